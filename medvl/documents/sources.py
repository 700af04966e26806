"""Public data sets of medical images and notes as conversations: fetched, checked, split and written.

Files in the folder, each written whole or not at all:

    raw/images/SHA256.png     images as RGB, upright, called by the sha256 of what the source holds
    raw/NAME.jsonl            the rows of a source that can be used
    download_summary.json     of each source: which path was used, what failed before, rows that are left out
    pages/SHA256-N.png        pages of notes
    {train,valid,test}.jsonl  conversations, as `language.conversations` reads them
    data_summary.json         counts by source and split, licences, whether one forbids commercial use

Rows with an article, a note or an image in common, directly or through others, are one group, and a group is in
one split. Groups and splits do not depend on the order of the rows.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from medvl.base import config, files
from medvl.base.display import track
from medvl.documents.source_record import Source, SourcesConfig
from medvl.documents.source_rows import (
    LeftOut,
    SourceError,
    check_columns,
    digest,
    is_local,
    parse_row,
    read_rows,
)
from medvl.documents.text_page import draw_text_page, missing_characters, page_lines
from medvl.language.conversations import read_records
from medvl.language.messages import check_order, check_other_tags, check_tags

Log = Callable[[str], None]
SPLITS = ("train", "valid", "test")
_TAG = "<image>"
PROMPTS = {
    "captions": (
        "Describe this medical image.",
        "What does this image show?",
        "Write a caption for this image.",
        "Describe the findings in this image.",
        "What can be seen in this radiological image?",
        "Describe this image as in a medical article.",
        "Summarise what this image shows.",
        "Explain this image to a physician.",
        "Which examination is this, and what does it show?",
        "Report what is visible in this image.",
    ),
    "notes": (
        "Transcribe the text of this page.",
        "Read this page word by word.",
        "What does this page say?",
        "Write down all text on this page.",
        "Extract the text of this medical note.",
        "Copy the text of this document exactly.",
        "Give the full text of this page.",
        "Convert this page to plain text.",
        "Which text is printed on this page?",
        "Type out this clinical note.",
    ),
}


def build_data(cfg: SourcesConfig, log: Log) -> dict[str, Any]:
    """Fetch the sources and write their conversations; returns what data_summary.json holds.

    A source that fails stops no other: the next of its paths is tried, then it is left out. What is there already
    is not fetched or written again. After a kill the same call goes on; a source that was not complete is read
    from its first row again, its images are kept.

    Raises:
        ValueError: no source can be used; no conversation or too few groups for the splits; another process is
            at work in the folder.
        OSError: the disk is full.
    """
    folder = Path(cfg.folder)
    with files.file_lock(folder / "data"):
        files.remove_unfinished(folder)
        downloads = _fetch_sources(cfg, folder, log)
        return _write_tables(cfg, folder, downloads, log)


# From the sources to rows -----------------------------------------------------------------------------------
def _fetch_sources(cfg: SourcesConfig, folder: Path, log: Log) -> dict[str, Any]:
    """The entries of download_summary.json, by source; the rows are in raw/NAME.jsonl."""
    path = folder / "download_summary.json"
    before = config.read_settings(path) if path.exists() else {}
    entries: dict[str, Any] = {}
    for source in cfg.sources:
        entry = before.get(source.name, {})
        # A source that failed is tried again.
        is_there = entry.get("path") and entry["record"] == config.unstructure(source)
        if not is_there or entry["rows_sha256"] != _file_digest(_rows_path(folder, source.name)):
            entry = _fetch_source(source, folder, log)
        entries[source.name] = entry
        # After each source, so that a run that is killed keeps those that are complete.
        _write_json(path, before | entries)
    _write_json(path, entries)  # without those that are no longer asked for
    if not any(entry["path"] for entry in entries.values()):
        reasons = [attempt["reason"] for entry in entries.values() for attempt in entry["failed"]]
        raise ValueError(f"{path}: no source can be used: {'; '.join(reasons)[:1000]}")
    return entries


def _fetch_source(source: Source, folder: Path, log: Log) -> dict[str, Any]:
    """Write the rows of the first path that can be used; the reasons of those before it are kept."""
    entry: dict[str, Any] = {"record": config.unstructure(source), "path": "", "failed": []}
    for path in (source.path, *source.alternatives):
        try:
            rows, left_out = _usable_rows(source, path, folder)
        except SourceError as e:
            log(f"{source.name} fails: {e}")
            entry["failed"].append({"path": path, "reason": str(e)})
            continue
        target = _rows_path(folder, source.name)
        files.write_text(target, "".join(json.dumps(row) + "\n" for row in rows))
        licence, non_commercial = source.licence_of(path)
        log(f"{source.name}: {len(rows)} rows of {path}; left out: {_listed(left_out)}")
        return entry | {
            "path": path,
            "licence": licence,
            "non_commercial": non_commercial,
            "rows": len(rows) + left_out.total(),
            "left_out": dict(sorted(left_out.items())),
            "images": len({name for row in rows for name in row["images"]}),
            "rows_sha256": files.file_digest(target),
        }
    log(f"{source.name} is left out: none of its paths can be used")
    return entry


def _usable_rows(source: Source, path: str, folder: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(rows in one form, how many are left out by reason)."""
    root = Path(path).parent if is_local(path) and not source.images else Path(source.images)
    rows: list[dict[str, Any]] = []
    left_out = Counter[str]()
    all_rows = read_rows(path, source.split)
    for row in track(all_rows, f"reading {source.name}", total=source.limit or None):
        if not rows and not left_out:
            check_columns(source.kind, path, row)
        try:
            rows.append(parse_row(source.kind, row, root, folder))
        except LeftOut as e:
            left_out[str(e)] += 1
        if len(rows) == source.limit > 0:
            break
    if not rows:
        raise SourceError(f"{path}: none of its {left_out.total()} rows can be used: {_listed(left_out)}")
    return rows, left_out


