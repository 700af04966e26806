"""skeletons: pure calls, the same in threads, and starting weights by a generator."""

import copy
import gc
import json
import threading
import weakref

import pytest
import torch

from medvl.hub import loading, skeletons
from medvl.weights import four_bit
from medvl.weights import lazy as weights
from tests import tiny
from tests.hub.pieces import TINY, in_threads, inputs_of


def test_an_empty_skeleton_costs_nothing():
    skeleton = skeletons.empty_skeleton(
        {"model_type": "qwen2_5_vl"}, head="language"
    )  # transformers' default has 76 billion parameters
    assert sum(p.numel() for p in skeleton.module.parameters()) > 7e10


PUBLISHED = {
    "qwen2-1.5b_config": 1_543_714_304,
    "qwen2.5-7b-instruct_config": 7_615_616_512,
    "qwen3-8b_config": 8_190_735_360,
    "qwen2.5-vl-7b_config": 8_292_166_656,
    "phi-4_config": 14_659_507_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_configs_have_their_published_size(shared_data, name):
    skeleton = skeletons.empty_skeleton(
        json.loads((shared_data / f"configs/{name}.json").read_text()), head="language"
    )
    params = {
        n: torch.empty(p.shape, dtype=torch.bfloat16, device="meta")
        for n, p in skeleton.module.named_parameters()
    }
    assert sum(p.numel() for p in params.values()) == PUBLISHED[name]
    assert weights.nbytes(params) == 2 * PUBLISHED[name]
    four = four_bit.quantize(params)
    quantised = {n: w for n, w in four.items() if isinstance(w, four_bit.FourBit)}
    values = sum(w.numel() for w in quantised.values())
    assert 8 * weights.nbytes(quantised) / values == pytest.approx(4.127, abs=0.002)
    if name.startswith("qwen2.5-vl"):
        assert weights.nbytes(four) == pytest.approx(
            6.90e9, rel=0.001
        )  # tower, table and head stay in bfloat16


def test_init_is_a_function_of_the_generator():
    seeded = [skeletons.init_skeleton(TINY["dinov2"], torch.Generator().manual_seed(s))[1] for s in (0, 0, 1)]
    assert (
        skeletons.weights_digest(seeded[0])
        == skeletons.weights_digest(seeded[1])
        != skeletons.weights_digest(seeded[2])
    )
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    skeletons.init_skeleton(TINY["dinov2"], torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), want)


def test_building_a_model_leaves_the_generators_of_gpus_alone(monkeypatch):
    """`torch.manual_seed` seeds every GPU, and no fork of the CPU's generator puts those back."""
    for name in ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: pytest.fail(f"torch.cuda.{name}"))
    skeletons.init_skeleton(TINY["dinov2"], torch.Generator().manual_seed(0))
    skeletons.empty_skeleton(TINY["dinov2"])
    with pytest.raises(pytest.fail.Exception):
        torch.manual_seed(0)


def test_init_follows_transformers_initialisation(gen):
    _, params = skeletons.init_skeleton(TINY["dinov2"], gen)
    assert torch.equal(params["layernorm.weight"], torch.ones(64))
    weights = torch.cat([t.flatten() for n, t in params.items() if t.dim() == 2 and n.endswith(".weight")])
    assert weights.std() == pytest.approx(0.02, rel=0.05)


def test_a_stored_config_builds_the_same_skeleton(folders, gen):
    skeleton, params = loading.load_skeleton(folders["registers"])
    again, random = skeletons.init_skeleton(skeleton.config, gen)
    assert {n: t.shape for n, t in random.items()} == {n: t.shape for n, t in params.items()}
    assert again.config == skeleton.config | {
        "_name_or_path": again.config["_name_or_path"],
        "dtype": again.config["dtype"],
    }


def test_calls_are_pure_and_carry_gradients(folders):
    skeleton, params = loading.load_skeleton(folders["dinov2"])
    x, before = inputs_of("dinov2"), skeletons.weights_digest(params)
    with torch.no_grad():
        first = skeleton(params, x).last_hidden_state
        other = skeleton({n: t * 0.5 for n, t in params.items()}, x).last_hidden_state
        assert not torch.allclose(first, other)
        assert torch.equal(skeleton(params, x).last_hidden_state, first)
    assert skeletons.weights_digest(params) == before
    leaf = params["layernorm.bias"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        skeleton(params | {"layernorm.bias": leaf}, x).last_hidden_state.sum(), leaf
    )
    torch.testing.assert_close(grad, torch.full((64,), 2.0 * 17))
    assert all(p.is_meta and not p.requires_grad for p in skeleton.module.parameters())


