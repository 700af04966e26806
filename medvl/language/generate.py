"""Generation of answers and likelihoods of given answers.

Batched, one token at a time with a cache, greedy or sampled, over allowed tokens, and streamed as text.
In shapes b are the rows of the batch, v the vocabulary, t the tokens of the prompt, n those of an answer.
"""

import copy
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from torch import Tensor, nn

from medvl.base.text import few
from medvl.hub.skeletons import Skeleton
from medvl.language import vlm

# (step, ids generated so far [b, step]) -> bool mask over the vocabulary, [v] or [b, v]
Allowed = Callable[[int, Tensor], Tensor]
Gens = torch.Generator | Sequence[torch.Generator]  # one for the batch, or one for each row
# What `_choose_tokens` gives in place of a token id.
_NONE_ALLOWED = -1
_NOT_FINITE = -2
_PARTIAL = "\ufffd"  # stands for bytes that are no complete character (yet) in the text of a tokenizer


@frozen(kw_only=True)
class Sampling:
    """How tokens are chosen, and when a row is done."""

    max_tokens: int = 256  # new tokens of a row
    min_tokens: int = 0  # no end token before so many new tokens
    temperature: float = 0.0  # 0 = the likeliest token
    top_k: int = 0  # sample from the k likeliest, 0 = from all
    top_p: float = 1.0  # sample from the fewest likeliest that together have this probability
    # Logits of tokens that a row has already, prompt included: positive ones / this, negative ones * this.
    repetition_penalty: float = 1.0
    end: tuple[int, ...] = ()  # tokens that end a row; not part of the answer
    stop: tuple[str, ...] = ()  # strings that end a row; the text is cut before them
    seed: int = 0  # of sampling, where no generator is given

    def __attrs_post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                "Sampling: need max_tokens >= 1 (nothing is generated without a limit) and 0 <= min_tokens "
                "<= max_tokens, "
                f"got max_tokens {self.max_tokens}, min_tokens {self.min_tokens}"
            )
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"Sampling: need temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {self.temperature}, "
                f"{self.top_k}, {self.top_p}"
            )
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                "Sampling: need a finite repetition_penalty > 0 (1 changes nothing), got "
                f"{self.repetition_penalty}"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"Sampling: top_k {self.top_k} and top_p {self.top_p} choose nothing at temperature 0; set "
                "temperature > 0"
            )
        if isinstance(self.stop, str) or not all(self.stop) or any(e < 0 for e in self.end):
            raise ValueError(
                f"Sampling: stop must be strings that are not empty, end ids >= 0, got {self.stop!r} and "
                f"{self.end}"
            )


