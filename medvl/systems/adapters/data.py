"""The conversations of adapters: drawn, cut from VQA-RAD, or read, each with its task."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from medvl.base import config, files
from medvl.language import vqa_rad
from medvl.language.conversations import (
    Conversation,
    Reader,
    check_gold,
    read_conversations,
    read_tasks,
    warn_of_one_file,
)
from medvl.phantoms import modalities
from medvl.systems.adapters.record import Config

SPLITS = ("train", "valid", "test")


def prepare(cfg: Config, log: Callable[[str], None] = print) -> Reader:
    """Put the data in place: pictures are drawn, VQA-RAD is cut by case, files must be there.

    Returns:
        the reader of the splits, which has those that were looked at here.
    Raises:
        ValueError: what is missing, or not as it must be, with file and line.
    """
    folder = data_folder(cfg)
    if cfg.data.source == "phantoms":
        drawn = modalities.draw_modalities(cfg.data.phantoms, folder)
        counts = ", ".join(f"{n} {split}" for split, n in drawn.items())
        log(f"{sum(drawn.values())} pictures and cases drawn in {folder}: {counts}")
    if cfg.data.source == "vqa_rad":
        _cut_vqa_rad(cfg, folder, log)
    # Adapters of a registry were trained elsewhere: then only the test is needed.
    splits = SPLITS if cfg.train or cfg.base else ("test",)
    if len(splits) > 1:
        warn_of_one_file(cfg.data.conversations)
    read = split_reader(cfg)
    for split in splits:
        tasks = tasks_of(read(split))
        if cfg.train:
            for task in tasks:
                # A task names the folder of its adapter.
                files.check_name(task, f"{split}: the task")
        log(f"{split}: {len(tasks)} tasks: {', '.join(tasks)}")
    return read


def _cut_vqa_rad(cfg: Config, folder: Path, log: Callable[[str], None]) -> None:
    """Cut VQA-RAD by case, if that has not been done, and keep the digest of the file it was cut from."""
    source, mark = Path(cfg.data.vqa_rad) / "vqa_rad_share.json", folder / "source.sha256"
    digest = files.file_digest(source) if source.is_file() else ""
    # The last table that is written: where it is, the cut is complete.
    if (folder / "test.jsonl").exists():
        if digest and mark.exists() and mark.read_text() != digest:
            raise ValueError(
                f"{folder}: was cut from another {source} than the present one; remove the folder to cut it "
                "again"
            )
        return
    if digest:
        files.write_text(mark, digest)  # first: tables without it would be taken for those of any file
    images = source.parent / "images"
    counts = vqa_rad.convert_vqa_rad(source, images, folder, group=cfg.data.group, seed=cfg.seed)
    log(f"VQA-RAD in {folder}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))


def data_folder(cfg: Config) -> Path:
    """The folder that `{folder}` stands for; what is drawn or cut by one record has a folder of its own."""
    data = cfg.data
    # All that decides the content, so that another record never finds it. The seed of the record cuts
    # VQA-RAD; drawn pictures have one of their own.
    origins = {"phantoms": data.phantoms, "vqa_rad": (data.vqa_rad, data.group, cfg.seed)}
    if data.source not in origins:
        return Path(data.folder)
    return Path(data.folder) / f"{data.source}-{config.record_digest(origins[data.source])}"


def read_split(cfg: Config, split: str) -> list[Conversation]:
    """The conversations of a split, each with its task.

    In the test split every answer holds a word, where words are compared.
    """
    folder = data_folder(cfg)
    # {split} and {task} stay, for `read_tasks` to fill: only the files tell which tasks there are.
    pattern = config.fill_pattern(
        cfg.data.conversations, "data.conversations", folder=folder, split=None, task=None
    )
    root = cfg.data.root or None
    conversations = read_tasks(pattern, split, key=cfg.data.task, root=root, max_images=cfg.chat.max_images)
    if split == "test" and cfg.evaluate.rule == "strict":
        # Every turn is a step that is scored, not only the last.
        check_gold(conversations, every=True)
    return conversations


def split_reader(cfg: Config) -> Reader:
    """`read_split` for the steps of one run: a split is read when it is first asked for, and then kept."""
    return functools.cache(partial(read_split, cfg))


def read_general(cfg: Config, split: str, read: Reader) -> Sequence[Conversation]:
    """What the base model is trained on: conversations of its own, or those of all tasks.

    Args:
        read: gives those of all tasks.
    """
    if not cfg.data.general:
        return read(split)
    folder = data_folder(cfg)
    path = config.fill_pattern(cfg.data.general, "data.general", folder=folder, split=split)
    return read_conversations(path, root=cfg.data.root or None, max_images=cfg.chat.max_images)


def tasks_of(conversations: Sequence[Conversation]) -> list[str]:
    """The tasks of conversations, by name."""
    return sorted({conversation.extra["task"] for conversation in conversations})


def of_task(conversations: Sequence[Conversation], task: str) -> list[Conversation]:
    """The conversations of one task."""
    return [conversation for conversation in conversations if conversation.extra["task"] == task]
