"""plugin_files: the peers are the published files' names and shapes, and the state dict that HealthGPT loads."""

import json
from functools import cache
from math import prod

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from safetensors.torch import load_file, save_file

from medvl.base import config as records
from medvl.base.tree import flatten
from medvl.commands import plugins
from medvl.components.project import ProjectConfig, project
from medvl.hub import hlora_files, plugin_files, skeletons, tokens
from medvl.hub.checkpoints import Entry
from medvl.hub.plugin_files import (
    PUBLISHED,
    Plugin,
    PluginConfig,
    check_base,
    published_config,
    read_plugin,
    read_published,
    write_plugin,
)
from medvl.weights import extended, four_bit, lazy, lora
from tests.hub.test_hlora_files import PHI, PHI4, QWEN, SMALL

P = "base_model.model."
D = "model.layers.1.mlp.down_proj"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QWEN_SMALL = {
    "model_type": "qwen2",
    **{k: v for k, v in SMALL.items() if k not in ("model_type", "pad_token_id")},
}
FULL = {  # base, rows of its own table, numbers of the H-LoRA sets, rows of table and head with image codes
    "M3": (PHI | {"vocab_size": 32064}, {"understand": 102_891_520, "draw": 404_881_408}, 40_206),
    "L14": (PHI4 | {"vocab_size": 100352}, {"understand": 116_736_000}, 108_547),
    "XL32": (QWEN | {"vocab_size": 152064}, {"understand": 283_377_664}, 151_665),
}
CASES = [(variant, config.task) for variant, configs in PUBLISHED.items() for config in configs]


def without_memory(shapes):
    """Entries of one bfloat16 number that is everywhere."""
    number = torch.full((), 0.5, dtype=torch.bfloat16)
    return {
        P + name: Entry(shape=shape, dtype=number.dtype, read=lambda shape=shape: number.expand(shape))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("variant", "task"), CASES)
def test_published_files_of_full_size(tmp_path, monkeypatch, variant, task):
    base, numbers, rows = FULL[variant]
    config, skeleton = published_config(variant, task), skeletons.empty_skeleton(base, head="language")
    shapes, tables = plugin_files._published_shapes(config, skeleton)
    routed = {name: shape for name, shape in shapes.items() if "lora" in name}
    assert sum(map(prod, routed.values())) == numbers[task]
    width = base["hidden_size"]
    assert tables == {EMBED: (rows, width), HEAD: (rows, width)}
    assert config.scale == 8
    files = {
        "plugin.bin": shapes | {"model.mm_projector.0.weight": (width, 1024)},
        "fusion.bin": tables if task == "draw" else {},
    }
    monkeypatch.setattr(hlora_files, "open_file", lambda path, _: without_memory(files[path.name]))
    fusion = "fusion.bin" if task == "draw" else None
    plugin, report = read_published(
        "plugin.bin", fusion, config=config, skeleton=skeleton, dtype=torch.bfloat16
    )
    assert f"({numbers[task]:,} numbers), projector" in report
    assert ("embed and head of fusion.bin" if fusion else "none, the base's are used") in report
    assert sum(t.numel() for t in flatten(plugin.projector).values()) == width * (1024 + width + 2)
    assert {part: t.shape for part, t in plugin.tables.items()} == (
        {"embed": (rows, width), "head": (rows, width)} if fusion else {}
    )
    assert (plugin.config.task, plugin.config.level) == (task, {"understand": -2, "draw": 1}[task])


# Small files --------------------------------------------------------------------------------------------------------------------------
BASES = {"M3": SMALL, "L14": SMALL | {"num_key_value_heads": 2}, "XL32": QWEN_SMALL}


@cache
def small(variant="M3", task="understand"):
    """(record, skeleton, params, state dict of its file, its tables) of a small base; 60 of 64 rows are tokens, 16 codes."""
    gen = torch.Generator().manual_seed(5)
    skeleton, params = skeletons.init_skeleton(BASES[variant], gen, head="language")
    config = evolve(published_config(variant, task), rank=8, alpha=16.0, tokens=60)
    if config.codes:
        config = evolve(config, codes=16)
    shapes, tables = plugin_files._published_shapes(config, skeleton)
    shapes["model.mm_projector.0.weight"] = (32, 24)
    draw = lambda shapes: {P + n: (0.2 * torch.randn(s, generator=gen)).half() for n, s in shapes.items()}
    return config, skeleton, params, draw(shapes), draw(tables)


