"""The model of unified: one base in memory that understands images and draws them, each through a part of its own.

Both tasks share the base and CLIP's tower. Of its own a task has an adapter, a projector and a level of the
tower; to draw is to write the codes of a VQ model, tokens whose rows stand behind those of the base.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from PIL import Image
from torch import Generator, Tensor

from medvl.base import config, processes
from medvl.base.files import PathLike
from medvl.base.text import few
from medvl.base.tree import Tree, flatten, map_leaves, merge_trees, unflatten
from medvl.components.project import ProjectConfig, init_project
from medvl.components.vq import VqConfig
from medvl.hub import loading, skeletons, tokens
from medvl.hub.checkpoints import find_optional_file, read_json
from medvl.hub.plugin_files import Plugin, PluginConfig, check_base, read_plugin, read_plugin_config
from medvl.hub.tokens import CodeTokens
from medvl.hub.vqgan_files import open_vqgan
from medvl.language import chat, clip_vision, images, system, vision
from medvl.language.chat import Chat, ChatConfig, ModelConfig
from medvl.language.conversations import Conversation
from medvl.language.system import LanguageModel, Tasks
from medvl.language.templates import PLACEHOLDERS, Placeholder
from medvl.systems.unified.record import CLIP, Config, TowerConfig
from medvl.training import stages
from medvl.weights import extended, lora, shards

_PUBLISHED = "of HealthGPT's, M3 has both, L14 and XL32 only understand; take another, or train one"
Vq = tuple[VqConfig, dict[str, Tensor]]  # a VQ model and its weights, which are frozen


@frozen(kw_only=True, eq=False)
class Unified:
    """Everything but the weights of base, tower, adapters, projectors and rows."""

    tasks: Tasks  # "understand", "draw" or both
    codes: CodeTokens | None  # None: nothing can be drawn
    vq: Vq | None
    cfg: Any = None  # the record of a run

    def task(self, name: str) -> LanguageModel:
        """The language model of a task.

        Raises:
            ValueError: there is none.
        """
        if name not in self.tasks.models:
            raise ValueError(
                f"this model has no plugin to {name}, only to {' and '.join(self.tasks.models)}; {_PUBLISHED}"
            )
        return self.tasks.models[name]


def picture_shape(cfg: VqConfig) -> tuple[int, int]:
    """Rows and columns of the codes of a picture, which is a square of `cfg.resolution` pixels."""
    side = cfg.resolution // cfg.stride
    return side, side


# From a record ----------------------------------------------------------------------------------------------
def init_model(
    cfg: Config,
    folder: Path,
    vq: Vq | None,
    texts: Sequence[str] = (),
    *,
    device: torch.device = torch.device("cpu"),
) -> tuple[Unified, Tree]:
    """The model and its starting weights {"model", "tower", TASK: {"projector", "lora"}, "rows"}.

    Args:
        vq: the trained VQ model; None = nothing is drawn.
        texts, device: as of `system.init_model`.
    Raises:
        ValueError: a plugin to start from that does not fit the record, the base or the VQ model.
    """
    starts = {task: read_plugin(cfg.task(task).start) for task in cfg.tasks if cfg.task(task).start}
    number = max((plugin.config.codes for plugin in starts.values()), default=0)
    if vq is not None:
        number = vq[0].codes
    adapters = dict[str, lora.Adapter | None]()
    made = dict[str, Any](codes=None, keep=0)

    def add_parts(opened: Chat, params: Tree, gen: Generator) -> tuple[Chat, Tree]:
        if number:
            opened, made["codes"], rows = add_codes(opened, params["model"], number)
            made["keep"] = made["codes"].start
            params = params | {"rows": map_leaves(lambda t: t.float().clone(), rows)}
        for task, plugin in starts.items():
            _check_start(cfg, task, plugin, opened, made["codes"])
        params = _start_tables(params, starts, skeletons.table_names(opened.skeleton), made["keep"])
        levels = {task: cfg.task(task).level for task in cfg.tasks}
        made["towers"], made["images"], tower = open_tower(cfg.tower, levels, opened.dtype, device, gen)
        params = params | {"tower": tower}
        width = params["model"][chat.token_table(opened)].shape[1]
        for task, skeleton in made["towers"].items():
            adapter: lora.Adapter | None
            place, settings = cfg.adapter(task)
            if task in starts:
                projector = starts[task].projector
                adapter = evolve(starts[task].adapter, dropout=settings.dropout)
            else:
                sizes = ProjectConfig(inputs=skeleton.config["hidden_size"], hidden=width, outputs=width)
                projector = init_project(sizes, gen)
                if cfg.shared and adapters:
                    adapter = adapters["understand"]  # made for both
                else:
                    adapter = stages.init_trained_adapter(
                        cfg.train, settings, opened.skeleton, gen, device, place=place
                    )
            own = {f"{task}/projector": projector, place: adapter.factors if adapter is not None else {}}
            params = merge_trees(params, map_leaves(lambda t: t.to(device), unflatten(own)))
            adapters[task] = adapter
        return opened, params

    model, params = system.init_model(cfg, folder, texts, device=device, lower=False, extend=add_parts)
    tasks = _join_tasks(model, params, adapters, made["towers"], made["images"], made["keep"])
    return Unified(tasks=tasks, codes=made["codes"], vq=vq, cfg=cfg), params


def _join_tasks(
    model: LanguageModel,
    params: Tree,
    adapters: Mapping[str, lora.Adapter | None],
    towers: Mapping[str, skeletons.Skeleton],
    image_config: clip_vision.ClipImageConfig,
    keep: int,
) -> Tasks:
    """The model with each task's adapter, and with its level of the tower and its projector to see through."""
    cfg, models = model.chat.cfg, {}
    # Of a template of one's own: the token that tokenizers trained here have.
    placeholder = PLACEHOLDERS.get(cfg.template, Placeholder(token="<|image_pad|>"))
    select = partial(select_task, skeletons.table_names(model.chat.skeleton), keep)
    for task, adapter in adapters.items():
        own = params[task]
        if adapter is not None:
            # The same tensors, not a second copy.
            adapter = evolve(adapter, factors=select(params, task)["lora"])
        up, down = own["projector"]["up"]["weight"], own["projector"]["down"]["weight"]
        sizes = ProjectConfig(inputs=up.shape[1], hidden=up.shape[0], outputs=down.shape[0])
        eyes = vision.clip_vision(
            image_config, towers[task], sizes, f"{task}/projector", placeholder, window=cfg.window
        )
        models[task] = evolve(model, chat=evolve(model.chat, vision=eyes), adapter=adapter)
    return Tasks(models=models, select=select)


