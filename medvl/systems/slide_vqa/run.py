"""How slide_vqa runs: data put in place, the compressor trained and frozen, two stages, the benchmark, the map of an answer."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Generator, Tensor

from medvl.base import config, files, processes, progress
from medvl.base.display import track
from medvl.base.tree import Tree
from medvl.components.slots import CompressConfig
from medvl.evaluation import choices, plots, report
from medvl.evaluation.results import Result
from medvl.hub.checkpoints import read_json
from medvl.language import chat, encoding, generate, templates
from medvl.phantoms import slide_questions
from medvl.slides import bench, names
from medvl.slides.names import slide_name
from medvl.slides.question_formats import TAG, SlideConversation
from medvl.slides.questions import published_as, read_slide_conversations
from medvl.slides.tokens import Features, open_features, slide_tokens
from medvl.systems.slide_vqa import model as slide_vqa
from medvl.systems.slide_vqa.model import Config, Encoded, Model, folder_of, path
from medvl.systems.slide_vqa.pretrain import fit_compressor, labelled, read_fitted
from medvl.training import order
from medvl.training import stages as tuning
from medvl.training.record import Stage

_log = logging.getLogger("medvl")
_MEAN = "mean_token.npy"
_ENCODER = "encoder.json"  # of the features that a run was trained on


# Data -----------------------------------------------------------------------------------------------------------------------------------
def prepare(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: slides are drawn, files must be there and readable, and every slide that is trained on must have features.

    Raises:
        ValueError: what is missing; faults of single questions are warnings.
    """
    if cfg.data.source == "phantoms":
        drawn = slide_questions.draw_slides(cfg.data.phantoms, folder_of(cfg))
        log(f"drawn in {folder_of(cfg)}: " + ", ".join(f"{n} {what}" for what, n in drawn.items()))
    wanted = [*sorted({s.data for s in cfg.train.stages}), "valid", "test"]
    if missing := [path(cfg, what) for what in wanted if not path(cfg, what).is_file()]:
        raise ValueError(
            f"{len(missing)} files are missing: {', '.join(map(str, missing))}; data.* says where they are"
        )
    people: dict[str, set[str]] = {}
    for what in wanted:
        held = read(cfg, what)
        people[what] = {names.case_of(slide) for talk in held for slide in talk.names}
        if not cfg.data.blind and not slides_of(held):
            raise ValueError(
                f"{path(cfg, what)}: none of {len(held)} records names a slide; data.blind = true takes none"
            )
        of = open_features(path(cfg, "features"), slides_of(held), dims=cfg.data.dims)
        log(
            f"{what}: {len(held)} conversations about {len(of.names)} slides, {len(of.missing)} without features"
        )
        if of.missing and (what != "test" or not (of.names or cfg.data.blind)):
            raise ValueError(
                f"{path(cfg, what)}: {len(of.missing)} slides have no features below {path(cfg, 'features')}, the first is "
                f"{of.missing[0]!r}{of.near}; `invoke slides check` lists all"
            )
        if what == "test" and cfg.evaluate.shuffled and not cfg.data.blind:
            _shuffled(held, cfg.seed, of.names)  # refuses what it cannot shuffle
    if cfg.pretrain.labels:
        people["labels"] = {names.case_of(slide_name(row["slide"])) for row in labelled(cfg)[0]["train"]}
    for trained in sorted({*people} - {"valid", "test"}):
        _warn_of_shared_patients(people, trained)


def _warn_of_shared_patients(people: Mapping[str, set[str]], trained: str) -> None:
    """Published sets share some: that is not refused, but numbers go with it. Cases of TCGA are told by name, else slides."""
    for scored in ("valid", "test"):
        both = people[trained] & people[scored]
        if both:
            _log.warning(
                "%d of %d patients in %s are in %s, too: what was learned of them is no proof",
                len(both),
                len(people[scored]),
                scored,
                trained,
            )


