"""compose: peft's add_weighted_adapter is the peer; the dense sum of w s B A is the naive formula, also where peft departs from it."""

import copy
import gc
import math
from functools import cache

import pytest
import torch
from attrs import evolve
from torch import nn

from medvl.weights.compose import compose_adapters, fusion_error, select_adapters, stack_adapters
from medvl.weights.lora import Adapter, apply_lora
from tests import tiny

peft = pytest.importorskip("peft")
from peft.utils import merge_utils  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out", "ignore:The density")
W3 = [0.5, -0.3, 0.9]
KINDS = {"embed": "embedding", "up": "linear", "conv": "conv1d", "out": "linear"}
SIZES = {"embed": (16, 23), "up": (20, 16), "conv": (18, 20), "out": (7, 18)}  # out, in
IDS = torch.randint(23, (4, 5), generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.conv, self.out = (
            nn.Embedding(23, 16),
            nn.Linear(16, 20),
            Conv1D(18, 20),
            nn.Linear(18, 7),
        )

    def forward(self, ids):
        return self.out(torch.tanh(self.conv(torch.tanh(self.up(self.embed(ids))))))


@cache
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


@torch.no_grad()
def logits(adapter, ids=IDS):
    return torch.func.functional_call(net(), apply_lora(dict(net().named_parameters()), adapter), (ids,))


def make(
    ranks=(4, 4, 4), alphas=(8, 2, 4), modules=None, seed=0, sizes=SIZES, kinds=KINDS, dtype=torch.float32
):
    """Adapters x, y, z... with random factors; `modules[j]` are those of adapter j."""
    gen, made = torch.Generator().manual_seed(seed), []
    for j, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        own = modules[j] if modules else list(sizes)
        factors = {
            m: {
                "a": torch.randn(r, sizes[m][1], generator=gen) / 4,
                "b": torch.randn(sizes[m][0], r, generator=gen) / 4,
            }
            for m in own
        }
        factors = {m: {k: t.to(dtype) for k, t in f.items()} for m, f in factors.items()}
        made.append(
            Adapter(
                factors=factors,
                scale=dict.fromkeys(own, alpha / r),
                kinds={m: kinds[m] for m in own},
                name="xyzuvw"[j],
            )
        )
    return made


def in_peft(base, adapters, **config):
    """A peft model that holds these adapters under the same names."""
    model = None
    for a in adapters:
        m = next(iter(a.factors))
        r, alpha = a.rank(m), a.scale[m] * (math.sqrt(a.rank(m)) if config.get("use_rslora") else a.rank(m))
        cfg = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=list(a.factors), **config)
        if model is None:
            model = peft.get_peft_model(copy.deepcopy(base), cfg, adapter_name=a.name).eval()
        else:
            model.add_adapter(a.name, cfg)
        for m, f in a.factors.items():
            layer = model.base_model.model.get_submodule(m)
            if a.kinds[m] == "embedding":
                held = layer.lora_embedding_A[a.name], layer.lora_embedding_B[a.name]
            else:
                held = layer.lora_A[a.name].weight, layer.lora_B[a.name].weight
            held[0].data, held[1].data = f["a"].clone(), f["b"].clone()
    return model


def peer_delta(model, m, name="sum"):
    d = model.base_model.model.get_submodule(m).get_delta_weight(name).detach()
    return d if KINDS.get(m, "linear") == "linear" else d.T


def delta(adapter, m):
    f, gate = adapter.factors[m], adapter.gate.get(m, torch.ones(()))
    return adapter.scale[m] * (f["b"].double() * gate.double()) @ f["a"].double()


def exact(adapters, weights, m):
    """sum_j w_j s_j B_j A_j as a dense matrix [out, in]."""
    has = [(w * a.scale[m], a.factors[m]) for w, a in zip(weights, adapters, strict=True) if m in a.factors]
    return sum(c * f["b"].double() @ f["a"].double() for c, f in has)


