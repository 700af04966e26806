"""Files with the reference's names: read, written, refused."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medvl.base import tree
from medvl.components.compress import CompressConfig, compress, init_compress
from medvl.components.project import ProjectConfig, init_project, project
from medvl.slides.reference_files import read_compressor, read_projector, write_compressor

CFG = CompressConfig(dim=12, slots=3, hidden=5)


def _expert(d, hidden):
    module = nn.Module()
    module.net = nn.Sequential(
        nn.Linear(d, hidden), nn.GELU(), nn.Dropout(0.25), nn.Linear(hidden, d), nn.LayerNorm(d)
    )
    return module


@pytest.fixture
def reference(gen):
    """A compressor as a module with the reference's names."""
    module = nn.Module()
    module.gate, module.experts = nn.Linear(12, 3), nn.ModuleList(_expert(12, 5) for _ in range(3))
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=gen)
    return module.eval()


@pytest.fixture
def state(reference):
    return reference.state_dict()


def _naive(module, x):
    value, index = module.gate(x).softmax(-1).topk(2, -1)
    weights = [(value * (index == i)).sum(-1) for i in range(3)]
    means = [w @ x / (w.sum() + 1e-9) for w in weights]
    return torch.stack([c + expert.net(c) for c, expert in zip(means, module.experts, strict=True)])


def test_plain_file(reference, state, gen, tmp_path):
    torch.save(state, tmp_path / "moe_compressor.pt")
    save_file(state, tmp_path / "moe.safetensors")
    x = torch.randn(40, 12, generator=gen)
    for name in ("moe_compressor.pt", "moe.safetensors"):
        cfg, params, rest = read_compressor(tmp_path / name)
        assert (cfg, rest) == (CFG, {})
        torch.testing.assert_close(compress(cfg, params, x[None]).tokens[0], _naive(reference, x))
        want, got = (tree.map_leaves(lambda t: t.shape, p) for p in (init_compress(cfg, gen), params))
        assert got == want


def test_checkpoint_of_pretraining(reference, state, gen, tmp_path):
    other = {"classifier.weight": torch.randn(9, 12, generator=gen), "classifier.steps": torch.tensor(3)}
    nested = {f"compressor.{k}": t for k, t in state.items()} | other
    torch.save({"model_state_dict": nested, "epoch": 3, "optimizer": {"lr": 1e-4}}, tmp_path / "best.pth")
    cfg, params, rest = read_compressor(tmp_path / "best.pth", top_k=1)
    assert (cfg.top_k, cfg.slots, cfg.dim, cfg.hidden) == (1, 3, 12, 5)
    assert rest.keys() == other.keys()
    assert all(torch.equal(rest[k], t) for k, t in other.items())
    write_compressor(params, tmp_path / "again.pth", others=rest)
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model_state_dict"]
    assert again.keys() == nested.keys()
    assert all(torch.equal(again[k], t) for k, t in nested.items())


@pytest.mark.parametrize("name", ["c.pt", "c.bin", "c.safetensors"])
def test_what_is_written_is_what_the_reference_reads(reference, state, gen, tmp_path, name):
    write_compressor(read_compressor_of(state, tmp_path), tmp_path / name)
    written = (
        load_file(tmp_path / name)
        if name.endswith("safetensors")
        else torch.load(tmp_path / name, weights_only=True)
    )
    for p in reference.parameters():
        p.data.zero_()
    reference.load_state_dict(written)
    assert all(torch.equal(written[k], t) for k, t in state.items())
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def read_compressor_of(state, tmp_path):
    torch.save({k: t.clone() for k, t in state.items()}, tmp_path / "in.pt")
    return read_compressor(tmp_path / "in.pt")[1]


def test_dtype_and_file_size(state, gen, tmp_path):
    params = init_compress(CFG, gen)
    write_compressor(params, tmp_path / "c.pt")
    assert (tmp_path / "c.pt").stat().st_size < 4 * tree.count_values(
        params
    ) + 12_000  # views of stacked experts are not saved whole
    _, half, _ = read_compressor(tmp_path / "c.pt", dtype=torch.bfloat16)
    assert {t.dtype for t in tree.flatten(half).values()} == {torch.bfloat16}