def read(cfg: Config, what: str) -> list[SlideConversation]:
    """The conversations of captions, questions, valid or test; those whose answer has no text are only of use in a test.

    Raises:
        ValueError: as `read_slide_conversations`; no answer has text.
    """
    held = read_slide_conversations(path(cfg, what))
    mute = {
        t.row for t in held if any(m["role"] == "assistant" and not m["content"].strip() for m in t.messages)
    }
    if not mute or what == "test":
        return held
    rows = ", ".join(map(str, sorted(mute)[:5]))
    if len(mute) == len(held):
        raise ValueError(
            f"{path(cfg, what)}: answers must have text to be trained on, each of {len(held)} records has an empty one"
        )
    _log.warning(
        "%s: %d conversations have an answer without text and are left out, such as row %s",
        path(cfg, what),
        len(mute),
        rows,
    )
    return [t for t in held if t.row not in mute]


def slides_of(held: Sequence[SlideConversation]) -> list[str]:
    """The slides that are talked about, each once."""
    return list(dict.fromkeys(s for t in held for s in t.slides))


# Stages ---------------------------------------------------------------------------------------------------------------------------------
def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree]:
    """Train (or go on with) the compressor and all stages in the run folder.

    Raises:
        ValueError: what cannot be trained; all that the record, the questions and the language model's config show is refused before
            anything is.
    """
    if cfg.train.shard and processes.world_size() == 1:
        _log.warning("train.shard: with one process nothing is cut; start several with torchrun")
    trained = {what: read(cfg, what) for what in sorted({s.data for s in cfg.train.stages})}
    texts = [m["content"] for of in trained.values() for t in of for m in t.messages]
    held = trained | {"valid": read(cfg, "valid")[: cfg.train.valid or None], "test": read(cfg, "test")}
    encoded = _encoded(cfg, folder, held, texts)
    _remember_encoder(cfg, folder, slides_of([t for of in held.values() for t in of]))
    compressor = fit_compressor(cfg, folder, log)
    model, params = slide_vqa.init(
        cfg, folder, compressor, texts, device=processes.choose_device(cfg.train.device)
    )
    tokens, valid = (
        tokens_of(model, folder, [t for of in held.values() for t in of], together=True),
        encoded["valid"],
    )
    if tokens and processes.rank() == 0:
        seen = slides_of([t for of in trained.values() for t in of])
        files.write_array(folder / _MEAN, torch.stack([tokens[s] for s in seen]).mean(0).numpy())
    for what in trained:
        n, refused = len(encoded[what].samples), encoded[what].refused
        log(f"{what}: {n} conversations, {refused} more are longer than the context and left out")
    params = tuning.shard_params(cfg.train, params)  # so that nothing here holds the whole
    params = tuning.fit_stages(
        cfg.train,
        params,
        slide_vqa.loss_of(model),
        lambda stage: batches(model, encoded[stage.data], tokens, cfg),
        folder,
        cut=slide_vqa.cut,
        conversations=lambda stage: len(encoded[stage.data].samples),
        validate=lambda stage: _validation(model, stage, encoded[stage.data], valid, tokens),
        seed=cfg.seed,
        log=log,
    )
    return model, params


def _encoded(
    cfg: Config, folder: Path, held: Mapping[str, Sequence[SlideConversation]], texts: Sequence[str]
) -> dict[str, Encoded]:
    """Token ids of {file of the data: its conversations}, made by a model without weights, that refuses what a real one would."""
    sizes = _sizes(cfg, slides_of([t for of in held.values() for t in of]))
    model, _ = slide_vqa.init(cfg, folder, (sizes, {}), texts, device=torch.device("meta"))
    found = dict[str, Encoded]()
    for what, talks in held.items():
        try:
            found[what] = slide_vqa.encode(model, talks, prompt=what == "test")
        except ValueError as e:
            raise ValueError(f"{path(cfg, what)}: {e}") from e
    for stage in cfg.train.stages:
        if (n := len(found[stage.data].samples)) < cfg.train.batch:
            raise ValueError(
                f"{path(cfg, stage.data)}: stage {stage.name} needs {cfg.train.batch} conversations for a batch, found {n} that fit the "
                "context; lower train.batch"
            )
        tuning.plan_steps(cfg.train, stage, n)
    found.pop("test")  # looked at in time; it is asked when all is trained
    return found


