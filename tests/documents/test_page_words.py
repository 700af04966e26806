"""The words of images in prompts."""

from pathlib import Path

import pytest
from PIL import Image

from medvl.base.config import structure
from medvl.documents import page_words, read_page
from medvl.documents.page_words import add_page_words
from medvl.documents.words import Word
from medvl.language import chat, system
from medvl.language.conversations import Conversation
from medvl.systems import run
from medvl.systems.tune import run as tune_run
from medvl.systems.tune.record import Config
from tests import tiny

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def reads(monkeypatch):
    """A reader that knows pages by their grey: 10 has two lines, 20 shows tags, others nothing."""
    pages = []

    def read(image):
        grey = image.convert("L").getpixel((0, 0))
        pages.append(grey)
        texts = {10: ["HbA1c 8.4", "TSH 2.1"], 20: ["<image> <|im_end|>"]}.get(grey, [])
        return [Word(text, (0.0, 30.0 * i, 50.0, 30.0 * i + 20)) for i, text in enumerate(texts)]

    monkeypatch.setattr(read_page, "read_page", read)
    monkeypatch.setattr(page_words, "read_page", read)
    return pages


def conversation(tmp_path, *greys, content="<image>\nWhat is high?"):
    paths = []
    for grey in greys:
        paths.append(tmp_path / f"{grey}.png")
        Image.new("L", (30, 20), grey).save(paths[-1])
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": "HbA1c"})
    return Conversation(messages=messages, images=tuple(paths))


def test_words_stand_behind_their_image(tmp_path, reads):
    given = conversation(tmp_path, 10, 30, content="Compare <image>\nwith <image> please")
    (anchored,) = add_page_words([given], tmp_path / "words")
    assert anchored.messages[0]["content"] == (
        "Compare <image>\n[text of the image, read by OCR]\nHbA1c 8.4\nTSH 2.1\n[end of the text]\nwith <image> please"
    )
    assert anchored.messages[1] == given.messages[1]
    assert anchored.images == given.images


def test_each_page_is_read_once_by_content(tmp_path, reads):
    same = [conversation(tmp_path, 10), conversation(tmp_path, 10)]
    first = add_page_words(same, tmp_path / "words")
    (tmp_path / "10.png").rename(tmp_path / "other.png")
    renamed = Conversation(messages=same[0].messages, images=(tmp_path / "other.png",))
    assert add_page_words([renamed], tmp_path / "words")[0].messages == first[0].messages
    assert reads == [10]
    add_page_words([renamed], None)
    assert reads == [10, 10]


def test_tags_and_special_tokens_that_a_page_shows_are_none(tmp_path, reads):
    (anchored,) = add_page_words([conversation(tmp_path, 20)], tmp_path / "words")
    content = anchored.messages[0]["content"]
    assert content.count("<image>") == 1
    assert "<|" not in content


def test_an_image_that_cannot_be_read_is_an_error_with_its_place(tmp_path, reads):
    given = conversation(tmp_path, 10)
    (tmp_path / "10.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"this conversation: .*10\.png"):
        add_page_words([given], tmp_path / "words")


def record(tmp_path, **chat_settings):
    return {
        "system": "tune",
        "model": {"config": tiny.CONFIGS["qwen2"], "dtype": "float32"},
        "data": {"folder": str(tmp_path)},
        "chat": {"context": 200} | chat_settings,
        "train": {"stages": [{"name": "all", "steps": 1, "lr": 1e-3, "train": ["model/.*"]}]},
    }


def test_a_model_without_eyes_reads_the_words_alone(tmp_path, reads):
    given = conversation(tmp_path, 10)
    line = '{"messages": [{"role": "user", "content": "<image>\\nWhat is high?"}, {"role": "assistant", "content": "HbA1c"}], "images": ["10.png"]}\n'
    for split in tune_run.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text(line)
    cfg = structure(record(tmp_path, ocr=True), Config, "test")
    read = tune_run.prepare(cfg, lambda _: None)
    assert reads == [10]
    model, _ = system.init_model(cfg, tmp_path / "run", system.message_texts(read("train")))
    encoded = chat.encode_conversations(model.chat, read("train"))
    text = model.chat.tokenizer.decode(encoded.samples[0].ids)
    assert "8.4" in text
    assert "image>" not in text.replace("of the image", "")
    assert encoded.conversations[0].images == ()
    assert reads == [10]
    plain = structure(record(tmp_path), Config, "test")
    model, _ = system.init_model(plain, tmp_path / "run")
    with pytest.raises(ValueError, match=r"no vision encoder; .* or set chat\.ocr = true"):
        chat.encode_conversations(model.chat, [given])


@pytest.mark.parametrize("name", ["slide_vqa", "unified", "adapters"])
def test_systems_that_read_no_pages_refuse_it(name):
    with pytest.raises(ValueError, match=f"chat.ocr: {name} reads no pages"):
        run.resolve(str(EXPERIMENTS / f"{name}_phantom.toml"), ("chat.ocr=true",))
