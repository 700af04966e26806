"""The score of a compressor's validation slides: several processes count what one counts."""

import json

import pytest
import torch

from medvl.base import processes
from medvl.components import compress
from medvl.components.slots import CompressConfig
from medvl.slides import heads
from medvl.systems.slide_vqa import pretrain
from tests.together import run_together

CLASSES = {"organ": 3, "grade": 2}


def score(folder):
    """Score 13 slides, five at a time: batches of 5, 5 and 3. Some have no organ, none has a stage."""
    gen = torch.Generator().manual_seed(0)
    cfg = CompressConfig(dim=8, slots=2, hidden=4)
    params = {
        "compressor": compress.init_compress(cfg, gen),
        "heads": heads.init_heads(cfg.dim, CLASSES | {"stage": 2}, gen),
    }
    slides = torch.randn(13, 6, cfg.dim, generator=gen)
    labels = {label: torch.randint(-1, count, (13,), generator=gen) for label, count in CLASSES.items()}
    labels["stage"] = torch.full((13,), -1)
    batches = []

    def collate(rows):
        numbers = [row["number"] for row in rows]
        batches.append(numbers)
        batch = {"x": slides[numbers], "mask": torch.ones(len(numbers), 6, dtype=torch.bool)}
        return batch | {label: values[numbers] for label, values in labels.items()}

    found = pretrain._score_labels(cfg, params, collate, [{"number": i} for i in range(13)], 5)
    text = json.dumps({"score": found, "batches": batches})
    (folder / f"{processes.world_size()}-{processes.rank()}.json").write_text(text)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_count_what_one_counts(tmp_path, world):
    for number in (1, world):
        run_together(__name__, "score", tmp_path, number)
    alone = json.loads((tmp_path / "1-0.json").read_text())
    assert alone["score"].keys() == {"score", "right_organ", "right_grade"}
    assert 0 < alone["score"]["score"] < 1
    assert [len(batch) for batch in alone["batches"]] == [5, 5, 3]
    for rank in range(world):
        found = json.loads((tmp_path / f"{world}-{rank}.json").read_text())
        assert found["score"] == alone["score"]
        assert len(found["batches"]) == -(-3 // world)
