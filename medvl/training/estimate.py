"""How much memory a computation will need, before there is any: it runs on tensors without storage, and what is alive is counted."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from medvl.weights import lazy

_SMALL = 2**24  # values of an index tensor that are followed


class Ledger(TorchDispatchMode):
    """While it is entered, every storage that appears is entered with its size and struck out when it goes.

    Tensors on the meta device stand for what will be on the accelerator, and only they are counted. Index tensors and masks may be real;
    their values are followed when they move to meta and through arithmetic with each other, so that a model may look at them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []  # (storage, +bytes or -bytes)
        self._held: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._numbers: dict[int, int] = {}  # address of a storage object -> its number
        self._names: dict[int, str] = {}  # number -> part

    def enter_as(self, part: str, tree: Any) -> None:
        """Enter tensors that exist already, under the name of a part."""
        for t in _tensors(tree):
            self._names[self._enter(t)] = part

    def peak(self) -> dict[str, int]:
        """Bytes by part at the moment when most were alive; what was never named is "activations and gradients"."""
        now: Counter[str] = Counter()
        top: Counter[str] = Counter()
        for number, size in self._events:
            now[self._names.get(number, "activations and gradients")] += size
            if size > 0 and now.total() > top.total():
                top = now.copy()
        return {part: n for part, n in top.items() if n}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = list(_tensors((args, kwargs)))
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(_value(held[0], must=True))
        if not (any(t.is_meta for t in held) or str(kwargs.get("device")) == "meta"):
            return func(*args, **kwargs)
        value = None
        if all(_value(t) is not None for t in held) and not any(t.is_floating_point() for t in held):
            known = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
            value = lambda: func(*tree_map(_value, args), **tree_map(_value, known))
        out = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        if (
            value is not None
            and isinstance(out, Tensor)
            and not out.is_floating_point()
            and out.numel() <= _SMALL
        ):
            out._value = value()  # type: ignore[attr-defined]
        for t in _tensors(out):
            self._enter(t)
        return out

    def _enter(self, t: Tensor) -> int:
        if not t.is_meta:
            return -1
        storage = t.untyped_storage()
        key = id(storage)
        if self._held.get(key) is storage:
            return self._numbers[key]
        number, size = len(self._events), storage.nbytes()
        self._held[key], self._numbers[key] = storage, number
        self._events.append((number, size))
        weakref.finalize(storage, self._events.append, (number, -size))
        return number


def peak_of(call: Callable[[], Any], known: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by part at the peak of `call()`; `known` are the tensors that exist before it, by part.

    Kernels' own scratch memory is not seen, nor what a caching allocator keeps; add a tenth for both.
    """
    ledger = Ledger()
    for part, tree in known.items():
        ledger.enter_as(part, tree)
    with ledger, _fused_attention():
        call()
    return ledger.peak()


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On meta, torch writes attention out as products; devices run one kernel that never holds the weights of all pairs."""
    real = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Attention.apply(q, k, v) if q.is_meta else real(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]  # a function mode would not last into what autograd computes again
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


def gathered(part: Tensor, rows: int) -> Tensor:
    """A matrix [rows, d] cut over processes, of which `part` lies here: whole while it is used, and so is its gradient until it is cut."""
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
        return grad.new_empty(ctx.shape), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device="meta")
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device="meta"))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _tensors(tree: Any) -> Iterator[Tensor]:
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


def _value(t: Any, must: bool = False) -> Any:
    """What a tensor holds, None where that is not known; anything else as it is."""
    if not isinstance(t, Tensor) or not t.is_meta:
        return t
    found = getattr(t, "_value", None)
    if must and found is None:
        raise ValueError(
            f"estimate: the model looks at the values of a tensor {list(t.shape)} {str(t.dtype)[6:]}, which has none here"
        )
    return found


def _on_meta(t: Any) -> Any:
    return (
        t.to("meta")
        if isinstance(t, Tensor) and t.dim() and not t.is_meta and not isinstance(t, lazy.Lazy)
        else t
    )
