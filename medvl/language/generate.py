"""From prompts to answers: one token at a time with a cache, batched, greedy or drawn, over allowed tokens, told as it is written."""

import copy
import inspect
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn

from medvl.base.text import few
from medvl.hub.skeletons import Skeleton
from medvl.language import vlm

Allowed = Callable[
    [int, Tensor], Tensor
]  # (step, ids generated so far [b, step]) -> bool mask over the vocabulary, [v] or [b, v]
Gens = torch.Generator | Sequence[torch.Generator]
_PARTIAL = "\ufffd"  # what a tokenizer makes of bytes that are no whole character (yet)


@frozen(kw_only=True)
class Sampling:
    """How tokens are chosen, and when a row is done."""

    max_tokens: int = 256  # new tokens of a row
    min_tokens: int = 0  # no end token before there are so many
    temperature: float = 0.0  # 0 = the likeliest token
    top_k: int = 0  # of the k likeliest, 0 = of all
    top_p: float = 1.0  # of the fewest likeliest that together have this probability
    repetition_penalty: float = (
        1.0  # logits of tokens that the row holds already, prompt included: positive / this, negative * this
    )
    end: tuple[int, ...] = ()  # tokens that end a row; not part of the answer
    stop: tuple[str, ...] = ()  # strings that end a row; the text is cut before them
    seed: int = 0  # of the drawing, where no generator is given

    def __attrs_post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                "Sampling: need max_tokens >= 1 (nothing is generated without a limit) and 0 <= min_tokens <= max_tokens, "
                f"got max_tokens {self.max_tokens}, min_tokens {self.min_tokens}"
            )
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"Sampling: need temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {self.temperature}, {self.top_k}, {self.top_p}"
            )
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"Sampling: need a finite repetition_penalty > 0 (1 changes nothing), got {self.repetition_penalty}"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"Sampling: top_k {self.top_k} and top_p {self.top_p} choose nothing at temperature 0; set temperature > 0"
            )
        if isinstance(self.stop, str) or not all(self.stop) or any(e < 0 for e in self.end):
            raise ValueError(
                f"Sampling: stop must be strings that are not empty, end ids >= 0, got {self.stop!r} and {self.end}"
            )


@frozen(kw_only=True)
class Generated:
    """The answers, one per row."""

    ids: tuple[tuple[int, ...], ...]  # without the end token; a stop string's tokens are among them
    texts: tuple[
        str, ...
    ]  # without special tokens and what a stop string cuts; () where there is no tokenizer
    reasons: tuple[str, ...]  # "end", "stop" or "length"
    prompt_tokens: tuple[int, ...]


