"""Two processes with sharded weights against one with the whole batch: gradients, steps, memory, files."""

import pytest
import torch
import torch.distributed as dist

from medvl.base import processes
from medvl.base.tree import flatten
from medvl.hub import skeletons
from medvl.training import gradients, loop, states
from medvl.training.muon import muon
from medvl.training.optim import Rate, adamw, clip_gradients, with_master
from medvl.weights import lazy as weights
from medvl.weights import shards
from medvl.weights.four_bit import eight_bit_moments
from tests.tiny import TEXT
from tests.together import run_together

CONFIG = {"model_type": "qwen3", **TEXT, "hidden_size": 40, "head_dim": 8, "tie_word_embeddings": True}
LEAST = 1024  # values: the projections to keys and values stay whole
CLIP = 0.5  # less than every gradient's norm


def model(dtype=torch.float64):
    skeleton, params = skeletons.init_skeleton(CONFIG, torch.Generator().manual_seed(0), head="language")
    return skeletons.checkpointed(skeleton), {n: t.to(dtype) for n, t in params.items()}


def batch_at(step):
    gen = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 160, (4, 12), generator=gen)
    return {
        "ids": ids,
        "labels": torch.where(torch.arange(12) < torch.tensor([2, 12, 5, 9])[:, None], ids, -100),
    }