def _sizes(cfg: Config, slides: Sequence[str]) -> CompressConfig:
    """Those of the compressor that `fit_compressor` will give, told by its file or by the features of a slide."""
    sizes = slide_vqa.open_compressor(cfg)[0] if cfg.pretrain.file else cfg.compress
    dims = open_features(path(cfg, "features"), slides[:1], dims=cfg.data.dims).dims or sizes.dim
    if cfg.pretrain.file and dims != sizes.dim:
        raise ValueError(
            f"{cfg.pretrain.file}: takes patches of {sizes.dim} numbers, those of {slides[0]} have {dims}; another encoder?"
        )
    return evolve(sizes, dim=dims)


def load(folder: Path) -> tuple[Model, Tree]:
    """Model and weights of a trained run, as `fit` returned them.

    Raises:
        ValueError: no run, one that is not trained to its end, or whose files are broken.
    """
    cfg = config.load_run(folder, Config)
    model, params = slide_vqa.init(
        cfg, folder, read_fitted(cfg, folder), device=processes.choose_device(cfg.train.device)
    )
    params = tuning.read_stages(cfg.train, params, folder, validated=_is_validated)
    return model, params


def tokens_of(
    model: Model, folder: Path, talks: Sequence[SlideConversation], *, together: bool = False
) -> dict[str, Tensor]:
    """The tokens of all slides with features that are talked about.

    Args:
        together: all processes call this at once, so that each computes its share and finds the others'.
    """
    if model.cfg.data.blind:
        return {}
    of = open_features(path(model.cfg, "features"), slides_of(talks), dims=model.compress.dim)
    check_encoder(folder, of)
    tokens = partial(slide_tokens, model.compress, model.compressor, of, folder / "tokens")
    if together and processes.world_size() > 1:
        if mine := of.names[processes.rank() :: processes.world_size()]:
            tokens(names=mine)
        processes.wait_for_all()
    return tokens()


def _remember_encoder(cfg: Config, folder: Path, slides: Sequence[str]) -> None:
    """Keep in the run folder by which encoder the features were made that it is trained on, where they say it."""
    if cfg.data.blind and not cfg.pretrain.labels:
        return
    labels = (
        [row["slide"] for part in labelled(cfg)[0].values() for row in part] if cfg.pretrain.labels else []
    )
    of = open_features(path(cfg, "features"), [*slides, *labels], dims=cfg.data.dims)
    check_encoder(folder, of)
    if of.encoder and processes.rank() == 0:
        files.write_text(folder / _ENCODER, json.dumps({"encoder": of.encoder, "dims": of.dims}) + "\n")


def check_encoder(folder: Path, of: Features) -> None:
    """Refuse features of another encoder than a run was trained on; of one width they would give answers, and wrong ones.

    Raises:
        ValueError: both say their encoder, and they differ.
    """
    if not of.encoder or not (folder / _ENCODER).is_file():
        return
    trained = read_json(folder / _ENCODER).get("encoder")
    if trained != of.encoder:
        raise ValueError(
            f"{folder}: was trained on features of the encoder {trained!r}, those of {of.names[0]} are of {of.encoder!r}; take features "
            "of the same encoder"
        )


def mean_token(folder: Path, model: Model) -> Tensor:
    """The tokens [k, d] of a slide as they are on the average over those that a run was trained on.

    Raises:
        ValueError: the run was trained without slides.
    """
    if not (folder / _MEAN).exists():
        raise ValueError(
            f"{folder}: must have seen slides (data.blind = false), found no {_MEAN}; train it again"
        )
    return torch.from_numpy(
        files.read_array(folder / _MEAN, (model.compress.slots, model.compress.dim), "train the run again")
    )


