"""How ct_clip is trained: its stages one after the other, and a trained run read back."""

from collections.abc import Callable
from pathlib import Path

import torch
from attrs import evolve

from medvl.base import config, processes
from medvl.base.tree import Tree, count_values, flatten, map_leaves, merge_trees, split_tree
from medvl.components import encode
from medvl.ct import pairs
from medvl.ct.preprocess import size_of
from medvl.hub import tokens
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip.data import open_volumes, pair_reports, training_batches
from medvl.systems.ct_clip.export import REST, load_exported
from medvl.systems.ct_clip.model import Model
from medvl.systems.ct_clip.record import Config
from medvl.systems.ct_clip.score import mean_auroc
from medvl.systems.ct_clip.slice_features import cached_features
from medvl.training import gradients, states, trace
from medvl.training.estimate import Laps, Step
from medvl.training.record import Stage, plan_steps
from medvl.training.stages import check_trainable, shard_params, shards_of_one, trace_step, train_stage
from medvl.weights import shards


def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree]:
    """Train (or go on with) all stages in the run folder; returns the model and its parameters.

    Under "running" they hold the running means of the towers' rows, in the state that was kept: what rows of
    one volume are normalised with.

    Raises:
        ValueError: a batch that processes cannot share evenly; as `model.init_model`, `loop.train_steps` and
            `cached_features`.
    """
    if cfg.train.batch % processes.world_size():
        raise ValueError(
            f"train.batch must be a multiple of the number of processes, got {cfg.train.batch} for "
            f"{processes.world_size()}; the loss compares the rows of all of them"
        )
    data = pair_reports(cfg, "train", open_volumes(cfg, "train"))
    scans = len(set(data.scans))
    texts: list[str] = []
    for text_of_part in data.texts:
        texts += text_of_part.values()
    model, params = ct_clip.init_model(cfg, folder, texts)
    # A later stage must not be found wrong when the first is trained.
    for stage in cfg.train.stages:
        check_trainable(stage, params)
    # An epoch shows each scan once, in one of its reconstructions: its length is counted in scans.
    stages = [plan_steps(cfg.train, stage, scans) for stage in cfg.train.stages]
    log(f"{len(data.names)} volumes of {scans} scans")
    cut = tokens.truncated(model.tokenizer, texts, cfg.words.tower.context)
    # Where some sentences are drawn for each step, none of them is always beyond the end.
    if cut and not cfg.data.sentences:
        log(
            f"{cut} of {len(texts)} texts are longer than {cfg.words.tower.context} tokens: the rest of them "
            "is not read"
        )
    # On the CPU, before the parameters move: starting weights do not depend on the device.
    if cfg.vit.whiten:
        params["vit"] = _whitened(model, params, data)
    device = processes.choose_device(cfg.train.device)
    # With shards the whole stays in main memory, and each stage puts on the device what it needs there.
    home = torch.device("cpu") if cfg.train.shard else device
    params = map_leaves(lambda leaf: leaf.to(home), params)
    rates = _rates(cfg, folder, data, device)
    means: Tree = {}
    for i, stage in enumerate(stages):
        place, rate = folder / f"{i}-{stage.name}", rates.get(stage.name, {})
        params, means = _fit_stage(model, params, means, stage, data, place, rate, log)
        params = map_leaves(lambda leaf: leaf.to(home), params)
    params = map_leaves(lambda leaf: leaf.to(device), params)
    return model, params | {"running": means}


def _fit_stage(
    model: Model,
    params: Tree,
    means: Tree,
    stage: Stage,
    data: pairs.Pairs,
    folder: Path,
    rates: dict[str, float],
    log: Callable[[str], None],
) -> tuple[Tree, Tree]:
    """(all parameters, running means) after one stage."""
    cfg = model.cfg
    trained, frozen = split_tree(params, stage.train)
    log(
        f"stage {stage.name}: {stage.steps} steps train {count_values(trained):,} of "
        f"{count_values(params):,} parameters"
    )
    device = processes.choose_device(cfg.train.device)
    frozen = map_leaves(lambda leaf: leaf.to(device), frozen)
    trained = map_leaves(lambda leaf: leaf.to(device), shard_params(cfg.train, trained, ct_clip.SHARDED))
    valid = open_volumes(cfg, "valid")
    if not any(name.startswith("vit/") for name in flatten(trained)):
        # The slice encoder stays as it is: each scan is encoded once.
        cache = Path(cfg.data.cache)
        data = evolve(data, store=cached_features(model, frozen, data.store, cache))
        valid = cached_features(model, frozen, valid, cache)

    def validate(state: states.State) -> dict[str, float]:
        # By the running means, as a trained run will be evaluated, not by those of a batch.
        merged = shards.lazy_shards(merge_trees(frozen, state.params))
        return {"score": mean_auroc(model, merged | {"running": state.means}, valid)}

    state = train_stage(
        cfg.train,
        stage,
        trained,
        ct_clip.contrastive_gradient(model, frozen),
        training_batches(model, data, cfg.train.batch, cfg.seed),
        folder,
        model=params,
        validate=validate,
        means=means,
        bound=lambda p: ct_clip.bound_scale(cfg.contrast, p),
        seed=cfg.seed,
        keyed=True,
        same_processes=True,
        rates=rates,
        log=log,
    )
    return merge_trees(frozen, state.params), state.means


