"""`unified_phantom` and its controls, each trained from several seeds: what H-LoRA and the levels of the tower are for.

    python benches/unified_controls.py FOLDER [--exp unified_phantom] [--seeds 0 1 2]

Writes runs and `table.md` into FOLDER; what is there is not trained again, so that a call which was stopped goes on.
All runs share the VQ model of the first seed, target codes and tokenizer; those of a seed that differ only in later
stages share the stages before. A control of one task leaves out the stages of the other. Figures are means over
the seeds, intervals the 2.5 % to 97.5 % of 2,000 samples of seeds and heads, drawn with replacement. Differences are
taken head by head, and hold where their interval is on one side of 0.
"""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

import attrs
import numpy as np
import torch
from PIL import Image

from medvl.base import config
from medvl.base.tree import Tree
from medvl.evaluation.pictures import controls, mean_picture, psnr, ssim
from medvl.evaluation.vqa import is_right
from medvl.language.conversations import Conversation
from medvl.language.drawings import Drawing
from medvl.systems import run
from medvl.systems.unified.data import codes_of, find_sources, read_questions, read_targets
from medvl.systems.unified.draw import decode_pictures
from medvl.systems.unified.probe import fit_probe, probe
from medvl.systems.unified.record import Config, Split
from medvl.systems.unified.run import load
from medvl.weights.lora import LoraConfig

RECIPE = "recipe"
Table = dict[str, np.ndarray]  # {score: mean of each head}
Scores = dict[str, dict[str, list[float]]]  # {score: {head: values}}


def without_lora(cfg: Config) -> Config:
    """Projectors and rows alone are trained on the base."""
    stages = []
    for stage in cfg.train.stages:
        kept = tuple(pattern for pattern in stage.train if "lora/" not in pattern)
        stages.append(attrs.evolve(stage, train=kept))
    return attrs.evolve(cfg, train=attrs.evolve(cfg.train, stages=tuple(stages)))


def with_one_lora(cfg: Config) -> Config:
    """One plain LoRA of the rank to draw, trained on both tasks at once for as many steps as both stages have."""
    *first, understand, draw = [
        attrs.evolve(stage, train=tuple(pattern.replace("draw/lora/", "lora/") for pattern in stage.train))
        for stage in cfg.train.stages
    ]
    patterns = tuple(p for p in (*understand.train, *draw.train) if not p.startswith("understand/lora/"))
    # The last stage keeps its name, as sources go by it.
    both = attrs.evolve(
        draw, data="mixed", steps=understand.steps + draw.steps, train=tuple(dict.fromkeys(patterns))
    )
    shared = LoraConfig(rank=cfg.draw.lora.rank, alpha=cfg.draw.lora.alpha, pattern=cfg.draw.lora.pattern)
    return attrs.evolve(cfg, shared=shared, train=attrs.evolve(cfg.train, stages=(*first, both)))


def with_concrete_understanding(cfg: Config) -> Config:
    """Questions are answered from the level that is drawn from."""
    cfg = attrs.evolve(cfg, understand=attrs.evolve(cfg.understand, level=cfg.draw.level))
    return of_one_task(cfg, "draw")


def with_abstract_drawing(cfg: Config) -> Config:
    """Pictures are drawn from the level that questions are answered from."""
    cfg = attrs.evolve(cfg, draw=attrs.evolve(cfg.draw, level=cfg.understand.level))
    return of_one_task(cfg, "understand")


def of_one_task(cfg: Config, other: str) -> Config:
    """Without the stages of the other task alone, and without its test."""
    stages = tuple(stage for stage in cfg.train.stages if stage.data != other)
    names = {stage.name for stage in stages}
    sources = []
    for source in cfg.data.sources:
        tested = source.task != other
        splits = tuple(split for split in source.splits if tested or split != "test")
        kept = tuple(name for name in source.stages if name in names)
        if kept or not source.stages:  # else it was for the stages that are left out
            sources.append(attrs.evolve(source, splits=splits, stages=kept))
    return attrs.evolve(
        cfg, data=attrs.evolve(cfg.data, sources=tuple(sources)), train=attrs.evolve(cfg.train, stages=stages)
    )


VARIANTS = {
    RECIPE: lambda cfg: cfg,
    "no H-LoRA": without_lora,
    "one LoRA for both tasks": with_one_lora,
    "concrete features to understand": with_concrete_understanding,
    "abstract features to draw": with_abstract_drawing,
}


