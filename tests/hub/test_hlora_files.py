"""hlora_files: the peers are the published files' key names and shapes, and the formula of the paper."""

from functools import cache

import pytest
import torch
from attrs import evolve

from medvl.hub import hlora_files, skeletons
from medvl.hub.checkpoints import Entry
from medvl.hub.hlora_files import read_hlora, write_hlora
from medvl.weights import lora
from medvl.weights.lora import Adapter, LoraConfig, apply_lora

P = "base_model.model."
PHI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
PHI |= {"num_key_value_heads": 32, "vocab_size": 64, "pad_token_id": 0}
PHI4 = PHI | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
}
QWEN |= {"num_key_value_heads": 8, "vocab_size": 64}
SMALL = PHI | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2}
PUBLISHED = [  # base, total rank, (tensors, numbers of H-LoRA, with the projector), shapes of a layer's fused or first projections
    (
        "m3-com",
        PHI,
        64,
        (384, 102_891_520, 115_480_576),
        {"self_attn.qkv_proj": (3072, 9216), "mlp.gate_up_proj": (3072, 16384)},
    ),
    (
        "m3-gen",
        PHI,
        256,
        (384, 404_881_408, 417_470_464),
        {"self_attn.o_proj": (3072, 3072), "mlp.down_proj": (8192, 3072)},
    ),
    (
        "l14-com",
        PHI4,
        32,
        (480, 116_736_000, 148_203_520),
        {"self_attn.qkv_proj": (5120, 7680), "mlp.gate_up_proj": (5120, 35840)},
    ),
    (
        "xl32-com",
        QWEN,
        32,
        (1344, 283_377_664, 314_845_184),
        {"self_attn.k_proj": (5120, 1024), "mlp.down_proj": (27648, 5120)},
    ),
]


@pytest.mark.parametrize(
    ("name", "config", "rank", "sizes", "shapes"), PUBLISHED, ids=[p[0] for p in PUBLISHED]
)
def test_key_names_and_shapes_of_the_published_files(tmp_path, name, config, rank, sizes, shapes):
    """Of full size, without memory: written from the meta device, read as one number that is everywhere."""
    skeleton, width = skeletons.empty_skeleton(config, head="language"), config["hidden_size"]
    factors = {}
    for m in lora.target_layers(LoraConfig(pattern="all-linear", experts=4), skeleton):
        out, into = skeleton.module.get_parameter(f"{m}.weight").shape
        meta = lambda *shape: torch.empty(*shape, device="meta")
        factors[m] = {"a": meta(rank, into), "b": meta(out, rank), "router": meta(4, into)}
    adapter = Adapter(
        factors=factors, scale=dict.fromkeys(factors, 8.0), kinds=dict.fromkeys(factors, "linear")
    )
    projector = {
        "0.weight": (width, 1024),
        "0.bias": (width,),
        "2.weight": (width, width),
        "2.bias": (width,),
    }
    rest = {f"model.mm_projector.{k}": torch.empty(shape, device="meta") for k, shape in projector.items()}
    state = hlora_files._hlora_state(adapter, rest)
    assert hlora_files.hlora_shapes(skeleton, rank, 4) == {
        k.removeprefix(P): t.shape for k, t in state.items() if "lora" in k
    }
    plain = {k: t for k, t in state.items() if "mm_projector" not in k}
    assert (
        len(plain),
        sum(t.numel() for t in plain.values()),
        sum(t.numel() for t in state.values()),
    ) == sizes
    for m, (into, out) in shapes.items():
        layer = f"{P}model.layers.{config['num_hidden_layers'] - 1}.{m}"
        found = [tuple(state[f"{layer}.{part}.weight"].shape) for part in ("lora_route", "lora_A", "lora_B")]
        assert found == [(4, into), (rank, into), (out, rank)]
    entry = lambda t: Entry(
        shape=tuple(t.shape),
        dtype=torch.bfloat16,
        read=lambda: torch.ones((), dtype=torch.bfloat16).expand(t.shape),
    )
    held = {k: entry(t) for k, t in state.items()}
    read, others = hlora_files.read_entries(
        held, tmp_path / "x.bin", rank, 2 * rank, 4, torch.bfloat16, "cpu"
    )
    assert {m: {k: t.shape for k, t in f.items()} for m, f in read.factors.items()} == {
        m: {k: t.shape for k, t in f.items()} for m, f in factors.items()
    }
    assert set(read.scale.values()) == {8.0}
    assert {n: t.shape for n, t in others.items()} == {n: t.shape for n, t in rest.items()}


