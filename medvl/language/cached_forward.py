"""Forward passes of a language model with a cache: of prompts, and of the tokens behind them.

In shapes b are the rows of the batch, v the vocabulary, t the tokens of the prompt, n those of an answer.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define
from torch import Tensor, nn

from medvl.base.transfer import to_device
from medvl.hub import kv_cache
from medvl.hub.skeletons import Skeleton


def left_padded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch with all padding on the left, where generation needs it, cut to the longest row.

    Raises:
        ValueError: the mask and another tensor differ in shape.
    """
    mask = inputs.get("mask")
    if mask is None or mask.dim() != 2 or not mask.numel():
        return dict(inputs)
    exists = mask.bool()
    longest = max(1, int(exists.sum(1).max()))
    # A stable sort of 0 (padding) and 1 moves padding to the left and keeps the order of tokens.
    # Columns [b, longest] that each row is read from.
    order = exists.long().sort(dim=1, stable=True).indices[:, mask.shape[1] - longest :]
    padded = dict(inputs)
    for name in ("ids", "mask", "mm_token_type_ids", "position_ids", "inputs_embeds"):
        tensor = inputs.get(name)
        if tensor is None:
            continue
        axis = 1  # of tokens
        if name == "position_ids" and tensor.dim() == 3:
            axis = 2
        if tensor.shape[axis - 1 : axis + 1] != mask.shape:
            raise ValueError(
                f"left_padded: {name} must be of the mask's rows and tokens {list(mask.shape)}, got "
                f"{list(tensor.shape)}"
            )
        index = order
        if axis == 2:
            index = order.expand(len(tensor), -1, -1)
        elif tensor.dim() > 2:
            index = order[..., None].expand(-1, -1, tensor.shape[-1])
        padded[name] = tensor.gather(axis, to_device(index, tensor.device))
    return padded


def check_not_checkpointed(skeleton: Skeleton) -> None:
    for module in skeleton.module.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise ValueError(
                f"generate: {skeleton.name} is checkpointed, its layers would leave the cache empty; "
                "give the skeleton it is of"
            )


def forward_prompt(model: nn.Module, call: Mapping[str, Any], room: int) -> Any:
    """The model's output for the prompts of a batch: its cache, and the logits of the last token (with those
    of the tokens before it, where the model cannot leave them out).

    Args:
        room: for so many tokens the cache has room behind the prompt.
    """
    output = model(**call, use_cache=True, **last_only(model))
    kv_cache.reserve_room(getattr(output, cache_name(model)), room)
    return output


