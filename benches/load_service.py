"""A service under load: nothing lost, nothing swapped, how fast, how soon /health answers, how much memory.

    python -m benches.load_service [--seconds 60]
    python -m benches.load_service --speed          only the last part; on a GPU with a model of 1.5 billion weights

A small vision-language model with three adapters is served by a process of its own. 200 mixed requests (texts, images,
adapters, mixtures, streams, schemas, chance) are sent by 1, 4, 16 and 64 clients at once, and each answer must be that
of the same request alone. Beside them /health is asked every 20 ms. Then a load of some seconds while memory is watched,
and SIGTERM in the middle of requests. At last the engine alone is compared with one answer after the other and with
transformers' `generate` on a whole batch, with the same weights in the same process.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image

from medvl.adapters import cache
from medvl.base import processes
from medvl.evaluation import results
from medvl.hub import tokens
from medvl.language import chat, generate
from medvl.language.chat import Chat, ChatConfig, ModelConfig
from medvl.language.conversations import Conversation
from medvl.serve import interface, models
from medvl.serve.engine import BatchEngine, EngineConfig, EngineService
from medvl.serve.interface import End
from medvl.weights import lora

CUDA = torch.cuda.is_available()
# On a GPU the width and depth of a model of about 1.5 billion weights, in bfloat16.
WIDTH, LAYERS, HEADS, DTYPE = (2048, 28, 16, "bfloat16") if CUDA else (256, 4, 4, "float32")
TEXT = {
    "vocab_size": 320,
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 8 or 2,
    "max_position_embeddings": 2048,
}
MODEL = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        **TEXT,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [16, 24, 24] if CUDA else [8, 12, 12],
            "rope_theta": 10000.0,
        },
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 14,
        "fullatt_block_indexes": [1],
    },
}
WORDS = [
    "glucose",
    "98",
    "mg/dL",
    "metformin",
    "500",
    "mg",
    "PO",
    "BID",
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
]
ADAPTERS = ("liver", "lung", "skin")
KINDS: tuple[Any, ...] = ("", *ADAPTERS, {"liver": 0.5, "lung": 0.5}, {"lung": 0.3, "skin": 0.9}, "base")
SCHEMA = {
    "type": "object",
    "properties": {
        "drug": {"type": "string", "maxLength": 6},
        "dose": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["drug", "dose"],
    "additionalProperties": False,
}


# The model ------------------------------------------------------------------------------------------------------
def open_model() -> models.Served:
    """Random weights, so large that answers differ, and three adapters that change them."""
    tok = tokens.train_bpe([" ".join(WORDS)], 300, lower=True)
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tok.add_special_tokens({"additional_special_tokens": special})
    tok.chat_template = chat.TEMPLATES["chatml"]
    gen = torch.Generator().manual_seed(0)
    opened, weights = chat.open_chat(
        ModelConfig(config=MODEL, dtype=DTYPE),
        ChatConfig(max_pixels=64 * 784),
        tok,
        gen,
        device=processes.choose_device("auto"),
    )
    weights = {name: w * 4 if w.dim() > 1 else w for name, w in weights.items()}
    adapters = []
    for name in ADAPTERS:
        cfg = lora.LoraConfig(rank=8, targets=("q_proj", "v_proj", "down_proj"))
        adapter = lora.init_lora(cfg, opened.skeleton, gen)
        adapter = lora.move_adapter(adapter, processes.choose_device("auto"))
        for factors in adapter.factors.values():
            factors["b"].copy_(torch.randn(factors["b"].shape, generator=gen) * 0.05)
        adapters.append(models.evolve(adapter, name=name))
    mixer = models._Mixer(weights, ADAPTERS, cache.cache_pool(lambda ids: [adapters[i] for i in ids]))
    return models.Served(
        name="bench",
        chat=opened,
        params={"model": weights},
        max_tokens=64,
        adapters=ADAPTERS,
        default=(),
        weights=mixer.weights,
    )


def open_service(post: Any, emit: Any, rows: int) -> EngineService:
    torch.set_num_threads(1)
    return EngineService(post, emit, open_model(), EngineConfig(rows=rows, context=1024))


def serve(port: int, rows: int) -> None:
    """The service in this process, until it is told to stop."""
    import uvicorn

    from medvl.serve.api import make_app
    from medvl.serve.backend import Backend
    from medvl.serve.settings import ServeConfig
    from medvl.serve.worker import LocalEngine, Worker

    async def run() -> None:
        cfg = ServeConfig(queue=128, deadline_s=120)
        model = Worker("model", "benches.load_service:open_service", rows, most=cfg.queue)
        opener = Worker("opener", "medvl.serve.pages:open_opener", cfg.limits, 2048, most=cfg.queue)
        checker = Worker("checker", "medvl.serve.pages:open_checker")
        backend = Backend(
            cfg=cfg,
            engine=LocalEngine(model),
            model="bench",
            opener=opener,
            checker=checker,
            readers=[],
            rooms={},
            workers=[model, opener, checker],
        )
        config = uvicorn.Config(
            make_app(backend), port=port, log_config=None, access_log=False, timeout_graceful_shutdown=60
        )
        await uvicorn.Server(config).serve()

    asyncio.run(run())


# Requests -------------------------------------------------------------------------------------------------------
def make_bodies(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    bodies = []
    for number in range(count):
        text: Any = " ".join(rng.choices(WORDS, k=rng.randint(2, 40)))
        if number % 4 == 0:
            text = [
                {"type": "image_url", "image_url": {"url": _picture(rng)}},
                {"type": "text", "text": text},
            ]
        body = {
            "messages": [{"role": "user", "content": text}],
            "adapter": KINDS[number % len(KINDS)],
            "max_tokens": rng.randint(8, 64),
            "stream": number % 3 == 0,
            "seed": number,
        }
        if number % 5 == 0:
            body["temperature"] = 0.8
        if number % 10 == 3:
            body |= {
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
                "max_tokens": 64,
            }
        bodies.append(body)
    return bodies


def _picture(rng: random.Random) -> str:
    image = Image.new("RGB", (rng.randint(40, 200), rng.randint(40, 200)), (rng.randint(0, 255), 90, 10))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, str, int]:
    """(status, text, tokens)."""
    if not body["stream"]:
        answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return answer.status_code, answer.text, 0
        content = answer.json()
        return 200, content["choices"][0]["message"]["content"], content["usage"]["completion_tokens"]
    text, used = "", 0
    with_usage = body | {"stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=with_usage) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return chunk["error"]["code"], "", 0
            text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            used = chunk["usage"]["completion_tokens"] if chunk.get("usage") else used
    return answer.status_code, text, used


async def send_all(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], clients: int
) -> list[tuple[int, str, int]]:
    gate = asyncio.Semaphore(clients)

    async def send(body: dict[str, Any]) -> tuple[int, str, int]:
        async with gate:
            return await ask(client, body)

    return await asyncio.gather(*map(send, bodies))


async def watch_health(client: httpx.AsyncClient, seconds: list[float], done: asyncio.Event) -> None:
    while not done.is_set():
        start = time.perf_counter()
        (await client.get("/health")).raise_for_status()
        seconds.append(time.perf_counter() - start)
        await asyncio.sleep(0.02)


# Parts ----------------------------------------------------------------------------------------------------------
async def compare_loads(address: str) -> None:
    """200 requests by 1 to 64 clients: answers are those of one client."""
    bodies = make_bodies(200)
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=address, timeout=300, trust_env=False, limits=limits) as client:
        alone = await send_all(client, bodies, 1)
        assert all(status == 200 for status, _, _ in alone), [a for a in alone if a[0] != 200][:3]
        print(f"different texts among 200: {len({text for _, text, _ in alone})}")
        for clients in (1, 4, 16, 64):
            waits: list[float] = []
            done = asyncio.Event()
            watch = asyncio.create_task(watch_health(client, waits, done))
            start = time.perf_counter()
            answers = await send_all(client, bodies, clients)
            seconds = time.perf_counter() - start
            done.set()
            await watch
            lost = sum(status != 200 for status, _, _ in answers)
            other = sum(a[1] != b[1] for a, b in zip(answers, alone, strict=True))
            number = sum(n for _, _, n in answers)
            waits.sort()
            p99 = waits[int(0.99 * (len(waits) - 1))]
            print(
                f"{clients:2} clients: lost {lost}, other than alone {other}, {number / seconds:6.0f} tokens/s, "
                f"{len(bodies) / seconds:5.1f} requests/s; /health p50 {1e3 * statistics.median(waits):.1f} ms, "
                f"p99 {1e3 * p99:.1f} ms, longest {1e3 * waits[-1]:.1f} ms of {len(waits)}"
            )


def tree_memory(pid: int) -> int:
    """Resident bytes of a process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        todo += children.get(one, [])
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * 4096
        except OSError:
            continue
    return total


