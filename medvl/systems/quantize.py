"""`invoke quantize`: the model of an experiment in four bits, as a folder that vLLM and transformers open."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medvl.base import files
from medvl.base.tree import Tree
from medvl.hub.checkpoints import check_new_folder
from medvl.language import awq, chat, measure
from medvl.language.chat import Encoded
from medvl.language.system import LanguageModel
from medvl.systems import run
from medvl.systems.system import Log
from medvl.weights import four_bit, int4

_log = logging.getLogger("medvl")
METHODS = ("awq", "round", "nf4")
CALIBRATION = 128  # training conversations for "awq"


def quantize(
    exp: str,
    overrides: Sequence[str] = (),
    method: str = "awq",
    *,
    variant: str = "base",
    samples: int = CALIBRATION,
    group: int = 0,
    log: Log = print,
) -> Path:
    """Write `RUN/int4`, the model with the matrices of its decoder in four bits, and `RUN/quantization_info.json`.

    Where a model cannot be quantised by "awq" or "round", it becomes NF4; a warning and the file say why.

    Args:
        method: "awq" finds factors on training conversations before it rounds, "round" rounds to whole numbers of four
            bits, "nf4" takes the codes of QLoRA.
        variant: "base", or "merged" where `invoke export` wrote it into the run folder.
        samples: training conversations for "awq".
        group: values that share a scale: 32, 64, 128, or -1 for a row; 0 = as `choose_rounding`.
    Raises:
        ValueError: no such experiment, method or variant; a folder that is there already.
    """
    if method not in METHODS:
        raise ValueError(f"quantize: --method must be one of {', '.join(METHODS)}, got {method!r}")
    if variant not in ("base", "merged"):
        raise ValueError(f"quantize: --variant must be base or merged, got {variant!r}")
    if group:
        int4.Int4Config(group=group)  # refused before a model is read
    cfg, folder = run.resolve(exp, overrides)
    system = run.find_system(cfg.system)
    if system.variant is None or system.calibration is None:
        raise ValueError(f"quantize: {exp} is a {cfg.system} experiment, which has no model to quantise")
    target = folder / "int4"
    check_new_folder(target)
    run.check_base(cfg, folder)
    model, params = system.variant(cfg, folder, variant).open()
    start = time.monotonic()
    data = None
    if method == "awq":
        system.prepare(cfg, log)
        data = chat.encode_conversations(model.chat, system.calibration(cfg)[:samples])
    rounding = choose_rounding(model, group)
    quantized, used, reason = quantize_weights(model, params["model"], data, method, rounding)
    chat.save_chat(model.chat, quantized, target)
    before = sum(weight.numel() * weight.element_size() for weight in params["model"].values())
    # Without the tokenizer and other files, which are not among the bytes before.
    after = sum(size for name, size in measure.file_sizes(target).items() if name.endswith(".safetensors"))
    info = {
        "asked": method,
        "method": used,
        "reason": reason,
        "variant": variant,
        "group": rounding.group,
        "samples": len(data.samples) if data is not None else 0,
        "seconds": time.monotonic() - start,
        "bytes_before": before,
        "bytes_after": after,
        "share": after / before,
    }
    files.write_text(folder / "quantization_info.json", json.dumps(info, indent=1) + "\n")
    log(f"{used}: {before / 1e9:.3f} -> {after / 1e9:.3f} GB ({after / before:.0%}); written: {target}")
    return target


def choose_rounding(model: LanguageModel, group: int = 0) -> int4.Int4Config:
    """Groups of so many values, or, for 0, of 128, or fewer where that does not divide the rows of the decoder."""
    if group:
        return int4.Int4Config(group=group)
    config: Any = model.chat.skeleton.module.config
    decoder = config.get_text_config()
    heads = decoder.num_attention_heads
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // heads
    rows = (decoder.hidden_size, decoder.intermediate_size, heads * head_dim)
    return int4.Int4Config(
        group=next((size for size in (128, 64, 32) if not any(row % size for row in rows)), -1)
    )


def quantize_weights(
    model: LanguageModel,
    weights: Tree,
    data: Encoded | None,
    method: str,
    rounding: int4.Int4Config = int4.Int4Config(),
) -> tuple[dict[str, Any], str, str]:
    """(the weights in four bits, the method that made them, why it is not the one that was asked for).

    Args:
        data: calibration conversations, for "awq".
    """
    try:
        if method == "awq":
            assert data is not None
            return awq.quantize_awq(model.chat, weights, data, awq.AwqConfig(rounding=rounding))[0], "awq", ""
        if method == "round":
            return int4.quantize(weights, rounding), "round", ""
        reason = ""
    except (ValueError, torch.OutOfMemoryError) as e:
        reason = " ".join(str(e).split())
        _log.warning("quantize: not by %s, but by nf4: %s", method, reason)
    return four_bit.quantize(weights), "nf4", reason
