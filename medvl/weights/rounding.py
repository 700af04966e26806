"""Parameters and moments stored in 16 or 8 bits: widened to float32 a piece at a time, updated by a kernel,
rounded back.
"""

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Generator, Tensor

HALF = (torch.bfloat16, torch.float16)
PIECE = 2**24  # values that are widened to float32 at a time; a multiple of any block


@frozen(kw_only=True)
class Packing:
    """How moments are stored in 8 bits: `pack(values, signed) -> (codes uint8, scale [blocks])` and
    `unpack(codes, scale, signed)`.
    """

    pack: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, bool], Tensor]
    block: int = 256  # values that share a scale
    least: int = 4096  # smaller tensors (norms, biases) keep float32


def round_stochastic(values: Tensor, gen: Generator) -> Tensor:
    """Round float32 to bfloat16, to one of the two neighbours with a probability by distance, so that the
    mean is exact.

    inf and nan stay.
    """
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=gen)
    # The sum carries into the upper 16 bits, which bfloat16 has, as often as the lower 16 are large.
    bits = values.contiguous().view(torch.int32) + noise
    rounded = (bits & -(2**16)).view(torch.float32)  # the lower 16 bits cleared
    # In inf and nan a carry would make another number.
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def is_large(t: Tensor) -> bool:
    """Whether a tensor is updated in pieces even where nothing of it is rounded."""
    return t.numel() > PIECE


def group_by_size(sizes: dict[str, int]) -> list[list[str]]:
    """The names in groups of about `PIECE` values: a kernel's scratch memory is as large as what it is given
    at once.
    """
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = PIECE
        groups[-1].append(name)
        room -= size
    return groups


def run_in_pieces(
    kernel: Callable[..., None],
    t: Tensor,
    g: Tensor,
    moments: list[Any],
    packing: Packing | None,
    gen: Generator | None,
) -> None:
    """Run an optimiser's `kernel` on one parameter, in float32 or wider, a piece at a time, and round the
    results. In place.

    Args:
        kernel: ([parameter], [gradient], [first moment], [second moment]), updates all but the gradient.
        t, g: the parameter and its gradient.
        moments: first and second; tensors, or {"codes", "scale"} of `packing`.
        packing: of moments in 8 bits.
        gen: rounds a bfloat16 parameter stochastically; None: to the nearest.
    """
    parameter = t.contiguous().view(-1)
    gradient = g.reshape(-1)
    signs = (True, False)  # first moments have a sign, second ones have none
    for start in range(0, len(parameter), PIECE):
        span = slice(start, start + PIECE)
        # A copy of a 16-bit parameter; of a wider one a view, which the kernel updates directly.
        wide = parameter[span].float() if parameter.dtype in HALF else parameter[span]
        wide_moments = []
        for moment, signed in zip(moments, signs, strict=True):
            values = _read_moment(moment, packing, span, signed)
            wide_moments.append(values.to(wide.dtype))
        # Lists of one tensor, as torch's kernels of several tensors take them.
        first, second = wide_moments
        kernel([wide], [gradient[span].to(wide.dtype)], [first], [second])
        for moment, values, signed in zip(moments, wide_moments, signs, strict=True):
            _write_moment(moment, packing, span, signed, values)
        if parameter.dtype in HALF:
            parameter[span] = wide if gen is None else round_stochastic(wide, gen)
    # `contiguous` made a copy of a parameter that is not.
    if parameter.data_ptr() != t.data_ptr():
        t.copy_(parameter.view(t.shape))


def _read_moment(moment: Any, packing: Packing | None, span: slice, signed: bool) -> Tensor:
    """The values of a moment in `span`: of a plain one a view, of a packed one a float32 copy."""
    if not isinstance(moment, dict):
        return moment.view(-1)[span]
    assert packing is not None
    blocks = slice(span.start // packing.block, span.stop // packing.block)
    return packing.unpack(moment["codes"].view(-1)[span], moment["scale"][blocks], signed)


def _write_moment(moment: Any, packing: Packing | None, span: slice, signed: bool, values: Tensor) -> None:
    """Pack new values; those of a plain moment were updated through the view."""
    if isinstance(moment, dict):
        assert packing is not None
        blocks = slice(span.start // packing.block, span.stop // packing.block)
        codes, scale = packing.pack(values.float(), signed)
        moment["codes"].view(-1)[span] = codes
        moment["scale"][blocks] = scale
