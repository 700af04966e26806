import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from medvl.components import losses
from medvl.components.losses import clip_loss, siglip_loss, token_cross_entropy, trained_mask
from medvl.training import estimate, gradients


def _pair(gen, b=5, d=8):
    return (F.normalize(torch.randn(b, d, generator=gen, dtype=torch.float64), dim=-1) for _ in range(2))


def test_clip_loss_is_the_formula(gen):
    a, b = _pair(gen)
    logits = 7.0 * a @ b.T
    naive = (
        sum(
            -(logits[i, i] - logits[i].exp().sum().log()) - (logits[i, i] - logits[:, i].exp().sum().log())
            for i in range(5)
        )
        / 10
    )
    torch.testing.assert_close(clip_loss(a, b, 7.0), naive)


def test_clip_loss_of_large_scales_is_finite(gen):
    a, b = _pair(gen)
    assert clip_loss(a, b, 1e4).isfinite()


def test_siglip_loss_is_the_formula(gen):
    a, b = _pair(gen)
    naive = 0.0
    for i in range(5):
        for j in range(5):
            naive = naive - torch.log(torch.sigmoid((1 if i == j else -1) * (10.0 * a[i] @ b[j] - 10.0)))
    torch.testing.assert_close(siglip_loss(a, b, 10.0, -10.0), naive / 5)


@pytest.mark.parametrize(
    "loss", [lambda a, b: clip_loss(a, b, 1.0), lambda a, b: siglip_loss(a, b, 1.0, 0.0)]
)
def test_errors(loss, gen):
    a, b = _pair(gen)
    with pytest.raises(ValueError, match="at least 2 rows"):
        loss(a[:1], b[:1])
    with pytest.raises(ValueError, match=r"must both be \[b, d\]"):
        loss(a, b[:3])


_BOTH = pytest.mark.parametrize(
    "loss",
    [lambda a, b, own: clip_loss(a, b, 9.0, own), lambda a, b, own: siglip_loss(a, b, 9.0, -5.0, own)],
    ids=["clip", "siglip"],
)


@_BOTH
def test_the_mean_over_parts_is_the_loss_of_all_rows(loss, gen):
    whole = [t.requires_grad_() for t in _pair(gen, b=6)]
    parts = [t.detach().clone().requires_grad_() for t in whole]
    want = loss(*whole, slice(None))
    mean = sum(loss(*parts, slice(i, i + 2)) for i in (0, 2, 4)) / 3
    torch.testing.assert_close(mean, want)
    for got, right in zip(torch.autograd.grad(mean, parts), torch.autograd.grad(want, whole), strict=True):
        torch.testing.assert_close(got, right)


@_BOTH
def test_a_part_takes_its_share_of_the_memory(loss):
    def peak(own):
        rows = {name: torch.empty(4096, 8, device="meta") for name in ("a", "b")}
        grad = gradients.value_and_grad(
            lambda p, _: (loss(p["a"], p["b"], own), gradients.Aux()), reduce=False
        )
        return sum(estimate.peak_of(lambda: grad(rows, None), {}).values())

    assert peak(slice(None)) == pytest.approx(4 * peak(slice(1024)), rel=0.02)


# The next token -------------------------------------------------------------------------------------------------------------------------
class LowRank(torch.Tensor):
    """A head that answers F.linear with W x + B A x, and nothing else."""

    @staticmethod
    def __new__(cls, base, a, b):
        return torch.Tensor._make_wrapper_subclass(cls, base.shape, dtype=base.dtype, device=base.device)

    def __init__(self, base, a, b):
        self.parts = base, a, b

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func is F.linear, func
        x, w, bias = (*args, None)[:3]
        base, a, b = w.parts
        return F.linear(x, base, bias) + F.linear(F.linear(x, a), b)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def _lazy(head):
    """The same head as a lazy one."""
    return LowRank(head, head.new_zeros(2, head.shape[1]), head.new_zeros(head.shape[0], 2))


