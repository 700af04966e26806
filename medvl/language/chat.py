"""A language or vision-language model with its tokenizer and its eyes: conversations with images in, losses and answers out."""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from PIL import Image
from torch import Generator, Tensor

from medvl.base import config, processes
from medvl.base.display import track
from medvl.base.files import PathLike, write_text
from medvl.hub import loading, saving, skeletons, tokens
from medvl.hub.checkpoints import find_file, new_folder, read_json
from medvl.language import encoding as conversations
from medvl.language import generate, images, intern_vl, qwen_vl, vlm
from medvl.language.conversations import Conversation, limit_images
from medvl.language.encoding import Placeholder, Sample, Turns
from medvl.language.generate import Generated, Sampling
from medvl.training import order
from medvl.weights import four_bit, shards

_log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Eyes = qwen_vl.ImageConfig | intern_vl.TileConfig
_QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_CHAT = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_OWN_OPTIONS = {  # what a template is called with anyway
    *(
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
    ),
    *(
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    ),
}
_TILES = ("<img>", "</img>", "<IMG_CONTEXT>")


@frozen(kw_only=True)
class ModelConfig:
    """The model: a hub name or folder; or, without a name, a Hugging Face config built from scratch with a tokenizer of its own."""

    name: str = ""
    config: dict[str, Any] = field(factory=dict)
    tokenizer: str = ""  # another than the model's own
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["none", "nf4", "fp4"] = "none"

    def __attrs_post_init__(self) -> None:
        if bool(self.name) == bool(self.config):
            raise ValueError(
                "model must have either a name (hub or folder) or a config to build from scratch"
            )


@frozen(kw_only=True)
class ChatConfig:
    """How conversations become tokens and pixels, and answers end."""

    context: int = 2048  # tokens
    template: str = ""  # "" = the tokenizer's own
    # Variables of the template: {enable_thinking = false} for reasoning models, {date_string = "26 Jul 2024"} for Llama 3.2.
    options: dict[str, Any] = field(factory=dict)
    # "raw": each answer is put as it is behind the prompt of generation, whatever the template does with answers (DeepSeek-R1).
    answers: Literal["template", "raw"] = "template"
    end: str = ""  # special token behind the last answer, where the template puts nothing there (GLM-4.5: "<|user|>")
    allow: tuple[
        str, ...
    ] = ()  # special tokens that answers may hold, such as those of boxes and image codes
    max_pixels: int = 0  # of an image (MAX_PIXELS elsewhere); 0 = what the checkpoint says
    min_pixels: int = 0
    max_images: int = 0  # of a user's turn, the last ones; 0 = all. (MAX_NUM elsewhere means this for some models and tiles for others)
    window: tuple[
        float, ...
    ] = ()  # (black, white): the greys of 16-bit and DICOM images that are shown as 0 and 255
    repetition_penalty: float = (
        0.0  # of answers; 0 = what the checkpoint's generation_config.json says, 1 = none
    )

    def __attrs_post_init__(self) -> None:
        config.check_bounds(
            self,
            "chat",
            context=(2, 2**24),
            max_pixels=(0, 2**28),
            min_pixels=(0, 2**28),
            max_images=(0, 2**20),
        )
        config.check_bounds(self, "chat", repetition_penalty=(0, 100))
        if self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"chat.min_pixels must not be above chat.max_pixels, got {self.min_pixels} and {self.max_pixels}"
            )
        if wrong := [key for key in self.options if not key.isidentifier() or key in _OWN_OPTIONS]:
            raise ValueError(f"chat.options must be variables of a template, {wrong[0]!r} is none")
        images.check_window(self.window, "chat.window")


@frozen(kw_only=True, eq=False)
class Chat:
    """Everything of a model that talks but its weights."""

    skeleton: skeletons.Skeleton
    tokenizer: Any
    cfg: ChatConfig
    dtype: torch.dtype
    placeholder: Placeholder | None = None
    eyes: Eyes | None = None


@frozen(kw_only=True, eq=False)
class Encoded:
    """Conversations as token ids; images are opened when they are needed."""

    conversations: tuple[Conversation, ...]
    samples: tuple[Sample, ...]
    refused: int  # too long for the context


