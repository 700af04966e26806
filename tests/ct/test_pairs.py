import logging

import numpy as np
import pytest
import torch

from medvl.base import store
from medvl.ct.pairs import draw_text, join_pairs, read_slices, some_sentences
from medvl.ct.volumes import FIELDS

ROW = {
    "spacing_mm": (3.0, 2.0, 2.0),
    "source_spacing_mm": (1.0, 1.0, 1.0),
    "source_shape": (9, 9, 9),
    "hu_rule": "none",
    "slope": 1.0,
    "intercept": 0.0,
}
OCCUPIED = {"train_1_a_1": (2, 6), "train_1_a_2": (1, 4), "train_2_a_1": (3, 7), "train_3_a_1": (0, 8)}


@pytest.fixture
def volumes(tmp_path, rng=np.random.default_rng(0)):
    path = tmp_path / "v.h5"
    store.create(path, [*OCCUPIED, "train_4_a_1"], (8, 4, 4), "uint8", {}, FIELDS)
    for name, occupied in OCCUPIED.items():
        store.put(
            store.open_store(path),
            name,
            rng.integers(0, 255, (8, 4, 4)).astype("uint8"),
            ROW | {"occupied": occupied},
        )
    return store.open_store(path)


def test_join_is_by_name_and_counts_what_is_alone(volumes, caplog):
    said = {
        "findings": {"train_2_a_1": "two", "train_1_a_2": "one", "train_9_a_1": "nine"},
        "impression": {"train_1_a_2": "I", "train_1_a_1": "I"},
    }
    with caplog.at_level(logging.WARNING):
        pairs = join_pairs(volumes, said)
    assert pairs.names == ("train_1_a_1", "train_1_a_2", "train_2_a_1")
    assert pairs.texts == ({"impression": "I"}, {"findings": "one", "impression": "I"}, {"findings": "two"})
    assert pairs.scans == ["train_1_a", "train_1_a", "train_2_a"]
    assert "1 volumes have no report, 1 reports have no volume" in caplog.text
    with pytest.raises(ValueError, match="none of its 4 volumes has one of the 1 reports"):
        join_pairs(volumes, {"both": {"valid_1_a_1": "other"}})


def test_slices_are_cut_to_what_any_volume_has(volumes):
    names = ["train_1_a_2", "train_2_a_1"]
    batch = read_slices(volumes, names)
    assert batch["slices"].shape == (2, 6, 4, 4)
    assert batch["position_mm"].tolist() == [[3.0, 6.0, 9.0, 12.0, 15.0, 18.0]] * 2
    assert batch["mask"].tolist() == [[True] * 3 + [False] * 3, [False] * 2 + [True] * 4]
    for i, name in enumerate(names):
        first, stop = OCCUPIED[name]
        torch.testing.assert_close(
            batch["slices"][i][batch["mask"][i]], torch.from_numpy(volumes.read(name)[first:stop])
        )


def test_some_sentences_are_sentences_of_the_report(gen):
    text = "No nodule. Heart is large. There is a small effusion; no pericardial fluid. Normal liver."
    whole = {
        "No nodule.",
        "Heart is large.",
        "There is a small effusion;",
        "no pericardial fluid.",
        "Normal liver.",
    }
    assert some_sentences(text, 0, gen) == text
    assert some_sentences("One.", 3, gen) == "One."
    drawn = [some_sentences(text, 2, gen) for _ in range(200)]
    assert {d for d in drawn if d in whole} == whole
    assert all(sum(s in d for s in whole) in (1, 2) for d in drawn)
    again = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    assert some_sentences(text, 3, again[0]) == some_sentences(text, 3, again[1])


def test_a_part_of_the_report_is_drawn_by_its_share(gen):
    parts, shares = {"findings": "Long.", "impression": "Short."}, {"findings": 0.25, "impression": 0.75}
    drawn = [draw_text(parts, shares, 0, gen) for _ in range(2000)]
    assert abs(drawn.count("Short.") / 2000 - 0.75) < 0.05
    assert draw_text({"findings": "Long."}, {"findings": 0.0, "impression": 1.0}, 0, gen) == "Long."
