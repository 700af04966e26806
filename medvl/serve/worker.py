"""Processes that work for the service: calls go in, events come out, and one that dies is started again.

The service itself computes nothing, so that it answers while they work, and outlives them.
"""

import asyncio
import importlib
import itertools
import logging
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

from attrs import field, frozen

from medvl.base import workers
from medvl.serve.interface import End, Piece, Refused, Request, place_of

_log = logging.getLogger(__name__)
Event = tuple[str, Any]  # (key of a call, what there is of its answer)
_PAUSES_S = (0, 1, 2, 5, 10, 30)  # before a process that has died so many times in a row is started again


class Result:
    """The whole answer of a call that is not told in pieces."""

    def __init__(self, value: Any) -> None:
        self.value = value


_LAST = (End, Result)  # kinds of events behind which no other comes


def _too_late(seconds: float) -> Refused:
    return Refused(504, f"no answer within {seconds:g} s; ask for less, or raise the deadline")


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Raises:
    Refused: what is done in this context takes longer.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise _too_late(seconds) from None


class Service(Protocol):
    """What runs in a process. Only `post` may be used by other threads of its own."""

    info: Mapping[str, Any]  # for the service, once it is open

    def submit(self, call: str, content: Any) -> None: ...

    def cancel(self, call: str) -> None: ...

    def handle(self, message: Any) -> None:
        """Something that it has posted to itself."""

    @property
    def is_idle(self) -> bool: ...

    def work(self, interrupted: Callable[[], bool]) -> None:
        """Go on until all is done or `interrupted()`."""

    def load(self) -> Mapping[str, float]:
        """How much it has to do and holds, for the metrics."""


# "module:function" of a function (post, emit) and arguments -> a service. `post` sends it a message; `emit` sends an
# event. By name, so that the service itself need not import what only its processes need, such as torch.
Opener = str


# In the process -------------------------------------------------------------------------------------------------
def run_service(connection: Connection, opener: Opener, arguments: tuple[Any, ...]) -> None:
    """The main function of a process."""
    try:
        _run_service(connection, opener, arguments)
    except BaseException as e:
        with suppress(OSError):
            connection.send(("crashed", place_of(e)))
        os._exit(1)


def _run_service(connection: Connection, opener: Opener, arguments: tuple[Any, ...]) -> None:
    workers.end_with_parent()
    for name in (signal.SIGINT, signal.SIGTERM):  # the parent says when to end
        signal.signal(name, signal.SIG_IGN)
    os.environ["HF_HUB_OFFLINE"] = "1"
    inbox = queue.SimpleQueue[Any]()
    outbox = list[Event]()
    sending = threading.Lock()

    def flush() -> bool:
        """Send the events of a step as one message; returns whether there is news."""
        with sending:
            if outbox:
                connection.send(("events", outbox[:]))
                outbox.clear()
        return not inbox.empty()

    try:
        module, _, function = opener.partition(":")
        open_service = getattr(importlib.import_module(module), function)
        service: Service = open_service(
            inbox.put, lambda call, event: outbox.append((call, event)), *arguments
        )
    except ValueError as e:
        connection.send(("failed", str(e)))
        return
    connection.send(("ready", service.info))
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    while True:
        message = inbox.get() if service.is_idle else _next(inbox)
        while message is not None:
            if message == ("stop",):
                flush()
                return
            _pass_on(service, message)
            message = _next(inbox)
        service.work(flush)
        flush()
        with sending:
            connection.send(("load", service.load()))


def _receive(connection: Connection, inbox: "queue.SimpleQueue[Any]") -> None:
    # In a thread, so that a large request does not wait in the pipe until a step is done.
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(("stop",))
    except BaseException as e:  # such as no memory for a message: a process that hears nothing is of no use
        _log.error("a message cannot be read: %s", place_of(e))
        os._exit(1)


def _next(inbox: "queue.SimpleQueue[Any]") -> Any:
    with suppress(queue.Empty):
        return inbox.get_nowait()
    return None


def _pass_on(service: Service, message: Any) -> None:
    kind, *rest = message
    if kind == "submit":
        service.submit(*rest)
    elif kind == "cancel":
        service.cancel(*rest)
    else:
        service.handle(message)


