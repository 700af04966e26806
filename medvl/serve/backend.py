"""All processes of a service behind its HTTP: the model, those that open and read pages, the rooms of other systems."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

from medvl.base import config
from medvl.serve.interface import Engine, Refused
from medvl.serve.settings import LANGUAGE_SYSTEMS, ServeConfig
from medvl.serve.worker import LocalEngine, Worker

# By system: the first part of the routes, and how its process opens a run.
_ROOMS = {
    "ct_clip": ("ct", "medvl.serve.rooms:open_ct"),
    "slide_vqa": ("slides", "medvl.serve.rooms:open_slides"),
    "unified": ("unified", "medvl.serve.rooms:open_unified"),
}
_OPENER_MIB = 2048


@define
class Backend:
    """What answers requests. Of one event loop."""

    cfg: ServeConfig
    engine: Engine | None
    model: str  # how clients call it
    opener: Worker
    checker: Worker  # compares answers with pages
    readers: list[Worker]
    rooms: dict[str, Worker]  # by the first part of their routes: "ct", "slides", "unified"
    workers: list[Worker] = field(factory=list)  # all of them
    is_closing: bool = False
    _suspects: asyncio.Lock = field(
        factory=asyncio.Lock
    )  # held while a file is opened that may have ended the opener

    async def open_files(self, call: str, contents: Sequence[bytes], **settings: Any) -> list[list[Any]]:
        """The pages of each file.

        A file may end the process that opens it, and with it the calls of others, which wait there. Those are opened
        again one by one, so that the file that did it is alone the second time.

        Args:
            settings: `chosen` and `window` of `uploads.open_uploads`.
        Raises:
            Refused: as `uploads.open_uploads`; 400 for files that end the process.
        """
        settings = settings | {"contents": list(contents)}
        try:
            return await self.opener.call(call, "open", **settings)
        except Refused as e:
            is_restarting = e.status == 503 and self.opener.restarts and not self.is_closing
            if e.status != 502 and not is_restarting:
                raise
        async with self._suspects:
            for _ in range(2):  # twice, as another that came meanwhile may do it, too
                try:
                    await self.opener.wait_ready()
                    return await self.opener.call(call, "open", **settings)
                except Refused as e:
                    if e.status != 502:
                        raise
                except ValueError:
                    raise Refused(503, "files cannot be opened now", 10) from None
        raise Refused(
            400, "a file cannot be opened: it ends its decoder, or takes too long or too much memory"
        )

    async def read_pages(self, call: str, images: Sequence[Any]) -> list[Any]:
        """The words of pages, each read by the process that has least to do."""
        async with asyncio.TaskGroup() as tasks:  # where one fails, the others are cancelled
            reading = [
                tasks.create_task(self._read_page(f"{call}/{number}", image))
                for number, image in enumerate(images)
            ]
        return [task.result() for task in reading]

    async def _read_page(self, call: str, image: Any) -> Any:
        reader = min(self.readers, key=lambda worker: worker.pending)
        return await reader.call(call, "read", image=image)

    def room(self, name: str) -> Worker:
        """Raises:
        Refused: no run of its system is served.
        """
        if name not in self.rooms:
            raise Refused(404, f"no run is served that answers /{name}; start the service with one by --run")
        return self.rooms[name]

    def language_engine(self) -> Engine:
        """Raises:
        Refused: no language model is served.
        """
        if self.engine is None:
            raise Refused(
                404, "no language model is served; start the service with a run, a model or an engine"
            )
        return self.engine

    @property
    def missing(self) -> list[str]:
        """Names of processes that are not ready."""
        return [worker.name for worker in self.workers if worker.state != "ready"]

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    async def wait_ready(self) -> None:
        """Raises:
        ValueError: something cannot be opened.
        """
        await asyncio.gather(*(worker.wait_ready() for worker in self.workers))

    async def close(self) -> None:
        """Finish what is under way, then end all processes."""
        self.is_closing = True
        await asyncio.gather(*(worker.close(self.cfg.grace_s) for worker in self.workers))
        if self.engine is not None:
            await self.engine.close()

    def result_files(self) -> list[Path]:
        """Results and benches of what is served, as they lie in the folders of runs and in those of `results`."""
        folders = [Path(run) for run in self.cfg.runs] + [Path(folder) for folder in self.cfg.results]
        patterns = ("results*/results.jsonl", "bench/*.json*", "results.jsonl", "*.jsonl")
        found = {
            path: None for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))
        }
        return [path for path in found if path.is_file()]


def make_backend(cfg: ServeConfig) -> Backend:
    """Look at what is to be served, before anything is loaded.

    Raises:
        ValueError: nothing to serve, two runs of one kind, a folder that is no run.
    """
    language, others = _sort_runs(cfg)
    engine_worker = None
    served: Engine | None = None
    name = ""
    if cfg.engine:
        from medvl.serve.remote import remote_engine

        served, name = remote_engine(cfg.engine, model=cfg.engine_model, most=cfg.queue), cfg.engine_model
    elif language or cfg.model or cfg.registry:
        # A registry's name where there is nothing else; a run of adapters has its registry.
        place = language or cfg.model
        sizes = (cfg.rows, cfg.cells, cfg.context)
        opener_of = "medvl.serve.engine:open_engine"
        engine_worker = Worker("model", opener_of, place, cfg.registry, cfg.threads, sizes, most=cfg.queue)
        # As `models` calls it; the stem of a place would end at the point of a name such as Qwen2.5-VL.
        served, name = LocalEngine(engine_worker), Path(cfg.registry).stem or Path(place).name
    elif not others:
        raise ValueError(
            "serve: give something to serve: --run RUN, --model MODEL, --registry FILE or --engine URL"
        )
    opener = Worker("opener", "medvl.serve.pages:open_opener", cfg.limits, _OPENER_MIB, most=cfg.queue)
    checker = Worker("checker", "medvl.serve.pages:open_checker", most=cfg.queue)
    readers = [
        Worker(f"reader {i}", "medvl.serve.pages:open_reader", most=2 * cfg.queue) for i in range(cfg.readers)
    ]
    room_workers = {
        name: Worker(name, opener_of, folder, most=cfg.queue) for name, (opener_of, folder) in others.items()
    }
    workers = [*([engine_worker] if engine_worker else []), opener, checker, *readers, *room_workers.values()]
    return Backend(
        cfg=cfg,
        engine=served,
        model=name,
        opener=opener,
        checker=checker,
        readers=readers,
        rooms=room_workers,
        workers=workers,
    )


def _sort_runs(cfg: ServeConfig) -> tuple[str, dict[str, Any]]:
    """(the run of a language system, {room: (how it is opened, run)})."""
    language = ""
    others: dict[str, Any] = {}
    for run in cfg.runs:
        folder = config.run_folder(run)
        system = config.system_of(folder)
        if system in LANGUAGE_SYSTEMS:
            if language or cfg.model or cfg.registry or cfg.engine:
                raise ValueError(f"serve: {run} is a second language model; give one, others on another port")
            language = str(folder)
        elif system in _ROOMS:
            name, opener_of = _ROOMS[system]
            if name in others:
                raise ValueError(
                    f"serve: {run} is a second run of {system}; give one, others on another port"
                )
            others[name] = opener_of, str(folder)
        else:
            raise ValueError(f"serve: {run} is a run of {system}, which is not served")
    return language, others
