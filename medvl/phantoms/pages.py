"""Drawn medical pages with their fields and the box of each: five kinds, many layouts, clean, scanned or photographed.

They show no patient, and every page says "SYNTHETIC". Research use only, not for diagnosis.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from attrs import frozen

from medvl.base import config, files
from medvl.documents.fields import Fields, fields_to_json
from medvl.documents.words import Box, Word, join_boxes
from medvl.phantoms import page_damage, page_grid, page_layout, page_records, pictures
from medvl.phantoms.page_damage import DAMAGES
from medvl.phantoms.page_layout import Piece
from medvl.phantoms.page_records import KINDS, pick, words

STYLES = ("letter", "grid")
# Of 16 equal parts of all records, those that a split takes its pages from: no two splits share a page, whatever
# their seeds. "bench" are the fixed pages of `standard_pages` and `suite_pages`.
_PARTS = {"train": range(10), "valid": range(10, 12), "test": range(12, 15), "bench": range(15, 16)}
# The numbers were chosen for pages that have BID, PRN, COPD, CKD and all flags between them.
_STANDARD = dict(zip(KINDS, (24, 0, 30, 4, 82), strict=True))
_SUITE = dict(zip(KINDS, (28, 1, 33, 22, 104), strict=True))


@frozen(kw_only=True)
class PageConfig:
    """How many pages of each split, and how they look. Kinds and damages take turns."""

    train: int = 2000
    valid: int = 100
    test: int = 300
    style: str = "letter"  # or "grid": short words, a glyph in each cell of 28 pixels
    kinds: tuple[str, ...] = KINDS
    damages: tuple[str, ...] = DAMAGES
    dpi: int = 100  # of letters; scans are drawn at this to twice as much
    rows: int = 6  # of a grid; a strip below says SYNTHETIC
    columns: int = 16
    lines: float = 0.0  # share of a grid's pages that have one line: the answer is its text
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "PageConfig", train=config.COUNT, valid=config.COUNT, test=config.COUNT)
        config.check_bounds(self, "PageConfig", seed=config.SEED, dpi=(72, 400), columns=(14, 100))
        _check_names("style", (self.style,), STYLES)
        _check_names("kinds", self.kinds, KINDS)
        _check_names("damages", self.damages, DAMAGES)
        config.check_bounds(self, "PageConfig", rows=(5, 100), lines=(0, 1))  # the longest form has 5 rows
        if self.lines and self.style != "grid":
            raise ValueError(f"PageConfig.lines is of style 'grid', got style {self.style!r}")


@frozen(eq=False)
class Page:
    """A drawn page."""

    image: np.ndarray  # uint8 [y, x, 3]
    fields: Fields  # as they are printed
    boxes: dict[str, Box]  # by path, as in `documents.fields.leaves`; pixels of the image
    kind: str
    damage: str
    texts: tuple[Word, ...]  # all words that are printed, section by section


def draw_page(cfg: PageConfig, split: str, number: int, *, kind: str = "", damage: str = "") -> Page:
    """A page, a pure function of its arguments; how many pages a split has makes no difference.

    Args:
        split: "train", "valid", "test" or "bench". No split has a patient of another one, or, in the style
            "grid", the words of another one's page.
        kind: of `cfg.kinds` or, by `cfg.lines`, "line", unless it is given; pages of one number and kind have the
            same fields and layout, whatever their damage.
        damage: of `cfg.damages` unless it is given.
    Raises:
        ValueError: unknown split, kind or damage.
    """
    _check_names("split", (split,), tuple(_PARTS))
    kind = kind or _kind_of(cfg, split, number)
    damage = damage or cfg.damages[number // len(cfg.kinds) % len(cfg.damages)]
    _check_names("kind", (kind,), (*KINDS, "line") if cfg.style == "grid" else KINDS)
    _check_names("damage", (damage,), DAMAGES)
    seeds = [cfg.seed, list(_PARTS).index(split), number, [*KINDS, "line"].index(kind)]
    fields = _draw_fields(cfg, split, kind, seeds)
    look_gen, damage_gen = np.random.default_rng([1, *seeds]), np.random.default_rng([2, *seeds])
    if cfg.style == "grid":
        rows = 1 if kind == "line" else cfg.rows
        fields, groups = page_grid.lay_out_grid(fields, rows, cfg.columns, look_gen)
        size, rules = (cfg.columns * page_grid.CELL, (rows + 1) * page_grid.CELL), []
    else:
        dpi = cfg.dpi * (float(damage_gen.uniform(1, 2)) if damage == "scan" else 1)
        look = page_layout.draw_look(kind, look_gen)
        fields, sheet = page_layout.lay_out(fields, look, dpi / 72)
        groups, size, rules = [[piece] for piece in sheet.pieces], sheet.size, sheet.rules
    ink, paper = int(look_gen.integers(0, 60)), int(look_gen.integers(235, 256))
    pieces = list(itertools.chain(*groups))
    image = page_layout.paint(size, pieces, rules, ink=ink, paper=paper)
    boxes = _field_boxes(pieces)
    values = [box for path, box in boxes.items() if path.endswith(("/value", "/dose"))]
    picture, matrix = page_damage.damage_page(
        image, values, damage, small=cfg.style == "grid", gen=damage_gen
    )
    return Page(
        image=np.array(picture.convert("RGB")),
        fields=fields,
        boxes={path: page_damage.move_box(matrix, box) for path, box in boxes.items()},
        kind=kind,
        damage=damage,
        texts=tuple(word for group in groups for word in _printed_words(group, matrix)),
    )


def _kind_of(cfg: PageConfig, split: str, number: int) -> str:
    """A line for as many pages as `cfg.lines` says; for the others kinds take turns."""
    gen = np.random.default_rng([4, cfg.seed, list(_PARTS).index(split), number])
    return "line" if gen.random() < cfg.lines else cfg.kinds[number % len(cfg.kinds)]


def draw_pages(cfg: PageConfig, folder: files.PathLike) -> dict[str, int]:
    """Write `folder/{split}/*.png` and `folder/{split}.jsonl`: conversations of a page, a request and its answer.

    The answer is the JSON of the fields, or the text of a line. A line of the table also has "kind", "damage",
    "category" (the kind), "document" (the page), "fields", "boxes" and "text", all that is printed. A table comes
    after its pictures; one that is there is left alone.

    Returns:
        number of pages per split.
    """
    counts = {"train": cfg.train, "valid": cfg.valid, "test": cfg.test}
    for split, count in counts.items():
        pictures.write_split(Path(folder), split, count, partial(_draw_conversation, cfg, split))
    return counts


def standard_pages(style: str = "letter") -> list[Page]:
    """The five pages of the bench, one of each kind, clean. No split of any config has them."""
    cfg = PageConfig(style=style)
    return [draw_page(cfg, "bench", number, kind=kind) for kind, number in _STANDARD.items()]


def suite_pages(style: str = "letter") -> list[Page]:
    """Five further pages to test on, one of each kind, clean. No split of any config has them."""
    cfg = PageConfig(style=style)
    return [draw_page(cfg, "bench", number, kind=kind) for kind, number in _SUITE.items()]


def draw_fixed_pages(folder: files.PathLike, style: str = "letter") -> None:
    """Write `standard_pages` as `folder/standard.jsonl` and `suite_pages` as `folder/suite.jsonl`, with their
    pictures, as `draw_pages` writes its splits."""
    for name, numbers in (("standard", _STANDARD), ("suite", _SUITE)):
        draw = partial(_draw_fixed, PageConfig(style=style), name, numbers)
        pictures.write_split(Path(folder), name, len(numbers), draw)


def _draw_fixed(cfg: PageConfig, name: str, numbers: Mapping[str, int], number: int) -> pictures.Drawn:
    """One of the fixed pages, each of another kind, as a conversation."""
    kind = KINDS[number]
    page = draw_page(cfg, "bench", numbers[kind], kind=kind)
    return _conversation(page, name, number, seed=numbers[kind])


def _draw_conversation(cfg: PageConfig, split: str, number: int) -> pictures.Drawn:
    page = draw_page(cfg, split, number)
    return _conversation(page, split, number, seed=[3, cfg.seed, list(_PARTS).index(split), number])


def _conversation(page: Page, split: str, number: int, *, seed: int | Sequence[int]) -> pictures.Drawn:
    """The picture of a page and its line of the table.

    Args:
        seed: of the wording of the request.
    """
    gen = np.random.default_rng(seed)
    answer = page.fields.text if page.kind == "line" else fields_to_json(page.fields)
    prompt = pick(gen, words()["prompts"]["line" if page.kind == "line" else "fields"])
    name, document = f"{split}/{number}.png", f"{split}-{number}"
    line = pictures.conversation(document, name, prompt, answer) | {
        "kind": page.kind,
        "category": page.kind,
        "damage": page.damage,
        "document": document,
        "fields": json.loads(fields_to_json(page.fields)),
        "text": " ".join(word.text for word in page.texts),  # all that is printed: no number of it is made up
        "boxes": page.boxes,
    }
    return {name: page.image}, [line]


def _draw_fields(cfg: PageConfig, split: str, kind: str, seeds: Sequence[int]) -> Fields:
    """The first record of a page that belongs to the split, of those that are drawn one after the other."""
    draw = page_records.draw_grid_fields if cfg.style == "grid" else page_records.draw_fields
    for attempt in itertools.count():
        fields = draw(kind, np.random.default_rng([0, *seeds, attempt]))
        # Rows of a letter may be left out later, but not its patient.
        key = (
            fields_to_json(fields)
            if cfg.style == "grid"
            else f"{fields.patient.name}, {fields.patient.record}"
        )
        if hashlib.sha256(key.encode()).digest()[0] % 16 in _PARTS[split]:
            return fields
    raise AssertionError  # unreachable: the loop has no end


def _field_boxes(pieces: Sequence[Piece]) -> dict[str, Box]:
    """The box of each field: around all parts of it."""
    parts: dict[str, list[Box]] = {}
    for piece in pieces:
        for path, start, end in piece.marks:
            parts.setdefault(path, []).append(piece.box(start, end))
    return {path: join_boxes(boxes) for path, boxes in parts.items()}


def _printed_words(pieces: Sequence[Piece], matrix: np.ndarray) -> list[Word]:
    """The words of one piece of text, or the word of the glyphs of a grid."""
    if len(pieces) > 1:
        box = join_boxes(piece.box() for piece in pieces)
        return [Word("".join(piece.text for piece in pieces), page_damage.move_box(matrix, box))]
    (piece,) = pieces
    matches = re.finditer(r"\S+", piece.text)
    return [Word(word[0], page_damage.move_box(matrix, piece.box(*word.span()))) for word in matches]


def _check_names(setting: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise where a name is unknown or there is none."""
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"PageConfig: {setting} must be of {', '.join(known)}, each once, got {', '.join(names) or 'none'}"
        )
