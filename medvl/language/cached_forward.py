"""Forward passes of a language model with a cache: of prompts, and of the tokens behind them.

In shapes b are the rows of the batch, v the vocabulary, t the tokens of the prompt, n those of an answer.
"""

import copy
import inspect
from collections.abc import Generator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        padded[name] = tensor.gather(axis, index)
    return padded


def check_not_checkpointed(skeleton: Skeleton) -> None:
    for module in skeleton.module.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise ValueError(
                f"generate: {skeleton.name} is checkpointed, its layers would leave the cache empty; "
                "give the skeleton it is of"
            )


def forward_prompt(model: nn.Module, call: Mapping[str, Any]) -> Any:
    """The model's output for the prompts of a batch: its cache, and the logits of the last token (with those
    of the tokens before it, where the model cannot leave them out).
    """
    return model(**call, use_cache=True, **_last_logits_only(model))


def _last_logits_only(model: nn.Module) -> dict[str, int]:
    """The argument by which a model computes logits of the last token only, where it has one."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return {"logits_to_keep": 1}
    return {}


def next_logits(model: nn.Module, call: dict[str, Any], steps: int) -> Generator[Tensor, Tensor, None]:
    """Yield logits float32 [b, v] of the next token; for every token [b] that is sent those of the token
    behind it.

    Args:
        steps: how often logits are yielded. The token sent last would be computed for nothing, so a caller
            that has all its tokens does not send it.
    """
    position = _next_position(call)
    cache_name = _cache_name(model)
    output = forward_prompt(model, call)
    prompt_mask = call["attention_mask"]
    has_padding = not bool(prompt_mask.all())
    last_only = _last_logits_only(model)
    # For the longest answer there can be; every step takes its beginning.
    mask = F.pad(prompt_mask, (0, steps), value=1)
    for length in range(prompt_mask.shape[1] + 1, mask.shape[1] + 1):
        # float32, as the softmax of a whole vocabulary in bfloat16 would round the probabilities away.
        token = yield output.logits[:, -1].float()
        cache = getattr(output, cache_name)
        # Without padding a new token may see the whole cache, and needs no mask.
        arguments: dict[str, Any] = {"attention_mask": None, cache_name: cache}
        if has_padding:
            arguments["attention_mask"] = _step_mask(model, cache, mask[:, :length])
        if position is not None:
            arguments["position_ids"] = position
            position = position + 1
        output = model(input_ids=token[:, None], use_cache=True, **arguments, **last_only)


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
    return mask[:, None, None, -windows.pop() :].bool()


def continuation_log_probs(
    model: nn.Module, call: dict[str, Any], prompt: Any, tokens: Tensor, exists: Tensor
) -> Tensor:
    """Log-probabilities [b, n - 1, v] of the second to the last token of answers [b, n], each after the
    prompt and the tokens before it.

    Args:
        prompt: from `forward_prompt`; its cache is left as it is.
        exists: bool [b, n], False for the padding of answers.
    """
    cache_name = _cache_name(model)
    cache = copy.copy(getattr(prompt, cache_name))
    # Shallow copies are enough: a layer replaces its tensors and does not write into them.
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    arguments: dict[str, Any] = {
        "attention_mask": torch.cat([call["attention_mask"], exists[:, :-1].long()], 1),
        cache_name: cache,
    }
    position = _next_position(call)
    if position is not None:
        arguments["position_ids"] = position + torch.arange(tokens.shape[1] - 1, device=tokens.device)
    output = model(input_ids=tokens[:, :-1], use_cache=True, **arguments)
    return output.logits.float().log_softmax(-1)


def _cache_name(model: nn.Module) -> str:
    """The name of the cache, as an argument and in the output: transformers changes it from 5.17 to 5.40."""
    if "cache" in inspect.signature(model.forward).parameters:
        return "cache"
    return "past_key_values"


def _next_position(call: dict[str, Any]) -> Tensor | None:
    """Position [b, 1] or [3, b, 1] of the token behind the prompt: one more than any before, on all axes."""
    positions = call.get("position_ids")
    if positions is None:
        return None
    if positions.dim() == 2:
        return positions.amax(1, keepdim=True) + 1
    # Where there are four axes, text positions stand before the three. A text goes on behind the largest
    # position of all axes (Qwen2-VL, arXiv:2409.12191, section 2.1).
    return (positions[-3:].amax((0, 2))[:, None] + 1).expand(3, -1, -1)
