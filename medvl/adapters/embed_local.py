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
    if not any(analyse(text) for text in words):
        return (), {}
    tfidf = vectorizer.fit_transform(words)  # sparse [b, v]
    if tfidf.shape[1] == 1:
        # TruncatedSVD refuses a single feature; one word needs no reduction.
        directions = np.ones((1, 1))
        sizes = np.ones(1)
    else:
        # random_state: its randomised SVD would give another embedder each time.
        svd = TruncatedSVD(min(k, *tfidf.shape), random_state=0)
        with np.errstate(invalid="ignore"):  # the share of variance of texts that are all the same
            svd.fit(tfidf)
        directions = svd.components_  # [k, v]
        sizes = svd.singular_values_
    components = _components(directions, sizes)
    params = {
        "text.idf": torch.from_numpy(vectorizer.idf_.copy()),
        "text.components": components.T.contiguous(),
    }
    vocabulary = vectorizer.get_feature_names_out().tolist()
    return tuple(vocabulary), params


def fit_images(k: int, x: np.ndarray) -> dict[str, Tensor]:
    """{"image.mean" [f], "image.weight" [f], "image.components" [k, f]} of features [n, f], float64; each
    block counts the same.

    Raises:
        ValueError: fewer than two, or all the same.
    """
    from sklearn.decomposition import PCA

    n, f = x.shape
    mean = x.mean(0)
    std = x.std(0)
    varies = std > 1e-9
    if n < 2 or not varies.any():
        raise ValueError(f"fit_local: there must be at least two different images, or none, got {n}")
    # Standardised; a feature that is the same in all images says nothing and gets the weight 0.
    inverse_std = np.where(varies, 1 / np.where(varies, std, 1), 0)
    # Divided by the root of its block's size, so that each block counts the same.
    root_size = np.repeat(np.sqrt(BLOCKS), BLOCKS)
    weight = inverse_std / root_size
    # With 976 features the covariance [f, f] is small; its eigenvectors need no random start.
    pca = PCA(min(k, n - 1, f), svd_solver="covariance_eigh")
    pca.fit((x - mean) * weight)
    return {
        "image.mean": torch.from_numpy(mean),
        "image.weight": torch.from_numpy(weight),
        "image.components": _components(pca.components_, pca.singular_values_),
    }


def _components(rows: np.ndarray, sizes: np.ndarray) -> Tensor:
    """The rows that are more than rounding, the largest value of each positive, float64."""
    # Components of no size are directions of rounding, which differ from machine to machine.
    is_component = sizes > 1e-6 * sizes.max()
    rows = rows[is_component]
    # v and -v are equally singular vectors; the sign is fixed, so that the same input gives the same vectors.
    largest = np.abs(rows).argmax(1)
    sign = np.sign(rows[np.arange(len(rows)), largest])
    oriented = rows * sign[:, None]
    return torch.from_numpy(np.ascontiguousarray(oriented, dtype=np.float64))


def check_fitted(vocabulary: tuple[str, ...], params: Mapping[str, Tensor]) -> None:
    """Raise where what was read from files is not what `fit_texts` and `fit_images` give."""
    are_words = all(isinstance(word, str) for word in vocabulary)
    if not are_words or len({*vocabulary}) < len(vocabulary):
        raise ValueError("its vocabulary must be different words")
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    expected = _expected_shapes(len(vocabulary), shapes)
    if not expected or shapes != expected:
        raise ValueError(f"must hold {expected or 'a vocabulary or images'}, found {shapes}")
    for name, tensor in params.items():
        if not tensor.is_floating_point() or not tensor.numel() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must hold finite numbers")


