"""One base with two plugins: answers and pictures, of one thread and of several, and what is refused."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attrs import evolve
from PIL import Image

import medvl
from medvl.base.tree import flatten
from medvl.hub import plugin_files, tokens
from medvl.language import chat, system
from medvl.systems.unified import ask, draw
from medvl.systems.unified.model import open_unified
from medvl.weights import lazy
from tests.systems.unified.pieces import VQ, make_files, make_plugin
from tests.tiny import drawn, saved

N = 16  # codes of a picture
QUESTIONS = ["Reconstruct the image.", "A liver on the left.", "Is there a mass?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("unified"))


def opened(folder, tasks=("understand", "draw"), **settings):
    plugins = {}
    for seed, task in enumerate(tasks):
        plugins[task] = make_plugin(folder, task, seed=seed + 1, rows=task == "draw")
    settings = {
        "dtype": "float32",
        "device": "cpu",
        "vq": folder / "vq",
        "tower": folder / "tower",
    } | settings
    return open_unified(folder / "base", plugins, **settings)


@pytest.fixture(scope="module")
def both(folder):
    return opened(folder)


def answer(model, params, **settings):
    return ask.ask_image(model, params, drawn((40, 30)), "Which organ is shown?", max_tokens=12, **settings)


def codes_of(model, params, **settings):
    question = ask.make_question(model.task("draw").chat, drawn((40, 30)), "Reconstruct the image.")
    prompts = draw.encode_drawings(model, [question])
    return draw.draw_codes(model, params, prompts, [0], **settings)


# Codes --------------------------------------------------------------------------------------------------------
def with_codes(params, scale):
    """Params whose head has the rows of the codes times `scale`: 50 = codes alone are likely, 0 = some text is likelier."""
    head = torch.zeros_like(params["draw"]["rows"]["head"])
    head[1 : 1 + VQ.n_embed] = params["draw"]["rows"]["head"][1 : 1 + VQ.n_embed] * scale
    return params | {"draw": params["draw"] | {"rows": params["draw"]["rows"] | {"head": head}}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_picture_has_all_its_codes_whatever_the_model_would_rather_say(both, temperature):
    model, params = both
    params = with_codes(params, 0)
    questions = [ask.make_question(model.task("draw").chat, None, text) for text in QUESTIONS]
    prompts = draw.encode_drawings(model, questions)
    assert not plain_loop(model, params, prompts, 0)  # it would rather write text
    codes = draw.draw_codes(model, params, prompts, [0, 1, 2], temperature=temperature, seed=5)
    assert codes.shape == (3, N)
    assert {*codes.flatten().tolist()} <= {*range(VQ.n_embed)}
    alone = [draw.draw_codes(model, params, prompts, [i], temperature=temperature, seed=5) for i in range(3)]
    assert torch.equal(torch.cat(alone), codes)


def embed(model, params, task, prompts, row):
    """(language model of a task, its weights, a prompt as vectors)."""
    own, selected = model.task(task), model.tasks.select(params, task)
    weights = system.model_weights(own, selected)
    batch = chat.make_batch(own.chat, prompts, [row])
    return own, weights, chat.model_inputs(own.chat, weights, batch, selected)


def logits_of(model, params, task):
    question = ask.make_question(model.task(task).chat, drawn((40, 30)), "Which organ is shown?")
    prompts = chat.encode_conversations(model.task(task).chat, [question], prompt=True)
    own, weights, inputs = embed(model, params, task, prompts, 0)
    with torch.no_grad():
        return own.chat.skeleton(weights, inputs_embeds=inputs["inputs_embeds"]).logits


def plain_loop(model, params, prompts, row):
    """Codes of greedy decoding over all tokens as far as they are codes, everything computed again at every step."""
    drawing, weights, inputs = embed(model, params, "draw", prompts, row)
    embedded, table = inputs["inputs_embeds"], lazy.dense(weights[chat.token_table(drawing.chat)])
    codes = []
    while len(codes) < N:
        with torch.no_grad():
            logits = drawing.chat.skeleton(weights, inputs_embeds=embedded).logits
        code = int(logits[0, -1].argmax()) - model.codes.first
        if not 0 <= code < model.codes.number:
            break
        codes.append(code)
        embedded = torch.cat([embedded, table[code + model.codes.first][None, None]], 1)
    return codes


def test_codes_are_those_of_plain_greedy_decoding(both):
    model, params = both
    params = with_codes(params, 50)
    questions = [ask.make_question(model.task("draw").chat, drawn((9, 20)), text) for text in QUESTIONS]
    prompts = draw.encode_drawings(model, questions)
    codes = draw.draw_codes(model, params, prompts, [0, 1, 2])
    for row in range(3):
        expected = plain_loop(model, params, prompts, row)
        assert len(expected) > 1
        assert codes[row, : len(expected)].tolist() == expected


def test_codes_that_are_trained_are_those_that_are_drawn(both):
    model, _ = both
    question = ask.make_question(model.task("draw").chat, drawn((9, 20)), QUESTIONS[0])
    (prompt,) = draw.encode_drawings(model, [question]).samples
    (sample,) = draw.encode_drawings(model, [question], [[*range(N)]]).samples
    start = len(prompt.ids)
    assert torch.equal(sample.ids[:start], prompt.ids)
    assert prompt.ids[-1] == model.codes.start
    tail = [*range(model.codes.first, model.codes.first + N), model.codes.end]
    assert sample.ids[start : start + N + 1].tolist() == tail
    assert model.task("draw").chat.tokenizer.decode(sample.ids[start + N + 1 :]) == "<|im_end|>"
    assert torch.equal(sample.labels[start - 1 :], sample.ids[start - 1 :])
    assert (sample.labels[: start - 1] == -100).all()


def test_a_code_is_reported_as_it_is_written_and_a_seed_is_a_picture(both):
    model, params = both
    steps = []
    picture = draw.draw_image(
        model, params, drawn((8, 8)), "a", temperature=1.0, seed=3, on_code=lambda i, n: steps.append((i, n))
    )
    assert (picture.size, picture.mode) == ((8, 8), "RGB")
    assert steps == [(i, N) for i in range(N + 1)]
    again = draw.draw_image(model, params, drawn((8, 8)), "a", temperature=1.0, seed=3)
    other = draw.draw_image(model, params, drawn((8, 8)), "a", temperature=1.0, seed=4)
    assert picture.tobytes() == again.tobytes() != other.tobytes()


# Residency ----------------------------------------------------------------------------------------------------
def test_a_task_answers_as_before_after_the_other_and_as_a_model_of_its_own(folder, both):
    model, params = both
    logits = {task: logits_of(model, params, task) for task in ("understand", "draw")}
    first, codes = answer(model, params), codes_of(model, params)
    assert answer(model, params) == first
    assert torch.equal(codes_of(model, params), codes)
    for task, before in logits.items():
        assert torch.equal(logits_of(model, params, task), before)
    alone, own = opened(folder, ("understand",))
    assert answer(alone, own) == first
    assert torch.equal(logits_of(alone, own, "understand"), logits["understand"])
    # The plugins matter: with the other's adapter and projector the answer is another one.
    mixed = params | {"understand": params["understand"] | {"lora": params["draw"]["lora"]}}
    assert answer(model, mixed) != first


def test_a_tokenizer_may_have_the_codes_already(folder, both, tmp_path):
    """As that of a base which was saved after they were added."""
    tok = tokens.tokenizer(folder / "base")
    tokens.add_image_codes(tok, VQ.n_embed)
    shutil.copytree(folder, tmp_path / "files")
    tok.save_pretrained(tmp_path / "files" / "base")
    plugins = {task: make_plugin(folder, task, seed=i) for i, task in ((1, "understand"), (2, "draw"))}
    plugins["understand"] = evolve(plugins["understand"], rows=None)
    settings = {"dtype": "float32", "device": "cpu", "vq": folder / "vq", "tower": folder / "tower"}
    model, params = open_unified(tmp_path / "files" / "base", plugins, **settings)
    assert model.codes == both[0].codes
    assert answer(model, params) == answer(*both)
    assert torch.equal(codes_of(model, params), codes_of(*both))


def test_threads_ask_and_draw_at_once(both):
    model, params = both
    expected = answer(model, params), codes_of(model, params).tolist()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(answer, model, params) for _ in range(3)]
        pictures = [pool.submit(codes_of, model, params) for _ in range(3)]
        assert {future.result() for future in answers} == {expected[0]}
        assert all(future.result().tolist() == expected[1] for future in pictures)


def test_both_tasks_hold_one_base(folder, both):
    model, params = both
    views = [model.tasks.select(params, task) for task in ("understand", "draw")]
    pointers = [
        {t.data_ptr() for t in flatten(view["model"]).values() if t.numel() and not isinstance(t, lazy.Lazy)}
        for view in views
    ]
    assert pointers[0] == pointers[1]
    storages = {}
    for leaf in flatten(params).values():
        storages[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
    parts = sum(t.nbytes for name, t in flatten(params).items() if not name.startswith("understand/rows"))
    assert sum(storages.values()) <= 1.01 * parts


def test_answers_stream_and_the_base_may_have_four_bits(folder):
    model, params = opened(folder, quantize="nf4")
    pieces = []
    text = answer(model, params, on_token=pieces.append)
    assert "".join(pieces).strip() == text
    assert codes_of(model, params).shape == (1, N)


def test_a_base_may_have_float16(folder):
    model, params = opened(folder, dtype="float16")
    assert {t.dtype for t in flatten(params).values()} == {torch.float16}
    assert codes_of(model, params).shape == (1, N)


# Files and what is refused -------------------------------------------------------------------------------------
def test_plugins_are_folders_and_images_are_files(folder, both, tmp_path):
    model, params = both
    for seed, task in enumerate(("understand", "draw")):
        plugin_files.write_plugin(
            make_plugin(folder, task, seed=seed + 1, rows=task == "draw"), tmp_path / task
        )
    model, params = medvl.open_unified(
        folder / "base",
        {task: tmp_path / task for task in ("understand", "draw")},
        vq=folder / "vq",
        tower=folder / "tower",
        dtype="float32",
        device="cpu",
    )
    (tmp_path / "image.png").write_bytes(saved(drawn((40, 30)), "PNG"))
    assert medvl.ask_image(
        model, params, tmp_path / "image.png", "Which organ is shown?", max_tokens=12
    ) == answer(*both)
    assert isinstance(medvl.draw_image(model, params, tmp_path / "image.png", "Draw."), Image.Image)
    assert medvl.draw_image(model, params, None, "Draw.").size == (8, 8)


def test_what_a_model_was_not_made_for_is_refused(folder, both, tmp_path):
    model, params = opened(folder, ("understand",), vq=None)
    with pytest.raises(
        ValueError, match=r"no plugin to draw, only to understand; .* L14 and XL32 only understand"
    ):
        draw.draw_image(model, params, None, "Draw.")
    plugin = make_plugin(folder, "draw")
    settings = {"tower": folder / "tower", "dtype": "float32", "device": "cpu"}
    with pytest.raises(ValueError, match="needs the VQ model of the plugin's 64 codes as vq, got none"):
        open_unified(folder / "base", {"draw": plugin}, **settings)
    with pytest.raises(ValueError, match="the plugin to understand must be one, got one to draw"):
        open_unified(folder / "base", {"understand": plugin}, vq=folder / "vq", **settings)
    with pytest.raises(ValueError, match='must be for "understand" or "draw"'):
        open_unified(folder / "base", {}, **settings)
    other = evolve(
        make_plugin(folder, "understand"), config=evolve(plugin.config, task="understand", template="phi3")
    )
    with pytest.raises(ValueError, match="must have one template and vocabulary"):
        open_unified(folder / "base", {"understand": other, "draw": plugin}, vq=folder / "vq", **settings)
    model, params = both
    with pytest.raises(ValueError, match=r'plugins must be {"understand": \.\.\., "draw": \.\.\.}'):
        open_unified(folder / "base", folder / "draw", **settings)
    for text in (" ", None, ["What?"]):
        with pytest.raises(ValueError, match="the question must have text"):
            ask.ask_image(model, params, None, text)
    with pytest.raises(ValueError, match="<image>"):
        ask.ask_image(model, params, drawn((8, 8)), "<image> and <image>")
    with pytest.raises(ValueError, match="no such file"):
        ask.ask_image(model, params, tmp_path / "none.png", "What?")
    for image in (torch.zeros(8, 8, 3), 5):
        with pytest.raises(ValueError, match="the image must be a path, a PIL image or None, got"):
            ask.ask_image(model, params, image, "What?")
    with pytest.raises(ValueError, match="page and window are for files"):
        ask.ask_image(model, params, drawn((8, 8)), "What?", page=0)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'FP16'"):
        open_unified(folder / "base", {"draw": plugin}, **settings | {"dtype": "FP16"})
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        open_unified(folder / "base", {"draw": plugin}, **settings | {"device": "tpu"})
    assert answer(model, params)
