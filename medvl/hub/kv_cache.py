"""The keys and values of a language model's tokens, in memory that has room for the tokens to come."""

from functools import cache as once
from typing import Any

from torch import Tensor

# Room is taken for so many tokens at a time: an answer is often shorter than its limit.
BLOCK = 256


def reserve_room(cache: Any, tokens: int) -> None:
    """Let a cache write its next tokens behind those that it has, in place.

    transformers' own layers copy all they have for every new token. Layers of other kinds than its plain
    ones stay as they are.

    Args:
        cache: as the model returned it for a prompt; it is changed.
        tokens: how many will come at most; more of them cost a copy.
    """
    layers: Any = getattr(cache, "layers", [])
    if not tokens:
        return
    roomy = _roomy_classes()
    for i, layer in enumerate(layers):
        # One that holds nothing yet, or keeps more than its window, is left alone.
        if type(layer) in roomy and layer.is_initialized and not getattr(layer, "record_past", False):
            layers[i] = roomy[type(layer)](layer, tokens)


@once
def _roomy_classes() -> dict[type, Any]:
    """{a class of transformers' layers: the same with room}. Made on first use: transformers loads slowly."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    class RoomyLayer(Roomy, DynamicLayer):
        pass

    class RoomySlidingLayer(Roomy, DynamicSlidingWindowLayer):
        pass

    return {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: RoomySlidingLayer}


def can_select_rows(cache: Any) -> bool:
    """Whether `cache.batch_select_indices` keeps some rows: of layers of other kinds it is not known."""
    return all(isinstance(layer, Roomy) for layer in getattr(cache, "layers", (None,)))


def keeps_states(module: Any) -> bool:
    """Whether layers of a language model keep a state, as linear attention and convolutions do (Qwen3.5, LFM2):
    every token changes it, and no mask keeps a later one from it.
    """
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=module.config.get_text_config())
    return any(hasattr(layer, "conv_states") for layer in cache.layers)


class Roomy:
    """What a layer of a cache does that has room behind its tokens; the rest is transformers'.

    A shallow copy shares the memory, and may be written to as long as the original is not: that is how the
    options of one prompt are scored one after the other.
    """

    keys: Any  # a tensor [b, h, n, d]: what the next token may look at
    values: Any
    is_sliding: bool  # whether a token looks at the last `sliding_window` tokens only
    sliding_window: int
    cumulative_length: int
    # Memory with room, and which of its tokens are held.
    _key_room: Tensor
    _value_room: Tensor
    _start: int
    _end: int
    _written: Tensor  # the keys as they were left by this class

    def __init__(self, layer: Any, tokens: int) -> None:
        # All that the layer knows, its window too.
        self.__dict__.update(layer.__dict__)
        self._tokens_to_come = tokens
        self._move_to_room(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys [b, h, n, d] and values of new tokens; return those that the new tokens may look at."""
        new = key_states.shape[-2]
        # What transformers offers besides (to crop, to choose rows) replaces the keys.
        if self.keys is not self._written or self._end + new > self._key_room.shape[-2]:
            self._move_to_room(new)
        self._key_room.narrow(2, self._end, new).copy_(key_states)
        self._value_room.narrow(2, self._end, new).copy_(value_states)
        self._end += new
        self._tokens_to_come -= new
        count = self._end - self._start
        keys = self._key_room.narrow(2, self._start, count)
        values = self._value_room.narrow(2, self._start, count)
        self.keys, self.values = keys, values
        if self.is_sliding:
            self.cumulative_length += new
            # The next token is itself one of its window.
            self.keys = keys[:, :, -self.sliding_window + 1 :]
            self.values = values[:, :, -self.sliding_window + 1 :]
            self._start = self._end - self.keys.shape[-2]
        self._written = self.keys
        return keys, values

    def _move_to_room(self, new: int) -> None:
        """Move keys and values to memory with room for `new` tokens, and for others that will come."""
        room = max(new, min(self._tokens_to_come, BLOCK))
        self._key_room, self.keys = _copy_with_room(self.keys, room)
        self._value_room, self.values = _copy_with_room(self.values, room)
        self._written = self.keys
        self._start, self._end = 0, self.keys.shape[-2]


def _copy_with_room(tensor: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """(memory of a tensor [b, h, n, d] with room for more along n, the tensor in it)."""
    b, h, n, d = tensor.shape
    memory = tensor.new_empty(b, h, n + room, d)
    copy = memory.narrow(2, 0, n)
    copy.copy_(tensor)
    return memory, copy
