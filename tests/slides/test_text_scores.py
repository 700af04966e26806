"""BLEU and ROUGE-L against sacrebleu and rouge-score, on real written answers.

The two packages bring twelve others along and take seconds to import, so they are peers of the tests only.
"""

import json
import random
import re

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from medvl.slides.bench import bleu, rouge_l


def _words(text):
    """The words of ASCII texts, as `bleu` takes them."""
    return re.findall(r"[a-z0-9]+", text.lower())


class _Words:
    def tokenize(self, text):
        return _words(text)


def _check(answers, references):
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    peers = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    assert rouge_l(answers, references) == pytest.approx(peers, abs=1e-12)
    plain = [" ".join(_words(text)) for text in answers], [[" ".join(_words(text)) for text in references]]
    peer = lambda k: BLEU(max_ngram_order=k, tokenize="none", smooth_method="none", force=True)
    peers = [peer(k).corpus_score(*plain).score / 100 for k in (1, 2, 3, 4)]
    assert bleu(answers, references) == pytest.approx(peers, abs=1e-12)


def test_reports_of_slides(shared_data):
    """Each report against that of another slide, and against itself with words left out."""
    records = json.loads((shared_data / "pathology/wsi_bench/1_Report_test.json").read_text())
    reports = [r["conversations"][1]["value"] for r in records]
    reports = [r.encode("ascii", "ignore").decode() for r in reports][:60]
    _check(reports[1:] + reports[:1], reports)
    draw = random.Random(0)
    thinned = [" ".join(w for w in r.split() if draw.random() < 0.8) for r in reports]
    _check(thinned, reports)


def test_short_answers(shared_data):
    records = json.loads((shared_data / "medvqa/vqa_rad/vqa_rad_share.json").read_text())
    answers = [str(r["answer"]).encode("ascii", "ignore").decode() for r in records]
    _check(answers[1:] + answers[:1], answers)
