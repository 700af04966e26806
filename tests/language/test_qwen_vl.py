"""Patches, visual tokens and rotary positions of the Qwen-VL family against transformers and naive formulas."""

import copy
import inspect
import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from medvl.language.images import open_image
from medvl.language.qwen_vl import (
    ImageConfig,
    count_image_tokens,
    mrope,
    parse_image_config,
    patchify_image,
    patchify_images,
    smart_resize,
    token_types,
)
from tests.tiny import drawn, saved


def mrope_next(delta, cached):
    """Positions [3, b, 1] of the token behind `cached` tokens (a number or [b]), of which no padding counts."""
    return (delta + torch.as_tensor(cached).view(-1, 1)).expand(3, -1, -1)


IMAGE, VIDEO = 120, 121
QWEN2 = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2_5_VLImageProcessor",
}
QWEN3 = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def peer_of(raw):
    """The image processor of transformers that needs nothing but Pillow."""
    from transformers import Qwen2VLImageProcessorPil

    raw = copy.deepcopy(raw)  # the peer writes into what it is given
    raw.pop("image_processor_type")
    return Qwen2VLImageProcessorPil(**raw)


def before_523() -> bool:
    """Older releases drop transparency instead of laying it on white, and cut the seconds of a video to whole ones."""
    import transformers

    return tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 23)


# Patches --------------------------------------------------------------------------------------------------------------------------------
SIZES = [
    (56, 56),
    (850, 1100),
    (1, 1),
    (3, 500),
    (211, 123),
    (27, 29),
    (640, 480),
    (100, 14),
    (13, 2000),
    (392, 28),
]


@pytest.mark.parametrize(
    "raw", [QWEN2, QWEN3, QWEN2 | {"max_pixels": 100_000}, QWEN2 | {"min_pixels": 500_000}]
)
def test_patches_are_those_of_transformers_to_the_bit(raw):
    cfg, peer = parse_image_config(raw), peer_of(raw)
    images = [drawn(size, seed=i) for i, size in enumerate(SIZES)]
    want = peer(images, return_tensors="pt")
    values, grids = patchify_images(cfg, images)
    assert values.dtype == torch.float32
    assert torch.equal(grids, want["image_grid_thw"])
    assert torch.equal(values, want["pixel_values"])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_are_those_of_transformers(mode):
    if mode.endswith("A") and before_523():
        pytest.skip("transformers before 5.23 drops transparency")
    image = drawn((90, 130), mode)
    values, grid = patchify_image(ImageConfig(), image)
    want = peer_of(QWEN2)(image, return_tensors="pt")
    assert grid == tuple(want["image_grid_thw"][0].tolist())
    assert torch.equal(values, want["pixel_values"])


def test_transparent_pixels_are_white_whatever_lies_beneath():
    white = patchify_image(ImageConfig(), Image.new("RGB", (56, 56), "white"))[0]
    for mode, clear in (("RGBA", (200, 10, 90, 0)), ("LA", (0, 0)), ("La", (0, 0)), ("RGBa", (0, 0, 0, 0))):
        assert torch.equal(patchify_image(ImageConfig(), Image.new(mode, (56, 56), clear))[0], white), mode
    for image, clear in (
        (Image.new("P", (56, 56), 3), 3),
        (Image.new("L", (56, 56), 7), 7),
        (Image.new("RGB", (56, 56)), (0, 0, 0)),
    ):
        image.info["transparency"] = clear
        assert torch.equal(patchify_image(ImageConfig(), image)[0], white), image.mode


def test_real_images_are_those_of_transformers(shared_data):
    paths = [
        *sorted((shared_data / "medvqa" / "vqa_rad" / "images").glob("*.jpg"))[::15],
        *sorted((shared_data / "medvqa").glob("*.png")),
    ]
    assert len(paths) > 8
    images = [open_image(p) for p in paths]
    for raw in (
        QWEN2 | {"max_pixels": 1003520},
        QWEN3 | {"size": {"shortest_edge": 65536, "longest_edge": 1 << 20}},
    ):
        want = peer_of(raw)([Image.open(p) for p in paths], return_tensors="pt")
        values, grids = patchify_images(parse_image_config(raw), images)
        assert torch.equal(grids, want["image_grid_thw"])
        assert torch.equal(values, want["pixel_values"])


@pytest.mark.parametrize(
    "cfg", [ImageConfig(), ImageConfig(patch=4, merge=3, temporal=1, min_pixels=1)], ids=["qwen", "odd"]
)
def test_a_lit_pixel_is_found_by_the_naive_formula(cfg):
    unit = cfg.patch * cfg.merge
    height, width = 2 * unit, 5 * unit
    dark = np.zeros((height, width, 3), np.uint8)
    rng = random.Random(0)
    for _ in range(60):
        y, x, c = rng.randrange(height), rng.randrange(width), rng.randrange(3)
        lit = dark.copy()
        lit[y, x, c] = 255
        change = (patchify_image(cfg, lit)[0] - patchify_image(cfg, dark)[0]).nonzero().tolist()
        token = (y // unit) * (width // unit) + x // unit
        row = token * cfg.merge**2 + (y // cfg.patch % cfg.merge) * cfg.merge + x // cfg.patch % cfg.merge
        columns = [
            ((c * cfg.temporal + t) * cfg.patch + y % cfg.patch) * cfg.patch + x % cfg.patch
            for t in range(cfg.temporal)
        ]
        assert change == [[row, column] for column in columns]


def test_arrays_tensors_and_batches_agree():
    cfg, image = ImageConfig(), drawn((100, 70))
    values, grid = patchify_image(cfg, image)
    array = np.array(image)
    for same in (array, torch.from_numpy(array), np.ascontiguousarray(array[:, ::-1])[:, ::-1]):
        assert torch.equal(patchify_image(cfg, same)[0], values)
    images = [image, drawn((60, 60)), drawn((33, 400))]
    together, grids = patchify_images(cfg, images)
    each = [patchify_image(cfg, i) for i in images]
    assert torch.equal(together, torch.cat([v for v, _ in each]))
    assert grids.tolist() == [list(g) for _, g in each]
    assert grids.dtype == torch.int64
    assert grid == (1, 4, 8)  # 70 pixels are two and a half tokens, rounded to even
    none, grids = patchify_images(cfg, [])
    assert (none.shape, grids.shape, grids.dtype) == ((0, 1176), (0, 3), torch.int64)
    assert np.array_equal(array, np.array(image))  # nothing was written to what was given


def test_sizes_are_those_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as peer

    rng, refused = random.Random(0), 0
    for i in range(500):
        unit, low = rng.choice([28, 32]), rng.choice([3136, 65536, 256 * 784])
        high = low * rng.choice([1, 2, 16, 4096])
        cfg = ImageConfig(patch=unit // 2, min_pixels=low, max_pixels=high)
        height = rng.randrange(1, 4000)
        width = rng.randrange(1, 4000) if i % 2 else max(1, int(height * 10 ** rng.uniform(-2.3, 2.3)))
        if max(height, width) > 200 * min(height, width):
            refused += 1
            with pytest.raises(ValueError, match="200"):
                smart_resize(cfg, height, width)
            with pytest.raises(ValueError, match="200"):
                peer(height, width, unit, low, high)
            continue
        assert smart_resize(cfg, height, width) == peer(height, width, unit, low, high)
    assert 0 < refused < 50


@pytest.mark.parametrize(
    ("size", "cap", "tokens"),
    [
        ((1100, 850), None, 1170),
        ((2200, 1700), None, 4819),
        ((2200, 1700), 1003520, 1240),
        ((1024, 768), None, 999),
        ((512, 512), None, 324),
    ],
)
def test_pages_take_the_known_number_of_tokens(size, cap, tokens):
    cfg = ImageConfig(max_pixels=cap or ImageConfig().max_pixels)
    h, w = smart_resize(cfg, *size)
    assert (
        count_image_tokens(cfg, (1, h // 14, w // 14))
        == count_image_tokens(cfg, torch.tensor([1, h // 14, w // 14]))
        == tokens
    )


# Records --------------------------------------------------------------------------------------------------------------------------------
def test_configs_are_read_in_all_their_forms(shared_data):
    assert (
        parse_image_config(
            json.loads((shared_data / "configs" / "qwen2.5-vl_preprocessor_config.json").read_text())
        )
        == ImageConfig()
    )
    three = parse_image_config(QWEN3)
    assert three == ImageConfig(
        patch=16, mean=(0.5,) * 3, std=(0.5,) * 3, min_pixels=65536, max_pixels=16777216
    )
    assert parse_image_config({"image_processor": QWEN3, "processor_class": "Qwen3VLProcessor"}) == three
    for raw in (QWEN2, QWEN3, QWEN3 | {"min_pixels": 10, "max_pixels": 99999}, QWEN3 | {"min_pixels": None}):
        peer = peer_of(raw)
        cfg = parse_image_config(peer.to_dict())  # what transformers writes today
        assert cfg == parse_image_config(raw)
        assert (cfg.min_pixels, cfg.max_pixels) == (peer.size["shortest_edge"], peer.size["longest_edge"])


def _without(key):
    return {k: v for k, v in QWEN2.items() if k != key}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "must be a record of keys and values, got list"),
        (
            {},
            "must have patch_size, merge_size, temporal_patch_size, image_mean, image_std, min_pixels, max_pixels, got only an empty",
        ),
        (_without("patch_size"), "must have patch_size, got only image_mean"),
        (_without("max_pixels"), "must have max_pixels"),
        (
            QWEN2 | {"image_processor_type": "CLIPImageProcessor"},
            "must be one of Qwen-VL's, got 'CLIPImageProcessor'",
        ),
        (QWEN2 | {"do_resize": False}, "steps of Qwen-VL are fixed, got do_resize=False, not True"),
        (QWEN2 | {"resample": 2}, "got resample=2, not 3"),
        (QWEN2 | {"rescale_factor": 1.0}, "got rescale_factor=1.0"),
        (QWEN2 | {"patch_sise": 14}, "unknown keys patch_sise; known are image_mean"),
        (QWEN3 | {"size": 448}, "size must hold shortest_edge and longest_edge, got 448"),
        (
            QWEN3 | {"size": {"height": 448, "width": 448}},
            "size must hold shortest_edge and longest_edge, got {'height'",
        ),
        (QWEN2 | {"patch_size": "14"}, "whole numbers >= 1, got patch='14'"),
        (QWEN2 | {"merge_size": True}, "whole numbers >= 1, got merge=True"),
        (QWEN2 | {"temporal_patch_size": 0}, "whole numbers >= 1, got temporal=0"),
        (QWEN2 | {"image_mean": 0.5}, "image_mean must be a list of 3 numbers, got 0.5"),
        (QWEN2 | {"image_mean": [0.5, 0.5]}, r"mean must be 3 finite numbers, got \(0.5, 0.5\)"),
        (QWEN2 | {"image_std": [0.5, 0.5, 0]}, r"std must be 3 finite numbers > 0, got \(0.5, 0.5, 0\)"),
        (
            QWEN2 | {"max_pixels": 1000},
            "must be at least min_pixels and one visual token .28 squared., got min_pixels 3136, max_pixels 1000",
        ),
        (QWEN2 | {"min_pixels": 1, "max_pixels": 783}, "at least min_pixels and one visual token"),
    ],
)
def test_config_errors(raw, message):
    with pytest.raises(ValueError, match=message):
        parse_image_config(raw)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I;16", (60, 60)), r"more than 8 bits \(mode I;16\) need a window: open_image"),
        (Image.new("I", (60, 60)), r"more than 8 bits \(mode I\)"),
        (Image.new("F", (60, 60)), r"more than 8 bits \(mode F\)"),
        (np.zeros((60, 60, 3), np.float32), r"uint8 \[y, x, 3\] and not empty, got float32 \[60, 60, 3\]"),
        (torch.zeros(60, 60, 3), r"got float32 \[60, 60, 3\]"),
        (np.zeros((3, 60, 60), np.uint8), r"got uint8 \[3, 60, 60\]"),
        (np.zeros((60, 60), np.uint8), r"got uint8 \[60, 60\]"),
        (np.zeros((0, 60, 3), np.uint8), r"not empty, got uint8 \[0, 60, 3\]"),
        (Image.new("RGB", (0, 60)), "height and width must be positive, got 60 x 0"),
        (Image.new("RGB", (6000, 20)), "at most 200 times the shorter, got 20 x 6000; crop or tile it"),
        ("page.png", "must be a PIL image, an array or a tensor, got str; open_image reads files"),
        (
            Image.open(io.BytesIO(saved(drawn((60, 60)), "PNG")[:2000])),
            "the image: cannot be read, broken or truncated",
        ),
    ],
    ids=[
        "I;16",
        "I",
        "F",
        "float",
        "float tensor",
        "channels first",
        "grey array",
        "empty array",
        "empty",
        "thin",
        "path",
        "cut",
    ],
)
def test_image_errors(image, message):
    with pytest.raises(ValueError, match=message):
        patchify_image(ImageConfig(), image)
    with pytest.raises(ValueError, match=f"patchify_images: image 1: .*{message}"):
        patchify_images(ImageConfig(), [Image.new("RGB", (60, 60)), image])


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, -1), (201, 1), (28, 5601)])
def test_sizes_out_of_bounds(height, width):
    with pytest.raises(ValueError, match=f"smart_resize: .*got {height} x {width}"):
        smart_resize(ImageConfig(), height, width)
    assert smart_resize(ImageConfig(), 200, 1)  # the reference allows exactly 200


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 0), (0, 2, 2), (4, 4), (1, -2, 2)])
def test_grids_that_are_none(grid):
    with pytest.raises(
        ValueError,
        match=r"count_image_tokens: grid must be \(t, h, w\) >= 1 with h and w multiples of 2, got \(",
    ):
        count_image_tokens(ImageConfig(), grid)


# Positions ------------------------------------------------------------------------------------------------------------------------------
def tiny(kind):
    """A random model of transformers with its vision tower, of a few thousand weights."""
    import transformers as hf

    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text |= {
        "num_key_value_heads": 1,
        "rope_parameters": rope,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "depth": 2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_heads": 2,
        "hidden_size": 32,
    }
    vision |= {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        "qwen2_5_vl": {
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        "qwen3_vl": {
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
    }[kind]
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    if kind == "qwen3_vl":
        text |= {"head_dim": 16}
    cfg = getattr(hf, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForConditionalGeneration")(cfg).eval()
    for w in model.parameters():
        w.data.add_(
            torch.randn_like(w) * 0.2
        )  # far from its initialisation, so that positions tell in the logits
    return model


def layout(rng, *, rows=3, videos=False, per_frame=False, touching=False):
    """Random rows: (ids, mask, image grids, video grids, seconds), padded left or right."""
    texts, grids, video_grids = [], [], []
    for _ in range(rows):
        row = [rng.randrange(3, 100) for _ in range(rng.randint(1, 5))]
        for _ in range(rng.randint(0, 3)):
            t, h, w = (
                (rng.randint(1, 3) if videos and rng.random() < 0.5 else 0),
                2 * rng.randint(1, 4),
                2 * rng.randint(1, 4),
            )
            if t:
                video_grids.append([t, h, w])
                for i in range(t if per_frame else 1):
                    row += [7] * (i > 0) + [VIDEO] * ((1 if per_frame else t) * h * w // 4)
            else:
                grids.append(
                    [rng.choice([1, 1, 1, 2]), h, w]
                )  # no image has two, but it says what would happen
                row += [IMAGE] * (grids[-1][0] * h * w // 4)
            row += [rng.randrange(3, 100) for _ in range(rng.randint(0 if touching else 1, 4))]
        texts.append(row)
    longest = max(map(len, texts)) + rng.randint(0, 2)
    left = rng.random() < 0.5
    ids, mask = torch.zeros(rows, longest, dtype=torch.int64), torch.zeros(rows, longest, dtype=torch.bool)
    for i, row in enumerate(texts):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), True
    return ids, mask, *(torch.tensor(g, dtype=torch.int64).view(-1, 3) for g in (grids, video_grids))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_transformers(kind):
    peer = tiny(kind).model
    rng = random.Random(kind)
    visual = 0
    for i in range(80):
        ids, mask, grid, videos = layout(rng, videos=i % 2 == 1, per_frame=kind == "qwen3_vl")
        seconds = torch.tensor(
            [rng.choice([1.0, 2.0] if before_523() else [0.5, 1.0, 0.73, 2.4]) for _ in videos]
        )
        how, theirs = {}, {}
        if kind == "qwen2_5_vl" and i % 4 == 1:
            theirs = {"second_per_grid_ts": seconds if i % 8 == 1 else seconds.tolist()}
            how = {"seconds": theirs["second_per_grid_ts"], "tokens_per_second": 2}
        elif kind == "qwen2_5_vl":
            how = {"tokens_per_second": 2}
        frames = (
            videos.repeat_interleave(videos[:, 0], 0).index_fill(1, torch.tensor([0]), 1)
            if kind == "qwen3_vl"
            else videos
        )
        want, want_delta = peer.get_rope_index(
            ids,
            mm_token_type_ids=token_types(ids, IMAGE, VIDEO),
            image_grid_thw=grid,
            video_grid_thw=videos.clone(),
            attention_mask=mask.long(),
            **theirs,
        )
        got, delta = mrope(ids, mask, grid, image_token=IMAGE, video_token=VIDEO, video_grid=frames, **how)
        assert got.dtype == delta.dtype == torch.int64
        assert torch.equal(got, want)
        assert torch.equal(delta, want_delta)
        visual += len(grid) + len(videos)
    assert visual > 160


def naive(types, grids, intervals):
    """Token by token; `grids` in visual tokens."""
    places, now, i = [], 0, 0
    while i < len(types):
        if types[i] == 0:
            places.append((now, now, now))
            now, i = now + 1, i + 1
            continue
        t, h, w = grids.pop(0)
        interval = intervals.pop(0)
        places += [
            (now + int(a * interval), now + b, now + c) for a in range(t) for b in range(h) for c in range(w)
        ]
        now, i = now + max(h, w), i + t * h * w
    return places


def test_images_may_touch():
    """Where transformers takes two touching images for one."""
    rng = random.Random(5)
    touching = 0
    for _ in range(60):
        ids, mask, grid, _ = layout(rng, touching=True)
        got, delta = mrope(ids, mask, grid, image_token=IMAGE)
        grids, intervals = [(t, h // 2, w // 2) for t, h, w in grid.tolist()], [1] * len(grid)
        for i in range(len(ids)):
            types = token_types(ids, IMAGE)[i, mask[i]]
            want = torch.tensor(naive(types.tolist(), grids, intervals)).T
            assert torch.equal(got[:, i, mask[i]], want)
            assert (got[:, i, ~mask[i]] == 0).all()
            assert delta[i, 0] == want.max() + 1 - want.shape[1]
        touching += len(grid) - int(
            ((token_types(ids, IMAGE).diff(dim=1, prepend=torch.zeros(3, 1))) == 1).sum()
        )
    assert touching > 20
    ids = torch.tensor([[5, *[IMAGE] * 10, 6]])
    got, _ = mrope(ids, torch.ones_like(ids).bool(), torch.tensor([[1, 4, 6], [1, 8, 2]]), image_token=IMAGE)
    assert got[1, 0].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7, 8]
    assert got[2, 0].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 4, 4, 4, 8]


def test_text_alone_counts_on():
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 3, 4], [3, 0, 0, 0], [0, 0, 0, 0]])
    mask = ids > 0
    for grid in (None, torch.zeros(0, 3, dtype=torch.int64)):
        positions, delta = mrope(ids, mask, grid, image_token=IMAGE)
        assert positions.tolist() == [[[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]] * 3
        assert delta.tolist() == [[0]] * 4
    assert token_types(torch.tensor([[3, IMAGE, VIDEO]]), IMAGE).tolist() == [[0, 1, 0]]
    assert token_types(torch.tensor([[3, IMAGE, VIDEO]]), IMAGE, VIDEO).tolist() == [[0, 1, 2]]


def test_the_next_position_is_that_of_the_longer_text():
    rng = random.Random(1)
    for _ in range(20):
        ids, mask, grid, _ = layout(rng)
        _, delta = mrope(ids, mask, grid, image_token=IMAGE)
        for n in range(3):
            longer, more = (
                torch.cat([ids, torch.full((3, n + 1), 9)], 1),
                torch.cat([mask, torch.ones(3, n + 1).bool()], 1),
            )
            want = mrope(longer, more, grid, image_token=IMAGE)[0][:, :, -1:]
            assert torch.equal(mrope_next(delta, mask.sum(1) + n), want)
    assert mrope_next(torch.tensor([[-3], [0]]), 10).tolist() == [[[7], [10]]] * 3


def batch_of(cfg, left=True):
    """Two rows, of one and of two images, the shorter padded."""
    images = [drawn((56, 84), seed=1), drawn((112, 56), seed=2), drawn((60, 60), seed=3)]
    pixels, grid = patchify_images(cfg, images)
    n = [count_image_tokens(cfg, g) for g in grid]
    rows = [[5, 9, *[IMAGE] * n[0], 6, 7], [8, *[IMAGE] * n[1], 9, *[IMAGE] * n[2], 4, 3, 5]]
    longest = max(map(len, rows))
    rows = [[0] * (longest - len(r)) + r if left else r + [0] * (longest - len(r)) for r in rows]
    ids = torch.tensor(rows)
    return ids, ids > 0, pixels, grid


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_logits_are_those_with_token_types(kind, left):
    model = tiny(kind)
    ids, mask, pixels, grid = batch_of(ImageConfig(), left)
    call = {"input_ids": ids, "attention_mask": mask.long(), "pixel_values": pixels, "image_grid_thw": grid}
    types = token_types(ids, IMAGE)
    positions, _ = mrope(ids, mask, grid, image_token=IMAGE)
    with torch.no_grad():
        want = model(**call, mm_token_type_ids=types).logits
        got = model(**call, position_ids=positions).logits
        one_axis = model(**call, position_ids=(mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)).logits
    assert torch.equal(got, want)
    assert (one_axis - want)[mask].abs().max() > 1e-3  # positions do tell


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_decoding_step_by_step_is_what_generate_does(kind):
    model = tiny(kind)
    ids, mask, pixels, grid = batch_of(ImageConfig())
    call = {"input_ids": ids, "attention_mask": mask.long(), "pixel_values": pixels, "image_grid_thw": grid}
    how = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want = model.generate(**call, mm_token_type_ids=token_types(ids, IMAGE), **how)
    model = tiny(kind)  # without what generate has left in it
    name = (
        "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    )  # by the version of transformers
    positions, delta = mrope(ids, mask, grid, image_token=IMAGE)
    cached = mask.sum(1)
    with torch.no_grad():
        out = model(**call, position_ids=positions, use_cache=True)
        for step in range(6):
            torch.testing.assert_close(out.logits[:, -1], want.logits[step], rtol=0, atol=1e-5)
            token = want.sequences[:, ids.shape[1] + step, None]
            mask = torch.cat([mask, torch.ones(2, 1).bool()], 1)
            out = model(
                input_ids=token,
                attention_mask=mask.long(),
                position_ids=mrope_next(delta, cached + step),
                **{name: getattr(out, name)},
                use_cache=True,
            )


GRID = torch.tensor([[1, 4, 6], [1, 4, 4]])
ROWS = torch.tensor([[5, *[IMAGE] * 6, 5, 5], [5, 5, 5, *[IMAGE] * 4, 5, 5]])
ON = torch.ones_like(ROWS).bool()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((ROWS.float(), ON, GRID), r"ids must be whole numbers \[b, t\], got torch.float32 \[2, 9\]"),
        ((ROWS[0], ON[0], GRID), r"ids must be whole numbers \[b, t\], got torch.int64 \[9\]"),
        (
            (ROWS, ON.long(), GRID),
            r"mask must be bool \[2, 9\] like ids, got torch.int64 \[2, 9\]; use mask.bool",
        ),
        ((ROWS, ON[:, :8], GRID), r"mask must be bool \[2, 9\] like ids, got torch.bool \[2, 8\]"),
        ((ROWS, ON, GRID.float()), r"grid must be whole numbers \[n, 3\], got torch.float32 \[2, 3\]"),
        ((ROWS, ON, GRID[0]), r"grid must be whole numbers \[n, 3\], got torch.int64 \[3\]"),
        (
            (ROWS, ON, GRID + 1),
            r"grid row 0 must be \(t, h, w\) >= 1 with h and w multiples of 2, got \(2, 5, 7\)",
        ),
        (
            (ROWS, ON, None),
            "row 0 has 6 image tokens from its token 1 on for which there is no image grid left",
        ),
        (
            (ROWS, ON, GRID[:1]),
            "row 1 has 4 image tokens from its token 3 on for which there is no image grid left",
        ),
        (
            (ROWS[:, :6], ON[:, :6], GRID),
            "row 0: the image at its token 1 must have 1 x 2 x 3 = 6 tokens by its grid, found 5; never truncate",
        ),
        (
            (ROWS, ON, GRID.flip(0)),
            "row 0: the image at its token 5 must have 1 x 2 x 3 = 6 tokens by its grid, found 2",
        ),
        (
            (ROWS, ON, GRID[[0, 1, 1]]),
            r"after the last row, 1, 1 of 3 images .* found no tokens; tokens per row: \[6, 4\]. Were ids truncated",
        ),
    ],
)
def test_mrope_errors(call, message):
    with pytest.raises(ValueError, match=message):
        mrope(*call, image_token=IMAGE)


def test_video_and_step_errors():
    ids = torch.tensor([[5, VIDEO, VIDEO, 5]])
    how = {"image_token": IMAGE, "video_token": VIDEO, "video_grid": torch.tensor([[2, 2, 2]])}
    assert mrope(ids, ids > 0, None, **how)[0][0, 0].tolist() == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="one number for each of the 1 videos, got 2"):
        mrope(ids, ids > 0, None, **how, seconds=[1.0, 2.0])
    with pytest.raises(ValueError, match="row 0: the video at its token 1 must have 3 x 1 x 1 = 3 tokens"):
        mrope(ids, ids > 0, None, **how | {"video_grid": torch.tensor([[3, 2, 2]])})
