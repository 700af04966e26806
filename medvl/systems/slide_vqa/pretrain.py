"""How slide_vqa comes to a frozen compressor: read from a file, or trained to tell the labels of whole
slides from its tokens."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from attrs import evolve
from torch import Generator, Tensor

from medvl.base import processes
from medvl.base.tree import Tree, flatten, map_leaves, merge_trees, split_tree
from medvl.components import compress
from medvl.components.slots import CompressConfig
from medvl.slides import heads
from medvl.slides.names import slide_name
from medvl.slides.reference_files import write_compressor
from medvl.slides.tokens import Features, whole
from medvl.systems.slide_vqa import data
from medvl.systems.slide_vqa.model import open_compressor
from medvl.systems.slide_vqa.record import GATE, Config, data_path
from medvl.training import gradients, order, states
from medvl.training.record import Stage, plan_steps
from medvl.training.stages import train_stage


def fit_compressor(
    cfg: Config, folder: Path, log: Callable[[str], None] = print
) -> tuple[CompressConfig, Tree]:
    """The frozen compressor: read, or trained on labels of slides (or gone on with) in the run folder.

    Of several processes each has its share of the slides of a batch; the balance of slots is over its own.
    """
    if cfg.pretrain.file:
        return open_compressor(cfg)
    training = cfg.pretrain.train
    device = processes.choose_device(cfg.train.device)
    rows_by_split, classes = labelled(cfg)
    train_rows = rows_by_split["train"]
    valid_rows = rows_by_split["valid"]
    # Of both splits at once: what is missing is known before a step is made.
    features = _open_features(cfg, [*train_rows, *valid_rows])
    # The width is that of the encoder (UNI 1,024, CONCH 512), which only the files know.
    sizes = evolve(cfg.compress, dim=features.dims)
    params = _init_params(cfg, sizes, classes)
    # Drawn on the CPU and then moved: a seed gives the same start on every device.
    params = map_leaves(lambda leaf: leaf.to(device), params)
    stage = _stage_of(cfg, len(train_rows))
    # The default stage trains all (".*"). What another pattern leaves out has no gradient and no moments, but
    # the forward pass needs it, so it is merged in again below.
    trained, frozen = split_tree(params, stage.train)
    label_names = ", ".join(cfg.pretrain.labels)
    log(f"compressor: {stage.steps} steps on {label_names} of {len(train_rows)} slides")

    def collate(rows: Sequence[dict[str, str]]) -> dict[str, Tensor]:
        return _collate_bags(features, rows, cfg.pretrain.most, classes)

    # Every slide is a group of its own, so that an epoch visits it at most once. A process gets its share of
    # the batch.
    indices = order.batch_indices(
        [row["slide"] for row in train_rows],
        training.batch,
        cfg.seed,
        rank=processes.rank(),
        world=processes.world_size(),
    )

    def training_batch(i: int) -> dict[str, Tensor]:
        rows = [train_rows[j] for j in indices(i)]
        return collate(rows)

    def loss(p: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, gradients.Aux]:
        every_param = merge_trees(frozen, p)
        return _label_loss(sizes, cfg.pretrain.aux, every_param, batch)

    def validate(state: states.State) -> dict[str, float]:
        every_param = merge_trees(frozen, state.params)
        # In the precision of training: the score decides which state is kept.
        with gradients.autocast(state.params, training.precision):
            return _score_labels(sizes, every_param, collate, valid_rows, training.batch)

    state = train_stage(
        # One device for the whole run: the record refuses `pretrain.train.device`.
        evolve(training, device=cfg.train.device),
        stage,
        trained,
        gradients.value_and_grad(loss, precision=training.precision),
        training_batch,
        folder / "compressor",
        model=params,
        validate=validate,
        seed=cfg.seed,
        title="compressor",
        log=log,
    )
    # On the CPU, as `read_fitted` gives them when a run is loaded.
    params = map_leaves(lambda leaf: leaf.to("cpu"), merge_trees(frozen, state.params))
    # The heads stay behind in the checkpoints: the language model sees tokens alone.
    compressor = params["compressor"]
    _write_reference(sizes, compressor, folder / "moe_compressor.pt")
    return sizes, compressor


def _open_features(cfg: Config, rows: Sequence[dict[str, str]]) -> Features:
    """The features of all slides of the table of labels."""
    features = data.open_slides(cfg, [row["slide"] for row in rows])
    # Only a test may ask about slides without features: here there would be nothing to learn from.
    if features.missing:
        raise ValueError(
            f"{data_path(cfg, 'labels')}: {len(features.missing)} slides have no features, the first is "
            f"{features.missing[0]}"
        )
    return features


def _write_reference(sizes: CompressConfig, compressor: Tree, path: Path) -> None:
    """Write it in the format of the reference, once, so that another run can take it as `pretrain.file`."""
    # That format has only the kind moe.
    if sizes.kind == "moe" and processes.rank() == 0 and not path.exists():
        write_compressor(compressor, path)


def _init_params(cfg: Config, sizes: CompressConfig, classes: dict[str, list[str]]) -> Tree:
    """{"compressor", "heads": a classifier of each label}, on the CPU."""
    gen = Generator().manual_seed(cfg.seed)
    # First the compressor, then the heads: another order gives other weights for the same seed.
    compressor = compress.init_compress(sizes, gen)
    num_classes = {label: len(values) for label, values in classes.items()}
    # 0 slots means a gated attention over the tokens, as `heads.init_heads` has it.
    slots = sizes.slots if cfg.pretrain.head == "places" else 0
    classifiers = heads.init_heads(sizes.dim, num_classes, gen, slots=slots)
    return {"compressor": compressor, "heads": classifiers}


def _stage_of(cfg: Config, slides: int) -> Stage:
    """The stage in steps; without the gate's speed where the compressor has no gate."""
    (stage,) = cfg.pretrain.train.stages
    if cfg.compress.kind != "moe":
        speeds = [speed for speed in stage.speeds if speed.match != GATE]
        stage = evolve(stage, speeds=tuple(speeds))
    return plan_steps(cfg.pretrain.train, stage, slides)