def _words(gen, b=3, t=11, d=6, v=17, dtype=torch.float64):
    hidden = torch.randn(b, t, d, generator=gen, dtype=dtype).requires_grad_()
    head, bias = (torch.randn(*n, generator=gen, dtype=dtype).requires_grad_() for n in ((v, d), (v,)))
    labels = torch.randint(v, (b, t), generator=gen)
    labels[torch.rand(b, t, generator=gen) < 0.5] = -100
    labels[0, 0] = 3  # has no token before it
    return hidden, head, bias, labels


def _plain(hidden, head, labels, bias=None, reduction="sum"):
    """All logits at once, shifted by hand."""
    logits = F.linear(hidden, head, bias)[:, :-1]
    return F.cross_entropy(
        logits.flatten(0, 1).double(), labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction
    )


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_token_loss_is_the_plain_one(gen, chunk, biased):
    hidden, head, bias, labels = _words(gen)
    wanted = [hidden, head, *([bias] if biased else [])]
    bias = bias if biased else None
    total, count = token_cross_entropy(hidden, head, labels, bias=bias, chunk=chunk)
    want = _plain(hidden, head, labels, bias)
    torch.testing.assert_close(total, want)
    assert int(count) == int((labels[:, 1:] != -100).sum()) == int(trained_mask(labels).sum())
    for got, g in zip(
        torch.autograd.grad(3 * total, wanted), torch.autograd.grad(3 * want, wanted), strict=True
    ):
        torch.testing.assert_close(got, g)
    each, count = token_cross_entropy(hidden, head, labels, bias=bias, chunk=chunk, reduction="none")
    torch.testing.assert_close(each[:, 1:].flatten(), _plain(hidden, head, labels, bias, reduction="none"))
    assert each.shape == labels.shape
    assert not each[:, 0].any()
    weight = torch.rand(each.shape, generator=gen, dtype=each.dtype)
    naive = (_plain(hidden, head, labels, bias, reduction="none") * weight[:, 1:].flatten()).sum()
    for got, g in zip(
        torch.autograd.grad((each * weight).sum(), wanted), torch.autograd.grad(naive, wanted), strict=True
    ):
        torch.testing.assert_close(got, g)


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "in a checkpoint"])
@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_gradients_reach_the_parts_of_a_head(gen, lazy, outer):
    hidden, base, bias, labels = _words(gen)
    a, b = (torch.randn(*n, generator=gen, dtype=torch.float64).requires_grad_() for n in ((2, 6), (17, 2)))
    parts = [hidden, base, bias, a, b]

    def loss(h):
        head = LowRank(base, a, b) if lazy else base + b @ a
        return token_cross_entropy(torch.tanh(h), head, labels, bias=bias, chunk=4)[0]

    total = checkpoint(loss, hidden, use_reentrant=False) if outer else loss(hidden)
    want = _plain(torch.tanh(hidden), base + b @ a, labels, bias)
    torch.testing.assert_close(total, want)
    for got, g in zip(torch.autograd.grad(total, parts), torch.autograd.grad(want, parts), strict=True):
        torch.testing.assert_close(got, g)


@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_frozen_heads_and_frozen_states(gen, lazy):
    hidden, head, _, labels = _words(gen)
    frozen = head.detach()
    want = torch.autograd.grad(_plain(hidden, head, labels), [hidden, head])
    total, _ = token_cross_entropy(hidden, _lazy(frozen) if lazy else frozen, labels, chunk=4)
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], want[0])
    total, _ = token_cross_entropy(hidden.detach(), _lazy(head) if lazy else head, labels, chunk=4)
    torch.testing.assert_close(torch.autograd.grad(total, head)[0], want[1])
    with torch.no_grad():
        again, _ = token_cross_entropy(hidden, _lazy(head) if lazy else head, labels, chunk=4)
    torch.testing.assert_close(again, total)
    assert not again.requires_grad


