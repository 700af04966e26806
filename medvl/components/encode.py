"""CT slices to embeddings: HU windows as image channels, and a vision transformer over the slices that exist,
in chunks that fit.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from attrs import evolve, field, frozen
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medvl.base import config, processes, transfer
from medvl.weights import lazy

# b batch, s slices, n slices of all volumes that exist, y x voxel axes, d width. Voxels are Hounsfield units:
# int16 as they are, uint8 as -1000..1000 HU in 255 steps.
WINDOWS = ((-600.0, 1500.0), (40.0, 400.0), (400.0, 1800.0))  # (centre, width) in HU: lung, mediastinum, bone
# Bytes of one tensor. Beyond it the allocator returns memory at once, and training is 10-20 % slower.
_LARGEST_ON_CPU = 16 * 2**20


class Vit(Protocol):
    """What `encode_slices` needs of a skeleton (`loading.load_skeleton`)."""

    @property
    def module(self) -> torch.nn.Module: ...
    @property
    def config(self) -> dict[str, Any]: ...
    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any: ...


@frozen(kw_only=True)
class EncodeConfig:
    """How slices become embeddings. `float64` is for checks; `minmax` stretches every slice by itself, so HU
    are not comparable.
    """

    window: Literal["fixed", "minmax"] = "fixed"
    # pixels of a side, bilinear; 0 keeps the size
    resize: int = field(default=0, validator=config.in_bounds(0, 4096))
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    # "cls" is the class token after the last norm; "mean" and "max" go over patch tokens only.
    pool: Literal["cls", "mean", "max", "cls+mean", "mean+max"] = "cls"
    # "mean" and "max" over each cell of a grid x grid partition, side by side: more than 1 keeps where things
    # are. An embedding is [cell rows, cell columns, (mean and max,) width], flattened (He et al. 2014,
    # arXiv:1406.4729, one level).
    grid: int = 1
    # For the activations of one chunk on a CPU; on a GPU it is what is free there.
    budget_mib: int = field(default=2048, validator=config.in_bounds(1, 2**24))
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    # Keep only which slices a chunk has for the gradient, and compute it again; on a GPU only what finds no
    # room there.
    checkpoint: bool = False

    def __attrs_post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                "EncodeConfig: mean and std must be 3 numbers, std positive, "
                f"got mean={self.mean}, std={self.std}"
            )
        if self.grid < 1 or (self.grid > 1 and "cls" in self.pool):
            raise ValueError(
                "EncodeConfig: grid must be >= 1, and 1 for a pool with the class token, "
                f"got {self.grid} and {self.pool!r}"
            )
        config.check_bounds(self, "EncodeConfig", grid=(1, 64), mean=(-10, 10), std=(1e-3, 10))


def embedding_width(cfg: EncodeConfig, vit: Vit) -> int:
    """The length d of a slice embedding."""
    return vit.config["hidden_size"] * len(cfg.pool.split("+")) * cfg.grid**2


def windows(cfg: EncodeConfig, voxels: Tensor) -> Tensor:
    """HU as three image channels.

    Args:
        voxels: uint8 or int16 [..., y, x].
    Returns:
        float32 [..., 3, y, x]: lung (-600, 1500), mediastinum (40, 400) and bone (400, 1800) windows scaled
        to 0..1, or with window="minmax" the slice stretched to 0..1 and repeated; then (value - mean) / std.
    Raises:
        ValueError: another dtype.
    """
    if voxels.dtype not in (torch.uint8, torch.int16) or voxels.dim() < 2:
        raise ValueError(
            f"windows: voxels must be uint8 or int16 [..., y, x], got {voxels.dtype} {list(voxels.shape)}"
        )
    if cfg.window == "minmax":
        v = voxels.float()
        low = v.amin((-2, -1), keepdim=True)
        high = v.amax((-2, -1), keepdim=True)
        v = (v - low) / (high - low).clamp(min=1)  # a slice of one value becomes 0
        channels = []
        for mean, std in zip(cfg.mean, cfg.std, strict=True):
            channels.append((v - mean) / std)
        return torch.stack(channels, -3)
    if voxels.dtype == torch.int16:
        return torch.stack([_window(cfg, voxels.float(), c) for c in range(3)], -3)
    # uint8 has 256 levels: a table of each window is looked up instead of computing every voxel.
    hu = torch.arange(256, device=voxels.device) / 255 * 2000 - 1000
    levels = voxels.int().flatten()
    channels = []
    for c in range(3):
        table = _window(cfg, hu, c)  # [256]
        channels.append(table.index_select(0, levels).view(voxels.shape))
    return torch.stack(channels, -3)


def _window(cfg: EncodeConfig, hu: Tensor, channel: int) -> Tensor:
    centre, width = WINDOWS[channel]
    lowest = centre - width / 2
    share = ((hu - lowest) / width).clamp(0, 1)
    return (share - cfg.mean[channel]) / cfg.std[channel]


def encode_slices(
    cfg: EncodeConfig, params: Mapping[str, Tensor], voxels: Tensor, mask: Tensor, *, vit: Vit
) -> Tensor:
    """Embed every slice of a batch of volumes that exists.

    Args:
        params: weights of `vit`; cast once per call if their dtype is not cfg.dtype (load them in that dtype
            to save this). Adapters with weights per sample have a row for each of the b volumes, which all
            its slices take.
        voxels: uint8 or int16 [b, s, y, x], HU; may lie on another device than the weights.
        mask: bool [b, s], true where a slice exists. The host must know how many there are: it waits for a
            mask that lies on a GPU.
        vit: skeleton of the encoder.
    Returns:
        float32 [b, s, d] (float64 for dtype="float64") on the device of the weights, 0 where mask is false, d
        = `embedding_width(cfg, vit)`. Chunks and padding do not change it.
    Raises:
        ValueError: shapes or dtypes are others, y, x (after resize) are no multiples of the patch size, or
            weights per sample are for another number of volumes.
    """
    if voxels.dim() != 4 or mask.shape != voxels.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            "encode_slices: voxels must be [b, s, y, x] and mask bool [b, s], "
            f"got {list(voxels.shape)}, {mask.dtype} {list(mask.shape)}"
        )
    size = check_slice_size(cfg, (voxels.shape[2], voxels.shape[3]), patch_size(vit))
    dtype = getattr(torch, cfg.dtype)
    options = _forward_options(size, vit)
    weights = lazy.move_params(params, dtype=dtype)
    device = next(iter(weights.values())).device

    # Slices of all volumes in a row; those that do not exist are never encoded.
    slices = transfer.to_device(voxels, device).flatten(0, 1)
    existing = transfer.to_device(mask.flatten().nonzero()[:, 0], device)
    count, sharded = len(existing), any(isinstance(w, lazy.Sharded) for w in weights.values())
    if sharded:
        # Processes that gather each other's weights must call the encoder equally often: slice 0 stands in.
        most = int(processes.gather_rows(torch.tensor([count])).max())
        existing = F.pad(existing, (0, most - count))

    def encode_chunk(chosen: Tensor) -> Tensor:
        pixels = windows(cfg, slices.index_select(0, chosen))  # [n, 3, y, x]
        # An adapter's weights per volume become weights per slice.
        params_of_slices = lazy.per_row(weights, chosen // voxels.shape[1], len(voxels))
        output = vit(params_of_slices, _resize(pixels, size).to(dtype), **options)
        return _pool(cfg, vit, size, output)

    chunks: list[Tensor] = []
    start = 0
    for at_once, recompute in _plan_chunks(cfg, vit, size, device, len(existing), sharded):
        chosen = existing[start : start + at_once]
        start += at_once
        if recompute:
            chunk = checkpoint(encode_chunk, chosen, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = encode_chunk(chosen)
        chunks.append(chunk)
    # What comes after is small and computed in float32 at least.
    embedding_dtype = torch.promote_types(dtype, torch.float32)
    embeddings = torch.zeros(len(slices), embedding_width(cfg, vit), device=device, dtype=embedding_dtype)
    if chunks:
        encoded = torch.cat(chunks)[:count].to(embedding_dtype)
        embeddings = embeddings.index_copy(0, existing[:count], encoded)
    return embeddings.unflatten(0, mask.shape)


def whiten(
    cfg: EncodeConfig, params: Mapping[str, Tensor], voxels: Tensor, *, shrink: float = 0.01
) -> dict[str, Tensor]:
    """Weights of an untrained encoder whose patch embedding is whitened: over the patches of these slices its
    outputs have mean 0, variance 1 and no correlation, so that gradients do not spend their first epochs on
    the body's outline.

    Args:
        params: weights of an encoder, flat; the patch embedding is its one convolution.
        voxels: uint8 or int16 [n, y, x], slices to take the statistics of.
        shrink: share of the mean variance added to each variance, so that noise is not blown up.
    Returns:
        params with a new patch embedding: its first rows are the principal directions of a patch, most
        variance first; rows beyond the number of values in a patch stay as they are.
    Source: the whitened first layer of Page 2018, "How to train your ResNet" part 8, and Jordan 2024,
        arXiv:2404.00498, for patches.
    """
    names = [n for n, t in params.items() if t.dim() == 4]
    if len(names) != 1 or voxels.dim() != 3 or not len(voxels):
        raise ValueError(
            f"whiten: needs one patch embedding and slices [n, y, x], got {names} and {list(voxels.shape)}"
        )
    weight = params[names[0]]
    bias = names[0].removesuffix("weight") + "bias"
    size = (cfg.resize, cfg.resize) if cfg.resize else voxels.shape[-2:]
    pixels = _resize(windows(cfg, voxels), size).to(weight.device)
    patch = weight.shape[-2:]
    # All patches of all slices as rows [n, 3 y x], in the order of channels that a convolution's weight has.
    patches = F.unfold(pixels, patch, stride=patch).mT.flatten(0, 1).double()
    mean = patches.mean(0)
    centred = patches - mean
    covariance = centred.mT @ centred / len(patches)
    variance, directions = torch.linalg.eigh(covariance)
    spread = (variance + shrink * variance.mean()).sqrt()
    # eigh sorts by rising variance, so the rows are flipped.
    rows = (directions / spread).mT.flip(0)[: len(weight)]
    new = weight.flatten(1).double().clone()
    new[: len(rows)] = rows
    whitened = dict(params) | {names[0]: new.view_as(weight).to(weight.dtype)}
    # The bias takes the mean off, so that outputs have mean 0.
    if bias in params:
        whitened[bias] = -(new @ mean).to(weight.dtype)
    return whitened


def _plan_chunks(
    cfg: EncodeConfig, vit: Vit, size: tuple[int, int], device: torch.device, n: int, sharded: bool
) -> list[tuple[int, bool]]:
    """(number of slices, whether to compute them again for the gradient) of each chunk of n slices."""
    if sharded:
        # By no process's own memory, and few calls, as each gathers all weights; its layers are computed again anyway.
        return _split(n, chunk_size(evolve(cfg, checkpoint=False), vit, size, device), False)
    again = n if cfg.checkpoint and torch.is_grad_enabled() else 0
    free = transfer.free_bytes(device)
    if free is None:
        at_once = chunk_size(cfg, vit, size, device)
        return _split(n, at_once, again > 0)
    # Some is left for what this cannot know: the other tower's activations, pieces too small to use.
    budget = free * 4 // 5
    work, kept = _slice_bytes(cfg, vit, size)
    # Three quarters for what is kept for the gradient, one for the chunk that is computed. To compute slices
    # again costs a forward pass, so it is done to those only that find no room. They come first: the gradient
    # begins at the end, and has let go of what was kept when it comes to them.
    again = max(0, again - budget * 3 // 4 // kept)
    at_once = max(1, budget // 4 // work)
    at_once_again = max(1, budget * 3 // 4 // (work + kept))
    return _split(again, min(at_once, at_once_again), True) + _split(n - again, at_once, False)


def _split(n: int, at_once: int, recompute: bool) -> list[tuple[int, bool]]:
    return [(min(at_once, n - start), recompute) for start in range(0, n, at_once)]


def chunk_size(cfg: EncodeConfig, vit: Vit, size: tuple[int, int], device: torch.device) -> int:
    """Slices [y, x] = `size` that go through the encoder together: as many as `budget_mib` holds, at least
    one.

    With checkpoint=True they hold what a gradient keeps of them too. Without it a gradient keeps that of all
    slices whatever the chunk.
    """
    work, kept = _slice_bytes(cfg, vit, size)
    recompute = cfg.checkpoint and torch.is_grad_enabled()
    most = cfg.budget_mib * 2**20 // (work + kept if recompute else work)
    if device.type == "cpu":
        most = min(most, _LARGEST_ON_CPU // _widest_bytes(cfg, vit, size))
    return max(1, most)


def _slice_bytes(cfg: EncodeConfig, vit: Vit, size: tuple[int, int]) -> tuple[int, int]:
    """Bytes of a slice [y, x] = `size` while it is encoded, and those kept for its gradient.

    Counted per token: 5 d + 2 h values at the widest place of a block (h the hidden width of the MLP), and
    10 d + 2 h that a block keeps for its gradient.
    """
    d, depth = vit.config["hidden_size"], vit.config["num_hidden_layers"]
    h = _hidden_width(vit)
    value_bytes = torch.finfo(getattr(torch, cfg.dtype)).bits // 8
    token_bytes = _count_tokens(vit, size) * value_bytes
    # Three channels in float32, twice: before and after they are resized or cast.
    pixel_bytes = 2 * 3 * 4 * size[0] * size[1]
    return pixel_bytes + token_bytes * (5 * d + 2 * h), token_bytes * depth * (10 * d + 2 * h)


def _widest_bytes(cfg: EncodeConfig, vit: Vit, size: tuple[int, int]) -> int:
    """Bytes of a slice's largest tensor, which is inside the MLP."""
    value_bytes = torch.finfo(getattr(torch, cfg.dtype)).bits // 8
    return _count_tokens(vit, size) * _hidden_width(vit) * value_bytes


