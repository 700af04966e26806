"""Work on a Dask cluster: nothing is lost with a worker, what cannot be reached is refused in one sentence."""

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from medvl.base.cluster import map_on_cluster, open_cluster

pytest.importorskip("distributed")
ROOT = Path(__file__).resolve().parents[2]


def _square(x, folder):
    """Kills its worker the first time that it sees 3, and always where it sees 5."""
    seen = folder / "seen"
    if x == 5 or (x == 3 and not seen.exists()):
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if x < 0:
        raise ValueError("must not be negative")
    return x * x


def test_a_lost_worker_costs_nothing_and_an_item_that_kills_them_only_itself(tmp_path):
    square = functools.partial(_square, folder=tmp_path)
    with open_cluster("local:2") as client:
        results = dict(map_on_cluster(client, square, range(12), lost="lost"))
        assert results == {x: x * x for x in range(12)} | {5: "lost"}
        assert (tmp_path / "seen").exists()
        with pytest.raises(ValueError, match="must not be negative"):
            list(map_on_cluster(client, square, [1, -1], lost=None))
        workers = client.run(os.getpid).values()
        assert client.run(signal.getsignal, signal.SIGINT).popitem()[1] == signal.SIG_IGN
        # Which GPU `choose_device` takes: each process another, those that took the place of lost ones, too.
        client.wait_for_workers(2, timeout=60)
        assert sorted(client.run(os.getenv, "LOCAL_RANK").values()) == ["0", "1"]
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        *(
            (a, "must be local:N or tcp://HOST:PORT")
            for a in ("somewhere", "local:0", "http://x:1", "tcp://x")
        ),
        ("tcp://127.0.0.1:1", "no scheduler with workers answers at tcp://127.0.0.1:1 .*refused"),
        ("tcp://nowhere.invalid:8786", "no scheduler with workers answers"),
    ],
)
def test_an_address_that_is_not_there_is_refused(address, message):
    with pytest.raises(ValueError, match=message), open_cluster(address):
        pass


@pytest.mark.parametrize(
    ("greeting", "closes"),
    [(b"", True), (b"", False), (b"SSH-2.0-OpenSSH_9.2 and more than sixteen bytes", False)],
)
def test_another_kind_of_server_is_refused(greeting, closes):
    connections = []

    def serve():
        with suppress(OSError):  # closed at the end
            while True:
                connections.append(server.accept()[0])
                connections[-1].sendall(greeting)
                if closes:
                    connections[-1].close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match="no scheduler with workers answers"), open_cluster(address, 1):
            pass


def test_without_dask_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"pip install 'medvl\[cluster\]'"), open_cluster("local:2"):
        pass


SCRIPT = """
import os, time
from medvl.base.cluster import open_cluster
if __name__ == "__main__":
    with open_cluster("local:1") as client:
        print(*client.run(os.getpid).values(), flush=True)
        time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed_and_leave_no_folder(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    run = subprocess.Popen(
        [sys.executable, "run.py"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    worker = int(run.stdout.readline())
    run.kill()
    run.wait()
    until = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{worker}").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]
