"""The cache of a frozen slice encoder's features: computed once, found again by weights and settings."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medvl.base import config, files, processes, store
from medvl.base.cache import compute_missing
from medvl.base.display import track
from medvl.base.store import Store
from medvl.base.tree import Tree
from medvl.components import encode
from medvl.ct import pairs
from medvl.hub import skeletons
from medvl.systems.ct_clip.model import Model

_FIELDS = (("spacing_mm", "f8", 3), ("occupied", "i4", 2), ("volume", "S32"))  # volume: digest of its voxels


def cached_features(model: Model, params: Tree, volumes: Store, folder: Path) -> Store:
    """Slice features of every volume: a store keyed by the weights, the settings and the volumes' file.

    Rows hold float16 [s, d] and which content of the volume they were made from. All processes must call
    this: each computes its share. Another run over the same cache waits meanwhile, then finds the features.

    Raises:
        ValueError: a volume has changed since its features were computed.
    """
    settings = _settings(model, params, volumes)
    path = folder / f"features-{config.record_digest(settings)}.h5"
    shape = (volumes.shape[0], encode.embedding_width(model.cfg.encode, model.vit))
    is_first = processes.rank() == 0
    # Process 0 holds the lock for all; the others wait for it in `wait_for_all`.
    with files.file_lock(path, wait=True) if is_first else nullcontext():
        if is_first:
            if not path.exists():
                store.create(path, volumes.names, shape, "float16", settings, _FIELDS)
            # Volumes may have been added to the split since.
            store.grow(path, volumes.names)
        processes.wait_for_all()
        features = store.open_store(path, expect=settings)
        _check_unchanged(features, volumes)
        # Nobody else writes while the lock is held, so this need not be read again.
        computed = {*features.names}

        def compute(name: str) -> None:
            array = _encode_volume(model, params, volumes, name, shape)
            store.put(features, name, array, _row_of(volumes, name))

        compute_missing(
            volumes.names, computed.__contains__, compute, "computing slice features", together=True
        )
    return store.open_store(path, expect=settings)


def _settings(model: Model, params: Tree, volumes: Store) -> dict[str, Any]:
    """All that decides what the features are. Its digest names the file."""
    encoder = config.unstructure(model.cfg.encode)
    for key in ("budget_mib", "checkpoint"):  # of memory alone, and no part of what is computed
        encoder.pop(key, None)
    return {
        "weights": skeletons.weights_digest(params["vit"]),
        "encode": encoder,
        "volumes": {"path": str(volumes.path.resolve()), "settings": volumes.settings},
        "row": [name for name, *_ in _FIELDS],
    }


def _encode_volume(
    model: Model, params: Tree, volumes: Store, name: str, shape: tuple[int, int]
) -> np.ndarray:
    """float16 [s, d], zero where the volume has no scan."""
    batch = pairs.read_slices(volumes, [name])
    with torch.no_grad():
        z = encode.encode_slices(
            model.cfg.encode, params["vit"], batch["slices"], batch["mask"], vit=model.vit
        )
    # Only slices that hold scan were encoded; the arrays of a store are of one shape.
    first, stop = volumes.row(name)["occupied"]
    padded = np.zeros(shape, np.float16)
    padded[first:stop] = z[0].cpu().numpy()
    return padded


def _row_of(volumes: Store, name: str) -> dict[str, Any]:
    """What the features of a volume are made from: its geometry and the digest of its voxels."""
    row = volumes.row(name)
    return {"spacing_mm": row["spacing_mm"], "occupied": row["occupied"], "volume": volumes.content(name)}


def _check_unchanged(features: Store, volumes: Store) -> None:
    """Refuse features of volumes that have another content now."""
    computed = {*features.names}
    both = [name for name in volumes.names if name in computed]
    changed = []
    for name in track(both, "comparing volumes"):
        if features.row(name) != _row_of(volumes, name):
            changed.append(name)
    if changed:
        raise ValueError(
            f"{features.path}: {len(changed)} volumes of {volumes.path} have changed since their features "
            f"were computed, e.g. {changed[0]}; remove this file, and they are computed again"
        )
