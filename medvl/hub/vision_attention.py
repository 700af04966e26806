"""Qwen-VL's vision encoders: attention of equal windows in one call, and what follows from grids alone."""

import itertools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_log = logging.getLogger(__name__)
_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # their vision attention is the same code


class StackedAttention(nn.Module):
    """transformers' vision attention, with one call for all windows of equal size that follow each other.

    transformers calls attention once for each window: in Qwen2.5-VL 2,240 times for an image of one
    megapixel. Windows of the same size are rows of a batch here. The layers, and so the names of the weights,
    are those of transformers' module.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads, self.scaling = attention.num_heads, attention.scaling

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """Attention of patches [n, d] within windows.

        Args:
            cu_seqlens: first patch of every window and n, [windows + 1]; on the CPU, where nothing waits to
                read it.
            position_embeddings: cosines and sines [n, d of a head] of the rotary positions.
        """
        n = len(hidden_states)
        qkv = self.qkv(hidden_states).view(n, 3, self.num_heads, -1)
        query, key = _rotate(qkv[:, :2], *position_embeddings).unbind(1)
        value = qkv[:, 2]
        outputs = list[Tensor]()
        start = 0
        for length, windows in itertools.groupby(cu_seqlens.diff().tolist()):
            number = len(list(windows))
            stop = start + number * length
            # [n, heads, d of a head] -> [windows, heads, length, d of a head]
            shape = (number, length)
            q, k, v = (t[start:stop].unflatten(0, shape).transpose(1, 2) for t in (query, key, value))
            output = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
            outputs.append(output.transpose(1, 2).reshape(stop - start, -1))
            start = stop
        return self.proj(torch.cat(outputs))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys [n, 2, heads, d] turned by their positions, in float32 as in transformers."""
    cos, sin = cos[:, None, None].float(), sin[:, None, None].float()
    wide = x.float()
    first, second = wide.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (wide * cos + turned * sin).to(x.dtype)


def stack_windows(module: nn.Module) -> None:
    """Replace the vision attention of Qwen-VL by `StackedAttention`; any other module is left as it is."""
    config: Any = module.config
    if config.model_type not in _MODEL_TYPES or config.vision_config._attn_implementation != "sdpa":
        return
    try:
        for block in _vision_encoder(module).blocks:
            block.attn = StackedAttention(block.attn).train(block.attn.training)
    except AttributeError as e:
        _log.warning(
            "the vision encoder of %s has changed in transformers (%s): each window of an image is a call of "
            "its own, which is slow",
            *(config.model_type, e),
        )


def _vision_encoder(module: Any) -> Any:
    # With a language head the model is a part of the module.
    return getattr(module, "model", module).visual


def grid_inputs(module: nn.Module, grid: Tensor) -> dict[str, Tensor]:
    """What the vision encoder would compute from the grids of images, as arguments of the model's call.

    It is computed on the CPU: the encoder itself waits for the device more than ten times to do it. The grids
    themselves must then stay on the CPU, and so must the lengths of windows, whose names end with "seqlens".
    Windows of equal size stand side by side in an image, as `StackedAttention` likes them.

    Args:
        module: of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        grid: [images, 3] (t, h, w) in patches, on the CPU.
    Returns:
        nothing (with a warning) where transformers no longer takes them.
    """
    try:
        from transformers.utils.generic import accepts_precomputed_kwargs  # noqa: F401
        from transformers.vision_utils import (
            get_vision_cu_seqlens,
            get_vision_interpolation_indices_and_weights,
            get_vision_position_ids,
            get_vision_window_index,
        )

        visual = _vision_encoder(module)
        merge = visual.spatial_merge_size
        inputs = {
            "position_ids": get_vision_position_ids(grid, merge),
            "cu_seqlens": get_vision_cu_seqlens(grid),
        }
        if hasattr(visual, "window_size"):
            index, windows = get_vision_window_index(grid, merge, visual.window_size, visual.patch_size)
            index, windows = _sort_windows(index, windows, inputs["cu_seqlens"], merge)
            inputs |= {"window_index": index, "cu_window_seqlens": windows}
        if hasattr(visual, "num_grid_per_side"):
            places, weights = get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=visual.num_grid_per_side,
                mode=visual.interpolation_mode,
                align_corners=visual.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            inputs |= {"interp_indices": places, "interp_weights": weights}
    except (ImportError, AttributeError, TypeError) as e:
        _log.warning("transformers computes positions of patches itself, and waits for the device: %s", e)
        return {}
    return {f"image_{name}": tensor for name, tensor in inputs.items()}


def _sort_windows(index: Tensor, windows: Tensor, frames: Tensor, merge: int) -> tuple[Tensor, Tensor]:
    """The windows of each frame in the order of their sizes, the largest first.

    The order within a frame is free: the encoder puts the patches back by the index.

    Args:
        index: [visual tokens], the tokens of one window after those of another.
        windows, frames: first patch of each, and the number of patches.
        merge: patches of a visual token, per axis.
    """
    lengths = windows.diff()
    frame = torch.searchsorted(frames, windows[:-1], right=True)
    order = (frame * (int(lengths.max()) + 1) - lengths).argsort(stable=True)
    tokens = index.split((lengths // merge**2).tolist())
    sorted_index = torch.cat([tokens[i] for i in order.tolist()])
    return sorted_index, F.pad(lengths[order].cumsum(0), (1, 0)).to(windows.dtype)
