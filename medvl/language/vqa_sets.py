"""SLAKE and OmniMedVQA as published, into conversations with the keys that `vqa_rad` gives them.

"task" is the modality, "episode_id" the image, "family" "closed", "open" or "choice"; a choice also has
"options", {letter: text}. Texts stay as published but for runs of white space.

Sources: Liu et al. 2021 (SLAKE), arXiv:2102.09542; Hu et al. 2024 (OmniMedVQA), arXiv:2402.09181.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from medvl.base import files
from medvl.base.text import one_line, short
from medvl.evaluation.choices import comparable_text, format_question
from medvl.language.conversations import read_records
from medvl.language.messages import check_tags


def convert_slake(
    source: files.PathLike, images: files.PathLike, table: files.PathLike, *, language: str = "en"
) -> dict[str, int]:
    """Write the questions of SLAKE's train.json, validate.json or test.json in one language as JSON lines.

    Args:
        images: the folder that "img_name" starts from.
    Returns:
        How many: "closed", "open"; "left_out" in other languages.
    Raises:
        ValueError: with file and line, another format, an empty text, an image that is not there, a question that is
            there twice; no question in this language.
    """
    files.check_writable(table)
    counts, lines = Counter[str](closed=0, open=0, left_out=0), dict[str, str]()
    keys = ("qid", "img_name", "question", "answer", "q_lang", "answer_type", "modality", "content_type")
    for _, where, row in read_records(Path(source)):
        number, name, question, answer, spoken, family, task, category = _texts(row, keys, where)
        family = family.lower()
        if family not in ("closed", "open"):
            raise ValueError(f"{where}: answer_type must be OPEN or CLOSED, got {family!r}")
        kept = spoken == language
        counts[family if kept else "left_out"] += 1
        if kept:
            about = {"task": task, "category": category, "family": family}
            _add_line(lines, table, number, Path(images) / name, question, answer, about, where)
    if not lines:
        raise ValueError(f"{source}: must hold questions in {language!r}, found {dict(counts)}")
    files.write_text(table, "".join(lines))
    return dict(counts)


def convert_omnimedvqa(
    source: files.PathLike, images: files.PathLike, table: files.PathLike
) -> dict[str, int]:
    """Write the questions of one file of OmniMedVQA's QA_information as JSON lines, each with its options below
    it, its answer the letter and text of one.

    Args:
        images: the folder that "image_path" starts from.
    Returns:
        {"choice": how many}.
    Raises:
        ValueError: as `convert_slake`; a gt_answer that is none of the options.
    """
    files.check_writable(table)
    lines = dict[str, str]()
    for _, where, row in read_records(Path(source)):
        # One of the published questions has "modality".
        modality = "modality" if isinstance(row, dict) and "modality" in row else "modality_type"
        keys = ("question_id", "image_path", "question", "gt_answer", "question_type", modality)
        number, name, question, gold, category, task = _texts(row, keys, where)
        options = {letter: one_line(row.get(f"option_{letter}")) for letter in "ABCD"}
        options = {letter: text for letter, text in options.items() if text}  # some questions have two
        right = [
            f"{o}. {text}" for o, text in options.items() if comparable_text(text) == comparable_text(gold)
        ]
        if not right:
            raise ValueError(
                f"{where}: gt_answer must be one of {short(options)}, got {short(gold)}; mend it"
            )
        about = {"task": task, "category": category, "family": "choice", "options": options}
        asked = format_question(question, options)
        _add_line(lines, table, number, Path(images) / name, asked, right[0], about, where)
    if not lines:
        raise ValueError(f"{source}: must hold questions, found none")
    files.write_text(table, "".join(lines))
    return {"choice": len(lines)}


def _texts(row: Any, keys: tuple[str, ...], where: str) -> list[str]:
    """What stands under the keys of a question."""
    found = row if isinstance(row, dict) else {}
    texts = [one_line(found.get(key)) for key in keys]
    if not all(texts):
        raise ValueError(
            f"{where}: must be an object with {', '.join(keys)}, all of them texts, none empty, got {short(row)}"
        )
    return texts


def _add_line(
    lines: dict[str, str],
    table: files.PathLike,
    number: str,
    image: Path,
    asked: str,
    answer: str,
    about: dict,
    where: str,
) -> None:
    """Add a line of the table to {line: place of its question}."""
    if not image.is_file():
        raise ValueError(f"{where}: the image {image} is not there")
    asked = f"<image>\n{asked}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    check_tags(messages, "<image>", 1, where)  # a text that holds one would ask for a second image
    name = os.path.relpath(image.resolve(), Path(table).parent.resolve())
    record = {"id": number, "images": [name], "messages": messages, **about, "episode_id": name}
    line = json.dumps(record, ensure_ascii=False) + "\n"
    if line in lines:
        raise ValueError(
            f"{where}: must be a question of its own, found that of {lines[line]} again; remove one"
        )
    lines[line] = where
