"""Four-bit whole numbers: the values of a group, a part of a row, share a scale and a zero point.

The formulas (rounding to nearest, values, both layouts of files) are functions of plain tensors; `Int4` is the
weight. `hub.int4_files` reads and writes such files, `language.awq` finds what to multiply columns by before.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from medvl.weights.four_bit import SKIP, check_skip, matrix_converter
from medvl.weights.lazy import Quantized

# Four-bit field i of a 32-bit word of AutoAWQ, counted from the low end, holds column AWQ_ORDER[i] of eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUPS = (32, 64, 128, -1)  # sizes that the kernels of vLLM have; -1 is the whole row


@frozen(kw_only=True)
class Int4Config:
    """How weights become four-bit whole numbers; the defaults are AWQ's."""

    group: int = 128  # values of a row that share a scale: 32, 64, 128, or -1 for the whole row
    symmetric: bool = False  # without zero points: the code of 0 is 8 everywhere
    skip: tuple[str, ...] = SKIP  # as of `four_bit.QuantConfig`

    def __attrs_post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"Int4Config: group must be 32, 64, 128 or -1 (the whole row), got {self.group}")
        check_skip("Int4Config", self.skip)


class Int4(Quantized):
    """A matrix [out, in] whose values are `(code - zero) scale`; made by `quantize` or read from a file.

    Or the matrices of all experts of a layer, [experts, out, in].
    """

    _parts = ("packed", "scale", "zero")

    packed: Tensor  # int32 [.., out, in / 8], as of `pack_codes`
    scale: Tensor  # [.., out, groups], of any float dtype
    zero: Tensor | None  # uint8 [.., out, groups], the code of 0; None stands for 8

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    def dense_as(self, dtype: torch.dtype) -> Tensor:
        return dequantize_codes(unpack_codes(self.packed, self.shape[-1]), self.scale, self.zero, dtype)

    def _about(self) -> str:
        kind = "symmetric" if self.zero is None else "with zero points"
        return f"{list(self.shape)}, groups of {self.group} {kind} for {str(self.dtype)[6:]}"


# Weights ----------------------------------------------------------------------------------------------------
def quantize(params: Mapping[str, Tensor], cfg: Int4Config = Int4Config()) -> dict[str, Tensor]:
    """The params with every matrix that `cfg.skip` does not name as an `Int4`, rounded to nearest.

    Raises:
        ValueError: nothing to quantise; as `quantize_matrix`, with the name.
    """
    convert = quantizer(cfg)
    quantized = {name: convert(name, w) for name, w in params.items()}
    if not any(isinstance(w, Int4) for w in quantized.values()):
        raise ValueError(f"int4: none of {len(params)} weights is a matrix that cfg.skip lets through")
    return quantized


def quantizer(cfg: Int4Config = Int4Config()) -> Callable[[str, Tensor], Tensor]:
    """(name, weight) -> what `quantize` makes of it; a `transform` for `loading.load_skeleton`."""
    return matrix_converter(cfg.skip, lambda w: quantize_matrix(w, cfg), lambda w: isinstance(w, Int4))


def quantize_matrix(w: Tensor, cfg: Int4Config = Int4Config()) -> Tensor:
    """One matrix [.., out, in], rounded to nearest: an `Int4` of the same shape and dtype.

    Raises:
        ValueError: groups that do not divide a row, values that are not finite, no float matrix.
    """
    if w.dim() not in (2, 3) or not w.numel() or not w.is_floating_point():
        raise ValueError(f"int4: needs a matrix of floats, got {list(w.shape)} {str(w.dtype)[6:]}")
    if cfg.group != -1 and w.shape[-1] % cfg.group:
        raise ValueError(
            f"int4: groups of {cfg.group} must divide a row, {list(w.shape)} has rows of {w.shape[-1]}; take "
            "another group (-1 fits always), or leave the weight out by cfg.skip"
        )
    # A weight on meta has no values; it is quantised to estimate memory.
    if not w.is_meta and not w.isfinite().all():
        raise ValueError(f"int4: the weight {list(w.shape)} holds values that are not finite")
    codes, scale, zero = round_to_codes(w.detach(), cfg.group, cfg.symmetric)
    return int4_weight(codes, scale, zero, w.dtype)


def int4_weight(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An `Int4` of codes uint8 [.., out, in] that stands for a weight of `dtype`."""
    parts = {"packed": pack_codes(codes), "scale": scale, "zero": zero}
    return Int4.like(codes.shape, dtype, codes.device, **parts)


# Formulas ---------------------------------------------------------------------------------------------------
def round_to_codes(w: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rounding to nearest between the least and the greatest value of each group.

    Args:
        w: [.., in], floats.
        group: values that share a scale, a divisor of in; -1 for all.
    Returns:
        codes uint8 [.., in], scales [.., groups] of the dtype of `w`, zero points uint8 [.., groups] or None.
    Source: compressed-tensors, `quantization/utils/helpers.py`, `calculate_qparams`.
    """
    grouped = w.float().unflatten(-1, (-1, group if group > 0 else w.shape[-1]))
    # 0 is always one of the values: an all-positive group counts from 0.
    low = grouped.amin(-1).clamp(max=0)
    high = grouped.amax(-1).clamp(min=0)
    step = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    # Codes belong to the scale as it is stored. A group of zeros may have any.
    scale = step.to(w.dtype)
    scale = torch.where(scale == 0, 1, scale)
    wide = scale.float()
    zero = torch.full_like(wide, 8) if symmetric else (-low / wide).round().clamp(0, 15)
    codes = ((grouped / wide.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, 15)
    return codes.to(torch.uint8).flatten(-2), scale, None if symmetric else zero.to(torch.uint8)


def dequantize_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`(codes - zero) scale` [.., in], rounded once, to `dtype`; arguments as returned by `round_to_codes`."""
    wide = torch.promote_types(scale.dtype, dtype)
    grouped = codes.unflatten(-1, (scale.shape[-1], -1)).to(wide)
    grouped -= 8 if zero is None else zero.to(wide).unsqueeze(-1)
    grouped *= scale.to(wide).unsqueeze(-1)
    return grouped.flatten(-2).to(dtype)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [.., n] of four bits as int32 [.., n / 8], the first in the lowest bits; n is filled up with 0.

    The layout of compressed-tensors.
    """
    filled = F.pad(codes, (0, -codes.shape[-1] % 8))
    pairs = filled.unflatten(-1, (-1, 2))
    # Four bytes are one word: all machines that torch runs on have the lowest byte first.
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)


def unpack_codes(packed: Tensor, n: int) -> Tensor:
    """The codes uint8 [.., n] that `pack_codes` packed."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)[..., :n]


def pack_awq(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, n] as int32 [rows, n / 8] in the order of AutoAWQ ("gemm"); n is a multiple of 8."""
    return pack_codes(codes.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2))


def unpack_awq(packed: Tensor) -> Tensor:
    """The codes uint8 [rows, n] that `pack_awq` packed."""
    fields = unpack_codes(packed, packed.shape[-1] * 8).unflatten(-1, (-1, 8))
    place = [AWQ_ORDER.index(column) for column in range(8)]
    return fields[..., place].flatten(-2)