@cache
def routed():
    """(skeleton, params, H-LoRA adapter, rest) of a small Phi-3."""
    gen = torch.Generator().manual_seed(5)
    skeleton, params = skeletons.init_skeleton(SMALL, gen, head="language")
    adapter = lora.init_lora(LoraConfig(pattern="all-linear", rank=8, alpha=16, experts=4), skeleton, gen)
    factors = {
        m: {k: 0.3 * torch.randn(t.shape, generator=gen) for k, t in f.items()}
        for m, f in adapter.factors.items()
    }
    rest = {
        "model.mm_projector.0.weight": torch.randn(32, 8, generator=gen),
        "model.mm_projector.0.bias": torch.randn(32, generator=gen),
    }
    return (
        skeleton,
        params,
        evolve(adapter, factors=factors),
        rest | {"lm_head.weight": torch.randn(64, 32, generator=gen)},
    )


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_hlora_comes_back(tmp_path, ending):
    skeleton, params, adapter, rest = routed()
    write_hlora(adapter, tmp_path / f"x.{ending}", rest)
    again, others = read_hlora(tmp_path / f"x.{ending}", rank=8, alpha=16, skeleton=skeleton)
    assert (again.factors.keys(), again.scale, again.kinds) == (
        adapter.factors.keys(),
        adapter.scale,
        adapter.kinds,
    )
    assert all(torch.equal(t, again.factors[m][k]) for m, f in adapter.factors.items() for k, t in f.items())
    assert others.keys() == rest.keys()
    assert all(torch.equal(t, rest[n]) for n, t in others.items())
    ids = torch.tensor([[3, 9, 4]])
    with torch.no_grad():
        want, got, plain = (
            skeleton(p, ids).logits for p in (apply_lora(params, adapter), apply_lora(params, again), params)
        )
    assert torch.equal(want, got)
    assert (got - plain).abs().max() > 0.05
    assert (
        read_hlora(tmp_path / f"x.{ending}", rank=8, alpha=16, dtype=torch.float16)[1]["lm_head.weight"].dtype
        == torch.float16
    )


def test_one_layer_of_hlora_equals_the_formula(tmp_path):
    """y = x W^T + ((x A^T) alpha / r n * g) B^T, each gate repeated over its expert's ranks."""
    _, params, adapter, _ = routed()
    name = "model.layers.1.mlp.down_proj"
    write_hlora(adapter, tmp_path / "x.bin")
    state = torch.load(tmp_path / "x.bin", weights_only=True)
    route, a, b = (state[f"{P}{name}.{part}.weight"] for part in ("lora_route", "lora_A", "lora_B"))
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(6))
    gates = (x @ route.T).softmax(-1)
    want = x @ params[f"{name}.weight"].T
    for i in range(4):
        mine = slice(2 * i, 2 * i + 2)
        want = want + gates[..., i, None] * (16 / 8 * 4) * (x @ a[mine].T) @ b[:, mine].T
    adapted = apply_lora(params, read_hlora(tmp_path / "x.bin", rank=8, alpha=16)[0])
    torch.testing.assert_close(torch.nn.functional.linear(x, adapted[f"{name}.weight"]), want)


