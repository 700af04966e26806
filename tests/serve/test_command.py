"""`invoke serve` as a user starts it: a process of its own, killed workers, bad files, a name on the disk."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest

from medvl.language import chat
from tests.serve import files as bad
from tests.serve import served_toy
from tests.serve.toy_service import until

ROOT = Path(__file__).resolve().parents[2]
NAME = "Doenitz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The toy as a folder of transformers' format."""
    toy = served_toy.open_toy()
    folder = tmp_path_factory.mktemp("models") / "toy"
    chat.save_chat(toy.chat, toy.params["model"], folder)
    return folder


class Started:
    """A service in a process of its own, whose home, cache and temporary files lie in a folder."""

    def __init__(self, place, *arguments):
        self.place = place
        for name in ("home", "cwd"):
            (place / name).mkdir()
        # Short, as sockets of multiprocessing lie there, whose names have at most 108 letters.
        self.temporary = Path(tempfile.mkdtemp(prefix="mv-"))
        environment = {
            **os.environ,
            "HOME": str(place / "home"),
            "XDG_CACHE_HOME": str(place / "home" / "cache"),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.log = place / "log.txt"
        command = [
            sys.executable,
            "-m",
            "invoke",
            "--search-root",
            str(ROOT),
            "serve",
            *arguments,
            "--port",
            "0",
        ]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=place / "cwd", env=environment, stdout=log, stderr=log
            )
        self.address = self._wait_for(r"listening at (\S+)")[1]

    def _wait_for(self, pattern):
        for _ in range(600):
            if found := re.search(pattern, self.log.read_text()):
                return found
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def client(self, **options):
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False, **options)

    def wait_ready(self):
        with self.client() as client:
            for _ in range(600):
                if client.get("/ready").status_code == 200:
                    return
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def process_of(self, name):
        """What /health says of a process."""
        with self.client() as client:
            return client.get("/health").json()["processes"][name]

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        shutil.rmtree(self.temporary)

    def files(self):
        """All that it has written, but its log."""
        found = [*self.place.rglob("*"), *self.temporary.rglob("*")]
        return [path for path in found if path.is_file() and path != self.log]


@pytest.fixture(scope="module")
def service(folder, tmp_path_factory):
    started = Started(
        tmp_path_factory.mktemp("service"),
        "--model",
        str(folder),
        "--set",
        "context=400",
        "--set",
        "limits.pages=4",
    )
    try:
        started.wait_ready()
        yield started
    finally:
        started.end()


def chat_body(**changes):
    return {"messages": [{"role": "user", "content": "glucose"}], "max_tokens": 60, **changes}


def test_a_killed_model_is_back_and_each_request_answered_once(service):
    """kill -9 in the middle of 20 requests: 502 for those that were in it, and the same answers when sent again."""
    bodies = [
        chat_body(messages=[{"role": "user", "content": f"glucose {i} mg"}], max_tokens=200)
        for i in range(20)
    ]
    with service.client() as client:
        expected = [client.post("/v1/chat/completions", json=body).json()["choices"] for body in bodies]
    answers = {}

    def ask(number):
        identity = {"x-request-id": f"{number:032x}"}
        with service.client() as client:
            answers.setdefault(number, []).append(
                client.post("/v1/chat/completions", json=bodies[number], headers=identity)
            )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    before = service.process_of("model")
    for thread in threads:
        thread.start()
    until(lambda: service.process_of("model")["calls"] >= 5)
    os.kill(before["pid"], signal.SIGKILL)
    for thread in threads:
        thread.join()
    refused = [number for number in range(20) if answers[number][0].status_code != 200]
    assert {answers[number][0].status_code for number in refused} <= {502, 503}
    assert refused
    assert all("retry-after" in answers[number][0].headers for number in refused)
    service.wait_ready()
    assert service.process_of("model")["restarts"] == before["restarts"] + 1
    for number in refused:
        ask(number)
    assert all(len(of) == (2 if number in refused else 1) for number, of in answers.items())
    assert [answers[number][-1].json()["choices"] for number in range(20)] == expected


