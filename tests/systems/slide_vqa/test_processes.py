"""slide_vqa in two processes against one: a batch's loss and gradient, bytes held, steps, files; and trained in 16 bits against 32."""

import gc
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from attrs import evolve

from medvl.base import config, processes
from medvl.base.tree import flatten, map_leaves, merge_trees, split_tree
from medvl.components import compress
from medvl.hub import skeletons
from medvl.language import chat
from medvl.systems.slide_vqa import model as slide_vqa
from medvl.systems.slide_vqa import pretrain
from medvl.systems.slide_vqa import run as slide_vqa_run
from medvl.systems.slide_vqa.assess import answer_conversations
from medvl.systems.slide_vqa.data import read_split
from medvl.systems.slide_vqa.record import Config
from medvl.systems.slide_vqa.tokens import compute_tokens
from medvl.training import stages, states
from medvl.training.optim import Optimizer
from medvl.weights import lazy, shards
from tests.systems.slide_vqa import pieces
from tests.systems.slide_vqa import test_run as toy
from tests.together import start_together, wait_together

ROOT = Path(__file__).resolve().parents[3]
# Every matrix is large enough to be cut; what stays whole (norms, biases) is 0.3 % of the values.
MODEL = toy.MODEL | {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
CAPTIONS = {"name": "captions", "data": "captions", "steps": 1, "lr": 1e-3, "train": ["projector/.*"]}
QUESTIONS = {
    "name": "questions",
    "data": "questions",
    "steps": 3,
    "lr": 1e-3,
    "train": ["projector/.*", "model/.*"],
}
ADAPTED = QUESTIONS | {"train": ["projector/.*", "lora/.*"]}
RUNS = {
    "float32": {"rounding": "nearest"},
    "master": {"dtype": "bfloat16", "rounding": "master"},
    "lora": {"stage": ADAPTED},
}


def config_of(place, *, dtype="float32", rounding="master", stage=QUESTIONS, **change):
    """A record over the slides and the compressor in `place`, as `experiments/slide_vqa_slidechat_full.toml` but small."""
    if stage is ADAPTED:
        change["model"] = {"name": str(place / "model"), "dtype": dtype}
    else:
        change["model"] = {"config": MODEL, "tokenizer": str(place / "model"), "dtype": dtype}
    held = {
        "hidden": 512,
        "pretrain": {"file": str(place / "moe_compressor.pt")},
        "lora": {"rank": 128, "pattern": "all-linear"},
    }
    how = {
        "train__shard": True,
        "train__rounding": rounding,
        "train__chunk": 1,
        "train__stages": [CAPTIONS, stage],
        "train__valid": 4,
        "evaluate__by": "likelihood",
    }
    return config.structure(toy.record(place, **held | how | change), Config, "test")


def opened(cfg, place, dtype=None):
    """(model, parameters, tokens of slides, conversations of both kinds)."""
    model, params = pieces.open_model(cfg, place, slide_vqa.open_compressor(cfg))
    held = {what: read_split(cfg, what) for what in ("captions", "questions")}
    tokens = compute_tokens(model, place, held["questions"])
    if dtype:
        model, params = (
            evolve(model, language=evolve(model.language, chat=evolve(model.language.chat, dtype=dtype))),
            map_leaves(lambda t: t.to(dtype), params),
        )
    return model, params, tokens, held


# A batch --------------------------------------------------------------------------------------------------------------------------------
WAYS = {
    "one row at a time": {"chunk": 1},
    "two rows at a time": {"chunk": 2},
    "whole weights": {"chunk": 1, "train__shard": False},
    "lora": {"chunk": 1, "stage": ADAPTED},
}


def mixed(model, held):
    """Long captions and short answers, each with and without its slide."""
    seen = [*held["captions"][:2], *held["questions"][:2]]
    return pieces.encode(
        model, seen + [slide_vqa.without_slides(t) for t in (*held["captions"][2:4], *held["questions"][2:4])]
    )


def gradients(place, chosen, chunk, **change):
    """{case: loss, gradient and what rows are} of the batches `chosen` by number: this process's share, in float64."""
    cfg = config_of(place, train__chunk=chunk, **change)
    model, params, tokens, held = opened(cfg, place, torch.float64)
    trained, frozen = split_tree(stages.shard_params(cfg.train, params), cfg.train.stages[-1].train)
    loss = pieces.loss_of(model)
    grad = stages.make_gradient(cfg.train, lambda p, b: loss(merge_trees(frozen, p), b), pieces.cut(model))
    batch_at, found = pieces.batches(model, mixed(model, held), tokens, cfg), {}
    for case, i in chosen.items():
        batch = batch_at(i)
        batch["tokens"] = batch["tokens"].double()
        if (
            case == "untrained" and processes.rank() == processes.world_size() - 1
        ):  # the last process has nothing to train
            batch["labels"][-2:] = -100
        value, aux, grads = grad(trained, batch)
        rows = {"images": batch["images"].tolist(), "trained": (batch["labels"][:, 1:] >= 0).sum(1).tolist()}
        found[case] = rows | {
            "loss": value,
            "tokens": aux.metrics["tokens"],
            "grads": flatten(shards.gather_shards(grads)),
        }
    return found


# Runs -----------------------------------------------------------------------------------------------------------------------------------
def live():
    """Bytes of all plain tensors of this process, each storage once; a shard's part is one of them."""
    gc.collect()
    plain = (
        torch.Tensor,
        torch.nn.Parameter,
    )  # other tests may have left tensors of other kinds, which know no memory
    held = [o.untyped_storage() for o in gc.get_objects() if type(o) in plain and o.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())


def fitted(kind, place, out):
    """Train a run of RUNS with `slide_vqa_run.fit` in `out`.

    Returns:
        {part: bytes}, as the optimiser gets it at the last step, "live" those of all tensors there are; of process 0 digest and answers;
        how many slides were compressed here.
    """
    cfg, held, made, before = config_of(place, **RUNS[kind]), {}, stages.make_optimizer, live()

    def counting(how, stage, *args, **settings):
        ours = made(how, stage, *args, **settings)

        def update(grads, state, params, step):
            if stage.data == "questions" and step == stage.steps - 1:
                parts = {"weights": params, "gradients": grads, "optimiser": state}
                held.update(
                    {k: lazy.nbytes(flatten(tree)) for k, tree in parts.items()} | {"live": live() - before}
                )
            return ours.update(grads, state, params, step)

        return Optimizer(ours.init, update)

    compressed = mock.patch.object(compress, "compress_stream", wraps=compress.compress_stream)
    with mock.patch.object(stages, "make_optimizer", counting), compressed as seen:
        model, params = slide_vqa_run.fit(cfg, out, lambda _: None)
    if processes.rank() == 0:
        (out / "config.json").write_text(json.dumps(config.unstructure(cfg)))
        return held, skeletons.weights_digest(params), answers(model, params, out), seen.call_count
    return held, "", [], seen.call_count


def answers(model, params, out):
    talks = read_split(model.cfg, "test")[:13]
    return answer_conversations(model, params, talks, compute_tokens(model, out, talks))


def losses(folder):
    return [
        json.loads(line)["loss"] for line in (folder / "1-questions/metrics.jsonl").read_text().splitlines()
    ]


def share(out):
    """What each of two processes does."""
    place, rank = out.parent, processes.rank()
    chosen = json.loads((place / "chosen.json").read_text())
    found = {way: gradients(place, chosen, **how) for way, how in WAYS.items()}
    torch.save(found, out / f"gradients{rank}.pt")
    with pytest.raises(ValueError, match="a sample for each process, got 1 for 2 processes"):
        gradients(place, chosen, 1, train__batch=1)
    (out / f"runs{rank}.json").write_text(
        json.dumps({kind: fitted(kind, place, out / kind) for kind in RUNS})
    )
    processes.wait_for_all()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Drawn slides, a trained compressor, a tokenizer and a model in a folder; and which batches show what."""
    place = tmp_path_factory.mktemp("slides")
    first = config.structure(toy.record(place, model__config=MODEL), Config, "test")
    slide_vqa_run.prepare(first, lambda _: None)
    fit = pretrain.fit_compressor(first, place, lambda _: None)
    texts = [
        m["content"]
        for what in ("captions", "questions")
        for t in read_split(first, what)
        for m in t.messages
    ]
    model, params = pieces.open_model(first, place, fit, texts)
    chat.save_chat(model.language.chat, params["model"], place / "model")
    cfg = config_of(place)
    model, _, tokens, held = opened(cfg, place)
    batch_at = pieces.batches(model, mixed(model, held), tokens, cfg)
    images = {i: batch_at(i)["images"].tolist() for i in range(60)}
    apart = next(i for i, n in images.items() if n == [1, 1, 0, 0])
    among = next(i for i, n in images.items() if n == [1, 0, 0, 1])
    (place / "chosen.json").write_text(json.dumps({"apart": apart, "among": among, "untrained": among}))
    return place


@pytest.fixture(scope="module")
def started(place):
    """Two processes at work in a folder."""
    out = place / "two"
    out.mkdir()
    return out, start_together(__name__, "share", out, 2)


@pytest.fixture(scope="module")
def one(place, started):
    """What one process comes to."""
    chosen = json.loads((place / "chosen.json").read_text())
    ways = {
        way: gradients(place, chosen, **how | {"chunk": 4})
        for way, how in WAYS.items()
        if way in ("one row at a time", "lora")
    }
    return ways, {kind: fitted(kind, place, place / "one" / kind) for kind in RUNS}


@pytest.fixture(scope="module")
def two(one, started):
    """What two processes came to, one after the other."""
    out, runs = started
    wait_together(runs)
    return [
        (
            torch.load(out / f"gradients{r}.pt", weights_only=True),
            json.loads((out / f"runs{r}.json").read_text()),
        )
        for r in range(2)
    ]


# One batch ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["apart", "among", "untrained"])
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradient_of_two_processes_are_those_of_one_batch(one, two, way, case):
    """Float64 and each row's own arithmetic leave only the order of sums: 1e-15 is found."""
    want, shares = (
        one[0]["lora" if way == "lora" else "one row at a time"][case],
        [found[way][case] for found, _ in two],
    )
    assert [n for s in shares for n in s["images"]] == want["images"]
    assert [n for s in shares for n in s["trained"]] == want["trained"]
    assert len(set(want["trained"])) > 2
    for got in shares:
        assert int(got["tokens"]) == sum(want["trained"])
        assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-12)
        for n, g in got["grads"].items():
            assert float((g - want["grads"][n]).norm()) <= 1e-12 * float(want["grads"][n].norm()), n
    assert shares[0]["grads"].keys() == want["grads"].keys()
    assert min(float(want["grads"][f"projector/{n}/weight"].norm()) for n in ("up", "down")) > 1e-5


