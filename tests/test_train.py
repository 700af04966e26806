"""The loop against autograd on the whole batch, and against being stopped, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from medvl.losses import clip_loss, siglip_loss
from medvl.optim import Rate, adamw, warmup_cosine
from medvl.train import Aux, Every, State, cached_value_and_grad, fit, make_step, read_state, save, value_and_grad
from medvl.tree import flatten

ROOT = Path(__file__).resolve().parents[1]


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
    got_value, got_aux, got = cached_value_and_grad(embed, lambda p, r: contrast(p, r, loss), chunk=chunk)(params, batch)
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
        torch.testing.assert_close(g, torch.zeros(2, dtype=torch.float64) if k == "unused" else leaves[k].grad, rtol=0, atol=1e-12)
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
        return clip_loss(F.normalize(rows["image"], dim=-1), F.normalize(rows["text"], dim=-1), p["scale"].float()), Aux()

    for chunk in (4, 16):
        seen.clear()
        cached_value_and_grad(e, c, chunk=chunk, precision="bfloat16")(_params(gen), _batch(gen))
        assert seen == {"embed": torch.bfloat16, "loss": torch.float32}


def test_two_processes_equal_one(tmp_path, gen):
    code = """
        import sys, torch, torch.distributed as dist
        sys.path.insert(0, {tests!r})
        from test_train import _params, _batch, embed, contrast
        from medvl.train import cached_value_and_grad
        dist.init_process_group("gloo", init_method="file://{store}", rank=int(sys.argv[1]), world_size=2)
        gen = torch.Generator().manual_seed(0)
        params, batch = _params(gen), _batch(gen)
        mine = {{k: v[int(sys.argv[1]) * 8 :][:8] for k, v in batch.items()}}
        value, aux, grads = cached_value_and_grad(embed, contrast, chunk=3)(params, mine)
        torch.save({{"value": value, "grads": grads, "means": aux.means}}, sys.argv[2])
        dist.destroy_process_group()
    """
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(code.format(tests=str(ROOT / "tests"), store=tmp_path / "store")))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen([sys.executable, script, str(r), tmp_path / f"{r}.pt"], env=env) for r in range(2)]
    assert [r.wait() for r in runs] == [0, 0]
    params, batch = _params(gen), _batch(gen)
    value, aux, want = cached_value_and_grad(embed, contrast, chunk=16)(params, batch)
    for r in range(2):
        got = torch.load(tmp_path / f"{r}.pt", weights_only=True)
        assert abs(got["value"] - value) < 1e-12
        assert _worst(got["grads"], want) < 1e-9
        assert _worst(got["means"], aux.means) < 1e-12


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
    return fit(
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


def test_resume_is_bit_exact_and_repeats_no_line(tmp_path):
    whole = _run(tmp_path / "whole")
    step, state = _start(torch.Generator().manual_seed(0))

    def interrupted(i):
        if i == 17:
            raise KeyboardInterrupt
        return _batch_at(i)

    with pytest.raises(KeyboardInterrupt):
        fit(
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
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "cut/metrics.jsonl").read_text()


def test_running_means_follow_the_batches(tmp_path):
    step, state = _start(torch.Generator().manual_seed(0))
    first = embed(state.params, _batch_at(0))["image"].mean(0)
    state, _ = step(state, _batch_at(0))
    torch.testing.assert_close(state.means["image"], first)
    second = embed(state.params, _batch_at(1))["image"].mean(0)
    state, _ = step(state, _batch_at(1))
    torch.testing.assert_close(state.means["image"], (first + second) / 2)


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from test_train import _run
_run(sys.argv[1], steps=int(sys.argv[2]), slow=0.02)
"""


def _process(folder, steps=40):
    env, code = os.environ | {"PYTHONPATH": str(ROOT)}, SCRIPT.format(tests=str(ROOT / "tests"))
    return subprocess.Popen([sys.executable, "-c", code, folder, str(steps)], env=env, stderr=subprocess.PIPE, text=True)


def test_sigterm_saves_and_the_next_run_goes_on(tmp_path):
    whole = _run(tmp_path / "whole")
    run = _process(tmp_path / "cut")
    while not (tmp_path / "cut/last.pt").exists():
        time.sleep(0.05)
    run.terminate()
    _, said = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in said
    assert 3 <= read_state(tmp_path / "cut/last.pt").step < 40
    assert _same(whole, _run(tmp_path / "cut"))


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
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "cut/metrics.jsonl").read_text()


def test_errors_say_what_to_do(tmp_path, gen):
    _, state = _start(gen)
    bad = lambda s, b: (s, {"loss": torch.tensor(float("nan"))})
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1; the last good state"):
        fit(bad, state, _batch_at, steps=3, folder=tmp_path, every=Every(log=1))
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
    save(tmp_path / "last.pt", other)
    with pytest.raises(ValueError, match="parameters differ from the model"):
        _run(tmp_path)
    with pytest.raises(ValueError, match="no such checkpoint"):
        read_state(tmp_path / "nothing.pt")
