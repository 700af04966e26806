"""How much one picture resembles another: SSIM, PSNR and MSE, their means over a test set, and controls.

Pictures are uint8 [y, x] or [y, x, 3]. They are compared as float64 on [0, 255]: differences of uint8 wrap
around, and then pictures that have nothing in common get a PSNR of 28 dB.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from attrs import evolve
from PIL import Image

from medvl.evaluation import metrics
from medvl.evaluation.accuracy import bootstrap_share
from medvl.evaluation.results import Result

Array = np.ndarray
Window = Literal["gaussian", "uniform"]
WINDOWS = {
    "gaussian": "11 x 11, sigma 1.5, population covariance",  # that of the paper
    "uniform": "7 x 7, sample covariance",  # scikit-image's default
}


def mse(a: Array, b: Array) -> float:
    """The mean squared difference of two pictures in squared grey levels; args and errors as `ssim`."""
    x, y = _as_floats("mse", a, b)
    return float(((x - y) ** 2).mean())


def psnr(a: Array, b: Array) -> float:
    """10 log10(255^2 / MSE) in dB, infinite for equal pictures; args and errors as `ssim`."""
    error = mse(a, b)
    return 10 * np.log10(255**2 / error) if error else float("inf")


def ssim(a: Array, b: Array, *, window: Window = "gaussian") -> float:
    """The structural similarity of two pictures, 1 for equal ones; the mean over channels.

    Args:
        a, b: uint8 [y, x] or [y, x, 3], of one shape.
        window: see `WINDOWS`; only places where all of it lies inside the pictures count.
    Raises:
        ValueError: another dtype or shape, another window, pictures smaller than the window.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, eq. 13, K = (0.01, 0.03).
    """
    x, y = _as_floats("ssim", a, b)
    if window not in WINDOWS:
        raise ValueError(f"ssim: window must be {' or '.join(WINDOWS)}, got {window!r}")
    kernel = np.ones(7) if window == "uniform" else np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    if min(x.shape[:2]) < len(kernel):
        raise ValueError(
            f"ssim: pictures must have {len(kernel)} pixels or more a side for the {window} window, got "
            f"{x.shape[:2]}"
        )
    mean_x, mean_y = _filter(x, kernel), _filter(y, kernel)
    correction = 49 / 48 if window == "uniform" else 1.0  # of the sample covariance
    var_x = correction * (_filter(x * x, kernel) - mean_x**2)
    var_y = correction * (_filter(y * y, kernel) - mean_y**2)
    covariance = correction * (_filter(x * y, kernel) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def controls(
    inputs: Sequence[Array], targets: Sequence[Array], train_targets: Sequence[Array], vq: Sequence[Array]
) -> dict[str, list[Array]]:
    """What drawn pictures must beat, for each of the n targets, and what they can reach.

    Args:
        inputs: what the model was given, of any size; bicubically resized where it is not the target's.
        train_targets: the targets of the training split, whose mean is a control.
        vq: the targets as the VQ model reconstructs them from their own codes.
    Returns:
        "copied input", "mean target" and "vq reconstruction", n pictures each; without inputs (a picture from
        text) or vq without these.
    """
    mean = np.round(np.mean(np.stack(train_targets), 0, dtype=np.float64)).astype(np.uint8)
    pictures = {"copied input": [], "mean target": [mean] * len(targets), "vq reconstruction": list(vq)}
    for image, target in zip(inputs, targets, strict=bool(inputs)):
        if image.shape != target.shape:
            size = (target.shape[1], target.shape[0])
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        pictures["copied input"].append(image)
    return {name: kind for name, kind in pictures.items() if kind}


def score_pictures(
    pictures: Mapping[str, Sequence[Array]],
    targets: Sequence[Array],
    *,
    split: str,
    groups: Sequence[Any] | None = None,
    experiment: str = "",
    n: int = 1000,
    gen: torch.Generator,
) -> list[Result]:
    """Mean SSIM (both windows), PSNR and MSE of pictures beside their targets, with 95 % intervals.

    Args:
        pictures: {subject: one picture for each target}, such as {"ours": ...} | `controls(...)`.
        groups: the case of each target, drawn as a whole; every target is one of its own where None.
    Returns:
        rows "ssim_gaussian", "ssim_uniform", "psnr", "mse". Pictures equal to their target have no finite PSNR:
        its mean is over the others, and `extra["equal"]` counts them. Intervals are nan with one group.
    Raises:
        ValueError: as `ssim`; another number of pictures than of targets; no targets.
    """
    if not targets or any(len(kind) != len(targets) for kind in pictures.values()):
        counts = ", ".join(f"{len(kind)} of {subject}" for subject, kind in pictures.items())
        raise ValueError(f"score_pictures: needs a picture for each of {len(targets)} targets, got {counts}")
    cases = np.asarray(range(len(targets)) if groups is None else metrics.group_codes(groups)[0])
    # All rows see the same replicates.
    seed = int(torch.randint(2**62, (), generator=gen))
    rows = []
    for subject, kind in pictures.items():
        pairs = list(zip(kind, targets, strict=True))
        values = {
            "ssim_gaussian": [ssim(picture, target) for picture, target in pairs],
            "ssim_uniform": [ssim(picture, target, window="uniform") for picture, target in pairs],
            "psnr": [psnr(picture, target) for picture, target in pairs],
            "mse": [mse(picture, target) for picture, target in pairs],
        }
        for what, numbers in values.items():
            row = _mean(np.array(numbers), cases, n, torch.Generator().manual_seed(seed))
            window = {"window": WINDOWS[what[5:]]} if what.startswith("ssim") else {}
            row = evolve(row, what=what, subject=subject, split=split, experiment=experiment)
            rows.append(evolve(row, extra=row.extra | window))
    return rows


def _mean(values: Array, groups: Array, n: int, gen: torch.Generator) -> Result:
    """The mean of those values [n] that are finite, without its names."""
    finite = np.isfinite(values)
    _, codes, sizes = np.unique(groups[finite], return_inverse=True, return_counts=True)
    extra = {"groups": len(sizes), "equal": int((~finite).sum())}
    if not finite.any():
        return Result(what="", value=float("nan"), extra=extra)
    sums = np.bincount(codes, weights=values[finite])
    value, low, high = bootstrap_share(sums, sizes, n, gen)
    return Result(what="", value=value, low=low, high=high, n=int(finite.sum()), extra=extra)


def _as_floats(caller: str, a: Array, b: Array) -> tuple[Array, Array]:
    """Both pictures as float64, checked."""
    for picture in (a, b):
        is_picture = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)
        if picture.dtype != np.uint8 or not is_picture or picture.shape != a.shape:
            raise ValueError(
                f"{caller}: needs two pictures uint8 [y, x] or [y, x, 3] of one shape, got {a.dtype} "
                f"{list(a.shape)} and {b.dtype} {list(b.shape)}"
            )
    return a.astype(np.float64), b.astype(np.float64)


def _filter(x: Array, kernel: Array) -> Array:
    """The mean of x [y, x] or [y, x, c] under the window at every place where all of it lies inside."""
    for axis in (0, 1):
        x = np.lib.stride_tricks.sliding_window_view(x, len(kernel), axis) @ kernel
    return x
