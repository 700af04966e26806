"""Phases: generated tokens, mixtures of adapters and the vision encoder, beside transformers and peft."""

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from benches.gpu.measure import Place, Results, attempt, digits, kernels, seconds, timed
from benches.gpu.models import (
    LINEAR,
    PUBLISHED,
    QWEN25_7B,
    language_model,
    on_device,
    peer_module,
    random_weights,
)
from medvl.base.tree import Tree
from medvl.hub import skeletons
from medvl.language import generate, vlm
from medvl.language.sampling import Sampling
from medvl.weights import compose, four_bit, lazy, lora
from tests.gpu import cases


def decode_7b(place: Place, results: Results) -> None:
    """Milliseconds a generated token of a 7B at batch 1 and 32, in bfloat16 and NF4, beside transformers' generate."""
    skeleton = language_model(place, QWEN25_7B)
    params = random_weights(place, skeleton)
    prompt, new = place.size((256, 64), (8, 4))
    results["prompt, new tokens"] = [prompt, new]
    # Every weight is read once a token: what an H100's 3.35 TB/s allow.
    results["floor ms a token at 3.35 TB/s"] = digits(lazy.nbytes(params) / 3.35e12 * 1e3)
    batches = (1, place.size(32, 2))
    peer = peer_module(skeleton)
    peer.load_state_dict(params, strict=False, assign=True)
    peer.tie_weights()
    peer.generation_config.pad_token_id = 0
    for rows in batches:
        ids = torch.randint(5, 400, (rows, prompt), device=place.device)
        attempt(results, f"bfloat16, batch {rows}", _decode, place, skeleton, params, ids, new)
        attempt(results, f"transformers, bfloat16, batch {rows}", _decode_peer, place, peer, ids, new)
    ids = torch.randint(5, 400, (1, prompt), device=place.device)
    attempt(
        results,
        "profile of 8 tokens",
        kernels,
        place,
        partial(_generate, skeleton, params, ids, place.size(8, 2)),
    )
    del peer
    # In place, so that both never lie on the GPU.
    quantize = four_bit.quantizer()
    for name in list(params):
        params[name] = quantize(name, params[name])
    results["floor ms a token of NF4"] = digits(lazy.nbytes(params) / 3.35e12 * 1e3)
    for rows in batches:
        ids = torch.randint(5, 400, (rows, prompt), device=place.device)
        attempt(results, f"NF4, batch {rows}", _decode, place, skeleton, params, ids, new)


def _generate(skeleton: skeletons.Skeleton, weights: Tree, ids: Tensor, new: int) -> None:
    inputs = {"ids": ids, "mask": torch.ones_like(ids)}
    generate.generate(Sampling(max_tokens=new, min_tokens=new), skeleton, weights, inputs)


def _decode(
    place: Place, skeleton: skeletons.Skeleton, weights: Tree, ids: Tensor, new: int
) -> dict[str, float]:
    return _per_token(place, lambda count: _generate(skeleton, weights, ids, count), len(ids), new)


def _decode_peer(place: Place, peer: Any, ids: Tensor, new: int) -> dict[str, float]:
    def generate_so_many(count: int) -> None:
        with torch.no_grad():
            peer.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )

    return _per_token(place, generate_so_many, len(ids), new)


