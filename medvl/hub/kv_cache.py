"""The keys and values of a language model's tokens, in memory that has room for the tokens to come."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = RoomyLayer(layer, tokens)
        elif type(layer) is DynamicSlidingWindowLayer and layer.is_initialized and not layer.record_past:
            layers[i] = RoomySlidingLayer(layer, tokens)


def can_select_rows(cache: Any) -> bool:
    """Whether `cache.batch_select_indices` keeps some rows: of layers of other kinds it is not known."""
    return all(isinstance(layer, RoomyLayer) for layer in getattr(cache, "layers", (None,)))


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room behind its tokens.

    A shallow copy shares the memory, and may be written to as long as the original is not: that is how the
    options of one prompt are scored one after the other.
    """

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
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
        self._keep(keys, values, new)
        return keys, values

    def _keep(self, keys: Tensor, values: Tensor, new: int) -> None:
        """Keep for the next tokens what they may look at."""
        self.keys = self._written = keys
        self.values = values

    def _move_to_room(self, new: int) -> None:
        """Move keys and values to memory with room for `new` tokens, and for others that will come."""
        room = max(new, min(self._tokens_to_come, BLOCK))
        self._key_room, self.keys = _copy_with_room(self.keys, room)
        self._value_room, self.values = _copy_with_room(self.values, room)
        self._written = self.keys
        self._start, self._end = 0, self.keys.shape[-2]


class RoomySlidingLayer(RoomyLayer, DynamicSlidingWindowLayer):
    """The same of a layer whose tokens look at the last `sliding_window` tokens only."""

    def _keep(self, keys: Tensor, values: Tensor, new: int) -> None:
        # The next token is itself one of the window.
        self.keys = self._written = keys[:, :, -self.sliding_window + 1 :]
        self.values = values[:, :, -self.sliding_window + 1 :]
        self._start = self._end - self.keys.shape[-2]
        self.cumulative_length += new


def _copy_with_room(tensor: Tensor | None, room: int) -> tuple[Tensor, Tensor]:
    """(memory of a tensor [b, h, n, d] with room for more along n, the tensor in it)."""
    assert tensor is not None  # a layer that has been written to
    b, h, n, d = tensor.shape
    memory = tensor.new_empty(b, h, n + room, d)
    copy = memory.narrow(2, 0, n)
    copy.copy_(tensor)
    return memory, copy