def test_the_batches_are_what_they_are_chosen_for(one, two):
    """A process that sees no slide, a row that trains no token; and a mean of the processes' means would be another loss."""
    ways, of = one[0]["one row at a time"], [found["one row at a time"] for found, _ in two]
    assert [s["apart"]["images"] for s in of] == [[1, 1], [0, 0]]
    assert [s["among"]["images"] for s in of] == [[1, 0], [0, 1]]
    assert of[1]["untrained"]["trained"] == [0, 0]
    assert float(ways["untrained"]["loss"]) != pytest.approx(float(ways["among"]["loss"]), rel=1e-4)
    first, all_ = (
        ways["untrained"]["loss"] * ways["untrained"]["tokens"],
        ways["among"]["loss"] * ways["among"]["tokens"],
    )
    n, total = ways["untrained"]["tokens"], ways["among"]["tokens"]
    means = (first / n + (all_ - first) / (total - n)) / 2
    assert abs(float(means / ways["among"]["loss"]) - 1) > 1e-3


# A run ----------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["float32", "master"])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_holds_half(one, two, kind, rank):
    whole, half = one[1][kind][0], two[rank][1][kind][0]
    assert set(half) == {"weights", "gradients", "optimiser", "live"}
    values = whole["gradients"] // 4  # several micro-batches are added up in float32
    assert whole["optimiser"] == pytest.approx(
        (8 if kind == "float32" else 12) * values, rel=0.1
    )  # the projector needs no master
    for part, n in half.items():
        assert 0.45 * whole[part] < n < 0.55 * whole[part], part


