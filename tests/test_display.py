"""What running work shows: in a terminal, in a file, and in what a run keeps."""

import contextlib
import io
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

from medvl import display
from medvl.optim import Rate, adamw, warmup_cosine
from medvl.train import Aux, Every, State, fit, make_step, value_and_grad

STEP = re.compile(
    r"one: (\d+)/40 \((\d+) %\), [\d.]+ (ms|s)/step, \d+ (s|min) left, lr [\d.e-]+, loss [\d.]+, \d+\.\d\d GB, grad_norm [\d.]+"
    r"(, valid_score [\d.]+)?"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True

    @property
    def screen(self):
        """What is left to see: lines, each as it was when it was last replaced."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are told to."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    made = Terminal()
    monkeypatch.setattr(display, "sys", SimpleNamespace(stderr=made, stdout=made))
    monkeypatch.setattr(display.shutil, "get_terminal_size", lambda: os.terminal_size((200, 24)))
    return made


def work(clock, items, seconds):
    for _ in display.track(items, "drawing chests"):
        clock[0] += seconds


def test_in_a_terminal_one_line_is_replaced_and_taken_away(clock, terminal):
    work(clock, range(50), 0.5)
    shown = terminal.getvalue().split("\r\x1b[K")
    assert shown[1] == "drawing chests: 2 of 50 (4 %), 0.50 s each, 24 s left"
    assert shown[-2] == "drawing chests: 50 of 50 (100 %), 0.50 s each, 0 s left"
    assert terminal.screen == [""]
    assert "\n" not in terminal.getvalue()


def test_quick_work_shows_nothing(clock, terminal):
    work(clock, range(9), 0.1)
    assert terminal.getvalue() == ""


def test_in_a_file_there_is_no_bar_and_a_line_a_minute_at_most(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(display, "sys", SimpleNamespace(stderr=log))
    work(clock, range(2661), 0.02)  # under a minute
    assert log.getvalue() == ""
    work(clock, range(5515), 0.125)
    lines = log.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "drawing chests: 480 of 5,515 (8 %), 0.12 s each, 10 min left"
    assert "\r" not in log.getvalue()


def test_other_processes_show_nothing(clock, terminal, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work(clock, range(50), 0.5)
    assert terminal.getvalue() == ""


def test_work_that_goes_on_counts_what_was_done_before(clock, terminal):
    with display.Progress("scans", 100, 90) as progress:
        clock[0] += 10
        progress.advance(5)
        assert terminal.screen == ["scans: 95 of 100 (95 %), 2.00 s each, 10 s left"]
        progress.clear()
        assert terminal.screen == [""]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (11100, "3 h 05 min"), (180000, "2 d 02 h")]
)
def test_durations(seconds, text):
    assert display.duration(seconds) == text


# Training -------------------------------------------------------------------------------------------------------------------------------
def trained(folder, log, steps=40):
    schedule = warmup_cosine(40, 10)
    optimizer = adamw(lambda n: Rate(lr=0.02), schedule)
    params = {"w": torch.ones(3)}
    step = make_step(value_and_grad(lambda p, b: (p["w"].square().sum(), Aux())), optimizer)
    return fit(
        step,
        State(params=params, opt=optimizer.init(params)),
        lambda i: None,
        steps=steps,
        folder=folder,
        every=Every(log=10, validate=20),
        validate=lambda state: {"score": float(state.step)},
        title="one",
        lr=lambda i: 0.02 * schedule(i),
        log=log,
    )


def test_training_says_where_it_is_how_fast_and_how_long(tmp_path):
    lines = []
    trained(tmp_path, lines.append)
    found = [STEP.fullmatch(line) for line in lines]
    assert all(found), lines
    assert [(m[1], m[2]) for m in found] == [("10", "25"), ("20", "50"), ("30", "75"), ("40", "100")]
    assert [bool(m[5]) for m in found] == [False, True, False, True]
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in kept] == pytest.approx([0.02 * warmup_cosine(40, 10)(i) for i in (9, 19, 29, 39)])
    assert all(line["seconds_per_step"] >= 0 for line in kept)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", line["time"]) for line in kept)


def test_the_clock_of_steps_stands_still_while_the_state_is_validated(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("medvl.train.time.monotonic", lambda: now[0])

    def step(state, batch):
        now[0] += 2.0
        return State(params=state.params, opt={}, step=state.step + 1), {"loss": torch.ones(())}

    def validate(state):
        now[0] += 100.0
        return {"score": 1.0}

    lines = []
    start = State(params={"w": torch.ones(1)}, opt={})
    fit(step, start, lambda i: None, steps=8, folder=tmp_path, every=Every(log=2, validate=4), validate=validate, log=lines.append)
    assert all(", 2.00 s/step, " in line for line in lines)
    assert [re.search(r"step, (.*?) left", line)[1] for line in lines] == ["12 s", "2 min", "37 s", "0 s"]


def test_in_a_terminal_training_is_one_line_and_log_txt_keeps_all(tmp_path, terminal):
    log = display.Log(print, tmp_path / "log.txt")
    with contextlib.redirect_stdout(terminal):
        log("stage one begins")
        trained(tmp_path, log)
        log("done")
    seen = [line for line in terminal.screen if line]
    assert seen[0] == "stage one begins"
    assert [STEP.fullmatch(line)[1] for line in seen[1:-1]] == ["20", "40"]  # those that were validated stay
    assert seen[-1] == "done"
    kept = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in kept)
    assert [line[21:].partition(" ")[0] for line in kept] == ["stage", *["one:"] * 4, "done"]


def test_in_a_file_training_is_plain_lines(tmp_path, capsys):
    trained(tmp_path, display.Log(print, tmp_path / "log.txt"))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert all(STEP.fullmatch(line) for line in out.splitlines())
    assert err == ""
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4
