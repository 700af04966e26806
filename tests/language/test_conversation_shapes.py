"""Conversations in the shapes of other programs: nothing is lost between any two of them."""

import base64
import hashlib
import json
import random

import pytest
from PIL import Image

from medvl.language.conversation_shapes import (
    SHAPES,
    convert_conversations,
    format_record,
    write_conversations,
)
from medvl.language.conversations import Conversation, read_conversations
from tests.tiny import turns

WORDS = [
    "Lasix",
    "40 mg",
    "µg/mL",
    "<b>",
    "\n",
    "  ",
    "é漢",
    '"',
    "\\",
    "\u2028",
    "[image]",
    "<|im_end|>",
    "{}",
]
EXTRAS = [
    ("category", "count"),
    ("year", 2024),
    ("score", 0.1),
    ("facts", {"a": [1, None, "é"]}),
    ("empty", ""),
]


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        path = tmp_path / "data" / f"images/{i} ü.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (i, 0, 0)).save(path)
    return tmp_path / "data"


def random_text(rng, images):
    pieces = rng.choices(WORDS, k=rng.randrange(1, 6)) + ["<image>"] * images
    rng.shuffle(pieces)
    return "".join(pieces)


def random_conversation(rng, folder, answers):
    names = sorted((folder / "images").iterdir())
    messages, images = [], []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": random_text(rng, 0)})
    for _ in range(answers):
        number = rng.choice([0, 0, 1, 1, 2, 4])
        images += rng.choices(names, k=number)
        messages.append({"role": "user", "content": random_text(rng, number)})
        messages.append({"role": "assistant", "content": random_text(rng, 0)})
    extra = dict(rng.sample(EXTRAS, k=rng.randrange(4)))
    name = rng.choice(["", "case-7", "é 1"])
    return Conversation(messages=tuple(messages), images=tuple(images), id=name, extra=extra)


def content(conversations):
    return [(c.messages, [p.resolve() for p in c.images], c.id, c.extra) for c in conversations]


def test_a_thousand_random_conversations_survive_every_pair_of_shapes(folder):
    rng = random.Random(0)
    one = [random_conversation(rng, folder, 1) for _ in range(400)]
    several = [random_conversation(rng, folder, rng.randrange(2, 4)) for _ in range(600)]
    assert sum(len(c.images) > 1 for c in one + several) > 200
    for shapes, conversations in ((SHAPES, one), (tuple(s for s in SHAPES if s != "completion"), several)):
        # In another folder, so that names of images change.
        other = folder.parent / "other"
        for shape in shapes:
            for place in (folder, other):
                write_conversations(place / f"{shape}.jsonl", conversations, shape)
                assert content(read_conversations(place / f"{shape}.jsonl")) == content(conversations)
        for first in shapes:
            for second in shapes:
                target = other / "converted.jsonl"
                assert convert_conversations(folder / f"{first}.jsonl", target, second) == len(conversations)
                assert target.read_bytes() == (other / f"{second}.jsonl").read_bytes()


def test_arrays_are_written_where_the_name_says_so(folder):
    conversations = [random_conversation(random.Random(i), folder, 2) for i in range(3)]
    write_conversations(folder / "x.json", conversations, "llava")
    assert len(json.loads((folder / "x.json").read_text())) == 3
    assert content(read_conversations(folder / "x.json")) == content(conversations)


def test_the_shapes_as_their_programs_write_them(folder):
    image = folder / "images/0 ü.png"
    other = folder / "images/1 ü.png"
    messages = tuple(turns("<image>\nWhat?", "A.", "And <image>?", "B.", system="Short."))
    c = Conversation(messages=messages, images=(image, other), id="7", extra={"year": 2024})
    about = {"id": "7", "year": 2024}
    names = ["images/0 ü.png", "images/1 ü.png"]
    assert format_record(c, "llava", folder) == about | {
        "conversations": [
            {"from": "system", "value": "Short."},
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A."},
            {"from": "human", "value": "And <image>?"},
            {"from": "gpt", "value": "B."},
        ],
        "image": names,
    }
    assert format_record(c.until(3), "llava", folder)["image"] == names[0]
    assert format_record(c, "swift", folder) == about | {"messages": list(messages), "images": names}

    def text(value):
        return {"type": "text", "text": value}

    trl = [
        {"role": "system", "content": [text("Short.")]},
        {"role": "user", "content": [{"type": "image"}, text("\nWhat?")]},
        {"role": "assistant", "content": [text("A.")]},
        {"role": "user", "content": [text("And "), {"type": "image"}, text("?")]},
        {"role": "assistant", "content": [text("B.")]},
    ]
    assert format_record(c, "trl", folder) == about | {"messages": trl, "images": names}
    assert format_record(c.until(3), "completion", folder) == about | {
        "prompt": trl[:2],
        "completion": trl[2:3],
        "images": names[:1],
    }
    openai = format_record(c, "openai", folder)
    assert openai["messages"][1]["content"] == [
        {"type": "image_url", "image_url": {"url": names[0]}},
        text("\nWhat?"),
    ]
    assert openai["messages"][0] == {"role": "system", "content": "Short."}
    assert "images" not in openai