def labelled(cfg: Config) -> tuple[dict[str, list[dict[str, str]]], dict[str, list[str]]]:
    """({"train", "valid": rows of slides}, {label: its classes}) of the table that a compressor is
    trained on.

    Raises:
        ValueError: as `files.read_csv` and `slide_classify.classes_of`; a slide twice; too few slides, or
            none with a label, in a split.
    """
    table = data_path(cfg, "labels")
    labels = cfg.pretrain.labels
    rows = data.read_labels(cfg, ("slide", "split", *labels))
    rows_by_split = {}
    # Rows of other splits, such as those of a test, are never looked at.
    for split_name in ("train", "valid"):
        rows_by_split[split_name] = [row for row in rows if row["split"] == split_name]
    empty = [name for name, part in rows_by_split.items() if not part]
    if empty:
        splits = ", ".join(sorted({row["split"] for row in rows}))
        raise ValueError(
            f'{table}: must have slides of the splits "train" and "valid", found none of {empty[0]!r}, '
            f"only {splits}"
        )
    # By the name of the slide, not its path: "a/X.h5" in train and "b/X.h5" in valid would be scored on what
    # was learned.
    times = Counter(slide_name(row["slide"]) for part in rows_by_split.values() for row in part)
    twice = [name for name, number in times.items() if number > 1]
    if twice:
        raise ValueError(
            f"{table}: every slide must be there once, in one split; {len(twice)} are there again, the first "
            f"is {twice[0]}"
        )
    try:
        # Of train alone: a class that only valid has cannot be learned, and its slides count as unlabelled.
        classes = heads.classes_of(rows_by_split["train"], labels)
    except ValueError as e:
        raise ValueError(f"{table}, split train: {e}") from e
    # Without one labelled slide there is no score to choose a state by. Better known before the training than
    # at its first validation.
    if not any(_has_label(row, classes) for row in rows_by_split["valid"]):
        raise ValueError(
            f"{table}: slides of the split valid must have labels that train has, none has one of "
            f"{', '.join(classes)}"
        )
    batch = cfg.pretrain.train.batch
    num_slides = len(rows_by_split["train"])
    # `order.batch_indices` would refuse it, too, but cannot name the file and the setting.
    if num_slides < batch:
        raise ValueError(
            f"{table}: pretrain.train.batch is {batch}, found {num_slides} slides of the split train; "
            "lower it"
        )
    return rows_by_split, classes


def _has_label(row: dict[str, str], classes: dict[str, list[str]]) -> bool:
    return any(row[label] in values for label, values in classes.items())


def read_fitted(cfg: Config, folder: Path) -> tuple[CompressConfig, Tree]:
    """The compressor of a run, as `fit_compressor` returned it."""
    if cfg.pretrain.file:
        return open_compressor(cfg)
    # It knows the width of the features that it was trained on; its own parameters say what it is.
    home = folder / "compressor"
    keep = cfg.pretrain.train.keep
    state = states.read_state(home / f"{keep}.pt", "cpu")
    trained = states.read_trained(home, keep, "cpu", model=state.params)
    params = trained.params["compressor"]
    # A parameter of each kind whose last axis is the width d of the features.
    names = {"attention": "tanh/weight", "perceiver": "latents"}
    name = names.get(cfg.compress.kind, "experts/norm/weight")
    dim = flatten(params)[name].shape[-1]
    return evolve(cfg.compress, dim=dim), params


