"""Drawn whole slides as patch features; `slide_questions` asks about them. They show no patient.

A slide is a few pieces of tissue cut into patches. A patch has the prototype of its tissue as features, with
variation and noise, and all are shifted by the slide's stain. Four slides in five have a rare motif in one
patch, or a few of 10,000: a direction of its own, which does not show in the mean over the slide.
"""

from itertools import combinations
from pathlib import Path

import h5py
import numpy as np
from attrs import frozen

from medvl.base import config, files
from medvl.base.display import track

Array = np.ndarray
SPLITS = ("train", "valid", "test")
OPTIONAL = ("fat", "normal epithelium", "muscle", "mucus")  # a slide has two of them
TISSUES = ("stroma", "tumour", "necrosis", "lymphocytes", *OPTIONAL)
CLASSES = {  # of the tumour: code, treatment
    "adenocarcinoma": ("ADC", "Surgical resection"),
    "squamous cell carcinoma": ("SCC", "Radiotherapy"),
    "small cell carcinoma": ("SMC", "Platinum chemotherapy"),
    "melanoma": ("MEL", "Checkpoint inhibitor"),
}
MOTIFS = {  # and the tissue it lies in
    "mitosis cluster": "tumour",
    "vascular invasion": "stroma",
    "granuloma": "stroma",
    "microcalcification": "tumour",
}
NO_MOTIF = "none"
NECROSIS = ((0.01, 0.03), (0.08, 0.12), (0.17, 0.2))  # share of the patches, by grade
LYMPHOCYTES = {"low": (0.01, 0.03), "high": (0.12, 0.16)}
# Slides within which every label and every answer letter is balanced: a multiple of 2, 3, 4, 5 and 6.
_BLOCK = 60
_FILLED = 0.4  # share of the grid that is tissue
_SMALLEST_LARGE = 20_000  # patches
_CHUNK = 8192  # patches at a time


@frozen(kw_only=True)
class SlideConfig:
    """How many slides of each split, and how large they are. Multiples of 60 slides are balanced exactly."""

    train: int = 600
    valid: int = 60
    test: int = 120
    dim: int = 64  # of the features
    patches: tuple[int, int] = (300, 4000)  # of a slide, log-uniform
    large: int = 4  # the first so many test slides have 200,000 patches down to 20,000, in equal ratios
    largest: int = 200_000
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        config.check_bounds(
            self, "SlideConfig", train=config.COUNT, valid=config.COUNT, test=config.COUNT, seed=config.SEED
        )
        config.check_bounds(
            self, "SlideConfig", dim=(32, 2**17), patches=(100, 10**8), largest=(_SMALLEST_LARGE, 10**8)
        )
        if not 0 <= self.large <= self.test:
            raise ValueError(f"SlideConfig: large must be 0 to test, got {self}")
        if self.patches[0] > self.patches[1]:
            raise ValueError(f"SlideConfig: patches must rise, got {list(self.patches)}")


@frozen(kw_only=True)
class Truth:
    """The ground truth of a slide; every question can be answered from it."""

    name: str
    patches: int
    tumour_class: str  # of CLASSES
    grade: int  # 1 to 3, by the share of necrosis
    lymphocytes: str  # "low" or "high"
    motif: str  # of MOTIFS, or NO_MOTIF
    motif_patches: int
    dominant: str  # the tissue with most patches: stroma, tumour or one of OPTIONAL
    tissues: dict[str, int]  # patches of every tissue that is there


@frozen(kw_only=True, eq=False)
class DrawnSlide:
    """A slide, its n patches row by row."""

    name: str
    features: Array  # float16 [n, d]
    coords: Array  # int64 [n, 2], x and y of the upper left corner, pixels of level 0
    patch_size: int  # pixels of level 0
    truth: Truth
    tissue: Array  # int64 [n], index of TISSUES; a motif's patch has the tissue around it
    motif_rows: Array  # int64 [m], the patches of the rare motif


@frozen(kw_only=True, eq=False)
class Prototypes:
    """Directions in feature space, the same for all slides of a seed and width; float32.

    Tissues, classes and motifs are orthogonal.
    """

    tissues: Array  # [tissue, d]
    classes: Array  # [class, d], added to the tumour's
    motifs: Array  # [motif, d], added to the surrounding tissue's
    stain: Array  # [3, d], directions in which slides differ
    spread: Array  # [8, d], directions in which patches differ
    strength: Array  # [tissue, 8], the deviation of a tissue's patches along each


