"""Worker processes: fresh ones of one thread each, which end with their parent, even if that was killed."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext

_PRELOAD = ["medvl.ct.ingest", "medvl.phantoms.chests"]  # modules whose functions workers run


@contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` processes.

    Raises:
        ValueError: they cannot start. Each of them imports the main script, so that must be a file and safe
            to import.
    """
    with ProcessPoolExecutor(count, worker_context(), _start) as workers:
        # Start one now: an error here means the script, an error later means the work.
        try:
            workers.submit(os.getpid).result()
        except BrokenProcessPool as e:
            raise ValueError(
                "worker processes cannot start: a script that uses workers must be a file and run its code "
                'under `if __name__ == "__main__":`; or use one worker, which is this process'
            ) from e
        yield workers


def worker_context() -> ForkServerContext:
    """A context whose processes are forked from a server that has imported `_PRELOAD` and run nothing.

    They are as fresh as spawned ones, at the price of a fork, and safe for h5py.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOAD)
    return server


def _start() -> None:
    """Runs once in each worker."""
    # Each worker has a core; threads of several workers would wait for each other.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    end_with_parent()


def end_with_parent() -> None:
    """Let this process end when its parent does, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        # A parent that is killed closes nothing that a waiting worker would notice by itself.
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
