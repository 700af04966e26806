"""A language or vision-language model with its tokenizer: conversations in, losses and answers out."""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from attrs import evolve, field, frozen
from PIL import Image
from torch import Generator, Tensor

from medvl.base import config, processes, transfer
from medvl.base.display import track
from medvl.base.files import PathLike, write_text
from medvl.base.tree import Tree
from medvl.evaluation import choices
from medvl.hub import int4_files, loading, saving, skeletons, tokens
from medvl.hub.checkpoints import find_file, new_folder, read_json
from medvl.language import encoding, generate, images, likelihood, vision, vlm
from medvl.language.conversations import Conversation, limit_images
from medvl.language.encoding import Sample
from medvl.language.generate import Generated
from medvl.language.messages import Message
from medvl.language.sampling import Sampling
from medvl.language.templates import (
    TEMPLATES,
    ConversationFormat,
    Turns,
    rewrites_history,
    template_text,
    writes_date,
)
from medvl.language.vision import Vision
from medvl.training import order
from medvl.weights import four_bit, shards

_log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Special tokens of a tokenizer that is trained here: those of ChatML and of both kinds of image placeholders.
_SPECIAL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>"),
)
_OWN_OPTIONS = {  # what a template is called with anyway
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "tokenizer_kwargs", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


@frozen(kw_only=True)
class ModelConfig:
    """The model: a hub name or folder; without a name, a Hugging Face config that is built from scratch."""

    name: str = ""
    config: dict[str, Any] = field(factory=dict)
    tokenizer: str = ""  # another than the model's own
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # float16: for answers, nothing is trained
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
    # Variables of the template, such as {enable_thinking = false} for reasoning models.
    options: dict[str, Any] = field(factory=dict)
    # "raw": each answer stands unchanged behind its generation prompt, whatever the template does
    # (DeepSeek-R1).
    answers: Literal["template", "raw"] = "template"
    # Special token behind the last answer, where the template puts nothing there (GLM-4.5: "<|user|>").
    end: str = ""
    # Special tokens that answers may hold, such as those of boxes and image codes.
    allow: tuple[str, ...] = ()
    max_pixels: int = 0  # of an image (MAX_PIXELS elsewhere); 0 = what the checkpoint says
    min_pixels: int = 0
    # Images of a user's turn, the last ones; 0 = all (MAX_NUM elsewhere means this or tiles, by model).
    max_images: int = 0
    # (black, white): the greys of 16-bit and DICOM images that are shown as 0 and 255.
    window: tuple[float, ...] = ()
    # Of answers; 0 = what the checkpoint's generation_config.json says, 1 = none.
    repetition_penalty: float = 0.0
    # The words of images, read by OCR, stand in the prompt (`documents.page_words`); a model without a vision
    # encoder gets them alone.
    ocr: bool = False

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
                f"chat.min_pixels must not be above chat.max_pixels, got {self.min_pixels} and "
                f"{self.max_pixels}"
            )
        if wrong := [key for key in self.options if not key.isidentifier() or key in _OWN_OPTIONS]:
            raise ValueError(f"chat.options must be variables of a template, {wrong[0]!r} is none")
        images.check_window(self.window, "chat.window")


@frozen(kw_only=True, eq=False)
class Chat:
    """A model that talks: everything but its weights."""

    skeleton: skeletons.Skeleton
    tokenizer: Any
    cfg: ChatConfig
    dtype: torch.dtype
    vision: Vision | None = None


class Dialogue(Protocol):
    """A record of a conversation that can be encoded, such as `Conversation` and `SlideTalk`."""

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """{"role", "content"} of every turn; each tag in a content stands for one item."""

    @property
    def items(self) -> tuple[Any, ...]:
        """What the tags stand for, in their order: whatever the chat's `Vision` takes."""

    @property
    def place(self) -> str:
        """Where the record was read, for errors."""

    def until(self, stop: int) -> Self:
        """The first `stop` messages with their items."""


