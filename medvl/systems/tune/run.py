"""How tune runs: its data is put in place, stages are trained, answers scored, memory estimated."""

import functools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import evolve

from medvl.base import config, files, processes
from medvl.base.tree import Tree, flatten, split_tree
from medvl.documents.page_words import add_page_words
from medvl.evaluation import plots, report
from medvl.evaluation.accuracy import accuracy, accuracy_by_category, paired_difference, to_results
from medvl.evaluation.results import Result
from medvl.evaluation.vqa import is_right
from medvl.hub.checkpoints import new_folder
from medvl.hub.hlora_files import write_hlora
from medvl.hub.peft_files import write_adapter
from medvl.language import chat, generate, system
from medvl.language.conversations import (
    Conversation,
    Reader,
    check_gold,
    read_conversations,
    warn_of_one_file,
)
from medvl.language.system import LanguageModel
from medvl.phantoms.pages import PageConfig, draw_pages
from medvl.phantoms.pictures import PictureConfig, draw_pictures
from medvl.systems.tune.record import Config
from medvl.training import stages
from medvl.training.estimate import Step
from medvl.weights import lora

SPLITS = ("train", "valid", "test")
# What can be drawn, by its settings: the name of it and (settings, folder) -> how many of each split.
_DRAWERS: dict[type, tuple[str, Callable[[Any, Path], dict[str, int]]]] = {
    PageConfig: ("pages", draw_pages),
    PictureConfig: ("pictures", draw_pictures),
}


# Data -------------------------------------------------------------------------------------------------------
def prepare(cfg: Config, log: Callable[[str], None] = print) -> Reader:
    """Put the data in place: pictures are drawn, files must be there.

    Returns:
        the reader that training and evaluation share.
    Raises:
        ValueError: lists every file that is missing.
    """
    if cfg.data.drawn is not None:
        name, draw = _DRAWERS[type(cfg.data.drawn)]
        drawn = draw(cfg.data.drawn, data_folder(cfg))
        counts = ", ".join(f"{n} {split}" for split, n in drawn.items())
        log(f"{sum(drawn.values())} {name} drawn in {data_folder(cfg)}: {counts}")
    paths = [split_path(cfg, split) for split in SPLITS]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing: {', '.join(missing)}. Each is JSON lines of conversations "
            '({"messages": [{"role": "user", "content": "<image>..."}, ...], "images": [...]}); '
            "data.conversations says where they are"
        )
    warn_of_one_file(cfg.data.conversations)
    read = split_reader(cfg)
    if cfg.chat.ocr:
        # Here, while other processes wait, so that each page is read once and by one of them.
        for split in SPLITS:
            read(split)
    return read


