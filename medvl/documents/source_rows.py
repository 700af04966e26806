"""Rows of a data set, from the Hugging Face hub or local tables, in one form, with their images as files."""

import errno
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medvl.base import files
from medvl.base.text import few
from medvl.language.conversations import read_records
from medvl.language.images import open_image

Row = dict[str, Any]  # column -> value; an embedded image is {"bytes": content, "path": name} or the content
_LOCAL = (".parquet", ".csv", ".json", ".jsonl")
_LONGEST_RATIO = 200  # of the sides of an image; Qwen's image preprocessing refuses more
# Columns of each kind, under the names that data sets give them; the first that a row has is read.
_IMAGE = ("image", "images", "image_path", "file_name", "pmc_figure")
_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "captions": {"text": ("caption",), "image": _IMAGE},
    "conversations": {"text": ("conversations", "question"), "image": _IMAGE},
    "notes": {"text": ("transcription", "note", "section_text", "text")},
}
_IDS = ("image_id", "roco_id", "id", "ID", "note_id", "Unnamed: 0", "")
_ARTICLE_COLUMNS = ("article", "article_id", "pmcid", "pmc_id", "pmc_figure")
# An article in the name of an image: PMC5665693_cureus-i01.jpg, or PubMedVision's pmc_9_0.jpg.
_ARTICLE = re.compile(r"PMC\d+|(?<![a-z0-9])pmc_\d+(?=_)", re.IGNORECASE)
_ROLES = {"human": "user", "gpt": "assistant"}


class SourceError(ValueError):
    """A data set that cannot be used: it is not there, or has another form. Others may still be used."""


class LeftOut(Exception):
    """A row that is counted and not used; the message is the reason."""


# Tables -----------------------------------------------------------------------------------------------------
def is_local(path: str) -> bool:
    """Whether a path names local files, by its ending, and not a data set of the hub."""
    return Path(path).suffix.lower() in _LOCAL


def read_rows(path: str, split: str = "train") -> Iterator[Row]:
    """The rows of a data set, one after the other.

    Args:
        path: local files ending in .parquet, .csv, .json or .jsonl (a pattern with * names several, read in
            sorted order), or a data set of the hub: "owner/name", or "owner/name:configuration". Rows of the
            hub are streamed: what follows the last row that is asked for is not downloaded.
        split: of a data set of the hub.
    Raises:
        SourceError: it cannot be read, or holds no rows.
        OSError: the disk is full.
    """
    is_empty = True
    # What the consumer of the rows raises does not pass through here, so that all of it is of the source.
    try:
        for row in _local_rows(path) if is_local(path) else _hub_rows(path, split):
            is_empty = False
            yield row
    except (ValueError, ImportError, *files.READ_ERRORS) as e:
        # Nothing else could be written either, so that no other source is tried.
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise SourceError(reason if path in reason else f"{path}: {reason}") from e
    if is_empty:
        raise SourceError(f"{path}: holds no rows")


def _local_rows(path: str) -> Iterator[Row]:
    names = sorted(glob.glob(path)) if "*" in path else [path]
    if not names:
        raise ValueError("no file has such a name")
    for name in names:
        suffix = Path(name).suffix.lower()
        if suffix == ".csv":
            yield from files.read_csv(name)
        elif suffix == ".parquet":
            files.check_regular(name)
            from pyarrow import parquet  # here: of the extra hubdata

            with parquet.ParquetFile(name) as table:
                # Few rows at a time: each may hold an image.
                for batch in table.iter_batches(batch_size=64):
                    yield from batch.to_pylist()
        else:
            for _, where, record in read_records(Path(name)):
                if not isinstance(record, dict):
                    raise ValueError(f"{where}: must be a JSON object")
                yield record


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    name, _, configuration = path.partition(":")
    try:
        import datasets
    except ImportError as e:
        raise ValueError(f"data sets of the hub need `pip install -e '.[hubdata]'` ({e})") from e
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        # Images stay as they were uploaded; without known columns there are none to decode.
        yield from rows.decode(False) if rows.features else rows
    # Some of these are neither OSError nor ValueError.
    except datasets.exceptions.DatasetsError as e:
        raise ValueError(e) from e


