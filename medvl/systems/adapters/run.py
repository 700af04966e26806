"""How adapters runs: its base and adapters are trained, the registry made, the answers of every mode scored."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import evolve

from medvl.adapters import embedders
from medvl.adapters.build import build_registry, category_of
from medvl.base import config, processes
from medvl.base.tree import Tree, map_leaves
from medvl.evaluation.results import Result
from medvl.hub.peft_files import write_adapter
from medvl.language import chat, system
from medvl.language.chat import Encoded
from medvl.language.conversations import Conversation, Reader
from medvl.language.system import LanguageModel
from medvl.systems.adapters import record, tables
from medvl.systems.adapters.data import data_folder, of_task, read_general, split_reader, tasks_of
from medvl.systems.adapters.record import Config, Model
from medvl.training import stages
from medvl.training.estimate import Step


# Training ---------------------------------------------------------------------------------------------------
def fit(
    cfg: Config, folder: Path, log: Callable[[str], None] = print, data: Reader | None = None
) -> tuple[Model, Tree]:
    """Train the base model and an adapter for each task, or go on with them, and make the registry.

    Args:
        data: from `data.prepare`; None = the files are read here.
    """
    read = data or split_reader(cfg)
    read("test")  # what evaluation would stop at is an error now, not after the training
    general = read_general(cfg, "train", read) if cfg.base else []
    train = read("train") if cfg.train else []
    valid = read("valid") if cfg.train else []
    # One tokenizer serves the base model and all adapters: where it is trained, it must know both texts.
    texts = system.message_texts([*general, *train])
    model, params = record.init(cfg, folder, texts, device=_device(cfg))
    if cfg.train is not None:
        _check_adapters(model, train, valid)
    if cfg.base is not None:
        # The same model without adapter and with stages of its own: to the loop it is a system like any
        # other.
        base = LanguageModel(cfg=cfg, chat=model.chat, adapter=None, train=cfg.base)
        general_valid = read_general(cfg, "valid", read)
        params = _fit_part(base, params, general, general_valid, "base", folder / "base", log)
        if not (folder / "model").exists() and processes.rank() == 0:
            chat.save_chat(model.chat, params["model"], folder / "model")
    if cfg.train is not None:
        _fit_adapters(model, params, train, valid, folder, log)
        if processes.rank() == 0 and not model.registry.exists():
            with processes.single_process():  # a retriever is trained, by this process
                make_registry(cfg, train, folder, log)
        processes.wait_for_all()
    return model, params


def _check_adapters(model: Model, train: Sequence[Conversation], valid: Sequence[Conversation]) -> None:
    """Raise before anything is trained where the adapters, or a registry of them, cannot be made."""
    cfg = model.cfg
    assert cfg.train is not None
    # Without storage: what is asked is whether the pattern finds layers, and the stages the factors.
    record.new_adapter(cfg, model.chat, 0, torch.device("meta"))
    tasks = tasks_of(train)
    for task in tasks:
        conversations = of_task(train, task)
        count = len(chat.encode_conversations(model.chat, conversations).samples)
        if count < cfg.train.batch:
            raise ValueError(
                f"task {task}: needs {cfg.train.batch} conversations of the split train for a batch, found "
                f"{count} that fit the context; lower train.batch"
            )
        for stage in cfg.train.stages:
            # Raises where the warm-up is longer than the epochs of this task turn out to be.
            stages.plan_steps(cfg.train, stage, count)
        if not of_task(valid, task):
            raise ValueError(
                f"task {task}: the split valid must have conversations of every task that train has, found "
                "none"
            )
        if cfg.retriever.kind != "none" and min(len(conversations), cfg.pool.samples) < 2:
            raise ValueError(
                f"task {task}: a retriever is trained on two samples of every task or more; raise "
                "pool.samples"
            )
    if cfg.retriever.kind != "none" and len(tasks) < 2:
        raise ValueError(
            f"retriever.kind {cfg.retriever.kind!r} tells tasks apart and needs two or more, found "
            f"{len(tasks)}"
        )
    if cfg.embed.kind != "local":
        # It is needed when all adapters are trained; a name that cannot be opened should be known before.
        embedders.open_embedder(cfg.embed)


def _fit_adapters(
    model: Model,
    params: Tree,
    train: Sequence[Conversation],
    valid: Sequence[Conversation],
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """One adapter for each task, written in peft's format; those that are there are kept."""
    cfg = model.cfg
    assert cfg.train is not None
    for i, task in enumerate(tasks_of(train)):
        # What lies here is complete and marks the task as done; unfinished states are in "training".
        path = folder / "adapters" / task
        if path.exists():
            continue
        # The number counts all tasks, finished ones too: a run that goes on draws the same start.
        adapter = record.new_adapter(cfg, model.chat, i, _device(cfg))
        adapted = LanguageModel(cfg=cfg, chat=model.chat, adapter=adapter, train=cfg.train)
        trained = _fit_part(
            adapted,
            # Every adapter starts from the base model, none from the one before it.
            params | {"lora": adapter.factors},
            of_task(train, task),
            of_task(valid, task),
            f"adapter {task}",
            folder / "training" / task,
            log,
        )
        if processes.rank() == 0:
            # The trained factors leave in this file; evaluation reads it as that of any other adapter.
            factors = map_leaves(lambda t: t.cpu(), trained["lora"])
            write_adapter(evolve(adapter, factors=factors, name=task), path, base=cfg.model.name or "model")
        processes.wait_for_all()


