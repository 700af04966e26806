"""Data sets as conversations: nothing is lost without being counted, and no group is in two splits."""

import csv
import errno
import io
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from PIL import Image

from medvl.base import config, files
from medvl.documents import source_rows, sources
from medvl.documents.source_record import LICENCES, Source, SourcesConfig, public_sources
from medvl.documents.source_rows import SourceError, read_rows
from medvl.documents.sources import PROMPTS, SPLITS, build_data
from medvl.language.conversations import read_conversations

TABLES = tuple(f"{split}.jsonl" for split in SPLITS)
LONG = "Axial image of the chest that shows a large effusion on the left side, number"


def picture(number, size=(8, 6), mode="RGB", kind="PNG"):
    file = io.BytesIO()
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(
        file, format=kind
    )
    return file.getvalue()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def captions(folder, number=30):
    """Rows whose images are embedded; every third shares the image of the one before."""
    rows = [
        {
            "image": {"bytes": picture(i - (i % 3 == 2)), "path": None},
            "image_id": f"ROCO_{i:05}",
            "caption": f"{LONG} {i}.",
        }
        for i in range(number)
    ]
    return Source(name="roco", kind="captions", path=write_rows(folder / "roco.parquet", rows))


def questions(folder, number=24):
    """Rows whose images are files; two figures of an article, and every sixth has two images."""
    rows = []
    for i in range(number):
        names = [f"images/pmc_{i // 2}_{i % 2}.png"]
        if i % 6 == 5:
            names.append(f"images/pmc_{i // 2}_9.png")
        for name in names:
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(picture(1000 + 7 * i + int(name[-5])))
        turns = [{"from": "human", "value": f"What is it, {i}?"}, {"from": "gpt", "value": f"{LONG} {i}."}]
        rows.append({"image": names, "conversations": turns, "id": str(i), "modality": "CT"})
    return Source(name="pmv", kind="conversations", path=write_rows(folder / "pmv.jsonl", rows))


def notes(folder, number=10):
    rows = []
    for i in range(number):
        text = f"CHIEF COMPLAINT, {i}: " + " ".join(f"word{i}x{k} 40 mg," for k in range(300))
        rows.append({"": str(i), "medical_specialty": " Surgery", "transcription": text, "keywords": ""})
    return Source(name="mts", kind="notes", path=write_rows(folder / "mts.csv", rows))


@pytest.fixture
def cfg(tmp_path):
    made = tuple(make(tmp_path / "in") for make in (captions, questions, notes))
    return SourcesConfig(folder=str(tmp_path / "out"), sources=made)


def quiet(line):
    pass


def tables(cfg):
    return {split: read_conversations(Path(cfg.folder) / f"{split}.jsonl") for split in SPLITS}


def contents(cfg):
    """{name: content} of all files."""
    root = Path(cfg.folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_three_sources_become_conversations(cfg):
    summary = build_data(cfg, quiet)
    read = tables(cfg)
    every = [c for split in SPLITS for c in read[split]]
    # Every row is a conversation or counted.
    for source in cfg.sources:
        about = summary["sources"][source.name]
        of_source = [c for c in every if c.extra["category"] == source.name]
        assert len(of_source) == sum(about[split] for split in SPLITS)
        if source.kind != "notes":
            assert about["rows"] == len(of_source)
            assert about["left_out_rows"] == about["left_out_conversations"] == {}
    assert {split: len(read[split]) for split in SPLITS} == summary["splits"]
    shares = [summary["splits"][split] / len(every) for split in SPLITS]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.05)
    # A caption is asked for by one of ten prompts, questions are the source's own.
    assert all(len(set(prompts)) >= 10 for prompts in PROMPTS.values())
    asked = {
        c.messages[0]["content"].removeprefix("<image>\n") for c in every if c.extra["category"] == "roco"
    }
    assert len(asked) > 3
    assert asked <= {*PROMPTS["captions"]}
    by_id = {c.id: c for c in every}
    assert by_id["pmv/5"].messages[0]["content"] == "<image>\n<image>\nWhat is it, 5?"
    assert len(by_id["pmv/5"].images) == 2
    assert by_id["roco/ROCO_00004"].messages[1]["content"] == f"{LONG} 4."
    with Image.open(by_id["roco/ROCO_00004"].images[0]) as image:
        assert (np.asarray(image) == np.asarray(Image.open(io.BytesIO(picture(4))))).all()
    # All words of a note are on its pages.
    with open(cfg.sources[2].path, newline="") as f:
        for row in csv.DictReader(f):
            pages = sorted(i for i in by_id if i.startswith(f"mts/{row['']}-page-"))
            assert len(pages) > 1
            words = [word for i in pages for word in by_id[i].messages[1]["content"].split()]
            assert words == row["transcription"].split()


