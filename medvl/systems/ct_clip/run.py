"""How ct_clip runs: its data put in place, its stages trained, its findings scored, one scan looked at."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from medvl.base import config, files, processes, store
from medvl.base.display import track
from medvl.base.tree import Tree, count_values, flatten, map_leaves, match_names, merge_trees, split_tree
from medvl.components import encode
from medvl.ct import ingest, metadata_table, names, pairs, preprocess, reports, zero_shot
from medvl.evaluation import metrics, plots, report
from medvl.evaluation.results import Result
from medvl.hub import tokens
from medvl.phantoms import chests
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip.model import SPLITS, Config, Model, Speed, Stage
from medvl.systems.ct_clip.slice_features import cached_features
from medvl.training import gradients, loop, order, states
from medvl.training.muon import muon
from medvl.training.optim import Optimizer, Rate, adamw, routed, seeded, warmup_cosine

_log = logging.getLogger("medvl")
_TABLES: tuple[Literal["store", "reports", "labels"], ...] = ("store", "reports", "labels")


def prepare(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: phantoms are drawn and preprocessed, files must be there.

    Raises:
        ValueError: lists every file that is missing and how to make it; as `check_labels`.
    """
    if cfg.data.source == "phantoms":
        drawn = chests.draw_chests(cfg.data.phantoms, folder_of(cfg), cfg.data.workers)
        log(
            f"{sum(drawn.values())} chests drawn in {folder_of(cfg)}: "
            + ", ".join(f"{n} {split}" for split, n in drawn.items())
        )
        for name in SPLITS:
            scans, out = folder_of(cfg) / name, path(cfg, "store", name)
            done = ingest.preprocess_folder(scans, out, cfg.ct, path(cfg, "metadata", name), cfg.data.workers)
            if done.rejected:
                raise ValueError(
                    f"{scans}: {len(done.rejected)} drawn scans were rejected, e.g. {next(iter(done.rejected.items()))}"
                )
    missing = [
        path(cfg, kind, name) for name in SPLITS for kind in _TABLES if not path(cfg, kind, name).is_file()
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing: {', '.join(map(str, missing))}. `invoke preprocess --source SCANS --out STORE.h5` makes "
            "the stores; reports and labels are CSVs in CT-RATE's columns; data.store, data.reports and data.labels say where they are"
        )
    check_labels(cfg)