@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_only_trained_positions_are_projected_chunk_by_chunk(gen, lazy, monkeypatch):
    hidden, head, _, labels = _words(gen, t=40)
    rows, linear = [], F.linear
    monkeypatch.setattr(losses.F, "linear", lambda x, *args: (rows.append(len(x)), linear(x, *args))[1])
    given = _lazy(head) if lazy else head
    monkeypatch.setattr(
        LowRank,
        "__torch_function__",
        classmethod(lambda cls, f, t, args=(), kwargs=None: linear(args[0], args[1].parts[0])),
    )
    total, count = token_cross_entropy(hidden, given, labels, chunk=8)
    assert sum(rows) == int(count) > 16
    assert max(rows) == 8
    torch.autograd.grad(total, [hidden, head])
    assert sum(rows) == int(count) * (2 if lazy else 1)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_softmax_is_float32(gen, dtype, reduction):
    hidden, head, _, labels = _words(gen, dtype=dtype)
    total, _ = token_cross_entropy(hidden, head, labels, reduction=reduction)
    logits = F.linear(hidden, head)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.sum(), want)
    grads = torch.autograd.grad(total.sum(), [hidden, head])
    for got, g in zip(grads, torch.autograd.grad(want, [hidden, head]), strict=True):
        torch.testing.assert_close(got, g)
    assert token_cross_entropy(1e3 * hidden, head, labels)[0].isfinite()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_is_that_of_the_plain_loss(gen, reduction):
    hidden, head, bias, labels = _words(gen, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total = token_cross_entropy(hidden, head, labels, bias=bias, reduction=reduction)[0].sum()
        logits = F.linear(hidden, head, bias)
        want = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(total, want)
    grads = [torch.autograd.grad(x, [hidden, head, bias]) for x in (total, want)]
    for got, g in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, g, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_nothing_trained_is_a_loss_of_zero_with_a_gradient(gen, lazy):
    hidden, head, _, labels = _words(gen)
    given = _lazy(head) if lazy else head
    total, count = token_cross_entropy(hidden, given, torch.full_like(labels, -100))
    assert (float(total.detach()), int(count)) == (0.0, 0)
    for g in torch.autograd.grad(total, [hidden, head]):
        assert not g.any()


def test_the_loss_of_a_batch_is_a_mean_over_tokens(gen):
    """Micro-batches with 1 and with many trained tokens: their gradients add up to that of the whole batch; means of means do not."""
    hidden, head, _, labels = _words(gen, b=4)
    labels[0], labels[0, 5] = -100, 2
    params = {"hidden": hidden, "head": head}
    count = trained_mask(labels).sum()

    def part(rows, total):
        def loss(p, _):
            s, n = token_cross_entropy(p["hidden"][rows], p["head"], labels[rows])
            return s / (count if total else n), gradients.Aux()

        return gradients.value_and_grad(loss)(params, None)

    whole, pieces, means = (
        part(slice(0, 4), True),
        [part(slice(i, i + 1), True) for i in range(4)],
        [part(slice(i, i + 1), False) for i in range(4)],
    )
    torch.testing.assert_close(whole[0], _plain(hidden, head, labels).detach() / count)
    torch.testing.assert_close(sum(p[0] for p in pieces), whole[0])
    for name in params:
        torch.testing.assert_close(sum(p[2][name] for p in pieces), whole[2][name])
    assert abs(sum(m[0] for m in means) / 4 - whole[0]) > 0.1


def test_token_loss_errors(gen):
    hidden, head, _, labels = _words(gen)
    for bad in (labels[:2], labels.int(), labels[0]):
        with pytest.raises(
            ValueError, match=r"hidden must be \[b, t, d\] and labels int64 \[b, t\], got \[3, 11, 6\]"
        ):
            token_cross_entropy(hidden, head, bad)
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        token_cross_entropy(hidden, head, labels, chunk=0)
    with pytest.raises(ValueError, match=r"reduction sum or none, got 256, 'mean'"):
        token_cross_entropy(hidden, head, labels, reduction="mean")
    for value in (17, -1):
        for reduction in ("sum", "none"):
            with pytest.raises(ValueError, match=f"labels must be -100 or lie in 0..16, found .*{value}"):
                token_cross_entropy(
                    hidden, head, labels.masked_fill(torch.arange(11) == 4, value), reduction=reduction
                )
