"""The files of slide_vqa. Preparing, training and evaluating need the same ones; in a process each is read
once.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from medvl.base import files, processes
from medvl.hub.checkpoints import read_json
from medvl.slides.question_formats import SlideConversation
from medvl.slides.questions import read_slide_conversations
from medvl.slides.tokens import Features, open_features
from medvl.systems.slide_vqa.record import Config, data_path

_log = logging.getLogger("medvl")
_ENCODER = "encoder.json"  # of the features that a run was trained on
_Version = tuple[int, int]  # size and time of change of a file


# Questions --------------------------------------------------------------------------------------------------
def read_split(cfg: Config, split: str) -> list[SlideConversation]:
    """The conversations of captions, questions, valid or test.

    Those with an answer without text are left out, but for the test: there is nothing to train in them.

    Raises:
        ValueError: as `read_slide_conversations`; no answer has text.
    """
    path = data_path(cfg, split)
    conversations = list(_read_questions(path, _version_of(path))[0])
    mute = [conversation.row for conversation in conversations if _has_empty_answer(conversation)]
    # A test stays whole, since accuracy is over all its questions.
    if not mute or split == "test":
        return conversations
    if len(mute) == len(conversations):
        raise ValueError(
            f"{path}: answers must have text to be trained on, each of {len(conversations)} records has an "
            "empty one"
        )
    _log.warning(
        "%s: %d conversations have an answer without text and are left out, such as row %s",
        path,
        len(mute),
        ", ".join(map(str, mute[:5])),
    )
    return [conversation for conversation in conversations if conversation.row not in {*mute}]


def split_digest(cfg: Config, split: str) -> str:
    """The sha256 of the file of a split."""
    path = data_path(cfg, split)
    return _read_questions(path, _version_of(path))[1]


def slides_of(conversations: Sequence[SlideConversation]) -> list[str]:
    """The slides of conversations, each once, by their first place."""
    return list(dict.fromkeys(slide for conversation in conversations for slide in conversation.slides))


def read_labels(cfg: Config, columns: Sequence[str]) -> tuple[dict[str, str], ...]:
    """The table of labels of slides.

    Raises:
        ValueError: as `files.read_csv`.
    """
    path = data_path(cfg, "labels")
    return _read_table(path, _version_of(path), tuple(columns))


def _has_empty_answer(conversation: SlideConversation) -> bool:
    answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
    return any(not answer.strip() for answer in answers)


# `version` is there for the key only: a file that was written again is read again. The result is a tuple,
# since all callers share it.
@functools.lru_cache(maxsize=8)
def _read_questions(path: Path, version: _Version) -> tuple[tuple[SlideConversation, ...], str]:
    if not path.is_file():
        read_slide_conversations(path)  # says what is wrong
    with open(path, "rb") as file:
        conversations = read_slide_conversations(path, file=file)
        # From the file that is open: between two openings it could be replaced, and the digest be of another.
        file.seek(0)
        return tuple(conversations), hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=4)
def _read_table(path: Path, version: _Version, columns: tuple[str, ...]) -> tuple[dict[str, str], ...]:
    return tuple(files.read_csv(path, columns))


def _version_of(path: Path) -> _Version:
    """What changes when a file is written again; (-1, -1) where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


# Features ---------------------------------------------------------------------------------------------------
def open_slides(cfg: Config, slides: Sequence[str], *, dims: int = 0) -> Features:
    """The features of slides.

    Args:
        dims: their width, 0 = as the record says.
    Raises:
        ValueError: as `open_features`.
    """
    return open_features(data_path(cfg, "features"), slides, dims=dims or cfg.data.dims)


def keep_encoder(folder: Path, features: Features) -> None:
    """Keep in the run folder by which encoder the features were made that it is trained on, where they say
    it.
    """
    check_encoder(folder, features)
    if features.encoder and processes.rank() == 0:
        text = json.dumps({"encoder": features.encoder, "dims": features.dims}) + "\n"
        files.write_text(folder / _ENCODER, text)


def check_encoder(folder: Path, features: Features) -> None:
    """Refuse features of another encoder than a run was trained on: of one width they would give wrong
    answers.

    Raises:
        ValueError: both say their encoder, and they differ.
    """
    # Many formats do not say their encoder. Then there is nothing to compare.
    if not features.encoder or not (folder / _ENCODER).is_file():
        return
    trained = read_json(folder / _ENCODER).get("encoder")
    if trained != features.encoder:
        raise ValueError(
            f"{folder}: was trained on features of the encoder {trained!r}, those of "
            f"{features.names[0]} are of {features.encoder!r}; take features of the same encoder"
        )
