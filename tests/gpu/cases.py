"""What medvl computes, at toy sizes, as functions of a device.

Every case builds its inputs on the CPU from seeds, moves them to `device`, and returns CPU tensors by name. Two
devices must give the same numbers (`benches/gpu`), and a pretended GPU must run them at all (`test_devices`).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from attrs import evolve, frozen
from torch import Generator, Tensor

from medvl.adapters import build, experts
from medvl.adapters.embed_config import EmbedConfig
from medvl.base import config
from medvl.base.tree import flatten, map_leaves, merge_trees, split_tree
from medvl.components import compress, encode, fuse, layers, losses, text, vq
from medvl.components.project import ProjectConfig, init_project
from medvl.components.slots import CompressConfig
from medvl.hub import skeletons
from medvl.hub.peft_files import write_adapter
from medvl.language import chat, clip_vision, encoding, generate, likelihood, system, vision, vlm
from medvl.language.conversations import Conversation
from medvl.language.sampling import Sampling, allow_only
from medvl.language.templates import PLACEHOLDERS
from medvl.systems.ct_clip import common_space
from medvl.systems.ct_clip import model as ct_clip
from medvl.systems.ct_clip.record import Config as CtClipConfig
from medvl.systems.slide_vqa import model as slide_vqa
from medvl.systems.slide_vqa.record import Config as SlideVqaConfig
from medvl.systems.tune.record import Config as TuneConfig
from medvl.systems.unified import draw
from medvl.systems.unified.model import make_question, open_unified
from medvl.training import gradients, loop, optim, stages, states
from medvl.weights import compose, extended, four_bit, lazy, lora
from tests import tiny
from tests.adapters import tiny_encoders
from tests.records import with_settings
from tests.systems.unified import pieces

Numbers = dict[str, Tensor]
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN3 = {"model_type": "qwen3", **TEXT, "head_dim": 16, "tie_word_embeddings": True}
QWEN_VL = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
}
IMAGE_TOKEN = 500
SPECIAL_TOKENS = {
    "<|image_pad|>": IMAGE_TOKEN,
    "<|video_pad|>": 501,
    "<|vision_start|>": 502,
    "<|vision_end|>": 503,
}


@frozen
class Case:
    compute: Callable[[torch.device | str], Numbers]
    tolerance: float  # relative error that a real GPU may have


CASES: dict[str, Case] = {}


def case(name: str, tolerance: float = 2e-4):
    def add(compute):
        CASES[name] = Case(compute, tolerance)
        return compute

    return add


class Tokenizer:
    """As much of a tokenizer as `system.init_model` asks for."""

    pad_token_id, eos_token_id, bos_token_id = 0, 2, 1

    def __len__(self) -> int:
        return TEXT["vocab_size"]

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, list):
            return [SPECIAL_TOKENS.get(token, 3) for token in tokens]
        return SPECIAL_TOKENS.get(tokens, 3)

    def get_vocab(self):
        return SPECIAL_TOKENS


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def difference(expected: Numbers, actual: Numbers) -> dict[str, float]:
    """{name: relative error}.

    The error of a gradient that is nothing but rounding (that of a bias in front of a centring) is taken relative to
    the norm of all gradients.
    """
    gradient_norms = [tensor.double().norm() for name, tensor in expected.items() if "grad/" in name]
    smallest_gradient = 1e-6
    if gradient_norms:
        smallest_gradient = 0.01 * float(torch.stack(gradient_norms).norm())
    errors = {}
    for name, a in expected.items():
        b = actual[name]
        if a.shape != b.shape:
            errors[name] = float("inf")
            continue
        a, b = a.double(), b.double()
        equal = (a == b) | (a.isnan() & b.isnan())  # infinities too
        error = torch.where(equal, torch.zeros_like(a), a - b).norm()
        smallest = smallest_gradient if "grad/" in name else 1e-6
        errors[name] = float(error / a.nan_to_num(posinf=0, neginf=0).norm().clamp(min=smallest))
    return errors


def move(device, tree):
    return map_leaves(lambda leaf: leaf.to(device), tree)


def fetch(tree, prefix: str = "") -> Numbers:
    """The leaves on the CPU, by name."""
    return {f"{prefix}{name}": leaf.detach().cpu().float() for name, leaf in flatten(tree).items()}


def with_noise(params: Numbers, seed: int = 7, std: float = 0.05) -> Numbers:
    """Weights of which none is 0 or 1, as transformers leaves some of them."""
    gen = generator(seed)
    return {name: p + torch.randn(p.shape, generator=gen).to(p) * std for name, p in params.items()}


def random_like(tree, seed: int, std: float = 0.05):
    """Random numbers in the shapes of a tree: factors of an adapter start with zeros, which would hide errors."""
    gen = generator(seed)
    return map_leaves(lambda leaf: (torch.randn(leaf.shape, generator=gen) * std).to(leaf.dtype), tree)


# ct_clip ----------------------------------------------------------------------------------------------------
CT_CLIP = {
    "system": "ct_clip",
    "vit": {
        "config": {
            "model_type": "dinov2_with_registers",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 70,
            "patch_size": 14,
            "num_register_tokens": 2,
        }
    },
    "fuse": {"dim": 64, "depth": 2, "heads": 4},
    "contrast": {"dim": 32},
    "words": {"tower": {"vocabulary": 200, "context": 16, "dim": 32, "depth": 2, "heads": 4}},
    "train": {"batch": 6, "chunk": 4, "stages": [{"name": "contrast", "steps": 2, "lr": 1e-3}]},
}


def ct_clip_model(**settings):
    """(model, params); a text tower of its own, so that no tokenizer is needed."""
    cfg = config.structure(with_settings(CT_CLIP, **settings), CtClipConfig, source="case")
    gen = generator()
    vit, vit_params = skeletons.init_skeleton(cfg.vit.config, gen)
    params = {
        "vit": with_noise(vit_params),
        "fuse": fuse.init_fuse(cfg.fuse, gen),
        "text": text.init_text(cfg.words.tower, gen),
    }
    widths = {"image": fuse.fused_width(cfg.fuse), "text": cfg.words.tower.dim}
    params["project"] = {
        side: layers.init_linear(width, cfg.contrast.dim, gen, std=width**-0.5, bias=False)
        for side, width in widths.items()
    }
    params["contrast"] = {"log_scale": torch.tensor(2.0), "bias": torch.tensor(-5.0)}
    return ct_clip.Model(cfg=cfg, vit=vit, text_encoder=None, tokenizer=None), params


def ct_batch(volumes: int = 6, slices: int = 5, side: int = 56) -> Numbers:
    gen = generator(3)
    mask = torch.ones(volumes, slices, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "slices": torch.randint(0, 256, (volumes, slices, side, side), dtype=torch.uint8, generator=gen),
        "mask": mask,
        "position_mm": torch.arange(slices).float().expand(volumes, slices).contiguous() * 3,
        "ids": torch.randint(0, 200, (volumes, 1, 12), generator=gen),
        "words": torch.ones(volumes, 1, 12, dtype=torch.bool),
    }


def ct_clip_gradient(device, **settings):
    """(record, params on the device, gradient function)."""
    model, params = ct_clip_model(**settings)
    return model.cfg, move(device, params), ct_clip.contrastive_gradient(model, {})


def ct_clip_step(device, steps: int = 2, **settings) -> Numbers:
    """Loss and gradient of the first step, and the loss of the last."""
    cfg, params, grad = ct_clip_gradient(device, **settings)
    loss, _, grads = grad(params, ct_batch())
    optimizer = optim.adamw(lambda name: optim.Rate(lr=1e-3, weight_decay=0.1))
    step = loop.make_step(grad, optimizer, clip=1.0, bound=lambda p: ct_clip.bound_scale(cfg.contrast, p))
    state = states.State(params=params, opt=optimizer.init(params))
    metrics = {"loss": loss}
    for _ in range(steps):
        state, metrics = step(state, ct_batch())
    losses_of_steps = {"loss": loss.cpu(), "after": metrics["loss"].cpu()}
    return losses_of_steps | fetch(grads, "grad/") | fetch(state.means, "means/")


@case("ct_clip gradient by chunks", 2e-3)
def _(device):
    return ct_clip_step(device)


@case("ct_clip gradient, checkpointed", 2e-3)
def _(device):
    return ct_clip_step(device, encode__checkpoint=True, encode__budget_mib=1)


@case("ct_clip gradient, siglip, standardise, max pool", 2e-3)
def _(device):
    return ct_clip_step(
        device,
        encode__pool="max",
        fuse={"dim": 64, "depth": 1, "heads": 4, "skip": True, "pool": "mean+max"},
        contrast={"dim": 32, "loss": "siglip", "normalise": "standardise"},
    )


@case("ct_clip gradient, bfloat16", 0.5)
def _(device):
    return ct_clip_step(device, steps=1, train__precision="bfloat16")


@case("ct_clip volumes, placed by running means", 2e-3)
def _(device):
    model, params = ct_clip_model()
    params = move(device, params | {"running": {"image": {"mean": randn(64)}}})
    return {"place": common_space.place_batch(model, params, ct_batch())}


@case("encode_slices of every pool, voxels on the CPU")
def _(device):
    model, params = ct_clip_model()
    vit_params = move(device, params["vit"])
    batch = ct_batch()
    numbers = {}
    for pool in ("cls", "mean", "max", "cls+mean"):
        cfg = encode.EncodeConfig(pool=pool)
        embeddings = encode.encode_slices(cfg, vit_params, batch["slices"], batch["mask"], vit=model.vit)
        numbers[pool] = embeddings.cpu()
    mask = batch["mask"].to(device)
    voxels = (batch["slices"].short() - 100).to(device)
    cfg = encode.EncodeConfig(window="minmax", resize=70)
    numbers["minmax"] = encode.encode_slices(cfg, vit_params, voxels, mask, vit=model.vit).cpu()
    return numbers


@case("whiten", 1e-3)
def _(device):
    model, params = ct_clip_model()
    white = encode.whiten(model.cfg.encode, move(device, params["vit"]), ct_batch()["slices"].flatten(0, 1))
    (kernel,) = [p for p in white.values() if p.dim() == 4]
    weight = kernel.flatten(1).double()
    # The sign of a direction is free, the covariance is not.
    return {"covariance": (weight @ weight.T).cpu()}


# tune -------------------------------------------------------------------------------------------------------
TUNE = {
    "system": "tune",
    "model": {"config": QWEN_VL, "dtype": "float32", "quantize": "none"},
    "data": {"folder": "nowhere"},
    "chat": {"context": 96},
    "lora": {"rank": 4, "alpha": 8.0, "pattern": "all-linear"},
    "train": {
        "batch": 2,
        "chunk": 1,
        "logits": 7,
        "stages": [{"name": "lora", "steps": 4, "lr": 1e-3, "train": ["lora/.*"]}],
    },
}
WHOLE = {"train__stages__0__train": ["model/.*"]}


def tune_model(**settings):
    """(model, params) with an adapter that changes something."""
    cfg = config.structure(with_settings(TUNE, **settings), TuneConfig, source="case")
    with mock.patch.object(chat, "tokenizer_of", return_value=Tokenizer()):
        model, params = system.init_model(cfg, Path("nowhere"))
    if "lora" in params:
        params["lora"] = random_like(params["lora"], seed=11)
    return model, params


def conversation_batch(images: bool = True, rows: int = 2, tokens: int = 24) -> Numbers:
    gen = generator(5)
    ids = torch.randint(3, 490, (rows, tokens), generator=gen)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[1, 18:] = False
    batch = {"ids": ids, "mask": mask, "images": torch.zeros(rows, dtype=torch.int64)}
    if images:
        # 4 x 4 and 4 x 6 patches are 4 and 6 visual tokens.
        ids[0, 2:6] = IMAGE_TOKEN
        ids[1, 3:9] = IMAGE_TOKEN
        batch |= {
            "images": torch.ones(rows, dtype=torch.int64),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 6]]),
            "pixel_values": torch.randn(40, 1176, generator=gen),
        }
    labels = ids.clone()
    labels[:, :12] = -100
    labels[~mask] = -100
    ids[~mask] = 0
    return batch | {"labels": labels, "visual": ids == IMAGE_TOKEN}


def packed_batch(images: bool = True) -> Numbers:
    """The conversations of `conversation_batch` in one row."""
    batch = conversation_batch(images)
    samples = []
    for ids, labels, mask in zip(batch["ids"], batch["labels"], batch["mask"], strict=True):
        samples.append(encoding.Sample(ids=ids[mask], labels=labels[mask]))
    packed = encoding.collate_packed([samples], 0)
    packed["visual"] = packed["ids"] == IMAGE_TOKEN
    packed["images"] = batch["images"].sum(0, keepdim=True)
    return packed | {name: batch[name] for name in ("image_grid_thw", "pixel_values") if name in batch}


def move_model(device, params):
    """Params of a language system; weights of the model may be of any kind, 4-bit ones too."""
    return {
        key: lazy.move_params(tree, device) if key == "model" else move(device, tree)
        for key, tree in params.items()
    }


def trained_gradient(device, model, params):
    """(what the first stage trains, its gradient function) on a device."""
    stage = model.train.stages[0]
    trained, frozen = split_tree(move_model(device, params), stage.train)
    loss = system.loss_function(model)
    grad = stages.make_gradient(
        model.train,
        lambda p, batch: loss(merge_trees(frozen, p), batch),
        lambda batch, rows: chat.micro_batch(model.chat, batch, rows),
    )
    return trained, grad


def tune_step(device, *, images: bool = True, steps: int = 2, packed: bool = False, **settings) -> Numbers:
    """Loss and gradient of the first step, loss and norm of the last."""
    model, params = tune_model(**settings)
    trained, grad = trained_gradient(device, model, params)
    batch = [packed_batch(images)] if packed else conversation_batch(images)
    optimizer = stages.make_optimizer(model.train, model.train.stages[0], trained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss, _, grads = grad(trained, batch)
    state = states.State(params=trained, opt=optimizer.init(trained))
    step = loop.make_step(grad, optimizer, clip=1.0, seed=0)
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, batch)
    numbers = {"loss": loss.cpu(), "after": metrics["loss"].cpu(), "norm": metrics["grad_norm"].cpu()}
    return numbers | fetch(grads, "grad/")


@case("tune whole, images", 2e-3)
def _(device):
    return tune_step(device, **WHOLE)


@case("tune whole, images, packed", 2e-3)
def _(device):
    return tune_step(device, packed=True, **WHOLE)


@case("tune whole, images, not checkpointed", 2e-3)
def _(device):
    return tune_step(device, **WHOLE, train__checkpoint=False, train__chunk=2)


@case("tune LoRA, images, vision encoder too", 2e-3)
def _(device):
    return tune_step(device, lora__vision=True)


@case("tune H-LoRA", 2e-3)
def _(device):
    return tune_step(device, lora__experts=4)


@case("tune whole qwen3, text", 2e-3)
def _(device):
    return tune_step(device, images=False, **WHOLE, model__config=QWEN3)


@case("tune muon", 5e-2)
def _(device):
    muon = {"match": "matrices", "optimizer": "muon", "lr": 0.02, "weight_decay": 0.0}
    return tune_step(device, steps=1, **WHOLE, train__stages__0__speeds=[muon])


@case("tune bfloat16 whole, master", 0.2)
def _(device):
    return tune_step(device, steps=1, **WHOLE, model__dtype="bfloat16")


@case("tune bfloat16 whole, 8-bit moments, stochastic rounding", 0.2)
def _(device):
    settings = {"model__dtype": "bfloat16", "train__rounding": "stochastic", "train__moments": "8bit"}
    return tune_step(device, steps=1, **WHOLE, **settings)


@case("tune NF4 and LoRA, bfloat16", 0.2)
def _(device):
    return tune_step(device, steps=1, model__quantize="nf4", model__dtype="bfloat16")


@case("tune NF4 and LoRA in bfloat16 with masters", 0.2)
def _(device):
    settings = {"model__quantize": "nf4", "model__dtype": "bfloat16", "train__added": "model"}
    return tune_step(device, steps=2, **settings)


@case("tune NF4 and LoRA, float32", 2e-3)
def _(device):
    return tune_step(device, model__quantize="nf4")


@case("tune FP4 and LoRA, float32", 2e-3)
def _(device):
    return tune_step(device, model__quantize="fp4")


@case("4-bit weights: packed there as here, their values, a product", 1e-3)
def _(device):
    weight, x = randn(96, 128), randn(3, 128, seed=1)
    numbers = {}
    for kind in ("nf4", "fp4"):
        for double in (True, False):
            cfg = four_bit.QuantConfig(kind=kind, double=double, skip=())
            packed_there = four_bit.quantize_matrix(weight.to(device), cfg)
            packed_here = four_bit.quantize_matrix(weight, cfg)
            moved = lazy.move_params({"w": packed_here}, torch.device(device))["w"]
            name = f"{kind}{' double' if double else ''}"
            numbers[f"{name} dense"] = lazy.dense(packed_there).cpu()
            numbers[f"{name} product"] = F.linear(x.to(device), packed_there).cpu()
            numbers[f"{name} moved"] = lazy.dense(moved).cpu()
    return numbers


# Mixtures of adapters ---------------------------------------------------------------------------------------
def toy_adapters(device, model, params, *, seed: int, std: float):
    adapters = []
    for i in range(3):
        factors = move(device, random_like(params["lora"], seed + i, std))
        adapters.append(evolve(model.adapter, name=f"adapter{i}", factors=factors))
    return adapters


@case("mixture per sample, in the vision encoder too, over NF4 too", 2e-3)
def _(device):
    numbers = {}
    for quantize in ("none", "nf4"):
        model, params = tune_model(lora__vision=True, model__quantize=quantize)
        pool = compose.stack_adapters(toy_adapters(device, model, params, seed=20, std=0.05))
        mixed = compose.compose_adapters(compose.select_adapters(pool, [2, 0]), [[0.9, 0.1], [0.3, 0.7]])
        batch = conversation_batch()
        rows = vlm.visual_rows(batch["ids"], IMAGE_TOKEN).to(device)
        weights = lora.apply_lora(lazy.move_params(params["model"], torch.device(device)), mixed, rows=rows)
        inputs = chat.model_inputs(model.chat, weights, batch)
        inputs.pop("labels", None)
        with torch.no_grad():
            total, count = chat.loss_sum(model.chat, model.chat.skeleton, weights, batch)
            hidden = vlm.hidden_states(model.chat.skeleton, weights, **inputs)
        numbers[f"{quantize} loss"] = total.cpu()
        numbers[f"{quantize} count"] = count.cpu()
        numbers[f"{quantize} hidden"] = hidden.cpu()[batch["mask"]]
    return numbers


@case("fusion by every rule", 2e-3)
def _(device):
    model, params = tune_model()
    adapters = toy_adapters(device, model, params, seed=30, std=1.0)
    module = next(iter(adapters[0].factors))
    weights = [0.5, 0.3, -0.2]
    numbers = {}
    for rule in ("cat", "svd", "linear", "average", "ties", "magnitude_prune", "ties_svd", "dare_linear"):
        options = {}
        if rule.startswith(("ties", "magnitude", "dare")):
            options["density"] = 0.5
        if rule.startswith("dare"):
            options["gen"] = generator(4)
        fused = compose.compose_adapters(adapters, weights, mode="fusion", rule=rule, **options)
        factors = fused.factors[module]
        numbers[rule] = (factors["b"] @ factors["a"]).cpu()
    return numbers


@case("merge of an adapter", 1e-3)
def _(device):
    model, params = tune_model()
    params = move_model(device, params)
    adapter = evolve(model.adapter, factors=params["lora"])
    merged = lora.merge_adapter(params["model"], adapter, also_head=True).params
    return fetch({name: merged[name] for name in list(merged)[:6]})


# unified ----------------------------------------------------------------------------------------------------
@case("a VQ model of both kinds: scores, images of codes, gradient of its loss", 1e-3)
def _(device):
    numbers = {}
    codes = torch.arange(12).view(1, 3, 4) % 6
    pixels = randn(1, 3, 6, 8).clamp(-1, 1)
    for kind in ("gumbel", "vq"):
        sizes = {
            "n_embed": 6,
            "embed_dim": 4,
            "z_channels": 4,
            "resolution": 16,
            "ch": 32,
            "num_res_blocks": 1,
        }
        cfg = vq.VqConfig(kind=kind, ch_mult=(1, 2), attn_resolutions=(8,), **sizes)
        params = move(device, vq.init_vq(cfg, generator(4)))
        numbers[f"{kind} scores"] = vq.encode_logits(cfg, params, pixels.to(device)).cpu()
        numbers[f"{kind} image"] = vq.decode_codes(cfg, params, codes.to(device)).cpu()
        if kind == "gumbel":  # its loss draws numbers, and each device its own
            drawn = vq.encode_codes(cfg, params, pixels.to(device), generator())
            numbers["gumbel drawn"] = drawn.cpu()
            continue

        def loss(p, batch, cfg=cfg):
            return vq.vq_loss(cfg, p, batch.to(device))[0], gradients.Aux()

        _, _, grads = gradients.value_and_grad(loss)(params, pixels)
        numbers |= fetch({name: grads[name] for name in grads if "conv_" in name or "quant" in name}, "grad/")
    return numbers


# slide_vqa --------------------------------------------------------------------------------------------------
@case("compress of every kind: gradient, streaming, weights", 1e-3)
def _(device):
    patches = randn(2, 300, 32)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, 200:] = False
    numbers = {}
    for kind in ("moe", "soft_moe", "perceiver", "attention", "mean"):
        passes = 2 if kind == "perceiver" else 1
        cfg = CompressConfig(kind=kind, dim=32, slots=4, hidden=16, heads=2, passes=passes)
        params = move(device, compress.init_compress(cfg, generator(2)))

        def loss(p, batch, cfg=cfg):
            out = compress.compress(
                cfg, p, batch["patches"].to(device), batch["mask"].to(device), routing=True
            )
            aux = sum(out.aux.values()) if out.aux else 0.0
            return out.tokens.square().mean() + out.routing.square().sum() + aux, gradients.Aux()

        value, _, grads = gradients.value_and_grad(loss)(params, {"patches": patches, "mask": mask})
        streamed = compress.compress_stream(cfg, params, lambda: patches[0].split(77))
        state = None if kind == "moe" else final_state(cfg, params, patches[0])
        numbers[f"{kind} loss"] = value.cpu()
        numbers[f"{kind} streamed"] = streamed.tokens.cpu()
        numbers[f"{kind} weights"] = compress.slot_weights(cfg, params, patches[0], state).cpu()
        numbers |= fetch(grads, f"{kind} grad/")
    return numbers


def final_state(cfg, params, patches):
    state = compress.begin_state(cfg, params)
    for turn in range(cfg.passes):
        if turn:
            state = compress.begin_state(cfg, params, state)
        state = compress.update_state(cfg, params, state, patches)
    return state


SLIDE_VQA = {
    "system": "slide_vqa",
    "hidden": 16,
    "model": {"config": QWEN3, "dtype": "float32"},
    "data": {"folder": "nowhere"},
    "chat": {"context": 64, "template": "chatml"},
    "compress": {"slots": 4, "dim": 32},
    "pretrain": {"labels": ["x"]},
    "cold": True,
    "lora": {"rank": 2, "pattern": "all-linear"},
    "train": {
        "batch": 2,
        "chunk": 1,
        "stages": [
            {
                "name": "questions",
                "data": "questions",
                "steps": 4,
                "lr": 1e-3,
                "train": ["projector/.*", "lora/.*"],
            }
        ],
    },
}


def slide_vqa_gradient(device):
    """(trained params on the device, gradient function, batch)."""
    cfg = config.structure(SLIDE_VQA, SlideVqaConfig, source="case")
    with mock.patch.object(chat, "tokenizer_of", return_value=Tokenizer()):
        model, params = slide_vqa.init_model(cfg, Path("nowhere"), CompressConfig(dim=32, slots=4))
    params["lora"] = random_like(params["lora"], seed=9)
    trained, grad = trained_gradient(device, model, params)
    batch = conversation_batch(images=False)
    batch["ids"][:, 2:6] = IMAGE_TOKEN
    batch |= {
        "visual": batch["ids"] == IMAGE_TOKEN,
        "images": torch.ones(2, dtype=torch.int64),
        "tokens": randn(2, 4, 32, seed=9),
    }
    return trained, grad, batch


@case("slide_vqa gradient: projector and LoRA", 2e-3)
def _(device):
    trained, grad, batch = slide_vqa_gradient(device)
    loss, _, grads = grad(trained, batch)
    return {"loss": loss.cpu()} | fetch(grads, "grad/")


# Answers ----------------------------------------------------------------------------------------------------
@case("generation: greedy, sampled, masked, likelihoods of options", 1e-3)
def _(device):
    model, params = tune_model()
    skeleton = model.chat.skeleton
    weights = lazy.move_params(with_noise(params["model"]), torch.device(device))
    inputs = chat.model_inputs(model.chat, weights, conversation_batch())
    inputs.pop("labels", None)

    def answer_ids(sampling, **options):
        answers = generate.generate(sampling, skeleton, weights, inputs, **options).ids
        return torch.tensor([[*ids, *[-1] * (8 - len(ids))] for ids in answers])

    total, mean = likelihood.score_options(skeleton, weights, inputs, [[[5, 6], [7]], [[9], [10, 11, 12]]])
    allowed = allow_only(range(3, 140))
    greedy = answer_ids(Sampling(max_tokens=8, min_tokens=2, end=(2,)))
    # The token that ends a row is one of the other row too, perhaps; each row ends by itself.
    ends = (int(greedy[0, 3]),)
    return {
        "greedy": greedy,
        "a row ends": answer_ids(Sampling(max_tokens=8, end=ends), allowed=allowed),
        "penalised": answer_ids(Sampling(max_tokens=8, end=ends, repetition_penalty=1.3)),
        "sampled": answer_ids(Sampling(max_tokens=8, temperature=1.0, top_p=0.9)),
        "masked": answer_ids(Sampling(max_tokens=6, temperature=0.7, top_k=20), allowed=allowed),
        "total": total.cpu(),
        "mean": mean.cpu(),
    }


@case("answer loss of a batch that lies on the device already", 1e-3)
def _(device):
    model, params = tune_model()
    weights = move(device, params["model"])
    batch = {name: t.to(device) for name, t in conversation_batch().items()}
    total, count = vlm.answer_loss(model.chat.skeleton, weights, batch)
    return {"total": total.detach().cpu(), "count": count.cpu()}


@case("qwen3_vl: positions of patches and deep features", 1e-3)
def _(device):
    encoder = {**QWEN_VL["vision_config"], "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text_config = {**QWEN_VL["text_config"], "model_type": "qwen3_vl_text", "head_dim": 16}
    config = {"model_type": "qwen3_vl", "text_config": text_config, "vision_config": encoder}
    return tune_step(device, steps=1, **WHOLE, model__config=config)


@case("a registry by encoders: vectors of samples and questions", 1e-3)
def _(device):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_encoders.write_all(folder, ("bert", "clip"))
        return registry_vectors(device, folder, "bert") | registry_vectors(device, folder, "clip")


def registry_vectors(device, folder: Path, encoder: str) -> Numbers:
    """Vectors of the adapters of a registry, and of questions that are asked of it."""
    model, params = tune_model(model__config=QWEN3)
    images = [(), ()]
    if encoder == "clip":
        paths = [folder / "bright.png", folder / "dark.png"]
        for i, path in enumerate(paths):
            tiny.drawn((40, 50), seed=i).save(path)
        images = [(path,) for path in paths]
    questions = {"hearts": ["Is the heart normal?", "Effusion?"], "nodules": ["A nodule of 12 mm?", "Lobe?"]}
    samples = {}
    for adapter, texts in questions.items():
        if not (folder / adapter).exists():
            write_adapter(evolve(model.adapter, factors=params["lora"]), folder / adapter)
        samples[adapter] = []
        for question, pictures in zip(texts, images, strict=True):
            content = "<image>" * len(pictures) + question
            message = {"role": "user", "content": content}
            samples[adapter].append(Conversation(messages=(message,), images=pictures))
    path = build.build_registry(
        folder / f"{encoder}.toml",
        {adapter: adapter for adapter in samples},
        samples,
        EmbedConfig(kind="image_text" if encoder == "clip" else "text", name=str(folder / encoder)),
        device=device,
        log=lambda line: None,
    )
    opened = experts.load_experts(model.chat, move(device, params["model"]), path)
    weight = next(iter(opened.embedder.params.values()))
    assert weight.device.type == torch.device(device).type
    asked = experts.embed_questions(opened, questions["hearts"], images)
    return {f"{encoder}: adapters": opened.vectors, f"{encoder}: questions": asked}


# Parts ------------------------------------------------------------------------------------------------------
@case("token_cross_entropy, over a plain head and one with LoRA", 1e-3)
def _(device):
    gen = generator()
    hidden, labels = torch.randn(2, 9, 16, generator=gen), torch.randint(0, 40, (2, 9), generator=gen)
    labels[0, :4] = -100
    head, bias = torch.randn(40, 16, generator=gen), torch.randn(40, generator=gen)
    a, b = torch.randn(2, 16, generator=gen), torch.randn(40, 2, generator=gen)
    heads = {
        "plain": head.to(device),
        "lora": lazy.low_rank(head.to(device), a.to(device), b.to(device)),
    }
    numbers = {}
    for name, weight in heads.items():
        x = hidden.to(device).requires_grad_()
        total, count = losses.token_cross_entropy(x, weight, labels.to(device), bias=bias.to(device), chunk=4)
        # Labels may stay on the CPU.
        each, _ = losses.token_cross_entropy(x, weight, labels, chunk=4, reduction="none")
        numbers[name] = total.detach().cpu()
        numbers[f"{name} grad"] = torch.autograd.grad(total, x)[0].cpu()
        numbers[f"{name} each"] = each.detach().cpu()
        numbers[f"{name} count"] = count.cpu()
    return numbers


@case("visual tokens of two levels of CLIP's tower, and the gradient of their projector")
def _(device):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = {"model_type": "clip_vision_model", **sizes, "image_size": 28, "patch_size": 14}
    gen = generator()
    tower = skeletons.init_skeleton(config, gen)[1]
    project = ProjectConfig(inputs=16, hidden=24, outputs=24)
    params = map_leaves(lambda t: t.to(device), {"tower": tower, "projector": init_project(project, gen)})
    cfg = clip_vision.ClipImageConfig(size=28)
    images = [tiny.drawn((20, 31)), tiny.drawn((5, 3))]
    numbers = {}
    for level in (-2, 1):
        skeleton = clip_vision.tower_skeleton(config, level)
        seen = vision.clip_vision(cfg, skeleton, project, "projector", PLACEHOLDERS["phi3"])
        batch = {name: t.to(device) for name, t in seen.load_items(images).items()}
        weight = params["projector"]["up"]["weight"].requires_grad_()
        visual = seen.embed(params, batch)
        numbers[f"{level} visual"] = visual.detach().cpu()
        numbers[f"{level} grad"] = torch.autograd.grad(visual.square().sum(), weight)[0].cpu()
    return numbers


@case("token tables with rows behind a plain and a 4-bit base: lookups, products, gradients", 1e-3)
def _(device):
    base, x, ids = randn(70, 64), randn(2, 3, 64, seed=1), torch.tensor([[0, 63, 64], [69, 5, 64]])
    numbers = {}
    for name, table in {"plain": base, "nf4": four_bit.quantize_matrix(base)}.items():
        table = lazy.move_params({"w": table}, torch.device(device))["w"]
        rows = extended.mean_rows(table, 64, 6) + randn(6, 64, seed=2).to(device)
        rows = rows.detach().requires_grad_()
        weight = extended.extend_table(table, rows, 64)
        y = F.linear(x.to(device) + F.embedding(ids.to(device), weight), weight)
        numbers[name] = y.detach().cpu()
        numbers[f"grad/{name}"] = torch.autograd.grad(y.square().mean(), rows)[0].cpu()
    return numbers


@case("unified: codes of a picture and their decoding, from a base with plugins", 1e-3)
def _(device):
    with tempfile.TemporaryDirectory() as folder:
        files = pieces.make_files(Path(folder))
        plugins = {task: pieces.make_plugin(files, task) for task in ("understand", "draw")}
        model, params = open_unified(
            *(files / "base", plugins), vq=files / "vq", tower=files / "tower", dtype="float32", device="cpu"
        )
    params = map_leaves(lambda t: t.to(device), params)
    model = evolve(model, vq=(model.vq[0], {name: t.to(device) for name, t in model.vq[1].items()}))
    question = make_question(model.task("draw").chat, tiny.drawn((20, 31)), "Reconstruct the image.")
    prompts = draw.encode_drawings(model, [question])
    codes = draw.draw_codes(model, params, prompts, [0], temperature=1.0)
    pictures = torch.from_numpy(draw.decode_pictures(model, codes)[0]).float() / 255
    return {"codes": codes.float().cpu(), "picture": pictures}


@case("dropout draws the same masks when a layer is computed again", 2e-3)
def _(device):
    """Compared on the device itself: another device draws other masks."""
    results = []
    for checkpoint in (True, False):
        model, params = tune_model(lora__dropout=0.3, train__checkpoint=checkpoint, train__chunk=2)
        trained, grad = trained_gradient(device, model, params)
        torch.manual_seed(3)
        loss, _, grads = grad(trained, conversation_batch())
        results.append({"loss": loss.cpu()} | fetch(grads, "grad/"))
    # Rounding differs a little; below the clamp all errors count as equal.
    return {"error": torch.tensor(max(difference(*results).values())).clamp(min=1e-3)}


@case("a resumed run gives the bits of an undisturbed one, on this device", 1e-6)
def _(device):
    digests = []
    for stops in ((4,), (2, 4)):
        with tempfile.TemporaryDirectory() as folder:
            for stop in stops:
                state = train_to(device, stop, folder)
            digests.append(skeletons.weights_digest(state.params))
    return {"same": torch.tensor(float(digests[0] == digests[1])), "one": torch.tensor(1.0)}


def train_to(device, steps: int, folder: str):
    model, params = tune_model(lora__dropout=0.1)
    trained, grad = trained_gradient(device, model, params)
    optimizer = stages.make_optimizer(model.train, model.train.stages[0], trained)
    return loop.train_steps(
        loop.make_step(grad, optimizer, clip=1.0, seed=0),
        states.State(params=trained, opt=optimizer.init(trained)),
        lambda i: conversation_batch(),
        steps=steps,
        folder=folder,
        every=loop.Every(log=0, save=0),
    )
