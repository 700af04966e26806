"""Pictures as codes: a VQ model is trained on images, and the codes of pictures are computed once."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from PIL import Image
from torch import Generator, Tensor

from medvl.base import config, files, processes
from medvl.base.cache import CacheFolder, compute_missing
from medvl.base.tree import Tree, map_leaves
from medvl.components import vq
from medvl.components.vq import Params, VqConfig
from medvl.hub import skeletons
from medvl.hub.vqgan_files import open_vqgan, write_vqgan
from medvl.language.images import Picture, open_image, to_rgb
from medvl.training import gradients, order, stages
from medvl.training.record import Stage, TrainConfig, refuse_settings, refuse_stage_batches

Open = Callable[[files.PathLike], Image.Image]


@frozen(kw_only=True)
class VqTraining:
    """How a VQ model is trained on images; patterns of its stages match names such as decoder.conv_in.weight."""

    start: str = ""  # folder of a VQ model that is trained further; "" = `model` from scratch
    model: VqConfig = config.subrecord(VqConfig())
    # Of kind gumbel: in the first and in the last step, between them half a cosine.
    temperature: tuple[float, ...] = (0.9, 0.1)
    train: TrainConfig = config.table(defaults={"stages": {"train": [".*"]}})

    def __attrs_post_init__(self) -> None:
        config.check_bounds(self, "vq", temperature=(1e-6, 100))
        refuse_stage_batches(self.train, "vq.train")
        if len(self.temperature) != 2:
            raise ValueError(f"vq.temperature must be [first, last], got {list(self.temperature)}")
        reason = "that is for language models"
        refuse_settings(self.train, "vq.train", reason, tokens=0, packing=False, logits=256, shard=False)


def vq_pixels(image: Picture, side: int = 256) -> Tensor:
    """A picture as a VQ model takes it: float [3, side, side] within -1..1.

    It is resized by Lanczos without regard to its aspect ratio, as the reference does; the vision tower's images are
    padded to a square instead.
    """
    resized = to_rgb(image, "vq_pixels").resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 * 2 - 1


# Training ---------------------------------------------------------------------------------------------------
def fit_vq(
    cfg: VqTraining,
    images: Mapping[str, Sequence[files.PathLike]],
    folder: Path,
    *,
    open_picture: Open = open_image,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> tuple[VqConfig, Params]:
    """Train a VQ model, or go on with it, in a folder; where it is trained already, it is read.

    The score that decides which state is kept is the mean absolute error of the reconstruction of the valid images.

    Args:
        images: {"train", "valid": files}; of "valid" at most `train.valid` are used, and it may be left out.
        folder: gets a folder for each stage, and "vq", which `open_vqgan` reads.
    Raises:
        ValueError: fewer images than a batch, or one that cannot be read.
    """
    if (folder / "vq").is_dir():
        return open_vqgan(folder / "vq")
    model, params = cfg.model, vq.init_vq(cfg.model, Generator().manual_seed(seed))
    if cfg.start:
        model, params = open_vqgan(cfg.start)
    device = processes.choose_device(cfg.train.device)
    params = {name: tensor.to(device) for name, tensor in params.items()}
    # Numbers of the used codes are no weights, and have no gradient.
    used = {name: params.pop(name) for name in list(params) if not params[name].is_floating_point()}
    train, valid = images["train"], images.get("valid", ())[: cfg.train.valid or None]

    def read_pixels(paths: Sequence[files.PathLike]) -> Tensor:
        return torch.stack([vq_pixels(open_picture(path), model.resolution) for path in paths])

    def batches(stage: Stage) -> Callable[[int], gradients.Batch]:
        numbers = [str(i) for i in range(len(train))]
        rank, world = processes.rank(), processes.world_size()
        share = order.batch_indices(numbers, cfg.train.batch, seed, rank=rank, world=world)

        def batch_at(i: int) -> gradients.Batch:
            pixels = read_pixels([train[j] for j in share(i)])
            # In each row, so that a micro-batch has it, too.
            temperature = torch.full((len(pixels),), _temperature(cfg, i / max(1, stage.steps - 1)))
            return {"pixels": pixels, "temperature": temperature}

        return batch_at

    def loss_sum(weights: Tree, batch: gradients.Batch) -> tuple[Tensor, int, gradients.Aux]:
        count = len(batch["pixels"])
        temperature = float(batch["temperature"][0])
        loss, parts = vq.vq_loss(model, weights | used, batch["pixels"].to(device), temperature=temperature)
        metrics = {name: part * count for name, part in parts.items()}
        return loss * count, count, gradients.Aux(metrics=metrics)

    def validate(weights: Tree) -> float:
        return _mean_error(model, weights | used, valid, read_pixels)

    trained = stages.fit_stages(
        cfg.train,
        params,
        loss_sum,
        batches,
        folder,
        cut=lambda batch, rows: {name: tensor[rows] for name, tensor in batch.items()},
        conversations=lambda stage: len(train),
        validate=lambda stage: validate if valid else None,
        seed=seed,
        log=log,
    )
    params = map_leaves(lambda leaf: leaf.cpu(), trained | used)
    if processes.rank() == 0:
        write_vqgan(model, params, folder / "vq")
    processes.wait_for_all()
    return model, params


@torch.no_grad()
def _mean_error(
    cfg: VqConfig,
    params: Params,
    paths: Sequence[files.PathLike],
    read_pixels: Callable[[Sequence[files.PathLike]], Tensor],
) -> float:
    """The mean absolute error of images as decoded from their own codes; each process takes its share of them."""
    total = torch.zeros(2, dtype=torch.float64)
    for number, counts in processes.share_batches(len(paths)):
        pixels = read_pixels(paths[number : number + 1]).to(params["quant_conv.bias"].device)
        decoded = vq.decode_codes(cfg, params, vq.encode_codes(cfg, params, pixels))
        if counts:
            total += torch.tensor([float((decoded - pixels).abs().mean()), 1])
    error, count = processes.sum_over_processes(total).tolist()
    return error / count


def _temperature(cfg: VqTraining, share: float) -> float:
    """After this share of a stage's steps."""
    first, last = cfg.temperature
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