@frozen(kw_only=True)
class Generated:
    """The answers, one per row."""

    ids: tuple[tuple[int, ...], ...]  # without the end token; the tokens of a stop string are among them
    texts: tuple[str, ...]  # without special tokens and what a stop string cuts; () without a tokenizer
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

    A row's answer depends neither on padding nor on the other rows, up to rounding: row i samples from the
    i-th generator that `gen` starts, so it is the same in any batch in which it is row i; with generators of
    its own it is the same in any batch.

    Args:
        params: weights of `skeleton`, of any kind (see `medvl.weights`); of a kind that differs from sample
            to sample, those for the rows of this batch.
        inputs: a batch as of `vlm.model_inputs`, padded on either side; images are encoded once, with the
            prompt.
        tok: tokenizer; needed for texts, stop strings and `on_token`.
        allowed: (step, ids generated so far [b, step]) -> bool mask [v] or [b, v] of the tokens that may
            come; a mask shorter than the vocabulary forbids the other tokens. `allow_only` and
            `allow_in_phases` make some. The mask of a row that is done has no effect.
        on_token: (row, piece of text), called whenever more of a row's text is certain: complete characters,
            nothing of a stop string. The pieces of a row joined are its text. An exception in it ends the
            call.
        gen: a generator, or one for every row, on any device; of cfg.seed if left out. Used only with
            temperature > 0.
    Raises:
        ValueError: as `vlm.model_inputs`; no token allowed; a prompt too long; a mask, tokenizer or stop
            string that cannot be used; a skeleton that is checkpointed.
        FloatingPointError: logits that are not finite.
    """
    _check_text_options(cfg, tok, on_token)
    _check_not_checkpointed(skeleton)
    # The last column must be the last token of every row: behind it the new tokens are put.
    call = vlm.model_inputs(skeleton, left_padded(inputs))
    rows, vocabulary = _check_size(cfg, skeleton, call)
    # All numbers in advance: how many a row uses does not change those of the other rows.
    draws = _draw_uniform(cfg, gen, rows, call["attention_mask"].device)
    device = draws.device  # where the batch is
    answers = [_Answer() for _ in range(rows)]

    def loop(model: nn.Module) -> None:
        decoder = _next_logits(model, call, cfg.max_tokens)
        generated = torch.zeros(rows, cfg.max_tokens, dtype=torch.int64, device=device)
        end = torch.tensor(cfg.end, dtype=torch.int64, device=device)
        logits = next(decoder)
        used = _prompt_tokens(call, vocabulary)  # by the prompt, and by each row's answer as it grows
        for step in range(cfg.max_tokens):
            logits = penalise_repetition(cfg, logits, used)
            if step < cfg.min_tokens and cfg.end:
                logits = logits.index_fill(1, end, -torch.inf)
            if allowed is not None:
                mask = _full_mask(allowed(step, generated[:, :step]), rows, vocabulary, logits.device)
                logits = logits.masked_fill(~mask, -torch.inf)
            tokens = _choose_tokens(cfg, logits, draws[:, step])
            # `tolist` is the one place in a step that waits for the device.
            for row, token in enumerate(tokens.tolist()):
                answer = answers[row]
                if answer.reason:
                    continue
                _check_token(token, row, step, allowed)
                _add_token(
                    cfg, tok, answer, token, is_last=step + 1 == cfg.max_tokens, stream=on_token is not None
                )
                if on_token is not None and answer.text != answer.streamed:
                    on_token(row, answer.text[len(answer.streamed) :])
                answer.streamed = answer.text
            if all(answer.reason for answer in answers):
                return
            # Rows that are done may have _NONE_ALLOWED; any token will do for them.
            generated[:, step] = tokens.clamp(min=0)
            used.scatter_(1, generated[:, step : step + 1], True)
            logits = decoder.send(generated[:, step])

    with torch.no_grad():
        skeleton.run(params, loop)
    texts: tuple[str, ...] = ()
    if tok is not None:
        texts = tuple(answer.text for answer in answers)
    return Generated(
        ids=tuple(tuple(answer.ids) for answer in answers),
        texts=texts,
        reasons=tuple(answer.reason for answer in answers),
        prompt_tokens=tuple(call["attention_mask"].sum(1).tolist()),
    )


@define
class _Answer:
    """The answer of a row while it is generated."""

    ids: list[int] = field(factory=list)
    text: str = ""  # as far as it is certain
    streamed: str = ""  # as far as `on_token` has had it
    reason: str = ""  # why the row is done, "" while it is not


def _add_token(cfg: Sampling, tok: Any, answer: _Answer, token: int, *, is_last: bool, stream: bool) -> None:
    """Add a token to an answer, and its text where it is needed at this step."""
    if token in cfg.end:
        answer.reason = "end"
    else:
        answer.ids.append(token)
        if is_last:
            answer.reason = "length"
    # Without stop strings and streaming the text is needed at the end only. All ids are decoded each time,
    # which at every step would cost the square of the answer's length.
    if tok is not None and (answer.reason or cfg.stop or stream):
        answer.text, answer.reason = _decode_certain(cfg, tok, answer.ids, answer.text, answer.reason)


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
        log-likelihoods float32 [b, o], summed over the tokens of an option, and their means per token; -inf
        where a row has fewer options.
    Raises:
        ValueError: as `vlm.model_inputs`; another number of rows, an option without tokens, ids outside the
            table.
    """
    _check_not_checkpointed(skeleton)
    call = vlm.model_inputs(skeleton, left_padded(inputs))
    device = call["attention_mask"].device
    _check_options(skeleton, options, rows=len(call["attention_mask"]))
    sums = list[Tensor]()
    means = list[Tensor]()

    def score_each(model: nn.Module) -> None:
        prompt = model(**call, use_cache=True, **_last_logits_only(model))
        # [b, 1, v]: what the prompt says of the first token of every option.
        first = prompt.logits[:, -1:].float().log_softmax(-1)
        # The k-th options of all rows are one batch; a row that has fewer takes part with an empty one.
        for k in range(max(map(len, options))):
            tokens, lengths = _pad_options([row[k] if k < len(row) else () for row in options], device)
            exists = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
            log_probs = first
            if tokens.shape[1] > 1:
                log_probs = torch.cat([first, _continuation(model, call, prompt, tokens, exists)], 1)
            # [b, n]; 0 behind the end of an option.
            of_tokens = log_probs.gather(2, tokens[..., None])[..., 0] * exists
            total = of_tokens.sum(1).masked_fill(lengths == 0, -torch.inf)
            sums.append(total)
            # The mean does not favour short options, as the sum does. Its clamp is for options that a row
            # does not have.
            means.append(total / lengths.clamp(min=1))

    with torch.no_grad():
        skeleton.run(params, score_each)
    return torch.stack(sums, 1), torch.stack(means, 1)


