"""How slide_vqa comes to a frozen compressor: read from a file, or trained to tell the labels of whole slides from its tokens."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import evolve
from torch import Generator, Tensor

from medvl.base import files, processes
from medvl.base.tree import Tree, flatten, map_leaves
from medvl.components import compress
from medvl.components.slots import CompressConfig
from medvl.slides import heads
from medvl.slides.names import slide_name
from medvl.slides.reference_files import write_compressor
from medvl.slides.tokens import Features, open_features, whole
from medvl.systems.slide_vqa import model
from medvl.systems.slide_vqa.model import Config, path
from medvl.training import gradients, loop, order, states
from medvl.training.optim import Rate, adamw, warmup_cosine


def fit_compressor(
    cfg: Config, folder: Path, log: Callable[[str], None] = print
) -> tuple[CompressConfig, Tree]:
    """The frozen compressor: read, or trained on labels of slides (or gone on with) in the run folder.

    Of several processes each has its share of the slides of a batch; the balance of slots is over its own.
    """
    if cfg.pretrain.file:
        return model.open_compressor(cfg)
    how, device = cfg.pretrain, processes.choose_device(cfg.train.device)
    parts, classes = labelled(cfg)
    of = open_features(
        path(cfg, "features"), [r["slide"] for part in parts.values() for r in part], dims=cfg.data.dims
    )
    if of.missing:
        raise ValueError(
            f"{path(cfg, 'labels')}: {len(of.missing)} slides have no features, the first is {of.missing[0]}"
        )
    sizes = evolve(cfg.compress, dim=of.dims)
    gen = Generator().manual_seed(cfg.seed)
    params: Tree = {"compressor": compress.init_compress(sizes, gen)}
    slots = sizes.slots if how.head == "places" else 0
    params["heads"] = heads.init_heads(sizes.dim, {c: len(v) for c, v in classes.items()}, gen, slots=slots)
    params = map_leaves(lambda t: t.to(device), params)
    at = partial(_bags, of, cfg=cfg, classes=classes)
    rate = lambda name: how.router_lr if name.startswith("compressor/gate/") else how.lr
    schedule = warmup_cosine(how.steps, how.warmup)
    optimizer = adamw(
        lambda n: Rate(lr=rate(n), weight_decay=how.weight_decay), schedule, beta2=0.999, eps=1e-8
    )
    chosen = order.batch_indices(
        [r["slide"] for r in parts["train"]],
        how.batch,
        cfg.seed,
        rank=processes.rank(),
        world=processes.world_size(),
    )
    log(f"compressor: {how.steps} steps on {', '.join(how.labels)} of {len(parts['train'])} slides")
    state = loop.train_steps(
        loop.make_step(
            gradients.value_and_grad(partial(_label_loss, sizes, how.aux)), optimizer, clip=1.0, seed=cfg.seed
        ),
        states.State(params=params, opt=optimizer.init(params)),
        lambda i: at([parts["train"][j] for j in chosen(i)]),
        steps=how.steps,
        folder=folder / "compressor",
        every=loop.Every(log=how.log, save=how.save, validate=how.validate),
        validate=lambda state: _labels_right(sizes, state.params, at, parts["valid"], how.batch),
        title="compressor",
        lr=lambda i: how.lr * schedule(i),
        log=log,
    )
    processes.wait_for_all()
    state = states.read_trained(folder / "compressor", "best", "cpu", model=params)
    if processes.rank() == 0 and sizes.kind == "moe" and not (folder / "moe_compressor.pt").exists():
        write_compressor(state.params["compressor"], folder / "moe_compressor.pt")
    return sizes, state.params["compressor"]


def labelled(cfg: Config) -> tuple[dict[str, list[dict[str, str]]], dict[str, list[str]]]:
    """({"train", "valid": rows of slides}, {label: its classes}) of the table that a compressor is trained on.

    Raises:
        ValueError: as `files.read_csv` and `slide_classify.classes_of`; a slide twice; too few slides, or none with a label, in a split.
    """
    where, how = path(cfg, "labels"), cfg.pretrain
    rows = files.read_csv(where, ("slide", "split", *how.labels))
    parts = {s: [r for r in rows if r["split"] == s] for s in ("train", "valid")}
    if empty := [s for s, part in parts.items() if not part]:
        splits = ", ".join(sorted({r["split"] for r in rows}))
        raise ValueError(
            f'{where}: must have slides of the splits "train" and "valid", found none of {empty[0]!r}, only {splits}'
        )
    times = Counter(slide_name(r["slide"]) for part in parts.values() for r in part)
    if twice := [n for n, k in times.items() if k > 1]:
        raise ValueError(
            f"{where}: every slide must be there once, in one split; {len(twice)} are there again, the first is {twice[0]}"
        )
    try:
        classes = heads.classes_of(parts["train"], how.labels)
    except ValueError as e:
        raise ValueError(f"{where}, split train: {e}") from e
    if not any(r[c] in found for r in parts["valid"] for c, found in classes.items()):
        raise ValueError(
            f"{where}: slides of the split valid must have labels that train has, none has one of {', '.join(classes)}"
        )
    if len(parts["train"]) < how.batch:
        raise ValueError(
            f"{where}: pretrain.batch is {how.batch}, found {len(parts['train'])} slides of the split train; lower it"
        )
    return parts, classes


def read_fitted(cfg: Config, folder: Path) -> tuple[CompressConfig, Tree]:
    """The compressor of a run, as `fit_compressor` returned it."""
    if cfg.pretrain.file:
        return model.open_compressor(cfg)
    # It knows the width of the features that it was trained on; its own parameters say what it is.
    best = states.read_state(folder / "compressor" / "best.pt", "cpu")
    params = states.read_trained(folder / "compressor", "best", "cpu", model=best.params).params["compressor"]
    table = {"attention": "tanh/weight", "perceiver": "latents"}.get(cfg.compress.kind, "experts/norm/weight")
    return evolve(cfg.compress, dim=flatten(params)[table].shape[-1]), params


def _bags(
    of: Features, rows: Sequence[dict[str, str]], *, cfg: Config, classes: dict[str, list[str]]
) -> dict[str, Tensor]:
    """A ragged batch of slides: x [b, n, d], mask [b, n], and the number of the class of each label [b], -1 where there is none."""
    bags = [torch.from_numpy(whole(of, r["slide"], cfg.pretrain.most)).float() for r in rows]
    longest = max(max(map(len, bags)), 1)
    x = torch.zeros(len(bags), longest, of.dims)
    for i, bag in enumerate(bags):
        x[i, : len(bag)] = bag
    out = {"x": x, "mask": torch.arange(longest) < torch.tensor([len(b) for b in bags])[:, None]}
    return out | {
        c: torch.tensor([v.index(r[c]) if r[c] in v else -1 for r in rows]) for c, v in classes.items()
    }


def _label_loss(
    cfg: CompressConfig, aux: float, params: Tree, batch: dict[str, Tensor]
) -> tuple[Tensor, gradients.Aux]:
    device = next(iter(flatten(params).values())).device
    gen = Generator(device).manual_seed(int(torch.randint(2**31, ())))  # the step's own, see loop.make_step
    got = compress.compress(
        cfg, params["compressor"], batch["x"].to(device), batch["mask"].to(device), gen=gen
    )
    loss, right = heads.label_loss(
        heads.label_logits(params["heads"], got.tokens), {c: t.to(device) for c, t in batch.items()}
    )
    balance = compress.reference_aux(got.aux) if cfg.kind == "moe" else torch.zeros((), device=device)
    return loss + aux * balance, gradients.Aux(
        metrics={f"right_{c}": r for c, r in right.items()} | {"labels": loss, "balance": balance}
    )


def _labels_right(
    cfg: CompressConfig,
    params: Tree,
    at: Callable[..., dict[str, Tensor]],
    rows: Sequence[dict[str, str]],
    size: int,
) -> dict[str, float]:
    """Mean share of right labels of the validation slides."""
    device = next(iter(flatten(params).values())).device
    hits, known = dict[str, int](), dict[str, int]()
    for i in range(0, len(rows), size):
        batch = at(rows[i : i + size])
        with torch.no_grad():
            got = compress.compress(
                cfg, params["compressor"], batch["x"].to(device), batch["mask"].to(device)
            )
            logits = heads.label_logits(params["heads"], got.tokens)
        for c, x in logits.items():
            there = batch[c] >= 0
            hits[c] = hits.get(c, 0) + int((x.argmax(1).cpu() == batch[c])[there].sum())
            known[c] = known.get(c, 0) + int(there.sum())
    shares = {f"right_{c}": hits[c] / known[c] for c in hits if known[c]}
    if not shares:
        raise ValueError(f"pretrain: none of {len(rows)} validation slides has a label")
    return {"score": sum(shares.values()) / len(shares)} | shares
