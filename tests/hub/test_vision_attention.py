"""Vision attention with equal windows in one call: the numbers of transformers' own, window by window."""

import itertools
import logging
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from medvl.hub import skeletons, vision_attention
from medvl.weights import four_bit, lazy
from tests import tiny

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Windows are of 4 x 4 patches: ragged ones at both edges, at one edge, and an image twice.
GRID = torch.tensor([[1, 10, 14], [1, 8, 12], [1, 8, 12], [1, 6, 4]])


def pixels(grid=GRID):
    return torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))


def features(module, grid=GRID, **inputs):
    """Visual tokens [n, d]."""
    return torch.cat(module.get_image_features(pixels(grid), grid, **inputs).pooler_output)


def features_and_gradients(skeleton, params, names, grid=GRID):
    leaves = {name: params[name].detach().clone().requires_grad_() for name in names}
    inputs = vision_attention.grid_inputs(skeleton.module, grid)
    tokens = skeleton.run(params | leaves, lambda module: features(module, grid, **inputs))
    loss = tokens.sin().sum()
    return tokens.detach(), torch.autograd.grad(loss, list(leaves.values()))


def count_attention(call):
    with mock.patch.object(
        F, "scaled_dot_product_attention", side_effect=F.scaled_dot_product_attention
    ) as attention:
        call()
    return attention.call_count


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_are_those_of_transformers(kind, checkpointed):
    skeleton, params = tiny.model(kind)
    peer = tiny.peer(skeleton, params)
    expected = features(peer)
    names = [name for name in params if ".visual.blocks." in name or "patch_embed" in name]
    parameters = dict(peer.named_parameters())
    wanted = torch.autograd.grad(expected.sin().sum(), [parameters[name] for name in names])
    if checkpointed:
        skeleton = skeletons.checkpointed(skeleton)
    tokens, grads = features_and_gradients(skeleton, params, names)
    torch.testing.assert_close(tokens, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, grad, want in zip(names, grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4, msg=name)


def test_grids_alone_give_the_same_features():
    """Without what is computed before: as transformers' own code calls the encoder."""
    for kind in KINDS:
        skeleton, params = tiny.model(kind)
        inputs = vision_attention.grid_inputs(skeleton.module, GRID)
        with torch.no_grad():
            alone = skeleton.run(params, features)
            computed = skeleton.run(params, lambda module, inputs=inputs: features(module, **inputs))
        torch.testing.assert_close(alone, computed, rtol=1e-5, atol=1e-5)


def test_frames_of_a_video_stay_apart():
    grid = torch.tensor([[3, 6, 10], [1, 8, 8]])
    skeleton, params = tiny.model("qwen2_5_vl")
    with torch.no_grad():
        expected = features(tiny.peer(skeleton, params), grid)
    tokens, _ = features_and_gradients(skeleton, params, ["model.visual.merger.ln_q.weight"], grid)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_lora_and_four_bits_in_the_encoder(gen):
    skeleton, params = tiny.model("qwen2_5_vl")
    quantize = four_bit.quantizer(four_bit.QuantConfig(kind="nf4", skip=()))
    weights, merged = dict(params), dict(params)
    for name, weight in params.items():
        if ".visual.blocks." not in name or weight.dim() != 2:
            continue
        a = torch.randn(2, weight.shape[1], generator=gen) * 0.2
        b = torch.randn(weight.shape[0], 2, generator=gen) * 0.2
        weights[name] = lazy.low_rank(quantize(name, weight), a, b)
        merged[name] = lazy.dense(weights[name])
    inputs = vision_attention.grid_inputs(skeleton.module, GRID)
    with torch.no_grad():
        got = skeleton.run(weights, lambda module: features(module, **inputs))
        expected = features(tiny.peer(skeleton, merged))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_equal_windows_are_one_call():
    skeleton, params = tiny.model("qwen2_5_vl")  # a layer of windows, and one of whole images
    # 16 x 12 patches are 12 equal windows; two edges make windows of two more sizes, and a corner a third.
    for grid, calls in (([[1, 16, 12]], 2), ([[1, 18, 14]], 3 + 1), ([[1, 16, 12]] * 3, 2)):
        grid = torch.tensor(grid)
        inputs = vision_attention.grid_inputs(skeleton.module, grid)

        def run(module, grid=grid, inputs=inputs):
            with torch.no_grad():
                return count_attention(lambda: features(module, grid, **inputs))

        assert skeleton.run(params, run) == calls


def test_windows_are_sorted_within_frames():
    skeleton = skeletons.empty_skeleton(tiny.CONFIGS["qwen2_5_vl"], head="language")
    grid = torch.tensor([[2, 10, 14], [1, 6, 6]])
    inputs = vision_attention.grid_inputs(skeleton.module, grid)
    assert sorted(inputs["image_window_index"].tolist()) == list(range(2 * 5 * 7 + 9))
    frames, windows = inputs["image_cu_seqlens"].tolist(), inputs["image_cu_window_seqlens"].tolist()
    assert {*frames} <= {*windows}
    assert frames == [0, 140, 280, 316]
    for first, stop in itertools.pairwise(frames):
        # Tokens of a frame are of that frame, and its windows do not grow.
        tokens = inputs["image_window_index"][first // 4 : stop // 4]
        assert first <= int(tokens.min()) * 4
        assert int(tokens.max()) * 4 < stop
        inside = torch.tensor([w for w in windows if first <= w <= stop]).diff()
        assert (inside.diff() <= 0).all()


def test_changed_code_of_transformers_is_told_and_still_right(monkeypatch, caplog):
    skeleton, params = tiny.model("qwen2_5_vl")
    with torch.no_grad():
        expected = features(tiny.peer(skeleton, params))
    from transformers import vision_utils

    monkeypatch.delattr(vision_utils, "get_vision_window_index")
    with caplog.at_level(logging.WARNING):
        assert vision_attention.grid_inputs(skeleton.module, GRID) == {}
    assert "waits for the device" in caplog.text
    monkeypatch.setattr(
        vision_attention, "StackedAttention", mock.Mock(side_effect=AttributeError("scaling"))
    )
    with caplog.at_level(logging.WARNING):
        skeleton = skeletons.empty_skeleton(tiny.CONFIGS["qwen2_5_vl"], head="language")
    assert "qwen2_5_vl has changed in transformers (scaling)" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(skeleton.run(params, features), expected)
