"""tokens: the tokenizers of transformers are the peers; others are learnt from a few sentences."""

import ast
import io
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import processors

import medvl
from medvl.hub import tokens

REPORTS = [
    "The heart is normal in size.",
    "No pleural effusion; the heart is  NORMAL.",
    "Nodule of 12 mm in the left upper lobe.",
] * 4


def test_real_clip_tokenizer(shared_data):
    folder = shared_data / "tokenizers/clip"
    tok = tokens.tokenizer(folder)
    texts = ["The heart is normal.", "Nodule " * 100, ""]
    with pytest.warns(UserWarning, match="longer than 77 tokens lose their tail"):
        ids, mask = tokens.tokenize(tok, texts, 77)
    want = tok(texts, truncation=True, max_length=77, padding=True, return_tensors="pt")
    assert torch.equal(ids, want["input_ids"])
    assert torch.equal(mask, want["attention_mask"].bool())
    assert (ids[:, 0] == 49406).all()
    assert [int(row[keep][-1]) for row, keep in zip(ids, mask, strict=True)] == [49407] * 3
    assert mask.sum(1).tolist() == [7, 77, 2]
    assert tokens.truncated(tok, texts, 77) == 1
    bare = tokens.tokenizer(folder / "tokenizer.json")
    assert torch.equal(tokens.tokenize(bare, texts[:1], 77)[0], ids[:1, :7])


def test_trained_bpe(tmp_path):
    tok = tokens.train_bpe(REPORTS, 300, tmp_path / "bpe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = tokens.tokenize(tok, ["  The HEART\nis normal ", "Nodule"], 64)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    start, end, pad = (tok.convert_tokens_to_ids(t) for t in (tokens.START, tokens.END, tokens.PAD))
    assert ids[0, 0] == ids[1, 0] == start
    assert [int(row[keep][-1]) for row, keep in zip(ids, mask, strict=True)] == [end, end]
    assert (ids[~mask] == pad).all()
    assert (~mask).any()
    assert tok.decode(ids[0], skip_special_tokens=True).strip() == "the heart is normal"
    assert len(tokens.tokenize(tok, ["the heart is normal"], 64)[0][0]) < 12  # learnt words are few tokens
    again = tokens.tokenizer(tmp_path / "bpe")
    assert torch.equal(tokens.tokenize(again, REPORTS[:3], 64)[0], tokens.tokenize(tok, REPORTS[:3], 64)[0])
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (start, end, pad)


def test_trained_bpe_is_deterministic_and_loses_no_character():
    a, b = (tokens.train_bpe(REPORTS, 300) for _ in range(2))
    assert a.get_vocab() == b.get_vocab()
    assert len(a) <= 300
    odd = "größe 3×4 µm 结节 🫁 <b>"
    assert a.decode(tokens.tokenize(a, [odd], 200)[0][0], skip_special_tokens=True).strip() == odd


def test_truncation_keeps_the_end_token():
    tok = tokens.train_bpe(REPORTS, 300)
    whole = tokens.tokenize(tok, [REPORTS[0]], 64)[0][0]
    with pytest.warns(UserWarning, match="lose their tail"):
        ids, mask = tokens.tokenize(tok, [REPORTS[0], "no"], 6)
    assert ids[0].tolist() == [*whole[:5].tolist(), tok.eos_token_id]
    assert ids.shape == mask.shape == (2, 6)
    assert tokens.truncated(tok, [REPORTS[0], "no"], 6) == 1


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match="vocab_size >= 259"):
        tokens.train_bpe(REPORTS, 100)
    with pytest.raises(ValueError, match="0 texts"):
        tokens.train_bpe([], 300)
    tok = tokens.train_bpe(REPORTS, 300)
    for texts in ([], [float("nan")], "one text"):
        with pytest.raises(ValueError, match="needs a list of texts"):
            tokens.tokenize(tok, texts, 64)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(ValueError, match="must put an end token behind every text"):
        tokens.tokenize(tok, ["a"], 64)
    (tmp_path / "tokenizer.json").write_text("{")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match="is not JSON"):
            tokens.tokenizer(name)


def test_a_tokenizer_that_is_nowhere_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ValueError,
        match=r"someone/nothing is not a folder.*tokenizer.json.*HF_HUB_OFFLINE.*hf download someone/nothing",
    ):
        tokens.tokenizer("someone/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"127.0.0.1:9 cannot be reached .*refused.*hf download someone/nothing"
    ):
        tokens.tokenizer("someone/nothing")


def test_case_is_kept_where_letters_are_answers():
    texts = ["A. Stroma", "b. fat", "C. Tumour"] * 5
    cased, plain = tokens.train_bpe(texts, 300, lower=False), tokens.train_bpe(texts, 300)
    said = lambda tok: tok.decode(tok("A. Stroma")["input_ids"], skip_special_tokens=True).strip()
    assert said(cased) == "A. Stroma"
    assert said(plain) == "a. stroma"


# Code that comes with a folder --------------------------------------------------------------------------------------------------------
PLANTED = """
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
Path({ran!r}).write_text("ran")
class Own(PreTrainedTokenizerFast): pass
class Config(PreTrainedConfig): model_type = "own"
"""
MAP = {"AutoTokenizer": ["own.Own", "own.Own"]}


