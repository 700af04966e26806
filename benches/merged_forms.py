"""What merging an adapter loses: `python -m benches.merged_forms runs/NAME... [--answers 100]`.

Each run (of a system whose adapters can be exported) is merged onto the weights that its adapter was trained on and onto those of
the model as it came, kept in its dtype or in four bits again. As `invoke export` does it, logits are compared over the answer
tokens of the bench's questions. `same answer` is the share of greedy answers to so many test conversations that are the same
text as the run's own.
"""

import argparse
from pathlib import Path

from attrs import evolve

from medvl.base import config
from medvl.evaluation.results import markdown_table
from medvl.language import chat, system
from medvl.systems import export, run
from medvl.systems.tune import run as tune_run

FORMS = (("seen", "none"), ("full", "none"), ("seen", "nf4"), ("seen", "awq"), ("full", "awq"))
HEADER = (
    "trained on",
    "merged onto",
    "kept as",
    "largest logit difference",
    "lost",
    "same token",
    "same answer",
    "export",
)


def rows_of(folder: Path, number: int) -> list[tuple[str, ...]]:
    """The rows of one run."""
    kind = run.find_system(config.system_of(folder))
    model, params = kind.load(folder)
    assert model.adapter is not None
    adapter = evolve(model.adapter, factors=params["lora"])
    conversations = tune_run.read_split(model.cfg, "test")[:number]
    prompts = chat.encode_conversations(model.chat, conversations, prompt=True)
    sampling = chat.sampling_of(model.chat, model.cfg.evaluate.max_tokens)
    size = model.cfg.evaluate.batch
    answers = system.answer_prompts(model, params, prompts, sampling, size=size)
    quantized, dtype = model.cfg.model.quantize, str(model.chat.dtype).removeprefix("torch.")
    trained_on = dtype if quantized == "none" else quantized
    rows = []
    for base, form in FORMS:
        if quantized == "none" and base == "full":
            continue  # the same weights
        merged, used, distance = export.merge(kind, model, params, adapter, folder, base=base, quantize=form)
        own = system.answer_prompts(
            evolve(model, adapter=None), {"model": merged}, prompts, sampling, size=size
        )
        same = sum(a == b for a, b in zip(own, answers, strict=True)) / len(answers)
        onto = dtype
        if quantized != "none":
            onto = f"{dtype}, {quantized} written out" if base == "seen" else f"{dtype}, as it came"
        rows.append(
            (
                trained_on,
                onto,
                dtype if form == "none" else used,
                f"{distance.largest:.3g}",
                f"{distance.lost:.2%}",
                f"{distance.same_token:.1%}",
                f"{same:.0%}",
                "yes" if distance.lost <= export.BOUND else "refused",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of trained runs")
    parser.add_argument("--answers", type=int, default=100, help="test conversations that are answered")
    options = parser.parse_args()
    rows = [row for folder in options.runs for row in rows_of(folder, options.answers)]
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
