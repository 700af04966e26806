"""`invoke ask` and `invoke draw` with plugins and with runs."""

import json

import pytest
from PIL import Image

from medvl.commands import pictures, questions
from medvl.hub import plugin_files
from medvl.systems.unified import draw as module
from medvl.systems.unified.record import CLIP
from tests.systems.unified.pieces import make_files, make_plugin
from tests.tiny import drawn

RUN = {"plugin": "", "run_path": "run", "vq": "", "tower": CLIP}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_files(tmp_path_factory.mktemp("unified"))
    for task in ("understand", "draw"):
        plugin_files.write_plugin(make_plugin(folder, task), folder / task)
    drawn((40, 30)).save(folder / "image.png")
    drawn((40, 30)).convert("L").convert("I").point(lambda v: v * 200).convert("I;16").save(
        folder / "deep.png"
    )
    return folder


def ask(folder, text="Which organ?", image="image.png", plugin="understand", **settings):
    settings = {"max_tokens": 4, "tower": str(folder / "tower")} | settings
    questions.print_answer(text, plugin=str(folder / plugin), images=[str(folder / image)], **settings)


def draw(folder, out, text="Draw.", **settings):
    settings = {
        "plugin": str(folder / "draw"),
        "vq": str(folder / "vq"),
        "tower": str(folder / "tower"),
    } | settings
    pictures.draw_pictures(text, str(out), **settings)


def test_a_plugin_answers(folder, capsys):
    ask(folder)
    ask(folder, image="deep.png", window="0,51000")
    assert capsys.readouterr().out.count("not for diagnosis") == 2
    with pytest.raises(ValueError, match="greys of more than 8 bits"):
        ask(folder, image="deep.png")
    with pytest.raises(ValueError, match="got page=3"):
        ask(folder, page=3)
    with pytest.raises(ValueError, match="--window must be black,white"):
        ask(folder, window="a")
    with pytest.raises(ValueError, match=r"got \[0.0, inf\]; both must be finite"):
        ask(folder, image="deep.png", window="0,inf")
    with pytest.raises(ValueError, match=r"needs either --adapters .* or --plugin"):
        ask(folder, run="run")
    with pytest.raises(ValueError, match=r"must be a plugin to understand, found one to draw"):
        ask(folder, plugin="draw")


def test_a_plugin_draws_one_picture_or_many_and_goes_on(folder, tmp_path, capsys):
    draw(folder, tmp_path / "out.png", image=str(folder / "image.png"))
    assert Image.open(tmp_path / "out.png").size == (8, 8)
    lines = [{"text": "A liver.", "image": "image.png"}, {"text": "A mass on the left."}]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):
        draw(folder, tmp_path / "many", "", questions=str(folder / "texts.jsonl"), batch=1)
    assert sorted(path.name for path in (tmp_path / "many" / "pictures").glob("*")) == ["0.png", "1.png"]
    assert "2 pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": "out.jpg"}, "--out must end in .png"),
        ({"plugin": ""}, "needs either --run RUN, or --plugin"),
        ({"text": ""}, "needs either --question .* or --questions"),
        (
            {"plugin": "understand"},
            "must be a plugin to draw, found one to understand; .* L14 and XL32 only understand",
        ),
        ({"vq": ""}, "needs the VQ model of the plugin's 64 codes"),
        ({"text": " "}, "needs either --question .* or --questions"),
        ({"image": ""}, "'': there is no such image"),
        ({"page": 0}, "page and window are for files of images, and there is none"),
        ({"window": "0,1"}, "page and window are for files of images, and there is none"),
        (RUN | {"vq": "vq"}, "is a run, .* leave --vq out"),
        (RUN | {"quantize": "nf4"}, "leave --quantize out"),
        ({"lines": '{"question": "a"}'}, 'line 1: "text" and "target" must be texts, got null'),
        ({"lines": '{"text": "a", "image": "gone.png"}'}, "line 1: image 'gone.png' does not exist"),
        ({"lines": '{"text": "a", "img": "a.png"}'}, 'line 1: .* images are read from "images"'),
        ({"lines": '{"text": "a <idx_5>"}'}, "line 1: .* must not hold special tokens"),
        ({"lines": ""}, "holds no drawing"),
        (RUN | {"lines": '{"text": "a"}', "window": "0,1"}, "leave --window out"),
    ],
)
def test_what_cannot_be_drawn_is_refused(folder, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    settings = {"out": "out.png"} | settings
    if "lines" in settings:
        (tmp_path / "texts.jsonl").write_text(settings.pop("lines"))
        settings |= {"questions": "texts.jsonl", "text": "", "out": "many"}
    if settings.get("plugin"):
        settings["plugin"] = str(folder / settings["plugin"])
    with pytest.raises(ValueError, match=message):
        draw(folder, **settings)
    assert not (tmp_path / "out.png").exists()


def test_pictures_that_another_process_draws_meanwhile_are_seen(folder, tmp_path, monkeypatch):
    def encode(*args):
        (tmp_path / "many" / "pictures").mkdir(parents=True)
        drawn((8, 8)).save(tmp_path / "many" / "pictures" / "1.png")
        return encode_drawings(*args)

    encode_drawings = module.encode_drawings
    monkeypatch.setattr(module, "encode_drawings", encode)
    (tmp_path / "texts.jsonl").write_text('{"text": "A liver."}')
    with pytest.raises(ValueError, match=r"must be new or hold pictures 0 to 0 .* found 1.png"):
        draw(folder, tmp_path / "many", "", questions=str(tmp_path / "texts.jsonl"))


def test_a_folder_holds_the_pictures_of_one_file(folder, tmp_path):
    """Of another window they are drawn anew; those of a longer file would be taken for pictures of this one."""
    deep = json.dumps({"text": "A liver.", "image": str(folder / "deep.png")}) + "\n"
    texts = tmp_path / "texts.jsonl"
    texts.write_text(deep * 2)
    for window in ("0,51000", "0,5000"):
        draw(folder, tmp_path / "many", "", questions=str(texts), window=window)
    assert len([*(tmp_path / "many").glob("answers-*")]) == 2
    texts.write_text(deep)
    with pytest.raises(ValueError, match=r"must be new or hold pictures 0 to 0 .* found 1.png; give another"):
        draw(folder, tmp_path / "many", "", questions=str(texts), window="0,51000")
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "pictures").touch()
    with pytest.raises(ValueError, match="pictures: must be a folder to write, and is a file"):
        draw(folder, tmp_path / "file", "", questions=str(texts), plugin="is not looked at yet")
