"""How unified runs: the VQ model and the stages are trained, answers and pictures scored, memory estimated."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from attrs import evolve

from medvl.base import config, processes
from medvl.base.text import few
from medvl.base.tree import Tree, flatten, split_tree
from medvl.evaluation import plots, report
from medvl.evaluation.results import Result
from medvl.hub import plugin_files, skeletons
from medvl.hub.vqgan_files import open_vqgan
from medvl.language import chat, encoding, system
from medvl.language.chat import Encoded
from medvl.systems.system import Question
from medvl.systems.tune.run import check_test
from medvl.systems.unified import score
from medvl.systems.unified.ask import ask_image
from medvl.systems.unified.codes import fit_vq
from medvl.systems.unified.data import (
    codes_of,
    find_sources,
    picture_opener,
    read_all_targets,
    read_questions,
    read_targets,
    target_places,
)
from medvl.systems.unified.draw import encode_drawings
from medvl.systems.unified.model import Unified, Vq, init_model, picture_shape, plugin_config
from medvl.systems.unified.record import Config, Source, Split, source_path, stage_tasks
from medvl.training import stages
from medvl.training.estimate import Step
from medvl.training.record import Stage, stage_training
from medvl.weights.lazy import dense


# Training ---------------------------------------------------------------------------------------------------
def open_vq(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> Vq | None:
    """The VQ model of the record, or the one that is trained in the run folder; None where nothing is drawn."""
    if "draw" not in cfg.tasks:
        return None
    if cfg.vq is None:
        model, weights = open_vqgan(cfg.codes)
    else:
        places: dict[str, dict[Path, str]] = {"train": {}, "valid": {}}
        if not (folder / "codes" / "vq").is_dir():
            for split in ("train", "valid"):
                places[split] = target_places(read_all_targets(cfg, split))
        model, weights = fit_vq(
            cfg.vq,
            {split: [*paths] for split, paths in places.items()},
            folder / "codes",
            open_picture=picture_opener(cfg, places["valid"] | places["train"]),
            seed=cfg.seed,
            log=log,
        )
    device = system.device_of(cfg.train)
    return model, {name: tensor.to(device) for name, tensor in weights.items()}


def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Unified, Tree]:
    """Train the VQ model, where the record says so, and all stages in the run folder, or go on with them."""
    # What evaluation would stop at is an error before anything is trained.
    for source in cfg.data.sources:
        if "test" in source.splits:
            read = read_questions if source.task == "understand" else read_targets
            read(cfg, source, "test")
    _check_trained(cfg, _init_meta(cfg, folder)[1])
    trained_vq = open_vq(cfg, folder, log)
    model, params = init_model(cfg, folder, trained_vq, _texts(cfg), device=system.device_of(cfg.train))
    encoded = _encode_sources(cfg, model, folder, log)
    train = {stage.name: _stage_data(cfg, encoded, stage, "train") for stage in cfg.train.stages}
    valid = {stage.name: _stage_data(cfg, encoded, stage, "valid") for stage in cfg.train.stages}
    params = stages.shard_params(cfg.train, params)
    params = system.fit_tasks(
        model.tasks, params, lambda stage: train[stage.name], lambda stage: valid[stage.name], folder, log
    )
    if processes.rank() == 0:
        export_plugins(cfg, model, params, folder, log)
    processes.wait_for_all()
    return model, params


def _check_trained(cfg: Config, params: Tree) -> None:
    """Each stage must train a part that its data is computed with."""
    for stage in cfg.train.stages:
        unused = {"understand", "draw"} - {*stage_tasks(stage.data)}
        names = [*flatten(split_tree(params, stage.train)[0])]
        if all(name.partition("/")[0] in unused for name in names):
            raise ValueError(
                f"stage {stage.name}: must train something that its data {stage.data!r} is computed with, but its "
                f"patterns match only {few(names)}"
            )


def _encode_sources(
    cfg: Config, model: Unified, folder: Path, log: Callable[[str], None]
) -> dict[tuple[str, Split], Encoded]:
    """{(source, split): token ids} of what is trained on and validated; the test split is only looked at."""
    encoded = dict[tuple[str, Split], Encoded]()
    for source in cfg.data.sources:
        for split in source.splits:
            if split == "test" and source.task == "understand":
                check_test(model.task("understand"), read_questions(cfg, source, split))
                continue
            part = _encode_source(cfg, model, source, split, folder)
            if split != "test":
                encoded[source.name, split] = part
                log(
                    f"{source.name}, {split}: {len(part.samples)} samples, {part.refused} more do not fit the context"
                )
    return encoded


def _texts(cfg: Config) -> list[str]:
    """What a tokenizer is trained on, where the model has none, as far as it is there."""
    texts = list[str]()
    if cfg.model.name or cfg.model.tokenizer:
        return texts
    for source in cfg.data.sources:
        if "train" in source.splits and source_path(cfg, source, "train").is_file():
            if source.task == "understand":
                texts += system.message_texts(read_questions(cfg, source, "train"))
            else:
                drawings = read_targets(cfg, source, "train")
                texts += system.message_texts([drawing.question for drawing in drawings])
    return texts


def _encode_source(cfg: Config, model: Unified, source: Source, split: Split, folder: Path) -> Encoded:
    """Token ids of a split of a source."""
    if source.task == "understand":
        return chat.encode_conversations(model.task("understand").chat, read_questions(cfg, source, split))
    assert model.vq is not None
    drawings = read_targets(cfg, source, split)
    questions = [drawing.question for drawing in drawings]
    codes = codes_of(cfg, model.vq, drawings, folder)
    return encode_drawings(model, questions, codes if split != "test" else None)


def _stage_data(
    cfg: Config, encoded: dict[tuple[str, Split], Encoded], stage: Stage, split: Split
) -> dict[str, Encoded]:
    """{task: what a stage sees of a split}: all samples of its sources, or of a mixed stage their shares.

    Raises:
        ValueError: nothing to train on.
    """
    data = dict[str, Encoded]()
    for task in stage_tasks(stage.data):
        sources = find_sources(cfg, task, split, stage.name)
        if split == "train" and not sources:
            raise ValueError(f"stage {stage.name}: a data source must be for its task {task}, found none")
        parts = [encoded[source.name, split] for source in sources]
        if split == "train" and stage.data == "mixed":
            parts = [
                take_share(part, source.share, cfg.seed) for part, source in zip(parts, sources, strict=True)
            ]
            if not any(part.samples for part in parts):
                raise ValueError(f"stage {stage.name}: the shares leave no sample to {task}; raise share")
        most = cfg.train.valid if split == "valid" and cfg.train.valid else None
        if parts:
            data[task] = Encoded(
                conversations=tuple(c for part in parts for c in part.conversations)[:most],
                samples=tuple(sample for part in parts for sample in part.samples)[:most],
                refused=0,
            )
    found, needed = sum(len(part.samples) for part in data.values()), stage_training(cfg.train, stage).batch
    if split == "train" and found < needed:
        message = (
            f"stage {stage.name}: a batch of {needed} needs as many samples, found {found}; lower its batch"
        )
        raise ValueError(message)
    return data


def take_share(data: Encoded, share: float, seed: int) -> Encoded:
    """A share of the samples, drawn by the seed, in their order."""
    count = len(data.samples)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    rows = sorted(drawn[: round(share * count)].tolist())
    conversations = tuple(data.conversations[row] for row in rows)
    return evolve(data, conversations=conversations, samples=tuple(data.samples[row] for row in rows))


def export_plugins(
    cfg: Config, model: Unified, params: Tree, folder: Path, log: Callable[[str], None] = print
) -> None:
    """Write a plugin of each task that has an adapter into `folder`/plugins, where others have base and tower."""
    patterns = [stage.train for stage in cfg.train.stages]
    trained = {name for some in patterns for name in flatten(split_tree(params, some)[0])}
    names = skeletons.table_names(next(iter(model.tasks.models.values())).chat.skeleton)
    tables = {f"model/{name}" for name in names.values()}
    changed = [name for name in trained - tables if name.startswith(("model/", "tower/"))]
    if not cfg.model.name or not cfg.tower.name or changed:
        log(
            "plugins are for a base and a tower by name, of which nothing but token tables is trained: none is written"
        )
        return
    for task, language in model.tasks.models.items():
        path = folder / "plugins" / task
        if language.adapter is None or path.exists():
            continue
        selected = model.tasks.select(params, task)
        record = plugin_config(cfg, task, language.chat, model.codes)
        whole = {}
        # A plugin that training started from may have brought tables of its own.
        if tables & trained or any(cfg.task(other).start for other in cfg.tasks):
            whole = {
                part: dense(selected["model"][name])[: record.vocabulary] for part, name in names.items()
            }
        plugin = plugin_files.Plugin(
            config=record,
            projector=selected[task]["projector"],
            adapter=evolve(language.adapter, factors=selected["lora"], dropout=0.0),
            rows=None if whole else params.get("rows"),
            tables=whole,
        )
        plugin_files.write_plugin(plugin, path)
        log(f"the plugin to {task}: {path}")


def load(folder: Path) -> tuple[Unified, Tree]:
    """Model and weights of a trained run, as `fit` returned them.

    Raises:
        ValueError: no run, one that is not trained to its end, or whose files are broken.
    """
    cfg = config.load_run(folder, Config)
    # It would be trained here, perhaps beside the process that trains the run.
    if cfg.vq and not (folder / "codes" / "vq").is_dir():
        raise ValueError(f"{folder / 'codes' / 'vq'}: the run has no VQ model yet; train it first")
    model, params = init_model(cfg, folder, open_vq(cfg, folder), device=system.device_of(cfg.train))

    def is_validated(stage: Stage) -> bool:
        return any(find_sources(cfg, task, "valid", stage.name) for task in stage_tasks(stage.data))

    return model, stages.read_stages(cfg.train, params, folder, validated=is_validated)


# Evaluation -------------------------------------------------------------------------------------------------
def assess(model: Unified, params: Tree, folder: Path, experiment: str) -> tuple[list[Result], Path]:
    """Answer the questions and draw the pictures of the test splits; writes answers, pictures and the report."""
    rows = score.score_questions(model, params, folder, experiment)
    scores, figures, notes = score.score_drawings(model, params, folder, experiment)
    rows += scores
    system.remove_unfinished_answers(folder)
    figures |= plots.training_curves(system.last_metrics(model.cfg.train, folder.parent))
    page = report.write_report(folder, f"{experiment}: answers and pictures", rows, figures, notes)
    return rows, page


def ask(folder: Path, question: Question) -> str:
    """The answer of a run, streamed where `question.on_token` is given: then nothing is left to be printed."""
    return ask_opened(*load(folder), question)


def ask_opened(model: Unified, params: Tree, question: Question) -> str:
    """`ask` of a model that is open."""
    if len(question.images) > 1:
        raise ValueError(f"ask: unified sees one image at a time, got {len(question.images)}")
    answer = ask_image(
        model,
        params,
        question.images[0] if question.images else None,
        question.text,
        max_tokens=question.max_tokens,
        on_token=question.on_token,
        page=question.page,
        window=question.window,
    )
    return "" if question.on_token else answer


# Before a run -----------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training sample of the last stage's first task as the model gets it, the trained tokens marked."""
    task = stage_tasks(cfg.train.stages[-1].data)[0]
    source = find_sources(cfg, task, "train", cfg.train.stages[-1].name)[0]
    model, _ = _init_meta(cfg, folder)
    if task == "understand":
        questions = read_questions(cfg, source, "train")
        return system.show_labels(lambda device: (model.task(task), {}), questions, number)
    drawings = read_targets(cfg, source, "train")
    if not 0 <= number < len(drawings):
        raise ValueError(f"labels: sample must be below {len(drawings)}, got {number}")
    assert model.vq is not None
    rows, columns = picture_shape(model.vq[0])
    # Codes that are computed for training only are shown as 0.
    codes = drawings[number].codes or (0,) * (rows * columns)
    (sample,) = encode_drawings(model, [drawings[number].question], [codes]).samples
    return encoding.show_sample(model.task(task).chat.tokenizer, sample)


