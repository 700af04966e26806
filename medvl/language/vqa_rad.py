"""VQA-RAD, questions about radiographs, CT and MRI, as published, into conversations with a task, a family and a category each."""

import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import frozen
from PIL import Image

from medvl.base import files
from medvl.base.display import track
from medvl.base.text import short
from medvl.language.images import open_image
from medvl.language.messages import check_tags

_log = logging.getLogger(__name__)
SPLITS = ("train", "valid", "test")
ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
_TYPOS = {"PRSE": "PRES"}
_NOTHING = ("", "NULL", "NA")
_KEYS = (
    "qid",
    "phrase_type",
    "image_case_url",
    "image_name",
    "image_organ",
    "question",
    "question_type",
    "answer",
    "answer_type",
)
_NAMES = {  # sequences of MRI are MRI, views and kinds of radiographs are radiographs
    "ct": r"c\.?t\.?|cat scan|computed tomography",
    "mri": r"mri?|magnetic resonance|t[12]|flair|dwi|adc|diffusion[- ]weighted",
    "xray": r"x-? ?ray|xr|cxr|radiograph|radiography|plain film",
    "ultrasound": r"ultrasound|sonogram|sonography",
    "pet": r"pet",
}
_WORD = {name: rf"(?<![a-z0-9])(?:{names})s?(?![a-z0-9])" for name, names in _NAMES.items()}
_ASKS = re.compile(r"(is|was) (this|the) ((image|scan|picture|film) )?(an? |taken (via|with|by|using) )")


@frozen(kw_only=True)
class _Question:
    id: str
    image: str
    case: str  # address of the case, "" = not known
    organ: str
    test: bool  # the published flag
    question: str
    answer: str
    types: tuple[str, ...]
    family: str


def convert_vqa_rad(
    source: files.PathLike,
    images: files.PathLike,
    folder: files.PathLike,
    *,
    group: Literal["organ", "modality"] = "organ",
    split: Literal["case", "published"] = "case",
    valid: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    size: int = 0,
) -> dict[str, int]:
    """The questions of VQA-RAD's JSON as `folder`/train.jsonl, valid.jsonl and test.jsonl, one question and its answer a line.

    A line has "id" (qid), "images" (relative to `folder`), "messages", "task", "category" (pres, abn, ...; the first where a question has
    several types), "family" ("closed" or "open"; 70 of 851 closed answers are neither yes nor no) and "episode_id" (the image:
    its questions are one case). Texts stay as published but for runs of white space, so "Yes" and "yes" are both there.

    All questions of an image, and all images of a case, go into one split, and every task has the same share of its cases there. The
    published flag (phrase_type test_...) is of questions: in the file of 1,420 questions 125 of the 126 images that are tested are trained
    on too, so split="published" is there to compare with others' numbers, not to learn how good a model is.

    Args:
        source: the published file, a JSON list of questions.
        images: the folder of its images.
        group: what a task is. "organ": head, chest, abdomen. "modality": ct, mri, xray ..., as far as questions of type MODALITY say it
            (`modality_of`); images of which none or several are said are left out, with all their questions.
        split: "case", or "published": the flag says what is tested and `test` is not used; `valid` is a share of the cases, without
            the questions that are tested.
        valid: share of the cases of every task; 0 for none.
        test: as `valid`.
        size: pictures are written into `folder`/images as PNG, none wider or higher than this many pixels; 0 = lines name the originals.
    Returns:
        How many: "train", "valid", "test" conversations; "images" and "cases" of them; "unknown" images without a modality, "empty"
        questions without a text or an answer (both left out); questions asked again of an image ("repeated"), those of them with another
        answer ("contradicting"; all are kept); "shared" images that are in test and elsewhere (0 unless split="published").
    Raises:
        ValueError: another format, a value that is not known, images that are not there, too few cases for the splits, or a table of an
            earlier run that this one would not replace. Tables are written last.
    Source: Lau et al. 2018, A dataset of clinically generated visual questions and answers about radiology images.
    """
    if group not in ("organ", "modality") or split not in ("case", "published"):
        raise ValueError(
            f'convert_vqa_rad: group is "organ" or "modality", split "case" or "published", got {group!r} and {split!r}'
        )
    if min(valid, test) < 0 or valid + test >= 1 or size < 0:
        raise ValueError(
            f"convert_vqa_rad: valid and test must be shares >= 0 that leave some for train, size >= 0, got {valid}, {test}, {size}"
        )
    folder = Path(folder)
    every, empty = _read(Path(source))
    paths = _find({q.image for q in every}, Path(images))
    said = _modalities(every) if group == "modality" else {}
    tasks = [said.get(q.image, "") if group == "modality" else q.organ for q in every]
    kept = [(q, task) for q, task in zip(every, tasks, strict=True) if task]
    if not kept:
        raise ValueError(f'{source}: no question says the modality of its image; take group="organ"')
    case_of = _cases(every)
    place = _place(
        [(case_of[q.image], task) for q, task in kept],
        {"valid": valid, "test": test if split == "case" else 0.0},
        seed,
    )
    lines: dict[str, list[str]] = {name: [] for name in SPLITS}
    sides = defaultdict(set)
    for q, task in kept:
        part = "test" if split == "published" and q.test else place[case_of[q.image]]
        picture = folder / "images" / f"{Path(q.image).stem}.png" if size else paths[q.image]
        lines[part].append(
            _line(q, task, Path(os.path.relpath(picture.resolve(), folder.resolve())).as_posix())
        )
        sides[q.image].add(part)
    if old := [name for name in SPLITS if not lines[name] and (folder / f"{name}.jsonl").exists()]:
        raise ValueError(
            f"{folder}: {old[0]}.jsonl is of an earlier run and this one has no {old[0]}; remove it or take another folder"
        )
    for name in track(sides if size else (), "shrinking pictures"):
        _shrink(paths[name], folder / "images" / f"{Path(name).stem}.png", size)
    for name in SPLITS:
        if lines[name]:
            files.write_text(folder / f"{name}.jsonl", "".join(lines[name]))
    counts = {name: len(found) for name, found in lines.items()} | {
        "images": len(sides),
        "cases": len({case_of[name] for name in sides}),
        "unknown": len(paths) - len(sides),
        "empty": empty,
        **_repeats([q for q, _ in kept]),
        "shared": sum("test" in parts and len(parts) > 1 for parts in sides.values()),
    }
    _say(Path(source), counts)
    return counts


