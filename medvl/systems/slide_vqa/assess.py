"""How slide_vqa is evaluated: the answers to the test questions, with a control that sees other slides."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve
from torch import Generator, Tensor

from medvl.base.tree import Tree
from medvl.evaluation import plots, report
from medvl.evaluation.results import Result
from medvl.language import chat, system
from medvl.slides import bench
from medvl.slides.question_formats import TAG, SlideConversation
from medvl.slides.questions import published_as
from medvl.systems.slide_vqa import data
from medvl.systems.slide_vqa.model import Model, encode_slides, with_tokens
from medvl.systems.slide_vqa.record import Config, data_path
from medvl.systems.slide_vqa.tokens import compute_tokens
from medvl.training import order


def assess(model: Model, params: Tree, folder: Path, experiment: str) -> tuple[list[Result], Path]:
    """Answer the test questions; writes `benchmark_results.json`, a table of categories and the report."""
    cfg, conversations = model.cfg, data.read_split(model.cfg, "test")
    # `folder` is that of the results; tokens and encoder are kept in the run folder around it.
    tokens = compute_tokens(model, folder.parent, conversations)
    if not _answerable(cfg, conversations, tokens):
        raise ValueError(
            f"{data_path(cfg, 'test')}: none of {len(conversations)} questions is about a slide that "
            f"has features below {data_path(cfg, 'features')}; data.features says where they are, "
            "data.blind = true asks without them"
        )
    # Made before anything is answered: questions about one slide alone have no control.
    control = []
    if cfg.evaluate.shuffled and not cfg.data.blind:
        control = shuffle_slides(conversations, cfg.seed, tokens)
    answers = _answer_answerable(model, params, conversations, tokens, folder)
    results = _score(cfg, conversations, answers, experiment)
    if control:
        control_answers = _answer_answerable(model, params, control, tokens, folder)
        for result in _score(cfg, conversations, control_answers, experiment):
            if result.what == "accuracy":
                results.append(evolve(result, what="accuracy_shuffled"))
    # Several versions of SlideBench are in use under one name; the digest says which this was.
    digest = data.split_digest(cfg, "test")
    source = {"file": data_path(cfg, "test").name, "sha256": digest, "published_as": published_as(digest)}
    bench.write_benchmark(
        folder,
        _choice_answers(conversations, answers),
        results,
        source=source,
        facts={"experiment": experiment, "by": cfg.evaluate.by},
        written=_open_answers(conversations, answers),
    )
    system.remove_unfinished_answers(folder)  # all of them are in the results now
    return results, _write_report(cfg, results, source, folder, experiment)


def _write_report(
    cfg: Config, results: Sequence[Result], source: Mapping[str, str], folder: Path, experiment: str
) -> Path:
    published = f" ({source['published_as']})" if source["published_as"] else ""
    notes = (
        f"Questions of {source['file']}, sha256 {source['sha256'][:16]}{published}. An answer that "
        "chooses no letter, or several, is wrong, and so is one whose slide has no features.",
    )
    figures = plots.training_curves(system.last_metrics(cfg.train, folder.parent))
    return report.write_report(folder, f"{experiment}: slides", results, figures, notes)


# Answers ----------------------------------------------------------------------------------------------------
def answer_conversations(
    model: Model,
    params: Tree,
    conversations: Sequence[SlideConversation],
    tokens: Mapping[str, Tensor],
    folder: Path | None = None,
) -> list[str]:
    """Answers of conversations whose slides all have tokens.

    They are greedy text, or with `by = "likelihood"` the likeliest letter where a question has options (an
    open one beside it is answered by text).

    Args:
        folder: answers are kept there batch by batch, and those that are there are not computed again, as
            long as all that decides them is the same.
    """
    cfg, language = model.cfg.evaluate, with_tokens(model, tokens)
    prompts = encode_slides(model.cfg, language.chat, conversations, prompt=True)
    sampling = chat.sampling_of(language.chat, cfg.max_tokens)
    options: list[dict[str, str]] = []
    if cfg.by == "likelihood":
        options = [conversation.choices for conversation in conversations]
    path = None
    if folder is not None:
        # The size of a batch changes the last bits of an answer, and options decide what can be answered.
        settings = [cfg.batch, options]
        # A slide counts by its tokens, not its name: another compressor gives other answers.
        stamp = system.stamp_answers(
            language, params, prompts, sampling, lambda slide: _tensor_digest(tokens[slide]), settings
        )
        path = system.unfinished_answers(folder, stamp)
    return system.answer_prompts(
        language, params, prompts, sampling, size=cfg.batch, options=options, path=path
    )


def _tensor_digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _answer_answerable(
    model: Model,
    params: Tree,
    conversations: Sequence[SlideConversation],
    tokens: Mapping[str, Tensor],
    folder: Path,
) -> dict[int, str]:
    """{number of the question: answer} of those whose slides have features."""
    rows = _answerable(model.cfg, conversations, tokens)
    asked = [conversations[row] for row in rows]
    answers = answer_conversations(model, params, asked, tokens, folder)
    return dict(zip(rows, answers, strict=True))


def _answerable(
    cfg: Config, conversations: Sequence[SlideConversation], tokens: Mapping[str, Tensor]
) -> list[int]:
    """The numbers of the questions whose slides all have tokens."""
    # A blind run shows no slide, so that none can be missing.
    if cfg.data.blind:
        return [*range(len(conversations))]
    return [
        row
        for row, conversation in enumerate(conversations)
        if conversation.slides and all(slide in tokens for slide in conversation.slides)
    ]


def shuffle_slides(
    conversations: Sequence[SlideConversation], seed: int, available: Collection[str]
) -> list[SlideConversation]:
    """The control: every slide's questions about another slide.

    Args:
        available: the slides that have features; in the place of one without, none can be shown.
    Raises:
        ValueError: fewer than two slides.
    """
    slides = [slide for slide in data.slides_of(conversations) if slide in available]
    try:
        other = order.derangement(slides, seed)
    except ValueError as e:
        raise ValueError(
            f"evaluate.shuffled: needs questions about two slides or more that have features ({e}); "
            "set evaluate.shuffled=false to evaluate without it"
        ) from e
    shuffled = []
    for conversation in conversations:
        # A slide without features stays where it is: its questions cannot be asked in the control, either.
        shown = [other.get(slide, slide) for slide in conversation.slides]
        shuffled.append(evolve(conversation, slides=tuple(shown)))
    return shuffled


# Scores -----------------------------------------------------------------------------------------------------
def _score(
    cfg: Config, conversations: Sequence[SlideConversation], answers: Mapping[int, str], experiment: str
) -> list[Result]:
    """The results of all questions: with options, and open ones.

    Args:
        answers: {number of the question: answer}, without those that could not be asked.
    """
    settings: dict[str, Any] = {"split": "test", "experiment": experiment, "n": cfg.evaluate.bootstrap}
    results: list[Result] = []
    # A generator for each kind: the intervals of one do not depend on whether there is the other.
    if chosen := _choice_answers(conversations, answers):
        results += bench.score_choices(chosen, gen=Generator().manual_seed(cfg.seed), **settings)
    if written := _open_answers(conversations, answers):
        results += bench.score_open_answers(written, gen=Generator().manual_seed(cfg.seed), **settings)
    return results


def _choice_answers(
    conversations: Sequence[SlideConversation], answers: Mapping[int, str]
) -> list[bench.ChoiceAnswer]:
    """What was chosen in the questions with options."""
    rows = []
    for i, conversation in enumerate(conversations):
        if conversation.choices:
            choice = bench.extract_choice(
                answers.get(i),
                conversation.choices,
                conversation.answer,
                missing=i not in answers,
                **_labels_of(conversation),
            )
            rows.append(choice)
    return rows


def _open_answers(
    conversations: Sequence[SlideConversation], answers: Mapping[int, str]
) -> list[bench.OpenAnswer]:
    """What was answered to the open questions."""
    rows = []
    for i, conversation in enumerate(conversations):
        if not conversation.choices:
            answer = bench.OpenAnswer(
                # The last message is the written answer, the one before it the question that was asked.
                question=conversation.messages[-2]["content"].replace(TAG, "").strip(),
                gold=conversation.answer,
                said=answers.get(i, ""),
                missing=i not in answers,
                **_labels_of(conversation),
            )
            rows.append(answer)
    return rows


def _labels_of(conversation: SlideConversation) -> dict[str, str]:
    """Whose question it is, and of which category."""
    # Formats have no, one or two levels of categories.
    broad, narrow = (*conversation.category, "", "")[:2]
    # The unit of the bootstrap. A question that names no slide stands for itself, by its id.
    slide = (*conversation.names, *conversation.slides, conversation.id)[0]
    return {
        "slide": slide,
        "broad": broad,
        "narrow": narrow or conversation.task,
        "id": conversation.id or str(conversation.row),
    }
