"""Gradients: the one binding in which they are taken, and large batches computed from small chunks,
exactly."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from attrs import evolve, field, frozen
from torch import Tensor

from medvl.base import processes
from medvl.base.tree import Tree, flatten, map_leaves, unflatten
from medvl.weights import shards
from medvl.weights.rounding import group_by_size

Batch = dict[str, Tensor]
Loss = Callable[[Tree, Any], tuple[Tensor, "Aux"]]
Grad = Callable[[Tree, Any], tuple[Tensor, "Aux", Tree]]
LossSum = Callable[[Tree, Any], tuple[Tensor, Tensor | int, "Aux"]]
_log = logging.getLogger(__name__)
_HALF = (torch.bfloat16, torch.float16)


@frozen(kw_only=True)
class Aux:
    """What a loss returns besides its value: numbers to log, and batch means that the state follows with
    running means."""

    metrics: dict[str, Tensor] = field(factory=dict)
    means: Tree = field(factory=dict)


def value_and_grad(loss: Loss, *, precision: str = "float32", reduce: bool = True) -> Grad:
    """`(params, batch) -> (loss, aux, gradient of the loss by every leaf of params)`.

    The only place that takes gradients, sets autocast (`precision="bfloat16"`) and averages over processes
    (`reduce`). A leaf that the loss does not touch gets zeros. Forward and gradient run inside one call,
    so that whatever binds weights during the forward pass (`torch.func.functional_call`) still binds them
    when checkpointed activations are computed again.

    Sharded leaves (`shards.shard_params`) get their part of the gradient, summed over processes where it
    arises: with reduce=False it stays that sum, while other leaves have this process's own gradient.
    """

    def run(params: Tree, batch: Any) -> tuple[Tensor, Aux, Tree]:
        # New leaves on the same memory, so that the caller's tensors neither require nor collect gradients.
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in flatten(params).items()}
        # Also where the caller has switched gradients off.
        with torch.enable_grad(), autocast(params, precision):
            value, aux = loss(unflatten(leaves), batch)
        reached: tuple[Tensor | None, ...] = ()
        # A loss that reaches no parameter has no graph; torch's own error would not say what to do.
        if value.requires_grad:
            reached = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        if leaves and all(grad is None for grad in reached):
            raise ValueError(
                "value_and_grad: the loss depends on none of the parameters; put what uses them "
                "(apply_lora...) inside the loss"
            )
        grads = []
        for leaf, grad in zip(leaves.values(), reached, strict=True):
            # Zeros, not None: optimisers and processes then see the same names at each step.
            grads.append(torch.zeros_like(leaf) if grad is None else grad)
        if reduce and processes.world_size() > 1:
            grads = _sum_over_processes(grads, processes.world_size())
        # Detached, or a metric that is kept for the log would keep the activations of the step alive.
        metrics = {name: number.detach() for name, number in aux.metrics.items()}
        aux = Aux(metrics=metrics, means=map_leaves(Tensor.detach, aux.means))
        return value.detach(), aux, unflatten(dict(zip(leaves, grads, strict=True)))

    return run


def cached_value_and_grad(
    embed: Callable[[Tree, Batch], Batch],
    contrast: Loss,
    *,
    chunk: int,
    precision: str = "float32",
    local: bool = False,
) -> Grad:
    """The gradient of `contrast(params, embed(params, batch))`, exact for the whole batch, with
    activations of `chunk` rows at a time.

    Embed all chunks without gradients, take the loss over the whole batch (of all processes) and its
    gradient by the embeddings, then embed each chunk again and pull that gradient through it: twice the
    forward passes, the memory of one chunk. A batch that is one chunk of one process goes straight through.

    Args:
        embed: rows of a batch -> {name: [rows, ...]}; a row's embedding must not depend on the other
            rows. Runs in `precision`.
        contrast: (params, {name: [all rows, ...]}) -> loss over the whole batch; runs in full precision. It must
            use no sharded parameter: every process would add the gradient of the whole loss to it.
        local: `contrast` gives the loss of `processes.own_rows` alone; the mean over processes is that of the
            batch. Each has a gradient by the rows of all, so these are summed too: left out, or without the
            mean, it would be wrong by the number of processes.
    Source: Gao et al. 2021 (GradCache), arXiv:2101.06983, section 3.
    """

    def whole_loss(params: Tree, batch: Batch) -> tuple[Tensor, Aux]:
        rows = embed(params, batch)
        # Not in bfloat16: near a cosine of 1 its steps are 2**-8, which a small temperature magnifies.
        with autocast(params, "float32"):
            return contrast(params, {name: _to_float32(tensor) for name, tensor in rows.items()})

    def contrast_loss(tree: Tree, _: None) -> tuple[Tensor, Aux]:
        return contrast(tree["params"], tree["rows"])

    def chunk_loss(params: Tree, piece: tuple[Batch, Batch]) -> tuple[Tensor, Aux]:
        # The gradient of <embeddings, gradient by the embeddings> is that of the loss, by the chain rule.
        rows, row_grads = embed(params, piece[0]), piece[1]
        products = [(rows[name].to(grad.dtype) * grad).sum() for name, grad in row_grads.items()]
        return torch.stack(products).sum(), Aux()

    # None of the three sums over processes: only the gradient by parameters is summed, in step 3.
    whole_grad = value_and_grad(whole_loss, precision=precision, reduce=False)
    contrast_grad = value_and_grad(contrast_loss, reduce=False)
    chunk_grad = value_and_grad(chunk_loss, precision=precision, reduce=False)

    def run(params: Tree, batch: Batch) -> tuple[Tensor, Aux, Tree]:
        n = len(next(iter(batch.values())))
        # One chunk of one process needs no second forward pass.
        if n <= chunk and processes.world_size() == 1:
            return whole_grad(params, batch)

        # 1. Embed everything without gradients; every process gets the rows of all.
        spans = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
        with torch.no_grad(), autocast(params, precision):
            chunks = [embed(params, _take_rows(batch, span)) for span in spans]
        rows = _gather_embeddings(chunks)

        # 2. The loss of the whole batch, and its gradient by parameters and embeddings.
        value, aux, grads = contrast_grad({"params": params, "rows": rows}, None)
        row_grads = grads["rows"]
        if local:
            parts = [value, *row_grads.values()]
            value, *means = _sum_over_processes(parts, processes.world_size())
            row_grads = dict(zip(row_grads, means, strict=True))

        # 3. Pull the embeddings' gradient through each chunk of this process. What the loss itself does with
        # parameters all processes have, or each a part of it: the sum over them is to be the mean.
        direct = flatten(grads["params"])
        total = {name: grad / processes.world_size() for name, grad in direct.items()}
        own_rows = processes.own_rows(n * processes.world_size())
        for span in spans:
            of_chunk = {name: grad[own_rows][span] for name, grad in row_grads.items()}
            _, _, chunk_grads = chunk_grad(params, (_take_rows(batch, span), of_chunk))
            for name, grad in flatten(chunk_grads).items():
                total[name] += grad
        if processes.world_size() > 1:
            # Of shards the chunks' gradients were summed where the weight was gathered.
            for grad in total.values():
                if not shards.is_shard(grad):
                    dist.all_reduce(grad)
        return value, aux, unflatten(total)

    return run


def token_value_and_grad(
    loss_sum: LossSum,
    *,
    chunk: int,
    precision: str = "float32",
    cut: Callable[[Any, slice], Any] | None = None,
    rows: Callable[[Any], int] | None = None,
) -> Grad:
    """The mean loss over all trained tokens of all micro-batches and processes, and its exact gradient,
    `chunk` rows at a time.

    A mean of the micro-batches' means would weigh a token more, the fewer tokens its micro-batch trains.
    A batch that is a list holds its micro-batches already (micro-batches by tokens): they are taken as they are.

    Args:
        loss_sum: (params, micro-batch) -> sum of the token losses, count of trained tokens, Aux whose
            metrics and means are sums over these tokens, too. Metrics come out as means per token, with
            "tokens", the count.
        cut: (batch, span of rows) -> micro-batch; needed where a tensor's first axis is not the batch,
            such as an image's patches.
        rows: batch -> its number of rows; the length of "ids", else of its first tensor, if left out.
    A micro-batch that does not fit the GPU's memory is computed as two of half its rows, and so are those behind it;
    it warns once.
    16-bit gradients of several micro-batches are added up in float32. Where parameters are sharded, every
    process needs the same number of micro-batches, since each of them gathers weights.
    Raises:
        ValueError: no trained token in the whole batch; rows of unequal number and no `cut`; micro-batches of
            unequal number over shards.
    """
    if chunk < 1:
        raise ValueError(f"token_value_and_grad: chunk must be at least one row, got {chunk}")

    def counted_loss(params: Tree, piece: Any) -> tuple[Tensor, Aux]:
        value, count, aux = loss_sum(params, piece)
        if not isinstance(count, Tensor):
            count = torch.tensor(count, device=value.device)
        # `metrics/tokens` is a sum like the others, so one pass adds and reduces all of them.
        return value, evolve(aux, metrics=aux.metrics | {"tokens": count})

    grad = value_and_grad(counted_loss, precision=precision, reduce=False)
    count_rows = rows or _count_rows
    fitting, warned = chunk, False  # rows that fit the GPU's memory, as far as is known

    def fitting_grad(params: Tree, piece: Any) -> tuple[Tensor, Aux, Tree]:
        """The gradient of a micro-batch; of two halves of it where it does not fit the GPU's memory."""
        nonlocal fitting, warned
        n = count_rows(piece)
        try:
            return grad(params, piece)
        except torch.OutOfMemoryError:
            # Over shards all processes need the same number of micro-batches.
            if n == 1 or shards.any_sharded(params):
                raise
        # Outside of the handler, whose traceback held the activations.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = -(-n // 2)
        if not warned:
            _log.warning(
                "out of memory: a micro-batch of %d rows is computed as two, with the same gradient; lower train.chunk or "
                "train.tokens to save the time of trying",
                n,
            )
        fitting, warned = min(fitting, half), True
        numbers, total = _add_up(fitting_grad, params, _split_rows(piece, n, half, cut)[1], 2)
        sums = unflatten(numbers)
        return sums["loss"], Aux(metrics=sums["metrics"], means=sums.get("means", {})), unflatten(total)

    def run(params: Tree, batch: Any) -> tuple[Tensor, Aux, Tree]:
        if isinstance(batch, list):
            n, count, pieces = sum(map(count_rows, batch)), len(batch), iter(batch)
        else:
            n = count_rows(batch)
            count, pieces = _split_rows(batch, n, fitting, cut)
        _check_same_number(params, count)
        numbers, total = _add_up(fitting_grad, params, pieces, count)
        if processes.world_size() > 1:
            for number in numbers.values():
                dist.all_reduce(number)
        # Sums are divided once, by the tokens of all micro-batches and processes.
        tokens = float(numbers["metrics/tokens"])
        if not tokens:
            raise ValueError(
                f"token_value_and_grad: no token of the batch ({n} rows) is trained; make sure that the "
                "answers fit into the context"
            )
        for name, number in numbers.items():
            numbers[name] = number if name == "metrics/tokens" else number / tokens
        mean = unflatten(numbers)
        names, sums = list(total), list(total.values())
        del total  # each sum is let go as soon as its mean is there
        grads = dict(zip(names, _sum_over_processes(sums, tokens), strict=True))
        return mean["loss"], Aux(metrics=mean["metrics"], means=mean.get("means", {})), unflatten(grads)

    return run


