"""Tiles and visual tokens of InternVL against transformers and naive formulas."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from medvl.language.images import open_image
from medvl.language.intern_vl import (
    TileConfig,
    count_tile_tokens,
    parse_tile_config,
    tile_grid,
    tile_image,
    tile_images,
)
from tests import tiny
from tests.tiny import drawn, saved

RAW = {
    "crop_size": None,
    "crop_to_patches": False,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 448, "width": 448},
}
SMALL = RAW | {"size": {"height": 16, "width": 16}, "image_seq_length": 4}  # what tiny.py's model takes


def peer_of(raw):
    """The image processor of transformers that needs nothing but Pillow."""
    from transformers import GotOcr2ImageProcessorPil

    keys = ("size", "image_mean", "image_std", "min_patches", "max_patches")
    return GotOcr2ImageProcessorPil(**{k: raw[k] for k in keys}, crop_to_patches=True)


def tiles_of(raw, images):
    out = peer_of(raw)(images, return_tensors="pt")
    return out["pixel_values"], out["num_patches"].tolist()


def before_523() -> bool:
    """Older releases drop transparency instead of laying it on white."""
    import transformers

    return tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 23)


# Tiles ----------------------------------------------------------------------------------------------------------------------------------
SIZES = [
    (448, 448),
    (896, 448),
    (850, 1100),
    (1, 1),
    (3, 500),
    (211, 123),
    (640, 480),
    (13, 2000),
    (1350, 900),
    (100, 14),
    (900, 900),
]


def test_tiles_are_those_of_transformers_to_the_bit():
    for chunk in range(0, len(SIZES), 4):  # a few at a time: an image is up to 31 MB
        images = [drawn(size, seed=i) for i, size in enumerate(SIZES[chunk : chunk + 4])]
        want, want_counts = tiles_of(RAW, images)
        values, counts = tile_images(parse_tile_config(RAW), images)
        assert values.dtype == torch.float32
        assert counts == want_counts
        assert torch.equal(values, want)


@pytest.mark.parametrize(
    "change",
    [{"max_patches": 1}, {"max_patches": 6}, {"min_patches": 4}, {"min_patches": 5, "max_patches": 5}],
)
@pytest.mark.parametrize("size", [16, 30])
def test_other_bounds_and_sizes_are_those_of_transformers(change, size):
    raw = (
        RAW
        | {"size": {"height": size, "width": size}, "image_mean": [0.5, 0.1, 0.9], "image_std": [0.5, 1, 0.2]}
        | change
    )
    images = [drawn(s, seed=i) for i, s in enumerate(SIZES)]
    want, want_counts = tiles_of(raw, images)
    values, counts = tile_images(parse_tile_config(raw), images)
    assert counts == want_counts
    assert torch.equal(values, want)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_are_those_of_transformers(mode):
    if mode.endswith("A") and before_523():
        pytest.skip("transformers before 5.23 drops transparency")
    image = drawn((90, 230), mode)
    want, (n,) = tiles_of(SMALL, [image])
    assert n > 1
    assert torch.equal(tile_image(parse_tile_config(SMALL), image), want)


def test_every_level_of_grey_is_normalised_as_in_transformers():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    got = tile_image(parse_tile_config(SMALL), ramp)
    assert torch.equal(got, tiles_of(SMALL, [Image.fromarray(ramp)])[0])
    want = (torch.from_numpy(ramp).double() / 255 - torch.tensor(RAW["image_mean"])) / torch.tensor(
        RAW["image_std"]
    )
    torch.testing.assert_close(got[0].permute(1, 2, 0), want.float(), rtol=0, atol=1e-6)


def test_transparent_pixels_are_white_whatever_lies_beneath():
    cfg = parse_tile_config(SMALL)
    white = tile_image(cfg, Image.new("RGB", (32, 16), "white"))
    for mode, clear in (("RGBA", (200, 10, 90, 0)), ("LA", (0, 0)), ("La", (0, 0)), ("RGBa", (0, 0, 0, 0))):
        assert torch.equal(tile_image(cfg, Image.new(mode, (32, 16), clear)), white), mode


def test_real_images_are_those_of_transformers(shared_data):
    folder = shared_data / "medvqa"
    paths = [sorted((folder / "vqa_rad" / "images").glob("*.jpg"))[0], *sorted(folder.glob("*.png"))]
    assert len(paths) == 2
    want, want_counts = tiles_of(RAW, [Image.open(p) for p in paths])
    values, counts = tile_images(parse_tile_config(RAW), [open_image(p) for p in paths])
    assert counts == want_counts
    assert max(counts) > 1
    assert torch.equal(values, want)


def test_a_lit_pixel_is_found_by_the_naive_formula():
    cfg, rng = TileConfig(size=16, tokens=4), random.Random(0)
    dark = np.zeros((2 * 16, 3 * 16, 3), np.uint8)
    assert tile_grid(cfg, *dark.shape[:2]) == (3, 2)
    for _ in range(60):
        y, x, c = rng.randrange(32), rng.randrange(48), rng.randrange(3)
        lit = dark.copy()
        lit[y, x, c] = 255
        change = tile_image(cfg, lit) - tile_image(cfg, dark)
        assert change[:6].nonzero().tolist() == [[y // 16 * 3 + x // 16, c, y % 16, x % 16]]
        assert change[6, c].abs().sum() == change[6].abs().sum() > 0  # the thumbnail sees it too


def test_the_thumbnail_is_the_image_as_one_tile_or_left_out():
    image = drawn((80, 40))
    cfg = TileConfig(size=16, tokens=4)
    with_it = tile_image(cfg, image)
    assert len(with_it) == 9  # of 2 x 1 and 4 x 2 the larger
    assert torch.equal(tile_image(TileConfig(size=16, thumbnail=False), image), with_it[:-1])
    assert torch.equal(tile_image(TileConfig(size=16, most=1), image), with_it[-1:])


def test_arrays_tensors_and_batches_agree():
    cfg, image = parse_tile_config(SMALL), drawn((100, 70))
    values, array = tile_image(cfg, image), np.array(image)
    for same in (array, torch.from_numpy(array), np.ascontiguousarray(array[:, ::-1])[:, ::-1]):
        assert torch.equal(tile_image(cfg, same), values)
    images = [image, drawn((16, 16)), drawn((33, 400))]
    together, counts = tile_images(cfg, images)
    each = [tile_image(cfg, i) for i in images]
    assert torch.equal(together, torch.cat(each))
    assert counts == [len(t) for t in each] == [7, 1, 13]
    none, counts = tile_images(cfg, [])
    assert (none.shape, none.dtype, counts) == ((0, 3, 16, 16), torch.float32, [])
    assert np.array_equal(array, np.array(image))  # nothing was written to what was given


# Grids and tokens -----------------------------------------------------------------------------------------------------------------------
def test_grids_are_those_of_transformers():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas as peer

    rng, seen = random.Random(0), set()
    for i in range(300):
        least = rng.choice([1, 1, 1, 2, 5])
        cfg = TileConfig(
            size=rng.choice([448, 448, 384, 16]), most=rng.choice([12, 12, 5, 6, 40]), least=least
        )
        height = rng.randrange(1, 3000)
        width = max(
            1,
            (rng.randrange(1, 3000), int(height * 10 ** rng.uniform(-2, 2)), height * rng.choice([1, 2, 3]))[
                i % 3
            ],
        )
        if i % 4 == 0:  # where two grids are equally near
            width, height = 5 * height // 2, 2 * (height // 2) or 2
        got = tile_grid(cfg, height, width)
        assert got == peer((height, width), (cfg.size, cfg.size), cfg.least, cfg.most), (cfg, height, width)
        want = peer_of(RAW).get_number_of_image_patches(height, width)
        columns, rows = tile_grid(TileConfig(), height, width)
        assert want == columns * rows + (columns * rows > 1)
        seen.add(got)
    assert len(seen) > 25
    for least, most, height, width in (
        (3, 4, 8, 16),
        (5, 6, 8, 26),
        (7, 8, 8, 10),
    ):  # which of two equally near ones is the smaller
        assert tile_grid(TileConfig(size=16, most=most, least=least), height, width) == peer(
            (height, width), (16, 16), least, most
        )


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((634, 634), (2, 2)),  # just over half of four tiles
        ((633, 633), (1, 1)),
        ((951, 951), (3, 3)),
        ((1100, 850), (3, 4)),
        ((1024, 768), (3, 4)),
        ((1, 5000), (12, 1)),
    ],
)
def test_pages_are_cut_into_the_known_grids(size, grid):
    assert tile_grid(TileConfig(), *size) == grid


def rows_of(cfg, counts):
    """A row of text with one image each, padded on the left, as InternVL's processor writes images."""
    rows = [[5 + i, 152, *[150] * count_tile_tokens(cfg, n), 153, 7, 9] for i, n in enumerate(counts)]
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(r)) + r for r in rows])


def test_the_model_says_the_same_of_our_tiles():
    cfg, model = parse_tile_config(SMALL), tiny.peer(*tiny.model("internvl"))
    images = [drawn((60, 20), seed=1), drawn((16, 16), seed=2), drawn((30, 47), seed=3)]
    values, counts = tile_images(cfg, images)
    assert sorted(set(counts)) == [1, 4, 7]
    theirs, their_counts = tiles_of(SMALL, images)
    ours, peers = rows_of(cfg, counts), rows_of(cfg, their_counts)
    with torch.no_grad():
        got = model(input_ids=ours, attention_mask=(ours > 0).long(), pixel_values=values).logits
        want = model(input_ids=peers, attention_mask=(peers > 0).long(), pixel_values=theirs).logits
        turned = model(input_ids=ours, attention_mask=(ours > 0).long(), pixel_values=values.flip(0)).logits
    assert torch.equal(got, want)
    assert (turned - want)[ours > 0].abs().max() > 1e-3  # which tile is where does tell


def test_the_tokens_are_those_of_transformers():
    from types import SimpleNamespace

    from transformers import InternVLProcessor

    cfg = parse_tile_config(RAW)
    names = {
        "start_image_token": "<img>",
        "image_token": "<IMG_CONTEXT>",
        "end_image_token": "</img>",
        "image_seq_length": cfg.tokens,
    }
    if not hasattr(InternVLProcessor, "replace_image_token"):
        pytest.skip("this release of transformers writes the tokens elsewhere")
    for n in (1, 3, 13):
        text = InternVLProcessor.replace_image_token(SimpleNamespace(**names), {"num_patches": [n]}, 0)
        assert text == f"<img>{'<IMG_CONTEXT>' * count_tile_tokens(cfg, n)}</img>"
    assert count_tile_tokens(cfg, 13) == 3328


