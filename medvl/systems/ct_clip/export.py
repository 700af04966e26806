"""A trained run as safetensors: the slice encoder in `vision` and a named text encoder in `text`, which transformers
opens, all other weights in one file. `run.load` takes such a folder for the run.
"""

import shutil
from pathlib import Path

import torch
from attrs import evolve

from medvl.base.tree import Tree, flatten, map_leaves, merge_trees, unflatten
from medvl.ct.preprocess import size_of
from medvl.hub import checkpoints, saving, skeletons
from medvl.systems.ct_clip.model import Model, embed_volumes, init_model
from medvl.systems.ct_clip.record import Config, VitConfig
from medvl.systems.ct_clip.slice_effects import AVERAGE

REST = "rest.safetensors"


def export(model: Model, params: Tree, folder: Path, out: Path) -> dict[str, str]:
    """Write a run into the folder `out`; returns {architecture: checkpoint it started from, or ""}.

    Raises:
        ValueError: read back, it has other weights, or embeds slices otherwise.
    """
    params = map_leaves(lambda leaf: leaf.cpu(), params)
    towers = {"vit": ("vision", model.vit, model.cfg.vit.name)}
    if model.text_encoder is not None:
        towers["text"] = ("text", model.text_encoder, model.cfg.words.encoder)
    for part, (name, skeleton, _) in towers.items():
        saving.save_skeleton(skeleton, params[part], out / name)
    rest = {part: tree for part, tree in params.items() if part not in towers}
    checkpoints.save_finite(flatten(rest), out / REST, "export: weights")
    model.tokenizer.save_pretrained(out / "tokenizer")
    # What `look_at_scan` reads of an evaluation: thresholds, calibration and average slices.
    (out / "results").mkdir()
    results = [*folder.glob("results/*.json"), *folder.glob(f"results/{AVERAGE}")]
    for path in (folder / "config.json", *results):
        shutil.copyfile(path, out / path.relative_to(folder))
    # Two drawn slices; the digest is of all weights.
    gen = torch.Generator().manual_seed(0)
    slices = torch.randint(256, (1, 2, *size_of(model.cfg.ct)[1:]), generator=gen).to(torch.uint8)
    mask = torch.ones(1, 2, dtype=torch.bool)
    batch = {"slices": slices, "mask": mask, "position_mm": torch.tensor([[0.0, 3.0]])}
    checks = []
    with torch.no_grad():
        for one, weights in ((model, params), load_exported(model.cfg, out)):
            checks.append((skeletons.weights_digest(weights), embed_volumes(one, weights, batch).tolist()))
    if checks[0] != checks[1]:
        raise ValueError(f"export: {folder} is read back as another model than was written; nothing is kept")
    return {skeleton.name: checkpoint for _, skeleton, checkpoint in towers.values()}


def load_exported(cfg: Config, folder: Path) -> tuple[Model, Tree]:
    """Model and parameters of a run that was exported, on the CPU.

    Raises:
        ValueError: files that are missing or broken, or not those of `cfg`.
    """
    encoder = str(folder / "text") if cfg.words.encoder else ""
    words = evolve(cfg.words, tokenizer=str(folder / "tokenizer"), encoder=encoder)
    here = evolve(cfg, vit=VitConfig(name=str(folder / "vision")), words=words)
    model, params = init_model(here, folder)
    entries = checkpoints.open_weights(folder / REST, str(folder))
    loaded = ("vit/", "text/") if encoder else ("vit/",)
    needed = {n: tuple(leaf.shape) for n, leaf in flatten(params).items() if not n.startswith(loaded)}
    running = {n: () for n in entries if n.startswith("running/")}
    if faults := checkpoints.list_faults(checkpoints.shapes_of(entries), needed, running):
        raise ValueError(f"load: {folder / REST} is not of the run that config.json describes: {faults}")
    rest = unflatten({name: entry.read() for name, entry in entries.items()})
    return evolve(model, cfg=cfg), {"running": {}} | merge_trees(params, rest)
