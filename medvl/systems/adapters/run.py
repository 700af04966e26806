"""How adapters runs: its data put in place, its base and adapters trained, the registry made, the answers of every mode scored."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import evolve
from torch import Tensor

from medvl.adapters import build, embed
from medvl.base import config, files, processes
from medvl.base.tree import Tree, map_leaves
from medvl.evaluation.results import Result
from medvl.hub import skeletons
from medvl.hub.peft_files import write_adapter
from medvl.language import chat, vqa_rad
from medvl.language import encoding as conversations
from medvl.language.chat import Chat, Encoded
from medvl.language.conversations import (
    Conversation,
    check_gold,
    read_conversations,
    read_tasks,
    warn_of_one_file,
)
from medvl.phantoms import modalities
from medvl.systems.adapters import record, tables
from medvl.systems.adapters.record import Config, Model
from medvl.training import gradients
from medvl.training import stages as tuning
from medvl.training.record import TrainConfig
from medvl.weights import lora

_log = logging.getLogger("medvl")
SPLITS = ("train", "valid", "test")


# Data -----------------------------------------------------------------------------------------------------------------------------------
def prepare(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: pictures are drawn, VQA-RAD is cut by case, files must be there.

    Raises:
        ValueError: what is missing, or not as it must be, with file and line.
    """
    folder = folder_of(cfg)
    if cfg.data.source == "phantoms":
        drawn = modalities.draw_modalities(cfg.data.phantoms, folder)
        log(
            f"{sum(drawn.values())} pictures and cases drawn in {folder}: "
            + ", ".join(f"{n} {split}" for split, n in drawn.items())
        )
    if cfg.data.source == "vqa_rad":
        _cut_vqa_rad(cfg, folder, log)
    wanted = SPLITS if cfg.train or cfg.base else ("test",)
    if len(wanted) > 1:
        warn_of_one_file(cfg.data.conversations)
    for split in wanted:
        tasks = _tasks(read(cfg, split))
        for task in tasks if cfg.train else ():
            files.check_name(task, f"{split}: the task")
        log(f"{split}: {len(tasks)} tasks: {', '.join(tasks)}")


def _cut_vqa_rad(cfg: Config, folder: Path, log: Callable[[str], None]) -> None:
    """Cut VQA-RAD by case, if that has not been done, and remember of which file."""
    source, mark = Path(cfg.data.vqa_rad) / "vqa_rad_share.json", folder / "source.sha256"
    digest = files.file_digest(source) if source.is_file() else ""
    if (folder / "test.jsonl").exists():
        if digest and mark.exists() and mark.read_text() != digest:
            raise ValueError(
                f"{folder}: was cut from another {source} than there is now; remove the folder to cut it anew"
            )
        return
    if digest:
        files.write_text(mark, digest)  # first: tables without it would be taken for those of any file
    cut = vqa_rad.convert_vqa_rad(
        source, source.parent / "images", folder, group=cfg.data.group, seed=cfg.seed
    )
    log(f"VQA-RAD in {folder}: " + ", ".join(f"{n} {what}" for what, n in cut.items()))