def test_each_process_compresses_half_of_the_slides(one, two):
    every, halves = one[1]["float32"][3], [found["float32"][3] for _, found in two]
    assert sum(halves) == every > 4
    assert abs(halves[0] - halves[1]) <= 1


@pytest.mark.parametrize(("kind", "most"), [("float32", 1e-6), ("master", 5e-4), ("lora", 1e-6)])
def test_losses_of_the_steps_are_those_of_one_process(place, two, kind, most):
    """Float32 adds up in another order. 16-bit gradients are summed over processes in 16 bits (0.2 % of them): 2e-4 is found."""
    want, got = (losses(place / who / kind) for who in ("one", "two"))
    assert len(want) == QUESTIONS["steps"]
    assert abs(want[-1] / want[0] - 1) > 0.02
    assert got == pytest.approx(want, rel=most)


@pytest.mark.parametrize("kind", RUNS)
def test_one_process_opens_what_two_wrote(place, one, two, kind):
    model, params = slide_vqa_run.load(place / "two" / kind)
    _, digest, said, _ = two[0][1][kind]
    assert skeletons.weights_digest(params) == digest
    assert answers(model, params, place / "two" / kind) == said == one[1][kind][2]
    assert len(set(said)) > 1
    alone = flatten(slide_vqa_run.load(place / "one" / kind)[1])
    far = {
        n: float((t.float() - alone[n].float()).norm() / alone[n].float().norm().clamp(min=1e-3))
        for n, t in flatten(params).items()
    }
    assert max(far.values()) < (2e-2 if kind == "master" else 1e-3)


