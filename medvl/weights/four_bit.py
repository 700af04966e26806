"""Four-bit weights: NF4 and FP4 with doubly quantised scales, by the kernels of bitsandbytes. Only this file
imports it.
"""

import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from attrs import frozen
from torch import Tensor

from medvl.weights.lazy import EXPERTS, Lazy, Quantized
from medvl.weights.rounding import Packing

_MISSING = "quantize: 4-bit weights and 8-bit moments need bitsandbytes; pip install 'medvl[quant]'"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What stays as it is unless asked for: tables, heads, towers and projectors, routers.
SKIP = (
    r"(^|\.)(embed_tokens|wte|wpe|embeddings?|shared|lm_head|classifier|head|score)\.",
    r"(^|\.)(visual|vision_tower|vision_model|vision_embed_tokens|multi_modal_projector|patch_embed)\.",
    r"(^|\.)(mlp\.gate|router|cls_token|mask_token|position_embeddings?|register_tokens)(\.weight)?$",
    r"_bias$",  # of experts, [experts, out]
)


@frozen(kw_only=True)
class QuantConfig:
    """How weights become four bits each; the defaults are QLoRA's."""

    kind: Literal["nf4", "fp4"] = "nf4"
    blocksize: int = 64  # weights that share a scale
    double: bool = True  # the scales are quantised too: 4.13 bits a weight instead of 4.5
    skip: tuple[str, ...] = SKIP  # regexes searched in the name: these stay; () quantises every matrix

    def __attrs_post_init__(self) -> None:
        if self.blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ValueError(
                f"QuantConfig: blocksize must be a power of two from 32 to 4096, got {self.blocksize}"
            )
        if self.kind not in ("nf4", "fp4"):
            raise ValueError(f"QuantConfig: kind must be 'nf4' or 'fp4', got {self.kind!r}")
        check_skip("QuantConfig", self.skip)


def check_skip(owner: str, skip: tuple[str, ...]) -> None:
    """Raise where names to leave out are no tuple of regular expressions."""
    if isinstance(skip, str):
        raise ValueError(f"{owner}: skip is a tuple of regexes, got {skip!r}")
    for pattern in skip:
        try:
            re.compile(pattern)
        except re.error as e:
            raise ValueError(f"{owner}: skip holds {pattern!r}, which is no regular expression: {e}") from e


class FourBit(Quantized):
    """A matrix held as 4-bit codes, two in a byte, with a scale for every block. Made by `quantize`.

    Or the matrices of all experts of a layer, [experts, out, in]: those are written out while their layer
    runs.
    """

    _parts = ("packed", "absmax", "offset", "nested", "nested_code")

    packed: Tensor  # uint8 [n / 2, 1]
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] where doubly quantised, then also:
    offset: Tensor | None
    nested: Tensor | None  # float32 [blocks / 256]
    nested_code: Tensor | None  # float32 [256]
    kind: str
    blocksize: int

    def dense_as(self, dtype: torch.dtype) -> Tensor:
        return _dequantize(self, dtype)

    def forward_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # The fused kernel is for GPUs, blocks of 64 and more, and codes without padding.
        if self.blocksize < 64 or not x.is_cuda or self.packed.numel() * 2 != self.numel():
            return super().forward_product(x, bias)
        # Doubly quantised scales go in as their own codes; `absmax` is then the scales of those.
        scales: dict[str, Any] = {}
        absmax = self.absmax
        if self.nested is not None:
            scales = {
                "absmax_8bit": self.absmax,
                "absmax_code": self.nested_code,
                "absmax_offset": self.offset,
            }
            absmax = self.nested
        product = _kernels().gemm_4bit.default
        return product(x, self.packed, self.shape, absmax, self.blocksize, self.kind, bias=bias, **scales)

    def _about(self) -> str:
        return f"{list(self.shape)}, {self.kind} for {str(self.dtype)[6:]}"


def quantize(params: Mapping[str, Tensor], cfg: QuantConfig = QuantConfig()) -> dict[str, Tensor]:
    """The params with every matrix that `cfg.skip` does not name as a `FourBit`, experts of mixture models
    too; the rest as it is.

    A warning names what has more than two axes and stays in full precision without being named in `cfg.skip`.

    Raises:
        ValueError: nothing to quantise, a weight that is quantised or adapted already, or of another dtype
            than 16- and 32-bit floats.
    Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314.
    """
    convert = quantizer(cfg)
    quantized = {name: convert(name, w) for name, w in params.items()}
    if not any(isinstance(w, FourBit) for w in quantized.values()):
        raise ValueError(f"quantize: none of {len(params)} weights is a matrix that cfg.skip lets through")
    return quantized


def quantizer(cfg: QuantConfig = QuantConfig()) -> Callable[[str, Tensor], Tensor]:
    """(name, weight) -> what `quantize` makes of it; given to `loading.load_skeleton` as `transform`, the
    full-precision model is never held.
    """
    settings = (cfg.kind, cfg.blocksize, cfg.double)

    def is_done(w: Tensor) -> bool:
        return isinstance(w, FourBit) and _settings(w) == settings

    return matrix_converter(cfg.skip, lambda w: quantize_matrix(w, cfg), is_done)


