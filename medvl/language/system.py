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
from medvl.base.tree import Tree, flatten, unflatten
from medvl.evaluation.choices import Options
from medvl.hub import skeletons
from medvl.language import cached_forward, chat, encoding, vlm
from medvl.language.chat import Chat, Dialogue, Encoded, ModelConfig
from medvl.language.sampling import Sampling
from medvl.training import estimate, gradients, order, stages
from medvl.training.record import Stage, TrainConfig, stage_training
from medvl.weights import lazy, lora, shards

_TOKENISED = 1000  # conversations for an estimate of memory
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


@frozen(kw_only=True, eq=False)
class Tasks:
    """Language models that share weights, each with a vision and an adapter of its own."""

    models: Mapping[str, LanguageModel]  # by task; all of one record
    # (all parameters, task) -> those of the task's model, by the names that `model_weights` and its vision
    # read; the same tensors, so that gradients reach them
    select: Callable[[Params, str], Params]


def one_task(model: LanguageModel) -> Tasks:
    """A language model alone, as a task without a name."""
    return Tasks(models={"": model}, select=lambda params, task: params)


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
        cfg: a record with seed, model, chat, train, and lora, unless `extend` adds adapters of its own.
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
    if opened.dtype == torch.float16:
        raise ValueError(
            "model.dtype 'float16' is for answers alone, small gradients are 0 in it; train in bfloat16"
        )
    params: Tree = {"model": weights}
    if extend is not None:
        opened, params = extend(opened, params, gen)
    adapter = None
    if hasattr(cfg, "lora"):
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

    def validated(stage: Stage) -> dict[str, Encoded]:
        conversations = valid(stage)
        return {} if conversations is None else {"": conversations}

    return fit_tasks(one_task(model), params, lambda stage: {"": data(stage)}, validated, folder, log)


def validation_loss(model: LanguageModel, data: Encoded, params: Params) -> float:
    """Mean loss over all trained tokens of conversations."""
    weights = model_weights(model, params)
    return chat.mean_loss(model.chat, weights, data, model.cfg.evaluate.batch, params=params)


# Several tasks on shared weights ------------------------------------------------------------------------------
def fit_tasks(
    tasks: Tasks,
    params: Params,
    data: Callable[[Stage], Mapping[str, Encoded]],
    valid: Callable[[Stage], Mapping[str, Encoded]],
    folder: Path,
    log: Callable[[str], None] = print,
) -> Params:
    """`fit_model` of several tasks. Each micro-batch is of one task and computed with the weights of that.

    Args:
        data: stage -> {task: conversations} it is trained on; a batch is drawn from all of them alike.
        valid: stage -> {task: conversations}; the mean of the tasks' losses counts, {} keeps its last state.
    """
    first = next(iter(tasks.models.values()))
    train, seed = first.train, first.cfg.seed

    def validation(stage: Stage) -> Callable[[Params], float] | None:
        parts = valid(stage)
        return partial(_mean_task_loss, tasks, parts) if parts else None

    params = stages.shard_params(train, params)  # bound to this name, so that nothing here holds the whole
    if shards.any_sharded(params):
        for stage in train.stages:
            for task, part in (*data(stage).items(), *valid(stage).items()):
                _check_images(tasks.models[task], part, stage.name)
    if train.packing:
        for task, model in tasks.models.items():
            vlm.check_packing(model.chat.skeleton, shards.lazy_shards(tasks.select(params, task)["model"]))
    return stages.fit_stages(
        train,
        params,
        task_loss(tasks),
        lambda stage: _task_batches(tasks, data(stage), stage_training(train, stage), seed),
        folder,
        cut=partial(task_micro_batch, tasks),
        conversations=lambda stage: sum(len(part.samples) for part in data(stage).values()),
        validate=validation,
        seed=seed,
        log=log,
    )


def _check_images(model: LanguageModel, data: Encoded, stage: str) -> None:
    """Refuse texts among images for a model with a vision encoder of its own whose weights lie in parts: a process
    without images would not run it, and others would wait for its parts."""
    seen = [bool(sample.visual) for sample in data.samples]
    if model.chat.vision is not None and model.chat.vision.embed is None and len({*seen}) > 1:
        place = data.conversations[seen.index(False)].place
        raise ValueError(
            f"stage {stage}: with train.shard, all conversations or none must have images, found {seen.count(False)} "
            f"of {len(seen)} without, first {place}; leave them out, or train with shard = false"
        )


def task_loss(tasks: Tasks) -> Callable[[Params, Mapping[str, Tensor]], tuple[Tensor, Tensor, gradients.Aux]]:
    """`loss_function` of whatever task a micro-batch is of."""
    losses = {task: loss_function(model) for task, model in tasks.models.items()}

    def loss(params: Params, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, gradients.Aux]:
        task = _task_of(tasks, batch)
        return losses[task](tasks.select(params, task), batch)

    return loss


def mark_task(tasks: Tasks, task: str, batch: Any) -> Any:
    """A batch, or a list of micro-batches, that says which task it is of: by "task", its number."""
    number = torch.tensor([*tasks.models].index(task))  # a batch holds tensors only
    if isinstance(batch, list):
        return [piece | {"task": number} for piece in batch]
    return batch | {"task": number}


def _task_of(tasks: Tasks, batch: Mapping[str, Tensor]) -> str:
    # Of one task alone batches say nothing.
    return [*tasks.models][int(batch["task"]) if "task" in batch else 0]


