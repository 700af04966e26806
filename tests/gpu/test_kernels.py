"""How many kernels the host queues: counted on the device "meta", at real sizes and with few widths."""

import pytest
import torch

from medvl.hub import skeletons
from medvl.language import vlm
from medvl.training import estimate, trace
from tests.gpu import cases


def image_gradient(height, width):
    """Loss and gradient of the vision encoder of Qwen2.5-VL, checkpointed, and of one layer behind it: a call for an
    image of so many patches."""
    # Depth and windows as published; the width changes no number of kernels.
    encoder = cases.QWEN_VL["vision_config"] | {
        "depth": 32,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    text = cases.QWEN_VL["text_config"] | {"num_hidden_layers": 1}
    tokens = {"image_token_id": cases.IMAGE_TOKEN, "video_token_id": 501}
    config = {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": encoder, **tokens}
    skeleton = skeletons.empty_skeleton(config, head="language")
    params = {
        name: torch.empty(p.shape, device="meta", requires_grad="visual" in name)
        for name, p in skeleton.module.named_parameters()
    }
    visual = height * width // 4
    ids = torch.full((1, visual + 20), 7)
    ids[:, :visual] = cases.IMAGE_TOKEN
    labels = torch.where(ids == 7, ids, -100)
    batch = {
        "ids": ids,
        "labels": labels,
        "pixel_values": torch.empty(height * width, 1176, device="meta"),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }

    def gradient():
        loss, _ = vlm.answer_loss(skeletons.checkpointed(skeleton), params, batch)
        leaves = [p for p in params.values() if p.requires_grad]
        torch.autograd.grad(loss, leaves)

    return gradient


# (patches, calls of attention in a pass: 28 layers of windows of one size or of four, 4 of the whole image)
@pytest.mark.parametrize(("patches", "attention"), [((80, 64), 28 + 4), ((74, 70), 28 * 4 + 4)])
def test_an_image_of_a_megapixel(patches, attention):
    counter = trace.WorkCounter()
    estimate.peak_of(image_gradient(*patches), {}, counter)
    operations = counter.work().operations
    assert counter.work().kernels <= 6000, operations
    # Each layer is computed twice, the language model's too.
    assert operations["attention"] == 2 * (attention + 1)
