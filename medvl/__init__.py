"""medvl: medical vision-language systems composed from small pure functions.

The public names; each is loaded when it is first used, so `import medvl` is quick.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "ct.preprocess": ("CtConfig", "Volume", "preprocess", "to_hu"),
    "base.store": ("Store", "open_store"),
    "ct.ingest": ("preprocess_folder", "contact_sheet"),
    "phantoms.chests": ("draw",),
    "ct.reports": ("read_reports", "read_labels", "split_patients"),
    "hub.loading": ("load",),
    "hub.saving": ("save",),
    "hub.skeletons": ("init_skeleton", "checkpointed"),
    "hub.tokens": ("tokenizer", "train_bpe", "tokenize"),
    "components.encode": ("EncodeConfig", "encode_slices"),
    "components.compress": ("CompressConfig", "init_compress", "compress", "compress_stream"),
    "components.project": ("ProjectConfig", "init_project", "project"),
    "components.fuse": ("FuseConfig", "init_fuse", "fuse"),
    "components.text": ("TextConfig", "init_text", "encode_text"),
    "components.losses": ("clip_loss", "siglip_loss", "token_cross_entropy"),
    "weights.lazy": ("dense", "nbytes"),
    "weights.four_bit": ("QuantConfig", "quantize", "quantizer"),
    "weights.lora": ("LoraConfig", "Adapter", "init_lora", "apply_lora"),
    "weights.compose": ("stack_adapters", "compose_adapters", "fusion_error"),
    "hub.peft_files": ("read_adapter", "write_adapter"),
    "hub.hlora_files": ("read_hlora", "write_hlora"),
    "language.vlm": ("splice", "visual_rows", "answer_loss"),
    "language.sampling": ("Sampling",),
    "language.generate": ("generate",),
    "language.likelihood": ("score_options",),
    "adapters.retrieve": ("RetrieveConfig",),
    "adapters.embed_config": ("EmbedConfig",),
    "adapters.embedders": ("fit_local", "open_embedder"),
    "adapters.experts": ("open_experts", "ask"),
    "evaluation.answers": ("same_answer",),
    "training.gradients": ("value_and_grad", "cached_value_and_grad", "token_value_and_grad"),
    "ct.zero_shot": ("zero_shot", "evaluate_findings"),
    "systems.ct_clip.look": ("look",),
    "systems.slide_vqa.look": ("look_at_slide",),
    "hub.plugin_files": ("read_published", "published_config", "read_plugin", "write_plugin"),
    "systems.unified.model": ("open_unified",),
    "systems.unified.ask": ("ask_image",),
    "systems.unified.draw": ("draw_image",),
}
# Public names that differ from the names in their modules.
_LONG_NAMES = {
    "load": "load_skeleton",
    "save": "save_skeleton",
    "preprocess": "preprocess_scan",
    "draw": "draw_chests",
    "ask": "ask_experts",
    "look": "look_at_scan",
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'medvl' has no attribute {name!r}")
    return getattr(import_module(f"medvl.{_WHERE[name]}"), _LONG_NAMES.get(name, name))


def __dir__() -> list[str]:
    return __all__
