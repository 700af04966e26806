"""sampling: transformers' processors of logits are the peer, frequencies for draws."""

import pytest
import torch

from medvl.language import sampling
from medvl.language.generate import generate
from medvl.language.sampling import Sampling, allow_in_phases, allow_only
from tests import tiny


def test_a_repetition_penalty_equals_the_processor():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    used = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (1.05, 0.8, 2.0):
        want = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(
            sampling.penalise_repetition(Sampling(repetition_penalty=penalty), logits, used), want
        )
    assert sampling.penalise_repetition(Sampling(), logits, used) is logits


WAYS = [{"temperature": 0.7}, {"temperature": 1.3, "top_k": 12}, {"temperature": 1.0, "top_p": 0.6}]
WAYS += [
    {"temperature": 2.0, "top_k": 30, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 999},
]


def probabilities(cfg, logits):
    """What a token is drawn from, [b, v]."""
    share, ids = sampling._shortlist(cfg, logits)
    return share if ids is None else torch.zeros_like(logits).scatter(1, ids, share)


@pytest.mark.parametrize("way", WAYS)
def test_probabilities_are_those_of_transformers(way, gen):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 160, generator=gen) * 2
    steps = [TemperatureLogitsWarper(way["temperature"])]
    steps += [TopKLogitsWarper(way["top_k"])] if "top_k" in way else []
    steps += [TopPLogitsWarper(way["top_p"])] if "top_p" in way else []
    want = LogitsProcessorList(steps)(torch.zeros(5, 1, dtype=torch.int64), logits.clone()).softmax(-1)
    torch.testing.assert_close(probabilities(Sampling(**way), logits), want)


@pytest.mark.parametrize("way", WAYS[:4])
def test_tokens_are_drawn_from_them(way):
    """4000 rows draw their first token: frequencies are within 4.5 standard deviations, and their sum of squares is what chance makes."""
    skeleton, params = tiny.model("qwen2")
    n, prompt = 4000, torch.tensor([[5, 9, 17]])
    cfg = Sampling(max_tokens=1, seed=3, **way)
    logits = skeleton(params, prompt).logits[:, -1].detach() * 1.0
    p = probabilities(cfg, logits)[0].double()
    got = generate(cfg, skeleton, params, {"ids": prompt.expand(n, -1)}).ids
    seen = torch.bincount(torch.tensor(got).flatten(), minlength=160).double()
    assert seen[p == 0].sum() == 0
    kept = p > 0
    z = (seen - n * p)[kept] / (n * p * (1 - p)).sqrt()[kept]
    assert z.abs().max() < 4.5
    free = int(kept.sum()) - 1
    chi = ((seen - n * p)[kept] ** 2 / (n * p)[kept]).sum()
    assert abs(chi - free) < 5 * (2 * free) ** 0.5


def test_the_ends_of_a_draw_are_tokens_that_may_come(gen):
    scores = torch.randn(2, 160, generator=gen).index_fill(1, torch.tensor([0, 1, 158, 159]), -torch.inf)
    draw = torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64)
    assert sampling.choose_tokens(Sampling(temperature=1.0), scores, draw).tolist() == [2, 157]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"max_tokens": 0},
            r"max_tokens >= 1 \(nothing is generated without a limit\) .*, got max_tokens 0, min_tokens 0",
        ),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens <= max_tokens, got max_tokens 4, min_tokens 5"),
        ({"temperature": -0.1}, "temperature >= 0"),
        ({"temperature": float("nan")}, "temperature >= 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "0 < top_p <= 1, got 1.0, 0, 0.0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k >= 0"),
        ({"top_k": 5}, "top_k 5 and top_p 1.0 choose nothing at temperature 0"),
        ({"stop": ("",)}, "stop must be strings that are not empty"),
        ({"stop": "###"}, "stop must be strings"),
        ({"end": (-1,)}, "end ids >= 0"),
        ({"repetition_penalty": 0.0}, r"need a finite repetition_penalty > 0 \(1 changes nothing\), got 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ],
)
def test_sampling_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_constructors_refuse():
    with pytest.raises(ValueError, match=r"allow_only: needs ids >= 0, got \[\]"):
        allow_only([])
    with pytest.raises(ValueError, match=r"allow_only: needs ids >= 0, got \[-1\]"):
        allow_only([-1])
    for parts in ((), ((0, allow_only([1])),)):
        with pytest.raises(ValueError, match="allow_in_phases: needs parts of at least one step"):
            allow_in_phases(*parts)