def planted(folder, changes, config=None):
    """A tokenizer folder with a file of code, and the file that this code writes when it runs."""
    tokens.train_bpe(REPORTS, 300, folder)
    ran = folder.parent / "ran"
    (folder / "own.py").write_text(PLANTED.format(ran=str(ran)))
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None})
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return ran


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"tokenizer_class": "Own", "auto_map": MAP}, None),
        ({"tokenizer_class": "Own", "auto_map": MAP["AutoTokenizer"]}, None),
        (
            {"tokenizer_class": None, "auto_map": MAP},
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"} | MAP},
        ),
    ],
)
def test_code_in_a_tokenizer_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch, changes, config):
    ran = planted(tmp_path / "tok", changes, config)
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 10))
    with pytest.raises(ValueError, match=r"needs code of its own .*, which is never run") as e:
        tokens.tokenizer(tmp_path / "tok")
    assert "trust_remote_code" not in str(e.value)
    assert not ran.exists()
    assert sys.stdin.read(4) == "yes\n"


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"auto_map": MAP}, None),
        ({"tokenizer_class": None}, {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"} | MAP}),
    ],
)
def test_a_known_tokenizer_beside_code_is_read_without_it(tmp_path, monkeypatch, changes, config):
    ran = planted(tmp_path / "tok", changes, config)
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 10))
    tok = tokens.tokenizer(tmp_path / "tok")
    assert tok(REPORTS[0])["input_ids"] == tokens.train_bpe(REPORTS, 300)(REPORTS[0])["input_ids"]
    assert not ran.exists()


@pytest.mark.parametrize(
    "changes", [{"auto_map": "own.Own"}, {"auto_map": {"AutoTokenizer": ["own.Own"]}}, {"tokenizer_class": 3}]
)
def test_a_malformed_tokenizer_config_is_one_error(tmp_path, changes):
    ran = planted(tmp_path / "tok", {"tokenizer_class": "Own"} | changes)
    with pytest.raises(ValueError, match=r"tokenizer: .*/tok does not hold one that transformers reads"):
        tokens.tokenizer(tmp_path / "tok")
    assert not ran.exists()


def test_a_deeply_nested_tokenizer_config_is_one_error(tmp_path):
    tokens.train_bpe(REPORTS, 300, tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"tokenizer: .*/tok does not hold one that transformers reads"):
        tokens.tokenizer(tmp_path / "tok")


def test_a_tokenizer_json_without_a_model_is_one_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"tokenizer: .*tokenizer\.json does not hold one that transformers reads \(Model missing",
    ):
        tokens.tokenizer(tmp_path / "tokenizer.json")


def test_every_call_of_transformers_that_could_run_code_forbids_it():
    for path in sorted(Path(medvl.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert given.get("trust_remote_code") is False, f"{path.name}:{node.lineno}"


# Image codes ------------------------------------------------------------------------------------------------
def test_image_codes_of_the_real_phi3_tokenizer(shared_data):
    """HealthGPT-M3's ids: 8,195 tokens behind 32,011, so that table and head have 40,206 rows."""
    tok = tokens.tokenizer(shared_data / "tokenizers/phi-3-mini")
    assert len(tok) == 32011
    before = tok("A nodule of 12 mm.<|end|>\n<|assistant|>\n")["input_ids"]
    codes = tokens.add_image_codes(tok)
    assert codes == tokens.CodeTokens(start=32011, first=32012, number=8192, end=40204, newline=40205)
    assert len(tok) == 40206
    assert tok.convert_tokens_to_ids("<idx_8191>") == 40203
    text = "<start_index><idx_0><idx_8191><end_index>"
    assert tok(text)["input_ids"] == [32011, 32012, 40203, 40204]
    assert tok.decode([32011, 32012, 40203, 40204]) == text
    assert tok("A nodule of 12 mm.<|end|>\n<|assistant|>\n")["input_ids"] == before


def test_image_codes_are_added_once_and_found_again(tmp_path):
    tok = tokens.train_bpe(REPORTS, 300)
    size = len(tok)
    codes = tokens.add_image_codes(tok, 16)
    assert (codes.start, codes.first, codes.end, codes.newline) == (size, size + 1, size + 17, size + 18)
    assert tokens.add_image_codes(tok, 16) == codes
    tok.save_pretrained(tmp_path / "tok")
    again = tokens.tokenizer(tmp_path / "tok")
    assert tokens.add_image_codes(again, 16) == codes
    assert len(again) == size + 19
    assert again.decode([codes.first + 3], skip_special_tokens=True) == ""  # as of other special tokens
    with pytest.raises(ValueError, match=r"the last 11 tokens .* <start_index>, <idx_0> to <idx_7>, .*take"):
        tokens.add_image_codes(again, 8)
    again.add_tokens(["<more>"])
    with pytest.raises(ValueError, match=r"but <start_index> is \d+ and <pixel_newline> \d+ of \d+"):
        tokens.add_image_codes(again, 16)


def test_a_tokenizer_that_puts_one_space_before_a_text():
    from tokenizers import normalizers

    plain, tok = (tokens.train_bpe(["the heart is normal"], 300) for _ in range(2))
    assert tokens.spaced_once(plain) is plain
    prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tok.backend_tokenizer.normalizer = normalizers.Sequence(prepend)
    copied = tokens.spaced_once(tok)
    assert copied is tokens.spaced_once(tok)
    assert copied.backend_tokenizer.normalizer is None
    assert tok.backend_tokenizer.normalizer is not None
    tok.add_tokens(["<idx_0>"], special_tokens=True)
    assert len(tokens.spaced_once(tok)) == len(tok) == len(copied) + 1
