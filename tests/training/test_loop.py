"""The loop against autograd on the whole batch, and against being stopped, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve

from medvl.base import display, processes
from medvl.base.tree import flatten
from medvl.components.losses import clip_loss, siglip_loss
from medvl.training import loop
from medvl.training.gradients import Aux, cached_value_and_grad, token_value_and_grad, value_and_grad
from medvl.training.interrupt import Stopped
from medvl.training.journal import check_tensorboard
from medvl.training.loop import Every, make_step, train_steps
from medvl.training.optim import Optimizer, Rate, adamw, routed, warmup_cosine, with_master
from medvl.training.states import State, read_state, read_trained, save_state
from medvl.weights import lazy
from medvl.weights.four_bit import eight_bit_moments
from tests import tiny
from tests.together import run_together

ROOT = Path(__file__).resolve().parents[2]


def _params(gen, d=6):
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    return {
        "image": {"w": draw(d, d)},
        "text": {"w": draw(d, d)},
        "project": {"w": draw(d, d)},
        "scale": torch.tensor(1.0, dtype=torch.float64),
    }


def _batch(gen, n=16, d=6):
    return {k: torch.randn(n, d, generator=gen, dtype=torch.float64) for k in ("image", "text")}


def embed(p, batch):
    return {k: torch.tanh(batch[k] @ p[k]["w"]) for k in ("image", "text")}


def contrast(p, rows, loss=clip_loss):
    means = {k: v.mean(0) for k, v in rows.items()}
    unit = {k: F.normalize((v - means[k]) @ p["project"]["w"], dim=-1) for k, v in rows.items()}
    extra = (p["scale"].exp(),) if loss is clip_loss else (p["scale"].exp(), -3.0)
    value = loss(unit["image"], unit["text"], *extra)
    return value, Aux(metrics={"scale": p["scale"]}, means=means)


def _worst(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
def test_gradient_caching_equals_the_whole_batch(loss, chunk, gen):
    params, batch = _params(gen), _batch(gen)
    whole = lambda p, b: contrast(p, embed(p, b), loss)
    value, aux, want = value_and_grad(whole)(params, batch)
    got_value, got_aux, got = cached_value_and_grad(embed, lambda p, r: contrast(p, r, loss), chunk=chunk)(
        params, batch
    )
    assert abs(value - got_value) < 1e-12
    assert _worst(got, want) < 1e-9
    assert _worst(got_aux.means, aux.means) < 1e-12
    assert min(t.abs().max() for t in flatten(want).values()) > 1e-3


def test_plain_accumulation_is_another_gradient(gen):
    params, batch = _params(gen), _batch(gen)
    grad = value_and_grad(lambda p, b: contrast(p, embed(p, b)))
    want = grad(params, batch)[2]
    pieces = [grad(params, {k: v[i : i + 4] for k, v in batch.items()})[2] for i in range(0, 16, 4)]
    mean = {k: sum(flatten(p)[k] for p in pieces) / 4 for k in flatten(want)}
    assert _worst(mean, want) > 1e-2


def test_value_and_grad_is_autograd_and_leaves_arguments_alone(gen):
    params, batch = _params(gen), _batch(gen)
    params["unused"] = torch.ones(2, dtype=torch.float64)
    before = {k: v.clone() for k, v in flatten(params).items()}
    _, _, grads = value_and_grad(lambda p, b: contrast(p, embed(p, b)))(params, batch)
    leaves = {k: v.clone().requires_grad_() for k, v in flatten(params).items()}
    nested = {
        "image": {"w": leaves["image/w"]},
        "text": {"w": leaves["text/w"]},
        "project": {"w": leaves["project/w"]},
        "scale": leaves["scale"],
    }
    contrast(nested, embed(nested, batch))[0].backward()
    for k, g in flatten(grads).items():
        torch.testing.assert_close(
            g, torch.zeros(2, dtype=torch.float64) if k == "unused" else leaves[k].grad, rtol=0, atol=1e-12
        )
        assert torch.equal(before[k], flatten(params)[k])
        assert not flatten(params)[k].requires_grad


def test_autocast_covers_embed_and_not_the_loss(gen):
    seen = {}

    def e(p, b):
        out = {k: b[k].float() @ p[k]["w"].float() for k in ("image", "text")}
        seen["embed"] = out["image"].dtype
        return out

    def c(p, rows):
        seen["loss"] = (rows["image"] @ rows["text"].T).dtype
        return clip_loss(
            F.normalize(rows["image"], dim=-1), F.normalize(rows["text"], dim=-1), p["scale"].float()
        ), Aux()

    for chunk in (4, 16):
        seen.clear()
        cached_value_and_grad(e, c, chunk=chunk, precision="bfloat16")(_params(gen), _batch(gen))
        assert seen == {"embed": torch.bfloat16, "loss": torch.float32}


def two_train(out):
    """What each of two processes does that train together."""
    rank = processes.rank()
    gen = torch.Generator().manual_seed(0)
    params, batch = _params(gen), _batch(gen)
    mine = {k: v[rank * 8 :][:8] for k, v in batch.items()}
    value, aux, grads = cached_value_and_grad(embed, contrast, chunk=3)(params, mine)
    torch.save({"value": value, "grads": grads, "means": aux.means}, out / f"{rank}.pt")

    batch = {k: v[:2] if rank == 0 else v[2:] for k, v in _tokens().items()}  # unequal rows, too
    value, aux, grads = token_value_and_grad(token_loss, chunk=1)(_token_params(), batch)
    torch.save({"value": value, "grads": grads, "metrics": aux.metrics}, out / f"tokens{rank}.pt")

    params, optimizer = {"w": torch.ones(3)}, adamw(lambda n: Rate(lr=0.1))
    step = make_step(value_and_grad(lambda p, x: ((p["w"] * x).sum(), Aux())), optimizer)

    def seen(state, batch):
        if state.step == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch)

    try:
        train_steps(
            seen,
            State(params=params, opt=optimizer.init(params)),
            lambda i: torch.ones(3),
            steps=20,
            folder=out / "run",
        )
    except Stopped as stopped:
        (out / f"stopped{rank}").write_text(str(stopped.code))
    processes.wait_for_all()

    lost = lambda p, x: (
        (p["w"] * x).sum() + (float("nan") if rank == 1 else 0.0),
        Aux(),
    )  # a loss of one process, no gradient
    step = make_step(value_and_grad(lost), optimizer)
    try:
        train_steps(
            step,
            State(params=params, opt=optimizer.init(params)),
            lambda i: torch.ones(3),
            steps=2,
            folder=out / "lost",
        )
    except FloatingPointError as e:
        (out / f"lost{rank}").write_text(str(e))
    processes.wait_for_all()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes leave in a folder, where they train together."""
    out = tmp_path_factory.mktemp("pair")
    run_together(__name__, "two_train", out, 2)
    return out


