"""Four-bit weights: NF4 and FP4 with doubly quantised scales, by the kernels of bitsandbytes. Only this file imports it."""

import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from medvl.weights.lazy import EXPERTS, Lazy, nbytes
from medvl.weights.rounding import Packing

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
        if isinstance(self.skip, str):
            raise ValueError(f"QuantConfig: skip is a tuple of regexes, got {self.skip!r}")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as e:
                raise ValueError(
                    f"QuantConfig: skip holds {pattern!r}, which is no regular expression: {e}"
                ) from e


class FourBit(Lazy):
    """A matrix held as 4-bit codes, two in a byte, with a scale for every block. Made by `quantize`; frozen: gradients pass through it.

    Or the matrices of all experts of a layer, [experts, out, in]: those are written out while their layer runs.
    """

    _parts = ("packed", "absmax", "offset", "nested", "nested_code")

    packed: Tensor  # uint8 [n / 2, 1]
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] where doubly quantised, then also:
    offset: Tensor | None
    nested: Tensor | None  # float32 [blocks / 256]
    nested_code: Tensor | None  # float32 [256]
    kind: str
    blocksize: int

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = bias if bias is None else bias.to(x.dtype)
        return _Product.apply(x, bias, self)

    def dense(self) -> Tensor:
        return _dequantize(self, self.dtype)

    def moved(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Lazy:
        """Elsewhere, or standing for another precision; codes and scales stay what they are."""
        held = {k: t if t is None or k not in self._parts else t.to(device) for k, t in self.__dict__.items()}
        return type(self).like(self.shape, dtype or self.dtype, held["packed"].device, **held)

    def _about(self) -> str:
        return f"{list(self.shape)}, {self.kind} for {str(self.dtype)[6:]}"


class _Product(torch.autograd.Function):
    """`x W^T + bias` that keeps the codes for the backward pass, never the written-out weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, w: FourBit) -> Tensor:
        ctx.weight, ctx.biased = w, bias is not None
        if w.blocksize < 64 or not x.is_cuda or w.packed.numel() * 2 != w.numel():
            return F.linear(x, _dequantize(w, x.dtype), bias)
        import bitsandbytes  # noqa: F401 (registers the kernels)

        scales = (
            {"absmax_8bit": w.absmax, "absmax_code": w.nested_code, "absmax_offset": w.offset}
            if w.nested is not None
            else {}
        )
        absmax = w.absmax if w.nested is None else w.nested
        return torch.ops.bitsandbytes.gemm_4bit.default(
            x, w.packed, w.shape, absmax, w.blocksize, w.kind, bias=bias, **scales
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x = grad @ _dequantize(ctx.weight, grad.dtype) if ctx.needs_input_grad[0] else None
        of_bias = grad.flatten(0, -2).sum(0) if ctx.biased and ctx.needs_input_grad[1] else None
        return of_x, of_bias, None


def quantize(params: Mapping[str, Tensor], cfg: QuantConfig = QuantConfig()) -> dict[str, Tensor]:
    """The params with every matrix that `cfg.skip` does not name as a `FourBit`, experts of mixture models too; the rest as it is.

    A warning names what has more than two axes and stays in full precision without being named in `cfg.skip`.

    Raises:
        ValueError: nothing to quantise, a weight that is quantised or adapted already, or of another dtype than 16- and 32-bit floats.
    Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314.
    """
    each = quantizer(cfg)
    done = {n: each(n, t) for n, t in params.items()}
    if not any(isinstance(w, FourBit) for w in done.values()):
        raise ValueError(
            f"quantize: none of {len(params)} weights is a matrix that cfg.skip leaves to quantise"
        )
    return done


def quantizer(cfg: QuantConfig = QuantConfig()) -> Callable[[str, Tensor], Tensor]:
    """(name, weight) -> what `quantize` makes of it; given to `loading.load_skeleton` as `each`, the full-precision model is never held."""
    skip = [re.compile(p) for p in cfg.skip]

    def each(name: str, t: Tensor) -> Tensor:
        if isinstance(t, FourBit) and (t.kind, t.blocksize, t.nested is not None) == (
            cfg.kind,
            cfg.blocksize,
            cfg.double,
        ):
            return t
        if isinstance(t, Lazy):
            raise ValueError(
                f"quantize: {name} must be a plain tensor, got {t!r}; quantise first, adapt afterwards"
            )
        if t.dim() < 2 or any(p.search(name) for p in skip):
            return t
        if t.dim() > 2 and not (t.dim() == 3 and EXPERTS.search(name)):
            warnings.warn(
                f"quantize: {name} {list(t.shape)} stays in full precision, it is neither a matrix nor of experts",
                stacklevel=2,
            )
            return t
        return quantize_matrix(t, cfg)

    return each


def quantize_matrix(t: Tensor, cfg: QuantConfig = QuantConfig()) -> Tensor:
    """One matrix [n, m], or those of all experts [e, n, m], as four-bit codes: a `FourBit` of the same shape and dtype.

    Raises:
        ValueError: not a float16, bfloat16 or float32 matrix, or values that are not finite.
    """
    if (
        t.dtype not in (torch.float16, torch.bfloat16, torch.float32)
        or t.dim() not in (2, 3)
        or not t.numel()
    ):
        raise ValueError(
            f"quantize: needs a matrix of 16- or 32-bit floats, got {list(t.shape)} {str(t.dtype)[6:]}"
        )
    if t.is_meta:
        return _shaped(t, cfg)
    if not torch.isfinite(t).all():
        raise ValueError(f"quantize: the weight {list(t.shape)} holds values that are not finite")
    packed, state = _functional().quantize_4bit(
        t.detach().contiguous(), blocksize=cfg.blocksize, compress_statistics=cfg.double, quant_type=cfg.kind
    )
    return _of_state(packed, state)


def pack_weight(w: FourBit) -> dict[str, Tensor]:
    """{suffix: tensor} of one weight as transformers and bitsandbytes store it: "" are the codes, ".absmax" and so on their scales."""
    return {"": w.packed} | {f".{k}": t for k, t in _state_of(w).as_dict(packed=True).items()}


def unpack_weight(held: Mapping[str, Tensor]) -> Tensor:
    """The weight that `pack_weight` wrote.

    Raises:
        ValueError: parts missing, or of the wrong size.
    """
    held = dict(held)
    state = next((k for k in held if k.startswith(".quant_state.bitsandbytes__")), None)
    if state is None:
        raise ValueError(
            "quant: a 4-bit weight must come with .quant_state.bitsandbytes__nf4 or __fp4; it is missing"
        )
    about = read_quant_header(held)
    need = {
        "",
        ".absmax",
        ".quant_map",
        *((".nested_absmax", ".nested_quant_map") if "nested_offset" in about else ()),
    }
    if missing := sorted(need - held.keys()):
        raise ValueError(f"quant: a 4-bit weight lacks {', '.join(missing)}")
    n = torch.Size(about["shape"]).numel()
    sizes = (held[""].numel(), held[".absmax"].numel())
    if sizes != (-(-n // 2), -(-n // about["blocksize"])):
        raise ValueError(
            f"quant: {list(about['shape'])} needs {-(-n // 2)} bytes and {-(-n // about['blocksize'])} scales, got {sizes}"
        )
    parts = {k[1:]: t for k, t in held.items() if k}
    return _of_state(held[""], _functional().QuantState.from_dict(parts, device=held[""].device))


def read_quant_header(held: Mapping[str, Tensor], name: str = "a 4-bit weight") -> dict[str, Any]:
    """What the quant_state of a stored 4-bit weight says: shape, dtype, quant_type, blocksize, nested_offset."""
    state = next(t for k, t in held.items() if k.startswith(".quant_state."))
    try:
        about = json.loads(bytes(state.cpu().tolist()).decode())
        shape, size = about["shape"], about["blocksize"]
        if about["quant_type"] not in ("nf4", "fp4"):
            raise ValueError(f"quant_type is {about['quant_type']!r}")
        if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"shape is {shape!r}")
        if about["dtype"] not in ("float16", "bfloat16", "float32") or type(size) is not int or size < 1:
            raise ValueError(f"dtype is {about['dtype']!r}, blocksize {size!r}")
        return about
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"quant: the quant_state of {name} cannot be read ({e!r})") from e


def bits_per_weight(params: Mapping[str, Tensor]) -> float:
    """Bits that a quantised weight takes on average, scales included."""
    held = {n: w for n, w in params.items() if isinstance(w, FourBit)}
    return 8 * nbytes(held) / max(1, sum(w.numel() for w in held.values()))


def _dequantize(w: FourBit, dtype: torch.dtype) -> Tensor:
    """The values of `w` [n, m], exactly those of bitsandbytes, of any float dtype."""
    import bitsandbytes  # noqa: F401 (registers the kernels)

    ops, absmax = torch.ops.bitsandbytes, w.absmax
    if w.nested is not None:
        assert w.nested_code is not None
        absmax = (
            ops.dequantize_blockwise.default(w.absmax, w.nested, w.nested_code, 256, torch.float32) + w.offset
        )
    near = dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
    return ops.dequantize_4bit.default(w.packed, absmax, w.blocksize, w.kind, w.shape, near).to(dtype)


def _shaped(t: Tensor, cfg: QuantConfig) -> Tensor:
    """A weight without values, of the size that `t` would have."""
    blocks, like = -(-t.numel() // cfg.blocksize), lambda n, dtype: torch.empty(n, dtype=dtype, device="meta")
    held = {
        "packed": like((-(-t.numel() // 2), 1), torch.uint8),
        "absmax": like(blocks, torch.uint8 if cfg.double else torch.float32),
    }
    nested: dict[str, Any] = {
        "offset": like((), torch.float32),
        "nested": like(-(-blocks // 256), torch.float32),
        "nested_code": like(256, torch.float32),
    }
    nested = nested if cfg.double else dict.fromkeys(nested)
    return FourBit.like(t.shape, t.dtype, t.device, **held, **nested, kind=cfg.kind, blocksize=cfg.blocksize)


def _of_state(packed: Tensor, state: Any) -> Tensor:
    nested = state.state2
    held = {
        "packed": packed.view(-1, 1),
        "absmax": state.absmax,
        "offset": state.offset,
        "nested": None if nested is None else nested.absmax,
        "nested_code": None if nested is None else nested.code,
    }
    if nested is not None and nested.blocksize != 256:
        raise ValueError(f"quant: doubly quantised scales must come in blocks of 256, got {nested.blocksize}")
    return FourBit.like(
        torch.Size(state.shape),
        state.dtype,
        packed.device,
        **held,
        kind=state.quant_type,
        blocksize=state.blocksize,
    )


def _state_of(w: FourBit) -> Any:
    functional = _functional()
    nested = None
    if w.nested is not None:
        nested = functional.QuantState(
            absmax=w.nested, code=w.nested_code, blocksize=256, dtype=torch.float32
        )
    code = functional.get_4bit_type(w.kind, device=w.packed.device)
    return functional.QuantState(
        absmax=w.absmax,
        shape=w.shape,
        code=code,
        blocksize=w.blocksize,
        quant_type=w.kind,
        dtype=w.dtype,
        offset=w.offset,
        state2=nested,
    )


def _functional() -> Any:
    log = logging.getLogger(
        "bitsandbytes.backends.cpu.ops"
    )  # it warns of a kernel that it would download and that is not used here
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError as e:
        raise ValueError("quantize: 4-bit weights need bitsandbytes; pip install 'medvl[quant]'") from e
    finally:
        log.setLevel(level)
    return functional


# Optimiser states -----------------------------------------------------------------------------------------------------------------------
def eight_bit_moments() -> Packing:
    """Moments of `optim.adamw` in 8 bits, with a scale for every 256 values, exactly as bitsandbytes keeps them.

    Source: Dettmers et al. 2022, arXiv:2110.02861 (blockwise dynamic quantisation).
    """
    functional = _functional()
    maps = {signed: functional.create_dynamic_map(signed=signed) for signed in (True, False)}
    ops = torch.ops.bitsandbytes

    def pack(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        maps[signed] = maps[signed].to(values.device)
        return ops.quantize_blockwise.default(values, maps[signed], 256)

    def unpack(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        maps[signed] = maps[signed].to(codes.device)
        return ops.dequantize_blockwise.default(codes, scale, maps[signed], 256, torch.float32)

    return Packing(pack=pack, unpack=unpack, block=256)