def batches(
    model: Model, data: Encoded, tokens: dict[str, Tensor], cfg: Config
) -> Callable[[int], dict[str, Tensor]]:
    """i -> batch: this process's share of `train.batch` conversations.

    Raises:
        ValueError: as `order.batch_indices`.
    """
    names = [*map(str, range(len(data.samples)))]
    share = order.batch_indices(
        names, cfg.train.batch, cfg.seed, rank=processes.rank(), world=processes.world_size()
    )
    return lambda i: slide_vqa.collate(model, data, tokens, share(i))


def _is_validated(stage: Stage) -> bool:
    return stage.data == "questions"


def _validation(
    model: Model, stage: Stage, data: Encoded, valid: Encoded, tokens: dict[str, Tensor]
) -> Callable[[Tree], float] | None:
    """Questions are validated; of captions, which have no set of their own, the last state counts."""
    if not _is_validated(stage):
        return None
    loss, size = slide_vqa.loss_of(model), model.cfg.evaluate.batch

    def mean(params: Tree) -> float:
        total, n = 0.0, 0
        for i in track(range(0, len(valid.samples), size), "validating, batch"):
            with torch.no_grad():
                value, count, _ = loss(
                    params,
                    slide_vqa.collate(model, valid, tokens, range(i, min(i + size, len(valid.samples)))),
                )
            total, n = total + float(value), n + int(count)
        return total / n

    return mean


# Evaluation -----------------------------------------------------------------------------------------------------------------------------
def assess(model: Model, params: Tree, folder: Path, experiment: str) -> tuple[list[Result], Path]:
    """Answer the test questions; writes `benchmark_results.json`, a table of categories, and the report into `folder`."""
    cfg, held = model.cfg, read(model.cfg, "test")
    tokens = tokens_of(model, folder.parent, held)
    unfinished = [folder / f"answers{control}.unfinished.jsonl" for control in ("", "_shuffled")]
    if not _answerable(cfg, held, tokens):
        raise ValueError(
            f"{path(cfg, 'test')}: none of {len(held)} questions is about a slide that has features below {path(cfg, 'features')}; "
            "data.features says where they are, data.blind = true asks without them"
        )
    # Made before anything is answered: questions about one slide alone have no control.
    control = _shuffled(held, cfg.seed, tokens) if cfg.evaluate.shuffled and not cfg.data.blind else []
    said = _said(model, params, held, tokens, unfinished[0])
    results = _score(cfg, held, said, experiment)
    if control:
        other = _said(model, params, control, tokens, unfinished[1])
        results += [
            evolve(r, what="accuracy_shuffled")
            for r in _score(cfg, held, other, experiment)
            if r.what == "accuracy"
        ]
    digest = files.file_digest(path(cfg, "test"))
    source = {"file": path(cfg, "test").name, "sha256": digest, "published_as": published_as(digest)}
    facts = {"experiment": experiment, "by": cfg.evaluate.by}
    bench.write_benchmark(
        folder, _chosen(held, said), results, source=source, facts=facts, written=_written(held, said)
    )
    for path_of_answers in unfinished:
        path_of_answers.unlink(missing_ok=True)  # all of them are in the results now
    last = folder.parent / f"{len(cfg.train.stages) - 1}-{cfg.train.stages[-1].name}" / "metrics.jsonl"
    known = f" ({source['published_as']})" if source["published_as"] else ""
    notes = (
        f"Questions of {source['file']}, sha256 {digest[:16]}{known}. An answer that chooses no letter, or several, is wrong, and so is "
        "one whose slide has no features.",
    )
    return results, report.write_report(
        folder, f"{experiment}: slides", results, plots.training_curves(last), notes
    )


def _said(
    model: Model, params: Tree, asked: Sequence[SlideConversation], tokens: dict[str, Tensor], path: Path
) -> dict[int, str]:
    """{number of the question: answer} of those whose slides have features."""
    there = _answerable(model.cfg, asked, tokens)
    return dict(zip(there, answer(model, params, [asked[i] for i in there], tokens, path), strict=True))