def _rows_path(folder: Path, name: str) -> Path:
    return folder / "raw" / f"{name}.jsonl"


# From rows to conversations ---------------------------------------------------------------------------------
def _write_tables(cfg: SourcesConfig, folder: Path, downloads: Mapping[str, Any], log: Log) -> dict[str, Any]:
    """Write the tables of all splits, and then the summary; nothing, where those of the same rows are there."""
    path = folder / "data_summary.json"
    sources = [source for source in cfg.sources if downloads[source.name]["path"]]
    settings = config.unstructure(cfg)
    made_of = {key: value for key, value in settings.items() if key not in ("folder", "sources")}
    made_of["rows"] = {source.name: downloads[source.name]["rows_sha256"] for source in sources}
    if path.exists():
        summary = config.read_settings(path)
        tables = {name: _file_digest(folder / name) for name in summary["tables"]}
        if summary["made_of"] == made_of and summary["tables"] == tables:
            log(f"{path}: is there already")
            return summary
        # A summary that is there holds for the tables beside it.
        path.unlink()
    left_out: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
    lines = list[dict[str, Any]]()
    for source in sources:
        lines += _read_lines(cfg, source, folder, left_out[source.name])
    # Before any is dropped: two articles with one image and one text belong together.
    group_of = _groups(lines)
    lines = _drop_repeated(lines, left_out)
    for line in lines:
        del line["shared"]
        line["document"] = group_of[line["id"]]
    split_of = _assign_splits(lines, cfg)
    tables = {}
    for split in SPLITS:
        table = folder / f"{split}.jsonl"
        of_split = [line for line in lines if split_of[line["document"]] == split]
        if not of_split:  # of a split without a share
            table.unlink(missing_ok=True)
            continue
        files.write_text(table, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in of_split))
        tables[table.name] = files.file_digest(table)
    counts = Counter((line["category"], split_of[line["document"]]) for line in lines)
    of_source = {}
    for name in left_out:
        of_source[name] = {
            **{key: downloads[name][key] for key in ("path", "licence", "non_commercial", "rows")},
            "left_out_rows": downloads[name]["left_out"],
            "left_out_conversations": dict(sorted(left_out[name].items())),
            **{split: counts[name, split] for split in SPLITS},
        }
    summary = {
        # Whoever trains on these data passes it on to the model.
        "non_commercial": any(entry["non_commercial"] for entry in of_source.values()),
        "licences": sorted({entry["licence"] for entry in of_source.values()}),
        "splits": {split: sum(entry[split] for entry in of_source.values()) for split in SPLITS},
        "groups": Counter(split_of.values()),
        "sources": of_source,
        "failed_sources": [name for name, entry in downloads.items() if not entry["path"]],
        "tables": tables,
        "made_of": made_of,
    }
    _write_json(path, summary)
    for name, reasons in left_out.items():
        if reasons:
            log(f"{name}: conversations left out: {_listed(reasons)}")
    log(f"{path}: {', '.join(f'{number} {split}' for split, number in summary['splits'].items())}")
    return summary


