"""How eight kinds of medical pictures look when drawn, and how a mark looks in each. Lengths are shares of a side, 0 is the middle."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from attrs import frozen

Array = np.ndarray


@frozen(kw_only=True)
class Scene:
    """A picture before its marks and its noise; grey [y, x, 1] or colour [y, x, 3], 0 to 255."""

    image: Array
    zone: Array  # bool [y, x]: where the centre of a mark may lie
    speckle: Array | float = 1.0  # multiplies the marked picture
    grain: float = 5.0  # deviation of the noise added last


@frozen(kw_only=True)
class Mark:
    """One kind of mark in one kind of picture."""

    bright: bool  # against what is around it
    sharp: bool
    colour: tuple[float, ...]
    rim: tuple[float, ...] = ()  # of a thin edge, none when empty


MARKS = {
    "ct": {
        "nodule": Mark(bright=True, sharp=True, colour=(225,)),
        "ground-glass opacity": Mark(bright=True, sharp=False, colour=(150,)),
    },
    "xray": {
        "nodule": Mark(bright=True, sharp=True, colour=(205,)),
        "infiltrate": Mark(bright=True, sharp=False, colour=(195,)),
    },
    "mri": {
        "tumour": Mark(bright=True, sharp=True, colour=(235,)),
        "oedema": Mark(bright=False, sharp=False, colour=(22,)),
    },
    "ultrasound": {
        "cyst": Mark(bright=False, sharp=True, colour=(6,), rim=(150,)),
        "solid mass": Mark(bright=True, sharp=False, colour=(215,)),
    },
    "histology": {
        "mitosis": Mark(bright=False, sharp=True, colour=(45, 18, 78)),
        "vacuole": Mark(bright=True, sharp=True, colour=(250, 243, 248), rim=(170, 95, 160)),
    },
    "fundus": {
        "haemorrhage": Mark(bright=False, sharp=False, colour=(75, 8, 8)),
        "exudate": Mark(bright=True, sharp=True, colour=(255, 238, 150)),
    },
    "dermoscopy": {
        "globule": Mark(bright=False, sharp=True, colour=(38, 24, 24)),
        "ulcer": Mark(bright=True, sharp=False, colour=(255, 178, 165)),
    },
    "endoscopy": {
        "polyp": Mark(bright=True, sharp=True, colour=(250, 150, 150), rim=(120, 30, 30)),
        "ulcer": Mark(bright=True, sharp=False, colour=(252, 238, 190)),
    },
}


def draw_scene(modality: str, size: int, gen: np.random.Generator) -> Scene:
    """An empty picture of this modality."""
    scene = _STYLES[modality](size, gen)
    gain = gen.uniform(0.9, 1.1) * gen.uniform(
        0.96, 1.04, scene.image.shape[2]
    )  # of light, and of each colour
    _, x = grid(size)
    return Scene(
        image=scene.image * np.asarray(gain, np.float32),
        zone=scene.zone & (np.abs(x) > 0.11),  # no mark reaches over the middle
        speckle=scene.speckle,
        grain=scene.grain * gen.uniform(0.7, 1.4),
    )


def add_marks(scene: Scene, mark: Mark, places: Array, gen: np.random.Generator) -> Array:
    """uint8 [y, x, 3] with marks around places [n, 3] (x, y, radius)."""
    n = len(scene.image)
    y, x = grid(n)
    image, bend = scene.image, 1 + 0.07 * noise(n, 10, gen)
    for cx, cy, r in places.astype(np.float32):
        stretch = np.float32(gen.uniform(0.88, 1.14))
        d = np.hypot((x - cx) * stretch, (y - cy) / stretch) * bend
        if mark.rim:
            image = _mix(image, _inside(r + 0.012 - d, 1.5 / n), mark.rim)
        share = _inside(r - d, 1.5 / n) if mark.sharp else 0.92 * np.exp(-((d / r) ** 3))
        image = _mix(image, share, mark.colour)
    image = image * scene.speckle + np.float32(scene.grain) * gen.standard_normal(
        image.shape, dtype=np.float32
    )
    return np.broadcast_to(np.clip(image, 0, 255).astype(np.uint8), (n, n, 3))


@lru_cache
def grid(size: int) -> tuple[Array, Array]:
    """(y [y, 1], x [1, x]) of the pixels' centres, -0.5 to 0.5."""
    at = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    return at[:, None], at[None]