def _expected_shapes(v: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters for a vocabulary of v words; the number of components is free."""
    expected: dict[str, tuple[int, ...]] = {}
    # (0,) where there are no components: the comparison fails then, by the missing name.
    if v:
        text_components = shapes.get("text.components") or (0,)
        expected["text.idf"] = (v,)
        expected["text.components"] = (v, text_components[-1])
    if "image.mean" in shapes:
        image_components = shapes.get("image.components") or (0,)
        f = int(BLOCKS.sum())
        expected["image.mean"] = (f,)
        expected["image.weight"] = (f,)
        expected["image.components"] = (image_components[0], f)
    return expected


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
        none_known = torch.zeros(len(words), dtype=torch.bool)
        return torch.zeros(len(words), 0), none_known
    tfidf = vectorizer.transform(words)  # sparse [b, v]
    projected = tfidf @ params["text.components"].numpy()
    return _directions(torch.from_numpy(projected))


def image_directions(params: Mapping[str, Tensor], pictures: Iterable[Image.Image]) -> tuple[Tensor, Tensor]:
    """(vectors of RGB pictures, float32 [n, k] of length 1, bool [n]: whether a picture differs from the mean
    one); n > 0.
    """
    mean = params["image.mean"].numpy()
    weight = params["image.weight"].numpy()
    components = params["image.components"].numpy()
    rows = []
    for picture in pictures:
        features = image_features(picture)
        # The same standardisation as in `fit_images`.
        standardised = (features - mean) * weight
        rows.append(components @ standardised)
    projected = np.stack(rows)
    return _directions(torch.from_numpy(projected))


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows [b, k] of length 1, bool [b]: whether a row has a direction)."""
    length = torch.linalg.vector_norm(x, dim=1)
    has_direction = length > _NOTHING
    # A row of rounding keeps its length: dividing by it would make a direction of noise.
    divisor = torch.where(has_direction, length, 1.0)
    directions = x / divisor[:, None]
    return directions.float(), has_direction


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
    pixels = np.asarray(image).reshape(-1, 3)
    grey = np.asarray(image.convert("L").resize((128, 128), Image.Resampling.BOX)) / 255
    blocks = [
        _colour_features(pixels),
        _thumbnail_features(image),
        _edge_features(grey),
        _spectrum_features(grey),
    ]
    return np.concatenate(blocks)


def _colour_features(pixels: np.ndarray) -> np.ndarray:
    """[64], from pixels uint8 [n, 3]."""
    levels = pixels // 64  # 4 levels of each channel
    colour = levels @ np.array([16, 4, 1])
    counts = np.bincount(colour, minlength=64)
    # Square roots of shares, as in Hellinger's distance: rare colours count too.
    return np.sqrt(counts / len(pixels))


def _thumbnail_features(image: Image.Image) -> np.ndarray:
    """[768]: 16 x 16 pixels of YCbCr."""
    small = image.resize((16, 16), Image.Resampling.BOX)
    channels = np.asarray(small.convert("YCbCr"))  # [16, 16, 3]
    return channels.reshape(-1) / 255


def _edge_features(grey: np.ndarray) -> np.ndarray:
    """[128], from brightness [128, 128]."""
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    # Modulo pi: dark on light is the same edge as light on dark.
    angle = np.arctan2(down, right) % np.pi
    # `% 8` catches an angle that rounds up to pi.
    direction = (angle / np.pi * 8).astype(int) % 8
    y, x = np.indices(grey.shape)
    place = y // 32 * 4 + x // 32
    bins = place * 8 + direction
    sums = np.bincount(bins.ravel(), strength.ravel(), 128)
    # Per pixel of a place, which is 32 x 32.
    return np.sqrt(sums / 32**2)


def _spectrum_features(grey: np.ndarray) -> np.ndarray:
    """[16], from brightness [128, 128]."""
    # Without its mean, which the thumbnail holds and which would alone fill ring 0.
    frequencies = np.fft.fft2(grey - grey.mean())
    power = np.abs(frequencies) ** 2 / grey.size
    # Distance from frequency 0; behind 64 the FFT's frequencies are negative.
    y, x = np.indices(grey.shape)
    radius = np.hypot(np.minimum(y, 128 - y), np.minimum(x, 128 - x))
    # Corners of the square lie beyond radius 64 and go into the last ring.
    ring = np.minimum(radius / 4, 15).astype(int)
    sums = np.bincount(ring.ravel(), power.ravel(), 16)
    pixels = np.bincount(ring.ravel(), minlength=16)
    # In logs, since power falls by orders of magnitude; 1e-6 is for pictures without any grain.
    return np.log(sums / pixels + 1e-6)
