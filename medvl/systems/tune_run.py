"""How tune runs: its data put in place and looked at, its stages trained, its answers scored, its memory foretold."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from tqdm import tqdm

from medvl import config, estimate, files, generation, hub, intern_vl, lora, plots, qwen_vl, report, shards, train
from medvl.data import conversations, images, order, phantom_pictures
from medvl.data.conversation_files import Conversation, read_conversations
from medvl.data.conversations import Sample
from medvl.generation import Sampling
from medvl.muon import muon
from medvl.optim import Optimizer, Rate, adamw, routed, warmup_cosine, with_master
from medvl.quant import eight_bit
from medvl.results import Result
from medvl.systems import tune
from medvl.systems.tune import Config, Model, Stage
from medvl.tree import Tree, count, flatten, merge, split

_log = logging.getLogger("medvl")
SPLITS = ("train", "valid", "test")


def prepare(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: pictures are drawn, files must be there.

    Raises:
        ValueError: lists every file that is missing.
    """
    if cfg.data.source == "phantoms":
        drawn = phantom_pictures.draw_pictures(cfg.data.phantoms, folder_of(cfg))
        log(f"{sum(drawn.values())} pictures drawn in {folder_of(cfg)}: " + ", ".join(f"{n} {split}" for split, n in drawn.items()))
    missing = [path(cfg, name) for name in SPLITS if not path(cfg, name).exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing: {', '.join(map(str, missing))}. Each is JSON lines of conversations "
            '({"messages": [{"role": "user", "content": "<image>..."}, ...], "images": [...]}); data.conversations says where they are'
        )


