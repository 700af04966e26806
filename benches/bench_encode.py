"""The slice encoder: against transformers' own call on a padded batch, its gradient, and what the parts around the module cost.

The batch is padded as CT-RATE's volumes are at 160 slices: 65 % of the slices exist. On a GPU the encoder is DINOv2-B at 224 px, on a CPU a
small one of the same kind (CPUs without bfloat16 units compute it slowly: there the ratio counts, not the time).
"""

import pytest
import torch
from torch import Tensor

from medvl.components.encode import EncodeConfig, encode_slices, windows
from medvl.hub import skeletons

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = {
    "model_type": "dinov2",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
}
TINY = SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 32}
BASE = {
    "model_type": "dinov2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 518,
    "patch_size": 14,
}


def encoder(config: dict, dtype: torch.dtype = torch.float32) -> tuple[skeletons.Skeleton, skeletons.Params]:
    skeleton, params = skeletons.init_skeleton(config, torch.Generator().manual_seed(0))
    return skeleton, {n: t.to(DEVICE, dtype) for n, t in params.items()}


def volumes(b: int, s: int, px: int) -> tuple[Tensor, Tensor]:
    """Voxels uint8 [b, s, y, x] and mask [b, s] with 65 % of the slices."""
    gen = torch.Generator().manual_seed(0)
    counts = torch.linspace(0.3 * s, s, b).round()
    mask = torch.arange(s) < counts[:, None]
    return torch.randint(0, 256, (b, s, px, px), generator=gen, dtype=torch.uint8).to(DEVICE), mask.to(DEVICE)


def module_of(config: dict, params: skeletons.Params, attention: str, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' module with these weights."""
    from transformers import AutoConfig, AutoModel

    options = {k: v for k, v in config.items() if k != "model_type"}
    model = AutoModel.from_config(
        AutoConfig.for_model(config["model_type"], **options), attn_implementation=attention
    )
    model.load_state_dict(params)
    return model.to(DEVICE, dtype).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("who", ["medvl", "transformers_eager", "transformers_sdpa"])
def bench_padded_batch(measure, who, dtype):
    """transformers gets ready pixels of all slices in one call; medvl gets uint8 voxels and the mask."""
    config = BASE if CUDA else SMALL if dtype == "float32" else TINY
    b, s, px = (4, 160, 224) if CUDA else (8, 20, config["image_size"])
    skeleton, params = encoder(config, getattr(torch, dtype))
    voxels, mask = volumes(b, s, px)
    cfg = EncodeConfig(dtype=dtype, budget_mib=16384 if CUDA else 2048)
    shape = {
        "b": b,
        "s": s,
        "px": px,
        "width": config["hidden_size"],
        "slices": int(mask.sum()),
        "dtype": dtype,
    }
    with torch.no_grad():
        if who == "medvl":
            measure(lambda: encode_slices(cfg, params, voxels, mask, vit=skeleton), rounds=5, **shape)
        else:
            module = module_of(config, params, who.removeprefix("transformers_"), getattr(torch, dtype))
            pixels = windows(cfg, voxels.flatten(0, 1)).to(getattr(torch, dtype))
            measure(lambda: module(pixels).last_hidden_state[:, 0], rounds=5, **shape)


@pytest.mark.parametrize("again", [False, True], ids=["keep", "checkpoint"])
def bench_gradient(measure, again):
    """Forward and backward of a small encoder over the slices of 8 volumes."""
    skeleton, params = encoder(SMALL)
    voxels, mask = volumes(8, 20, 64)
    leaves = {n: t.requires_grad_("mask_token" not in n) for n, t in params.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]

    def step():
        out = encode_slices(EncodeConfig(checkpoint=again, budget_mib=64), leaves, voxels, mask, vit=skeleton)
        return torch.autograd.grad(out.square().sum(), wanted)

    measure(step, rounds=5, b=8, s=20, px=64, width=128, slices=int(mask.sum()))


@pytest.mark.parametrize("who", ["skeleton", "module"])
def bench_call_overhead(measure, who):
    """One slice of 32 px through 12 narrow blocks: what binding 223 weights adds to a call."""
    config = TINY | {"num_hidden_layers": 12}
    skeleton, params = encoder(config)
    x = torch.zeros(1, 3, 32, 32, device=DEVICE)
    module = module_of(config, params, "sdpa", torch.float32)
    with torch.no_grad():
        measure(
            (lambda: skeleton(params, x)) if who == "skeleton" else lambda: module(x),
            rounds=30,
            weights=len(params),
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=["uint8", "int16"])
def bench_windows(measure, dtype):
    voxels = torch.randint(0, 256, (16, 224, 224), dtype=dtype, device=DEVICE)
    measure(windows, EncodeConfig(), voxels, rounds=10, slices=16, px=224)


def bench_digest(measure):
    params = {str(i): torch.rand(2**22) for i in range(4)}
    measure(skeletons.weights_digest, params, rounds=5, mib=64)
