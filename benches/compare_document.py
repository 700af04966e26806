"""Two forms of a document run on the same test pages: `python -m benches.compare_document runs/NAME [--variant base]`.

`invoke evaluate --exp runs/NAME --variant base` answers with the model before its training, into `runs/NAME/results-base`. Its
answers are compared with those of the run: F1 with 95 % intervals by bootstrap of documents, and the paired difference with p
by exchange (`documents.score.compare_runs`). `--rules` adds what OCR and rules make of the same pages.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medvl.base import config
from medvl.documents.score import PageScore, compare_runs, score_results
from medvl.evaluation.results import markdown_table
from medvl.systems.document import SYSTEM
from medvl.systems.document.record import Config
from medvl.systems.document.score import answer_by_rules, score_answers
from medvl.systems.tune.run import data_folder

SHOWN = (
    *(("f1", "all"), ("precision", "all"), ("recall", "all")),
    *(("hallucinated_value_rate", ""), ("omission_rate", ""), ("coherence", "")),
)


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The lines of `answers.jsonl` of some results."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def row_of(name: str, scores: Sequence[PageScore], seed: int) -> tuple[str, ...]:
    """A row of the table: the rates of SHOWN with their intervals."""
    gen = torch.Generator().manual_seed(seed)
    found = {(row.what, row.subject): row for row in score_results(scores, split="test", gen=gen)}
    cells = [found[key] for key in SHOWN]
    return name, *(f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a trained run of document")
    parser.add_argument("--variant", default="base", help="that was evaluated, too")
    parser.add_argument(
        "--rules", action="store_true", help="also OCR and rules, 3 s a page that is not read yet"
    )
    options = parser.parse_args()
    cfg: Any = config.load_run(options.run, Config)
    pages = SYSTEM.prepare(cfg, print)("test")
    scores = {}
    for name, folder in ((options.variant, f"results-{options.variant}"), ("trained", "results")):
        lines = read_answers(options.run / folder)
        scores[name] = score_answers(pages, [line["answer"] for line in lines])
        shapes = sorted({line["read_as"] for line in lines})
        counts = ", ".join(f"{sum(line['read_as'] == shape for line in lines)} {shape}" for shape in shapes)
        print(f"answers of {name} read as: {counts}")
    if options.rules:
        words = data_folder(cfg) / "page_words"
        scores["OCR and rules"] = score_answers(pages, [answer_by_rules(page, words) for page in pages])
    header = ("", *(f"{what} {subject}".strip() for what, subject in SHOWN))
    print(markdown_table(header, [row_of(name, scores[name], cfg.seed) for name in scores]))
    for name in scores:
        gen = torch.Generator().manual_seed(cfg.seed)
        rows = (
            [] if name == "trained" else compare_runs(scores["trained"], scores[name], split="test", gen=gen)
        )
        for row in [row for row in rows if row.n]:
            print(
                f"F1 of {row.subject}, trained minus {name}: {row.value:+.3f} [{row.low:+.3f}, {row.high:+.3f}], "
                f"p = {row.extra['p']:.4f}, n = {row.n}"
            )


if __name__ == "__main__":
    main()