def _collate_bags(
    features: Features, rows: Sequence[dict[str, str]], most: int, classes: dict[str, list[str]]
) -> dict[str, Tensor]:
    """A ragged batch of slides: x [b, n, d], mask [b, n], and the number of the class of each label [b],
    -1 where there is none.

    A store may hold 16 bits; the compressor is trained in float32.
    """
    bags = []
    for row in rows:
        patches = torch.from_numpy(whole(features, row["slide"], most))
        bags.append(patches.float())
    lengths = torch.tensor([len(bag) for bag in bags])
    # Where no slide of the batch has a patch there is still one row, of padding.
    longest = max(1, *map(len, bags))
    # Zeros at the end of shorter slides; the mask keeps them out of every slot.
    x = torch.zeros(len(bags), longest, features.dims)
    for i, bag in enumerate(bags):
        x[i, : len(bag)] = bag
    mask = torch.arange(longest) < lengths[:, None]
    batch = {"x": x, "mask": mask}
    for label, values in classes.items():
        class_numbers = {value: number for number, value in enumerate(values)}
        # A cell that is empty, or of a class that train has not, becomes -1, which the loss leaves out.
        targets = [class_numbers.get(row[label], -1) for row in rows]
        batch[label] = torch.tensor(targets)
    return batch


def _label_loss(
    cfg: CompressConfig, aux: float, params: Tree, batch: dict[str, Tensor]
) -> tuple[Tensor, gradients.Aux]:
    device = next(iter(flatten(params).values())).device
    # The step's own generator: torch's default one is seeded for each step, see loop.make_step.
    seed = int(torch.randint(2**31, ()))
    gen = Generator(device).manual_seed(seed)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    # Only with a generator is there noise on the router and dropout: this is training.
    compressed = compress.compress(cfg, params["compressor"], batch["x"], batch["mask"], gen=gen)
    logits = heads.label_logits(params["heads"], compressed.tokens)
    loss, right = heads.label_loss(logits, batch)
    # The reference's auxiliary loss is made of what the router of moe reports; other kinds have none.
    balance = torch.zeros((), device=device)
    if cfg.kind == "moe":
        balance = compress.reference_aux(compressed.aux)
    # Logged without its weight, so that runs with another `aux` can be compared.
    metrics = {f"right_{label}": share for label, share in right.items()}
    metrics["labels"] = loss
    metrics["balance"] = balance
    return loss + aux * balance, gradients.Aux(metrics=metrics)


def _score_labels(
    cfg: CompressConfig,
    params: Tree,
    collate: Callable[[Sequence[dict[str, str]]], dict[str, Tensor]],
    rows: Sequence[dict[str, str]],
    size: int,
) -> dict[str, float]:
    """Mean share of right labels of the validation slides; each process counts its share of them."""
    device = next(iter(flatten(params).values())).device
    # Slides are counted over all batches: a mean of batches would weigh the short last one too much, and not
    # every slide of a batch has every label.
    hits = Counter[str]()
    totals = Counter[str]()
    starts = range(0, len(rows), size)
    for number, counts in processes.share_batches(len(starts)):
        batch = collate(rows[starts[number] : starts[number] + size])
        x = batch["x"].to(device)
        mask = batch["mask"].to(device)
        with torch.no_grad():
            # No generator, so neither noise nor dropout, and the score of a state is always the same.
            compressed = compress.compress(cfg, params["compressor"], x, mask)
            logits = heads.label_logits(params["heads"], compressed.tokens)
        for label, scores in logits.items():
            targets = batch[label]
            is_labelled = (targets >= 0) & counts
            is_right = scores.argmax(1).cpu() == targets
            hits[label] += int(is_right[is_labelled].sum())
            totals[label] += int(is_labelled.sum())
    # Every process has the same labels in the same order.
    sums = processes.sum_over_processes(torch.tensor([[hits[label], totals[label]] for label in hits]))
    shares = {}
    for label, (right, total) in zip(hits, sums.tolist(), strict=True):
        if total:
            shares[f"right_{label}"] = right / total
    if not shares:
        raise ValueError(f"pretrain: none of {len(rows)} validation slides has a label")
    # Every label counts alike, however few slides have it.
    score = sum(shares.values()) / len(shares)
    return {"score": score} | shares
