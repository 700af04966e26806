"""VQA-RAD, questions about radiographs, CT and MRI, as published, into conversations with a task, a family
and a category each.

A line of a table has "id" (qid), "images" (relative to the table), "messages", "task", "category" (pres, abn,
...; the first where a question has several types), "family" ("closed" or "open"; 70 of 851 closed answers are
neither yes nor no) and "episode_id" (the image: its questions are one case). Texts stay as published but for
runs of white space, so "Yes" and "yes" are both there.

All questions of an image, and all images of a case, go into one split, and every task has the same share of
its cases there. The published flag (phrase_type test_...) is of questions: in the file of 1,420 questions 125
of the 126 images that are tested are trained on too. So split="published" is there to compare with others'
numbers, not to learn how good a model is.

Source: Lau et al. 2018, A dataset of clinically generated visual questions and answers about radiology
images.
"""

import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import frozen
from PIL import Image

from medvl.base import files
from medvl.base.display import track
from medvl.base.text import one_line, short
from medvl.language.images import open_image
from medvl.language.messages import check_tags

_log = logging.getLogger(__name__)
SPLITS = ("train", "valid", "test")
ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
_TYPOS = {"PRSE": "PRES"}  # of question types in the published file
_NOTHING = ("", "NULL", "NA")  # what stands where there is nothing
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
# Sequences of MRI are MRI; views and kinds of radiographs are radiographs.
_MODALITY_NAMES = {
    "ct": r"c\.?t\.?|cat scan|computed tomography",
    "mri": r"mri?|magnetic resonance|t[12]|flair|dwi|adc|diffusion[- ]weighted",
    "xray": r"x-? ?ray|xr|cxr|radiograph|radiography|plain film",
    "ultrasound": r"ultrasound|sonogram|sonography",
    "pet": r"pet",
}
# \b would not do: there is none between the dot of "c.t." and a space. The s is of plurals.
_MODALITY_WORDS = {
    name: rf"(?<![a-z0-9])(?:{names})s?(?![a-z0-9])" for name, names in _MODALITY_NAMES.items()
}
_ASKS_MODALITY = re.compile(
    r"(is|was) (this|the) ((image|scan|picture|film) )?(an? |taken (via|with|by|using) )"
)


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
    """Write VQA-RAD's JSON as `folder`/train.jsonl, valid.jsonl and test.jsonl, one question and its answer a
    line.

    Args:
        source: the published file, a JSON list of questions.
        images: the folder of its images.
        group: what a task is. "organ": head, chest, abdomen. "modality": ct, mri, xray ..., as far as
            questions of type MODALITY say it (`modality_of`); images of which none or several are said are
            left out, with all their questions.
        split: "case", or "published": the flag says what is tested and `test` is not used; `valid` is a share
            of the cases, without the questions that are tested.
        valid: share of the cases of every task; 0 for none.
        test: as `valid`.
        size: pictures are written into `folder`/images as PNG, none wider or higher than this many pixels; 0
            = lines name the originals.
    Returns:
        How many: "train", "valid", "test" conversations; "images" and "cases" of them; "unknown" images
        without a modality, "empty" questions without a text or an answer (both left out); questions asked
        again of an image ("repeated"), those of them with another answer ("contradicting"; all are kept);
        "shared" images that are in test and elsewhere (0 unless split="published").
    Raises:
        ValueError: another format, an unknown value, images that are not there, too few cases for the splits,
            or a table of an earlier run that this one would not replace. Tables are written last.
    """
    _check_arguments(group, split, valid, test, size)
    source = Path(source)
    folder = Path(folder)
    files.check_writable(folder, folder=True)
    questions, empty = _read_questions(source)
    paths = _find_images({question.image for question in questions}, Path(images))
    task_of = _tasks_of_images(questions, group)
    usable = [question for question in questions if question.image in task_of]
    if not usable:
        raise ValueError(f'{source}: no question says the modality of its image; take group="organ"')
    # Cases are found over all questions: images that are left out may link two others to one case.
    case_of = _cases_of_images(questions)
    shares = {"valid": valid, "test": test}
    tables = _split_questions(usable, case_of, task_of, shares, published=split == "published", seed=seed)
    _write_tables(folder, tables, paths, task_of, size)
    counts = _count_all(tables, case_of, unknown=len(paths) - len(task_of), empty=empty)
    _log_counts(source, counts)
    return counts