def saved(tmp_path, **states):
    for name, state in states.items():
        torch.save({k: t.clone() for k, t in state.items()}, tmp_path / f"{name}.bin")
    return [tmp_path / f"{name}.bin" for name in states]


def applied(skeleton, params, plugin):
    """The base with a plugin on it, mean rows where it brings none."""
    config, names = plugin.config, skeletons.table_names(skeleton)
    if config.codes:
        mean = lambda name: extended.mean_rows(params[name], config.tokens, config.added)
        rows = plugin.rows or {part: mean(name) for part, name in names.items() if part not in plugin.tables}
        params = extended.extend_tables(params, names, rows, config.tokens)
    params = params | {names[part]: table for part, table in plugin.tables.items()}
    return lora.apply_lora(params, plugin.adapter)


def reference(skeleton, params, state, ids, config):
    """HealthGPT's forward pass by its formulas on the state dict: resized tables, then the files' tensors over them."""
    state = {k.removeprefix(P): t.float() for k, t in state.items()}
    dense = {}
    for name in (EMBED, HEAD):
        kept = params[name][: config.tokens]
        mean = kept.mean(0, keepdim=True).expand(config.added, -1)
        dense[name] = state.get(name, torch.cat([kept, mean]) if config.codes else params[name])

    class Routed(lazy.Lazy):
        _parts = ("base", "a", "b", "route")

        def linear(self, x, bias):
            gate = F.linear(x, self.route).softmax(-1).repeat_interleave(config.rank // 4, -1)
            h = F.linear(x, self.a) * (config.alpha / config.rank * 4)
            return F.linear(x, self.base, bias) + F.linear(gate * h, self.b)

    for name in [n for n in params if n.replace(".weight", ".lora_A.weight") in state]:
        module, w = name.removesuffix(".weight"), params[name]
        a, b, route = (state[f"{module}.{part}.weight"] for part in ("lora_A", "lora_B", "lora_route"))
        dense[name] = Routed.like(w.shape, w.dtype, w.device, base=w, a=a, b=b, route=route)
    rows = len(dense[EMBED])
    return skeletons.with_vocabulary(skeleton, rows)(params | dense, ids).logits


@pytest.mark.parametrize(("variant", "task"), CASES)
@pytest.mark.parametrize("tables", ["none", "fusion", "own"])
def test_a_plugin_acts_as_in_healthgpt(tmp_path, variant, task, tables):
    config, skeleton, params, state, held = small(variant, task)
    if tables != "none" and variant == "XL32":
        pytest.skip("its vocabulary is the base's")
    state = state | (held if tables == "own" else {})
    path, fusion = saved(tmp_path, plugin=state, fusion=held)
    if (task, tables) == ("draw", "none"):
        with pytest.raises(
            ValueError, match=r"one to draw must have rows or a head .* fusion_layer_weights.bin"
        ):
            read_published(path, config=config, skeleton=skeleton)
        return
    plugin, report = read_published(
        path, fusion if tables == "fusion" else None, config=config, skeleton=skeleton
    )
    assert report.endswith(
        {
            "none": "none, the base's are used",
            "fusion": "embed and head of fusion.bin",
            "own": "embed and head of plugin.bin",
        }[tables]
    )
    ours = applied(skeleton, params, plugin)
    ids = torch.tensor([[3, 59, 20, 4]] + ([[60, 61, 78, 7]] if config.codes else []))
    big = skeletons.with_vocabulary(skeleton, len(ours[EMBED]))
    got = big(ours, ids).logits
    want = reference(skeleton, params, state | (held if tables == "fusion" else {}), ids, config)
    assert got.shape[-1] == (config.vocabulary if config.codes else 64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    # The projector: Linear, GELU, Linear of the names mm_projector.0 and .2.
    z = torch.randn(2, 24)
    layer = lambda i, x: F.linear(
        x, *(state[f"{P}model.mm_projector.{i}.{k}"].float() for k in ("weight", "bias"))
    )
    torch.testing.assert_close(
        project(ProjectConfig(inputs=24, hidden=32, outputs=32), plugin.projector, z),
        layer(2, F.gelu(layer(0, z))),
    )


def test_the_base_is_shared_and_stays(tmp_path):
    """Four-bit, two plugins at once: what is held is the base once, and the plugins."""
    config, skeleton, params, state, held = small()
    path, fusion = saved(tmp_path, plugin=state, fusion=held)
    base = four_bit.quantize(params)
    before = skeletons.weights_digest(base)
    understand, _ = read_published(path, config=config, skeleton=skeleton)
    draw, _ = read_published(path, fusion, config=evolve(config, task="draw", level=1), skeleton=skeleton)
    both = [applied(skeleton, base, plugin) for plugin in (understand, draw)]
    assert skeletons.weights_digest(base) == before
    own = sum(t.nbytes for plugin in (understand, draw) for t in flatten(plugin.adapter.factors).values())
    own += sum(t.nbytes for t in draw.tables.values()) + 2 * 32 * 4  # a mean row for table and head
    together = {f"{i}{name}": w for i, params in enumerate(both) for name, w in params.items()}
    assert lazy.nbytes(together) == lazy.nbytes(base) + own


def test_a_published_file_is_converted_by_a_command(tmp_path, monkeypatch, capsys):
    config, skeleton, _, state, held = small("M3", "draw")
    path, fusion = saved(tmp_path, plugin=state, fusion=held)
    monkeypatch.setattr(plugins, "published_config", lambda variant, task: config)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(skeleton.config))
    given = {"variant": "M3", "task": "draw", "base": str(tmp_path / "base"), "out": str(tmp_path / "out")}
    plugins.convert("convert", str(path), str(fusion), **given)
    report = "H-LoRA of 8 layers (7,040 numbers), projector (1,856 numbers), token tables: embed and head of"
    assert f"to draw on microsoft/Phi-3-mini-4k-instruct: {report} fusion.bin" in capsys.readouterr().out
    plugin = read_plugin(tmp_path / "out", dtype=torch.float16)
    for part, name in (("embed", EMBED), ("head", HEAD)):
        assert torch.equal(plugin.tables[part], held[P + name])
    size = (tmp_path / "out/plugin.safetensors").stat().st_size
    assert size < 1.2 * (path.stat().st_size + fusion.stat().st_size)  # kept in the 16 bits of the files
    nowhere = {"base": str(tmp_path / "nothing"), "out": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=r"fusion.bin must hold H-LoRA layers, .* given as fusion"):
        plugins.convert("convert", str(fusion), "", **given | nowhere)
    with pytest.raises(ValueError, match="out is there already; give a new folder"):
        plugins.convert("convert", str(path), str(fusion), **given)
    with pytest.raises(ValueError, match="the action must be convert, got 'x'"):
        plugins.convert("x", str(path), "", **given)


def test_own_folders_come_back(tmp_path):
    config, skeleton, params, state, held = small("M3", "draw")
    path, fusion = saved(tmp_path, plugin=state, fusion=held)
    plugin, _ = read_published(path, fusion, config=config, skeleton=skeleton)
    rows = {part: table[-19:].clone() for part, table in plugin.tables.items()}
    for name, written in (("tables", plugin), ("rows", evolve(plugin, tables={}, rows=rows))):
        write_plugin(written, tmp_path / name)
        again = read_plugin(tmp_path / name)
        assert again.config == config
        check_base(again, skeleton, Tokenizer(60))
        for part in ("projector", "rows", "tables"):
            a, b = (flatten(getattr(p, part) or {}) for p in (written, again))
            assert a.keys() == b.keys()
            assert all(torch.equal(t, b[n]) for n, t in a.items())
        logits = [
            skeletons.with_vocabulary(skeleton, config.vocabulary)(
                applied(skeleton, params, p), torch.tensor([[3, 70]])
            ).logits
            for p in (written, again)
        ]
        assert torch.equal(*logits)
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == ["plugin.json", "plugin.safetensors"]
    record = json.loads((tmp_path / "rows/plugin.json").read_text())
    assert record == {
        "task": "draw",
        "level": 1,
        "rank": 8,
        "alpha": 16.0,
        "experts": 4,
        "base": "microsoft/Phi-3-mini-4k-instruct",
        "revision": "",
        "template": "phi3",
        "tokens": 60,
        "codes": 16,
        "bos": False,
    }


class Tokenizer:
    """As much of a tokenizer as the check of a base asks for."""

    bos_token_id = 1

    def __init__(self, size, bos=False):
        self.size, self.bos = size, bos

    def __len__(self):
        return self.size

    def __call__(self, text):
        return {"input_ids": [1, 5] if self.bos else [5]}


# What is refused ----------------------------------------------------------------------------------------------------------------------
def pop(*keys):
    return lambda s: [s.pop(P + key) for key in keys] and s


def put(**tensors):
    return lambda s: s | {P + k.replace("__", "."): t for k, t in tensors.items()}


DAMAGED = [
    (
        "a layer lacks its router",
        pop(f"{D}.lora_route.weight"),
        {},
        rf"missing {D}.lora_route.weight; choose",
    ),
    (
        "a layer is not there",
        pop(*(f"{D}.{part}.weight" for part in ("lora_route", "lora_A", "lora_B"))),
        {},
        rf"missing {D}.lora_route.weight, {D}.lora_A.weight, {D}.lora_B.weight; choose",
    ),
    (
        "no projector",
        pop(*(f"model.mm_projector.{k}" for k in ("0.weight", "0.bias", "2.weight", "2.bias"))),
        {},
        r"missing model.mm_projector.0.weight, .*, model.mm_projector.2.bias; choose",
    ),
    (
        "a key of plain LoRA",
        put(x__lora_A__default=torch.ones(1)),
        {},
        r"unexpected x.lora_A.default; choose",
    ),
    (
        "another shape",
        put(**{f"{D}.lora_A.weight": torch.ones(4, 48)}),
        {},
        rf"of another shape {D}.lora_A.weight \[4, 48\] instead of \[8, 48\]; choose",
    ),
    (
        "the rank of another plugin",
        lambda s: s,
        {"rank": 32},
        r"must hold weights to understand, of rank 32 .* for microsoft/Phi-3.*lora_A.weight \[8, 32\] instead of \[32, 32\]",
    ),
    (
        "a table without image codes",
        lambda s: s | {P + EMBED: torch.ones(64, 32)},
        {},
        r"model.embed_tokens.weight \[64, 32\] instead of \[79, 32\]",
    ),
    (
        "NaN",
        put(**{f"{D}.lora_B.weight": torch.full((32, 8), torch.nan)}),
        {},
        rf"{D}.lora_B.weight must be finite in float32, but holds NaN",
    ),
    (
        "the projector's NaN",
        put(**{"model.mm_projector.2.bias": torch.full((32,), torch.inf)}),
        {},
        r"mm_projector.2.bias must be finite",
    ),
    (
        "a fusion file alone",
        lambda s: {P + EMBED: torch.ones(79, 32), P + HEAD: torch.ones(79, 32)},
        {},
        r"must hold H-LoRA layers, found only .*embed_tokens.weight, .*lm_head.weight; .* given as fusion",
    ),
]


@pytest.mark.parametrize(("what", "change", "more", "message"), DAMAGED, ids=[d[0] for d in DAMAGED])
def test_damaged_files_are_refused_by_name(tmp_path, what, change, more, message):
    config, skeleton, _, state, _ = small()
    (path,) = saved(tmp_path, x=change(dict(state)))
    with pytest.raises(ValueError, match=message) as error:
        read_published(path, config=evolve(config, **more), skeleton=skeleton)
    assert str(path) in str(error.value)


def test_fusion_files_that_are_refused(tmp_path):
    config, skeleton, _, state, held = small()
    damaged = {
        "half": {P + EMBED: held[P + EMBED]},
        "more": held | {P + "model.norm.weight": torch.ones(32)},
        "old": {k: t[:64] for k, t in held.items()},
        "nan": held | {P + HEAD: torch.full((79, 32), torch.nan)},
    }
    path, *paths = saved(tmp_path, plugin=state, **damaged)
    messages = {
        "half": r"half.bin .*missing lm_head.weight; choose",
        "more": r"unexpected model.norm.weight",
        "old": r"lm_head.weight \[64, 32\] instead of \[79, 32\]",
        "nan": r"nan.bin: base_model.model.lm_head.weight must be finite",
    }
    for fusion, message in zip(paths, messages.values(), strict=True):
        with pytest.raises(ValueError, match=message):
            read_published(path, fusion, config=config, skeleton=skeleton)
    with pytest.raises(ValueError, match=r"gone.bin must be a .bin or .safetensors file, nothing is there"):
        read_published(tmp_path / "gone.bin", config=config, skeleton=skeleton)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"plugin.bin is not a file of plain tensors, or broken"):
        read_published(path, config=config, skeleton=skeleton)