def matrix_converter(
    skip: Sequence[str], convert: Callable[[Tensor], Tensor], is_done: Callable[[Tensor], bool]
) -> Callable[[str, Tensor], Tensor]:
    """(name, weight) -> `convert(weight)` of matrices and experts that `skip` does not name, others unchanged.

    Args:
        is_done: whether a file held the weight as `convert` makes it; it then stays.
    """
    patterns = [re.compile(pattern) for pattern in skip]

    def convert_named(name: str, w: Tensor) -> Tensor:
        if is_done(w):
            return w
        if isinstance(w, Lazy):
            raise ValueError(
                f"quantize: {name} must be a plain tensor, got {w!r}; quantise first, adapt afterwards, and set "
                "model.quantize = 'none' where the file is quantised"
            )
        if w.dim() < 2 or any(pattern.search(name) for pattern in patterns):
            return w
        of_experts = w.dim() == 3 and EXPERTS.search(name)
        if w.dim() > 2 and not of_experts:
            warnings.warn(
                f"quantize: {name} {list(w.shape)} stays in full precision: it is neither a matrix nor a "
                "weight of experts",
                stacklevel=2,
            )
            return w
        try:
            return convert(w)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from e

    return convert_named


def _settings(w: FourBit) -> tuple[str, int, bool]:
    return w.kind, w.blocksize, w.nested is not None


def quantize_matrix(t: Tensor, cfg: QuantConfig = QuantConfig()) -> Tensor:
    """One matrix [n, m], or those of all experts [e, n, m], as four-bit codes: a `FourBit` of the same shape
    and dtype.

    Raises:
        ValueError: not a float16, bfloat16 or float32 matrix, or values that are not finite.
    """
    is_matrix = t.dim() in (2, 3) and t.numel() > 0
    if t.dtype not in _KERNEL_DTYPES or not is_matrix:
        raise ValueError(
            f"quantize: needs a matrix of 16- or 32-bit floats, got {list(t.shape)} {str(t.dtype)[6:]}"
        )
    # A model on the meta device is quantised too, to estimate its memory without its values.
    if t.is_meta:
        return _empty(t, cfg)
    # One value that is not finite would spoil its whole block, which shares a scale.
    if not torch.isfinite(t).all():
        raise ValueError(f"quantize: the weight {list(t.shape)} holds values that are not finite")
    packed, state = _functional().quantize_4bit(
        t.detach().contiguous(), blocksize=cfg.blocksize, compress_statistics=cfg.double, quant_type=cfg.kind
    )
    return _from_state(packed, state)


def pack_weight(w: FourBit) -> dict[str, Tensor]:
    """The tensors of one weight as transformers and bitsandbytes store them.

    Returns:
        {suffix of the name: tensor}: "" are the codes, ".absmax" and so on their scales.
    """
    state = _to_state(w).as_dict(packed=True)
    return {"": w.packed} | {f".{name}": t for name, t in state.items()}


