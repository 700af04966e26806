"""What composing costs in a long run: `python benches/loop_adapters.py [loop|peer|registry ...]`.

Samples come one at a time, with images, each with other adapters and weights: the last must be as fast as the first, and take no memory.
peft's way stands beside it, a new adapter for each sample. `registry` is the search for adapters among ten thousand.
"""

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from cost_adapters import resident, rounds

from medvl.adapters import cache
from medvl.adapters import registry as registries
from medvl.adapters.retrieve import RetrieveConfig, Retrieved, retrieve_adapters
from medvl.hub import peft_files, skeletons
from medvl.language import generate, vlm
from medvl.language.sampling import Sampling
from medvl.weights import lora

GEN = torch.Generator().manual_seed(0)
POOL, TOP, TOKENS, FEW = 8, 3, 4, 50  # adapters, of which a sample gets, new tokens, samples at either end
WARM = 3
VISUAL = 999  # id of the placeholder
MODEL = {
    "model_type": "qwen2_vl",
    "text_config": {
        "model_type": "qwen2_vl_text",
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
    },
    "vision_config": {
        "depth": 4,
        "embed_dim": 128,
        "hidden_size": 256,
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": 14,
    },
    "image_token_id": VISUAL,
    "video_token_id": 998,
    "vision_start_token_id": 997,
    "vision_end_token_id": 996,
}


def adapters(skeleton: skeletons.Skeleton) -> list[lora.Adapter]:
    cfg = lora.LoraConfig(rank=8, pattern="all-linear", vision=True)
    made = [lora.init_lora(cfg, skeleton, GEN) for _ in range(POOL)]
    for f in (f for a in made for f in a.factors.values()):
        f["b"].normal_(std=0.02, generator=GEN)
    return made


