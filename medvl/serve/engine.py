"""Requests become tokens: any number of answers at once from one model, each with its own adapters.

A request is prepared (its images opened, its text tokenised), waits for room in the cache, and its prompt is run alone.
Its row then joins the batch until it is done or nobody wants it any more.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor, nn

from medvl.documents.page_words import add_page_words
from medvl.hub import kv_cache
from medvl.language import (
    cached_forward,
    chat,
    generate,
    json_schema,
    messages,
    rows_in_flight,
    sampling,
    vlm,
)
from medvl.language.bounded_schema import error_without_names
from medvl.language.conversations import Conversation
from medvl.language.rows_in_flight import Rows
from medvl.language.sampling import Allowed, Sampling
from medvl.serve.interface import End, Piece, Refused, Request
from medvl.serve.models import Mixture, Served, Weights, find_mixture, find_revision, open_served
from medvl.training import estimate
from medvl.weights import lazy

_log = logging.getLogger(__name__)
Emit = Callable[[str, Piece | End | Refused], None]  # (id of the request, what there is of its answer)
_LETTERS = 16  # of a token, at most, on average over a text: of English it is four
_MASK_FAILED = -9  # in the place of a token, beside the negative numbers of `sampling.choose_tokens`
_CONTEXT = 16384  # tokens, where nothing else is said: a page at 300 dpi has up to 11,000


@frozen(kw_only=True)
class EngineConfig:
    """How much is answered at once."""

    rows: int = 16  # answers at a time
    cells: int = 0  # rows times columns (tokens) of the cache; 0 = what fits the memory
    context: int = (
        0  # tokens of a prompt with its answer, at most; 0 = 16,384, or as the model and the memory allow
    )

    def __attrs_post_init__(self) -> None:
        if self.rows < 1 or self.cells < 0 or self.context < 0:
            raise ValueError(
                f"EngineConfig: need rows >= 1, cells >= 0 and context >= 0, got {self.rows}, {self.cells}, {self.context}"
            )


@frozen(kw_only=True, eq=False)
class Prepared:
    """A request whose prompt can be run."""

    request: Request = field(repr=False)
    call: Mapping[str, Any] = field(repr=False)  # a batch [1, t] of `chat.make_batch`, on the CPU
    sampling: Sampling
    allowed: Allowed | None
    mixture: Mixture
    tokens: int  # of the prompt
    arrived: float  # seconds, as all times here of time.monotonic

    @property
    def columns(self) -> int:
        """Columns of the cache that it needs at most."""
        return self.tokens + self.sampling.max_tokens


@define
class _Row:
    """A request whose prompt has been run."""

    prepared: Prepared
    draws: Tensor  # float64 [max_tokens]
    used: Tensor | None  # bool [v], tokens that it has; None without a repetition penalty
    begun: float
    first_token: float = 0.0
    token: int = 0  # the last one, which the next step reads
    answer: generate.Answer = field(factory=generate.Answer)


class BatchEngine:
    """Answers requests together. `prepare` may be called from another thread, all else from one."""

    def __init__(self, served: Served, cfg: EngineConfig, emit: Emit) -> None:
        """Run one prompt, which measures the cache.

        Args:
            emit: called with each piece of an answer, and how it ended.
        Raises:
            ValueError: a model whose rows cannot be computed together; no memory for a cache.
        """
        self.served = served
        self.revision = find_revision(served)
        self.emit = emit
        self._waiting = deque[Prepared]()
        self._rows = list[_Row]()  # as they lie in the cache
        self._of_schema: Any = None  # schema -> mask, made at the first request that has one
        self._weights: Weights | None = None  # of these rows, None where they have changed
        self._device = next(iter(served.weights([()]).values())).device
        module: Any = served.chat.skeleton.module
        self._vocabulary = module.get_output_embeddings().weight.shape[0]
        # A token that any table has.
        prompt = self._run_prompt({"ids": torch.zeros(1, 1, dtype=torch.int64)}, served.weights([()]))
        served.chat.skeleton.run(served.weights([()]), partial(self._make_cache, prompt))
        self.cfg = _with_sizes(cfg, served, kv_cache.token_nbytes(prompt.cache, 1), self._device)

    def _make_cache(self, prompt: cached_forward.Decoding, model: nn.Module) -> None:
        self._cache: Rows = rows_in_flight.no_rows(model, prompt)

    # Requests -----------------------------------------------------------------------------------------------
    def prepare(self, request: Request) -> Prepared:
        """Open the images of a request and tokenise its text.

        Raises:
            Refused: a conversation, adapter, schema or settings that cannot be; too many tokens.
        """
        arrived = time.monotonic()
        served = self.served
        conversation = _conversation_of(request)
        self._check_text(request)
        try:
            mixture = find_mixture(served, request.adapter, conversation)
            if served.chat.cfg.ocr:
                (conversation,) = add_page_words([conversation], None, served.chat.cfg.window)
            prompts = chat.encode_conversations(served.chat, [conversation], prompt=True)
            tokens = len(prompts.samples[0].ids)
            wanted = evolve(
                chat.sampling_of(served.chat, self._max_tokens(request.max_tokens, tokens)),
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                stop=request.stop,
                seed=request.seed,
            )
            allowed = None
            if request.schema is not None:
                allowed = self._allowed(wanted.end, request.schema)
            batch = chat.make_batch(served.chat, prompts, [0], side="left")
        except Refused:
            raise
        except ValueError as e:
            # What medvl's own errors say of a conversation names its place, tags and sizes, never its text.
            raise Refused(400, _plain(e)) from e
        return Prepared(
            request=request,
            call=batch,
            sampling=wanted,
            allowed=allowed,
            mixture=mixture,
            tokens=tokens,
            arrived=arrived,
        )

    def _check_text(self, request: Request) -> None:
        """Refuse a text that cannot fit, before it is tokenised: of megabytes that takes a minute.

        Raises:
            Refused: more characters than any tokens of the context can have.
        """
        most = _LETTERS * self.cfg.context
        letters = sum(len(message["content"]) for message in request.messages)
        if letters > most:
            raise Refused(
                400,
                f"messages must have at most {most:,} characters for a context of {self.cfg.context} tokens, got {letters:,}",
            )

    def _max_tokens(self, asked: int, tokens: int) -> int:
        """Tokens that an answer to a prompt may have: as asked, else as the model is used to, as far as they fit.

        Raises:
            Refused: they do not fit.
        """
        left = self.cfg.context - tokens
        if left < 1:
            raise Refused(
                400,
                f"a prompt of {tokens} tokens must leave room for an answer within {self.cfg.context}; send fewer or "
                "smaller pages, or less text",
            )
        if left < asked:
            raise Refused(
                400,
                f"a prompt of {tokens} tokens and max_tokens {asked} must be at most {self.cfg.context} together; ask for a "
                "shorter answer",
            )
        return asked or min(self.served.max_tokens, left)

    def _allowed(self, end: tuple[int, ...], schema: Mapping[str, Any]) -> Allowed:
        """The masks of an answer under a schema.

        Raises:
            Refused: a schema that cannot be kept to.
        """
        if self._of_schema is None:
            self._of_schema = json_schema.schema_grammar(self.served.chat.tokenizer, self._vocabulary, end)
        try:
            return self._of_schema(schema)
        except ValueError as e:
            raise Refused(400, error_without_names(e, schema)) from e

    def submit(self, prepared: Prepared) -> None:
        """Let a request wait for its turn."""
        self._waiting.append(prepared)

    def cancel(self, request_id: str) -> None:
        """Forget a request; nothing more of it is emitted."""
        self._waiting = deque(one for one in self._waiting if one.request.id != request_id)
        for place, row in enumerate(self._rows):
            if row.prepared.request.id == request_id:
                self._leave(place)
                return

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._rows

    def load(self) -> dict[str, float]:
        """How much there is to do, and what it holds on a GPU in bytes: for the metrics."""
        load: dict[str, float] = {
            "waiting": len(self._waiting),
            "running": len(self._rows),
            "cached_tokens": sum(self._cache.cache.lengths),
        }
        if self._device.type == "cuda":
            load["gpu_bytes"] = torch.cuda.memory_allocated(self._device)
            load["gpu_free_bytes"], load["gpu_total_bytes"] = torch.cuda.mem_get_info(self._device)
        return load

    # Steps --------------------------------------------------------------------------------------------------
    def work(self, interrupted: Callable[[], bool]) -> None:
        """Answer until nothing is left to do, or `interrupted()` says that there is news; at least one step."""
        while not self.is_idle:
            # One prompt at a time: the rows in flight would wait for all of them.
            if self._waiting and self._has_room(self._waiting[0]):
                self._begin(self._waiting.popleft())
            if self._rows:
                if self._weights is None:
                    self._weights = self.served.weights([row.prepared.mixture for row in self._rows])
                with torch.no_grad():
                    self.served.chat.skeleton.run(self._weights, partial(self._decode, interrupted))
            if interrupted():
                return

    def _has_room(self, next_one: Prepared) -> bool:
        rows, columns = self._room(next_one)
        return rows <= self.cfg.rows and rows * columns <= self.cfg.cells

    def _room(self, next_one: Prepared) -> tuple[int, int]:
        """(rows, columns) of the cache that the rows in flight and the next one need at most."""
        columns = max(one.columns for one in (next_one, *(row.prepared for row in self._rows)))
        return len(self._rows) + 1, columns

    def _begin(self, prepared: Prepared) -> None:
        """Run a prompt, choose its first token, and add its row."""
        begun = time.monotonic()
        try:
            prompt = self._run_prompt(prepared.call, self.served.weights([prepared.mixture]))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.emit(
                prepared.request.id,
                Refused(503, "no memory for this prompt now; send fewer or smaller pages", 10),
            )
            return
        row = _Row(
            prepared=prepared,
            draws=sampling.draw_uniform(prepared.sampling, None, 1, self._device)[0],
            used=self._used_tokens(prepared),
            begun=begun,
        )
        self._add_tokens([row], prompt.logits)
        if row.answer.reason:  # it ended with its first token, or failed
            return
        rows_in_flight.join(self._cache, prompt, self._room(prepared), self.cfg.cells)
        self._rows.append(row)
        self._weights = None

    def _run_prompt(self, batch: Mapping[str, Tensor], weights: Weights) -> cached_forward.Decoding:
        served = self.served
        with torch.no_grad():
            inputs = chat.model_inputs(served.chat, weights, batch, served.params)
            inputs.pop("labels", None)
            call = vlm.model_inputs(served.chat.skeleton, inputs, self._device)
            return served.chat.skeleton.run(weights, partial(rows_in_flight.run_prompt, call=call))

    def _used_tokens(self, prepared: Prepared) -> Tensor | None:
        if prepared.sampling.repetition_penalty == 1:
            return None
        used = torch.zeros(self._vocabulary, dtype=torch.bool, device=self._device)
        ids = prepared.call["ids"][0].to(self._device)
        used[ids[ids < self._vocabulary]] = True  # a placeholder of images may be beyond the head's rows
        return used

    def _decode(self, interrupted: Callable[[], bool], model: nn.Module) -> None:
        """Write tokens until a row ends, a waiting request fits, or there is news."""
        while True:
            tokens = torch.tensor([row.token for row in self._rows]).to(self._device)
            logits = rows_in_flight.decode(model, self._cache, tokens)
            self._add_tokens(self._rows, logits)
            # From the last one: where a row leaves, the last takes its number.
            ended = [place for place, row in enumerate(self._rows) if row.answer.reason]
            for place in reversed(ended):
                self._leave(place)
            if ended or interrupted() or (self._waiting and self._has_room(self._waiting[0])):
                return

    def _leave(self, place: int) -> None:
        rows_in_flight.leave(self._cache, place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        self._weights = None

    # Tokens -------------------------------------------------------------------------------------------------
    def _add_tokens(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Choose a token of each row from its logits [b, v], and emit what is certain of its text."""
        for row, token in zip(rows, self._choose(rows, logits), strict=True):
            answer, cfg = row.answer, row.prepared.sampling
            row.first_token = row.first_token or time.monotonic()
            if token < 0:
                answer.reason = "error"
                self.emit(row.prepared.request.id, _failure(token))
                continue
            row.token = token
            if row.used is not None:
                row.used[token] = True
            before = len(answer.text)
            is_last = len(answer.ids) + 1 == cfg.max_tokens
            try:
                generate.add_token(
                    cfg, self.served.chat.tokenizer, answer, token, is_last=is_last, stream=True
                )
            except ValueError:  # a tokenizer whose texts cannot be told in pieces
                answer.reason = "error"
                self.emit(
                    row.prepared.request.id, Refused(500, "the tokenizer's text cannot be told in pieces")
                )
                continue
            if answer.text[before:]:
                self.emit(row.prepared.request.id, Piece(text=answer.text[before:]))
            if answer.reason:
                self.emit(row.prepared.request.id, self._end_of(row))

    def _end_of(self, row: _Row) -> End:
        prepared, now = row.prepared, time.monotonic()
        return End(
            reason=row.answer.reason,  # type: ignore[arg-type]
            prompt_tokens=prepared.tokens,
            answer_tokens=len(row.answer.ids),
            model=self.served.name,
            revision=self.revision,
            adapters=prepared.mixture,
            queued_s=row.begun - prepared.arrived,
            first_token_s=row.first_token - row.begun,
            total_s=now - prepared.arrived,
        )

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> list[int]:
        """A token of each row; a negative number where none can be chosen."""
        groups: dict[tuple[float, int, float], list[int]] = {}
        failed = list[int]()  # whose masks cannot be made
        for place, row in enumerate(rows):
            cfg = row.prepared.sampling
            groups.setdefault((cfg.temperature, cfg.top_k, cfg.top_p), []).append(place)
            if row.used is not None:
                logits[place] = sampling.penalise_repetition(cfg, logits[place], row.used)
            if row.prepared.allowed is not None:
                mask = self._mask(row.prepared.allowed, row.answer.ids)
                if mask is None:
                    failed.append(place)
                else:
                    logits[place] = logits[place].masked_fill(~mask, -torch.inf)
        chosen = [0] * len(rows)
        for places in groups.values():
            draws = torch.stack([rows[place].draws[len(rows[place].answer.ids)] for place in places])
            some = logits if len(places) == len(rows) else logits[places]
            tokens = sampling.choose_tokens(rows[places[0]].prepared.sampling, some, draws)
            for place, token in zip(places, tokens.tolist(), strict=True):
                chosen[place] = token
        for place in failed:
            chosen[place] = _MASK_FAILED
        return chosen

    def _mask(self, allowed: Allowed, ids: Sequence[int]) -> Tensor | None:
        """The tokens that may come behind others, bool [v]; None where that takes more than a schema may."""
        try:
            mask = allowed(len(ids), torch.tensor([ids], dtype=torch.int64))
        except ValueError:
            return None
        return sampling.full_mask(mask, 1, self._vocabulary, self._device).view(-1)