def open_chat(
    model: ModelConfig,
    cfg: ChatConfig,
    tok: Any,
    gen: Generator,
    *,
    device: torch.device = torch.device("cpu"),
    shard: bool = False,
) -> tuple[Chat, skeletons.Params]:
    """The model and its weights: read, or drawn from `gen` where the record has no name.

    Args:
        tok: from `tokenizer_of`.
        device: where the weights are; "meta" makes none, for an estimate.
        shard: matrices lie in parts on all processes.
    Raises:
        ValueError: as `loading.load_skeleton` and `skeletons.init_skeleton`.
    """
    dtype = DTYPES[model.dtype]
    each = None if model.quantize == "none" else four_bit.quantizer(four_bit.QuantConfig(kind=model.quantize))
    if model.name and device.type != "meta":
        cut_ = shards.sharder(shards.process_mesh(device)) if shard else None
        skeleton, params = loading.load_skeleton(
            model.name, head="language", dtype=dtype, device=device, each=each or cut_
        )
    else:
        skeleton = skeletons.empty_skeleton(config_of(model, tok), head="language")
        if device.type == "meta":
            params = {
                n: torch.empty(p.shape, dtype=dtype, device="meta")
                for n, p in skeleton.module.named_parameters()
            }
        else:
            skeleton, params = skeletons.init_skeleton(skeleton.config, gen, head="language")
            params = {n: t.to(device, dtype) for n, t in params.items()}
        params = {n: each(n, t) if each else t for n, t in params.items()}
    holder, eyes = _sight(model, cfg, skeleton)
    chat = Chat(skeleton=skeleton, tokenizer=tok, cfg=cfg, dtype=dtype, placeholder=holder, eyes=eyes)
    if not model.name and device.type != "meta":
        _try_sizes(chat, params)
    return chat, params


def _try_sizes(chat: Chat, params: skeletons.Params) -> None:
    """Compute one small loss of a model that was built from a config, with an image where it sees them.

    Sizes that do not fit each other are found here, and not when the data is read and the first step is computed.
    """
    token, pixels = chat.tokenizer.convert_tokens_to_ids, dict[str, Tensor]()
    ids, visual = [0, 1, 2, 3], [False] * 4
    try:
        if chat.placeholder is not None and chat.eyes is not None:
            if isinstance(chat.eyes, intern_vl.TileConfig):
                pixels["pixel_values"] = intern_vl.tile_all(
                    chat.eyes, [Image.new("RGB", (chat.eyes.size, chat.eyes.size))]
                )[0]
                count = intern_vl.visual_tokens(chat.eyes, len(pixels["pixel_values"]))
            else:
                side = 2 * chat.eyes.patch * chat.eyes.merge
                pixels["pixel_values"], grid = qwen_vl.patchify_all(
                    chat.eyes, [Image.new("RGB", (side, side))]
                )
                pixels["image_grid_thw"] = grid
                count = int(grid.prod()) // chat.eyes.merge**2
            ids = [
                token(chat.placeholder.before),
                *[token(chat.placeholder.token)] * count,
                token(chat.placeholder.after),
                *ids,
            ]
            visual = [False, *[True] * count, False, *visual]
        row = torch.tensor([ids])
        batch = {
            "ids": row,
            "labels": row,
            "mask": torch.ones_like(row).bool(),
            "visual": torch.tensor([visual]),
            **pixels,
        }
        with torch.no_grad():
            loss, _ = loss_sum(chat, chat.skeleton, shards.lazy_shards(params), batch)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(
            f"model.config: sizes of this {chat.skeleton.name} do not fit each other: {' '.join(str(e).split())}"
        ) from e
    if not bool(loss.isfinite()):
        raise ValueError(
            f"model.config: this {chat.skeleton.name} computes a loss of {float(loss)} before it is trained; see its numbers"
        )


