"""int4: the formulas against naive loops and compressed-tensors; the weight in every way a model may use it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from medvl.training import trace
from medvl.weights import four_bit, int4, lazy, lora, shards
from medvl.weights.extended import extend_table
from medvl.weights.int4 import Int4Config
from tests import tiny

SCHEMES = [(32, True), (32, False), (64, False), (128, True), (-1, False), (-1, True)]


def matrix(shape=(24, 128), dtype=torch.float32, seed=0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    w[0, :32] = 0  # a group of zeros
    w[1, :32] = w[1, :32].abs() + 1  # and one without a negative value
    return w.to(dtype)


def naive(w, group, symmetric):
    """(codes, scales, zero points, values) of one value after the other."""
    n = w.shape[1] if group == -1 else group
    codes, values = torch.zeros(w.shape, dtype=torch.uint8), torch.zeros(w.shape)
    scales, zeros = torch.zeros(len(w), w.shape[1] // n), torch.zeros(len(w), w.shape[1] // n)
    for i, row in enumerate(w.float()):
        for g in range(w.shape[1] // n):
            part = row[g * n : g * n + n]
            low, high = min(part.min(), torch.tensor(0.0)), max(part.max(), torch.tensor(0.0))
            step = max(-low, high) / 7.5 if symmetric else (high - low) / 15
            scale = step.to(w.dtype).float()
            scale = torch.tensor(1.0) if scale == 0 else scale
            zero = torch.tensor(8.0) if symmetric else (-low / scale).round().clamp(0, 15)
            code = ((part / scale).round() + zero).clamp(0, 15)
            codes[i, g * n : g * n + n], values[i, g * n : g * n + n] = code.byte(), (code - zero) * scale
            scales[i, g], zeros[i, g] = scale, zero
    return codes, scales, zeros, values.to(w.dtype)


# Formulas -------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "symmetric"), SCHEMES)
def test_rounding_is_the_naive_formula(group, symmetric, dtype):
    w = matrix(dtype=dtype)
    codes, scales, zeros, values = naive(w, group, symmetric)
    got, scale, zero = int4.round_to_codes(w, group, symmetric)
    assert torch.equal(got, codes)
    assert torch.equal(scale.float(), scales)
    assert scale.dtype == dtype
    assert zero is None if symmetric else torch.equal(zero.float(), zeros)
    q = int4.quantize_matrix(w, Int4Config(group=group, symmetric=symmetric))
    assert torch.equal(lazy.dense(q), values)
    assert (q.group, q.shape, q.dtype) == (128 if group == -1 else group, w.shape, dtype)
    # No value is further away than half a step, the greatest of a symmetric group a whole one.
    error = (values.float() - w.float()).abs().unflatten(-1, (scale.shape[-1], -1)).amax(-1)
    assert (error <= scale.float() * (0.52 if not symmetric else 1.0) + w.float().abs().max() / 100).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_rounding_and_packing_are_those_of_compressed_tensors(group, symmetric):
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=4,
        symmetric=symmetric,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    w = matrix()
    grouped = w.unflatten(-1, (-1, w.shape[1] if group == -1 else group))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    ours = int4.quantize_matrix(w, Int4Config(group=group, symmetric=symmetric))
    is_zero = grouped.abs().amax(-1) == 0
    torch.testing.assert_close(ours.scale[~is_zero], scale[~is_zero], rtol=1e-6, atol=0)
    if not symmetric:
        assert torch.equal(ours.zero[~is_zero].float() - 8, zero[~is_zero].float().round())
    state = {"weight": w, "weight_scale": ours.scale}
    if not symmetric:
        state["weight_zero_point"] = ours.zero.to(torch.int8) - 8
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = compressors.PackedQuantizationCompressor.compress(state, scheme)
    assert torch.equal(theirs["weight_packed"], ours.packed)
    if not symmetric:
        zeros = int4.pack_codes(ours.zero.t().contiguous()).t()
        assert torch.equal(theirs["weight_zero_point"], zeros)
    values = compressors.PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    torch.testing.assert_close(lazy.dense(ours), values, rtol=0, atol=1e-6)


def test_both_layouts_against_a_naive_packer():
    """compressed-tensors: field i of a word is value i. AutoAWQ: field i is value 0 2 4 6 1 3 5 7."""
    codes = torch.randint(16, (5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for order, pack, unpack in (
        (range(8), int4.pack_codes, lambda p: int4.unpack_codes(p, 24)),
        ((0, 2, 4, 6, 1, 3, 5, 7), int4.pack_awq, int4.unpack_awq),
    ):
        want = torch.zeros(5, 3, dtype=torch.int64)
        for i in range(5):
            for word in range(3):
                for place, column in enumerate(order):
                    want[i, word] |= int(codes[i, 8 * word + column]) << 4 * place
        packed = pack(codes)
        assert packed.dtype == torch.int32
        assert torch.equal(packed.long() & 0xFFFFFFFF, want)
        assert torch.equal(unpack(packed), codes)
    assert torch.equal(int4.unpack_codes(int4.pack_codes(codes[:, :21]), 21), codes[:, :21])


def test_bits_of_a_value():
    """Four, and the scale and zero point of its group."""
    w = matrix((256, 1024), torch.bfloat16)
    for (group, symmetric), bits in {(128, True): 4.125, (128, False): 4.1875, (32, False): 4.75}.items():
        q = int4.quantize_matrix(w, Int4Config(group=group, symmetric=symmetric))
        assert 8 * lazy.nbytes({"w": q}) / w.numel() == bits
        on_meta = int4.quantize_matrix(w.to("meta"), Int4Config(group=group, symmetric=symmetric))
        assert lazy.nbytes({"w": on_meta}) == lazy.nbytes({"w": q})
        assert repr(on_meta) == repr(q)


# The weight -----------------------------------------------------------------------------------------------------------------------------
def test_products_and_gradients_are_those_of_its_values():
    w, bias = matrix(), torch.randn(24)
    q = int4.quantize_matrix(w, Int4Config(group=32))
    x = torch.randn(2, 5, 128)
    leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    peers = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        y = F.linear(leaves[0], q, leaves[1])
    assert sum(kept) == 0  # no written-out weight
    want = F.linear(peers[0], lazy.dense(q), peers[1])
    torch.testing.assert_close(y, want)
    got = torch.autograd.grad(y.square().sum(), leaves)
    for g, h in zip(got, torch.autograd.grad(want.square().sum(), peers), strict=True):
        torch.testing.assert_close(g, h)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, q, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", [int4.quantize_matrix, four_bit.quantize_matrix])
def test_torch_func_differentiates_through_it(quantize):
    q = quantize(matrix())
    x, a, b = torch.randn(3, 4, 128), torch.randn(2, 128), torch.randn(24, 2)

    def loss(factors, x):
        return F.linear(x, lazy.low_rank(q, *factors)).square().sum()

    def dense_loss(factors, x):
        a, b = factors
        return F.linear(x, lazy.dense(q) + b @ a).square().sum()

    for g, h in zip(torch.func.grad(loss)((a, b), x), torch.func.grad(dense_loss)((a, b), x), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.func.vmap(lambda row: F.linear(row, q))(x), F.linear(x, lazy.dense(q)))
    torch.testing.assert_close(
        torch.func.grad(loss, argnums=1)((a, b), x),
        torch.func.grad(dense_loss, argnums=1)((a, b), x),
        rtol=1e-4,
        atol=1e-3,
    )


def test_it_moves_is_copied_and_lies_in_others():
    w = matrix()
    q = int4.quantize_matrix(w)
    half = q.to(torch.bfloat16)
    assert (half.dtype, half.scale.dtype, half.zero.dtype) == (torch.bfloat16, torch.float32, torch.uint8)
    assert q.to("meta").packed.is_meta
    assert repr(copy.deepcopy(half)) == repr(half) == repr(half.clone())
    assert repr(half) == "Int4([24, 128], groups of 128 with zero points for bfloat16)"
    x, a, b = torch.randn(3, 128), torch.randn(2, 128), torch.randn(24, 2)
    torch.testing.assert_close(F.linear(x, lazy.low_rank(q, a, b)), F.linear(x, lazy.dense(q) + b @ a))
    rows = torch.randn(3, 128)
    table = extend_table(q, rows, 20)
    torch.testing.assert_close(F.linear(x, table), F.linear(x, torch.cat([lazy.dense(q)[:20], rows])))
    with pytest.raises(NotImplementedError, match="which supports only linear"):
        q + 1
    # Like NF4 it lies whole on every process.
    assert shards.sharder(2, least=1)("w", q) is q


def test_an_adapter_is_merged_into_its_values(gen):
    skeleton, params = tiny.model("qwen3")
    q = int4.quantize(params, Int4Config(group=-1))
    adapter = lora.init_lora(lora.LoraConfig(rank=2, pattern="all-linear"), skeleton, gen)
    for factors in adapter.factors.values():
        factors["b"].normal_(generator=gen)
    merged = lora.merge_adapter(q, adapter).params
    want = {n: lazy.dense(w) for n, w in lora.apply_lora(q, adapter).items()}
    assert not any(isinstance(w, lazy.Lazy) for w in merged.values())
    for name, w in merged.items():
        torch.testing.assert_close(w, want[name], rtol=0, atol=1e-5)


def test_a_model_in_int4_answers_as_its_values_and_trains_an_adapter(gen):
    for kind in ("qwen3", "qwen2_5_vl", "phi3"):
        skeleton, params = tiny.model(kind)
        q = int4.quantize(params, Int4Config(group=-1))
        assert {n for n, w in q.items() if isinstance(w, int4.Int4)} == {
            n for n, w in four_bit.quantize(params).items() if isinstance(w, four_bit.FourBit)
        }
        x = tiny.batch(kind)
        values = {n: lazy.dense(w) for n, w in q.items()}
        with torch.no_grad():
            torch.testing.assert_close(
                skeleton(q, **x).logits, skeleton(values, **x).logits, rtol=0, atol=1e-5
            )
        adapter = lora.init_lora(lora.LoraConfig(rank=4, pattern="all-linear"), skeleton, gen)
        factor = next(iter(adapter.factors.values()))["b"].requires_grad_()

        def gradient(base, adapter=adapter, factor=factor, skeleton=skeleton, x=x):
            logits = skeleton(lora.apply_lora(base, adapter), **x).logits
            return torch.autograd.grad(logits.square().mean(), factor)[0]

        torch.testing.assert_close(gradient(q), gradient(values), rtol=1e-4, atol=1e-6)


def test_an_estimate_counts_it():
    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    base = int4.quantize_matrix(empty(64, 128).detach())
    leaves = empty(2, 9, 128), empty(8, 128), empty(64, 8)

    def step():
        y = F.linear(leaves[0], lazy.low_rank(base, *leaves[1:], scale=2.0))
        torch.autograd.grad(y, leaves, y.detach())

    assert trace.count_work(step).flops >= 2 * 2 * 18 * 64 * 128


# Bad input ------------------------------------------------------------------------------------------------------------------------------
BAD = [
    (lambda: Int4Config(group=48), r"group must be 32, 64, 128 or -1 \(the whole row\), got 48"),
    (lambda: Int4Config(skip="lm_head"), "Int4Config: skip is a tuple of regexes, got 'lm_head'"),
    (
        lambda: int4.quantize({"m.weight": matrix((4, 96))}),
        r"m.weight: int4: groups of 128 must divide a row, \[4, 96\] has rows of 96; take another group",
    ),
    (lambda: int4.quantize_matrix(torch.full((4, 128), torch.inf)), r"\[4, 128\] holds values that are not"),
    (lambda: int4.quantize_matrix(torch.ones(128)), r"needs a matrix of floats, got \[128\] float32"),
    (lambda: int4.quantize_matrix(torch.ones(2, 128).long()), r"got \[2, 128\] int64"),
    (lambda: int4.quantize({"norm.weight": torch.ones(4)}), "none of 1 weights is a matrix"),
    (
        lambda: int4.quantize({"m.weight": four_bit.quantize_matrix(matrix())}),
        "m.weight must be a plain tensor, got FourBit.*model.quantize = 'none' where the file is quantised",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_weights(call, message):
    with pytest.raises(ValueError, match=message):
        call()
