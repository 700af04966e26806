"""Images for CLIP's tower and its levels: transformers is the peer."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, nn

from medvl.base.tree import map_leaves
from medvl.components.project import ProjectConfig, init_project
from medvl.hub.skeletons import init_skeleton
from medvl.language import clip_vision, vision, vlm
from medvl.language.clip_vision import ClipImageConfig
from medvl.language.templates import PLACEHOLDERS
from medvl.weights import lora
from tests import tiny
from tests.tiny import drawn

TINY = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize("size", [(336, 336), (500, 120), (3, 5), (1, 700), (37, 90)])
def test_pixels_are_bit_equal_to_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    cfg = ClipImageConfig()
    peer = CLIPImageProcessorPil(**clip_vision.dump_clip_config(cfg))
    image = drawn(size, seed=sum(size))
    # LLaVA's expand2square
    side = max(size)
    padded = np.full((side, side, 3), (122, 116, 104), np.uint8)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    padded[top : top + size[1], left : left + size[0]] = np.array(image)
    want = peer(Image.fromarray(padded), return_tensors="pt")["pixel_values"]
    assert torch.equal(clip_vision.clip_pixels(cfg, [image]), want)


@pytest.mark.parametrize("level", [-4, -2, -1, 1, 2, 4])
def test_levels_are_the_hidden_states_of_the_whole_tower(level):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    whole, params = init_skeleton(TINY, Generator().manual_seed(0))
    peer = CLIPVisionModel(CLIPVisionConfig(**TINY)).eval()
    peer.load_state_dict(params)
    pixels = torch.randn(3, 3, 28, 28)
    skeleton = clip_vision.tower_skeleton(whole.config, level)
    weights = clip_vision.level_params(params, skeleton)
    with torch.no_grad():
        want = peer(pixels, output_hidden_states=True).hidden_states[level]
        got = skeleton(weights, pixel_values=pixels).last_hidden_state
    assert torch.equal(got, want)
    assert all(weights[name] is params[name] for name in weights)


def test_a_level_that_the_tower_does_not_have():
    for level in (0, 5, -5):
        with pytest.raises(ValueError, match=f"4 layers has the levels 1 to 4 and -4 to -1, got {level}"):
            clip_vision.tower_skeleton(TINY, level)
    assert (
        clip_vision.tower_skeleton({"model_type": "clip", "vision_config": TINY}, 1).config[
            "num_hidden_layers"
        ]
        == 1
    )
    with pytest.raises(ValueError, match="must be clip or clip_vision_model, got 'dinov2'"):
        clip_vision.tower_skeleton({"model_type": "dinov2"}, 1)
    skeleton = clip_vision.tower_skeleton(TINY, 1)
    with pytest.raises(ValueError, match="params must be exactly its"):
        skeleton(clip_vision.level_params({"pre_layrnorm.weight": torch.ones(16)}, skeleton), torch.ones(1))


def test_settings_of_a_tower():
    cfg = ClipImageConfig(size=28, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    raw = clip_vision.dump_clip_config(cfg)
    assert clip_vision.parse_clip_config(raw) == cfg
    assert clip_vision.parse_clip_config({**raw, "size": 28, "crop_size": 28}) == cfg  # as old files
    with pytest.raises(ValueError, match="size and crop_size must be one side, got 224 and"):
        clip_vision.parse_clip_config({**raw, "size": 224})
    with pytest.raises(ValueError, match="must have crop_size"):
        clip_vision.parse_clip_config({"size": 28, "image_mean": [0] * 3, "image_std": [1] * 3})
    with pytest.raises(ValueError, match="size must be a whole number >= 1, got 0"):
        ClipImageConfig(size=0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "1", "CMYK"])
def test_images_of_any_mode(mode):
    cfg = ClipImageConfig(size=28)
    image = drawn((30, 20), mode)
    want = image if mode in ("RGBA", "LA") else image.convert("RGBA")
    want = Image.alpha_composite(Image.new("RGBA", image.size, "white"), want.convert("RGBA")).convert("RGB")
    assert torch.equal(clip_vision.clip_pixels(cfg, [image]), clip_vision.clip_pixels(cfg, [want]))
    assert clip_vision.clip_pixels(cfg, []).shape == (0, 3, 28, 28)


def test_images_that_cannot_be_shown():
    cfg = ClipImageConfig(size=28)
    with pytest.raises(
        ValueError, match=r"clip_pixels: image 1: square: greys of more than 8 bits .* need a window"
    ):
        clip_vision.clip_pixels(cfg, [drawn((9, 9)), Image.new("I;16", (9, 9))])
    with pytest.raises(ValueError, match="longer side must have at most 9459 pixels, got 1 x 9460; make"):
        clip_vision.clip_pixels(cfg, [Image.new("RGB", (1, 9460))])


# The whole of it ----------------------------------------------------------------------------------------------
SIZES = ProjectConfig(inputs=16, hidden=32, outputs=32)
TOKEN = 150


def naive_logits(config, params, tower, projector, factors, scale, level, rows, images):
    """Logits of each row by modules of transformers and a loop over experts, without medvl.

    rows: ids, None where an image stands.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

    clip = CLIPVisionModel(CLIPVisionConfig(**TINY)).eval().double()
    clip.load_state_dict(tower)
    phi = (
        Phi3ForCausalLM(Phi3Config(**{k: v for k, v in config.items() if k != "model_type"})).eval().double()
    )
    phi.load_state_dict(params)
    up, down = nn.Linear(16, 32).double(), nn.Linear(32, 32).double()
    up.load_state_dict(projector["up"])
    down.load_state_dict(projector["down"])

    def routed(a, b, router, experts):
        def add(module, inputs, output):
            gates = (inputs[0] @ router.T).softmax(-1)
            rank = len(a) // experts
            for i in range(experts):
                part = slice(i * rank, (i + 1) * rank)
                output = output + gates[..., i : i + 1] * scale * (inputs[0] @ a[part].T @ b[:, part].T)
            return output

        return add

    for name, f in factors.items():
        phi.get_submodule(name).register_forward_hook(routed(f["a"], f["b"], f["router"], len(f["router"])))
    logits = []
    for row in rows:
        parts = []
        for token in row:
            if token is None:
                hidden = clip(images.pop(0)[None].double(), output_hidden_states=True).hidden_states[level][
                    :, 1:
                ]
                parts.append(down(nn.functional.gelu(up(hidden)))[0])
            else:
                parts.append(phi.model.embed_tokens(torch.tensor([token])))
        logits.append(phi(inputs_embeds=torch.cat(parts)[None]).logits[0])
    return logits