def generate(
    cfg: Sampling,
    skeleton: Skeleton,
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    *,
    tok: Any = None,
    allowed: Allowed | None = None,
    on_token: Callable[[int, str], None] | None = None,
    gen: Gens | None = None,
) -> Generated:
    """Continue the prompts of a batch.

    A row's answer depends neither on padding nor on the other rows, up to rounding: row i draws from the i-th generator that `gen` starts,
    so it is the same in any batch in which it is row i; with generators of its own it is the same in any batch.

    Args:
        params: weights of `skeleton`, of any kind; weights per sample must be for the rows of this batch.
        inputs: a batch as of `vlm.model_inputs`, padded on either side; images are seen once, with the prompt.
        tok: tokenizer; needed for texts, stop strings and `on_token`.
        allowed: (step, ids generated so far [b, step]) -> bool mask [v] or [b, v] of the tokens that may come; a mask shorter than the
            vocabulary forbids the rest. `allow_only` and `allow_in_phases` make some. Rows that are done are asked too, and not heard.
        on_token: (row, piece of text), called whenever more of a row's text is certain: whole characters, nothing of a stop string. The
            pieces of a row joined are its text. An exception in it ends the call.
        gen: a generator, or one for every row, on any device; of cfg.seed if left out. Used only with temperature > 0.
    Raises:
        ValueError: as `vlm.model_inputs`; no token allowed; a prompt too long; a mask, tokenizer or stop string that cannot be used; a
            skeleton that is `hub.checkpointed`.
        FloatingPointError: logits that are not finite.
    """
    _check_text(cfg, tok, on_token)
    _check_cache(skeleton)
    call = vlm.model_inputs(skeleton, left_padded(inputs))
    rows, size = _check_room(cfg, skeleton, call)
    draws = _draws(cfg, gen, rows, call["attention_mask"].device)
    ids: list[list[int]] = [[] for _ in range(rows)]
    texts, reasons = [""] * rows, [""] * rows

    def loop(model: nn.Module) -> None:
        steps, written = (
            _steps(model, call, cfg.max_tokens),
            torch.zeros(rows, cfg.max_tokens, dtype=torch.int64, device=draws.device),
        )
        scores, end = next(steps), torch.tensor(cfg.end, dtype=torch.int64, device=draws.device)
        used = _prompt_tokens(call, size)
        for step in range(cfg.max_tokens):
            scores = penalise_repetition(cfg, scores, used)
            if step < cfg.min_tokens and cfg.end:
                scores = scores.index_fill(1, end, -torch.inf)
            if allowed is not None:
                scores = scores.masked_fill(
                    ~_mask(allowed(step, written[:, :step]), rows, size, scores.device), -torch.inf
                )
            token = _choose(cfg, scores, draws[:, step])
            for row, one in enumerate(token.tolist()):  # the one wait for the device in a step
                if reasons[row]:
                    continue
                _check_token(one, row, step, allowed)
                ids[row] += [one] if one not in cfg.end else []
                reasons[row] = "end" if one in cfg.end else "length" if step + 1 == cfg.max_tokens else ""
                if tok is not None and (reasons[row] or cfg.stop or on_token):
                    said, (texts[row], reasons[row]) = (
                        texts[row],
                        _heard(cfg, tok, ids[row], texts[row], reasons[row]),
                    )
                    if on_token is not None and texts[row] != said:
                        on_token(row, texts[row][len(said) :])
            if all(reasons):
                return
            written[:, step] = token.clamp(min=0)
            used.scatter_(1, written[:, step : step + 1], True)
            scores = steps.send(written[:, step])

    with torch.no_grad():
        skeleton.run(params, loop)
    lengths = call["attention_mask"].sum(1).tolist()
    return Generated(
        ids=tuple(map(tuple, ids)),
        texts=tuple(texts) if tok is not None else (),
        reasons=tuple(reasons),
        prompt_tokens=tuple(lengths),
    )


def score_options(
    skeleton: Skeleton,
    params: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    options: Sequence[Sequence[Sequence[int]]],
) -> tuple[Tensor, Tensor]:
    """How likely each of several answers is after its prompt. The prompt (with its images) is computed once.

    Args:
        inputs: a batch as of `vlm.model_inputs`.
        options: token ids of the answers of each row; rows may have different numbers of them.
    Returns:
        log-likelihoods float32 [b, o], summed over the tokens of an option, and their means per token; -inf where a row has fewer options.
    Raises:
        ValueError: as `vlm.model_inputs`; another number of rows, an option without tokens, ids outside the table.
    """
    _check_cache(skeleton)
    call = vlm.model_inputs(skeleton, left_padded(inputs))
    mask, table = call["attention_mask"], skeleton.module.get_input_embeddings()  # type: ignore[operator]
    ids = [t for row in options for option in row for t in option]
    if len(options) != len(mask) or not all(row and all(row) for row in options):
        raise ValueError(
            f"score_options: each of {len(mask)} rows needs options of at least one token, got {options}"
        )
    if min(ids) < 0 or max(ids) >= len(table.weight):
        raise ValueError(
            f"score_options: ids must be from 0 to {len(table.weight) - 1}, got {min(ids)} to {max(ids)}"
        )
    out: list[tuple[Tensor, Tensor]] = []

    def each(model: nn.Module) -> None:
        prompt = model(**call, use_cache=True, **_last_only(model))
        first = prompt.logits[:, -1:].float().log_softmax(-1)
        for k in range(max(map(len, options))):
            lengths = torch.tensor(
                [len(row[k]) if k < len(row) else 0 for row in options], device=mask.device
            )
            padded = [list(row[k]) if k < len(row) else [] for row in options]
            longest = max(map(len, padded))
            tokens = torch.tensor([p + [0] * (longest - len(p)) for p in padded], device=mask.device)
            real = torch.arange(longest, device=mask.device) < lengths[:, None]
            told = (
                first
                if longest == 1
                else torch.cat([first, _continued(model, call, prompt, tokens, real)], 1)
            )
            total = (
                (told.gather(2, tokens[..., None])[..., 0] * real)
                .sum(1)
                .masked_fill(lengths == 0, -torch.inf)
            )
            out.append((total, total / lengths.clamp(min=1)))

    with torch.no_grad():
        skeleton.run(params, each)
    return torch.stack([s for s, _ in out], 1), torch.stack([m for _, m in out], 1)