def autocast(params: Tree, precision: str) -> torch.autocast:
    """Mixed precision on the device of `params`; does nothing unless `precision` is "bfloat16"."""
    device = next(iter(flatten(params).values())).device.type
    # torch.autocast refuses the device type "meta".
    if device == "meta":
        device = "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def _gather_embeddings(chunks: list[Batch]) -> Batch:
    """The embeddings of all chunks of all processes, in float32 or wider."""
    rows = {}
    for name in chunks[0]:
        local = torch.cat([chunk[name] for chunk in chunks])
        rows[name] = processes.gather_rows(_to_float32(local))
    return rows


def _split_rows(
    batch: Any, n: int, chunk: int, cut: Callable[[Any, slice], Any] | None
) -> tuple[int, Iterator[Any]]:
    """(number of micro-batches, micro-batches) of a batch of n rows, `chunk` rows each."""
    spans = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
    if len(spans) == 1:
        return 1, iter([batch])
    # A generator, so that only one micro-batch exists at a time.
    return len(spans), (cut(batch, span) if cut else _cut_equal_rows(batch, n, span) for span in spans)


def _add_up(
    grad: Grad, params: Tree, pieces: Iterable[Any], n: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(loss, metrics and means; gradients) of n pieces, added up."""
    numbers: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    for piece in pieces:
        value, aux, grads = grad(params, piece)
        new = flatten({"loss": value, "metrics": aux.metrics, "means": aux.means})
        # In float64: thousands of token losses are added up.
        numbers = {name: number.double() + numbers.get(name, 0.0) for name, number in new.items()}
        if n == 1:
            return numbers, flatten(grads)
        _add_gradients(total, flatten(grads))
        del grads  # before the next piece makes its own
    return numbers, total


def _add_gradients(total: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """Add a piece's gradients to the sums; tensors share kernels."""
    first = not total
    if first:
        for name, grad in grads.items():
            # Sums of 16-bit gradients in 16 bits would lose the small contributions of later micro-batches.
            dtype = torch.float32 if grad.dtype in _HALF else grad.dtype
            total[name] = torch.empty_like(grad, dtype=dtype)
    sums = [_local(tensor) for tensor in total.values()]
    new = [_local(grads[name]) for name in total]
    if first:
        torch._foreach_copy_(sums, new)
    else:
        torch._foreach_add_(sums, new)


def _sum_over_processes(grads: list[Tensor], divisor: float) -> list[Tensor]:
    """The gradients divided by `divisor` and summed; those of shards were summed where their weight was
    gathered. Each is let go as soon as its quotient is there."""
    plain = {str(i): grad.numel() for i, grad in enumerate(grads) if not shards.is_shard(grad)}
    for bunch in group_by_size(plain):
        places = [int(i) for i in bunch]
        # Not in place: two leaves may have one gradient.
        quotients = torch._foreach_div([grads[i] for i in places], divisor)
        for i, quotient in zip(places, quotients, strict=True):
            grads[i] = quotient
    for i, grad in enumerate(grads):
        if shards.is_shard(grad):
            grads[i] = grad / divisor
        elif processes.world_size() > 1:
            dist.all_reduce(grad)
    return grads


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if shards.is_shard(tensor) else tensor


def _check_same_number(params: Tree, n: int) -> None:
    """Raise where processes that gather each other's shards have different numbers of micro-batches."""
    if processes.world_size() == 1 or not shards.any_sharded(params):
        return
    device = next(iter(flatten(params).values())).device
    # Different numbers would hang: a process would wait in a gather that another never enters.
    numbers = processes.gather_rows(torch.tensor([n], device=device)).tolist()
    if len(set(numbers)) > 1:
        raise ValueError(
            "token_value_and_grad: with sharded parameters every process needs as many micro-batches, "
            f"got {numbers}"
        )


def _count_rows(batch: Batch) -> int:
    rows = batch["ids"] if "ids" in batch else next(iter(batch.values()))
    return len(rows)


def _cut_equal_rows(batch: Batch, n: int, span: slice) -> Batch:
    """The rows of a batch whose tensors all have its n rows."""
    wrong = [f"{name} has {len(tensor)}" for name, tensor in batch.items() if len(tensor) != n]
    if wrong:
        raise ValueError(
            f"token_value_and_grad: every tensor must have the batch's {n} rows, {', '.join(wrong)}; say how "
            "to cut it with `cut`"
        )
    return _take_rows(batch, span)


def _take_rows(batch: Batch, span: slice) -> Batch:
    return {name: tensor[span] for name, tensor in batch.items()}


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor
