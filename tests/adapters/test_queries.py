"""queries: tags go, what has no share is left out, pictures are opened as RGB within a bound of pixels."""

import pytest
import torch

from medvl.adapters import queries
from medvl.adapters.embed_config import EmbedConfig
from tests import tiny

PICTURES = [tiny.drawn((40, 30), seed=i) for i in range(3)]


def test_tags_go_and_images_beyond_the_most_do_not_count():
    cfg = EmbedConfig(max_images=2)
    words, pictures = queries.check_queries(
        "here", cfg, ["<image>\n<image>\nIs it big? ", " "], [PICTURES, []]
    )
    assert words == ["Is it big?", ""]
    assert pictures == [PICTURES[:2], []]
    assert queries.enumerate_pictures(pictures) == [(0, 0, PICTURES[0]), (0, 1, PICTURES[1])]


def test_what_has_no_share_is_left_out():
    only_texts = EmbedConfig(shares=(1.0, 0.0))
    assert queries.check_queries("here", only_texts, ["heart"], [PICTURES]) == (["heart"], [[]])
    only_images = EmbedConfig(shares=(0.0, 1.0), max_images=3)
    assert queries.check_queries("here", only_images, ["heart"], [PICTURES]) == ([""], [PICTURES])


def test_a_picture_is_opened_within_a_bound_of_pixels(tmp_path):
    PICTURES[0].convert("L").save(tmp_path / "grey.png")
    cfg = EmbedConfig(max_pixels=300)
    for source in (tmp_path / "grey.png", (tmp_path / "grey.png").read_bytes(), PICTURES[0]):
        image = queries.open_picture("here", cfg, 0, 0, source)
        assert image.mode == "RGB"
        assert image.width * image.height <= 300
    with pytest.raises(ValueError, match=r"here: image 1 of row 2: .*no\.png: no such file"):
        queries.open_picture("here", cfg, 2, 1, tmp_path / "no.png")


def test_the_mean_of_the_vectors_of_each_row():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mean, has_vector = queries.mean_per_row(vectors, [0, 2, 2], 3)
    assert mean.tolist() == [[1.0, 2.0], [0.0, 0.0], [4.0, 5.0]]
    assert has_vector.tolist() == [True, False, True]
