"""How tune runs: its data put in place and looked at, its stages trained, its answers scored, its memory foretold."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import evolve

from medvl.base import config, files, processes
from medvl.base.display import track
from medvl.base.progress import run_batches
from medvl.base.tree import Tree, flatten, split_tree
from medvl.evaluation import plots, report
from medvl.evaluation.accuracy import accuracy, accuracy_by_category, to_results
from medvl.evaluation.answers import same_answer
from medvl.evaluation.results import Result
from medvl.hub.checkpoints import new_folder
from medvl.hub.hlora_files import write_hlora
from medvl.hub.peft_files import write_adapter
from medvl.language import chat, generate
from medvl.language import encoding as conversations
from medvl.language.chat import Encoded
from medvl.language.conversations import Conversation, check_gold, read_conversations, warn_of_one_file
from medvl.phantoms import pictures
from medvl.systems.tune import record
from medvl.systems.tune.record import Config, Model
from medvl.training import stages
from medvl.weights import lora

SPLITS = ("train", "valid", "test")


def prepare(cfg: Config, log: Callable[[str], None] = print) -> None:
    """Put the data in place: pictures are drawn, files must be there.

    Raises:
        ValueError: lists every file that is missing.
    """
    if cfg.data.source == "phantoms":
        drawn = pictures.draw_pictures(cfg.data.phantoms, folder_of(cfg))
        log(
            f"{sum(drawn.values())} pictures drawn in {folder_of(cfg)}: "
            + ", ".join(f"{n} {split}" for split, n in drawn.items())
        )
    missing = [path(cfg, name) for name in SPLITS if not path(cfg, name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing: {', '.join(map(str, missing))}. Each is JSON lines of conversations "
            '({"messages": [{"role": "user", "content": "<image>..."}, ...], "images": [...]}); data.conversations says where they are'
        )
    warn_of_one_file(cfg.data.conversations)


def folder_of(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; pictures of one PictureConfig share one."""
    drawn = cfg.data.source == "phantoms"
    return (
        Path(cfg.data.folder) / f"pictures-{config.record_digest(cfg.data.phantoms)}"
        if drawn
        else Path(cfg.data.folder)
    )


def path(cfg: Config, name: str) -> Path:
    """Where a split's conversations are."""
    return Path(
        config.fill_pattern(cfg.data.conversations, "data.conversations", folder=folder_of(cfg), split=name)
    )


def read(cfg: Config, name: str) -> list[Conversation]:
    """The conversations of a split; in those of the test split the last answer, which is compared, holds a word."""
    conversations = read_conversations(
        path(cfg, name), root=cfg.data.root or None, max_images=cfg.chat.max_images
    )
    if name == "test":
        check_gold(conversations)
    return conversations


# Training -------------------------------------------------------------------------------------------------------------------------------
def fit(cfg: Config, folder: Path, log: Callable[[str], None] = print) -> tuple[Model, Tree, Tree]:
    """Train (or go on with) all stages in the run folder; returns the model, its weights and no running means."""
    held = read(cfg, "train")
    model, params = record.init(
        cfg,
        folder,
        [m["content"] for c in held for m in c.messages],
        device=processes.choose_device(cfg.train.device),
    )
    data, valid = (
        chat.encode_conversations(model.chat, held),
        chat.encode_conversations(model.chat, read(cfg, "valid")[: cfg.train.valid or None]),
    )
    check_test(model)
    tokens = sum(len(s.ids) for s in data.samples)
    log(
        f"{len(data.samples)} conversations of {tokens:,} tokens; {data.refused} more are longer than the context and left out"
    )
    if model.adapter is not None:
        own, base, share = lora.count_adapter(model.adapter, params["model"])
        log(
            f"adapter: {own:,} numbers on {len(model.adapter.factors)} layers, {share:.2f} % of {own + base:,}"
        )
    params = stages.shard_params(cfg.train, params)  # so that nothing here holds the whole
    params = stages.fit_stages(
        cfg.train,
        params,
        record.loss_of(model),
        lambda stage: chat.training_batches(model.chat, data, cfg.train.batch, cfg.seed),
        folder,
        cut=partial(chat.micro_batch, model.chat),
        conversations=lambda stage: len(data.samples),
        validate=lambda stage: (
            lambda p: chat.mean_loss(model.chat, record.weights_of(model, p), valid, cfg.evaluate.batch)
        ),
        seed=cfg.seed,
        log=log,
    )
    if processes.rank() == 0:
        write_results(model, params, folder, log)
    processes.wait_for_all()
    return model, params, {}


