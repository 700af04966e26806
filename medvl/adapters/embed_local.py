"""Texts and pictures as vectors without an encoder: TF-IDF and truncated SVD of words, PCA of colours, edges
and grain.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# b texts, n pictures, v vocabulary, k components, f features of a picture
# 4**3 colours; 16 x 16 pixels of 3 channels; 4 x 4 places of 8 directions; 16 rings.
BLOCKS = np.array([64, 768, 128, 16])  # features of a picture: colours, thumbnail, edges, spectrum
_NOTHING = 1e-6  # shorter than this, what the components see of a unit vector is rounding
_WORDS = 2**16  # at most, of the vocabulary: the most frequent


def fit_texts(k: int, words: list[str]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """(vocabulary, {"text.idf" [v], "text.components" [v, k]}), float64; nothing where no text has a word."""
    # Imported here: only kind "local" needs scikit-learn.
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer: Any = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=_WORDS)
    analyse = vectorizer.build_analyzer()
    if not any(analyse(w) for w in words):
        return (), {}
    x = vectorizer.fit_transform(words)
    components, sizes = np.ones((1, 1)), np.ones(1)
    # TruncatedSVD refuses a single feature; one word needs no reduction.
    if x.shape[1] > 1:
        with np.errstate(invalid="ignore"):  # the share of variance of texts that are all the same
            # random_state: its randomised SVD would give another embedder each time.
            svd = TruncatedSVD(min(k, *x.shape), random_state=0).fit(x)
        components, sizes = svd.components_, svd.singular_values_
    params = {
        "text.idf": torch.from_numpy(vectorizer.idf_.copy()),
        "text.components": _components(components, sizes).T.contiguous(),
    }
    return tuple(vectorizer.get_feature_names_out().tolist()), params


def fit_images(k: int, x: np.ndarray) -> dict[str, Tensor]:
    """{"image.mean" [f], "image.weight" [f], "image.components" [k, f]} of features [n, f], float64; each
    block counts the same.

    Raises:
        ValueError: fewer than two, or all the same.
    """
    from sklearn.decomposition import PCA

    mean, std = x.mean(0), x.std(0)
    alive = std > 1e-9
    if len(x) < 2 or not alive.any():
        raise ValueError(f"fit_local: there must be at least two different images, or none, got {len(x)}")
    # Standardised; and divided by the root of its block's size, so that each block counts the same.
    weight = np.where(alive, 1 / np.where(alive, std, 1), 0) / np.repeat(np.sqrt(BLOCKS), BLOCKS)
    # With 976 features the covariance [f, f] is small; its eigenvectors need no random start.
    pca = PCA(min(k, len(x) - 1, x.shape[1]), svd_solver="covariance_eigh").fit((x - mean) * weight)
    return {
        "image.mean": torch.from_numpy(mean),
        "image.weight": torch.from_numpy(weight),
        "image.components": _components(pca.components_, pca.singular_values_),
    }


def _components(rows: np.ndarray, sizes: np.ndarray) -> Tensor:
    """The rows that are more than rounding, the largest value of each positive."""
    # Components of no size are directions of rounding, which differ from machine to machine.
    rows = rows[sizes > 1e-6 * sizes.max()]
    # v and -v are equally singular vectors; the sign is fixed, so that the same input gives the same vectors.
    sign = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(1)])
    return torch.from_numpy(np.ascontiguousarray(rows * sign[:, None], dtype=np.float64))


def check_fitted(vocabulary: tuple[str, ...], params: Mapping[str, Tensor]) -> None:
    """Raise where what was read from files is not what `fit_texts` and `fit_images` give."""
    if not all(isinstance(word, str) for word in vocabulary) or len({*vocabulary}) < len(vocabulary):
        raise ValueError("its vocabulary must be different words")
    shapes = {name: tuple(t.shape) for name, t in params.items()}
    # (0,) where there are none: the comparison below fails then, by the missing name.
    components = {name: (shapes.get(f"{name}.components") or (0,)) for name in ("text", "image")}
    v, f = len(vocabulary), int(BLOCKS.sum())
    texts = {"text.idf": (v,), "text.components": (v, components["text"][-1])}
    images = {"image.mean": (f,), "image.weight": (f,), "image.components": (components["image"][0], f)}
    expected = (texts if v else {}) | (images if "image.mean" in shapes else {})
    if not expected or shapes != expected:
        raise ValueError(f"must hold {expected or 'a vocabulary or images'}, found {shapes}")
    if bad := [
        name
        for name, t in params.items()
        if not t.is_floating_point() or not t.numel() or not bool(t.isfinite().all())
    ]:
        raise ValueError(f"{bad[0]} must hold finite numbers")


def vectorizer_of(vocabulary: tuple[str, ...], params: Mapping[str, Tensor]) -> Any:
    """What makes TF-IDF of texts, from what `fit_texts` gave; None without a vocabulary."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not vocabulary:
        return None
    vectorizer: Any = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, vocabulary=list(vocabulary))
    # Set, not fitted: new texts are then weighed as those of the fit were.
    vectorizer.idf_ = params["text.idf"].numpy()
    return vectorizer