def folder_of(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; pictures of one PictureConfig share one."""
    drawn = cfg.data.source == "phantoms"
    return Path(cfg.data.folder) / f"pictures-{config.digest(cfg.data.phantoms)}" if drawn else Path(cfg.data.folder)


def path(cfg: Config, name: str) -> Path:
    """Where a split's conversations are."""
    return Path(cfg.data.conversations.format(folder=folder_of(cfg), split=name))


def read(cfg: Config, name: str) -> list[Conversation]:
    """The conversations of a split."""
    return read_conversations(path(cfg, name), root=cfg.data.root or None)


@frozen(kw_only=True, eq=False)
class Encoded:
    """Conversations of a split as token ids; images are opened when they are needed."""

    conversations: tuple[Conversation, ...]
    samples: tuple[Sample, ...]
    refused: int  # too long for the context


def encode(model: Model, held: Sequence[Conversation], *, prompt: bool = False) -> Encoded:
    """Token ids of conversations; those that do not fit the context are left out and counted (a warning says so)."""
    cfg = model.cfg
    if model.images is None and (sees := [c for c in held if c.images]):
        raise ValueError(f"{len(sees)} conversations have images, and {model.skeleton.name} has no eyes; choose a vision-language model")
    visual = [[_tokens(model.images, p) for p in c.images] if model.images else [] for c in held]
    how: dict[str, Any] = {"placeholder": model.placeholder, "context": cfg.data.context, "template": cfg.data.template or None}
    if prompt:
        samples = [
            conversations.encode_prompt(model.tokenizer, c.messages[:-1], visual=v, **how | {"context": None})
            for c, v in zip(held, visual, strict=True)
        ]
        return Encoded(conversations=tuple(held), samples=tuple(samples), refused=0)
    found, refused = conversations.encode_all(model.tokenizer, [c.messages for c in held], visual=visual, **how)
    out = {i for i, _ in refused}
    return Encoded(conversations=tuple(c for i, c in enumerate(held) if i not in out), samples=tuple(found), refused=len(refused))


def collate(model: Model, data: Encoded, chosen: Sequence[int], side: str = "right") -> dict[str, Tensor]:
    """A batch of `loss_sum`: ids, mask, labels [b, t], images [b] (how many of each row), and their patches."""
    tok: Any = model.tokenizer
    pad = tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id or 0
    batch = conversations.collate([data.samples[i] for i in chosen], pad, side="left" if side == "left" else "right")
    paths = [p for i in chosen for p in data.conversations[i].images]
    batch["images"] = torch.tensor([len(data.conversations[i].images) for i in chosen])
    if not paths or model.images is None:
        return batch
    opened = [images.open_image(p) for p in paths]
    if isinstance(model.images, intern_vl.TileConfig):
        return batch | {"pixel_values": intern_vl.tile_all(model.images, opened)[0]}
    patches, grid = qwen_vl.patchify_all(model.images, opened)
    return batch | {"pixel_values": patches, "image_grid_thw": grid}


def batches(model: Model, data: Encoded, size: int, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """i -> batch: this process's share of `size` conversations."""
    names, r, n = [str(i) for i in range(len(data.samples))], train.rank(), train.world()

    def batch_at(i: int) -> dict[str, Tensor]:
        return collate(model, data, order.batch_indices(names, size, seed, i)[r * size // n : (r + 1) * size // n])

    return batch_at


# Training -------------------------------------------------------------------------------------------------------------------------------
def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree, Tree]:
    """Train (or go on with) all stages in the run folder; returns the model, its weights and no running means."""
    held = read(cfg, "train")
    model, params = tune.init(cfg, folder, [m["content"] for c in held for m in c.messages], device=train.device(cfg.train.device))
    data, valid = encode(model, held), encode(model, read(cfg, "valid")[: cfg.train.valid or None])
    tokens = sum(len(s.ids) for s in data.samples)
    log(f"{len(data.samples)} conversations of {tokens:,} tokens; {data.refused} more are longer than the context and left out")
    if model.adapter is not None:
        own, base, share = lora.count(model.adapter, params["model"])
        log(f"adapter: {own:,} numbers on {len(model.adapter.factors)} layers, {share:.2f} % of {own + base:,}")
    for i, stage in enumerate(cfg.train.stages):
        params = _fit_stage(model, params, stage, (data, valid), folder / f"{i}-{stage.name}", log)
    return model, params, {}


def _fit_stage(model: Model, params: Tree, stage: Stage, data: tuple[Encoded, Encoded], folder: Path, log: Callable[[str], None]) -> Tree:
    cfg = model.cfg
    trained, frozen_ = split(params, stage.train)
    if cfg.train.shard:
        trained = shards.shard(trained, shards.mesh(train.device(cfg.train.device)))
    log(f"stage {stage.name}: {stage.steps} steps train {count(trained):,} of {count(params):,} parameters")
    everything = lambda p: merge(frozen_, p)
    optimizer = optimizer_of(cfg, stage, trained)
    step = train.make_step(gradient_of(model, everything), optimizer, clip=cfg.train.clip, seed=cfg.seed)

    def validate(state: train.State) -> dict[str, float]:
        loss = _mean_loss(model, everything(state.params), data[1])
        return {"score": -loss, "loss": loss}

    state = train.fit(
        step,
        train.State(params=trained, opt=optimizer.init(trained)),
        batches(model, data[0], cfg.train.batch, cfg.seed),
        steps=stage.steps,
        folder=folder,
        every=train.Every(log=cfg.train.log, save=cfg.train.save, validate=cfg.train.validate),
        validate=validate,
        log=lambda line: log("  " + "  ".join(f"{k} {v:.4g}" for k, v in line.items())),
    )
    if cfg.train.keep == "best" or cfg.train.shard:
        train.meet()  # process 0 has written it
        state = train.read_state(folder / f"{cfg.train.keep}.pt", train.device(cfg.train.device))
    return everything(state.params)


def gradient_of(model: Model, everything: Callable[[Tree], Tree]) -> train.Grad:
    """The gradient of the mean token loss by what a stage trains; `everything` adds the rest of the weights."""
    cfg = model.cfg.train
    skeleton = hub.checkpointed(model.skeleton) if cfg.checkpoint else model.skeleton
    loss = lambda p, batch: tune.loss_sum(model, skeleton, everything(p), batch)
    return train.token_value_and_grad(loss, chunk=cfg.chunk, cut=tune.cut, rows=lambda b: len(b["ids"]))


def optimizer_of(cfg: Config, stage: Stage, trained: Tree) -> Optimizer:
    """AdamW as the record wants it: the rounding of 16-bit weights, the precision of the moments."""
    rate = Rate(lr=stage.lr, weight_decay=stage.weight_decay)
    low = any(t.dtype in (torch.bfloat16, torch.float16) for t in flatten(trained).values())
    made = adamw(
        lambda name: rate,
        warmup_cosine(stage.steps, stage.warmup),
        beta2=0.999,
        eps=1e-8,
        rounding="stochastic" if low and cfg.train.rounding == "stochastic" else "nearest",
        seed=cfg.seed,
        packing=eight_bit() if cfg.train.moments == "8bit" else None,
    )
    made = with_master(made) if low and cfg.train.rounding == "master" else made
    if not stage.muon:
        return made
    inner = {n for n, t in flatten(trained).items() if t.dim() > 1 and not re.search(r"(embed_tokens|lm_head|pos_embed)\.", n)}
    turned = muon(lambda name: Rate(lr=stage.muon, weight_decay=stage.weight_decay), warmup_cosine(stage.steps, stage.warmup))
    return routed(lambda n: "muon" if n in inner else "adamw", {"adamw": made, "muon": turned})


def _mean_loss(model: Model, params: Tree, data: Encoded) -> float:
    """Mean loss over the trained tokens of a split."""
    total, n = 0.0, 0
    for i in range(0, len(data.samples), model.cfg.evaluate.batch):
        with torch.no_grad():
            batch = collate(model, data, range(i, min(i + model.cfg.evaluate.batch, len(data.samples))))
            value, count_, _ = tune.loss_sum(model, model.skeleton, params, batch)
        total, n = total + float(value), n + int(count_)
    return total / n


def load(folder: Path) -> tuple[Model, Tree, Tree]:
    """Model and weights of a trained run, as `fit` returned them."""
    cfg = config.load(folder / "config.json", Config)
    device = train.device(cfg.train.device)
    model, params = tune.init(cfg, folder, device=device)
    for i, stage in enumerate(cfg.train.stages):
        params = merge(params, train.read_state(folder / f"{i}-{stage.name}" / f"{cfg.train.keep}.pt", device).params)
    return model, params, {}


# Evaluation -----------------------------------------------------------------------------------------------------------------------------
def assess(model: Model, params: Tree, means: Tree, folder: Path, experiment: str) -> tuple[list[Result], Path]:
    """Answer the last question of every test conversation; writes answers, results and the report into `folder`."""
    cfg, held = model.cfg, read(model.cfg, "test")
    data = encode(model, held, prompt=True)
    said = answer(model, params, data)
    gold = [c.messages[-1]["content"] for c in held]
    right = [same_answer(a, g) for a, g in zip(said, gold, strict=True)]
    kinds = [str(c.extra.get("category", "")) for c in held]
    lines = [
        json.dumps({"id": c.id, "category": k, "answer": a, "gold": g, "right": r}, ensure_ascii=False) + "\n"
        for c, k, a, g, r in zip(held, kinds, said, gold, right, strict=True)
    ]
    files.write_text(folder / "answers.jsonl", "".join(lines))
    rows = [_accuracy(right, "all", experiment, cfg)]
    for kind in sorted({*kinds} - {""}):
        rows.append(_accuracy([r for r, k in zip(right, kinds, strict=True) if k == kind], kind, experiment, cfg))
    usual = max(set(gold), key=gold.count)
    like: dict[str, Any] = {"split": "test", "n": len(held), "experiment": experiment}
    rows.append(Result(what="accuracy_of_the_usual_answer", subject="all", value=gold.count(usual) / len(gold), **like))
    rows.append(Result(what="token_loss", subject="all", value=_mean_loss(model, params, encode(model, held)), **like))
    last = folder.parent / f"{len(cfg.train.stages) - 1}-{cfg.train.stages[-1].name}" / "metrics.jsonl"
    notes = ("An answer is right when it equals the written one but for case, spaces and final punctuation; greedy decoding.",)
    return rows, report.write_report(folder, f"{experiment}: answers", rows, {"Training": plots.curves(last)}, notes)


def answer(model: Model, params: Tree, data: Encoded) -> list[str]:
    """Greedy answers to prompts."""
    tok, size, said = model.tokenizer, model.cfg.evaluate.batch, list[str]()
    end = {tok.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|end|>", "<|endoftext|>") if t in tok.get_vocab()} | {tok.eos_token_id}
    how = Sampling(max_tokens=model.cfg.evaluate.max_tokens, end=tuple(sorted(e for e in end if e is not None)))
    held = tune.weights_of(model, params)
    device = next(iter(params["model"].values())).device
    for i in tqdm(range(0, len(data.samples), size), desc="answers", leave=False, disable=None):
        batch = collate(model, data, range(i, min(i + size, len(data.samples))), side="left")
        inputs = {k: t.to(device) for k, t in batch.items() if k not in ("labels", "images", "visual")}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(tune.DTYPES[model.cfg.model.dtype])
        said += generation.generate(how, model.skeleton, held, inputs, tok=tok).texts
    return said


def same_answer(said: str, gold: str) -> bool:
    """Equal but for case, white space and punctuation at the end."""
    plain = lambda t: re.sub(r"\s+", " ", t).strip().rstrip(".!").strip().casefold()
    return plain(said) == plain(gold)


def _accuracy(right: Sequence[bool], subject: str, experiment: str, cfg: Config) -> Result:
    """Share of right answers with a bootstrap interval."""
    hit, n = torch.tensor(right, dtype=torch.float64), len(right)
    gen = torch.Generator().manual_seed(cfg.seed)
    means = torch.stack([hit[torch.randint(n, (n,), generator=gen)].mean() for _ in range(cfg.evaluate.bootstrap)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Result(what="accuracy", subject=subject, split="test", value=float(hit.mean()), low=low, high=high, n=n, experiment=experiment)


# Before a run ---------------------------------------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training conversation as the model gets it, the trained tokens marked."""
    held = read(cfg, "train")
    if not 0 <= number < len(held):
        raise ValueError(f"labels: sample must be below {len(held)}, got {number}")
    model, _ = tune.init(cfg, folder, [m["content"] for c in held for m in c.messages], device=torch.device("meta"))
    data = encode(model, held[number : number + 1])
    return conversations.show(model.tokenizer, data.samples[0])


def memory(cfg: Config, folder: Path) -> dict[str, dict[str, int]]:
    """{stage: {part: bytes}} that one process will need on its device: a step of the run, on tensors without storage.

    Where the data is there, its longest conversations are the batch; otherwise the whole context is trained text. Shards count whole.
    """
    there = path(cfg, "train").exists()
    held = read(cfg, "train") if there else []
    model, params = tune.init(cfg, folder, [m["content"] for c in held for m in c.messages], device=torch.device("meta"))
    n = min(cfg.train.batch, 2 * cfg.train.chunk)  # of two micro-batches and more the gradients are added up
    if there:
        data = encode(model, held)
        longest = sorted(range(len(data.samples)), key=lambda i: -len(data.samples[i].ids))[:n]
        batch = collate(model, data, (longest * n)[:n])
    else:
        batch = filled(cfg, n)
    found = {}
    for stage in cfg.train.stages:
        trained, frozen_ = split(params, stage.train)
        found[stage.name] = _memory_of(model, stage, trained, frozen_, batch)
    return found


def filled(cfg: Config, n: int) -> dict[str, Tensor]:
    """A batch of n conversations that fill the context, every token trained: the most that can come without images."""
    ids = torch.ones(n, cfg.data.context, dtype=torch.int64)
    return {"ids": ids, "labels": ids, "mask": ids.bool(), "visual": ~ids.bool(), "images": torch.zeros(n, dtype=torch.int64)}


def _memory_of(model: Model, stage: Stage, trained: Tree, frozen_: Tree, batch: dict[str, Tensor]) -> dict[str, int]:
    grad, optimizer = gradient_of(model, lambda p: merge(frozen_, p)), optimizer_of(model.cfg, stage, trained)
    state = train.State(params=trained, opt=optimizer.init(trained))

    step = train.make_step(grad, optimizer, clip=model.cfg.train.clip, seed=model.cfg.seed)
    return estimate.peak_of(lambda: step(state, batch), {"frozen weights": frozen_, "trained weights": trained, "optimiser": state.opt})


def _tokens(cfg: qwen_vl.ImageConfig | intern_vl.TileConfig, path: Path) -> int:
    """Visual tokens of an image."""
    width, height = images.open_image(path).size
    if isinstance(cfg, intern_vl.TileConfig):
        columns, rows = intern_vl.grid_of(cfg, height, width)
        return intern_vl.visual_tokens(cfg, columns * rows + (cfg.thumbnail and columns * rows > 1))
    h, w = qwen_vl.smart_resize(cfg, height, width)
    return qwen_vl.visual_tokens(cfg, (1, h // cfg.patch, w // cfg.patch))
