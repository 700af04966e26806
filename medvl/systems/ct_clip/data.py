"""The data of ct_clip: where its files are, what is checked before training, volumes with their labels and
reports, batches.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor

from medvl.base import config, processes, store
from medvl.ct import ingest, names, pairs, preprocess, protocols, reports
from medvl.hub import tokens
from medvl.phantoms import chests
from medvl.systems.ct_clip.model import Model
from medvl.systems.ct_clip.record import SPLITS, Config
from medvl.training import order
from medvl.training.optim import seeded

_log = logging.getLogger("medvl")
Kind = Literal["store", "reports", "labels", "metadata"]
_NEEDED: tuple[Kind, ...] = ("store", "reports", "labels")  # metadata may be absent


@frozen(kw_only=True, eq=False)
class LabelledVolumes:
    """The volumes of a split that have labels."""

    names: tuple[str, ...]
    findings: tuple[str, ...]
    labels: np.ndarray  # int8 [n, c], c findings


# Files ------------------------------------------------------------------------------------------------------
def data_folder(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; phantoms of one PhantomConfig share one."""
    folder = Path(cfg.data.folder)
    if cfg.data.source == "phantoms":
        return folder / f"phantoms-{config.record_digest(cfg.data.phantoms)}"
    return folder


def data_path(cfg: Config, kind: Kind, split: str) -> Path:
    """Where a split's file is; `{ct}` in the record stands for the digest of the CT settings."""
    if cfg.data.test and split == "test":
        return Path(cfg.data.test, "test.h5" if kind == "store" else f"test_{kind}.csv")
    pattern, setting = getattr(cfg.data, kind), f"data.{kind}"
    # A split may have a store of its own.
    if kind == "store" and split in cfg.data.stores:
        pattern, setting = cfg.data.stores[split], f"data.stores.{split}"
    # With the preset's defaults filled in: settings that mean the same find the same store.
    digest = config.record_digest(preprocess.settings_of(cfg.ct))

    def fill(split: str) -> Path:
        return Path(config.fill_pattern(pattern, setting, folder=data_folder(cfg), split=split, ct=digest))

    # CT-RATE calls some tables of this split "validation", and so does `invoke split --rule reference`.
    if split == "valid" and not fill("valid").exists() and fill("validation").exists():
        return fill("validation")
    return fill(split)


