"""Files of conversations: the three shapes are one, and a wrong line is named."""

import json
import logging
from pathlib import Path

import pytest

from medvl.language.conversations import (
    Conversation,
    check_gold,
    limit_images,
    read_conversations,
    read_tasks,
    warn_of_one_file,
)
from tests.tiny import turns


def write(path, *records):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("data/images/a.png", "data/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "data"


def test_the_three_shapes_are_one(folder):
    two, two_images = "<image>\n<image>\nWas ist neu? é", {"images": ["images/a.png", "./../c.png"]}
    path = write(
        folder / "x.jsonl",
        two_images | {"query": two, "response": "Nichts.", "episode_id": "000058", "year": 2024},
        two_images | {"conversations": [{"from": "human", "value": two}, {"from": "gpt", "value": "Nichts."}]},
        "",
        two_images | {"conversations": [{"from": "user", "value": two}, {"from": "assistant", "value": "Nichts."}]},
        two_images | {"messages": turns(two, "Nichts."), "id": 7},
        {"image": "b.png", "messages": turns("<image>", "a", "b", "", system="Kurz."), "id": "z"},
        {"query": "q", "response": "", "system": "s"},
    )  # fmt: skip
    found = read_conversations(path)
    assert [c.line for c in found] == [1, 2, 4, 5, 6, 7]
    assert [c.id for c in found] == ["000058", "", "", "7", "z", ""]
    assert all(c.messages == tuple(turns(two, "Nichts.")) for c in found[:4])
    assert all(c.images == (folder / "images/a.png", folder / "../c.png") for c in found[:4])
    assert found[0].extra == {"year": 2024}
    assert found[4].images == (folder / "b.png",)
    assert found[4].messages == tuple(turns("<image>", "a", "b", "", system="Kurz."))
    assert found[5].messages == tuple(turns("q", "", system="s"))
    assert read_conversations(
        write(folder.parent / "y.jsonl", {"image": "b.png", "query": "<image>", "response": "a"}), root=folder
    )


def test_a_byte_order_mark_and_windows_line_ends_are_read(folder):
    path = folder / "x.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"query": "a\xe2\x80\xa8b", "response": "c"}\r\n\r\n{"query": "d", "response": "e"}'
    )
    assert [(c.line, c.messages[0]["content"]) for c in read_conversations(path)] == [
        (1, "a\u2028b"),
        (3, "d"),
    ]


