"""The forms that a model has on its way: as it came, in 4 bits, with its adapter, merged."""

from collections.abc import Sequence
from pathlib import Path

from attrs import evolve
from torch import Generator

from medvl.base.tree import Tree
from medvl.hub.checkpoints import find_file
from medvl.language import chat, system
from medvl.language.chat import Dialogue, ModelConfig
from medvl.language.system import LanguageModel
from medvl.systems.system import VARIANTS, Variant
from medvl.systems.tune import run
from medvl.systems.tune.record import Config

_QUESTIONS = 5  # of the test split, that a bench asks


def bench_questions(cfg: Config) -> Sequence[Dialogue]:
    """The first questions of the test split."""
    run.prepare(cfg, lambda line: None)
    return run.read_split(cfg, "test")[:_QUESTIONS]


def calibration(cfg: Config) -> Sequence[Dialogue]:
    """The training split."""
    return run.read_split(cfg, "train")


def find_variant(cfg: Config, folder: Path, name: str) -> Variant:
    """A variant of an experiment's model.

    Args:
        folder: of the run; "lora" is the trained run itself, "int4" and "merged" are folders in it.
    Raises:
        ValueError: no such variant; one that is not made yet.
    """
    if name not in VARIANTS:
        raise ValueError(f"--variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    if name == "lora":
        if not (folder / "adapter").is_dir():
            raise ValueError(
                f"{folder}: there is no adapter; `invoke train` makes one where a stage trains lora/..."
            )
        base = _base_folder(cfg, folder)
        return Variant(open=lambda: run.load(folder, type(cfg)), folders=(base, folder / "adapter"))
    model = _model_of(cfg, folder, name)
    place = find_file(model.name, ("config.json",)).parent
    return Variant(open=lambda: _open(cfg, folder, model), folders=(place,))


def _model_of(cfg: Config, folder: Path, name: str) -> ModelConfig:
    if name in ("int4", "merged"):
        made_by = {"int4": "invoke quantize", "merged": "invoke export --as merged"}[name]
        if not (folder / name).is_dir():
            raise ValueError(f"{folder / name}: there is no such folder; `{made_by}` makes it")
        return ModelConfig(name=str(folder / name), dtype=cfg.model.dtype)
    base = evolve(cfg.model, name=str(_base_folder(cfg, folder)), config={}, quantize="none")
    return evolve(base, quantize="nf4") if name == "nf4" else base


def _base_folder(cfg: Config, folder: Path) -> Path:
    """Where the model is that adapters are for: that of the record, or of the run, which trained it."""
    if (folder / "model").is_dir():
        return folder / "model"
    if not cfg.model.name:
        raise ValueError(
            f"{folder / 'model'}: the model has no name and is not trained yet; `invoke train` makes it"
        )
    return find_file(cfg.model.name, ("config.json",)).parent


def _open(cfg: Config, folder: Path, model: ModelConfig) -> tuple[LanguageModel, Tree]:
    """A model without an adapter."""
    tok = chat.tokenizer_of(model, folder)
    gen = Generator().manual_seed(cfg.seed)
    opened, weights = chat.open_chat(model, cfg.chat, tok, gen, device=system.device_of(cfg.train))
    return LanguageModel(cfg=cfg, chat=opened, adapter=None, train=cfg.train), {"model": weights}
