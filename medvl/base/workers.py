"""Worker processes: fresh ones, of one thread each, that end with their parent however that ended."""

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

_WORK = ["medvl.data.ingest", "medvl.data.phantoms"]  # whose functions workers run


@contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes to give functions of `_WORK` to.

    Raises:
        ValueError: they cannot start. The main script is imported by each of them, so it must be one that can be.
    """
    with ProcessPoolExecutor(count, worker_context(), _start) as workers:
        try:
            workers.submit(os.getpid).result()
        except BrokenProcessPool as e:
            raise ValueError(
                'worker processes cannot start: a script that asks for workers needs `if __name__ == "__main__":` around what it does, '
                "and must be a file; or ask for one worker, which is this process"
            ) from e
        yield workers


def worker_context() -> ForkServerContext:
    """Processes fork from a server that has imported `_WORK` and run nothing: fresh ones for the price of a fork, safe for h5py."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_WORK)
    return server


def _start() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> (
        None
    ):  # a parent that is killed closes nothing that a waiting worker would notice by itself
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