def _fit_part(
    model: LanguageModel,
    params: Tree,
    train: Sequence[Conversation],
    valid: Sequence[Conversation],
    name: str,
    folder: Path,
    log: Callable[[str], None],
) -> Tree:
    """Train the base model, or one adapter; returns all parameters."""
    data = chat.encode_conversations(model.chat, train)
    valid_data: Encoded = chat.encode_conversations(model.chat, valid[: model.train.valid or None])
    log(
        f"{name}: {len(data.samples)} conversations, {data.refused} more are longer than the context and "
        "left out"
    )
    return system.fit_model(model, params, lambda stage: data, lambda stage: valid_data, folder, log)


def make_registry(
    cfg: Config, train: Sequence[Conversation], folder: Path, log: Callable[[str], None] = print
) -> Path:
    """Fit or open the embedder, and write the registry with a vector for each adapter of `folder`/adapters."""
    samples = {task: of_task(train, task) for task in tasks_of(train)}
    categories = {task: category_of(task, part, cfg.data.category) for task, part in samples.items()}
    return build_registry(
        folder / "registry.toml",
        {task: f"adapters/{task}" for task in samples},
        samples,
        cfg.embed,
        base=cfg.model.name or "model",
        categories=categories,
        num_samples=cfg.pool.samples,
        retriever=cfg.retriever,
        seed=cfg.seed,
        device=_device(cfg),
        log=log,
    )


def registry_of(folder: Path) -> Path:
    """Where the registry of a run is.

    Raises:
        ValueError: no run, or one that is not trained to its end.
    """
    cfg = config.load_record(config.run_folder(folder) / "config.json", Config)
    path = record.registry_path(cfg, folder)
    if cfg.train is not None and not path.exists():
        raise ValueError(
            f"{folder}: the run is not trained to its end and has no registry yet; `invoke train --exp "
            f"{folder}` continues it"
        )
    return path


def load(folder: Path) -> tuple[Model, Tree]:
    """Model and base weights of a run, as `fit` returned them.

    Raises:
        ValueError: no run, one that is not trained to its end, or whose files are broken.
    """
    cfg = config.load_run(folder, Config)
    registry_of(folder)
    # No texts: a tokenizer that was trained lies in the run folder.
    model, params = record.init(cfg, folder, [], device=_device(cfg))
    if cfg.base:
        params = stages.read_stages(cfg.base, params, folder / "base")
    return model, params


def _device(cfg: Config) -> torch.device:
    train = cfg.train or cfg.base
    return processes.choose_device(train.device if train else "auto")


# Evaluation -------------------------------------------------------------------------------------------------
def assess(
    model: Model, params: Tree, folder: Path, experiment: str, data: Reader | None = None
) -> tuple[list[Result], Path]:
    """Score every mode on the test conversations; see `tables.assess`.

    Args:
        data: from `data.prepare`; None = the file is read here.
    """
    read = data or split_reader(model.cfg)
    return tables.assess(model, params, read("test"), folder, experiment)


# Before a run -----------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training conversation of an adapter as the model gets it, the trained tokens marked."""
    read = split_reader(cfg)
    train = read("train")
    general = read_general(cfg, "train", read) if cfg.base else []
    init = partial(record.init, cfg, folder, system.message_texts([*general, *train]))
    return system.show_labels(init, train, number)


def memory(cfg: Config, folder: Path, processes: int = 1, data: Reader | None = None) -> dict[str, Step]:
    """{stage: a step of one of so many processes} of the base model and of one adapter.

    Args:
        data: from `data.prepare`; None = the files are read here.
    """
    if not cfg.trained:
        raise ValueError("estimate: the record trains nothing, its adapters are there")
    read = data or split_reader(cfg)
    train = read("train") if data_folder(cfg).exists() else []
    general = read_general(cfg, "train", read) if cfg.base and train else []
    meta = torch.device("meta")
    model, params = record.init(cfg, folder, system.message_texts([*general, *train]), device=meta)
    # Base and adapters are trained one after the other, so that their bytes are not added up.
    estimates: dict[str, Step] = {}
    if cfg.base is not None:
        base = LanguageModel(cfg=cfg, chat=model.chat, adapter=None, train=cfg.base)
        for stage, step in system.estimate_steps(base, params, general, processes).items():
            estimates[f"base: {stage}"] = step
    if cfg.train is not None:
        adapter = record.new_adapter(cfg, model.chat, 0, meta)
        adapted = LanguageModel(cfg=cfg, chat=model.chat, adapter=adapter, train=cfg.train)
        params = params | {"lora": adapter.factors}
        for stage, step in system.estimate_steps(adapted, params, train, processes).items():
            estimates[f"adapter: {stage}"] = step
    return estimates
