"""A GPU that is not there: tensors that say they lie on cuda:0 while the CPU holds them.

Every operation is checked for the devices of what it is given, every wait for the device is counted, and results
have values. It needs neither a GPU nor a CUDA build of torch. What it cannot see: the casts of autocast, kernels
that CUDA lacks, results that differ from run to run, memory.

How: each such tensor is a wrapper whose device is "meta" for torch's C++ side (autograd runs such nodes in the
calling thread and asks no driver) and "cuda:0" for Python; its values lie in a CPU tensor inside. Python's questions
arrive in `Pretend.ask`, the operations of C++ in `Pretend.run`.
"""

import contextlib
import functools
import traceback
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from medvl.components import losses
from medvl.training import optim

GPU = torch.device("cuda", 0)
META = torch.device("meta")
CPU = torch.device("cpu")

_aten = torch.ops.aten
# Operations that may have tensors of two devices.
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put_.default,
    _aten.index_put.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
# Operations after which the host waits, because the size of their result, or the result itself, is known to the
# device alone.
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "repeat_interleave.Tensor",
    "equal",
    "is_nonzero",
    "bincount",
    "linalg_svd",
    "_linalg_svd",
    "linalg_qr",
    "_linalg_eigh",
    "_linalg_det",
    "linalg_inv_ex",
    "histc",
}
_ACTIVE: "Pretend | None" = None


class OnGpu(Tensor):
    """A tensor that says it lies on cuda:0."""

    values: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, values):
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=META,
        )
        wrapper.values = values
        return wrapper

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # Called where the mode is switched off: inside another overridden function.
        if any(not issubclass(cls, kind) for kind in types):
            return NotImplemented  # another kind of tensor answers for both
        with torch._C.DisableTorchFunctionSubclass():
            if _ACTIVE is not None:
                return _ACTIVE.ask(func, args, dict(kwargs or {}))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if _ACTIVE is None:
            return NotImplemented
        return _ACTIVE.run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None):
        return f"OnGpu({self.values!r})"