def _per_token(place: Place, generate_so_many: Any, rows: int, new: int) -> dict[str, float]:
    """From two lengths, so that the prompt's pass does not count."""
    long = seconds(place, lambda: generate_so_many(new), repeats=1)
    short = seconds(place, lambda: generate_so_many(new // 2), repeats=1, warmup=0)
    per_token = (long - short) / (new - new // 2)
    return {"ms a token": digits(per_token * 1e3), "tokens/s": digits(rows / per_token)}


def mixture(place: Place, results: Results) -> None:
    """A pass of a 7B with another mixture of adapters for each sample, beside the bare model and peft."""
    skeleton = language_model(place, QWEN25_7B)
    params = random_weights(place, skeleton)
    count = place.size(8, 2)
    cfg = lora.LoraConfig(rank=16, alpha=32.0, pattern=LINEAR)
    adapters = [
        lora.init_lora(cfg, skeleton, Generator().manual_seed(i), device=place.device) for i in range(count)
    ]
    rows, tokens = place.size((8, 512), (2, 16))
    ids = torch.randint(5, 400, (rows, tokens), device=place.device)
    shares = torch.rand(rows, count, generator=Generator().manual_seed(0)).softmax(-1)
    results["adapters, rows, tokens"] = [count, rows, tokens]

    def forward(weights: Tree) -> None:
        skeleton(weights, input_ids=ids, logits_to_keep=1, use_cache=False)

    with torch.no_grad():
        bare = seconds(place, lambda: forward(params))
        results["bare ms"] = digits(bare * 1e3)
        for dtype in (torch.float32, torch.bfloat16):
            pool = compose.stack_adapters([lora.move_adapter(a, dtype=dtype) for a in adapters])
            mixed = lora.apply_lora(params, compose.compose_adapters(pool, shares))
            label = f"mixture, {str(dtype)[6:]}"
            attempt(results, f"{label}, x bare", _times, place, partial(forward, mixed), bare)
            one = lora.apply_lora(params, compose.compose_adapters(pool, shares[:1]))
            attempt(
                results,
                f"{label}, batch 1, decoding",
                _decode,
                place,
                skeleton,
                one,
                ids[:1],
                place.size(16, 2),
            )
        results["compose ms"] = digits(
            seconds(place, lambda: compose.compose_adapters(pool, shares)) * 1e3, 3
        )

        def fuse(members: Any) -> None:
            weights = [0.5, 0.3, 0.2][: len(members)]
            compose.compose_adapters(members, weights, mode="fusion", rule="svd")

        attempt(results, "fusion by svd", timed, place, partial(fuse, adapters[:3]), 1, 0)
        peer = peer_module(skeleton)
        peer.load_state_dict(params, strict=False, assign=True)
        peer.tie_weights()
        attempt(results, "peft", _peft, place, peer, count, ids, bare)


def _times(place: Place, call: Any, bare: float) -> float:
    return digits(seconds(place, call) / bare)


def _peft(place: Place, peer: Any, count: int, ids: Tensor, bare: float) -> dict[str, float]:
    """peft with as many adapters active at once (one weight for all samples), and one adapter a sample by name."""
    from peft import LoraConfig, get_peft_model

    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]

    def adapter() -> Any:
        return LoraConfig(r=16, lora_alpha=32, target_modules=targets)

    names = [f"a{i}" for i in range(count)]
    model = get_peft_model(peer, adapter(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, adapter())
    model.base_model.set_adapter(names)
    model = model.to(place.device).eval()
    call = {"input_ids": ids, "logits_to_keep": 1, "use_cache": False}
    of_samples = [names[i % count] for i in range(len(ids))]
    return {
        "all active, x bare": _times(place, lambda: model(**call), bare),
        "one a sample, x bare": _times(place, lambda: model(**call, adapter_names=of_samples), bare),
    }


def vision_encoder(place: Place, results: Results) -> None:
    """An image of a megapixel through Qwen2.5-VL's vision encoder, most of whose layers look at windows."""
    real = PUBLISHED["Qwen/Qwen2.5-VL-7B-Instruct"]["vision_config"]
    small = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
    vision = place.size(real, real | small | {"fullatt_block_indexes": [1]})
    config = cases.QWEN_VL | {"vision_config": vision | {"out_hidden_size": 64}}
    skeleton = on_device(place, skeletons.empty_skeleton(config, head="language"))
    params = random_weights(place, skeleton)
    height, width = place.size((80, 64), (8, 8))
    skeleton.module.config.image_token_id = skeleton.config["image_token_id"] = cases.IMAGE_TOKEN
    skeleton.module.model.config.image_token_id = cases.IMAGE_TOKEN
    visual = height * width // 4
    ids = torch.randint(3, 400, (1, visual + 32), device=place.device)
    ids[:, 4 : 4 + visual] = cases.IMAGE_TOKEN
    inputs = {
        "ids": ids,
        "mask": torch.ones_like(ids),
        "pixel_values": torch.randn(height * width, 1176, device=place.device, dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }
    with torch.no_grad():

        def encode() -> None:
            vlm.hidden_states(skeleton, params, **inputs)

        attempt(results, "image", timed, place, encode)
        attempt(results, "profile", kernels, place, encode)
