"""Values kept in 16 or 8 bits: widened to float32 a piece at a time, computed, rounded back. The arithmetic is the caller's."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Generator, Tensor

HALF = (torch.bfloat16, torch.float16)
PIECE = 2**24  # values that are widened to float32 at a time; a multiple of any block


@frozen(kw_only=True)
class Packing:
    """How moments are kept in 8 bits: `pack(values, signed) -> (codes uint8, scale [blocks])` and `unpack(codes, scale, signed)`."""

    pack: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, bool], Tensor]
    block: int = 256  # values that share a scale
    least: int = 4096  # smaller tensors (norms, biases) keep float32


def round_stochastic(values: Tensor, gen: Generator) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours with the odds of the distance, so that the mean is exact; inf and nan stay."""
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=gen)
    bits = (
        values.contiguous().view(torch.int32) + noise
    )  # carries into the upper half as often as the lower half is large
    return torch.where(values.isfinite(), (bits & -(2**16)).view(torch.float32), values).bfloat16()


def is_large(t: Tensor) -> bool:
    """Whether a tensor is walked in pieces even where nothing of it is rounded."""
    return t.numel() > PIECE


def group_by_size(sizes: dict[str, int]) -> list[list[str]]:
    """The names in bunches of about `PIECE` values: the kernel's scratch is as large as what it is given at once."""
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            found.append([])
            room = PIECE
        found[-1].append(name)
        room -= size
    return found


def run_in_pieces(
    kernel: Callable[..., None],
    t: Tensor,
    g: Tensor,
    moments: list[Any],
    packing: Packing | None,
    gen: Generator | None,
) -> None:
    """Run `kernel` on one parameter, in float32 or wider, a piece at a time; round what is kept in fewer bits."""
    p, g = t.contiguous().view(-1), g.reshape(-1)
    for i in range(0, len(p), PIECE):
        span = slice(i, i + PIECE)
        wide = p[span].float() if p.dtype in HALF else p[span]
        opened = [
            _opened(m, packing, span, signed).to(wide.dtype)
            for m, signed in zip(moments, (True, False), strict=True)
        ]
        kernel([wide], [g[span].to(wide.dtype)], *([m] for m in opened))
        for m, values, signed in zip(moments, opened, (True, False), strict=True):
            _closed(m, packing, span, signed, values)
        if p.dtype in HALF:
            p[span] = wide if gen is None else round_stochastic(wide, gen)
    if p.data_ptr() != t.data_ptr():
        t.copy_(p.view(t.shape))


def _opened(held: Any, packing: Packing | None, span: slice, signed: bool) -> Tensor:
    """The float32 values of a moment that lie in `span`: of a plain one a view, of a packed one a copy."""
    if not isinstance(held, dict):
        return held.view(-1)[span]
    assert packing is not None
    blocks = slice(span.start // packing.block, span.stop // packing.block)
    return packing.unpack(held["codes"].view(-1)[span], held["scale"][blocks], signed)


def _closed(held: Any, packing: Packing | None, span: slice, signed: bool, values: Tensor) -> None:
    if isinstance(held, dict):
        assert packing is not None
        blocks = slice(span.start // packing.block, span.stop // packing.block)
        held["codes"].view(-1)[span], held["scale"][blocks] = packing.pack(values.float(), signed)