@pytest.mark.parametrize("level", [-2, 1])
def test_logits_are_those_of_a_naive_composition(level):
    """An image at the start, in the middle, two of them and none, in one padded batch, with H-LoRA."""
    config = {**tiny.CONFIGS["phi3"], "sliding_window": None}
    gen = Generator().manual_seed(3)
    skeleton, params = init_skeleton(config, gen, head="language")
    # In float64, so that nothing is left but what is computed in another way.
    params = {n: (t + torch.randn(t.shape, generator=gen) * 0.1).double() for n, t in params.items()}
    whole, tower = init_skeleton(TINY, gen)
    tower = {n: (t + torch.randn(t.shape, generator=gen) * 0.1).double() for n, t in tower.items()}
    projector = map_leaves(torch.Tensor.double, init_project(SIZES, gen))
    factors = {}
    targets = lora.target_layers(lora.LoraConfig(pattern="all-linear"), skeleton)
    for name in targets:
        out, inside = skeleton.module.get_submodule(name).weight.shape
        shapes = {"a": (8, inside), "b": (out, 8), "router": (4, inside)}
        factors[name] = {k: (torch.randn(shape, generator=gen) * 0.2).double() for k, shape in shapes.items()}
    adapter = lora.Adapter(factors=factors, scale=dict.fromkeys(targets, 8.0), kinds=targets)

    cfg = ClipImageConfig(size=28)
    seen = vision.clip_vision(
        cfg, clip_vision.tower_skeleton(whole.config, level), SIZES, "draw/projector", PLACEHOLDERS["phi3"]
    )
    images = [drawn((20, 31)), drawn((40, 9)), drawn((28, 28)), drawn((5, 3))]
    rows = [[None, 5, 6, 7], [8, 9, None, 10], [11, None, 12, None, 13], [14, 15]]
    counts = [seen.count_tokens(image) for image in images]
    assert counts == [4] * 4
    ids = [[x for token in row for x in ([TOKEN] * 4 if token is None else [token])] for row in rows]
    longest = max(map(len, ids))
    batch = {
        "ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
        "mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        "images": torch.tensor([1, 1, 2, 0]),
    } | seen.load_items(images)
    tree = {"tower": tower, "draw": {"projector": projector}}
    with torch.no_grad():
        want = naive_logits(
            config, params, tower, projector, factors, 8.0, level, rows, [*batch["pixel_values"]]
        )
    # As one batch, and as two micro-batches.
    for part in ((slice(0, 4),), (slice(0, 2), slice(2, 4)), (slice(2, 3), slice(3, 4))):
        for cut in part:
            ids_of, mask = batch["ids"][cut], batch["mask"][cut]
            visual = seen.embed(tree, seen.select_rows(batch, cut))
            with torch.no_grad():
                embedded = vlm.splice(ids_of, visual, params["model.embed_tokens.weight"], TOKEN)
                inputs = vlm.model_inputs(skeleton, {"inputs_embeds": embedded, "mask": mask})
                logits = skeleton(lora.apply_lora(params, adapter), **inputs).logits
            for row, keep, expected in zip(logits, mask.bool(), want[cut], strict=True):
                torch.testing.assert_close(row[keep], expected, atol=1e-6, rtol=1e-6)


