"""`invoke serve`: the HTTP service, from its settings to its last answer."""

import asyncio
import hashlib
import multiprocessing
import secrets
import socket
from collections.abc import Sequence
from typing import Any

from medvl.base import config
from medvl.serve.settings import ServeConfig

_MISSING = "serve: needs fastapi, uvicorn and others; pip install 'medvl[serve]'"


def serve(
    runs: Sequence[str] = (),
    model: str = "",
    registry: str = "",
    engine: str = "",
    keys: str = "",
    host: str = "",
    port: int = -1,
    overrides: Sequence[str] = (),
) -> None:
    """Serve runs, a model, a registry or an engine elsewhere until the process is told to stop.

    Args:
        host, port: "" and -1 = those of `ServeConfig`.
        overrides: "key=value" of `ServeConfig`.
    Raises:
        ValueError: nothing to serve, something that cannot be opened, an address in use, an extra that is missing.
    """
    given = {
        "runs": list(runs),
        "model": model,
        "registry": registry,
        "engine": engine,
        "keys": keys,
        "host": host,
    }
    raw: dict[str, Any] = {name: value for name, value in given.items() if value}
    if port >= 0:
        raw["port"] = port
    cfg = config.structure(config.override(raw, tuple(overrides), "serve"), ServeConfig, "serve")
    try:
        import uvicorn

        from medvl.serve.api import make_app
        from medvl.serve.backend import make_backend
    except ImportError as e:
        raise ValueError(f"{_MISSING} ({e.name} is missing)") from e
    backend = make_backend(cfg)
    app = make_app(backend)
    if not cfg.keys and not _is_local(cfg.host):
        print(
            f"warning: anybody who reaches {cfg.host} may ask; give --keys, or listen at 127.0.0.1",
            flush=True,
        )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # At once, and not when all connections are done: what comes over open ones is refused from now on.
            backend.is_closing = True
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # its lines hold addresses; `http.log_request` writes ours
            server_header=False,
            timeout_graceful_shutdown=max(1, round(cfg.grace_s)),
        )
    )
    with _bound(cfg.host, cfg.port) as bound:
        try:
            asyncio.run(_run(server, backend, bound))
        finally:
            # A second Ctrl-C leaves them. They heed no signal, and Python would wait for them for ever.
            for process in multiprocessing.active_children():
                process.kill()


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
        ValueError: it is in use, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as e:
        bound.close()
        raise ValueError(
            f"serve: cannot listen at {host}:{port} ({e.strerror}); choose another --port"
        ) from e
    return bound


async def _run(server: Any, backend: Any, bound: socket.socket) -> None:
    host, port = bound.getsockname()[:2]
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.05)
    if serving.done():
        await serving  # why it could not start
    print(f"listening at http://{host}:{port} (research use, not for diagnosis); loading ...", flush=True)
    loading = asyncio.create_task(backend.wait_ready())
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and not loading.exception():
        print(f"ready: {', '.join(worker.name for worker in backend.workers)}", flush=True)
        await serving
        return
    server.should_exit = True
    await serving
    loading.cancel()
    if loading.done() and not loading.cancelled():
        loading.result()  # why something could not be opened


def print_key() -> None:
    """Print a new key, and the line for the file of keys that accepts it."""
    key = secrets.token_urlsafe(32)
    print(f"key (give it to the client, it is not kept): {key}")
    print(f"line for the file of keys: sha256:{hashlib.sha256(key.encode()).hexdigest()}")