def _failure(token: int) -> Refused:
    """Why `BatchEngine._choose` gave a negative number in place of a token."""
    if token == _MASK_FAILED:
        return Refused(400, "schema: it needs more than its limits allow; make its patterns simpler")
    return Refused(500, "the model's logits are not finite, or its settings leave no token")


def _conversation_of(request: Request) -> Conversation:
    """The conversation of a request.

    Raises:
        Refused: roles in another order.
    """
    if any(message.get("role") not in ("system", "user", "assistant") for message in request.messages):
        raise Refused(400, "messages: a role must be system, user or assistant")
    try:
        # The last turn is the user's: an answer that stood there would be left out without a word.
        messages.check_order(request.messages, "user", "messages")
    except ValueError as e:
        raise Refused(400, _plain(e)) from e
    images: Any = request.images  # open ones, which a `Vision` takes as it takes paths
    return Conversation(messages=tuple(map(dict, request.messages)), images=images, id="of the request")


def _plain(error: ValueError) -> str:
    """The message of an error without line breaks, cut where it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


# Memory ---------------------------------------------------------------------------------------------------------
def _with_sizes(cfg: EngineConfig, served: Served, token_nbytes: int, device: torch.device) -> EngineConfig:
    """The settings with the sizes that they leave open.

    Raises:
        ValueError: no memory for a prompt of 256 tokens.
    """
    config: Any = served.chat.skeleton.module.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or _CONTEXT
    context = min(cfg.context or _CONTEXT, positions)
    cells = cfg.cells
    if not cells:
        # What a prompt of this length takes besides its keys and values is needed while others lie in the cache.
        free = _free_memory(device) - _prompt_nbytes(served, context)
        cells = max(0, free) // token_nbytes
    if cells < min(256, context):
        raise ValueError(
            f"serve: the cache must hold at least {min(256, context)} tokens of {token_nbytes:,} bytes, found memory for "
            f"{cells} beside a prompt of {context}; lower context, or take a smaller or quantised model"
        )
    context = min(context, cells)
    return evolve(cfg, cells=min(cells, cfg.rows * context), context=context)


def _free_memory(device: torch.device) -> int:
    """Bytes that may be taken: most of what is free on a GPU, a quarter of the memory of the machine."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def _prompt_nbytes(served: Served, tokens: int) -> int:
    """Bytes of activations at the peak of a prompt of text, on tensors without storage."""
    skeleton = served.chat.skeleton
    weights = lazy.move_params(served.weights([()]), "meta")
    call = vlm.model_inputs(
        skeleton, {"ids": torch.zeros(1, tokens, dtype=torch.int64)}, torch.device("meta")
    )

    def run() -> None:
        with torch.no_grad():
            skeleton.run(weights, partial(rows_in_flight.run_prompt, call=call))

    return sum(estimate.peak_of(run, {"weights": weights}).values()) - lazy.nbytes(weights)


