"""How slide_vqa runs: data put in place, the compressor trained and frozen, two stages, the benchmark, the map of an answer."""

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve
from torch import Generator, Tensor
from tqdm import tqdm

from medvl import choices, compressor, config, files, generation, plots, report, slide_classify, slidebench, train, tuning, vlm
from medvl.compressor_files import write_compressor
from medvl.data import conversations, order, phantom_slide_talk
from medvl.data.slide_questions import SlideTalk, file_digest, published_as, read_slide_talks
from medvl.generation import Generated, Sampling
from medvl.optim import Rate, adamw, warmup_cosine
from medvl.results import Result
from medvl.slide_maps import write_map
from medvl.slide_relevance import gradient_attribution, patch_relevance
from medvl.slide_tokens import Features, features_file, open_features, patch_weights, slide_tokens, whole
from medvl.slots import CompressConfig
from medvl.systems import slide_vqa
from medvl.systems.slide_vqa import Config, Encoded, Model
from medvl.tree import Tree, flatten
from medvl.tuning import Stage

_log = logging.getLogger("medvl")


# Data -----------------------------------------------------------------------------------------------------------------------------------
def prepare(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: slides are drawn, files must be there and readable, and every slide that is trained on must have features.

    Raises:
        ValueError: what is missing; faults of single questions are warnings.
    """
    if cfg.data.source == "phantoms":
        drawn = phantom_slide_talk.draw_slides(cfg.data.phantoms, folder_of(cfg))
        log(f"drawn in {folder_of(cfg)}: " + ", ".join(f"{n} {what}" for what, n in drawn.items()))
    wanted = [*sorted({s.data for s in cfg.train.stages}), "valid", "test"]
    if missing := [path(cfg, what) for what in wanted if not path(cfg, what).exists()]:
        raise ValueError(f"{len(missing)} files are missing: {', '.join(map(str, missing))}; data.* says where they are")
    for what in wanted:
        held = read(cfg, what)
        of = open_features(path(cfg, "features"), slides_of(held), dims=cfg.data.dims)
        log(f"{what}: {len(held)} conversations about {len(of.names)} slides, {len(of.missing)} without features")
        if of.missing and what != "test":
            raise ValueError(
                f"{path(cfg, what)}: {len(of.missing)} slides have no features below {path(cfg, 'features')}, the first is "
                f"{of.missing[0]}; `invoke slides check` lists all"
            )


def folder_of(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; slides drawn by one record share one."""
    drawn = cfg.data.source == "phantoms"
    return Path(cfg.data.folder) / f"slides-{config.digest(cfg.data.phantoms)}" if drawn else Path(cfg.data.folder)


def path(cfg: Config, what: str) -> Path:
    """Where a file of the data is."""
    return Path(getattr(cfg.data, what).format(folder=folder_of(cfg)))


def read(cfg: Config, what: str) -> list[SlideTalk]:
    """The conversations of captions, questions, valid or test."""
    return read_slide_talks(path(cfg, what))


def slides_of(held: Sequence[SlideTalk]) -> list[str]:
    """The slides that are talked about, each once."""
    return list(dict.fromkeys(s for t in held for s in t.slides))


# The compressor -------------------------------------------------------------------------------------------------------------------------
def fit_compressor(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[CompressConfig, Tree]:
    """The frozen compressor: read, or trained on labels of slides (or gone on with) in the run folder."""
    if cfg.pretrain.file:
        return slide_vqa.open_compressor(cfg)
    how, device = cfg.pretrain, train.device(cfg.train.device)
    rows = files.read_csv(path(cfg, "labels"), ("slide", "split", *how.labels))
    classes = slide_classify.classes_of([r for r in rows if r["split"] == "train"], how.labels)
    parts = {s: [r for r in rows if r["split"] == s] for s in ("train", "valid")}
    of = open_features(path(cfg, "features"), [r["slide"] for part in parts.values() for r in part], dims=cfg.data.dims)
    if of.missing:
        raise ValueError(f"{path(cfg, 'labels')}: {len(of.missing)} slides have no features, the first is {of.missing[0]}")
    sizes = evolve(cfg.compress, dim=of.dims)
    gen = Generator().manual_seed(cfg.seed)
    params: Tree = {"compressor": compressor.init_compress(sizes, gen)}
    slots = sizes.slots if how.head == "places" else 0
    params["heads"] = slide_classify.init_heads(sizes.dim, {c: len(v) for c, v in classes.items()}, gen, slots=slots)
    params = _moved(params, device)
    at = partial(_bags, of, cfg=cfg, classes=classes)
    optimizer = adamw(lambda n: Rate(lr=how.lr, weight_decay=how.weight_decay), warmup_cosine(how.steps, how.warmup), beta2=0.999, eps=1e-8)
    log(f"compressor: {how.steps} steps on {', '.join(how.labels)} of {len(parts['train'])} slides")
    state = train.fit(
        train.make_step(train.value_and_grad(partial(_label_loss, sizes, how.aux)), optimizer, clip=1.0, seed=cfg.seed),
        train.State(params=params, opt=optimizer.init(params)),
        lambda i: at([parts["train"][j] for j in order.batch_indices([r["slide"] for r in parts["train"]], how.batch, cfg.seed, i)]),
        steps=how.steps,
        folder=folder / "compressor",
        every=train.Every(log=how.log, save=how.save, validate=how.validate),
        validate=lambda state: _labels_right(sizes, state.params, at, parts["valid"], how.batch),
        log=lambda line: log("  " + "  ".join(f"{k} {v:.4g}" for k, v in line.items())),
    )
    train.meet()
    state = train.read_state(folder / "compressor" / "best.pt", "cpu")
    if train.rank() == 0 and sizes.kind == "moe" and not (folder / "moe_compressor.pt").exists():
        write_compressor(state.params["compressor"], folder / "moe_compressor.pt")
    return sizes, state.params["compressor"]


def read_fitted(cfg: Config, folder: Path) -> tuple[CompressConfig, Tree]:
    """The compressor of a run, as `fit_compressor` returned it."""
    if cfg.pretrain.file:
        return slide_vqa.open_compressor(cfg)
    params = train.read_state(folder / "compressor" / "best.pt", "cpu").params["compressor"]
    width = {"moe": ("gate", "weight"), "soft_moe": ("mu",), "attention": ("tanh", "weight"), "perceiver": ("latents",)}[cfg.compress.kind]
    table = params
    for key in width:
        table = table[key]
    return evolve(cfg.compress, dim=table.shape[-1]), params


def _bags(of: Features, rows: Sequence[dict[str, str]], *, cfg: Config, classes: dict[str, list[str]]) -> dict[str, Tensor]:
    """A ragged batch of slides: x [b, n, d], mask [b, n], and the number of the class of each label [b], -1 where there is none."""
    bags = [torch.from_numpy(whole(of, r["slide"], cfg.pretrain.most)).float() for r in rows]
    longest = max(max(map(len, bags)), 1)
    x = torch.zeros(len(bags), longest, of.dims)
    for i, bag in enumerate(bags):
        x[i, : len(bag)] = bag
    out = {"x": x, "mask": torch.arange(longest) < torch.tensor([len(b) for b in bags])[:, None]}
    return out | {c: torch.tensor([v.index(r[c]) if r[c] in v else -1 for r in rows]) for c, v in classes.items()}


def _label_loss(cfg: CompressConfig, aux: float, params: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, train.Aux]:
    device = next(iter(flatten(params).values())).device
    gen = Generator(device).manual_seed(int(torch.randint(2**31, ())))  # the step's own, see train.make_step
    got = compressor.compress(cfg, params["compressor"], batch["x"].to(device), batch["mask"].to(device), gen=gen)
    loss, right = slide_classify.label_loss(
        slide_classify.classify(params["heads"], got.tokens), {c: t.to(device) for c, t in batch.items()}
    )
    balance = compressor.reference_aux(got.aux) if cfg.kind == "moe" else torch.zeros((), device=device)
    return loss + aux * balance, train.Aux(metrics={f"right_{c}": r for c, r in right.items()} | {"labels": loss, "balance": balance})


def _labels_right(
    cfg: CompressConfig, params: Tree, at: Callable[..., dict[str, Tensor]], rows: Sequence[dict[str, str]], size: int
) -> dict[str, float]:
    """Mean share of right labels of the validation slides."""
    device = next(iter(flatten(params).values())).device
    hits, known = dict[str, int](), dict[str, int]()
    for i in range(0, len(rows), size):
        batch = at(rows[i : i + size])
        with torch.no_grad():
            got = compressor.compress(cfg, params["compressor"], batch["x"].to(device), batch["mask"].to(device))
            logits = slide_classify.classify(params["heads"], got.tokens)
        for c, x in logits.items():
            there = batch[c] >= 0
            hits[c] = hits.get(c, 0) + int((x.argmax(1).cpu() == batch[c])[there].sum())
            known[c] = known.get(c, 0) + int(there.sum())
    shares = {f"right_{c}": hits[c] / known[c] for c in hits if known[c]}
    if not shares:
        raise ValueError(f"pretrain: none of {len(rows)} validation slides has a label")
    return {"score": sum(shares.values()) / len(shares)} | shares


# Stages ---------------------------------------------------------------------------------------------------------------------------------
def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree, Tree]:
    """Train (or go on with) the compressor and all stages in the run folder."""
    compressor = fit_compressor(cfg, folder, log)
    held = {what: read(cfg, what) for what in sorted({s.data for s in cfg.train.stages})}
    texts = [m["content"] for of in held.values() for t in of for m in t.messages]
    model, params = slide_vqa.init(cfg, folder, compressor, texts, device=train.device(cfg.train.device))
    valid = slide_vqa.encode(model, read(cfg, "valid")[: cfg.train.valid or None])
    tokens = tokens_of(model, folder, [t for of in held.values() for t in of] + list(valid.talks), log)
    for i, stage in enumerate(cfg.train.stages):
        data = slide_vqa.encode(model, held[stage.data])
        log(f"{stage.data}: {len(data.samples)} conversations, {data.refused} more are longer than the context and left out")
        params = tuning.fit_stage(
            cfg.train,
            stage,
            params,
            slide_vqa.loss_of(model),
            batches(model, data, tokens, cfg),
            folder / f"{i}-{stage.name}",
            cut=slide_vqa.cut,
            validate=_validation(model, stage, data, valid, tokens),
            seed=cfg.seed,
            log=log,
        )
    return model, params, {}


def load(folder: Path) -> tuple[Model, Tree, Tree]:
    """Model and weights of a trained run, as `fit` returned them."""
    cfg = config.load(folder / "config.json", Config)
    model, params = slide_vqa.init(cfg, folder, read_fitted(cfg, folder), device=train.device(cfg.train.device))
    for i, stage in enumerate(cfg.train.stages):
        params = tuning.read_stage(cfg.train, params, folder / f"{i}-{stage.name}")
    return model, params, {}


def tokens_of(model: Model, folder: Path, talks: Sequence[SlideTalk], log: Callable[[str], None] = print) -> dict[str, Tensor]:
    """The tokens of all slides with features that are talked about."""
    if model.cfg.data.blind:
        return {}
    of = open_features(path(model.cfg, "features"), slides_of(talks), dims=model.compress.dim)
    return slide_tokens(model.compress, model.compressor, of, folder / "tokens")


def batches(model: Model, data: Encoded, tokens: dict[str, Tensor], cfg: Config) -> Callable[[int], dict[str, Tensor]]:
    """i -> batch: this process's share of `train.batch` conversations."""
    names, size, r, n = [str(i) for i in range(len(data.samples))], cfg.train.batch, train.rank(), train.world()

    def batch_at(i: int) -> dict[str, Tensor]:
        return slide_vqa.collate(model, data, tokens, order.batch_indices(names, size, cfg.seed, i)[r * size // n : (r + 1) * size // n])

    return batch_at


def _validation(model: Model, stage: Stage, data: Encoded, valid: Encoded, tokens: dict[str, Tensor]) -> Callable[[Tree], float] | None:
    """Questions are validated; of captions, which have no set of their own, the last state counts."""
    if stage.data != "questions":
        return None
    loss, size = slide_vqa.loss_of(model), model.cfg.evaluate.batch

    def mean(params: Tree) -> float:
        total, n = 0.0, 0
        for i in range(0, len(valid.samples), size):
            with torch.no_grad():
                value, count, _ = loss(params, slide_vqa.collate(model, valid, tokens, range(i, min(i + size, len(valid.samples)))))
            total, n = total + float(value), n + int(count)
        return total / n

    return mean


# Evaluation -----------------------------------------------------------------------------------------------------------------------------
def assess(model: Model, params: Tree, means: Tree, folder: Path, experiment: str) -> tuple[list[Result], Path]:
    """Answer the test questions; writes `benchmark_results.json`, a table of categories, and the report into `folder`."""
    cfg, held = model.cfg, read(model.cfg, "test")
    tokens = tokens_of(model, folder.parent, held)
    asked = _shuffled(held, cfg.seed) if cfg.data.shuffle else held
    there = [i for i, t in enumerate(asked) if cfg.data.blind or all(s in tokens for s in t.slides)]
    said = dict(zip(there, answer(model, params, [asked[i] for i in there], tokens), strict=True))
    rows, open_ = [], list[tuple[str, str]]()
    for i, t in enumerate(held):
        if not t.choices:
            open_.append((said.get(i, ""), t.answer))
            continue
        broad, narrow = (*t.category, "", "")[:2]
        about = {"broad": broad, "narrow": narrow or t.task, "id": t.id or str(t.row)}
        rows.append(
            slidebench.answered(said.get(i), t.choices, t.answer, slide=(*t.names, *t.slides, t.id)[0], missing=i not in said, **about)
        )
    gen = Generator().manual_seed(cfg.seed)
    results = slidebench.score(rows, split="test", experiment=experiment, n=cfg.evaluate.bootstrap, gen=gen) if rows else []
    if open_:
        results += slidebench.score_texts([a for a, _ in open_], [g for _, g in open_], split="test", experiment=experiment)
    digest = file_digest(path(cfg, "test"))
    source = {"file": path(cfg, "test").name, "sha256": digest, "published_as": published_as(digest)}
    if rows:
        slidebench.write_benchmark(folder, rows, results, source=source, facts={"experiment": experiment})
    last = folder.parent / f"{len(cfg.train.stages) - 1}-{cfg.train.stages[-1].name}" / "metrics.jsonl"
    known = f" ({source['published_as']})" if source["published_as"] else ""
    notes = (
        f"Questions of {source['file']}, sha256 {digest[:16]}{known}. An answer that chooses no letter, or several, is wrong, and so is "
        "one whose slide has no features.",
    )
    return results, report.write_report(folder, f"{experiment}: slides", results, {"Training": plots.curves(last)}, notes)


def answer(model: Model, params: Tree, talks: Sequence[SlideTalk], tokens: dict[str, Tensor]) -> list[str]:
    """Greedy answers, or the likeliest letters, of conversations whose slides all have tokens."""
    cfg, said = model.cfg.evaluate, list[str]()
    data = slide_vqa.encode(model, talks, prompt=True)
    weights = slide_vqa.weights_of(model, params)
    for i in tqdm(range(0, len(talks), cfg.batch), desc="answers", leave=False, disable=None):
        rows = range(i, min(i + cfg.batch, len(talks)))
        batch = slide_vqa.collate(model, data, tokens, rows, side="left")
        with torch.no_grad():
            inputs = slide_vqa.inputs_of(model, params, weights, batch)
        options = [choices.lettered(data.talks[j].choices) for j in rows if data.talks[j].choices]
        if cfg.by == "likelihood" and len(options) == len(rows):
            ids = [[model.chat.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in of] for of in options]
            scores, _ = generation.score_options(model.chat.skeleton, weights, inputs, ids)
            said += choices.letters_by_likelihood(scores.tolist(), options)
        else:
            said += _generated(model, weights, inputs, cfg.max_tokens).texts
    return said


def _generated(model: Model, weights: dict[str, Tensor], inputs: dict[str, Tensor], most: int) -> Generated:
    tok = model.chat.tokenizer
    ends = {tok.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>") if t in tok.get_vocab()} | {tok.eos_token_id}
    how = Sampling(max_tokens=most, end=tuple(sorted(e for e in ends if e is not None)))
    return generation.generate(how, model.chat.skeleton, weights, inputs, tok=tok)


def _shuffled(held: Sequence[SlideTalk], seed: int) -> list[SlideTalk]:
    """Every slide's questions about another slide."""
    names = slides_of(held)
    turned = names[:]
    random.Random(seed).shuffle(turned)
    other = {turned[i]: turned[(i + 1) % len(turned)] for i in range(len(turned))}
    return [evolve(t, slides=tuple(other[s] for s in t.slides)) for t in held]


# One slide ------------------------------------------------------------------------------------------------------------------------------
def look_at_slide(
    folder: files.PathLike, slide: files.PathLike, question: str, out: files.PathLike = "", most: int = 128
) -> dict[str, Any]:
    """Ask a trained run about one slide; for research, not for diagnosis.

    Args:
        folder: of the run.
        slide: a file of patch features, of any format that is read.
        out: write the map of where the answer came from into this folder.
    Returns:
        "answer", "relevance" [n] of the patches, "coords" [n, 2] or None, "slots" [k] (what each token was worth), "map" (its folder).
    """
    folder, slide = Path(folder), Path(slide)
    model, params, _ = load(folder)
    of = features_file(slide, dims=model.compress.dim)
    tokens = slide_tokens(model.compress, model.compressor, of, folder / "tokens")
    talk = SlideTalk(messages=_turn(question), slides=of.names)
    how = evolve(model.cfg.evaluate, max_tokens=most, by="text")
    (said,) = answer(evolve(model, cfg=evolve(model.cfg, evaluate=how)), params, [talk], tokens)
    slots = relevance_of_slots(model, params, talk, said, tokens)
    weights, coords = patch_weights(model.compress, model.compressor, of, of.names[0])
    relevance = patch_relevance(weights, slots, sign="positive")
    found = {"answer": said, "relevance": relevance, "coords": coords, "slots": slots, "map": ""}
    if out:
        found["map"] = str(write_map(out, Path(slide.stem).name, relevance, weights, coords, of.patch_size(of.names[0]) or 256))
    return found


def relevance_of_slots(model: Model, params: Tree, talk: SlideTalk, said: str, tokens: dict[str, Tensor]) -> np.ndarray:
    """What each of a slide's tokens was worth for this answer, [k]: gradient times token of the answer's log-likelihood."""
    whole_ = evolve(talk, messages=(*talk.messages[:-1], {"role": "assistant", "content": said or "-"}))
    data = slide_vqa.encode(model, [whole_])
    batch = slide_vqa.collate(model, data, tokens, [0])
    weights = slide_vqa.weights_of(model, params)
    with torch.no_grad():
        inputs = slide_vqa.inputs_of(model, params, weights, batch)
    places = batch["visual"][0].nonzero()[:, 0]

    def score(visual: Tensor) -> Tensor:
        embeds = inputs["inputs_embeds"].index_copy(1, places, visual[None].to(inputs["inputs_embeds"].dtype))
        labels = batch["labels"].to(embeds.device)
        total, _ = vlm.answer_loss(model.chat.skeleton, weights, inputs | {"inputs_embeds": embeds, "labels": labels})
        return -total

    return gradient_attribution(score, inputs["inputs_embeds"][0, places].float(), signed=True).numpy()


def _turn(question: str) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": ""}


# Before a run ---------------------------------------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training conversation of the last stage as the model gets it, the trained tokens marked."""
    held = read(cfg, cfg.train.stages[-1].data)
    if not 0 <= number < len(held):
        raise ValueError(f"labels: sample must be below {len(held)}, got {number}")
    model, _ = slide_vqa.init(cfg, folder, (cfg.compress, {}), _texts(cfg), device=torch.device("meta"))
    return conversations.show(model.chat.tokenizer, slide_vqa.encode(model, held[number : number + 1]).samples[0])


def memory(cfg: Config, folder: Path) -> dict[str, dict[str, int]]:
    """{stage: {part: bytes}} that one process will need on its device, on tensors without storage; shards count whole."""
    model, params = slide_vqa.init(cfg, folder, (cfg.compress, {}), _texts(cfg), device=torch.device("meta"))
    n = min(cfg.train.batch, 2 * cfg.train.chunk)
    ids = torch.ones(n, cfg.chat.context, dtype=torch.int64)
    token = model.chat.tokenizer.convert_tokens_to_ids(conversations.QWEN_VL.token)
    ids[:, : model.compress.slots] = token
    batch = {"ids": ids, "labels": torch.ones_like(ids), "mask": ids.bool(), "visual": ids == token}
    batch["images"] = torch.ones(n, dtype=torch.int64)
    batch["tokens"] = torch.zeros(n, model.compress.slots, model.compress.dim)
    loss = slide_vqa.loss_of(model)
    return {s.name: tuning.memory_of(cfg.train, s, params, loss, slide_vqa.cut, batch, cfg.seed) for s in cfg.train.stages}


def _texts(cfg: Config) -> list[str]:
    held = [t for what in {s.data for s in cfg.train.stages} if path(cfg, what).exists() for t in read(cfg, what)]
    return [m["content"] for t in held for m in t.messages]


def _moved(tree: Tree, device: torch.device) -> Tree:
    return {k: _moved(v, device) if isinstance(v, dict) else v.to(device) for k, v in tree.items()}