def allow_only(ids: Sequence[int]) -> Allowed:
    """A mask that allows these tokens at every step.

    Raises:
        ValueError: no ids, or negative ones.
    """
    if not ids or min(ids) < 0:
        raise ValueError(f"allow_only: needs ids >= 0, got {list(ids)}")
    mask = torch.zeros(max(ids) + 1, dtype=torch.bool)
    mask[list(ids)] = True
    on: dict[torch.device, Tensor] = {}

    def allowed(step: int, so_far: Tensor) -> Tensor:
        if so_far.device not in on:
            on[so_far.device] = mask.to(so_far.device)
        return on[so_far.device]

    return allowed


def allow_in_phases(*parts: tuple[int, Allowed]) -> Allowed:
    """Masks one after the other, each for a number of steps; the last stays. Image codes: `allow_in_phases((1024, allow_only(codes)), (1, allow_only([end])))`.

    Raises:
        ValueError: no parts, or one of less than a step.
    """
    if not parts or min(n for n, _ in parts) < 1:
        raise ValueError(f"allow_in_phases: needs parts of at least one step, got {[n for n, _ in parts]}")

    def allowed(step: int, so_far: Tensor) -> Tensor:
        ends = itertools.accumulate(n for n, _ in parts)
        part = next((part for end, (_, part) in zip(ends, parts, strict=True) if step < end), parts[-1][1])
        return part(step, so_far)

    return allowed


def sampling_probabilities(cfg: Sampling, logits: Tensor) -> Tensor:
    """What a token is drawn from, [b, v] -> float32 [b, v]: softmax at cfg.temperature (not 0) of the tokens that top_k and top_p leave.

    Source: top_p after Holtzman et al. 2020, arXiv:1904.09751, section 3.1; the same order as in transformers: temperature, top_k, top_p.
    """
    share, ids = _shortlist(cfg, logits.float())
    return share if ids is None else torch.zeros_like(logits, dtype=torch.float32).scatter(1, ids, share)


def penalise_repetition(cfg: Sampling, logits: Tensor, used: Tensor) -> Tensor:
    """Logits [b, v] with cfg.repetition_penalty on the tokens that are `used`, bool [b, v].

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1; RepetitionPenaltyLogitsProcessor of transformers, but for padding,
    which is not used here.
    """
    if cfg.repetition_penalty == 1:
        return logits
    lowered = torch.where(logits < 0, logits * cfg.repetition_penalty, logits / cfg.repetition_penalty)
    return torch.where(used, lowered, logits)


def _prompt_tokens(call: Mapping[str, Any], size: int) -> Tensor:
    """Which tokens of a vocabulary of `size` each prompt holds, bool [b, v]; none where the prompt is given as embeddings."""
    mask = call["attention_mask"].bool()
    used = torch.zeros(len(mask), size, dtype=torch.bool, device=mask.device)
    ids = call.get("input_ids")
    if ids is None:
        return used
    rows, columns = (mask & (ids < size)).nonzero(as_tuple=True)
    used[rows, ids[rows, columns]] = True
    return used


def left_padded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch with all padding on the left, where generation needs it, and no more of it than the longest row leaves.

    Raises:
        ValueError: the mask is of another shape than what it is for.
    """
    mask = inputs.get("mask")
    if mask is None or mask.dim() != 2 or not mask.numel():
        return dict(inputs)
    kept = mask.bool()
    order = kept.long().sort(dim=1, stable=True).indices[:, mask.shape[1] - max(1, int(kept.sum(1).max())) :]
    out = dict(inputs)
    for name in ("ids", "mask", "mm_token_type_ids", "position_ids", "inputs_embeds"):
        t = inputs.get(name)
        if t is None:
            continue
        axis = 2 if name == "position_ids" and t.dim() == 3 else 1
        if t.shape[axis - 1 : axis + 1] != mask.shape:
            raise ValueError(
                f"left_padded: {name} must be of the mask's rows and tokens {list(mask.shape)}, got {list(t.shape)}"
            )
        at = (
            order.expand(len(t), -1, -1)
            if axis == 2
            else order
            if t.dim() == 2
            else order[..., None].expand(-1, -1, t.shape[-1])
        )
        out[name] = t.gather(axis, at)
    return out


# The model ------------------------------------------------------------------------------------------------------------------------------
def _steps(model: nn.Module, call: dict[str, Any], most: int) -> Generator[Tensor, Tensor, None]:
    """Logits float32 [b, v] of the next token; for every token [b] that is sent back those of the one after it."""
    last, at, name = _last_only(model), _next_position(call), _cache_name(model)
    out = model(**call, use_cache=True, **last)
    mask, whole = F.pad(call["attention_mask"], (0, most), value=1), bool(call["attention_mask"].all())
    for n in range(call["attention_mask"].shape[1] + 1, mask.shape[1] + 1):
        token = yield out.logits[:, -1].float()
        cache = getattr(out, name)
        seen = None if whole else _step_mask(model, cache, mask[:, :n])
        place = {} if at is None else {"position_ids": at}
        out = model(
            input_ids=token[:, None], attention_mask=seen, **{name: cache}, use_cache=True, **place, **last
        )
        at = None if at is None else at + 1


def _cache_name(model: nn.Module) -> str:
    """What the model calls its cache, as an argument and in its output: transformers changes the name between 5.17 and 5.40."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _last_only(model: nn.Module) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _next_position(call: dict[str, Any]) -> Tensor | None:
    """Position [b, 1] or [3, b, 1] of the token behind the prompt: one more than any before it, on all axes."""
    positions = call.get("position_ids")
    if positions is None or positions.dim() == 2:
        return None if positions is None else positions.amax(1, keepdim=True) + 1
    return (positions[-3:].amax((0, 2))[:, None] + 1).expand(3, -1, -1)