def test_two_processes_equal_one(pair, gen):
    params, batch = _params(gen), _batch(gen)
    value, aux, want = cached_value_and_grad(embed, contrast, chunk=16)(params, batch)
    for r in range(2):
        got = torch.load(pair / f"{r}.pt", weights_only=True)
        assert abs(got["value"] - value) < 1e-12
        assert _worst(got["grads"], want) < 1e-9
        assert _worst(got["means"], aux.means) < 1e-12


def test_tokens_of_two_processes_count_alike(pair):
    value, want = _whole_batch()
    for r in range(2):
        got = torch.load(pair / f"tokens{r}.pt", weights_only=True)
        assert abs(got["value"] - value) < 1e-12
        assert _worst(got["grads"], want) < 1e-12
        assert got["metrics"]["tokens"] == sum(TRAINED)


def test_sigterm_to_one_process_stops_both_at_the_same_step(pair):
    assert [(pair / f"stopped{r}").read_text() for r in range(2)] == ["143", "143"]
    assert read_state(pair / "run/last.pt").step == 5


def test_a_loss_that_one_process_lost_stops_both(pair):
    said = [(pair / f"lost{r}").read_text() for r in range(2)]
    assert "the loss is nan at step 1" in said[1]
    assert "loss or gradient of another process is not finite at step" in said[0]
    assert not list((pair / "lost").glob("*.pt"))


# Token losses ---------------------------------------------------------------------------------------------------------------------------
TRAINED = (1, 40, 0, 3, 17)  # tokens of each row that have a label


def _tokens():
    gen = torch.Generator().manual_seed(1)
    labels = torch.randint(7, (5, 40), generator=gen)
    labels[torch.arange(40) >= torch.tensor(TRAINED)[:, None]] = -100
    return {"x": torch.randn(5, 40, 4, generator=gen, dtype=torch.float64), "labels": labels}


def _token_params():
    gen = torch.Generator().manual_seed(2)
    return {
        "w": torch.randn(7, 4, generator=gen, dtype=torch.float64),
        "in": {"w": torch.randn(4, 4, generator=gen, dtype=torch.float64)},
    }


def token_loss(p, batch):
    logits = torch.tanh(batch["x"] @ p["in"]["w"]) @ p["w"].t()
    kept = batch["labels"] >= 0
    right = (logits.argmax(-1) == batch["labels"])[kept].sum()
    return (
        F.cross_entropy(logits[kept], batch["labels"][kept], reduction="sum"),
        kept.sum(),
        Aux(metrics={"accuracy": right}),
    )