def test_bad_files_take_no_memory(service):
    """Each is refused, and no process has more memory than before by more than a few pages."""
    attacks = {
        "pixels": (bad.empty_png(20000, 20000), 400),
        "PDF of 500 pages": (bad.pdf(500), 400),
        "TIFF of 10,000 pages": (bad.tiff([(100, 100)] * 10_000), 400),
        "DICOM of 300 frames": (bad.dicom_frames(300), 400),
        "a zip": (b"PK\x03\x04" + bytes(1000), 415),
        "too long": (b"\x89PNG\r\n\x1a\n" + bytes(21 * 2**20), 413),
    }
    with service.client() as client:
        for content, _ in attacks.values():  # once, for what is loaded at the first use
            client.post("/extract", files={"file": content})
        before = {name: service.process_of(name)["resident_bytes"] for name in ("opener", "model")}
        own = resident(service.process.pid)
        for name, (content, status) in attacks.items():
            assert client.post("/extract", files={"file": ("page.png", content)}).status_code == status, name
    for name, size in before.items():
        assert service.process_of(name)["resident_bytes"] - size < 64 * 2**20
    assert resident(service.process.pid) - own < 64 * 2**20


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_nothing_of_a_patient_is_on_the_disk(service):
    """The name in a prompt, a file name, a header, a page's text and an answer: on no file of the service, its log too."""
    with service.client(headers={"user-agent": NAME, "x-patient": NAME}) as client:
        page = bad.saved("png", bad.picture())
        for route in ("/extract", "/analyze", f"/{NAME}"):
            client.post(
                route,
                files={"file": (f"{NAME}.png", page)},
                data={"prompt": f"Is {NAME} ill?", "max_tokens": "20"},
            )
        client.post("/extract", files={"file": (f"{NAME}.pdf", page[:40])}, data={"prompt": NAME})
        client.post("/extract", files={"file": (f"{NAME}.pdf", page * 200)}, data={NAME: NAME})
        client.post("/v1/chat/completions", json=chat_body(messages=[{"role": "user", "content": NAME}]))
        client.post("/v1/chat/completions", json=chat_body(messages=[{"role": NAME, "content": NAME}]))
        told = client.get("/metrics").text + client.get("/health").text + service.log.read_text()
    assert "/v1/chat/completions" in told
    assert NAME not in told
    assert not service.files()  # sockets of multiprocessing are no files


def test_it_ends_when_it_is_told_and_leaves_no_process(folder, tmp_path):
    started = Started(tmp_path, "--model", str(folder), "--set", "context=400")
    started.wait_ready()
    pids = [one["pid"] for one in (started.process_of("model"), started.process_of("opener"))]
    answer = {}

    def ask():
        with started.client() as client:
            answer["status"] = client.post("/v1/chat/completions", json=chat_body(max_tokens=300)).status_code

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: started.process_of("model")["calls"])
    started.end()
    thread.join()
    assert answer["status"] == 200
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_what_is_not_done_in_time_is_refused(folder, tmp_path):
    """What `grace_s` cuts gets 503 in the form of every refusal, and no traceback is logged."""
    started = Started(tmp_path, "--model", str(folder), "--set", "context=400", "--set", "grace_s=1.0")
    started.wait_ready()
    os.kill(started.process_of("model")["pid"], signal.SIGSTOP)  # so that nothing is done in time
    answer = {}

    def ask():
        with started.client() as client:
            answer["cut"] = client.post("/v1/chat/completions", json=chat_body())

    thread = threading.Thread(target=ask)
    thread.start()
    while started.process_of("model")["calls"] == 0:
        time.sleep(0.01)
    started.end()
    thread.join()
    assert answer["cut"].status_code == 503
    assert "stopping" in answer["cut"].json()["error"]["message"]
    assert int(answer["cut"].headers["retry-after"]) > 0
    assert "Traceback" not in started.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give something to serve"),
        (("--model", "nowhere"), "nowhere"),
        (("--model", "{folder}", "--set", "rows=0"), "rows"),
        (("--model", "{folder}", "--set", "readers=many"), "readers"),
        (("--model", "{folder}", "--keys", "nowhere.txt"), "keys: nowhere.txt cannot be read"),
        (("--run", "nowhere"), "must be the folder of a run"),
        (("--model", "{folder}", "--host", "192.0.2.1"), "cannot listen at 192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_one_line(folder, tmp_path, arguments, message):
    arguments = [argument.format(folder=folder) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "--search-root", str(ROOT), "serve", *arguments, "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_a_new_key_is_accepted(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "--search-root", str(ROOT), "serve", "--new-key"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    key, line = (text.split(": ")[-1] for text in done.stdout.splitlines())
    (tmp_path / "keys").write_text(line.strip() + "\n")
    from medvl.serve.http import is_accepted, read_keys

    digests = read_keys(str(tmp_path / "keys"))
    assert is_accepted(f"Bearer {key}", digests)
    assert not is_accepted(f"Bearer {key}x", digests)


def test_a_second_interrupt_ends_it_at_once(folder, tmp_path):
    """Although a request is under way, for which it waits after the first."""
    started = Started(tmp_path, "--model", str(folder), "--set", "readers=0", "--set", "context=400")
    try:
        started.wait_ready()
        opener = started.process_of("opener")["pid"]
        host, port = started.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(
                b"POST /extract HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n"
            )
            connection.sendall(b"content-length: 100\r\n\r\n--b")
            with started.client() as client:
                assert client.get("/ready").status_code == 200  # it has read the lines above
            for _ in range(2):
                started.process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            started.process.wait(20)
        assert (
            not Path(f"/proc/{opener}/cmdline").exists() or not Path(f"/proc/{opener}/cmdline").read_bytes()
        )
    finally:
        started.process.kill()