def prepare_data(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: phantoms are drawn and preprocessed, files must be there.

    Raises:
        ValueError: lists every file that is missing and how to make it; as `check_labels`.
    """
    if cfg.data.source == "phantoms":
        _draw_phantoms(cfg, log)
    paths = [data_path(cfg, kind, split) for split in SPLITS for kind in _NEEDED]
    missing = [str(path) for path in paths if not store.main_file(path).is_file()]  # a store may be a folder
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing: {', '.join(missing)}. `invoke preprocess --source SCANS "
            "--out STORE.h5` makes the stores; reports and labels are CSVs in CT-RATE's columns; data.store, "
            "data.reports and data.labels say where they are"
        )
    check_labels(cfg)


def _draw_phantoms(cfg: Config, log: Callable[[str], None]) -> None:
    folder, workers = data_folder(cfg), cfg.data.workers
    num_volumes = chests.draw_chests(cfg.data.phantoms, folder, workers)
    counts = ", ".join(f"{n} {split}" for split, n in num_volumes.items())
    log(f"{sum(num_volumes.values())} chests drawn in {folder}: {counts}")
    for split in SPLITS:
        scans = folder / split
        store_path = data_path(cfg, "store", split)
        metadata = data_path(cfg, "metadata", split)
        # What is drawn and stored already is left as it is.
        summary = ingest.preprocess_folder(scans, store_path, cfg.ct, metadata, workers)
        # Real scans may be rejected one by one; phantoms must all be usable.
        if summary.rejected:
            first = next(iter(summary.rejected.items()))
            raise ValueError(f"{scans}: {len(summary.rejected)} drawn scans were rejected, e.g. {first}")


def open_volumes(cfg: Config, split: str) -> store.Store:
    """The store of a split; refuses one made with other settings than the record's."""
    return store.open_store(data_path(cfg, "store", split), expect=preprocess.settings_of(cfg.ct))


# Labels and patients ----------------------------------------------------------------------------------------
def label_volumes(cfg: Config, split: str, volumes: store.Store) -> LabelledVolumes:
    """The volumes of a split that have labels; what is on one side only is counted in a warning.

    Raises:
        ValueError: as `reports.read_labels`; no volume has labels.
    """
    table = data_path(cfg, "labels", split)
    listed, findings, labels = _read_labels(cfg, table)
    # Volumes in the order of the table, not of the store: it is the order of all scores that are written.
    stored = set(volumes.names)
    rows = [i for i, name in enumerate(listed) if name in stored]
    if not rows:
        raise ValueError(f"{table}: has labels for none of the {len(stored)} volumes of {volumes.path}")
    if len(rows) < len(listed) or len(rows) < len(stored):
        _log.warning(
            "%s: %d labelled volumes; %d labels have no volume, %d volumes no label",
            split,
            len(rows),
            len(listed) - len(rows),
            len(stored) - len(rows),
        )
    if cfg.evaluate.exclude:
        excluded = set(names.read_list(cfg.evaluate.exclude))
        rows = [i for i in rows if listed[i] not in excluded]
        if not rows:
            raise ValueError(
                f"evaluate.exclude: {cfg.evaluate.exclude} leaves no volume of the {split} split"
            )
        _log.warning("%s: %d volumes are left without those of %s", split, len(rows), cfg.evaluate.exclude)
    return LabelledVolumes(names=tuple(listed[i] for i in rows), findings=findings, labels=labels[rows])


def _read_labels(cfg: Config, table: Path) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """Volumes, findings and labels of a table."""
    if cfg.evaluate.protocol:
        return protocols.read_labels(table, cfg.evaluate.protocol)
    return reports.read_labels(table, cfg.evaluate.findings, cfg.data.patient_column)


def patients_of(cfg: Config, split: str, volume_names: Sequence[str]) -> list[str]:
    """The patient of each of these volumes of a split, as `data.patient_column` or `data.patient_pattern`
    say.

    Raises:
        ValueError: as `reports.read_patients` and `names.patients_of`.
    """
    column = None
    if cfg.data.patient_column:
        # Metadata may be absent.
        tables = [data_path(cfg, "labels", split), data_path(cfg, "metadata", split)]
        present = [table for table in tables if table.exists()]
        column = reports.read_patients(present, cfg.data.patient_column)
    return names.patients_of(volume_names, cfg.data.patient_pattern, column)


def check_labels(cfg: Config) -> None:
    """Check that what is scored can be scored, and that no patient is in two splits.

    Raises:
        ValueError: labels that cannot be used, validation and test tables with other findings, validation
            labels of one class only, a patient in two splits.
    """
    patients = {"train": set(patients_of(cfg, "train", open_volumes(cfg, "train").names))}
    for split in ("valid", "test"):
        labelled = label_volumes(cfg, split, open_volumes(cfg, split))
        patients[split] = set(patients_of(cfg, split, labelled.names))
        if split == "valid":
            _check_classes(cfg, labelled)
    check_findings(cfg)
    _check_patients(patients)


def check_findings(cfg: Config) -> None:
    """Raise where the label tables of validation and test have other findings: thresholds of the one are applied
    column by column to the other.
    """
    valid_table, test_table = data_path(cfg, "labels", "valid"), data_path(cfg, "labels", "test")
    valid, test = _read_labels(cfg, valid_table)[1], _read_labels(cfg, test_table)[1]
    if valid != test:
        different = sorted(set(valid) ^ set(test)) or ["their order"]
        raise ValueError(
            f"{test_table}: must have the findings of {valid_table} in their order, "
            f"they differ in {', '.join(different)}; evaluate.findings can name those to score"
        )


def check_test_set(cfg: Config) -> None:
    """Raise where what is scored now cannot be: as `check_findings`; of another test set (data.test), which training
    has not seen, also where one of its patients is in validation or training.
    """
    check_findings(cfg)
    if not cfg.data.test:
        return
    patients = {}
    for split in ("valid", "test"):
        listed = _read_labels(cfg, data_path(cfg, "labels", split))[0]
        patients[split] = set(patients_of(cfg, split, listed))
    # Training may have been on another machine.
    if data_path(cfg, "store", "train").exists():
        patients["train"] = set(patients_of(cfg, "train", open_volumes(cfg, "train").names))
    _check_patients(patients)


def _check_classes(cfg: Config, valid: LabelledVolumes) -> None:
    """Raise where no finding of the validation split has both classes; warn of those that have one."""
    # AUROC and thresholds have no value where all volumes have a finding, or none.
    prevalence = valid.labels.mean(0)
    one_class = [f for f, share in zip(valid.findings, prevalence, strict=True) if share in (0, 1)]
    place = f"{data_path(cfg, 'labels', 'valid')}: of {len(valid.labels)} volumes"
    listed = ", ".join(one_class)
    if len(one_class) == len(valid.findings):
        raise ValueError(
            f"{place}, none or all have {listed}; the validation split chooses checkpoint and thresholds, "
            "which needs volumes with and without a finding"
        )
    if one_class:
        _log.warning(
            "%s, none or all have %s: these do not count in the validation score and get no thresholds",
            place,
            listed,
        )


def _check_patients(patients: Mapping[str, set[str]]) -> None:
    for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
        shared = patients.get(first, set()) & patients.get(second, set())
        if shared:
            raise ValueError(
                f"{len(shared)} patients are both in {first} and in {second}; what is learnt from a patient "
                "must not be tested on the same one. `invoke split` splits tables by patient; "
                "data.patient_column or data.patient_pattern say which patient a volume is of"
            )


# Reports ----------------------------------------------------------------------------------------------------
def pair_reports(cfg: Config, split: str, volumes: store.Store) -> pairs.Pairs:
    """A split's volumes (or their slice features) with their reports."""
    data = pairs.join_pairs(volumes, _read_report_parts(cfg, split))
    if cfg.data.shuffle and split == "train":
        return shuffle_reports(data, cfg.seed)
    return data


def _read_report_parts(cfg: Config, split: str) -> dict[str, dict[str, str]]:
    """{part: {volume: text}} of a split's reports, as `data.text` says."""
    path = data_path(cfg, "reports", split)
    if cfg.data.text != "either":
        return {cfg.data.text: reports.read_reports(path, cfg.data.text, cfg.data.missing)}
    # A report needs one of its two parts only.
    kinds: tuple[reports.Text, ...] = ("findings", "impression")
    return {kind: reports.read_reports(path, kind, "drop") for kind in kinds}


def shuffle_reports(data: pairs.Pairs, seed: int) -> pairs.Pairs:
    """The control that must learn nothing: every scan has another scan's report; its reconstructions share
    it.
    """
    report = dict(zip(data.scans, data.texts, strict=True))
    # No scan gets its own report back, as a plain shuffle would let some: that would be a little to learn.
    donor = order.derangement(report, seed)
    return evolve(data, texts=tuple(report[donor[scan]] for scan in data.scans))


# Batches ----------------------------------------------------------------------------------------------------
def training_batches(
    model: Model, data: pairs.Pairs, size: int, seed: int
) -> Callable[[int], dict[str, Tensor]]:
    """i -> batch: this process's rows of `size` pairs from different scans, with `data.draws` texts each.

    What is drawn for a pair is a function of (seed, i, pair), so that any number of processes show the same
    texts.
    """
    cfg = model.cfg.data
    context = model.cfg.words.tower.context
    indices_of_batch = order.batch_indices(
        data.scans, size, seed, rank=processes.rank(), world=processes.world_size()
    )
    # With data.text other than "either" each pair has one part only, whose share does not matter.
    shares = {"findings": 1 - cfg.impressions, "impression": cfg.impressions, "both": 1.0}

    def draw_texts(i: int, pair: int) -> list[str]:
        # Not one generator for the batch: its draws would depend on which pairs this process has.
        gen = seeded(torch.device("cpu"), "texts", seed, i, pair)
        return [pairs.draw_text(data.texts[pair], shares, cfg.sentences, gen) for _ in range(cfg.draws)]

    def batch_at(i: int) -> dict[str, Tensor]:
        chosen = indices_of_batch(i)
        texts: list[str] = []
        for pair in chosen:
            texts += draw_texts(i, pair)
        ids, mask = tokens.tokenize(model.tokenizer, texts, context)
        # "slices", "mask" and "position_mm"; the texts are tokenized flat, [b * k, t], and become [b, k, t].
        slices = pairs.read_slices(data.store, [data.names[pair] for pair in chosen])
        texts_of_volume = (len(chosen), -1)
        return slices | {
            "ids": ids.unflatten(0, texts_of_volume),
            "words": mask.unflatten(0, texts_of_volume),
        }

    return batch_at