# In a process of its own ------------------------------------------------------------------------------------------
class EngineService:
    """A `BatchEngine` as a `worker.Service`: requests are prepared in a thread, while others are answered."""

    def __init__(self, post: Callable[[Any], None], emit: Emit, served: Served, cfg: EngineConfig) -> None:
        self.engine = BatchEngine(served, cfg, emit)
        self.info = {
            "model": served.name,
            "revision": self.engine.revision,
            "models": [served.name, *(name for name in served.adapters if name != served.name)],
            "dtype": str(served.chat.dtype).removeprefix("torch."),
            "device": str(self.engine._device),
            "weights_bytes": lazy.nbytes(served.weights([()])),
            "rows": self.engine.cfg.rows,
            "cells": self.engine.cfg.cells,
            "context": self.engine.cfg.context,
            "max_tokens": served.max_tokens,
            "has_vision": served.chat.vision is not None,
        }
        self._post, self._emit = post, emit
        self._threads = ThreadPoolExecutor(1)
        self._preparing: set[str] = set()

    def submit(self, call: str, content: Request) -> None:
        self._preparing.add(call)
        self._threads.submit(self._prepare, call, evolve(content, id=call))

    def _prepare(self, call: str, request: Request) -> None:
        if call not in self._preparing:  # cancelled before its turn
            return
        prepared: Prepared | Refused
        try:
            prepared = self.engine.prepare(request)
        except Refused as e:
            prepared = e
        except Exception as e:  # a thread that ended without a word would leave the client waiting
            _log.error("a request could not be prepared: %s", type(e).__name__)
            prepared = Refused(500, "the request could not be prepared")
        self._post(("prepared", call, prepared))

    def handle(self, message: tuple[str, str, Prepared | Refused]) -> None:
        _, call, prepared = message
        if call not in self._preparing:
            return
        self._preparing.discard(call)
        if isinstance(prepared, Refused):
            self._emit(call, prepared)
        else:
            self.engine.submit(prepared)

    def cancel(self, call: str) -> None:
        self._preparing.discard(call)
        self.engine.cancel(call)

    @property
    def is_idle(self) -> bool:
        return self.engine.is_idle

    def work(self, interrupted: Callable[[], bool]) -> None:
        self.engine.work(interrupted)

    def load(self) -> dict[str, float]:
        return self.engine.load() | {"preparing": len(self._preparing)}


def open_engine(
    post: Callable[[Any], None],
    emit: Emit,
    place: str,
    registry: str,
    threads: int,
    sizes: tuple[int, int, int],
) -> EngineService:
    """An `EngineService` of what `models.open_served` opens.

    Args:
        threads: of a CPU; 0 = as torch chooses.
        sizes: rows, cells and context of `EngineConfig`.
    """
    if threads:
        torch.set_num_threads(threads)
    rows, cells, context = sizes
    cfg = EngineConfig(rows=rows, cells=cells, context=context)
    return EngineService(post, emit, open_served(place, registry), cfg)