@pytest.mark.parametrize("copied", [False, True])
def test_threads_share_a_skeleton_and_are_exact(folders, copied):
    skeleton, params = loading.load_skeleton(folders["dinov3"])
    x = inputs_of("dinov3")
    variants = [{n: t * s for n, t in params.items()} for s in (1.0, 0.9, 0.8, 0.7)]
    with torch.no_grad():
        want = [skeleton(v, x).last_hidden_state for v in variants]

    def work(i):
        mine = copy.deepcopy(skeleton) if copied else skeleton
        with torch.no_grad():
            return [torch.equal(mine(variants[i], x).last_hidden_state, want[i]) for _ in range(40)]

    assert in_threads(work) == [[True] * 40] * 4
    assert all(p.is_meta for p in skeleton.module.parameters())


def test_threads_share_a_checkpointed_skeleton_and_take_their_own_gradients(folders):
    plain, params = loading.load_skeleton(folders["dinov2"])
    skeleton, x = skeletons.checkpointed(plain), inputs_of("dinov2")
    variants = [{n: t * s for n, t in params.items()} for s in (1.0, 0.9, 0.8, 0.7)]

    def gradient(of, i):
        leaves = {
            n: t.clone().requires_grad_() for n, t in variants[i].items() if n != "embeddings.mask_token"
        }
        loss = of(variants[i] | leaves, x).last_hidden_state.square().sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    want = [gradient(plain, i) for i in range(4)]
    for i, runs in enumerate(in_threads(lambda i: [gradient(skeleton, i) for _ in range(10)])):
        for found in runs:
            for a, b in zip(found, want[i], strict=True):
                torch.testing.assert_close(a, b)


def test_threads_that_end_leave_no_copy_behind(folders):
    skeleton, params = loading.load_skeleton(folders["vit"])
    copies = []

    def work():
        skeleton(params, inputs_of("vit"))
        copies.append(weakref.ref(skeleton._copy()))

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    gc.collect()
    assert [c() for c in copies] == [None] * 3


def test_models_built_in_threads_are_those_built_alone():
    before = torch.nn.Module.register_parameter
    build = lambda i: skeletons.init_skeleton(
        tiny.CONFIGS["qwen2"], torch.Generator().manual_seed(i), head="language"
    )[1]
    alone = [build(i) for i in range(4)]
    for _ in range(3):
        together = in_threads(build, 4)
        for a, b in zip(alone, together, strict=True):
            assert all(torch.equal(a[n], b[n]) for n in a)
    assert torch.nn.Module.register_parameter is before
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_calls_refuse_other_names_and_inner_checkpointing(folders):
    skeleton, params = loading.load_skeleton(folders["dinov2"])
    x = inputs_of("dinov2")
    with pytest.raises(
        ValueError, match=r"must be exactly its .* missing layernorm.bias, unknown layernorm.bais"
    ):
        skeleton({n.replace("layernorm.bias", "layernorm.bais"): t for n, t in params.items()}, x)
    turn_on = "activation_checkpointing_enable"  # transformers 5.17 has it under its older name only
    getattr(
        skeleton.module, turn_on if hasattr(skeleton.module, turn_on) else "gradient_checkpointing_enable"
    )()
    with pytest.raises(ValueError, match=r"use checkpointed\(skeleton\)"):
        skeleton(params, x)


def test_digest_is_of_content():
    a = {"x": torch.arange(6.0), "y": torch.zeros(2, dtype=torch.bfloat16)}
    same = {"y": a["y"].clone(), "x": torch.arange(12.0)[::2] / 2}
    assert skeletons.weights_digest(a) == skeletons.weights_digest(same)
    others = [
        a | {"x": torch.arange(6.0).view(2, 3)},
        a | {"x": torch.arange(6)},
        a | {"x": torch.arange(6.0) + torch.eye(6)[5] * 1e-6},
        {"z": a["x"], "y": a["y"]},
        {"x": a["x"]},
    ]
    assert len({skeletons.weights_digest(t) for t in [a, *others]}) == 6
    assert skeletons.weights_digest({"a": {"b": torch.tensor(1)}}) != skeletons.weights_digest(
        {"a": {"b": torch.tensor(2)}}
    )
