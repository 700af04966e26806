"""Does the slice that a run calls strongest show the finding? On drawn chests with one local finding.

    python benches/localise_phantoms.py runs/ctclip_phantom-0a1b2c3d [--shuffled runs/...] [--seed 1] [--each 15]

Every chest has one nodule, opacity, consolidation or hernia and nothing else, from a seed that no run was trained
with. A hit: the strongest slice, as thick as the run's grid, meets the finding; distances are between their centres.
Compared are the ways to occlude, the middle slice, the same weights asked for another finding, untrained weights,
and a run that was trained on shuffled reports. Intervals are of a bootstrap over chests.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from attrs import evolve

from medvl.base.tree import Tree
from medvl.ct import preprocess
from medvl.evaluation import results
from medvl.phantoms import chest_voxels, chests
from medvl.phantoms.chest_case import Lesion, PhantomConfig
from medvl.systems.ct_clip import data, look, model, run, slice_effects
from medvl.systems.ct_clip.model import Model

FINDINGS = ("Lung nodule", "Lung opacity", "Consolidation", "Hiatal hernia")  # balls about `Lesion.at`


def draw(
    cfg: PhantomConfig, seed: int, each: int
) -> Iterator[tuple[str, str, chest_voxels.DrawnVolume, Lesion]]:
    """(name, finding, volume, lesion) of `each` chests with one lesion of each finding."""
    cfg = evolve(cfg, seed=seed)
    missing = dict.fromkeys(FINDINGS, each)
    number = 0
    while any(missing.values()):
        number += 1
        name = f"test_{number}_a_1"
        case = chests.draw_volume_case(cfg, name)
        single = [f for f in FINDINGS if len(case.findings.get(f, ())) == 1 and missing[f]]
        if single:
            finding = single[0]
            missing[finding] -= 1
            alone = evolve(case, findings={finding: case.findings[finding]})
            gen = np.random.default_rng([seed, number])
            yield name, finding, chest_voxels.render(cfg, alone, gen), case.findings[finding][0]


def heights(drawn: chest_voxels.DrawnVolume, volume: preprocess.Volume) -> np.ndarray:
    """z [s] in the patient's mm of the slices of a volume that hold something; preset mm is centred on the scan."""
    shape = np.array(drawn.hu.shape)
    corners = nib.affines.apply_affine(drawn.affine, np.stack([0 * shape, shape - 1]))
    n, mm = len(volume.voxels), volume.spacing_mm[0]
    z = corners[:, 2].mean() + (np.arange(n) - (n - 1) / 2) * mm
    return z[slice(*volume.occupied)]


def untrained(opened: tuple[Model, Tree], folder: Path) -> tuple[Model, Tree]:
    """The same model with the weights of another start; its statistics are those of its own validation rows."""
    cfg = opened[0].cfg
    ct_clip, params = model.init_model(evolve(cfg, seed=cfg.seed + 1), folder)
    volumes = data.open_volumes(cfg, "valid")
    with torch.no_grad():
        batches = [look_at(ct_clip, params, volumes, name) for name in volumes.names[:64]]
        rows = torch.cat([model.embed_volumes(ct_clip, params, batch) for batch in batches])
        statistics = {"image": model.batch_statistics(cfg.contrast, rows)}
    return ct_clip, params | {"running": statistics | {"text": opened[1]["running"].get("text", {})}}


def look_at(ct_clip: Model, params: Tree, volumes: data.store.Store, name: str) -> dict[str, torch.Tensor]:
    return slice_effects.encode_batch(ct_clip, params, data.pairs.read_slices(volumes, [name]))


def average_of(opened: tuple[Model, Tree]) -> torch.Tensor:
    volumes = data.open_volumes(opened[0].cfg, "valid")
    return slice_effects.average_slices(*opened, volumes, volumes.names[:64])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--shuffled", type=Path)
    parser.add_argument("--seed", type=int, default=17001)
    parser.add_argument("--each", type=int, default=15)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    opened = {"trained": run.load(args.run)}
    opened["untrained weights"] = untrained(opened["trained"], args.run)
    if args.shuffled:
        opened["shuffled reports"] = run.load(args.shuffled)
    average = {name: average_of(models) for name, models in opened.items()}
    cfg = opened["trained"][0].cfg
    measured: dict[str, list[tuple[str, float, bool]]] = {}

    with tempfile.TemporaryDirectory() as place:
        for name, finding, drawn, lesion in draw(cfg.data.phantoms, args.seed, args.each):
            path = Path(place) / f"{name}.nii"
            nib.save(nib.Nifti1Image(drawn.hu, drawn.affine), path)
            volume = preprocess.preprocess_scan(path, cfg.ct)
            z = heights(drawn, volume)
            other = FINDINGS[(FINDINGS.index(finding) + 1) % len(FINDINGS)]
            effects = {"middle slice": -np.abs(np.arange(len(z)) - (len(z) - 1) / 2)}
            for kind, (ct_clip, params) in opened.items():
                batch = slice_effects.encode_batch(ct_clip, params, look.batch_of_one(volume))
                around = average[kind][slice(*volume.occupied)]
                table = slice_effects.slice_effects(ct_clip, params, batch, [finding, other], around).numpy()
                effects[f"{kind}, all other slices average"] = table[:, 0]
                if kind == "trained":
                    effects["trained, asked for another finding"] = table[:, 1]
                    dropped = slice_effects.slice_effects(ct_clip, params, batch, [finding]).numpy()[:, 0]
                    effects["trained, the slice left out"] = dropped
            for kind, effect in effects.items():
                distance = abs(float(z[np.argmax(effect)]) - lesion.at[2])
                hit = distance <= (lesion.size_mm + volume.spacing_mm[0]) / 2
                measured.setdefault(kind, []).append((finding, distance, hit))

    lines = []
    for kind, rows in measured.items():
        for subject in (*FINDINGS, "all"):
            chosen = [(mm, hit) for finding, mm, hit in rows if subject in (finding, "all")]
            lines.append([kind, subject, len(chosen), *map(interval, np.array(chosen, float).T[::-1])])
    print(results.markdown_table(("Slice", "Finding", "n", "Meets the finding", "Distance, mm"), lines))


def interval(values: np.ndarray) -> str:
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    digits = 2 if values.max() <= 1 else 0
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()