# Codes ------------------------------------------------------------------------------------------------------
def target_codes(
    cfg: VqConfig,
    params: Params,
    paths: Sequence[files.PathLike],
    folder: files.PathLike,
    *,
    open_picture: Open = open_image,
    opened: str = "",
    together: bool = False,
) -> dict[str, Tensor]:
    """{path: the likeliest codes int64 [h, w]} of picture files by a frozen VQ model; each content is computed once.

    Args:
        folder: the cache. Codes lie in a folder of these weights and settings, in a file for each content.
        opened: what else decides about the codes, such as the window that `open_picture` applies.
        together: all processes call this at once: each computes its share and reads the others'.
    Raises:
        ValueError: a picture that cannot be read, or a file of codes that is broken.
    """
    side = cfg.resolution
    keys = {str(path): files.file_digest(path) for path in paths}
    cache = CacheFolder(
        folder=Path(folder) / skeletons.weights_name(f"{cfg} {opened}", params),
        shape=(side // cfg.stride, side // cfg.stride),
        remedy="remove it, the picture's codes will be computed again",
    )
    device = next(iter(params.values())).device

    @torch.no_grad()
    def compute(path: str) -> None:
        pixels = vq_pixels(open_picture(path), side)[None].to(device)
        codes = vq.encode_codes(cfg, params, pixels)
        cache.write(keys[path], codes[0].to("cpu", torch.int32).numpy())

    compute_missing(
        [*keys], lambda path: cache.has(keys[path]), compute, "coding pictures", together=together
    )
    return {path: torch.from_numpy(cache.read(key)).long() for path, key in keys.items()}
