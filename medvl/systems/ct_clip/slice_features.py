"""The cache of a frozen slice encoder's features: computed once, found again by weights and settings."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvl.base import config, files, processes, store
from medvl.base.cache import missing_names
from medvl.base.display import track
from medvl.base.store import Store
from medvl.base.tree import Tree
from medvl.components import encode
from medvl.ct import pairs
from medvl.hub import skeletons
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip.model import Model
from medvl.training.order import prefetch

# Volumes that a GPU encodes together, which a single one of a small encoder would not fill.
_TOGETHER_ON_GPU = 4
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
        missing = missing_names(volumes.names, computed.__contains__, together=True)
        _compute_features(model, params["vit"], volumes, missing, features)
        processes.wait_for_all()
    return store.open_store(path, expect=settings)


def _settings(model: Model, params: Tree, volumes: Store) -> dict[str, Any]:
    """All that decides what the features are. Its digest names the file."""
    # With the precision of this device: a GPU's features in bfloat16 are none of a CPU's in float32.
    encoder = config.unstructure(ct_clip.encoder_settings(model.cfg, _device_of(params["vit"])))
    for key in ("budget_mib", "checkpoint"):  # of memory alone, and no part of what is computed
        encoder.pop(key, None)
    return {
        "weights": skeletons.weights_digest(params["vit"]),
        "encode": encoder,
        "volumes": {"path": str(volumes.path.resolve()), "settings": volumes.settings},
        "row": [name for name, *_ in _FIELDS],
    }


def _compute_features(
    model: Model, vit_params: Tree, volumes: Store, names: Sequence[str], features: Store
) -> None:
    """Encode volumes and put their features into the store: the next ones are read while these are encoded, and
    those before are written.
    """
    device = _device_of(vit_params)
    # One by one on a CPU, where the size of a batch decides the last bits.
    at_once = 1 if device.type == "cpu" else _TOGETHER_ON_GPU
    batches = [names[i : i + at_once] for i in range(0, len(names), at_once)]

    def read(i: int) -> dict[str, Tensor]:
        return pairs.read_slices(volumes, batches[i])

    def write(batch: Sequence[str], embeddings: Tensor) -> None:
        rows = [_row_of(volumes, name) for name in batch]
        first_read = min(row["occupied"][0] for row in rows)
        # A GPU is waited for here, while it has the next volumes to encode.
        for name, row, z in zip(batch, rows, embeddings.cpu().numpy(), strict=True):
            first, stop = row["occupied"]
            # Only slices that hold scan were encoded; the arrays of a store are of one shape.
            padded = np.zeros(features.shape, np.float16)
            padded[first:stop] = z[first - first_read : stop - first_read]
            store.put(features, name, padded, row)

    with ThreadPoolExecutor(1) as writer, torch.no_grad():
        written: Future[None] | None = None
        for i, batch in track(
            prefetch(read, 0, len(batches), device), "computing slice features", total=len(batches)
        ):
            z = ct_clip.encode_volumes(model, vit_params, batch["slices"], batch["mask"])
            if written is not None:
                written.result()  # raises what the writer met; and only one batch waits in memory
            written = writer.submit(write, batches[i], z)
        if written is not None:
            written.result()


def _device_of(params: Tree) -> torch.device:
    return next(iter(params.values())).device


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
