"""likelihood: the log-probabilities of whole texts are the naive formula."""

import functools
import warnings

import pytest
import torch

from medvl.hub import skeletons
from medvl.language import vlm
from medvl.language.likelihood import score_options
from medvl.weights import lazy
from tests import tiny

COUNTS = (1, 2)
model = functools.cache(tiny.model)


OPTIONS = [
    [[33], [34, 35, 36], [40, 41, 42, 43, 44, 45, 46, 47]],
    [[50, 51], [60], [61, 62]],
    [[70, 71, 72], [80, 81]],
]


# Layers that keep a state, which every token overwrites.
STATES = {
    "lfm2": {
        "model_type": "lfm2",
        **tiny.TEXT,
        "layer_types": ["conv", "full_attention"],
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text",
        **tiny.TEXT,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "gpt2", "qwen2_5_vl", "internvl", *STATES])
@pytest.mark.parametrize("side", ["left", "right"])
def test_options_score_as_in_whole_texts(kind, side, monkeypatch):
    monkeypatch.setattr(tiny, "CONFIGS", tiny.CONFIGS | STATES)
    skeleton, params = model(kind)
    counts = (1, 2, 0)
    inputs = tiny.batch(kind, counts, side)
    total, mean = score_options(skeleton, params, tiny.renamed(inputs), OPTIONS)
    for i, row in enumerate(OPTIONS):
        for k, option in enumerate(row):
            one = tiny.renamed(tiny.sample(kind, inputs, i, counts))
            one.pop("mm_token_type_ids", None)
            n = one["ids"].shape[1]
            ids = torch.cat([one["ids"], torch.tensor([option])], 1)
            with torch.no_grad():
                logits = skeleton(
                    params, **vlm.model_inputs(skeleton, {**one, "ids": ids, "mask": torch.ones_like(ids)})
                ).logits
            want = logits[0, n - 1 : -1].log_softmax(-1).gather(1, torch.tensor(option)[:, None]).sum()
            torch.testing.assert_close(total[i, k], want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mean[i, k], want / len(option), rtol=1e-5, atol=1e-5)
    assert total[2, 2] == mean[2, 2] == -torch.inf
    assert total.isfinite().sum() == 8


def test_letters_score_as_the_next_token():
    skeleton, params = model("qwen2")
    batch = tiny.renamed(tiny.batch("qwen2"))
    total, mean = score_options(skeleton, params, batch, [[[t] for t in (33, 34, 35)]] * 2)
    with torch.no_grad():
        logits = skeleton(params, **vlm.model_inputs(skeleton, batch)).logits[:, -1]
    torch.testing.assert_close(total, logits.log_softmax(-1)[:, 33:36])
    assert torch.equal(total, mean)


def test_options_with_weights_per_sample(gen):
    skeleton, params = model("qwen2")
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = torch.randn(2, 32, generator=gen), torch.randn(48, 2, generator=gen)
    gate = torch.tensor([[1.0, 0], [0, 2]])
    inputs = tiny.batch("qwen2")
    got, _ = score_options(
        skeleton,
        params | {name: lazy.low_rank(params[name], a, b, gate=gate)},
        tiny.renamed(inputs),
        OPTIONS[:2],
    )
    for i in range(2):
        mine = params | {name: params[name] + (b * gate[i]) @ a}
        one, _ = score_options(
            skeleton, mine, tiny.renamed(tiny.sample("qwen2", inputs, i, COUNTS)), OPTIONS[i : i + 1]
        )
        torch.testing.assert_close(got[i], one[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OPTIONS, r"each of 2 rows needs options of at least one token"),
        ([[[1], []], [[2]]], "needs options of at least one token"),
        ([[], [[2]]], "needs options of at least one token"),
        ([[[1]], [[160]]], "ids must be from 0 to 159, got 1 to 160"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    skeleton, params = model("qwen2")
    with pytest.raises(ValueError, match=message):
        score_options(skeleton, params, tiny.renamed(tiny.batch("qwen2")), options)


def test_options_need_a_cache():
    skeleton, params = model("qwen2")
    again = skeletons.checkpointed(skeleton)
    with pytest.raises(ValueError, match="qwen2 is checkpointed, its layers would leave the cache empty"):
        score_options(again, params, tiny.renamed(tiny.batch("qwen2")), OPTIONS[:2])


def test_options_use_no_name_that_goes_away():
    skeleton, params = model("qwen3")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        score_options(skeleton, params, tiny.renamed(tiny.batch("qwen3", COUNTS)), [[[5, 6], [7]]] * 2)
