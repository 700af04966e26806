"""How much memory a computation will need and how long it will take, before there is any: it runs on tensors
without storage, and what is alive and what runs is counted."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from medvl.base import transfer
from medvl.training import trace
from medvl.weights import lazy

_SMALL = 2**24  # values of an index tensor that are followed


class Ledger(TorchDispatchMode):
    """While it is entered, every storage that appears is counted with its size, and no more when it goes.

    Tensors on the meta device stand for what will be on the accelerator, and only they are counted. Index
    tensors and masks may be real; their values are followed when they move to meta and through arithmetic
    with each other, so that a model may look at them.
    """

    def __init__(self, counter: trace.WorkCounter | None = None) -> None:
        super().__init__()
        self._counter = counter  # is told of every operation
        # A storage is known by a running number: addresses are used again.
        self._events: list[tuple[int, int]] = []  # (storage, +bytes or -bytes)
        self._alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._numbers: dict[int, int] = {}  # address of a storage object -> its number
        self._parts: dict[int, str] = {}  # number -> part

    def enter_as(self, part: str, tree: Any) -> None:
        """Enter tensors that exist already, under the name of a part."""
        for tensor in _tensors(tree):
            self._parts[self._enter(tensor)] = part

    def alive(self) -> int:
        """Bytes of all that is alive now."""
        return sum(size for _, size in self._events)

    def peak(self) -> dict[str, int]:
        """Bytes by part at the moment when most were alive; what was never named is "activations and
        gradients"."""
        now: Counter[str] = Counter()
        top: Counter[str] = Counter()
        for number, size in self._events:
            now[self._parts.get(number, "activations and gradients")] += size
            if size > 0 and now.total() > top.total():
                top = now.copy()
        return {part: size for part, size in top.items() if size}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        # `.item()` and its like: a model that looks at a value gets it only where the value was followed.
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(_value(inputs[0], must=True))
        on_meta = any(tensor.is_meta for tensor in inputs) or str(kwargs.get("device")) == "meta"
        if not on_meta:
            return func(*args, **kwargs)
        # Where a mask is true decides the shape, so that only its values can tell.
        if func is torch.ops.aten.nonzero.default:
            positions = func(_value(inputs[0], must=True))
            result = positions.to("meta")
            result._value = positions
            self._enter(result)
            return result
        # The operator runs without storage; only shapes and dtypes come out.
        if all(tensor.is_meta for tensor in inputs):
            result = func(*args, **kwargs)
        else:
            result = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        if self._counter is not None:
            self._counter.record(func, args, kwargs, result)
        # The same operator runs once more, on the known values; masks and indices are small enough for that.
        if _is_small_index(result) and _are_followed(inputs):
            on_cpu = {}
            for name, value in kwargs.items():
                on_cpu[name] = torch.device("cpu") if name == "device" else value
            result._value = func(*tree_map(_value, args), **tree_map(_value, on_cpu))
        for tensor in _tensors(result):
            self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> int:
        if not tensor.is_meta:
            return -1
        storage = tensor.untyped_storage()
        key = id(storage)
        # The address alone does not tell: a new storage may lie where one was that is gone.
        if self._alive.get(key) is storage:
            return self._numbers[key]
        # Events are only ever added, so their count is a number that no storage has had.
        number, size = len(self._events), storage.nbytes()
        self._alive[key], self._numbers[key] = storage, number
        self._events.append((number, size))
        # The negative event is added when the last tensor on this storage is collected.
        weakref.finalize(storage, self._events.append, (number, -size))
        return number


@frozen(kw_only=True)
class Step:
    """A training step of one process: what it takes, estimated."""

    memory: dict[str, int]  # {part: bytes} at the peak
    work: trace.Work
    samples: int  # conversations or volumes
    tokens: float = 0.0  # of text, padding included

    def rates(self, gpu: trace.Gpu) -> dict[str, float]:
        """{"seconds", "samples_per_second", and "tokens_per_second" where there are some} on a GPU."""
        seconds = self.work.seconds(gpu)
        rates = {"seconds": seconds, "samples_per_second": self.samples / seconds}
        if self.tokens:
            rates["tokens_per_second"] = self.tokens / seconds
        return rates