def memory(cfg: Config, folder: Path, processes: int = 1, slices: int = 0) -> dict[str, Step]:
    """{stage: a step of one of so many processes} in which every volume has so many slices (0 = all that a
    volume can have) and every text fills the context.

    Raises:
        ValueError: a batch that processes cannot share evenly; as `model.empty_model`.
    """
    share, rest = divmod(cfg.train.batch, processes)
    if rest or not share:
        raise ValueError(
            f"estimate: train.batch must be a multiple of the number of processes, got {cfg.train.batch} for "
            f"{processes}"
        )
    model, params = ct_clip.empty_model(cfg)
    steps = {}
    for stage in cfg.train.stages:
        check_trainable(stage, params)
        local, gather = shards_of_one(cfg.train, params, processes, ct_clip.SHARDED)
        trained, frozen = split_tree(local, stage.train)
        encodes = any(name.startswith("vit/") for name in flatten(trained))
        # A batch of one chunk on one process is computed at once. Otherwise two chunks tell of any number.
        is_whole = share <= cfg.train.chunk and processes == 1
        rows = share if is_whole else 2 * min(cfg.train.chunk, share)
        batch = _empty_batch(cfg, rows, slices or size_of(cfg.ct)[0], encodes)
        laps = Laps()
        memory = trace_step(
            cfg.train,
            stage,
            trained,
            frozen,
            ct_clip.contrastive_gradient(model, frozen, laps.mark, gather),
            batch,
            laps.counter,
            seed=cfg.seed,
            keyed=True,
        )
        # Chunks are embedded twice, the second time with gradients.
        more = (share - rows) / min(cfg.train.chunk, share)
        work = laps.work(more, kinds=(slice(0, 2), slice(2, 4)))
        steps[stage.name] = Step(memory=memory, work=work, samples=share)
    return steps


def _rates(cfg: Config, folder: Path, data: pairs.Pairs, device: torch.device) -> dict[str, dict[str, float]]:
    """{stage: {"mfu": seconds of a step at the GPU's peak}}, of volumes with as many slices as some thousand have
    in the mean; nothing where no peak is known."""
    gpu = trace.find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return {}
    occupied = [data.store.row(name)["occupied"] for name in data.names[:: -(-len(data.names) // 1000)]]
    slices = round(sum(stop - first for first, stop in occupied) / len(occupied))
    number = processes.world_size()
    with processes.single_process():  # an estimate has no values to exchange
        steps = memory(cfg, folder, number, slices)
    return {stage: {"mfu": step.work.peak_seconds(gpu)} for stage, step in steps.items()}


def _empty_batch(cfg: Config, volumes: int, slices: int, encodes: bool) -> gradients.Batch:
    """A batch without values, but for the mask, which says how many slices there are."""
    meta = torch.device("meta")
    if encodes:
        dtype = getattr(torch, cfg.ct.dtype)
        content = torch.empty(volumes, slices, *size_of(cfg.ct)[1:], dtype=dtype, device=meta)
    else:
        # Features from the cache of the frozen encoder.
        width = cfg.fuse.inputs or cfg.fuse.dim
        content = torch.empty(volumes, slices, width, dtype=torch.float16, device=meta)
    texts = (volumes, cfg.data.draws, cfg.words.tower.context)
    return {
        "slices": content,
        "mask": torch.ones(volumes, slices, dtype=torch.bool),
        "position_mm": torch.empty(volumes, slices, device=meta),
        "ids": torch.ones(texts, dtype=torch.int64, device=meta),
        "words": torch.ones(texts, dtype=torch.bool, device=meta),
    }


def _whitened(model: Model, params: Tree, data: pairs.Pairs, scans: int = 200) -> Tree:
    """The slice encoder with its patch embedding whitened over slices of scans that are spread over the
    training split.

    Raises:
        ValueError: no stage trains the patch embedding, so that checkpoints would not hold it.
    """
    trained: set[str] = set()
    for stage in model.cfg.train.stages:
        trained |= flatten(split_tree(params, stage.train)[0]).keys()
    # The patch embedding is the encoder's only convolution: its weight [d, c, p, p] has four axes.
    patch = [name for name, leaf in flatten(params).items() if name.startswith("vit/") and leaf.dim() == 4]
    if not trained.issuperset(patch):
        raise ValueError(
            f"vit.whiten: a stage must train {', '.join(patch)}, or the checkpoints would not hold it"
        )
    chosen = data.names[:: max(1, len(data.names) // scans)]
    batch = pairs.read_slices(data.store, chosen)
    slices = batch["slices"][batch["mask"]]
    # At most 16 million pixels: some 400 MiB of statistics.
    sample = slices[:: -(-slices.numel() // 2**24)]
    return encode.whiten(model.cfg.encode, params["vit"], sample)


def load(folder: Path) -> tuple[Model, Tree]:
    """Model and parameters of a trained run, as `fit` returned them, or of one that was exported."""
    cfg = config.load_run(folder, Config)
    device = processes.choose_device(cfg.train.device)
    if (folder / REST).is_file():
        model, params = load_exported(cfg, folder)
        return model, map_leaves(lambda leaf: leaf.to(device), params)
    model, params = ct_clip.init_model(cfg, folder)
    means: Tree = {}
    # Each stage holds the parameters it trained; what a later stage trained again comes from there.
    for i, stage in enumerate(cfg.train.stages):
        state = states.read_trained(folder / f"{i}-{stage.name}", cfg.train.keep, "cpu", model=params)
        params, means = merge_trees(params, state.params), state.means
    return model, map_leaves(lambda leaf: leaf.to(device), params | {"running": means})
