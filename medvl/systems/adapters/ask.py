"""A question to a run of adapters, or to a registry of adapters that has no run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from attrs import evolve, frozen

from medvl.adapters import experts, registry
from medvl.adapters.experts import Answer, Experts, FusionConfig, HoldConfig, Mode
from medvl.adapters.retrieve import RetrieveConfig
from medvl.base import config, files, processes
from medvl.evaluation import results
from medvl.language.chat import ChatConfig, check_no_ocr
from medvl.systems.adapters import record, run
from medvl.systems.system import Question


# Nothing of the model or its chat: a run answers with the type and template that it was trained with.
@frozen(kw_only=True)
class ChooseConfig:
    """Settings of one question to a run: how adapters are chosen for it, and made one."""

    retrieve: RetrieveConfig = RetrieveConfig()
    fusion: FusionConfig = FusionConfig()
    hold: HoldConfig = HoldConfig()


@frozen(kw_only=True)
class AskConfig:
    """Settings of one question to a registry. A run has its own dtype, chat and device."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["none", "nf4", "fp4"] = "none"
    chat: ChatConfig = ChatConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    fusion: FusionConfig = FusionConfig()
    hold: HoldConfig = HoldConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    root: str = ""  # where the registry's relative paths start; "" = as it says, or at its folder

    def __attrs_post_init__(self) -> None:
        check_no_ocr(self.chat, "adapters")


def ask(folder: Path, question: Question) -> str:
    """The answer of a trained run, and the adapters that gave it.

    Raises:
        ValueError: an unknown mode or adapter; as `experts.ask`.
    """
    _check_mode(run.registry_of(folder), question)
    model, params = run.load(folder)
    defaults = ChooseConfig(retrieve=model.cfg.retrieve, fusion=model.cfg.fusion, hold=model.cfg.pool.hold)
    # The settings of the run, then -k, then --set: what comes later wins.
    raw = _with_k(config.unstructure(defaults), question.k)
    cfg = config.structure(config.override(raw, question.overrides, "ask"), ChooseConfig, "ask")
    settings = evolve(model.cfg, fusion=cfg.fusion, pool=evolve(model.cfg.pool, hold=cfg.hold))
    pool = record.gather(evolve(model, cfg=settings), params)
    return _answer(pool, cfg.retrieve, question)


def ask_registry(path: files.PathLike, question: Question, base: str = "") -> str:
    """The answer of a registry's base model and adapters; as `ask`.

    Args:
        base: the model, if the registry does not say it, or it lies elsewhere.
    """
    _check_mode(path, question)
    # A registry has no record: what is not given here has the defaults of AskConfig.
    raw = config.override(_with_k({}, question.k), question.overrides, "ask")
    cfg = config.structure(raw, AskConfig, "ask")
    pool = experts.open_experts(
        path,
        base=base,
        root=cfg.root,
        cfg=cfg.chat,
        dtype=cfg.dtype,
        quantize=cfg.quantize,
        fusion=cfg.fusion,
        hold=cfg.hold,
        device=processes.choose_device(cfg.device),
    )
    return _answer(pool, cfg.retrieve, question)


def _check_mode(path: files.PathLike, question: Question) -> None:
    # Before a model is loaded, which takes minutes.
    names = [adapter.name for adapter in registry.read_registry(path).adapters]
    experts.check_mode(question.mode, question.adapter, names)


def _with_k(raw: dict[str, Any], k: int) -> dict[str, Any]:
    # -1 is "as the run says"; 0 is a number, no adapter at all.
    if k < 0:
        return raw
    return raw | {"retrieve": raw.get("retrieve", {}) | {"k": k}}


def _answer(pool: Experts, cfg: RetrieveConfig, question: Question) -> str:
    images: Sequence[str] = question.images
    answer = experts.ask_experts(
        pool,
        question.text,
        images,
        mode=cast(Mode, question.mode),
        cfg=cfg,
        own=question.adapter,
        max_tokens=question.max_tokens,
    )
    return f"{answer.text.strip()}\n\n{_table(answer)}"


def _table(answer: Answer) -> str:
    if not answer.adapters:
        return "no adapter: the bare model answered"
    return results.markdown_table(("Adapter", "Similarity", "Weight"), answer.adapters)