D = "model.layers.1.mlp.down_proj"
HLORA = [
    (lambda s: s.pop(f"{P}{D}.lora_route.weight"), {}, f"missing {D}.lora_route.weight$"),
    (
        lambda s: [s.pop(f"{P}{D}.{k}.weight") for k in ("lora_A", "lora_B")],
        {},
        f"missing {D}.lora_A.weight, {D}.lora_B.weight$",
    ),
    (
        lambda s: [s.pop(f"{P}{D}.{k}.weight") for k in ("lora_A", "lora_B", "lora_route")],
        {},
        f"missing {D}.lora_route.weight, {D}.lora_A.weight, {D}.lora_B.weight$",
    ),
    (
        lambda s: {k.replace("layers.1", "layers.2"): t for k, t in s.items()},
        {},
        "missing model.layers.1.* unexpected model.layers.2",
    ),
    (
        lambda s: s.update({f"{P}{D}.lora_A0.weight": torch.ones(2, 48)}),
        {},
        f"found unexpected {P}{D}.lora_A0.weight",
    ),
    (lambda s: s.update({"lm_head.weight": torch.ones(64, 32)}), {}, "found unexpected lm_head.weight"),
    (lambda s: {f"{P}lm_head.weight": torch.ones(64, 32)}, {}, "found no layers, only lm_head.weight"),
    (
        lambda s: None,
        {"rank": 4},
        r"must hold layers of rank 4 and 4 experts for .*lora_A.weight \[8, 32\] instead of \[4, 32\]",
    ),
    (lambda s: None, {"experts": 2}, r"2 experts for .*lora_route.weight \[4, 32\] instead of \[2, 32\]"),
    (
        lambda s: None,
        {"rank": 6},
        "experts must divide the rank of all of them together, got rank 6 and 4 experts",
    ),
    (
        lambda s: s.update({f"{P}{D}.lora_B.weight": torch.ones(31, 8)}),
        {},
        rf"of another shape {D}.lora_B.weight \[31, 8\] instead of \[32, 8\]",
    ),
    (
        lambda s: s.update({f"{P}{D}.lora_B.weight": torch.full((32, 8), torch.inf)}),
        {},
        f"{D}.lora_B.weight must be finite",
    ),
]


@pytest.mark.parametrize(("change", "more", "message"), HLORA, ids=[m[:30] for _, _, m in HLORA])
def test_hlora_files_that_are_refused(tmp_path, change, more, message):
    skeleton, _, adapter, _ = routed()
    write_hlora(adapter, tmp_path / "x.bin")
    state = torch.load(tmp_path / "x.bin")
    torch.save(new if isinstance(new := change(state), dict) else state, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=message):
        read_hlora(tmp_path / "x.bin", **{"rank": 8, "alpha": 16, "skeleton": skeleton} | more)


def test_hlora_paths_and_adapters_that_are_refused(tmp_path, gen):
    skeleton, _, adapter, _ = routed()
    with pytest.raises(ValueError, match=r"must be a .bin or .safetensors file, nothing is there"):
        read_hlora(tmp_path / "x.bin", rank=8, alpha=16)
    (tmp_path / "x.bin").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"x.bin is not a file of plain tensors, or broken"):
        read_hlora(tmp_path / "x.bin", rank=8, alpha=16)
    with pytest.raises(ValueError, match=r"must end in .bin or .safetensors, got x.pt"):
        write_hlora(adapter, tmp_path / "x.pt")
    for wrong, message in (
        (
            lora.init_lora(LoraConfig(targets=("down_proj",)), skeleton, gen),
            f"must be linear and have a router, not so .*{D}.*use write_adapter",
        ),
        (evolve(adapter, factors={}), "not so none"),
        (
            evolve(adapter, scale=adapter.scale | {D: 1.0}),
            r"one rank, number of experts and scale, got \(8, 4, 1.0\), \(8, 4, 8.0\)",
        ),
        (evolve(adapter, gate={D: torch.ones(2, 8)}), "differs by sample"),
    ):
        with pytest.raises(ValueError, match=message):
            write_hlora(wrong, tmp_path / "new.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
