"""What several processes do with the volumes of a small trained run; `test_processes` starts them in its folder."""

import itertools
import json
import os
import time
from contextlib import nullcontext
from unittest import mock

import torch
from attrs import evolve

from medvl.base import processes, store
from medvl.base.tree import flatten, map_leaves, unflatten
from medvl.systems.ct_clip import data, score, slice_features
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip import run as ct_clip_run
from medvl.training import loop, states
from medvl.training.optim import Optimizer


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


def _descend(grads, opt, params, step):
    """Plain gradient descent, which a wrong scale of the gradient changes; Adam's steps would hide it."""
    grads = flatten(grads)
    return unflatten({name: leaf - 1e-5 * grads[name] for name, leaf in flatten(params).items()}), opt


def _wrongly_scaled(cfg, params, rows, right=ct_clip.contrastive_loss):
    """The right loss, and the gradient of a gather whose backward pass sums over processes what is not divided."""
    value, aux = right(cfg, params, rows)
    return value + (processes.world_size() - 1) * (value - value.detach()), aux


@mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
def train_by_descent(folder):
    """Write {variant: [loss and norm of the gradient at each step]} of both losses and ways to gather, and of a wrong one.

    In float64: the rows of a start are nearly parallel, so that in float32 the order of a sum shows after few steps.
    """
    model, params = _trained(folder)
    params.pop("running")
    params = map_leaves(torch.Tensor.double, params)
    pairs = data.pair_reports(model.cfg, "train", data.open_volumes(model.cfg, "train"))
    curves = {}
    for loss, gather in itertools.product(("clip", "siglip"), ("global", "local", "wrong")):
        contrast = evolve(model.cfg.contrast, loss=loss, gather="global" if gather == "global" else "local")
        train = evolve(model.cfg.train, batch=8, chunk=3)
        encode = evolve(model.cfg.encode, dtype="float64")
        variant = evolve(model, cfg=evolve(model.cfg, contrast=contrast, train=train, encode=encode))
        wrong = mock.patch.object(ct_clip, "contrastive_loss", _wrongly_scaled)
        with wrong if gather == "wrong" else nullcontext():
            gradient = ct_clip.contrastive_gradient(variant, {})
            step = loop.make_step(gradient, Optimizer(init=lambda params: {}, update=_descend))
            state = states.State(params=params, opt={})
            batches = data.training_batches(variant, pairs, 8, 0)
            curve = curves[f"{loss} {gather}"] = []
            for i in range(6):
                state, metrics = step(state, batches(i))
                curve.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    path = folder / f"curves-{processes.world_size()}-{processes.rank()}.json"
    path.write_text(json.dumps(curves))
