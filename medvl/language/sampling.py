"""How tokens are chosen: settings, masks of allowed tokens, the choice of one token for each row.

In shapes b are the rows of the batch, v the vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

# (step, ids generated so far [b, step]) -> bool mask over the vocabulary, [v] or [b, v]
Allowed = Callable[[int, Tensor], Tensor]
Gens = torch.Generator | Sequence[torch.Generator]  # one for the batch, or one for each row
# What `choose_tokens` gives in place of a token id.
_NONE_ALLOWED = -1
_NOT_FINITE = -2


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


def full_mask(mask: Tensor, rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """A mask of allowed tokens over the vocabulary, [v] or [b, v]; what it does not cover is forbidden."""
    fits = mask.dtype == torch.bool and mask.dim() in (1, 2) and mask.shape[-1] <= vocabulary
    if not fits or (mask.dim() == 2 and len(mask) != rows):
        raise ValueError(
            f"generate: allowed must give bool [v] or [{rows}, v] with v <= {vocabulary}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return F.pad(mask.to(device), (0, vocabulary - mask.shape[-1]))


def penalise_repetition(cfg: Sampling, logits: Tensor, used: Tensor) -> Tensor:
    """Logits [b, v] with cfg.repetition_penalty on the tokens that are `used`, bool [b, v].

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1; equal to
    RepetitionPenaltyLogitsProcessor of transformers, except that padding is not penalised here.
    """
    if cfg.repetition_penalty == 1:
        return logits
    lowered = torch.where(logits < 0, logits * cfg.repetition_penalty, logits / cfg.repetition_penalty)
    return torch.where(used, lowered, logits)


def draw_uniform(cfg: Sampling, gen: Gens | None, rows: int, device: torch.device) -> Tensor:
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
    for row_gen in gen:
        drawn = torch.rand(cfg.max_tokens, generator=row_gen, device=row_gen.device, dtype=torch.float64)
        numbers.append(drawn.to(device))
    # Below 1 by more than rounding: times a total, it must not become the total (`choose_tokens`).
    return torch.stack(numbers).clamp(max=1 - 2.0**-32)


def choose_tokens(cfg: Sampling, logits: Tensor, draw: Tensor) -> Tensor:
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
    # Told by the id, since to raise here would wait for the device; `check_token` reads it.
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


def check_token(token: int, row: int, step: int, allowed: Allowed | None) -> None:
    """Raise where `choose_tokens` gave no token."""
    if token == _NONE_ALLOWED:
        reason = "min_tokens forbids the only ones"
        if allowed is not None:
            reason = "its mask is empty"
        raise ValueError(f"generate: no token is allowed in row {row} at step {step}: {reason}")
    if token == _NOT_FINITE:
        raise FloatingPointError(f"generate: logits of row {row} at step {step} are not finite")
