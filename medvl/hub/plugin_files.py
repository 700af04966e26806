"""Plugins: what makes a language model understand images, or draw them, beside the base that all plugins share.

A plugin is an H-LoRA adapter, a projector of visual tokens, and rows or whole tables for the tokens of image
codes. Those of HealthGPT are read from its published files; medvl's own are folders with plugin.safetensors and
plugin.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from medvl.base import config as records
from medvl.base import files
from medvl.base.text import few
from medvl.base.tree import Tree, count_values, flatten, unflatten
from medvl.hub import hlora_files
from medvl.hub.checkpoints import (
    ANY,
    Entry,
    Shape,
    find_file,
    list_faults,
    new_folder,
    open_weights,
    read_finite,
    read_json,
    save_finite,
    shapes_of,
)
from medvl.hub.peft_files import PREFIX, check_fit
from medvl.hub.skeletons import Skeleton, table_names
from medvl.weights import lora
from medvl.weights.lora import Adapter

# {HealthGPT's names of the projector's layers: ours}; number 1 is the GELU between them
_PROJECTOR = {"model.mm_projector.0": "up", "model.mm_projector.2": "down"}
_MARKS = 3  # tokens beside the codes: start, end, new line


@frozen(kw_only=True)
class PluginConfig:
    """What a plugin is for, and the base that it was trained on."""

    task: Literal["understand", "draw"]
    level: int  # of the hidden states of the vision tower: -2 = all blocks but the last, 1 = the first block
    rank: int  # of all experts together
    alpha: float
    experts: int = 4  # 0 = LoRA
    base: str  # name on the hub, or folder
    revision: str = ""
    template: str  # a name in `templates.TEMPLATES`
    tokens: int  # of the base's tokenizer
    codes: int = 8192  # image codes that were added to it, 0 = none
    bos: bool = False  # whether the tokenizer puts its start token before a text

    def __attrs_post_init__(self) -> None:
        if min(self.rank, self.tokens) < 1 or min(self.codes, self.experts) < 0 or not self.alpha > 0:
            raise ValueError(f"plugin: rank, alpha and tokens must be positive, got {self}")
        if self.rank % max(1, self.experts):
            raise ValueError(
                f"plugin: rank is that of all experts together, so experts must divide it, got rank {self.rank} "
                f"and {self.experts} experts"
            )

    @property
    def vocabulary(self) -> int:
        """Rows of the token table and of the head, image codes included."""
        return self.tokens + self.added

    @property
    def added(self) -> int:
        """Tokens that were added to the base's tokenizer."""
        return self.codes + _MARKS if self.codes else 0

    @property
    def scale(self) -> float:
        """What stands before B diag(gates) A in every layer."""
        return self.alpha / self.rank * max(1, self.experts)


_M3 = PluginConfig(
    task="understand",
    level=-2,
    rank=64,
    alpha=128,
    base="microsoft/Phi-3-mini-4k-instruct",
    template="phi3",
    tokens=32011,
)
_L14 = evolve(_M3, rank=32, alpha=64, base="microsoft/phi-4", template="phi4", tokens=100352)
# Of the last one no tokens were added to the base's.
_XL32 = evolve(_L14, base="Qwen/Qwen2.5-32B-Instruct", template="qwen2", tokens=151665, codes=0)
PUBLISHED = {
    "M3": (_M3, evolve(_M3, task="draw", level=1, rank=256, alpha=512)),
    "L14": (_L14,),
    "XL32": (_XL32,),
}
"""The plugins that HealthGPT published."""


