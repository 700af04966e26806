"""What adapters cost: `python benches/cost_adapters.py [mixture|growth|experts|steps ...]`.

Each variant takes turns with the first one and the medians of both are compared, so that a busy machine slows them alike; peft's ways stand
beside ours.
"""

import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from medvl.hub import skeletons
from medvl.weights import compose, four_bit, lazy, lora

GEN = torch.Generator().manual_seed(0)


def model(hidden: int, layers: int, dtype: torch.dtype = torch.float32) -> tuple[skeletons.Skeleton, dict]:
    config = {
        "model_type": "qwen3",
        "vocab_size": 1000,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
    }
    skeleton, params = skeletons.init_skeleton(config, GEN, head="language")
    return skeleton, {n: t.to(dtype) for n, t in params.items()}


def adapters(skeleton: skeletons.Skeleton, k: int, r: int, experts: int = 0) -> list[lora.Adapter]:
    cfg = lora.LoraConfig(rank=r, pattern="all-linear", experts=experts)
    made = [lora.init_lora(cfg, skeleton, GEN) for _ in range(k)]
    for f in (f for a in made for f in a.factors.values()):
        f["b"].normal_(std=0.02, generator=GEN)
    return made


def rounds(
    calls: dict[str, Callable[[], object]], n: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, tuple[float, float]]:
    """{name: (median seconds, its ratio to the first call's median)}, each call taking turns with the first."""
    first, found = next(iter(calls.values())), {}
    for name, call in calls.items():
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(n + 1):
            for which, kept in zip((first, call), times, strict=True):
                start = clock()
                which()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i:
                    kept.append(clock() - start)
        bare, own = map(statistics.median, times)
        found[name] = (own, own / bare)
    return found


def peer(skeleton: skeletons.Skeleton, params: dict, made: list[lora.Adapter], r: int):
    import peft

    module = type(skeleton.module)(skeleton.module.config).eval()
    module.load_state_dict(params, strict=False)
    module.tie_weights()
    names = [f"a{j}" for j in range(len(made))]
    targets = sorted({m.rpartition(".")[2] for m in made[0].factors})
    config = peft.LoraConfig(r=r, lora_alpha=16, target_modules=targets)
    found = peft.get_peft_model(module, config, names[0])
    for name in names[1:]:
        found.add_adapter(name, config)
    for path, m in found.named_modules():
        if hasattr(m, "lora_A"):
            for name, a in zip(names, made, strict=True):
                f = a.factors[path.removeprefix("base_model.model.")]
                m.lora_A[name].weight.data.copy_(f["a"])
                m.lora_B[name].weight.data.copy_(f["b"])
    return found.eval(), names


def mixture(n: int = 9) -> dict[str, float]:
    """Per-sample mixtures over the bare model; batch 8, r = 8."""
    found = {}
    for hidden, layers, t in ((1024, 4, 64), (4096, 1, 32)):
        skeleton, params = model(hidden, layers)
        ids = torch.randint(0, 1000, (8, t), generator=GEN)
        made = adapters(skeleton, 16, 8)
        quantised = four_bit.quantize(params)

        def call(p, ids=ids, skeleton=skeleton):
            return lambda: skeleton(p, input_ids=ids, use_cache=False).logits

        calls = {"bare": call(params), "nf4": call(quantised)}
        for k in (1, 4, 8, 16):
            mix = compose.compose_adapters(made[:k], torch.randn(8, k, generator=GEN))
            calls[f"mixture k={k}"] = call(lora.apply_lora(params, mix))
        calls["nf4 mixture k=8"] = call(
            lora.apply_lora(quantised, compose.compose_adapters(made[:8], torch.randn(8, 8, generator=GEN)))
        )
        calls["fused cat k=8"] = call(
            lora.apply_lora(params, compose.compose_adapters(made[:8], [0.125] * 8, mode="fusion"))
        )
        theirs, names = peer(skeleton, params, made[:8], 8)
        eight = copy.deepcopy(theirs)
        eight.base_model.set_adapter(names)
        calls["peft, 8 active"] = lambda m=eight, ids=ids: m(input_ids=ids, use_cache=False).logits
        calls["peft, adapter_names"] = lambda m=theirs, ids=ids, names=names: (
            m(input_ids=ids, use_cache=False, adapter_names=names).logits
        )
        with torch.no_grad():
            seconds = rounds(calls, n)
        for name, (s, ratio) in seconds.items():
            found[f"{hidden} {name}"] = ratio
            print(f"hidden {hidden:5d}  {name:20s} {1e3 * s:8.1f} ms   {ratio:.2f} x bare")
    return found