def plugin_config(cfg: Config, task: str, opened: Chat, codes: CodeTokens | None) -> PluginConfig:
    """The record of the plugin that a run trains for a task."""
    tok, (_, lora_config) = opened.tokenizer, cfg.adapter(task)
    return PluginConfig(
        task=task,  # type: ignore[arg-type]
        level=cfg.task(task).level,
        rank=lora_config.rank,
        alpha=lora_config.alpha,
        experts=lora_config.experts,
        base=cfg.model.name,
        template=cfg.chat.template,
        tokens=codes.start if codes else len(tok),
        codes=codes.number if codes else 0,
        bos=tok("a")["input_ids"][:1] == [tok.bos_token_id],
    )


def _check_start(cfg: Config, task: str, plugin: Plugin, opened: Chat, codes: CodeTokens | None) -> None:
    """A plugin that training starts from must be such as the run trains, and of its base."""
    check_base(plugin, opened.skeleton, opened.tokenizer, base=cfg.model.name, template=cfg.chat.template)
    found = plugin.config
    # The name of the base was compared: a folder may have any.
    expected = evolve(plugin_config(cfg, task, opened, codes), base=found.base, revision=found.revision)
    if found != expected:
        differences = config.differences(config.unstructure(found), config.unstructure(expected))
        raise ValueError(
            f"{task}.start: {cfg.task(task).start} must be a plugin such as the record trains, but differs (plugin / "
            f"record): {few(differences)}"
        )


def _start_tables(params: Tree, starts: Mapping[str, Plugin], names: Mapping[str, str], keep: int) -> Tree:
    """`params` with the rows and tables of plugins; of a whole table the first `keep` rows are the base's.

    Raises:
        ValueError: two plugins have different ones.
    """
    brought = dict[str, Tensor]()
    for plugin in starts.values():
        tensors = flatten({"rows": plugin.rows or {}, "tables": plugin.tables})
        for name, tensor in tensors.items():
            if not torch.equal(brought.setdefault(name, tensor), tensor):
                raise ValueError(
                    f"understand.start and draw.start must have the same {name}, as plugins of one run"
                )
    if not brought:
        return params
    model, rows = dict(params["model"]), dict(params["rows"])
    for part, name in names.items():
        if f"tables/{part}" in brought:
            old, table = model[name], brought[f"tables/{part}"]
            model[name] = table[:keep].to(old.device, old.dtype)
            brought[f"rows/{part}"] = table[keep:]
        if f"rows/{part}" in brought:
            rows[part] = brought[f"rows/{part}"].to(rows[part].device, copy=True)
    return params | {"model": model, "rows": rows}