def noise(size: int, cells: int, gen: np.random.Generator) -> Array:
    """Smooth noise [y, x], about unit normal at points a share 1 / cells apart."""
    w = _weights(size, cells)
    return w @ gen.standard_normal((cells + 1, cells + 1), dtype=np.float32) @ w.T


@lru_cache
def _weights(size: int, cells: int) -> Array:
    """[size, cells + 1]: how much each point counts; eased, so that no grid shows."""
    at = (np.arange(size) + 0.5) / size * cells
    d = np.clip(1 - np.abs(at[:, None] - np.arange(cells + 1)), 0, 1)
    return (d * d * (3 - 2 * d)).astype(np.float32)


def _inside(distance: Array, width: float = 0.015) -> Array:
    return np.clip(distance / np.float32(width) + np.float32(0.5), 0, 1)


def _oval(x: Array, y: Array, a: float, b: float, width: float = 0.02) -> Array:
    """Share [y, x] inside an ellipse around 0."""
    return _inside((1 - np.hypot(x / np.float32(a), y / np.float32(b))) * min(a, b), width)


def _mix(image: Array, share: Array, value: Array | float | tuple[float, ...]) -> Array:
    """image [y, x, c] with a share [y, x] of each pixel replaced."""
    return image + share[..., None] * (np.asarray(value, np.float32) - image)


def _mix_grey(image: Array, share: Array, value: Array | float) -> Array:
    return image + share * (value - image)


# The eight, in grey [y, x] and in colour [y, x, 3] --------------------------------------------------------------------------------------
def _ct(n: int, gen: np.random.Generator) -> Scene:
    (y, x), u = grid(n), gen.uniform
    x, y = x - np.float32(u(-0.02, 0.02)), y - np.float32(u(-0.025, 0.025))
    a, b = u(0.455, 0.485), u(0.37, 0.42)
    image = _oval(x, y, a, b) * np.float32(85)  # fat
    image = _mix_grey(image, _oval(x, y, a - 0.035, b - 0.03), 128 + 7 * noise(n, 12, gen))
    turn = np.cos(np.arctan2(y / b, x / a) * 14 + u(0, 6))  # ribs cut across
    image = _mix_grey(
        image,
        _inside(0.022 - np.abs(np.hypot(x / a, y / b) - 0.88) * b, 0.02) * _inside(turn - 0.35, 0.4),
        215,
    )
    wide, tall, zone = u(0.155, 0.17), u(0.25, 0.28), np.zeros((n, n), bool)
    vessels = 32 + 10 * noise(n, 8, gen) + 45 * _inside(noise(n, 30, gen) - 1.5, 0.8)
    for side in (-1, 1):
        lung = x - side * np.float32(0.215), y + 0.01 + 0.25 * (np.abs(x) - 0.2)
        image = _mix_grey(image, _oval(*lung, wide, tall), vessels)
        zone |= _oval(*lung, wide - 0.05, tall - 0.055) > 0.5
    heart = x - np.float32(u(0.03, 0.05)), y + np.float32(u(0.08, 0.12))
    image = _mix_grey(image, _oval(*heart, 0.12, 0.11), 150)
    image = _mix_grey(image, _oval(x - 0.05, y - 0.11, 0.035, 0.035), 160)  # aorta
    image = _mix_grey(image, _oval(x, y - 0.2, 0.065, 0.06), 225)
    image = _mix_grey(image, _oval(x, y - 0.275, 0.022, 0.022), 120)  # canal of the spine
    image = _mix_grey(
        image, _inside(0.012 - np.abs(y - 0.44 - 0.3 * x * x), 0.012) * (np.abs(x) < 0.4), 90
    )  # table
    clear = _oval(*heart, 0.18, 0.17) + _oval(x, y - 0.2, 0.14, 0.14) < 0.5
    return Scene(image=image[..., None], zone=zone & clear & (np.abs(x) > 0.15), grain=7)


