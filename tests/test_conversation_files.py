"""Files of conversations: the three shapes are one, and a wrong line is named."""

import json

import pytest
from tiny import turns

from medvl.data.conversation_files import read_conversations


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records), encoding="utf-8")
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
    assert read_conversations(write(folder.parent / "y.jsonl", {"image": "b.png", "query": "<image>", "response": "a"}), root=folder)


def test_a_byte_order_mark_and_windows_line_ends_are_read(folder):
    path = folder / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"query": "a\xe2\x80\xa8b", "response": "c"}\r\n\r\n{"query": "d", "response": "e"}')
    assert [(c.line, c.messages[0]["content"]) for c in read_conversations(path)] == [(1, "a\u2028b"), (3, "d")]


GOOD = {"query": "q", "response": "a"}
WRONG = {
    "bad JSON": ('{"query": ', "not a line of JSON in UTF-8"),
    "an array": ("[", "not a line of JSON"),
    "not an object": ("[1, 2]", r"must be a JSON object, one per line, got \[1, 2\]"),
    "unknown shape": ({"text": "q"}, 'must have "messages", or "conversations", or "query" and "response".*found text'),
    "no response": ({"query": "q"}, "found query"),
    "two shapes": (GOOD | {"messages": turns("q", "a")}, "found query, response, messages"),
    "history": (GOOD | {"history": [["a", "b"]]}, '"history"'),
    "empty": ({}, "found nothing"),
    "no assistant": ({"messages": turns("q")}, "needs a turn of the assistant"),
    "wrong order": ({"messages": turns("q", "a")[::-1]}, "got assistant user"),
    "two systems": ({"messages": turns("q", "a", system="s"), "system": "t"}, "got system system user assistant"),
    "unknown role": ({"conversations": [{"from": "bot", "value": "x"}, {"from": "gpt", "value": "x"}]}, "got bot assistant"),
    "list content": ({"messages": [{"role": "user", "content": []}, *turns("q", "a")[1:]]}, "message 0 must be .*got"),
    "number": ({"query": 3, "response": "a"}, "message 0 must be"),
    "null": ({"query": "q", "response": None}, "message 1 must be"),
    "not messages": ({"messages": "q"}, "message 0 must be"),
    "other keys": ({"messages": [turns("q")[0] | {"loss": False}, *turns("q", "a")[1:]]}, 'message 0 must be .*"loss"'),
    "more tags": ({"query": "<image>", "response": "a"}, "got 1 tags and 0 images"),
    "fewer tags": (GOOD | {"images": ["b.png"]}, "got 0 tags and 1 images"),
    "tag in an answer": ({"query": "q", "response": "<image>", "images": ["b.png"]}, "found it in one of the assistant"),
    "images no list": (GOOD | {"images": {"a": 1}}, '"images" must be a list of file names'),
    "images no names": (GOOD | {"images": [None]}, '"images" must be a list of file names'),
    "images twice": (GOOD | {"images": [], "image": "b.png"}, '"images" must be a list of file names'),
    "missing image": ({"query": "<image>", "response": "a", "image": "no.png"}, "image 'no.png' is not there"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lines_are_named(folder, name):
    line, said = WRONG[name]
    path = write(folder / "x.jsonl", GOOD, "", line)
    with pytest.raises(ValueError, match=said) as e:
        read_conversations(path)
    assert str(e.value).startswith(f"{path}, line 3: ")


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
