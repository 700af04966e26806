"""`invoke impressions`: reports without an impression get one, from a server or from a model on this machine."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from attrs import evolve

from medvl.base import files, progress
from medvl.ct import impressions
from medvl.serve.backend import Backend, make_backend
from medvl.serve.interface import Engine, Piece, Refused, Request
from medvl.serve.settings import ServeConfig

_TRIES, _BACKOFF_S = 6, 1.0  # of a request whose engine fails; the wait doubles
_PASSING = (429, 500, 502, 503, 504)  # statuses of failures that may be over after a while


def fill_impressions(
    table: str,
    examples: str,
    out: str,
    *,
    engine: str = "",
    model: str = "",
    shots: int = 8,
    seed: int = 0,
    max_tokens: int = 256,
    in_flight: int = 16,
    for_training: bool = False,
) -> None:
    """Write `table` to `out` with the impressions that it lacks, and a log of these to a .json beside it.

    Answers are kept beside it as they come, in a file whose name stands for the prompts and settings, so that the
    same call goes on after a kill.

    Args:
        engine: address of a server of OpenAI's API; "" = `model` runs here.
        shots: examples in a prompt.
        in_flight: requests at a time.
    Raises:
        ValueError: tables that must not be used so; a server that fails; another run that writes to `out`.
    """
    path = Path(out)
    if path.suffix != ".csv" or path.resolve() in (Path(table).resolve(), Path(examples).resolve()):
        raise ValueError(f"impressions: --out must be a file of its own that ends in .csv, got {out}")
    if not engine and not model:
        raise ValueError("impressions: give the --engine URL of a server, or a --model that runs here")
    files.check_writable(path)
    rows, pool = impressions.read_table(table), impressions.read_table(examples)
    impressions.check_tables(table, rows, pool, for_training)
    prompts = impressions.make_prompts(rows, pool, shots, seed)
    row_of = {prompt: row for row, prompt in enumerate(prompts, 2) if prompt}
    requests = []
    for prompt, row in row_of.items():
        turn = {"role": "user", "content": prompt}
        requests.append(Request(id=f"row {row}", messages=(turn,), max_tokens=max_tokens, seed=seed))
    here = "" if engine else model
    cfg = ServeConfig(engine=engine, engine_model=model, model=here, rows=in_flight, queue=in_flight)
    decides = json.dumps([*row_of, model, max_tokens, seed]).encode()
    journal = path.with_suffix(f".{hashlib.sha256(decides).hexdigest()[:8]}.answers.jsonl")
    with files.file_lock(path):
        answers = _ask_all(make_backend(cfg), requests, journal)
        cleaned = [impressions.clean_answer(answer["text"], answer["is_cut"]) for answer in answers]
        text_of = {prompt: text for prompt, (text, _) in zip(row_of, cleaned, strict=True)}
        completed, log = impressions.complete_rows(rows, [text_of.get(prompt, "") for prompt in prompts])
        files.write_text(path.with_suffix(".json"), json.dumps(log, ensure_ascii=False, indent=2))
        files.write_csv(path, completed, completed[0])
    sources = Counter(row[impressions.SOURCE] for row in completed)
    # Rows without a prompt have no findings; with one, they got an empty answer.
    no_findings = sum(
        not row[impressions.SOURCE] and not prompt for row, prompt in zip(completed, prompts, strict=True)
    )
    num_cleaned = sum(is_cleaned for _, is_cleaned in cleaned)
    num_cut = sum(answer["is_cut"] for answer in answers)
    num_empty = sum(not text for text, _ in cleaned)
    models = ", ".join(sorted({answer["model"] for answer in answers}))
    print(
        f"{out}: {len(rows)} rows: {sources['original']} have an impression of their own, {sources['generated']} a "
        f"generated one, {sources['']} none ({no_findings} without findings)\n{len(answers)} scans asked ({models}): "
        f"{num_cleaned} answers cleaned, {num_cut} cut, {num_empty} empty"
    )


def _ask_all(backend: Backend, requests: Sequence[Request], journal: Path) -> list[progress.Line]:
    backend.workers[:] = [worker for worker in backend.workers if worker.name == "model"]  # no pages are read
    engine, gate = backend.language_engine(), asyncio.Semaphore(backend.cfg.queue)
    tasks = dict[int, asyncio.Task[progress.Line]]()

    async def ask(rows: Sequence[int]) -> list[progress.Line]:
        """The answer to one request, while those to the next ones are on their way."""
        (first,) = rows
        if not tasks:
            backend.start()
        await backend.wait_ready()
        # Answers are kept in order; so many ahead, one that is slow holds nobody up.
        for row in range(first, min(first + 4 * backend.cfg.queue, len(requests))):
            if row not in tasks:
                tasks[row] = asyncio.create_task(_ask(engine, requests[row], gate))
        return [await tasks[first]]

    async def close() -> None:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        await backend.close()

    one_by_one = [[row] for row in range(len(requests))]
    with asyncio.Runner() as runner:
        try:
            return progress.run_batches(
                journal, one_by_one, lambda rows: runner.run(ask(rows)), title="impressions"
            )
        finally:
            runner.run(close())


async def _ask(engine: Engine, request: Request, gate: asyncio.Semaphore) -> progress.Line:
    """An answer. An engine that fails is asked again after a while; one that says nothing once, less greedily."""
    num_failures = 0
    async with gate:
        while True:
            try:
                answer = await _read_answer(engine, request)
            except Refused as e:
                num_failures += 1
                if e.status not in _PASSING or num_failures == _TRIES:
                    raise ValueError(
                        f"impressions: {request.id} of the table: {e}; the same command goes on from what was answered"
                    ) from None
                await asyncio.sleep(max(e.retry_after, _BACKOFF_S * 2 ** (num_failures - 1)))
                continue
            impression, _ = impressions.clean_answer(answer["text"], answer["is_cut"])
            if impression or request.temperature:
                return answer
            request = evolve(request, temperature=0.5)


async def _read_answer(engine: Engine, request: Request) -> progress.Line:
    text, end = "", None
    async for item in engine.stream(request):
        if isinstance(item, Piece):
            text += item.text
        else:
            end = item
    assert end is not None
    return {"text": text, "is_cut": end.reason == "length", "model": end.model}
