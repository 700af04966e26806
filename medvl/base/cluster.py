"""A function over many items on a cluster of processes or machines; Dask does all that is scheduling."""

import logging
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

# Of each process of `local:N`: the parent answers Ctrl-C, and N processes share the GPUs as those of torchrun do.
_PRELOAD = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)

def dask_setup(worker):
    os.environ["LOCAL_RANK"] = str(worker.name)
"""


@contextmanager
def open_cluster(address: str, timeout_s: float = 10) -> Iterator[Any]:
    """A Dask client: of the scheduler at `tcp://HOST:PORT`, or of N processes of one thread for `local:N`.

    Raises:
        ValueError: another address, no scheduler there, without workers or gone meanwhile; no Dask.
    """
    try:
        import dask
        from distributed import CancelledError, Client, LocalCluster
        from distributed.comm import CommClosedError
    except ImportError as e:
        raise ValueError(f"cluster: needs Dask ({e}); pip install 'medvl[cluster]'") from e
    local = re.fullmatch(r"local:([1-9]\d{0,3})", address)
    remote = re.fullmatch(r"tcp://\[?([^\s\[\]]+)\]?:(\d{1,5})", address)
    if not local and not remote:
        raise ValueError(f"cluster: must be local:N or tcp://HOST:PORT, got {address!r}")
    # What goes wrong is said here in one sentence, or told by the result of an item.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        try:
            if remote:
                _check_server(remote[1], int(remote[2]), timeout_s)
            else:
                assert local
                # An item is given up with the second worker that it costs, as worker processes do.
                stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 1}))
                cluster = LocalCluster(
                    n_workers=int(local[1]),
                    threads_per_worker=1,
                    memory_limit=None,
                    silence_logs=logging.CRITICAL,
                    preload=[_PRELOAD],
                    # Without the page of Dask, whose port several runs would want.
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                )
                address = stack.enter_context(cluster).scheduler_address
            client = stack.enter_context(Client(address, timeout=timeout_s))
            client.wait_for_workers(1, timeout=timeout_s)
        # A memory error is another server's greeting, read as a length.
        except (OSError, OverflowError, MemoryError) as e:
            raise ValueError(f"cluster: no scheduler with workers answers at {address} ({e})") from e
        try:
            yield client
        except (CancelledError, CommClosedError) as e:
            again = "finished work is kept, the same command continues from there"
            raise ValueError(f"cluster: the scheduler at {address} went away; {again}") from e


def _check_server(host: str, port: int, timeout_s: float) -> None:
    """Raise OSError where nothing greets us, as a scheduler does; Dask would wait for it for ever."""
    with socket.create_connection((host, port), timeout_s) as connection:
        if not connection.recv(1):
            raise OSError("it hung up")


def map_on_cluster(
    client: Any, function: Callable, items: Iterable[Any], lost: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)) as they come; what a lost worker was at is computed by another.

    Args:
        function: can be pickled, and may see an item twice. What it raises is raised here.
        lost: the result of an item that several workers were lost with.
    """
    from distributed import KilledWorker, wait

    running: dict[Any, Any] = {}
    remaining = iter(items)
    while True:
        # One for each thread: with a worker, only what it was at is lost.
        free = max(1, sum(client.nthreads().values())) - len(running)
        for item in islice(remaining, max(0, free)):
            running[client.submit(function, item, pure=False)] = item
        if not running:
            return
        for future in wait(list(running), return_when="FIRST_COMPLETED").done:
            item = running.pop(future)
            try:
                result = future.result()
            except KilledWorker:
                result = lost
            yield item, result
