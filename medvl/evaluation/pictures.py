"""How much one picture resembles another: SSIM, PSNR and MSE, their means over a test set, and controls.

Pictures are uint8 [y, x] or [y, x, 3], compared as float64 on [0, 255]: differences of uint8 wrap around, and
pictures that have nothing in common then get a PSNR of 28 dB.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from medvl.evaluation.accuracy import bootstrap_share
from medvl.evaluation.metrics import group_codes
from medvl.evaluation.results import Result

Array = np.ndarray


_KERNELS = {"gaussian": np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2)), "uniform": np.ones(7)}


def check_sides(shape: tuple[int, ...], where: str = "ssim", window: str = "gaussian") -> None:
    """Raise where pictures [y, x, ...] are smaller than a window of `ssim`."""
    side = len(_KERNELS[window])
    if min(shape[:2]) < side:
        raise ValueError(f"{where}: pictures must have {side} pixels a side or more, got {shape[:2]}")


def mse(a: Array, b: Array) -> float:
    """The mean squared difference in squared grey levels; arguments and errors as `ssim`."""
    x, y = _as_floats(a, b)
    return float(((x - y) ** 2).mean())


def psnr(a: Array, b: Array) -> float:
    """10 log10(255^2 / MSE) in dB, infinite for equal pictures; arguments and errors as `ssim`."""
    error = mse(a, b)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(a: Array, b: Array, *, window: Literal["gaussian", "uniform"] = "gaussian") -> float:
    """The structural similarity, 1 for equal pictures: the mean over channels and over all places where the
    whole window lies inside the pictures.

    Args:
        a, b: uint8 [y, x] or [y, x, 3], of one shape.
        window: "gaussian" 11 x 11 with sigma 1.5 (the paper's), "uniform" 7 x 7 with sample covariance
            (scikit-image's default).
    Raises:
        ValueError: another dtype or shape, another window, pictures smaller than the window.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, eq. 13.
    """
    x, y = _as_floats(a, b)
    if window not in _KERNELS:
        raise ValueError(f"ssim: window must be gaussian or uniform, got {window!r}")
    check_sides(a.shape, window=window)
    kernel = _KERNELS[window] / _KERNELS[window].sum()
    mean_x, mean_y = _filter(x, kernel), _filter(y, kernel)
    unbiased = 49 / 48 if window == "uniform" else 1
    variances = unbiased * (_filter(x * x + y * y, kernel) - mean_x**2 - mean_y**2)
    covariance = unbiased * (_filter(x * y, kernel) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((numerator / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


_SCORES: dict[str, Callable[[Array, Array], float]] = {
    "ssim_gaussian": ssim,
    "ssim_uniform": partial(ssim, window="uniform"),
    "psnr": psnr,
    "mse": mse,
}


def mean_picture(pictures: Sequence[Array]) -> Array:
    """The mean of pictures of one shape, rounded to uint8."""
    return np.asarray(np.stack(pictures).mean(0, dtype=np.float64).round(), np.uint8)


def controls(
    inputs: Sequence[Array], targets: Sequence[Array], means: Sequence[Array], vq: Sequence[Array]
) -> dict[str, Sequence[Array]]:
    """What drawn pictures must beat, and what they can reach, a picture for each target.

    Args:
        inputs: what the model was given; resized (bicubic) to the target's size.
        means: for each target the mean of targets of the training split.
        vq: the targets as decoded from their own codes.
    Returns:
        {"copied input", "mean target", "vq reconstruction"}, only those that there are such pictures for.
    """
    copied = []
    for image, target in zip(inputs, targets, strict=bool(inputs)):
        size = (target.shape[1], target.shape[0])
        copied.append(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)))
    found = {"copied input": copied, "mean target": means, "vq reconstruction": vq}
    return {subject: pictures for subject, pictures in found.items() if len(pictures)}


def score_pictures(
    pictures: Mapping[str, Sequence[Array]],
    targets: Sequence[Array],
    groups: Sequence[Any],
    *,
    split: str,
    experiment: str = "",
    n: int = 1000,
    gen: torch.Generator,
) -> list[Result]:
    """Means of "ssim_gaussian", "ssim_uniform", "psnr" and "mse" with 95 % intervals.

    Args:
        pictures: {subject: a picture for each target}, such as {"ours": ...} | `controls(...)`.
        groups: the case of each target, drawn as a whole; `range(len(targets))` where each is its own.
    Returns:
        a row of each subject and score. A picture equal to its target has no finite PSNR: that mean is over
        the others, and `extra["equal"]` counts them.
    Raises:
        ValueError: as `ssim`; no targets, another number of pictures or groups.
    """
    numbers = {len(groups), *(len(found) for found in pictures.values())}
    if not targets or numbers != {len(targets)}:
        raise ValueError(
            f"score_pictures: each of {len(targets)} targets needs a group and pictures, got {numbers}"
        )
    seed = int(torch.randint(2**62, (), generator=gen))  # all rows see the same replicates
    rows = []
    for subject, found in pictures.items():
        for what, score in _SCORES.items():
            values = np.array([score(*pair) for pair in zip(found, targets, strict=True)])
            finite = np.isfinite(values)
            codes, k = group_codes([group for group, keep in zip(groups, finite, strict=True) if keep])
            value = low = high = float("nan")
            if k:
                sums, sizes = np.bincount(codes, values[finite]), np.bincount(codes)
                value, low, high = bootstrap_share(sums, sizes, n, torch.Generator().manual_seed(seed))
            extra = {"groups": k, "equal": int((~finite).sum())}
            about: dict[str, Any] = {"subject": subject, "split": split, "experiment": experiment}
            n_finite = int(finite.sum())
            rows.append(Result(what=what, value=value, low=low, high=high, n=n_finite, extra=extra, **about))
    return rows


def _as_floats(a: Array, b: Array) -> tuple[Array, Array]:
    """Both pictures as float64, checked."""
    is_picture = a.ndim == 2 or (a.ndim == 3 and a.shape[2] == 3)
    if not is_picture or a.shape != b.shape or not a.dtype == b.dtype == np.uint8:
        raise ValueError(
            f"pictures: must be two uint8 [y, x] or [y, x, 3] of one shape, got {a.dtype} {list(a.shape)} and "
            f"{b.dtype} {list(b.shape)}"
        )
    return a.astype(np.float64), b.astype(np.float64)


def _filter(x: Array, kernel: Array) -> Array:
    """The weighted mean of x [y, x] or [y, x, c] under the window, wherever all of it lies inside."""
    for axis in (0, 1):
        x = np.lib.stride_tricks.sliding_window_view(x, len(kernel), axis) @ kernel
    return x