def loss_sum(skeleton):
    def run(p, batch):
        logits = skeleton(shards.lazy_shards(p), input_ids=batch["ids"], use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return total, (labels >= 0).sum(), gradients.Aux()

    return run


def mean_loss(skeleton):
    def run(p, batch):
        out = skeleton(shards.lazy_shards(p), input_ids=batch["ids"], labels=batch["ids"], use_cache=False)
        return out.loss, gradients.Aux()

    return run


def optimizer():
    return adamw(lambda n: Rate(lr=1e-3, weight_decay=0.1))


def run(folder, steps, mesh=None, stop=None, rows=slice(None), grad=None, ours=None, dtype=torch.float64):
    """Train a tiny language model; the state at the end."""
    skeleton, params = model(dtype)
    leaves = shards.shard_params(params, mesh, least=LEAST)
    ours = ours or optimizer()
    state = states.State(params=leaves, opt=ours.init(leaves))
    grad = grad(skeleton) if grad else gradients.token_value_and_grad(loss_sum(skeleton), chunk=1)

    def batches(i):
        if i == stop:
            raise KeyboardInterrupt
        return {k: v[rows] for k, v in batch_at(i).items()}

    step = loop.make_step(grad, ours, clip=CLIP)
    return loop.train_steps(step, state, batches, steps=steps, folder=folder, every=loop.Every(log=1, save=1))


def two_train(out):
    """What each of two processes does that share weights and batch."""
    rank = processes.rank()
    mesh, rows = shards.process_mesh(), slice(rank * 2, rank * 2 + 2)
    known = {}

    state = run(out / "tokens", 5, mesh, rows=rows)
    run(out / "mean", 3, mesh, rows=rows, grad=lambda s: gradients.value_and_grad(mean_loss(s)))
    known["held"] = {
        k: weights.nbytes(flatten(tree)) for k, tree in (("params", state.params), ("opt", state.opt))
    }
    known["kinds"] = {n: type(x).__name__ for n, x in state.params.items()}

    with pytest.raises(KeyboardInterrupt):
        run(out / "cut", 5, mesh, rows=rows, stop=3)
    dist.barrier()
    run(out / "cut", 5, mesh, rows=rows)  # goes on at step 3
    run(out / "alone", 5, mesh, rows=rows)  # goes on from what one process wrote

    for name, ours in (
        ("stochastic", adamw(lambda n: Rate(lr=1e-4), rounding="stochastic")),
        ("master", with_master(optimizer())),
    ):
        half = run(out / name, 2, mesh, rows=rows, ours=ours, dtype=torch.bfloat16)
        small = torch.cat([x.flatten() for x in half.params.values() if not shards.is_shard(x)]).float()
        other = small.clone()
        dist.broadcast(other, 0)
        known[name] = bool(torch.equal(small, other))  # what every process holds must stay alike

    def refused(call):
        try:
            call()
        except ValueError as e:
            return str(e)

    odd = {"w": torch.arange(21.0).view(7, 3), "b": torch.arange(3.0)}
    cut = shards.shard_params(odd, mesh, least=1)
    clipped = dict(cut)
    known["odd"] = [list(cut["w"].to_local().shape), clip_gradients(clipped, 1.0)]
    known["clipped"] = shards.gather_shards(clipped)
    known["back"] = shards.gather_shards(shards.place_like(odd, cut))
    known["muon"] = refused(lambda: muon(lambda n: Rate(lr=1)).init({"w": cut["w"]}))
    known["packed"] = refused(lambda: adamw(lambda n: Rate(lr=1), packing=eight_bit_moments()).init(cut))
    unequal = gradients.token_value_and_grad(None, chunk=1)
    known["unequal"] = refused(lambda: unequal(cut, {"x": torch.zeros(2 + rank)}))
    known["nothing"] = refused(lambda: shards.shard_params(odd, mesh))
    torch.save(known, out / f"known{rank}.pt")
    processes.wait_for_all()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process leaves that has the whole batch."""
    out = tmp_path_factory.mktemp("one")
    run(out / "tokens", 5)
    run(out / "mean", 3, grad=lambda s: gradients.value_and_grad(mean_loss(s)))
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes leave that share weights and batch."""
    out = tmp_path_factory.mktemp("two")
    with pytest.raises(KeyboardInterrupt):
        run(out / "alone", 5, stop=2)
    run_together(__name__, "two_train", out, 2)
    return out


def _worst(a, b, of="params"):
    a, b = (flatten(getattr(states.read_state(x / "last.pt"), of)) for x in (a, b))
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def _known(two, rank=0):
    return torch.load(two / f"known{rank}.pt", weights_only=True)


@pytest.mark.parametrize("loss", ["tokens", "mean"])
def test_steps_of_two_processes_are_those_of_one(one, two, loss):
    """Adam's first steps are the gradient's sign, so a wrong factor shows only in the moments and through the clipped norm."""
    assert _worst(one / loss, two / loss) < 1e-9
    assert _worst(one / loss, two / loss, "opt") < 1e-9
    start = model()[1]
    moved = states.read_state(two / loss / "last.pt").params
    assert min((moved[n] - start[n]).abs().max() for n in start) > 1e-3
    lines = [(x / loss / "metrics.jsonl").read_text().splitlines()[0] for x in (one, two)]
    norms = [float(line.split('"grad_norm": ')[1].split(",")[0].rstrip("}")) for line in lines]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert norms[0] > CLIP


def test_each_process_holds_half(one, two):
    params = model()[1]
    small = sum(t.nbytes for t in params.values() if t.dim() < 2 or t.numel() < LEAST)
    whole = sum(t.nbytes for t in params.values())
    for rank in range(2):
        held = _known(two, rank)["held"]
        assert held == {"params": small + (whole - small) // 2, "opt": 2 * (small + (whole - small) // 2)}
        assert held["params"] < 0.6 * whole
    kinds = _known(two)["kinds"]
    assert {n for n, k in kinds.items() if k == "DTensor"} == {
        n for n, t in params.items() if t.dim() == 2 and t.numel() >= LEAST
    }


def test_a_resumed_pair_ends_in_the_same_bits(two):
    assert _worst(two / "tokens", two / "cut") == 0
    assert _worst(two / "tokens", two / "cut", "opt") == 0


def test_another_number_of_processes_goes_on(one, two, tmp_path):
    assert _worst(one / "tokens", two / "alone") < 1e-9  # one process, then two
    assert len((two / "alone/metrics.jsonl").read_text().splitlines()) == 5
    state = run(two / "cut", 7)  # two processes, then one
    assert _worst(run_folder(one, state, tmp_path), two / "cut") < 1e-9


def run_folder(one, state, tmp_path):
    run(tmp_path / "seven", state.step)
    return tmp_path / "seven"


@pytest.mark.parametrize("kind", ["stochastic", "master"])
def test_whole_leaves_stay_alike_on_all_processes(two, kind):
    assert _known(two)[kind] is True
    assert _known(two, 1)[kind] is True
    assert {t.dtype for t in states.read_state(two / kind / "last.pt").params.values()} == {torch.bfloat16}


def test_rows_that_do_not_divide_are_cut_gathered_and_clipped(two):
    w, b = torch.arange(21.0).view(7, 3), torch.arange(3.0)
    norm = torch.cat([w.flatten(), b]).norm()
    assert [_known(two, r)["odd"][0] for r in range(2)] == [[4, 3], [3, 3]]
    for r in range(2):
        torch.testing.assert_close(_known(two, r)["odd"][1], norm)
    torch.testing.assert_close(_known(two)["clipped"], {"w": w / norm, "b": b / norm})
    assert torch.equal(_known(two)["back"]["w"], w)
    assert _known(two, 1)["back"].keys() == {"b"}


def test_errors_of_shards_say_what_to_do(two):
    known = _known(two)
    assert known["muon"] == "muon: needs whole matrices, 1 are sharded, e.g. w; leave them to adamw"
    assert (
        known["packed"]
        == "adamw: 8-bit moments need whole parameters, 1 are sharded, e.g. w; leave packing out"
    )
    assert "every process needs as many micro-batches, got [2, 3]" in known["unequal"]
    assert (
        known["nothing"]
        == "shard_params: none of 2 parameters is a plain matrix of at least 16384 values that a pattern matches"
    )


def test_one_process_needs_no_group(gen):
    assert not dist.is_initialized()
    assert shards.process_mesh() is None
    params = {"a": {"w": torch.randn(200, 100, generator=gen)}, "b": torch.randn(3, generator=gen)}
    leaves = shards.shard_params(params, shards.process_mesh())
    assert leaves["a"]["w"] is params["a"]["w"]
    assert shards.lazy_shards(leaves)["a"]["w"] is params["a"]["w"]
    assert shards.gather_shards(leaves) is leaves
    with pytest.raises(ValueError, match=r"pattern 'c.\*' matches no parameter"):
        shards.shard_params(params, None, patterns=("c.*",))


def test_what_is_cut_and_what_stays(gen, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        w = torch.randn(64, 64, generator=gen)
        lazy = weights.low_rank(w, torch.zeros(2, 64), torch.zeros(64, 2))
        params = {
            "q": w,
            "k": w.t(),
            "conv": torch.zeros(64, 64, 2),
            "ids": torch.zeros(64, 64, dtype=torch.int64),
            "lazy": lazy,
            "skip": w,
        }
        leaves = shards.shard_params(params, mesh, patterns=("[^s].*",), least=4096)
        assert {n for n, t in leaves.items() if shards.is_shard(t)} == {"q", "k"}
        assert leaves["skip"] is w
        assert leaves["lazy"] is lazy
        assert torch.equal(shards.gather_shards(leaves)["k"], w.t())
        w.zero_()  # a shard keeps its own memory
        assert leaves["q"].to_local().abs().max() > 1
    finally:
        dist.destroy_process_group()
