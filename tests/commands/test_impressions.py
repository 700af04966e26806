"""`invoke impressions` against a small server that answers, fails, dies and comes back as it is told."""

import csv
import hashlib
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from medvl.base import files
from medvl.commands import impressions
from medvl.hub import skeletons, tokens
from medvl.language.templates import TEMPLATES
from tests import tiny

pytest.importorskip("httpx")
ROOT = Path(__file__).resolve().parents[2]
SECRET = "Jane Q Planted"


def answer_to(prompt):
    """What the server says: a function of the prompt, with a preamble that is cleaned off."""
    return f"Impression: Sign {hashlib.sha256(prompt.encode()).hexdigest()[:12]}."


def sse(text, finish="stop"):
    parts = [
        {"choices": [{"delta": {"content": text}}]},
        {"choices": [{"delta": {}, "finish_reason": finish}]},
    ]
    return "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"


class Server:
    """Of OpenAI's API. `faults` are taken one by one: (status, body), or None to answer; then all are answered."""

    def __init__(self, port=0):
        self.asked, self.told, self.faults = [], [], []  # prompts as they came, and those that were answered
        self.most, self.running, self.pause_s, self.say = (
            0,
            0,
            0.0,
            lambda body: sse(answer_to(prompt_of(body))),
        )
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self.send(200, json.dumps({"data": [{"id": "toy"}]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append(prompt_of(body))
                    outer.running += 1
                    outer.most = max(outer.most, outer.running)
                    fault = outer.faults.pop(0) if outer.faults else None
                time.sleep(outer.pause_s)
                with outer.lock:
                    outer.running -= 1
                if self.send(*(fault or (200, outer.say(body)))) and not fault:
                    outer.told.append(prompt_of(body))

            def send(self, status, text):
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "text/event-stream")
                    self.end_headers()
                    self.wfile.write(text.encode())
                    return True
                except OSError:
                    return False  # the client was killed

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def prompt_of(body):
    (turn,) = body["messages"]  # one turn of the user
    assert turn["role"] == "user"
    return turn["content"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(impressions, "_BACKOFF_S", 0.001)
    running = Server()
    yield running
    running.close()


@pytest.fixture
def tables(tmp_path):
    """(table, examples, out): 12 scans of two reconstructions; of three, one is complete and one has no findings."""
    columns = ["VolumeName", "Findings_EN", "Impressions_EN"]
    texts = [(f"Findings {SECRET} {i}.", "") for i in range(12)]
    texts[::3] = [("Findings.", "Own.")] * 4
    texts[1::3] = [("", "Not given.")] * 4
    rows = [[f"p_{i}_a_{k}.nii.gz", *text] for i, text in enumerate(texts) for k in (1, 2)]
    shots = [[f"train_{i}_a_1.nii.gz", f"Given {i}.", f"Written {i}."] for i in range(10)]
    for path, lines in ((tmp_path / "r.csv", rows), (tmp_path / "train.csv", shots)):
        files.write_csv(path, [dict(zip(columns, line, strict=True)) for line in lines], columns)
    return tmp_path / "r.csv", tmp_path / "train.csv", tmp_path / "out" / "done.csv"


def fill(tables, server, **options):
    impressions.fill_impressions(
        *map(str, tables), **({"engine": server and server.url, "model": "toy"} | options)
    )
    return read(tables[2])


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_is_completed_with_one_call_for_each_scan(tables, server, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    before = tables[0].read_bytes()
    rows = fill(tables, server)
    assert tables[0].read_bytes() == before
    assert Counter(row["Impression_source"] for row in rows) == {"original": 8, "generated": 8, "": 8}
    assert len(server.asked) == len({*server.asked}) == 4
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["Impressions_EN"] == second["Impressions_EN"]
    expected = {answer_to(prompt).removeprefix("Impression: ") for prompt in server.asked}
    assert {row["Impressions_EN"] for row in rows if row["Impression_source"] == "generated"} == expected
    log = json.loads(tables[2].with_suffix(".json").read_text())
    assert [line["row_index"] for line in log] == [4, 5, 10, 11, 16, 17, 22, 23]
    assert all(rows[line["row_index"]]["Impressions_EN"] == line["generated_impression"] for line in log)
    out = capsys.readouterr().out
    assert "24 rows: 8 have an impression of their own, 8 a generated one, 8 none (8 without findings)" in out
    assert "4 scans asked (toy): 4 answers cleaned, 0 cut, 0 empty" in out
    assert SECRET not in out + caplog.text
    # Again: nothing is asked, and the same is written. Another seed: other prompts.
    again = tables[2].read_bytes()
    fill(tables, server)
    assert (len(server.asked), tables[2].read_bytes()) == (4, again)
    fill(tables, server, seed=1)
    assert len({*server.asked}) == 8


HTML = (200, "<html><body>Welcome</body></html>")
HALF = (200, 'data: {"choices": [{"delta": {"content": "Imp')
DIED = (200, sse("Impression: Sign").partition('data: {"choices": [{"delta": {}')[0])


@pytest.mark.parametrize(
    "fault", [(500, "oops"), HTML, HALF, DIED], ids=["500", "html", "half a JSON", "dies"]
)
def test_a_server_that_fails_is_asked_again_and_then_given_up_with_what_is_done_kept(
    tables, server, fault, monkeypatch
):
    server.faults = [fault] * 3
    rows = fill(tables, server, in_flight=1)
    assert Counter(row["Impression_source"] for row in rows)["generated"] == 8
    assert len(server.asked) == 7

    monkeypatch.setattr(impressions, "_TRIES", 3)
    server.asked, server.faults = [], [None, None] + [fault] * 3
    with pytest.raises(
        ValueError, match=r"row \d+ of the table: the model server .*; the same command goes on"
    ) as e:
        fill(tables, server, in_flight=1, seed=1)
    assert SECRET not in str(e.value)
    assert len(server.asked) == 5
    fill(tables, server, in_flight=1, seed=1)
    assert Counter(Counter(server.asked).values()) == {
        1: 3,
        4: 1,
    }  # the fourth once more, the first two never


def test_what_no_other_try_mends_is_said_at_once(tables, server):
    server.faults = [(400, "context_length_exceeded")]
    with pytest.raises(ValueError, match=r"row 7 of the table: the prompt and max_tokens are longer than"):
        fill(tables, server, in_flight=1)
    assert len(server.asked) == 1
    assert not tables[2].exists()


def test_an_empty_answer_is_asked_for_once_more_and_then_left_empty(tables, server, capsys):
    prompts, asked = [], []

    def say(body):
        prompts.append(prompt_of(body))
        asked.append(body["temperature"])
        is_mute = prompts[-1] == prompts[0]  # never answered
        return sse("" if is_mute or body["temperature"] == 0 else "Here is the impression: Clear.")

    server.say = say
    rows = fill(tables, server, in_flight=1)
    assert Counter(row["Impression_source"] for row in rows) == {"original": 8, "generated": 6, "": 10}
    assert asked == [0, 0.5] * 4
    assert "10 none (8 without findings)" in (out := capsys.readouterr().out)
    assert "4 scans asked (toy): 3 answers cleaned, 0 cut, 1 empty" in out
    fill(tables, server, in_flight=1)
    assert len(asked) == 8


def test_answers_beyond_the_cap_are_cut_at_a_sentence(tables, server, capsys):
    server.say = lambda body: sse(f"Clear. Cap {body['max_tokens']} rea", finish="length")
    rows = fill(tables, server, max_tokens=7)
    assert {row["Impressions_EN"] for row in rows if row["Impression_source"] == "generated"} == {"Clear."}
    assert "4 cut" in capsys.readouterr().out


def test_requests_are_in_flight_together(tables, server):
    server.pause_s = 0.2
    fill(tables, server, in_flight=4)
    assert server.most == 4
    server.most = 0
    fill(tables, server, in_flight=1, seed=1)
    assert server.most == 1


def test_tables_that_must_not_be_used_so_are_refused_before_anything_is_asked(tables, server):
    table, examples, out = tables
    with pytest.raises(ValueError, match="examples must be of other patients"):
        fill((table, table, out), server)
    with pytest.raises(ValueError, match=r"--out must be a file of its own that ends in \.csv"):
        fill((table, examples, table), server)
    with pytest.raises(ValueError, match="give the --engine URL of a server, or a --model"):
        fill(tables, server, engine="", model="")
    table.write_text(table.read_text().replace("p_", "valid_"))
    with pytest.raises(ValueError, match="add --for-training"):
        fill(tables, server)
    assert not server.asked
    assert not out.parent.exists()
    assert len(fill(tables, server, for_training=True)) == 24


def test_kill_nine_of_the_client_and_the_end_of_the_server_lose_no_scan(tmp_path):
    """100 scans of two reconstructions; what was kept before a kill is never asked for again."""
    columns = ["VolumeName", "Findings_EN", "Impressions_EN"]
    rows = [[f"p_{i}_a_{k}.nii.gz", f"Findings {i}.", ""] for i in range(100) for k in (1, 2)]
    shots = [[f"train_{i}_a_1.nii.gz", f"Given {i}.", f"Written {i}."] for i in range(8)]
    for path, lines in ((tmp_path / "r.csv", rows), (tmp_path / "train.csv", shots)):
        files.write_csv(path, [dict(zip(columns, line, strict=True)) for line in lines], columns)
    server, out = Server(), tmp_path / "done.csv"
    server.pause_s, port = 0.05, server.http.server_port
    options = {"table": tmp_path / "r.csv", "examples": tmp_path / "train.csv", "out": out}
    options |= {"engine": server.url, "in-flight": 4}
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "invoke", "impressions", *flags]
    log = (tmp_path / "log").open("w")

    def start():
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def kept():
        text = b"".join(path.read_bytes() for path in tmp_path.glob("*.answers.jsonl"))
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]

    def until(count):
        while len(kept()) < count:
            assert client.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)

    marks = []
    for count in (20, 45):
        client = start()
        until(count)
        client.kill()  # SIGKILL
        client.wait()
        marks.append(([line["row"] for line in kept()], len(server.asked)))
        assert len(marks[-1][0]) >= count
        assert not out.exists()
    client = start()
    until(65)
    server.close()
    time.sleep(0.3)
    second = Server(port)
    try:
        assert client.wait() == 0, (tmp_path / "log").read_text()
    finally:
        second.close()
    asked = [
        int(re.search(r"Findings (\d+)\.\nImpression:$", prompt)[1]) for prompt in server.asked + second.asked
    ]
    assert {*asked} == {*range(100)}
    for rows_kept, mark in marks:
        assert not {*asked[mark:]} & {*rows_kept}
    # What was under way, or ahead of its turn to be kept, at one of the three ends.
    assert len(asked) - 100 <= 3 * 16
    done = read(out)
    assert [row["VolumeName"] for row in done] == [row[0] for row in rows]
    assert {row["Impression_source"] for row in done} == {"generated"}
    told = {answer_to(prompt).removeprefix("Impression: "): prompt for prompt in server.asked + second.asked}
    for row in done:
        assert f"\nFindings: {row['Findings_EN']}\n" in told[row["Impressions_EN"]]  # of its own scan
    assert len(json.loads(out.with_suffix(".json").read_text())) == 200


def test_a_model_that_runs_here_answers_as_well(tables, tmp_path):
    folder, tok = (
        tmp_path / "model",
        tokens.train_bpe(["Findings. Impression: normal heart; no "], 300, lower=False),
    )
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tok.chat_template = TEMPLATES["chatml"]
    tok.save_pretrained(folder)
    config = tiny.CONFIGS["qwen2"] | {"vocab_size": len(tok)}
    gen = torch.Generator().manual_seed(0)
    skeleton, params = skeletons.init_skeleton(config, gen, head="language")
    params = {name: torch.randn(t.shape, generator=gen) * 0.6 + (t.dim() == 1) for name, t in params.items()}
    tiny.peer(skeleton, params).save_pretrained(folder)
    options = {"engine": "", "model": str(folder), "shots": 1, "max_tokens": 6, "in_flight": 2}
    rows = fill(tables, None, **options)
    (journal,) = tables[2].parent.glob("*.answers.jsonl")
    first = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(first) == 4
    assert all(line["text"] and line["model"] == "model" for line in first)
    assert all(bool(row["Impression_source"]) == bool(row["Findings_EN"]) for row in rows[::6])