def test_files_keep_the_id_they_had(folder):
    records = [
        {"id": 12, "query": "q", "response": "a"},
        {"episode_id": "e", "query": "q", "response": "a"},
        {"id": "x", "episode_id": "e", "query": "q", "response": "a", "note": "half \ud800"},
    ]
    source = folder / "x.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    for shape in SHAPES:
        convert_conversations(source, folder / "y.jsonl", shape)
        lines = [json.loads(line) for line in (folder / "y.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k in ("id", "episode_id", "note")} for line in lines]
        assert kept == [{k: v for k, v in r.items() if k not in ("query", "response")} for r in records]


def test_data_urls_become_files_once(folder):
    content = (folder / "images/3 ü.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "q"}]}, turns("q", "a")[1]]
    source = folder / "x.jsonl"
    source.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match="`invoke conversations convert` does it with data: URLs"):
        read_conversations(source)
    target = folder.parent / "out" / "y.jsonl"
    convert_conversations(source, target, "swift")
    (c,) = read_conversations(target)
    assert c.messages == tuple(turns("<image><image>q", "a"))
    assert [path.name for path in c.images] == [f"{hashlib.sha256(content).hexdigest()}.png"] * 2
    assert c.images[0].read_bytes() == content
    assert len([*(target.parent / "images").iterdir()]) == 1


TRL = {"prompt": turns("q"), "completion": turns("q", "a")[1:]}
IMAGE = {"type": "image", "image": "images/0 ü.png"}
WRONG = {
    "a text that holds the tag beside an image": (
        {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "the <image> tag"}]}, turns("", "a")[1]]},
        r"line 1: message 0: a text beside images must not hold <image>, .* such as \[image\]",
    ),
    "a text that holds the tag": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "the <image> tag"}]}, turns("", "a")[1]]},
        r"got 1 tags and 0 images; where a text means the word and no image, write it in another way",
    ),
    "a tag in an answer": (
        {"messages": turns("q", "see <image>")},
        r"found it in one of the assistant; where a text means .* such as \[image\]",
    ),
    "an image on the web": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "http://x/a.png"}]}, turns("", "a")[1]]},
        "must be the name of a file, got .*http",
    ),
    "no image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:text/html,x"}]}, turns("", "a")[1]]},
        "a data: URL must be an image in base64",
    ),
    "no base64": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,?"}]}, turns("", "a")[1]]},
        "a data: URL must be an image in base64",
    ),
    "half an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,iVBORw0="}]}, turns("", "a")[1]]},
        "a data: URL is no whole image",
    ),
    "texts": ({"prompt": "q", "completion": "a"}, '"prompt" and "completion" must be lists of messages'),
    "answers in the prompt": ({"prompt": turns("q", "a", "r"), "completion": turns("q", "a")[1:]}, "got the roles user assistant user assistant: only"),
    "two in the completion": (TRL | {"completion": turns("q", "a", "r", "b")[1:]}, "must have no answer and .* only one"),
    "nothing in the completion": (TRL | {"completion": []}, "got the roles user: only"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_records_are_named_and_nothing_is_written(folder, name):
    record, said = WRONG[name]
    source, target = folder / "x.jsonl", folder.parent / "out" / "y.jsonl"
    source.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=said):
        convert_conversations(source, target, "trl")
    assert not target.parent.exists()


def test_what_a_shape_cannot_hold_is_refused(folder):
    c = Conversation(messages=tuple(turns("q", "a", "r", "b")))
    for shape, changed, said in (
        ("alpaca", c, "shape must be one of llava, .*, got 'alpaca'"),
        ("completion", c, "takes one answer, got several, .* use the shape trl"),
        ("swift", Conversation(messages=c.messages, extra={"messages": 1}), 'has its own "messages"'),
        ("swift", Conversation(messages=c.messages, extra={"videos": ["a"]}), 'must not have "videos"'),
        ("llava", Conversation(messages=c.messages, extra={"image": "a.png"}), "got 0 tags and 1 images"),
        ("llava", Conversation(messages=c.messages, extra={"system": "s"}), "without loss"),
        (
            "openai",
            Conversation(messages=tuple(turns("<image>", "a"))),
            "got 1 tags and 0 images",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            write_conversations(folder / "y.jsonl", [changed], shape)
    assert not (folder / "y.jsonl").exists()


def test_a_prompt_beside_messages_stays_another_key(folder):
    source = folder / "x.jsonl"
    source.write_text(json.dumps({"messages": turns("q", "a"), "prompt": "q", "completion": "a"}) + "\n")
    (c,) = read_conversations(source)
    assert c.extra == {"prompt": "q", "completion": "a"}
    with pytest.raises(ValueError, match='the shape completion has its own "completion"'):
        convert_conversations(source, folder / "y.jsonl", "completion")
    convert_conversations(source, folder / "y.jsonl", "openai")
    assert content(read_conversations(folder / "y.jsonl")) == content([c])
