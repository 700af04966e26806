"""Weights that are not plain tensors: low-rank corrections, shards, stand-ins. A forward pass uses them like
any weight and knows of none.

A lazy weight is a tensor subclass without storage. It answers `F.linear` and `F.embedding` (and the `addmm`
of GPT-2's Conv1D) by what it holds, and the weights of all experts of a layer, [experts, out, in], what their
layers do with them; any other arithmetic is an error. Kinds nest: a low-rank correction over a 4-bit weight
(`four_bit.FourBit`) is QLoRA.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medvl.weights.rounding import HALF

_aten = torch.ops.aten
_linear = F.linear  # itself: an estimate (`training.trace`) has another in its place
# A parameter of a mixture model that holds the matrices of all experts of a layer.
EXPERTS = re.compile(r"(^|\.)experts\.\w+$")
# What layers do with such a parameter; grouped_mm has moved between versions of torch.
_GROUPED = [getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)]
_OF_EXPERTS = (
    *(Tensor.transpose, Tensor.__getitem__, torch.bmm, torch.matmul),
    *(function for function in _GROUPED if function is not None),
)
_COPIES = (
    _aten.detach.default,
    _aten.alias.default,
    _aten._to_copy.default,
    _aten.clone.default,
    _aten.view.default,
)


class Lazy(Tensor):
    """A weight that knows how to be used in a layer. The tensors it holds are its `parts`; it has the shape
    of the weight it stands for.
    """

    _parts: tuple[str, ...] = ()  # attributes that hold tensors (lazy ones among them) or None
    fixed = False  # whether nothing that it holds can be trained

    @classmethod
    def like(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, **attributes: Any
    ) -> "Lazy":
        # A wrapper has shape, dtype and device, but no memory of its own.
        w = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        w.__dict__.update(attributes)
        return w

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + bias`, x [..., in] -> [..., out]."""
        return F.linear(x, self.dense(), bias)

    def embedding(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The rows `ids` of the weight [v, d]."""
        return F.embedding(ids, self.dense(), *args, **kwargs)

    def product(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x W + bias` for a weight that lies as [in, out] (GPT-2's Conv1D)."""
        return torch.addmm(bias, x, self.dense())

    def dense(self) -> Tensor:
        """The weight as a plain tensor, where it is one."""
        raise ValueError(f"{self!r} has no plain tensor")

    def mapped(self, f: Callable[[Tensor], Tensor]) -> "Lazy":
        """The same weight with `f` applied to every tensor it holds."""
        attributes = dict(self.__dict__)
        for name in self._parts:
            if attributes[name] is not None:
                attributes[name] = f(attributes[name])
        tensors = [attributes[name] for name in self._parts if attributes[name] is not None]
        # The first part is the weight itself, or the base that it corrects, so it says dtype and device. Codes
        # stand for another dtype than that of their scales.
        dtype = self.dtype
        if not self.fixed:
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), self.dtype)
        return type(self).like(self.shape, dtype, tensors[0].device, **attributes)

    def moved(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> "Lazy":
        """The same weight elsewhere or in another precision."""
        return self.mapped(lambda t: _moved(t, dtype, device))

    def per_row(self, samples: Tensor) -> "Lazy":
        """The same weight for a batch whose row i belongs to sample `samples[i]`."""
        attributes = dict(self.__dict__)
        # Weights lie in one another, adapters over adapters, and each may have a gate per sample.
        for name in self._parts:
            if isinstance(attributes[name], Lazy):
                attributes[name] = attributes[name].per_row(samples)
        return type(self).like(self.shape, self.dtype, self.device, **attributes)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls instead of a function, such as F.linear, that is given a lazy weight."""
        kwargs = kwargs or {}
        if func is _linear and isinstance(args[1], Lazy):
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return weight.linear(x, bias)
        if func is F.embedding and isinstance(args[1], Lazy):
            ids, weight = args[:2]
            return weight.embedding(ids, *args[2:], **kwargs)
        if func is torch.addmm and len(args) == 3 and isinstance(args[2], Lazy) and not kwargs:
            bias, x, weight = args
            return weight.product(x, bias)
        # All else runs as torch has it; arithmetic on the weight then ends in `__torch_dispatch__`.
        with torch._C.DisableTorchFunctionSubclass():
            if func in _OF_EXPERTS:
                args = [_dense_experts(a) for a in args]
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Below autograd: copies and moves of a lazy weight work, any other operator raises."""
        kwargs = kwargs or {}
        # A view in another shape is no copy.
        changes_shape = func is _aten.view.default and args[0].shape != torch.Size(args[1])
        if func in _COPIES and isinstance(args[0], Lazy) and not changes_shape:
            if func is _aten.clone.default:
                return args[0].mapped(_cloned)
            return args[0].moved(kwargs.get("dtype"), kwargs.get("device"))
        weight = next(_lazies(args, kwargs))
        raise NotImplementedError(
            f"{func} meets {weight!r}, which supports only linear, embedding and addmm; lazy.dense(w) makes "
            "a plain tensor of it"
        )

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all that it holds."""
        return sum(t.nbytes for t in leaves(self))

    def requires_grad_(self, requires_grad: bool = True) -> "Lazy":
        raise TypeError(f"{self!r} has no gradient of its own; its parts may have")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self._about()})"

    def _about(self) -> str:
        return f"{list(self.shape)}, {str(self.dtype)[6:]}"

    # torch's own copies the storage, which a lazy weight does not have.
    def __deepcopy__(self, memo: dict) -> "Lazy":
        return self.mapped(lambda t: copy.deepcopy(t, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{self!r} is not saved as it is: write adapters with write_adapter, models with "
            "saving.save_skeleton"
        )


class LowRank(Lazy):
    """`W + B diag(gate) A`: what an adapter, or many at once, add to a base weight. Made by `low_rank`."""

    _parts = ("base", "a", "b", "gate", "router", "rows")

    base: Tensor
    a: Tensor
    b: Tensor
    gate: Tensor | None
    router: Tensor | None
    rows: Tensor | None
    scale: float
    kind: str
    dropout: float

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_adapter_in_training(x, bias):
            return _Corrected.apply(x, self._dropped(x), self.a, self.b, self.base, bias, self.scale)
        y = F.linear(x, self.base, bias)
        # A head that shares the table of an adapted embedding uses it without the correction.
        if self.kind == "embedding":
            return y
        return self._add(y, x)

    def product(self, x: Tensor, bias: Tensor) -> Tensor:
        return self._add(torch.addmm(bias, x, self.base), x)

    def embedding(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = F.embedding(ids, self.base, *args, **kwargs)
        # The other way round: an adapter of the head does not change the token table that it shares.
        if self.kind != "embedding":
            return y
        # Row i of A^T is what A makes of token i as a one-hot vector.
        h = F.embedding(ids, self.a.t())
        return (y + F.linear(self._gated(h, h), self.b)).to(y.dtype)

    def dense(self) -> Tensor:
        if self.router is not None:
            raise ValueError(f"{self!r} has no plain tensor: its correction depends on the token")
        if self.gate is not None and self.gate.dim() > 1:
            raise ValueError(f"{self!r} has no plain tensor: its correction depends on the sample")
        base = dense(self.base)  # may itself be four-bit or low-rank
        gate = self.scale if self.gate is None else self.gate * self.scale
        change = (self.b * gate) @ self.a  # [out, in], whatever way the base lies
        if self.kind != "linear":
            change = change.t()
        return (base + change).to(base.dtype)

    def per_row(self, samples: Tensor) -> "Lazy":
        weight: Any = super().per_row(samples)
        if self.gate is not None and self.gate.dim() == 2 and len(self.gate) > 1:
            # One gate for each row of the batch; `rows`, which sorts tokens to samples, has done its work.
            weight.gate = self.gate[samples.to(self.gate.device)]
            weight.rows = None
        return weight

    def _is_adapter_in_training(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the factors alone are trained, and all is of one 16-bit dtype. Wider sums keep the order
        of their terms, and so their bits."""
        plain = self.kind == "linear" and self.gate is None and self.router is None
        if not (plain and torch.is_grad_enabled() and x.dtype in HALF):
            return False
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return False
        base, terms = self.base, (self.a, self.b) if bias is None else (self.a, self.b, bias)
        base_is_fixed = base.fixed if isinstance(base, Lazy) else not base.requires_grad
        bias_is_fixed = bias is None or not bias.requires_grad
        same_dtype = all(t.dtype == x.dtype for t in (base, *terms))
        return base_is_fixed and bias_is_fixed and same_dtype

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` and the correction for `x`, added in the wider precision of the two and rounded once."""
        mixed = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        routed = self.router is not None
        a_input = x if routed else self._dropped(x)
        # Under autocast F.linear casts by itself; without it, A may be float32 over a bfloat16 base.
        if not mixed:
            a_input = a_input.to(self.a.dtype)
        h = F.linear(a_input, self.a)  # [..., r]
        if routed:  # H-LoRA drops what A makes of the input; its router sees the whole input
            h = self._dropped(h)
        h = self._gated(h, x)
        # One dtype throughout: addmm adds while it multiplies, which saves a pass over y.
        if h.dtype == y.dtype == self.b.dtype and not mixed:
            flat = y.reshape(-1, y.shape[-1])
            h = h.reshape(-1, h.shape[-1])
            if torch.is_grad_enabled() or y is x:
                return torch.addmm(flat, h, self.b.t()).view(y.shape)
            return flat.addmm_(h, self.b.t()).view(y.shape)  # y is fresh, nobody else has it
        return (y + F.linear(h, self.b)).to(y.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout else x

    def _gated(self, h: Tensor, x: Tensor) -> Tensor:
        if self.router is not None:
            # The ranks lie expert after expert, so h splits into [..., n, r / n], and expert i takes share i.
            logits = F.linear(x.to(self.router.dtype), self.router)
            share = logits.softmax(-1)  # [..., n]
            by_expert = h.unflatten(-1, (share.shape[-1], -1))  # [..., n, r / n]
            routed = by_expert * share.unsqueeze(-1).to(h.dtype)
            h = routed.flatten(-2)
        if self.gate is not None:
            gate = self.gate if self.gate.dim() == 1 else self._per_row(h)
            h = h * gate.to(h.dtype)
        return h if self.scale == 1.0 else h * self.scale

    def _per_row(self, h: Tensor) -> Tensor:
        """The gate [b, r] of each row's sample, shaped to multiply h: [b, t, r], or rows of several samples
        one after the other.
        """
        gate, n = self.gate, h.shape[0]
        assert gate is not None
        # `rows` has the sample of each visual token. A tower sees tokens, patches (more) or tiles (fewer) in
        # the same order.
        if self.rows is not None:
            total = len(self.rows)
            if n % total and total % n:
                raise ValueError(
                    f"{self!r}: {n} rows do not belong to {total} visual tokens; "
                    "rows must be of the ids of this batch"
                )
            # A patch takes the sample of the token that it is merged into, a tile that of its first token.
            samples = self.rows.repeat_interleave(n // total) if n >= total else self.rows[:: total // n]
            gate = gate[samples]
        elif n != len(gate) and len(gate) > 1:
            advice = "; give weights for every sample of the batch"
            if h.dim() == 2:
                advice = "; this layer flattens its batch, so it cannot have weights per sample"
            raise ValueError(f"{self!r}: weights for {len(gate)} samples meet {n} rows{advice}")
        # [b, r] for rows [n, r]; with an axis for the tokens of each row [b, t, r].
        return gate[:, None, :] if h.dim() == 3 else gate

    def _about(self) -> str:
        gating = ""
        if self.router is not None:
            gating = " routed"
        elif self.gate is not None and self.gate.dim() > 1:
            gating = " per sample"
        base = str(self.base.dtype)[6:]  # without "torch."
        if isinstance(self.base, Lazy):
            base = repr(self.base)
        return f"{list(self.shape)}, {self.kind}, rank {len(self.a)}{gating} over {base}"


class _Corrected(torch.autograd.Function):
    """`x W^T + bias + scale dropped A^T B^T` over a frozen weight, all of one dtype.

    Every sum and scaling is part of a product. Left to autograd, they would be passes of their own over
    [tokens, out] and [tokens, in].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        a: Tensor,
        b: Tensor,
        base: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        y = F.linear(x, base, bias)
        h = F.linear(dropped, a).reshape(-1, len(a))
        # An adapter that is frozen itself passes a gradient on, for which its input need not stay.
        ctx.save_for_backward(dropped if ctx.needs_input_grad[2] else None, h, a, b)
        ctx.base, ctx.scale, ctx.is_dropped = base, scale, dropped is not x
        flat = y.reshape(-1, len(b))
        return flat.addmm_(h, b.t(), alpha=scale).view(y.shape)  # y is fresh, nobody else has it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dropped, h, a, b = ctx.saved_tensors
        of_x, of_dropped, of_a, of_b = ctx.needs_input_grad[:4]
        shape = (*grad.shape[:-1], a.shape[1])  # of x
        grad = grad.reshape(-1, len(b))
        # With beta = 0 the first tensor gives no more than a shape: product and scale are one kernel.
        grad_h = torch.addmm(h, grad, b, beta=0, alpha=ctx.scale)
        grad_x = grad_dropped = grad_a = grad_b = None
        if of_x:
            grad_x = grad @ dense(ctx.base)
            if not ctx.is_dropped:
                grad_x.addmm_(grad_h, a)
            grad_x = grad_x.view(shape)
        if of_dropped and ctx.is_dropped:
            grad_dropped = (grad_h @ a).view(shape)
        if of_a:
            grad_a = grad_h.t() @ dropped.reshape(-1, a.shape[1])
        if of_b:
            grad_b = torch.addmm(b, grad.t(), h, beta=0, alpha=ctx.scale)
        return grad_x, grad_dropped, grad_a, grad_b, None, None, None


class Quantized(Lazy):
    """A weight held as codes of a few bits and their scales. Frozen: gradients pass through it.

    Its parts are `packed`, the codes, and then the scales. A kind defines `dense_as`.
    """

    fixed = True
    packed: Tensor

    def dense_as(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, as a plain tensor."""
        raise NotImplementedError

    def forward_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + bias`; a kind that has a kernel for it uses that."""
        return F.linear(x, self.dense_as(x.dtype), bias)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # Autocast does not know the product below, so its casts are made here, as it makes them for F.linear.
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = bias if bias is None else bias.to(x.dtype)
        # Functions, not the weight: torch.func would wrap it as any tensor that it sees.
        return _QuantizedProduct.apply(x, bias, self.forward_product, self.dense_as)

    def dense(self) -> Tensor:
        return self.dense_as(self.dtype)

    def moved(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Lazy:
        """Elsewhere, or standing for another precision; codes and scales stay what they are."""
        attributes = dict(self.__dict__)
        for name in self._parts:
            if attributes[name] is not None:
                attributes[name] = attributes[name].to(device)
        return type(self).like(self.shape, dtype or self.dtype, attributes["packed"].device, **attributes)


class _QuantizedProduct(torch.autograd.Function):
    """`x W^T + bias` that keeps the codes for the backward pass, never the written-out weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, product: Any, dense_as: Any) -> Tensor:
        return product(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, bias, _, ctx.dense_as = inputs
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # None for the weight: it is frozen.
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.dense_as(grad.dtype)
        if ctx.has_bias and ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None, None


class Sharded(Lazy):
    """A weight whose parts lie on several processes (`torch.distributed.tensor.DTensor`): gathered when used,
    its gradient scattered.
    """

    _parts = ("shard",)
    shard: Any

    def dense(self) -> Tensor:
        from torch.distributed.tensor import Partial

        # Every process has the gradient of its own part of the batch; these are summed and scattered.
        return self.shard.full_tensor(grad_placements=[Partial("sum")] * self.shard.device_mesh.ndim)

    def _about(self) -> str:
        processes = self.shard.device_mesh.size()
        return f"{super()._about()}, {self.shard.placements} on {processes} processes"


class Passed(Lazy):
    """A head that hands its input on: logits become the hidden states before it. As an embedding it is its
    base (tied weights).
    """

    _parts = ("base",)
    base: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return x

    def embedding(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.embedding(ids, self.base, *args, **kwargs)


def low_rank(
    base: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    gate: Tensor | None = None,
    router: Tensor | None = None,
    rows: Tensor | None = None,
    kind: str = "linear",
    dropout: float = 0.0,
) -> Tensor:
    """A weight that acts as `base + scale B diag(gate) A`, where the gate may differ by sample or by token.

    Args:
        base: [out, in], of any kind of weight; [in, out] with kind "conv1d" (GPT-2), [v, d] with kind
            "embedding".
        a, b: [r, in] and [out, r]; [r, v] and [d, r] with kind "embedding". Adapters side by side are one
            with the sum of their ranks.
        gate: [r], or [b, r] with a row for each sample of the batch that will come; ones if left out.
        router: [n, in]; softmax over n experts of `x router^T` gates r / n ranks each, per token (H-LoRA).
        rows: int64 [tokens], which sample each visual token belongs to: needed with a gate per sample where
            the layer is in a vision tower.
        kind: an embedding's correction is not seen by a head that shares its weight, nor the other way round.
        dropout: of the input of A; with a router, of A's output before the gates, as H-LoRA has it. For
            training; drawn from torch's default generator.
    Raises:
        ValueError: shapes that do not fit.
    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685; gates and their dropout after Lin et al. 2025
        (HealthGPT), arXiv:2502.09838, eq. 9, and its public code, `llava/peft/tuners/lora.py`,
        `Linear.forward`.
    """
    r = len(a)
    shape = (b.shape[0], a.shape[1])
    # A table and GPT-2's Conv1D lie as [in, out].
    if kind != "linear":
        shape = shape[::-1]
    if a.dim() != 2 or b.dim() != 2 or b.shape[1] != r or base.shape != shape:
        sizes = f"{list(a.shape)} and {list(b.shape)} for {list(base.shape)} of kind {kind}"
        raise ValueError(f"low_rank: A [r, in] and B [out, r] must fit the weight, got {sizes}")
    if gate is not None and (gate.dim() > 2 or gate.shape[-1] != r):
        raise ValueError(f"low_rank: the gate must be [{r}] or [b, {r}], got {list(gate.shape)}")
    if router is not None and (kind == "embedding" or router.shape[-1] != a.shape[1] or r % len(router)):
        raise ValueError(
            f"low_rank: the router must be [n, {a.shape[1]}] with n dividing rank {r}, "
            f"got {list(router.shape)}"
        )
    tensors = {"base": base, "a": a, "b": b, "gate": gate, "router": router, "rows": rows}
    return LowRank.like(
        base.shape, base.dtype, base.device, **tensors, scale=float(scale), kind=kind, dropout=dropout
    )


def sharded(shard: Any) -> Tensor:
    """A weight from a DTensor, gathered at each use; the gradient it passes back is the sum over processes,
    scattered as the shard is.
    """
    return Sharded.like(shard.shape, shard.dtype, shard.device, shard=shard)


def passed(base: Tensor) -> Tensor:
    """In the place of a language head's weight: the model returns the hidden states [.., d] that the head
    would have got.
    """
    return Passed.like(base.shape, base.dtype, base.device, base=base)


def per_row(params: Mapping[str, Tensor], samples: Tensor, count: int) -> dict[str, Tensor]:
    """The params for a batch whose rows are parts of samples, such as the slices of volumes.

    Args:
        samples: int64 [rows], the sample that each row belongs to. A gate per sample becomes one per row.
        count: how many samples there are.
    Raises:
        ValueError: weights for another number of samples.
    """
    rows = {}
    for name, w in params.items():
        if isinstance(w, LowRank):
            gate = w.gate
            if gate is not None and gate.dim() == 2 and len(gate) not in (1, count):
                raise ValueError(f"{name} has weights for {len(gate)} samples, the batch has {count}")
        rows[name] = w.per_row(samples) if isinstance(w, Lazy) else w
    return rows


def dense(w: Tensor) -> Tensor:
    """`w` as a plain tensor; low-rank corrections are added in, 4-bit values written out.

    Raises:
        ValueError: a correction that differs by sample or token has no plain tensor.
    """
    return w.dense() if isinstance(w, Lazy) else w


def gathered(w: Tensor) -> Tensor:
    """The weight with all of it on this process that lies on several."""
    if isinstance(w, Sharded):
        return w.dense()
    return w.mapped(gathered) if isinstance(w, Lazy) else w


def move_params(
    params: Mapping[str, Tensor], device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The params elsewhere or in another precision; codes and scales of 4-bit weights keep theirs."""
    target = None if device is None else torch.device(device)
    return {name: _moved(w, dtype, target) for name, w in params.items()}


def leaves(w: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a weight holds; of a plain tensor, itself."""
    if not isinstance(w, Lazy):
        yield w
        return
    for name in w._parts:
        part = getattr(w, name)
        if part is not None:
            yield from leaves(part)


def nbytes(params: Mapping[str, Tensor]) -> int:
    """Bytes of memory that the weights hold on this process; what several share counts once."""
    storages: dict[int, int] = {}
    for w in params.values():
        for t in leaves(w):
            if hasattr(t, "to_local"):  # a shard: only the part on this process counts
                t = t.to_local()
            # Views of one tensor and tied weights have one storage.
            storage = t.untyped_storage()
            size = t.nbytes if t.device.type == "meta" else storage.nbytes()
            # Tensors without memory have no address.
            storages[storage.data_ptr() or id(t)] = size
    return sum(storages.values())


def _moved(t: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    if isinstance(t, Lazy):
        return t.moved(dtype, device)
    # Integers, such as the sample of each row, keep their dtype.
    if not t.is_floating_point():
        dtype = None
    return t.to(device=device, dtype=dtype)


def _dense_experts(argument: Any) -> Any:
    is_experts = isinstance(argument, Lazy) and argument.dim() == 3
    return argument.dense() if is_experts else argument


def _cloned(t: Tensor) -> Tensor:
    return t.mapped(_cloned) if isinstance(t, Lazy) else t.clone()


def _lazies(args: Any, kwargs: Any) -> Iterator[Lazy]:
    for a in (*args, *kwargs.values()):
        if isinstance(a, Lazy):
            yield a
        elif isinstance(a, list | tuple):
            yield from _lazies(a, {})
