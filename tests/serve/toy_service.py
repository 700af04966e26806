"""A real service with a tiny model, in a thread of the test: real sockets, real processes."""

import asyncio
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from medvl.serve.api import make_app
from medvl.serve.backend import Backend
from medvl.serve.http import Guard
from medvl.serve.remote import remote_engine
from medvl.serve.settings import ServeConfig
from medvl.serve.worker import LocalEngine, Worker


class Running:
    """A service that listens."""

    def __init__(self, cfg, rows, opener, readers, opener_mib, rooms):
        self.opener_mib, self.room_openers = opener_mib, rooms
        self.cfg, self.rows, self.opener_of, self.reader_openers = cfg, rows, opener, readers
        self.address = ""
        self.backend = None
        self._listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    async def _main(self):
        readers = [Worker(f"reader {i}", name) for i, name in enumerate(self.reader_openers)]
        opener = Worker(
            "opener", "medvl.serve.pages:open_opener", self.cfg.limits, self.opener_mib, most=self.cfg.queue
        )
        rooms = {name: Worker(name, opener_of) for name, opener_of in self.room_openers.items()}
        checker = Worker("checker", "medvl.serve.pages:open_checker")
        workers = [opener, checker, *readers, *rooms.values()]
        if self.cfg.engine:
            engine = remote_engine(self.cfg.engine, model=self.cfg.engine_model)
        else:
            model = Worker("model", self.opener_of, self.rows, most=self.cfg.queue)
            engine = LocalEngine(model)
            workers.append(model)
        self.backend = Backend(
            cfg=self.cfg,
            engine=engine,
            model="toy",
            opener=opener,
            checker=checker,
            readers=readers,
            rooms=rooms,
            workers=workers,
        )
        config = uvicorn.Config(
            make_app(self.backend), port=0, log_config=None, access_log=False, timeout_graceful_shutdown=30
        )
        self.server = uvicorn.Server(config)
        serving = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.loop = asyncio.get_running_loop()
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        await self.backend.wait_ready()
        self._listening.set()
        await serving

    def do(self, coroutine):
        """Run a coroutine in the loop of the service; returns its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    @property
    def guard(self):
        """Its outermost layer."""
        layer = self.server.config.app.middleware_stack
        while not isinstance(layer, Guard):
            layer = layer.app
        return layer

    def stop(self):
        self.server.should_exit = True


@contextmanager
def running(
    rows=8, opener="tests.serve.served_toy:open_service", readers=(), opener_mib=0, rooms=None, **settings
):
    """A service with settings of `ServeConfig`.

    Args:
        rooms: by the first part of their routes: names of functions that open them.
    """
    service = Running(ServeConfig(port=0, **settings), rows, opener, readers, opener_mib, rooms or {})
    service._thread.start()
    assert service._listening.wait(60)
    try:
        yield service
    finally:
        service.stop()
        service._thread.join(40)


def until(condition):
    """Wait until something is so."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it has not happened within a minute")


def client(service, **options):
    return httpx.Client(base_url=service.address, timeout=60, trust_env=False, **options)