def test_no_group_is_in_two_splits(cfg):
    build_data(cfg, quiet)
    where = defaultdict(set)
    for split, conversations in tables(cfg).items():
        for c in conversations:
            source, _, name = c.id.partition("/")
            where["document", c.extra["document"]].add(split)
            for image in c.images:
                where["image", image.name].add(split)
            if source == "pmv":
                where["article", int(name) // 2].add(split)
            if source == "mts":
                where["note", name.partition("-")[0]].add(split)
            if source == "roco":  # the image of two rows
                number = int(name[5:])
                where["pair", number - (number % 3 == 2)].add(split)
    assert all(len(splits) == 1 for splits in where.values())
    assert set.union(*where.values()) == {*SPLITS}
    # Two figures of an article are one group, and so are the pages of a note.
    assert len([key for key in where if key[0] == "document"]) == 20 + 12 + 10


def test_the_order_of_the_rows_decides_nothing(cfg, tmp_path):
    build_data(cfg, quiet)
    shuffled = []
    for source in cfg.sources:
        rows = [*read_rows(source.path)]
        random.Random(1).shuffle(rows)
        path = Path(source.path)
        path.unlink()
        write_rows(path, rows)
        shuffled.append(source)
    other = evolve(cfg, folder=str(tmp_path / "again"), sources=tuple(shuffled[::-1]))
    build_data(other, quiet)
    # The rows of a source keep its order, and the summaries tell their digests.
    a, b = (
        {name: content for name, content in contents(c).items() if name in TABLES or name.endswith(".png")}
        for c in (cfg, other)
    )
    assert a == b


def test_the_split_is_the_same_in_every_process(cfg, tmp_path):
    build_data(cfg, quiet)
    record = tmp_path / "cfg.json"
    code = (
        "import sys; from medvl.base import config; from medvl.documents.source_record import SourcesConfig as C;"
        "from medvl.documents.sources import build_data; build_data(config.load_record(sys.argv[1], C), print)"
    )
    other = evolve(cfg, folder=str(tmp_path / "other"))
    record.write_text(json.dumps(config.unstructure(other)))
    # This process has another seed, drawn by chance or none.
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    run = [sys.executable, "-c", code, str(record)]
    subprocess.run(run, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
    assert contents(other) == contents(cfg)


def test_the_same_command_again_does_nothing(cfg, monkeypatch):
    build_data(cfg, quiet)
    before = {p: p.stat().st_mtime_ns for p in Path(cfg.folder).rglob("*") if p.suffix in (".jsonl", ".png")}
    summary = (Path(cfg.folder) / "data_summary.json").stat().st_mtime_ns
    monkeypatch.setattr(sources, "read_rows", None)
    monkeypatch.setattr(sources, "draw_text_page", None)
    again = build_data(cfg, quiet)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert (Path(cfg.folder) / "data_summary.json").stat().st_mtime_ns == summary
    assert again["splits"] == json.loads((Path(cfg.folder) / "data_summary.json").read_text())["splits"]
    # Another seed splits the same rows anew; a table that was changed is written again.
    other = build_data(evolve(cfg, seed=1), quiet)
    assert other["tables"] != again["tables"]
    (Path(cfg.folder) / "test.jsonl").write_text("")
    assert build_data(evolve(cfg, seed=1), quiet)["tables"] == other["tables"]
    assert (Path(cfg.folder) / "test.jsonl").read_text()


@pytest.mark.parametrize("stop", [5, 55, 78])
def test_a_run_that_is_killed_goes_on(cfg, tmp_path, monkeypatch, stop):
    build_data(cfg, quiet)
    other = evolve(cfg, folder=str(tmp_path / "killed"))
    written = []
    replace = os.replace

    def killed(source, target):
        written.append(target)
        if len(written) == stop:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        build_data(other, quiet)
    monkeypatch.setattr(os, "replace", replace)
    # What a kill -9 would leave.
    (Path(other.folder) / "raw").mkdir(exist_ok=True)
    (Path(other.folder) / "raw" / ".roco.jsonl.x.tmp").write_text("half")
    build_data(other, quiet)
    assert contents(other) == contents(cfg)


def test_a_source_that_fails_stops_no_other(cfg, tmp_path):
    wrong = write_rows(tmp_path / "wrong.csv", [{"picture": "a", "words": "b"}])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("image,caption\n")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 no")
    lost = write_rows(tmp_path / "lost.jsonl", [{"image": "no.png", "caption": LONG}])
    bad = [wrong, str(tmp_path / "empty.csv"), str(tmp_path / "header.csv"), str(tmp_path / "half.parquet")]
    bad += [lost, str(tmp_path / "none.json"), str(tmp_path / "none-*.parquet")]
    first = evolve(cfg.sources[0], path=bad[0], alternatives=(*bad[1:], cfg.sources[0].path))
    gone = Source(name="gone", kind="notes", path=bad[-1])
    mixed = evolve(cfg, folder=str(tmp_path / "mixed"), sources=(gone, first, *cfg.sources[1:]))
    lines = []
    summary = build_data(mixed, lines.append)
    assert summary["failed_sources"] == ["gone"]
    assert summary["splits"] == build_data(cfg, quiet)["splits"]
    downloads = json.loads((tmp_path / "mixed/download_summary.json").read_text())
    reasons = [attempt["reason"] for attempt in downloads["roco"]["failed"]]
    assert [attempt["path"] for attempt in downloads["roco"]["failed"]] == bad
    assert downloads["roco"]["path"] == cfg.sources[0].path
    assert "must have the column caption, found 'picture', 'words'" in reasons[0]
    assert "no rows" in reasons[1]
    assert "no rows" in reasons[2]
    assert "half.parquet" in reasons[3]
    assert "none of its 1 rows can be used: 1 of an image that is not there" in reasons[4]
    assert "no such file" in reasons[5]
    assert "no file has such a name" in reasons[6]
    assert any(line.startswith("gone is left out") for line in lines)
    with pytest.raises(ValueError, match=r"no source can be used: .*no file has such a name"):
        build_data(evolve(mixed, folder=str(tmp_path / "nothing"), sources=(gone,)), quiet)
    assert not (tmp_path / "nothing/train.jsonl").exists()


def test_rows_that_cannot_be_used_are_counted(cfg, tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)).save(deep, format="PNG")
    big = picture(1)
    header = (20000).to_bytes(4, "big")
    big = big[:16] + header * 2 + big[24:]  # says that it is 20000 x 20000
    bad = {
        "empty file": b"",
        "half": picture(2)[:60],
        "big": big,
        "page": b"%PDF-1.7",
        "strip": picture(3, (300, 1)),
    }
    good = {
        "cmyk": picture(4, mode="CMYK", kind="JPEG"),
        "deep": deep.getvalue(),
        "grey": picture(5, mode="L"),
    }
    rows = [{"image": content, "image_id": name, "caption": LONG} for name, content in (bad | good).items()]
    ok = picture(6)
    rows += [
        {"image": ok, "image_id": "short", "caption": "Too short."},
        {"image": ok, "image_id": "tag", "caption": f"{LONG} <image>"},
        {"image": ok, "image_id": "other tag", "caption": f"{LONG} <video>"},
        {"image": ok, "image_id": "none", "caption": None},
        {"image": None, "image_id": "no image", "caption": LONG},
        {"image": ok, "image_id": "twice", "caption": f"{LONG} 1"},
        {"image": ok, "image_id": "twice", "caption": f"{LONG} 1"},
        {"image": ok, "image_id": "twice", "caption": f"{LONG} 2"},
    ]
    made = evolve(cfg.sources[0], path=write_rows(tmp_path / "bad.parquet", rows))
    cfg = evolve(cfg, sources=(made, cfg.sources[2]))
    about = build_data(cfg, quiet)["sources"]["roco"]
    assert about["rows"] == len(rows)
    assert about["left_out_rows"] == {
        "an image that is damaged, too large or of another format": 4,
        "an image more than 200 times as long as wide": 1,
        "no text": 1,
        "no image": 1,
    }
    assert about["left_out_conversations"] == {
        "a tag such as <image> in the text that is no image's place": 2,
        "an answer shorter than 50 characters": 1,
        "the images and texts of another row": 1,
    }
    conversations = [c for split in tables(cfg).values() for c in split if c.extra["category"] == "roco"]
    assert len(conversations) == sum(about[split] for split in SPLITS) == 5
    same = [c for c in conversations if c.id.startswith("roco/twice-")]
    assert len({c.id for c in same}) == 2
    assert len({c.extra["document"] for c in same}) == 1
    for c in conversations:
        with Image.open(c.images[0]) as image:
            assert (image.mode, image.format) == ("RGB", "PNG")
            if c.id == "roco/deep":
                # 12 bits in a file of 16: shown from the lowest to the highest.
                shown = np.asarray(image)[..., 0].ravel()
                assert np.abs(shown - np.arange(64) * 255 / 63).max() <= 1


def test_notes_that_cannot_be_drawn_are_counted(cfg, tmp_path):
    rows = [*read_rows(cfg.sources[2].path)]
    rows += [{"": "a", "transcription": "漢字 " * 40}, {"": "b", "transcription": " "}]
    rows = [{"": row[""], "transcription": row["transcription"]} for row in rows]
    rows.append({"": "again", "transcription": rows[0]["transcription"].replace(" ", "  ")})
    made = evolve(cfg.sources[2], path=write_rows(tmp_path / "notes.csv", rows))
    about = build_data(evolve(cfg, sources=(made,)), quiet)["sources"]["mts"]
    assert about["left_out_rows"] == {"no text": 1}
    left_out = about["left_out_conversations"]
    assert left_out["characters that the font cannot draw"] == 1
    # The pages of the note that is there twice.
    assert left_out["the images and texts of another row"] >= 2


def test_questions_with_the_same_answer_stay(cfg, tmp_path):
    rows = [
        {
            "image": picture(i // 3),
            "question": f"Is it, {i % 3}?",
            "answer": f"{LONG} {i // 3}.",
            "id": str(i),
        }
        for i in range(30)
    ]
    rows.append(rows[0] | {"id": "again"})
    # The same image and texts in two articles, of which one has another image.
    rows += [rows[1] | {"id": "PMC1"}, rows[4] | {"id": "PMC1"}]
    made = Source(name="vqa", kind="conversations", path=write_rows(tmp_path / "vqa.parquet", rows))
    about = build_data(evolve(cfg, sources=(made,)), quiet)["sources"]["vqa"]
    assert sum(about[split] for split in SPLITS) == 30
    assert about["left_out_conversations"] == {"the images and texts of another row": 3}
    # Questions about one image are in one group, and so are two images that a dropped row joins.
    of_image = defaultdict(set)
    for conversations in tables(evolve(cfg, sources=(made,))).values():
        for c in conversations:
            of_image[c.images[0].name].add(c.extra["document"])
    assert len(of_image) == 10
    assert all(len(groups) == 1 for groups in of_image.values())
    assert len(set.union(*of_image.values())) == 9


def test_a_full_disk_is_no_fault_of_a_source(cfg, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"make room|No space"):
        build_data(cfg, quiet)
    assert [p for p in Path(cfg.folder).rglob("*") if p.is_file()] == []
    monkeypatch.undo()
    monkeypatch.setattr(files, "read_csv", full)
    with pytest.raises(OSError, match="No space"):
        [*read_rows("a.csv")]


def test_limits_and_licences(cfg, tmp_path):
    limited = evolve(cfg.sources[0], limit=12, licence="cc-by-nc-2.0", non_commercial=True)
    cfg = evolve(cfg, sources=(limited, evolve(cfg.sources[1], licence="cc0")), folder=str(tmp_path / "x"))
    summary = build_data(cfg, quiet)
    assert summary["sources"]["roco"]["rows"] == 12
    assert summary["non_commercial"] is True
    assert summary["licences"] == ["cc-by-nc-2.0", "cc0"]
    assert build_data(evolve(cfg, sources=cfg.sources[1:]), quiet)["non_commercial"] is False
    # What is not stated is not granted.
    assert cfg.sources[1].licence_of("a.csv") == ("cc0", False)
    assert Source(name="a", kind="notes", path="a.csv").licence_of("a.csv") == ("not stated", True)
    for source in public_sources():
        for path in (source.path, *source.alternatives):
            assert source.licence_of(path) == LICENCES[path.partition(":")[0]]
    assert public_sources()[0].licence_of("unsloth/Radiology_mini") == ("cc-by-nc-2.0", True)


def test_rows_of_the_hub(cfg, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    asked = []

    def local(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        if name != "eltorio/ROCO-radiology":
            raise datasets.exceptions.DatasetNotFoundError(f"{name} is not on the hub")
        return load(
            "parquet", data_files=cfg.sources[0].path, split=split, streaming=streaming, cache_dir=tmp_path
        )

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert [*read_rows("eltorio/ROCO-radiology")] == [*read_rows(cfg.sources[0].path)]
    with pytest.raises(SourceError, match="a/b:c: a/b is not on the hub"):
        [*read_rows("a/b:c", "test")]
    assert asked[-1] == ("a/b", "c", "test", True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"need `pip install -e '.\[hubdata\]'`"):
        [*read_rows("a/b")]
    assert source_rows.is_local("a/b.parquet")


def test_settings_that_cannot_be_are_refused(cfg):
    for changed, said in (
        ({"sources": ()}, "one or more of different names"),
        ({"sources": (cfg.sources[0],) * 2}, "one or more of different names"),
        ({"valid": 0.5, "test": 0.5}, "leave a share for training"),
        ({"shortest": -1}, "data.shortest must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            evolve(cfg, **changed)
    with pytest.raises(ValueError, match=r"source '\.\./x'"):
        Source(name="../x", kind="notes", path="a.csv")
    few = evolve(cfg, sources=(evolve(cfg.sources[1], limit=2),))
    with pytest.raises(
        ValueError, match="2 conversations in 1 groups are too few for the splits, valid and test"
    ):
        build_data(few, quiet)
    assert build_data(evolve(few, valid=0.0, test=0.0), quiet)["splits"] == {
        "train": 2,
        "valid": 0,
        "test": 0,
    }