def growth(samples: int = 500) -> dict[str, float]:
    """Compose and run, again and again, each time with other weights: sample 1 and sample `samples`; peft the way its users do it."""
    skeleton, params = model(256, 8)
    made, ids = adapters(skeleton, 8, 8), torch.randint(0, 1000, (1, 32), generator=GEN)
    pool, found = compose.stack_adapters(made), {}
    ways = {
        "mixture": lambda w: compose.compose_adapters(pool, w),
        "fusion cat": lambda w: compose.compose_adapters(pool, w, mode="fusion"),
        "fusion svd": lambda w: compose.compose_adapters(pool, w, mode="fusion", rule="svd"),
    }
    with torch.no_grad():
        for name, way in ways.items():
            skeleton(lora.apply_lora(params, way([0.125] * 8)), input_ids=ids)
            times, held = [], []
            for _ in range(samples if "svd" not in name else samples // 5):
                w = torch.rand(8, generator=GEN).tolist()
                start = time.perf_counter()
                skeleton(lora.apply_lora(params, way(w)), input_ids=ids, use_cache=False)
                times.append(time.perf_counter() - start)
                held.append(resident())
            found |= _report(name, times, held)
        theirs, names = peer(skeleton, params, made, 8)
        times, held = [], []
        for i in range(40):
            start = time.perf_counter()
            theirs.add_weighted_adapter(names, [0.125] * 8, f"fused{i}", combination_type="cat")
            theirs.set_adapter(f"fused{i}")
            theirs(input_ids=ids, use_cache=False)
            times.append(time.perf_counter() - start)
            held.append(resident())
        found |= _report("peft, a new fused adapter each", times, held)
    return found


def _report(name: str, times: list[float], held: list[float]) -> dict[str, float]:
    few = max(3, len(times) // 10)
    first, last = statistics.median(times[:few]), statistics.median(times[-few:])
    grown = held[-1] - held[few]
    then = (
        f"sample 1: {1e3 * first:7.1f} ms, sample {len(times)}: {1e3 * last:7.1f} ms = {last / first:.2f} x"
    )
    print(f"{name:32s} {then}, memory {grown:+.1f} MiB")
    return {f"{name} last/first": last / first, f"{name} grown MiB": grown}


def resident() -> float:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20


def experts(n: int = 15) -> dict[str, float]:
    """H-LoRA against LoRA of the same rank and a loop over n LoRA experts; one layer 1024 -> 3072, 512 tokens, forward and backward."""
    x, w, found = torch.randn(8, 64, 1024, generator=GEN), torch.randn(3072, 1024, generator=GEN) * 0.02, {}
    for k in (4, 8, 32):
        a, b = torch.randn(64, 1024, generator=GEN) * 0.02, torch.randn(3072, 64, generator=GEN) * 0.02
        router = torch.randn(k, 1024, generator=GEN) * 0.02
        leaves = [t.requires_grad_() for t in (a, b, router)]

        def loop(a=a, b=b, router=router, k=k):
            share, r = F.linear(x, router).softmax(-1), 64 // k
            y = F.linear(x, w)
            for i in range(k):
                y = y + share[..., i : i + 1] * F.linear(
                    F.linear(x, a[i * r : i * r + r]), b[:, i * r : i * r + r]
                )
            return y

        ways = {
            "lora": lambda a=a, b=b: F.linear(x, lazy.low_rank(w, a, b)),
            "h-lora": lambda a=a, b=b, router=router: F.linear(x, lazy.low_rank(w, a, b, router=router)),
            "loop of lora": loop,
        }
        assert torch.allclose(ways["h-lora"](), loop(), atol=1e-4)

        def trained(way, leaves=leaves):
            return lambda: torch.autograd.grad(way().square().mean(), leaves, allow_unused=True)

        seconds = rounds({name: trained(way) for name, way in ways.items()}, n)
        for name, (s, ratio) in seconds.items():
            found[f"n={k} {name}"] = ratio
            print(f"n = {k:2d}  {name:14s} {1e3 * s:7.1f} ms   {ratio:.2f} x lora")
    return found


class ExpertLoop(lazy.LowRank):
    """The correction of H-LoRA with an expert after the other, as code of MoE-LoRA computes it."""

    def _add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        share = F.linear(x, self.router).softmax(-1)
        rank = len(self.a) // len(self.router)
        for i, (a, b) in enumerate(zip(self.a.split(rank), self.b.split(rank, dim=1), strict=True)):
            y = y + share[..., i : i + 1] * self.scale * F.linear(F.linear(x, a), b)
        return y


def steps(n: int = 10, hidden: int = 512, layers: int = 2, rank: int = 64) -> dict[str, float]:
    """A training step of 8 x 64 tokens and a decoding step of one, of a model whose every linear layer is adapted:
    base : LoRA : H-LoRA of 4 experts : the same in a loop. The base's step takes the gradient by its inputs, as when a
    projector alone is trained.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    skeleton, params = model(hidden, layers, dtype)
    params = lazy.move_params(params, device)
    plain, routed = (adapters(skeleton, 1, rank, experts=k)[0] for k in (0, 4))
    plain, routed = (lora.move_adapter(a, device, dtype) for a in (plain, routed))
    x = torch.randn(8, 64, hidden, generator=GEN).to(device, dtype).requires_grad_()
    factors = {"base": [], "LoRA": _leaves(plain), "H-LoRA": _leaves(routed), "loop": _leaves(routed)}
    variants = {
        "base": params,
        "LoRA": lora.apply_lora(params, plain),
        "H-LoRA": lora.apply_lora(params, routed),
    }
    variants["loop"] = {
        name: ExpertLoop.like(w.shape, w.dtype, w.device, **w.__dict__) if isinstance(w, lazy.LowRank) else w
        for name, w in variants["H-LoRA"].items()
    }

    def train(name):
        logits = skeleton(variants[name], inputs_embeds=x, use_cache=False).logits
        return torch.autograd.grad(logits.square().mean(), [x, *factors[name]])

    def decode(name):
        with torch.no_grad():
            return skeleton(variants[name], inputs_embeds=x[:1, :1], use_cache=False).logits

    error = (decode("H-LoRA") - decode("loop")).norm() / decode("loop").norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.05), error
    found = {}
    for kind, call in (("training step", train), ("decoding step", decode)):
        # On a CPU that others use, too, the time that this process had it is what the step costs.
        clock = time.perf_counter if device == "cuda" else time.process_time
        seconds = rounds({name: partial(call, name) for name in variants}, n, clock)
        for name, (s, ratio) in seconds.items():
            found[f"{kind} {name}"] = ratio
            print(f"{kind}  {name:8s} {1e3 * s:8.1f} ms   {ratio:.2f} x base")
    return found


def _leaves(adapter: lora.Adapter) -> list[torch.Tensor]:
    return [t.requires_grad_() for f in adapter.factors.values() for t in f.values()]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parts = {"mixture": mixture, "growth": growth, "experts": experts, "steps": steps}
    done = {name: parts[name]() for name in sys.argv[1:] or parts}
    print(json.dumps({name: {k: round(v, 3) for k, v in rows.items()} for name, rows in done.items()}))