def _xray(n: int, gen: np.random.Generator) -> Scene:
    (y, x), u = grid(n), gen.uniform
    x, y = x - np.float32(u(-0.02, 0.02)), y - np.float32(u(-0.02, 0.02))
    image = (
        150
        + 25 * y
        + 6 * noise(n, 5, gen)
        - 110 * _inside(np.abs(x) - 0.46 + 0.5 * np.clip(-0.28 - y, 0, 1) * -1, 0.1)
    )
    wide, tall, zone, lungs = (
        u(0.165, 0.185),
        u(0.36, 0.4),
        np.zeros((n, n), bool),
        np.zeros((n, n), np.float32),
    )
    for side in (-1, 1):
        lung = x - side * np.float32(0.215) - side * 0.12 * y, y - 0.01
        lungs = np.maximum(lungs, _oval(*lung, wide, tall, 0.04))
        zone |= _oval(*lung, wide - 0.055, tall - 0.08) > 0.5
    dome = 0.27 + u(-0.02, 0.02) + 1.6 * (np.abs(x) - 0.2) ** 2
    lungs = lungs * _inside(dome - y, 0.03)
    image = _mix_grey(image, lungs, 62 + 8 * noise(n, 9, gen) + 30 * np.exp(-((x / 0.16) ** 2)))
    ribs = np.sin((y + 1.3 * (np.abs(x) - 0.13) ** 2 - 0.3 * np.abs(x)) * 2 * np.pi * u(10, 12) + u(0, 6))
    image = image + 24 * _inside(ribs - 0.35, 0.7) * lungs
    image = _mix_grey(
        image,
        _inside(0.022 - np.abs(y + 0.36 + 0.18 * np.abs(x)), 0.02) * _inside(0.36 - np.abs(x), 0.05),
        image + 30,
    )
    image = _mix_grey(image, _inside(0.055 - np.abs(x), 0.04) * 0.8, 178 + 14 * np.sin(y * 2 * np.pi * 14))
    heart = x - np.float32(u(0.05, 0.075)), y - np.float32(u(0.15, 0.19))
    image = _mix_grey(image, _oval(*heart, 0.15, 0.14, 0.05), 188)
    return Scene(
        image=image[..., None], zone=zone & (_oval(*heart, 0.215, 0.205) < 0.5) & (y < dome - 0.07), grain=5
    )


def _mri(n: int, gen: np.random.Generator) -> Scene:
    (y, x), u = grid(n), gen.uniform
    x, y = x - np.float32(u(-0.02, 0.02)), y - np.float32(u(-0.02, 0.02))
    x = x + np.float32(u(-0.08, 0.08)) * y
    a, b = u(0.37, 0.41), u(0.43, 0.47)
    image = _oval(x, y, a, b) * np.float32(185)  # scalp
    image = _mix_grey(image, _oval(x, y, a - 0.03, b - 0.03), 18)  # skull
    folds = 92 - 48 * _inside(0.12 - np.abs(noise(n, 16, gen)), 0.2)
    image = _mix_grey(image, _oval(x, y, a - 0.055, b - 0.055), folds)
    inner = _oval(x, y, a - 0.115, b - 0.115, 0.05)
    image = _mix_grey(
        image,
        np.clip(inner + 0.35 * noise(n, 14, gen) * (inner > 0) * (inner < 1), 0, 1),
        136 + 6 * noise(n, 8, gen),
    )
    image = _mix_grey(
        image, _inside(0.006 - np.abs(x), 0.012) * _oval(x, y, a - 0.06, b - 0.06), 45
    )  # between the hemispheres
    size = u(0.8, 1.25)
    for side in (-1, 1):  # ventricles
        image = _mix_grey(
            image, _oval(x - side * (0.035 + 1.2 * (y + 0.01) ** 2), y + 0.01, 0.026 * size, 0.12 * size), 25
        )
    return Scene(
        image=image[..., None], zone=(_oval(x, y, a - 0.13, b - 0.13) > 0.5) & (np.abs(x) > 0.14), grain=6
    )


