"""How unified is scored on the test splits: its answers, and the pictures that it draws, each beside controls."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Generator

from medvl.base import files
from medvl.base.tree import Tree
from medvl.evaluation import pictures, plots
from medvl.evaluation.accuracy import accuracy, to_results
from medvl.evaluation.results import Result
from medvl.evaluation.vqa import Labelled, score_answers
from medvl.language.conversations import Conversation
from medvl.language.drawings import Drawing
from medvl.systems.tune.run import answer_conversations
from medvl.systems.unified.codes import vq_pixels
from medvl.systems.unified.data import (
    codes_of,
    find_sources,
    picture_opener,
    read_all_targets,
    read_questions,
)
from medvl.systems.unified.draw import decode_pictures, draw_pictures
from medvl.systems.unified.model import Unified
from medvl.systems.unified.probe import FACTS, fit_probe, probe
from medvl.systems.unified.record import Config, Split
from medvl.training import order

_MOST_TARGETS = 1000  # of the training split that the mean target is over
_ON_SHEET = 3  # pictures of each task that the report shows


# Answers ----------------------------------------------------------------------------------------------------
def score_questions(model: Unified, params: Tree, folder: Path, experiment: str) -> list[Result]:
    """Answer the questions of the test splits, into `folder`/answers.jsonl; no rows where there are none."""
    cfg = model.cfg
    conversations = _read_conversations(cfg, "test")
    if not conversations:
        return []
    selected = model.tasks.select(params, "understand")
    lines = answer_conversations(model.task("understand"), selected, conversations, folder)
    files.write_text(folder / "answers.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return score_answers(
        [line["answer"] for line in lines],
        [_label(conversation) for conversation in conversations],
        [_case(conversation, i) for i, conversation in enumerate(conversations)],
        train=[_label(conversation) for conversation in _read_conversations(cfg, "train")],
        split="test",
        experiment=experiment,
        n=cfg.evaluate.bootstrap,
        gen=Generator().manual_seed(cfg.seed),
    )


def _read_conversations(cfg: Config, split: Split) -> list[Conversation]:
    """The conversations of a split of all sources."""
    conversations = list[Conversation]()
    for source in find_sources(cfg, "understand", split):
        conversations += read_questions(cfg, source, split)
    return conversations


def _label(conversation: Conversation) -> Labelled:
    """The last question of a conversation and its answer, with what it counts under."""
    question, answer = conversation.messages[-2:]
    return Labelled(
        gold=answer["content"],
        question=question["content"].replace("<image>", ""),
        options=conversation.options,
        subjects=[str(conversation.extra.get(key, "")) for key in ("family", "category")],
    )


def _case(question: Conversation, number: int) -> Any:
    """What a bootstrap draws as a whole: the case that a line names, or the line."""
    return question.extra.get("episode_id", number)


# Pictures ---------------------------------------------------------------------------------------------------
@frozen(kw_only=True, eq=False)
class Drawn:
    """A drawn picture and what it is compared with; pictures are uint8 [y, x, 3]."""

    question: Conversation
    case: Any
    picture: np.ndarray
    target: np.ndarray
    reconstruction: np.ndarray  # what the VQ model makes of the target's codes
    image: np.ndarray | None  # that the question is about

    @property
    def task(self) -> str:
        """What its line says, or nothing."""
        return str(self.question.extra.get("task", ""))


def score_drawings(
    model: Unified, params: Tree, folder: Path, experiment: str
) -> tuple[list[Result], dict[str, bytes], list[str]]:
    """Draw the pictures of the test splits, into `folder`/pictures; all is empty where there are none.

    Returns:
        results, and figures and notes of a report.
    """
    cfg = model.cfg
    drawings = _some(read_all_targets(cfg, "test"), cfg.evaluate.drawings, cfg.seed)
    if not drawings:
        return [], {}, []
    drawn = _draw(model, params, drawings, folder)
    notes = [
        "Pictures are compared as floats on [0, 255]. The controls: the input copied, the mean target of the training "
        "split, and the target as the VQ model reconstructs it from its own codes, the best that codes can be."
    ]
    train = [drawing for drawing in read_all_targets(cfg, "train") if drawing.target]
    train = _some(train, _MOST_TARGETS, cfg.seed)
    if not train:
        notes.append("There is no mean target: no training drawing has a picture as its target.")
    rows = score_likeness(cfg, drawn, _mean_targets(model, train), experiment)
    reports = [one for one in drawn if one.task == "report" and one.question.extra.keys() >= {*FACTS}]
    if cfg.data.source == "phantoms" and reports:
        rows += score_reports(cfg, reports, experiment)
        notes.append(
            "Of pictures from reports a small network, trained on other drawn heads, tells look, side and kind of "
            "the mark. The control has the same pictures with the reports of other cases."
        )
    return rows, {"Pictures of the test split": _contact_sheet(drawn)}, notes


def _some(drawings: Sequence[Drawing], most: int, seed: int) -> list[Drawing]:
    """At most so many of them, drawn by the seed, in their order; 0 = all."""
    drawn = torch.randperm(len(drawings), generator=Generator().manual_seed(seed))
    return [drawings[row] for row in sorted(drawn[: most or None].tolist())]


def _draw(model: Unified, params: Tree, drawings: Sequence[Drawing], folder: Path) -> list[Drawn]:
    """The pictures that drawings ask for."""
    cfg, questions = model.cfg, [drawing.question for drawing in drawings]
    assert model.vq is not None
    pictures = draw_pictures(
        model,
        params,
        questions,
        folder,
        batch=cfg.evaluate.batch,
        temperature=cfg.evaluate.temperature,
        text_temperature=cfg.evaluate.text_temperature,
        seed=cfg.seed,
    )
    codes = codes_of(cfg, model.vq, drawings, folder.parent)
    reconstructions = decode_pictures(model, torch.tensor(codes))
    open_picture, drawn = picture_opener(cfg), []
    for i, drawing in enumerate(drawings):
        # Of a target that is codes, what they decode to is all there is.
        target = _open_targets(model, [drawing])[0] if drawing.target else reconstructions[i]
        image = np.asarray(open_picture(questions[i].images[0])) if questions[i].images else None
        drawn.append(
            Drawn(
                question=questions[i],
                case=_case(questions[i], i),
                picture=pictures[i],
                target=target,
                reconstruction=reconstructions[i],
                image=image,
            )
        )
    return drawn


def _open_targets(model: Unified, drawings: Sequence[Drawing]) -> list[np.ndarray]:
    """Targets that are files, as pictures of the VQ model's size."""
    assert model.vq is not None
    targets, open_picture = [], picture_opener(model.cfg)
    for drawing in drawings:
        pixels = vq_pixels(open_picture(drawing.target), model.vq[0].resolution)
        targets.append(((pixels + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    return targets


def _mean_targets(model: Unified, drawings: Sequence[Drawing]) -> dict[str, np.ndarray]:
    """{look: the mean of targets that are files}. Of lines that name a "look", such as CT, each has a mean of its
    own: the mean over several would be an easy one to beat."""
    of_look = dict[str, list[Drawing]]()
    for drawing in drawings:
        of_look.setdefault(_look(drawing.question), []).append(drawing)
    return {look: pictures.mean_picture(_open_targets(model, some)) for look, some in of_look.items()}


def _look(question: Conversation) -> str:
    return str(question.extra.get("look", ""))


def score_likeness(
    cfg: Config, drawn: Sequence[Drawn], mean_targets: Mapping[str, np.ndarray], experiment: str
) -> list[Result]:
    """Likeness of the drawn pictures and of the controls to their targets, over all and by task.

    Args:
        mean_targets: {look: the mean target of the training split}; a look that is not there has no such control.
    """
    rows = []
    for task in ["all", *sorted({one.task for one in drawn} - {""})]:
        chosen = [one for one in drawn if task in ("all", one.task)]
        targets = [one.target for one in chosen]
        inputs = [one.image for one in chosen if one.image is not None]
        # Of pictures from text alone nothing can be copied.
        if len(inputs) < len(chosen):
            inputs = []
        compared: dict[str, Sequence[np.ndarray]] = {"drawn": [one.picture for one in chosen]}
        reconstructions = [one.reconstruction for one in chosen]
        means = [mean_targets[look] for one in chosen if (look := _look(one.question)) in mean_targets]
        if len(means) < len(chosen):
            means = []
        compared |= pictures.controls(inputs, targets, means, reconstructions)
        rows += pictures.score_pictures(
            {f"{task}: {name}": some for name, some in compared.items()},
            targets,
            split="test",
            groups=[one.case for one in chosen],
            experiment=experiment,
            n=cfg.evaluate.bootstrap,
            gen=Generator().manual_seed(cfg.seed),
        )
    return rows


def score_reports(cfg: Config, drawn: Sequence[Drawn], experiment: str) -> list[Result]:
    """How often pictures of heads show what their reports say, as `probe` tells it.

    Args:
        drawn: their questions have the keys "look", "side" and "kind".
    Returns:
        rows "look_as_reported", "side_as_reported", "kind_as_reported" and "all_as_reported" of the drawn pictures, of
        the same with "shuffled reports" (those of other cases, where there are any), and of the VQ reconstructions of
        the targets, which are the most that can be reached.
    """
    weights = fit_probe()
    reports = [{fact: str(one.question.extra[fact]) for fact in FACTS} for one in drawn]
    shown = probe(weights, [one.picture for one in drawn])
    compared = {"drawn": (shown, reports)}
    cases = [str(one.case) for one in drawn]
    if len({*cases}) > 1:
        compared["shuffled reports"] = shown, _reports_of_others(reports, cases, cfg.seed)
    compared["vq reconstruction"] = probe(weights, [one.reconstruction for one in drawn]), reports
    rows = []
    for name, (told, written) in compared.items():
        for what, facts in {**{fact: (fact,) for fact in FACTS}, "all": FACTS}.items():
            pairs = zip(told, written, strict=True)
            right = [all(seen[fact] == said[fact] for fact in facts) for seen, said in pairs]
            gen = Generator().manual_seed(cfg.seed)
            record = {f"report: {name}": accuracy(right, cases, n=cfg.evaluate.bootstrap, gen=gen)}
            rows += to_results(record, split="test", metric=f"{what}_as_reported", experiment=experiment)
    return rows


def _reports_of_others(
    reports: Sequence[dict[str, str]], cases: Sequence[str], seed: int
) -> list[dict[str, str]]:
    """For each report one of another case, drawn by the seed."""
    rows_of = dict[str, list[int]]()
    for row, case in enumerate(cases):
        rows_of.setdefault(case, []).append(row)
    other, gen = order.derangement(cases, seed), Generator().manual_seed(seed)
    found = []
    for case in cases:
        rows = rows_of[other[case]]
        found.append(reports[rows[int(torch.randint(len(rows), (), generator=gen))]])
    return found


def _contact_sheet(drawn: Sequence[Drawn]) -> bytes:
    """A few pictures of each task, as PNG."""
    lines = []
    for task in sorted({one.task for one in drawn}):
        numbers = [i for i, one in enumerate(drawn) if one.task == task]
        for i in numbers[:_ON_SHEET]:
            one = drawn[i]
            text = one.question.messages[-1]["content"].replace("<image>", "").strip()
            shown = [one.image, one.target, one.reconstruction, one.picture]
            lines.append((f"{i}.png: {text}", shown))
    return plots.picture_grid(lines, ["input", "target", "VQ reconstruction", "drawn"])