def test_another_base_is_refused(tmp_path):
    config, skeleton, _, state, _ = small()
    (path,) = saved(tmp_path, x=state)
    other = skeletons.empty_skeleton(SMALL | {"num_hidden_layers": 3, "hidden_size": 64}, head="language")
    with pytest.raises(
        ValueError, match=r"missing model.layers.2.*of another shape model.layers.0.*instead of \[4, 64\]"
    ):
        read_published(path, config=config, skeleton=other)
    plugin, _ = read_published(path, config=config, skeleton=skeleton)
    tok = Tokenizer(60)
    check_base(plugin, skeleton, tok)
    check_base(plugin, skeleton, Tokenizer(79), base=config.base, template="phi3")
    check_base(plugin, skeleton, tok, base=str(tmp_path))  # a folder may have any name
    name = r"plugin to understand, trained on microsoft/Phi-3-mini-4k-instruct: "
    for change, message in (
        (
            {"skeleton": other},
            r"self_attn.o_proj has A \[8, 32\] and B \[32, 8\], but its weight is \[64, 64\]",
        ),
        ({"base": "microsoft/phi-4"}, r"the base must be that, found microsoft/phi-4; load it, or take"),
        ({"template": "phi4"}, r"with the template 'phi3', found 'phi4'; set chat.template = 'phi3'"),
        (
            {"tok": Tokenizer(61)},
            r"has 60 tokens \(79 with image codes\) and no start token .* found 61 and no",
        ),
        ({"tok": Tokenizer(60, bos=True)}, r"found 60 and a start token; take the tokenizer of the revision"),
        (
            {"skeleton": skeletons.with_vocabulary(skeleton, 59)},
            r"a token table of 60 rows or more, as wide as the plugin's projector and rows \[32\], found \[59, 32\]",
        ),
    ):
        with pytest.raises(ValueError, match=name + f".*{message}"):
            check_base(plugin, **({"skeleton": skeleton, "tok": tok} | change))