def test_an_image_is_refused_by_its_name(tmp_path):
    seen = vision.clip_vision(
        ClipImageConfig(size=28),
        clip_vision.tower_skeleton(TINY, 1),
        SIZES,
        "projector",
        PLACEHOLDERS["phi3"],
    )
    files = {"strip.png": Image.new("L", (9460, 1)), "deep.png": Image.new("I;16", (9, 9))}
    for name, image in files.items():
        image.save(tmp_path / name)
    Image.new("L", (5, 3)).save(tmp_path / "small.png")
    assert seen.count_tokens(tmp_path / "small.png") == 4
    with pytest.raises(ValueError, match=r"strip.png: square: the longer side must have at most 9459 pixels"):
        seen.count_tokens(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"deep.png: greys of more than 8 bits .* need window="):
        seen.count_tokens(tmp_path / "deep.png")


def test_a_gradient_reaches_the_tower_where_it_is_trained():
    gen = Generator().manual_seed(0)
    _, tower = init_skeleton(TINY, gen)
    projector = init_project(SIZES, gen)
    projector["up"]["weight"].requires_grad_(True)
    seen = vision.clip_vision(
        ClipImageConfig(size=28),
        clip_vision.tower_skeleton(TINY, -2),
        SIZES,
        "projector",
        PLACEHOLDERS["phi3"],
    )
    for images in ([drawn((9, 9))], []):
        visual = seen.embed({"tower": tower, "projector": projector}, seen.load_items(images))
        assert visual.shape == (4 * len(images), 32)
        visual.sum().backward()
        assert projector["up"]["weight"].grad is not None
        projector["up"]["weight"].grad = None
    assert all(weight.grad is None for weight in tower.values())
    for weight in tower.values():
        weight.requires_grad_(True)
    seen.embed({"tower": tower, "projector": projector}, seen.load_items([drawn((9, 9))])).sum().backward()
    assert tower["embeddings.patch_embedding.weight"].grad is not None
    with pytest.raises(ValueError, match="takes 28 px and makes 16 features, got images of 336 px and"):
        vision.clip_vision(
            ClipImageConfig(), clip_vision.tower_skeleton(TINY, 1), SIZES, "projector", PLACEHOLDERS["phi3"]
        )
