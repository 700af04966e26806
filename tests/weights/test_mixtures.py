"""Adapters joined with models that see: one batch with a mixture per sample equals each sample by itself, through peft and through us."""

import threading

import peft
import pytest
import torch

from medvl.language import generate, vlm
from medvl.language.sampling import Sampling
from medvl.weights import compose, four_bit, lora
from tests import tiny

W = torch.tensor([[0.6, -0.3, 0.5], [0.2, 0.9, 0.0]])  # a row for each sample, one weight negative, one zero
COUNTS = (1, 2)  # images of each sample
RANKS = (4, 8, 16)


@pytest.fixture(scope="module", params=tiny.VLM)
def joined(request):
    """(kind, skeleton, params, peft model with three adapters on every linear layer, the same as a pool)."""
    kind = request.param
    skeleton, params = tiny.model(kind)
    module = tiny.peer(skeleton, params)
    model, adapters = None, []
    for j, r in enumerate(RANKS):
        config = peft.LoraConfig(r=r, lora_alpha=2 * r - 3, target_modules="all-linear")
        model = (
            peft.get_peft_model(module, config, f"a{j}")
            if model is None
            else (model.add_adapter(f"a{j}", config), model)[1]
        )
    gen = torch.Generator().manual_seed(3)
    for j in range(len(RANKS)):
        factors, scale = {}, {}
        for name, m in model.named_modules():
            if hasattr(m, "lora_A"):
                a, b = m.lora_A[f"a{j}"].weight, m.lora_B[f"a{j}"].weight
                with torch.no_grad():
                    a.copy_(torch.randn(a.shape, generator=gen) * 0.1)
                    b.copy_(torch.randn(b.shape, generator=gen) * 0.1)
                path = name.removeprefix("base_model.model.")
                factors[path], scale[path] = (
                    {"a": a.detach().clone(), "b": b.detach().clone()},
                    m.scaling[f"a{j}"],
                )
        adapters.append(
            lora.Adapter(factors=factors, scale=scale, kinds=dict.fromkeys(factors, "linear"), name=f"a{j}")
        )
    assert any("visual" in m or "vision_tower" in m for m in factors)
    assert any("merger" in m or "projector" in m for m in factors)
    return kind, skeleton, params, model, compose.stack_adapters(adapters)


def mixed(params, pool, ids, weights=W):
    return lora.apply_lora(params, compose.compose_adapters(pool, weights), rows=vlm.visual_rows(ids, 150))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixture_per_sample_is_pefts_cat_for_each(joined, side):
    kind, skeleton, params, model, pool = joined
    x = tiny.batch(kind, COUNTS, side)
    with torch.no_grad():
        got = skeleton(mixed(params, pool, x["input_ids"]), **x).logits
        bare = skeleton(params, **x).logits
        for b in range(2):
            model.add_weighted_adapter(
                ["a0", "a1", "a2"], W[b].tolist(), f"{side}{b}", combination_type="cat"
            )
            model.set_adapter(f"{side}{b}")
            want = model(**tiny.sample(kind, x, b, COUNTS)).logits[0]
            model.delete_adapter(f"{side}{b}")
            keep = x["attention_mask"][b].bool()
            torch.testing.assert_close(got[b][keep], want, rtol=0, atol=5e-6)
            assert (want - bare[b][keep]).abs().max() > 0.05


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_greedy_answers_of_a_batch_are_those_of_each_sample(joined, base):
    kind, skeleton, params, _, pool = joined
    params = four_bit.quantize(params) if base == "nf4" else params
    cfg = Sampling(max_tokens=8)
    x = tiny.batch(kind, COUNTS)
    together = generate.generate(cfg, skeleton, mixed(params, pool, x["input_ids"]), tiny.renamed(x))
    for b in range(2):
        one = tiny.sample(kind, x, b, COUNTS)
        alone = generate.generate(
            cfg, skeleton, mixed(params, pool, one["input_ids"], W[b : b + 1]), tiny.renamed(one)
        )
        assert together.ids[b] == alone.ids[0]
    bare = generate.generate(cfg, skeleton, params, tiny.renamed(x))
    assert bare.ids != together.ids


def test_a_text_only_row_and_two_threads(joined):
    kind, skeleton, params, _, pool = joined
    x = tiny.batch(kind, (0, 2))
    weights = [W, W.flip(0)]
    with torch.no_grad():
        want = [skeleton(mixed(params, pool, x["input_ids"], w), **x).logits for w in weights]
        alone = tiny.sample(kind, x, 0, (0, 2))
        row = skeleton(mixed(params, pool, alone["input_ids"], W[:1]), **alone).logits[0]
    torch.testing.assert_close(want[0][0][x["attention_mask"][0].bool()], row, rtol=0, atol=5e-6)
    assert (want[0] - want[1]).abs().max() > 0.05
    wrong: list[float] = []

    def work(i):
        with torch.no_grad():
            for _ in range(4):
                wrong.append(
                    float(
                        (skeleton(mixed(params, pool, x["input_ids"], weights[i]), **x).logits - want[i])
                        .abs()
                        .max()
                    )
                )

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == [0.0] * 8


def test_weights_for_another_batch_are_refused(joined):
    kind, skeleton, params, _, pool = joined
    x = tiny.batch(kind, COUNTS)
    mix, rows = compose.compose_adapters(pool, W), vlm.visual_rows(x["input_ids"], 150)
    with pytest.raises(ValueError, match=r"weights for 3 samples meet \d+ rows"), torch.no_grad():
        skeleton(mixed(params, pool, x["input_ids"], W[[0, 1, 1]]), **x)
    with (
        pytest.raises(
            ValueError, match=r"rows do not belong to 5 visual tokens; rows must be of the ids of this batch"
        ),
        torch.no_grad(),
    ):
        skeleton(lora.apply_lora(params, mix, rows=rows[:5]), **x)
    with pytest.raises(ValueError, match="sees images and its weights differ by sample"):
        lora.apply_lora(params, mix)