def modality_of(question: str, answer: str) -> str:
    """The modality that a question of type MODALITY and its answer say an image has: ct, mri, xray, ultrasound, pet, or "" for none.

    The answer names it ("MR - Flair", "plain film"), or the question does ("Is this a CT scan?" yes; "Does this CT ...?"). What is
    denied says nothing, nor does a name among several.
    """
    question, answer = question.lower(), answer.lower()
    if re.search(r"\bnot\b|n't\b", question.replace("or not", "")) or re.search(r"\bnot\b", answer):
        return ""
    named, asked = _named(answer), _named(question)
    if len(named) == 1:
        return named[0]
    if not named and len(asked) == 1:
        confirmed = answer.strip(" .") == "yes" and _ASKS.match(question)
        if confirmed or re.search(rf"\bthis {_WORD[asked[0]]}", question):
            return asked[0]
    return ""


def _named(text: str) -> list[str]:
    return [name for name, word in _WORD.items() if re.search(word, text)]


def _modalities(questions: Iterable[_Question]) -> dict[str, str]:
    """The modality of every image of which one is said, and no other."""
    said = defaultdict(set)
    for q in questions:
        if "modality" in q.types:
            said[q.image].add(modality_of(q.question, q.answer))
    return {image: min(names - {""}) for image, names in said.items() if len(names - {""}) == 1}


