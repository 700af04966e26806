"""The HTTP service over a backend: how it starts and ends, who may ask, and what state it is in."""

import asyncio
import importlib.metadata
import json
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from medvl.serve import chat_routes, page_routes, responses, room_routes
from medvl.serve.backend import Backend
from medvl.serve.http import Guard, read_keys
from medvl.serve.interface import Refused
from medvl.serve.metrics import Metrics
from medvl.serve.responses import DISCLAIMER
from medvl.serve.site import Site

_PROBE_S = 3  # seconds in which an engine elsewhere must answer to be ready


def make_app(backend: Backend) -> FastAPI:
    """The service over a backend, which it starts and closes.

    Raises:
        ValueError: keys that cannot be read.
    """
    cfg = backend.cfg
    digests = read_keys(cfg.keys) if cfg.keys else ()
    site = Site(backend=backend, metrics=Metrics())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend.start()
        yield
        await backend.close()

    app = FastAPI(
        title="medvl",
        version=importlib.metadata.version("medvl"),
        description=DISCLAIMER,
        lifespan=lifespan,
        openapi_url="/openapi.json",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )

    async def leave_to_guard(request: Request, error: Exception) -> Response:
        raise error

    app.add_exception_handler(HTTPException, leave_to_guard)  # of addresses and methods that there are not
    app.add_middleware(
        Guard,
        digests=digests,
        body_bytes=lambda path: cfg.scan_bytes if path == "/ct/classify" else cfg.body_bytes,
        all_bytes=cfg.all_bytes,
        body_s=cfg.deadline_s,
        is_closing=lambda: backend.is_closing,
        done=site.metrics.add_request,
    )
    if cfg.origins:  # outside of the guard, so that a browser may read refusals, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cfg.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    _add_state(app, site)
    for routes in (page_routes, chat_routes, room_routes):
        routes.add_routes(app, site)
    return app


# State ------------------------------------------------------------------------------------------------------
def _add_state(app: FastAPI, site: Site) -> None:
    backend = site.backend

    @app.get("/health")
    async def health() -> responses.Health:
        """Whether the service is alive, and what of it is ready."""
        processes = {}
        for worker in backend.workers:
            processes[worker.name] = {
                "state": worker.state,
                "restarts": worker.restarts,
                "calls": worker.pending,
                "pid": worker.pid,
                "resident_bytes": _resident_bytes(worker.pid),
                **worker.info,
                **worker.load,
            }
        return responses.Health(
            status=_status(backend),
            missing=backend.missing,
            version=app.version,
            model=backend.model,
            processes=processes,
        )

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """200 where requests are answered now, else 503."""
        missing = [*backend.missing, *(await _engine_fault(backend))]
        if backend.is_closing or missing:
            raise Refused(503, f"not ready: {', '.join(missing) or 'stopping'}", 5)
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Counters for Prometheus."""
        return PlainTextResponse(site.metrics.text(backend), media_type="text/plain; version=0.0.4")

    @app.get("/benchmark")
    async def benchmark() -> dict[str, Any]:
        """All results and benches in the folders of what is served, and how it was made."""
        files = await asyncio.to_thread(_read_results, backend)
        return {
            "disclaimer": DISCLAIMER,
            "files": files,
            "models": await asyncio.to_thread(_read_models, backend),
        }


async def _engine_fault(backend: Backend) -> list[str]:
    """["engine"] where it is another server that does not answer now."""
    if backend.engine is None or not backend.cfg.engine:
        return []
    try:
        await asyncio.wait_for(backend.engine.models(), _PROBE_S)
    except (Refused, TimeoutError):
        return ["engine"]
    return []


def _status(backend: Backend) -> Literal["ready", "loading", "failed", "stopping"]:
    if backend.is_closing:
        return "stopping"
    if any(worker.state == "failed" for worker in backend.workers):
        return "failed"
    return "loading" if backend.missing else "ready"


def _resident_bytes(pid: int) -> int:
    """Memory of a process; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def _read_results(backend: Backend) -> list[dict[str, Any]]:
    files = []
    for path in backend.result_files():
        text = path.read_text(encoding="utf-8")
        try:
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            rows = [json.loads(line) for line in lines]
        except ValueError:  # it is being written, or broken
            files.append({"file": "/".join(path.parts[-3:]), "fault": "is not whole JSON"})
            continue
        # Answers lie beside results, with texts of patients: only rows of `Result` are shown.
        if path.suffix == ".jsonl" and not all(
            isinstance(row, dict) and {"what", "value"} <= {*row} for row in rows
        ):
            continue
        # Of a path only what names the run and the file.
        name = "/".join(path.parts[-3:])
        files.append({"file": name, "rows": _without_folders(rows if path.suffix == ".jsonl" else rows[0])})
    return files


def _read_models(backend: Backend) -> list[dict[str, Any]]:
    """How each model was made: the record of its run and its card, where its folder has them."""
    models = []
    for place in (*backend.cfg.runs, backend.cfg.model):
        folder = Path(place)
        if not place or not folder.is_dir():
            continue
        made: dict[str, Any] = {"name": folder.name, "card": "", "record": {}}
        if (card := folder / "README.md").is_file():
            made["card"] = card.read_text(encoding="utf-8")
        # A model's config.json is its shape; that of a run names its system.
        if (record := folder / "config.json").is_file():
            content = json.loads(record.read_text(encoding="utf-8"))
            made["record"] = _without_folders(content) if "system" in content else {}
        models.append(made)
    return models


def _without_folders(tree: Any) -> Any:
    """JSON whose paths of this machine are names."""
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    return Path(tree).name if isinstance(tree, str) and tree.startswith(("/", "~", "..")) else tree
