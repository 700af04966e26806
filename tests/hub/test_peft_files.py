"""adapter_files: peft is the peer. It writes folders that we read, and reads folders that we write; models are tiny and random."""

import copy
import json
import re
import warnings
from functools import cache

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from medvl.hub import skeletons, weight_names
from medvl.hub.peft_files import read_adapter, write_adapter
from medvl.weights import compose, lora
from medvl.weights.lora import LoraConfig, apply_lora

P = "base_model.model."
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
TEXT |= {
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
}
MODELS = {
    "qwen3": {"model_type": "qwen3", **TEXT, "tie_word_embeddings": False},
    "tied": {"model_type": "qwen3", **TEXT, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 64,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "vision_config": TOWER | {"temporal_patch_size": 2, "in_channels": 3},
        "text_config": {k: v for k, v in TEXT.items() if k != "head_dim"}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
        "tie_word_embeddings": False,
    },
}


@cache
def made(kind):
    """(skeleton, params, a module of transformers with the same weights)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    skeleton, params = skeletons.init_skeleton(
        MODELS[kind], torch.Generator().manual_seed(0), head="language"
    )
    gen = torch.Generator().manual_seed(1)
    params = {n: t + 0.1 * torch.randn(t.shape, generator=gen) for n, t in params.items()}
    config = dict(MODELS[kind])
    cfg = AutoConfig.for_model(config.pop("model_type"), **config)
    model = (
        (AutoModelForImageTextToText if kind == "qwen2_vl" else AutoModelForCausalLM).from_config(cfg).eval()
    )
    model.load_state_dict(params, strict=False)
    return skeleton, params, model


def inputs(kind):
    gen = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 60, (2, 7), generator=gen)
    if kind != "qwen2_vl":
        return {"input_ids": ids}
    ids[:, 1:4] = torch.tensor([62, 60, 63])
    pixels = torch.randn(2 * 4, 3 * 2 * 2 * 2, generator=gen)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 60).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
    }


def trained(kind, **config):
    """A peft model whose adapter is random in all that it trains."""
    import peft

    model = peft.get_peft_model(
        copy.deepcopy(made(kind)[2]),
        peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config),
    )
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn(p.shape, generator=gen))
    return model.eval()


def logits(run, kind):
    with torch.no_grad():
        return run(**inputs(kind)).logits


def ours(kind, adapter):
    skeleton, params, _ = made(kind)
    base, factors = params | adapter.full, evolve(adapter, full={})
    return logits(lambda **x: skeleton(apply_lora(base, factors), **x), kind)


def theirs(kind, folder):
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(made(kind)[2]), folder).eval()


CASES = {
    "linear": ("qwen3", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all-linear": ("qwen3", {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "patterns": (
        "qwen3",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, "k_proj": 7},
            "alpha_pattern": {r"model\.layers\.1\..*": 5, "up_proj": 3},
        },
    ),
    "rslora": (
        "qwen3",
        {"target_modules": ["o_proj"], "use_rslora": True, "rank_pattern": {"layers.1.self_attn.o_proj": 3}},
    ),
    "regex": ("qwen3", {"target_modules": r".*layers\.1.*(q|gate)_proj"}),
    "layers": (
        "qwen3",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]},
    ),
    "saved": (
        "qwen3",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    ),
    "embedding": ("qwen3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-head": ("qwen3", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied-embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-wte": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "gaussian": (
        "gpt2",
        {"target_modules": "all-linear", "fan_in_fan_out": True, "init_lora_weights": "gaussian"},
    ),
    "tower": ("qwen2_vl", {"target_modules": ["q_proj", "v_proj", "qkv", "fc1", "mlp.0", "mlp.2"]}),
    "tower-regex": (
        "qwen2_vl",
        {
            "target_modules": r"model\.(visual.*\.(qkv|proj)|language_model.*o_proj)",
            "exclude_modules": ".*patch_embed.*",
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes the folder of a case with peft, once: folder(case) -> (path, logits of peft)."""

    @cache
    def write(case):
        kind, config = CASES[case]
        model = trained(kind, **config)
        where = tmp_path_factory.mktemp(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(where)
        return where, logits(model, kind)

    return write


@pytest.mark.parametrize("case", CASES)
def test_equals_peft_and_goes_back_to_peft(folder, tmp_path, case):
    kind, (where, want) = CASES[case][0], folder(case)
    plain = logits(made(kind)[2], kind)
    assert (want - plain).abs().max() > 0.05
    for adapter in (
        read_adapter(where, made(kind)[0]),
        *([read_adapter(where)] if case != "tied-head" else []),
    ):
        torch.testing.assert_close(ours(kind, adapter), want, rtol=0, atol=2e-6)
    write_adapter(read_adapter(where, made(kind)[0]), tmp_path / "again")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (where, tmp_path / "again"))
    if (
        case != "tied-head"
    ):  # its base, which peft adds to the file, is the embedding's in a model without a head's weight
        assert before.keys() == after.keys()
        assert all(torch.equal(t, after[k]) for k, t in before.items())
    again = theirs(kind, tmp_path / "again")
    torch.testing.assert_close(logits(again, kind), want, rtol=0, atol=1e-6)
    first = theirs(kind, where)
    assert again.base_model.targeted_module_names == first.base_model.targeted_module_names
    old, new = (json.loads((f / "adapter_config.json").read_text()) for f in (where, tmp_path / "again"))
    free = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    )  # written as the full names of the layers
    assert {k: v for k, v in old.items() if k not in free} == {k: v for k, v in new.items() if k not in free}


