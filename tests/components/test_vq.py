"""The VQ model against a naive computation of its formulas, and against numbers of the published code."""

import math

import pytest
import torch
from torch import Generator

from medvl.components import vq
from medvl.components.vq import VqConfig

TINY = {
    "n_embed": 6,
    "embed_dim": 4,
    "z_channels": 4,
    "resolution": 16,
    "ch": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (8,),
}
GUMBEL = VqConfig(**TINY)
NEAREST = VqConfig(kind="vq", **TINY)


def waves(cfg):
    """Parameters that need no generator, so that the numbers below hold for every version of torch."""
    params = {}
    for i, (name, shape) in enumerate(sorted(vq.vq_shapes(cfg).items())):
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + i) * 0.3
        if len(shape) == 1 and name.endswith("weight"):
            wave += 1
        params[name] = wave.float().reshape(shape)
    return params


PIXELS = torch.sin(torch.arange(2 * 3 * 8 * 12, dtype=torch.float64) * 0.37).float().reshape(2, 3, 8, 12)
CODES = (torch.arange(12) % 6).reshape(1, 3, 4)


# A naive computation: sums over windows, every block by its name --------------------------------------------
def conv(p, name, x, stride=1, pad=(1, 1, 1, 1)):
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    side = weight.shape[-1]
    if side == 3:
        x = torch.nn.functional.pad(x, pad)
    rows = (x.shape[2] - side) // stride + 1
    columns = (x.shape[3] - side) // stride + 1
    out = bias[None, :, None, None].expand(len(x), -1, rows, columns)
    for dy in range(side):
        for dx in range(side):
            part = x[:, :, dy : dy + stride * rows : stride, dx : dx + stride * columns : stride]
            out = out + torch.einsum("bcyx,oc->boyx", part[:, :, :rows, :columns], weight[:, :, dy, dx])
    return out


def norm(p, name, x):
    groups = x.unflatten(1, (32, -1))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = ((groups - mean) ** 2).mean((2, 3, 4), keepdim=True)
    normed = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    return normed * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def swish(x):
    return x / (1 + (-x).exp())