def _check_arguments(group: str, split: str, valid: float, test: float, size: int) -> None:
    if group not in ("organ", "modality") or split not in ("case", "published"):
        raise ValueError(
            f'convert_vqa_rad: group is "organ" or "modality", split "case" or "published", got {group!r} '
            f"and {split!r}"
        )
    if min(valid, test) < 0 or valid + test >= 1 or size < 0:
        raise ValueError(
            "convert_vqa_rad: valid and test must be shares >= 0 that leave some for train, size >= 0, "
            f"got {valid}, {test}, {size}"
        )


def modality_of(question: str, answer: str) -> str:
    """The modality that a question of type MODALITY and its answer say an image has: ct, mri, xray,
    ultrasound, pet, or "" for none.

    The answer names it ("MR - Flair", "plain film"), or the question does ("Is this a CT scan?" yes; "Does
    this CT ...?"). What is denied says nothing, nor does a name among several.
    """
    question = question.lower()
    answer = answer.lower()
    # "Is this a CT or not?" is no denial.
    denied = re.search(r"\bnot\b|n't\b", question.replace("or not", "")) or re.search(r"\bnot\b", answer)
    if denied:
        return ""
    in_answer = _named_modalities(answer)
    in_question = _named_modalities(question)
    if len(in_answer) == 1:
        return in_answer[0]
    # The question alone says it only if the answer affirms it or it takes it for granted.
    if not in_answer and len(in_question) == 1:
        modality = in_question[0]
        confirmed = answer.strip(" .") == "yes" and _ASKS_MODALITY.match(question)
        if confirmed or re.search(rf"\bthis {_MODALITY_WORDS[modality]}", question):
            return modality
    return ""


def _named_modalities(text: str) -> list[str]:
    return [name for name, pattern in _MODALITY_WORDS.items() if re.search(pattern, text)]


def _tasks_of_images(questions: Iterable[_Question], group: str) -> dict[str, str]:
    """The task of every image that has one: its organ, or the one modality that its questions say.

    Images are in the order of the file.
    """
    if group == "organ":
        return {question.image: question.organ for question in questions}
    modalities = defaultdict[str, set[str]](set)
    for question in questions:
        names = modalities[question.image]  # of every image, so that the file's order stays
        if "modality" in question.types:
            names.add(modality_of(question.question, question.answer))
    task_of = {}
    for image, names in modalities.items():
        names.discard("")  # questions that say none
        if len(names) == 1:
            # Its only one.
            task_of[image] = min(names)
    return task_of