def _check_options(skeleton: Skeleton, options: Sequence[Sequence[Sequence[int]]], *, rows: int) -> None:
    if len(options) != rows or not all(row and all(row) for row in options):
        raise ValueError(
            f"score_options: each of {rows} rows needs options of at least one token, got {options}"
        )
    table = skeleton.module.get_input_embeddings()  # type: ignore[operator]
    ids = [token for row in options for option in row for token in option]
    if min(ids) < 0 or max(ids) >= len(table.weight):
        raise ValueError(
            f"score_options: ids must be from 0 to {len(table.weight) - 1}, got {min(ids)} to {max(ids)}"
        )


def _pad_options(options: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids int64 [b, n] with 0 behind them, how many there are of each [b])."""
    lengths = [len(option) for option in options]
    longest = max(lengths)
    padded = [list(option) + [0] * (longest - len(option)) for option in options]
    return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)


def allow_only(ids: Sequence[int]) -> Allowed:
    """A mask that allows these tokens at every step.

    Raises:
        ValueError: no ids, or negative ones.
    """
    if not ids or min(ids) < 0:
        raise ValueError(f"allow_only: needs ids >= 0, got {list(ids)}")
    mask = torch.zeros(max(ids) + 1, dtype=torch.bool)
    mask[list(ids)] = True
    on_device: dict[torch.device, Tensor] = {}  # copied once, not at every step

    def allowed(step: int, so_far: Tensor) -> Tensor:
        if so_far.device not in on_device:
            on_device[so_far.device] = mask.to(so_far.device)
        return on_device[so_far.device]

    return allowed


def allow_in_phases(*phases: tuple[int, Allowed]) -> Allowed:
    """Masks one after the other, each for a number of steps; the last one stays.

    Image codes and an end token: `allow_in_phases((1024, allow_only(codes)), (1, allow_only([end])))`.

    Raises:
        ValueError: no phases, or one of less than a step.
    """
    if not phases or min(steps for steps, _ in phases) < 1:
        raise ValueError(
            f"allow_in_phases: needs parts of at least one step, got {[steps for steps, _ in phases]}"
        )

    def allowed(step: int, so_far: Tensor) -> Tensor:
        end = 0
        for steps, mask in phases:
            end += steps
            if step < end:
                return mask(step, so_far)
        last = phases[-1][1]
        return last(step, so_far)

    return allowed


def penalise_repetition(cfg: Sampling, logits: Tensor, used: Tensor) -> Tensor:
    """Logits [b, v] with cfg.repetition_penalty on the tokens that are `used`, bool [b, v].

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1; equal to
    RepetitionPenaltyLogitsProcessor of transformers, except that padding is not penalised here.
    """
    if cfg.repetition_penalty == 1:
        return logits
    lowered = torch.where(logits < 0, logits * cfg.repetition_penalty, logits / cfg.repetition_penalty)
    return torch.where(used, lowered, logits)


def _prompt_tokens(call: Mapping[str, Any], vocabulary: int) -> Tensor:
    """Which tokens each prompt has, bool [b, v]; none where the prompt is given as embeddings."""
    mask = call["attention_mask"].bool()
    used = torch.zeros(len(mask), vocabulary, dtype=torch.bool, device=mask.device)
    ids = call.get("input_ids")
    if ids is None:
        return used
    # A placeholder of images may have an id beyond the head's rows; it cannot be chosen, and needs no
    # penalty.
    rows, columns = (mask & (ids < vocabulary)).nonzero(as_tuple=True)
    used[rows, ids[rows, columns]] = True
    return used


def left_padded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch with all padding on the left, where generation needs it, cut to the longest row.

    Raises:
        ValueError: the mask and another tensor differ in shape.
    """
    mask = inputs.get("mask")
    if mask is None or mask.dim() != 2 or not mask.numel():
        return dict(inputs)
    exists = mask.bool()
    longest = max(1, int(exists.sum(1).max()))
    # A stable sort of 0 (padding) and 1 moves padding to the left and keeps the order of tokens.
    # Columns [b, longest] that each row is read from.
    order = exists.long().sort(dim=1, stable=True).indices[:, mask.shape[1] - longest :]
    padded = dict(inputs)
    for name in ("ids", "mask", "mm_token_type_ids", "position_ids", "inputs_embeds"):
        tensor = inputs.get(name)
        if tensor is None:
            continue
        axis = 1  # of tokens
        if name == "position_ids" and tensor.dim() == 3:
            axis = 2
        if tensor.shape[axis - 1 : axis + 1] != mask.shape:
            raise ValueError(
                f"left_padded: {name} must be of the mask's rows and tokens {list(mask.shape)}, got "
                f"{list(tensor.shape)}"
            )
        index = order
        if axis == 2:
            index = order.expand(len(tensor), -1, -1)
        elif tensor.dim() > 2:
            index = order[..., None].expand(-1, -1, tensor.shape[-1])
        padded[name] = tensor.gather(axis, index)
    return padded