def _ultrasound(n: int, gen: np.random.Generator) -> Scene:
    (y, x), u = grid(n), gen.uniform
    x, y = x - np.float32(u(-0.02, 0.02)), y + np.float32(u(0.56, 0.6))
    depth, angle, half = np.hypot(x, y), np.abs(np.arctan2(x, y)), u(0.62, 0.7)
    fan = _inside((half - angle) * depth) * _inside(depth - 0.13) * _inside(1.04 - depth)
    wave = np.sin(depth * 2 * np.pi * u(4, 7) + 1.2 * noise(n, 4, gen) + u(0, 6))
    image = (78 + 14 * wave + 16 * noise(n, 6, gen)) * (1.15 - 0.45 * depth) + 70 * np.exp(
        -(((depth - 0.16) / 0.03) ** 2)
    )
    speckle = np.exp(0.26 * noise(n, 50, gen) + 0.16 * gen.standard_normal((n, n), dtype=np.float32)) * fan
    zone = (angle < half - 0.15) & (depth > 0.42) & (depth < 0.94) & (np.abs(x) < 0.4)
    return Scene(image=image[..., None], zone=zone, speckle=speckle[..., None], grain=2)


def _histology(n: int, gen: np.random.Generator) -> Scene:
    (y, x), u = grid(n), gen.uniform
    tissue = np.array([228, 168, 200], np.float32) + 9 * noise(n, 9, gen)[..., None] * np.array(
        [0.5, 1.4, 0.8], np.float32
    )
    fibres = np.sin((x * np.float32(u(-1, 1)) + y) * 60 + 3 * noise(n, 5, gen))
    image = _mix(tissue, 0.5 * _inside(noise(n, 4, gen) - 0.4, 0.6) * (0.7 + 0.3 * fibres), (236, 140, 172))
    cells = int(u(9, 12))
    jitter = gen.uniform(-0.4, 0.4, (2, cells + 2, cells + 2)).astype(np.float32)
    radius = gen.uniform(0.12, 0.3, (cells + 2, cells + 2)).astype(np.float32)
    py, px = (y + 0.5) * cells + 0.5, (x + 0.5) * cells + 0.5
    iy, ix = py.astype(int), px.astype(int)
    near = np.full((n, n), -1, np.float32)
    for dy, dx in np.ndindex(2, 2):  # no nucleus reaches over the middle of the next one's square
        jy, jx = iy + dy, ix + dx
        d = (py - jy - jitter[0, jy, jx]) ** 2 + 1.3 * (px - jx - jitter[1, jy, jx]) ** 2
        near = np.maximum(near, radius[jy, jx] - np.sqrt(d))
    chromatin = np.array([128, 78, 160], np.float32) + 12 * noise(n, 40, gen)[..., None]
    image = _mix(image, 0.85 * _inside(near / cells, 0.014), chromatin)
    return Scene(image=image, zone=(np.abs(x) < 0.41) & (np.abs(y) < 0.41), grain=4)


def _fundus(n: int, gen: np.random.Generator) -> Scene:
    """Of a right eye always: its disc, and with it the nose, is on the right of the picture."""
    (y, x), u = grid(n), gen.uniform
    x, y = x - np.float32(u(-0.012, 0.012)), y - np.float32(u(-0.012, 0.012))
    r = np.hypot(x, y)
    shade = (
        1.08 - 1.3 * r * r + 0.05 * noise(n, 6, gen) - 0.3 * np.exp(-((np.hypot(x + 0.06, y) / 0.07) ** 2))
    )  # the macula is dark
    image = shade[..., None] * np.array([214, 104 + u(-10, 12), 44 + u(-8, 10)], np.float32)
    dx, dy = u(0.27, 0.31), u(-0.03, 0.03)
    ax = np.abs(x - np.float32(dx)) + 1e-3
    for bend, width in zip(
        (0.66, -0.66, 0.42, -0.42, 0.9, -0.9), (0.011, 0.011, 0.007, 0.007, 0.006, 0.006), strict=True
    ):
        c = bend * u(0.85, 1.15)
        path = c * np.sqrt(ax) + 0.025 * np.sin(ax * u(20, 35) + u(0, 6)) * np.minimum(ax * 8, 1)
        slope = 0.5 * c / np.sqrt(ax)
        vessel = _inside(width * (1.1 - ax) - np.abs(y - dy - path) / np.sqrt(1 + slope * slope), 0.01)
        image = _mix(image, 0.75 * vessel, (128, 28, 18))
    image = _mix(image, _oval(x - np.float32(dx), y - np.float32(dy), 0.07, 0.08, 0.025), (244, 190, 118))
    image = _mix(
        image, 0.8 * _oval(x - np.float32(dx), y - np.float32(dy), 0.03, 0.035, 0.02), (255, 226, 170)
    )
    image = image * _inside(0.475 - r)[..., None]
    return Scene(image=image, zone=(r < 0.4) & (np.hypot(x - dx, y - dy) > 0.165), grain=4)


