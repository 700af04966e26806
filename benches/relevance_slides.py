"""How much of an answer's relevance lies on the patches of the rare motif.

    python benches/relevance_slides.py runs/slide_vqa_phantom-... [OUT]

The first ten test slides with a motif, asked which rare motif there is. OUT is a folder for their maps.
"""

import json
import sys
from pathlib import Path

import numpy as np

from medvl.evaluation import results
from medvl.phantoms.slide_questions import draw_questions, question_prompt
from medvl.slides.relevance import mass_share, percentiles
from medvl.systems.slide_vqa import look, record
from medvl.systems.slide_vqa import run as slide_vqa_run


def main(run: Path, out: str = "") -> None:
    """Print a row for each slide, and how many hold 80 %."""
    cfg = slide_vqa_run.load(run)[0].cfg
    home = record.data_folder(cfg)
    truths = [
        t for t in map(json.loads, (home / "truth.jsonl").read_text().splitlines()) if t["split"] == "test"
    ]
    rows = []
    for i, truth in [(i, t) for i, t in enumerate(truths) if t["motif_rows"]][:10]:
        asked = next(q for q in draw_questions(cfg.data.phantoms, "test", i) if q.family == "motif")
        text = question_prompt(asked.question, asked.options).removeprefix("<image>\n")
        found = look.look_at_slide(run, home / "features" / f"{truth['name']}.h5", text, out)
        motif = np.isin(np.arange(truth["patches"]), truth["motif_rows"])
        share, best = mass_share(found["relevance"], motif), percentiles(found["relevance"])[motif].max()
        right = found["answer"].strip().startswith(asked.letter)
        rows.append(
            (
                truth["name"],
                truth["patches"],
                int(motif.sum()),
                truth["motif"],
                right,
                f"{share:.3f}",
                f"{best:.5f}",
            )
        )
    print(
        results.markdown_table(
            ("Slide", "Patches", "of the motif", "Motif", "Right", "Share of relevance", "Percentile"), rows
        )
    )
    print(
        f"80 % or more in {sum(float(r[5]) >= 0.8 for r in rows)} of {len(rows)} slides; right in {sum(r[4] for r in rows)}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