async def soak(address: str, pid: int, seconds: float) -> None:
    """Load for a while: memory at its beginning and its end."""
    bodies = make_bodies(400)
    sizes = []
    sent = failed = 0
    async with httpx.AsyncClient(base_url=address, timeout=300, trust_env=False) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answers = await send_all(client, bodies[sent % 400 : sent % 400 + 40], 16)
            sent += len(answers)
            failed += sum(status != 200 for status, _, _ in answers)
            sizes.append(tree_memory(pid))
    tenth = max(1, len(sizes) // 10)
    first, last = statistics.median(sizes[tenth : 2 * tenth + 1]), statistics.median(sizes[-tenth:])
    print(
        f"{seconds:.0f} s of load: {sent} requests, {failed} failed; memory of all processes {first / 2**20:.0f} MiB after a "
        f"tenth, {last / 2**20:.0f} MiB at the end ({(last - first) / 2**20:+.1f}), most {max(sizes) / 2**20:.0f} MiB"
    )


async def stop_in_the_middle(address: str, process: Any) -> None:
    """SIGTERM while requests are answered: those that were accepted are answered."""
    bodies = [body | {"max_tokens": 64} for body in make_bodies(48)]
    async with httpx.AsyncClient(base_url=address, timeout=300, trust_env=False) as client:
        tasks = [asyncio.create_task(ask(client, body)) for body in bodies]
        await asyncio.sleep(0.25)
        process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    code = await process.wait()
    answered = sum(isinstance(a, tuple) and a[0] == 200 for a in answers)
    refused = sum(isinstance(a, tuple) and a[0] == 503 for a in answers)
    unaccepted = sum(isinstance(a, httpx.ConnectError) for a in answers)
    rest = [
        a
        for a in answers
        if not isinstance(a, httpx.ConnectError) and not (isinstance(a, tuple) and a[0] in (200, 503))
    ]
    print(
        f"SIGTERM in the middle of 48: {answered} answered, {refused} refused by 503, {unaccepted} not connected, "
        f"lost {len(rest)} {[type(a).__name__ for a in rest][:3]}; exit status {code}"
    )


def compare_speed() -> None:
    """Tokens per second of the engine, of one answer after the other, and of transformers on a whole batch."""
    torch.set_num_threads(1)
    served = open_model()
    rng = random.Random(1)
    count, new = 64, 48
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 40))) for _ in range(count)]
    requests = [
        interface.Request(id=str(i), messages=({"role": "user", "content": text},), max_tokens=new)
        for i, text in enumerate(texts)
    ]
    speeds: dict[str, list[float]] = {}
    print(f"on {results.device_name()}")
    for _ in range(3):
        for name, run in (
            ("one by one", partial(_one_by_one, served, texts, new)),
            *((f"engine, {rows} rows", partial(_by_engine, served, requests, rows)) for rows in (1, 8, 32)),
            *(
                (f"transformers, batches of {n}", partial(_by_transformers, served, texts, new, n))
                for n in (1, 8, 32)
            ),
            ("medvl generate, batches of 32", partial(_by_batches, served, texts, new, 32)),
        ):
            start = time.perf_counter()
            number = run()
            speeds.setdefault(name, []).append(number / (time.perf_counter() - start))
    first = statistics.median(speeds["one by one"])
    for name, of in speeds.items():
        print(
            f"{name:38} {statistics.median(of):7.0f} tokens/s, {statistics.median(of) / first:5.2f} of one by one"
        )