@frozen(kw_only=True, eq=False)
class Plugin:
    """What a plugin brings: its adapter, its projector, and rows or tables for image codes."""

    config: PluginConfig
    projector: Tree = field(repr=False)  # as of `components.project`
    adapter: Adapter
    # {"embed", "head"}: [added, d], behind the base's rows
    rows: dict[str, Tensor] | None = field(default=None, repr=False)
    # {"embed", "head"}: [vocabulary, d], in place of the base's
    tables: dict[str, Tensor] = field(factory=dict, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.config.task == "draw" and "head" not in {**self.tables, **(self.rows or {})}:
            raise ValueError(
                "plugin: one to draw must have rows or a head for its image codes, or else all of them are equally "
                "likely; found none (HealthGPT's are in fusion_layer_weights.bin)"
            )


def published_config(variant: str, task: str) -> PluginConfig:
    """The record of one of HealthGPT's plugins.

    Raises:
        ValueError: a variant or a plugin that was never published.
    """
    if variant not in PUBLISHED:
        raise ValueError(f"plugin: the variant must be one of {', '.join(PUBLISHED)}, got {variant!r}")
    for config in PUBLISHED[variant]:
        if config.task == task:
            return config
    published = " and ".join(repr(config.task) for config in PUBLISHED[variant])
    raise ValueError(f"plugin: of {variant} only the plugin for {published} was published, not {task!r}")


def read_published(
    path: files.PathLike,
    fusion: files.PathLike | None = None,
    *,
    config: PluginConfig,
    skeleton: Skeleton,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Plugin, str]:
    """A plugin in HealthGPT's files, and a sentence about what they hold.

    Args:
        path: H-LoRA and projector, such as com_hlora_weights.bin; where it holds a token table and a head,
            these are used.
        fusion: fusion_layer_weights.bin, the token table and the head; they go before those of `path`, as they
            do in HealthGPT.
        config: `published_config("M3", "draw")`, or a record of your own; the files say none of it.
        skeleton: of the base.
        dtype: None = the file's.
    Returns:
        plugin with weights in `dtype` on `device`, and the report.
    Raises:
        ValueError: keys that are missing, unexpected or of another shape (all are named), a fusion file alone,
            numbers that are not finite, a broken file.
    """
    path = Path(path)
    entries = open_published(path)
    shapes, tables = _published_shapes(config, skeleton)
    _check_tensors(entries, shapes, tables, path, config)
    adapter, rest = hlora_files.read_entries(
        entries, path, config.rank, config.alpha, config.experts, dtype, device
    )
    layers = f"H-LoRA of {len(adapter.factors)} layers ({count_values(adapter.factors):,} numbers)"
    source = "none, the base's are used"
    if fusion is not None:
        path = Path(fusion)
        fused = hlora_files.open_file(path, "read_published")
        _check_tensors(fused, tables, {}, path, config)
        for key, entry in fused.items():
            rest[key.removeprefix(PREFIX)] = read_finite(entry, key, path, dtype, device)
    names = table_names(skeleton)
    held = {part: rest.pop(name) for part, name in names.items() if name in rest}
    if held:
        source = f"{' and '.join(held)} of {path.name}"
    projector: Tree = {}
    for theirs, ours in _PROJECTOR.items():
        projector[ours] = {part: rest[f"{theirs}.{part}"] for part in ("weight", "bias")}
    report = f"{layers}, projector ({count_values(projector):,} numbers), token tables: {source}"
    return Plugin(config=config, projector=projector, adapter=adapter, tables=held), report


def open_published(path: files.PathLike) -> dict[str, Entry]:
    """The tensors of the file with a plugin's H-LoRA, not yet read; the base need not be known.

    Raises:
        ValueError: no file, a broken one, or a fusion file.
    """
    entries = hlora_files.open_file(Path(path), "read_published")
    if not any(".lora_" in key for key in entries):
        raise ValueError(
            f"read_published: {path} must hold H-LoRA layers, found only {few([*entries])}; a fusion file (token "
            "table and head) is given as fusion, beside the plugin's file"
        )
    return entries


def _published_shapes(config: PluginConfig, skeleton: Skeleton) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """({name: shape} of what a plugin's file must hold, the same of the token tables, which it may hold)."""
    shapes = hlora_files.hlora_shapes(skeleton, config.rank, config.experts)
    names = table_names(skeleton)
    width = skeleton.module.get_parameter(names["embed"]).shape[1]
    up, down = _PROJECTOR
    # Its input is as wide as the vision tower, which the base does not know.
    shapes[f"{up}.weight"] = (width, ANY)
    shapes[f"{down}.weight"] = (width, width)
    shapes[f"{up}.bias"] = shapes[f"{down}.bias"] = (width,)
    return shapes, dict.fromkeys(names.values(), (config.vocabulary, width))


def _check_tensors(
    entries: Mapping[str, Entry],
    needed: Mapping[str, Shape],
    optional: Mapping[str, Shape],
    path: Path,
    config: PluginConfig,
) -> None:
    shapes = {key.removeprefix(PREFIX): entry.shape for key, entry in entries.items()}
    if faults := list_faults(shapes, needed, optional):
        raise ValueError(
            f"read_published: {path} must hold weights to {config.task}, of rank {config.rank} and "
            f"{config.vocabulary} tokens, for {config.base}: {faults}; choose the variant and task that the "
            "file is of, and their base"
        )


def write_plugin(plugin: Plugin, folder: files.PathLike) -> None:
    """Write plugin.safetensors and plugin.json into a new folder, which is there whole or not at all.

    Raises:
        ValueError: the folder exists and is not empty, parts that do not fit the plugin's record, numbers that
            are not finite.
    """
    where, config, adapter = f"write_plugin: {folder}", plugin.config, plugin.adapter
    scales, kinds = {*adapter.scale.values()}, {*adapter.kinds.values()}
    if scales != {config.scale} or kinds != {"linear"} or adapter.gate or adapter.full:
        raise ValueError(
            f"{where}: the adapter must be of linear layers with the record's scale {config.scale}, without gates and "
            f"whole tensors, got {adapter} of {few(sorted(kinds))} layers with scale {few(sorted(scales))}"
        )
    parts = {
        "projector": plugin.projector,
        "adapter": adapter.factors,
        "rows": plugin.rows or {},
        "tables": plugin.tables,
    }
    tensors = flatten(parts)
    _check_parts({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, where)
    with new_folder(folder) as tmp:
        save_finite(tensors, tmp / "plugin.safetensors", where)
        text = json.dumps(records.unstructure(config), indent=2)
        files.write_text(tmp / "plugin.json", text + "\n")


def read_plugin_config(name: files.PathLike) -> PluginConfig:
    """The record of a plugin in a folder, or of a name on the hub."""
    record = find_file(str(name), ("plugin.json",))
    return records.structure(read_json(record), PluginConfig, source=str(record))


def read_plugin(
    name: files.PathLike, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Plugin:
    """A plugin that `write_plugin` wrote: a folder, or a name on the hub.

    Raises:
        ValueError: nothing there, a broken file, a record or tensors that are none of a plugin, numbers that
            are not finite.
    """
    config = read_plugin_config(name)
    path = find_file(str(name), ("plugin.safetensors",))
    entries = open_weights(path, str(name))
    _check_parts(shapes_of(entries), config, f"read_plugin: {path}")
    parts = unflatten({key: read_finite(entry, key, path, dtype, device) for key, entry in entries.items()})
    factors = parts["adapter"]
    adapter = Adapter(
        factors=factors,
        scale=dict.fromkeys(factors, config.scale),
        kinds=dict.fromkeys(factors, "linear"),
        name=Path(name).name,
    )
    return Plugin(
        config=config,
        projector=parts["projector"],
        adapter=adapter,
        rows=parts.get("rows"),
        tables=parts.get("tables", {}),
    )


def _check_parts(shapes: Mapping[str, Shape], config: PluginConfig, where: str) -> None:
    """The tensors of a plugin by their names in plugin.safetensors must be those that its record says."""
    needed: dict[str, Shape] = {
        "projector/up/weight": (ANY, ANY),
        "projector/up/bias": (ANY,),
        "projector/down/weight": (ANY, ANY),
        "projector/down/bias": (ANY,),
    }
    # Which layers these are the base knows (`check_base`).
    modules = {name.split("/")[1] for name in shapes if name.startswith("adapter/") and name.count("/") == 2}
    for module in sorted(modules) or ["LAYER"]:
        needed[f"adapter/{module}/a"] = (config.rank, ANY)
        needed[f"adapter/{module}/b"] = (ANY, config.rank)
        if config.experts:
            needed[f"adapter/{module}/router"] = (config.experts, ANY)
    rows = {f"rows/{part}": (config.added, ANY) for part in ("embed", "head")}
    tables = {f"tables/{part}": (config.vocabulary, ANY) for part in ("embed", "head")}
    # Rows are of both, and not beside whole tables.
    has_rows = any(name in rows for name in shapes)
    faults = list_faults(shapes, needed | rows, {}) if has_rows else list_faults(shapes, needed, tables)
    if faults:
        raise ValueError(
            f"{where}: must hold a projector, an adapter of rank {config.rank} with {config.experts} experts, and rows "
            f"or tables of {config.vocabulary} tokens as its record says: {faults}"
        )


def check_base(
    plugin: Plugin, skeleton: Skeleton, tok: Any, *, base: str = "", template: str | None = None
) -> None:
    """A plugin must have been trained on this base, with this tokenizer and template.

    Args:
        tok: the base's tokenizer, with image codes or without.
        base: the base's name on the hub; folders have names of their own, and are not compared.
        template: the chat template's name; None = not known.
    Raises:
        ValueError: it was not.
    """
    config = plugin.config
    where = f"plugin to {config.task}, trained on {config.base}"
    names = (config.base, base)
    if base and base != config.base and not any(Path(name).exists() for name in names):
        raise ValueError(
            f"{where}: the base must be that, found {base}; load it, or take a plugin for {base}"
        )
    layers = lora.adaptable_layers(skeleton)
    for module, factors in plugin.adapter.factors.items():
        check_fit(skeleton, layers, module, "linear", factors["a"].shape, factors["b"].shape, where)
    rows, width = skeleton.module.get_parameter(table_names(skeleton)["embed"]).shape
    tables = [plugin.projector["down"]["bias"], *(plugin.rows or {}).values(), *plugin.tables.values()]
    widths = sorted({tensor.shape[-1] for tensor in tables})
    if widths != [width] or rows < config.tokens:
        raise ValueError(
            f"{where}: the base must have a token table of {config.tokens} rows or more, as wide as the plugin's "
            f"projector and rows {widths}, found [{rows}, {width}]"
        )
    bos = bool(tok("a")["input_ids"][:1] == [tok.bos_token_id])
    if len(tok) not in (config.tokens, config.vocabulary) or bos != config.bos:
        raise ValueError(
            f"{where}: its tokenizer has {config.tokens} tokens ({config.vocabulary} with image codes) and "
            f"{'a' if config.bos else 'no'} start token before a text, found {len(tok)} and "
            f"{'a' if bos else 'no'} start token; take the tokenizer of the revision that it was trained with"
        )
    if template is not None and template != config.template:
        raise ValueError(
            f"{where}: it was trained with the template {config.template!r}, found {template!r}; set "
            f"chat.template = {config.template!r}"
        )