@frozen(kw_only=True, eq=False)
class Encoded:
    """Conversations as token ids; their items are opened when a batch is made."""

    conversations: tuple[Dialogue, ...]
    samples: tuple[Sample, ...]
    refused: int  # too long for the context


# Opening ----------------------------------------------------------------------------------------------------
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
    # Weights are quantised or sharded one by one as they are read, so that the whole model in full precision
    # never lies on the device.
    convert = None
    if model.quantize != "none":
        convert = four_bit.quantizer(four_bit.QuantConfig(kind=model.quantize))
    if model.name and device.type != "meta":
        if convert is None and shard:
            convert = shards.sharder(shards.process_mesh(device))
        skeleton, params = loading.load_skeleton(
            model.name, head="language", dtype=dtype, device=device, transform=convert
        )
    else:
        skeleton = skeletons.empty_skeleton(config_of(model, tok), head="language")
        if device.type == "meta":
            # Names and shapes are enough for an estimate; nothing is read or drawn.
            shapes = {name: p.shape for name, p in skeleton.module.named_parameters()}
            params = {name: torch.empty(s, dtype=dtype, device="meta") for name, s in shapes.items()}
            if convert is None and model.name:
                # A file of int4 is read as it is; `quantize` says nothing of it.
                convert = int4_files.int4_on_meta(config_of(model, tok), skeleton.module)
        else:
            skeleton, params = skeletons.init_skeleton(skeleton.config, gen, head="language")
            # Drawn in float32 on the CPU and moved then: a seed gives the same weights on every device.
            params = {name: t.to(device, dtype) for name, t in params.items()}
        if convert is not None:
            params = {name: convert(name, t) for name, t in params.items()}
    chat = Chat(
        skeleton=skeleton,
        tokenizer=tok,
        cfg=cfg,
        dtype=dtype,
        vision=vision.vision_of(
            skeleton.config,
            model.name,
            max_pixels=cfg.max_pixels,
            min_pixels=cfg.min_pixels,
            window=cfg.window,
        ),
    )
    if not model.name and device.type != "meta":
        _try_sizes(chat, params)
    return chat, params


def _try_sizes(chat: Chat, params: skeletons.Params) -> None:
    """Compute one small loss of a model that was built from a config, with an image where it sees them.

    Sizes that do not fit each other are found here, and not when the data is read and the first step is
    computed.
    """
    # Any tokens that are in the table: only sizes are tried.
    ids, visual, tensors = [0, 1, 2, 3], [False] * 4, dict[str, Tensor]()
    try:
        if chat.vision is not None and chat.vision.example is not None:
            placeholder = chat.vision.placeholder
            tensors = chat.vision.load_items([chat.vision.example])
            count = chat.vision.count_tokens(chat.vision.example)
            # As `encoding` puts an image into a text, so that the ids are those that training will see.
            words = [placeholder.before, *[placeholder.token] * count, placeholder.after]
            ids = [*chat.tokenizer.convert_tokens_to_ids(words), *ids]
            visual = [False, *[True] * count, False, *visual]
        row = torch.tensor([ids])
        batch = {
            "ids": row,
            "labels": row,
            "mask": torch.ones_like(row).bool(),
            "visual": torch.tensor([visual]),
            **tensors,
        }
        with torch.no_grad():
            loss, _ = loss_sum(chat, chat.skeleton, shards.lazy_shards(params), batch)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(
            f"model.config: sizes of this {chat.skeleton.name} do not fit each other: "
            f"{' '.join(str(e).split())}"
        ) from e
    if not bool(loss.isfinite()):
        raise ValueError(
            f"model.config: this {chat.skeleton.name} computes a loss of {float(loss)} before it is "
            "trained; see its numbers"
        )


