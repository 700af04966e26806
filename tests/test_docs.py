"""The documentation: what it shows runs, and what it points to is there."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken

from medvl.adapters.build import build_registry
from medvl.adapters.embed_config import EmbedConfig
from medvl.components import vq
from medvl.hub import loading, saving, skeletons, tokens
from medvl.hub.peft_files import write_adapter
from medvl.hub.vqgan_files import write_vqgan
from medvl.language import chat
from medvl.language.conversations import read_conversations
from medvl.language.templates import TEMPLATES
from medvl.systems import run as systems
from medvl.weights import lora
from tests import tiny
from tests.systems.ct_clip.test_run import SET as CT_CLIP

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page):
    """[(line of the first statement, code)] of the Python blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in FENCED.finditer(text) if m[1] == "python"]


def run(page):
    """Run the Python blocks of a page one after another as a script; errors have the page's own name and lines."""
    space = {"__name__": "__main__"}
    smaller = dict(SMALLER.get(page.name, {}))
    for line, code in blocks(page):
        for shown in [shown for shown in smaller if shown in code]:
            code = code.replace(shown, smaller.pop(shown))
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), space)
    assert not smaller, f"{page}: shows {list(smaller)} no more"
    return space


# What would take long is made smaller
SMALLER = {
    "phantoms.md": {
        "patients=3000, seed=0, valid=150, test=350": "patients=5, seed=0, valid=1, test=1, columns=(32, 32), slices=(8, 9)"
    },
    "ct_preprocess.md": {"workers=8": "workers=2"},
    "document.md": {"train=2000, valid=100, test=300": "train=2, valid=1, test=1, dpi=72"},
}


# Small checkpoints under the names that the pages use -------------------------------------------------------------------------------------
def _tokenizer(kind):
    tok = tokens.train_bpe(
        ["what is the density of water in hounsfield units? is there an effusion? yes no"] * 2, 320
    )
    tok.add_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS], special_tokens=True)
    tok.chat_template = TEMPLATES[kind]
    return tok


def _language(tok):
    return tiny.CONFIGS["qwen3"] | {"vocab_size": 512}


def _vision_language(tok):
    config = json.loads(json.dumps(tiny.CONFIGS["qwen2_vl"]))
    config["text_config"]["vocab_size"] = 512
    config["vision_config"]["patch_size"] = 14
    of = {
        "image": "image_pad",
        "video": "video_pad",
        "vision_start": "vision_start",
        "vision_end": "vision_end",
    }
    return config | {f"{k}_token_id": tok.convert_tokens_to_ids(f"<|{v}|>") for k, v in of.items()}


STAND_INS = {
    "Qwen/Qwen3-4B-Instruct-2507": ("chatml", _language),
    "Qwen/Qwen2-VL-2B-Instruct": ("qwen2", _vision_language),
}


EYES = "Qwen/Qwen2.5-VL-7B-Instruct"  # what the adapters are of
ADAPTERS = ("xray", "ct", "histology")


def _snapshot(cache, name):
    """The folder of a model in a hub cache."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    return folder / "snapshots" / "abc"


def _make_models(cache):
    """The stand-ins, an encoder of slices as wide as the real one, a tokenizer, and a model with eyes whose adapters are returned."""
    gen = torch.Generator().manual_seed(0)
    for name, (template, config) in STAND_INS.items():
        tok, snapshot = _tokenizer(template), _snapshot(cache, name)
        skeleton, params = skeletons.init_skeleton(config(tok), gen, head="language")
        saving.save_skeleton(skeleton, {n: t.bfloat16() for n, t in params.items()}, snapshot)
        tok.save_pretrained(snapshot)
    vit = {
        "model_type": "dinov2_with_registers",
        "hidden_size": 768,
        "num_hidden_layers": 1,
        "num_attention_heads": 12,
        "mlp_ratio": 1,
    }
    vit |= {"image_size": 224, "patch_size": 14}
    saving.save_skeleton(
        *skeletons.init_skeleton(vit, gen), _snapshot(cache, "facebook/dinov2-with-registers-base")
    )

    config = {k: v for k, v in tiny.CONFIGS["qwen2_5_vl"].items() if not k.endswith("token_id")}
    config |= {"vision_config": config["vision_config"] | {"patch_size": 14, "window_size": 56}}
    model = chat.ModelConfig(config=config, dtype="bfloat16")
    tok = chat.tokenizer_of(model, cache, ["is there a fracture? there is a pleural effusion. yes no"] * 20)
    talks, params = chat.open_chat(model, chat.ChatConfig(), tok, gen)
    chat.save_chat(talks, params, _snapshot(cache, EYES))
    tok.save_pretrained(
        _snapshot(cache, "openai/clip-vit-base-patch32")
    )  # README hands its ids to a language model
    return [
        lora.init_lora(lora.LoraConfig(rank=4, pattern="all-linear"), talks.skeleton, gen) for _ in ADAPTERS
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A hub cache, and a working folder with all that the pages name: scans, a picture, adapters, their registry, a trained run."""
    folder = tmp_path_factory.mktemp("docs")
    cache, work = folder / "cache", folder / "work"
    adapters = _make_models(cache)
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.chdir(work)
        Path("experiments").symlink_to(ROOT / "experiments")
        systems.run("ctclip_phantom", (*CT_CLIP, "train.stages.0.steps=1"), lambda line: None)
        next(Path("runs").iterdir()).rename("runs/ctclip_phantom-0a1b2c3d")
        drawn = next(Path("data").glob("phantoms-*"))
        shutil.copytree(drawn / "valid", "scans")
        shutil.copy(drawn / "valid_metadata.csv", "metadata.csv")
        shutil.copy(drawn / "valid" / "valid_1_a_1.nii.gz", "scan.nii.gz")
        for i, picture in enumerate(("scan.png", "other.png")):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)).save(picture)
        for name, adapter in zip(ADAPTERS, adapters, strict=True):
            write_adapter(adapter, name, base=EYES)
            query = f"<image>{name}: is there a fracture in region "
            lines = [
                {"query": f"{query}{i}?", "response": "yes", "images": [("scan.png", "other.png")[i % 2]]}
                for i in range(6)
            ]
            Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sizes = {"n_embed": 8, "embed_dim": 4, "z_channels": 4, "ch": 32, "num_res_blocks": 1}
        codes = vq.VqConfig(resolution=32, attn_resolutions=(4,), **sizes)
        write_vqgan(codes, vq.init_vq(codes, torch.Generator().manual_seed(0)), "vqgan")
        places = dict(zip(ADAPTERS, ADAPTERS, strict=True))
        talks = {name: read_conversations(f"{name}.jsonl") for name in ADAPTERS}
        build_registry(Path("registry.toml"), places, talks, EmbedConfig(dims=4))
    return cache, work


