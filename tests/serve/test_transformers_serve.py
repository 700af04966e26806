"""The engine over `transformers serve`, a real server of OpenAI's API, with tiny models that know nothing."""

import asyncio
import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import processors

from medvl.base import files
from medvl.commands import impressions
from medvl.ct.impressions import make_prompts, read_table
from medvl.hub import skeletons, tokens
from medvl.language.encoding import encode_prompt, end_ids
from medvl.language.generate import generate
from medvl.language.sampling import Sampling
from medvl.language.templates import TEMPLATES
from medvl.serve.api import make_app
from medvl.serve.backend import make_backend
from medvl.serve.interface import End, Piece, Refused, Request
from medvl.serve.remote import openai_messages, remote_engine
from medvl.serve.settings import ServeConfig
from tests import tiny

for package in ("fastapi", "uvicorn", "pydantic"):
    pytest.importorskip(package)
PROGRAM = shutil.which("transformers", path=str(Path(sys.executable).parent))
if PROGRAM is None:
    pytest.skip("there is no `transformers serve`", allow_module_level=True)

openai = pytest.importorskip("openai")
ENDING = "effusion heart"  # its answer ends before 24 tokens
QUESTIONS = ("The heart is", "no effusion", "normal; user", "is The no", ENDING)


def tokenizer():
    tok = tokens.train_bpe(["The heart is normal; no effusion. user assistant system " * 3], 300, lower=False)
    # As tokenizers of chat models: what begins and ends a text is for the template to say.
    tok.backend_tokenizer.post_processor = processors.ByteLevel()
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
    return tok


def ascii_only(tok, head, end):
    """Without the rows of tokens that are no text: pieces of characters are told in other ways by each program."""
    for token in range(len(head)):
        text = tok.decode([token], skip_special_tokens=True) if token < len(tok) else ""
        if not (text and text.isascii() and text.isprintable()) and token != end:
            head[token] = 0
    return head


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """(folder, tokenizer, skeleton, params) of a language model."""
    folder, tok = tmp_path_factory.mktemp("language"), tokenizer()
    tok.chat_template = TEMPLATES["chatml"]
    tok.save_pretrained(folder)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    gen = torch.Generator().manual_seed(0)
    config = tiny.CONFIGS["qwen2"] | {"vocab_size": len(tok), "eos_token_id": end}
    skeleton, params = skeletons.init_skeleton(config, gen, head="language")
    params = {name: torch.randn(t.shape, generator=gen) * 0.6 + (t.dim() == 1) for name, t in params.items()}
    params["lm_head.weight"] = ascii_only(tok, params["lm_head.weight"], end)
    params["lm_head.weight"][end] *= 2  # so that some answers end
    tiny.peer(skeleton, params).save_pretrained(folder)
    # Beside a config of Qwen2 it is read as Qwen2's, which splits texts in another way.
    return folder, tokens.tokenizer(folder), skeleton, params


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """(folder, processor, model) of a model that sees; LLaVA's processor needs no torchvision."""
    transformers = pytest.importorskip("transformers")
    folder, tok = tmp_path_factory.mktemp("pictures"), tokenizer()
    part = "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    turn = f"<|im_start|>{{{{ m.role }}}}\n{{% for c in m.content %}}{part}{{% endfor %}}<|im_end|>\n"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}<|im_start|>assistant\n"
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=tiny.CONFIGS["qwen2"] | {"vocab_size": len(tok)},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **tower},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3 + (parameter.dim() == 1)
    ascii_only(tok, model.lm_head.weight.data, -1)
    model.save_pretrained(folder)
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tok,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return folder, processor, model


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        server = subprocess.Popen([PROGRAM, "serve", *options], env=environment, stdout=out, stderr=out)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.ConnectError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def ask(url, **request):
    async def run():
        engine = remote_engine(url)
        try:
            return [item async for item in engine.stream(Request(**({"id": "r"} | request)))]
        finally:
            await engine.close()

    *pieces, end = asyncio.run(run())
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(end, End)
    return [piece.text for piece in pieces], end


def test_greedy_answers_are_those_of_generate(url, language):
    folder, tok, skeleton, params = language
    reasons = set()
    for number, question in enumerate(QUESTIONS):
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": question}]
        messages = messages[number % 2 :]
        pieces, end = ask(url, messages=tuple(messages), adapter=str(folder), max_tokens=24)
        ids = encode_prompt(tok, messages).ids[None]
        cfg = Sampling(max_tokens=24, end=end_ids(tok))
        own = generate(cfg, skeleton, params, {"ids": ids}, tok=tok)
        assert "".join(pieces) == own.texts[0]
        assert len(pieces) > 1
        assert (end.reason, end.prompt_tokens) == (own.reasons[0], own.prompt_tokens[0])
        assert end.answer_tokens == len(own.ids[0]) + (end.reason == "end")
        assert end.adapters == ((str(folder), 1.0),)
        reasons.add(end.reason)
    assert reasons == {"end", "length"}