def test_an_embedding_that_is_replaced_is_corrected_as_well(folder):
    skeleton, params, _ = made("qwen3")
    where, want = folder("embedding")
    adapter = read_adapter(where, skeleton)
    assert list(adapter.full) == ["model.embed_tokens.weight"]
    got = logits(lambda **x: skeleton(apply_lora(params, adapter), **x), "qwen3")
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_writes_what_was_never_in_a_folder(tmp_path):
    """Ranks and scales of all kinds, a gate, a dropout, a norm that is replaced."""
    skeleton = made("qwen3")[0]
    gen = torch.Generator().manual_seed(4)
    cfg = LoraConfig(
        targets=("q_proj", "down_proj", "embed_tokens"),
        rank_pattern={"0.self_attn.q_proj": 3, "down_proj": 5},
        dropout=0.1,
    )
    adapter = lora.init_lora(cfg, skeleton, gen)
    adapter = evolve(
        adapter,
        factors={
            m: {k: 0.3 * torch.randn(t.shape, generator=gen) for k, t in f.items()}
            for m, f in adapter.factors.items()
        },
        scale={m: 0.1 * i + 1 / 3 for i, m in enumerate(adapter.factors)},
        gate={m: torch.rand(len(f["a"]), generator=gen) for m, f in adapter.factors.items() if "1" in m},
        full={"model.norm.weight": torch.rand(32, generator=gen)},
    )
    want = ours("qwen3", adapter)
    write_adapter(adapter, tmp_path / "a", base="some/model")
    model = theirs("qwen3", tmp_path / "a")
    torch.testing.assert_close(logits(model, "qwen3"), want, rtol=0, atol=2e-6)
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.task_type, config.lora_dropout) == (
        "some/model",
        "CAUSAL_LM",
        0.1,
    )
    again = read_adapter(tmp_path / "a", skeleton)
    torch.testing.assert_close(ours("qwen3", again), want, rtol=0, atol=2e-6)
    assert again.dropout == 0.1
    assert again.scale == pytest.approx(adapter.scale, rel=1e-12)
    write_adapter(
        adapter, tmp_path / "b", targets=("q_proj", "down_proj", "embed_tokens"), task="FEATURE_EXTRACTION"
    )
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert (config["target_modules"], config["task_type"]) == (
        ["q_proj", "down_proj", "embed_tokens"],
        "FEATURE_EXTRACTION",
    )
    torch.testing.assert_close(logits(theirs("qwen3", tmp_path / "b"), "qwen3"), want, rtol=0, atol=2e-6)


