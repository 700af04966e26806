"""What several processes do with the volumes of a small trained run; `test_processes` starts them in its folder."""

import json
import os
import time
from unittest import mock

import torch

from medvl.base import processes, store
from medvl.systems.ct_clip import data, score, slice_features
from medvl.systems.ct_clip import run as ct_clip_run


def _trained(folder):
    (trained,) = (folder / "runs").iterdir()
    return ct_clip_run.load(trained)


def place_and_score(folder):
    """Write the rows of the validation split's volumes, their score, and how many volumes were read here."""
    model, params = _trained(folder)
    volumes = data.open_volumes(model.cfg, "valid")
    names = volumes.names[:7]  # of batches of 3, 3 and 1
    with mock.patch.object(store.Store, "read", autospec=True, side_effect=store.Store.read) as read:
        rows = score.place_volumes(model, params, volumes, names)
    found = {"rows": rows, "volumes": read.call_count, "score": score.mean_auroc(model, params, volumes)}
    torch.save(found, folder / f"placed-{processes.world_size()}-{processes.rank()}.pt")


def fill_cache(folder):
    """Fill the cache of slice features, slowly; each volume that is encoded here becomes a line of a log."""
    model, params = _trained(folder)
    volumes = data.open_volumes(model.cfg, "valid")
    log = folder / f"encoded-{os.getpid()}.txt"
    put = store.put

    def slowly(features, name, *arguments):
        time.sleep(0.1)
        with log.open("a") as lines:
            lines.write(f"{name}\n")
        put(features, name, *arguments)

    with mock.patch.object(store, "put", slowly):
        cache = slice_features.cached_features(model, params, volumes, folder / "filled")
    arrays = {name: cache.read(name).tolist() for name in cache.names}
    (folder / f"features-{os.getpid()}.json").write_text(json.dumps(arrays))