def _by_engine(served: models.Served, requests: list[interface.Request], rows: int) -> int:
    ends = []

    def emit(call: str, event: Any) -> None:
        if isinstance(event, End):
            ends.append(event.answer_tokens)

    batch = BatchEngine(served, EngineConfig(rows=rows, context=1024), emit)
    for request in requests:
        batch.submit(batch.prepare(request))
    while not batch.is_idle:
        batch.work(lambda: False)
    return sum(ends)


def _prompts(served: models.Served, texts: list[str]) -> chat.Encoded:
    conversations = [Conversation(messages=({"role": "user", "content": text},)) for text in texts]
    return chat.encode_conversations(served.chat, conversations, prompt=True)


def _one_by_one(served: models.Served, texts: list[str], new: int) -> int:
    return _by_batches(served, texts, new, 1)


def _by_batches(served: models.Served, texts: list[str], new: int, size: int) -> int:
    prompts = _prompts(served, texts)
    cfg = chat.sampling_of(served.chat, new)
    number = 0
    for start in range(0, len(texts), size):
        rows = range(start, min(start + size, len(texts)))
        batch = chat.make_batch(served.chat, prompts, rows, side="left")
        inputs = chat.model_inputs(served.chat, served.weights([()]), batch)
        inputs.pop("labels")
        answer = generate.generate(
            cfg, served.chat.skeleton, served.weights([()]), inputs, tok=served.chat.tokenizer
        )
        number += sum(map(len, answer.ids))
    return number