def test_a_changed_adapter_has_a_changed_config(folder, tmp_path):
    adapter = read_adapter(folder("patterns")[0], made("qwen3")[0])
    kept = {m: f for m, f in adapter.factors.items() if "layers.1" in m}
    less = evolve(adapter, factors=kept, scale={m: 2 * s for m, s in adapter.scale.items() if m in kept})
    write_adapter(less, tmp_path / "less")
    torch.testing.assert_close(
        logits(theirs("qwen3", tmp_path / "less"), "qwen3"), ours("qwen3", less), rtol=0, atol=2e-6
    )
    assert read_adapter(tmp_path / "less", made("qwen3")[0]).factors.keys() == kept.keys()


def rewrite(where, to, change=lambda state: state, bin=False, **config):
    """A copy of a folder, changed."""
    to.mkdir()
    stored = json.loads((where / "adapter_config.json").read_text()) | config
    (to / "adapter_config.json").write_text(json.dumps(stored))
    state = load_file(where / "adapter_model.safetensors")
    state = {k: t.clone() for k, t in (change(state) or state).items()}
    if bin:
        torch.save(state, to / "adapter_model.bin")
    else:
        save_file(state, to / "adapter_model.safetensors", {"format": "pt"})
    return to


def same(a, b):
    assert a.factors.keys() == b.factors.keys()
    assert (a.scale, a.kinds, a.full.keys()) == (b.scale, b.kinds, b.full.keys())
    assert all(torch.equal(t, b.factors[m][k]) for m, f in a.factors.items() for k, t in f.items())
    assert all(torch.equal(t, b.full[n]) for n, t in a.full.items())


def test_other_containers_and_keys(folder, tmp_path):
    where = folder("saved")[0]
    want = read_adapter(where)
    same(read_adapter(rewrite(where, tmp_path / "bin", bin=True)), want)
    infix = {
        "lora_A": "lora_A.default",
        "lora_B": "lora_B.default",
        "lm_head": "lm_head.modules_to_save.default",
    }
    named = lambda s: {re.sub("lora_A|lora_B|lm_head", lambda hit: infix[hit[0]], k): t for k, t in s.items()}
    same(read_adapter(rewrite(where, tmp_path / "infix", named)), want)
    same(
        read_adapter(
            rewrite(where, tmp_path / "bare", lambda s: {k.removeprefix(P): t for k, t in s.items()})
        ),
        want,
    )
    wte = folder("conv1d-wte")[0]
    named = lambda s: {re.sub("_[AB]$", lambda hit: hit[0] + ".other", k): t for k, t in s.items()}
    same(
        read_adapter(rewrite(wte, tmp_path / "wte", named), made("gpt2")[0]),
        read_adapter(wte, made("gpt2")[0]),
    )
    half = read_adapter(where, dtype=torch.bfloat16)
    assert {t.dtype for f in half.factors.values() for t in f.values()} == {torch.bfloat16}
    write_adapter(half, tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half/adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    harmless = {
        "new_option": False,
        "another": None,
        "third": [],
        "eva_config": {"rho": 2.0},
        "init_lora_weights": "eva",
    }
    same(read_adapter(rewrite(where, tmp_path / "new", **harmless)), want)


@pytest.mark.parametrize(("case", "kind"), [("conv1d", "gpt2"), ("linear", "qwen3")])
def test_the_skeleton_knows_gpt2s_layers_better_than_the_config(folder, tmp_path, case, kind):
    where, want = folder(case)
    wrong = rewrite(where, tmp_path / "x", fan_in_fan_out=kind == "qwen3")
    torch.testing.assert_close(ours(kind, read_adapter(wrong, made(kind)[0])), want, rtol=0, atol=2e-6)


def test_reads_the_hub_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny/snapshots/abc"
    (tmp_path / "models--someone--tiny/refs").mkdir(parents=True)
    (tmp_path / "models--someone--tiny/refs/main").write_text("abc")
    snapshot.parent.mkdir()
    rewrite(folder("linear")[0], snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapter = read_adapter("someone/tiny")
    same(adapter, read_adapter(folder("linear")[0]))
    assert adapter.name == "someone/tiny"


# Names of older versions ----------------------------------------------------------------------------------------------------------------
def older(state):
    """Keys of Qwen2-VL before transformers 4.52."""
    return {
        k.replace(f"{P}model.visual", f"{P}visual").replace(f"{P}model.language_model", f"{P}model"): t
        for k, t in state.items()
    }


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("tower", {}),
        ("tower", {"target_modules": r"(model(?!\.visual)|visual).*\.(q_proj|v_proj|qkv|fc1|mlp\.0|mlp\.2)"}),
        ("tower", {"target_modules": "full names"}),
        ("tower-regex", {"target_modules": r"visual\.blocks.*\.(qkv|proj)|model\.layers\..*o_proj"}),
    ],
)
def test_older_names_are_mapped(folder, tmp_path, case, config):
    where, want = folder(case)
    if config.get("target_modules") == "full names":
        state = older(load_file(where / "adapter_model.safetensors"))
        config = {"target_modules": sorted({k.partition(".lora")[0].removeprefix(P) for k in state})}
    rewrite(where, tmp_path / "old", older, **config)
    skeleton, params, _ = made("qwen2_vl")
    adapter = read_adapter(tmp_path / "old", skeleton)
    torch.testing.assert_close(ours("qwen2_vl", adapter), want, rtol=0, atol=2e-6)
    with pytest.raises(
        ValueError, match=r"apply_lora: the model has no weight (visual|model\.layers)"
    ):  # peft leaves it inactive
        apply_lora(params, read_adapter(tmp_path / "old"))
    write_adapter(adapter, tmp_path / "new")  # under today's names peft reads it
    torch.testing.assert_close(
        logits(theirs("qwen2_vl", tmp_path / "new"), "qwen2_vl"), want, rtol=0, atol=1e-6
    )
    cut = rewrite(
        tmp_path / "old", tmp_path / "cut", lambda s: {k: t for k, t in s.items() if "layers.1" not in k}
    )
    with pytest.raises(ValueError, match=r"lacks model\.language_model\.layers\.1\."):
        read_adapter(cut, skeleton)


