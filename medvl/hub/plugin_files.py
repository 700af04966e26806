"""Plugins: what makes a language model understand images, or draw them, beside the base that all plugins share.

A plugin is an H-LoRA adapter, a projector of visual tokens, and rows or whole tables for the tokens of image
codes. Those of HealthGPT are read from its published files; medvl's own are folders with plugin.safetensors and
plugin.json.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from medvl.base import config as records
from medvl.base import files
from medvl.base.text import few
from medvl.base.tree import Tree, count_values, flatten, unflatten
from medvl.hub import hlora_files
from medvl.hub.checkpoints import (
    Entry,
    find_file,
    new_folder,
    open_weights,
    read_finite,
    read_json,
    save_finite,
)
from medvl.hub.peft_files import PREFIX, check_fit
from medvl.hub.skeletons import Skeleton, table_names
from medvl.weights import lora
from medvl.weights.lora import Adapter, LoraConfig

# {HealthGPT's names of the projector's layers: ours}; number 1 is the GELU between them
_PROJECTOR = {"model.mm_projector.0": "up", "model.mm_projector.2": "down"}
# The tensors of plugin.safetensors
_KEY = re.compile(r"projector/(up|down)/(weight|bias)|adapter/[^/]+/(a|b|router)|(rows|tables)/(embed|head)")
_ANY = -1  # of a shape: whatever the file has
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


_PHI3: dict[str, Any] = {
    "base": "microsoft/Phi-3-mini-4k-instruct",
    "template": "phi3",
    "tokens": 32011,
}
_PHI4: dict[str, Any] = {"base": "microsoft/phi-4", "template": "phi4", "tokens": 100352}
_QWEN: dict[str, Any] = {
    "base": "Qwen/Qwen2.5-32B-Instruct",
    "template": "qwen2",
    "tokens": 151665,
    "codes": 0,  # its script adds none
}
_SMALL: dict[str, Any] = {"task": "understand", "level": -2, "rank": 32, "alpha": 64}
PUBLISHED = {
    "M3": (
        PluginConfig(task="understand", level=-2, rank=64, alpha=128, **_PHI3),
        PluginConfig(task="draw", level=1, rank=256, alpha=512, **_PHI3),
    ),
    "L14": (PluginConfig(**_SMALL, **_PHI4),),
    "XL32": (PluginConfig(**_SMALL, **_QWEN),),
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

    @property
    def task(self) -> str:
        return self.config.task

    @property
    def level(self) -> int:
        return self.config.level


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
    published = few([config.task for config in PUBLISHED[variant]])
    raise ValueError(f"plugin: of {variant} only the plugin for {published!r} was published, not {task!r}")


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
    entries = hlora_files.open_file(path, "read_published")
    shapes, tables = _published_shapes(config, skeleton)
    _check_keys(entries, shapes, tables, path, config)
    adapter, rest = hlora_files.read_entries(
        *(entries, path, config.rank, config.alpha, config.experts, skeleton, dtype, device)
    )
    layers = f"H-LoRA of {len(adapter.factors)} layers ({count_values(adapter.factors):,} numbers)"
    source = "none, the base's are used"
    if fusion is not None:
        path = Path(fusion)
        fused = hlora_files.open_file(path, "read_published")
        _check_keys(fused, tables, {}, path, config)
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


def _published_shapes(
    config: PluginConfig, skeleton: Skeleton
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """({name: shape} of what a plugin's file must hold, the same of the token tables, which it may hold)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in lora.target_layers(LoraConfig(pattern="all-linear"), skeleton):
        out, into = skeleton.module.get_parameter(f"{module}.weight").shape
        shapes[f"{module}.lora_route.weight"] = (config.experts, into)
        shapes[f"{module}.lora_A.weight"] = (config.rank, into)
        shapes[f"{module}.lora_B.weight"] = (out, config.rank)
    names = table_names(skeleton)
    width = skeleton.module.get_parameter(names["embed"]).shape[1]
    up, down = _PROJECTOR
    # Its input is as wide as the vision tower, which the base does not know.
    shapes[f"{up}.weight"] = (width, _ANY)
    shapes[f"{down}.weight"] = (width, width)
    shapes[f"{up}.bias"] = shapes[f"{down}.bias"] = (width,)
    return shapes, dict.fromkeys(names.values(), (config.vocabulary, width))


def _check_keys(
    entries: Mapping[str, Entry],
    needed: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    path: Path,
    config: PluginConfig,
) -> None:
    """Raise one error that names all keys that are missing, unexpected, or of another shape."""
    shapes = {key.removeprefix(PREFIX): entry.shape for key, entry in entries.items()}
    if optional and shapes.keys() <= optional.keys():
        raise ValueError(
            f"read_published: {path} must hold H-LoRA layers, found only {few([*shapes])}; give it as fusion, "
            "beside the plugin's file"
        )
    known = {**needed, **optional}
    missing = [name for name in needed if name not in shapes]
    unexpected = [name for name in shapes if name not in known]
    others = []
    for name, shape in shapes.items():
        wanted = known.get(name, shape)
        fits = len(shape) == len(wanted) and all(w in (n, _ANY) for n, w in zip(shape, wanted, strict=True))
        if not fits:
            sizes = ["any" if w == _ANY else w for w in wanted]
            others.append(f"{name} {list(shape)} for {sizes}")
    if missing or unexpected or others:
        raise ValueError(
            f"read_published: {path} must hold weights to {config.task}, of rank {config.rank} and "
            f"{config.vocabulary} tokens, for {config.base}: missing {few(missing)}; unexpected "
            f"{few(unexpected)}; of another shape {few(others)}; choose the variant and task that the file is "
            "of, and their base"
        )


def write_plugin(plugin: Plugin, folder: files.PathLike) -> None:
    """Write plugin.safetensors and plugin.json into a new folder, which is there whole or not at all.

    Raises:
        ValueError: the folder exists and is not empty, parts that do not fit the plugin's record, numbers that
            are not finite.
    """
    _check_plugin(plugin, f"write_plugin: {folder}")
    parts = {
        "projector": plugin.projector,
        "adapter": plugin.adapter.factors,
        "rows": plugin.rows or {},
        "tables": plugin.tables,
    }
    with new_folder(folder) as tmp:
        save_finite(flatten(parts), tmp / "plugin.safetensors", f"write_plugin: {folder}")
        text = json.dumps(records.unstructure(plugin.config), indent=2)
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
    if unexpected := [key for key in entries if not _KEY.fullmatch(key)]:
        raise ValueError(f"read_plugin: {path} holds {few(unexpected)}, which is no part of a plugin")
    tensors = {key: read_finite(entry, key, path, dtype, device) for key, entry in entries.items()}
    parts = unflatten(tensors)
    factors = parts.get("adapter", {})
    adapter = Adapter(
        factors=factors,
        scale=dict.fromkeys(factors, config.scale),
        kinds=dict.fromkeys(factors, "linear"),
        name=Path(name).name,
    )
    plugin = Plugin(
        config=config,
        projector=parts.get("projector", {}),
        adapter=adapter,
        rows=parts.get("rows"),
        tables=parts.get("tables", {}),
    )
    _check_plugin(plugin, f"read_plugin: {path}")
    return plugin


def _check_plugin(plugin: Plugin, where: str) -> None:
    """The parts of a plugin must be those that its record says."""
    config, adapter = plugin.config, plugin.adapter
    parts = {"a", "b", "router"} if config.experts else {"a", "b"}
    for module, factors in adapter.factors.items():
        experts = len(factors["router"]) if "router" in factors else 0
        is_linear = adapter.kinds[module] == "linear" and adapter.scale[module] == config.scale
        fits = factors.keys() == parts and is_linear and experts == config.experts
        if not fits or len(factors["a"]) != config.rank or factors["b"].shape[1:] != (config.rank,):
            sizes = {part: list(t.shape) for part, t in factors.items()}
            raise ValueError(
                f"{where}: {module} must be a linear layer with {', '.join(sorted(parts))} of rank {config.rank}, "
                f"{config.experts} experts and scale {config.scale}, got {sizes} and scale {adapter.scale[module]}"
            )
    if not adapter.factors or adapter.gate or adapter.full:
        raise ValueError(f"{where}: the adapter must have layers, and neither gates nor whole tensors")
    projector = flatten(plugin.projector)
    if projector.keys() != {"up/weight", "up/bias", "down/weight", "down/bias"}:
        raise ValueError(
            f"{where}: the projector must be that of components.project, got {few([*projector])}"
        )
    width = len(projector["down/bias"])
    for what, tensors, n in (
        ("rows", plugin.rows, config.added),
        ("tables", plugin.tables, config.vocabulary),
    ):
        for part, tensor in (tensors or {}).items():
            if part not in ("embed", "head") or tensor.shape != (n, width) or not config.codes:
                raise ValueError(
                    f"{where}: {what} must be embed and head, [{n}, {width}] each, got {part} {list(tensor.shape)}"
                )
    if plugin.rows is not None and (len(plugin.rows) < 2 or plugin.tables):
        raise ValueError(f"{where}: rows must be of both embed and head, and not beside whole tables")


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
    if width != len(plugin.projector["down"]["bias"]) or rows < config.tokens:
        raise ValueError(
            f"{where}: the base must have a token table of {config.tokens} rows or more, as wide as the "
            f"projector's output {len(plugin.projector['down']['bias'])}, found [{rows}, {width}]"
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