def add_codes(
    opened: Chat, params: Mapping[str, Tensor], number: int
) -> tuple[Chat, CodeTokens, dict[str, Tensor]]:
    """The chat whose vocabulary has so many image codes, their tokens, and rows {"embed", "head"} for them: the
    mean of the base's, as a view."""
    codes = tokens.add_image_codes(opened.tokenizer, number)
    names = skeletons.table_names(opened.skeleton)
    # Not the size before: the tokenizer may have the codes already.
    added = len(opened.tokenizer) - codes.start
    rows = {part: extended.mean_rows(params[name], codes.start, added) for part, name in names.items()}
    skeleton = skeletons.with_vocabulary(opened.skeleton, len(opened.tokenizer))
    return evolve(opened, skeleton=skeleton), codes, rows


def open_tower(
    cfg: TowerConfig,
    levels: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device,
    gen: Generator | None = None,
) -> tuple[dict[str, skeletons.Skeleton], clip_vision.ClipImageConfig, dict[str, Tensor]]:
    """(a skeleton of CLIP's tower for the level of each task, how images become pixels, the weights of the deepest
    of them). A tower without a name is drawn from `gen`."""
    architecture = loading.encoder_config(cfg.name, "vision") if cfg.name else cfg.config
    towers = {task: clip_vision.tower_skeleton(architecture, level) for task, level in levels.items()}
    deepest = max(towers.values(), key=lambda skeleton: skeleton.config["num_hidden_layers"])
    image_config = clip_vision.ClipImageConfig(size=deepest.config["image_size"])
    if settings := find_optional_file(cfg.name, "preprocessor_config.json") if cfg.name else None:
        image_config = clip_vision.parse_clip_config(read_json(settings))
    if device.type == "meta":
        weights: Mapping[str, Tensor] = dict(deepest.module.named_parameters())
    elif cfg.name:
        _, weights = loading.load_encoder(cfg.name, "vision")
    else:
        architecture = {**architecture, "model_type": "clip_vision_model"}
        _, weights = skeletons.init_skeleton(architecture, gen or Generator())
    # The layers above are never run.
    weights = clip_vision.level_params(weights, deepest)
    return towers, image_config, {name: t.to(device, dtype) for name, t in weights.items()}


def select_task(names: Mapping[str, str], keep: int, params: Tree, task: str) -> Tree:
    """What a task's model uses of all parameters: the same tensors, no copies.

    Args:
        names: {"embed", "head"} of the base's tables.
        keep: rows of these before those of the codes.
        params: a task's own "rows" and "tables", as a plugin brings them, go before the "rows" that tasks share.
    """
    own = params[task]
    model = shards.lazy_shards(params["model"])
    if rows := own.get("rows", params.get("rows")):
        model = extended.extend_tables(model, names, shards.lazy_shards(rows), keep)
    model |= {names[part]: table for part, table in own.get("tables", {}).items()}
    selected = {"model": model, "tower": params["tower"], task: {"projector": own["projector"]}}
    # Of its own, or the one that tasks share.
    return selected | {"lora": own.get("lora") or params.get("lora", {})}


def make_question(
    opened: Chat,
    image: Any,
    text: str,
    *,
    page: int | None = None,
    window: tuple[float, float] | None = None,
) -> Conversation:
    """A text about an image, opened.

    Args:
        image: a path (PNG, JPEG, DICOM, NIfTI...), a PIL image, or None.
        page: of a file with several pages, frames or slices, from 0.
        window: (black, white) of a file with greys of more than 8 bits; the chat's is taken if left out.
    Raises:
        ValueError: as `images.open_image`; no text, or tags <image> in it that do not match.
    """
    if isinstance(image, Image.Image | None) and (page is not None or window):
        raise ValueError("page and window are for files of images, and there is none; leave them out")
    if image is None:
        return chat.make_question(opened, text)
    if not isinstance(image, Image.Image):
        if not isinstance(image, str | os.PathLike | bytes):
            found = type(image).__name__
            raise ValueError(f"the image must be a path, a PIL image or None, got {found}; open it first")
        levels = images.check_window(window or opened.cfg.window, "window")
        image = images.open_image(image, page=page, window=levels, only_deep=True)
    return chat.make_question(opened, text, [image])


# From plugins -----------------------------------------------------------------------------------------------
def open_plugin(
    folder: PathLike, task: str, *, base: str = "", vq: PathLike | None = None, **settings: Any
) -> tuple[Unified, Tree]:
    """`open_unified` of the one plugin in a folder, on the base that it names or on another place of that.

    Raises:
        ValueError: the plugin is for another task; as `open_unified`.
    """
    record = read_plugin_config(folder)
    if record.task != task:
        raise ValueError(f"{folder} must be a plugin to {task}, found one to {record.task}; {_PUBLISHED}")
    return open_unified(base or record.base, {record.task: folder}, vq=vq or None, **settings)