def check_test(model: Model) -> None:
    """Raise at what evaluation would stop at, before the training: faults of the test split, and no room for its answers."""
    conversations = read(model.cfg, "test")
    chat.encode_conversations(model.chat, conversations)
    prompts = chat.encode_conversations(model.chat, conversations, prompt=True)
    longest = max(len(sample.ids) for sample in prompts.samples)
    generate.check_length(
        chat.sampling_of(model.chat, model.cfg.evaluate.max_tokens), model.chat.skeleton, longest
    )


def write_results(model: Model, params: Tree, folder: Path, log: Callable[[str], None] = print) -> None:
    """Write what other programs open: the trained model as a Hugging Face folder, the adapter as a PEFT folder, each with its tokenizer.

    `folder`/model is written where a stage trains the model, or where the model has no name to be found by; `folder`/adapter where there is
    an adapter (one with experts as HealthGPT's file, because peft has no place for routers). What is there already is kept: the same
    record trains the same weights.
    """
    cfg, home = model.cfg, folder / "model"
    trained = any(
        name.startswith("model/")
        for stage in cfg.train.stages
        for name in flatten(split_tree(params, stage.train)[0])
    )
    if (trained or not cfg.model.name) and not home.exists():
        chat.save_chat(model.chat, params["model"], home)
        log(f"the model, for transformers and for model.name: {home}")
    out = folder / "adapter"
    if model.adapter is None or out.exists():
        return
    adapter = evolve(model.adapter, factors=params["lora"])
    base = str(home) if home.exists() else cfg.model.name
    with new_folder(out) as tmp:
        if cfg.lora.experts:
            write_hlora(adapter, tmp / "hlora.safetensors")
        else:
            write_adapter(adapter, tmp, base=base)
        chat.save_tokenizer(model.chat, tmp)
    kind = "H-LoRA in HealthGPT's format" if cfg.lora.experts else "for peft"
    log(f"the adapter, {kind}, on {base}: {out}")


def load(folder: Path) -> tuple[Model, Tree, Tree]:
    """Model and weights of a trained run, as `fit` returned them.

    Raises:
        ValueError: no run, one that is not trained to its end, or whose files are broken.
    """
    cfg = config.load_run(folder, Config)
    model, params = record.init(cfg, folder, device=processes.choose_device(cfg.train.device))
    params = stages.read_stages(cfg.train, params, folder)
    return model, params, {}