class Calls:
    """A service that answers one call after the other by functions."""

    def __init__(
        self,
        emit: Callable[[str, Any], None],
        functions: Mapping[str, Callable[..., Any]],
        info: Mapping[str, Any],
    ) -> None:
        self.info = info
        self._emit = emit
        self._functions = functions
        self._waiting = deque[tuple[str, Any]]()

    def submit(self, call: str, content: Any) -> None:
        self._waiting.append((call, content))

    def cancel(self, call: str) -> None:
        self._waiting = deque(one for one in self._waiting if one[0] != call)

    def handle(self, message: Any) -> None:
        raise AssertionError(message)

    def load(self) -> Mapping[str, float]:
        return {"waiting": len(self._waiting)}

    @property
    def is_idle(self) -> bool:
        return not self._waiting

    def work(self, interrupted: Callable[[], bool]) -> None:
        while self._waiting:
            call, (name, arguments) = self._waiting.popleft()
            self._emit(call, self._answer(name, arguments))
            if interrupted():
                return

    def _answer(self, name: str, arguments: Mapping[str, Any]) -> Result | Refused:
        try:
            return Result(self._functions[name](**arguments))
        except Refused as e:
            return e
        except ValueError:
            # Its message may hold a name or a text of the request.
            return Refused(400, f"{name}: the request cannot be answered; see that its files are whole")
        except RuntimeError:  # such as CUDA's errors, behind which nothing works: a new process is needed
            raise
        except Exception as e:
            _log.error("%s: %s", name, place_of(e))
            return Refused(500, f"{name} failed; the service's log says where")


# In the service -------------------------------------------------------------------------------------------------
@frozen
class _Call:
    """A call that is under way."""

    id: str
    events: asyncio.Queue[Any] = field(factory=asyncio.Queue)


