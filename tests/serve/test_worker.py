"""Calls to a process: answered once each, refused where it is killed, and answered again by the next."""

import asyncio
import os
import random
import signal
from contextlib import aclosing
from multiprocessing import forkserver

import pytest
from attrs import evolve

from medvl.serve.interface import End, Piece, Refused
from medvl.serve.worker import Calls, LocalEngine, Result, Worker
from tests.serve import served_toy


class Unreadable:
    """What cannot be unpickled."""

    def __reduce__(self):
        return int, ("Jane Doe, MRN 4711",)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def slow_echo(post, emit):
    import time

    def echo(text, seconds=0.0):
        time.sleep(seconds)
        return text * 2

    def miss():
        raise FileNotFoundError("Jane Doe, MRN 4711")

    def fail():
        raise ValueError("Jane Doe, MRN 4711")

    def crash():
        raise RuntimeError("Jane Doe, MRN 4711")

    return Calls(emit, {"echo": echo, "fail": fail, "miss": miss, "crash": crash}, {"answer": 42})


class Teller:
    """A service that tells a piece of each call when it is called with `more`, also of those that were given up."""

    def __init__(self, post, emit):
        self.info = {}
        self._emit, self._asked, self._steps = emit, {}, 0

    def submit(self, call, content):
        if content == "more":
            self._steps += 1
            self._emit(call, Result(None))
        else:
            self._asked[call] = content

    def cancel(self, call):
        """It is slow to notice."""

    @property
    def is_idle(self):
        return not self._steps

    def load(self):
        return {}

    def work(self, interrupted):
        self._steps -= 1
        for call, content in self._asked.items():
            self._emit(call, Piece(text=content))


def broken(post, emit):
    raise ValueError("there is no such model")


def run(scenario, opener, *arguments, **options):
    async def main():
        worker = Worker("toy", opener, *arguments, **options)
        worker.start()
        try:
            await worker.wait_ready()
            return await scenario(worker)
        finally:
            await worker.close(1)

    return asyncio.run(main())


def test_calls_are_answered():
    async def scenario(worker):
        assert worker.info == {"answer": 42}
        first, second = await asyncio.gather(
            worker.call("a", "echo", text="x", seconds=0.1), worker.call("b", "echo", text="y")
        )
        assert (first, second) == ("xx", "yy")
        with pytest.raises(Refused, match="fail: the request cannot be answered") as refused:
            await worker.call("c", "fail")
        assert refused.value.status == 400

    run(scenario, "tests.serve.test_worker:slow_echo")


def test_a_crash_says_where_and_not_what(caplog):
    async def scenario(worker):
        with pytest.raises(Refused) as refused:
            await worker.call("c", "crash")
        assert refused.value.status == 502
        await worker.wait_ready()
        assert await worker.call("c", "echo", text="z") == "zz"
        return refused.value

    text = str(run(scenario, "tests.serve.test_worker:slow_echo")) + caplog.text
    assert "RuntimeError" in text
    assert "Jane" not in text
    assert "4711" not in text


def test_an_error_of_one_call_ends_no_process():
    async def scenario(worker):
        pid = worker.pid
        with pytest.raises(Refused) as refused:
            await worker.call("c", "miss")
        assert refused.value.status == 500
        assert "Jane" not in str(refused.value)
        assert await worker.call("c", "echo", text="z") == "zz"
        assert (worker.pid, worker.restarts) == (pid, 0)

    run(scenario, "tests.serve.test_worker:slow_echo")


def test_the_log_of_an_error_says_where_and_not_what(caplog):
    service = slow_echo(None, lambda call, event: None)
    service.submit("c", ("miss", {}))
    service.work(lambda: False)
    assert "FileNotFoundError in" in caplog.text
    assert "Jane" not in caplog.text


def test_a_call_that_cannot_be_sent_is_refused_and_stops_no_other():
    """A body may nest deeper than can be passed to a process."""

    async def scenario(worker):
        deep = []
        for _ in range(5000):
            deep = [deep]
        with pytest.raises(Refused, match="too deep") as refused:
            await worker.call("a", "echo", 30, text=deep)
        assert refused.value.status == 400
        assert await worker.call("b", "echo", 30, text="x") == "xx"
        assert worker.restarts == 0

    run(scenario, "tests.serve.test_worker:slow_echo")


def test_a_process_that_cannot_read_a_call_is_replaced():
    async def scenario(worker):
        with pytest.raises(Refused) as refused:
            await worker.call("a", "echo", 30, text=Unreadable())
        assert refused.value.status == 502
        await worker.wait_ready()
        assert await worker.call("b", "echo", 30, text="x") == "xx"
        assert worker.restarts == 1

    run(scenario, "tests.serve.test_worker:slow_echo")


def test_a_process_that_cannot_be_started_now_is_started_later(monkeypatch):
    async def scenario(worker):
        fork, failures = worker._fork, [OSError("too many open files")]

        def fork_at_second_try():
            if failures:
                raise failures.pop()
            return fork()

        monkeypatch.setattr(worker, "_fork", fork_at_second_try)
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.state == "loading")
        await worker.wait_ready()
        assert await worker.call("b", "echo", 30, text="x") == "xx"
        assert worker.restarts == 2

    run(scenario, "tests.serve.test_worker:slow_echo")