def folder_of(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; phantoms of one PhantomConfig share one."""
    drawn = cfg.data.source == "phantoms"
    return (
        Path(cfg.data.folder) / f"phantoms-{config.record_digest(cfg.data.phantoms)}"
        if drawn
        else Path(cfg.data.folder)
    )


def path(cfg: Config, kind: Literal["store", "reports", "labels", "metadata"], name: str) -> Path:
    """Where a split's file is; `{ct}` stands for the digest of the CT settings."""
    digest = config.record_digest(preprocess.settings_of(cfg.ct))
    pattern, where = getattr(cfg.data, kind), f"data.{kind}"
    if kind == "store" and name in cfg.data.stores:
        pattern, where = cfg.data.stores[name], f"data.stores.{name}"
    return Path(config.fill_pattern(pattern, where, folder=folder_of(cfg), split=name, ct=digest))


def volumes(cfg: Config, name: str) -> store.Store:
    """The store of a split; refuses one made with other settings than the record's."""
    return store.open_store(path(cfg, "store", name), expect=preprocess.settings_of(cfg.ct))


def labelled(
    cfg: Config, name: str, volumes: store.Store
) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """(names, findings, labels [n, c]) of the volumes of a split that have labels; what is on one side only is counted in a warning.

    Raises:
        ValueError: as `reports.read_labels`; no volume has labels.
    """
    table = path(cfg, "labels", name)
    listed, findings, labels = reports.read_labels(table, cfg.evaluate.findings, cfg.data.patient_column)
    stored = {*volumes.names}
    rows = [i for i, volume in enumerate(listed) if volume in stored]
    if not rows:
        raise ValueError(f"{table}: has labels for none of the {len(stored)} volumes of {volumes.path}")
    if len(rows) < len(listed) or len(rows) < len(stored):
        _log.warning(
            "%s: %d labelled volumes; %d labels have no volume, %d volumes no label",
            name,
            len(rows),
            len(listed) - len(rows),
            len(stored) - len(rows),
        )
    return tuple(listed[i] for i in rows), findings, labels[rows]


def patients(cfg: Config, name: str, wanted: Sequence[str]) -> list[str]:
    """The patient of each of these volumes of a split, as `data.patient_column` or `data.patient_pattern` say.

    Raises:
        ValueError: as `reports.read_patients` and `names.patients_of`.
    """
    column = None
    if cfg.data.patient_column:
        tables = [path(cfg, "labels", name), path(cfg, "metadata", name)]
        column = reports.read_patients([table for table in tables if table.exists()], cfg.data.patient_column)
    return names.patients_of(wanted, cfg.data.patient_pattern, column)


def check_labels(cfg: Config) -> None:
    """See that what is scored can be scored, and that no patient is on both sides.

    Raises:
        ValueError: labels that cannot be used, validation and test tables with other findings, validation labels of one class only, a
            patient in two splits.
    """
    people = {"train": {*patients(cfg, "train", volumes(cfg, "train").names)}}
    findings: dict[str, tuple[str, ...]] = {}
    for name in ("valid", "test"):
        listed, findings[name], labels = labelled(cfg, name, volumes(cfg, name))
        people[name] = {*patients(cfg, name, listed)}
        if name == "valid":
            _check_classes(cfg, findings[name], labels)
    if findings["valid"] != findings["test"]:
        odd = sorted({*findings["valid"]} ^ {*findings["test"]}) or ["their order"]
        raise ValueError(
            f"{path(cfg, 'labels', 'test')}: must have the findings of {path(cfg, 'labels', 'valid')} in their order, they differ in "
            f"{', '.join(odd)}; evaluate.findings can name those to score"
        )
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        both = people[one] & people[other]
        if both:
            raise ValueError(
                f"{len(both)} patients are both in {one} and in {other}; what was learned of a patient says nothing of others. "
                "`invoke split` cuts tables by patient; data.patient_column or data.patient_pattern say whose a volume is"
            )


def _check_classes(cfg: Config, findings: Sequence[str], labels: np.ndarray) -> None:
    single = [f for f, share in zip(findings, labels.mean(0), strict=True) if share in (0, 1)]
    where = f"{path(cfg, 'labels', 'valid')}: of {len(labels)} volumes"
    if len(single) == len(findings):
        raise ValueError(
            f"{where}, none or all have {', '.join(single)}; the validation split chooses checkpoint and thresholds, which needs "
            "volumes with and without a finding"
        )
    if single:
        _log.warning(
            "%s, none or all have %s: these count neither in the validation score nor have thresholds",
            where,
            ", ".join(single),
        )


def report_parts(cfg: Config, name: str) -> dict[str, dict[str, str]]:
    """{part: {volume: text}} of a split's reports, as `data.text` says."""
    kinds: tuple[reports.Text, ...] = (
        ("findings", "impression") if cfg.data.text == "either" else (cfg.data.text,)
    )
    missing = "drop" if cfg.data.text == "either" else cfg.data.missing  # a report needs one of its two parts
    return {kind: reports.read_reports(path(cfg, "reports", name), kind, missing) for kind in kinds}


def paired(cfg: Config, name: str, volumes: store.Store) -> pairs.Pairs:
    """A split's volumes (or features) with their reports."""
    joined = pairs.join_pairs(volumes, report_parts(cfg, name))
    return shuffle_reports(joined, cfg.seed) if cfg.data.shuffle and name == "train" else joined


def shuffle_reports(data: pairs.Pairs, seed: int) -> pairs.Pairs:
    """The control that must learn nothing: every scan has another scan's report; its reconstructions share it."""
    report = dict(zip(data.scans, data.texts, strict=True))
    other = order.derangement(report, seed)
    return evolve(data, texts=tuple(report[other[scan]] for scan in data.scans))


def batches(model: Model, data: pairs.Pairs, size: int, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """i -> batch: this process's rows of `size` pairs from different scans.

    What is drawn for a pair is a function of (seed, i, pair), so that any number of processes show the same texts.
    """
    cfg, tok = model.cfg, model.tokenizer
    share = order.batch_indices(data.scans, size, seed, rank=processes.rank(), world=processes.world_size())
    shares = {"findings": 1 - cfg.data.impressions, "impression": cfg.data.impressions, "both": 1.0}

    def draw_texts(i: int, pair: int) -> list[str]:
        gen = seeded(torch.device("cpu"), "texts", seed, i, pair)
        return [
            pairs.draw_text(data.texts[pair], shares, cfg.data.sentences, gen) for _ in range(cfg.data.draws)
        ]

    def batch_at(i: int) -> dict[str, Tensor]:
        chosen = share(i)
        texts = [text for pair in chosen for text in draw_texts(i, pair)]
        ids, words = tokens.tokenize(tok, texts, cfg.words.tower.context)
        return pairs.read_slices(data.store, [data.names[j] for j in chosen]) | {
            "ids": ids.unflatten(0, (len(chosen), -1)),
            "words": words.unflatten(0, (len(chosen), -1)),
        }

    return batch_at


# Training -------------------------------------------------------------------------------------------------------------------------------


def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree]:
    """Train (or go on with) all stages in the run folder; returns the model and its parameters.

    Under "running" they hold the running means of the towers' rows, in the state that was kept: what rows of one volume are normalised with.

    Raises:
        ValueError: a batch that processes cannot share evenly; as `ct_clip.init`, `loop.train_steps` and `cached_features`.
    """
    if cfg.train.batch % processes.world_size():
        raise ValueError(
            f"train.batch must be a multiple of the number of processes, got {cfg.train.batch} for {processes.world_size()}; the loss compares "
            "the rows of all of them"
        )
    data = paired(cfg, "train", volumes(cfg, "train"))
    texts = [t for parts in data.texts for t in parts.values()]
    model, params = ct_clip.init(cfg, folder, texts)
    for stage in cfg.train.stages:  # a later one must not be found wrong when the first is trained
        try:
            _optimizer(stage, split_tree(params, stage.train)[0])
        except ValueError as e:
            raise ValueError(f"stage {stage.name}: {e}") from e
    cut = tokens.truncated(model.tokenizer, texts, cfg.words.tower.context)
    log(f"{len(data.names)} volumes of {len(set(data.scans))} scans")
    if cut and not cfg.data.sentences:
        log(
            f"{cut} of {len(texts)} texts are longer than {cfg.words.tower.context} tokens: what lies beyond is not read"
        )
    if cfg.vit.whiten:
        params["vit"] = _whitened(model, params, data)
    params = map_leaves(lambda t: t.to(processes.choose_device(cfg.train.device)), params)
    means: Tree = {}
    for i, stage in enumerate(cfg.train.stages):
        params, means = _fit_stage(model, params, means, stage, data, folder / f"{i}-{stage.name}", log)
    return model, params | {"running": means}


def _fit_stage(
    model: Model,
    params: Tree,
    means: Tree,
    stage: Stage,
    data: pairs.Pairs,
    folder: Path,
    log: Callable[[str], None],
) -> tuple[Tree, Tree]:
    cfg = model.cfg
    trained, frozen = split_tree(params, stage.train)
    log(
        f"stage {stage.name}: {stage.steps} steps train {count_values(trained):,} of {count_values(params):,} parameters"
    )
    valid = volumes(cfg, "valid")
    if not any(n.startswith("vit/") for n in flatten(trained)):
        cache = Path(cfg.data.cache)
        data = evolve(data, store=cached_features(model, params, data.store, cache))
        valid = cached_features(model, params, valid, cache)
    everything = lambda p: merge_trees(frozen, p)
    grad = gradients.cached_value_and_grad(
        lambda p, rows: {
            "image": ct_clip.embed_volumes(model, everything(p), rows),
            "text": ct_clip.embed_texts(model, everything(p), rows),
        },
        lambda p, rows: ct_clip.contrast(cfg.contrast, everything(p), rows),
        chunk=cfg.train.chunk,
        precision=cfg.train.precision,
    )
    optimizer, schedule = _optimizer(stage, trained), warmup_cosine(stage.steps, stage.warmup)
    step = loop.make_step(
        grad, optimizer, clip=cfg.train.clip, bound=lambda p: ct_clip.bound(cfg.contrast, p)
    )

    def validate(state: states.State) -> dict[str, float]:
        return {"score": _mean_auroc(model, everything(state.params) | {"running": state.means}, valid)}

    state = states.State(params=trained, opt=optimizer.init(trained), means=means)
    state = loop.train_steps(
        step,
        state,
        batches(model, data, cfg.train.batch, cfg.seed),
        steps=stage.steps,
        folder=folder,
        every=loop.Every(log=cfg.train.log, save=cfg.train.save, validate=cfg.train.validate),
        validate=validate,
        title=stage.name,
        lr=lambda i: stage.lr * schedule(i),
        log=log,
    )
    if cfg.train.keep == "best":
        processes.wait_for_all()  # process 0 has written it
        state = states.read_trained(folder, "best", processes.choose_device(cfg.train.device), model=params)
    return everything(state.params), state.means


def _optimizer(stage: Stage, trained: Tree) -> Optimizer:
    """A later speed wins over an earlier one; muon takes matrices only, so a pattern may name whole blocks."""
    flat, schedule = flatten(trained), warmup_cosine(stage.steps, stage.warmup)
    chosen = dict.fromkeys(flat, Speed(match=".*", lr=stage.lr, weight_decay=stage.weight_decay))
    for speed in stage.speeds:
        hits = match_names(list(flat), [speed.match])
        chosen |= dict.fromkeys([n for n in hits if speed.optimizer == "adamw" or flat[n].dim() > 1], speed)
    rate = lambda n: Rate(lr=chosen[n].lr, weight_decay=chosen[n].weight_decay)
    return routed(
        lambda n: chosen[n].optimizer, {"adamw": adamw(rate, schedule), "muon": muon(rate, schedule)}
    )


def _whitened(model: Model, params: Tree, data: pairs.Pairs, scans: int = 200) -> Tree:
    """The slice encoder with its patch embedding whitened over slices of scans that are spread over the training split.

    Raises:
        ValueError: no stage trains the patch embedding, so that checkpoints would not hold it.
    """
    trained = {n for stage in model.cfg.train.stages for n in flatten(split_tree(params, stage.train)[0])}
    patch = [n for n, t in flatten(params).items() if n.startswith("vit/") and t.dim() == 4]
    if not trained.issuperset(patch):
        raise ValueError(
            f"vit.whiten: a stage must train {', '.join(patch)}, or the checkpoints would not hold it"
        )
    chosen = data.names[:: max(1, len(data.names) // scans)]
    batch = pairs.read_slices(data.store, chosen)
    slices = batch["slices"][batch["mask"]]
    few = slices[:: -(-slices.numel() // 2**24)]  # at most 16 million pixels: some 400 MiB of statistics
    return encode.whiten(model.cfg.encode, params["vit"], few)


def load(folder: Path) -> tuple[Model, Tree]:
    """Model and parameters of a trained run, as `fit` returned them."""
    cfg = config.load_run(folder, Config)
    model, params = ct_clip.init(cfg, folder)
    means: Tree = {}
    for i, stage in enumerate(cfg.train.stages):
        state = states.read_trained(folder / f"{i}-{stage.name}", cfg.train.keep, "cpu", model=params)
        params, means = merge_trees(params, state.params), state.means
    device = processes.choose_device(cfg.train.device)
    return model, map_leaves(lambda t: t.to(device), params | {"running": means})


# Evaluation -----------------------------------------------------------------------------------------------------------------------------


def images(model: Model, params: Tree, of: store.Store, wanted: Sequence[str]) -> Tensor:
    """Volumes in the common space, [n, d] float32 on the CPU; each is encoded once."""
    size, rows = model.cfg.evaluate.batch, []
    for i in track(range(0, len(wanted), size), "embedding volumes, batch"):
        with torch.no_grad(), gradients.autocast(params, model.cfg.train.precision):
            z = ct_clip.embed_volumes(model, params, pairs.read_slices(of, wanted[i : i + size]))
        rows.append(ct_clip.place(params, "image", z, params["running"].get("image", {})).detach().cpu())
    return torch.cat(rows)


def sentences(model: Model, params: Tree, said: Sequence[str]) -> Tensor:
    """Texts in the common space, [n, d] float32 on the CPU."""
    rows = []
    for i in range(0, len(said), 64):
        ids, words = tokens.tokenize(model.tokenizer, said[i : i + 64], model.cfg.words.tower.context)
        with torch.no_grad(), gradients.autocast(params, model.cfg.train.precision):
            z = ct_clip.embed_texts(model, params, {"ids": ids[:, None], "words": words[:, None]})[:, 0]
        rows.append(ct_clip.place(params, "text", z, params["running"].get("text", {})).detach().cpu())
    return torch.cat(rows)


def probabilities(model: Model, params: Tree, image: Tensor, findings: Sequence[str]) -> Tensor:
    """Zero-shot probability [n, c] of each finding for embedded volumes [n, d]."""
    pairs_of = [reports.prompts_for(f, model.cfg.evaluate.prompts) for f in findings]
    sides = [
        sentences(model, params, [t for pair in pairs_of for t in pair[k]]).unflatten(0, (len(findings), -1))
        for k in (0, 1)
    ]
    return zero_shot.zero_shot(image, sides[0], sides[1], params["contrast"]["log_scale"].exp().cpu())


def score_split(model: Model, params: Tree, name: str, of: store.Store | None = None) -> dict[str, Any]:
    """{"names", "findings", "labels" [n, c], "scores" [n, c], "image" [n, d]} of a split's labelled volumes."""
    of = of or volumes(model.cfg, name)
    listed, findings, labels = labelled(model.cfg, name, of)
    image = images(model, params, of, listed)
    scores = probabilities(model, params, image, findings).numpy()
    return {"names": listed, "findings": findings, "labels": labels, "scores": scores, "image": image}


def _mean_auroc(model: Model, params: Tree, of: store.Store) -> float:
    found = score_split(model, params, "valid", of)
    return float(np.nanmean(metrics.auroc(found["scores"], found["labels"])))


def assess(model: Model, params: Tree, folder: Path, experiment: str) -> tuple[list[Result], Path]:
    """Score the test split with thresholds from the validation split; writes results, scores, plots and the report into `folder`."""
    cfg = model.cfg
    valid, test = (score_split(model, params, name) for name in ("valid", "test"))
    cuts = metrics.best_thresholds(valid["scores"], valid["labels"], cfg.evaluate.rule)
    rows = zero_shot.evaluate_findings(
        test["scores"],
        test["labels"],
        test["names"],
        test["findings"],
        cuts,
        experiment=experiment,
        split="test",
        n_bootstrap=cfg.evaluate.bootstrap,
        seed=cfg.seed,
        patients=patients(cfg, "test", test["names"]),
    )
    rows += _retrieval(model, params, test, experiment)
    for name, found in (("valid", valid), ("test", test)):
        table = [
            {"VolumeName": n} | dict(zip(found["findings"], s, strict=True))
            for n, s in zip(found["names"], found["scores"].tolist(), strict=True)
        ]
        files.write_csv(folder / f"scores_{name}.csv", table, ["VolumeName", *found["findings"]])
    files.write_text(
        folder / "thresholds.json",
        json.dumps(dict(zip(test["findings"], cuts.tolist(), strict=True)), indent=1) + "\n",
    )
    sheet = folder / "volumes.png"
    shown = test["names"][:9]
    labels = (
        shown if cfg.evaluate.names else [f"row {i} of scores_test.csv" for i in range(1, len(shown) + 1)]
    )
    ingest.contact_sheet(volumes(cfg, "test"), sheet, shown, labels=labels)
    last = folder.parent / f"{len(cfg.train.stages) - 1}-{cfg.train.stages[-1].name}" / "metrics.jsonl"
    findings_only = [r for r in rows if r.what == "auroc"]
    figures = {
        "AUROC with 95 % intervals": plots.intervals(findings_only),
        "ROC curves of the test split": plots.roc(test["scores"], test["labels"], test["findings"]),
        **plots.training_curves(last),
        "Middle slices of nine test volumes as the model sees them": sheet.read_bytes(),
    }
    notes = (
        f"Zero-shot with the prompt set {cfg.evaluate.prompts!r}; thresholds by {cfg.evaluate.rule!r} on the validation split "
        f"({len(valid['names'])} volumes). Labels were not trained on; validation labels chose checkpoint and thresholds.",
    )
    return rows, report.write_report(folder, f"{experiment}: zero-shot findings", rows, figures, notes)


def _retrieval(model: Model, params: Tree, test: dict[str, Any], experiment: str) -> list[Result]:
    """Report -> volume recall over the test split; any reconstruction of the report's scan is a hit."""
    told = {n: " ".join(parts.values()) for n, parts in _texts_by_name(model.cfg).items()}
    gallery = list(test["names"])
    queries = {names.scan_of(n): told[n] for n in gallery if n in told}
    words = sentences(model, params, list(queries.values()))
    ks = [k for k in (1, 5, 10, 50) if k <= len(gallery)]
    recall = metrics.group_recall_at(
        words @ test["image"].T, list(queries), [names.scan_of(n) for n in gallery], ks
    )
    like: dict[str, Any] = {
        "split": "test",
        "n": len(queries),
        "experiment": experiment,
        "subject": f"report to one of {len(gallery)} volumes",
    }
    return [Result(what=f"recall_at_{k}", value=v, **like) for k, v in recall.items()]


def _texts_by_name(cfg: Config) -> dict[str, dict[str, str]]:
    pair = paired(cfg, "test", volumes(cfg, "test"))
    return dict(zip(pair.names, pair.texts, strict=True))


# One scan -------------------------------------------------------------------------------------------------------------------------------


def look(
    folder: Path,
    scan: files.PathLike,
    findings: Sequence[str] = (),
    metadata_csv: files.PathLike = "",
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Preprocess, embed and classify one scan with a trained run.

    Args:
        metadata_csv: a table with the scan's row, by `VolumeName`.
        settings: of how this scan is read, `hu=...` and `spacing_from=...`; all else must be as the run was trained.
    Returns:
        {"volume": ct.Volume, "embedding" [d] float32, "probability" {finding: p}, "threshold" {finding: from validation, where known}}.
    """
    trained_with = config.load_record(Path(folder) / "config.json", Config).ct
    cfg = config.structure(
        config.override(config.unstructure(trained_with), tuple(settings), "one scan"),
        preprocess.CtConfig,
        "one scan",
    )
    if evolve(cfg, hu=trained_with.hu, spacing_from=trained_with.spacing_from) != trained_with:
        raise ValueError(
            f"one scan: only hu and spacing_from may differ from what the run was trained with, got {', '.join(settings)}"
        )
    row = None
    if metadata_csv:
        name = names.volume_name(scan)
        row = metadata_table.read_metadata(metadata_csv, [name], preprocess.metadata_columns(cfg))[name]
    volume = preprocess.preprocess_scan(scan, cfg, row)
    model, params = load(Path(folder))
    first, stop = volume.occupied
    z = np.arange(first, stop)
    batch = {
        "slices": torch.from_numpy(volume.voxels[None, first:stop]),
        "mask": torch.ones(1, stop - first, dtype=torch.bool),
        "position_mm": torch.from_numpy((z * volume.spacing_mm[0]).astype(np.float32))[None],
    }
    with torch.no_grad(), gradients.autocast(params, model.cfg.train.precision):
        rows = ct_clip.embed_volumes(model, params, batch)
    image = ct_clip.place(params, "image", rows, params["running"].get("image", {})).detach().cpu()
    kept = Path(folder) / "results" / "thresholds.json"
    cuts = json.loads(kept.read_text()) if kept.exists() else {}
    asked = tuple(findings) or tuple(cuts) or model.cfg.evaluate.findings or reports.FINDINGS
    p = probabilities(model, params, image, asked)[0].tolist()
    return {
        "volume": volume,
        "embedding": image[0],
        "probability": dict(zip(asked, p, strict=True)),
        "threshold": {f: cuts[f] for f in asked if f in cuts},
    }