def distance(got, adapters, weights, m):
    want = exact(adapters, weights, m)
    return float((delta(got, m) - want).norm() / want.norm())


def assert_equals_peft(adapters, weights, rule, rank=None, density=None, sign="total"):
    model = in_peft(net(), adapters)
    names = [a.name for a in adapters]
    model.add_weighted_adapter(
        names, weights, "sum", rule, svd_rank=rank, density=density, majority_sign_method=sign
    )
    model.set_adapter("sum")
    got = compose_adapters(
        adapters, weights, mode="fusion", rule=rule, rank=rank, density=density, majority_sign=sign
    )
    assert got.gate == {}
    for m in got.factors:
        torch.testing.assert_close(delta(got, m).float(), peer_delta(model, m), rtol=0, atol=1e-5)
    with torch.no_grad():
        want, base = model(IDS), net()(IDS)
    torch.testing.assert_close(logits(got), want, rtol=0, atol=1e-5)
    assert (want - base).abs().max() > 0.01


# Fusions against peft -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], W3, [0.0, 1.0, -2.0]])
@pytest.mark.parametrize("rule", ["cat", "linear", "svd"])
def test_cat_linear_and_svd_equal_peft(rule, weights):
    assert_equals_peft(make(), weights, rule)


@pytest.mark.parametrize(
    ("density", "sign"), [(0.5, "total"), (0.3, "frequency"), (1.0, "frequency"), (0.11, "total")]
)
@pytest.mark.parametrize("rule", ["ties", "ties_svd"])
def test_ties_equals_peft(rule, density, sign):
    assert_equals_peft(make(), W3, rule, density=density, sign=sign)


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("rule", ["magnitude_prune", "magnitude_prune_svd"])
def test_magnitude_prune_equals_peft(rule, density):
    assert_equals_peft(make(), W3, rule, density=density)


@pytest.mark.parametrize(
    ("rule", "options"),
    [("svd", {}), ("ties_svd", {"density": 0.5}), ("magnitude_prune_svd", {"density": 0.5})],
)
@pytest.mark.parametrize("rank", [None, 1, 5, 7])
def test_svd_of_mixed_ranks_equals_peft_at_any_rank(rule, options, rank):
    assert_equals_peft(make((2, 4, 6)), W3, rule, rank=rank, **options)


@pytest.mark.parametrize("rule", ["cat", "svd"])
def test_cat_and_svd_of_different_modules_equal_peft(rule):
    assert_equals_peft(make((2, 4, 6), modules=[["up", "out"], ["embed", "up"], ["conv"]]), W3, rule)