GOOD = {"query": "q", "response": "a"}
WRONG = {
    "bad JSON": ('{"query": ', "not a line of JSON in UTF-8"),
    "deep JSON": ("[" * 100_000, "not a line of JSON in UTF-8"),
    "videos": (
        GOOD | {"videos": ["a.mp4"]},
        'must not have "videos": videos are not read; give frames as images',
    ),
    "audios": (GOOD | {"audios": ["a.wav"]}, 'must not have "audios": sound is not read'),
    "objects": (GOOD | {"objects": {"ref": ["x"], "bbox": [[0, 0, 1, 1]]}}, 'must not have "objects": boxes'),
    "rejected": (
        GOOD | {"rejected_response": "b"},
        'must not have "rejected_response": pairs of a better and a worse answer',
    ),
    "rejected messages": (
        {"messages": turns("q", "a"), "rejected_messages": turns("q", "b")},
        'must not have "rejected_messages"',
    ),
    "a bad answer of KTO": (GOOD | {"label": False}, 'must not have "label": false: in KTO'),
    "a good answer of KTO": (GOOD | {"label": True}, 'must not have "label": true: in KTO'),
    "tools": (
        {"messages": turns("q", "a"), "tools": [{"name": "f"}]},
        'must not have "tools": tool calls',
    ),
    "another key for images": (
        GOOD | {"image_path": "b.png"},
        'must not have "image_path": images are read from "images"',
    ),
    "tag of a video": (
        {"query": "<video>q", "response": "a"},
        "the tag <video> of the user stands for something that is not read",
    ),
    "tag of a box": (
        {"query": "q", "response": "<ref-object><bbox>"},
        "the tag <ref-object> of the assistant stands for",
    ),
    "tag of sound": ({"query": "<audio>q", "response": "a"}, "the tag <audio> of the user"),
    "numbered images": ({"query": "<image_1> q", "response": "a"}, "the tag <image_1> of the user"),
    "Phi's images": ({"query": "<|image_1|> q", "response": "a"}, r"the tag <\|image_1\|> of the user"),
    "Alpaca without output": ({"instruction": "q", "input": ""}, "found instruction, input"),
    "Alpaca with a list": (
        {"instruction": "q", "input": [1], "output": "a"},
        '"instruction" and "input" must be texts',
    ),
    "an image on the web": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/a.png"}}]},
                *turns("q", "a")[1:],
            ]
        },
        'message 0: an image must be the name of a file, got "https://x/a.png"; write it to a file',
    ),
    "a part that is no text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
                *turns("q", "a")[1:],
            ]
        },
        'message 0: parts must be {"type": "text".*got {"type": "video"',
    ),
    "images in parts and beside": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "b.png"}]},
                *turns("q", "a")[1:],
            ],
            "images": ["b.png"],
        },
        'images must be in the messages or in "images", not in both',
    ),
    "an array": ("[", "not a line of JSON"),
    "not an object": ("[1, 2]", r"must be a JSON object, one per line, got \[1, 2\]"),
    "unknown shape": (
        {"text": "q"},
        'must have "messages", or "conversations", or "query" and "response".*found text',
    ),
    "no response": ({"query": "q"}, "found query"),
    "two shapes": (GOOD | {"messages": turns("q", "a")}, "found query, response, messages"),
    "history no pairs": (
        GOOD | {"history": ["a", "b"]},
        r'"history" must be a list of \[question, answer\], got \["a", "b"\]',
    ),
    "history of messages": (
        {"messages": turns("q", "a"), "history": [["a", "b"]]},
        r'and "history" only beside the last two\)',
    ),
    "empty": ({}, "found nothing"),
    "no assistant": ({"messages": turns("q")}, "needs a turn of the assistant"),
    "wrong order": ({"messages": turns("q", "a")[::-1]}, "got assistant user"),
    "two systems": (
        {"messages": turns("q", "a", system="s"), "system": "t"},
        "got system system user assistant",
    ),
    "unknown role": (
        {"conversations": [{"from": "bot", "value": "x"}, {"from": "gpt", "value": "x"}]},
        "got bot assistant",
    ),
    "list content": (
        {"messages": [{"role": "user", "content": []}, *turns("q", "a")[1:]]},
        "message 0 must be",
    ),
    "number": ({"query": 3, "response": "a"}, "message 0 must be"),
    "null": ({"query": "q", "response": None}, "message 1 must be"),
    "not messages": ({"messages": "q"}, "message 0 must be"),
    "other keys": (
        {"messages": [turns("q")[0] | {"loss": False}, *turns("q", "a")[1:]]},
        'message 0 must be .*"loss"',
    ),
    "more tags": ({"query": "<image>", "response": "a"}, "got 1 tags and 0 images"),
    "fewer tags": (GOOD | {"images": ["b.png"]}, "got 0 tags and 1 images"),
    "tag in an answer": (
        {"query": "q", "response": "<image>", "images": ["b.png"]},
        "found it in one of the assistant",
    ),
    "images no list": (GOOD | {"images": {"a": 1}}, '"images" must be a list of file names'),
    "images no names": (GOOD | {"images": [None]}, '"images" must be a list of file names'),
    "images twice": (GOOD | {"images": ["b.png"], "image": "b.png"}, '"images" must be a list of file names'),
    "half a character": (
        json.dumps(GOOD | {"query": "q \ud800"}),
        r"message 0 must be text .* UTF-8, it holds '\\ud800'",
    ),
    "a name beyond names": (
        {"query": "<image>", "response": "a", "image": "a" * 5000},
        "image 'aaaa.*' does not exist",
    ),
    "a name with a NUL": ({"query": "<image>", "response": "a", "image": "a\0.png"}, "does not exist"),
    "missing image": (
        {"query": "<image>", "response": "a", "image": "no.png"},
        "image 'no.png' does not exist",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lines_are_named(folder, name):
    line, said = WRONG[name]
    path = write(folder / "x.jsonl", GOOD, "", line)
    with pytest.raises(ValueError, match=said) as e:
        read_conversations(path)
    assert str(e.value).startswith(f"{path}, line 3: ")


def test_keys_that_mean_nothing_here_stay_beside_the_conversation(folder):
    line = GOOD | {"label": "effusion", "videos": [], "objects": None, "tools": "", "category": "pos"}
    (c,) = read_conversations(write(folder / "x.jsonl", line))
    assert c.extra["label"] == "effusion"
    assert c.extra["category"] == "pos"
    assert c.place == f"{folder / 'x.jsonl'}, line 1"
    assert Conversation(messages=()).place == "this conversation"


def test_what_is_empty_is_as_if_it_were_not_there(folder):
    for empty in ([], None, ""):
        line = GOOD | {"history": empty, "system": empty, "images": empty, "image": empty}
        (c,) = read_conversations(write(folder / "x.jsonl", line))
        assert c.messages == tuple(turns("q", "a"))
        assert c.images == ()
        (c,) = read_conversations(
            write(folder / "x.jsonl", {"messages": turns("q", "a"), "history": empty, "system": empty})
        )
        assert c.messages == tuple(turns("q", "a"))
    (c,) = read_conversations(
        write(folder / "x.jsonl", {"query": "<image>", "response": "a", "images": [], "image": "b.png"})
    )
    assert c.images == (folder / "b.png",)
    (c,) = read_conversations(
        write(
            folder / "x.jsonl",
            {"query": "<image>", "response": "a", "images": [{"path": "b.png", "bytes": None}]},
        )
    )
    assert c.images == (folder / "b.png",)


def test_alpaca_and_history(folder):
    lines = [
        {
            "instruction": "Translate.",
            "input": "Ödem",
            "output": "oedema",
            "system": "s",
            "history": [["a", "b"], ["c", "d"]],
        },
        {"instruction": "Name it.", "input": "", "output": "CT."},
        {
            "query": "<image>c",
            "response": "d",
            "history": [["<image>a", "b"]],
            "images": ["b.png", "images/a.png"],
        },
    ]
    found = read_conversations(write(folder / "x.jsonl", *lines))
    assert found[0].messages == tuple(turns("a", "b", "c", "d", "Translate.\nÖdem", "oedema", system="s"))
    assert found[1].messages == tuple(turns("Name it.", "CT."))
    assert found[2].messages == tuple(turns("<image>a", "b", "<image>c", "d"))
    assert found[2].images == (folder / "b.png", folder / "images/a.png")


def test_contents_as_lists_of_parts(folder):
    def part(kind, value):
        return {"type": kind, kind: value}

    user = [
        part("text", "First "),
        part("image_url", {"url": "images/a.png"}),
        part("text", "\nthen "),
        part("image", "b.png"),
    ]
    lines = [
        {
            "messages": [
                {"role": "user", "content": user},
                {"role": "assistant", "content": [part("text", "Both.")], "tool_calls": None},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, part("text", "q")]},
                *turns("q", "a")[1:],
            ],
            "images": ["b.png"],
        },
        {
            "messages": [
                {"role": "user", "content": [part("image_url", f"file://{folder}/b.png")]},
                *turns("q", "a")[1:],
            ]
        },
    ]
    found = read_conversations(write(folder / "x.jsonl", *lines))
    assert found[0].messages == tuple(turns("First <image>\nthen <image>", "Both."))
    assert found[0].images == (folder / "images/a.png", folder / "b.png")
    assert found[1].messages == tuple(turns("<image>q", "a"))
    assert found[1].images == found[2].images == (folder / "b.png",)