class Worker:
    """A process with a service, and the calls that are under way to it. Of one event loop."""

    def __init__(self, name: str, opener: Opener, *arguments: Any, most: int = 64) -> None:
        """Args:
        opener: "module:function", see `Opener`.
        most: calls at a time, those that wait among them.
        """
        self.name = name
        self.state: Literal["new", "loading", "ready", "failed", "closed"] = "new"
        self.info: Mapping[str, Any] = {}
        self.fault = ""  # why it failed
        self.load: Mapping[str, float] = {}
        self.restarts = 0
        self._opener, self._arguments, self._most = opener, arguments, most
        self._calls: dict[str, _Call] = {}
        self._numbers = itertools.count()
        self._seconds = deque[float](maxlen=20)  # that the last calls took
        self._starting: asyncio.Task[None] | None = None
        self._process: Any = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._changed = asyncio.Event()
        self._load_s = 10.0
        self._deaths = 0  # in a row

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def pending(self) -> int:
        return len(self._calls)

    def start(self) -> None:
        """Start the process; `wait_ready` waits until its service is open."""
        self.state, self.fault, self._started = "loading", "", time.monotonic()
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        try:
            # In a thread: the server that forks processes may have to be started itself, which takes seconds.
            self._process, connection = await asyncio.to_thread(self._fork)
        except Exception as e:  # no process or no file can be opened now
            if self.state == "closed":
                return
            _log.error("%s: cannot be started: %s", self.name, place_of(e))
            self._start_again()
            return
        self._outbox = queue.SimpleQueue()
        loop = asyncio.get_running_loop()
        for target, argument in ((self._send_all, self._outbox), (self._receive_all, self._process)):
            threading.Thread(target=target, args=(connection, argument, loop), daemon=True).start()

    def _fork(self) -> tuple[Any, Connection]:
        context = workers.worker_context()
        ours, theirs = context.Pipe()
        process = context.Process(
            target=run_service, args=(theirs, self._opener, self._arguments), name=self.name, daemon=True
        )
        process.start()
        theirs.close()  # so that its end is noticed
        return process, ours

    async def wait_ready(self) -> None:
        """Raises:
        ValueError: the service cannot be opened.
        """
        while self.state == "loading":
            self._changed.clear()
            await self._changed.wait()
        if self.state != "ready":
            raise ValueError(self.fault or f"{self.name}: closed")

    def _send_all(
        self,
        connection: Connection,
        outbox: "queue.SimpleQueue[Any]",
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        # In a thread, as the other end reads large messages only when it is ready for them.
        with suppress(OSError):
            while (message := outbox.get()) is not None:
                try:
                    connection.send(message)
                except (RecursionError, MemoryError) as e:  # it is pickled before any of it is sent
                    _log.error("%s: a call cannot be sent: %s", self.name, place_of(e))
                    refused = Refused(400, "the request is too large, or what it holds stands too deep")
                    loop.call_soon_threadsafe(self._handle, ("events", [(message[1], refused)]))
                if message == ("stop",):
                    return
                del message  # pages must not stay until the next message

    def _receive_all(self, connection: Connection, process: Any, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(EOFError, OSError), suppress(RuntimeError):  # the loop is closed
            try:
                while True:
                    loop.call_soon_threadsafe(self._handle, connection.recv())
            finally:
                process.join(1)  # its exit code
                process.kill()  # one whose messages cannot be read is of no use
                loop.call_soon_threadsafe(self._ended, process)

    def _handle(self, message: Any) -> None:
        kind, content = message
        if kind == "ready":
            self.state, self.info, self._deaths = "ready", content, 0
            self._load_s = time.monotonic() - self._started
            self._changed.set()
        elif kind == "failed":
            self.fault = content
        elif kind == "load":
            self.load = content
        elif kind == "crashed":
            _log.error("%s: %s", self.name, content)
        else:
            for key, event in content:
                if key in self._calls:  # else nobody wants it any more
                    self._calls[key].events.put_nowait(event)

    def _ended(self, process: Any) -> None:
        """The process is gone: its calls are refused, and it is started again."""
        if process is not self._process:
            return
        self._outbox.put(None)
        text = "the process that computed the answer has ended; send the request again"
        for call in self._calls.values():
            call.events.put_nowait(Refused(502, text, self._retry_s()))
        self._calls = {}
        if self.state == "closed":
            return
        self.state = "failed" if self.fault and self.state == "loading" else "loading"
        self._changed.set()
        if self.state == "failed" and not self.restarts:
            return  # it never was open
        reason = self.fault or f"exit code {process.exitcode}"
        _log.warning("%s: its process has ended (%s)", self.name, reason)
        self._start_again()

    def _start_again(self) -> None:
        self._deaths += 1
        self.restarts += 1
        pause = _PAUSES_S[min(self._deaths, len(_PAUSES_S)) - 1]
        _log.warning("%s: started again in %d s", self.name, pause)
        asyncio.get_running_loop().call_later(pause, self._restart)

    def _restart(self) -> None:
        if self.state != "closed":
            self.start()

    def _retry_s(self) -> int:
        return max(1, round(self._load_s) + 1)

    # Calls --------------------------------------------------------------------------------------------------
    async def stream(self, call: str, content: Any, deadline_s: float = 0.0) -> AsyncGenerator[Any, None]:
        """The events of a call; closing the iterator cancels it.

        Args:
            call: its id.
            deadline_s: seconds until its last event; 0 = any.
        Raises:
            Refused: the process is not ready, has too much to do, ended or was too late; what the service refused.
        """
        self._check_open(call)
        begun = time.monotonic()
        # A key of its own: what the process still tells of a call that was given up must not reach another one of
        # the same id, as clients send requests again by it.
        key = f"{call} {next(self._numbers)}"
        events = asyncio.Queue[Any]()
        self._calls[key] = _Call(call, events)
        self._outbox.put(("submit", key, content))
        del content
        try:
            while True:
                left_s = begun + deadline_s - time.monotonic() if deadline_s else None
                event = await asyncio.wait_for(events.get(), left_s)
                if isinstance(event, Refused):
                    raise event
                if isinstance(event, _LAST):
                    # The call is over before its last event is handed out: whoever gets it may stop there.
                    self._calls.pop(key, None)
                    self._seconds.append(time.monotonic() - begun)
                    yield event
                    return
                yield event
        except TimeoutError:
            raise _too_late(deadline_s) from None
        finally:
            if self._calls.pop(key, None) is not None:
                self._outbox.put(("cancel", key))

    def check_ready(self) -> None:
        """Raises:
        Refused: it loads, or stops.
        """
        if self.state != "ready":
            text = "is stopping" if self.state == "closed" else "is loading"
            raise Refused(503, f"{self.name} {text}", self._retry_s())

    def _check_open(self, call: str) -> None:
        self.check_ready()
        if any(other.id == call for other in self._calls.values()):
            raise Refused(409, "a request with this id is being answered")
        if len(self._calls) >= self._most:
            mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
            raise Refused(
                429, f"{self.name}: {self._most} requests are being answered or wait", max(1, round(mean))
            )

    async def call(self, call: str, name: str, deadline_s: float = 0.0, **arguments: Any) -> Any:
        """The result of a function of a service of `Calls`."""
        async with aclosing(self.stream(call, (name, arguments), deadline_s)) as events:
            async for event in events:
                if isinstance(event, Result):
                    return event.value
        raise AssertionError

    async def close(self, grace_s: float = 30.0) -> None:
        """Let the calls under way finish, then end the process."""
        end = time.monotonic() + grace_s
        was_ready = self.state == "ready"
        self.state = "closed"
        self._changed.set()
        while was_ready and self._calls and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self._starting is not None:
            await asyncio.wait({self._starting})
        self._outbox.put(("stop",))
        if self._process is not None:
            await asyncio.to_thread(self._process.join, 2 if was_ready else 0)
            if self._process.is_alive():
                self._process.kill()
                await asyncio.to_thread(self._process.join)


class LocalEngine:
    """A model in a process of its own, as `interface.Engine`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def stream(self, request: Request) -> AsyncIterator[Piece | End]:
        """As `interface.Engine`."""
        return self.worker.stream(request.id, request, request.deadline_s)

    async def models(self) -> list[str]:
        """As `interface.Engine`."""
        self.worker.check_ready()
        return list(self.worker.info["models"])

    async def close(self) -> None:
        """Nothing: whoever started its process ends it."""