# The model --------------------------------------------------------------------------------------------------
def _next_logits(model: nn.Module, call: dict[str, Any], steps: int) -> Generator[Tensor, Tensor, None]:
    """Yield logits float32 [b, v] of the next token; for every token [b] that is sent those of the token
    behind it.

    Args:
        steps: how often logits are yielded. The token sent last would be computed for nothing, so a caller
            that has all its tokens does not send it.
    """
    last_only = _last_logits_only(model)
    position = _next_position(call)
    cache_name = _cache_name(model)
    output = model(**call, use_cache=True, **last_only)
    prompt_mask = call["attention_mask"]
    has_padding = not bool(prompt_mask.all())
    # For the longest answer there can be; every step takes its beginning.
    mask = F.pad(prompt_mask, (0, steps), value=1)
    for length in range(prompt_mask.shape[1] + 1, mask.shape[1] + 1):
        # float32, as the softmax of a whole vocabulary in bfloat16 would round the probabilities away.
        token = yield output.logits[:, -1].float()
        cache = getattr(output, cache_name)
        # Without padding a new token may see the whole cache, and needs no mask.
        arguments: dict[str, Any] = {"attention_mask": None, cache_name: cache}
        if has_padding:
            arguments["attention_mask"] = _step_mask(model, cache, mask[:, :length])
        if position is not None:
            arguments["position_ids"] = position
            position = position + 1
        output = model(input_ids=token[:, None], use_cache=True, **arguments, **last_only)


def _cache_name(model: nn.Module) -> str:
    """The name of the cache, as an argument and in the output: transformers changes it from 5.17 to 5.40."""
    if "cache" in inspect.signature(model.forward).parameters:
        return "cache"
    return "past_key_values"