def test_arrays_of_llava_llava_med_and_vl_health(folder):
    llava = {
        "id": "0",
        "image": "b.png",
        "conversations": [{"from": "human", "value": "q\n<image>"}, {"from": "gpt", "value": "a"}],
    }
    med = {"id": "1", "image": "b.png", "domain": {"ct_scan": True}, "conversatons": llava["conversations"]}
    health = {"image": "images/a.png", "conversations": llava["conversations"]}
    text = {"id": "3", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    path = folder / "x.json"
    for indent in (None, 2):
        path.write_text(json.dumps([llava, med, health, text], indent=indent))
        found = read_conversations(path)
        assert [c.id for c in found] == ["0", "1", "", "3"]
        assert all(c.messages == tuple(turns("q\n<image>", "a")) for c in found[:3])
        assert [len(c.images) for c in found] == [1, 1, 1, 0]
    lines = path.read_text().split("\n")
    assert [lines[c.line - 1].strip() for c in found] == ["{"] * 4
    path.write_text(json.dumps([llava, text, llava | {"image": "no.png"}], indent=1))
    with pytest.raises(
        ValueError,
        match=rf"x.json, line {path.read_text()[: path.read_text().index('no.png')].count(chr(10)) - 1}, record 3: ",
    ):
        read_conversations(path)


def test_arrays_that_are_broken(folder):
    path = folder / "x.json"
    for content, said in (
        ('[{"query": "q", "response": "a"},\n', r"line 2, record 2: not JSON, or the array is cut off"),
        ('[{"query": "q", "response": "a"}\n{"query": "q"}]', "line 1, record 1: a comma or ] must follow"),
        ('[{"query": "q", "response": "a"}] x', "nothing may follow the array"),
        ("\n[[1]]", r"line 2, record 1: must be a JSON object"),
        ("[" * 100_000, "line 1, record 1: not JSON"),
        ("[]", "holds no conversation"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            read_conversations(path)
    path.write_bytes(b'[{"query": "q",\n "response": "\xff"}]')
    with pytest.raises(ValueError, match=r"x.json, line 2: not UTF-8"):
        read_conversations(path)


def test_an_answer_without_a_word_is_named_where_it_must_be_compared(folder):
    found = read_conversations(write(folder / "x.jsonl", GOOD, "", GOOD | {"response": " ."}))
    check_gold(found[:1])
    with pytest.raises(
        ValueError, match=r'x.jsonl, line 3: the last answer must hold a word to be compared with, got " ."'
    ):
        check_gold(found)
    found = read_conversations(write(folder / "x.jsonl", {"messages": turns("q", "", "r", "a")}))
    check_gold(found)
    with pytest.raises(
        ValueError, match=r'x.jsonl, line 1: each answer must hold a word to be compared with, got ""'
    ):
        check_gold(found, every=True)


def test_wrong_files(folder):
    with pytest.raises(ValueError, match=r"x.jsonl: no such file"):
        read_conversations(folder / "x.jsonl")
    for text in ("", "\n\n"):
        (folder / "x.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"x.jsonl: holds no conversation"):
            read_conversations(folder / "x.jsonl")
    (folder / "x.jsonl").write_bytes(b'{"query": "\xff", "response": "a"}')
    with pytest.raises(ValueError, match=r"x.jsonl, line 1: not a line of JSON in UTF-8"):
        read_conversations(folder / "x.jsonl")


def test_relative_images_start_from_the_root(tmp_path):
    """As LoraRetriever's do: "x.png" in the project's folder, "./../x.png" beside it, wherever the file of conversations lies."""
    for name in ("project/in.png", "project/sub/in.png", "beside.png", "data/lines.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [
        "in.png",
        "./in.png",
        "sub/in.png",
        "./../beside.png",
        "../beside.png",
        str(tmp_path / "beside.png"),
    ]
    path = write(
        tmp_path / "data/lines.jsonl", *({"query": "<image>", "response": "a", "images": [n]} for n in names)
    )
    wanted = [
        "project/in.png",
        "project/in.png",
        "project/sub/in.png",
        "beside.png",
        "beside.png",
        "beside.png",
    ]
    assert [c.images[0].resolve() for c in read_conversations(path, root=tmp_path / "project")] == [
        (tmp_path / name).resolve() for name in wanted
    ]
    with pytest.raises(
        ValueError, match=r"line 1: image 'in.png' does not exist \(relative names start from"
    ):
        read_conversations(path)


def held(*contents, images=()):
    return Conversation(
        messages=tuple(turns(*contents)),
        images=tuple(map(Path, images)),
        id="7",
        line=3,
        extra={"year": 2024},
    )


def test_the_last_images_of_a_turn_are_kept():
    c = held(
        "<image>\n<image>\n<image>\nWhat is new?",
        "Nothing.",
        "And <image> to <image>?",
        "No.",
        "Sure?",
        "Yes.",
        images="abcde",
    )
    got = limit_images(c, 1)
    assert got.images == (Path("c"), Path("e"))
    assert [m["content"] for m in got.messages] == [
        "<image>\nWhat is new?",
        "Nothing.",
        "And  to <image>?",
        "No.",
        "Sure?",
        "Yes.",
    ]
    assert (got.id, got.line, got.extra) == (c.id, c.line, c.extra)
    got = limit_images(c, 2)
    assert got.images == tuple(map(Path, "bcde"))
    assert got.messages[0]["content"] == "<image>\n<image>\nWhat is new?"
    assert got.messages[1:] == c.messages[1:]
    assert c.images == tuple(map(Path, "abcde"))  # untouched
    for most in (0, 3, 12):
        assert limit_images(c, most) is c


def test_other_tags_and_line_ends():
    c = held("[i.*]\r\n[i.*]\n\n<image>[i.*]x", "", images="abc")
    assert [m["content"] for m in limit_images(c, 1, tag="[i.*]").messages] == ["\n<image>[i.*]x", ""]
    assert limit_images(c, 1, tag="[i.*]").images == (Path("c"),)
    system = Conversation(
        messages=tuple(turns("<image><image>q", "a", system="s")), images=(Path("a"), Path("b"))
    )
    assert limit_images(system, 1).messages == tuple(turns("<image>q", "a", system="s"))


def test_limits_that_are_none():
    with pytest.raises(
        ValueError, match="limit_images: most must be at least 1 image, or 0 for no limit, got -1"
    ):
        limit_images(held("q", "a"), -1)
    with pytest.raises(
        ValueError, match="limit_images: every tag '<image>' needs its image, got 2 tags and 1 images"
    ):
        limit_images(held("<image><image>", "a", images="a"), 1)


def test_one_file_for_all_splits_is_told(caplog):
    warn_of_one_file("{folder}/{split}.json")
    assert not caplog.records
    warn_of_one_file("data/all.json")
    assert "data/all.json: is one file for all splits, so the test data are trained on" in caplog.text


def test_a_file_is_limited_with_one_warning(folder, caplog):
    three = {"query": "<image>" * 3 + "q", "response": "a", "images": ["b.png", "b.png", "images/a.png"]}
    path = write(
        folder / "x.jsonl",
        three,
        three | {"query": "<image> <image>\n<image>"},
        {"query": "q", "response": "a"},
    )
    with caplog.at_level(logging.WARNING):
        found = read_conversations(path, max_images=3)
    assert found == read_conversations(path)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        found = read_conversations(path, max_images=1)
    assert [[p.name for p in c.images] for c in found] == [["a.png"], ["a.png"], []]
    assert [c.messages[0]["content"] for c in found] == ["<image>q", " <image>", "q"]
    assert caplog.messages == [
        f"{path}: 4 images of 2 of 3 conversations are left out: a turn of the user keeps its last 1"
    ]


def test_tasks_from_one_file_each(folder):
    for task in ("mri", "ct", "chest x-ray"):
        (folder / task).mkdir()
        write(
            folder / task / "train.jsonl",
            {"query": f"{task} 1", "response": "a"},
            GOOD | {"task": task, "category": "pos"},
        )
    write(folder / "ct" / "test.jsonl", GOOD)
    (folder / "mri" / "deep").mkdir()
    write(folder / "mri" / "deep" / "train.jsonl", GOOD)
    found = read_tasks(folder / "{task}" / "{split}.jsonl", "train")
    assert [c.extra["task"] for c in found] == ["chest x-ray"] * 2 + ["ct"] * 2 + ["mri"] * 2
    assert [c.messages[0]["content"] for c in found[::2]] == ["chest x-ray 1", "ct 1", "mri 1"]
    assert [c.line for c in found] == [1, 2] * 3
    assert found[1].extra == {"task": "chest x-ray", "category": "pos"}
    assert [c.extra["task"] for c in read_tasks(folder / "{task}" / "{split}.jsonl", "test")] == ["ct"]
    with pytest.raises(ValueError, match=r"\{task\}/valid.jsonl: no file has this name, for any task"):
        read_tasks(folder / "{task}" / "{split}.jsonl", "valid")
    write(folder / "mri" / "train.jsonl", GOOD, "", GOOD | {"task": "ct"})
    with pytest.raises(
        ValueError,
        match=r'mri/train.jsonl, line 3: "task" must be "mri" like the file\'s, or not be there, got "ct"',
    ):
        read_tasks(folder / "{task}" / "{split}.jsonl", "train")


def test_patterns_are_taken_literally(folder):
    odd = folder / "a[b]*{x}"
    odd.mkdir()
    (folder / "a*").mkdir()
    for name in ("ct_train.jsonl", "us_ct_train.jsonl", "train.jsonl", "_train.jsonl", "ct_train_old.jsonl"):
        write(odd / name, GOOD)
        write(folder / "a*" / name, GOOD)
    assert [c.extra["task"] for c in read_tasks(f"{odd}/{{task}}_{{split}}.jsonl", "train")] == [
        "ct",
        "us_ct",
    ]
    for task, name in (("ct", "ct"), ("us", "mri")):
        (folder / task).mkdir()
        write(folder / task / f"{name}.jsonl", GOOD)
    assert [c.extra["task"] for c in read_tasks(f"{folder}/{{task}}/{{task}}.jsonl", "train")] == ["ct"]


def test_tasks_from_the_lines_of_one_file(folder):
    lines = [{"query": str(i), "response": "a", "task": t} for i, t in enumerate(("mri", "ct", "mri"))]
    write(folder / "train.jsonl", *lines)
    found = read_tasks(folder / "{split}.jsonl", "train")
    assert [c.extra["task"] for c in found] == ["mri", "ct", "mri"]
    assert [c.messages[0]["content"] for c in found] == ["0", "1", "2"]
    write(folder / "organs.jsonl", GOOD | {"organ": "chest"})
    assert read_tasks(folder / "organs.jsonl", "any", key="organ")[0].extra == {
        "organ": "chest",
        "task": "chest",
    }
    with pytest.raises(ValueError, match=r"test.jsonl: no such file"):
        read_tasks(folder / "{split}.jsonl", "test")
    for line, said in (
        (GOOD, "only what every line has"),
        (GOOD | {"year": 1}, "only year"),
        (GOOD | {"task": 3}, "3"),
        (GOOD | {"task": " "}, '" "'),
    ):
        path = write(folder / "train.jsonl", lines[0], "", line)
        with pytest.raises(ValueError, match=f'line 3: "task" must be there and be text, got {said}$') as e:
            read_tasks(folder / "{split}.jsonl", "train")
        assert str(e.value).startswith(f"{path}, line 3: ")


def test_what_reading_may_be_told_reaches_every_task(folder):
    line = {"query": "[i][i]", "response": "a", "images": ["images/a.png", "b.png"]}
    for task in ("ct", "mri"):
        (folder / task).mkdir()
        write(folder / task / "train.jsonl", line)
    found = read_tasks(folder / "{task}/train.jsonl", "", tag="[i]", root=folder, max_images=1)
    assert [(c.messages[0]["content"], c.images) for c in found] == [("[i]", (folder / "b.png",))] * 2
