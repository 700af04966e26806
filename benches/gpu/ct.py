"""Phases: slices through the encoder, and a step of ct_clip by how it is chunked."""

from functools import partial

import torch
from attrs import evolve
from torch import Generator

from benches.gpu.measure import Place, Results, attempt, digits, kernels, timed
from benches.gpu.models import PUBLISHED
from medvl.base import config
from medvl.base.tree import map_leaves
from medvl.components import encode
from medvl.hub import skeletons
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip.record import Config, VitConfig
from medvl.training import loop, stages, states
from medvl.weights import lazy

VITB = PUBLISHED["facebook/dinov2-with-registers-base"]
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 70}


def vit_config(place: Place) -> dict:
    return place.size(VITB, VITB | _SMALL)


def encoder(place: Place, results: Results) -> None:
    """160 slices of 224 x 224 through ViT-B/14 by precision, beside transformers in bfloat16."""
    n, side = place.size((160, 224), (4, 56))
    vit, params = skeletons.init_skeleton(vit_config(place), Generator().manual_seed(0))
    d, depth = vit.config["hidden_size"], vit.config["num_hidden_layers"]
    tokens = 5 + (side // 14) ** 2
    flops = n * tokens * depth * (24 * d * d + 4 * tokens * d)
    results["GFLOP a slice"] = digits(flops / n / 1e9)
    voxels = torch.randint(0, 256, (1, n, side, side), dtype=torch.uint8)
    mask = torch.ones(1, n, dtype=torch.bool)
    on_device = voxels.to(place.device)
    weights = {
        "float32": lazy.move_params(params, place.device),
        "bfloat16": lazy.move_params(params, place.device, torch.bfloat16),
    }

    def measure(call):
        with torch.no_grad():
            numbers = timed(place, call)
        return {
            "ms a slice": digits(numbers["s"] / n * 1e3),
            "tflops": digits(flops / numbers["s"] / 1e12),
            "host_share": numbers["host_share"],
        }

    def ours(dtype, slices=on_device):
        cfg = encode.EncodeConfig(dtype=dtype)
        return encode.encode_slices(cfg, weights[dtype], slices, mask, vit=vit)

    def mixed():
        with torch.autocast(place.device.type, torch.bfloat16):
            ours("float32")

    attempt(results, "bfloat16", measure, partial(ours, "bfloat16"))
    attempt(results, "float32 under autocast", measure, mixed)
    attempt(results, "float32", measure, partial(ours, "float32"))
    attempt(results, "bfloat16, voxels on the host", measure, partial(ours, "bfloat16", voxels))
    peer = type(vit.module)(vit.module.config).eval()
    peer.load_state_dict(params, strict=False)
    peer = peer.to(place.device, torch.bfloat16)
    pixels = torch.randn(n, 3, side, side, device=place.device, dtype=torch.bfloat16)
    attempt(results, "transformers, bfloat16, one batch", measure, partial(peer, pixels))
    with torch.no_grad():
        attempt(results, "profile", kernels, place, partial(ours, "bfloat16"))


# What a step is varied by: settings of the record beside those of ctclip_vitb.toml.
VARIANTS = {
    "as ctclip_vitb.toml": (),
    "chunk 4": ("train.chunk=4",),
    "chunk 8, some slices computed again": ("train.chunk=8",),
}


def ct_step(place: Place, results: Results) -> None:
    """An optimiser step of ctclip_vitb with 32 volumes instead of 256 (time is linear in them)."""
    volumes, slices, side = place.size((32, 104, 224), (4, 3, 56))
    results["volumes"], results["slices"] = volumes, slices
    for name, settings in VARIANTS.items():
        attempt(results, name, _step, place, settings, volumes, slices, side)
    results["note"] = "a step of 256 volumes takes 8 times as long"


def _step(place: Place, settings: tuple[str, ...], volumes: int, slices: int, side: int) -> dict:
    cfg = config.load_record("experiments/ctclip_vitb.toml", Config, settings)
    cfg = evolve(
        cfg,
        vit=VitConfig(config=vit_config(place)),
        ct=evolve(cfg.ct, size=(slices, side, side), spacing_mm=(3.0, 1.5, 1.5)),
    )
    if place.tiny:
        tower = evolve(cfg.words.tower, context=16, dim=32, depth=1, heads=2)
        cfg = evolve(
            cfg,
            fuse=evolve(cfg.fuse, dim=64, depth=1, heads=4),
            words=evolve(cfg.words, tower=tower),
            train=evolve(cfg.train, chunk=2),
        )
    model, empty = ct_clip.empty_model(cfg)
    gen = Generator().manual_seed(0)
    params = map_leaves(lambda leaf: (torch.randn(leaf.shape, generator=gen) * 0.02).to(place.device), empty)
    batch = {
        "slices": torch.randint(0, 256, (volumes, slices, side, side), dtype=torch.uint8),
        "mask": torch.ones(volumes, slices, dtype=torch.bool),
        "position_mm": torch.arange(slices).float().expand(volumes, slices).contiguous() * 3,
        "ids": torch.randint(0, 1000, (volumes, 1, cfg.words.tower.context)),
        "words": torch.ones(volumes, 1, cfg.words.tower.context, dtype=torch.bool),
    }
    optimizer = stages.make_optimizer(cfg.train, cfg.train.stages[0], params, keyed=True)
    step = loop.make_step(ct_clip.contrastive_gradient(model, {}), optimizer, clip=1.0)
    state = states.State(params=params, opt=optimizer.init(params))
    latest = {"state": state}
    del state, params

    def once():
        latest["state"], _ = step(latest["state"], batch)

    numbers = timed(place, once, repeats=1)
    return numbers | {"volumes/s": digits(volumes / numbers["s"])}