def _last_logits_only(model: nn.Module) -> dict[str, int]:
    """The argument by which a model computes logits of the last token only, where it has one."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return {"logits_to_keep": 1}
    return {}


def _next_position(call: dict[str, Any]) -> Tensor | None:
    """Position [b, 1] or [3, b, 1] of the token behind the prompt: one more than any before, on all axes."""
    positions = call.get("position_ids")
    if positions is None:
        return None
    if positions.dim() == 2:
        return positions.amax(1, keepdim=True) + 1
    # Where there are four axes, text positions stand before the three. A text goes on behind the largest
    # position of all axes (Qwen2-VL, arXiv:2409.12191, section 2.1).
    return (positions[-3:].amax((0, 2))[:, None] + 1).expand(3, -1, -1)


def _step_mask(model: nn.Module, cache: Any, mask: Tensor) -> Tensor:
    """The mask of one new token.

    Where all layers have the same attention window, it is made here: transformers would wait for the device
    to look at the mask.
    """
    windows = set[int]()  # 0 for a layer that looks at all tokens
    for layer in cache.layers:
        # A layer of another kind, or one that holds no keys: left to transformers.
        if not hasattr(layer, "is_sliding") or not hasattr(layer, "keys"):
            return mask
        windows.add(layer.sliding_window if layer.is_sliding else 0)
    config: Any = model.config
    if len(windows) != 1 or config.get_text_config()._attn_implementation != "sdpa":
        return mask
    # A layer with a window keeps only that many keys. Without one, -0 is the beginning: all of them.
    return mask[:, None, None, -windows.pop() :].bool()


def _continuation(
    model: nn.Module, call: dict[str, Any], prompt: Any, tokens: Tensor, exists: Tensor
) -> Tensor:
    """Log-probabilities [b, n - 1, v] of the second to the last token of answers [b, n], each after the
    prompt and the tokens before it.

    Args:
        prompt: the model's output for the prompt; its cache is left as it is.
        exists: bool [b, n], False for the padding of answers.
    """
    cache_name = _cache_name(model)
    cache = copy.copy(getattr(prompt, cache_name))
    # Shallow copies are enough: a layer replaces its tensors and does not write into them.
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    arguments: dict[str, Any] = {
        "attention_mask": torch.cat([call["attention_mask"], exists[:, :-1].long()], 1),
        cache_name: cache,
    }
    position = _next_position(call)
    if position is not None:
        arguments["position_ids"] = position + torch.arange(tokens.shape[1] - 1, device=tokens.device)
    output = model(input_ids=tokens[:, :-1], use_cache=True, **arguments)
    return output.logits.float().log_softmax(-1)


def _check_not_checkpointed(skeleton: Skeleton) -> None:
    for module in skeleton.module.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise ValueError(
                f"generate: {skeleton.name} is checkpointed, its layers would leave the cache empty; "
                "give the skeleton it is of"
            )


# One token --------------------------------------------------------------------------------------------------
def _choose_tokens(cfg: Sampling, logits: Tensor, draw: Tensor) -> Tensor:
    """Token ids [b] of logits [b, v]: _NONE_ALLOWED where all are -inf, _NOT_FINITE where the best is not
    finite otherwise (NaN, inf).

    Args:
        draw: uniform in [0, 1), float64 [b]; not used at temperature 0.
    """
    tokens = logits.argmax(-1, keepdim=True)
    best = logits.gather(1, tokens)
    if cfg.temperature:
        probabilities, ids = _shortlist(cfg, logits)
        # float64: a sum over 150,000 tokens in float32 would lose the least likely ones.
        cumulative = probabilities.double().cumsum(-1)
        # Scaled by the total, which rounding leaves a little beside 1.
        # right=True: a draw of 0 must not choose a token of probability 0 that stands first.
        places = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True)
        # In a row of NaN every place is behind the last token; its token is replaced below.
        tokens = places.clamp(max=probabilities.shape[1] - 1)
        if ids is not None:
            tokens = ids.gather(1, tokens)
    # Told by the id, since to raise here would wait for the device; `_check_token` reads it.
    error = torch.where(best == -torch.inf, _NONE_ALLOWED, _NOT_FINITE)
    return torch.where(best.isfinite(), tokens, error)[:, 0]


def _shortlist(cfg: Sampling, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Probabilities [b, k] of the tokens that top_k and top_p leave, and their ids; ids None stands for the
    whole vocabulary in its order.

    Source: top_p after Holtzman et al. 2020, arXiv:1904.09751, section 3.1; the same order as in
    transformers: temperature, top_k, top_p.
    """
    ids = None
    if cfg.top_k and cfg.top_k < logits.shape[1]:
        logits, ids = logits.topk(cfg.top_k)
    # topk sorts already.
    elif cfg.top_p < 1:
        logits, ids = logits.sort(descending=True)
    probabilities = (logits / cfg.temperature).softmax(-1)
    if cfg.top_p < 1:
        # The probability of all likelier tokens: the one that crosses top_p stays, so that there is always
        # one.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= cfg.top_p, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