def test_the_service_answers_while_a_process_is_started():
    """The server that forks processes was killed, too: another one has to import first."""

    async def scenario(worker):
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.state == "loading")
        started = asyncio.create_task(worker.wait_ready())
        turns = 0
        while not started.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert await worker.call("b", "echo", 30, text="x") == "xx"
        return turns

    assert run(scenario, "tests.serve.test_worker:slow_echo") > 10


def test_a_process_is_closed_while_it_is_started():
    async def main():
        worker = Worker("toy", "tests.serve.test_worker:slow_echo")
        worker.start()
        ready = asyncio.create_task(worker.wait_ready())
        await asyncio.sleep(0)
        await worker.close()
        with pytest.raises(ValueError, match="closed"):
            await ready
        return worker._process.is_alive()

    assert asyncio.run(main()) is False


def test_a_request_sent_again_hears_nothing_of_the_first():
    """The process still answers the one that was given up, whose id the second one has."""

    async def scenario(worker):
        async with aclosing(worker.stream("id", "first", 30)) as first:
            asking = asyncio.create_task(anext(first))
            await until(lambda: worker.pending)
            async with aclosing(worker.stream("a", "more", 30)) as more:
                await anext(more)
            assert (await asking).text == "first"
        async with aclosing(worker.stream("id", "second", 30)) as second:
            asking = asyncio.create_task(anext(second))
            await until(lambda: worker.pending)
            async with aclosing(worker.stream("b", "more", 30)) as more:
                await anext(more)
            assert (await asking).text == "second"

    run(scenario, "tests.serve.test_worker:Teller")


def test_what_cannot_be_opened_is_said():
    async def scenario(worker):
        raise AssertionError

    with pytest.raises(ValueError, match="there is no such model"):
        run(scenario, "tests.serve.test_worker:broken")


def test_too_many_too_late_and_twice():
    async def scenario(worker):
        slow = asyncio.create_task(worker.call("a", "echo", text="x", seconds=0.5))
        await until(lambda: worker.pending == 1)
        with pytest.raises(Refused) as twice:
            await worker.call("a", "echo", text="x")
        late = asyncio.create_task(worker.call("b", "echo", 0.1, text="x"))
        await until(lambda: worker.pending == 2)
        with pytest.raises(Refused) as full:
            await worker.call("c", "echo", text="x")
        with pytest.raises(Refused) as too_late:
            await late
        assert await slow == "xx"
        return [one.value.status for one in (twice, full, too_late)], full.value.retry_after

    statuses, retry_after = run(scenario, "tests.serve.test_worker:slow_echo", most=2)
    assert statuses == [409, 429, 504]
    assert retry_after >= 1


def test_closing_finishes_what_is_under_way():
    async def scenario(worker):
        slow = asyncio.create_task(worker.call("a", "echo", text="x", seconds=0.5))
        await until(lambda: worker.pending)
        closing = asyncio.create_task(worker.close())
        await until(lambda: worker.state == "closed")
        with pytest.raises(Refused) as refused:
            await worker.call("b", "echo", text="x")
        await closing
        return await slow, refused.value.status, worker._process.is_alive()

    assert run(scenario, "tests.serve.test_worker:slow_echo") == ("xx", 503, False)


async def collect(engine, request):
    """(text, number of ends) of a request; a refusal as it is."""
    text, ends = "", 0
    try:
        async for event in engine.stream(request):
            if isinstance(event, Piece):
                text += event.text
            ends += isinstance(event, End)
    except Refused as e:
        return e
    return text, ends


def test_a_killed_engine_comes_back_and_answers_each_request_once():
    """20 requests, and SIGKILL while some are answered: those that were not are refused, and answered when sent again."""
    requests = served_toy.requests(20, random.Random(1), max_tokens=(60, 60))

    async def scenario(worker):
        engine = LocalEngine(worker)
        expected = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert all(ends == 1 for _, ends in expected)
        first = evolve(requests[0], id="first")
        tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
        async with aclosing(engine.stream(first)) as stream:  # until it is in flight
            await anext(stream)
        os.kill(worker.pid, signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
        refused = [i for i, answer in enumerate(answers) if isinstance(answer, Refused)]
        assert refused
        assert {answers[i].status for i in refused} == {502}
        await worker.wait_ready()
        again = await asyncio.gather(*(collect(engine, requests[i]) for i in refused))
        answers = {i: answer for i, answer in enumerate(answers) if i not in refused}
        answers |= dict(zip(refused, again, strict=True))
        assert [answers[i] for i in range(20)] == expected
        assert worker.restarts == 1

    run(scenario, "tests.serve.served_toy:open_service")


def test_a_client_that_goes_frees_its_row():
    async def scenario(worker):
        engine = LocalEngine(worker)
        long = served_toy.requests(1, random.Random(2), max_tokens=(300, 300))[0]
        async with aclosing(engine.stream(evolve(long, adapter=""))) as stream:
            await anext(stream)
        assert worker.pending == 0
        _, ends = await collect(engine, evolve(long, max_tokens=5))
        return ends

    assert run(scenario, "tests.serve.served_toy:open_service", 1) == 1
