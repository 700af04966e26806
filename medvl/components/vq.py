"""A vector-quantised autoencoder: an image becomes a grid of codes, and codes an image.

Two kinds: "gumbel" is GumbelVQ, whose encoder gives a distribution over codes, "vq" is VQModel, which takes the
nearest vector of its codebook. Parameters are a flat dict with the names of the published checkpoints.

Source: Esser et al. 2021 (VQGAN), arXiv:2012.09841; architecture, names and losses of its public code
taming-transformers. Shapes: y x pixels, h w codes (each stands for `stride` x `stride` pixels), d `embed_dim`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Generator, Tensor

from medvl.base import config

Params = dict[str, Tensor]
Layer = tuple[str, str, int, int]  # kind, name of its parameters, channels in, channels out
_GROUPS = 32  # of every group norm
_BETA = 0.25  # weight of the codebook's own loss of kind "vq"


@frozen(kw_only=True)
class VqConfig:
    """The architecture; fields have the names of taming's yaml. The defaults are HealthGPT's GumbelVQ."""

    kind: Literal["gumbel", "vq"] = "gumbel"
    n_embed: int = field(default=8192, validator=config.in_bounds(1, 2**20))
    embed_dim: int = field(default=256, validator=config.in_bounds(*config.WIDTH))
    kl_weight: float = 1e-8  # of the KL divergence to equally likely codes, kind "gumbel"
    used: int = 0  # so many codes of the codebook are used ("quantize.used", taming's `remap`); 0 = all
    z_channels: int = field(default=256, validator=config.in_bounds(*config.WIDTH))
    # Of the training images; says at which levels attention stands. Other sizes can be encoded.
    resolution: int = field(default=256, validator=config.in_bounds(*config.WIDTH))
    in_channels: int = field(default=3, validator=config.in_bounds(1, 1024))
    out_ch: int = field(default=3, validator=config.in_bounds(1, 1024))
    ch: int = field(default=128, validator=config.in_bounds(*config.WIDTH))
    ch_mult: tuple[int, ...] = field(default=(1, 1, 2, 4), validator=config.in_bounds(1, 64))  # of each level
    num_res_blocks: int = field(default=2, validator=config.in_bounds(1, 64))
    attn_resolutions: tuple[int, ...] = (32,)

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "VqConfig", kl_weight=(0, 1e6), used=(0, self.n_embed))
        if not self.ch_mult or self.ch % _GROUPS:
            raise ValueError(
                f"VqConfig: ch must be a multiple of {_GROUPS} and ch_mult name a level, got ch={self.ch}, "
                f"ch_mult={self.ch_mult}"
            )
        if self.kind == "gumbel" and self.embed_dim != self.z_channels:
            raise ValueError(
                "VqConfig: embed_dim of kind gumbel must be z_channels, got "
                f"{self.embed_dim} and {self.z_channels}"
            )

    @property
    def codes(self) -> int:
        """How many codes there are: they are the numbers 0 .. codes - 1."""
        return self.used or self.n_embed

    @property
    def stride(self) -> int:
        """Pixels of a side that one code stands for."""
        return 2 ** (len(self.ch_mult) - 1)


# Layers ----------------------------------------------------------------------------------------------
def _encoder(cfg: VqConfig) -> list[Layer]:
    layers = [("conv", "encoder.conv_in", cfg.in_channels, cfg.ch)]
    width = cfg.ch
    for level, multiple in enumerate(cfg.ch_mult):
        name = f"encoder.down.{level}"
        layers += _level(cfg, name, level, width, cfg.ch * multiple, cfg.num_res_blocks)
        width = cfg.ch * multiple
        if level < len(cfg.ch_mult) - 1:
            layers.append(("down", f"{name}.downsample.conv", width, width))
    layers += _middle("encoder", width)
    layers.append(("norm", "encoder.norm_out", width, width))
    layers.append(("conv", "encoder.conv_out", width, cfg.z_channels))
    layers.append(("point", "quant_conv", cfg.z_channels, cfg.embed_dim))
    return layers


def _decoder(cfg: VqConfig) -> list[Layer]:
    width = cfg.ch * cfg.ch_mult[-1]
    layers = [("point", "post_quant_conv", cfg.embed_dim, cfg.z_channels)]
    layers.append(("conv", "decoder.conv_in", cfg.z_channels, width))
    layers += _middle("decoder", width)
    for level in reversed(range(len(cfg.ch_mult))):
        name = f"decoder.up.{level}"
        layers += _level(cfg, name, level, width, cfg.ch * cfg.ch_mult[level], cfg.num_res_blocks + 1)
        width = cfg.ch * cfg.ch_mult[level]
        if level:
            layers.append(("up", f"{name}.upsample.conv", width, width))
    layers.append(("norm", "decoder.norm_out", width, width))
    layers.append(("conv", "decoder.conv_out", width, cfg.out_ch))
    return layers


def _level(cfg: VqConfig, name: str, level: int, width: int, out: int, blocks: int) -> list[Layer]:
    """The residual blocks of a level, each with attention where the level has the size for it."""
    layers: list[Layer] = []
    for i in range(blocks):
        layers.append(("residual", f"{name}.block.{i}", width if i == 0 else out, out))
        if cfg.resolution // 2**level in cfg.attn_resolutions:
            layers.append(("attention", f"{name}.attn.{i}", out, out))
    return layers


def _middle(name: str, width: int) -> list[Layer]:
    return [
        ("residual", f"{name}.mid.block_1", width, width),
        ("attention", f"{name}.mid.attn_1", width, width),
        ("residual", f"{name}.mid.block_2", width, width),
    ]


def vq_shapes(cfg: VqConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    for kind, name, width, out in [*_encoder(cfg), *_decoder(cfg)]:
        if kind == "norm":
            add(name, width)
        elif kind == "attention":
            add(f"{name}.norm", width)
            for part in ("q", "k", "v", "proj_out"):
                add(f"{name}.{part}", width, width, 1, 1)
        elif kind == "residual":
            add(f"{name}.norm1", width)
            add(f"{name}.conv1", out, width, 3, 3)
            add(f"{name}.norm2", out)
            add(f"{name}.conv2", out, out, 3, 3)
            if width != out:
                add(f"{name}.nin_shortcut", out, width, 1, 1)
        else:
            side = 1 if kind == "point" else 3
            add(name, out, width, side, side)
    if cfg.kind == "gumbel":
        add("quantize.proj", cfg.n_embed, cfg.embed_dim, 1, 1)
    shapes[_codebook(cfg)] = (cfg.n_embed, cfg.embed_dim)
    if cfg.used:
        shapes["quantize.used"] = (cfg.used,)
    return shapes


def _codebook(cfg: VqConfig) -> str:
    return "quantize.embed.weight" if cfg.kind == "gumbel" else "quantize.embedding.weight"


def init_vq(cfg: VqConfig, gen: Generator) -> Params:
    """Random parameters, float32 on the CPU: convolutions and codebook drawn as torch and taming draw them."""
    params: Params = {}
    for name, shape in vq_shapes(cfg).items():
        if name == "quantize.used":
            params[name] = torch.arange(cfg.used)
        elif name == _codebook(cfg):
            table = torch.randn(shape, generator=gen)
            # As torch.nn.Embedding of GumbelVQ; VQModel's is uniform within 1 / n_embed.
            params[name] = (
                table if cfg.kind == "gumbel" else (torch.rand(shape, generator=gen) * 2 - 1) / cfg.n_embed
            )
        elif len(shape) == 1:
            params[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        else:
            bound = (shape[1] * shape[2] * shape[3]) ** -0.5
            params[name] = (torch.rand(shape, generator=gen) * 2 - 1) * bound
    return params


def _run(layers: list[Layer], params: Params, x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        # About 15 % less time there; group norms of CUDA would copy it back.
        x = x.contiguous(memory_format=torch.channels_last)
    for kind, name, _, _ in layers:
        x = _APPLY[kind](params, name, x)
    return x


def _conv(params: Params, name: str, x: Tensor) -> Tensor:
    weight = params[f"{name}.weight"]
    return F.conv2d(x, weight, params[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _down(params: Params, name: str, x: Tensor) -> Tensor:
    # Zeros at the right and at the bottom only, as published weights were trained.
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), params[f"{name}.weight"], params[f"{name}.bias"], stride=2)


def _up(params: Params, name: str, x: Tensor) -> Tensor:
    return _conv(params, name, F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _norm(params: Params, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, _GROUPS, params[f"{name}.weight"], params[f"{name}.bias"], eps=1e-6)


def _norm_swish(params: Params, name: str, x: Tensor) -> Tensor:
    return F.silu(_norm(params, name, x))


def _residual(params: Params, name: str, x: Tensor) -> Tensor:
    hidden = _conv(params, f"{name}.conv1", _norm_swish(params, f"{name}.norm1", x))
    hidden = _conv(params, f"{name}.conv2", _norm_swish(params, f"{name}.norm2", hidden))
    if f"{name}.nin_shortcut.weight" in params:
        x = _conv(params, f"{name}.nin_shortcut", x)
    return x + hidden


def _attention(params: Params, name: str, x: Tensor) -> Tensor:
    """Every place looks at all places, with one head."""
    normed = _norm(params, f"{name}.norm", x)
    q, k, v = (_conv(params, f"{name}.{part}", normed).flatten(2).mT for part in "qkv")  # [b, h w, c]
    mixed = F.scaled_dot_product_attention(q, k, v)
    mixed = mixed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return x + _conv(params, f"{name}.proj_out", mixed)


_APPLY = {
    "conv": _conv,
    "point": _conv,
    "down": _down,
    "up": _up,
    "norm": _norm_swish,
    "residual": _residual,
    "attention": _attention,
}


# Images to codes and back ------------------------------------------------------------------------------
def encode_logits(cfg: VqConfig, params: Params, pixels: Tensor) -> Tensor:
    """The score of every code at every place of an image; the code is where it is highest.

    Args:
        params: from `init_vq` or `vqgan_files`.
        pixels: float [b, in_channels, y, x] within -1..1.
    Returns:
        [b, codes, h, w]: of kind "gumbel" logits, of kind "vq" minus the squared distance of each codebook vector.
    Raises:
        ValueError: another shape or dtype, or sides that are no multiples of `stride`.
    """
    return _scores(cfg, params, _encode(cfg, params, pixels))


def _encode(cfg: VqConfig, params: Params, pixels: Tensor) -> Tensor:
    """What is to be quantised, [b, d, h, w]."""
    fits = pixels.dim() == 4 and pixels.is_floating_point() and pixels.shape[1] == cfg.in_channels
    if not fits or 0 in pixels.shape or pixels.shape[2] % cfg.stride or pixels.shape[3] % cfg.stride:
        raise ValueError(
            f"encode: pixels must be floating point [b, {cfg.in_channels}, y, x], y and x multiples of "
            f"{cfg.stride}, got {pixels.dtype} {list(pixels.shape)}; resize the image"
        )
    return _run(_encoder(cfg), params, pixels)


def _scores(cfg: VqConfig, params: Params, z: Tensor) -> Tensor:
    if cfg.kind == "gumbel":
        scores = _conv(params, "quantize.proj", z)
    else:
        table = params[_codebook(cfg)]
        products = torch.einsum("bdhw,nd->bnhw", z, table)
        norms = z.square().sum(1, keepdim=True) + table.square().sum(1)[:, None, None]
        scores = 2 * products - norms
    return scores[:, params["quantize.used"]] if cfg.used else scores


def encode_codes(cfg: VqConfig, params: Params, pixels: Tensor, gen: Generator | None = None) -> Tensor:
    """The codes of images, int64 [b, h, w] within 0 .. codes - 1.

    Args:
        pixels: as `encode_logits`.
        gen: draws each code from the softmax of its logits, by Gumbel noise, as the reference does even at
            inference; left out, it is the likeliest or nearest one. It may lie on another device.
    Raises:
        ValueError: as `encode_logits`; `gen` for kind "vq", whose scores are no logits.
    """
    if gen is not None and cfg.kind != "gumbel":
        raise ValueError(
            "encode_codes: codes of kind vq cannot be drawn, only those of kind gumbel; leave gen out"
        )
    logits = encode_logits(cfg, params, pixels)
    if gen is not None:
        noise = torch.empty(logits.shape, device=gen.device).exponential_(generator=gen).log()
        logits = logits - noise.to(logits.device)
    return logits.argmax(1)


def decode_codes(cfg: VqConfig, params: Params, codes: Tensor) -> Tensor:
    """The images of codes.

    Args:
        codes: whole numbers [b, h, w] within 0 .. codes - 1.
    Returns:
        float [b, out_ch, h stride, w stride], about -1..1 and not clamped.
    Raises:
        ValueError: another shape or dtype, or codes out of range.
    """
    if codes.dim() != 3 or 0 in codes.shape or codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(
            f"decode: codes must be whole numbers [b, h, w], got {codes.dtype} {list(codes.shape)}"
        )
    low, high = (int(end) for end in codes.aminmax())
    if low < 0 or high >= cfg.codes:
        raise ValueError(f"decode: codes must lie in 0..{cfg.codes - 1}, got {low}..{high}")
    codes = codes.long()
    if cfg.used:
        codes = params["quantize.used"][codes]
    z = F.embedding(codes, params[_codebook(cfg)]).permute(0, 3, 1, 2)
    return _run(_decoder(cfg), params, z.contiguous())


def to_uint8(pixels: Tensor) -> Tensor:
    """Decoded images as colours: [b, c, y, x] -> uint8 [b, y, x, c], clamped to -1..1 and truncated, not rounded,
    as the reference does."""
    scaled = (pixels.clamp(-1, 1) + 1) / 2 * 255
    return scaled.to(torch.uint8).permute(0, 2, 3, 1)


def vq_loss(
    cfg: VqConfig, params: Params, pixels: Tensor, *, temperature: float | Tensor = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of images [b, c, y, x]: the mean absolute error, and what ties encoder and codebook together.

    "gumbel": codes are drawn with torch's default generator at `temperature`, their gradient is that of the softmax
    (straight through), and the KL divergence to equally likely codes is added. "vq": the nearest vectors, the gradient
    passes straight through; |z - sg(e)|^2 + 0.25 |sg(z) - e|^2 is added, weighed as published models were trained.
    Taming's perceptual and adversarial terms are not there.

    Returns:
        (loss, {"l1", "quantize": the other term, "codes": different codes in the batch})
    """
    z = _encode(cfg, params, pixels)
    scores = _scores(cfg, params, z)
    table = params[_codebook(cfg)]
    if cfg.used:
        table = table[params["quantize.used"]]
    codes = scores.argmax(1)
    if cfg.kind == "gumbel":
        one_hot = F.gumbel_softmax(scores, tau=temperature, dim=1, hard=True)  # type: ignore[arg-type]
        quantised = torch.einsum("bnhw,nd->bdhw", one_hot, table)
        share = scores.softmax(1)
        term = cfg.kl_weight * (share * (share * cfg.n_embed + 1e-10).log()).sum(1).mean()
    else:
        nearest = F.embedding(codes, table).permute(0, 3, 1, 2)
        term = (nearest.detach() - z).square().mean() + _BETA * (nearest - z.detach()).square().mean()
        quantised = z + (nearest - z).detach()
    decoded = _run(_decoder(cfg), params, quantised)
    l1 = (pixels - decoded).abs().mean()
    different = torch.zeros(cfg.codes, device=codes.device).index_fill(0, codes.flatten(), 1.0).sum()
    return l1 + term, {"l1": l1, "quantize": term, "codes": different}