@pytest.mark.parametrize("rule", ["linear", "ties", "magnitude_prune"])
def test_rules_act_on_the_adapters_that_have_the_module(rule):
    adapters = make(modules=[["up", "out"], ["embed", "up"], ["conv", "up"]])
    assert_equals_peft(adapters, W3, rule, density=None if rule == "linear" else 0.5)


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_equals_pefts_functions_at_the_same_seed(rule):
    """peft's whole call draws while it makes the new layers, so its functions are the peer."""
    adapters, kwargs = make(), {"majority_sign_method": "frequency"} if "ties" in rule else {}
    theirs = getattr(merge_utils, rule.removesuffix("_svd"))
    sign = {"majority_sign": "frequency"} if kwargs else {}
    gen = torch.Generator().manual_seed(7)
    got = compose_adapters(
        adapters,
        W3,
        mode="fusion",
        rule=rule,
        density=0.6,
        gen=gen,
        rank=64 if "svd" in rule else None,
        **sign,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for m in SIZES:
            c = torch.tensor([w * a.scale[m] for w, a in zip(W3, adapters, strict=True)])
            if "svd" in rule:
                full = [a.factors[m]["b"] @ a.factors[m]["a"] * a.scale[m] for a in adapters]
                want = theirs(full, torch.tensor(W3), 0.6, **kwargs)
            else:
                a, b = ([x.factors[m][k] for x in adapters] for k in "ab")
                left, right = (
                    theirs(a, c.abs().sqrt() * c.sign(), 0.6, **kwargs),
                    theirs(b, c.abs().sqrt(), 0.6, **kwargs),
                )
                want = right @ left
            torch.testing.assert_close(delta(got, m).float(), want, rtol=0, atol=1e-5)


def test_average_is_loraretrievers_fusion():
    """(sum_j w_j B_j)(sum_j w_j A_j) at one scale."""
    adapters = make(alphas=(6, 6, 6))
    got = compose_adapters(adapters, W3, mode="fusion", rule="average")
    for m in SIZES:
        b, a = (sum(w * x.factors[m][k] for w, x in zip(W3, adapters, strict=True)) for k in "ba")
        torch.testing.assert_close(delta(got, m).float(), 1.5 * b @ a, rtol=0, atol=1e-6)
    scaled = make(alphas=(6, 12, 3))  # of different scales: each adapter's own product keeps w^2 s
    alone = compose_adapters(scaled, [0.0, 0.5, 0.0], mode="fusion", rule="average")
    torch.testing.assert_close(delta(alone, "up"), 0.25 * exact(scaled, [0, 1, 0], "up"), rtol=0, atol=1e-6)


# Fusions where peft is off: the dense formula -------------------------------------------------------------------------------------------
def test_rslora_sources_are_not_scaled_twice():
    adapters = make((4, 4, 4))
    model = in_peft(net(), adapters, use_rslora=True)
    model.add_weighted_adapter(list("xyz"), W3, "sum", "cat")
    for rule in ("cat", "svd"):
        got = compose_adapters(adapters, W3, mode="fusion", rule=rule, rank=12 if rule == "svd" else None)
        for m in SIZES:
            torch.testing.assert_close(delta(got, m), exact(adapters, W3, m), rtol=0, atol=1e-6)
            torch.testing.assert_close(
                delta(got, m).float() * math.sqrt(12), peer_delta(model, m), rtol=0, atol=1e-4
            )  # what peft does


def test_a_rank_above_what_there_is_gives_all_there_is():
    """peft fails where the rank is above the width of a layer."""
    adapters = make((2, 4, 6))
    for rule, density in {"svd": None, "ties_svd": 1.0}.items():
        got = compose_adapters(adapters, W3, mode="fusion", rule=rule, rank=64, density=density)
        assert {m: got.rank(m) for m in SIZES} == {
            m: min(*s, *([12] if rule == "svd" else [])) for m, s in SIZES.items()
        }
        assert (max(fusion_error(adapters, W3, got).values()) < 1e-6) == (rule == "svd")


def test_ranks_that_differ_by_module():
    """rank_pattern: each module has its own rank, and so has the result."""
    one, two = make((2, 3), alphas=(2, 6)), make((5, 4), alphas=(1, 2), seed=3)
    adapters = [
        evolve(p, factors=p.factors | {"up": q.factors["up"]}, scale=p.scale | {"up": q.scale["up"]})
        for p, q in zip(one, two, strict=True)
    ]
    got = compose_adapters(adapters, [0.5, -2.0], mode="fusion")
    assert {m: got.rank(m) for m in SIZES} == {"embed": 5, "up": 9, "conv": 5, "out": 5}
    assert all(distance(got, adapters, [0.5, -2.0], m) < 1e-6 for m in SIZES)


def test_scales_that_differ_by_module():
    """alpha_pattern: layers of equal ranks do not share a gate then."""
    adapters = [evolve(a, scale=a.scale | {"conv": 3.0 * (i + 1)}) for i, a in enumerate(make())]
    for mode in ("mixture", "fusion"):
        got = compose_adapters(adapters, W3, mode=mode)
        assert all(distance(got, adapters, W3, m) < 1e-6 for m in SIZES)


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune", "linear", "svd", "ties_svd"])
def test_one_adapter_by_any_rule_is_itself_when_nothing_is_pruned(rule):
    adapters = make((4,), (8,))
    got = compose_adapters(
        adapters, [-0.7], mode="fusion", rule=rule, density=None if rule in ("linear", "svd") else 1.0
    )
    assert all(distance(got, adapters, [-0.7], m) < 1e-5 for m in SIZES)


def test_one_adapter_is_pruned_when_that_is_asked():
    x = make((4,), (8,))[0]
    got = compose_adapters([x], [1.0], mode="fusion", rule="magnitude_prune", density=0.25)
    assert [int((got.factors["up"][k] != 0).sum()) for k in "ab"] == [16, 20]


# The error of a fusion ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "options"),
    [("cat", {}), ("svd", {"rank": 3}), ("linear", {}), ("average", {}), ("ties", {"density": 0.5})],
)
def test_error_is_the_dense_one(rule, options):
    adapters = make(modules=[["up", "out"], ["embed", "up", "out"], ["conv", "up", "out"]])
    pool = stack_adapters(adapters)
    got = compose_adapters(pool, W3, mode="fusion", rule=rule, **options)
    error = fusion_error(pool, W3, got)
    assert error.keys() == SIZES.keys()
    for m, e in error.items():
        assert e == pytest.approx(distance(got, adapters, W3, m), rel=1e-9, abs=1e-12)
    assert (max(error.values()) < 1e-6) == (rule == "cat")