def tokenizer_of(cfg: ModelConfig, folder: Path, texts: Sequence[str] = (), *, lower: bool = True) -> Any:
    """The named tokenizer; or one trained on `texts` with the tokens of ChatML and of images, kept in `folder` and found there again.

    Of several processes the first trains and writes it, the others wait. With lower=False it tells capitals from small letters.
    """
    if cfg.name or cfg.tokenizer:
        return tokens.tokenizer(cfg.tokenizer or cfg.name)
    kept = folder / "tokenizer"
    if not kept.exists() and not texts:
        raise ValueError(f"{kept}: the run has no tokenizer yet; train it first")
    if processes.rank() == 0 and not kept.exists():
        tok = tokens.train_bpe(texts, 600, lower=lower)
        tok.add_special_tokens({"additional_special_tokens": [*_CHAT, *_TILES]})
        tok.chat_template = conversations.TEMPLATES["chatml"]
        with new_folder(kept) as tmp:
            tok.save_pretrained(tmp)
    processes.wait_for_all()
    return tokens.tokenizer(kept)


def config_of(cfg: ModelConfig, tok: Any) -> dict[str, Any]:
    """The Hugging Face config; of a model built from scratch with the tokenizer's size and ids."""
    if cfg.name:
        return read_json(find_file(cfg.name, ("config.json",)))
    raw = {**cfg.config}
    words = {
        "vocab_size": -(-len(tok) // 8) * 8,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
    }
    if "text_config" in raw:
        raw["text_config"] = {**raw["text_config"], **words}
        if raw["model_type"] == "internvl":
            return raw | {"image_token_id": tok.convert_tokens_to_ids(conversations.INTERN_VL.token)}
        at = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 2, "vision_end_token_id": 3}
        return raw | {key: tok.convert_tokens_to_ids(_CHAT[i]) for key, i in at.items()}
    return raw | words


# Conversations --------------------------------------------------------------------------------------------------------------------------
def encode(chat: Chat, held: Sequence[Conversation], *, prompt: bool = False) -> Encoded:
    """Token ids of conversations; those that do not fit the context are left out and counted (a warning says so).

    A conversation whose earlier answers the template writes in another way than behind their prompts (reasoning models) becomes one sample
    per answer, each with what generation sees before it.

    Args:
        prompt: without the last answer and of any length, for `answer`: one sample per conversation.
    Raises:
        ValueError: with the place of the conversation: images for a model without eyes, an image that cannot be read or is too long a
            strip; as `conversations.encode`. A template that writes today's date, where something is trained.
    """
    blind = [c for c in held if c.images] if chat.eyes is None else []
    if blind:
        raise ValueError(
            f"{blind[0].place}: has images, as {len(blind)} conversations do, and {chat.skeleton.name} has no eyes; "
            "choose a vision-language model"
        )
    if prompt:
        samples = [_encode_prompt(chat, c) for c in track(held, "encoding questions")]
        return Encoded(conversations=tuple(held), samples=tuple(samples), refused=0)
    _check_date(chat, held)
    kept, turns = list[Conversation](), list[Turns]()
    for c in track(held, "rendering conversations"):
        whole = chat.cfg.answers == "template" and not _rewritten(chat, c, c.messages)
        parts = [c] if whole else _one_answer_each(c)
        apart: Turns = "last" if chat.cfg.answers == "template" else "raw"
        kept += parts
        turns += ["all" if whole else apart] * len(parts)
    samples, refused = conversations.encode_all(
        chat.tokenizer,
        [c.messages for c in kept],
        placeholder=chat.placeholder,
        visual=[_visual_tokens(chat, c) for c in track(kept, "measuring images")],
        context=chat.cfg.context,
        turns=turns,
        names=[c.place for c in kept],
        **template_of(chat.cfg),
    )
    out = {i for i, _ in refused}
    kept = [c for i, c in enumerate(kept) if i not in out]
    return Encoded(conversations=tuple(kept), samples=tuple(samples), refused=len(refused))


def template_of(cfg: ChatConfig) -> dict[str, Any]:
    """What `conversations.encode` and `encode_prompt` take of the record."""
    return {"template": cfg.template or None, "options": cfg.options, "allow": cfg.allow, "end": cfg.end}


def _encode_prompt(chat: Chat, conversation: Conversation) -> Sample:
    messages = conversation.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    visual = _visual_tokens(chat, conversation)
    apart = chat.cfg.answers == "raw" or _rewritten(chat, conversation, messages)
    turns: Turns = "last" if apart else "all"
    try:
        return conversations.encode_prompt(
            chat.tokenizer,
            messages,
            placeholder=chat.placeholder,
            visual=visual,
            turns=turns,
            **template_of(chat.cfg),
        )
    except ValueError as e:
        raise ValueError(f"{conversation.place}: {e}") from e


