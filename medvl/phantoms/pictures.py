"""Drawn pictures with questions for tuning a chat model: a body, two lungs and up to three bright nodules."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from attrs import frozen
from PIL import Image

from medvl.base import config, files
from medvl.base.display import track

SPLITS = ("train", "valid", "test")
Drawn = tuple[dict[str, np.ndarray], list[dict]]  # {file name: picture uint8 [y, x, 3]}, lines of a table
_SIDES, _ZONES = ("right", "left"), ("upper", "lower")
_NUMBERS = ("no", "one", "two", "three")
_QUESTIONS = {
    "count": "How many nodules are there?",
    "side": "On which side is the nodule?",
    "zone": "In which zone is the nodule?",
}


@frozen(kw_only=True)
class PictureConfig:
    """How many pictures of each split; every picture comes with one question."""

    train: int = 2000
    valid: int = 200
    test: int = 300
    size: int = 112  # pixels of a side
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "PictureConfig", train=config.COUNT, valid=config.COUNT, test=config.COUNT)
        config.check_bounds(self, "PictureConfig", size=(56, 4096), seed=config.SEED)


def draw_pictures(cfg: PictureConfig, folder: files.PathLike) -> dict[str, int]:
    """Write `folder/{split}/*.png` and `folder/{split}.jsonl`, conversations with one picture and one
    question each.

    A picture is a pure function of (cfg.seed, split, number). Sides are the patient's: right is on the left
    of the picture. A table comes after its pictures; one that is there is left alone.

    Returns:
        number of pictures per split.
    """
    counts = {"train": cfg.train, "valid": cfg.valid, "test": cfg.test}
    for split, count in counts.items():
        write_split(Path(folder), split, count, partial(_draw_conversation, cfg, split))
    return counts


def _draw_conversation(cfg: PictureConfig, split: str, number: int) -> Drawn:
    """The picture and the one line of a sample."""
    picture, question, answer, kind = draw_picture(cfg, split, number)
    name = f"{split}/{number}.png"
    line = conversation(f"{split}-{number}", name, question, answer) | {"category": kind}
    return {name: picture}, [line]


def write_split(folder: Path, split: str, count: int, draw: Callable[[int], Drawn]) -> None:
    """Write the pictures of `count` samples and then `folder/{split}.jsonl`, unless that table is there
    already.

    Args:
        draw: number -> pictures and lines of the table.
    """
    table = folder / f"{split}.jsonl"
    if table.exists():
        return
    lines = []
    for i in track(range(count), f"drawing pictures, {split}"):
        drawn, drawn_lines = draw(i)
        # An unfinished picture never has its final name, so a table that is there has all of its pictures.
        for name, picture in drawn.items():
            with files.atomic(folder / name) as tmp:
                # Hard to compress, as noise is: more effort takes three times as long for a tenth of the bytes.
                Image.fromarray(picture).save(tmp, format="PNG", compress_level=1)
        lines += [json.dumps(line) + "\n" for line in drawn_lines]
    files.write_text(table, "".join(lines))


def conversation(identifier: str, picture: str, question: str, answer: str) -> dict:
    """A line of a table of conversations, with one picture, one question and its answer."""
    messages = [
        {"role": "user", "content": f"<image>\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"id": identifier, "images": [picture], "messages": messages}


def draw_picture(cfg: PictureConfig, split: str, number: int) -> tuple[np.ndarray, str, str, str]:
    """A picture uint8 [y, x, 3], its question, the answer, and the kind of question: count, side or zone."""
    gen = np.random.default_rng([cfg.seed, SPLITS.index(split), number])
    # Nodules, each in another of the four quarters.
    count = int(gen.integers(0, 4))
    nodules = []  # (side, zone) of each, indices of _SIDES and _ZONES
    for quarter in gen.permutation(4)[:count]:
        side, zone = divmod(int(quarter), 2)
        nodules.append((side, zone))
    picture = _paint_picture(cfg.size, nodules, gen)
    # Side and zone can be asked of a single nodule only.
    kind = "count"
    if count == 1:
        kind = ("count", "side", "zone")[int(gen.integers(3))]
    return picture, _QUESTIONS[kind], _answer(kind, nodules), kind


def _paint_picture(n: int, nodules: list[tuple[int, int]], gen: np.random.Generator) -> np.ndarray:
    """The picture uint8 [n, n, 3].

    Lengths are shares of a side, 0 in the middle. Shapes and greys were chosen by eye.
    """
    y, x = np.mgrid[0:n, 0:n] / n - 0.5
    body = (x / 0.45) ** 2 + (y / 0.48) ** 2 < 1
    image = 20 + 70.0 * body
    for side in (-1, 1):
        lung_x = x - side * 0.2
        lung = (lung_x / 0.15) ** 2 + (y / 0.36) ** 2 < 1
        image[lung] = 45
    for side, zone in nodules:
        centre_x = (-0.2, 0.2)[side] + gen.uniform(-0.05, 0.05)
        centre_y = (-0.17, 0.17)[zone] + gen.uniform(-0.06, 0.06)
        grey = gen.uniform(150, 230)
        radius = gen.uniform(0.05, 0.07)
        nodule = (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2
        image[nodule] = grey
    noisy = image + gen.normal(0, 6, image.shape)
    pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, 2)  # three equal channels


def _answer(kind: str, nodules: list[tuple[int, int]]) -> str:
    count = len(nodules)
    if kind == "count":
        if count == 1:
            return f"There is {_NUMBERS[count]} nodule."
        return f"There are {_NUMBERS[count]} nodules."
    side, zone = nodules[0]
    if kind == "side":
        return f"On the {_SIDES[side]}."
    return f"In the {_ZONES[zone]} zone."
