"""Phases: patches of a slide into tokens, and what the host can deliver to a GPU."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from benches.gpu.measure import Place, Results, attempt, digits, seconds, timed
from medvl.base import store
from medvl.base.tree import Tree, map_leaves
from medvl.components import compress
from medvl.components.slots import CompressConfig
from medvl.ct import pairs
from medvl.ct.volumes import FIELDS
from medvl.language import qwen_vl
from medvl.training import gradients


def compressor(place: Place, results: Results) -> None:
    """A million patches of 1,024 numbers into 16 tokens, and a training batch of 8 bags of 4,096."""
    n, d, bags, patches = place.size((2**20, 1024, 8, 4096), (3000, 64, 2, 256))
    cfg = CompressConfig(dim=d, slots=16)
    params = compress.init_compress(cfg, Generator().manual_seed(0))
    slide = torch.randn(n, d, dtype=torch.float16)
    results["patches"] = n
    for device in {torch.device("cpu"), place.device}:
        for chunk in (4096, 65536):
            attempt(results, f"{device.type}, chunks of {chunk}", _stream, place, device, cfg, slide, chunk)
    batch = {"x": torch.randn(bags, patches, d), "mask": torch.ones(bags, patches, dtype=torch.bool)}
    on_device = map_leaves(lambda leaf: leaf.to(place.device), params)

    def loss(p: Tree, batch: dict[str, Tensor]) -> tuple[Tensor, gradients.Aux]:
        out = compress.compress(cfg, p, batch["x"].to(place.device), batch["mask"].to(place.device))
        return out.tokens.square().mean() + compress.reference_aux(out.aux), gradients.Aux()

    grad = gradients.value_and_grad(loss)
    moved = {name: t.to(place.device) for name, t in batch.items()}
    attempt(results, "gradient of bags", timed, place, partial(grad, on_device, batch))
    attempt(results, "gradient of bags on the device", timed, place, partial(grad, on_device, moved))


def _stream(
    place: Place, device: torch.device, cfg: CompressConfig, slide: Tensor, chunk: int
) -> dict[str, float]:
    params = compress.init_compress(cfg, Generator().manual_seed(0))
    params = map_leaves(lambda leaf: leaf.to(device), params)
    numbers = timed(place, lambda: compress.compress_stream(cfg, params, slide.split(chunk)), repeats=1)
    nbytes = slide.numel() * slide.itemsize
    return numbers | {"GB/s": digits(nbytes / numbers["s"] / 1e9)}


def data_path(place: Place, results: Results) -> None:
    """Volumes of a store and images a second, with one thread."""
    count, shape = place.size((48, (160, 224, 224)), (4, (8, 32, 32)))
    with tempfile.TemporaryDirectory() as folder:
        volumes = _write_store(Path(folder) / "volumes.h5", count, shape)
        read = seconds(place, lambda: pairs.read_slices(volumes, list(volumes.names)), repeats=2)
        results["volumes/s"] = digits(count / read)
        results["GB/s"] = digits(count * np.prod(shape) / read / 1e9)
    pixels = np.random.default_rng(0).integers(0, 255, place.size((1120, 896, 3), (64, 64, 3)), np.uint8)
    image = Image.fromarray(pixels)
    cfg = qwen_vl.ImageConfig(max_pixels=1003520)
    patchify = seconds(place, lambda: qwen_vl.patchify_image(cfg, image))
    results["images/s"] = digits(1 / patchify)


def _write_store(path: Path, count: int, shape: tuple[int, ...]) -> store.Store:
    names = [f"v{i}" for i in range(count)]
    store.create(path, names, shape, "uint8", {"made by": "benches/gpu"}, FIELDS)
    row = {
        "spacing_mm": (3.0, 1.5, 1.5),
        "source_spacing_mm": (3.0, 1.5, 1.5),
        "source_shape": shape,
        "occupied": (0, shape[0]),
        "hu_rule": "metadata",
        "slope": 1.0,
        "intercept": 0.0,
    }
    gen = np.random.default_rng(0)
    opened = store.open_store(path)
    for name in names:
        store.put(opened, name, gen.integers(0, 255, shape, np.uint8), row)
    return store.open_store(path)
