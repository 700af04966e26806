"""Retrieval against naive double loops, on volumes with duplicate reconstructions and duplicate reports."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from medvl.ct import names, retrieval


def _data(seed):
    """25 scans of 1 to 3 reconstructions, some of them bit for bit the same; some reports and labels are shared."""
    rng = np.random.default_rng(seed)
    volumes, labels, rows, text_of_scan = [], [], [], {}
    for patient in range(25):
        own = rng.integers(0, 2, 3)
        base = rng.normal(size=6)
        for recon in range(1, 1 + rng.integers(1, 4)):
            volumes.append(f"test_{patient}_a_{recon}")
            labels.append(own)
            rows.append(base if recon == 2 else base + 0.4 * rng.normal(size=6))
        if patient % 6:
            text_of_scan[f"test_{patient}_a"] = f"report {patient // 2}"
    embeddings = normalize(torch.tensor(np.array(rows)), dim=1)
    texts = {t: rng.normal(size=6) for t in text_of_scan.values()}
    texts = normalize(torch.tensor(np.array([texts[t] for t in text_of_scan.values()])), dim=1)
    return embeddings, volumes, np.array(labels), text_of_scan, texts


def _naive(embeddings, volumes, labels, text_of_scan, texts):
    """{(metric, what is sought): value}, by loops over queries and gallery."""
    scans = [names.scan_of(v) for v in volumes]
    cosine = lambda a, b: float(a @ b)

    def ranked(query, gallery):
        """Indices of the gallery from the most similar down."""
        return sorted(gallery, key=lambda i: -cosine(query, embeddings[i]))

    out = {}
    everything = range(len(volumes))
    for k in (1, 5, 10, 50):
        hits = []
        for text, scan in zip(texts, text_of_scan, strict=True):
            hits.append(any(scans[i] == scan for i in ranked(text, everything)[:k]))
        if k <= len(volumes):
            out[f"recall_at_{k}", "report"] = np.mean(hits)

        words = list(dict.fromkeys(text_of_scan.values()))
        of_words = [texts[list(text_of_scan.values()).index(w)] for w in words]
        hits = []
        for i in everything:
            if scans[i] in text_of_scan:
                order = sorted(range(len(words)), key=lambda j: -cosine(embeddings[i], of_words[j]))
                hits.append(text_of_scan[scans[i]] in [words[j] for j in order[:k]])
        if k <= len(words):
            out[f"recall_at_{k}", "volume to one"] = np.mean(hits)

        hits = []
        for i in everything:
            others = [j for j in everything if j != i]
            if any(scans[j] == scans[i] for j in others):
                hits.append(any(scans[j] == scans[i] for j in ranked(embeddings[i], others)[:k]))
        if k <= len(volumes) - 1:
            out[f"recall_at_{k}", "volume to another"] = np.mean(hits)

        with_finding = [i for i in everything if labels[i].sum()]
        means = []
        for i in everything:
            values = []
            for j in ranked(embeddings[i], with_finding)[:k]:
                a, b = set(np.flatnonzero(labels[i])), set(np.flatnonzero(labels[j]))
                values.append(len(a & b) / len(a | b))
            means.append(np.mean(values))
        if k <= len(with_finding):
            out[f"ctclip_jaccard@{k}", "volume to"] = np.mean(means)

        one = [i for i in everything if scans.index(scans[i]) == i]
        precisions = []
        for i in one:
            others = [j for j in one if j != i]
            positives = [j for j in others if tuple(labels[j]) == tuple(labels[i])]
            total, found = 0, 0
            for place, j in enumerate(ranked(embeddings[i], others)[:k], 1):
                if j in positives:
                    found += 1
                    total += found / place
            if positives:
                precisions.append(total / min(len(positives), k))
        if k <= len(one) - 1:
            out[f"spectre_exact@{k}", "volume to"] = np.mean(precisions)
    return out


def _values(rows):
    kinds = ("report", "volume to one", "volume to another", "volume to")
    return {(r.what, next(k for k in kinds if r.subject.startswith(k))): r.value for r in rows}


@pytest.mark.parametrize("seed", range(4))
def test_all_kinds_are_naive_double_loops(seed):
    data = _data(seed)
    ours = _values(retrieval.evaluate_retrieval(*data, experiment="x", split="test"))
    naive = _naive(*data)
    assert ours.keys() == naive.keys()
    assert len(naive) > 12
    for key, value in naive.items():
        assert ours[key] == pytest.approx(value, abs=1e-12), key


def test_the_order_of_the_gallery_does_not_matter():
    embeddings, volumes, labels, text_of_scan, texts = _data(9)
    turn = np.random.default_rng(1).permutation(len(volumes))
    other = (embeddings[turn], [volumes[i] for i in turn], labels[turn], text_of_scan, texts)
    # Which reconstruction stands for a scan is the first: all have the same embedding here.
    first = [volumes.index(f"{names.scan_of(v)}_1") for v in volumes]
    alike = (embeddings[first], volumes, labels, text_of_scan, texts)
    alike_turned = (embeddings[first][turn], *other[1:])
    for a, b, drop in (((embeddings, *_data(9)[1:]), other, ("spectre",)), (alike, alike_turned, ())):
        want = _values(retrieval.evaluate_retrieval(*a, experiment="x", split="test"))
        got = _values(retrieval.evaluate_retrieval(*b, experiment="x", split="test"))
        for key, value in want.items():
            if not key[0].startswith(drop or "-"):
                assert got[key] == pytest.approx(value, abs=1e-12), key


def test_subjects_say_how_large_the_gallery_is_and_whether_it_holds_the_query():
    rows = retrieval.evaluate_retrieval(*_data(0), experiment="x", split="test")
    _, volumes, labels, *_ = _data(0)
    n, with_finding, scans = len(volumes), int(labels.any(1).sum()), 25
    subjects = {r.subject for r in rows}
    assert f"report to one of {n} volumes" in subjects
    assert f"volume to another of its scan among {n - 1} volumes, itself excluded" in subjects
    assert f"volume to {with_finding} volumes with a finding, itself included" in subjects
    assert f"volume to {scans - 1} others, one of each scan, itself excluded" in subjects
    of = {r.what: r.n for r in rows}
    assert of["ctclip_jaccard@5"] == n
    assert of["spectre_exact@5"] <= scans


def test_jaccard_of_a_k_does_not_depend_on_the_ks_before_it():
    """CT-CLIP's code never empties its list, so that its value at 5 holds that at 1."""
    embeddings, _, labels, *_ = _data(3)
    similarity = (embeddings @ embeddings.T).numpy()
    both = retrieval.ctclip_jaccard_at(similarity, labels, (1, 5))
    alone = retrieval.ctclip_jaccard_at(similarity, labels, (5,))
    assert both[5] == alone[5] != (both[1] + both[5]) / 2


def test_without_reports_and_without_other_reconstructions():
    embeddings, _, labels, *_ = _data(0)
    volumes = [f"tst{i}" for i in range(len(labels))]
    rows = retrieval.evaluate_retrieval(
        embeddings, volumes, labels, {}, torch.empty(0), experiment="x", split="test"
    )
    assert {r.what.partition("@")[0] for r in rows} == {"ctclip_jaccard", "spectre_exact"}
    # No two of the same labels, and none with a finding: no rows, and no warning of a mean of nothing.
    lone = retrieval.evaluate_retrieval(
        embeddings[:1],
        ["tst1"],
        np.zeros((1, 2), int),
        {"tst1": "a"},
        embeddings[:1],
        experiment="x",
        split="test",
    )
    assert [(r.what, r.value) for r in lone] == [("recall_at_1", 1.0), ("recall_at_1", 1.0)]
