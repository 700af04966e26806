"""From token ids to one embedding of a report or prompt."""

from typing import Any, Literal

import torch
from attrs import frozen
from torch import Generator, Tensor

from medvl.base import config
from medvl.base.tree import Tree
from medvl.components import layers


@frozen(kw_only=True)
class TextConfig:
    """The causal text tower of CLIP, at any size; the defaults are CLIP's own."""

    vocabulary: int = 49408
    context: int = 77
    dim: int = 512
    depth: int = 12
    heads: int = 8
    # CLIP reads the end token; mean and max over tokens learn from fewer reports.
    pool: Literal["last", "mean", "max"] = "last"

    def __attrs_post_init__(self) -> None:
        if min(self.vocabulary, self.context, self.dim, self.depth, self.heads) < 1 or self.dim % self.heads:
            raise ValueError(f"TextConfig: sizes must be positive and dim a multiple of heads, got {self}")
        config.check_bounds(self, "TextConfig", vocabulary=(1, 2**24), context=(1, 2**17), dim=config.WIDTH)
        config.check_bounds(self, "TextConfig", depth=config.DEPTHS, heads=config.DEPTHS)


def init_text(cfg: TextConfig, gen: Generator) -> Tree:
    """Parameters of `encode_text`: {"token" [v, d], "position" [t, d], "blocks", "norm"}; float32 on CPU."""
    # The spreads of CLIP's own initialisation; in the order in which they are drawn.
    return {
        "token": torch.randn(cfg.vocabulary, cfg.dim, generator=gen) * 0.02,
        "position": torch.randn(cfg.context, cfg.dim, generator=gen) * 0.01,
        "blocks": {str(i): layers.init_block(cfg.dim, cfg.depth, gen) for i in range(cfg.depth)},
        "norm": layers.init_norm(cfg.dim),
    }


def encode_text(cfg: TextConfig, p: Tree, ids: Tensor, mask: Tensor) -> Tensor:
    """Embed token ids with a causal transformer, read at the last kept token (the end token) or pooled over
    the kept ones.

    Args:
        p: from `init_text`.
        ids: int64 [b, t], t <= cfg.context, padded at the end.
        mask: bool [b, t], true where a token exists.
    Returns:
        [b, d], not normalised, not projected; padding does not change it.
    Raises:
        ValueError: wrong shapes, more tokens than the context, or ids outside the vocabulary.
    Source: Radford et al. 2021, arXiv:2103.00020, section 2.4; equal to transformers' CLIPTextModel with the
        same weights.
    """
    if ids.dim() != 2 or ids.shape != mask.shape or ids.shape[1] > cfg.context:
        raise ValueError(
            f"encode_text: ids and mask must be [b, t] with t <= {cfg.context}, "
            f"got {tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    # On a GPU this would wait for it, and an id out of range raises there anyway.
    if ids.device.type == "cpu" and ids.numel():
        low = int(ids.min())
        high = int(ids.max())
        if low < 0 or high >= cfg.vocabulary:
            raise ValueError(
                f"encode_text: ids must lie in 0..{cfg.vocabulary - 1}, found {low}..{high}: another "
                "tokenizer?"
            )
    x = p["token"][ids] + p["position"][: ids.shape[1]]
    # No mask: padding is at the end, where causal attention does not look.
    for i in range(cfg.depth):
        x = layers.block(p["blocks"][str(i)], x, cfg.heads, causal=True, act=layers.quick_gelu)
    return pool_tokens(cfg.pool, layers.norm(p["norm"], x), mask)


def encode_text_with(
    params: Tree, ids: Tensor, mask: Tensor, *, model: Any, pool: Literal["first", "last", "mean"] = "first"
) -> Tensor:
    """The same from any Hugging Face text encoder: `model(params, input_ids=..., attention_mask=...)` -> [b,
    d].

    Args:
        model: the skeleton that `loading.load_skeleton` gave with `params`.
        pool: "first" for BERT-like encoders ([CLS]), "last" for causal ones, "mean" over kept tokens.
    """
    hidden = model(params, input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return pool_tokens(pool, hidden, mask)


def pool_tokens(pool: Literal["first", "last", "mean", "max"], x: Tensor, mask: Tensor) -> Tensor:
    """One vector per row of [b, t, d]: the first token, the last kept one, or the mean or maximum of the kept
    ones.
    """
    if pool == "first":
        return x[:, 0]
    if pool == "last":
        # Padding is at the end, so the number of tokens says which is last; an empty row takes its first.
        last = mask.sum(1).clamp(min=1) - 1
        return x[torch.arange(len(x), device=x.device), last]
    if pool == "max":
        existing = x.masked_fill(~mask[..., None], -torch.inf)
        return existing.amax(1).nan_to_num(neginf=0.0)  # an empty row would be -inf
    num_tokens = mask.sum(1, keepdim=True).clamp(min=1)
    share = mask / num_tokens
    return torch.einsum("bt,btd->bd", share.to(x.dtype), x)