def _step_mask(model: nn.Module, cache: Any, mask: Tensor) -> Tensor:
    """The mask of one new token. Where all layers see as far, it is made here: transformers would wait for the device to look at it."""
    windows = {
        layer.sliding_window if layer.is_sliding else 0
        for layer in cache.layers
        if hasattr(layer, "is_sliding")
    }
    plain = all(hasattr(layer, "is_sliding") and hasattr(layer, "keys") for layer in cache.layers)
    config: Any = model.config
    if not plain or len(windows) != 1 or config.get_text_config()._attn_implementation != "sdpa":
        return mask
    return mask[:, None, None, -windows.pop() :].bool()  # -0 is the beginning


def _continued(model: nn.Module, call: dict[str, Any], prompt: Any, tokens: Tensor, real: Tensor) -> Tensor:
    """Log-probabilities [b, n - 1, v] of what follows each of tokens [b, n] but the last, behind the prompt, whose cache stays as it is."""
    name = _cache_name(model)
    cache, at = copy.copy(getattr(prompt, name)), _next_position(call)
    cache.layers = [
        copy.copy(layer) for layer in cache.layers
    ]  # a layer replaces its tensors, it does not write into them
    mask = torch.cat([call["attention_mask"], real[:, :-1].long()], 1)
    place = (
        {} if at is None else {"position_ids": at + torch.arange(tokens.shape[1] - 1, device=tokens.device)}
    )
    out = model(input_ids=tokens[:, :-1], attention_mask=mask, **{name: cache}, use_cache=True, **place)
    return out.logits.float().log_softmax(-1)


def _check_cache(skeleton: Skeleton) -> None:
    if any(getattr(m, "gradient_checkpointing", False) and m.training for m in skeleton.module.modules()):
        raise ValueError(
            f"generate: {skeleton.name} is checkpointed, its layers would leave the cache empty; give the skeleton it is of"
        )


# One token ------------------------------------------------------------------------------------------------------------------------------
def _choose(cfg: Sampling, scores: Tensor, draw: Tensor) -> Tensor:
    """Token ids [b] of logits [b, v], -1 where no token is allowed, -2 where logits are not finite; draw [b]: uniform in [0, 1)."""
    token = scores.argmax(-1, keepdim=True)
    best = scores.gather(1, token)
    if cfg.temperature:
        share, ids = _shortlist(cfg, scores)
        upto = share.double().cumsum(-1)
        token = torch.searchsorted(upto, draw[:, None] * upto[:, -1:], right=True).clamp(
            max=share.shape[1] - 1
        )
        token = token if ids is None else ids.gather(1, token)
    return torch.where(best.isfinite(), token, torch.where(best == -torch.inf, -1, -2))[:, 0]