@pytest.mark.parametrize(("variant", "task"), CASES)
def test_records_come_back_from_json(variant, task):
    published = published_config(variant, task)
    again = json.loads(json.dumps(records.unstructure(published)))
    assert records.structure(again, PluginConfig) == published


def test_records_that_are_refused():
    for variant, task, message in (
        ("L14", "draw", "of L14 only the plugin for 'understand' was published, not 'draw'"),
        ("M4", "draw", "the variant must be one of M3, L14, XL32, got 'M4'"),
    ):
        with pytest.raises(ValueError, match=message):
            published_config(variant, task)
    with pytest.raises(ValueError, match=r"experts must divide it, got rank 30 and 4 experts"):
        evolve(published_config("M3", "understand"), rank=30)
    with pytest.raises(ValueError, match="rank, alpha and tokens must be positive"):
        evolve(published_config("M3", "understand"), alpha=0.0)


def test_plugins_that_are_not_written(tmp_path):
    config, skeleton, _, state, held = small()
    path, fusion = saved(tmp_path, x=state, fusion=held)
    plugin, _ = read_published(path, fusion, config=config, skeleton=skeleton)
    adapter, factors = plugin.adapter, plugin.adapter.factors
    wrong = [
        (
            {"config": evolve(config, alpha=32.0)},
            r"linear layers with the record\'s scale 16.0, .* of linear layers with scale 8.0",
        ),
        (
            {"config": evolve(config, experts=0, alpha=64.0)},
            r"rank 8 with 0 experts, .*: unexpected adapter/.*/router",
        ),
        ({"adapter": evolve(adapter, factors={})}, "missing adapter/LAYER/a, adapter/LAYER/b"),
        ({"adapter": evolve(adapter, gate={D: torch.ones(8)})}, "must be of linear layers .*, without gates"),
        (
            {
                "adapter": evolve(
                    adapter, factors=factors | {D: factors[D] | {"b": torch.full((32, 8), torch.nan)}}
                )
            },
            rf"{D}/b must be finite",
        ),
        (
            {"projector": {"up": plugin.projector["up"]}},
            "must hold a projector, .*: missing projector/down/weight, projector/down/bias",
        ),
        (
            {"tables": {"embed": torch.ones(60, 32)}},
            r"of another shape tables/embed \[60, 32\] instead of \[79, \'any\'\]",
        ),
        ({"rows": {"embed": torch.ones(19, 32)}, "tables": {}}, "missing rows/head"),
        (
            {"rows": {part: torch.ones(19, 32) for part in ("embed", "head")}},
            "unexpected tables/embed, tables/head",
        ),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            write_plugin(evolve(plugin, **change), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    write_plugin(plugin, tmp_path / "new")
    with pytest.raises(ValueError, match=r"new is there already; give a new folder or remove it"):
        write_plugin(plugin, tmp_path / "new")


def test_folders_that_are_not_read(tmp_path):
    config, skeleton, _, state, _ = small()
    (path,) = saved(tmp_path, x=state)
    plugin, _ = read_published(path, config=config, skeleton=skeleton)
    write_plugin(plugin, tmp_path / "p")
    record = json.loads((tmp_path / "p/plugin.json").read_text())
    for change, message in (
        ({"rank": "8"}, r"plugin.json: .*rank"),
        ({"rnak": 8}, r"plugin.json: .*rnak"),
        ({"task": "paint"}, r"plugin.json: .*task"),
        ({"rank": 4, "alpha": 8.0}, r"of rank 4 with 4 experts, .* of another shape adapter/"),
        ({"codes": 8192}, None),
    ):
        (tmp_path / "p/plugin.json").write_text(json.dumps(record | change))
        if message is None:
            read_plugin(tmp_path / "p")
            continue
        with pytest.raises(ValueError, match=message):
            read_plugin(tmp_path / "p")
    weights = tmp_path / "p/plugin.safetensors"
    (tmp_path / "p/plugin.json").write_text(json.dumps(record))
    tensors = load_file(weights)
    wrong = {"adapter/x": torch.ones(1), "rows": torch.ones(1), "tables/lm_head": torch.ones(1)}
    for name, tensor in wrong.items():
        save_file(tensors | {name: tensor}, weights)
        with pytest.raises(ValueError, match=rf"plugin.safetensors: must hold .* unexpected {name}$"):
            read_plugin(tmp_path / "p")
    save_file({key: t for key, t in tensors.items() if key != f"adapter/{D}/router"}, weights)
    with pytest.raises(ValueError, match=rf"missing adapter/{D}/router$"):
        read_plugin(tmp_path / "p")
    save_file({key: t for key, t in tensors.items() if "projector" not in key}, weights)
    with pytest.raises(ValueError, match=r"missing projector/up/weight"):
        read_plugin(tmp_path / "p")
    save_file(tensors, weights)
    read_plugin(tmp_path / "p")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"plugin.safetensors is broken or cut off"):
        read_plugin(tmp_path / "p")
    weights.with_name("plugin.json").unlink()
    with pytest.raises(ValueError, match=r"must hold plugin.json, found plugin.safetensors"):
        read_plugin(tmp_path / "p")


def test_the_real_phi3_tokenizer_is_that_of_m3(shared_data):
    _, skeleton, *_ = small()
    tok = tokens.tokenizer(shared_data / "tokenizers/phi-3-mini")
    real = published_config("M3", "understand")
    big = skeletons.with_vocabulary(skeleton, 32064)
    plugin = Plugin(
        config=real,
        projector={"up": {}, "down": {"bias": torch.ones(32)}},
        adapter=lora.Adapter(factors={}, scale={}, kinds={}),
    )
    check_base(plugin, big, tok)
    tokens.add_image_codes(tok)
    check_base(plugin, big, tok)
    assert len(tok) == real.vocabulary