def unpack_weight(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that `pack_weight` wrote.

    Raises:
        ValueError: tensors missing, or of the wrong size.
    """
    if not any(suffix.startswith(".quant_state.bitsandbytes__") for suffix in tensors):
        raise ValueError(
            "quant: a 4-bit weight must come with .quant_state.bitsandbytes__nf4 or __fp4; it is missing"
        )
    # A file from anywhere is checked here, as the kernels trust the sizes that they are given.
    header = read_quant_header(tensors)
    needed = {"", ".absmax", ".quant_map"}
    if "nested_offset" in header:
        needed |= {".nested_absmax", ".nested_quant_map"}
    missing = sorted(needed - tensors.keys())
    if missing:
        raise ValueError(f"quant: a 4-bit weight lacks {', '.join(missing)}")
    # Two codes in a byte and a scale for each block, both rounded up.
    n = torch.Size(header["shape"]).numel()
    code_bytes = -(-n // 2)
    scales = -(-n // header["blocksize"])
    sizes = (tensors[""].numel(), tensors[".absmax"].numel())
    if sizes != (code_bytes, scales):
        raise ValueError(
            f"quant: {list(header['shape'])} needs {code_bytes} bytes and {scales} scales, got {sizes}"
        )
    state_tensors = {suffix[1:]: t for suffix, t in tensors.items() if suffix}
    state = _functional().QuantState.from_dict(state_tensors, device=tensors[""].device)
    return _from_state(tensors[""], state)


def read_quant_header(tensors: Mapping[str, Tensor], name: str = "a 4-bit weight") -> dict[str, Any]:
    """The quant_state of a stored 4-bit weight: shape, dtype, quant_type, blocksize, nested_offset.

    Raises:
        ValueError: it cannot be read; says of which weight by `name`.
    """
    state = next(t for suffix, t in tensors.items() if suffix.startswith(".quant_state."))
    try:
        header = json.loads(bytes(state.cpu().tolist()).decode())
        shape, blocksize = header["shape"], header["blocksize"]
        if header["quant_type"] not in ("nf4", "fp4"):
            raise ValueError(f"quant_type is {header['quant_type']!r}")
        # `type`, not isinstance: true and false are integers in Python.
        if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"shape is {shape!r}")
        known_dtype = header["dtype"] in ("float16", "bfloat16", "float32")
        if not known_dtype or type(blocksize) is not int or blocksize < 1:
            raise ValueError(f"dtype is {header['dtype']!r}, blocksize {blocksize!r}")
        return header
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"quant: the quant_state of {name} cannot be read ({e!r})") from e


def _dequantize(w: FourBit, dtype: torch.dtype) -> Tensor:
    """The values of `w` [n, m], exactly those of bitsandbytes, of any float dtype."""
    kernels = _kernels()
    absmax = w.absmax
    if w.nested is not None:
        assert w.nested_code is not None
        scales = kernels.dequantize_blockwise.default(w.absmax, w.nested, w.nested_code, 256, torch.float32)
        absmax = scales + w.offset
    # The kernels write these three dtypes; others are converted from float32.
    kernel_dtype = dtype if dtype in _KERNEL_DTYPES else torch.float32
    values = kernels.dequantize_4bit.default(w.packed, absmax, w.blocksize, w.kind, w.shape, kernel_dtype)
    return values.to(dtype)


def _empty(t: Tensor, cfg: QuantConfig) -> Tensor:
    """A weight without values, of the size that `t` would have."""

    def empty(n: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(n, dtype=dtype, device="meta")

    blocks = -(-t.numel() // cfg.blocksize)  # rounded up; the last one may be shorter
    tensors: dict[str, Tensor | None] = {
        "packed": empty((-(-t.numel() // 2), 1), torch.uint8),
        "absmax": empty(blocks, torch.uint8 if cfg.double else torch.float32),
        "offset": None,
        "nested": None,
        "nested_code": None,
    }
    if cfg.double:
        tensors["offset"] = empty((), torch.float32)
        tensors["nested"] = empty(-(-blocks // 256), torch.float32)
        tensors["nested_code"] = empty(256, torch.float32)
    return FourBit.like(t.shape, t.dtype, t.device, **tensors, kind=cfg.kind, blocksize=cfg.blocksize)


def _from_state(packed: Tensor, state: Any) -> Tensor:
    """The weight of codes and a QuantState of bitsandbytes."""
    nested = state.state2
    if nested is not None and nested.blocksize != 256:
        raise ValueError(f"quant: doubly quantised scales must come in blocks of 256, got {nested.blocksize}")
    tensors = {
        "packed": packed.view(-1, 1),
        "absmax": state.absmax,
        "offset": state.offset,
        "nested": None if nested is None else nested.absmax,
        "nested_code": None if nested is None else nested.code,
    }
    return FourBit.like(
        torch.Size(state.shape),
        state.dtype,
        packed.device,
        **tensors,
        kind=state.quant_type,
        blocksize=state.blocksize,
    )


def _to_state(w: FourBit) -> Any:
    """The QuantState of bitsandbytes for a weight."""
    functional = _functional()
    nested = None
    if w.nested is not None:
        nested = functional.QuantState(
            absmax=w.nested, code=w.nested_code, blocksize=256, dtype=torch.float32
        )
    return functional.QuantState(
        absmax=w.absmax,
        shape=w.shape,
        code=functional.get_4bit_type(w.kind, device=w.packed.device),
        blocksize=w.blocksize,
        quant_type=w.kind,
        dtype=w.dtype,
        offset=w.offset,
        state2=nested,
    )


def _kernels() -> Any:
    """`torch.ops.bitsandbytes`, which importing bitsandbytes registers. torch.compile can trace this; it
    cannot trace `_functional`.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as e:
        raise ValueError(_MISSING) from e
    return torch.ops.bitsandbytes


def _functional() -> Any:
    """`bitsandbytes.functional`.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    # On import it warns of a kernel that it would download and that is not used here.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError as e:
        raise ValueError(_MISSING) from e
    finally:
        log.setLevel(level)
    return functional


# Optimiser states
#
# --------------------
def eight_bit_moments() -> Packing:
    """Moments of `optim.adamw` in 8 bits, with a scale for every 256 values, exactly as bitsandbytes keeps
    them.

    Source: Dettmers et al. 2022, arXiv:2110.02861 (blockwise dynamic quantisation).
    """
    functional = _functional()
    kernels = _kernels()
    # Tables of the 256 values that codes stand for: of first moments, which have a sign, and of second ones.
    tables = {signed: functional.create_dynamic_map(signed=signed) for signed in (True, False)}

    def pack(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        tables[signed] = tables[signed].to(values.device)
        return kernels.quantize_blockwise.default(values, tables[signed], 256)

    def unpack(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        tables[signed] = tables[signed].to(codes.device)
        return kernels.dequantize_blockwise.default(codes, scale, tables[signed], 256, torch.float32)

    return Packing(pack=pack, unpack=unpack, block=256)