def _read(source: Path) -> tuple[list[_Question], int]:
    """The questions, and how many have no text or no answer and are left out."""
    try:
        files.check_regular(source)
        rows = json.loads(source.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as e:
        raise ValueError(f"{source}: no such file") from e
    except (OSError, ValueError) as e:
        raise ValueError(f"{source}: cannot be read as JSON ({e})") from e
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{source}: must be a JSON list of questions, got {short(rows)}")
    found = [_question(row, f"{source}, question {i}") for i, row in enumerate(rows)]
    full = [q for q in found if q.question and q.answer]
    if not full:
        raise ValueError(f"{source}: none of its {len(rows)} questions has a text and an answer")
    return full, len(found) - len(full)


def _question(row: Any, where: str) -> _Question:
    if not isinstance(row, dict) or not row.keys() >= {*_KEYS}:
        raise ValueError(f"{where}: must be an object with {', '.join(_KEYS)}, got {short(row)}")
    text = {
        key: " ".join(str(row[key]).split()) for key in _KEYS
    }  # answers that count are numbers; some texts hold tabs
    text |= {key: "" for key in ("question", "answer", "image_case_url") if text[key].upper() in _NOTHING}
    organ, family, phrase = (
        text["image_organ"].upper(),
        text["answer_type"].lower(),
        text["phrase_type"].lower(),
    )
    if (
        organ not in ORGANS
        or family not in ("closed", "open")
        or phrase.removeprefix("test_") not in ("freeform", "para")
    ):
        raise ValueError(
            f"{where}: image_organ must be {', '.join(ORGANS)}, answer_type OPEN or CLOSED, phrase_type freeform or para or one of them "
            f"after test_, got {organ!r}, {family!r} and {phrase!r}"
        )
    image = text["image_name"]
    if not image or Path(image).name != image:
        raise ValueError(f"{where}: image_name must be the name of a file, got {image!r}")
    check_tags(
        [{"role": "user", "content": text["question"]}, {"role": "assistant", "content": text["answer"]}],
        "<image>",
        0,
        where,
    )
    kinds = [kind.strip().upper() for kind in text["question_type"].split(",")]
    return _Question(
        id=text["qid"],
        image=image,
        case=text["image_case_url"],
        organ=ORGANS[organ],
        test=phrase.startswith("test_"),
        question=text["question"],
        answer=text["answer"],
        types=tuple(_TYPOS.get(kind, kind).lower() for kind in kinds),
        family=family,
    )


def _find(names: set[str], images: Path) -> dict[str, Path]:
    """Where the images are."""
    paths = {name: images / name for name in sorted(names)}
    if absent := [name for name, path in paths.items() if not path.is_file()]:
        raise ValueError(
            f"{images}: {len(absent)} of {len(paths)} images are not there: {', '.join(absent[:3])}{' ...' * (len(absent) > 3)}"
        )
    stems = Counter(Path(name).stem for name in paths)
    if twice := [stem for stem, n in stems.items() if n > 1]:
        raise ValueError(
            f"{images}: {stems[twice[0]]} images are called {twice[0]!r}; rename all but one, in the questions too"
        )
    return paths


def _cases(questions: Iterable[_Question]) -> dict[str, str]:
    """The case of every image: images with an address in common, directly or through others, are of one."""
    head: dict[str, str] = {}

    def first(name: str) -> str:
        while head.setdefault(name, name) != name:
            name = head[name]
        return name

    images = {q.image for q in questions}
    for q in questions:
        a, b = sorted((first(f"image {q.image}"), first(f"case {q.case}" if q.case else f"image {q.image}")))
        head[b] = a  # the smaller name wins, so that the order of the questions does not matter
    return {image: first(f"image {image}") for image in images}


def _place(cases: Sequence[tuple[str, str]], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """The split of every case, with the same shares of every task's cases."""
    task_of = defaultdict(set)
    for case, task in cases:
        task_of[case].add(task)
    strata = defaultdict(list)
    for case in sorted(task_of):
        strata[" and ".join(sorted(task_of[case]))].append(case)
    place, rng = dict[str, str](), np.random.default_rng(seed)
    for task in sorted(strata):
        n = len(strata[task])
        counts = {name: max(1, round(share * n)) for name, share in shares.items() if share}
        if sum(counts.values()) >= n:
            raise ValueError(
                f"convert_vqa_rad: {task} has {n} cases, too few for train, {', '.join(counts)}; take smaller shares or none"
            )
        order = [strata[task][i] for i in rng.permutation(n)]
        parts = [name for name, count in counts.items() for _ in range(count)]
        place |= dict(zip(order, parts + ["train"] * (n - len(parts)), strict=True))
    return place


def _line(q: _Question, task: str, image: str) -> str:
    turns = [
        {"role": "user", "content": f"<image>\n{q.question}"},
        {"role": "assistant", "content": q.answer},
    ]
    named = {"task": task, "category": q.types[0], "family": q.family, "episode_id": Path(q.image).stem}
    return json.dumps({"id": q.id, "images": [image], "messages": turns, **named}, ensure_ascii=False) + "\n"


def _repeats(questions: Iterable[_Question]) -> dict[str, int]:
    plain = lambda text: " ".join(re.findall(r"\w+", text.lower()))
    answers = defaultdict(list)
    for q in questions:
        answers[q.image, plain(q.question)].append(plain(q.answer))
    again = [found for found in answers.values() if len(found) > 1]
    return {"repeated": len(again), "contradicting": sum(len({*found}) > 1 for found in again)}


def _shrink(source: Path, target: Path, size: int) -> None:
    image = open_image(source)
    if (longest := max(image.size)) > size:
        width, height = (max(1, round(side * size / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    with files.atomic(target) as tmp:
        image.save(tmp, format="PNG")


def _say(source: Path, counts: Mapping[str, int]) -> None:
    _log.info("%s: %s", source, ", ".join(f"{n} {name}" for name, n in counts.items()))
    said = {
        "unknown": "images are left out: no question says their modality, or several differ",
        "empty": "questions have no text or no answer and are left out",
        "contradicting": "questions are asked again of the same image and answered otherwise; all are kept",
        "shared": "images are in test and in train or valid too: what is measured on test is not what new images will give",
    }
    for name, text in said.items():
        if counts[name]:
            _log.warning("%s: %d %s", source, counts[name], text)