def test_error_of_svd_says_the_energy_kept():
    adapters = make((4, 8, 2))
    got = compose_adapters(adapters, W3, mode="fusion", rule="svd", rank=5)
    for m, e in fusion_error(adapters, W3, got).items():
        energy = torch.linalg.svdvals(exact(adapters, W3, m)).square()
        assert 1 - e**2 == pytest.approx(float(energy[:5].sum() / energy.sum()), abs=1e-6)
        assert 0.3 < 1 - e**2 < 0.999


def test_error_of_mixtures_of_missing_modules_and_of_nothing():
    adapters = make()
    mixed = compose_adapters(adapters, W3)
    assert max(fusion_error(adapters, W3, mixed).values()) < 1e-6
    part = evolve(mixed, factors={m: f for m, f in mixed.factors.items() if m != "up"})
    assert fusion_error(adapters, W3, part)["up"] == 1
    assert fusion_error(adapters, [0, 0, 0], compose_adapters(adapters, [0, 0, 0]))["up"] == 0
    assert fusion_error(adapters, [0, 0, 0], mixed)["up"] == math.inf


# Mixtures -------------------------------------------------------------------------------------------------------------------------------
QWEN = {
    f"model.layers.{i}.{m}": s
    for i in (0, 1)
    for m, s in {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}.items()
}
SOME = [[*QWEN], [*QWEN][:3], [*QWEN][1:]]