def memory(cfg: Config, folder: Path, processes: int = 1) -> dict[str, Step]:
    """{stage: a step of one of so many processes}; one image a sample, and all text up to the context trained."""
    model, params = _init_meta(cfg, folder)
    steps = {}
    for stage in cfg.train.stages:
        train = stage_training(cfg.train, stage)
        rows = stages.estimate_rows(train, processes)
        # Of a mixed stage, drawing: it needs more, since its adapter is the larger one.
        task = stage_tasks(stage.data)[-1]
        opened = model.task(task).chat
        assert opened.vision is not None
        example = opened.vision.example
        batch = chat.fullest_batch(opened, [], rows, example, tokens=train.tokens, packing=train.packing)
        batch = system.mark_task(model.tasks, task, batch)
        loss, cut = system.task_loss(model.tasks), partial(system.task_micro_batch, model.tasks)
        steps[stage.name] = stages.estimate_step(
            train, stage, params, loss, cut, batch, seed=cfg.seed, processes=processes
        )
    return steps


def _init_meta(cfg: Config, folder: Path) -> tuple[Unified, Tree]:
    """The model without weights."""
    model: Vq | None = None
    if cfg.vq is not None:
        model = cfg.vq.model, {}
    elif cfg.codes:
        model = open_vqgan(cfg.codes)
    return init_model(cfg, folder, model, _texts(cfg), device=torch.device("meta"))