def _shortlist(cfg: Sampling, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Probabilities [b, n] and the ids they are of, None for the vocabulary in its order."""
    ids = None
    if cfg.top_k and cfg.top_k < scores.shape[1]:
        scores, ids = scores.topk(cfg.top_k)
    elif cfg.top_p < 1:
        scores, ids = scores.sort(descending=True)
    share = (scores / cfg.temperature).softmax(-1)
    if cfg.top_p < 1:
        share = share.masked_fill(share.cumsum(-1) - share >= cfg.top_p, 0)
        share = share / share.sum(-1, keepdim=True)
    return share, ids


def _draws(cfg: Sampling, gen: Gens | None, rows: int, device: torch.device) -> Tensor:
    """Uniform numbers float64 [b, max_tokens], those of a row from a generator of its own."""
    if cfg.temperature == 0:
        return torch.zeros(rows, cfg.max_tokens, device=device)
    gen = torch.Generator().manual_seed(cfg.seed) if gen is None else gen
    if isinstance(gen, torch.Generator):
        seeds = [int(torch.randint(2**62, (), generator=gen, device=gen.device)) for _ in range(rows)]
        gen = [torch.Generator().manual_seed(s) for s in seeds]
    if len(gen) != rows:
        raise ValueError(
            f"generate: gen must be one generator or one for each of {rows} rows, got {len(gen)}"
        )
    drawn = [
        torch.rand(cfg.max_tokens, generator=g, device=g.device, dtype=torch.float64).to(device) for g in gen
    ]
    return torch.stack(drawn).clamp(max=1 - 2.0**-32)


def _mask(mask: Tensor, rows: int, size: int, device: torch.device) -> Tensor:
    if (
        mask.dtype != torch.bool
        or mask.shape[-1] > size
        or mask.dim() not in (1, 2)
        or (mask.dim() == 2 and len(mask) != rows)
    ):
        raise ValueError(
            f"generate: allowed must give bool [v] or [{rows}, v] with v <= {size}, got {mask.dtype} {list(mask.shape)}"
        )
    return F.pad(mask.to(device), (0, size - mask.shape[-1]))


# Text -----------------------------------------------------------------------------------------------------------------------------------
def _heard(cfg: Sampling, tok: Any, ids: list[int], said: str, reason: str) -> tuple[str, str]:
    """The text of these tokens as far as later ones cannot change it, and the reason why they end (or ""). `said` is what was certain."""
    text = tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if cuts := [at for s in cfg.stop if (at := text.find(s)) >= 0]:
        text, reason = text[: min(cuts)], "stop"
    elif not reason:
        text = text.rstrip(_PARTIAL)
        text = text[
            : len(text)
            - max((k for s in cfg.stop for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
        ]
    if not text.startswith(said):
        if not reason:
            return said, ""
        raise ValueError(
            f"generate: the tokenizer turned {said[-20:]!r} into {text[-20:]!r}: its texts cannot be told in pieces"
        )
    return text, reason


def _check_text(cfg: Sampling, tok: Any, on_token: Any) -> None:
    if tok is None and (cfg.stop or on_token is not None):
        raise ValueError(
            f"generate: stop strings and on_token need a tokenizer (tok=tokens.tokenizer(...)), got stop {cfg.stop} and tok None"
        )
    if tok is not None and (special := sorted({*cfg.stop} & {*tok.all_special_tokens})):
        ids = tok.convert_tokens_to_ids(special)
        raise ValueError(f"generate: {few(special)} are tokens, not text; give their ids {ids} as end")


def check_length(cfg: Sampling, skeleton: Skeleton, longest: int) -> None:
    """Raise where a prompt of so many tokens and its answer need more positions than the model has."""
    config: Any = skeleton.module.config
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    room = getattr(config, "max_position_embeddings", None) or longest + cfg.max_tokens
    room = int(room * max(1.0, rope.get("factor") or 1.0))
    if longest + cfg.max_tokens > room:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and max_tokens {cfg.max_tokens} are more than the {room} positions of {skeleton.name}"
        )


def _check_room(cfg: Sampling, skeleton: Skeleton, call: dict[str, Any]) -> tuple[int, int]:
    """(rows, vocabulary)."""
    module: Any = skeleton.module
    rows, longest = call["attention_mask"].shape
    size = module.get_output_embeddings().weight.shape[0]
    check_length(cfg, skeleton, longest)
    if wrong := [e for e in cfg.end if e >= size]:
        raise ValueError(f"generate: end ids must be below the vocabulary's {size}, got {wrong}")
    return rows, size


def _check_token(token: int, row: int, step: int, allowed: Allowed | None) -> None:
    if token == -1:
        why = "its mask is empty" if allowed is not None else "min_tokens forbids the only ones"
        raise ValueError(f"generate: no token is allowed in row {row} at step {step}: {why}")
    if token == -2:
        raise FloatingPointError(f"generate: logits of row {row} at step {step} are not finite")
