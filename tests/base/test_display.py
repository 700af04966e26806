"""What running work shows: in a terminal, in a file, and in what a run keeps."""

import io
import json
import logging
import os
import re
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from unittest import mock

import pytest
import torch
from tqdm import tqdm

import tasks
from medvl.base import display
from medvl.training.gradients import Aux, value_and_grad
from medvl.training.loop import Every, make_step, train_steps
from medvl.training.optim import Rate, adamw, warmup_cosine
from medvl.training.states import State

STEP = re.compile(
    r"one: (\d+)/40 \((\d+) %\), (\d\d:\d\d|\?) left, [\d.e-]+ s/step, lr [\d.e-]+, loss [\d.]+, \d+\.\d\d GB, grad_norm [\d.]+"
    r"(, valid_score [\d.]+)?"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2

    @property
    def screen(self):
        """What is left to see: the lines of a terminal that knows a carriage return, a line feed and one line up."""
        rows, y, x = [""], 0, 0
        for piece in re.findall(r"\r|\n|\x1b\[A|[^\r\n\x1b]+", self.getvalue()):
            if piece == "\r":
                x = 0
            elif piece == "\n":
                y, x = y + 1, 0
                rows += [""] * (y + 1 - len(rows))
            elif piece == "\x1b[A":
                y -= 1
            else:
                rows[y] = rows[y][:x].ljust(x) + piece + rows[y][x + len(piece) :]
                x += len(piece)
        return [row.rstrip() for row in rows]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are told to."""
    now = [1.8e9]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


@contextmanager
def watched(columns=200):
    """In a terminal: what is shown goes there."""
    made = Terminal()
    size = os.terminal_size((columns, 24))
    width = mock.patch("os.get_terminal_size", return_value=size)
    of_old_tqdm = mock.patch.dict(os.environ, COLUMNS=str(columns), LINES="24")
    with redirect_stderr(made), redirect_stdout(made), width, of_old_tqdm:
        yield made


def work(clock, items, seconds):
    for _ in display.track(items, "drawing chests"):
        clock[0] += seconds


def test_in_a_terminal_one_line_is_replaced_and_taken_away(clock):
    with watched() as terminal:
        work(clock, range(50), 0.5)
    shown = [
        re.sub(r"\|.*\|", "|", line).rstrip() for line in terminal.getvalue().split("\r") if line.strip()
    ]
    assert shown[0] == "drawing chests:   4%| 2/50 [00:01<00:24,  2.00it/s]"
    assert shown[-1] == "drawing chests: 100%| 50/50 [00:25<00:00,  2.00it/s]"
    assert terminal.screen == [""]
    assert "\n" not in terminal.getvalue()


def test_quick_work_shows_nothing(clock):
    with watched() as terminal:
        work(clock, range(9), 0.1)
    assert terminal.getvalue().strip() == ""


def test_what_is_said_during_quick_work_leaves_no_bar_behind(clock):
    with watched() as terminal:
        for i in display.track(range(9), "drawing chests"):
            clock[0] += 0.01
            if i == 4:
                tqdm.write("a chest was drawn twice")
    assert terminal.screen == ["a chest was drawn twice", ""]


def test_warnings_of_a_task_land_above_the_bar(clock):
    def check():
        for i in display.track(range(9), "drawing chests"):
            clock[0] += 2
            if i == 4:
                logging.getLogger("medvl").warning("chest 4 has no ribs")
                assert terminal.screen[1].startswith("drawing chests:  ")
            if i == 6:
                warnings.warn("chest 6 is cut off", stacklevel=1)

    with watched() as terminal:
        tasks._call(check)
    first, second, *rest = terminal.screen
    assert first == "chest 4 has no ribs"
    assert second.endswith("UserWarning: chest 6 is cut off")
    assert not any("drawing" in line for line in rest)


def test_an_error_takes_the_bar_away(clock):
    def fail(terminal):
        for i in display.track(range(9), "drawing chests"):
            clock[0] += 2
            assert i == 0 or terminal.screen[0]
            if i == 4:
                raise ValueError("no ribs")

    with watched() as terminal, pytest.raises(ValueError, match="no ribs"):
        fail(terminal)
    assert terminal.screen == [""]


def test_in_a_file_nothing_is_shown(clock, capsys):
    work(clock, range(5515), 0.125)
    assert capsys.readouterr() == ("", "")


def test_other_processes_show_nothing(clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with watched() as terminal:
        work(clock, range(50), 0.5)
    assert terminal.getvalue() == ""


def test_work_that_goes_on_counts_what_was_done_before(clock):
    with watched() as terminal:
        for _ in display.track(iter(range(5)), "scans", total=100, initial=90):
            seen, shown = terminal.screen, clock[0]
            clock[0] += 2
    assert shown == 1.8e9 + 8
    assert re.sub(r"\|.*\|", "|", seen[0]) == "scans:  94%| 94/100 [00:08<00:12,  2.00s/it]"


# Training -------------------------------------------------------------------------------------------------------------------------------
def trained(folder, log, steps=40):
    schedule = warmup_cosine(40, 10)
    optimizer = adamw(lambda n: Rate(lr=0.02), schedule)
    params = {"w": torch.ones(3)}
    step = make_step(value_and_grad(lambda p, b: (p["w"].square().sum(), Aux())), optimizer)
    return train_steps(
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
    assert [bool(m[4]) for m in found] == [False, True, False, True]
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in kept] == pytest.approx(
        [0.02 * warmup_cosine(40, 10)(i) for i in (9, 19, 29, 39)]
    )
    assert all(line["seconds_per_step"] >= 0 for line in kept)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", line["time"]) for line in kept)


def test_the_clock_of_steps_stands_still_while_the_state_is_validated(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("medvl.training.journal.time.monotonic", lambda: now[0])

    def step(state, batch):
        now[0] += 2.0
        return State(params=state.params, opt={}, step=state.step + 1), {"loss": torch.ones(())}

    def validate(state):
        now[0] += 100.0
        return {"score": 1.0}

    lines = []
    start = State(params={"w": torch.ones(1)}, opt={})
    train_steps(
        step,
        start,
        lambda i: None,
        steps=8,
        folder=tmp_path,
        every=Every(log=2, validate=4),
        validate=validate,
        log=lines.append,
    )
    assert all(", 2 s/step, " in line for line in lines)
    assert [re.search(r", (.*?) left", line)[1] for line in lines] == ["00:12", "01:48", "00:37", "00:00"]


def test_in_a_terminal_training_is_one_line_and_log_txt_keeps_all(tmp_path):
    log = display.Log(tqdm.write, tmp_path / "log.txt")
    with watched() as terminal:
        log("stage one begins")
        trained(tmp_path, log)
        log("done")
    assert terminal.screen[0] == "stage one begins"
    assert [STEP.fullmatch(line)[1] for line in terminal.screen[1:-2]] == [
        "20",
        "40",
    ]  # those that were validated stay
    assert terminal.screen[-2:] == ["done", ""]
    assert re.search(r"\rone: 10/40 \(25 %\), .* left, .*, grad_norm", terminal.getvalue())
    kept = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in kept)
    assert [line[21:].partition(" ")[0] for line in kept] == ["stage", *["one:"] * 4, "done"]


def test_the_line_fits_a_narrow_terminal_and_log_txt_does_not_lose_its_end(tmp_path):
    with watched(columns=60) as terminal:
        trained(tmp_path, display.Log(lambda line: None, tmp_path / "log.txt"))
    lines = [line for line in terminal.getvalue().split("\r") if line.startswith("one: ")]
    assert max(len(line.rstrip()) for line in lines) == 59
    assert all("grad_norm" in line for line in (tmp_path / "log.txt").read_text().splitlines())


def test_in_a_file_training_is_plain_lines(tmp_path, capsys):
    trained(tmp_path, display.Log(tqdm.write, tmp_path / "log.txt"))
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert all(STEP.fullmatch(line) for line in out.splitlines())
    assert err == ""
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


def test_a_line_is_in_a_file_as_soon_as_it_is_said(tmp_path):
    log = display.Log(tqdm.write, tmp_path / "log.txt")
    with open(tmp_path / "out", "w") as out, redirect_stdout(out):
        log("data in place")
        assert (tmp_path / "out").read_text() == "data in place\n"
        log.update("step 1")
        assert (tmp_path / "out").read_text() == "data in place\nstep 1\n"