def _whole_batch():
    leaves = {k: v.requires_grad_() for k, v in flatten(_token_params()).items()}
    logits = torch.tanh(_tokens()["x"] @ leaves["in/w"]) @ leaves["w"].t()
    value = F.cross_entropy(logits.flatten(0, 1), _tokens()["labels"].flatten(), ignore_index=-100)
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 9])
def test_micro_batches_of_unequal_tokens_equal_one_batch(chunk):
    value, want = _whole_batch()
    got, aux, grads = token_value_and_grad(token_loss, chunk=chunk)(_token_params(), _tokens())
    assert abs(got - value) < 1e-12
    assert _worst(grads, want) < 1e-12
    labels = _tokens()["labels"]
    found = (torch.tanh(_tokens()["x"] @ _token_params()["in"]["w"]) @ _token_params()["w"].t()).argmax(-1)
    assert aux.metrics["tokens"] == 61
    assert aux.metrics["accuracy"] == pytest.approx(int((found == labels).sum()) / 61)


def _short_of_memory(rows, sizes):
    """`token_loss` on a GPU that has memory for so many rows; `sizes` gets those of all tries."""

    def loss(p, batch):
        sizes.append(len(batch["labels"]))
        found = token_loss(p, batch)
        if len(batch["labels"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    return loss


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_micro_batch_that_does_not_fit_is_halved_with_the_same_gradient(rows, as_list, caplog):
    value, want = _whole_batch()
    sizes = []
    batch = [{k: v[:1] for k, v in _tokens().items()}, {k: v[1:] for k, v in _tokens().items()}]
    if not as_list:
        batch = _tokens()
    grad = token_value_and_grad(_short_of_memory(rows, sizes), chunk=5)
    for _ in range(2):
        got, aux, grads = grad(_token_params(), batch)
        assert abs(got - value) < 1e-12
        assert _worst(grads, want) < 1e-12
        assert aux.metrics["tokens"] == 61
    assert caplog.text.count("out of memory: a micro-batch of") == 1
    if not as_list:
        # The second step begins with chunks that fit.
        first = sizes.index(5) + 1
        assert sizes.count(5) == 1
        assert max(sizes[first:]) <= 3


def test_one_row_that_does_not_fit_is_the_error_it_was():
    grad = token_value_and_grad(_short_of_memory(0, []), chunk=5)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        grad(_token_params(), _tokens())


def test_a_mean_of_means_is_another_gradient():
    value, want = _whole_batch()
    mean = value_and_grad(lambda p, b: ((s := token_loss(p, b))[0] / s[1], Aux()))
    pieces = [
        mean(_token_params(), {k: v[i : i + 1] for k, v in _tokens().items()})
        for i, n in enumerate(TRAINED)
        if n
    ]
    assert abs(sum(p[0] for p in pieces) / 4 - value) > 0.1
    assert _worst({k: sum(flatten(p[2])[k] for p in pieces) / 4 for k in want}, want) > 0.05


def test_two_leaves_of_one_gradient_are_both_right():
    """Autograd hands out one tensor for both; adding or dividing in place would count it twice."""
    params = {k: torch.zeros(4, dtype=torch.float64) for k in ("a", "b")}
    loss = lambda p, batch: (((p["a"] + p["b"]) * batch["x"]).sum(), len(batch["x"]), Aux())
    x = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    for chunk in (1, 3):
        grads = token_value_and_grad(loss, chunk=chunk)(params, {"x": x})[2]
        for g in grads.values():
            torch.testing.assert_close(g, x.mean(0))


def test_many_16_bit_micro_batches_are_added_up_in_float32():
    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    loss = lambda p, batch: ((p["w"] * batch["x"]).sum(), len(batch["x"]), Aux())
    batch = {"x": torch.full((1000, 3), 1.0, dtype=torch.bfloat16)}
    grads = token_value_and_grad(loss, chunk=1)(params, batch)[2]
    assert grads["w"].dtype == torch.float32
    assert torch.equal(grads["w"], torch.ones(3))


def test_what_has_no_row_per_sample_is_cut_by_the_caller():
    """Five samples with 2, 0, 1, 3 and 1 patches, all patches in one tensor."""
    per = torch.tensor([2, 0, 1, 3, 1])
    patches = torch.arange(7.0, dtype=torch.float64)[:, None]
    batch = {"pixel_values": patches, "per": per, "labels": torch.ones(5)}

    def loss(p, b):
        assert len(b["pixel_values"]) == int(b["per"].sum())
        return (b["pixel_values"] * p["w"]).sum(), len(b["labels"]), Aux()

    def cut(b, span):
        ends = F.pad(b["per"].cumsum(0), (1, 0))
        mine = slice(int(ends[span.start]), int(ends[span.stop]))
        return {k: v[mine if k == "pixel_values" else span] for k, v in b.items()}

    grad = token_value_and_grad(loss, chunk=2, cut=cut, rows=lambda b: len(b["labels"]))
    assert grad({"w": torch.ones(1, dtype=torch.float64)}, batch)[2]["w"] == patches.sum() / 5
    with pytest.raises(
        ValueError, match="must have the batch's 5 rows, pixel_values has 7; say how to cut it with `cut`"
    ):
        token_value_and_grad(loss, chunk=2, rows=lambda b: 5)({"w": torch.ones(1)}, batch)


def test_token_errors_say_what_to_do():
    nothing = {k: v[2:3] for k, v in _tokens().items()}
    with pytest.raises(ValueError, match=r"no token of the batch \(1 rows\) is trained"):
        token_value_and_grad(token_loss, chunk=1)(_token_params(), nothing)
    with pytest.raises(ValueError, match="at least one row, got 0"):
        token_value_and_grad(token_loss, chunk=0)


# The loop -----------------------------------------------------------------------------------------------------------------------------


def _start(gen):
    params = _params(gen)
    optimizer = adamw(lambda n: Rate(lr=1e-2, weight_decay=0.1), warmup_cosine(40, 5))
    step = make_step(cached_value_and_grad(embed, contrast, chunk=8), optimizer, clip=1.0)
    return step, State(params=params, opt=optimizer.init(params))


def _batch_at(i):
    return _batch(torch.Generator().manual_seed(100 + i))


def _run(folder, steps=40, slow=0.0, gen=None, **every):
    step, state = _start(gen or torch.Generator().manual_seed(0))
    score = lambda s: {"score": float(flatten(s.params)["scale"])}
    wait = lambda i: (time.sleep(slow), _batch_at(i))[1]
    return train_steps(
        step,
        state,
        wait,
        steps=steps,
        folder=folder,
        every=Every(log=1, save=3, validate=5) if not every else Every(**every),
        validate=score,
    )


def _same(a: State, b: State):
    return (
        _worst({"p": a.params, "o": a.opt, "m": a.means}, {"p": b.params, "o": b.opt, "m": b.means}) == 0
        and a.step == b.step
        and a.best == b.best
    )


def test_the_loss_falls_and_the_journal_says_so(tmp_path):
    _run(tmp_path)
    lines = [json.loads(t) for t in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert {"loss", "grad_norm", "scale"} <= lines[0].keys()
    assert "valid_score" in lines[4]
    assert read_state(tmp_path / "best.pt").best == max(line.get("valid_score", -9) for line in lines)


def test_the_best_state_is_kept_without_the_optimiser(tmp_path):
    _run(tmp_path)
    best, last = read_state(tmp_path / "best.pt"), read_state(tmp_path / "last.pt")
    assert best.opt == {}
    assert last.opt
    assert best.step in range(5, 41, 5)
    assert (tmp_path / "best.pt").stat().st_size < 0.6 * (tmp_path / "last.pt").stat().st_size
    kept = read_trained(tmp_path, "best", "cpu", model=best.params)
    # Files of older versions hold the optimiser, too, and are read as ever.
    save_state(tmp_path / "best.pt", evolve(best, opt=last.opt))
    assert _same(read_trained(tmp_path, "best", "cpu", model=best.params), kept)


def test_resume_is_bit_exact_and_repeats_no_line(tmp_path):
    whole = _run(tmp_path / "whole")
    step, state = _start(torch.Generator().manual_seed(0))

    def interrupted(i):
        if i == 17:
            raise KeyboardInterrupt
        return _batch_at(i)

    with pytest.raises(KeyboardInterrupt):
        train_steps(
            step,
            state,
            interrupted,
            steps=40,
            folder=tmp_path / "cut",
            every=Every(log=1, save=3, validate=5),
            validate=lambda s: {"score": float(flatten(s.params)["scale"])},
        )
    again = _run(tmp_path / "cut")
    assert _same(whole, again)
    assert tiny.without_clock(tmp_path / "whole/metrics.jsonl") == tiny.without_clock(
        tmp_path / "cut/metrics.jsonl"
    )


def test_running_means_follow_the_batches(tmp_path):
    step, state = _start(torch.Generator().manual_seed(0))
    first = embed(state.params, _batch_at(0))["image"].mean(0)
    state, _ = step(state, _batch_at(0))
    torch.testing.assert_close(state.means["image"], first)
    second = embed(state.params, _batch_at(1))["image"].mean(0)
    state, _ = step(state, _batch_at(1))
    torch.testing.assert_close(state.means["image"], (first + second) / 2)


SCRIPT = """
import sys
from tests.training.test_loop import _run
_run(sys.argv[1], steps=int(sys.argv[2]), slow=0.02)
"""


def _process(folder, steps=40):
    env, code = os.environ | {"PYTHONPATH": str(ROOT)}, SCRIPT
    return subprocess.Popen(
        [sys.executable, "-c", code, folder, str(steps)], env=env, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_run_goes_on(number, tmp_path):
    whole = _run(tmp_path / "whole")
    run = _process(tmp_path / "cut")
    while not (tmp_path / "cut/last.pt").exists():
        time.sleep(0.05)
    run.send_signal(number)
    _, said = run.communicate()
    assert run.returncode == 128 + number
    assert "the same command goes on" in said
    assert ("Ctrl-C again ends at once" in said) == (number == signal.SIGINT)
    assert "Traceback" not in said
    assert 3 <= read_state(tmp_path / "cut/last.pt").step < 40
    assert _same(whole, _run(tmp_path / "cut"))


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """The second comes while the step that was at work at the first lasts; what was saved stays."""
    steps = []

    def batch_at(i):
        return torch.ones(3)

    def step(state, batch):
        steps.append(state.step)
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return evolve(state, step=state.step + 1), {"loss": torch.zeros(())}

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_steps(
            step,
            State(params={"w": torch.ones(3)}, opt={}),
            batch_at,
            steps=20,
            folder=tmp_path,
            every=Every(log=1, save=2),
        )
    assert steps == [0, 1, 2, 3, 4, 5]
    assert read_state(tmp_path / "last.pt").step == 4
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("when", ["in the last step", "after it"])
def test_a_signal_at_the_end_begins_nothing_new(when, tmp_path):
    def step(state, batch):
        if state.step == 3 and when == "in the last step":
            os.kill(os.getpid(), signal.SIGTERM)
        return evolve(state, step=state.step + 1), {"loss": torch.zeros(())}

    def log(line):
        if "4/4" in line and when == "after it":
            os.kill(os.getpid(), signal.SIGTERM)

    run = lambda: train_steps(
        step, State(params={"w": torch.ones(3)}, opt={}), lambda i: None, steps=4, folder=tmp_path, log=log
    )
    with pytest.raises(Stopped) as stopped:
        run()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert read_state(tmp_path / "last.pt").step == 4
    assert run().step == 4  # and the same call finds it done


def test_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    """MEDVL_KILLS sets how many times the run is killed with SIGKILL."""
    kills = int(os.environ.get("MEDVL_KILLS", "2"))
    steps, moments, done = 20 + 14 * kills, torch.Generator().manual_seed(int(time.time())), []
    whole, last = _run(tmp_path / "whole", steps=steps), tmp_path / "cut/last.pt"
    for _ in range(kills):
        before = read_state(last).step if last.exists() else 0
        run = _process(tmp_path / "cut", steps)
        while run.poll() is None and (read_state(last).step if last.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(float(torch.rand(1, generator=moments)) * 0.1)
        assert run.poll() is None, "it ended before it could be killed"
        run.kill()
        run.wait()
        done.append(read_state(last).step)
    assert done == sorted(set(done))
    assert done[-1] < steps
    assert _same(whole, _run(tmp_path / "cut", steps=steps))
    assert tiny.without_clock(tmp_path / "whole/metrics.jsonl") == tiny.without_clock(
        tmp_path / "cut/metrics.jsonl"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw | {"params": [1]}, "params must not be list"),
        (lambda raw: raw | {"step": "x"}, "step must not be str"),
        (lambda raw: raw | {"best": None}, "best must not be NoneType"),
        (lambda raw: raw | {"means": {"a": {"b": "text"}}}, "means/a/b must be a tensor, found str"),
        (lambda raw: raw | {"more": 1}, "found params, opt, means, step, .*, more"),
        (lambda raw: raw["params"], "found image"),
        (lambda raw: [raw], "found list"),
    ],
)
def test_a_state_of_other_fields_is_one_sentence(tmp_path, gen, change, message):
    _, state = _start(gen)
    save_state(tmp_path / "last.pt", state)
    raw = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(change(raw), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=rf"last.pt: not a whole checkpoint of medvl \({message}"):
        read_state(tmp_path / "last.pt")


def test_a_state_of_an_older_medvl_is_read(tmp_path, gen):
    _, state = _start(gen)
    save_state(tmp_path / "last.pt", state)
    raw = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({k: raw[k] for k in ("params", "opt", "means", "step", "best")}, tmp_path / "last.pt")
    found = read_state(tmp_path / "last.pt")
    assert (found.step, found.steps, found.processes) == (state.step, 0, 0)


def test_errors_say_what_to_do(tmp_path, gen):
    _, state = _start(gen)
    bad = lambda s, b: (s, {"loss": torch.tensor(float("nan"))})
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1; no state was saved yet"):
        train_steps(bad, state, _batch_at, steps=3, folder=tmp_path, every=Every(log=1))
    _run(tmp_path)
    with pytest.raises(ValueError, match="past the 10 asked for"):
        _run(tmp_path, steps=10)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        _run(tmp_path)
    (tmp_path / "last.pt").write_text("weights")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        _run(tmp_path)
    other = State(params={"image": {"w": torch.zeros(2, 2)}}, opt={})
    save_state(tmp_path / "last.pt", other)
    with pytest.raises(ValueError, match="parameters differ from the model"):
        _run(tmp_path)
    with pytest.raises(ValueError, match="no such checkpoint"):
        read_state(tmp_path / "nothing.pt")


def test_a_resume_with_another_optimiser_says_so(tmp_path):
    _run(tmp_path, steps=3)
    step, state = _start(torch.Generator().manual_seed(0))
    other = State(params=state.params, opt={"momentum": state.params})
    with pytest.raises(
        ValueError,
        match=r"12 optimiser moments differ from this stage's, e\.g\. mean/image/w: \(6, 6\) in the file, absent",
    ):
        train_steps(step, other, _batch_at, steps=9, folder=tmp_path)


# Dropout --------------------------------------------------------------------------------------------------------------------------------
def _lora_run(folder, steps, stop=None, **seed):
    """A run whose loss goes through a low-rank weight with dropout; the state it ends with."""
    gen = torch.Generator().manual_seed(0)
    base, params = (
        torch.randn(6, 5, generator=gen),
        {"a": torch.randn(2, 5, generator=gen), "b": torch.randn(6, 2, generator=gen)},
    )

    def loss(p, x):
        return F.linear(x, lazy.low_rank(base, p["a"], p["b"], dropout=0.5)).square().mean(), Aux()

    def batch_at(i):
        if i == stop:
            raise KeyboardInterrupt
        return torch.randn(4, 5, generator=torch.Generator().manual_seed(i))

    optimizer = adamw(lambda n: Rate(lr=1e-2))
    step = make_step(value_and_grad(loss), optimizer, **seed)
    return train_steps(
        step,
        State(params=params, opt=optimizer.init(params)),
        batch_at,
        steps=steps,
        folder=folder,
        every=Every(save=2),
    )


def test_a_resumed_run_draws_the_same_dropout(tmp_path):
    whole = _lora_run(tmp_path / "whole", 10, seed=3)
    with pytest.raises(KeyboardInterrupt):
        _lora_run(tmp_path / "cut", 10, stop=5, seed=3)
    torch.manual_seed(99)  # another process would start with another generator
    before = torch.get_rng_state()
    assert _same(whole, _lora_run(tmp_path / "cut", 10, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    assert not _same(whole, _lora_run(tmp_path / "other", 10, seed=4))
    first = _lora_run(tmp_path / "unseeded", 10)
    assert not _same(first, _lora_run(tmp_path / "again", 10))


def test_a_step_seeds_no_gpu_but_its_own(monkeypatch):
    """On a CPU none; `torch.manual_seed` would seed all of them."""
    for name in ("manual_seed", "manual_seed_all", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: pytest.fail(f"torch.cuda.{name}"))
    others = [torch.Generator().manual_seed(7) for _ in range(3)]
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(others))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: others[device.index].get_state())
    put_back = lambda state, device: others[device.index].set_state(state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put_back)

    class OnGpu:  # a parameter of cuda:1
        device = torch.device("cuda", 1)

    for device in ("cpu", "cuda"):
        params = {"w": OnGpu() if device == "cuda" else torch.ones(2)}
        monkeypatch.setattr(loop, "flatten", lambda tree: tree)
        with loop._seeded_draws(3, State(params=params, opt={})):
            seeds = [gen.initial_seed() for gen in others]
            assert seeds[0] == seeds[2] == 7
            assert (seeds[1] == torch.default_generator.initial_seed()) == (device == "cuda")
        assert [gen.initial_seed() for gen in others] == [7, 7, 7]


# What is not finite ---------------------------------------------------------------------------------------------------------------------
def _wrong_gradient(value, at=3):
    """(step, state, batch_at) of a run whose loss stays finite and whose gradient holds `value` at step `at`."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.save_for_backward(factor)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0], None

    params = {"w": torch.ones(3), "v": torch.ones(2)}
    loss = lambda p, b: ((Wrong.apply(p["w"], b) * 0.5).sum() + p["v"].square().sum(), Aux())
    return params, loss, lambda i: torch.tensor([value, 1.0, 1.0] if i + 1 == at else [1.0] * 3)


OPTIMISERS = {
    "adamw": lambda rate: adamw(rate),
    "master": lambda rate: with_master(adamw(rate)),
    "8bit": lambda rate: adamw(rate, packing=eight_bit_moments()),
    "routed": lambda rate: routed(
        lambda n: "one" if n == "w" else "two", {"one": adamw(rate), "two": adamw(rate)}
    ),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_never_saved(kind, clip, value, tmp_path):
    params, loss, batch_at = _wrong_gradient(value)
    optimizer = OPTIMISERS[kind](lambda n: Rate(lr=0.1))

    def train(stop, at=batch_at):
        own = {k: t.clone() for k, t in params.items()}
        step = make_step(value_and_grad(loss), optimizer, clip=clip)
        return train_steps(
            step,
            State(params=own, opt=optimizer.init(own)),
            at,
            steps=stop,
            folder=tmp_path,
            every=Every(log=1, save=1),
        )

    for _ in range(2):  # the rerun meets the same step, and still loses nothing
        with pytest.raises(
            FloatingPointError,
            match=r"norm of the gradient is (nan|inf) \(loss .*\) at step 3; the last good state is",
        ):
            train(6)
        state = read_state(tmp_path / "last.pt")
        assert state.step == 2
        assert all(t.isfinite().all() for t in flatten(state.params).values())
    assert train(6, lambda i: torch.ones(3)).step == 6  # with better data it goes on from there
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize(
    "every", [Every(log=0, save=0), Every(log=5, save=5), Every(log=0, save=0, validate=5)]
)
def test_a_wrong_gradient_between_two_looks_is_told_with_its_step(every, tmp_path):
    params, loss, batch_at = _wrong_gradient(float("nan"))
    frozen = lambda p, b: loss(p | {"w": p["w"].nan_to_num(1.0)}, b)  # the loss never shows it
    optimizer = adamw(lambda n: Rate(lr=0.1))
    with pytest.raises(
        FloatingPointError, match=r"norm of the gradient is nan \(loss .*\) at step 3; no state was saved yet"
    ):
        train_steps(
            make_step(value_and_grad(frozen), optimizer),
            State(params=params, opt=optimizer.init(params)),
            batch_at,
            steps=5,
            folder=tmp_path,
            every=every,
            validate=lambda s: {"score": 1.0},
        )
    assert not list(tmp_path.glob("*.pt"))


def test_an_update_that_overflows_is_not_saved(tmp_path):
    grow = Optimizer(
        lambda p: {"mean": {"w": torch.zeros(3)}}, lambda g, opt, p, step: ({"w": p["w"] * 1e30}, opt)
    )
    step = make_step(value_and_grad(lambda p, b: (p["w"].sum() * 1e-30, Aux())), grow)
    start = State(params={"w": torch.ones(3)}, opt=grow.init({}))
    run = partial(train_steps, step, start, lambda i: None, steps=4, folder=tmp_path, every=Every(save=1))
    with pytest.raises(
        FloatingPointError,
        match="trained numbers are not finite after the update at step 2; the last good state is",
    ):
        run()
    assert torch.equal(read_state(tmp_path / "last.pt").params["w"], torch.full((3,), 1e30))
    save_state(
        tmp_path / "last.pt", State(params={"w": torch.full((3,), float("nan"))}, opt=grow.init({}), step=1)
    )
    with pytest.raises(ValueError, match=r"last\.pt: holds numbers that are not finite"):
        run()


@pytest.mark.parametrize(("dropout", "same"), [(0.0, False), (0.0, True), (0.5, False)])
def test_another_number_of_processes_goes_on_unless_each_of_them_draws(tmp_path, dropout, same):
    """Where nothing is drawn any number of processes computes the same, but for the last bits; masks of dropout are drawn by each process for its rows."""
    params, optimizer = {"w": torch.ones(3)}, adamw(lambda n: Rate(lr=0.1))
    loss = lambda p, x: ((F.dropout(p["w"], dropout) if dropout else p["w"]).sum() * x, Aux())

    def train_to(steps):
        step = make_step(value_and_grad(loss), optimizer, seed=0)
        state = State(params=params, opt=optimizer.init(params))
        return train_steps(
            step, state, lambda i: torch.ones(()), steps=steps, folder=tmp_path, same_processes=same
        )

    assert train_to(2).drawn == (dropout > 0)
    raw = torch.load(tmp_path / "last.pt", weights_only=True)
    assert raw["processes"] == 1
    torch.save(raw | {"processes": 4}, tmp_path / "last.pt")  # as four processes leave it
    assert train_to(2).step == 2  # nothing is left to be trained
    if not (dropout or same):
        assert train_to(4).step == 4
        return
    reason = "each draws" if dropout else "each adds up its share of a batch by itself"
    with pytest.raises(
        ValueError,
        match=f"last.pt: was trained by 4 processes, now there are 1; {reason}.* start 4, or remove",
    ):
        train_to(4)
    torch.save(
        {k: v for k, v in raw.items() if k not in ("processes", "drawn")}, tmp_path / "last.pt"
    )  # of an older medvl
    assert train_to(4).step == 4


# The end before the last step, and states besides the last one ----------------------------------------------------------
SCORES = (1.0, 3.0, 2.0, 3.0, 2.5, 4.0, 0.0, 0.0)  # of the validations after steps 2, 4, ...


def _patient(folder, scores=SCORES, steps=16, stop=None, **kw):
    """A run that is validated every second step; the score is a function of the step alone."""

    def batch_at(i):
        if i == stop:
            raise KeyboardInterrupt
        return {"x": torch.full((2, 2), float(i))}

    optimizer = adamw(lambda n: Rate(lr=0.1))
    step = make_step(value_and_grad(lambda p, b: ((p["w"] * b["x"]).sum(), Aux())), optimizer)
    start = {"w": torch.ones(2, 2)}
    return train_steps(
        step,
        State(params=start, opt=optimizer.init(start)),
        batch_at,
        steps=steps,
        folder=folder,
        every=Every(log=1, save=kw.pop("save", 3), validate=2),
        validate=lambda state: {"score": scores[state.step // 2 - 1]},
        **kw,
    )


@pytest.mark.parametrize(("patience", "end"), [(0, 16), (1, 6), (2, 8), (3, 10), (4, 16)])
def test_a_run_ends_after_validations_without_a_better_score(tmp_path, patience, end):
    """An equal score is no better one: after 3.0 at step 4 come 2, 3 and 2.5, then 4."""
    lines = []
    state = _patient(tmp_path, patience=patience, log=lines.append)
    assert state.step == end
    last = read_state(tmp_path / "last.pt")
    assert (last.step, last.steps) == (end, end)
    assert read_state(tmp_path / "best.pt").step == (4 if end < 16 else 12)
    assert ("gave no better score" in lines[-1]) == (end < 16)
    assert read_trained(tmp_path, "best", model={"w": torch.ones(2, 2)}, device="cpu").step in (4, 12)


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_run_that_ends_early_ends_so_after_a_stop_too(tmp_path, stop):
    """Wherever it is stopped: between a validation and a save the validation comes again."""
    whole = _patient(tmp_path / "whole", patience=2)
    with pytest.raises(KeyboardInterrupt):
        _patient(tmp_path / "cut", patience=2, stop=stop)
    again = _patient(tmp_path / "cut", patience=2)
    assert (again.step, again.stale, again.best) == (whole.step, whole.stale, whole.best) == (8, 2, 3.0)
    assert torch.equal(again.params["w"], whole.params["w"])
    for name in ("last.pt", "best.pt"):
        one, two = (read_state(tmp_path / run / name) for run in ("whole", "cut"))
        assert torch.equal(one.params["w"], two.params["w"])
        assert evolve(one, params={}, opt={}) == evolve(two, params={}, opt={})
    once_more = _patient(tmp_path / "cut", patience=2, stop=8)  # asks for no batch
    assert torch.equal(once_more.params["w"], whole.params["w"])


@pytest.mark.parametrize("stop", [None, 5, 7])
def test_tensorboard_shows_each_step_once(tmp_path, stop):
    """The numbers of metrics.jsonl, also where steps behind the last save were run again after a kill."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if stop:
        with pytest.raises(KeyboardInterrupt):
            _patient(tmp_path, stop=stop, tensorboard=True, rates={"samples_per_second": 4})
    _patient(tmp_path, tensorboard=True, rates={"samples_per_second": 4, "mfu": 1e-9})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {*display.TIMING_KEYS} <= lines[-1].keys()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {*events.Tags()["scalars"]} == {*lines[-1]} - {"step", "time"}
    for name in ("loss", "grad_norm", "valid_score", "samples_per_second"):
        shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        assert shown == [(line["step"], line[name]) for line in lines if name in line]
    assert [line["step"] for line in lines] == [*range(1, 17)]
    before = sorted(tmp_path.iterdir())
    _patient(tmp_path, tensorboard=True)
    assert sorted(tmp_path.iterdir()) == before


def test_tensorboard_is_missed_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"tensorboard = true needs tensorboard; pip install 'medvl\[tensorb"
    ):
        check_tensorboard()


def test_a_file_says_nothing_of_patience_where_there_is_none(tmp_path):
    _patient(tmp_path)
    assert "stale" not in torch.load(tmp_path / "last.pt", weights_only=True)


@pytest.mark.parametrize(("number", "kept"), [(0, []), (1, []), (2, [15, 16]), (9, [3, 6, 9, 12, 15, 16])])
def test_the_latest_states_are_kept(tmp_path, number, kept):
    _patient(tmp_path, keep_last=number)
    paths = sorted(tmp_path.glob("step-*.pt"))
    assert [read_state(path).step for path in paths] == kept
    assert [path.name for path in paths] == [f"step-{step:09d}.pt" for step in kept]
    if kept:
        assert paths[-1].read_bytes() == (tmp_path / "last.pt").read_bytes()


PATIENT = """
import sys
from medvl.base import processes
from tests.training.test_loop import _patient
rank, folder, kill = int(sys.argv[1]), sys.argv[2], sys.argv[3]
processes.join_processes(init_method=f"file://{folder}/store{kill}", rank=rank, world_size=2)
scores = [s if rank == 0 else 9.0 + i for i, s in enumerate((1.0, 3.0, 2.0, 3.0, 2.5, 4.0, 0.0, 0.0))]
try:
    state = _patient(f"{folder}/run", scores=scores, patience=2, stop=5 if kill == "1" else None)
    print(state.step, state.stale, state.best)
except KeyboardInterrupt:
    print("stopped")
"""


def test_two_processes_end_at_the_same_step_by_the_score_of_the_first(tmp_path):
    """The second one's scores rise for ever; with a stop in between, and without."""
    for kill, said in (("1", "stopped"), ("0", "8 2 3.0")):
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", PATIENT, str(rank), str(tmp_path), kill],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        assert [p.communicate(timeout=120)[0].strip() for p in pair] == [said, said]