def draw_slide(cfg: SlideConfig, split: str, number: int) -> DrawnSlide:
    """The slide, a pure function of (cfg.seed, cfg.dim, its number of patches, split, number).

    Raises:
        ValueError: no such split, or number < 0.
    """
    truth = draw_truth(cfg, split, number)
    gen = slide_generator(cfg, 1, split, number)
    size = 256 << int(gen.integers(2))  # 20x, or 40x read at half its resolution
    cells = _draw_outline(truth.patches, gen)
    tissue = _draw_regions(truth, cells, gen)
    motif_rows = _draw_motif(truth, cells, tissue, gen)
    features = _draw_features(cfg, truth, tissue, motif_rows, gen)
    coords = cells[:, ::-1] * size + gen.integers(4 * size, size=2)
    return DrawnSlide(
        name=truth.name,
        features=features,
        coords=coords,
        patch_size=size,
        truth=truth,
        tissue=tissue,
        motif_rows=motif_rows,
    )


def draw_truth(cfg: SlideConfig, split: str, number: int) -> Truth:
    """The ground truth of `draw_slide`. Of 60 slides from a multiple of 60 on, every label has its exact
    share.

    Raises:
        ValueError: as `draw_slide`.
    """
    if split not in SPLITS or number < 0:
        raise ValueError(
            f"draw_truth: split must be of {', '.join(SPLITS)} and number >= 0, got {split!r}, {number}"
        )
    gen = slide_generator(cfg, 0, split, number)
    n = _draw_size(cfg, split, number, gen)
    # Each label has an order of its own, so that no two of them go together.
    grade = balanced_index(cfg, 1, split, number) % 3
    lymphocytes = tuple(LYMPHOCYTES)[balanced_index(cfg, 2, split, number) % 2]
    pair = list(combinations(OPTIONAL, 2))[balanced_index(cfg, 3, split, number) % 6]
    motif = (*MOTIFS, NO_MOTIF)[balanced_index(cfg, 4, split, number) % 5]
    tumour_class = tuple(CLASSES)[balanced_index(cfg, 6, split, number) % 4]
    main = ("stroma", "tumour", *pair)
    dominant = main[balanced_index(cfg, 5, split, number) % 4]
    # Necrosis and lymphocytes have the share of their label; the main tissues divide the remainder.
    shares = {
        "necrosis": gen.uniform(*NECROSIS[grade]),
        "lymphocytes": gen.uniform(*LYMPHOCYTES[lymphocytes]),
    }
    remainder = 1 - sum(shares.values())
    weights = {}
    for name in main:
        low, high = (2.6, 3.2) if name == dominant else (0.85, 1.15)
        weights[name] = gen.uniform(low, high)
    total = sum(weights.values())
    for name, weight in weights.items():
        shares[name] = weight / total * remainder
    counts = {name: max(1, round(shares[name] * n)) for name in TISSUES if name in shares}
    counts[dominant] += n - sum(counts.values())  # what rounding left over
    motif_patches = 0
    if motif != NO_MOTIF:
        motif_patches = max(1, round(n * gen.uniform(1e-4, 5e-4)))
    return Truth(
        name=f"TCGA-{split[:2].upper()}-{number:04d}-01Z-00-DX1",
        patches=n,
        tumour_class=tumour_class,
        grade=grade + 1,
        lymphocytes=lymphocytes,
        motif=motif,
        motif_patches=motif_patches,
        dominant=dominant,
        tissues=counts,
    )


def _draw_size(cfg: SlideConfig, split: str, number: int, gen: np.random.Generator) -> int:
    """How many patches a slide has."""
    low, high = cfg.patches
    # Drawn for large slides too, so that `large` changes nothing else about a slide.
    n = float(np.exp(gen.uniform(np.log(low), np.log(high))))
    if split == "test" and number < cfg.large:
        n = float(np.geomspace(cfg.largest, _SMALLEST_LARGE, cfg.large)[number])
    return round(n)