def _dermoscopy(n: int, gen: np.random.Generator) -> Scene:
    (y, x), u = grid(n), gen.uniform
    r = np.hypot(x, y)
    image = np.array([222, 176, 150], np.float32) + (9 * noise(n, 7, gen) + 5 * noise(n, 30, gen))[..., None]
    px, py = x - np.float32(u(-0.02, 0.02)), y - np.float32(u(-0.02, 0.02))
    a, b = u(0.39, 0.44), u(0.36, 0.42)
    spread = (1 - np.hypot(px / np.float32(a), py / np.float32(b))) + 0.08 * noise(n, 7, gen)
    net = np.abs(noise(n, 22, gen))
    pigment = np.array([142, 92, 64], np.float32) + (14 * noise(n, 6, gen) + 14 * (net - 0.8))[..., None]
    image = _mix(image, 0.95 * _inside(spread, 0.16), pigment)
    for _ in range(int(gen.integers(3, 8))):  # hairs
        turn = u(0, np.pi)
        along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
        hair = _inside(0.005 - np.abs(across - u(-0.45, 0.45) - u(-0.8, 0.8) * along * along), 0.008)
        image = _mix(
            image, 0.8 * hair * _inside(u(0.2, 0.5) - np.abs(along - u(-0.3, 0.3)), 0.02), (64, 44, 38)
        )
    image = image * (1.04 - 0.9 * np.clip(r - 0.35, 0, 1))[..., None]
    return Scene(image=image, zone=_oval(px, py, a - 0.08, b - 0.08) > 0.5, grain=4)


def _endoscopy(n: int, gen: np.random.Generator) -> Scene:
    (y, x), u = grid(n), gen.uniform
    px, py = x - np.float32(u(-0.05, 0.05)), y - np.float32(u(-0.06, 0.06))
    r, turn = np.hypot(px, py) * (1 + 0.08 * noise(n, 4, gen)) + 1e-3, np.arctan2(py, px)
    folds = np.sin(2 * np.pi * (u(1.6, 2.2) * np.log(r) + u(0, 1)) + 0.5 * np.cos(3 * turn + u(0, 6)))
    light = np.clip(0.22 + 2.6 * r, 0, 0.92) * (1 + 0.12 * folds * _inside(r - 0.12, 0.1)) + 0.04 * noise(
        n, 12, gen
    )
    image = np.clip(light, 0, 1.2)[..., None] * np.array([212, 98 + u(-10, 12), 88 + u(-10, 12)], np.float32)
    image = _mix(
        image,
        0.3 * _inside(0.06 - np.abs(noise(n, 9, gen)), 0.05),
        image * np.array([0.8, 0.5, 0.5], np.float32),
    )
    shine = np.zeros((n, n), np.float32)
    for cx, cy, s in gen.uniform((-0.4, -0.4, 0.008), (0.4, 0.4, 0.02), (int(gen.integers(4, 9)), 3)).astype(
        np.float32
    ):
        shine = np.maximum(shine, _oval(x - cx, y - cy, 1.6 * s, 0.8 * s))
    image = _mix(image, 0.9 * shine, (255, 246, 240))
    image = (
        image
        * (_inside(0.485 - np.maximum(np.abs(x), np.abs(y))) * _inside(0.64 - np.abs(x) - np.abs(y)))[
            ..., None
        ]
    )
    far = np.hypot(px, py)
    return Scene(
        image=image, zone=(far > 0.15) & (np.hypot(x, y) < 0.38) & (np.abs(x) + np.abs(y) < 0.54), grain=4
    )


_STYLES: dict[str, Callable[[int, np.random.Generator], Scene]] = {
    "ct": _ct,
    "xray": _xray,
    "mri": _mri,
    "ultrasound": _ultrasound,
    "histology": _histology,
    "fundus": _fundus,
    "dermoscopy": _dermoscopy,
    "endoscopy": _endoscopy,
}