class _Operations(TorchDispatchMode):
    """Sends also those operations to `Pretend.run` that have no tensor of the GPU among their arguments."""

    def __init__(self, gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._gpu.run(func, args, kwargs or {})


class Pretend(TorchFunctionMode):
    """`with Pretend() as gpu: ...`; afterwards `gpu.count["wait"]`, `gpu.count["launch"]`, `gpu.bytes["to"]`.

    Attributes:
        count: "wait": how often the host waited; "launch": kernels; "copies to the GPU", "copies from the GPU";
            "op NAME": calls of an operation.
        bytes: copied "to" and "from" the GPU.
        waits: {"operation @ file:line code": how often}, where `trace` is set.
        autocasts: (device type, enabled) of every autocast that was entered.
        free_bytes: what the GPU says is free; may be set.
        seeds: of the generators that lie on the GPU; a CUDA generator cannot be made here, so that one of the CPU
            stands for it.
    """

    def __init__(self, *, trace=False):
        super().__init__()
        self.count, self.bytes, self.waits = Counter(), Counter(), Counter()
        self.autocasts, self.seeds = [], set()
        self.free_bytes = 2**36
        self._pinned = {}  # memory that is pinned: {address: its storage, which keeps the address from being reused}
        self._copies_under_way = []  # (copy, its values)
        self._trace = trace
        self._asked_for_meta = 0  # depth of calls that really ask for the device "meta"

    # What Python asks ---------------------------------------------------------------------------------------
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.ask(func, args, dict(kwargs or {}))

    def ask(self, func, args, kwargs):
        """Answer a call of torch from Python: properties here, operations as if the device were "meta"."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        name = getattr(func, "__name__", "")
        if isinstance(first, OnGpu):
            handled, answer = self._ask_tensor(func, name, first)
            if handled:
                return answer
            # A list becomes an index tensor inside C++, which on "meta" would have no values.
            if name in ("__getitem__", "__setitem__"):
                args = (first, _index_of_tensors(args[1]), *args[2:])
        if func is torch.device or (first is None and name in ("get_device_module", "is_autocast_enabled")):
            return func(*args, **kwargs)
        if name == "cuda":
            return OnGpu(first)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_gpu(kwargs.get("device")):
            return self._from_data(func, args, kwargs)
        devices = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device | str)]
        if not devices:
            return func(*args, **kwargs)
        asks_for_meta = any(_is_meta(value) for value in devices)
        if not asks_for_meta:
            args = tuple(META if _is_gpu(value) else value for value in args)
            kwargs = {key: META if _is_gpu(value) else value for key, value in kwargs.items()}
        self._asked_for_meta += asks_for_meta
        try:
            return func(*args, **kwargs)
        finally:
            self._asked_for_meta -= asks_for_meta

    def _ask_tensor(self, func, name, tensor):
        """(True, answer) of what a tensor of the GPU says of itself; (False, None) of anything else."""
        if name == "__get__":
            owner = getattr(func, "__self__", None)
            if owner is Tensor.device:
                return True, GPU
            if owner is Tensor.is_cuda:
                return True, True
            if owner in (Tensor.is_meta, Tensor.is_cpu):
                return True, False
        if name == "get_device":
            return True, 0
        if name in ("numpy", "__array__"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                "memory first."
            )
        if name == "tolist":
            self._wait("tolist")
            return True, tensor.values.detach().tolist()
        if name == "data_ptr":
            return True, tensor.values.data_ptr()
        if name == "cuda":
            return True, tensor
        return False, None

    def _from_data(self, func, args, kwargs):
        """`torch.tensor(data, device="cuda")` and its like."""
        kwargs.pop("device")
        if isinstance(args[0], OnGpu):
            return args[0].clone() if func is torch.tensor else args[0]
        made = func(*args, **kwargs)
        self._count_copy(made, "to")
        return OnGpu(made.detach()).requires_grad_(made.requires_grad)

    # What the C++ side does ---------------------------------------------------------------------------------
    def run(self, func, args, kwargs):
        """Run an operation on the values, after a look at the devices of its arguments."""
        tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        device = kwargs.get("device")
        makes_on_gpu = (
            device is not None
            and torch.device(device).type == "meta"
            and not (self._asked_for_meta and not on_gpu)
        )
        if not on_gpu and not makes_on_gpu:
            return func(*args, **kwargs)
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        self._check_devices(func, args, tensors, on_gpu)
        generator = kwargs.get("generator")
        if generator is not None and generator.initial_seed() not in self.seeds:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
        name = _name(func)
        if _waits(func, name, args):
            self._wait(name)
        if "device" in kwargs:
            kwargs = kwargs | {"device": CPU}
        out = func(*_change_leaves(_values, args), **_change_leaves(_values, kwargs))
        if not _is_view(func):
            self.count["launch"] += 1
            self.count[f"op {name}"] += 1
        written = _written_arguments(func, args, kwargs)
        for tensor in written:
            if tensor.values.shape != tensor.shape:
                raise NotImplementedError(f"{func} changes a shape in place")
        # What is written in place is returned as the same tensor.
        if written and isinstance(out, Tensor):
            return written[0]
        if written and not _leaves(out):
            return out
        return _change_leaves(_onto_gpu, out)

    def _check_devices(self, func, args, tensors, on_gpu):
        others = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        if not on_gpu:
            if others:
                raise RuntimeError(f"{func}: device cuda:0 is asked for of CPU tensors")
            return
        # Scalars of the CPU may take part everywhere.
        strangers = [tensor for tensor in others if tensor.dim() > 0]
        # Torch moves indices that lie on the CPU itself, which is a copy that the host waits for.
        if strangers and func in _INDEXING and isinstance(args[0], OnGpu):
            indices = [leaf for leaf in _leaves(args[1]) if isinstance(leaf, Tensor)]
            if all(any(tensor is index for index in indices) for tensor in strangers):
                self.count["index from the CPU"] += 1
                self._wait("index")
                return
        if strangers:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"{strangers[0].device}! ({func}, {shapes})"
            )

    def _copy(self, func, args, kwargs):
        if kwargs.get("non_blocking") and isinstance(args[0], OnGpu) and _goes_to_cpu(func, kwargs):
            return self._copy_later(args[0], kwargs.get("dtype"))
        if func is _aten._to_copy.default:
            source, device = args[0], kwargs.get("device")
            was_there = isinstance(source, OnGpu)
            goes_there = was_there if device is None else torch.device(device).type == "meta"
            if device is not None:
                kwargs = kwargs | {"device": CPU}
            made = func(_values(source), **kwargs)
            if goes_there != was_there:
                self._count_copy(source, "to" if goes_there else "from", kwargs.get("non_blocking", False))
            else:
                self.count["launch"] += 1
                self.count["op cast"] += 1
            return OnGpu(made) if goes_there else made
        target, source = args[0], args[1]
        if isinstance(target, OnGpu) != isinstance(source, OnGpu):
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            self._count_copy(source, "to" if isinstance(target, OnGpu) else "from", non_blocking)
        else:
            self.count["launch"] += 1
        func(_values(target), _values(source), *args[2:], **kwargs)
        return target

    def _copy_later(self, source, dtype):
        """A copy that has its values once an event behind it has been waited for; torch pins its memory."""
        made = torch.zeros(source.shape, dtype=dtype or source.dtype)
        self.count["copies from the GPU"] += 1
        self.bytes["from"] += made.numel() * made.element_size()
        self._copies_under_way.append((made, source.values.clone()))
        return made

    # What is counted ----------------------------------------------------------------------------------------
    def _wait(self, why):
        self.count["wait"] += 1
        if not self._trace:
            return
        ours = []
        for frame in traceback.extract_stack():
            if "/medvl/" in frame.filename or "/transformers/" in frame.filename:
                ours.append(frame)
        place = "?"
        if ours:
            file = ours[-1].filename.rpartition("/")[2]
            place = f"{file}:{ours[-1].lineno} {ours[-1].line[:90]}"
        self.waits[f"{why} @ {place}"] += 1

    def _count_copy(self, tensor, direction, non_blocking=False):
        self.count[f"copies {direction} the GPU"] += 1
        self.bytes[direction] += tensor.numel() * tensor.element_size()
        # The host waits for a copy of memory that is not pinned, and for what it is to read.
        if not (non_blocking and direction == "to" and self._is_pinned(tensor)):
            self._wait(f"copy {direction} the GPU")

    def _pin(self, tensor):
        if isinstance(tensor, OnGpu):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        pinned = tensor.detach().clone()
        storage = pinned.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return pinned

    def _is_pinned(self, tensor):
        return not isinstance(tensor, OnGpu) and tensor.untyped_storage().data_ptr() in self._pinned

    # What torch has besides ---------------------------------------------------------------------------------
    def __enter__(self):
        global _ACTIVE
        self._patches = contextlib.ExitStack()
        patch = self._patches.enter_context
        patch(
            mock.patch.object(
                torch.cuda, "get_rng_state", side_effect=lambda device=None: torch.get_rng_state()
            )
        )
        patch(mock.patch.object(torch.cuda, "set_rng_state"))
        patch(mock.patch.object(torch.cuda, "default_generators", (torch.Generator(),)))
        # On the class, since batches are pinned in a thread, where this mode is not asked.
        patch(mock.patch.object(Tensor, "pin_memory", lambda tensor, device=None: self._pin(tensor)))
        patch(mock.patch.object(Tensor, "is_pinned", lambda tensor, device=None: self._is_pinned(tensor)))
        free = lambda device=None: (self.free_bytes, 2**36)
        patch(mock.patch.object(torch.cuda, "mem_get_info", free))
        patch(mock.patch.object(torch.cuda, "current_stream"))
        patch(mock.patch.object(torch.cuda, "Event", functools.partial(_Event, self)))
        patch(mock.patch.object(torch.autocast, "__init__", self._recording(torch.autocast.__init__)))
        # Otherwise this mode would be off while a checkpointed layer is computed again.
        patch(mock.patch.object(torch.autograd, "has_torch_function", return_value=False))
        patch(mock.patch.object(torch, "save", self._saving(torch.save)))
        patch(mock.patch.object(torch, "load", _loading(torch.load)))
        # Checkpointing compares the devices of what it recomputes in a place where this mode is not asked.
        without_device = {"default": lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}}
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        patch(mock.patch.dict(checks, without_device))
        patch(_Operations(self))
        _ACTIVE = self
        return super().__enter__()

    def __exit__(self, *error):
        global _ACTIVE
        super().__exit__(*error)
        self._patches.close()
        _ACTIVE = None

    def _recording(self, real_init):
        """`torch.autocast.__init__` that notes the device, and casts nothing for the GPU."""

        def init(autocast, device_type, *args, **kwargs):
            self.autocasts.append((device_type, kwargs.get("enabled", True)))
            if device_type == "cuda":
                kwargs = kwargs | {"enabled": False}
            real_init(autocast, device_type, *args, **kwargs)

        return init

    def _saving(self, real_save):
        def save(content, *args, **kwargs):
            for leaf in tree_leaves(content):
                if isinstance(leaf, OnGpu):
                    self._count_copy(leaf, "from")
            real_save(tree_map(_values, content), *args, **kwargs)

        return save


class _Event:
    """An event in the queue of the GPU."""

    def __init__(self, gpu):
        self._gpu = gpu

    def record(self, stream=None):
        self._launches = self._gpu.count["launch"]
        self._copies, self._gpu._copies_under_way = self._gpu._copies_under_way, []

    def synchronize(self):
        # While there is other work in the queue, the GPU does not run dry.
        if self._gpu.count["launch"] == self._launches:
            self._gpu._wait("event")
        for copy, values in self._copies:
            copy.copy_(values)


def _loading(real_load):
    def load(file, map_location=None, **kwargs):
        if not _is_gpu(map_location):
            return real_load(file, map_location=map_location, **kwargs)
        return tree_map(_onto_gpu, real_load(file, map_location="cpu", **kwargs))

    return load


def _waits(func, name, args):
    if name in _WAITING or (name.split(".")[0] in _WAITING and name != "repeat_interleave.self_int"):
        return True
    # A mask as an index is turned into positions, whose number only the device knows.
    return func in _INDEXING and any(
        isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in _leaves(args[1])
    )


@functools.cache
def _name(func):
    return str(func).removeprefix("aten.").removesuffix(".default")


@functools.cache
def _is_view(func):
    return any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)


def _written_arguments(func, args, kwargs):
    """Tensors of the GPU that an operation writes into."""
    written = []
    for place in _written_places(func):
        if isinstance(place, str):
            written.append(kwargs.get(place))
        elif place < len(args):
            written.append(args[place])
    return [leaf for leaf in _leaves(written) if isinstance(leaf, OnGpu)]


@functools.cache
def _written_places(func):
    """Numbers or names of the arguments that an operation writes into."""
    places = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            places.append(argument.name if argument.kwarg_only else i)
    return places


# Torch's own functions for trees take longer than the operations, whose arguments are lists and dicts at most.
def _leaves(tree):
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return [] if tree is None else [tree]
    found = []
    for part in tree:
        if isinstance(part, tuple | list | dict):
            found += _leaves(part)
        elif part is not None:
            found.append(part)
    return found


def _change_leaves(change, tree):
    if isinstance(tree, dict):
        return {key: _change_leaves(change, part) for key, part in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([_change_leaves(change, part) for part in tree])
    return change(tree)


def _index_of_tensors(index):
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
    return parts if isinstance(index, tuple) else parts[0]


def _values(leaf):
    return leaf.values if isinstance(leaf, OnGpu) else leaf


def _onto_gpu(leaf):
    return OnGpu(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, OnGpu) else leaf


def _goes_to_cpu(func, kwargs):
    device = kwargs.get("device")
    return func is _aten._to_copy.default and device is not None and torch.device(device).type == "cpu"


def _is_gpu(device):
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _is_meta(device):
    if isinstance(device, torch.device):
        return device == META
    return isinstance(device, str) and device == "meta"


@contextlib.contextmanager
def pretended_gpu():
    """`with pretended_gpu() as gpu`: medvl on a GPU that is not there, with two places where a wrapper cannot stand
    for a tensor of CUDA."""
    gpu, real_seeded = Pretend(trace=True), optim.seeded

    def seeded(device, *key):
        gen = real_seeded(CPU, *key)
        if device.type == "cuda":
            gpu.seeds.add(gen.initial_seed())
        return gen

    # `token_cross_entropy` asks for a plain tensor or a Parameter by its exact type.
    parameter = SimpleNamespace(Parameter=OnGpu)
    with mock.patch.object(losses, "nn", parameter), mock.patch.object(optim, "seeded", seeded), gpu:
        yield gpu
