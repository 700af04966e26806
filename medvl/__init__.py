"""medvl: medical vision-language systems composed from small pure functions.

The public names; each is loaded when it is first used, so `import medvl` is quick.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "data.ct": ("CtConfig", "Volume", "preprocess", "to_hu"),
    "data.store": ("Store", "open_store"),
    "data.ingest": ("preprocess_folder", "contact_sheet"),
    "data.phantoms": ("draw",),
    "data.reports": ("read_reports", "read_labels", "split_patients"),
    "hub": ("load", "save", "init_skeleton", "checkpointed"),
    "tokens": ("tokenizer", "train_bpe", "tokenize"),
    "encode": ("EncodeConfig", "encode_slices"),
    "compressor": ("CompressConfig", "init_compress", "compress", "compress_stream"),
    "projector": ("ProjectConfig", "init_project", "project"),
    "fusion": ("FuseConfig", "init_fuse", "fuse"),
    "text": ("TextConfig", "init_text", "encode_text"),
    "losses": ("clip_loss", "siglip_loss", "token_cross_entropy"),
    "weights": ("dense", "nbytes"),
    "quant": ("QuantConfig", "quantize", "quantizer"),
    "lora": ("LoraConfig", "Adapter", "init_lora", "apply_lora"),
    "compose": ("stack_adapters", "compose_adapters", "fusion_error"),
    "adapter_files": ("read_adapter", "write_adapter"),
    "hlora_files": ("read_hlora", "write_hlora"),
    "vlm": ("splice", "visual_rows", "answer_loss"),
    "generation": ("Sampling", "generate", "score_options"),
    "retrieve": ("RetrieveConfig",),
    "embed": ("EmbedConfig", "fit_local", "open_embedder"),
    "experts": ("open_experts", "ask"),
    "answers": ("same_answer",),
    "train": ("value_and_grad", "cached_value_and_grad", "token_value_and_grad"),
    "evaluate": ("zero_shot", "evaluate_findings"),
    "systems.ct_clip_run": ("look",),
    "systems.slide_vqa_look": ("look_at_slide",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'medvl' has no attribute {name!r}")
    return getattr(import_module(f"medvl.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
