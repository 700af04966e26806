"""How ct_clip is trained: its stages one after the other, and a trained run read back."""

from collections.abc import Callable
from pathlib import Path

from attrs import evolve

from medvl.base import config, processes
from medvl.base.tree import Tree, count_values, flatten, map_leaves, match_names, merge_trees, split_tree
from medvl.components import encode
from medvl.ct import pairs
from medvl.hub import tokens
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip.data import open_volumes, pair_reports, training_batches
from medvl.systems.ct_clip.model import Config, Model, Speed, Stage
from medvl.systems.ct_clip.score import mean_auroc
from medvl.systems.ct_clip.slice_features import cached_features
from medvl.training import gradients, loop, states
from medvl.training.muon import muon
from medvl.training.optim import Optimizer, Rate, adamw, routed, warmup_cosine

# Training -------------------------------------------------------------------------------------------------------------------------------


def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree]:
    """Train (or go on with) all stages in the run folder; returns the model and its parameters.

    Under "running" they hold the running means of the towers' rows, in the state that was kept: what rows of one volume are normalised with.

    Raises:
        ValueError: a batch that processes cannot share evenly; as `ct_clip.init`, `loop.train_steps` and `cached_features`.
    """
    if cfg.train.batch % processes.world_size():
        raise ValueError(
            f"train.batch must be a multiple of the number of processes, got {cfg.train.batch} for {processes.world_size()}; the loss compares "
            "the rows of all of them"
        )
    data = pair_reports(cfg, "train", open_volumes(cfg, "train"))
    texts = [t for parts in data.texts for t in parts.values()]
    model, params = ct_clip.init(cfg, folder, texts)
    for stage in cfg.train.stages:  # a later one must not be found wrong when the first is trained
        try:
            _optimizer(stage, split_tree(params, stage.train)[0])
        except ValueError as e:
            raise ValueError(f"stage {stage.name}: {e}") from e
    cut = tokens.truncated(model.tokenizer, texts, cfg.words.tower.context)
    log(f"{len(data.names)} volumes of {len(set(data.scans))} scans")
    if cut and not cfg.data.sentences:
        log(
            f"{cut} of {len(texts)} texts are longer than {cfg.words.tower.context} tokens: what lies beyond is not read"
        )
    if cfg.vit.whiten:
        params["vit"] = _whitened(model, params, data)
    params = map_leaves(lambda t: t.to(processes.choose_device(cfg.train.device)), params)
    means: Tree = {}
    for i, stage in enumerate(cfg.train.stages):
        params, means = _fit_stage(model, params, means, stage, data, folder / f"{i}-{stage.name}", log)
    return model, params | {"running": means}


def _fit_stage(
    model: Model,
    params: Tree,
    means: Tree,
    stage: Stage,
    data: pairs.Pairs,
    folder: Path,
    log: Callable[[str], None],
) -> tuple[Tree, Tree]:
    cfg = model.cfg
    trained, frozen = split_tree(params, stage.train)
    log(
        f"stage {stage.name}: {stage.steps} steps train {count_values(trained):,} of {count_values(params):,} parameters"
    )
    valid = open_volumes(cfg, "valid")
    if not any(n.startswith("vit/") for n in flatten(trained)):
        cache = Path(cfg.data.cache)
        data = evolve(data, store=cached_features(model, params, data.store, cache))
        valid = cached_features(model, params, valid, cache)
    everything = lambda p: merge_trees(frozen, p)
    grad = gradients.cached_value_and_grad(
        lambda p, rows: {
            "image": ct_clip.embed_volumes(model, everything(p), rows),
            "text": ct_clip.embed_texts(model, everything(p), rows),
        },
        lambda p, rows: ct_clip.contrast(cfg.contrast, everything(p), rows),
        chunk=cfg.train.chunk,
        precision=cfg.train.precision,
    )
    optimizer, schedule = _optimizer(stage, trained), warmup_cosine(stage.steps, stage.warmup)
    step = loop.make_step(
        grad, optimizer, clip=cfg.train.clip, bound=lambda p: ct_clip.bound(cfg.contrast, p)
    )

    def validate(state: states.State) -> dict[str, float]:
        return {"score": mean_auroc(model, everything(state.params) | {"running": state.means}, valid)}

    state = states.State(params=trained, opt=optimizer.init(trained), means=means)
    state = loop.train_steps(
        step,
        state,
        training_batches(model, data, cfg.train.batch, cfg.seed),
        steps=stage.steps,
        folder=folder,
        every=loop.Every(log=cfg.train.log, save=cfg.train.save, validate=cfg.train.validate),
        validate=validate,
        title=stage.name,
        lr=lambda i: stage.lr * schedule(i),
        log=log,
    )
    if cfg.train.keep == "best":
        processes.wait_for_all()  # process 0 has written it
        state = states.read_trained(folder, "best", processes.choose_device(cfg.train.device), model=params)
    return everything(state.params), state.means


def _optimizer(stage: Stage, trained: Tree) -> Optimizer:
    """A later speed wins over an earlier one; muon takes matrices only, so a pattern may name whole blocks."""
    flat, schedule = flatten(trained), warmup_cosine(stage.steps, stage.warmup)
    chosen = dict.fromkeys(flat, Speed(match=".*", lr=stage.lr, weight_decay=stage.weight_decay))
    for speed in stage.speeds:
        hits = match_names(list(flat), [speed.match])
        chosen |= dict.fromkeys([n for n in hits if speed.optimizer == "adamw" or flat[n].dim() > 1], speed)
    rate = lambda n: Rate(lr=chosen[n].lr, weight_decay=chosen[n].weight_decay)
    return routed(
        lambda n: chosen[n].optimizer, {"adamw": adamw(rate, schedule), "muon": muon(rate, schedule)}
    )


def _whitened(model: Model, params: Tree, data: pairs.Pairs, scans: int = 200) -> Tree:
    """The slice encoder with its patch embedding whitened over slices of scans that are spread over the training split.

    Raises:
        ValueError: no stage trains the patch embedding, so that checkpoints would not hold it.
    """
    trained = {n for stage in model.cfg.train.stages for n in flatten(split_tree(params, stage.train)[0])}
    patch = [n for n, t in flatten(params).items() if n.startswith("vit/") and t.dim() == 4]
    if not trained.issuperset(patch):
        raise ValueError(
            f"vit.whiten: a stage must train {', '.join(patch)}, or the checkpoints would not hold it"
        )
    chosen = data.names[:: max(1, len(data.names) // scans)]
    batch = pairs.read_slices(data.store, chosen)
    slices = batch["slices"][batch["mask"]]
    few = slices[:: -(-slices.numel() // 2**24)]  # at most 16 million pixels: some 400 MiB of statistics
    return encode.whiten(model.cfg.encode, params["vit"], few)


def load(folder: Path) -> tuple[Model, Tree]:
    """Model and parameters of a trained run, as `fit` returned them."""
    cfg = config.load_run(folder, Config)
    model, params = ct_clip.init(cfg, folder)
    means: Tree = {}
    for i, stage in enumerate(cfg.train.stages):
        state = states.read_trained(folder / f"{i}-{stage.name}", cfg.train.keep, "cpu", model=params)
        params, means = merge_trees(params, state.params), state.means
    device = processes.choose_device(cfg.train.device)
    return model, map_leaves(lambda t: t.to(device), params | {"running": means})