def draw_prototypes(cfg: SlideConfig) -> Prototypes:
    """The prototypes of all slides, a pure function of (cfg.seed, cfg.dim)."""
    gen = np.random.default_rng([9, cfg.seed, cfg.dim])
    sizes = [len(TISSUES), len(CLASSES), len(MOTIFS)]
    orthogonal, _ = np.linalg.qr(gen.standard_normal((cfg.dim, sum(sizes))))
    axes = orthogonal.T.astype(np.float32)
    tissues, classes, motifs = np.split(axes, np.cumsum(sizes)[:-1])
    others = gen.standard_normal((3 + _RANK, cfg.dim), np.float32)
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    return Prototypes(
        tissues=tissues * 4,
        classes=classes * 3,
        motifs=motifs * _MOTIF,
        stain=others[:3],
        spread=others[3:],
        strength=gen.uniform(0.2, 1.0, (len(TISSUES), _RANK)).astype(np.float32),
    )


def slide_generator(cfg: SlideConfig, use: int, split: str, *numbers: int) -> np.random.Generator:
    """A generator of one slide, for one use."""
    return np.random.default_rng([use, cfg.seed, SPLITS.index(split), *numbers])


def balanced_index(cfg: SlideConfig, use: int, split: str, number: int) -> int:
    """A number of 0 to 59, each once in every 60 slides; another order for each use."""
    order = slide_generator(cfg, 4, split, number // _BLOCK, use).permutation(_BLOCK)
    return int(order[number % _BLOCK])


# Features ---------------------------------------------------------------------------------------------------
_RANK = 8  # of the variation within a tissue
_NOISE = 0.5  # of every feature
_MOTIF = 6.0  # length of a motif's direction: twelve times the noise
_STAIN = (1.0, 0.1)  # of a slide's shift: along the stain's directions, and of every feature


def _bumps(rows: Array, columns: Array, at: Array, width: Array) -> tuple[Array, Array]:
    """Gaussian bumps as a product of [row, bump] and [column, bump]: a map is never formed bump by bump.

    Args:
        rows, columns: places, in the units of `at` [bump, 2] and `width` [bump].
    """
    factors = []
    for axis, places in enumerate((rows, columns)):
        z = (places[:, None] - at[:, axis]) / width
        factors.append(np.exp(-0.5 * z**2).astype(np.float32))
    return factors[0], factors[1]


def _draw_outline(n: int, gen: np.random.Generator) -> Array:
    """Row and column [n, 2] of a slide's patches, row by row: one to three pieces with uneven edges."""
    cells = n / _FILLED  # of the grid
    height = int(np.ceil(np.sqrt(cells * gen.uniform(0.6, 1.6))))
    width = int(np.ceil(cells / height))
    # A height map of a large bump for each piece, and 24 small ones, up or down, that make the edges uneven.
    # Places and sizes are shares of the grid's sides.
    pieces = int(gen.integers(1, 4))
    piece_at = gen.uniform(0.22, 0.78, (pieces, 2))
    small_at = gen.uniform(0, 1, (24, 2))
    piece_size = gen.uniform(0.14, 0.24, pieces)
    small_size = gen.uniform(0.03, 0.1, 24)
    small_height = gen.uniform(-0.3, 0.3, 24)
    at = np.concatenate([piece_at, small_at])  # [bump, 2]
    size = np.concatenate([piece_size, small_size])
    bump_height = np.concatenate([np.ones(pieces), small_height]).astype(np.float32)
    rows, columns = _bumps(np.linspace(0, 1, height), np.linspace(0, 1, width), at, size)
    elevation = (rows * bump_height) @ columns.T  # [row, column]
    # The n highest cells are tissue. Sorted, they are in the order of rows, in which slides are read.
    highest = np.argpartition(-elevation.ravel(), n - 1)[:n]
    inside = np.sort(highest)
    return np.stack(np.divmod(inside, width), 1)


def _draw_regions(truth: Truth, cells: Array, gen: np.random.Generator) -> Array:
    """The tissue [n] of every patch.

    One tissue after another takes the highest free cells of a height map of its own; stroma has what is left.
    """
    tissue = np.zeros(len(cells), np.int64)
    free = np.arange(len(cells))
    extent = cells.max(0) + 1
    height, width = extent
    others = [tissue_name for tissue_name in truth.tissues if tissue_name != "stroma"]
    for name in gen.permutation(others):
        count = truth.tissues[name]
        at = cells[gen.choice(free, 3)]  # centres of three bumps
        size = gen.uniform(0.06, 0.16, 3) * extent.mean()
        rows, columns = _bumps(np.arange(height), np.arange(width), at, size)
        # Only at the free cells: the whole map of a large slide would be many times larger.
        free_row, free_column = cells[free].T
        elevation = np.einsum("nk,nk->n", rows[free_row], columns[free_column])
        elevation += 0.05 * gen.random(len(free), np.float32)  # ragged edges
        highest = np.argpartition(-elevation, count - 1)[:count]
        tissue[free[highest]] = TISSUES.index(name)
        free = np.delete(free, highest)
    return tissue


def _draw_motif(truth: Truth, cells: Array, tissue: Array, gen: np.random.Generator) -> Array:
    """Rows [m] of the patches with the motif: neighbours in the tissue that it lies in."""
    if truth.motif == NO_MOTIF:
        return np.zeros(0, np.int64)
    host_tissue = TISSUES.index(MOTIFS[truth.motif])
    host = np.flatnonzero(tissue == host_tissue)
    centre = cells[gen.choice(host)]
    offset = cells[host] - centre
    squared_distance = (offset**2).sum(1)
    nearest = np.argsort(squared_distance, kind="stable")[: truth.motif_patches]
    return np.sort(host[nearest])


def _draw_features(
    cfg: SlideConfig, truth: Truth, tissue: Array, motif_rows: Array, gen: np.random.Generator
) -> Array:
    """Features float16 [n, d], drawn in chunks so that large slides take little memory in float32."""
    p = draw_prototypes(cfg)
    base = p.tissues.copy()  # [tissue, d], what patches of a tissue have in common
    tumour = TISSUES.index("tumour")
    tumour_class = list(CLASSES).index(truth.tumour_class)
    base[tumour] += p.classes[tumour_class]
    # One shift for all patches of a slide, as they are stained together.
    along, everywhere = _STAIN
    stain = along * gen.standard_normal(len(p.stain), np.float32) @ p.stain
    base += stain + everywhere * gen.standard_normal(cfg.dim, np.float32)
    features = np.empty((len(tissue), cfg.dim), np.float16)
    for start in range(0, len(tissue), _CHUNK):
        kinds = tissue[start : start + _CHUNK]
        n = len(kinds)
        # Noise, the variation within a tissue, and the tissue itself, added up in place.
        x = gen.standard_normal((n, cfg.dim), np.float32)
        x *= _NOISE
        variation = gen.standard_normal((n, _RANK), np.float32) * p.strength[kinds]
        x += variation @ p.spread
        x += base[kinds]
        in_chunk = (motif_rows >= start) & (motif_rows < start + n)
        rows = motif_rows[in_chunk]
        if len(rows):
            motif = list(MOTIFS).index(truth.motif)
            x[rows - start] += p.motifs[motif]
        features[start : start + n] = x
    return features


# Files ------------------------------------------------------------------------------------------------------
def write_slides(cfg: SlideConfig, folder: Path) -> dict[str, list[int]]:
    """Write all slides into a folder; returns {slide name: rows of the rare motif}."""
    motif_rows = {}
    for split in SPLITS:
        for number in track(range(getattr(cfg, split)), f"drawing slides, {split}"):
            slide = draw_slide(cfg, split, number)
            _write_slide(folder / f"{slide.name}.h5", slide)
            motif_rows[slide.name] = slide.motif_rows.tolist()
    return motif_rows


def _write_slide(path: Path, slide: DrawnSlide) -> None:
    """Write a slide in TRIDENT's layout."""
    right, bottom = slide.coords.max(0) + slide.patch_size
    level = slide.patch_size // 256  # 20x, or 40x read at half its resolution
    attributes = {
        "name": slide.name,
        "patch_size": 256,
        "patch_size_level0": slide.patch_size,
        "level0_magnification": 20 * level,
        "target_magnification": 20,
        "overlap": 0,
        "level0_width": int(right),
        "level0_height": int(bottom),
    }
    with files.atomic(path) as tmp, h5py.File(tmp, "w") as f:
        f["features"], f["coords"] = slide.features, slide.coords
        f["features"].attrs.update({"name": slide.name, "encoder": "phantom"})
        f["coords"].attrs.update(attributes)