@torch.no_grad()
def test_mixture_per_sample_is_pefts_cat_per_sample():
    adapters = make((4, 8, 16), (8, 8, 4), modules=SOME, sizes=QWEN, kinds=dict.fromkeys(QWEN, "linear"))
    skeleton, params = tiny.model("qwen3")
    ids = torch.randint(3, 140, (2, 9), generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([[0.5, -0.4, 0.9], [0.0, 1.0, 0.3]])
    mixed = compose_adapters(adapters, weights)
    assert mixed.gate[[*QWEN][1]].shape == (2, 28)
    assert mixed.gate[[*QWEN][3]].shape == (2, 20)  # y leaves the last one alone
    run = lambda adapter, ids: skeleton(apply_lora(params, adapter), input_ids=ids, use_cache=False).logits
    got, base = run(mixed, ids), skeleton(params, input_ids=ids, use_cache=False).logits
    model = in_peft(tiny.peer(skeleton, params), adapters)
    for i in (0, 1):
        model.add_weighted_adapter(list("xyz"), weights[i].tolist(), f"sum{i}", "cat")
        model.set_adapter(f"sum{i}")
        want = model(input_ids=ids[i : i + 1], use_cache=False).logits[0]
        torch.testing.assert_close(got[i], want, rtol=0, atol=1e-5)
        assert (want - base[i]).abs().max() > 0.05
    other = run(
        compose_adapters(adapters, torch.stack([weights[0], -weights[1]])), ids
    )  # rows know nothing of each other
    torch.testing.assert_close(other[0], got[0], rtol=0, atol=1e-6)
    assert (other[1] - got[1]).abs().max() > 0.05
    fused = compose_adapters(adapters, weights[1], mode="fusion", rule="svd", rank=28)
    torch.testing.assert_close(run(fused, ids[1:])[0], got[1], rtol=0, atol=1e-5)


def test_mixture_of_every_kind_of_layer_per_sample():
    adapters = make((2, 4, 6), modules=[["up", "out"], ["embed", "up"], ["out", "embed"]])
    weights = [[0.5, -0.3, 0.9], [0, 0, 0], [1, 2, 3], [-1, 0, 0]]
    got = logits(compose_adapters(adapters, weights))
    for i, row in enumerate(weights):
        one = compose_adapters(adapters, row)
        assert all(
            distance(one, adapters, row, m) < 1e-6
            for m in one.factors
            if any(row) and exact(adapters, row, m).norm() > 0
        )
        torch.testing.assert_close(got[i : i + 1], logits(one, IDS[i : i + 1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(got[1], net()(IDS[1]).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        got[3],
        logits(evolve(adapters[0], scale={m: -s for m, s in adapters[0].scale.items()}))[3],
        rtol=0,
        atol=1e-6,
    )


def test_some_of_a_pool_are_a_pool_of_these():
    adapters = make((2, 4, 6), modules=[["up", "out"], ["embed", "up"], ["out"]])
    pool = stack_adapters(adapters)
    for chosen in ([2, 0], [1], [0, 1, 2], [2]):
        some, want = select_adapters(pool, chosen), stack_adapters([adapters[j] for j in chosen])
        assert some.names == want.names
        assert some.factors.keys() == want.factors.keys()
        w = [0.5, -2.0, 1.5][: len(chosen)]
        torch.testing.assert_close(
            logits(compose_adapters(some, [w] * 4)),
            logits(compose_adapters(want, [w] * 4)),
            rtol=0,
            atol=1e-6,
        )
        assert max(fusion_error(some, w, compose_adapters(some, w, mode="fusion")).values()) < 1e-6
    for wrong in ([], [0, 0], [3], [-1]):
        with pytest.raises(
            ValueError, match=r"select_adapters: choose some of the 3 adapters 0..2, each once"
        ):
            select_adapters(pool, wrong)


def test_a_layer_that_flattens_its_batch_refuses_weights_per_sample():
    """GPT-2's Conv1D: which row is whose could only be guessed."""
    with pytest.raises(
        ValueError, match=r"weights for 4 samples meet 20 rows; this layer flattens its batch"
    ):
        logits(compose_adapters(make(), [W3] * 4))
    torch.testing.assert_close(
        logits(compose_adapters(make(), [W3])), logits(compose_adapters(make(), W3)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "as_",
    [
        list,
        tuple,
        torch.tensor,
        lambda w: torch.tensor(w, dtype=torch.float64),
        lambda w: [torch.tensor(x) for x in w],
    ],
)
def test_weights_of_any_type(as_):
    adapters = make()
    got, want = compose_adapters(adapters, as_(W3)), compose_adapters(stack_adapters(adapters), W3)
    assert got.gate["up"].dtype == torch.float32
    torch.testing.assert_close(got.gate["up"], want.gate["up"], rtol=0, atol=1e-7)
    assert torch.equal(
        compose_adapters(adapters, torch.tensor([1, 0, -2])).gate["up"],
        compose_adapters(adapters, (1.0, 0, -2)).gate["up"],
    )


def test_one_adapter_and_fusion_by_cat_of_samples_are_mixtures():
    adapters = make()
    torch.testing.assert_close(
        logits(compose_adapters(adapters[:1], [1.0])), logits(adapters[0]), rtol=0, atol=1e-6
    )
    rows, adapters = [W3, [1.0, 0, 0], [0, 0, 0], [0, 2.0, 1]], make(modules=[["embed", "up", "out"]] * 3)
    torch.testing.assert_close(
        logits(compose_adapters(adapters, rows, mode="fusion")),
        logits(compose_adapters(adapters, rows)),
        rtol=0,
        atol=0,
    )


def test_the_gradient_reaches_the_weights():
    adapters, w = make(), torch.tensor(W3, requires_grad=True)
    mixed = compose_adapters(adapters, w)
    torch.func.functional_call(
        net(), apply_lora(dict(net().named_parameters()), mixed), (IDS,)
    ).sum().backward()
    h = 1e-2
    sums = [logits(compose_adapters(adapters, [W3[0], W3[1] + d, W3[2]])).double().sum() for d in (h, -h)]
    assert float(w.grad[1]) == pytest.approx(float(sums[0] - sums[1]) / (2 * h), rel=1e-2)


def test_a_mixture_can_be_composed_again():
    adapters = make((2, 4, 6))
    inner = compose_adapters(adapters[:2], [0.5, -2.0])
    got = compose_adapters([inner, adapters[2]], [3.0, 1.0])
    assert all(distance(got, adapters, [1.5, -6.0, 1.0], m) < 1e-6 for m in SIZES)


@pytest.mark.parametrize("rule", ["cat", "svd", "linear", "magnitude_prune_svd"])
def test_half_precision_factors_stay_so(rule):
    adapters = make(dtype=torch.bfloat16)
    got = compose_adapters(
        adapters,
        W3,
        mode="fusion",
        rule=rule,
        density=1.0 if "prune" in rule else None,
        rank=12 if "svd" in rule else None,
    )
    assert {t.dtype for f in got.factors.values() for t in f.values()} == {torch.bfloat16}
    assert rule == "linear" or max(fusion_error(adapters, W3, got).values()) < 0.01
    assert (
        max(fusion_error(adapters, W3, compose_adapters(adapters, W3)).values()) < 1e-6
    )  # gates are float32


# What is refused ------------------------------------------------------------------------------------------------------------------------
def routed(a):
    return evolve(
        a, factors={m: f | {"router": torch.zeros(2, f["a"].shape[1])} for m, f in a.factors.items()}
    )


SPECIAL = {
    "router per token": routed,
    "whole tensors that it replaces": lambda a: evolve(a, full={"out.bias": torch.zeros(7)}),
    "weights that differ by sample": lambda a: compose_adapters([a], [[1.0], [2.0]]),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_what_is_no_plain_correction_is_used_alone(what):
    adapters = make()
    adapters[1] = evolve(SPECIAL[what](adapters[1]), name="chest")
    with pytest.raises(ValueError, match=f"'chest' has .*{what}.*only used alone"):
        stack_adapters(adapters)
    assert compose_adapters(adapters[1:2], [1.0]) is adapters[1]
    assert compose_adapters(stack_adapters(adapters[1:2]), torch.ones(3, 1)) is adapters[1]
    with pytest.raises(ValueError, match=f"'chest' has .*{what}.*with weight 1, got"):
        compose_adapters(adapters[1:2], [0.5])
    with pytest.raises(ValueError, match=f"{what}.*rule 'svd'"):
        compose_adapters(adapters[1:2], [1.0], mode="fusion", rule="svd")
    with pytest.raises(ValueError, match=f"fusion_error: .* must be a plain adapter, it has .*{what}"):
        fusion_error(adapters[:1], [1.0], adapters[1])


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0, 2.0], {}, r"weights must be \[3\] or \[b, 3\] for x, y, z, got \[2\]"),
        ([[1.0, 2.0]], {}, r"got \[1, 2\]"),
        (torch.ones(2, 2, 3), {}, r"got \[2, 2, 3\]"),
        (torch.ones(0, 3), {}, r"got \[0, 3\]"),
        (1.0, {}, r"got \[\]"),
        ([1.0, float("nan"), 0], {}, "must be finite, got .*nan"),
        (torch.tensor([[1, 0, 0], [1, torch.inf, 0]]), {}, "must be finite"),
        (["a", "b", "c"], {}, "weights must be numbers"),
        ([[1.0], [1.0, 2.0]], {}, "weights must be numbers"),
        (W3, {"mode": "sum"}, "mode mixture or fusion"),
        (W3, {"rule": "cats", "mode": "fusion"}, "rule one of cat, linear.*got 'fusion', 'cats'"),
        (W3, {"rule": "ties", "mode": "fusion", "majority_sign": "mean"}, "majority_sign total or frequency"),
        (W3, {"rule": "svd"}, "a mixture is exact and has no rule, got 'svd'; set mode='fusion'"),
        (
            [W3],
            {"rule": "svd", "mode": "fusion"},
            r"'svd' makes one set of factors, of weights \[3\], got \[1, 3\]",
        ),
        (W3, {"rank": 4}, "rank .* belongs to svd rules, got 4 for rule 'cat'"),
        (W3, {"rule": "svd", "mode": "fusion", "rank": 0}, "rank must be at least 1"),
        (W3, {"rule": "ties", "mode": "fusion"}, r"'ties' needs density in \(0, 1\], .* got None"),
        (W3, {"rule": "ties", "mode": "fusion", "density": 1.5}, "got 1.5"),
        (W3, {"rule": "dare_ties", "mode": "fusion", "density": 0.0}, "got 0.0"),
        (
            W3,
            {"rule": "linear", "mode": "fusion", "density": 0.5},
            "'linear' keeps all values and has no density",
        ),
        (W3, {"rule": "dare_linear", "mode": "fusion", "density": 0.5}, "draws at random: give gen"),
        (W3, {"gen": torch.Generator()}, "'cat' draws nothing"),
        (W3, {"rule": "svd", "mode": "fusion", "majority_sign": "frequency"}, "'svd' elects no sign"),
    ],
)
def test_errors_of_weights_and_options(weights, options, message):
    with pytest.raises(ValueError, match=f"compose_adapters: .*{message}"):
        compose_adapters(make(), weights, **options)


def test_errors_of_adapters():
    with pytest.raises(ValueError, match="stack_adapters: adapters must be a list of at least one, got"):
        compose_adapters([], [])
    with pytest.raises(ValueError, match="must be a list"):
        stack_adapters(make()[0])
    one, two = make()[0], evolve(make(sizes=SIZES | {"up": (20, 17)})[1], name="brain")
    with pytest.raises(
        ValueError,
        match=r"up is linear 16 -> 20 on cpu for 'x' and linear 17 -> 20 on cpu for 'brain'; .* same base model",
    ):
        stack_adapters([one, two])
    with pytest.raises(ValueError, match="conv is conv1d 20 -> 18 on cpu for 'x' and linear"):
        stack_adapters([one, evolve(make()[1], kinds=KINDS | {"conv": "linear"})])
    with pytest.raises(
        ValueError, match=r"'x', up: A must be \[r, in\] and B \[out, r\], got \[4, 16\] and \[20, 3\]"
    ):
        stack_adapters([evolve(one, factors={"up": {"a": torch.zeros(4, 16), "b": torch.zeros(20, 3)}})])
    for rule in ("linear", "average", "ties", "dare_ties"):
        pruned = {"density": 0.5} if rule in ("ties", "dare_ties") else {}
        gen = torch.Generator() if "dare" in rule else None
        with pytest.raises(
            ValueError, match=f"'{rule}' needs equal ranks, embed has 'x' 2, 'y' 4; 'cat' and 'svd' take any"
        ):
            compose_adapters(make((2, 4), (1, 1)), [1.0, 1.0], mode="fusion", rule=rule, gen=gen, **pruned)


def test_errors_of_fusion_error():
    adapters = make()
    with pytest.raises(ValueError, match=r"fusion_error: weights must be one vector \[3\], got \[2, 3\]"):
        fusion_error(adapters, [W3, W3], adapters[0])
    alien = make((4,), (4,), sizes=SIZES | {"down": (3, 3)}, kinds=KINDS | {"down": "linear"})[0]
    with pytest.raises(ValueError, match="adapts down, which none of x, y, z does"):
        fusion_error(adapters, W3, alien)


# Properties -----------------------------------------------------------------------------------------------------------------------------
def test_order_does_not_matter_and_weights_scale_linearly():
    adapters = make((2, 4, 6))
    want = logits(compose_adapters(adapters, W3))
    turned = [2, 0, 1]
    for mode in ("mixture", "fusion"):
        got = compose_adapters([adapters[i] for i in turned], [W3[i] for i in turned], mode=mode)
        torch.testing.assert_close(logits(got), want, rtol=0, atol=1e-6)
    for rule in ("cat", "svd"):
        one, three = (
            compose_adapters(adapters, [c * w for w in W3], mode="fusion", rule=rule) for c in (1, -3)
        )
        for m in SIZES:
            torch.testing.assert_close(delta(three, m), -3 * delta(one, m), rtol=0, atol=1e-5)


def test_linear_has_the_cross_terms_it_is_documented_with():
    x, y = make((4, 4), (4, 4))
    got = compose_adapters([x, y], [1.0, -1.0], mode="fusion", rule="linear")
    (a, b), (c, d) = ((f["a"], f["b"]) for f in (x.factors["up"], y.factors["up"]))
    torch.testing.assert_close(delta(got, "up").float(), (b + d) @ (a - c), rtol=0, atol=1e-6)
    assert fusion_error([x, y], [1.0, -1.0], got)["up"] > 0.5


def test_dare_is_a_function_of_its_generator():
    run = lambda seed: compose_adapters(
        make(), W3, mode="fusion", rule="dare_linear", density=0.5, gen=torch.Generator().manual_seed(seed)
    ).factors["up"]["a"]
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_composing_500_times_leaves_nothing_behind():
    adapters = make((4, 8, 16))
    pool = stack_adapters(adapters)
    before = {(m, k): t.clone() for m, f in pool.factors.items() for k, t in f.items()}
    alive = lambda: sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    rows = torch.randn(500, 2, 3, generator=torch.Generator().manual_seed(0))
    counts = []
    for i in range(500):
        mixed = compose_adapters(pool, rows[i])
        assert all(
            mixed.factors[m][k] is t for m, f in pool.factors.items() for k, t in f.items()
        )  # nothing is copied
        assert len({id(g) for g in mixed.gate.values()}) == 1  # layers that look alike share a gate
        if i in (1, 499):
            gc.collect()
            counts.append(alive())
        if i % 100 == 0:
            compose_adapters(pool, rows[i, 0], mode="fusion", rule="svd")
            mixed.factors["up"]["a"] = torch.zeros(1)  # of the result, not of the pool
            mixed.kinds.clear()
    assert counts[0] == counts[1]
    assert pool.kinds == KINDS
    assert all(torch.equal(before[m, k], t) for m, f in pool.factors.items() for k, t in f.items())
    del adapters
    torch.testing.assert_close(
        compose_adapters(pool, rows[0]).gate["up"], compose_adapters(make((4, 8, 16)), rows[0]).gate["up"]
    )