def open_unified(
    base: PathLike,
    plugins: Mapping[str, Plugin | PathLike],
    *,
    vq: Vq | PathLike | None = None,
    tower: PathLike = CLIP,
    quantize: str = "none",
    dtype: str = "bfloat16",
    device: str = "auto",
    window: tuple[float, ...] = (),
) -> tuple[Unified, Tree]:
    """One base with plugins that share it, to ask and to draw from any number of threads.

    Args:
        base: name on the hub or folder of the language model.
        plugins: {"understand", "draw"}, or one of them: plugins, or their folders.
        vq: the VQ model whose codes are drawn, or its folder (`invoke vqgan` makes one); needed to draw.
        tower: name or folder of CLIP.
        quantize: "nf4" or "fp4" of the base, as `ModelConfig`.
        dtype: of the base; the parts beside it have it, too.
        window: (black, white) of 16-bit, DICOM and NIfTI images.
    Returns:
        model and params {"model", "tower", TASK: {"projector", "lora", "rows", "tables"}}.
    Raises:
        ValueError: a plugin of another base, task, tokenizer or template; no VQ model to draw with, or one of
            another number of codes; as `chat.open_chat` and `plugin_files.read_plugin`.
    """
    if dtype not in chat.DTYPES:
        raise ValueError(f"open_unified: dtype must be one of {', '.join(chat.DTYPES)}, got {dtype!r}")
    if not isinstance(plugins, Mapping):
        raise ValueError(
            f'open_unified: plugins must be {{"understand": ..., "draw": ...}}, or one of both, got {plugins!r}'
        )
    target, kind = processes.choose_device(device), chat.DTYPES[dtype]
    opened_plugins = dict[str, Plugin]()
    for task, plugin in plugins.items():
        if not isinstance(plugin, Plugin):
            plugin = read_plugin(plugin, dtype=kind, device=target)
        if plugin.config.task != task:
            message = f"open_unified: the plugin to {task} must be one, got one to {plugin.config.task}"
            raise ValueError(message)
        opened_plugins[task] = plugin
    if not opened_plugins or not {*plugins} <= {"understand", "draw"}:
        raise ValueError(f'open_unified: plugins must be for "understand" or "draw", got {[*plugins]}')
    records = [plugin.config for plugin in opened_plugins.values()]
    if len({(record.template, record.tokens, record.codes) for record in records}) > 1:
        raise ValueError(f"open_unified: plugins must have one template and vocabulary, got {records}")
    record = records[0]
    tok = tokens.tokenizer(base)
    settings = ModelConfig(name=str(base), quantize=quantize, dtype=dtype)  # type: ignore[arg-type]
    opened, weights = chat.open_chat(
        settings, ChatConfig(template=record.template, window=window), tok, Generator(), device=target
    )
    for plugin in opened_plugins.values():
        check_base(plugin, opened.skeleton, tok, base=str(base), template=record.template)
    params: Tree = {"model": weights}
    if vq is not None and not isinstance(vq, tuple):
        vq = open_vqgan(vq, device=target)
    if "draw" in opened_plugins and (vq is None or vq[0].codes != record.codes):
        found = "none" if vq is None else f"one of {vq[0].codes} codes"
        raise ValueError(
            f"open_unified: to draw needs the VQ model of the plugin's {record.codes} codes as vq, got {found}"
        )
    codes, keep = None, len(tok)
    means = dict[str, Tensor]()
    if record.codes:
        opened, codes, means = add_codes(opened, weights, record.codes)
        keep = codes.start
    levels = {task: plugin.config.level for task, plugin in opened_plugins.items()}
    towers, image_config, params["tower"] = open_tower(TowerConfig(name=str(tower)), levels, kind, target)
    for task, plugin in opened_plugins.items():
        # What a plugin has no rows for gets the mean, as in HealthGPT.
        rows = {part: row for part, row in means.items() if part not in plugin.tables}
        own = {"projector": plugin.projector, "lora": plugin.adapter.factors}
        own |= {"rows": rows | (plugin.rows or {}), "tables": plugin.tables}
        params[task] = map_leaves(lambda t: t.to(target, kind), own)
    adapters = {task: plugin.adapter for task, plugin in opened_plugins.items()}
    nothing: Any = None  # is trained
    model = LanguageModel(cfg=nothing, chat=opened, adapter=None, train=nothing)
    tasks = _join_tasks(model, params, adapters, towers, image_config, keep)
    return Unified(tasks=tasks, codes=codes, vq=vq), params
