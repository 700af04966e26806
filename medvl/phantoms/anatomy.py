"""Drawn heads, each as CT and as MR: one anatomy in two looks, with a mark, questions, and pictures to draw.

Both looks share the map of tissues and the mark; greys, light and noise are their own. Tissues that are bright in
one are dark in the other, so that a copied picture is a bad answer. They show no patient.
"""

from functools import partial
from pathlib import Path

import numpy as np
from attrs import evolve, frozen

from medvl.base import config, files
from medvl.phantoms import pictures, styles
from medvl.phantoms.styles import Mark

LOOKS = {"ct": "CT", "mr": "MR"}
SIDES = ("right", "left")  # the patient's: right is on the left of the picture
KINDS = ("haemorrhage", "lipoma")
SIZES = {"small": (0.05, 0.06), "large": (0.085, 0.1)}  # radius of a mark as a share of the picture's side
# Both are alike on CT and on T2 weighted MR with fat suppression, some days after the haemorrhage.
MARKS = {
    "haemorrhage": Mark(bright=True, sharp=True, colour=(245,)),
    "lipoma": Mark(bright=False, sharp=True, colour=(10,)),
}
GREYS = {
    "ct": {"scalp": 70, "skull": 225, "cortex": 132, "sulci": 85, "white": 108, "fissure": 55, "fluid": 45},
    "mr": {"scalp": 165, "skull": 22, "cortex": 140, "sulci": 205, "white": 92, "fissure": 200, "fluid": 225},
}
TABLES = {"draw": ("reconstruction", "report"), "change": ("transfer", "super_resolution")}


@frozen(kw_only=True)
class AnatomyConfig:
    """How many heads of each split; multiples of 8 are balanced exactly."""

    train: int = 2000
    valid: int = 96
    test: int = 200
    size: int = 64  # pixels of a side, a multiple of 4
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "AnatomyConfig", train=config.COUNT, valid=config.COUNT, test=config.COUNT)
        config.check_bounds(self, "AnatomyConfig", size=(32, 4096), seed=config.SEED)
        if self.size % 4:
            raise ValueError(f"AnatomyConfig: size must be a multiple of 4, got {self.size}")


def draw_anatomy(cfg: AnatomyConfig, folder: files.PathLike) -> dict[str, int]:
    """Write pictures `folder/{split}/{number}-{look}.png` (and `...-low.png`, a quarter as many pixels a side),
    questions about them, `{split}.jsonl`, and for `language/drawings.py` pictures to draw: `{split}_draw.jsonl` with the
    tasks "reconstruction" and "report" (from text alone), and `{split}_change.jsonl` with "transfer" (from the other
    look) and "super_resolution". Each line has "look", "side", "kind" and "size" of its target.

    Of the training split the three questions about a picture are one conversation, in any order.

    A table comes after its pictures; one that is there is left alone. Returns the number of heads per split.
    """
    counts = {"train": cfg.train, "valid": cfg.valid, "test": cfg.test}
    for split, count in counts.items():
        pictures.write_split(Path(folder), split, count, partial(_draw_questions, cfg, split))
        for table, tasks in TABLES.items():
            pictures.write_split(
                Path(folder), f"{split}_{table}", count, partial(_draw_tasks, cfg, tasks, split)
            )
    return counts