def task_micro_batch(tasks: Tasks, batch: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """`chat.micro_batch` of a batch of one task."""
    part = chat.micro_batch(tasks.models[_task_of(tasks, batch)].chat, batch, rows)
    return part | {"task": batch["task"]} if "task" in batch else part


def _task_batches(
    tasks: Tasks, parts: Mapping[str, Encoded], train: TrainConfig, seed: int
) -> Callable[[int], Any]:
    """i -> this process's share of batch i. Of several tasks it is a list of micro-batches, each of one."""
    if len(parts) == 1:
        ((task, data),) = parts.items()
        opened = tasks.models[task].chat
        batch_at = chat.training_batches(
            opened, data, train.batch, seed, tokens=train.tokens, packing=train.packing
        )
        return batch_at if task == "" else lambda i: mark_task(tasks, task, batch_at(i))
    # Every sample of every task is a group of its own, as in `chat.training_batches`.
    samples = [(task, row) for task, data in parts.items() for row in range(len(data.samples))]
    names = [f"{task} {row}" for task, row in samples]
    rank, world = processes.rank(), processes.world_size()
    share = order.batch_indices(names, train.batch, seed, rank=rank, world=world)
    lengths = {task: [len(sample.ids) for sample in data.samples] for task, data in parts.items()}

    def micro_batches(i: int) -> list[dict[str, Tensor]]:
        drawn = [samples[index] for index in share(i)]
        batch = list[dict[str, Tensor]]()
        for task, data in parts.items():
            rows = [row for other, row in drawn if other == task]
            pieces: list[order.MicroBatch] = [
                [(row,) for row in piece] for piece in _batches(rows, train.chunk)
            ]
            if train.tokens:
                pieces = order.split_by_tokens(rows, lengths[task], train.tokens, packing=train.packing)
            make = partial(chat.make_micro_batch, tasks.models[task].chat, data, packing=train.packing)
            batch += mark_task(tasks, task, [make(piece) for piece in pieces])
        return batch

    return micro_batches


def _mean_task_loss(tasks: Tasks, parts: Mapping[str, Encoded], params: Params) -> float:
    # Over tasks and not over tokens: a picture has a hundred times the tokens of an answer.
    losses = [
        validation_loss(tasks.models[task], data, tasks.select(params, task)) for task, data in parts.items()
    ]
    return sum(losses) / len(losses)


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
    conversations = _longest(conversations)
    loss, cut = loss_function(model), partial(chat.micro_batch, model.chat)
    steps = {}
    for stage in model.train.stages:
        train = stage_training(model.train, stage)
        rows = stages.estimate_rows(train, number_of_processes)
        # The longest conversations: memory must be enough for the worst batch, not for a usual one.
        batch = chat.fullest_batch(
            model.chat, conversations, rows, item, tokens=train.tokens, packing=train.packing
        )
        seed = model.cfg.seed
        steps[stage.name] = stages.estimate_step(
            train, stage, params, loss, cut, batch, seed=seed, processes=number_of_processes
        )
    return steps


def estimate_answers(
    model: LanguageModel, params: Params, prompts: Encoded, rows: Sequence[int], new_tokens: int
) -> dict[str, int]:
    """Bytes by part at the peak of a batch of answers, on tensors without storage: weights and adapter, and what the
    prompt and one token behind it take, with the cache for all of them. Kernels' scratch memory is not seen.

    Args:
        params: on any device; nothing is computed with them.
    """
    meta: Params = {}
    for part, weights in params.items():
        meta[part] = unflatten(lazy.move_params(flatten(weights), "meta"))
    if model.adapter is not None:
        model = evolve(model, adapter=evolve(model.adapter, factors=meta["lora"]))
    batch = chat.make_batch(model.chat, prompts, rows, side="left")

    def answer() -> None:
        with torch.no_grad():
            weights = model_weights(model, meta)
            inputs = chat.model_inputs(model.chat, weights, batch, meta)
            inputs.pop("labels", None)
            call = vlm.model_inputs(model.chat.skeleton, inputs, torch.device("meta"))
            model.chat.skeleton.run(weights, partial(_write_two, call, new_tokens))

    peak = estimate.peak_of(answer, {"weights": meta["model"], "adapter": meta.get("lora", {})})
    return {part.replace(" and gradients", "_and_cache"): size for part, size in peak.items()}


def _write_two(call: Mapping[str, Any], new_tokens: int, module: torch.nn.Module) -> None:
    """The first token, and a second one, whose step has the cache with all its room."""
    decoding = cached_forward.start_decoding(module, call, new_tokens - 1)
    if new_tokens > 1:
        cached_forward.decode_tokens(module, decoding, decoding.logits.argmax(-1))


def _longest(conversations: Sequence[Dialogue]) -> Sequence[Dialogue]:
    """At most 1,000 conversations, those with the most to show and to read: to tokenise a million takes minutes."""
    if len(conversations) <= _TOKENISED:
        return conversations

    def size(conversation: Dialogue) -> int:
        characters = sum(len(message["content"]) for message in conversation.messages)
        # An image has about as many tokens as 4,000 characters.
        return characters + 4000 * len(conversation.items)

    return sorted(conversations, key=size, reverse=True)[:_TOKENISED]


def device_of(train: TrainConfig) -> torch.device:
    """Where a record trains."""
    return processes.choose_device(train.device)
