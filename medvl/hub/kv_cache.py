"""The keys and values of a language model's tokens, in memory that has room for the tokens to come."""

from functools import cache as once
from typing import Any

import torch
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


# Rows that join and leave ---------------------------------------------------------------------------------------
def can_hold_rows(cache: Any) -> bool:
    """Whether rows of different lengths can be kept beside each other: all layers hold keys and nothing else.

    Args:
        cache: as the model returned it for a prompt.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", ())
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return bool(layers) and all(type(layer) in plain and layer.is_initialized for layer in layers)


def token_nbytes(cache: Any, tokens: int) -> int:
    """Bytes that a token takes in all layers.

    Args:
        cache: of one row, as the model returned it for a prompt of `tokens`.
    """
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // tokens


class RowCache:
    """Keys and values of rows of different lengths, which join and leave one by one.

    Token j of a row stands in column j, so that rows need no padding on their left. Rows lie without gaps: where one
    leaves, the last takes its place.
    """

    def __init__(self, cache: Any) -> None:
        """An empty one of the layers of `cache`, as the model returned it for a prompt of one row."""
        from transformers.cache_utils import Cache

        row_layer = _row_layer_class()
        self.lengths: list[int] = []  # tokens of each row
        self.layers = [row_layer(layer, self) for layer in cache.layers]
        self.cache = Cache(layers=self.layers)  # what the model is called with
        self.windows = {layer.window for layer in self.layers}  # 0: a layer that looks at all tokens
        # On the device: which rows there are, and in which column each writes its next token.
        self.rows = torch.empty(0, dtype=torch.int64)
        self.columns = torch.empty(0, dtype=torch.int64)

    def join(self, cache: Any, tokens: int, room: tuple[int, int], cells: int) -> None:
        """Add a row.

        Args:
            cache: of its prompt, of `tokens`.
            room: (rows, columns) that all rows need at most until one leaves.
            cells: rows times columns of the memory at most; `room` is within it.
        """
        row = len(self.lengths)
        self._reserve(*room, cells)
        self.lengths.append(tokens)
        for layer, new in zip(self.layers, cache.layers, strict=True):
            held = new.keys.shape[2]  # a layer with a window holds the last tokens only
            layer.key_room[row, :, tokens - held : tokens] = new.keys[0]
            layer.value_room[row, :, tokens - held : tokens] = new.values[0]
        self._renew_index()

    def leave(self, row: int) -> None:
        """Remove a row; the last one has its number from now on."""
        last = len(self.lengths) - 1
        length, last_length = self.lengths[row], self.lengths[last]
        self.lengths[row] = last_length
        self.lengths.pop()
        for layer in self.layers:
            for room in (layer.key_room, layer.value_room):
                # Zeros behind all rows, as at first: the row that left may have failed, and hold what is not finite.
                room[row, :, :length] = 0
                if row != last:
                    room[row, :, :last_length] = room[last, :, :last_length]
                    room[last, :, :last_length] = 0
        self._renew_index()

    def mask(self, window: int) -> Tensor:
        """Which columns the next token of each row sees, itself among them: bool [b, 1, 1, n].

        Args:
            window: tokens that a layer looks at, 0 = all.
        """
        column = torch.arange(max(self.lengths) + 1, device=self.columns.device)
        seen = column <= self.columns[:, None]
        if window:
            seen &= column > self.columns[:, None] - window
        return seen[:, None, None]

    def step(self) -> None:
        """Every row has one token more, which the model has written."""
        self.lengths = [length + 1 for length in self.lengths]
        self.columns = self.columns + 1

    def _reserve(self, rows: int, columns: int, cells: int) -> None:
        """Memory for so many rows and columns, if there is less."""
        held_rows, _, held_columns, _ = self.layers[0].key_room.shape
        if held_rows >= rows and held_columns >= columns:
            return
        # More rows than asked for, so that not each new row moves all others.
        wanted = max(held_rows, 2 ** (rows - 1).bit_length()), max(held_columns, columns)
        if wanted[0] * wanted[1] > cells:
            wanted = rows, columns
        for layer in self.layers:  # beside all of the old memory there is one layer of the new
            layer.key_room = _resized(layer.key_room, *wanted)
            layer.value_room = _resized(layer.value_room, *wanted)

    def _renew_index(self) -> None:
        device = self.layers[0].key_room.device
        self.columns = torch.tensor(self.lengths, dtype=torch.int64).to(device)
        self.rows = torch.arange(len(self.lengths), device=device)


@once
def _row_layer_class() -> Any:
    """A layer of a `RowCache` as transformers calls it. Made on first use: transformers loads slowly."""
    from transformers.cache_utils import DynamicLayer

    class RowLayer(DynamicLayer):
        def __init__(self, layer: Any, of: RowCache) -> None:
            super().__init__()
            self.of = of
            self.window = layer.sliding_window if layer.is_sliding else 0
            # Zeros and not whatever memory holds: what a mask hides is multiplied by 0, and must be finite.
            self.key_room = layer.keys.new_zeros(0, layer.keys.shape[1], 0, layer.keys.shape[3])
            self.value_room = layer.values.new_zeros(0, layer.values.shape[1], 0, layer.values.shape[3])
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            """Write a token of each row [b, h, 1, d]; return the keys and values of all columns [b, h, n, d]."""
            rows, columns = len(self.of.lengths), max(self.of.lengths) + 1
            place = (self.of.rows, slice(None), self.of.columns)
            self.key_room[place] = key_states[:, :, 0]
            self.value_room[place] = value_states[:, :, 0]
            return self.key_room[:rows, :, :columns], self.value_room[:rows, :, :columns]

        def get_seq_length(self) -> int:
            return max(self.of.lengths)

    return RowLayer


def _resized(memory: Tensor, rows: int, columns: int) -> Tensor:
    """Memory [rows, h, columns, d] with what is in another as far as both reach."""
    _, heads, _, width = memory.shape
    resized = memory.new_zeros(rows, heads, columns, width)
    rows, columns = min(rows, len(memory)), min(columns, memory.shape[2])
    resized[:rows, :, :columns] = memory[:rows, :, :columns]
    return resized