# Records --------------------------------------------------------------------------------------------------------------------------------
def test_configs_are_read_in_all_their_forms():
    assert parse_tile_config(RAW) == TileConfig()
    old = {"image_seq_length": 64, "processor_class": "InternVLProcessor"}
    assert (
        parse_tile_config(RAW | old)
        == parse_tile_config({"image_processor": RAW, "video_processor": {"size": 3}, **old})
        == TileConfig(tokens=64)
    )
    assert parse_tile_config({"image_processor": RAW | old, "image_seq_length": None}) == TileConfig(
        tokens=64
    )
    assert (
        parse_tile_config({k: v for k, v in RAW.items() if k in ("size", "image_mean", "image_std")})
        == TileConfig()
    )
    assert parse_tile_config(peer_of(RAW | {"max_patches": 6, "min_patches": 2}).to_dict()) == TileConfig(
        most=6, least=2
    )
    assert parse_tile_config(RAW | {"max_patches": None}).most == 12


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "must be a record of keys and values, got list"),
        ({"image_processor": "GotOcr2ImageProcessor"}, "must be a record of keys and values, got str"),
        ({}, "must have size, image_mean, image_std, got only an empty record"),
        (
            {"image_seq_length": 256, "processor_class": "InternVLProcessor"},
            "must have size, image_mean, image_std, got only image_seq",
        ),
        (RAW | {"image_std": None}, "must have image_std, got only crop_to_patches"),
        (
            RAW | {"image_processor_type": "Qwen2VLImageProcessor"},
            "must be GotOcr2ImageProcessor as in InternVL's files, got 'Qwen2VL",
        ),
        (
            RAW | {"processor_class": "GotOcr2Processor"},
            "processor_class must be InternVLProcessor as in InternVL's files, got 'GotOcr2P",
        ),
        (
            {"image_processor": RAW, "processor_class": "GotOcr2Processor"},
            "processor_class must be InternVLProcessor",
        ),
        (RAW | {"do_resize": False}, "steps of InternVL are fixed, got do_resize=False, not True"),
        (RAW | {"do_center_crop": True}, "got do_center_crop=True, not False"),
        (RAW | {"resample": 2, "rescale_factor": 1.0}, "got rescale_factor=1.0, not .*; resample=2, not 3"),
        (RAW | {"max_tiles": 12}, "unknown keys max_tiles; known are image_mean"),
        (RAW | {"size": 448}, "size must hold height and width, equal as tiles are square, got 448"),
        (RAW | {"size": {"shortest_edge": 448}}, "size must hold height and width, .* got {'shortest_edge'"),
        (
            RAW | {"size": {"height": 448, "width": 224}},
            "equal as tiles are square, got {'height': 448, 'width': 224}",
        ),
        (RAW | {"size": {"height": "448", "width": "448"}}, "whole numbers >= 1, got size='448'"),
        (RAW | {"max_patches": 12.0}, "whole numbers >= 1, got most=12.0"),
        (RAW | {"min_patches": 0}, "whole numbers >= 1, got least=0"),
        (RAW | {"min_patches": True}, "whole numbers >= 1, got least=True"),
        (RAW | {"image_seq_length": -1}, "whole numbers >= 1, got tokens=-1"),
        (RAW | {"min_patches": 7, "max_patches": 6}, "most must be at least least, got most 6, least 7"),
        (RAW | {"image_mean": 0.5}, "image_mean must be a list of 3 numbers, got 0.5"),
        (RAW | {"image_mean": [0.5, 0.5]}, r"mean must be 3 finite numbers, got \(0.5, 0.5\)"),
        (RAW | {"image_std": [0.5, 0.5, 0]}, r"std must be 3 finite numbers > 0, got \(0.5, 0.5, 0\)"),
    ],
)
def test_config_errors(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_tile_config(raw)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I;16", (60, 60)), r"more than 8 bits \(mode I;16\) need a window: open_image"),
        (Image.new("F", (60, 60)), r"more than 8 bits \(mode F\)"),
        (np.zeros((60, 60, 3), np.float32), r"uint8 \[y, x, 3\] and not empty, got float32 \[60, 60, 3\]"),
        (torch.zeros(60, 60, 3), r"got float32 \[60, 60, 3\]"),
        (np.zeros((3, 60, 60), np.uint8), r"got uint8 \[3, 60, 60\]"),
        (np.zeros((60, 60), np.uint8), r"got uint8 \[60, 60\]"),
        (np.zeros((0, 60, 3), np.uint8), r"not empty, got uint8 \[0, 60, 3\]"),
        (Image.new("RGB", (0, 60)), "tile_grid: height and width must be positive, got 60 x 0"),
        ("page.png", "must be a PIL image, an array or a tensor, got str; open_image reads files"),
        (
            Image.open(io.BytesIO(saved(drawn((60, 60)), "PNG")[:2000])),
            "the image: cannot be read, broken or truncated",
        ),
    ],
    ids=[
        "I;16",
        "F",
        "float",
        "float tensor",
        "channels first",
        "grey array",
        "empty array",
        "empty",
        "path",
        "cut",
    ],
)
def test_image_errors(image, message):
    with pytest.raises(ValueError, match=message):
        tile_image(TileConfig(), image)
    with pytest.raises(ValueError, match=f"tile_images: image 1: .*{message}"):
        tile_images(TileConfig(), [Image.new("RGB", (60, 60)), image])


def test_numbers_that_are_none():
    for height, width in ((0, 5), (5, -1)):
        with pytest.raises(
            ValueError, match=f"tile_grid: height and width must be positive, got {height} x {width}"
        ):
            tile_grid(TileConfig(), height, width)
    for tiles in (0, -1, 1.0, True, "3"):
        with pytest.raises(
            ValueError, match=f"count_tile_tokens: tiles must be a whole number >= 1, got {tiles!r}"
        ):
            count_tile_tokens(TileConfig(), tiles)
    with pytest.raises(ValueError, match="thumbnail must be true or false, got 1"):
        TileConfig(thumbnail=1)