def tokenizer_of(cfg: ModelConfig, folder: Path, texts: Sequence[str] = (), *, lower: bool = True) -> Any:
    """The named tokenizer; or one trained on `texts` with the tokens of ChatML and of images.

    One that is trained is kept in `folder` and found there again. Of several processes the first trains and
    writes it, the others wait.

    Args:
        lower: capitals become small letters.
    """
    if cfg.name or cfg.tokenizer:
        return tokens.tokenizer(cfg.tokenizer or cfg.name)
    path = folder / "tokenizer"
    if not path.exists() and not texts:
        raise ValueError(f"{path}: the run has no tokenizer yet; train it first")
    if processes.rank() == 0 and not path.exists():
        # 256 bytes, 3 special tokens and some 340 merges: enough for the few phrases of phantoms and tests.
        tok = tokens.train_bpe(texts, 600, lower=lower)
        tok.add_special_tokens({"additional_special_tokens": [*_SPECIAL_TOKENS]})
        tok.chat_template = TEMPLATES["chatml"]
        with new_folder(path) as tmp:
            tok.save_pretrained(tmp)
    # No process may look for the tokenizer before the first one has written it.
    processes.wait_for_all()
    return tokens.tokenizer(path)


def config_of(cfg: ModelConfig, tok: Any) -> dict[str, Any]:
    """The Hugging Face config; of a model built from scratch with the tokenizer's size and ids."""
    if cfg.name:
        return read_json(find_file(cfg.name, ("config.json",)))
    raw = {**cfg.config}
    vocabulary = {
        "vocab_size": -(-len(tok) // 8) * 8,  # a multiple of 8, as matrix products like it
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
    }
    # Vision-language configs keep what is of the text in a record of its own, but ids of image tokens
    # outside.
    if "text_config" in raw:
        raw["text_config"] = {**raw["text_config"], **vocabulary}
        return raw | vision.placeholder_ids(raw["model_type"], tok)
    return raw | vocabulary


# Conversations ----------------------------------------------------------------------------------------------
def encode_conversations(chat: Chat, conversations: Sequence[Dialogue], *, prompt: bool = False) -> Encoded:
    """Token ids of conversations; those longer than the context are left out and counted (it warns).

    Where the template writes earlier answers in another way than behind their prompts (reasoning models), a
    conversation becomes one sample per answer, each with what generation sees before it.

    Args:
        prompt: without the last answer and of any length, for `generate_answers`: one sample per
            conversation.
    Raises:
        ValueError: with the place of the conversation: images for a model that takes none, an image that
            cannot be read or is too long a strip; as `encoding.encode_conversation`. A template that writes
            today's date, where something is trained.
    """
    if chat.vision is None and chat.cfg.ocr:
        conversations = [_without_images(conversation) for conversation in conversations]
    elif chat.vision is None:
        _check_no_items(chat, conversations)
    # Prompts keep their number and order, one for each conversation, as predictions are compared by position.
    if prompt:
        traits = encoding.tokenizer_traits(chat.tokenizer, _format_with_items(chat))
        prompts = [_encode_prompt(chat, traits, c) for c in track(conversations, "encoding questions")]
        return Encoded(conversations=tuple(conversations), samples=tuple(prompts), refused=0)
    _check_date(chat, conversations)
    parts, turns = list[Dialogue](), list[Turns]()
    for conversation in track(conversations, "rendering conversations"):
        raw = chat.cfg.answers == "raw"
        if raw or _rewrites_history(chat, conversation, conversation.messages):
            answers = _split_by_answer(conversation)
            parts += answers
            turns += ["raw" if raw else "last"] * len(answers)
        else:
            parts.append(conversation)
            turns.append("all")
    samples, refused = encoding.encode_fitting(
        chat.tokenizer,
        [part.messages for part in parts],
        # The context bounds what is trained only; how long a prompt may be the model's positions say.
        evolve(_format_with_items(chat), context=chat.cfg.context),
        visual=[_count_visual_tokens(chat, part) for part in track(parts, "measuring images")],
        turns=turns,
        names=[part.place for part in parts],
    )
    # `samples` holds those that fit and no gaps: the conversations are thinned alike, so that one index is
    # for both.
    too_long = {i for i, _ in refused}
    fitting = [part for i, part in enumerate(parts) if i not in too_long]
    return Encoded(conversations=tuple(fitting), samples=tuple(samples), refused=len(refused))


def check_no_ocr(cfg: ChatConfig, system: str) -> None:
    """Raise for a system that does not put the words of images into prompts."""
    if cfg.ocr:
        raise ValueError(f"chat.ocr: {system} reads no pages; leave it out, or use tune or document")


def conversation_format(cfg: ChatConfig) -> ConversationFormat:
    """The template of the record, as `encoding.encode_conversation` takes it; of any length, for texts only."""
    return ConversationFormat(
        template=cfg.template or None, options=cfg.options, allow=cfg.allow, end=cfg.end
    )


def _format_with_items(chat: Chat) -> ConversationFormat:
    fmt = conversation_format(chat.cfg)
    if chat.vision is None:
        return fmt
    return evolve(fmt, placeholder=chat.vision.placeholder)


def _check_no_items(chat: Chat, conversations: Sequence[Dialogue]) -> None:
    with_items = [c for c in conversations if c.items]
    if with_items:
        raise ValueError(
            f"{with_items[0].place}: has images, as {len(with_items)} conversations do, and "
            f"{chat.skeleton.name} has no vision encoder; choose a vision-language model, or set chat.ocr = "
            "true if they are pages of text"
        )


def _without_images(conversation: Dialogue) -> Dialogue:
    """A conversation without its images and their tags, whose words it holds."""
    if not isinstance(conversation, Conversation):
        return conversation
    messages = [
        {**message, "content": message["content"].replace("<image>", "").lstrip("\n")}
        for message in conversation.messages
    ]
    return evolve(conversation, messages=tuple(messages), images=())


def _encode_prompt(chat: Chat, traits: encoding.TokenizerTraits, conversation: Dialogue) -> Sample:
    messages = conversation.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    visual = _count_visual_tokens(chat, conversation)
    rewritten = chat.cfg.answers == "raw" or _rewrites_history(chat, conversation, messages)
    # "last" takes the earlier answers as the template writes a history, and does not ask that each stands
    # behind its own prompt.
    turns: Turns = "last" if rewritten else "all"
    try:
        return encoding.encode_prompt(
            chat.tokenizer,
            messages,
            _format_with_items(chat),
            visual=visual,
            turns=turns,
            traits=traits,
        )
    except ValueError as e:
        raise ValueError(f"{conversation.place}: {e}") from e


def _rewrites_history(chat: Chat, conversation: Dialogue, messages: Sequence[Message]) -> bool:
    try:
        return rewrites_history(chat.tokenizer, messages, conversation_format(chat.cfg))
    except ValueError as e:
        raise ValueError(f"{conversation.place}: {e}") from e


def _split_by_answer(conversation: Dialogue) -> list[Dialogue]:
    """The conversation up to each of its answers."""
    roles = [message["role"] for message in conversation.messages]
    return [conversation.until(i + 1) for i, role in enumerate(roles) if role == "assistant"]


def _check_date(chat: Chat, conversations: Sequence[Dialogue]) -> None:
    """Refuse to train on today's date: a run that goes on tomorrow would train other tokens."""
    if not conversations:
        return
    # One conversation is enough: the date comes from the template.
    if writes_date(chat.tokenizer, conversations[0].messages, conversation_format(chat.cfg)):
        raise ValueError(
            "chat: the template writes today's date into every conversation, so that the tokens change from "
            'day to day; pin it by chat.options, such as {date_string = "26 Jul 2024"} for Llama 3.2, or '
            "give another chat.template"
        )


def _count_visual_tokens(chat: Chat, conversation: Dialogue) -> list[int]:
    """Visual tokens of every item of a conversation."""
    if chat.vision is None:
        return []
    try:
        return [chat.vision.count_tokens(item) for item in conversation.items]
    except ValueError as e:
        raise ValueError(f"{conversation.place}: {e}") from e


def make_question(chat: Chat, text: str, images: Sequence[PathLike | Image.Image] = ()) -> Conversation:
    """One question about images, to be encoded as a prompt; images without tags in the text come first.

    Args:
        images: files, or images that are open.
    Raises:
        ValueError: no text, or tags that do not match the images.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"ask: the question must have text, got {text!r}")
    items: tuple[Any, ...] = tuple(
        image if isinstance(image, Image.Image) else Path(image) for image in images
    )
    # Image first, then a line break and the question: the order of LLaVA and of most data sets.
    content = text if "<image>" in text else "<image>\n" * len(items) + text
    conversation = Conversation(messages=({"role": "user", "content": content},), images=items)
    return limit_images(conversation, chat.cfg.max_images)


# Batches ----------------------------------------------------------------------------------------------------
def make_batch(
    chat: Chat, data: Encoded, rows: Sequence[int], side: Literal["right", "left"] = "right"
) -> dict[str, Tensor]:
    """A batch: ids, mask, labels, visual [b, t], images [b] (the number of items), and the items' tensors."""
    batch = encoding.collate_samples([data.samples[i] for i in rows], _padding_id(chat), side=side)
    return _add_items(chat, batch, [data.conversations[i].items for i in rows])


def make_packed_batch(chat: Chat, data: Encoded, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch as of `make_batch`, whose rows hold several conversations each; "segments" [b, t] parts them."""
    batch = encoding.collate_packed([[data.samples[i] for i in row] for row in rows], _padding_id(chat))
    items = []
    for row in rows:
        items.append([item for i in row for item in data.conversations[i].items])
    return _add_items(chat, batch, items)


def _padding_id(chat: Chat) -> int:
    # Any id will do, the mask hides it; many tokenizers (Llama's) have no padding token.
    tok = chat.tokenizer
    return tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id or 0


def _add_items(chat: Chat, batch: dict[str, Tensor], items: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """The batch with the items of each row, opened."""
    # Counts, as the items of all rows lie one behind the other.
    batch["images"] = torch.tensor([len(of_row) for of_row in items])
    if chat.vision is None:
        return batch
    return batch | chat.vision.load_items([item for of_row in items for item in of_row])


def training_batches(
    chat: Chat, data: Encoded, size: int, seed: int, *, tokens: int = 0, packing: bool = False
) -> Callable[[int], dict[str, Tensor] | list[dict[str, Tensor]]]:
    """i -> batch: this process's share of `size` conversations, a pure function of (seed, i).

    Args:
        tokens: with it a batch is a list of micro-batches of at most so many tokens, padding included.
        packing: their rows hold several conversations each.
    Raises:
        ValueError: as `order.batch_indices`.
    """
    # Every sample is a group of its own: answers that are alike do not disturb each other in a batch, as
    # equal reports do in contrastive training.
    names = [str(i) for i in range(len(data.samples))]
    rank, world = processes.rank(), processes.world_size()
    share = order.batch_indices(names, size, seed, rank=rank, world=world)
    if not tokens:
        return lambda i: make_batch(chat, data, share(i))
    whole = order.batch_indices(names, size, seed)
    lengths = [len(sample.ids) for sample in data.samples]

    def micro_batches(i: int) -> list[dict[str, Tensor]]:
        # Of the whole batch, dealt out: processes then have as many of them, and as much to compute.
        parts = order.split_by_tokens(whole(i), lengths, tokens, packing=packing, multiple_of=world)
        return [make_micro_batch(chat, data, rows, packing=packing) for rows in parts[rank::world]]

    return micro_batches


def make_micro_batch(
    chat: Chat, data: Encoded, rows: order.MicroBatch, *, packing: bool = False
) -> dict[str, Tensor]:
    """The batch of a micro-batch of `order.split_by_tokens`."""
    if packing:
        return make_packed_batch(chat, data, rows)
    return make_batch(chat, data, [i for (i,) in rows])


def micro_batch(chat: Chat, batch: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The rows of a batch with their items, without columns that are padding in all of them."""
    names = [name for name in ("ids", "mask", "labels", "visual", "images", "segments") if name in batch]
    part = {name: batch[name][rows] for name in names}
    # The longest row of the whole batch set the length; a micro-batch of shorter ones would compute its
    # padding.
    used = part["mask"].any(0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    # "images" is [b] and has no tokens to cut.
    part = {name: t[:, first:last] if t.dim() > 1 else t for name, t in part.items()}
    return part if chat.vision is None else part | chat.vision.select_rows(batch, rows)


def fullest_batch(
    chat: Chat,
    conversations: Sequence[Dialogue],
    size: int,
    item: Any = None,
    *,
    tokens: int = 0,
    packing: bool = False,
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """A batch for an estimate of memory: the longest conversations.

    Args:
        conversations: without any, all rows are text that fills the context, every token trained.
        item: what each of these rows shows besides.
        tokens, packing: as of `training_batches`: the two fullest micro-batches then, of two and more the
            gradients are added up.
    """
    if conversations:
        data = encode_conversations(chat, conversations)
    else:
        data = _full_conversations(chat, item, tokens, packing)
        size *= len(data.samples)
    by_length = sorted(range(len(data.samples)), key=lambda i: -len(data.samples[i].ids))
    # Repeated where there are fewer conversations than rows.
    by_length *= -(-size // len(by_length))
    if not tokens:
        return make_batch(chat, data, by_length[:size])
    lengths = [len(sample.ids) for sample in data.samples]
    # Packed micro-batches are full whatever the lengths. One conversation a row, two of 700 tokens take more of
    # 1,500 than one of 900, so that all are looked at.
    candidates = by_length[:size] if packing else by_length
    micro_batches = order.split_by_tokens(candidates, lengths, tokens, packing=packing)

    def padded_tokens(rows: order.MicroBatch) -> int:
        return len(rows) * max(sum(lengths[i] for i in row) for row in rows)

    fullest = sorted(micro_batches, key=padded_tokens, reverse=True)[:2]
    # One holds the whole share: the gradient of a second is not added.
    if sum(map(len, fullest[0])) >= size:
        fullest = [fullest[0][:size]]
    return [make_micro_batch(chat, data, rows, packing=packing) for rows in fullest]


def _full_conversations(chat: Chat, item: Any, tokens: int, packing: bool) -> Encoded:
    """Conversations that fill the context or their micro-batches, with the item first, every token trained."""
    visual = 0
    if chat.vision is not None and item is not None:
        visual = chat.vision.count_tokens(item)
    length = chat.cfg.context
    # Two rows of half the bound take more than one row of the context that leaves a third of it free.
    if tokens > length:
        length = max(visual + 2, tokens // -(-tokens // length))
    ids = torch.ones(length, dtype=torch.int64)
    spans: tuple[tuple[int, int], ...] = ()
    images: tuple[Any, ...] = ()
    if chat.vision is not None and visual:
        ids[:visual] = _placeholder_id(chat, chat.vision)
        spans, images = ((0, visual),), (item,)
    samples = [Sample(ids=ids, labels=ids, visual=spans)]
    conversations = [Conversation(messages=(), images=images)]
    if packing and tokens >= length:
        # Two in a row: where there is one, attention needs no mask, and so less memory.
        samples = [Sample(ids=ids[:-1], labels=ids[:-1], visual=spans), Sample(ids=ids[-1:], labels=ids[-1:])]
        conversations.append(Conversation(messages=()))
    return Encoded(conversations=tuple(conversations), samples=tuple(samples), refused=0)


def model_inputs(
    chat: Chat, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor], params: Tree | None = None
) -> dict[str, Tensor]:
    """What of a batch the model is called with, on the device of its weights and in its dtype.

    Ids, masks and labels stay where they are: `vlm.model_inputs` looks at them before it moves them.

    Args:
        params: of the system, where `Vision.embed` uses some; gradients reach them.
    """
    device = next(iter(weights.values())).device
    inputs = {}
    for name, tensor in batch.items():
        if name in vlm.INDICES:
            inputs[name] = tensor
        elif name not in ("images", "visual"):
            target = device if tensor.is_floating_point() else transfer.index_device(device)
            inputs[name] = transfer.to_device(tensor, target)
    if chat.vision is not None and chat.vision.embed is not None:
        visual = chat.vision.embed(params or {}, inputs).to(chat.dtype)
        counts = batch["visual"].sum(1).tolist()
        table = weights[token_table(chat)]
        token = _placeholder_id(chat, chat.vision)
        embedded = vlm.splice(inputs["ids"], visual, table, token, counts=counts)
        text = {name: inputs[name] for name in ("mask", "labels", "segments") if name in inputs}
        return {"inputs_embeds": embedded} | text
    if "pixel_values" in inputs:
        # Preprocessing gives float32, and a convolution wants the dtype of its weights.
        inputs["pixel_values"] = inputs["pixel_values"].to(chat.dtype)
    return inputs


def token_table(chat: Chat) -> str:
    """The name of the weight of the model's token table [v, d]."""
    module: Any = chat.skeleton.module
    # By identity: architectures call it by different names, and a tied one is also the head.
    table = module.get_input_embeddings().weight
    return next(name for name, p in module.named_parameters() if p is table)


def _placeholder_id(chat: Chat, vision: Vision) -> int:
    return chat.tokenizer.convert_tokens_to_ids(vision.placeholder.token)


# Losses and answers -----------------------------------------------------------------------------------------
def loss_sum(
    chat: Chat,
    skeleton: skeletons.Skeleton,
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    *,
    params: Tree | None = None,
    logits: int = 256,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of the trained tokens of a (micro-)batch, and their number.

    Args:
        skeleton: the chat's, or `skeletons.checkpointed` of it.
        params: as of `model_inputs`.
        logits: tokens whose logits exist at a time.
    """
    return vlm.answer_loss(skeleton, weights, model_inputs(chat, weights, batch, params), chunk=logits)


def mean_loss(
    chat: Chat, weights: Mapping[str, Tensor], data: Encoded, size: int, *, params: Tree | None = None
) -> float:
    """Mean loss over all trained tokens, `size` conversations at a time.

    Processes that train together must all call it: each computes its share of the batches.
    """
    total, tokens = 0.0, 0
    starts = range(0, len(data.samples), size)
    for number, counts in track(processes.share_batches(len(starts)), "computing the loss, batch"):
        rows = range(starts[number], min(starts[number] + size, len(data.samples)))
        with torch.no_grad():
            loss, count = loss_sum(chat, chat.skeleton, weights, make_batch(chat, data, rows), params=params)
        # Weighted by tokens: a mean of the batches' means would give answers in short batches more weight.
        if counts:
            total, tokens = total + float(loss), tokens + int(count)
    sums = processes.sum_over_processes(torch.tensor([total, tokens], dtype=torch.float64))
    total, tokens = sums.tolist()
    return total / tokens


def generate_answers(
    chat: Chat,
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    sampling: Sampling,
    *,
    params: Tree | None = None,
    **options: Any,
) -> Generated:
    """Answers to the prompts of a batch.

    Args:
        weights: also with adapters of weights per sample, which must be for the rows of this batch.
        batch: from `make_batch(..., side="left")`.
        sampling: from `sampling_of`.
        params: as of `model_inputs`.
        options: `allowed`, `on_token`, `on_step` and `gen` of `generate.generate`.
    """
    with torch.no_grad():
        inputs = model_inputs(chat, weights, batch, params)
    # Prompts have no trained tokens.
    inputs.pop("labels", None)
    return generate.generate(sampling, chat.skeleton, weights, inputs, tok=chat.tokenizer, **options)


def likeliest_letters(
    chat: Chat,
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    options: Sequence[choices.Options],
    *,
    params: Tree | None = None,
) -> list[str]:
    """The letter of each prompt's likeliest option.

    Args:
        batch: from `make_batch(..., side="left")`.
        options: of each row; rows may have different numbers of them.
        params: as of `model_inputs`.
    """
    with torch.no_grad():
        inputs = model_inputs(chat, weights, batch, params)
    inputs.pop("labels", None)
    letter_ids = []
    for row_options in options:
        letters = choices.letter_options(row_options)
        # No start token, since the letter goes on behind a prompt; a list, as some tokenizers make two tokens
        # of it.
        letter_ids.append([chat.tokenizer(x, add_special_tokens=False)["input_ids"] for x in letters])
    scores, _ = likelihood.score_options(chat.skeleton, weights, inputs, letter_ids)
    return choices.letters_by_likelihood(scores.tolist(), options)


def sampling_of(chat: Chat, max_tokens: int) -> Sampling:
    """Greedy decoding as this model and its template want it.

    An answer ends with the tokens of generation_config.json (of the model's config where it has none), with
    the one that the template puts behind answers, and with the tokenizer's end token. The repetition
    penalty is generation_config's, unless chat.repetition_penalty says another.
    """
    cfg, tok, generation = chat.cfg, chat.tokenizer, chat.skeleton.generation
    model_config: Any = chat.skeleton.module.config
    # Models without a generation_config.json say it in their config; that of a vision-language model has it
    # inside its text_config.
    of_model = generation.get("eos_token_id", model_config.get_text_config().eos_token_id)
    ends = {tok.eos_token_id}
    # Llama 3 and Qwen name several.
    ends |= {*of_model} if isinstance(of_model, list | tuple) else {of_model}
    # The template's own: files of Qwen's base models end with <|endoftext|>, ChatML ends an answer with
    # <|im_end|>.
    ends |= {*encoding.end_ids(tok, conversation_format(cfg))}
    if ends == {None}:
        _log.warning(
            "%s: no token ends an answer, so answers run to their limit; name one in chat.end",
            chat.skeleton.name,
        )
    # Both 0 and null mean: not set.
    penalty = cfg.repetition_penalty or generation.get("repetition_penalty") or 1.0
    return Sampling(
        max_tokens=max_tokens,
        end=tuple(sorted(end for end in ends if end is not None)),
        repetition_penalty=float(penalty),
    )


# Files ------------------------------------------------------------------------------------------------------
def save_chat(chat: Chat, params: Mapping[str, Tensor], folder: PathLike) -> None:
    """Write weights, config, tokenizer and image settings as transformers has them.

    `ModelConfig(name=folder)` opens it again. The chat template is the one that the chat was trained
    with, chat.options in it as its defaults; a generation_config.json that the model came with is kept.

    Raises:
        ValueError: as `saving.save_skeleton`.
    """
    with new_folder(folder) as tmp:
        saving.save_skeleton(chat.skeleton, params, tmp)
        save_tokenizer(chat, tmp)
        if chat.vision is not None and chat.vision.preprocessor:
            text = json.dumps(chat.vision.preprocessor, indent=1) + "\n"
            write_text(tmp / "preprocessor_config.json", text)


def save_tokenizer(chat: Chat, folder: Path) -> None:
    """Write the tokenizer with the chat template of the conversations, chat.options in it as its defaults."""
    # A copy: the template that is written has the options in it, and the chat's own goes on without.
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.chat_template = template_text(tokenizer, conversation_format(chat.cfg))
    tokenizer.save_pretrained(folder)