class Laps:
    """The work of a step that has more chunks than were traced.

    `mark` is called when a chunk begins. Chunks of a kind do the same work, so that the work of any number of them
    follows from that of two.
    """

    def __init__(self) -> None:
        self.counter = trace.WorkCounter()
        self._starts: list[trace.Work] = []

    def mark(self) -> None:
        self._starts.append(self.counter.work())

    def last_of(self, kind: slice) -> trace.Work:
        """The work of the last chunk whose end is known too, of those that began in `kind`."""
        before, after = self._starts[kind][-2:]
        return after - before

    def work(self, more: float, kinds: Sequence[slice] = (slice(None),)) -> trace.Work:
        """All that was counted, and `more` chunks of each of these kinds."""
        total = self.counter.work()
        for kind in kinds if more and len(self._starts) > 1 else ():
            total += self.last_of(kind) * more
        return total


def peak_of(
    call: Callable[[], Any], existing: Mapping[str, Any], counter: trace.WorkCounter | None = None
) -> dict[str, int]:
    """Bytes by part at the peak of `call()`; `existing` are the tensors that are there before it, by part.

    Kernels' own scratch memory is not seen, nor what a caching allocator keeps; add a tenth for both.

    Args:
        counter: counts the work of the call.
    """
    ledger = Ledger(counter)
    for part, tree in existing.items():
        ledger.enter_as(part, tree)
    with ledger, trace.gpu_kernels(counter), transfer.allocated_on_meta(ledger.alive):
        call()
    return ledger.peak()


def _is_small_index(item: Any) -> bool:
    return isinstance(item, Tensor) and not item.is_floating_point() and item.numel() <= _SMALL


def _are_followed(inputs: list[Tensor]) -> bool:
    """Whether the values of all inputs are known, and are indices or masks."""
    return all(_value(tensor) is not None and not tensor.is_floating_point() for tensor in inputs)


def gathered(part: Tensor, rows: int) -> Tensor:
    """A matrix [rows, d] cut over processes, of which `part` lies here: whole while it is used, and so is
    its gradient until it is cut."""
    # Lazy, so that the whole matrix exists on meta only from its use to the end of that use.
    return _Part.like((rows, *part.shape[1:]), part.dtype, part.device, shard=part)


class _Part(lazy.Sharded):
    def dense(self) -> Tensor:
        return _Gather.apply(self.shard, self.shape)

    def _about(self) -> str:
        return f"{list(self.shape)}, {str(self.dtype)[6:]}, {len(self.shard)} rows of it here"


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: torch.Size) -> Tensor:
        ctx.shape = part.shape
        return part.new_empty(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Reduce-scatter: a process keeps the gradient of its own rows only.
        return grad.new_empty(ctx.shape), None


def _tensors(tree: Any) -> Iterator[Tensor]:
    # A lazy weight (4 bits, a low-rank sum) takes the memory of the tensors it is made from.
    if isinstance(tree, lazy.Lazy):
        yield from lazy.leaves(tree)
    elif isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for v in tree.values():
            yield from _tensors(v)
    elif isinstance(tree, list | tuple):
        for v in tree:
            yield from _tensors(v)


def _value(item: Any, must: bool = False) -> Any:
    """The values of a tensor, None where they are not known; anything else as it is."""
    if not isinstance(item, Tensor) or not item.is_meta:
        return item
    value = getattr(item, "_value", None)
    if must and value is None:
        raise ValueError(
            f"estimate: the model looks at the values of a tensor {list(item.shape)} {str(item.dtype)[6:]}, "
            "which has none here"
        )
    return value


def _to_meta(item: Any) -> Any:
    """A tensor on meta. Scalars stay: their values decide what an operator does, and they take no memory."""
    if not isinstance(item, Tensor) or isinstance(item, lazy.Lazy) or item.is_meta or not item.dim():
        return item
    return item.to("meta")