def question(i: int) -> dict[str, torch.Tensor]:
    """A prompt with one image; five sizes take turns."""
    grid = torch.tensor([[1, 8, 8 + 2 * (i % 5)]])
    ids = torch.randint(3, 900, (1, 32), generator=GEN)
    seen = torch.tensor([[997, *[VISUAL] * (int(grid.prod()) // 4), 996]])
    pixels = torch.randn(int(grid.prod()), 3 * 2 * 14 * 14, generator=GEN)
    return {
        "ids": torch.cat([ids[:, :4], seen, ids[:, 4:]], 1),
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }


def choice() -> Retrieved:
    """Other adapters and weights each time."""
    ids, shares = torch.randperm(POOL, generator=GEN)[None, :TOP], torch.rand(1, TOP, generator=GEN)
    return Retrieved(
        indices=ids, similarity=shares, weights=shares / shares.sum(), abstained=torch.tensor([False])
    )


def loop(samples: int = 500) -> dict[str, float]:
    """Ours, adapters read from files into memory when they are asked for."""
    skeleton, params = skeletons.init_skeleton(MODEL, GEN, head="language")
    made, questions, found = adapters(skeleton), [question(i) for i in range(10)], {}
    size, how = cache.adapter_nbytes(made[0]), Sampling(max_tokens=TOKENS)
    print(
        f"{sum(w.numel() for w in params.values()):,} parameters, {POOL} adapters of {len(made[0].factors)} layers, {size:,} bytes each"
    )
    with tempfile.TemporaryDirectory() as tmp:
        for j, a in enumerate(made):
            peft_files.write_adapter(a, f"{tmp}/{j}")

        def pool(held: int) -> cache.Pools:
            return cache.cache_pool(
                cache.cache_adapters(lambda j: peft_files.read_adapter(f"{tmp}/{j}", skeleton), held * size)
            )

        whole, half, fuse = pool(POOL), pool(POOL // 2), cache.cache_fusions(pool(POOL), 4 * size, rule="svd")
        ways = {
            "mixture": lambda got: cache.mix_adapters(whole, got),
            "mixture, 4 of 8 adapters held": lambda got: cache.mix_adapters(half, got),
            "fusion, svd": lambda got: fuse(*cache.group_rows(got)[0][1:]),
        }
        for name, way in ways.items():

            def compose(i: int, way: Callable = way) -> dict[str, torch.Tensor]:
                return lora.apply_lora(
                    params, way(choice()), rows=vlm.visual_rows(questions[i % 10]["ids"], VISUAL)
                )

            def answer(i: int, adapted: dict[str, torch.Tensor] = params) -> object:
                return generate.generate(how, skeleton, adapted, questions[i % 10])

            found |= _run(name, answer, compose, answer, samples)
    return found


def peer(seconds: float = 90.0) -> dict[str, float]:
    """peft: for each sample `add_weighted_adapter` under a new name and `set_adapter`; as many samples as there is time for."""
    skeleton, params = skeletons.init_skeleton(MODEL, GEN, head="language")
    made, questions, found = adapters(skeleton), [question(i) for i in range(10)], {}
    how = Sampling(max_tokens=TOKENS)
    for kind in ("linear", "svd"):
        model, names = _in_peft(skeleton, params, made)

        def compose(i: int, model=model, names=names, kind=kind) -> str:
            got = choice()
            model.add_weighted_adapter(
                [names[j] for j in got.indices[0]],
                got.weights[0].tolist(),
                f"fused{i}",
                combination_type=kind,
            )
            model.set_adapter(f"fused{i}")
            return f"fused{i}"

        def answer(i: int, _: str, model=model) -> object:
            q = {("input_ids" if k == "ids" else k): t for k, t in questions[i % 10].items()}
            types, mask = (q["input_ids"] == VISUAL).int(), torch.ones_like(q["input_ids"])
            return model.generate(
                **q,
                mm_token_type_ids=types,
                attention_mask=mask,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
            )

        bare = lambda i: generate.generate(how, skeleton, params, questions[i % 10])
        found |= _run(f"peft, {kind}", bare, compose, answer, 10**6, seconds)
    return found


def _in_peft(skeleton: skeletons.Skeleton, params: dict, made: list[lora.Adapter]):
    import peft

    module = type(skeleton.module)(skeleton.module.config).eval()
    module.load_state_dict(params, strict=False)
    module.tie_weights()
    names = [f"a{j}" for j in range(POOL)]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(made[0].factors))
    model = peft.get_peft_model(module, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for path, m in model.named_modules():
        for name, a in zip(names, made, strict=True) if hasattr(m, "lora_A") else ():
            f = a.factors[path.removeprefix("base_model.model.")]
            m.lora_A[name].weight.data.copy_(f["a"])
            m.lora_B[name].weight.data.copy_(f["b"])
    return model.eval(), names


def _run(
    name: str,
    bare: Callable,
    compose: Callable,
    answer: Callable,
    samples: int,
    seconds: float = float("inf"),
) -> dict[str, float]:
    """Composes and answers sample after sample; the bare model takes turns, to tell what is the machine's."""
    times, held, begun = [], [], time.perf_counter()
    with torch.no_grad():
        for i in range(samples + WARM):
            if time.perf_counter() - begun > seconds and i >= WARM + 6:
                break
            start = time.perf_counter()
            bare(i)
            between = time.perf_counter()
            made = compose(i)
            composed = time.perf_counter()
            answer(i, made)
            end = time.perf_counter()
            times.append(
                (
                    between - start,
                    composed - between,
                    end - composed,
                    end - between,
                    (end - between) / (between - start),
                )
            )
            held.append(resident())
    return _said(name, times[WARM:], held[WARM:])


def _said(name: str, times: list[tuple[float, ...]], held: list[float]) -> dict[str, float]:
    n, few = len(times), min(FEW, max(3, len(times) // 5))
    then, now = (
        [statistics.median(column) for column in zip(*part, strict=True)]
        for part in (times[:few], times[-few:])
    )
    mib, r = (held[few - 1], held[-1]), [y / x for x, y in zip(then, now, strict=True)]
    print(
        f"{name}: {n} samples; medians of {few}: ms to compose + to answer = both, over the bare model in turn; resident MiB at their end"
    )
    for which, t, m in (("first", then, mib[0]), ("last", now, mib[1])):
        bare, made, answered, both = (1e3 * s for s in t[:4])
        print(
            f"  {which:6s} {made:8.1f} + {answered:6.1f} = {both:8.1f} ms, {t[4]:6.2f} x bare (its {bare:6.1f} ms)   {m:7.1f} MiB"
        )
    grown = 1024 * (mib[1] - mib[0]) / (n - few)
    more = f"{mib[1] / mib[0]:7.3f}, {grown:+.1f} KiB a sample"
    print(
        f"  ratio  {r[1]:8.2f}   {r[2]:6.2f}   {r[3]:8.2f}     {r[4]:6.2f}          ({r[0]:6.2f})      {more}"
    )
    kept = {
        "samples": n,
        "first ms": 1e3 * then[3],
        "last ms": 1e3 * now[3],
        "last/first": r[3],
        "bare last/first": r[0],
    }
    kept |= {"last/first, each over bare": r[4], "MiB last/first": mib[1] / mib[0], "KiB a sample": grown}
    return {f"{name}: {k}": v for k, v in kept.items()}


def registry(p: int = 10_000, n: int = 31) -> dict[str, float]:
    """The adapters of a query out of `p`: reading the vectors, bytes, search for 1 and 64 queries over the floor, one matrix product."""
    found: dict[str, float] = {}
    for d in (1024, 2048):
        with tempfile.TemporaryDirectory() as tmp:
            raw = torch.randn(p, d, generator=GEN)
            for i, row in enumerate((raw / raw.norm(dim=1, keepdim=True)).numpy()):
                np.save(f"{tmp}/{i}.npy", row)
            records = tuple(
                registries.AdapterRecord(name=f"a{i}", path=f"{i}", vector=f"{i}.npy") for i in range(p)
            )
            path, times = Path(tmp, "registry.toml"), [time.perf_counter()]
            registries.write_registry(path, registries.Registry(adapters=records))
            times.append(time.perf_counter())
            read = registries.read_registry(path)
            times.append(time.perf_counter())
            vectors = registries.read_vectors(path, read)
            times.append(time.perf_counter())
        about = [b - a for a, b in pairwise(times)]
        found |= {f"{d}: {k} s": s for k, s in zip(("write", "read", "vectors"), about, strict=True)} | {
            f"{d}: bytes": vectors.nbytes
        }
        print(
            f"{p:,} x {d}: {vectors.nbytes:,} bytes; registry: write {about[0]:.2f} s, read {about[1]:.2f} s, vectors {about[2]:.2f} s"
        )
        for b in (1, 64):
            queries, cfg = torch.randn(b, d, generator=GEN), RetrieveConfig(k=TOP, weighting="softmax")
            calls = {
                "product": lambda q=queries, v=vectors: q @ v.T,
                "retrieve": lambda q=queries, v=vectors, c=cfg: retrieve_adapters(c, q, v),
            }
            s, ratio = rounds(calls, n)["retrieve"]
            found |= {f"{d}: retrieve {b} ms": 1e3 * s, f"{d}: product {b} ms": 1e3 * s / ratio}
            print(
                f"  {b:2d} queries: retrieve {1e3 * s:6.2f} ms, one matrix product {1e3 * s / ratio:6.2f} ms, {ratio:.2f} x"
            )
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parts = {"loop": loop, "peer": peer, "registry": registry}
    done = {name: parts[name]() for name in sys.argv[1:] or parts}
    print(json.dumps({name: {k: round(v, 3) for k, v in rows.items()} for name, rows in done.items()}))