@pytest.fixture
def at_work(world, tmp_path, monkeypatch):
    """A copy of the working folder, and the hub cache."""
    cache, work = world
    shutil.copytree(work, tmp_path / "work", symlinks=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p) and p.name != "weights.md"], ids=lambda p: p.name
)
def test_the_python_of_a_page_runs(page, at_work):
    of = run(page)
    if page.name == "README.md":
        assert of["z"].shape == (1, 160, 768)
        assert of["text"].shape == (2, 512)
        assert set(of["found"]["probability"]) == {"Pleural effusion", "Lung nodule"}
    if page.name in ("README.md", "adapters.md"):
        assert {name for name, *_ in of["answer"].adapters} <= {*ADAPTERS}
    if page.name == "benches.md":
        of["bench_fuse"](lambda function, *arguments, **about: function(*arguments))
    if page.name == "ct_preprocess.md":
        assert of["summary"].done == 8
        assert of["voxels"].shape == (160, 224, 224)
        assert Path("volumes.png").stat().st_size > 0
    if page.name == "encoders.md":
        assert of["z"].shape == (1, 40, 768)
    if page.name == "phantoms.md":
        assert len(list(Path("phantoms").glob("*/*.nii.gz"))) >= 5
        assert set(of["report"]) > {"Findings_EN", "Impressions_EN"}


def test_the_page_on_weights_runs(at_work):
    """And what it says in passing is so."""
    assert len(blocks(ROOT / "docs/weights.md")) > 8
    of = run(ROOT / "docs/weights.md")
    q = "model.layers.0.self_attn.q_proj"
    assert of["lazy"].nbytes(of["four"]) < of["lazy"].nbytes(of["params"])
    assert [repr(p[f"{q}.weight"]) for p in (of["host"], of["adapted"])] == [
        f"LowRank([32, 32], linear, rank 16 over FourBit([32, 32], nf4 for {d}))"
        for d in ("float32", "bfloat16")
    ]
    assert not of["adapter"].factors[q]["b"].any()
    assert of["water"].factors[q]["b"].any()
    assert of["each"].gate[q].shape == (2, 32)
    assert len(of["rows"]) == sum(g.prod() // 4 for g in of["grid"])
    assert [len(ids) for ids in of["answer"].ids] == [4, 4]
    assert torch.equal(
        of["merged"].params[f"{q}.weight"],
        loading.load_skeleton("merged", head="language", dtype=torch.bfloat16)[1][f"{q}.weight"],
    )
    again = loading.load_skeleton("four", head="language", dtype=torch.bfloat16)[1]
    assert all(torch.equal(of["lazy"].dense(w), of["lazy"].dense(again[n])) for n, w in of["four"].items())
    for n, w in of["eight"].items():
        assert (of["lazy"].dense(w) - of["params"][n]).abs().max() <= 0.02 * of["params"][n].abs().max()


def test_a_block_that_fails_names_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\na = 1\n```\n\n```sh\nb\n```\n\ntext\n```python\n\nc = a\nassert c == 2\n```\n"
    )
    with pytest.raises(AssertionError) as failed:
        run(page)
    assert (str(failed.traceback[-1].path), failed.traceback[-1].lineno + 1) == (str(page), 15)
    page.write_text("\n```python\na = = 1\n```\n")
    with pytest.raises(SyntaxError) as broken:
        run(page)
    assert (broken.value.filename, broken.value.lineno) == (str(page), 3)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    assert not dead(page)


def dead(page):
    """Relative links of a page that lead to no file."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = [t.partition("#")[0] for t in LINK.findall(text) if not re.match(r"[a-z]+:|#", t)]
    return [t for t in targets if not (page.parent / t).exists()]


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "there.md").touch()
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md#part) ![b](gone.png) [c](https://x.y/z) [d](#here)\n```python\nf[0](gone.py)\n```\n[e](../gone.md)\n"
    )
    assert dead(page) == ["gone.png", "../gone.md"]