def residual(p, name, x):
    hidden = conv(p, f"{name}.conv1", swish(norm(p, f"{name}.norm1", x)))
    hidden = conv(p, f"{name}.conv2", swish(norm(p, f"{name}.norm2", hidden)))
    return hidden + (conv(p, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in p else x)


def attention(p, name, x):
    normed = norm(p, f"{name}.norm", x)
    q, k, v = (conv(p, f"{name}.{part}", normed).flatten(2) for part in "qkv")
    weights = (torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5).softmax(2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    return x + conv(p, f"{name}.proj_out", mixed)


def naive_encode(p, x):
    x = conv(p, "encoder.conv_in", x)
    x = residual(p, "encoder.down.0.block.0", x)
    x = conv(p, "encoder.down.0.downsample.conv", x, stride=2, pad=(0, 1, 0, 1))
    x = attention(p, "encoder.down.1.attn.0", residual(p, "encoder.down.1.block.0", x))
    x = attention(p, "encoder.mid.attn_1", residual(p, "encoder.mid.block_1", x))
    x = swish(norm(p, "encoder.norm_out", residual(p, "encoder.mid.block_2", x)))
    return conv(p, "quant_conv", conv(p, "encoder.conv_out", x))


def naive_decode(p, z):
    x = conv(p, "decoder.conv_in", conv(p, "post_quant_conv", z))
    x = attention(p, "decoder.mid.attn_1", residual(p, "decoder.mid.block_1", x))
    x = residual(p, "decoder.mid.block_2", x)
    for i in (0, 1):
        x = attention(p, f"decoder.up.1.attn.{i}", residual(p, f"decoder.up.1.block.{i}", x))
    x = conv(p, "decoder.up.1.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for i in (0, 1):
        x = residual(p, f"decoder.up.0.block.{i}", x)
    return conv(p, "decoder.conv_out", swish(norm(p, "decoder.norm_out", x)))


def test_it_is_the_naive_computation():
    for cfg, table in ((GUMBEL, "quantize.embed.weight"), (NEAREST, "quantize.embedding.weight")):
        params = {
            name: tensor.double() for name, tensor in vq.init_vq(cfg, Generator().manual_seed(1)).items()
        }
        pixels = PIXELS.double()
        z = naive_encode(params, pixels)
        if cfg.kind == "gumbel":
            scores = conv(params, "quantize.proj", z)
        else:
            scores = -((z[:, None] - params[table][:, :, None, None]) ** 2).sum(2)
        torch.testing.assert_close(vq.encode_logits(cfg, params, pixels), scores, atol=1e-10, rtol=0)
        one_hot = torch.nn.functional.one_hot(CODES, 6).double()
        z = torch.einsum("bhwn,nd->bdhw", one_hot, params[table])
        torch.testing.assert_close(
            vq.decode_codes(cfg, params, CODES), naive_decode(params, z), atol=1e-10, rtol=0
        )


# Numbers of taming-transformers at 3ba01b2, on the same parameters -------------------------------------------
def test_it_is_the_published_code():
    logits = [-0.38136, -0.23739, 0.19053, -0.01157, -0.28308, 0.11828]
    scores = [-0.33556, -0.43646, -0.57744, -0.71419, -0.79517, -0.79048]
    nearest = [[0, 5, 5, 5, 5, 0], [0, 0, 0, 5, 5, 0], [0, 5, 0, 0, 5, 5], [0, 5, 5, 0, 0, 5]]
    for cfg, expected in ((GUMBEL, logits), (NEAREST, scores)):
        params = waves(cfg)
        actual = vq.encode_logits(cfg, params, PIXELS)
        assert actual.shape == (2, 6, 4, 6)
        torch.testing.assert_close(actual[0, :, 1, 2], torch.tensor(expected), atol=1e-4, rtol=0)
        decoded = vq.decode_codes(cfg, params, CODES)
        assert decoded.shape == (1, 3, 6, 8)
        torch.testing.assert_close(
            decoded[0, :, 2, 3], torch.tensor([2.72237, 2.22063, 1.52122]), atol=1e-4, rtol=0
        )
    assert vq.encode_codes(NEAREST, waves(NEAREST), PIXELS)[1].tolist() == nearest
    loss, parts = vq.vq_loss(NEAREST, waves(NEAREST), PIXELS)
    assert float(parts["l1"]) == pytest.approx(1.03432, abs=1e-4)
    assert float(parts["quantize"]) == pytest.approx(0.638239, abs=1e-4)
    assert float(parts["codes"]) == 2
    torch.testing.assert_close(loss, parts["l1"] + parts["quantize"])


def test_the_defaults_are_healthgpts_model():
    shapes = vq.vq_shapes(VqConfig())
    assert len(shapes) == 301
    assert sum(math.prod(shape) for shape in shapes.values()) == 68_995_971
    parts = {"encoder": (126, 26_345_728), "decoder": (168, 38_316_163), "quantize": (3, 4_202_496)}
    for part, (tensors, numbers) in parts.items():
        of_part = [shape for name, shape in shapes.items() if name.startswith(f"{part}.")]
        assert (len(of_part), sum(map(math.prod, of_part))) == (tensors, numbers)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert "decoder.up.3.attn.2.proj_out.bias" in shapes
    assert (VqConfig().codes, VqConfig().stride) == (8192, 8)


# Properties --------------------------------------------------------------------------------------------------
def test_a_batch_is_its_images_and_any_multiple_of_the_stride_fits():
    params = vq.init_vq(GUMBEL, Generator().manual_seed(0))
    codes = vq.encode_codes(GUMBEL, params, PIXELS)
    assert codes.shape == (2, 4, 6)
    assert codes.dtype == torch.int64
    for i in (0, 1):
        assert torch.equal(codes[i], vq.encode_codes(GUMBEL, params, PIXELS[i : i + 1])[0])
        alone = vq.decode_codes(GUMBEL, params, codes[i : i + 1])
        torch.testing.assert_close(alone[0], vq.decode_codes(GUMBEL, params, codes)[i], atol=1e-5, rtol=1e-5)
    assert vq.decode_codes(GUMBEL, params, codes.to(torch.int16)).shape == PIXELS.shape
    assert vq.encode_codes(GUMBEL, params, torch.zeros(1, 3, 2, 4)).shape == (1, 1, 2)


def test_drawn_codes_follow_the_softmax_of_the_logits():
    params = vq.init_vq(GUMBEL, Generator().manual_seed(0))
    pixels = PIXELS[:1, :, :2, :2].expand(4000, -1, -1, -1)  # one code each
    codes = vq.encode_codes(GUMBEL, params, pixels, Generator().manual_seed(5))
    assert torch.equal(codes, vq.encode_codes(GUMBEL, params, pixels, Generator().manual_seed(5)))
    expected = vq.encode_logits(GUMBEL, params, pixels[:2]).softmax(1)[0].flatten()
    share = codes.flatten().bincount(minlength=6) / 4000
    assert float((share - expected).abs().max()) < 0.03
    with pytest.raises(ValueError, match="codes of kind vq cannot be drawn"):
        vq.encode_codes(NEAREST, waves(NEAREST), PIXELS, Generator())


def test_of_a_remapped_codebook_only_the_used_codes_exist():
    """taming's `remap`: position i of `used` is code i; where it draws a code at random, the nearest used one is
    taken here."""
    for cfg in (VqConfig(used=3, **TINY), VqConfig(kind="vq", used=3, **TINY)):
        whole = waves(VqConfig(kind=cfg.kind, **TINY))
        params = whole | {"quantize.used": torch.tensor([4, 1, 3])}
        assert cfg.codes == 3
        every = vq.encode_logits(VqConfig(kind=cfg.kind, **TINY), whole, PIXELS)
        assert torch.equal(vq.encode_logits(cfg, params, PIXELS), every[:, [4, 1, 3]])
        codes = CODES % 3
        expected = vq.decode_codes(VqConfig(kind=cfg.kind, **TINY), whole, torch.tensor([4, 1, 3])[codes])
        assert torch.equal(vq.decode_codes(cfg, params, codes), expected)
        with pytest.raises(ValueError, match=r"codes must lie in 0\.\.2, got 0\.\.5"):
            vq.decode_codes(cfg, params, CODES)
        loss, _ = vq.vq_loss(cfg, params, PIXELS)
        assert loss.isfinite()


def test_gradients_reach_every_part():
    for cfg in (GUMBEL, NEAREST):
        params = vq.init_vq(cfg, Generator().manual_seed(0))
        leaves = {name: tensor.requires_grad_() for name, tensor in params.items()}
        loss, _ = vq.vq_loss(cfg, leaves, PIXELS, temperature=0.5)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        # A bias before a softmax over places or a norm of groups of one channel moves nothing.
        still = [name for name, grad in zip(leaves, grads, strict=True) if not grad.abs().max() > 0]
        assert not [name for name in still if "weight" in name]


def test_images_become_bytes_as_in_the_reference():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 2, 3)
    assert vq.to_uint8(pixels).flatten().tolist() == [0, 0, 127, 254, 255, 255]  # truncated
    assert vq.to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


# Errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 3, 4),
        torch.zeros(1, 1, 4, 4),
        torch.zeros(3, 4, 4),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(0, 3, 4, 4),
    ],
)
def test_pixels_that_do_not_fit_are_refused(pixels):
    for function in (vq.encode_logits, vq.encode_codes, vq.vq_loss):
        with pytest.raises(
            ValueError, match=r"pixels must be floating point \[b, 3, y, x\], .* multiples of 2, got"
        ):
            function(GUMBEL, waves(GUMBEL), pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, 2), 6), r"codes must lie in 0\.\.5, got 6\.\.6"),
        (torch.tensor([[[0, -1]]]), r"codes must lie in 0\.\.5, got -1\.\.0"),
        (torch.zeros(1, 2, 2), r"whole numbers \[b, h, w\], got torch.float32 \[1, 2, 2\]"),
        (torch.zeros(4, dtype=torch.int64), r"whole numbers \[b, h, w\], got torch.int64 \[4\]"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), r"got torch.int64 \[1, 0, 2\]"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        vq.decode_codes(GUMBEL, waves(GUMBEL), codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch": 48}, "ch must be a multiple of 32 .* got ch=48"),
        ({"ch_mult": ()}, "ch_mult name a level"),
        ({"embed_dim": 8}, "embed_dim of kind gumbel must be z_channels, got 8 and 4"),
        ({"used": 7}, "VqConfig.used must be 6 or less, got 7"),
        ({"n_embed": 0}, "VqConfig.n_embed must be 1 or more, got 0"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VqConfig(**TINY | change)