def train_variant(cfg: Config, name: str, folder: Path, start: Path | None) -> Path:
    """Train a variant, or find it trained; returns its run folder.

    Args:
        cfg: the recipe.
        folder: gets the record, FOLDER/NAME.json.
        start: a run of the recipe, of another seed or variant; what both have in common is taken from there.
    """
    variant = VARIANTS[name](cfg)
    record = folder / f"{name.replace(' ', '_')}-{cfg.seed}.json"
    record.write_text(json.dumps(config.unstructure(variant)))
    _, run_folder = run.resolve(str(record))
    if start is not None and not run_folder.is_dir():
        for part in shared_parts(config.load_run(start, Config), variant):
            shutil.copytree(start / part, run_folder / part)
    if not (run_folder / "results" / "report.html").is_file():
        run.run(str(record), log=print)
    return run_folder


def shared_parts(a: Config, b: Config) -> list[str]:
    """What two records have in common: folders of a run."""
    parts = ["codes", "targets", "tokenizer"]
    if (a.seed, a.understand.level, a.draw.level) != (b.seed, b.understand.level, b.draw.level):
        return parts
    for i, (stage, other) in enumerate(zip(a.train.stages, b.train.stages, strict=False)):
        if stage != other:
            break
        parts.append(f"{i}-{stage.name}")
    return parts


# Scores -----------------------------------------------------------------------------------------------------
def read_scores(cfg: Config, results: Path, weights: Tree) -> Table:
    """The scores of a run: {"accuracy", "SSIM, transfer", ...: the mean of each head}."""
    table: Table = {}
    if (results / "answers.jsonl").is_file():
        table |= score_answers(questions_of(cfg, "test"), read_lines(results / "answers.jsonl"))
    if drawings := read_drawings(cfg, "test"):
        pictures = [open_picture(results / "pictures" / f"{i}.png") for i in range(len(drawings))]
        table |= score_pictures(drawings, pictures, drawings, weights)
    return table


def score_answers(questions: list[Conversation], lines: list[dict]) -> Table:
    """Accuracy of all answers, and by category; lines are those of `answers.jsonl`."""
    scores: Scores = {}
    for question, line in zip(questions, lines, strict=True):
        assert question.id == line["id"]
        for name in ("accuracy", f"accuracy, {line['category']}"):
            add_score(scores, name, question.extra["episode_id"], float(line["right"]))
    return to_table(scores)


def score_pictures(
    drawings: list[Drawing], pictures: list[np.ndarray], reports: list[Drawing], weights: Tree
) -> Table:
    """SSIM and PSNR of pictures, and how often they show the side and the kind that reports say.

    Args:
        reports: for each picture the drawing whose lines say what it should show.
        weights: of `probe`.
    """
    scores: Scores = {}
    shown = probe(weights, pictures)
    for drawing, picture, report, seen in zip(drawings, pictures, reports, shown, strict=True):
        task, head = drawing.question.extra["task"], drawing.question.extra["episode_id"]
        target = open_picture(drawing.target)
        add_score(scores, f"SSIM, {task}", head, ssim(picture, target))
        value = psnr(picture, target)
        if np.isfinite(value):  # not of a copy that is the target itself
            add_score(scores, f"PSNR, {task}", head, value)
        for fact in ("look", "side", "kind"):
            add_score(
                scores, f"{fact} as told, {task}", head, float(seen[fact] == report.question.extra[fact])
            )
    return to_table(scores)


def score_controls(run_folder: Path, weights: Tree) -> dict[str, Table]:
    """The scores of pictures and answers that need no training of their own, on the test split of a run."""
    model, _ = load(run_folder)
    drawings = read_drawings(model.cfg, "test")
    targets = [open_picture(drawing.target) for drawing in drawings]
    means = mean_targets(model.cfg)
    codes = torch.tensor(codes_of(model.cfg, model.vq, drawings, run_folder))
    reconstructions = decode_pictures(model, codes)
    of_mean = [means[drawing.question.extra["look"]] for drawing in drawings]
    tables = {}
    for name, pictures in controls([], targets, of_mean, reconstructions).items():
        tables[name] = score_pictures(drawings, list(pictures), drawings, weights)
    with_image = [i for i, drawing in enumerate(drawings) if drawing.question.images]
    inputs = [open_picture(drawings[i].question.images[0]) for i in with_image]
    copied = controls(inputs, [targets[i] for i in with_image], [], [])["copied input"]
    asked = [drawings[i] for i in with_image]
    tables["copied input"] = score_pictures(asked, list(copied), asked, weights)
    from_text = [i for i, drawing in enumerate(drawings) if not drawing.question.images]
    others = [drawings[i] for i in [*from_text[2:], *from_text[:2]]]  # of the next head: each has two
    drawn = [open_picture(run_folder / "results" / "pictures" / f"{i}.png") for i in from_text]
    shuffled = score_pictures([drawings[i] for i in from_text], drawn, others, weights)
    tables["shuffled reports"] = {name: values for name, values in shuffled.items() if "as told" in name}
    tables["question only"] = answer_from_questions(model.cfg)
    return tables