def _read_questions(source: Path) -> tuple[list[_Question], int]:
    """(questions, how many were left out because they have no text or no answer)."""
    try:
        files.check_regular(source)
        rows = json.loads(source.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as e:
        raise ValueError(f"{source}: no such file") from e
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{source}: cannot be read as JSON ({e})") from e
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{source}: must be a JSON list of questions, got {short(rows)}")
    questions = [_parse_question(row, f"{source}, question {i}") for i, row in enumerate(rows)]
    # Parsed before they are left out, so that a file of another format is an error and not an empty table.
    complete = [question for question in questions if question.question and question.answer]
    if not complete:
        raise ValueError(f"{source}: none of its {len(rows)} questions has a text and an answer")
    return complete, len(questions) - len(complete)


def _parse_question(row: Any, where: str) -> _Question:
    if not isinstance(row, dict) or not row.keys() >= {*_KEYS}:
        raise ValueError(f"{where}: must be an object with {', '.join(_KEYS)}, got {short(row)}")
    # Answers that count are numbers; some texts hold tabs.
    text = {key: one_line(row[key]) for key in _KEYS}
    for key in ("question", "answer", "image_case_url"):
        if text[key].upper() in _NOTHING:
            text[key] = ""

    organ = text["image_organ"].upper()
    family = text["answer_type"].lower()
    phrase = text["phrase_type"].lower()
    phrasing = phrase.removeprefix("test_")
    if organ not in ORGANS or family not in ("closed", "open") or phrasing not in ("freeform", "para"):
        raise ValueError(
            f"{where}: image_organ must be {', '.join(ORGANS)}, answer_type OPEN or CLOSED, phrase_type "
            f"freeform or para or one of them after test_, got {organ!r}, {family!r} and {phrase!r}"
        )
    image = text["image_name"]
    if not image or Path(image).name != image:
        raise ValueError(f"{where}: image_name must be the name of a file, got {image!r}")
    messages = [
        {"role": "user", "content": text["question"]},
        {"role": "assistant", "content": text["answer"]},
    ]
    # The tag of the image is put in by `_format_line`; a text that holds one would ask for a second image.
    check_tags(messages, "<image>", 0, where)
    types = []
    for name in text["question_type"].split(","):
        name = name.strip().upper()
        types.append(_TYPOS.get(name, name).lower())
    return _Question(
        id=text["qid"],
        image=image,
        case=text["image_case_url"],
        organ=ORGANS[organ],
        test=phrase.startswith("test_"),
        question=text["question"],
        answer=text["answer"],
        types=tuple(types),
        family=family,
    )


def _find_images(names: set[str], folder: Path) -> dict[str, Path]:
    """The path of every image.

    Raises:
        ValueError: images that are not there, or two that differ only in their suffix.
    """
    paths = {name: folder / name for name in sorted(names)}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        more = " ..." * (len(missing) > 3)
        raise ValueError(
            f"{folder}: {len(missing)} of {len(paths)} images are not there: {', '.join(missing[:3])}{more}"
        )
    # The name without its suffix is that of the shrunk PNG and of the episode.
    stems = Counter(Path(name).stem for name in paths)
    for stem, count in stems.items():
        if count > 1:
            raise ValueError(
                f"{folder}: {count} images are called {stem!r}; rename all but one, in the questions too"
            )
    return paths


def _cases_of_images(questions: Sequence[_Question]) -> dict[str, str]:
    """The case of every image: images with an address in common, directly or through others, belong to one
    case.
    """
    # Union-find over images and addresses. The smaller name becomes the root, so that the order of the
    # questions does not matter.
    parent: dict[str, str] = {}

    def root_of(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for question in questions:
        image_root = root_of(f"image {question.image}")
        case_root = image_root
        if question.case:
            case_root = root_of(f"case {question.case}")
        smaller, larger = sorted((image_root, case_root))
        parent[larger] = smaller
    return {question.image: root_of(f"image {question.image}") for question in questions}


def _split_questions(
    questions: Sequence[_Question],
    case_of: Mapping[str, str],
    task_of: Mapping[str, str],
    shares: dict[str, float],
    *,
    published: bool,
    seed: int,
) -> dict[str, list[_Question]]:
    """The questions of every split."""
    if published:
        # The flag chooses the tested questions, so that all cases are shared out between train and valid.
        shares = shares | {"test": 0.0}
    tasks_of_cases = [(case_of[question.image], task_of[question.image]) for question in questions]
    split_of = _assign_splits(tasks_of_cases, shares, seed)
    tables: dict[str, list[_Question]] = {name: [] for name in SPLITS}
    for question in questions:
        name = split_of[case_of[question.image]]
        if published and question.test:
            name = "test"
        tables[name].append(question)
    return tables


def _assign_splits(
    tasks_of_cases: Sequence[tuple[str, str]], shares: Mapping[str, float], seed: int
) -> dict[str, str]:
    """The split of every case, with the same shares of every task's cases.

    Args:
        tasks_of_cases: (case, task) of every question.
        shares: {"valid": share, "test": share}; the others are for training.
    """
    tasks = defaultdict[str, set[str]](set)
    for case, task in tasks_of_cases:
        tasks[case].add(task)
    strata = defaultdict[str, list[str]](list)
    # Sorted, so that the split depends on the seed and not on the order of the file.
    for case in sorted(tasks):
        # A case with images of several tasks is of a kind of its own: it cannot be cut.
        strata[" and ".join(sorted(tasks[case]))].append(case)

    split_of = dict[str, str]()
    rng = np.random.default_rng(seed)
    for task in sorted(strata):
        cases = strata[task]
        # At least one case of every task in every split, or the task could not be scored there.
        counts = {name: max(1, round(share * len(cases))) for name, share in shares.items() if share}
        if sum(counts.values()) >= len(cases):
            raise ValueError(
                f"convert_vqa_rad: {task} has {len(cases)} cases, too few for train, {', '.join(counts)}; "
                "take smaller shares or none"
            )
        splits = list[str]()
        for name, count in counts.items():
            splits += [name] * count
        splits += ["train"] * (len(cases) - len(splits))
        for i, name in zip(rng.permutation(len(cases)), splits, strict=True):
            split_of[cases[i]] = name
    return split_of


def _write_tables(
    folder: Path,
    tables: Mapping[str, Sequence[_Question]],
    paths: Mapping[str, Path],
    task_of: Mapping[str, str],
    size: int,
) -> None:
    """Write the pictures, where they are shrunk to `size`, and then the tables that have lines."""
    pictures = dict(paths)
    if size:
        pictures = {image: _png_path(folder, image) for image in paths}
    lines: dict[str, list[str]] = {name: [] for name in tables}
    for name, questions in tables.items():
        for question in questions:
            # Relative to the table, as `read_conversations` reads names.
            picture = os.path.relpath(pictures[question.image].resolve(), folder.resolve())
            lines[name].append(_format_line(question, task_of[question.image], Path(picture).as_posix()))
    _check_old_tables(folder, lines)
    # Pictures first: a table names only what is there.
    if size:
        for image in track(task_of, "shrinking pictures"):
            _shrink_image(paths[image], pictures[image], size)
    for name in tables:
        if lines[name]:
            files.write_text(folder / f"{name}.jsonl", "".join(lines[name]))


def _png_path(folder: Path, image: str) -> Path:
    """Where a shrunk image is written."""
    return folder / "images" / f"{Path(image).stem}.png"


def _check_old_tables(folder: Path, lines: Mapping[str, list[str]]) -> None:
    """Raise where a table of an earlier run would stay beside the new ones."""
    for name in SPLITS:
        if not lines[name] and (folder / f"{name}.jsonl").exists():
            raise ValueError(
                f"{folder}: {name}.jsonl is of an earlier run and this one has no {name}; remove it or use "
                "another folder"
            )


def _format_line(question: _Question, task: str, image: str) -> str:
    """A line of a table.

    Args:
        image: path relative to the table.
    """
    record = {
        "id": question.id,
        "images": [image],
        "messages": [
            {"role": "user", "content": f"<image>\n{question.question}"},
            {"role": "assistant", "content": question.answer},
        ],
        "task": task,
        "category": question.types[0],
        "family": question.family,
        "episode_id": Path(question.image).stem,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _count_all(
    tables: Mapping[str, Sequence[_Question]], case_of: Mapping[str, str], *, unknown: int, empty: int
) -> dict[str, int]:
    """What `convert_vqa_rad` counts of the questions in the tables."""
    splits_of_images = defaultdict[str, set[str]](set)
    for name, questions in tables.items():
        for question in questions:
            splits_of_images[question.image].add(name)
    shared = [splits for splits in splits_of_images.values() if "test" in splits and len(splits) > 1]
    return {
        **{name: len(questions) for name, questions in tables.items()},
        "images": len(splits_of_images),
        "cases": len({case_of[image] for image in splits_of_images}),
        "unknown": unknown,
        "empty": empty,
        **_count_repeats(chain(*tables.values())),
        "shared": len(shared),
    }


def _count_repeats(questions: Iterable[_Question]) -> dict[str, int]:
    """Questions that are asked again of an image, and those of them with another answer; case does not
    matter.
    """
    answers = defaultdict[tuple[str, str], list[str]](list)
    for question in questions:
        # Compared by their words: the published texts differ in case and punctuation.
        answers[question.image, _words(question.question)].append(_words(question.answer))
    repeated = [texts for texts in answers.values() if len(texts) > 1]
    contradicting = [texts for texts in repeated if len(set(texts)) > 1]
    return {"repeated": len(repeated), "contradicting": len(contradicting)}


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _shrink_image(source: Path, target: Path, size: int) -> None:
    """Write an image as PNG, none of its sides longer than `size` pixels."""
    image = open_image(source)
    longest = max(image.size)
    if longest > size:
        # Of a thin strip the shorter side would round to 0.
        width, height = (max(1, round(side * size / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    with files.atomic(target) as tmp:
        image.save(tmp, format="PNG")


def _log_counts(source: Path, counts: Mapping[str, int]) -> None:
    _log.info("%s: %s", source, ", ".join(f"{count} {name}" for name, count in counts.items()))
    warnings = {
        "unknown": "images are left out: no question says their modality, or several differ",
        "empty": "questions have no text or no answer and are left out",
        "contradicting": "questions are asked again about the same image and answered differently; all are "
        "kept",
        "shared": "images are in test and also in train or valid: results on test will not hold for new "
        "images",
    }
    for name, text in warnings.items():
        if counts[name]:
            _log.warning("%s: %d %s", source, counts[name], text)
