"""loading: transformers itself is the peer; checkpoints are tiny, random and in the real formats."""

import json
import os
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from medvl.hub import checkpoints, loading, saving, skeletons
from tests import tiny
from tests.hub.pieces import TINY, VISION, in_threads, inputs_of, model_of


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
        match=rf"someone/nothing is not a folder.*{tmp_path}/cache.*HF_HUB_OFFLINE.*hf download someone/nothing",
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
        match=r"lm_head.weight and model.embed_tokens.weight are one weight according to its config, but differ",
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