def _by_transformers(served: models.Served, texts: list[str], new: int, size: int) -> int:
    prompts = _prompts(served, texts)
    model = _transformers_model(served.chat, served.params["model"])
    device = next(model.parameters()).device
    end = list(chat.sampling_of(served.chat, new).end)
    number = 0
    for start in range(0, len(texts), size):
        batch = chat.make_batch(
            served.chat, prompts, range(start, min(start + size, len(texts))), side="left"
        )
        with torch.no_grad():
            ids = model.generate(
                input_ids=batch["ids"].to(device),
                attention_mask=batch["mask"].long().to(device),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end[0],
            )
        for row in ids[:, batch["ids"].shape[1] :].tolist():
            ended = [i for i, token in enumerate(row) if token in end]
            number += ended[0] if ended else len(row)
            served.chat.tokenizer.decode(row)
    return number


_MODELS: dict[str, Any] = {}


def _transformers_model(opened: Chat, weights: Any) -> Any:
    if "model" not in _MODELS:
        module: Any = opened.skeleton.module
        weight = next(iter(weights.values()))
        model = type(module)(module.config).to(weight.device, weight.dtype)
        model.load_state_dict(dict(weights), strict=False)
        _MODELS["model"] = model.eval()
    return _MODELS["model"]


async def main(seconds: float) -> None:
    port = 8123
    address = f"http://127.0.0.1:{port}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benches.load_service", "--serve", str(port), env=environment, stderr=log
        )
        try:
            async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
                for _ in range(600):
                    try:
                        if (await client.get("/ready")).status_code == 200:
                            break
                    except httpx.ConnectError:
                        pass
                    await asyncio.sleep(0.1)
            await compare_loads(address)
            await soak(address, process.pid, seconds)
            await stop_in_the_middle(address, process)
        finally:
            if process.returncode is None:
                process.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--speed", action="store_true", help="only compare the engine with generate")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, 16)
    else:
        if not arguments.speed:
            asyncio.run(main(arguments.seconds))
        compare_speed()