def _rewritten(chat: Chat, conversation: Conversation, messages: Sequence[conversations.Message]) -> bool:
    try:
        return conversations.rewrites_history(
            chat.tokenizer, messages, template=chat.cfg.template or None, options=chat.cfg.options
        )
    except ValueError as e:
        raise ValueError(f"{conversation.place}: {e}") from e


def _one_answer_each(conversation: Conversation) -> list[Conversation]:
    """The conversation up to each of its answers, with the images of that part."""
    tag, parts = Placeholder(token="").tag, []
    for i, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            messages = conversation.messages[: i + 1]
            seen = sum(m["content"].count(tag) for m in messages)
            parts.append(evolve(conversation, messages=messages, images=conversation.images[:seen]))
    return parts


def _check_date(chat: Chat, held: Sequence[Conversation]) -> None:
    """Refuse to train on today's date: a run that goes on tomorrow would train other tokens."""
    template = chat.cfg.template or None
    if held and conversations.writes_date(
        chat.tokenizer, held[0].messages, template=template, options=chat.cfg.options
    ):
        raise ValueError(
            "chat: the template writes today's date into every conversation, so that the tokens change from day to day; "
            'pin it by chat.options, such as {date_string = "26 Jul 2024"} for Llama 3.2, or give another chat.template'
        )


def _visual_tokens(chat: Chat, conversation: Conversation) -> list[int]:
    """Visual tokens of every image of a conversation."""
    try:
        return [_tokens(chat, path) for path in conversation.images]
    except ValueError as e:
        raise ValueError(f"{conversation.place}: {e}") from e


def question(chat: Chat, text: str, images: Sequence[PathLike] = ()) -> Conversation:
    """One question about images, as `encode(..., prompt=True)` wants it; the images come first where the text has no tags for them.

    Raises:
        ValueError: no text, or tags that do not match the images.
    """
    if not text.strip():
        raise ValueError("ask: the question must have text, got none")
    paths = tuple(map(Path, images))
    content = text if "<image>" in text else "<image>\n" * len(paths) + text
    talk = Conversation(messages=({"role": "user", "content": content},), images=paths)
    return limit_images(talk, chat.cfg.max_images)