def _answerable(cfg: Config, asked: Sequence[SlideConversation], tokens: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the questions whose slides all have tokens."""
    return [
        i for i, t in enumerate(asked) if cfg.data.blind or (t.slides and all(s in tokens for s in t.slides))
    ]


def _score(
    cfg: Config, held: Sequence[SlideConversation], said: Mapping[int, str], experiment: str
) -> list[Result]:
    """The numbers of all questions: with options, and open ones."""
    how: dict[str, Any] = {"split": "test", "experiment": experiment, "n": cfg.evaluate.bootstrap}
    chosen, written = _chosen(held, said), _written(held, said)
    results = bench.score_choices(chosen, gen=Generator().manual_seed(cfg.seed), **how) if chosen else []
    return results + (
        bench.score_open_answers(written, gen=Generator().manual_seed(cfg.seed), **how) if written else []
    )


def _chosen(held: Sequence[SlideConversation], said: Mapping[int, str]) -> list[bench.ChoiceAnswer]:
    """What was chosen in the questions with options."""
    rows = []
    for i, t in enumerate(held):
        if t.choices:
            rows.append(
                bench.extract_choice(said.get(i), t.choices, t.answer, missing=i not in said, **_about(t))
            )
    return rows


def _written(held: Sequence[SlideConversation], said: Mapping[int, str]) -> list[bench.OpenAnswer]:
    """What was answered to the open questions."""
    rows = []
    for i, t in enumerate(held):
        if not t.choices:
            question = t.messages[-2]["content"].replace(TAG, "").strip()
            written = bench.OpenAnswer(
                question=question, gold=t.answer, said=said.get(i, ""), missing=i not in said, **_about(t)
            )
            rows.append(written)
    return rows


def _about(talk: SlideConversation) -> dict[str, str]:
    """Whose question it is, and of which category."""
    broad, narrow = (*talk.category, "", "")[:2]
    slide = (*talk.names, *talk.slides, talk.id)[0]
    return {"slide": slide, "broad": broad, "narrow": narrow or talk.task, "id": talk.id or str(talk.row)}


def answer(
    model: Model,
    params: Tree,
    talks: Sequence[SlideConversation],
    tokens: dict[str, Tensor],
    path: files.PathLike | None = None,
) -> list[str]:
    """Answers of conversations whose slides all have tokens: greedy text, or with `by = "likelihood"` the likeliest letter where a
    question has options (an open one beside it is answered by text).

    Args:
        path: answers are written to it batch by batch, so that those of earlier batches are kept where a later one fails. What an earlier
            evaluation left there is written over: it may be of other weights.
    """
    cfg = model.cfg.evaluate
    data = slide_vqa.encode(model, talks, prompt=True)
    weights = slide_vqa.weights_of(model, params)
    by_letter = [i for i, talk in enumerate(data.talks) if talk.choices and cfg.by == "likelihood"]
    by_text = [i for i in range(len(data.talks)) if i not in set(by_letter)]
    batches = [
        rows[at : at + cfg.batch] for rows in (by_letter, by_text) for at in range(0, len(rows), cfg.batch)
    ]

    def answer_batch(rows: Sequence[int]) -> list[dict[str, Any]]:
        batch = slide_vqa.collate(model, data, tokens, rows, side="left")
        with torch.no_grad():
            inputs = slide_vqa.inputs_of(model, params, weights, batch)
        reply = _likeliest if rows[0] in set(by_letter) else _generated
        texts = reply(model, weights, inputs, [data.talks[i] for i in rows])
        return [
            {"row": row, "id": data.talks[row].id, "answer": text}
            for row, text in zip(rows, texts, strict=True)
        ]

    if path is None:
        lines = [line for rows in track(batches, "answering, batch") for line in answer_batch(rows)]
    else:
        Path(path).unlink(missing_ok=True)
        lines = progress.run_batches(path, batches, answer_batch, title="answering")
    answers = {line["row"]: line["answer"] for line in lines}
    return [answers[i] for i in range(len(talks))]


def _likeliest(
    model: Model, weights: dict[str, Tensor], inputs: dict[str, Tensor], talks: Sequence[SlideConversation]
) -> Sequence[str]:
    """The likeliest letter of each question's options."""
    options = [choices.letter_options(talk.choices) for talk in talks]
    ids = {
        letter: model.chat.tokenizer(letter, add_special_tokens=False)["input_ids"]
        for row in options
        for letter in row
    }
    scores, _ = generate.score_options(
        model.chat.skeleton, weights, inputs, [[ids[letter] for letter in row] for row in options]
    )
    return choices.letters_by_likelihood(scores.tolist(), options)


def _generated(
    model: Model, weights: dict[str, Tensor], inputs: dict[str, Tensor], talks: Sequence[SlideConversation]
) -> Sequence[str]:
    """The greedy text of each answer."""
    how = chat.sampling_of(model.chat, model.cfg.evaluate.max_tokens)
    return generate.generate(how, model.chat.skeleton, weights, inputs, tok=model.chat.tokenizer).texts


def _shuffled(
    held: Sequence[SlideConversation], seed: int, there: Collection[str]
) -> list[SlideConversation]:
    """Every slide's questions about another slide that has features; where a slide has none, there is none to be shown in its place."""
    try:
        other = order.derangement((s for s in slides_of(held) if s in there), seed)
    except ValueError as e:
        raise ValueError(
            f"evaluate.shuffled: needs questions about two slides or more that have features ({e}); "
            "set evaluate.shuffled=false to evaluate without it"
        ) from e
    return [evolve(t, slides=tuple(other.get(s, s) for s in t.slides)) for t in held]


# Before a run ---------------------------------------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training conversation of the last stage as the model gets it, the trained tokens marked."""
    held = read(cfg, cfg.train.stages[-1].data)
    if not 0 <= number < len(held):
        raise ValueError(f"labels: sample must be below {len(held)}, got {number}")
    model, _ = slide_vqa.init(cfg, folder, (_file_sizes(cfg), {}), _texts(cfg), device=torch.device("meta"))
    return encoding.show_sample(
        model.chat.tokenizer, slide_vqa.encode(model, held[number : number + 1]).samples[0]
    )


def memory(cfg: Config, folder: Path, processes: int = 1) -> dict[str, dict[str, int]]:
    """{stage: {part: bytes}} that one of so many processes will need on its device, on tensors without storage.

    One slide a conversation, and all text up to the context trained.
    """
    sizes = _file_sizes(cfg)
    model, params = slide_vqa.init(cfg, folder, (sizes, {}), _texts(cfg), device=torch.device("meta"))
    n = tuning.estimate_rows(cfg.train, processes)
    ids = torch.ones(n, cfg.chat.context, dtype=torch.int64)
    token = model.chat.tokenizer.convert_tokens_to_ids(templates.QWEN_VL.token)
    ids[:, : model.compress.slots] = token
    batch = {"ids": ids, "labels": torch.ones_like(ids), "mask": ids.bool(), "visual": ids == token}
    batch["images"] = torch.ones(n, dtype=torch.int64)
    batch["tokens"] = torch.zeros(n, model.compress.slots, model.compress.dim)
    loss = slide_vqa.loss_of(model)
    foretold = partial(tuning.estimate_memory, seed=cfg.seed, processes=processes)
    return {s.name: foretold(cfg.train, s, params, loss, slide_vqa.cut, batch) for s in cfg.train.stages}


def _file_sizes(cfg: Config) -> CompressConfig:
    """Those of the compressor's file, if it is there, else those of the record."""
    if cfg.pretrain.file and Path(cfg.pretrain.file).exists():
        return slide_vqa.open_compressor(cfg)[0]
    return evolve(cfg.compress, dim=cfg.data.dims or cfg.compress.dim)


def _texts(cfg: Config) -> list[str]:
    held = [
        t for what in {s.data for s in cfg.train.stages} if path(cfg, what).exists() for t in read(cfg, what)
    ]
    return [m["content"] for t in held for m in t.messages]
