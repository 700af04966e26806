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
from medvl.systems.ct_clip import common_space, data, score, slice_features
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip import run as ct_clip_run
from medvl.training import loop, stages, states
from medvl.training.optim import Optimizer
from medvl.weights import shards


def _trained(folder):
    (trained,) = (folder / "runs").iterdir()
    return ct_clip_run.load(trained)


def place_and_score(folder):
    """Write the rows of the validation split's volumes, their score, and how many volumes were read here."""
    model, params = _trained(folder)
    volumes = data.open_volumes(model.cfg, "valid")
    names = volumes.names[:7]  # of batches of 3, 3 and 1
    with mock.patch.object(store.Store, "read", autospec=True, side_effect=store.Store.read) as read:
        rows = common_space.place_volumes(model, params, volumes, names)
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


def _in_double(params):
    """Parameters for training in float64, without the running means."""
    params.pop("running", None)
    return map_leaves(torch.Tensor.double, params)


def _curve(model, params, batch_at):
    """(parameters after six steps of gradient descent in float64, [loss and norm of the gradient at each step])."""
    gradient = ct_clip.contrastive_gradient(model, {})
    step = loop.make_step(gradient, Optimizer(init=lambda params: {}, update=_descend))
    state, curve = states.State(params=params, opt={}), []
    for i in range(6):
        state, metrics = step(state, batch_at(i))
        curve.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return state.params, curve


def _wrongly_scaled(cfg, params, rows, right=ct_clip.contrastive_loss):
    """The right loss, and the gradient of a gather whose backward pass sums over processes what is not divided."""
    value, aux = right(cfg, params, rows)
    return value + (processes.world_size() - 1) * (value - value.detach()), aux


def _changed(cfg, gather="global", loss="clip", **encode):
    """The record with a batch for four processes, in float64."""
    return evolve(
        cfg,
        contrast=evolve(cfg.contrast, loss=loss, gather=gather),
        train=evolve(cfg.train, batch=8, chunk=3),
        encode=evolve(cfg.encode, dtype="float64", **encode),
    )


@mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
def train_by_descent(folder):
    """Write {variant: [loss and norm of the gradient at each step]} of both losses and ways to gather, and of a wrong one.

    In float64: the rows of a start are nearly parallel, so that in float32 the order of a sum shows after few steps.
    """
    model, params = _trained(folder)
    params = _in_double(params)
    pairs = data.pair_reports(model.cfg, "train", data.open_volumes(model.cfg, "train"))
    curves = {}
    for loss, gather in itertools.product(("clip", "siglip"), ("global", "local", "wrong")):
        way = "global" if gather == "global" else "local"
        variant = evolve(model, cfg=_changed(model.cfg, way, loss))
        wrong = mock.patch.object(ct_clip, "contrastive_loss", _wrongly_scaled)
        with wrong if gather == "wrong" else nullcontext():
            batches = data.training_batches(variant, pairs, 8, 0)
            _, curves[f"{loss} {gather}"] = _curve(variant, params, batches)
    path = folder / f"curves-{processes.world_size()}-{processes.rank()}.json"
    path.write_text(json.dumps(curves))


@mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
def train_shards(folder):
    """Write parameters and curves of encoders that lie in parts, slices of a process being fewer than another's."""
    (trained,) = (folder / "runs").iterdir()
    cfg = ct_clip_run.config.load_run(trained, ct_clip.Config)
    words = evolve(cfg.words, encoder=str(folder / "bert"), tokenizer=str(trained / "tokenizer"))
    vit = evolve(cfg.vit, config=cfg.vit.config | {"hidden_size": 128})
    fuse = evolve(cfg.fuse, inputs=128)
    # At most eleven slices go through the encoder together.
    cfg = evolve(_changed(cfg, budget_mib=1), words=words, vit=vit, fuse=fuse)
    cfg = evolve(cfg, train=evolve(cfg.train, shard=True))
    model, params = ct_clip.init_model(cfg, trained)
    pairs = data.pair_reports(cfg, "train", data.open_volumes(cfg, "train"))
    batches = data.training_batches(model, pairs, 8, 0)

    def batch_at(i):
        batch = batches(i)
        if processes.rank() == 0:
            batch["mask"][:2, 1:] = False
        return batch

    parts = stages.shard_params(cfg.train, _in_double(params), ct_clip.SHARDED)
    cut = [name for name, leaf in flatten(parts).items() if shards.is_shard(leaf)]
    held = sum(leaf.to_local().numel() if shards.is_shard(leaf) else 0 for leaf in flatten(parts).values())
    params, curve = _curve(model, parts, batch_at)
    whole = shards.gather_shards(params)  # those that are cut on process 0 only
    path = folder / f"shards-{processes.world_size()}-{processes.rank()}.pt"
    torch.save({"params": whole, "curve": torch.tensor(curve), "cut": cut, "held": held}, path)