def _read_lines(
    cfg: SourcesConfig, source: Source, folder: Path, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The conversations of a source as lines of a table; those that are left out are counted by reason.

    "shared" is what a line may have in common with others: lines that share an article, a row or an image are one
    group.
    """
    rows = [row for _, _, row in read_records(_rows_path(folder, source.name))]
    times = Counter(row["id"] for row in rows)
    # Sorted, so that the order of the source decides nothing.
    for row in track(sorted(rows, key=digest), f"conversations of {source.name}"):
        name = f"{source.name}/{row['id']}"
        shared = [f"row {name}", *(f"article {article}" for article in row["articles"])]
        # Several rows of one id stay apart, in one group.
        if times[row["id"]] > 1:
            name += f"-{digest(row)[:8]}"
        lines = [(name, row["messages"], row["images"])]
        if source.kind == "notes":
            (note,) = row["messages"]
            if missing_characters(note["content"]):
                left_out["characters that the font cannot draw"] += 1
                continue
            lines = _draw_note(name, note["content"], folder)
        for identifier, messages, images in lines:
            line = {
                "id": identifier,
                "images": images,
                "messages": _with_question(cfg, source.kind, identifier, messages, len(images)),
                "category": source.name,
                "shared": shared + [f"image {image}" for image in images],
            }
            reason = _reason_against(line, cfg.shortest)
            if reason:
                left_out[reason] += 1
            else:
                yield line


def _draw_note(name: str, text: str, folder: Path) -> list[tuple[str, list[dict[str, str]], list[str]]]:
    """(id, messages, image) of each page of a note, which is drawn unless it is there."""
    pages = page_lines(text)
    # Notes with the same words on every line have the same pages.
    stem = digest(pages)
    drawn = []
    for number, lines in enumerate(pages, 1):
        image = f"pages/{stem}-{number}.png"
        if not (folder / image).exists():
            picture = draw_text_page(lines, number, len(pages))
            with files.atomic(folder / image) as tmp:
                Image.fromarray(picture).save(tmp, format="PNG")
        drawn.append((f"{name}-page-{number}", [{"role": "assistant", "content": "\n".join(lines)}], [image]))
    return drawn


def _with_question(
    cfg: SourcesConfig, kind: str, identifier: str, messages: list[dict[str, str]], images: int
) -> list[dict[str, str]]:
    """Messages with the tags of their images; before a caption or a page a prompt, drawn by seed and id alone."""
    if kind in PROMPTS:
        number = int(digest([cfg.seed, "prompt", identifier]), 16)
        messages = [{"role": "user", "content": PROMPTS[kind][number % len(PROMPTS[kind])]}, *messages]
    # PubMedVision has no tags: its images come before the first question.
    has_tags = kind == "conversations" and any(_TAG in message["content"] for message in messages)
    for number, message in enumerate(messages):
        if message["role"] == "user" and not has_tags:
            first = {**message, "content": f"{_TAG}\n" * images + message["content"]}
            return [*messages[:number], first, *messages[number + 1 :]]
    return messages


def _reason_against(line: Mapping[str, Any], shortest: int) -> str:
    """Why a conversation is left out; "" where it is used."""
    messages, name = line["messages"], line["id"]
    try:
        check_order(messages, "assistant", name)
    except ValueError:
        return "roles or characters that no conversation may have"
    try:
        check_other_tags(messages, _TAG, name)
        check_tags(messages, _TAG, len(line["images"]), name)
    except ValueError:
        return f"a tag such as {_TAG} in the text that is no image's place"
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return f"an answer shorter than {shortest} characters" if min(map(len, answers)) < shortest else ""


def _drop_repeated(
    lines: Sequence[dict[str, Any]], left_out: Mapping[str, Counter[str]]
) -> list[dict[str, Any]]:
    """Lines sorted by id; of those with the same images and texts only the first."""
    kept: dict[str, dict[str, Any]] = {}
    # Captions and notes that are there twice may have two prompts, which are ours.
    prompts = {f"{_TAG}\n{prompt}" for of_kind in PROMPTS.values() for prompt in of_kind}
    for line in sorted(lines, key=lambda line: line["id"]):
        texts = [message["content"] for message in line["messages"] if message["content"] not in prompts]
        if kept.setdefault(digest([line["images"], texts]), line) is not line:
            left_out[line["category"]]["the images and texts of another row"] += 1
    return list(kept.values())


# Splits -----------------------------------------------------------------------------------------------------
def _groups(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The group of every line by its id: lines that share anything, directly or through others, have one."""
    # Union-find. The smaller name becomes the root, so that the order of the lines does not matter.
    parent: dict[str, str] = {}

    def root_of(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for line in lines:
        for name in line["shared"]:
            smaller, larger = sorted((root_of(line["shared"][0]), root_of(name)))
            parent[larger] = smaller
    return {line["id"]: root_of(line["shared"][0]) for line in lines}


def _assign_splits(lines: Sequence[Mapping[str, Any]], cfg: SourcesConfig) -> dict[str, str]:
    """The split of every group, so that each source has about the same shares of its lines in all."""
    sizes = Counter(line["document"] for line in lines)
    sources = {line["document"]: line["category"] for line in reversed(lines)}
    shares = {"train": 1 - cfg.valid - cfg.test, "valid": cfg.valid, "test": cfg.test}
    counts = dict.fromkeys(SPLITS, 0)
    split_of: dict[str, str] = {}
    # Source by source, and in each in an order that only the seed and the names decide.
    for group in sorted(sizes, key=lambda name: (sources[name], digest([cfg.seed, "split", name]))):
        placed = sum(counts.values()) + sizes[group]
        # Where most are missing.
        split_of[group] = max(SPLITS, key=lambda name: shares[name] * placed - counts[name])
        counts[split_of[group]] += sizes[group]
    empty = [name for name in SPLITS if shares[name] and not counts[name]]
    if empty:
        raise ValueError(
            f"{cfg.folder}: {len(lines)} conversations in {len(sizes)} groups are too few for the splits, "
            f"{' and '.join(empty)} would be empty; take more rows, or valid = 0 and test = 0"
        )
    return split_of


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number} of {reason}" for reason, number in sorted(counts.items())) or "none"


def _file_digest(path: Path) -> str:
    return files.file_digest(path) if path.is_file() else ""


def _write_json(path: Path, value: Any) -> None:
    files.write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
