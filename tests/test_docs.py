"""The documentation: what it shows runs, and what it points to is there."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import AddedToken

from medvl import hub, tokens
from medvl.data.conversations import TEMPLATES

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
    """Run the Python blocks of a page one after another in one namespace; errors have the page's own name and lines."""
    space = {"__name__": "page"}
    for line, code in blocks(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), space)
    return space


# Small checkpoints under the names that the pages use -------------------------------------------------------------------------------------
def _tokenizer(kind):
    tok = tokens.train_bpe(["what is the density of water in hounsfield units? is there an effusion? yes no"] * 2, 320)
    tok.add_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS], special_tokens=True)
    tok.chat_template = TEMPLATES[kind]
    return tok


def _language(tok):
    return tiny.CONFIGS["qwen3"] | {"vocab_size": 512}


def _vision_language(tok):
    config = json.loads(json.dumps(tiny.CONFIGS["qwen2_vl"]))
    config["text_config"]["vocab_size"] = 512
    config["vision_config"]["patch_size"] = 14
    of = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return config | {f"{k}_token_id": tok.convert_tokens_to_ids(f"<|{v}|>") for k, v in of.items()}


STAND_INS = {
    "Qwen/Qwen3-4B-Instruct-2507": ("chatml", _language),
    "Qwen/Qwen2-VL-2B-Instruct": ("qwen2", _vision_language),
}


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    """An empty working folder, and a hub cache that holds the stand-ins."""
    cache = tmp_path / "cache"
    for name, (template, config) in STAND_INS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        tok = _tokenizer(template)
        skeleton, params = hub.init_skeleton(config(tok), torch.Generator().manual_seed(0), head="language")
        hub.save(skeleton, {n: t.bfloat16() for n, t in params.items()}, folder / "snapshots" / "abc")
        tok.save_pretrained(folder / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_the_page_on_weights_runs(at_work):
    """And what it says in passing is so."""
    assert len(blocks(ROOT / "docs/weights.md")) > 8
    of = run(ROOT / "docs/weights.md")
    q = "model.layers.0.self_attn.q_proj"
    assert of["weights"].nbytes(of["four"]) < of["weights"].nbytes(of["params"])
    assert [repr(p[f"{q}.weight"]) for p in (of["host"], of["adapted"])] == [
        f"LowRank([32, 32], linear, rank 16 over FourBit([32, 32], nf4 for {d}))" for d in ("float32", "bfloat16")
    ]
    assert not of["adapter"].factors[q]["b"].any()
    assert of["water"].factors[q]["b"].any()
    assert of["each"].gate[q].shape == (2, 32)
    assert len(of["rows"]) == sum(g.prod() // 4 for g in of["grid"])
    assert [len(ids) for ids in of["answer"].ids] == [4, 4]
    assert torch.equal(of["merged"].params[f"{q}.weight"], hub.load("merged", head="language", dtype=torch.bfloat16)[1][f"{q}.weight"])
    again = hub.load("four", head="language", dtype=torch.bfloat16)[1]
    assert all(torch.equal(of["weights"].dense(w), of["weights"].dense(again[n])) for n, w in of["four"].items())
    for n, w in of["eight"].items():
        assert (of["weights"].dense(w) - of["params"][n]).abs().max() <= 0.02 * of["params"][n].abs().max()


def test_a_block_that_fails_names_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\na = 1\n```\n\n```sh\nb\n```\n\ntext\n```python\n\nc = a\nassert c == 2\n```\n")
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
    page.write_text("[a](there.md#part) ![b](gone.png) [c](https://x.y/z) [d](#here)\n```python\nf[0](gone.py)\n```\n[e](../gone.md)\n")
    assert dead(page) == ["gone.png", "../gone.md"]
