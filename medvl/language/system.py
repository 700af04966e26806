"""What all language systems share: a chat with its adapter is trained, validated, asked and estimated.

A language system is then its record, its `Vision`, its data and its report.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Generator, Tensor

from medvl.base import processes
from medvl.base.display import track
from medvl.base.progress import run_batches
from medvl.base.tree import Tree
from medvl.evaluation.choices import Options
from medvl.hub import skeletons
from medvl.language import chat, encoding, vlm
from medvl.language.chat import Chat, Dialogue, Encoded, ModelConfig
from medvl.language.sampling import Sampling
from medvl.training import estimate, gradients, stages
from medvl.training.record import Stage, TrainConfig
from medvl.weights import lora, shards

_UNFINISHED = ".unfinished.jsonl"  # end of the name of answers that are kept until all are there
Params = (
    Tree  # {"model": {name: weight}, "lora": factors where there is an adapter, and what the system adds}
)


@frozen(kw_only=True, eq=False)
class LanguageModel:
    """Everything of a language model in training that is not a weight."""

    cfg: Any  # the system's record; its `seed` and `evaluate.batch` are read here
    chat: Chat
    adapter: lora.Adapter | None  # names, kinds and scales; the factors are in the params
    train: TrainConfig


def init_model(
    cfg: Any,
    folder: Path,
    texts: Sequence[str] = (),
    *,
    device: torch.device = torch.device("cpu"),
    lower: bool = True,
    extend: Callable[[Chat, Tree, Generator], tuple[Chat, Tree]] | None = None,
) -> tuple[LanguageModel, Params]:
    """The model and its starting weights.

    Args:
        cfg: a record with seed, model, chat, lora and train.
        folder: of the run; a tokenizer trained on `texts` is kept there and taken from there the next time.
        device: where the weights are; "meta" makes none, for an estimate.
        lower: a tokenizer that is trained makes capitals small.
        extend: adds what the system has besides: another vision, other params. It draws from the generator
            between the model and the adapter.
    Raises:
        ValueError: as `chat.open_chat`; a stage that trains what is not there.
    """
    # One generator for model, extension and adapter, in this order: another order would be other weights.
    gen = Generator().manual_seed(cfg.seed)
    tok = chat.tokenizer_of(cfg.model, folder, texts, lower=lower)
    opened, weights = chat.open_chat(cfg.model, cfg.chat, tok, gen, device=device, shard=cfg.train.shard)
    params: Tree = {"model": weights}
    if extend is not None:
        opened, params = extend(opened, params, gen)
    adapter = stages.init_trained_adapter(cfg.train, cfg.lora, opened.skeleton, gen, device)
    added = {key: tree for key, tree in params.items() if key != "model"}
    if adapter is not None:
        added["lora"] = adapter.factors
    added = stages.cast_added(cfg.train, added, opened.dtype)
    if adapter is not None:
        adapter = evolve(adapter, factors=added["lora"])  # the same tensors, not a second copy
    params = params | added
    # All stages before the first begins: a wrong pattern of the last would show after days of training.
    for stage in cfg.train.stages:
        stages.check_trainable(stage, params)
    return LanguageModel(cfg=cfg, chat=opened, adapter=adapter, train=cfg.train), params


def check_quantized(model: ModelConfig, train: TrainConfig, instead: str) -> None:
    """Raise where 4 bits freeze all that the stages train.

    Args:
        instead: what can be trained, for the message.
    """
    if model.quantize != "none" and all(p.startswith("model/") for p in train.patterns):
        raise ValueError(f"model.quantize {model.quantize!r} freezes the model; {instead}")


# Training ---------------------------------------------------------------------------------------------------
def model_weights(model: LanguageModel, params: Params, *, train: bool = False) -> dict[str, Tensor]:
    """The weights that the skeleton is called with: shards to be gathered, the adapter on them.

    Args:
        train: with the adapter's dropout.
    """
    base = shards.lazy_shards(params["model"])
    if model.adapter is None:
        return base
    return lora.apply_lora(base, evolve(model.adapter, factors=params["lora"]), train=train)


def loss_function(
    model: LanguageModel,
) -> Callable[[Params, Mapping[str, Tensor]], tuple[Tensor, Tensor, gradients.Aux]]:
    """(all parameters, batch) -> sum of the losses of its trained tokens, and their number."""
    skeleton = model.chat.skeleton
    # For training only: generation needs the cache, which checkpointed layers leave empty.
    if model.train.checkpoint:
        skeleton = skeletons.checkpointed(skeleton)

    def loss(params: Params, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, gradients.Aux]:
        weights = model_weights(model, params, train=True)
        total, tokens = chat.loss_sum(
            model.chat, skeleton, weights, batch, params=params, logits=model.train.logits
        )
        return total, tokens, gradients.Aux()

    return loss


def fit_model(
    model: LanguageModel,
    params: Params,
    data: Callable[[Stage], Encoded],
    valid: Callable[[Stage], Encoded | None],
    folder: Path,
    log: Callable[[str], None] = print,
) -> Params:
    """Train all stages, or go on with them, in folders of their own; returns all parameters.

    Args:
        data: stage -> the conversations it is trained on.
        valid: stage -> those its validation loss is taken over; None keeps its last state.
    """

    def validation(stage: Stage) -> Callable[[Params], float] | None:
        conversations = valid(stage)
        if conversations is None:
            return None
        return partial(validation_loss, model, conversations)

    train, seed = model.train, model.cfg.seed
    params = stages.shard_params(train, params)  # bound to this name, so that nothing here holds the whole
    if train.packing:
        vlm.check_packing(model.chat.skeleton, shards.lazy_shards(params["model"]))
    return stages.fit_stages(
        train,
        params,
        loss_function(model),
        lambda stage: chat.training_batches(
            model.chat, data(stage), train.batch, seed, tokens=train.tokens, packing=train.packing
        ),
        folder,
        cut=partial(chat.micro_batch, model.chat),
        conversations=lambda stage: len(data(stage).samples),
        validate=validation,
        seed=seed,
        log=log,
    )


def validation_loss(model: LanguageModel, data: Encoded, params: Params) -> float:
    """Mean loss over all trained tokens of conversations."""
    weights = model_weights(model, params)
    return chat.mean_loss(model.chat, weights, data, model.cfg.evaluate.batch, params=params)


# Answers ----------------------------------------------------------------------------------------------------
def answer_prompts(
    model: LanguageModel,
    params: Params,
    prompts: Encoded,
    sampling: Sampling,
    *,
    size: int,
    options: Sequence[Options] = (),
    path: Path | None = None,
) -> list[str]:
    """Answers to prompts, in their order.

    Args:
        sampling: of text, from `chat.sampling_of`.
        size: prompts answered at a time.
        options: of each prompt; where there are some the answer is the likeliest letter, and the text where
            there are none. () = text everywhere.
        path: answers are kept there batch by batch, and those that are kept are not computed again. Its
            name must stand for all that decides them, see `stamp_answers`.
    Raises:
        ValueError: as `progress.run_batches`.
    """
    weights = model_weights(model, params)
    # Letters and texts are computed differently, so that no batch holds both.
    by_letter = [i for i in range(len(prompts.samples)) if options and options[i]]
    letters = {*by_letter}
    by_text = [i for i in range(len(prompts.samples)) if i not in letters]

    def answer_batch(rows: Sequence[int]) -> list[dict[str, Any]]:
        # Left, since new tokens follow the last column.
        batch = chat.make_batch(model.chat, prompts, rows, side="left")
        texts: Sequence[str]
        if rows[0] in letters:
            row_options = [options[i] for i in rows]
            texts = chat.likeliest_letters(model.chat, weights, batch, row_options, params=params)
        else:
            texts = chat.generate_answers(model.chat, weights, batch, sampling, params=params).texts
        return [{"row": row, "answer": text} for row, text in zip(rows, texts, strict=True)]

    batches = [*_batches(by_letter, size), *_batches(by_text, size)]
    if path is None:
        lines = [line for rows in track(batches, "answering, batch") for line in answer_batch(rows)]
    else:
        lines = run_batches(path, batches, answer_batch, title="answering")
    # Lines come in the order of the batches: first the letters.
    answers = {line["row"]: line["answer"] for line in lines}
    return [answers[row] for row in range(len(prompts.samples))]


def _batches(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def stamp_answers(
    model: LanguageModel,
    params: Params,
    prompts: Encoded,
    sampling: Sampling,
    items: Callable[[Any], str],
    settings: Sequence[Any] = (),
) -> str:
    """Eight hex digits of all that decides answers: weights, prompts as token ids, what they show, settings.

    Args:
        items: item of a conversation -> a digest of its content.
        settings: whatever else decides: the size of a batch changes the last bits of an answer.
    """
    vision = model.chat.vision
    preprocessor = vision.preprocessor if vision is not None else {}
    facts = [str(sampling), str(model.chat.dtype), preprocessor, [str(setting) for setting in settings]]
    content = hashlib.sha256(json.dumps([*facts, skeletons.weights_digest(params)]).encode())
    # Each once: many conversations may show the same image or slide.
    names = {item for conversation in prompts.conversations for item in conversation.items}
    digests = {item: items(item) for item in track(sorted(names), "hashing what is shown")}
    for conversation, sample in zip(prompts.conversations, prompts.samples, strict=True):
        shown = [digests[item] for item in conversation.items]
        # In the order of the prompts, since kept answers are found again by their number.
        content.update(json.dumps([sample.ids.tolist(), shown]).encode())
    return content.hexdigest()[:8]


def unfinished_answers(folder: Path, stamp: str) -> Path:
    """The file of answers that are kept until all are there, from `stamp_answers`."""
    return folder / f"answers-{stamp}{_UNFINISHED}"


def remove_unfinished_answers(folder: Path) -> None:
    """Remove the kept answers, those of other weights too, once what is made of them is written."""
    # Those with another stamp are of settings or weights that nobody goes on with.
    for path in folder.glob(f"answers*{_UNFINISHED}"):
        path.unlink()


def last_metrics(train: TrainConfig, folder: Path) -> Path:
    """The metrics.jsonl of a run's last stage."""
    return folder / f"{len(train.stages) - 1}-{train.stages[-1].name}" / "metrics.jsonl"