# Evaluation -----------------------------------------------------------------------------------------------------------------------------
def assess(
    model: Model, params: Tree, means: Tree, folder: Path, experiment: str
) -> tuple[list[Result], Path]:
    """Answer the last question of every test conversation; writes answers, results and the report into `folder`."""
    cfg, held = model.cfg, read(model.cfg, "test")
    lines = answer_conversations(model, params, held, folder / "answers.unfinished.jsonl")
    files.write_text(
        folder / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    (folder / "answers.unfinished.jsonl").unlink()
    gold = [line["gold"] for line in lines]
    right = [line["right"] for line in lines]
    kinds = [line["category"] for line in lines]
    if any(kinds):
        kinds = [kind or "without a category" for kind in kinds]
    gen, each = torch.Generator().manual_seed(cfg.seed), range(len(right))
    found = {"all": accuracy(right, each, n=cfg.evaluate.bootstrap, gen=gen)}
    if all(kinds):
        found |= accuracy_by_category(right, kinds, each, n=cfg.evaluate.bootstrap, gen=gen)
    rows = to_results(found, split="test", experiment=experiment)
    loss = chat.mean_loss(
        model.chat,
        record.weights_of(model, params),
        chat.encode_conversations(model.chat, held),
        cfg.evaluate.batch,
    )
    usual = max(set(gold), key=gold.count)
    like: dict[str, Any] = {"split": "test", "n": len(held), "experiment": experiment}
    rows.append(
        Result(
            what="accuracy_of_the_usual_answer", subject="all", value=gold.count(usual) / len(gold), **like
        )
    )
    rows.append(Result(what="token_loss", subject="all", value=loss, **like))
    last = folder.parent / f"{len(cfg.train.stages) - 1}-{cfg.train.stages[-1].name}" / "metrics.jsonl"
    notes = (
        "An answer is right when it says the same as the written one in the same words, side and negation included; greedy decoding.",
    )
    return rows, report.write_report(
        folder, f"{experiment}: answers", rows, plots.training_curves(last), notes
    )


def answer_conversations(
    model: Model, params: Tree, conversations: Sequence[Conversation], path: Path
) -> list[dict[str, Any]]:
    """A line for each conversation: its answer, the written one, and whether they say the same.

    Lines are written to `path` batch by batch, so that those of earlier batches are kept where a later one fails. What an earlier
    evaluation left there is written over: it may be of other weights.
    """
    data = chat.encode_conversations(model.chat, conversations, prompt=True)
    weights, size = record.weights_of(model, params), model.cfg.evaluate.batch
    batches = [range(i, min(i + size, len(conversations))) for i in range(0, len(conversations), size)]

    def answer_batch(rows: Sequence[int]) -> list[dict[str, Any]]:
        texts = _answers(model, weights, data, rows)
        return [_line(conversations[row], text) for row, text in zip(rows, texts, strict=True)]

    path.unlink(missing_ok=True)
    lines = run_batches(path, batches, answer_batch, title="answering")
    return [{key: value for key, value in line.items() if key != "row"} for line in lines]


def _line(conversation: Conversation, text: str) -> dict[str, Any]:
    gold, category = conversation.messages[-1]["content"], str(conversation.extra.get("category", ""))
    return {
        "id": conversation.id,
        "category": category,
        "answer": text,
        "gold": gold,
        "right": same_answer(text, gold),
    }


def ask(folder: Path, text: str, images: Sequence[files.PathLike] = (), most: int = 256) -> str:
    """The answer of a trained run to one question about images, or none; for research, not for diagnosis.

    Args:
        most: tokens of the answer.
    Raises:
        ValueError: no such run, or one that is not trained to its end; no question; an image that cannot be read, or that the model
            cannot see.
    """
    model, params, _ = load(folder)
    data = chat.encode_conversations(model.chat, [chat.make_question(model.chat, text, images)], prompt=True)
    cfg = evolve(model.cfg, evaluate=evolve(model.cfg.evaluate, max_tokens=most))
    return answer(evolve(model, cfg=cfg), params, data)[0]


def answer(model: Model, params: Tree, data: Encoded) -> list[str]:
    """Greedy answers to prompts."""
    weights, size = record.weights_of(model, params), model.cfg.evaluate.batch
    texts = list[str]()
    for i in track(range(0, len(data.samples), size), "answering, batch"):
        texts += _answers(model, weights, data, range(i, min(i + size, len(data.samples))))
    return texts


def _answers(
    model: Model, weights: dict[str, torch.Tensor], data: Encoded, rows: Sequence[int]
) -> Sequence[str]:
    batch = chat.make_batch(model.chat, data, rows, side="left")
    sampling = chat.sampling_of(model.chat, model.cfg.evaluate.max_tokens)
    return chat.generate_answers(model.chat, weights, batch, sampling).texts


# Before a run ---------------------------------------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training conversation as the model gets it, the trained tokens marked."""
    held = read(cfg, "train")
    if not 0 <= number < len(held):
        raise ValueError(f"labels: sample must be below {len(held)}, got {number}")
    model, _ = record.init(
        cfg, folder, [m["content"] for c in held for m in c.messages], device=torch.device("meta")
    )
    samples = chat.encode_conversations(
        model.chat, held[number : number + 1]
    ).samples  # of reasoning models one for each answer
    return "\n\n".join(conversations.show_sample(model.chat.tokenizer, sample) for sample in samples)


def memory(cfg: Config, folder: Path, processes: int = 1) -> dict[str, dict[str, int]]:
    """{stage: {part: bytes}} that one of so many processes will need on its device: a step of the run, on tensors without storage.

    Where the data is there, its longest conversations are the batch; otherwise the whole context is trained text.
    """
    there = path(cfg, "train").exists()
    held = read(cfg, "train") if there else []
    model, params = record.init(
        cfg, folder, [m["content"] for c in held for m in c.messages], device=torch.device("meta")
    )
    batch, loss = (
        chat.fullest_batch(model.chat, held, stages.estimate_rows(cfg.train, processes)),
        record.loss_of(model),
    )
    foretold = partial(stages.estimate_memory, seed=cfg.seed, processes=processes)
    return {
        s.name: foretold(cfg.train, s, params, loss, partial(chat.micro_batch, model.chat), batch)
        for s in cfg.train.stages
    }