def test_images_reach_the_model(url, pictures):
    """Two of them, in order: the text is what transformers' own `generate` writes with the same processor."""
    folder, processor, model = pictures
    images = tuple(tiny.drawn((20, 16), seed=seed) for seed in range(2))
    messages = ({"role": "user", "content": "<image> The heart <image>"},)
    texts = []
    for order in (images, images[::-1]):
        pieces, _ = ask(url, messages=messages, images=order, adapter=str(folder), max_tokens=16)
        shown = openai_messages(messages, order)
        for part in shown[0]["content"]:
            if part["type"] == "image_url":
                part |= {"type": "image", "url": part.pop("image_url")["url"]}
        inputs = processor.apply_chat_template(shown, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)[
                0, inputs["input_ids"].shape[1] :
            ]
        texts.append("".join(pieces))
        assert texts[-1] == processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert texts[0] != texts[1]


def test_a_server_without_schemas_is_found_out(url, language):
    """`transformers serve` takes no notice of response_format, and says so in its own log alone."""
    errors = []
    for question in QUESTIONS:
        messages = ({"role": "user", "content": question},)
        try:
            _, end = ask(
                url, messages=messages, adapter=str(language[0]), max_tokens=24, schema={"type": "object"}
            )
            assert end.reason == "length"
        except Refused as error:
            errors.append((error.status, str(error)))
    (error,) = {*errors}
    assert error[0] == 502
    assert error[1].startswith("the model server did not keep to the JSON schema")


def test_settings_that_it_does_not_know_are_told(url, language):
    messages = ({"role": "user", "content": "The heart"},)
    with pytest.raises(Refused, match="does not know top_k"):
        ask(url, messages=messages, adapter=str(language[0]), temperature=1.0, top_k=3)


def test_it_writes_the_impressions_that_reports_lack(url, language, tmp_path):
    """One answer for both reconstructions of a scan: what it says to the prompt when it is asked by itself."""
    columns = ("VolumeName", "Findings_EN", "Impressions_EN")
    scans = [(f"p_{i}_a_{k}.nii.gz", QUESTIONS[i], "") for i in range(3) for k in (1, 2)]
    shots = [(f"train_{i}_a_1.nii.gz", QUESTIONS[i], QUESTIONS[i - 1]) for i in range(4)]
    paths = [str(tmp_path / name) for name in ("r.csv", "train.csv", "done.csv")]
    for path, rows in zip(paths, (scans, shots), strict=False):
        files.write_csv(path, [dict(zip(columns, row, strict=True)) for row in rows], columns)
    options = {"engine": url, "model": str(language[0]), "shots": 2, "max_tokens": 24}
    impressions.fill_impressions(*paths, **options)
    (journal,) = tmp_path.glob("done.*.answers.jsonl")
    prompts = make_prompts(read_table(paths[0]), read_table(paths[1]), 2, 0)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(lines) == 3
    for line, prompt in zip(lines, prompts[::2], strict=True):
        messages = ({"role": "user", "content": prompt},)
        pieces, end = ask(url, messages=messages, adapter=str(language[0]), max_tokens=24)
        assert (line["text"], line["is_cut"]) == ("".join(pieces), end.reason == "length")
    written = [row["Impressions_EN"] for row in files.read_csv(paths[2])]
    assert written[::2] == written[1::2]


@contextmanager
def service(engine, model):
    """The address of our own service, with the engine over another server."""
    import uvicorn

    backend = make_backend(ServeConfig(engine=engine, engine_model=model, readers=0, port=0))
    server = uvicorn.Server(uvicorn.Config(make_app(backend), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as web:
            while web.get("/ready").status_code != 200:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def openai_script(address, model, content):
    """What a user of the openai client writes: (text, text of a stream, its reason)."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
    wanted = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
    }
    answer = client.chat.completions.create(**wanted)
    text, reason = "", ""
    for part in client.chat.completions.create(**wanted, stream=True):
        for choice in part.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return answer.choices[0].message.content, text, reason


def test_the_openai_client_gets_the_same_from_our_service(url, language, pictures):
    """Chat, stream, image, models and json_schema, with `transformers serve` behind it or alone."""
    folder = str(language[0])
    seeing = str(pictures[0])
    png = io.BytesIO()
    tiny.drawn((20, 16)).save(png, "PNG")
    picture = {"url": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()}
    parts = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "\nThe heart"}]
    with service(url, folder) as address:
        for question in QUESTIONS:
            alone = openai_script(url, folder, question)
            assert openai_script(address, folder, question) == alone
            assert alone[0] == alone[1]
        # Our service puts a line break between the parts of a message.
        sent = [parts[0], {"type": "text", "text": "The heart"}]
        assert openai_script(address, seeing, sent) == openai_script(url, seeing, parts)

        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        assert folder in [model.id for model in client.models.list()]
        schema = {"name": "fields", "schema": {"type": "object", "properties": {}}}
        with pytest.raises(openai.APIStatusError, match="did not keep to the JSON schema") as error:
            client.chat.completions.create(
                model=folder,
                messages=[{"role": "user", "content": ENDING}],
                max_tokens=24,
                response_format={"type": "json_schema", "json_schema": schema},
            )
        assert error.value.status_code == 502