def mean_targets(cfg: Config) -> dict[str, np.ndarray]:
    """{look: the mean of 500 targets of the training split}."""
    of_look: dict[str, list[np.ndarray]] = {}
    for drawing in read_drawings(cfg, "train")[:1000]:
        of_look.setdefault(drawing.question.extra["look"], []).append(open_picture(drawing.target))
    return {look: mean_picture(pictures) for look, pictures in of_look.items()}


def answer_from_questions(cfg: Config) -> Table:
    """The accuracy of the most frequent training answer to each question: what can be said without an image."""
    answers_to: dict[str, Counter[str]] = {}
    for question in questions_of(cfg, "train"):
        for asked, answered in zip(question.messages[::2], question.messages[1::2], strict=True):
            answers_to.setdefault(text_of(asked), Counter())[answered["content"]] += 1
    scores: Scores = {}
    for question in questions_of(cfg, "test"):
        usual = answers_to[text_of(question.messages[0])].most_common(1)[0][0]
        right = float(is_right(usual, question.messages[-1]["content"]))
        for name in ("accuracy", f"accuracy, {question.extra['category']}"):
            add_score(scores, name, question.extra["episode_id"], right)
    return to_table(scores)


def text_of(message: dict[str, str]) -> str:
    """What a message says, without the place of its image."""
    return message["content"].replace("<image>", "").strip()


def questions_of(cfg: Config, split: Split) -> list[Conversation]:
    """The questions of all sources."""
    sources = find_sources(cfg, "understand", split)
    return [question for source in sources for question in read_questions(cfg, source, split)]


def read_drawings(cfg: Config, split: Split) -> list[Drawing]:
    """The drawings of all sources."""
    return [
        drawing for source in find_sources(cfg, "draw", split) for drawing in read_targets(cfg, source, split)
    ]


def add_score(scores: Scores, name: str, head: str, value: float) -> None:
    """Count a value for a head."""
    scores.setdefault(name, {}).setdefault(head, []).append(value)


def to_table(scores: Scores) -> Table:
    """The mean of each head, in the order of the names of heads."""
    return {
        name: np.array([np.mean(of_head[head]) for head in sorted(of_head)])
        for name, of_head in scores.items()
    }


def read_lines(path: Path) -> list[dict]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_picture(path: Path | None) -> np.ndarray:
    """A picture uint8 [y, x, 3]."""
    assert path is not None
    return np.asarray(Image.open(path).convert("RGB"))


def interval(values: np.ndarray, samples: int = 2000) -> tuple[float, float, float]:
    """The mean of values [seeds, heads], and its 95 % interval."""
    gen = np.random.default_rng(0)  # equal samples for all rows
    seeds, heads = values.shape
    means = []
    for _ in range(samples):
        of_seeds = values[gen.integers(seeds, size=seeds)]
        means.append(of_seeds[:, gen.integers(heads, size=heads)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return values.mean(), low, high


def write_table(tables: dict[str, list[Table]], path: Path) -> None:
    """A row for each score and variant: the mean of the seeds, and what the recipe has more.

    Args:
        tables: {variant: the scores of each seed}.
    """
    lines = ["| score | | seeds | mean (95 % interval) | recipe's less this |", "|---|---|--:|---|---|"]
    for score in tables[RECIPE][0]:
        ours = np.stack([table[score] for table in tables[RECIPE]])
        for variant, of_seeds in tables.items():
            if score not in of_seeds[0] or len(of_seeds[0][score]) != ours.shape[1]:
                continue
            values = np.stack([table[score] for table in of_seeds])
            mean, low, high = interval(values)
            cells = [score, variant, f"{len(values)}", f"{mean:.3f} ({low:.3f} to {high:.3f})", ""]
            if variant != RECIPE:
                mean, low, high = interval(ours[: len(values)] - values)
                apart = low > 0 or high < 0
                cells[-1] = f"{mean:+.3f} ({low:+.3f} to {high:+.3f}){'' if apart else ', not told apart'}"
            lines.append(f"| {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exp", default="unified_phantom")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    run.RUNS = args.folder
    weights, tables, first = fit_probe(), dict[str, list[Table]](), None
    for seed in args.seeds:
        cfg, _ = run.resolve(args.exp, (f"seed={seed}",))
        recipe = train_variant(cfg, RECIPE, args.folder, first)
        first = first or recipe
        for name in VARIANTS:
            folder = recipe if name == RECIPE else train_variant(cfg, name, args.folder, recipe)
            scores = read_scores(config.load_run(folder, Config), folder / "results", weights)
            tables.setdefault(name, []).append(scores)
        for name, table in score_controls(recipe, weights).items():
            tables.setdefault(name, []).append(table)
        write_table(tables, args.folder / "table.md")


if __name__ == "__main__":
    main()
