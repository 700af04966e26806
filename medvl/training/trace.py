"""How long a computation will take, before there is any GPU: it runs on tensors without storage, its kernels are
counted with their FLOPs and bytes, and a GPU's rates make seconds of them. An estimate, no measurement."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_LAUNCH_SECONDS = 4e-6  # of the host for one kernel, through Python, autograd and the dispatcher
_COMPUTE_SHARE = 0.6  # of the peak, that large matrix products and attention reach
_BANDWIDTH_SHARE = 0.8  # of the bandwidth, that kernels that only move and add numbers reach
_HALF = (torch.bfloat16, torch.float16)
# They ask for memory, and no kernel runs.
_NO_KERNEL = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",  # a view whose schema does not say so
    "lift_fresh",
)
# They write, and what they are given is not read.
_ONLY_WRITE = ("zeros_like", "ones_like", "full_like", "zero_", "fill_", "new_zeros", "new_full", "new_ones")
# They read of a table as much as they write.
_GATHER = ("embedding", "index_select", "index", "gather")


@frozen(kw_only=True)
class Gpu:
    """Peak rates of a GPU: FLOPs a second of dense matrix products by dtype, bytes a second of its memory."""

    bfloat16: float
    tf32: float
    float32: float
    bandwidth: float

    def rate(self, dtype: str) -> float:
        """FLOPs a second; of a dtype that is not in the table, float32's."""
        return {"bfloat16": self.bfloat16, "float16": self.bfloat16, "tf32": self.tf32}.get(
            dtype, self.float32
        )


GPUS = {
    # NVIDIA H100 Tensor Core GPU datasheet, column SXM: with sparsity 1,979 and 989 TFLOP/s, half of it without.
    "h100": Gpu(bfloat16=989.5e12, tf32=494.5e12, float32=67e12, bandwidth=3.35e12),
    # NVIDIA H200 Tensor Core GPU datasheet, column SXM: the H100's cores, faster memory.
    "h200": Gpu(bfloat16=989.5e12, tf32=494.5e12, float32=67e12, bandwidth=4.8e12),
    # NVIDIA A100 Tensor Core GPU datasheet, column A100 80GB SXM.
    "a100": Gpu(bfloat16=312e12, tf32=156e12, float32=19.5e12, bandwidth=2.039e12),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: bfloat16 and TF32 with float32 accumulate, dense.
    "rtx4090": Gpu(bfloat16=165.2e12, tf32=82.6e12, float32=82.6e12, bandwidth=1.008e12),
}
ASSUMPTIONS = (
    f"{_COMPUTE_SHARE:.0%} of the peak in matrix products and attention, {_BANDWIDTH_SHARE:.0%} of the memory's "
    f"bandwidth elsewhere, {_LAUNCH_SECONDS * 1e6:.0f} us to launch a kernel"
)


def find_gpu(name: str) -> Gpu | None:
    """The GPU that a device's name speaks of, such as "NVIDIA H100 80GB HBM3"; None where no peak is known."""
    name = name.lower().replace(" ", "")
    is_slower = any(part in name for part in ("pcie", "nvl", "mig", "laptop", "4090d"))
    return next((gpu for key, gpu in GPUS.items() if key in name and not is_slower), None)


class Kernel(NamedTuple):
    """One operation of a GPU. `flops` are of matrix products, convolutions and attention, 0 for all others."""

    operation: str
    dtype: str
    flops: int
    bytes: int  # read and written


@frozen
class Work:
    """The kernels of a computation, and how often each runs (a float, where work was multiplied)."""

    count: dict[Kernel, float] = field(factory=dict)

    @property
    def kernels(self) -> float:
        return sum(self.count.values())

    @property
    def flops(self) -> float:
        """As `torch.utils.flop_counter`: a multiplication and an addition are two, causal attention is whole."""
        return sum(kernel.flops * times for kernel, times in self.count.items())

    @property
    def flops_of_dtype(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for kernel, times in self.count.items():
            if kernel.flops:
                total[kernel.dtype] += kernel.flops * times  # type: ignore[assignment]
        return dict(total)

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes * times for kernel, times in self.count.items())

    @property
    def operations(self) -> dict[str, float]:
        """{operation: kernels}, most first."""
        total: Counter[str] = Counter()
        for kernel, times in self.count.items():
            total[kernel.operation] += times  # type: ignore[assignment]
        return dict(total.most_common())

    def seconds(self, gpu: Gpu) -> float:
        """On a GPU: each kernel computes or moves memory, whichever takes longer; together no less than the host
        needs to launch them."""
        busy = 0.0
        for kernel, times in self.count.items():
            compute = kernel.flops / (gpu.rate(kernel.dtype) * _COMPUTE_SHARE)
            move = kernel.bytes / (gpu.bandwidth * _BANDWIDTH_SHARE)
            busy += times * max(compute, move)
        return max(busy, self.launch_seconds)

    def peak_seconds(self, gpu: Gpu) -> float:
        """If a GPU computed its FLOPs at the peak rate of their dtypes, and did nothing else."""
        return sum(flops / gpu.rate(dtype) for dtype, flops in self.flops_of_dtype.items())

    @property
    def launch_seconds(self) -> float:
        """Of the host, to launch all kernels."""
        return self.kernels * _LAUNCH_SECONDS

    def __add__(self, other: "Work") -> "Work":
        count = dict(self.count)
        for kernel, times in other.count.items():
            count[kernel] = count.get(kernel, 0) + times
        return Work(count)

    def __mul__(self, times: float) -> "Work":
        return Work({kernel: n * times for kernel, n in self.count.items()})

    def __sub__(self, other: "Work") -> "Work":
        count = (self + other * -1).count
        return Work({kernel: times for kernel, times in count.items() if times})