def folder_of(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; what is drawn or cut by one record has a folder of its own."""
    made = {"phantoms": cfg.data.phantoms, "vqa_rad": (cfg.data.vqa_rad, cfg.data.group, cfg.seed)}.get(
        cfg.data.source
    )
    return Path(cfg.data.folder) / (f"{cfg.data.source}-{config.record_digest(made)}" if made else "")


def read(cfg: Config, split: str) -> list[Conversation]:
    """The conversations of a split, each with its task; in the test split every answer holds a word, where words are compared."""
    pattern = config.fill_pattern(
        cfg.data.conversations, "data.conversations", folder=folder_of(cfg), split=None, task=None
    )
    conversations = read_tasks(
        pattern, split, key=cfg.data.task, root=cfg.data.root or None, max_images=cfg.chat.max_images
    )
    if split == "test" and cfg.evaluate.rule == "strict":
        check_gold(conversations, every=True)
    return conversations


def read_general(cfg: Config, split: str) -> list[Conversation]:
    """What the base model is trained on."""
    if not cfg.data.general:
        return read(cfg, split)
    path = config.fill_pattern(cfg.data.general, "data.general", folder=folder_of(cfg), split=split)
    return read_conversations(path, root=cfg.data.root or None, max_images=cfg.chat.max_images)


# Training -------------------------------------------------------------------------------------------------------------------------------
def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree]:
    """Train (or go on with) the base model and an adapter for each task, and make the registry."""
    read(cfg, "test")  # what evaluation would stop at is an error now, not after the training
    general = read_general(cfg, "train") if cfg.base else []
    held = read(cfg, "train") if cfg.train else []
    model, params = record.init(
        cfg, folder, [m["content"] for c in (*general, *held) for m in c.messages], device=_device(cfg)
    )
    if cfg.train is not None:
        _check_adapters(model, held, read(cfg, "valid"))
    if cfg.base is not None:
        parts = _parts(model.chat, general, read_general(cfg, "valid"), cfg.base, "base", log)
        loss = _loss(model.chat, cfg.base, lambda p, train: p["model"])
        params = _fit_stages(
            cfg, cfg.base, model.chat, params, loss, lambda p: p["model"], parts, folder / "base", log
        )
        if not (folder / "model").exists() and processes.rank() == 0:
            chat.save_chat(model.chat, params["model"], folder / "model")
    if cfg.train is not None:
        _fit_adapters(model, params, held, read(cfg, "valid"), folder, log)
        if processes.rank() == 0 and not model.registry.exists():
            with processes.single_process():  # a retriever is trained, by this process
                make_registry(cfg, held, folder, log)
        processes.wait_for_all()
    return model, params


def _check_adapters(model: Model, held: Sequence[Conversation], valid: Sequence[Conversation]) -> None:
    """Raise where the adapters, or a registry of them, cannot be made: before the base model is trained, and the other adapters."""
    cfg = model.cfg
    assert cfg.train is not None
    record.new_adapter(cfg, model.chat, 0, torch.device("meta"))
    tasks = _tasks(held)
    for task in tasks:
        own = [[c for c in part if c.extra["task"] == task] for part in (held, valid)]
        fit = len(chat.encode_conversations(model.chat, own[0]).samples)
        if fit < cfg.train.batch:
            raise ValueError(
                f"task {task}: needs {cfg.train.batch} conversations of the split train for a batch, found {fit} that fit the context; "
                "lower train.batch"
            )
        for stage in cfg.train.stages:
            tuning.plan_steps(cfg.train, stage, fit)
        if not own[1]:
            raise ValueError(
                f"task {task}: the split valid must have conversations of every task that train has, found none"
            )
        if cfg.retriever.kind != "none" and min(len(own[0]), cfg.pool.samples) < 2:
            raise ValueError(
                f"task {task}: a retriever is trained on two samples of every task or more; raise pool.samples"
            )
    if cfg.retriever.kind != "none" and len(tasks) < 2:
        raise ValueError(
            f"retriever.kind {cfg.retriever.kind!r} tells tasks apart and needs two or more, found {len(tasks)}"
        )
    if cfg.embed.kind != "local":
        embed.open_embedder(cfg.embed)


def registry_of(folder: Path) -> Path:
    """Where the registry of a run is.

    Raises:
        ValueError: no run, or one that is not trained to its end.
    """
    cfg = config.load_record(config.run_folder(folder) / "config.json", Config)
    path = record.registry_path(cfg, folder)
    if cfg.train is not None and not path.exists():
        raise ValueError(
            f"{folder}: the run is not trained to its end, it has no registry yet; `invoke train --exp {folder}` goes on"
        )
    return path


def load(folder: Path) -> tuple[Model, Tree]:
    """Model and base weights of a run, as `fit` returned them.

    Raises:
        ValueError: no run, one that is not trained to its end, or whose files are broken.
    """
    cfg = config.load_run(folder, Config)
    registry_of(folder)
    model, params = record.init(cfg, folder, [], device=_device(cfg))
    return model, tuning.read_stages(cfg.base, params, folder / "base") if cfg.base else params


def _fit_adapters(
    model: Model,
    params: Tree,
    held: Sequence[Conversation],
    valid: Sequence[Conversation],
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """One adapter for each task, written in peft's format."""
    cfg = model.cfg
    assert cfg.train is not None
    for i, task in enumerate(_tasks(held)):
        out = folder / "adapters" / task
        if out.exists():
            continue
        own = [[c for c in part if c.extra["task"] == task] for part in (held, valid)]
        parts = _parts(model.chat, own[0], own[1], cfg.train, f"adapter {task}", log)
        adapter = record.new_adapter(cfg, model.chat, i, _device(cfg))
        weights = partial(_adapted, adapter)
        trained = _fit_stages(
            cfg,
            cfg.train,
            model.chat,
            params | {"lora": adapter.factors},
            _loss(model.chat, cfg.train, weights),
            partial(weights, train=False),
            parts,
            folder / "training" / task,
            log,
        )
        if processes.rank() == 0:
            done = evolve(adapter, factors=map_leaves(lambda t: t.cpu(), trained["lora"]), name=task)
            write_adapter(done, out, base=cfg.model.name or "model")
        processes.wait_for_all()


def _adapted(adapter: lora.Adapter, params: Tree, train: bool) -> dict[str, Tensor]:
    """The base model's weights with the adapter on them."""
    return lora.apply_lora(params["model"], evolve(adapter, factors=params["lora"]), train=train)


def _fit_stages(
    cfg: Config,
    how: TrainConfig,
    talks: Chat,
    params: Tree,
    loss: gradients.LossSum,
    weights: Callable[[Tree], dict[str, Tensor]],
    parts: tuple[Encoded, Encoded],
    folder: Path,
    log: Callable[[str], None],
) -> Tree:
    return tuning.fit_stages(
        how,
        params,
        loss,
        lambda stage: chat.training_batches(talks, parts[0], how.batch, cfg.seed),
        folder,
        cut=partial(chat.micro_batch, talks),
        conversations=lambda stage: len(parts[0].samples),
        validate=lambda stage: lambda p: chat.mean_loss(talks, weights(p), parts[1], cfg.evaluate.batch),
        seed=cfg.seed,
        log=log,
    )


def _parts(
    talks: Chat,
    held: Sequence[Conversation],
    valid: Sequence[Conversation],
    how: TrainConfig,
    name: str,
    log: Callable[[str], None],
) -> tuple[Encoded, Encoded]:
    parts = (
        chat.encode_conversations(talks, held),
        chat.encode_conversations(talks, valid[: how.valid or None]),
    )
    log(
        f"{name}: {len(parts[0].samples)} conversations, {parts[0].refused} more are longer than the context and left out"
    )
    return parts


def _loss(talks: Chat, how: TrainConfig, weights: Callable[..., dict[str, Tensor]]) -> gradients.LossSum:
    skeleton = skeletons.checkpointed(talks.skeleton) if how.checkpoint else talks.skeleton
    return lambda p, batch: (
        *chat.loss_sum(talks, skeleton, weights(p, train=True), batch, logits=how.logits),
        gradients.Aux(),
    )


# The registry ---------------------------------------------------------------------------------------------------------------------------
def make_registry(
    cfg: Config, held: Sequence[Conversation], folder: Path, log: Callable[[str], None] = print
) -> Path:
    """Fit or open the embedder, and write the registry with a vector for each adapter of `folder`/adapters."""
    samples = {task: [c for c in held if c.extra["task"] == task] for task in _tasks(held)}
    categories = {task: build.category_of(task, talks, cfg.data.category) for task, talks in samples.items()}
    return build.build_registry(
        folder / "registry.toml",
        {task: f"adapters/{task}" for task in samples},
        samples,
        cfg.embed,
        base=cfg.model.name or "model",
        categories=categories,
        num_samples=cfg.pool.samples,
        retriever=cfg.retriever,
        seed=cfg.seed,
        log=log,
    )


def _tasks(held: Sequence[Conversation]) -> list[str]:
    return sorted({c.extra["task"] for c in held})


def _device(cfg: Config) -> torch.device:
    how = cfg.train or cfg.base
    return processes.choose_device(how.device if how else "auto")


# Evaluation -----------------------------------------------------------------------------------------------------------------------------
def assess(model: Model, params: Tree, folder: Path, experiment: str) -> tuple[list[Result], Path]:
    """Score every mode on the test conversations; see `adapters_report`."""
    return tables.assess(model, params, read(model.cfg, "test"), folder, experiment)


# Before a run ---------------------------------------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training conversation of an adapter as the model gets it, the trained tokens marked."""
    held = read(cfg, "train")
    if not 0 <= number < len(held):
        raise ValueError(f"labels: sample must be below {len(held)}, got {number}")
    general = read_general(cfg, "train") if cfg.base else []
    texts = [m["content"] for c in (*general, *held) for m in c.messages]
    model, _ = record.init(cfg, folder, texts, device=torch.device("meta"))
    samples = chat.encode_conversations(
        model.chat, held[number : number + 1]
    ).samples  # of reasoning models one for each answer
    return "\n\n".join(conversations.show_sample(model.chat.tokenizer, sample) for sample in samples)


def memory(cfg: Config, folder: Path, processes: int = 1) -> dict[str, dict[str, int]]:
    """{stage: {part: bytes}} that one of so many processes will need on its device, for the base model and for one adapter."""
    if not cfg.trained:
        raise ValueError("estimate: the record trains nothing, its adapters are there")
    held = read(cfg, "train") if folder_of(cfg).exists() else []
    general = read_general(cfg, "train") if cfg.base and held else []
    meta = torch.device("meta")
    model, params = record.init(
        cfg, folder, [m["content"] for c in (*general, *held) for m in c.messages], device=meta
    )
    found: dict[str, dict[str, int]] = {}
    for how, of, name in ((cfg.base, general, "base"), (cfg.train, held, "adapter")):
        if how is None:
            continue
        batch = chat.fullest_batch(model.chat, of, tuning.estimate_rows(how, processes))
        weights: Callable[..., dict[str, Tensor]] = lambda p, train: p["model"]
        tree = params
        if name == "adapter":
            adapter = record.new_adapter(cfg, model.chat, 0, meta)
            tree = params | {"lora": adapter.factors}
            weights = partial(_adapted, adapter)
        loss = _loss(model.chat, how, weights)
        foretold = partial(tuning.estimate_memory, seed=cfg.seed, processes=processes)
        found |= {
            f"{name}: {s.name}": foretold(how, s, tree, loss, partial(chat.micro_batch, model.chat), batch)
            for s in how.stages
        }
    return found