# In 16 bits -----------------------------------------------------------------------------------------------------------------------------
STEPS = 30
LOW = QUESTIONS | {"steps": STEPS, "lr": 1e-5}


@pytest.fixture(scope="module")
def moved(place):
    """(kind of training, seed) -> (how far the language model's weights went from one start, last loss); "float32" knows no rounding."""
    _, start, tokens, held = opened(config_of(place, dtype="bfloat16", stage=LOW, train__shard=False), place)
    start = map_leaves(torch.clone, start)
    known = {}

    def run(kind, seed=0):
        if (kind, seed) in known:
            return known[kind, seed]
        wide, rounding = kind == "float32", "nearest" if kind == "float32" else kind
        how = {"train__shard": False, "train__chunk": 4, "train__checkpoint": False, "train__save": 0}
        cfg = config_of(place, dtype="float32" if wide else "bfloat16", rounding=rounding, stage=LOW, **how)
        model, _, _, _ = opened(cfg, place)
        params = map_leaves(torch.Tensor.float if wide else torch.clone, start)
        batch_at = pieces.batches(model, pieces.encode(model, held["questions"]), tokens, cfg)
        stage, out = cfg.train.stages[-1], place / f"low-{kind}-{seed}"
        quiet = {"cut": pieces.cut(model), "seed": seed, "log": lambda _: None}
        params = stages.fit_stage(cfg.train, stage, params, pieces.loss_of(model), batch_at, out, **quiet)
        if kind == "master":
            params = {"model": states.read_state(out / "last.pt").opt["master"]["model"]}
        loss = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        known[kind, seed] = _vector(params["model"]) - _vector(start["model"]), loss
        return known[kind, seed]

    return run


def _vector(weights_):
    return torch.cat([weights_[n].double().flatten() for n in sorted(weights_)])


def _along(a, b):
    """(cosine of a and b, length of a along b in units of b)."""
    return float(a @ b / (a.norm() * b.norm())), float(a @ b / (b @ b))


def test_plain_rounding_loses_most_steps(moved):
    """Found: 85 % of the weights that float32 moves stay where they are, and of the way 12 % is left."""
    want, loss = moved("float32")
    got, other = moved("nearest")
    there = want != 0
    assert float(there.double().mean()) > 0.99
    assert float((got[there] == 0).double().mean()) > 0.8
    assert _along(got, want)[1] < 0.2
    assert other > loss + 0.1


def test_a_master_moves_as_float32_does(moved):
    """Found: cosine 0.9997, length 0.9996 of it."""
    cosine, length = _along(moved("master")[0], moved("float32")[0])
    assert cosine > 0.998
    assert length == pytest.approx(1, abs=5e-3)
    assert moved("master")[1] == pytest.approx(moved("float32")[1], rel=2e-3)


def test_stochastic_rounding_moves_as_float32_does_on_average(moved):
    """Found: length 0.998 to 1.002, cosine 0.70. What is left is noise: the mean of three runs is nearer by the root of three."""
    want, loss = moved("float32")
    runs = [moved("stochastic", seed) for seed in range(3)]
    for got, other in runs:
        assert _along(got, want)[1] == pytest.approx(1, abs=1e-2)
        assert other == pytest.approx(loss, rel=2e-3)
    single = sum(float((got - want).norm()) for got, _ in runs) / 3
    mean = sum(got for got, _ in runs) / 3
    assert float((mean - want).norm()) / single == pytest.approx(3**-0.5, rel=0.03)
    assert abs(float((mean - want).mean())) < 0.02 * float(want.abs().mean())
