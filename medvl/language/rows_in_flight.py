"""Answers that are generated together although they began at different times: continuous batching.

A prompt is run alone. Its row then joins the batch, of which every step writes one token a row, and leaves it when it
is done. In shapes b are the rows of the batch, v the vocabulary.

Source: Yu et al. 2022 (Orca), OSDI 22, section 3.1, iteration-level scheduling.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn

from medvl.hub import kv_cache
from medvl.hub.kv_cache import RowCache
from medvl.language import cached_forward
from medvl.language.cached_forward import Decoding


@define
class Rows:
    """The rows of a batch between two steps."""

    cache: RowCache
    position: Tensor  # of each row's next token, [b, 1] or [3, b, 1]

    def __len__(self) -> int:
        return len(self.cache.lengths)


def run_prompt(model: nn.Module, call: Mapping[str, Any]) -> Decoding:
    """A prompt alone, int64 [1, t], as `cached_forward.start_decoding` runs it."""
    return cached_forward.start_decoding(model, call, 0)


def no_rows(model: nn.Module, prompt: Decoding) -> Rows:
    """A batch without rows, for prompts such as this.

    Raises:
        ValueError: rows of different lengths cannot be computed together: the model keeps states in its layers,
            counts positions itself, or takes no masks of its own.
    """
    reason = _reason_against(model, prompt)
    if reason:
        raise ValueError(
            f"this model cannot answer several requests at once: {reason}; serve it by another engine"
        )
    assert prompt.position is not None
    return Rows(cache=RowCache(prompt.cache), position=prompt.position[..., :0, :])


def _reason_against(model: Any, prompt: Decoding) -> str:
    if not kv_cache.can_hold_rows(prompt.cache):
        kinds = sorted({type(layer).__name__ for layer in prompt.cache.layers})
        return f"its layers must hold keys and values only, found {', '.join(kinds)}"
    if prompt.position is None:
        return "it takes no positions"
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    attention = decoder.config._attn_implementation
    if attention != "sdpa":
        return f"its attention must be torch's (sdpa), found {attention}"
    layers = {layer.sliding_window if layer.is_sliding else 0 for layer in prompt.cache.layers}
    code = inspect.unwrap(type(decoder).forward).__code__
    if len(layers) > 1 and not {"isinstance", "dict"} <= {*code.co_names}:
        return "its layers look at different numbers of tokens, and it takes one mask for all"
    return ""


def join(rows: Rows, prompt: Decoding, room: tuple[int, int], cells: int) -> None:
    """Add the row of a prompt as the last.

    Args:
        room, cells: as of `RowCache.join`.
    """
    assert prompt.position is not None
    rows.cache.join(prompt.cache, prompt.length, room, cells)
    rows.position = torch.cat([rows.position, prompt.position], dim=-2)


def leave(rows: Rows, row: int) -> None:
    """Remove a row; the last one has its number from now on."""
    last = len(rows) - 1
    rows.cache.leave(row)
    position = rows.position.clone()
    position[..., row, :] = position[..., last, :]
    rows.position = position[..., :last, :]


def decode(model: nn.Module, rows: Rows, tokens: Tensor) -> Tensor:
    """Put a token [b] behind each row; returns the logits of the token after it, float32 [b, v]."""
    cache = rows.cache
    arguments: dict[str, Any] = {
        "attention_mask": _masks(cache),
        "position_ids": rows.position,
        cached_forward.cache_name(model): cache.cache,
    }
    output = model(input_ids=tokens[:, None], use_cache=True, **arguments, **cached_forward.last_only(model))
    rows.position = rows.position + 1
    cache.step()
    return cached_forward.last_logits(output)


def _masks(cache: RowCache) -> Any:
    """The mask of the next tokens; where layers look at different numbers of tokens, one for each kind of layer."""
    if len(cache.windows) == 1:
        (window,) = cache.windows
        return cache.mask(window)
    return {"full_attention": cache.mask(0), "sliding_attention": cache.mask(max(cache.windows))}
