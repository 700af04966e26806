"""Images for CLIP's tower and its levels: transformers is the peer."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from medvl.hub.skeletons import init_skeleton
from medvl.language import clip_vision
from medvl.language.clip_vision import ClipImageConfig
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