def data_folder(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; what is drawn by equal settings shares one."""
    if cfg.data.drawn is None:
        return Path(cfg.data.folder)
    name, _ = _DRAWERS[type(cfg.data.drawn)]
    return Path(cfg.data.folder) / f"{name}-{config.record_digest(cfg.data.drawn)}"


def split_path(cfg: Config, split: str) -> Path:
    """The file of a split's conversations."""
    pattern, folder = cfg.data.conversations, data_folder(cfg)
    return Path(config.fill_pattern(pattern, "data.conversations", folder=folder, split=split))


def read_split(cfg: Config, split: str) -> list[Conversation]:
    """The conversations of a split; those of the test split have a last answer that can be compared with."""
    path, root = split_path(cfg, split), cfg.data.root or None
    conversations = read_conversations(path, root=root, max_images=cfg.chat.max_images)
    if cfg.chat.ocr:
        conversations = add_page_words(conversations, data_folder(cfg) / "page_words", cfg.chat.window)
    if split == "test":
        check_gold(conversations)
    return conversations


def split_reader(cfg: Config) -> Reader:
    """`read_split` for the steps of one run: a split is read when it is first asked for, and then kept."""
    return functools.cache(partial(read_split, cfg))


# Training ---------------------------------------------------------------------------------------------------
def fit(
    cfg: Config, folder: Path, log: Callable[[str], None] = print, data: Reader | None = None
) -> tuple[LanguageModel, Tree]:
    """Train all stages in the run folder, or go on with them.

    Args:
        data: from `prepare`; None = the files are read here.
    """
    read = data or split_reader(cfg)
    train = read("train")
    device = system.device_of(cfg.train)
    # Where the model has no tokenizer, one is made: of the training split alone, not of what is scored.
    model, params = system.init_model(cfg, folder, system.message_texts(train), device=device)
    encoded = chat.encode_conversations(model.chat, train)
    # train.valid = 0 means all: a slice that ends at None keeps everything.
    encoded_valid = chat.encode_conversations(model.chat, read("valid")[: cfg.train.valid or None])
    check_test(model, read("test"))
    tokens = sum(len(sample.ids) for sample in encoded.samples)
    log(
        f"{len(encoded.samples)} conversations of {tokens:,} tokens; {encoded.refused} more are longer than "
        "the context and left out"
    )
    if model.adapter is not None:
        own, base, share = lora.count_adapter(model.adapter, params["model"])
        layers = len(model.adapter.factors)
        log(f"adapter: {own:,} numbers on {layers} layers, {share:.2f} % of {own + base:,}")
    # Bound to this name, so that nothing here holds the whole while it is trained in parts.
    params = stages.shard_params(cfg.train, params)
    # All stages of tune see the same conversations; slide_vqa has other data for each.
    params = system.fit_model(model, params, lambda stage: encoded, lambda stage: encoded_valid, folder, log)
    if processes.rank() == 0:
        export_model(model, params, folder, log)
    processes.wait_for_all()
    return model, params


def check_test(model: LanguageModel, conversations: Sequence[Conversation]) -> None:
    """Raise before training what evaluation would raise: faults of the test split, no room for answers."""
    # With their answers, as the token loss needs them, and then as prompts, as generation does.
    chat.encode_conversations(model.chat, conversations)
    prompts = chat.encode_conversations(model.chat, conversations, prompt=True)
    longest = max(len(sample.ids) for sample in prompts.samples)
    sampling = chat.sampling_of(model.chat, model.cfg.evaluate.max_tokens)
    # The longest prompt and max_tokens behind it must fit the positions of the model.
    generate.check_length(sampling, model.chat.skeleton, longest)


def export_model(
    model: LanguageModel, params: Tree, folder: Path, log: Callable[[str], None] = print
) -> None:
    """Write what other programs open: the model as a Hugging Face folder, the adapter as a PEFT folder.

    Each has its tokenizer. `folder`/model is written where a stage trains the model, or where the model has
    no name to be found by; `folder`/adapter where there is an adapter (one with experts as HealthGPT's
    file: peft has no place for routers). What is there already is kept: the same record trains the same
        weights.
    """
    cfg, model_folder = model.cfg, folder / "model"
    if (_trains_model(model, params) or not cfg.model.name) and not model_folder.exists():
        chat.save_chat(model.chat, params["model"], model_folder)
        log(f"the model, for transformers and for model.name: {model_folder}")
    adapter_folder = folder / "adapter"
    if model.adapter is None or adapter_folder.exists():
        return
    # model.adapter still holds the factors it started with; the trained ones are leaves of params.
    adapter = evolve(model.adapter, factors=params["lora"])
    # Other programs load this base before the adapter: the model of the hub is not the one trained here.
    base = str(model_folder) if model_folder.exists() else cfg.model.name
    # It takes its name when it is complete, so that a stopped process leaves no half of an adapter.
    with new_folder(adapter_folder) as tmp:
        if cfg.lora.experts:
            write_hlora(adapter, tmp / "hlora.safetensors")
        else:
            write_adapter(adapter, tmp, base=base)
        chat.save_tokenizer(model.chat, tmp)
    kind = "H-LoRA in HealthGPT's format" if cfg.lora.experts else "for peft"
    log(f"the adapter, {kind}, on {base}: {adapter_folder}")


def _trains_model(model: LanguageModel, params: Tree) -> bool:
    """Whether any stage trains weights of the model itself."""
    for stage in model.train.stages:
        # By the names they match: the regexes alone do not tell, ".*" trains the model, too.
        trained, _ = split_tree(params, stage.train)
        if any(name.startswith("model/") for name in flatten(trained)):
            return True
    return False


def load(folder: Path, record: type = Config) -> tuple[LanguageModel, Tree]:
    """Model and weights of a trained run, as `fit` returned them.

    Args:
        record: of the system.
    Raises:
        ValueError: no run, one that is not trained to its end, or whose files are broken.
    """
    cfg: Any = config.load_run(folder, record)
    # No texts: a tokenizer that was trained lies in the run folder.
    model, params = system.init_model(cfg, folder, device=system.device_of(cfg.train))
    return model, stages.read_stages(cfg.train, params, folder)


# Evaluation -------------------------------------------------------------------------------------------------
def assess(
    model: LanguageModel, params: Tree, folder: Path, experiment: str, data: Reader | None = None
) -> tuple[list[Result], Path]:
    """Answer the last question of every test conversation; writes answers and report into `folder`.

    Args:
        data: from `prepare`; None = the file is read here.
    """
    cfg = model.cfg
    read = data or split_reader(cfg)
    conversations = read("test")
    lines = answer_conversations(model, params, conversations, folder)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_text(folder / "answers.jsonl", text)
    system.remove_unfinished_answers(folder)  # all of them are in answers.jsonl now
    rows = _score(cfg, lines, experiment)
    encoded = chat.encode_conversations(model.chat, conversations)
    # Over all written answers of a conversation with the written ones before them (teacher forcing), while
    # the accuracy is of the last answer as it is generated.
    loss = system.validation_loss(model, encoded, params)
    about: dict[str, Any] = {"subject": "all", "split": "test", "n": len(lines), "experiment": experiment}
    rows.append(Result(what="token_loss", value=loss, **about))
    notes = (
        "An answer is right when it says the same as the written one in the same words, side and negation "
        "included; greedy decoding.",
    )
    # `folder` is that of the results; the metrics of training lie in the run folder around it.
    figures = plots.training_curves(system.last_metrics(cfg.train, folder.parent))
    page = report.write_report(folder, f"{experiment}: answers", rows, figures, notes)
    return rows, page


def _score(cfg: Config, lines: Sequence[dict[str, Any]], experiment: str) -> list[Result]:
    """Accuracy of all answers and of each category, and that of always giving the commonest answer."""
    right = [line["right"] for line in lines]
    categories = [line["category"] for line in lines]
    # Without any category there is no table of them; with some, the others are one of their own.
    if any(categories):
        categories = [category or "without a category" for category in categories]
    # One generator for all intervals: their order decides the draws.
    gen, groups = torch.Generator().manual_seed(cfg.seed), range(len(right))
    # Every conversation is drawn by itself: tune knows of no cases that several belong to.
    accuracies = {"all": accuracy(right, groups, n=cfg.evaluate.bootstrap, gen=gen)}
    if all(categories):
        accuracies |= accuracy_by_category(right, categories, groups, n=cfg.evaluate.bootstrap, gen=gen)
    rows = to_results(accuracies, split="test", experiment=experiment)
    gold = [line["gold"] for line in lines]
    # Which of equally common ones it is does not matter, only their number is used.
    commonest = max(set(gold), key=gold.count)
    baseline = Result(
        what="accuracy_of_the_usual_answer",
        subject="all",
        value=gold.count(commonest) / len(gold),
        split="test",
        n=len(lines),
        experiment=experiment,
    )
    return [*rows, baseline]


def answer_conversations(
    model: LanguageModel, params: Tree, conversations: Sequence[Conversation], folder: Path
) -> list[dict[str, Any]]:
    """A line for each conversation: its answer, the written one, and whether they say the same.

    Answers are kept in `folder` as they come; those that are there are not computed again, as long as all
    that decides them is the same.
    """
    prompts = chat.encode_conversations(model.chat, conversations, prompt=True)
    sampling = chat.sampling_of(model.chat, model.cfg.evaluate.max_tokens)
    size = model.cfg.evaluate.batch
    # Images count by content, as a picture may be exchanged under its name. The size of a batch counts, since
    # padding changes the last bits of an answer.
    stamp = system.stamp_answers(model, params, prompts, sampling, files.file_digest, [size])
    path = system.unfinished_answers(folder, stamp)
    answers = system.answer_prompts(model, params, prompts, sampling, size=size, path=path)
    return [_line(*pair) for pair in zip(conversations, answers, strict=True)]


def compare_answers(cfg: Config, folder: Path, other: Path) -> list[Result]:
    """How much more often the answers of a folder of results are right than those of another."""
    ours, theirs = ([line["right"] for line in read_answers(place)] for place in (folder, other))
    gen = torch.Generator().manual_seed(cfg.seed)
    difference = paired_difference(ours, theirs, range(len(ours)), n=cfg.evaluate.bootstrap, gen=gen)
    return to_results({"all": difference}, split="test")


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The lines of the answers.jsonl that `assess` wrote into a folder."""
    # Not by splitlines, which also ends a line at other characters of an answer.
    with open(folder / "answers.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _line(conversation: Conversation, answer: str) -> dict[str, Any]:
    gold = conversation.messages[-1]["content"]
    return {
        "id": conversation.id,
        "category": str(conversation.extra.get("category", "")),
        "answer": answer,
        "gold": gold,
        "right": is_right(answer, gold, conversation.options),
    }


def ask(
    folder: Path,
    text: str,
    images: Sequence[files.PathLike] = (),
    max_tokens: int = 256,
    record: type = Config,
) -> str:
    """The answer of a trained run to one question about images, or none; for research, not for diagnosis.

    Args:
        max_tokens: of the answer.
        record: of the system.
    Raises:
        ValueError: no such run, or one that is not trained to its end; no question; an image that cannot be
            read, or that the model cannot see.
    """
    model, params = load(folder, record)
    question = chat.make_question(model.chat, text, images)
    if model.cfg.chat.ocr:
        (question,) = add_page_words([question], None, model.cfg.chat.window)
    prompts = chat.encode_conversations(model.chat, [question], prompt=True)
    # Through the record, whose bounds hold for a question, too.
    sampling = chat.sampling_of(model.chat, evolve(model.cfg.evaluate, max_tokens=max_tokens).max_tokens)
    (answer,) = system.answer_prompts(model, params, prompts, sampling, size=1)
    return answer


# Before a run -----------------------------------------------------------------------------------------------
def labels(cfg: Config, folder: Path, number: int = 0) -> str:
    """One training conversation as the model gets it, the trained tokens marked."""
    conversations = read_split(cfg, "train")
    texts = system.message_texts(conversations)
    return system.show_labels(partial(system.init_model, cfg, folder, texts), conversations, number)


def memory(cfg: Config, folder: Path, processes: int = 1, data: Reader | None = None) -> dict[str, Step]:
    """{stage: a step of one of so many processes}.

    Where the data is there, its longest conversations are the batch; otherwise the whole context is trained
    text.

    Args:
        data: from `prepare`; None = the file is read here.
    """
    read = data or split_reader(cfg)
    conversations = read("train") if split_path(cfg, "train").exists() else []
    texts = system.message_texts(conversations)
    # Tensors on "meta" have shapes and no storage: the model need not fit this machine.
    model, params = system.init_model(cfg, folder, texts, device=torch.device("meta"))
    return system.estimate_steps(model, params, conversations, processes)