def last_only(model: nn.Module) -> dict[str, int]:
    """The argument by which a model computes logits of the last token only, where it has one."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return {"logits_to_keep": 1}
    return {}


@define
class Decoding:
    """Rows of a batch while tokens are put behind their prompts."""

    cache: Any
    logits: Tensor  # float32 [b, v], of each row's next token
    length: int  # tokens in the cache, padding included
    mask: Tensor | None  # bool [b, t + steps], True where a token exists; None where there is no padding
    position: Tensor | None  # of the next token, [b, 1] or [3, b, 1]; None where the model counts


def start_decoding(model: nn.Module, call: Mapping[str, Any], steps: int) -> Decoding:
    """Run the prompts.

    Args:
        call: arguments of the model, padded on the left.
        steps: how often `decode_tokens` will be called at most.
    """
    output = forward_prompt(model, call, steps)
    exists = call["attention_mask"].bool()
    # Without padding a new token may see the whole cache, and needs no mask. With it, every step takes the
    # beginning of the mask for the longest answer there can be.
    mask = None if bool(exists.all()) else F.pad(exists, (0, steps), value=True)
    return Decoding(
        cache=getattr(output, cache_name(model)),
        logits=last_logits(output),
        length=exists.shape[1],
        mask=mask,
        position=_next_position(call),
    )


def decode_tokens(model: nn.Module, decoding: Decoding, tokens: Tensor) -> None:
    """Put a token [b] behind each row; the logits are then those of the token after it."""
    name = cache_name(model)
    decoding.length += 1
    arguments: dict[str, Any] = {"attention_mask": None, name: decoding.cache}
    if decoding.mask is not None:
        mask = decoding.mask[:, : decoding.length]
        arguments["attention_mask"] = _step_mask(model, decoding.cache, mask)
    if decoding.position is not None:
        arguments["position_ids"] = decoding.position
        decoding.position = decoding.position + 1
    output = model(input_ids=tokens[:, None], use_cache=True, **arguments, **last_only(model))
    decoding.logits = last_logits(output)


def can_keep_rows(decoding: Decoding) -> bool:
    return kv_cache.can_select_rows(decoding.cache)


def keep_rows(decoding: Decoding, rows: Tensor) -> None:
    """Go on with these rows alone, int64 [n]. Their logits are known after the next token."""
    decoding.cache.batch_select_indices(rows)
    if decoding.mask is not None:
        decoding.mask = decoding.mask[rows]
    if decoding.position is not None:
        decoding.position = decoding.position[..., rows, :]


def last_logits(output: Any) -> Tensor:
    # float32, as the softmax of a whole vocabulary in bfloat16 would round the probabilities away.
    return output.logits[:, -1].float()


def _step_mask(model: nn.Module, cache: Any, mask: Tensor) -> Tensor:
    """The mask of one new token.

    Where all layers have the same attention window, it is made here: transformers would wait for the device
    to look at the mask.
    """
    windows = set[int]()  # 0 for a layer that looks at all tokens
    for layer in cache.layers:
        # A layer of another kind, or one that holds no keys: left to transformers.
        if not hasattr(layer, "is_sliding") or not hasattr(layer, "keys"):
            return mask
        windows.add(layer.sliding_window if layer.is_sliding else 0)
    config: Any = model.config
    if len(windows) != 1 or config.get_text_config()._attn_implementation != "sdpa":
        return mask
    # A layer with a window keeps only that many keys. Without one, -0 is the beginning: all of them.
    return mask[:, None, None, -windows.pop() :]


def continuation_log_probs(
    model: nn.Module, call: dict[str, Any], prompt: Any, tokens: Tensor, exists: Tensor
) -> Tensor:
    """Log-probabilities [b, n - 1, v] of the second to the last token of answers [b, n], each after the
    prompt and the tokens before it.

    Args:
        prompt: from `forward_prompt`; its cache is left as it is.
        exists: bool [b, n], False for the padding of answers.
    """
    name = cache_name(model)
    cache = copy.copy(getattr(prompt, name))
    cache.layers = [_copy_layer(layer) for layer in cache.layers]
    arguments: dict[str, Any] = {
        "attention_mask": torch.cat([call["attention_mask"], exists[:, :-1].long()], 1),
        name: cache,
    }
    position = _next_position(call)
    if position is not None:
        arguments["position_ids"] = position + torch.arange(tokens.shape[1] - 1, device=tokens.device)
    output = model(input_ids=tokens[:, :-1], use_cache=True, **arguments)
    return output.logits.float().log_softmax(-1)


def _copy_layer(layer: Any) -> Any:
    """A layer of a cache that can be written to while the original stays as it is."""
    # A shallow copy is enough where new tokens stand behind the prompt: the next option writes there, too.
    if isinstance(layer, kv_cache.Roomy):
        return copy.copy(layer)
    # States of linear attention and convolutions (Qwen3.5, LFM2) are overwritten in place.
    return copy.deepcopy(layer)


def cache_name(model: nn.Module) -> str:
    """The name of the cache, as an argument and in the output: transformers changes it from 5.17 to 5.40."""
    if "cache" in inspect.signature(model.forward).parameters:
        return "cache"
    return "past_key_values"


def _next_position(call: Mapping[str, Any]) -> Tensor | None:
    """Position [b, 1] or [3, b, 1] of the token behind the prompt: one more than any before, on all axes."""
    positions = call.get("position_ids")
    if positions is None:
        return None
    if positions.dim() == 2:
        return positions.amax(1, keepdim=True) + 1
    # Where there are four axes, text positions stand before the three. A text goes on behind the largest
    # position of all axes (Qwen2-VL, arXiv:2409.12191, section 2.1).
    return (positions[-3:].amax((0, 2))[:, None] + 1).expand(3, -1, -1)
