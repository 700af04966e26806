"""Writes what training takes into docs/gpu.md, between its marks: `python -m benches.gpu.table [--gpu h100] [--only NAME]`.

Nothing is measured and nothing is read from the hub: steps are estimated on tensors without storage (`invoke estimate`),
sizes of models are those of `models.py`, and a tokenizer is only asked for its size.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from attrs import frozen

from benches.gpu.models import PUBLISHED
from medvl.ct.preprocess import size_of
from medvl.evaluation import results
from medvl.hub import loading, tokens
from medvl.language import chat, vision
from medvl.systems import run
from medvl.training import trace
from medvl.training.estimate import Step

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/gpu.md"
MARKS = ("<!-- begin of benches/gpu/table.py -->\n", "<!-- end of benches/gpu/table.py -->\n")
NUMBERS = (1, 8, 64)  # of GPUs


@frozen(kw_only=True)
class Workload:
    """What a record is meant for: so many samples of so many tokens."""

    name: str
    samples: int
    slices: int = 0  # of a volume, that are scan and not padding
    tokens: int = 0  # of a conversation


# CT-RATE: an epoch shows each scan in one of its reconstructions. 104 of 160 slices of 3 mm are scan, on average.
CT_RATE = (
    Workload(name="CT-RATE, 24,128 scans", samples=24_128, slices=104),
    Workload(name="CT-RATE, 47,149 reconstructions", samples=47_149, slices=104),
)
# SlideChat: 4,181 captions and 175,734 questions about 4,915 slides.
CAPTIONS = Workload(name="SlideChat, 4,181 captions of 512 tokens", samples=4_181, tokens=512)
QUESTIONS = Workload(name="SlideChat, 175,734 questions of 256 tokens", samples=175_734, tokens=256)
MILLION = Workload(name="a million conversations of 1,024 tokens", samples=1_000_000, tokens=1024)


class Tokenizer:
    """As much of a tokenizer as an estimate asks for; an image's token is the model's own."""

    pad_token_id, eos_token_id, bos_token_id = 0, 2, 1

    def __init__(self, image_token: int) -> None:
        self.image_token = image_token

    def __len__(self) -> int:
        return 151_936

    def get_vocab(self) -> dict[str, int]:
        return {"<|image_pad|>": self.image_token}

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, list):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        return self.image_token if tokens == "<|image_pad|>" else 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h100", choices=trace.GPUS)
    parser.add_argument("--only", default="", help="experiments, comma-separated; prints their rows")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else experiment_names()
    with published_models():
        rows = [row for name in names for row in rows_of(name, options.gpu)]
    text = render(rows, options.gpu)
    if options.only:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(before + MARKS[0] + text + MARKS[1] + after, encoding="utf-8")
    print(f"{PAGE}: {len(rows)} rows")


def experiment_names() -> list[str]:
    """Experiments for GPUs: those that name a published model, and train."""
    names = []
    for path in sorted((ROOT / "experiments").glob("*.toml")):
        cfg, _ = resolve(path.stem)
        kind = run.find_system(cfg.system)
        published = cfg.vit.name if cfg.system == "ct_clip" else cfg.model.name
        if published in PUBLISHED and kind.trains(cfg) and getattr(cfg, "trained", True):
            names.append(path.stem)
    return names


@contextmanager
def published_models() -> Iterator[None]:
    """Configs come from `models.py`, tokenizers are `Tokenizer`."""

    def config_of(model: Any, tokenizer: Any) -> dict[str, Any]:
        return PUBLISHED[model.name]

    def encoder_config(name: Any, tower: str) -> dict[str, Any]:
        return PUBLISHED[str(name)]

    vision_of = vision.vision_of

    def default_preprocessing(config: dict[str, Any], name: str, **options: Any) -> Any:
        return vision_of(config, "", **options)

    with (
        mock.patch.object(chat, "config_of", config_of),
        mock.patch.object(vision, "vision_of", default_preprocessing),
        mock.patch.object(tokens, "tokenizer", return_value=Tokenizer(151_655)),
        mock.patch.object(loading, "encoder_config", encoder_config),
    ):
        yield


def resolve(name: str) -> tuple[Any, Path]:
    return run.resolve(str(ROOT / "experiments" / f"{name}.toml"))


def rows_of(name: str, gpu: str) -> list[tuple[str, ...]]:
    """The rows of an experiment: each stage with what it is meant for."""
    start = time.monotonic()
    cfg, folder = resolve(name)
    steps = run.find_system(cfg.system).memory(cfg, folder)
    rows = []
    for stage, step in steps.items():
        for workload in workloads_of(cfg, stage):
            rows.append(row_of(cfg, name, stage, step, workload, gpu))
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def workloads_of(cfg: Any, stage: str) -> tuple[Workload, ...]:
    """What a stage, as `memory` calls it, is meant for."""
    if cfg.system == "ct_clip":
        return CT_RATE
    if cfg.system == "slide_vqa":
        return (CAPTIONS if stage == "captions" else QUESTIONS,)
    return (MILLION,)


def row_of(cfg: Any, name: str, stage: str, step: Step, workload: Workload, gpu: str) -> tuple[str, ...]:
    rates = step.rates(trace.GPUS[gpu])
    if cfg.system == "ct_clip":
        # A step has all slices that a volume can have; time is linear in those that are encoded.
        per_second = rates["samples_per_second"] * size_of(cfg.ct)[0] / workload.slices
        speed = f"{short(per_second)} volumes"
    else:
        per_second = rates["tokens_per_second"] / workload.tokens
        speed = f"{short(rates['tokens_per_second'])} tokens"
    hours = workload.samples / per_second / 3600
    memory = f"{sum(step.memory.values()) / 1e9:.1f}"
    all_hours = [short(hours / number) if hours / number >= 0.01 else "<0.01" for number in NUMBERS]
    return f"`{name}`", stage, memory, short(rates["seconds"]), speed, workload.name, *all_hours


def short(number: float) -> str:
    """Two digits, or whole with its thousands apart."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def render(rows: list[tuple[str, ...]], gpu: str) -> str:
    header = ("experiment", "stage", "GB", "s a step", "a second", "for", *(f"h on {n}" for n in NUMBERS))
    today = datetime.date.today().isoformat()
    command = "python -m benches.gpu.table" + ("" if gpu == "h100" else f" --gpu {gpu}")
    return (
        f"Estimated, not measured, for an {gpu.upper()}, {today}, by `{command}`. Assumed: {trace.ASSUMPTIONS}.\n\n"
        + results.markdown_table(header, rows)
    )


if __name__ == "__main__":
    main()