def draw_case(cfg: AnatomyConfig, split: str, number: int) -> dict[str, str]:
    """{"side", "kind", "size"} of a head. The 8 from a multiple of 8 on have all combinations."""
    order = _generator(cfg, 1, split, number // 8).permutation(8)
    side, kind, size = np.unravel_index(order[number % 8], (2, 2, 2))
    return {"side": SIDES[side], "kind": KINDS[kind], "size": [*SIZES][size]}


def draw_pair(cfg: AnatomyConfig, split: str, number: int) -> dict[str, np.ndarray]:
    """{look: picture uint8 [y, x, 3]} of a head, a pure function of (cfg.seed, cfg.size, split, number)."""
    case, gen = draw_case(cfg, split, number), _generator(cfg, 0, split, number)
    tables = [GREYS[look] for look in LOOKS]
    greys = {tissue: np.array([[[table[tissue]]] for table in tables], np.float32) for tissue in tables[0]}
    head = styles.draw_head(cfg.size, gen, greys)  # its image is [look, y, x, 1]
    on_the_left = np.arange(cfg.size) < cfg.size // 2  # of the picture
    row, column = gen.choice(np.argwhere(head.zone & (on_the_left == (case["side"] == "right"))))
    y, x = styles.grid(cfg.size)
    place = np.array([[x[0, column], y[row, 0], gen.uniform(*SIZES[case["size"]])]])
    outline = int(gen.integers(2**31))  # the seed of both looks
    drawn = dict[str, np.ndarray]()
    for image, look in zip(head.image, LOOKS, strict=True):
        scene = evolve(head, image=image * np.float32(gen.uniform(0.92, 1.08)), grain=0)
        clean = styles.add_marks(scene, MARKS[case["kind"]], place, np.random.default_rng(outline))
        noisy = clean[..., :1] + gen.normal(0, 4, (cfg.size, cfg.size, 1))
        drawn[look] = np.repeat(np.clip(noisy, 0, 255).astype(np.uint8), 3, 2)
    return drawn


def _draw_questions(cfg: AnatomyConfig, split: str, number: int) -> pictures.Drawn:
    """All pictures of a head, and the lines of its questions."""
    case, drawn, lines = draw_case(cfg, split, number), dict[str, np.ndarray](), []
    asked = {
        "side": ("On which side is the lesion?", f"On the {case['side']}."),
        "kind": ("What is the lesion?", f"A {case['kind']}."),
        "size": ("How large is the lesion?", f"It is {case['size']}."),
    }
    gen = _generator(cfg, 2, split, number)
    for look, picture in draw_pair(cfg, split, number).items():
        name = f"{split}/{number}-{look}"
        blocks = picture.reshape(cfg.size // 4, 4, cfg.size // 4, 4, 3)
        drawn |= {f"{name}.png": picture, f"{name}-low.png": blocks.mean((1, 3)).round().astype(np.uint8)}
        facts = {"task": look, "episode_id": f"{split}-{number}"}
        questions = []
        for category, pair in asked.items():
            line = pictures.conversation(f"{name}-{category}", f"{name}.png", *pair)
            questions.append(line | facts | {"category": category})
        if split == "train":
            questions = [_join(f"{name}-questions", [questions[i] for i in gen.permutation(3)])]
        lines += questions
    return drawn, lines


def _join(identifier: str, questions: list[dict]) -> dict:
    """Conversations about one picture as one: a step of training then reads the picture once for all of them.

    The category is that of the last question, as its answer is the one that controls look at.
    """
    messages = list[dict]()
    for question in questions:
        asked, answer = question["messages"]
        if messages:
            asked = asked | {"content": asked["content"].removeprefix("<image>\n")}
        messages += [asked, answer]
    return questions[-1] | {"id": identifier, "messages": messages}


def _draw_tasks(cfg: AnatomyConfig, tasks: tuple[str, ...], split: str, number: int) -> pictures.Drawn:
    """The lines of what is to be drawn of a head, whose pictures are there already.

    The image comes last: from a patch of it to the code of the same place it is then equally far in all tasks.
    """
    case, lines = draw_case(cfg, split, number), []
    for look, other in (("ct", "mr"), ("mr", "ct")):
        name = f"{split}/{number}-{look}"
        report = f"{LOOKS[look]} of the head with a {case['size']} {case['kind']} on the {case['side']}."
        asked = {
            "reconstruction": (f"{name}.png", "Reconstruct the image.\n<image>"),
            "transfer": (
                f"{split}/{number}-{other}.png",
                f"Show this {LOOKS[other]} as {LOOKS[look]}.\n<image>",
            ),
            "super_resolution": (f"{name}-low.png", "Show this image at four times the resolution.\n<image>"),
            "report": ("", report),
        }
        for task in tasks:
            image, text = asked[task]
            line = {"id": f"{name}-{task}", "image": image, "text": text, "target": f"{name}.png"}
            lines.append(line | {"task": task, "look": look, "episode_id": f"{split}-{number}"} | case)
    return {}, lines


def _generator(cfg: AnatomyConfig, use: int, split: str, number: int) -> np.random.Generator:
    return np.random.default_rng([use, cfg.seed, pictures.SPLITS.index(split), number])
