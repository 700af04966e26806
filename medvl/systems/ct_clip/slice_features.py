"""The cache of a frozen slice encoder's features: computed once, found again by weights and settings."""

import functools
import json
import re
import uuid
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
from medvl.base.cluster import map_on_cluster, open_cluster
from medvl.base.display import track
from medvl.base.store import Store
from medvl.base.tree import Tree, flatten, map_leaves
from medvl.components import encode
from medvl.ct import pairs
from medvl.hub import skeletons
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip.data import open_volumes, prepare_data
from medvl.systems.ct_clip.model import Model
from medvl.systems.ct_clip.record import Config
from medvl.training.order import prefetch

# Volumes that a GPU encodes together, which a single one of a small encoder would not fill.
_TOGETHER_ON_GPU = 4
_FIELDS = (("spacing_mm", "f8", 3), ("occupied", "i4", 2), ("volume", "S32"))  # volume: digest of its voxels


def compute_features(cfg: Config, cluster: str = "") -> list[Store]:
    """Slice features of training and validation volumes ahead of the training that will find them, in this process or
    on a cluster (see `open_cluster`).

    Raises:
        ValueError: the first stage trains another encoder than the starting one; as `cached_features`.
    """
    model, params = _starting_encoder(cfg)
    stage = cfg.train.stages[0]
    changes = ["vit.whiten"] if cfg.vit.whiten else []
    changes += [name for name in flatten(params) if any(re.fullmatch(p, name) for p in stage.train)]
    if changes:
        raise ValueError(
            f"features: stage {stage.name} must leave the slice encoder as it is, and {changes[0]} changes it; "
            "only features of a frozen encoder can be computed ahead of training"
        )
    prepare_data(cfg)
    volumes = [open_volumes(cfg, split) for split in ("train", "valid")]
    with open_cluster(cluster) if cluster else nullcontext() as client:
        return [cached_features(model, params, v, Path(cfg.data.cache), client) for v in volumes]


def _starting_encoder(cfg: Config) -> tuple[Model, Tree]:
    vit, params = ct_clip.init_encoder(cfg, torch.Generator().manual_seed(cfg.seed))
    device = processes.choose_device(cfg.train.device)
    params = map_leaves(lambda leaf: leaf.to(device), {"vit": params})
    return Model(cfg=cfg, vit=vit, text_encoder=None, tokenizer=None), params


def cached_features(model: Model, params: Tree, volumes: Store, folder: Path, client: Any = None) -> Store:
    """Slice features of every volume: a store keyed by the weights, the settings and the volumes' file.

    Rows hold float16 [s, d] and which content of the volume they were made from. All processes must call
    this: each computes its share. Another run over the same cache waits meanwhile, then finds the features.

    Args:
        client: of a cluster, whose workers compute them from the starting weights of the record.
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
            file = store.main_file(path) if client is None else store.begin_shards(path)
            if not file.exists():
                store.create(file, volumes.names, shape, "float16", settings, _FIELDS)
            # Volumes may have been added to the split since.
            store.grow(path, volumes.names)
        processes.wait_for_all()
        features = store.open_store(path, expect=settings)
        _check_unchanged(features, volumes)
        # Nobody else writes while the lock is held, so this need not be read again.
        computed = {*features.names}
        missing = missing_names(volumes.names, computed.__contains__, together=True)
        if client is None:
            _compute_features(model, params["vit"], volumes, missing, features)
        else:
            _compute_on_cluster(client, model.cfg, volumes, missing, features)
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


def _compute_on_cluster(
    client: Any, cfg: Config, volumes: Store, names: Sequence[str], features: Store
) -> None:
    batches = [names[i : i + _TOGETHER_ON_GPU] for i in range(0, len(names), _TOGETHER_ON_GPU)]
    opened = json.dumps(config.unstructure(cfg)), volumes.path.absolute(), features.path.absolute()
    run = functools.partial(_compute_on_worker, opened=(*opened, uuid.uuid4().hex))
    results = map_on_cluster(client, run, batches, lost="its workers died, most likely out of memory")
    for batch, problem in track(results, "computing slice features", len(batches)):
        if problem:
            raise ValueError(f"{features.path}: {batch[0]}: {problem}; the same command goes on from here")


def _compute_on_worker(names: Sequence[str], opened: tuple[str, Path, Path, str]) -> str:
    model, params, volumes, features = _open_on_worker(*opened)
    _compute_features(model, params["vit"], volumes, names, features, show=False)
    return ""


@functools.lru_cache(maxsize=1)
def _open_on_worker(record: str, source: Path, path: Path, run_id: str) -> tuple[Model, Tree, Store, Store]:
    """Once per process and run: the encoder, the volumes, and a shard of the features."""
    model, params = _starting_encoder(config.structure(json.loads(record), Config))
    volumes = store.open_store(source)
    store.open_store(path, expect=_settings(model, params, volumes))  # no other weights or precision here
    return model, params, volumes, store.open_shard(path)


def _compute_features(
    model: Model,
    vit_params: Tree,
    volumes: Store,
    names: Sequence[str],
    features: Store,
    show: bool = True,
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
            prefetch(read, 0, len(batches), device), "computing slice features", len(batches), show=show
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