def _broken(state, **changes):
    return {
        k: t
        for k, t in (state | {k.replace("__", "."): t for k, t in changes.items()}).items()
        if t is not None
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate__bias": None}, r"must hold 3 experts: missing gate.bias$"),
        (
            {"experts__1__net__3__bias": None, "experts__2__net__4__weight": None},
            r"missing experts.1.net.3.bias, experts.2.net.4.weight",
        ),
        (
            {"experts__3__net__0__bias": torch.zeros(5)},
            r"must hold 3 experts: unexpected experts.3.net.0.bias",
        ),
        ({"experts__0__net__1__weight": torch.zeros(5)}, r"unexpected experts.0.net.1.weight"),
        ({"classifier__weight": torch.zeros(5)}, r"unexpected classifier.weight"),
        ({"gate__weight": None}, r"missing gate.weight"),
        ({"gate__weight": torch.zeros(3)}, r"gate.weight must be \[slots, dim\]"),
        ({"gate__bias": torch.zeros(4)}, r"gate.bias \[4\] instead of \[3\]"),
        (
            {"experts__2__net__0__weight": torch.zeros(6, 12)},
            r"experts.2.net.0.weight \[6, 12\] instead of \[5, 12\]",
        ),
        ({"gate__bias": torch.tensor([0.0, torch.nan, 0.0])}, r"gate.bias must be finite"),
        ({"gate__bias": torch.zeros(3, dtype=torch.int64)}, r"gate.bias must hold floating point"),
    ],
)
def test_files_that_do_not_fit(state, changes, message, tmp_path):
    torch.save(_broken(state, **changes), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        read_compressor(tmp_path / "c.pt")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def test_other_files(state, gen, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_compressor(tmp_path / "no.pt")
    with pytest.raises(ValueError, match=r"must end in .pt, .pth, .bin, .safetensors, got c.npy"):
        read_compressor(tmp_path / "c.npy")
    for name, content in [
        ("bomb.pt", pickle.dumps({"gate.weight": Bomb()}, 2)),
        ("cut.pt", b"PK\x03\x04abc"),
        ("empty.pt", b""),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a file of plain tensors, or broken"):
            read_compressor(tmp_path / name)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dict of tensors"):
        read_compressor(tmp_path / "list.pt")
    torch.save({"w": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "repeated.pt")
    with pytest.raises(ValueError, match=r"w must be \[1048576, 1048576\] numbers of their own"):
        read_compressor(tmp_path / "repeated.pt")
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"top_k lie in 1\.\.slots"):
        read_compressor(tmp_path / "c.pt", top_k=4)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model_state_dict": s}])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_as_wrappers_write_them(state, tmp_path, prefix, wrap):
    torch.save(state, tmp_path / "plain.pt")
    torch.save(wrap({prefix + k: t for k, t in state.items()}), tmp_path / "c.pt")
    plain, found = (tree.flatten(read_compressor(tmp_path / f"{n}.pt")[1]) for n in ("plain", "c"))
    assert all(torch.equal(t, found[n]) for n, t in plain.items())


def test_a_checkpoint_with_numpy_metrics_says_how_to_read_it(state, tmp_path):
    torch.save({"model_state_dict": state, "best_auc": np.float64(0.9)}, tmp_path / "best.pt")
    with pytest.raises(
        ValueError, match=r"best.pt holds NumPy numbers beside its weights, such as metrics.*best_weights.pt"
    ) as e:
        read_compressor(tmp_path / "best.pt")
    exec(str(e.value).split('python -c "')[1].rstrip('"'))
    read_compressor(tmp_path / "best_weights.pt")


def test_what_cannot_be_written(gen, tmp_path):
    params = init_compress(CFG, gen)
    with pytest.raises(ValueError, match=r"must end in .pt, .pth, .bin, got c.safetensors"):
        write_compressor(params, tmp_path / "c.safetensors", others={})
    with pytest.raises(
        ValueError, match="must be those of kind moe, gate and experts, got mu, scale, experts"
    ):
        write_compressor(
            init_compress(CompressConfig(kind="soft_moe", dim=4, slots=2, hidden=3), gen), tmp_path / "c.pt"
        )
    with pytest.raises(ValueError, match=r"must not begin with compressor\., got compressor.gate.weight"):
        write_compressor(params, tmp_path / "c.pt", others={"compressor.gate.weight": torch.zeros(1)})
    params["gate"]["bias"][1] = torch.inf
    with pytest.raises(ValueError, match=r"gate.bias must be finite"):
        write_compressor(params, tmp_path / "c.pt")
    assert not list(tmp_path.iterdir())


# The projector --------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["projector.pt", "projector.safetensors"])
def test_projector(gen, tmp_path, name):
    peer = nn.Module()
    peer.proj = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4))
    save = save_file if name.endswith("safetensors") else torch.save
    save(peer.state_dict(), tmp_path / name)
    cfg, params = read_projector(tmp_path / name)
    assert cfg == ProjectConfig(inputs=6, hidden=9, outputs=4)
    z = torch.randn(3, 6, generator=gen)
    torch.testing.assert_close(project(cfg, params, z), peer.proj(z))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proj__2__bias": None}, r"must hold proj.0 and proj.2: missing proj.2.bias$"),
        ({"proj__4__bias": torch.zeros(2)}, r"proj.2: unexpected proj.4.bias"),
        ({"proj__2__weight": torch.zeros(4, 8)}, r"proj.2.weight \[4, 8\] instead of \[4, 9\]"),
        ({"proj__0__bias": torch.zeros(8)}, r"proj.0.bias \[8\] instead of \[9\]"),
        ({"proj__0__weight": torch.zeros(8)}, r"proj.0.weight \[8\] instead of \['any', 'any'\]"),
    ],
)
def test_projectors_that_do_not_fit(gen, changes, message, tmp_path):
    params = init_project(ProjectConfig(inputs=6, hidden=9, outputs=4), gen)
    state = {
        f"proj.{i}.{kind}": params[n][kind]
        for i, n in ((0, "up"), (2, "down"))
        for kind in ("weight", "bias")
    }
    torch.save(_broken(state, **changes), tmp_path / "p.pt")
    with pytest.raises(ValueError, match=message):
        read_projector(tmp_path / "p.pt")