def text_directions(
    vectorizer: Any, params: Mapping[str, Tensor], words: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """(vectors of texts, float32 [b, k] of length 1, bool [b]: whether a text has a word that is known)."""
    if vectorizer is None:
        return torch.zeros(len(words), 0), torch.zeros(len(words), dtype=torch.bool)
    x = vectorizer.transform(words) @ params["text.components"].numpy()
    return _directions(torch.from_numpy(x))


def image_directions(params: Mapping[str, Tensor], pictures: Iterable[Image.Image]) -> tuple[Tensor, Tensor]:
    """(vectors of RGB pictures, float32 [n, k] of length 1, bool [n]: whether a picture differs from the mean
    one); n > 0.
    """
    mean = params["image.mean"].numpy()
    weight = params["image.weight"].numpy()
    components = params["image.components"].numpy()
    rows = []
    for picture in pictures:
        # The same standardisation as in `fit_images`.
        standardised = (image_features(picture) - mean) * weight
        rows.append(components @ standardised)
    return _directions(torch.from_numpy(np.stack(rows)))


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of length 1, whether a row has a direction)."""
    length = torch.linalg.vector_norm(x, dim=1)
    has_direction = length > _NOTHING
    return (x / torch.where(has_direction, length, 1.0)[:, None]).float(), has_direction


def side_by_side(
    params: Mapping[str, Tensor], text: Tensor, image: Tensor, with_images: bool
) -> tuple[Tensor, Tensor]:
    """[text, 0] and [0, image]; 0 for the images where there are none."""
    image_width = len(params.get("image.components", ()))
    right = image if with_images else torch.zeros(len(text), image_width)
    padded_text = torch.nn.functional.pad(text, (0, image_width))
    padded_image = torch.nn.functional.pad(right, (text.shape[1], 0))
    return padded_text, padded_image


def image_features(image: Image.Image) -> np.ndarray:
    """What a picture looks like, float64 [f].

    Shares of 64 colours; 16 x 16 of brightness and two colours; strength of edges in 4 x 4 places and 8
    directions; log power in 16 rings of the spectrum.
    """
    colour = np.asarray(image).reshape(-1, 3) // 64 @ np.array([16, 4, 1])  # 4 levels of each channel
    # Square roots of shares, as in Hellinger's distance: rare colours count too.
    colours = np.sqrt(np.bincount(colour, minlength=64) / len(colour))
    small = image.resize((16, 16), Image.Resampling.BOX).convert("YCbCr")
    thumbnail = np.asarray(small).reshape(-1) / 255
    grey = np.asarray(image.convert("L").resize((128, 128), Image.Resampling.BOX)) / 255

    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    # Modulo pi: dark on light is the same edge as light on dark. `% 8` catches an angle that rounds up to pi.
    direction = (np.arctan2(down, right) % np.pi / np.pi * 8).astype(int) % 8
    y, x = np.indices(grey.shape)
    place = y // 32 * 4 + x // 32
    sums = np.bincount((place * 8 + direction).ravel(), strength.ravel(), 128)
    # Per pixel of a place, which is 32 x 32.
    edges = np.sqrt(sums / 32**2)

    # Without its mean, which the thumbnail holds and which would alone fill ring 0.
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2 / grey.size
    # Distance from frequency 0; behind 64 the FFT's frequencies are negative.
    radius = np.hypot(np.minimum(y, 128 - y), np.minimum(x, 128 - x))
    # Corners of the square lie beyond radius 64 and go into the last ring.
    ring = np.minimum(radius / 4, 15).astype(int)
    mean_power = np.bincount(ring.ravel(), power.ravel(), 16) / np.bincount(ring.ravel(), minlength=16)
    # In logs, since power falls by orders of magnitude; 1e-6 is for pictures without any grain.
    spectrum = np.log(mean_power + 1e-6)
    return np.concatenate([colours, thumbnail, edges, spectrum])
