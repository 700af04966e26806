"""Drawn pictures with questions: a body, its organs and a few bright spots, told about in words. Free of cost and of patients."""

import json
from pathlib import Path

import numpy as np
from attrs import frozen
from PIL import Image

from medvl.base import config, files
from medvl.base.display import track

SPLITS = ("train", "valid", "test")
_SIDES, _ZONES = ("right", "left"), ("upper", "lower")
_NUMBERS = ("no", "one", "two", "three")


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
    """Write `folder/{split}/*.png` and `folder/{split}.jsonl`, conversations with one picture and one question each; the tables come last.

    A picture is a pure function of (cfg.seed, split, number). Sides are the patient's: right is on the left of the picture.
    Returns:
        number of pictures per split.
    """
    folder, counts = Path(folder), {"train": cfg.train, "valid": cfg.valid, "test": cfg.test}
    for split, n in counts.items():
        table = folder / f"{split}.jsonl"
        if table.exists():
            continue
        lines = []
        for i in track(range(n), f"drawing pictures, {split}"):
            picture, question, answer, kind = draw_picture(cfg, split, i)
            name = f"{split}/{i}.png"
            with files.atomic(folder / name) as tmp:
                Image.fromarray(picture).save(tmp, format="PNG")
            turns = [
                {"role": "user", "content": f"<image>\n{question}"},
                {"role": "assistant", "content": answer},
            ]
            lines.append(
                json.dumps({"id": f"{split}-{i}", "images": [name], "messages": turns, "category": kind})
                + "\n"
            )
        files.write_text(table, "".join(lines))
    return counts


def draw_picture(cfg: PictureConfig, split: str, number: int) -> tuple[np.ndarray, str, str, str]:
    """(uint8 [y, x, 3], question, answer, kind of question)."""
    gen = np.random.default_rng([cfg.seed, SPLITS.index(split), number])
    n = cfg.size
    y, x = np.mgrid[0:n, 0:n] / n - 0.5
    image = 20 + 70.0 * ((x / 0.45) ** 2 + (y / 0.48) ** 2 < 1)
    for side in (-1, 1):  # lungs
        image[((x - side * 0.2) / 0.15) ** 2 + (y / 0.36) ** 2 < 1] = 45
    wanted = int(gen.integers(0, 4))
    places = [(s, z) for s in range(2) for z in range(2)]
    chosen = [places[i] for i in gen.permutation(4)[:wanted]]
    for s, z in chosen:
        cx, cy = (-0.2, 0.2)[s] + gen.uniform(-0.05, 0.05), (-0.17, 0.17)[z] + gen.uniform(-0.06, 0.06)
        image[(x - cx) ** 2 + (y - cy) ** 2 < gen.uniform(0.05, 0.07) ** 2] = gen.uniform(150, 230)
    image = np.clip(image + gen.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    kind = ("count", "side", "zone")[int(gen.integers(3)) if wanted == 1 else 0]
    asked = {
        "count": "How many nodules are there?",
        "side": "On which side is the nodule?",
        "zone": "In which zone is the nodule?",
    }[kind]
    if kind == "count":
        said = (
            f"There {'is' if wanted == 1 else 'are'} {_NUMBERS[wanted]} nodule{'' if wanted == 1 else 's'}."
        )
    else:
        said = f"On the {_SIDES[chosen[0][0]]}." if kind == "side" else f"In the {_ZONES[chosen[0][1]]} zone."
    return np.repeat(image[..., None], 3, 2), asked, said, kind
