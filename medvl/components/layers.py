"""Transformer pieces as pure functions over dicts of tensors.

The letters of all shapes in medvl: b batch, s slices, n tokens in, m tokens kept, t text tokens, p patches,
d width, h heads, e experts, k adapters, r rank, l layers, v vocabulary, c findings, x y z voxel axes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor

from medvl.base.tree import Tree

Rope = tuple[Tensor, Tensor]


def init_linear(
    width_in: int, width_out: int, gen: Generator, *, std: float = 0.02, bias: bool = True
) -> Tree:
    """{"weight" [out, in], "bias" [out]}: normal with `std`, bias zero."""
    weight = torch.randn(width_out, width_in, generator=gen) * std
    return {"weight": weight, "bias": torch.zeros(width_out)} if bias else {"weight": weight}


def linear(p: Tree, x: Tensor) -> Tensor:
    """`x W^T + b` over the last axis."""
    return F.linear(x, p["weight"], p.get("bias"))


def init_norm(width: int) -> Tree:
    """{"weight" [d], "bias" [d]} of a layer norm."""
    return {"weight": torch.ones(width), "bias": torch.zeros(width)}


def norm(p: Tree, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis."""
    return F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], eps)


def init_block(width: int, depth: int, gen: Generator, mlp: int = 4) -> Tree:
    """Parameters of `block`; the two layers that write to the residual stream start smaller the deeper the
    stack (Radford et al. 2019).
    """
    # 2 x depth layers write to the stream: their sum does not grow with depth.
    small = 0.02 / (2 * depth) ** 0.5
    return {
        "norm1": init_norm(width),
        "qkv": init_linear(width, 3 * width, gen),
        "out": init_linear(width, width, gen, std=small),
        "norm2": init_norm(width),
        "up": init_linear(width, mlp * width, gen),
        "down": init_linear(mlp * width, width, gen, std=small),
    }


def block(
    p: Tree,
    x: Tensor,
    heads: int,
    *,
    keep: Tensor | None = None,
    rope: Rope | None = None,
    causal: bool = False,
    act: Callable[[Tensor], Tensor] = F.gelu,
) -> Tensor:
    """A pre-norm transformer block, [b, n, d] -> [b, n, d].

    Args:
        keep: bool, broadcastable to [b, h, n, n]; true where a query may look at a key.
        rope: from `rotary`; turns queries and keys.
        causal: token i looks only at tokens up to i (with `keep`: both must allow it).
    Source: Vaswani et al. 2017, arXiv:1706.03762; pre-norm as in Xiong et al. 2020, arXiv:2002.04745.
    """
    # Pre-norm: what is added to x is never normed itself, so gradients pass straight through all blocks.
    qkv = linear(p["qkv"], norm(p["norm1"], x))
    x = x + linear(p["out"], attention(qkv, heads, keep=keep, rope=rope, causal=causal))
    hidden = act(linear(p["up"], norm(p["norm2"], x)))
    return x + linear(p["down"], hidden)


def attention(
    qkv: Tensor, heads: int, *, keep: Tensor | None = None, rope: Rope | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product self-attention of packed [b, n, 3d] (q, k, v in this order) -> [b, n, d]."""
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
    # Values carry no position: only the match of query and key depends on it.
    if rope is not None:
        q = rotate(q, rope)
        k = rotate(k, rope)
    # torch takes a mask or is_causal, not both.
    if causal and keep is not None:
        n = q.shape[-2]
        keep = keep & torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        causal = False
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal)
    return rearrange(mixed, "b h n d -> b n (h d)")


def rotary(position: Tensor, head_width: int, base: float = 10000.0) -> Rope:
    """(cos, sin), each [b, 1, n, head_width / 2], float32, for positions [b, n] in any unit (wavelengths 2 pi
    ... 2 pi `base` of it).

    Source: Su et al. 2021, arXiv:2104.09864, eq. 15, on halves instead of interleaved pairs.
    """
    # float32 also under bfloat16, which cannot tell apart positions beyond 256.
    pairs = torch.arange(0, head_width, 2, device=position.device, dtype=torch.float32)
    speed = base ** (-pairs / head_width)  # radians per unit of position: 1 for the first pair, then slower
    angle = position.float()[:, None, :, None] * speed
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs (x[i], x[i + half]) of [b, h, n, d] by the angles of `rope`; the dot product of two
    turned vectors depends only on the difference of their positions."""
    cos, sin = (part.to(x.dtype) for part in rope)
    # Pairs are across the halves, not of neighbours: the same rotation with the channels in another order.
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)
