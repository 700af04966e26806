"""`invoke export`: a trained run as a folder that other programs open, checked against the run before it is written."""

import json
from pathlib import Path
from typing import Any

from attrs import asdict, evolve

from medvl.base import config, files
from medvl.base.tree import Tree
from medvl.hub.checkpoints import check_new_folder, new_folder
from medvl.hub.peft_files import write_adapter
from medvl.language import chat, compare
from medvl.language.compare import Distance
from medvl.language.system import LanguageModel
from medvl.systems import card, run
from medvl.systems.quantize import CALIBRATION, choose_rounding, quantize_weights
from medvl.systems.system import Log, System
from medvl.weights import four_bit, int4, lazy, lora
from medvl.weights.lora import Adapter

KINDS = ("merged", "int4", "peft")
BASES = ("seen", "full")
FOUR_BIT = {kind: four_bit.QuantConfig(kind=kind) for kind in ("nf4", "fp4")}
BOUND = 0.05  # of what the adapter learned, that merging may lose


def export_run(
    run_path: str,
    out: files.PathLike,
    kind: str,
    *,
    base: str = "seen",
    quantize: str = "none",
    group: int = 0,
    bound: float = BOUND,
    log: Log = print,
) -> Path:
    """Write a run of a language system with an adapter as a folder for transformers ("merged", or "int4" in four bits
    as `invoke quantize` makes them) or for peft and vLLM ("peft"), with a model card; returns the folder, which is there
    whole or not at all. Systems with an `export` of their own have one form.

    A merged model is compared with the run on the conversations of its bench: logits of all answer tokens.

    Args:
        base: "seen" merges into the weights that the adapter was trained on (4-bit ones written out), "full" into
            those of the model as it came.
        quantize: "nf4" or "fp4" rounds the merged model to 4 bits again.
        group: of "int4", values that share a scale; 0 = as `quantize.choose_rounding`.
        bound: the share of what the adapter learned that may be lost, see `compare.Distance`.
    Raises:
        ValueError: no trained run, one without an adapter or with one that peft has no place for; a folder that is
            there already; a merged model that lost more than `bound`.
    """
    for name, value, choices in (
        ("as", kind, KINDS),
        ("base", base, BASES),
        ("quantize", quantize, ("none", *FOUR_BIT)),
    ):
        if value not in choices:
            raise ValueError(f"export: --{name} must be one of {', '.join(choices)}, got {value!r}")
    if kind == "int4" and quantize != "none":
        raise ValueError(f"export: --as int4 goes without --quantize, got {quantize!r}")
    folder = config.run_folder(run_path)
    system = run.find_system(config.system_of(folder))
    check_new_folder(out)
    if system.export is not None:
        if (kind, base, quantize) != ("merged", "seen", "none"):
            name = config.system_of(folder)
            raise ValueError(f"export: a run of {name} has one form; leave out --as, --base and --quantize")
        model, params = system.load(folder)
        with new_folder(out) as tmp:
            bases = system.export(model, params, folder, tmp)
            _describe(model.cfg, bases, folder, {"run": folder.name, "kind": "safetensors"}, tmp)
        log(f"written: {out}")
        return Path(out)
    if system.variant is None or system.bench_questions is None:
        raise ValueError(
            f"export: {folder} is a run of {config.system_of(folder)}, which has no model to export"
        )
    model, params = system.load(folder)
    if model.adapter is None:
        raise ValueError(
            f"export: {folder} has no adapter; its trained model is {folder / 'model'}, a folder of transformers"
        )
    adapter = evolve(model.adapter, factors=params["lora"])
    about: dict[str, Any] = {"run": folder.name, "kind": kind}
    merged: Tree = {}
    if kind != "peft":
        method = "awq" if kind == "int4" else quantize
        rounding = choose_rounding(model, group)
        merged, quantize, distance = merge(
            system, model, params, adapter, folder, base=base, quantize=method, rounding=rounding
        )
        words = _in_words(base, quantize)
        if not distance.lost <= bound:
            raise ValueError(
                f"export: merged onto {words}, the model loses {distance.lost:.1%} of what its adapter learned (largest "
                f"difference of two logits {distance.largest:.3g}, over {distance.n} tokens), more than the bound of "
                f"{bound:.1%}; --as peft loses nothing, and --as merged with --base seen and no --quantize the least"
            )
        log(f"merged onto {words}: {distance.lost:.2%} of what the adapter learned is lost")
        about |= {"base": base, "quantize": quantize, "distance": asdict(distance)}
    with new_folder(out) as tmp:
        if kind != "peft":
            chat.save_chat(model.chat, merged, tmp)
        else:
            write_adapter(adapter, tmp, base=_base_name(model, folder))
            chat.save_tokenizer(model.chat, tmp)
        _describe(model.cfg, {model.chat.skeleton.name: model.cfg.model.name}, folder, about, tmp)
    log(f"written: {out}")
    return Path(out)


def _describe(cfg: Any, bases: dict[str, str], folder: Path, about: dict[str, Any], out: Path) -> None:
    files.write_text(out / "README.md", card.model_card(cfg, bases, folder, about))
    files.write_text(out / "export.json", json.dumps(about, indent=1) + "\n")


def merge(
    system: System,
    model: LanguageModel,
    params: Tree,
    adapter: Adapter,
    folder: Path,
    *,
    base: str = "seen",
    quantize: str = "none",
    rounding: int4.Int4Config = int4.Int4Config(),
) -> tuple[Tree, str, Distance]:
    """The weights of a run with its adapter added in, how they were quantised, and how far they are from the run.

    Args:
        base, quantize: as of `export_run`; also "awq" or "round", which become "nf4" where they cannot be.
        rounding: of "awq" and "round".
    """
    assert system.variant is not None
    assert system.bench_questions is not None
    weights = params["model"]
    if base == "full":
        weights = system.variant(model.cfg, folder, "base").open()[1]["model"]
    merged: Tree = lora.merge_adapter(weights, adapter, dtype=model.chat.dtype).params
    # What four bits left out of the adapter's layers, as the file will hold it.
    merged = {name: lazy.dense(weight).to(model.chat.dtype) for name, weight in merged.items()}
    plain = evolve(model, adapter=None)
    if quantize in FOUR_BIT:
        merged = four_bit.quantize(merged, FOUR_BIT[quantize])
    elif quantize != "none":
        assert system.calibration is not None
        conversations = system.calibration(model.cfg)[:CALIBRATION]
        calibration = chat.encode_conversations(model.chat, conversations)
        merged, quantize, _ = quantize_weights(plain, merged, calibration, quantize, rounding)
    data = chat.encode_conversations(model.chat, system.bench_questions(model.cfg))
    distance = compare.compare(
        data, form=(plain, {"model": merged}), original=(model, params), without=(plain, params)
    )
    return merged, quantize, distance


def _base_name(model: LanguageModel, folder: Path) -> str:
    trained_here = folder / "model"
    return str(trained_here) if trained_here.is_dir() else model.cfg.model.name


def _in_words(base: str, quantize: str) -> str:
    onto = {"seen": "the weights that it was trained on", "full": "those of the model as it came"}[base]
    return onto + (f", in four bits by {quantize}" if quantize != "none" else "")
