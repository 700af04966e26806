"""From slice embeddings to one embedding of the volume."""

from typing import Literal

import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Generator, Tensor

from medvl.base import config
from medvl.base.tree import Tree
from medvl.components import layers


@frozen(kw_only=True)
class FuseConfig:
    """A pre-norm transformer over slices."""

    dim: int = 768
    inputs: int = 0  # width of the slice embeddings, projected to dim; 0 = dim, as they are
    # Append the slice embeddings themselves, normed and pooled: what shows in one slice needs no attention.
    skip: bool = False
    depth: int = field(default=4, validator=config.in_bounds(0, 1024))
    heads: int = 12
    pool: Literal["cls", "mean", "max", "mean+max", "attention"] = "cls"
    # One radian of the fastest rotary pair per this many mm.
    unit_mm: float = field(default=3.0, validator=config.in_bounds(1e-3, 1e4))
    base: float = 1000.0  # slowest rotary wavelength = 2 pi base units: the height of a body

    def __attrs_post_init__(self) -> None:
        if self.dim < 1 or self.heads < 1 or self.dim % (2 * self.heads):
            raise ValueError(
                "FuseConfig: dim must be a multiple of 2 x heads (rotary pairs), "
                f"got dim={self.dim}, heads={self.heads}"
            )
        if self.inputs < 0 or (self.skip and self.pool not in ("mean", "max", "mean+max")):
            raise ValueError(
                "FuseConfig: inputs must be >= 0, and skip needs pool mean, max or mean+max, "
                f"got {self.inputs}, {self.pool!r}"
            )
        if self.base <= 1:
            raise ValueError(f"FuseConfig: base must be above 1, got {self.base}")
        config.check_bounds(self, "FuseConfig", dim=config.WIDTH, inputs=config.WIDTH_OR_NONE)
        config.check_bounds(self, "FuseConfig", heads=config.DEPTHS, base=(1, 1e9))


def fused_width(cfg: FuseConfig) -> int:
    """The length of a volume embedding."""
    width = cfg.dim
    if cfg.skip:
        width += cfg.inputs or cfg.dim
    return width * len(cfg.pool.split("+"))


def init_fuse(cfg: FuseConfig, gen: Generator) -> Tree:
    """Parameters of `fuse`, float32 on CPU: {"blocks" {"0".. -> layers.block}, "norm"}; "cls" [d] or "query"
    [d], "kv" for pooling; "into" [d, inputs]; "skip" norm."""
    # The order of the draws decides what a seed gives: blocks first, then what the options add.
    params: Tree = {
        "blocks": {str(i): layers.init_block(cfg.dim, cfg.depth, gen) for i in range(cfg.depth)},
        "norm": layers.init_norm(cfg.dim),
    }
    if cfg.inputs:
        params["into"] = layers.init_linear(cfg.inputs, cfg.dim, gen, std=cfg.inputs**-0.5)
    if cfg.skip:
        params["skip"] = layers.init_norm(cfg.inputs or cfg.dim)
    if cfg.pool == "cls":
        params["cls"] = torch.randn(cfg.dim, generator=gen) * 0.02
    if cfg.pool == "attention":
        params["query"] = torch.randn(cfg.dim, generator=gen) * 0.02
        params["kv"] = layers.init_linear(cfg.dim, 2 * cfg.dim, gen)
    return params


def fuse(cfg: FuseConfig, p: Tree, z: Tensor, mask: Tensor, position_mm: Tensor) -> Tensor:
    """Fuse the slice embeddings of each volume into one embedding.

    Args:
        p: from `init_fuse`.
        z: slice embeddings [b, s, cfg.inputs or d], in any order: only `position_mm` says where a slice lies.
        mask: bool [b, s], true where a slice exists.
        position_mm: [b, s], height of every slice along the body axis in mm; what it says of masked slices is
            ignored.
    Returns:
        volume embedding [b, `fused_width(cfg)`], not normalised; padding does not change it, nor does moving
        all positions by the same distance.
    Raises:
        ValueError: z, mask or position_mm has another shape.
    Source: pre-norm transformer with a class token, Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1-4;
        rotary positions, arXiv:2104.09864.
    """
    inputs = cfg.inputs or cfg.dim
    if z.dim() != 3 or z.shape[-1] != inputs or not (z.shape[:2] == mask.shape == position_mm.shape):
        raise ValueError(
            f"fuse: z must be [b, s, {inputs}], mask and position_mm [b, s], got z {tuple(z.shape)}, "
            f"mask {tuple(mask.shape)}, position_mm {tuple(position_mm.shape)}; "
            "set fuse.dim (or fuse.inputs) to the slice encoder's width"
        )
    # Positions are relative to the middle of the scan: where the table stood says nothing.
    weight = mask.float()
    num_slices = weight.sum(1, keepdim=True).clamp(min=1)
    middle = (position_mm * weight).sum(1, keepdim=True) / num_slices
    position = torch.where(mask, position_mm - middle, 0.0) / cfg.unit_mm
    # Before `z` is projected and gets a class token.
    skipped = None
    if cfg.skip:
        skipped = _pool(cfg, p, layers.norm(p["skip"], z), mask)
    if cfg.inputs:
        z = layers.linear(p["into"], z)
    if cfg.pool == "cls":  # the class token sits in the middle of the scan and always exists
        z = torch.cat([p["cls"].to(z.dtype).expand(len(z), 1, -1), z], 1)
        mask = torch.cat([mask.new_ones(len(z), 1), mask], 1)
        position = torch.cat([position.new_zeros(len(z), 1), position], 1)
    rope = layers.rotary(position, cfg.dim // cfg.heads, cfg.base)
    keep = mask[:, None, None]  # the same keys for all heads and queries
    for i in range(cfg.depth):
        z = layers.block(p["blocks"][str(i)], z, cfg.heads, keep=keep, rope=rope)
    fused = _pool(cfg, p, layers.norm(p["norm"], z), mask)
    if skipped is None:
        return fused
    return torch.cat([fused, skipped], -1)


def _pool(cfg: FuseConfig, p: Tree, z: Tensor, mask: Tensor) -> Tensor:
    """One vector a volume of [b, s, d]; the parts of "mean+max" side by side."""
    if cfg.pool == "cls":
        return z[:, 0]
    if cfg.pool == "attention":
        # One learned query for all volumes, split into heads like keys and values: [b, h, 1 or s, d / h].
        kv = layers.linear(p["kv"], z).unflatten(-1, (2, cfg.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        query = p["query"].to(z.dtype).view(1, cfg.heads, 1, -1)
        q = query.expand(len(z), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return pooled.flatten(1)
    vectors = []  # [b, d] each
    for kind in cfg.pool.split("+"):
        if kind == "mean":
            num_slices = mask.sum(1, keepdim=True).clamp(min=1)
            share = mask / num_slices
            vectors.append(torch.einsum("bs,bsd->bd", share.to(z.dtype), z))
        else:
            existing = z.masked_fill(~mask[..., None], -torch.inf)
            # A volume without slices would have -inf.
            vectors.append(existing.amax(1).nan_to_num(neginf=0.0))
    return torch.cat(vectors, -1)