def count_work(call: Callable[[], Any]) -> Work:
    """The work of a call whose tensors lie on the device "meta"."""
    counter = WorkCounter()
    with counter, gpu_kernels(counter):
        call()
    return counter.work()


class WorkCounter(TorchDispatchMode):
    """While it is entered, every kernel on tensors of the device "meta" is counted."""

    def __init__(self) -> None:
        super().__init__()
        self._count: Counter[Kernel] = Counter()

    def work(self) -> Work:
        """What was counted so far."""
        return Work(dict(self._count))

    def add(self, kernel: Kernel) -> None:
        self._count[kernel] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.record(func, args, kwargs, result)
        return result

    def record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operation that was run."""
        inputs = _meta_tensors((args, kwargs))
        outputs = _meta_tensors(result)
        operation = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        # A copy from another device is no kernel, and waits for nothing if memory is pinned.
        is_copy_from_host = operation == "_to_copy" and not inputs
        if is_view or is_copy_from_host or operation in _NO_KERNEL or not (inputs or outputs):
            return
        flops = 0
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
        dtype = _dtype_of(inputs or outputs)
        # cudnn's default; of matrix products TF32 must be asked for.
        if flops and dtype == "float32" and "conv" in operation:
            dtype = "tf32"
        self.add(Kernel(operation, dtype, int(flops), _bytes_of(operation, inputs, outputs)))


@contextmanager
def gpu_kernels(counter: WorkCounter | None = None) -> Iterator[None]:
    """On "meta", attention is one kernel and autocast casts, as on a GPU.

    torch takes attention apart on "meta", and knows no autocast there. Products that are written as `@` or by einsum
    keep their dtype.

    Args:
        counter: attention is added to it; other operations it sees by itself.
    """
    casts = _Casts()
    attention = F.scaled_dot_product_attention

    def one_kernel(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not q.is_meta:
            return attention(q, k, v, *args, **kwargs)
        q, k, v = (casts.lower(t) for t in (q, k, v))
        return _Attention.apply(q, k, v, counter)

    # Not by a function mode: that would not last into what autograd computes again.
    replaced = {
        (F, "scaled_dot_product_attention"): one_kernel,
        (F, "linear"): casts.with_lower_inputs(F.linear),
        (F, "conv2d"): casts.with_lower_inputs(F.conv2d),
        (F, "conv3d"): casts.with_lower_inputs(F.conv3d),
        (torch, "clear_autocast_cache"): casts.clear,
    }
    originals = {(owner, name): getattr(owner, name) for owner, name in replaced}
    for (owner, name), function in replaced.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in originals.items():
            setattr(owner, name, function)


class _Casts:
    """What autocast does to inputs of products: cast to 16 bits, each weight once until autocast ends."""

    def __init__(self) -> None:
        self._cached: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # id -> (the weight, cast); the weight keeps its id
        self._clear = torch.clear_autocast_cache

    def clear(self) -> None:
        self._cached.clear()
        self._clear()

    def lower(self, item: Any) -> Any:
        # `gradients.autocast` enters that of the CPU for "meta".
        if not torch.is_autocast_enabled("cpu"):
            return item
        # A lazy weight, which is a subclass, casts what it is made from by itself.
        if type(item) not in (Tensor, torch.nn.Parameter) or not item.is_meta or item.dtype != torch.float32:
            return item
        if id(item) in self._cached:
            return self._cached[id(item)][1]
        lower = item.to(torch.get_autocast_dtype("cpu"))
        if item.is_leaf and item.requires_grad:
            self._cached[id(item)] = (item, lower)
        return lower

    def with_lower_inputs(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            lower_args = [self.lower(item) for item in args]
            return function(*lower_args, **{name: self.lower(item) for name, item in kwargs.items()})

        return call


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, counter: WorkCounter | None) -> Tensor:
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device="meta")
        # What the backward pass of a fused kernel needs: inputs, output and, in float32, the log-sum-exp of
        # every query [..., n]; the weights [..., n, n] are computed again.
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device="meta"))
        ctx.counter = counter
        products = q.shape[-1] + v.shape[-1]  # q k and its softmax with v
        _count_attention(counter, "attention", q, k, products, [q, k, v, out])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors[:4]
        # q k once more; the gradients by the weights, v, q and k.
        products = 3 * q.shape[-1] + 2 * v.shape[-1]
        _count_attention(ctx.counter, "attention_backward", q, k, products, [q, k, v, out, grad, q, k, v])
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _count_attention(
    counter: WorkCounter | None, operation: str, q: Tensor, k: Tensor, products: int, moved: list[Tensor]
) -> None:
    pairs = q.shape[:-1].numel() * k.shape[-2]
    nbytes = sum(t.numel() * t.itemsize for t in moved)
    kernel = Kernel(operation, str(q.dtype).removeprefix("torch."), 2 * pairs * products, nbytes)
    if counter is not None:
        counter.add(kernel)


def _meta_tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree] if tree.is_meta else []
    # Arguments of operators are nothing deeper than these; torch's own walk is several times slower.
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if not isinstance(tree, list | tuple):
        return []
    found: list[Tensor] = []
    for item in tree:
        found += _meta_tensors(item)
    return found


def _dtype_of(tensors: list[Tensor]) -> str:
    floating = [t for t in tensors if t.is_floating_point()]
    return str((floating or tensors)[0].dtype).removeprefix("torch.")


def _bytes_of(operation: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = sum(_nbytes(t) for t in outputs)
    if operation in _ONLY_WRITE:
        return written
    if operation in _GATHER:
        return 2 * written
    return written + sum(_nbytes(t) for t in inputs)


def _nbytes(tensor: Tensor) -> int:
    # An expanded tensor has more numbers than its storage.
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