# Before a run -----------------------------------------------------------------------------------------------
def message_texts(conversations: Iterable[Dialogue]) -> list[str]:
    """The text of every message: what a tokenizer is trained on."""
    return [message["content"] for conversation in conversations for message in conversation.messages]


def show_labels(
    init: Callable[..., tuple[Any, Params]], conversations: Sequence[Dialogue], number: int
) -> str:
    """One training conversation as the model gets it, the trained tokens marked.

    Args:
        init: device -> (something with a `chat`, params); it is made without weights.
    Raises:
        ValueError: no conversation of this number.
    """
    if not 0 <= number < len(conversations):
        raise ValueError(f"labels: sample must be below {len(conversations)}, got {number}")
    # The device "meta" has shapes and no storage: labels are shown at once, however large the model.
    model, _ = init(device=torch.device("meta"))
    opened = model.chat
    # A conversation of a reasoning model is one sample for each answer.
    samples = chat.encode_conversations(opened, conversations[number : number + 1]).samples
    return "\n\n".join(encoding.show_sample(opened.tokenizer, sample) for sample in samples)


def estimate_steps(
    model: LanguageModel,
    params: Params,
    conversations: Sequence[Dialogue],
    number_of_processes: int = 1,
    item: Any = None,
) -> dict[str, estimate.Step]:
    """{stage: a step of one of so many processes}, on tensors without storage.

    Args:
        model, params: made on the device "meta".
        conversations, item: of `chat.fullest_batch`.
    """
    train = model.train
    rows = stages.estimate_rows(train, number_of_processes)
    # The longest conversations: memory must be enough for the worst batch, not for a usual one.
    batch = chat.fullest_batch(
        model.chat, conversations, rows, item, tokens=train.tokens, packing=train.packing
    )
    loss, cut = loss_function(model), partial(chat.micro_batch, model.chat)
    return {
        stage.name: stages.estimate_step(
            *(train, stage, params, loss, cut, batch),
            seed=model.cfg.seed,
            processes=number_of_processes,
        )
        for stage in train.stages
    }


def device_of(train: TrainConfig) -> torch.device:
    """Where a record trains."""
    return processes.choose_device(train.device)
