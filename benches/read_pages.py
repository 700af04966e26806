"""How well drawn pages are read by OCR and by rules: `python -m benches.read_pages FOLDER [--pages 100]`.

Each of so many test pages is drawn clean, as a scan and as a photograph. For each damage: the character error rate of
the words, precision, recall and F1 of the fields by rules, and the share of the gold values whose located box overlaps
the drawn one by more than half (intersection over union), with 95 % intervals by bootstrap of whole pages.

Words are kept in FOLDER, so that a run that was stopped goes on. Reading takes about 3 seconds a page on one core.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from medvl.base.display import track
from medvl.documents import score
from medvl.documents.fields import leaves
from medvl.documents.locate import locate
from medvl.documents.read_page import read_page_once
from medvl.documents.rules import extract_by_rules
from medvl.documents.words import Word, overlap
from medvl.evaluation import metrics
from medvl.phantoms.pages import DAMAGES, Page, PageConfig, draw_page

KINDS = (*score.KINDS, "all")
COUNTS = ("right", "false", "missed")


def character_errors(page: Page, words: Sequence[Word]) -> tuple[int, int]:
    """(wrong letters, letters) of a page without spaces.

    Each printed piece is compared with the words whose middle lies in its box, in reading order: the order of pieces and
    columns does not count. Words that lie in no piece are inserted letters.
    """
    read: list[list[Word]] = [[] for _ in page.texts]
    wrong = letters = 0
    for word in words:
        near = [i for i, piece in enumerate(page.texts) if _is_inside(word, piece)]
        if near:
            read[min(near, key=lambda i: abs(page.texts[i].centre[1] - word.centre[1]))].append(word)
        else:
            wrong += len(word.text)
    for piece, found in zip(page.texts, read, strict=True):
        printed = "".join(piece.text.split())
        ordered = sorted(found, key=lambda word: word.box[0])
        letters += len(printed)
        wrong += edit_distance(printed, "".join("".join(word.text.split()) for word in ordered))
    return wrong, letters


def _is_inside(word: Word, piece: Word) -> bool:
    """Whether the middle of a word lies in the box of a piece, or hardly beside it."""
    (x, y), (left, top, right, bottom) = word.centre, piece.box
    return left - 8 <= x <= right + 8 and top - 2 <= y <= bottom + 2


def edit_distance(a: str, b: str) -> int:
    """Letters to insert, remove or replace (Levenshtein)."""
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def measure(page: Page, words: Sequence[Word]) -> list[int]:
    """One row of the table: right, false and missed fields of each kind, wrong letters, letters, located values, values."""
    counts = score.count_fields(page.fields, extract_by_rules(words))
    row = [getattr(counts[kind], name) for kind in score.KINDS for name in COUNTS]
    row += [sum(getattr(counts[kind], name) for kind in score.KINDS) for name in COUNTS]
    boxes = locate(page.fields, words)
    values = [path for path in leaves(page.fields) if path in page.boxes]
    located = 0
    for path in values:
        box = boxes[path]
        located += box is not None and overlap(box, page.boxes[path]) > 0.5
    return [*row, *character_errors(page, words), located, len(values)]


def rates(sums: np.ndarray) -> np.ndarray:
    """F1 of each kind, character error rate and share of located values of column sums [k, c]."""
    right, false, missed = (sums[:, i : 3 * len(KINDS) : 3] for i in range(3))
    f1 = 2 * right / np.maximum(1, 2 * right + false + missed)
    f1[right + missed == 0] = np.nan
    errors, letters, located, values = sums[:, 3 * len(KINDS) :].T
    return np.column_stack([f1, errors / letters, located / values])


def print_table(tables: dict[str, np.ndarray]) -> None:
    """A row for each figure, a column for each damage; `tables` are [pages, columns] of `measure`."""
    names = [*(f"F1 of {kind}" for kind in KINDS), "character error rate", "boxes that overlap > 0.5"]
    print(f"{'':26}" + "".join(f"{f'{damage} (n={len(table)})':>24}" for damage, table in tables.items()))
    columns = []
    for table in tables.values():

        def of_sums(rows, _, weights):
            sums = rows.sum(0, keepdims=True) if weights is None else weights.T @ rows
            return {"": rates(sums)[0] if weights is None else rates(sums)}

        documents = [str(i) for i in range(len(table))]
        gen = torch.Generator().manual_seed(0)
        columns.append(
            metrics.bootstrap(of_sums, table, np.zeros_like(table), documents, n=1000, gen=gen)[""]
        )
    for i, name in enumerate(names):
        cells = [f"{c.value[i]:.3f} [{c.low[i]:.3f}, {c.high[i]:.3f}]" for c in columns]
        print(f"{name:26}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where words are kept")
    parser.add_argument("--pages", type=int, default=100, help="of each damage")
    args = parser.parse_args()
    if args.pages < 2:
        parser.error("--pages must be 2 or more: intervals are over pages")
    tables: dict[str, list[list[int]]] = {damage: [] for damage in DAMAGES}
    for number in track(range(args.pages), "reading pages"):
        for damage in DAMAGES:
            page = draw_page(PageConfig(), "test", number, damage=damage)
            tables[damage].append(measure(page, read_page_once(page.image, args.folder)))
    print_table({damage: np.array(rows, np.float64) for damage, rows in tables.items()})


if __name__ == "__main__":
    main()
