"""A question to a run of slide_vqa: its answer, and the patches that it came from."""

import re
from pathlib import Path

from medvl.base import files
from medvl.evaluation import results
from medvl.slides.relevance import top_patches
from medvl.systems.slide_vqa.look import look_at_slide
from medvl.systems.system import Question


def ask(folder: Path, question: Question) -> str:
    """The answer about one slide and its five most relevant patches; the map goes into `question.out`.

    Raises:
        ValueError: no slide is named; as `look_at_slide`.
    """
    if not question.slide:
        raise ValueError(
            f"ask: {folder} is a slide_vqa run and needs --slide: a file of patch features, STORE.h5::NAME, "
            "or a slide's name"
        )
    # Now, and not after model and slide were loaded and the answer was computed.
    files.check_writable(question.out, folder=True)
    answer = look_at_slide(
        str(folder),
        question.slide,
        question.text,
        question.out,
        question.max_tokens,
        offset=parse_offset(question.offset),
    )
    patches = top_patches(answer["relevance"], answer["coords"], 5)
    # In powers of ten: relevance is shared by up to a million patches, and often tiny.
    rows = [(p.rank, p.x, p.y, f"{p.relevance:.1e}", p.percentile) for p in patches]
    table = results.markdown_table(("Patch", "x", "y", "Relevance", "Percentile"), rows)
    return f"{answer['answer'].strip()}\n\n{table}map: {answer['map']}"


def parse_offset(text: str) -> tuple[int, int]:
    """(x, y) of "x,y" in level-0 pixels; (0, 0) of ""."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", text or "0,0")
    if match is None:
        raise ValueError(f"ask: --offset must be x,y in level-0 pixels, such as 12288,2048, got {text!r}")
    return int(match[1]), int(match[2])
