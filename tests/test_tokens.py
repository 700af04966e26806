"""tokens: the tokenizers of transformers are the peers; others are learnt from a few sentences."""

import warnings

import pytest
import torch
from tokenizers import processors

from medvl import tokens

REPORTS = ["The heart is normal in size.", "No pleural effusion; the heart is  NORMAL.", "Nodule of 12 mm in the left upper lobe."] * 4


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
    with pytest.raises(ValueError, match=r"someone/nothing is no folder.*tokenizer.json.*HF_HUB_OFFLINE.*hf download someone/nothing"):
        tokens.tokenizer("someone/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"127.0.0.1:9 cannot be reached .*refused.*hf download someone/nothing"):
        tokens.tokenizer("someone/nothing")


def test_case_is_kept_where_letters_are_answers():
    texts = ["A. Stroma", "b. fat", "C. Tumour"] * 5
    cased, plain = tokens.train_bpe(texts, 300, lower=False), tokens.train_bpe(texts, 300)
    said = lambda tok: tok.decode(tok("A. Stroma")["input_ids"], skip_special_tokens=True).strip()
    assert said(cased) == "A. Stroma"
    assert said(plain) == "a. stroma"