def _draw_uniform(cfg: Sampling, gen: Gens | None, rows: int, device: torch.device) -> Tensor:
    """Uniform numbers float64 [b, max_tokens], those of a row from a generator of its own; at temperature 0,
    where they are not used, zeros.
    """
    if cfg.temperature == 0:
        return torch.zeros(rows, cfg.max_tokens, device=device)
    if gen is None:
        gen = torch.Generator().manual_seed(cfg.seed)
    if isinstance(gen, torch.Generator):
        # A generator for every row: with one for all, a row's numbers would depend on how many rows there
        # are.
        seeds = [int(torch.randint(2**62, (), generator=gen, device=gen.device)) for _ in range(rows)]
        gen = [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(gen) != rows:
        raise ValueError(
            f"generate: gen must be one generator or one for each of {rows} rows, got {len(gen)}"
        )
    numbers = list[Tensor]()
    for one in gen:
        drawn = torch.rand(cfg.max_tokens, generator=one, device=one.device, dtype=torch.float64)
        numbers.append(drawn.to(device))
    # Below 1 by more than rounding: times a total, it must not become the total (`_choose_tokens`).
    return torch.stack(numbers).clamp(max=1 - 2.0**-32)


def _full_mask(mask: Tensor, rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """A mask of allowed tokens over the vocabulary, [v] or [b, v]; what it does not cover is forbidden."""
    fits = mask.dtype == torch.bool and mask.dim() in (1, 2) and mask.shape[-1] <= vocabulary
    if not fits or (mask.dim() == 2 and len(mask) != rows):
        raise ValueError(
            f"generate: allowed must give bool [v] or [{rows}, v] with v <= {vocabulary}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return F.pad(mask.to(device), (0, vocabulary - mask.shape[-1]))


# Text -------------------------------------------------------------------------------------------------------
def _decode_certain(cfg: Sampling, tok: Any, ids: list[int], before: str, reason: str) -> tuple[str, str]:
    """The text of tokens as far as later tokens cannot change it, and the reason why the row is done (or "").

    Args:
        before: the certain text of the tokens before.
        reason: why the row is done without regard to stop strings, or "".
    """
    # All ids and not the new one alone: a character may span tokens, and sentencepiece drops the first space.
    # Cleaning up would remove spaces that a caller has seen.
    text = tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cuts = [text.index(stop) for stop in cfg.stop if stop in text]
    if cuts:
        text = text[: min(cuts)]
        reason = "stop"
    elif not reason:
        text = text.rstrip(_PARTIAL)  # the next token may complete the character
        # What may become a stop string is held back until the next tokens tell.
        text = text[: len(text) - _started_stop(cfg, text)]
    if not text.startswith(before):
        # Not an error yet: a tokenizer may rewrite its last characters once more, and the text is certain
        # later.
        if not reason:
            return before, ""
        raise ValueError(
            f"generate: the tokenizer turned {before[-20:]!r} into {text[-20:]!r}: its texts cannot be "
            "told in pieces"
        )
    return text, reason


def _started_stop(cfg: Sampling, text: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = 0
    for stop in cfg.stop:
        # The whole string is not among them: it has been cut off already.
        for length in range(1, len(stop)):
            if text.endswith(stop[:length]):
                longest = max(longest, length)
    return longest


def _check_text_options(cfg: Sampling, tok: Any, on_token: Any) -> None:
    if tok is None and (cfg.stop or on_token is not None):
        raise ValueError(
            "generate: stop strings and on_token need a tokenizer (tok=tokens.tokenizer(...)), "
            f"got stop {cfg.stop} and tok None"
        )
    if tok is None:
        return
    special = sorted(set(cfg.stop) & set(tok.all_special_tokens))
    if special:
        ids = tok.convert_tokens_to_ids(special)
        raise ValueError(f"generate: {few(special)} are tokens, not text; give their ids {ids} as end")


def check_length(cfg: Sampling, skeleton: Skeleton, longest: int) -> None:
    """Check that a prompt of `longest` tokens and its answer fit the positions of the model.

    Raises:
        ValueError: they do not.
    """
    config: Any = skeleton.module.config
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    positions = getattr(config, "max_position_embeddings", None) or longest + cfg.max_tokens
    # With scaled rotary positions some configs give the length before the scaling (Qwen2.5 with YaRN), others
    # that behind it (Llama 3.1): the larger is allowed.
    positions = int(positions * max(1.0, rope.get("factor") or 1.0))
    if longest + cfg.max_tokens > positions:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and max_tokens {cfg.max_tokens} are more than the "
            f"{positions} "
            f"positions of {skeleton.name}"
        )


def _check_size(cfg: Sampling, skeleton: Skeleton, call: dict[str, Any]) -> tuple[int, int]:
    """(rows, size of the vocabulary) of a batch, after a check that it and cfg.end fit the model."""
    module: Any = skeleton.module
    rows, longest = call["attention_mask"].shape
    # Rows of the head, which may be more than the tokenizer's tokens: logits have this width.
    vocabulary = module.get_output_embeddings().weight.shape[0]
    check_length(cfg, skeleton, longest)
    outside = [token for token in cfg.end if token >= vocabulary]
    if outside:
        raise ValueError(f"generate: end ids must be below the vocabulary's {vocabulary}, got {outside}")
    return rows, vocabulary


def _check_token(token: int, row: int, step: int, allowed: Allowed | None) -> None:
    """Raise where `_choose_tokens` gave no token."""
    if token == _NONE_ALLOWED:
        reason = "min_tokens forbids the only ones"
        if allowed is not None:
            reason = "its mask is empty"
        raise ValueError(f"generate: no token is allowed in row {row} at step {step}: {reason}")
    if token == _NOT_FINITE:
        raise FloatingPointError(f"generate: logits of row {row} at step {step} are not finite")