def collate(
    chat: Chat, data: Encoded, chosen: Sequence[int], side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """A batch of `loss_sum`: ids, mask, labels, visual [b, t], images [b] (how many of each row), and their patches or tiles."""
    tok = chat.tokenizer
    pad = tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id or 0
    batch = conversations.collate([data.samples[i] for i in chosen], pad, side=side)
    paths = [p for i in chosen for p in data.conversations[i].images]
    batch["images"] = torch.tensor([len(data.conversations[i].images) for i in chosen])
    if not paths or chat.eyes is None:
        return batch
    opened = [_opened(chat, p) for p in paths]
    if isinstance(chat.eyes, intern_vl.TileConfig):
        return batch | {"pixel_values": intern_vl.tile_all(chat.eyes, opened)[0]}
    patches, grid = qwen_vl.patchify_all(chat.eyes, opened)
    return batch | {"pixel_values": patches, "image_grid_thw": grid}


def batches(chat: Chat, data: Encoded, size: int, seed: int) -> Callable[[int], dict[str, Tensor]]:
    """i -> batch: this process's share of `size` conversations, a pure function of (seed, i)."""
    share = order.batch_indices(
        [*map(str, range(len(data.samples)))], size, seed, rank=processes.rank(), world=processes.world_size()
    )
    return lambda i: collate(chat, data, share(i))


def cut(batch: Mapping[str, Tensor], span: slice) -> dict[str, Tensor]:
    """The rows of a batch in `span` with their images, without columns that are padding in all of them."""
    rows = {k: batch[k][span] for k in ("ids", "mask", "labels", "visual", "images")}
    used = rows["mask"].any(0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    out = {k: t[:, first:last] if t.dim() > 1 else t for k, t in rows.items()}
    if "pixel_values" not in batch:
        return out
    if "image_grid_thw" not in batch:  # tiles, each of as many visual tokens
        seen = batch["visual"].sum(1)
        each = int(seen.sum()) // len(batch["pixel_values"])
        a, b = (int(seen[:n].sum()) // each for n in (span.start, span.stop))
        return out | ({"pixel_values": batch["pixel_values"][a:b]} if b > a else {})
    before, upto = (int(batch["images"][:n].sum()) for n in (span.start, span.stop))
    if upto == before:
        return out
    sizes = batch["image_grid_thw"].prod(1)
    a, b = int(sizes[:before].sum()), int(sizes[:upto].sum())
    return out | {
        "image_grid_thw": batch["image_grid_thw"][before:upto],
        "pixel_values": batch["pixel_values"][a:b],
    }


def arguments(chat: Chat, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What of a batch the model is called with, on its device and in its dtype."""
    real = (
        torch.device("cpu") if device.type == "meta" else device
    )  # an estimate counts, but must know lengths and masks
    inputs = {
        k: t.to(device if t.is_floating_point() else real)
        for k, t in batch.items()
        if k not in ("images", "visual")
    }
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(chat.dtype)
    return inputs


def fullest(chat: Chat, held: Sequence[Conversation], n: int) -> dict[str, Tensor]:
    """A batch of n for an estimate: the longest of `held`, or, without any, text that fills the context, every token trained."""
    if not held:
        ids = torch.ones(n, chat.cfg.context, dtype=torch.int64)
        return {
            "ids": ids,
            "labels": ids,
            "mask": ids.bool(),
            "visual": ~ids.bool(),
            "images": torch.zeros(n, dtype=torch.int64),
        }
    data = encode(chat, held)
    longest = sorted(range(len(data.samples)), key=lambda i: -len(data.samples[i].ids))[:n]
    return collate(chat, data, (longest * n)[:n])


# Losses and answers ---------------------------------------------------------------------------------------------------------------------
def loss_sum(
    chat: Chat,
    skeleton: skeletons.Skeleton,
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    *,
    logits: int = 256,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of the trained tokens of a (micro-)batch, and their number.

    Args:
        skeleton: the chat's, or `hub.checkpointed` of it.
        logits: tokens whose logits exist at a time.
    """
    return vlm.answer_loss(skeleton, weights, arguments(chat, batch, _device(weights)), chunk=logits)


def mean_loss(chat: Chat, weights: Mapping[str, Tensor], data: Encoded, size: int) -> float:
    """Mean loss over all trained tokens, `size` conversations at a time."""
    total, n = 0.0, 0
    for i in track(range(0, len(data.samples), size), "computing the loss, batch"):
        with torch.no_grad():
            value, count = loss_sum(
                chat, chat.skeleton, weights, collate(chat, data, range(i, min(i + size, len(data.samples))))
            )
        total, n = total + float(value), n + int(count)
    return total / n


def answer(
    chat: Chat, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor], max_tokens: int
) -> Generated:
    """Greedy answers to the prompts of a batch.

    Args:
        weights: also with adapters of weights per sample, which must be for the rows of this batch.
        batch: from `collate(..., side="left")`.
    """
    inputs = {k: t for k, t in arguments(chat, batch, _device(weights)).items() if k != "labels"}
    return generate.generate(
        sampling_of(chat, max_tokens), chat.skeleton, weights, inputs, tok=chat.tokenizer
    )


def sampling_of(chat: Chat, max_tokens: int) -> Sampling:
    """Greedy decoding as this model and its template want it.

    An answer ends with the tokens of generation_config.json (of the model's config where it has none), with the one that the template puts
    behind answers, and with the tokenizer's end token. The repetition penalty is generation_config's, unless chat.repetition_penalty says
    another.
    """
    config: Any = chat.skeleton.module.config
    own = chat.skeleton.generation.get("eos_token_id", config.get_text_config().eos_token_id)
    cfg, tok = chat.cfg, chat.tokenizer
    ends = {tok.eos_token_id, *(own if isinstance(own, list | tuple) else [own])}
    ends |= {*conversations.end_ids(tok, template=cfg.template or None, options=cfg.options, end=cfg.end)}
    if ends == {None}:
        _log.warning(
            "%s: no token ends an answer, so that answers go on to their limit; name one: chat.end",
            chat.skeleton.name,
        )
    penalty = cfg.repetition_penalty or chat.skeleton.generation.get("repetition_penalty") or 1.0
    return Sampling(
        max_tokens=max_tokens,
        end=tuple(sorted(e for e in ends if e is not None)),
        repetition_penalty=float(penalty),
    )


def _device(weights: Mapping[str, Tensor]) -> torch.device:
    return next(iter(weights.values())).device


# Images ---------------------------------------------------------------------------------------------------------------------------------
def _sight(
    model: ModelConfig, cfg: ChatConfig, skeleton: skeletons.Skeleton
) -> tuple[Placeholder | None, Eyes | None]:
    """How images come into the model, where it can see."""
    kind = skeleton.config["model_type"]
    if kind not in (*_QWEN_VL, "internvl"):
        return None, None
    vision = skeleton.config["vision_config"]
    raw = (
        read_json(find_file(model.name, ("preprocessor_config.json", "processor_config.json")))
        if model.name
        else None
    )
    if kind == "internvl":
        seen = {"tokens": skeleton.config["image_seq_length"]}
        side = vision["image_size"][0] if isinstance(vision["image_size"], list) else vision["image_size"]
        return conversations.INTERN_VL, evolve(
            intern_vl.tile_config(raw) if raw else intern_vl.TileConfig(size=side), **seen
        )
    own = {
        "patch": vision["patch_size"],
        "merge": vision["spatial_merge_size"],
        "temporal": vision["temporal_patch_size"],
    }
    eyes = qwen_vl.image_config(raw) if raw else qwen_vl.ImageConfig(**own)
    if cfg.max_pixels:
        eyes = evolve(eyes, max_pixels=cfg.max_pixels)
    if cfg.min_pixels:
        eyes = evolve(eyes, min_pixels=cfg.min_pixels)
    return conversations.QWEN_VL, eyes


def _opened(chat: Chat, path: Path) -> Image.Image:
    """An image as the eyes want it: tiles know no most of pixels, so it is made smaller before."""
    image = images.open_image(
        path, window=images.check_window(chat.cfg.window, "chat.window"), only_deep=True
    )
    return (
        images.cap_pixels(image, chat.cfg.max_pixels)
        if isinstance(chat.eyes, intern_vl.TileConfig)
        else image
    )


def _tokens(chat: Chat, path: Path) -> int:
    """Visual tokens of an image."""
    image = _opened(chat, path)
    (width, height), cfg = image.size, chat.eyes
    if isinstance(cfg, intern_vl.TileConfig):
        columns, rows = intern_vl.grid_of(cfg, height, width)
        return intern_vl.visual_tokens(cfg, columns * rows + (cfg.thumbnail and columns * rows > 1))
    assert cfg is not None
    try:
        h, w = qwen_vl.smart_resize(cfg, height, width)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return qwen_vl.visual_tokens(cfg, (1, h // cfg.patch, w // cfg.patch))


# Files ----------------------------------------------------------------------------------------------------------------------------------
def save_chat(chat: Chat, params: Mapping[str, Tensor], folder: PathLike) -> None:
    """Write weights, config, tokenizer and image settings as transformers has them; `ModelConfig(name=folder)` opens it again.

    The chat template is the one that the chat was trained with, chat.options in it as what it falls back to; a generation_config.json that
    the model came with is kept.

    Raises:
        ValueError: as `saving.save_skeleton`.
    """
    with new_folder(folder) as tmp:
        saving.save_skeleton(chat.skeleton, params, tmp)
        save_tokenizer(chat, tmp)
        if isinstance(chat.eyes, qwen_vl.ImageConfig):
            write_text(
                tmp / "preprocessor_config.json", json.dumps(qwen_vl.to_raw(chat.eyes), indent=1) + "\n"
            )
        elif isinstance(chat.eyes, intern_vl.TileConfig):
            write_text(
                tmp / "preprocessor_config.json", json.dumps(intern_vl.to_raw(chat.eyes), indent=1) + "\n"
            )


def save_tokenizer(chat: Chat, folder: Path) -> None:
    """Write the tokenizer with the chat template that conversations are encoded with, chat.options in it as what it falls back to."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = conversations.template_text(
        tokenizer, chat.cfg.template or None, chat.cfg.options
    )
    tokenizer.save_pretrained(folder)