def _hidden_width(vit: Vit) -> int:
    """Of the MLP of a block."""
    c = vit.config
    return c.get("intermediate_size") or int(c["hidden_size"] * c["mlp_ratio"])


def _count_tokens(vit: Vit, size: tuple[int, int]) -> int:
    num_patches = size[0] * size[1] // patch_size(vit) ** 2
    return 1 + vit.config.get("num_register_tokens", 0) + num_patches


def _resize(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    if size == pixels.shape[-2:]:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)


def check_slice_size(cfg: EncodeConfig, stored: tuple[int, int], patch: int) -> tuple[int, int]:
    """The size (y, x) in which slices of the size `stored` are encoded.

    Raises:
        ValueError: patches, or the cells of the grid, do not fill it.
    """
    size = (cfg.resize, cfg.resize) if cfg.resize else stored
    if any(n % patch or not n for n in size):
        near: set[int] = set()  # the multiples below and above each side
        for n in size:
            below = n // patch * patch
            near |= {max(patch, below), max(patch, below + patch)}
        raise ValueError(
            f"encode_slices: y and x must be multiples of the patch size {patch}, got {size[0]}x{size[1]}; "
            f"nearest are {', '.join(map(str, sorted(near)))}: set EncodeConfig.resize or store slices of "
            "such a size"
        )
    if any(n // patch % cfg.grid for n in size):
        raise ValueError(
            f"encode_slices: grid {cfg.grid} must divide the {size[0] // patch} x {size[1] // patch} patches"
        )
    return size


def patch_size(vit: Vit) -> int:
    """The side of an encoder's patches, in pixels."""
    patch = vit.config["patch_size"]
    return patch if isinstance(patch, int) else patch[0]


def _forward_options(size: tuple[int, int], vit: Vit) -> dict[str, bool]:
    """Plain ViT and CLIP interpolate their position embedding only where they are told to; DINO does by
    itself.
    """
    trained = vit.config["image_size"]
    trained_size = (trained, trained) if isinstance(trained, int) else tuple(trained)
    has_option = "interpolate_pos_encoding" in inspect.signature(vit.module.forward).parameters
    if size != trained_size and has_option:
        return {"interpolate_pos_encoding": True}
    return {}


def _pool(cfg: EncodeConfig, vit: Vit, size: tuple[int, int], output: Any) -> Tensor:
    """[n, d] of the encoder's output for n slices."""
    tokens = output.last_hidden_state  # [n, tokens, width]: class, registers, patches
    num_special = 1 + vit.config.get("num_register_tokens", 0)
    patches = tokens[:, num_special:]
    cell_rows = size[0] // patch_size(vit) // cfg.grid
    # Patches lie row by row; r and c say which cell of the grid, y and x where in the cell.
    cells = rearrange(patches, "n (r y c x) d -> n (r c) (y x) d", r=cfg.grid, c=cfg.grid, y=cell_rows)
    pooled = []
    for kind in cfg.pool.split("+"):
        if kind == "mean":
            pooled.append(cells.mean(2))
        elif kind == "max":
            pooled.append(cells.amax(2))
        elif vit.config["model_type"] == "clip_vision_model":
            # CLIP's last norm is on the class token only.
            pooled.append(output.pooler_output[:, None])
        else:
            pooled.append(tokens[:, :1])
    return torch.cat(pooled, -1).flatten(1)
