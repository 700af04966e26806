"""hub: transformers itself is the peer; checkpoints are tiny, random and in the real formats."""

import ast
import copy
import gc
import json
import os
import threading
import warnings
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import medvl
from medvl.hub import checkpoints, dinov2, loading, saving, skeletons
from medvl.hub.dinov2 import dinov2_config
from medvl.weights import four_bit
from medvl.weights import lazy as weights
from tests import tiny

VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 99,
}
TINY = {
    "dinov2": {"model_type": "dinov2", **VISION},
    "giant": {"model_type": "dinov2", **VISION, "use_swiglu_ffn": True},
    "registers": {"model_type": "dinov2_with_registers", **VISION, "num_register_tokens": 4},
    "dinov3": {"model_type": "dinov3_vit", **VISION, "intermediate_size": 96, "num_register_tokens": 4},
    "vit": {"model_type": "vit", **VISION, "intermediate_size": 96},
    "clip_vision": {"model_type": "clip_vision_model", **VISION, "intermediate_size": 96},
    "clip_text": {"model_type": "clip_text_model", **TEXT, "bos_token_id": 1, "eos_token_id": 2},
    "bert": {"model_type": "bert", **TEXT},
}


def model_of(kind):
    """transformers' own module with every parameter random (its initialisation leaves many at 0 or 1)."""
    from transformers import AutoConfig, AutoModel

    config = dict(TINY[kind])
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder that transformers wrote}."""
    where = tmp_path_factory.mktemp("models")
    for kind in TINY:
        model_of(kind).save_pretrained(where / kind)
    return {kind: where / kind for kind in TINY}


def inputs_of(kind, px=32):
    gen = torch.Generator().manual_seed(1)
    return (
        torch.randint(5, 90, (2, 9), generator=gen)
        if kind in ("clip_text", "bert")
        else torch.randn(2, 3, px, px, generator=gen)
    )


@pytest.mark.parametrize("kind", TINY)
def test_equals_transformers_on_one_checkpoint(folders, kind):
    from transformers import AutoModel

    peer = AutoModel.from_pretrained(folders[kind]).eval()
    skeleton, params = loading.load_skeleton(folders[kind])
    assert all(p.is_meta for p in skeleton.module.parameters())
    sizes = (
        (32, 48) if kind in ("dinov2", "giant", "registers", "dinov3") else (32,)
    )  # 48: positions are interpolated
    for px in sizes:
        x = inputs_of(kind, px)
        with torch.no_grad():
            torch.testing.assert_close(
                skeleton(params, x).last_hidden_state,
                peer(x).last_hidden_state,
                rtol=0,
                atol=1e-5,
                msg=f"{kind} at {px} px",
            )


@pytest.mark.parametrize("kind", TINY)
def test_save_writes_the_checkpoint_that_was_loaded(folders, kind, tmp_path):
    skeleton, params = loading.load_skeleton(folders[kind])
    saving.save_skeleton(skeleton, params, tmp_path / "out")
    before, after = (
        load_file(folders[kind] / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    before = {k: t for k, t in before.items() if "pooler" not in k}  # the plain encoder has none
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [
        type(skeleton.module).__name__
    ]


def test_a_shared_weight_stays_shared(tmp_path, gen):
    config = {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 16,
        "num_heads": 2,
        "num_layers": 1,
        "d_ff": 32,
        "vocab_size": 50,
    }
    skeleton, params = skeletons.init_skeleton(config, gen)
    saving.save_skeleton(skeleton, params, tmp_path / "t5")
    skeleton, loaded = loading.load_skeleton(tmp_path / "t5")
    assert loaded.keys() == params.keys()
    assert not any("embed_tokens" in n for n in loaded)
    ids = {"input_ids": torch.tensor([[3, 4]]), "decoder_input_ids": torch.tensor([[5]])}
    zero = loaded | {"shared.weight": torch.zeros_like(loaded["shared.weight"])}
    assert skeleton(loaded, **ids).encoder_last_hidden_state.abs().max() > 0
    assert skeleton(zero, **ids).encoder_last_hidden_state.abs().max() == 0


def test_a_classifier_checkpoint_gives_its_encoder(tmp_path):
    from transformers import AutoConfig, AutoModelForImageClassification

    for kind in ("dinov2", "vit"):
        config = dict(TINY[kind])
        model = AutoModelForImageClassification.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        ).eval()
        model.save_pretrained(tmp_path / kind)
        assert any(k.startswith(f"{kind}.") for k in load_file(tmp_path / kind / "model.safetensors"))
        skeleton, params = loading.load_skeleton(tmp_path / kind)
        x = inputs_of(kind)
        with torch.no_grad():
            assert torch.equal(
                skeleton(params, x).last_hidden_state, getattr(model, kind)(x).last_hidden_state
            )


def test_one_tower_of_clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    text, vision = (
        {k: v for k, v in TINY[f"clip_{t}"].items() if k != "model_type"} for t in ("text", "vision")
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path / "clip")
    for part, x in (("text", inputs_of("clip_text")), ("vision", inputs_of("clip_vision"))):
        skeleton, params = loading.load_skeleton(tmp_path / "clip", part=part)
        with torch.no_grad():
            want = getattr(model, f"{part}_model")(x).pooler_output
            torch.testing.assert_close(skeleton(params, x).pooler_output, want, rtol=0, atol=1e-5)
    saving.save_skeleton(skeleton, params, tmp_path / "vision")
    with pytest.raises(ValueError, match="has no text tower"):
        loading.load_skeleton(tmp_path / "vision", part="text")


def test_shards_and_plain_pickles_are_the_same_weights(folders, tmp_path):
    model, want = model_of("dinov2"), skeletons.weights_digest(loading.load_skeleton(folders["dinov2"])[1])
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert skeletons.weights_digest(loading.load_skeleton(tmp_path / "shards")[1]) == want
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text((folders["dinov2"] / "config.json").read_text())
    torch.save(load_file(folders["dinov2"] / "model.safetensors"), tmp_path / "bin/pytorch_model.bin")
    assert skeletons.weights_digest(loading.load_skeleton(tmp_path / "bin")[1]) == want


def test_loads_in_the_wanted_dtype(folders):
    skeleton, params = loading.load_skeleton(folders["dinov3"], dtype=torch.bfloat16)
    _, whole = loading.load_skeleton(folders["dinov3"])
    assert all(torch.equal(params[n], whole[n].bfloat16()) for n in whole)
    assert skeleton.module.get_buffer("rope_embeddings.inv_freq").dtype == torch.float32
    assert skeleton(params, inputs_of("dinov3").bfloat16()).last_hidden_state.dtype == torch.bfloat16


def test_reads_the_hub_cache(folders, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--tiny/refs").mkdir()
    (tmp_path / "models--someone--tiny/refs/main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        os.link(folders["dinov2"] / name, snapshot / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    skeleton, params = loading.load_skeleton("someone/tiny")
    assert skeleton.name == "someone/tiny"
    assert skeletons.weights_digest(params) == skeletons.weights_digest(
        loading.load_skeleton(folders["dinov2"])[1]
    )


def test_what_is_nowhere_stops_at_once(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", never)
    with pytest.raises(
        ValueError,
        match=rf"someone/nothing is no folder.*{tmp_path}/cache.*HF_HUB_OFFLINE.*hf download someone/nothing",
    ):
        loading.load_skeleton("someone/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"127.0.0.1:9 cannot be reached .*refused.*hf download someone/nothing"
    ):
        loading.load_skeleton("someone/nothing")
    with pytest.raises(ValueError, match="no file or folder /no/such/folder"):
        loading.load_skeleton("/no/such/folder")
    with pytest.raises(ValueError, match=r"must hold config.json, found none"):
        loading.load_skeleton(tmp_path)


def break_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_json(folder):
    (folder / "config.json").write_text('{"model_type": "dinov2"')


def break_model_type(folder):
    (folder / "config.json").write_text(
        '{"model_type": "cxr-bert", "auto_map": {"AutoModel": "modeling.Own"}}'
    )


def break_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 64', '"hidden_size": "64"'))


def break_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"layernorm.weight": "model-00001-of-00002.safetensors"}}'
    )


def break_with(change):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return damage


BROKEN = [
    (break_truncated, "model.safetensors is broken or cut off"),
    (break_json, "config.json is not JSON"),
    (break_model_type, "found 'cxr-bert'; it needs code of its own, which is never run"),
    (break_config, "not a dinov2.*'hidden_size' expected int"),
    (break_shard, "model-00001-of-00002.safetensors is missing"),
    (lambda f: (f / "model.safetensors").unlink(), "must hold model.safetensors or .* found config.json"),
    (break_with(lambda s: s.pop("layernorm.weight")), "missing layernorm.weight"),
    (break_with(lambda s: s.update(foo=torch.zeros(2))), "unexpected foo"),
    (
        break_with(lambda s: s.update({"layernorm.bias": torch.zeros(3)})),
        r"of another shape layernorm.bias \[3\] instead of \[64\]",
    ),
    (
        break_with(lambda s: s.update({"layernorm.bias": torch.zeros(64).char()})),
        r"found layernorm.bias \(int8\); other quantised files are not read",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[m[:24] for _, m in BROKEN])
def test_broken_checkpoints_say_what_is_wrong(folders, tmp_path, damage, message):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["dinov2"] / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        loading.load_skeleton(tmp_path)


def test_all_faults_are_one_error_and_unused_keys_are_none(folders):
    config, state = (
        json.loads((folders["dinov2"] / "config.json").read_text()),
        load_file(folders["dinov2"] / "model.safetensors"),
    )
    del state["embeddings.mask_token"]
    _, params = loading.bind_weights(
        config, state | {"classifier.weight": torch.zeros(2, 64), "pooler.dense.bias": torch.zeros(64)}
    )
    assert torch.equal(params["embeddings.mask_token"], torch.zeros(1, 64))
    state = {k: t for k, t in state.items() if k != "layernorm.weight"} | {
        "foo": torch.zeros(2),
        "layernorm.bias": torch.zeros(3),
    }
    with pytest.raises(
        ValueError, match=r"missing layernorm.weight; unexpected foo; of another shape layernorm.bias"
    ):
        loading.bind_weights(config, state)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/nonexistent/bomb",)


def test_a_pickle_is_never_run(tmp_path):
    torch.save({"a": Bomb()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        loading.load_skeleton(tmp_path / "x.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="one flat dict of tensors"):
        loading.load_skeleton(tmp_path / "x.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"must be an original DINOv2 checkpoint .* found a"):
        loading.load_skeleton(tmp_path / "x.pth")


# Language models ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_language_models_equal_transformers_on_one_checkpoint(kind, tmp_path):
    skeleton, params = tiny.model(kind)
    tiny.peer(skeleton, params).save_pretrained(tmp_path / "theirs")
    skeleton, loaded = loading.load_skeleton(tmp_path / "theirs", head="language")
    x = tiny.batch(kind)
    with torch.no_grad():
        assert torch.equal(skeleton(loaded, **x).logits, tiny.peer(skeleton, params)(**x).logits)
    assert all(p.is_meta for p in skeleton.module.parameters())
    saving.save_skeleton(skeleton, loaded, tmp_path / "ours", shard_gb=4e-5)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if kind in tiny.VLM else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(again.eval()(**x).logits, skeleton(loaded, **x).logits)
    before, after = (
        {k for f in (tmp_path / d).glob("*.safetensors") for k in load_file(f)} for d in ("theirs", "ours")
    )
    assert before == after


def test_layouts_of_before_transformers_5_are_mapped(tmp_path):
    """Qwen2-VL before 4.52 (visual.*, model.*) and the in-memory names of today (model.visual.*, model.language_model.*) are one model."""
    for kind in ("qwen2_vl", "qwen2_5_vl"):
        skeleton, params = tiny.model(kind)
        old = {
            n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
            for n, t in params.items()
        }
        for state in (old, params):
            _, loaded = loading.bind_weights(skeleton.config, state, head="language")
            assert skeletons.weights_digest(loaded) == skeletons.weights_digest(params)
    skeleton, params = tiny.model("internvl")
    old = {
        "language_model." + n.removeprefix("model.language_model."): t
        for n, t in params.items()
        if "model.language_model" in n
    }
    old = {n.replace("language_model.", "language_model.model.", 1): t for n, t in old.items()}
    old |= {
        n.removeprefix("model."): t
        for n, t in params.items()
        if "model.language_model" not in n and n != "lm_head.weight"
    }
    _, loaded = loading.bind_weights(
        skeleton.config, old | {"language_model.lm_head.weight": params["lm_head.weight"]}, head="language"
    )
    assert skeletons.weights_digest(loaded) == skeletons.weights_digest(params)


def test_a_tied_head_under_either_name():
    skeleton, params = tiny.model("qwen3")
    assert "lm_head.weight" not in params
    both = params | {"lm_head.weight": params["model.embed_tokens.weight"].clone()}
    for state in (both, {n: t for n, t in both.items() if n != "model.embed_tokens.weight"}):
        assert skeletons.weights_digest(
            loading.bind_weights(skeleton.config, state, head="language")[1]
        ) == skeletons.weights_digest(params)
    with pytest.raises(
        ValueError,
        match=r"lm_head.weight and model.embed_tokens.weight are one weight by its config, but differ",
    ):
        loading.bind_weights(
            skeleton.config, both | {"lm_head.weight": torch.zeros(160, 32)}, head="language"
        )


def test_a_headless_decoder_and_a_head_that_is_missing():
    skeleton, params = tiny.model("qwen2")
    _, bare = loading.bind_weights(skeleton.config, params)
    assert bare.keys() == {n.removeprefix("model.") for n in params} - {"lm_head.weight"}
    with pytest.raises(ValueError, match=r"missing lm_head.weight"):
        loading.bind_weights(
            skeleton.config, {n: t for n, t in params.items() if n != "lm_head.weight"}, head="language"
        )
    with pytest.raises(ValueError, match=r"must be a language model that transformers has .* found 'dinov2'"):
        skeletons.init_skeleton(TINY["dinov2"], torch.Generator(), head="language")


def test_weights_are_read_one_at_a_time_after_all_are_known_to_fit(tmp_path, monkeypatch):
    skeleton, params = tiny.model("qwen2")
    saving.save_skeleton(skeleton, params, tmp_path / "m", shard_gb=4e-5)
    seen: list[str] = []
    loading.load_skeleton(tmp_path / "m", head="language", transform=lambda n, t: (seen.append(n), t)[1])
    assert sorted(seen) == sorted(params)
    shard = sorted((tmp_path / "m").glob("model-*.safetensors"))[-1]
    state = load_file(shard)
    state[sorted(state)[-1]] = torch.zeros(1)
    save_file(state, shard)
    seen.clear()
    with pytest.raises(ValueError, match="of another shape"):
        loading.load_skeleton(tmp_path / "m", head="language", transform=lambda n, t: (seen.append(n), t)[1])
    assert seen == []


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


def test_adapted_weights_are_not_saved_unmerged(tmp_path):
    skeleton, params = tiny.model("qwen3")
    name = "model.layers.0.mlp.up_proj.weight"
    lazy = weights.low_rank(params[name], torch.ones(2, 32), torch.ones(48, 2))
    with pytest.raises(ValueError, match=f"save: adapters are on {name}; merge them"):
        saving.save_skeleton(skeleton, params | {name: lazy}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Skeletons ------------------------------------------------------------------------------------------------------------------------------
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


def test_init_follows_transformers_initialisation(gen):
    _, params = skeletons.init_skeleton(TINY["dinov2"], gen)
    assert torch.equal(params["layernorm.weight"], torch.ones(64))
    weights = torch.cat([t.flatten() for n, t in params.items() if t.dim() == 2 and n.endswith(".weight")])
    assert weights.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 96}, "a dinov2 config has no hiden_size; it has .*hidden_size"),
        ({"hidden_size": "96"}, "'hidden_size' expected int"),
        ({"model_type": "dinov9"}, "found 'dinov9'"),
    ],
)
def test_init_refuses_typos(gen, change, message):
    with pytest.raises(ValueError, match=message):
        skeletons.init_skeleton(TINY["dinov2"] | change, gen)


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


def in_threads(work, n=4):
    """What `work(i)` returns in each of n threads that start together."""
    ready = threading.Barrier(n)

    def start(i):
        ready.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))


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


def test_loading_leaves_modules_that_other_threads_build_alone(folders):
    stop, wrong, built = threading.Event(), [], []

    def build():
        while not stop.is_set():
            parts = list(torch.nn.Linear(3, 3).parameters())
            built.append(len(parts))
            wrong.extend(p for p in parts if p.is_meta or not p.requires_grad)

    thread = threading.Thread(target=build)
    thread.start()
    try:
        loaded = in_threads(lambda i: [loading.load_skeleton(folders["dinov2"])[0] for _ in range(4)], 2)
    finally:
        stop.set()
        thread.join()
    assert built
    assert not wrong
    assert all(
        p.is_meta for skeletons in loaded for skeleton in skeletons for p in skeleton.module.parameters()
    )


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


def sharded(folders, tmp_path, weight_map):
    """A model folder with an index of two shards, and its weight_map as `weight_map` makes it."""
    folder = tmp_path / "models/vit"
    skeleton, params = loading.load_skeleton(folders["vit"])
    saving.save_skeleton(skeleton, params, folder, shard_gb=1e-4)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    assert len({*raw["weight_map"].values()}) > 1
    index.write_text(json.dumps(raw | {"weight_map": weight_map(folder, raw["weight_map"])}))
    return folder


def outside(folder, weights_):
    """One of the shards lies beside the folder; it is a good file."""
    shard = next(iter(weights_.values()))
    (folder / shard).rename(folder.parent / shard)
    return {n: f"../{s}" if s == shard else s for n, s in weights_.items()}


def absolute(folder, weights_):
    return {n: str(folder.resolve() / s) for n, s in weights_.items()}


BAD_INDEX = [
    (outside, r"weight_map must name .safetensors files in the folder of the index, found \"../model-0000"),
    (absolute, r"weight_map must name .safetensors files in the folder of the index, found \"/"),
    (lambda folder, w: list(w), r"weight_map must be {weight: file}, found \["),
    (lambda folder, w: {}, r"weight_map must be {weight: file}, found {}"),
    (lambda folder, w: None, r"weight_map must be {weight: file}, found null"),
    (lambda folder, w: dict.fromkeys(w, 7), r"weight_map must name .safetensors files .*, found 7 for"),
    (
        lambda folder, w: {n: ["model-00001-of-00002.safetensors"] for n in w},
        r"weight_map must name .safetensors files",
    ),
    (
        lambda folder, w: dict.fromkeys(w, "config.json"),
        r'weight_map must name .safetensors files .*, found "config.json"',
    ),
]


@pytest.mark.parametrize(("weight_map", "message"), BAD_INDEX)
def test_an_index_names_files_beside_it(folders, tmp_path, weight_map, message):
    folder = sharded(folders, tmp_path, weight_map)
    with pytest.raises(ValueError, match=message):
        loading.load_skeleton(folder)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint16, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
def test_weights_of_other_dtypes_are_refused_by_name(folders, tmp_path, dtype):
    skeleton, params = loading.load_skeleton(folders["vit"])
    saving.save_skeleton(skeleton, params, tmp_path / "vit")
    path = tmp_path / "vit/model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    save_file(state | {name: state[name].to(dtype)}, path)
    with pytest.raises(ValueError, match=rf"weights must be float16, .*found {name} \({str(dtype)[6:]}\)"):
        loading.load_skeleton(tmp_path / "vit")
    entry = checkpoints.open_weights(path, str(tmp_path / "vit"))[name]
    assert torch.equal(entry.read(), state[name].to(dtype))


@pytest.mark.parametrize(
    "name",
    [
        "./nosuch",
        "../nosuch",
        ".",
        "/nosuch/at/all",
        "a/b/c",
        "my--model",
        "a..b",
        "org/model.git",
        "~/model",
    ],
)
def test_a_path_that_is_not_there_is_no_hub_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"hub: (there is no file or folder|the folder \. must hold)") as e:
        loading.load_skeleton(name)
    assert "epo id" not in str(e.value)


def test_an_unknown_part_or_head_is_refused(folders):
    for call in (
        lambda: loading.load_skeleton(folders["bert"], head="languge"),
        lambda: loading.bind_weights(TINY["bert"], {}, head="vision"),
        lambda: skeletons.empty_skeleton(TINY["bert"], head="Language"),
        lambda: skeletons.init_skeleton(TINY["bert"], torch.Generator(), head="text"),
    ):
        with pytest.raises(ValueError, match=r"head must be '' .* or 'language', got"):
            call()
    with pytest.raises(ValueError, match="part must be '', 'text' or 'vision', got 'visoin'"):
        loading.load_skeleton(folders["bert"], part="visoin")


@pytest.mark.parametrize("change", [{"text_config": [1]}, {"text_config": "bert"}, {"text_config": None}])
def test_a_tower_that_is_no_config_is_refused(folders, tmp_path, change):
    skeleton, params = loading.load_skeleton(folders["bert"])
    saving.save_skeleton(skeleton, params, tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="has no text tower"):
        loading.load_skeleton(tmp_path / "m", part="text")
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        loading.load_skeleton(tmp_path / "m")


def resized_as_the_hub(embedding, side):
    """The original code: a scale factor with an offset of 0.1, bicubic without antialiasing; a square of `side` patches."""
    old = int((embedding.shape[1] - 1) ** 0.5)
    grid = embedding[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    new = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([embedding[:, :1], new.permute(0, 2, 3, 1).reshape(1, side * side, -1)], 1)


@pytest.mark.parametrize(
    ("kind", "image", "says"),
    [("dinov2", 518, True), ("dinov2", 28, False), ("dinov2_with_registers", 518, False)],
)
def test_position_embeddings_that_are_not_the_hub_s_are_said_at_load(tmp_path, kind, image, says):
    config = {"model_type": kind, **VISION, "image_size": image, "patch_size": 14, "num_hidden_layers": 1}
    skeleton, params = skeletons.init_skeleton(config, torch.Generator().manual_seed(0))
    saving.save_skeleton(skeleton, params, tmp_path / "m")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        loading.load_skeleton(tmp_path / "m")
    assert [w for w in heard if "offset of 0.1" in str(w.message)] != [] if says else not heard
    if says:  # the difference is there, and it is that of the position embedding alone
        own = skeletons.empty_skeleton(config | {"image_size": 224})
        x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        name = "embeddings.position_embeddings"
        params = params | {
            name: torch.randn(params[name].shape, generator=torch.Generator().manual_seed(2)) * 0.02
        }
        with torch.no_grad():
            theirs = own(params | {name: resized_as_the_hub(params[name], 16)}, x).last_hidden_state
            ours = skeleton(params, x).last_hidden_state
        assert 1e-3 < (theirs - ours).abs().max() < 1


IMPOSSIBLE = [
    ("qwen2", "hidden_size", -1, r"hidden_size must be from 1 to \d+, got -1"),
    ("qwen2", "vocab_size", 0, r"vocab_size must be from 1 to \d+, got 0"),
    ("qwen2", "num_attention_heads", 0, r"num_attention_heads must be from 1 to \d+, got 0"),
    ("qwen2", "num_attention_heads", 64, "num_attention_heads must be at most hidden_size, got 64 and 32"),
    ("qwen2", "num_key_value_heads", 3, "num_key_value_heads must divide num_attention_heads, got 3 and 4"),
    (
        "qwen2",
        "intermediate_size",
        10**13,
        r"intermediate_size must be from \d to 4194304, got 10000000000000",
    ),
    ("qwen2", "num_hidden_layers", 10**9, r"num_hidden_layers must be from \d to 1024, got 1000000000"),
    ("qwen2", "hidden_size", 28, "heads must have an even number of values for rotary positions, got 7"),
    (
        "qwen2_5_vl",
        "text_config.rope_parameters.mrope_section",
        [2, 1],
        r"mrope_section must be three numbers whose sum is 4, .*\[2, 1\]",
    ),
    (
        "qwen2_5_vl",
        "text_config.rope_parameters.mrope_section",
        [2, 2, 2],
        "mrope_section must be three numbers whose sum is 4",
    ),
    (
        "qwen3_vl",
        "text_config.rope_parameters.mrope_section",
        None,
        "config.text_config: mrope_section must be three numbers",
    ),
    (
        "qwen3_vl",
        "vision_config.num_heads",
        3,
        "vision_config: num_heads must divide hidden_size, got 3 and 32",
    ),
    ("qwen3_vl", "vision_config.depth", 10**6, r"vision_config.depth must be from \d to 1024"),
    ("qwen3_vl", "vision_config.patch_size", -1, r"vision_config.patch_size must be from 1 to \d+, got -1"),
    ("qwen3_vl", "vision_config.out_hidden_size", 10**6, r"out_hidden_size must be from \d to 131072"),
    ("qwen2_vl", "vision_config.mlp_ratio", 10**6, r"mlp_ratio must be from \d to 256"),
    ("gpt2", "n_positions", 0, r"n_positions must be from 1 to \d+, got 0"),
    ("internvl", "vision_config.image_size", [0, 16], r"image_size must be from 1 to \d+, got 0"),
    ("internvl", "vision_config.patch_size", [], "config: no internvl can be built of these sizes"),
    ("dinov2", "patch_size", 0, r"patch_size must be from 1 to \d+, got 0"),
    ("dinov2", "patch_size", 64, "image_size 32 and patch_size 64 must make 1 to 262144 patches, got 0"),
    (
        "dinov2",
        "image_size",
        100_000,
        "image_size 100000 and patch_size 8 must make 1 to 262144 patches, got 156250000",
    ),
    ("dinov2", "num_attention_heads", -1, r"num_attention_heads must be from 1 to \d+, got -1"),
    (
        "dinov2",
        "hidden_size",
        float("nan"),
        r"hidden_size must be from 1 to \d+, got nan|config: not a dinov2",
    ),
    ("dinov2", "num_labels", 10**8, r"num_labels must be from \d to 1048576"),
    ("qwen2", "num_labels", 10**8, r"num_labels must be from \d to 1048576"),
    ("dinov2", "image_size", [8], "config: no dinov2 can be built of these sizes .IndexError"),
]


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"), IMPOSSIBLE, ids=[f"{k}-{n}-{v}"[:60] for k, n, v, _ in IMPOSSIBLE]
)
def test_impossible_sizes_are_refused_before_anything_is_made(kind, key, value, message, monkeypatch):
    config = copy.deepcopy(tiny.CONFIGS.get(kind) or TINY[kind])
    part = config
    for name in key.split(".")[:-1]:
        part = part[name]
    part[key.split(".")[-1]] = value
    head = "language" if kind in tiny.CONFIGS else ""
    for make in (
        skeletons.empty_skeleton,
        lambda c, head: skeletons.init_skeleton(c, torch.Generator(), head=head),
    ):
        with pytest.raises(ValueError, match=message):
            make(config, head=head)


def test_a_model_larger_than_memory_is_not_begun(monkeypatch):
    """A thousand layers would take minutes to build, and the first of them all the memory."""
    config = tiny.CONFIGS["qwen2"] | {
        "hidden_size": 2**16,
        "intermediate_size": 2**20,
        "num_hidden_layers": 1000,
    }
    monkeypatch.setattr(skeletons, "build_module", lambda *args: pytest.fail("was built"))
    with pytest.raises(
        ValueError,
        match=r"config: a qwen2 of these sizes has 274,877.9 GB of float32 weights or more, this machine",
    ):
        skeletons.init_skeleton(config, torch.Generator(), head="language")


def test_save_leaves_a_whole_folder_or_none(folders, tmp_path, monkeypatch):
    skeleton, params = loading.load_skeleton(folders["dinov2"])
    saving.save_skeleton(skeleton, params, tmp_path / "a")
    with pytest.raises(ValueError, match="is there already"):
        saving.save_skeleton(skeleton, params, tmp_path / "a")
    with pytest.raises(ValueError, match="save: params must be"):
        saving.save_skeleton(skeleton, {}, tmp_path / "b")

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        saving.save_skeleton(skeleton, params, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


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


def test_importing_medvl_does_not_import_transformers():
    """It takes seconds, and a list of tasks must not: every import of it stands inside a function."""
    for path in Path(medvl.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", None) or ""]
            )
            assert not any(n.split(".")[0] == "transformers" for n in names), path


# Original DINOv2 ------------------------------------------------------------------------------------------------------------------------
def original(swiglu=False, registers=0, d=128, depth=2, grid=4):
    """A random state dict with the names and shapes of the original DINOv2 checkpoints."""
    shapes = {
        "cls_token": (1, 1, d),
        "mask_token": (1, d),
        "pos_embed": (1, grid**2 + 1, d),
        "patch_embed.proj.weight": (d, 3, 14, 14),
    }
    shapes |= {"patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,)}
    shapes |= {"register_tokens": (1, registers, d)} if registers else {}
    hidden = (int(4 * d * 2 / 3) + 7) // 8 * 8
    mlp = {"w12": (2 * hidden, d), "w3": (d, hidden)} if swiglu else {"fc1": (4 * d, d), "fc2": (d, 4 * d)}
    for i in range(depth):
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d)} | {f"mlp.{k}": s for k, s in mlp.items()}
        shapes |= {
            f"blocks.{i}.{n}.{leaf}": s[: 2 - (leaf == "bias")]
            for n, s in linear.items()
            for leaf in ("weight", "bias")
        }
        shapes |= {f"blocks.{i}.{n}.{leaf}": (d,) for n in ("norm1", "norm2") for leaf in ("weight", "bias")}
        shapes |= {f"blocks.{i}.ls{k}.gamma": (d,) for k in (1, 2)}
    gen = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=gen) * 0.2 for n, s in shapes.items()}


def naive_dinov2(p, x):
    """Oquab et al. 2023, arXiv:2304.07193; registers of Darcet et al. 2023, arXiv:2309.16588. x [b, 3, y, x] of the trained size."""
    d = p["norm.weight"].numel()

    def norm(z, name):
        return F.layer_norm(z, (d,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    def linear(z, name):
        return z @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    z = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=14).flatten(2).mT
    z = torch.cat([p["cls_token"].expand(len(z), 1, d), z], 1) + p["pos_embed"]
    if "register_tokens" in p:
        z = torch.cat([z[:, :1], p["register_tokens"].expand(len(z), -1, -1), z[:, 1:]], 1)
    for i in range(2):
        b = f"blocks.{i}."
        q, k, v = (
            linear(norm(z, b + "norm1"), b + "attn.qkv")
            .unflatten(-1, (3, d // 64, 64))
            .permute(2, 0, 3, 1, 4)
        )
        heads = (q @ k.mT / 8).softmax(-1) @ v
        z = z + p[b + "ls1.gamma"] * linear(heads.transpose(1, 2).flatten(2), b + "attn.proj")
        h = norm(z, b + "norm2")
        if b + "mlp.w12.weight" in p:
            gate, up = linear(h, b + "mlp.w12").chunk(2, -1)
            h = linear(F.silu(gate) * up, b + "mlp.w3")
        else:
            h = linear(F.gelu(linear(h, b + "mlp.fc1")), b + "mlp.fc2")
        z = z + p[b + "ls2.gamma"] * h
    return norm(z, "norm")


@pytest.mark.parametrize(("swiglu", "registers"), [(False, 0), (False, 4), (True, 0), (True, 4)])
def test_original_dinov2(tmp_path, swiglu, registers):
    state = original(swiglu, registers)
    torch.save(state, tmp_path / "dinov2_vitx14_pretrain.pth")
    skeleton, params = loading.load_skeleton(tmp_path / "dinov2_vitx14_pretrain.pth")
    assert skeleton.name == "dinov2_vitx14_pretrain"
    assert (skeleton.config["image_size"], skeleton.config["num_attention_heads"]) == (56, 2)
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            skeleton(params, x).last_hidden_state, naive_dinov2(state, x), rtol=1e-4, atol=1e-4
        )
    for names in (params, dinov2.from_dinov2(state)):
        back = dinov2.to_dinov2(names)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[k], state[k]) for k in state)


def test_original_dinov2_of_published_shapes():
    """facebookresearch/dinov2: ViT-S/14 has 12 blocks of 384 (176 keys with registers), ViT-g/14 40 of 1536 and a SwiGLU of 4096."""
    with torch.device("meta"):
        small = {k: torch.empty(v.shape) for k, v in original(registers=4, d=384, depth=12, grid=37).items()}
        giant = {k: torch.empty(v.shape) for k, v in original(swiglu=True, d=192, depth=3).items()}
    assert len(small) == 176
    config = dinov2_config(small, "x")
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == (
        "dinov2_with_registers",
        384,
        12,
    )
    assert (config["num_attention_heads"], config["image_size"], config["num_register_tokens"]) == (6, 518, 4)
    assert dinov2_config(giant, "x")["use_swiglu_ffn"]


def test_original_dinov2_refuses_other_keys():
    with pytest.raises(ValueError, match=r"'blocks.0.attn.rel_pos' is no key of an original DINOv2"):
        dinov2.from_dinov2({"blocks.0.attn.rel_pos": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'encoder.layer.0.foo' is no key of a Hugging Face DINOv2"):
        dinov2.to_dinov2({"encoder.layer.0.foo": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"attn.qkv.bias needs query, key, value, but there is no key, value"
    ):
        dinov2.to_dinov2({"encoder.layer.0.attention.q_proj.bias": torch.zeros(1)})
    state = {k: v[:100] if k == "patch_embed.proj.weight" else v for k, v in original().items()}
    with pytest.raises(ValueError, match=r"multiple of 64 .* found 100"):
        dinov2_config(state, "x")


NOT_OF_THEIR_OWN = {
    "repeated": (
        lambda: {"w": torch.zeros(1).expand(2**20, 2**20)},
        r"w must be \[1048576, 1048576\] numbers of their own, the file holds 4",
    ),
    "without numbers": (
        lambda: {"w": torch.zeros(3, device="meta")},
        r"w must be \[3\] numbers of their own",
    ),
    "sparse": (lambda: {"w": torch.ones(3).to_sparse()}, r"w must be \[3\] numbers of their own"),
    "numbered": (lambda: {1: torch.zeros(3)}, "must hold one flat dict of tensors"),
}


@pytest.mark.parametrize("kind", NOT_OF_THEIR_OWN)
def test_tensors_hold_as_many_numbers_as_they_have(tmp_path, kind):
    make, message = NOT_OF_THEIR_OWN[kind]
    torch.save(make(), tmp_path / "w.bin")
    with pytest.raises(ValueError, match=message):
        checkpoints.open_weights(tmp_path / "w.bin", "w")


def test_a_compressed_pickle_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "w.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"must be as torch.save writes it, \d+ members are compressed"):
        checkpoints.read_pickle(tmp_path / "w.bin")


def test_two_weights_of_one_tensor_are_read(tmp_path):
    w = torch.arange(6.0).view(2, 3)
    torch.save({"a": w, "b": w, "c": w.T, "d": w[1]}, tmp_path / "w.bin")
    found = checkpoints.open_weights(tmp_path / "w.bin", "w")
    assert {k: e.read().tolist() for k, e in found.items()} == {
        "a": w.tolist(),
        "b": w.tolist(),
        "c": w.T.tolist(),
        "d": w[1].tolist(),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": "x"}, 'eos_token_id must be a token or a list of tokens, found "x"'),
        ({"eos_token_id": [2, [3]]}, r"eos_token_id must be .*, found \[3\]"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must be .*, found -1"),
        ({"eos_token_id": True}, "eos_token_id must be .*, found true"),
        ({"repetition_penalty": "a"}, 'repetition_penalty must be a number above 0, found "a"'),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, found 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be a number above 0, found NaN"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_generation_config_that_is_none_is_named(tmp_path, gen, content, message):
    saving.save_skeleton(
        *skeletons.init_skeleton(tiny.CONFIGS["qwen2"], gen, head="language"), tmp_path / "m"
    )
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"m/generation_config.json:? {message}"):
        loading.load_skeleton(tmp_path / "m", head="language")
    (tmp_path / "m" / "generation_config.json").write_text(
        '{"eos_token_id": [2, 3], "repetition_penalty": 1.05}'
    )
    assert loading.load_skeleton(tmp_path / "m", head="language")[0].generation == {
        "eos_token_id": [2, 3],
        "repetition_penalty": 1.05,
    }


def test_an_empty_pickle_is_told(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a file of plain tensors, or broken"):
        checkpoints.read_pickle(tmp_path / "w.pt")


def test_kernels_that_a_config_names_are_not_fetched():
    """A name such as owner/kernel would be downloaded and run; which kernel computes a layer is not part of the architecture."""
    nested = {"attn_implementation": {"": "owner/kernel", "text_config": "owner/kernel"}}
    for config in (
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "flash_attention_2"},
        nested,
    ):
        skeleton = skeletons.empty_skeleton(
            tiny.CONFIGS["qwen2"] | config | {"experts_implementation": "owner/kernel"}, head="language"
        )
        assert skeleton.module.config._attn_implementation == "sdpa"
    inner = tiny.CONFIGS["qwen2_vl"] | {
        "vision_config": tiny.CONFIGS["qwen2_vl"]["vision_config"] | {"attn_implementation": "owner/kernel"}
    }
    assert (
        skeletons.empty_skeleton(inner, head="language").module.config.vision_config._attn_implementation
        == "sdpa"
    )
    assert (
        skeletons.empty_skeleton(
            tiny.CONFIGS["qwen2"] | {"attn_implementation": "eager"}
        ).module.config._attn_implementation
        == "eager"
    )