LLAVA = {
    "model_type": "llava",
    "vision_config": {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    | {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
    "text_config": {"model_type": "llama"} | TEXT,
}
INTERN = {
    "model_type": "internvl",
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    | {"image_size": [28, 28], "patch_size": [14, 14]},
    "text_config": {"model_type": "qwen2"} | TEXT,
}


@pytest.mark.parametrize("config", [LLAVA, INTERN], ids=["llava", "internvl"])
def test_older_layouts_of_other_models(config):
    skeleton = skeletons.empty_skeleton(config, head="language")
    old = {
        "language_model.model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight": "model.multi_modal_projector.linear_1.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }
    assert weight_names.current_names(skeleton, [*old, "model.layers.99.self_attn.q_proj.weight"]) == old
    assert weight_names.current_names(skeleton, old.values()) == {n: n for n in old.values()}


def test_an_adapter_of_the_whole_model_serves_its_decoder(folder):
    decoder = skeletons.empty_skeleton(MODELS["qwen3"])
    adapter = read_adapter(folder("linear")[0], decoder)
    assert "layers.0.self_attn.q_proj" in adapter.factors
    with pytest.raises(ValueError, match=r"has no lm_head.weight, under no name of older versions"):
        read_adapter(folder("embedding-head")[0], decoder)


def test_ends_of_names_do_not_demand_a_tower_that_was_left_alone(folder, tmp_path):
    skeleton = made("qwen2_vl")[0]
    for side, other in (("visual", "language_model"), ("language_model", "visual")):
        cut = rewrite(
            folder("tower")[0],
            tmp_path / side,
            lambda s, side=side: {k: t for k, t in s.items() if side not in k},
        )
        assert all(other in m for m in read_adapter(cut, skeleton).factors)
    regex = rewrite(
        folder("tower-regex")[0],
        tmp_path / "regex",
        lambda s: {k: t for k, t in s.items() if "visual" not in k},
    )
    with pytest.raises(ValueError, match=r"lacks model\.visual\.blocks\.0\.attn\.qkv, .*target_modules"):
        read_adapter(regex, skeleton)


# Faults ---------------------------------------------------------------------------------------------------------------------------------
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
CONFIGS = [
    ({"peft_type": "IA3"}, 'peft_type = "IA3" cannot be read: it must be LORA'),
    ({"peft_type": None}, "peft_type = null"),
    ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights = "pissa_niter_4".*path_initial_model'),
    *[
        ({"init_lora_weights": i}, f'"{i}" cannot be read: it may change the base')
        for i in ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
    ],
    ({"use_dora": True}, "use_dora = true cannot be read: DoRA"),
    ({"lora_bias": True}, "lora_bias = true"),
    ({"bias": "lora_only"}, 'bias = "lora_only".*biases of the base'),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices = \[1, 2\]"),
    ({"layer_replication": [[0, 1]]}, "layer_replication.*copies"),
    ({"target_parameters": ["experts.w"]}, "target_parameters.*not layers"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens.*certain tokens"),
    ({"use_qalora": True}, "use_qalora.*pools"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora.*block-diagonal"),
    ({"kasa_config": {"beta": 1}}, "kasa_config.*truncates"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying.*tied"),
    *[
        ({k: {"x": 1}}, f"{k} = .*its effect is not known here")
        for k in ("megatron_config", "arrow_config", "monteclora_config", "velora_config")
    ],
    ({"brand_new": 3}, "brand_new = 3 cannot be read: its effect is not known here"),
    ({"r": 0}, "r = 0.*positive integer"),
    ({"lora_alpha": "16"}, 'lora_alpha = "16".*a number'),
    ({"lora_dropout": 1.0}, r"lora_dropout = 1.0.*\[0, 1\)"),
    ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern.*regex: positive integer"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern.*'\(' is not a regular expression"),
    ({"target_modules": "*q_proj"}, "target_modules.*not a regular expression"),
    ({"target_modules": 3}, "target_modules = 3.*a regex or a list of names"),
    (
        {"r": 8},
        r"layers.0.*lora_A.weight must be \[r, in\].* rank 8 of the config, got \[4, 48\] and \[32, 4\]",
    ),
    (
        {"rank_pattern": {"1.self_attn.v_proj": 3}},
        r"layers.1.self_attn.v_proj.lora_A.weight .* rank 3 .* got \[4, 32\] and \[16, 4\]",
    ),
]


@pytest.mark.parametrize(
    ("config", "message"), CONFIGS, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(CONFIGS)]
)
def test_configs_that_are_refused(folder, tmp_path, config, message):
    where = rewrite(folder("linear")[0], tmp_path / "x", **config)
    with pytest.raises(ValueError, match=message):
        read_adapter(where)


STATES = [
    (lambda s: s.pop(f"{P}{Q}.lora_B.weight"), f"{Q}.lora_A.weight has no lora_B beside it"),
    (lambda s: s.pop(f"{P}{V}.lora_A.weight"), f"{V}.lora_B.weight has no lora_A beside it"),
    (
        lambda s: [s.pop(f"{P}{V}.lora_{x}.weight") for x in "AB"],
        f"lacks {V}, which target_modules in its config name",
    ),
    (
        lambda s: s.update({f"{P}{Q}.lora_magnitude_vector": torch.ones(32)}),
        "unexpected .*lora_magnitude_vector",
    ),
    (lambda s: s.update({f"{P}{Q}.lora_B.bias": torch.ones(32)}), "unexpected .*lora_B.bias"),
    (lambda s: s.update({f"{P}{Q}.bias": torch.ones(32)}), f"unexpected {P}{Q}.bias"),
    (lambda s: s.update({f"{P}model.norm.weight": torch.ones(32)}), "unexpected .*norm.weight"),
    (
        lambda s: s.update({f"{P}{Q}.lora_A.default.weight": torch.ones(4, 32)}),
        "lora_A.* one too many .*one adapter",
    ),
    (
        lambda s: s.update({f"{P}{Q}.lora_embedding_A": torch.ones(4, 32)}),
        "lora_(embedding_)?A.* one too many",
    ),
    (
        lambda s: s.update({k: s[f"{P}{Q}.lora_A.weight"] * torch.nan for k in [f"{P}{Q}.lora_A.weight"]}),
        "lora_A.weight must be finite .* NaN",
    ),
    (
        lambda s: s.update({f"{P}{Q}.lora_B.weight": torch.ones(32, 4).int()}),
        "lora_B.weight must hold floating point numbers",
    ),
    (
        lambda s: s.update({f"{P}{Q}.lora_A.weight": torch.ones(4, 31)}),
        rf"{Q} has A \[4, 31\] and B \[32, 4\], but its weight is \[32, 32\]",
    ),
    (
        lambda s: s.update({f"{P}{Q}.lora_A.weight": torch.ones(4, 32, 1)}),
        r"must be \[r, in\].*got \[4, 32, 1\]",
    ),
    (
        lambda s: s.update({f"{P}{Q}.lora_B.weight": torch.ones(32, 3)}),
        r"rank 4 of the config, got \[4, 32\] and \[32, 3\]",
    ),
    (
        lambda s: {k.replace("layers.1", "layers.7"): t for k, t in s.items()},
        r"qwen3 has no model.layers.7.* its weights look like model.embed",
    ),
    (
        lambda s: {k.replace(".self_attn.q_proj", ".input_layernorm"): t for k, t in s.items()},
        "input_layernorm has factors of kind linear, but is no",
    ),
    (
        lambda s: {re.sub(r"lora_([AB]).weight", r"lora_embedding_\1", k): t for k, t in s.items()},
        "factors of kind embedding, but is linear",
    ),
    (
        lambda s: s.update({f"{P}lm_head.weight": torch.ones(60, 32)}),
        r"lm_head.weight must be \[64, 32\] as in qwen3, got \[60, 32\]",
    ),
    (lambda s: {"x": torch.ones(1)}, "unexpected x"),
]


@pytest.mark.parametrize(("change", "message"), STATES, ids=[m[:30] for _, m in STATES])
def test_files_that_are_refused(folder, tmp_path, change, message):
    where = rewrite(
        folder("linear")[0], tmp_path / "x", lambda s: new if isinstance(new := change(s), dict) else s
    )
    with pytest.raises(ValueError, match=message):
        read_adapter(where, made("qwen3")[0])


def test_folders_that_are_broken(folder, tmp_path):
    for text, message in (("{", "adapter_config.json is not JSON"), ("[]", "must hold a JSON object")):
        where = rewrite(folder("linear")[0], tmp_path / message[:10])
        (where / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_adapter(where)
    where = rewrite(folder("linear")[0], tmp_path / "x")
    whole = (where / "adapter_model.safetensors").read_bytes()
    for part in (b"", whole[:-9]):
        (where / "adapter_model.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match=r"adapter_model.safetensors is broken or cut off"):
            read_adapter(where)
    save_file({}, where / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA factors"):
        read_adapter(where)
    (where / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"must hold adapter_model.safetensors or adapter_model.bin, found adapter_config.json",
    ):
        read_adapter(where)
    (where / "adapter_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match=r"adapter_model.bin is not a file of plain tensors"):
        read_adapter(where)
    with pytest.raises(ValueError, match="no file or folder /no/where"):
        read_adapter("/no/where")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold adapter_config.json, found none"):
        read_adapter(tmp_path / "empty")


def test_tied_weights_are_not_untied(folder, tmp_path):
    where = folder("linear")[0]
    head, table = torch.ones(64, 32), {f"{P}model.embed_tokens.weight": torch.ones(64, 32)}
    both = rewrite(
        where, tmp_path / "both", lambda s: s | table | {f"{P}lm_head.weight": head}
    )  # a resized vocabulary
    assert list(read_adapter(both, made("tied")[0]).full) == ["model.embed_tokens.weight"]
    assert len(read_adapter(both, made("qwen3")[0]).full) == 2
    differ = rewrite(where, tmp_path / "differ", lambda s: s | table | {f"{P}lm_head.weight": 2 * head})
    with pytest.raises(
        ValueError,
        match=r"embed_tokens.weight and .*lm_head.weight differ, but are one weight|differ, but are one",
    ):
        read_adapter(differ, made("tied")[0])
    saved = rewrite(where, tmp_path / "saved", lambda s: s | table, modules_to_save=["embed_tokens"])
    with pytest.raises(
        ValueError,
        match=r"replaces one of model.embed_tokens.weight, lm_head.weight.*tie_word_embeddings = false",
    ):
        read_adapter(saved, made("tied")[0])


def test_two_names_for_one_layer(folder, tmp_path):
    where = rewrite(folder("tower")[0], tmp_path / "x", lambda s: s | older(s))
    with pytest.raises(ValueError, match="under an older and a newer name"):
        read_adapter(where, made("qwen2_vl")[0])


def test_what_is_not_written(folder, tmp_path):
    adapter = read_adapter(folder("linear")[0])
    gated = evolve(adapter, gate={Q: torch.ones(2, 4)})
    routed = evolve(
        adapter, factors=adapter.factors | {Q: adapter.factors[Q] | {"router": torch.ones(2, 32)}}
    )
    nan = evolve(
        adapter,
        factors=adapter.factors | {Q: {"a": torch.full((4, 32), torch.nan), "b": adapter.factors[Q]["b"]}},
    )
    for wrong, more, message in (
        (gated, {}, rf"{Q} of .* differs by sample \(gate \[2, 4\]\)"),
        (routed, {}, rf"{Q} of .* have routers .*write_hlora"),
        (nan, {}, rf"{Q}.lora_A.weight must be finite"),
        (evolve(adapter, factors={}), {}, "must adapt at least one layer"),
        (evolve(adapter, scale=adapter.scale | {Q: torch.inf}), {}, f"the scale of {Q} of .* must be finite"),
        (
            adapter,
            {"targets": ["q_proj", "v_proj"]},
            r'targets must name every layer of .* \["q_proj", "v_proj"\] misses .*down_proj',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            write_adapter(wrong, tmp_path / "out", **more)
    assert list(tmp_path.iterdir()) == []
    write_adapter(adapter, tmp_path / "out", targets=r".*\.(q_proj|v_proj|down_proj)")
    with pytest.raises(ValueError, match="out is there already"):
        write_adapter(adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", ["qwen3", "tied"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_the_token_table_and_the_head_are_mixed_without_peft_s_copies(kind, tmp_path):
    """peft saves the table untouched beside an adapter that corrects it; a table that was trained stays one."""
    skeleton, params, _ = made(kind)
    targets = ["embed_tokens", "q_proj"] if kind == "tied" else ["embed_tokens", "lm_head", "q_proj"]
    trained(kind, target_modules=targets).save_pretrained(tmp_path / "one")
    read = read_adapter(tmp_path / "one", skeleton)
    assert read.full
    with pytest.raises(ValueError, match=r"whole tensors that it replaces \(.*lora.without_copies"):
        compose.stack_adapters([read, read])
    plain = lora.without_copies(read, params)
    assert plain.full == {}
    x = inputs(kind)
    pool = compose.stack_adapters([plain, plain])
    mixed = lora.apply_lora(params, compose.compose_adapters(pool, [0.25, 0.75]))
    with torch.no_grad():
        torch.testing.assert_close(skeleton(mixed, **x).logits, ours(kind, read), rtol=0, atol=1e-5)
    half = {n: t.bfloat16() for n, t in params.items()}
    assert (
        lora.without_copies(
            evolve(read, full={n: t.bfloat16().float() for n, t in read.full.items()}), half
        ).full
        == {}
    )
    moved = {n: t + 1e-3 for n, t in read.full.items()}
    assert lora.without_copies(evolve(read, full=moved), params).full.keys() == moved.keys()
