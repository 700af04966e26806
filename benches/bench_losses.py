"""The next-token loss at Qwen's vocabulary: chunked against all logits at once, forward and gradient.

"again" is what a head that is no plain tensor costs: its logits are computed a second time for the gradient. On a CPU the vocabulary, the
width and the number of tokens are smaller: there the ratios count.
"""

import pytest
import torch
import torch.nn.functional as F

from medvl.components.losses import token_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
V, D, TOKENS = (151_936, 896, 2048) if CUDA else (32_000, 256, 512)
CHUNK = 256 if CUDA else 64


def plain(hidden, head, labels):
    logits = F.linear(hidden, head)[:, :-1]
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def chunked(hidden, head, labels):
    return token_cross_entropy(hidden, head, labels, chunk=CHUNK)[0]


def again(hidden, head, labels):
    return token_cross_entropy(hidden, head, labels, chunk=CHUNK, reduction="none")[0].sum()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("who", ["plain", "chunked", "again"])
def bench_token_loss(measure, who, head, dtype):
    """Every token trained: where only answers are, the chunked loss does not project the others at all."""
    gen, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    hidden = torch.randn(1, TOKENS + 1, D, generator=gen).to(DEVICE, kind).requires_grad_()
    weight = (torch.randn(V, D, generator=gen) * D**-0.5).to(DEVICE, kind).requires_grad_(head == "trained")
    labels = torch.randint(V, (1, TOKENS + 1), generator=gen).to(DEVICE)
    wanted = [t for t in (hidden, weight) if t.requires_grad]
    of = {"plain": plain, "chunked": chunked, "again": again}[who]
    measure(
        lambda: torch.autograd.grad(of(hidden, weight, labels), wanted),
        rounds=3,
        v=V,
        d=D,
        tokens=TOKENS,
        chunk=CHUNK,
        head=head,
    )


@pytest.mark.parametrize("who", ["plain", "chunked"])
def bench_answers_only(measure, who):
    """A tenth of the tokens trained, as with a page or a slide before a short answer; frozen head."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, TOKENS // 4, D, generator=gen).to(DEVICE).requires_grad_()
    weight = (torch.randn(V, D, generator=gen) * D**-0.5).to(DEVICE)
    labels = torch.randint(V, (4, TOKENS // 4), generator=gen).to(DEVICE)
    labels[:, : -TOKENS // 40] = -100
    of = {"plain": plain, "chunked": chunked}[who]
    measure(
        lambda: torch.autograd.grad(of(hidden, weight, labels), hidden),
        rounds=3,
        v=V,
        d=D,
        tokens=TOKENS,
        chunk=CHUNK,
    )