# Rows in one form -------------------------------------------------------------------------------------------
def check_columns(kind: str, path: str, row: Row) -> None:
    """Check that the first row of a source has what rows of its kind must have.

    Raises:
        SourceError: naming the columns that it has.
    """
    for names in _COLUMNS[kind].values():
        if not row.keys() & {*names}:
            raise SourceError(
                f"{path}: a source of {kind} must have the column {' or '.join(names)}, found "
                f"{few(sorted(map(repr, row)), 12)}"
            )


def parse_row(kind: str, row: Row, root: Path, folder: Path) -> dict[str, Any]:
    """A row of a source in one form: {"id": text, "images": names from `folder`, "articles": names, "messages"}. Of
    captions and notes the text is the only message.

    Args:
        root: where relative names of images start.
        folder: of the data; images are written into `raw/images` in it.
    Raises:
        LeftOut: no text, no image, or an image that cannot be used.
    """
    turns = [("assistant", _first(row, _COLUMNS[kind]["text"]))]
    if "conversations" in row and kind == "conversations":
        records = [turn if isinstance(turn, dict) else {} for turn in _as_list(row["conversations"])]
        turns = [(_ROLES.get(str(r.get("from")), str(r.get("from"))), r.get("value")) for r in records]
    elif kind == "conversations":
        turns = [("user", row.get("question")), ("assistant", row.get("answer"))]
    if not all(isinstance(text, str) and text.strip() for _, text in turns):
        raise LeftOut("no text")
    items = _as_list(_first(row, _COLUMNS[kind].get("image", ())))
    if not items and kind != "notes":
        raise LeftOut("no image")
    parsed = {
        "messages": [{"role": role, "content": text.strip()} for role, text in turns],
        "images": [_save_image(_image_content(item, root), folder) for item in items],
    }
    # A row without an id is called by what it holds.
    identifier = _first(row, _IDS)
    identifier = digest(parsed)[:16] if identifier in (None, "") else str(identifier)
    names = [item.get("path") if isinstance(item, dict) else item for item in items]
    names += [identifier, *(row.get(column) for column in _ARTICLE_COLUMNS)]
    # Only the name of a file: a folder such as pmc_0_9 holds many articles.
    texts = [Path(name).name for name in names if isinstance(name, str)]
    articles = {hit.group().upper() for text in texts for hit in _ARTICLE.finditer(text)}
    return parsed | {"id": identifier, "articles": sorted(articles)}


def digest(value: Any) -> str:
    """The sha256 of plain data, the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _first(row: Row, names: Iterable[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None or value == "" else [value]


# Images -----------------------------------------------------------------------------------------------------
def _image_content(item: Any, root: Path) -> bytes:
    """What an image of a row holds: embedded, or in a file."""
    if isinstance(item, dict):
        # An image of no bytes is damaged and not missing.
        content = item.get("bytes")
        item = item.get("path") if content is None else content
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str) or not item:
        raise LeftOut("no image")
    if not (root / item).is_file():
        raise LeftOut("an image that is not there")
    return (root / item).read_bytes()


def _save_image(content: bytes, folder: Path) -> str:
    """Write an image as RGB PNG, unless it is there; returns its name from `folder`.

    It is called by what the source holds, as the bytes of a PNG differ between versions of its writer.
    """
    name = f"raw/images/{hashlib.sha256(content).hexdigest()}.png"
    if not (folder / name).exists():
        try:
            # No window holds for all of a data set: scans of 12 bits are kept in files of 16, too.
            image = open_image(content, full_range=True)
        except ValueError as e:
            raise LeftOut("an image that is damaged, too large or of another format") from e
        if max(image.size) > _LONGEST_RATIO * min(image.size):
            raise LeftOut(f"an image more than {_LONGEST_RATIO} times as long as wide")
        with files.atomic(folder / name) as tmp:
            image.save(tmp, format="PNG")
    return name
