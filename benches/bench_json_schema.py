"""JSON under a schema: a tokenizer made ready, a grammar of the fields of a page, and the masks of an answer, beside the size of the vocabulary.

The tokenizers are learnt from the sources of Python and transformers, as no other text is sure to be here.
"""

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from medvl.documents.fields_schema import fields_schema
from medvl.hub import tokens
from medvl.language.json_schema import schema_grammar

pytest.importorskip("llguidance")
VOCABULARIES = (32_000, 152_000)
LAB = {"name": "Glucose", "value": "108", "unit": "mg/dL", "low": "70", "high": "99", "flag": "H"}
ANSWER = {"kind": "lab results", "patient": {"name": "SYNTHETIC", "age": "54"}, "labs": [LAB] * 8}


@cache
def tokenizer(size: int):
    python = [file for file in Path(os.__file__).parent.rglob("*.py") if "site-packages" not in file.parts]
    models = [*(Path(transformers.__file__).parent / "models").rglob("*.py")]
    files = sorted(python + models if size > 100_000 else python)
    return tokens.train_bpe([file.read_text(errors="ignore") for file in files], size, lower=False)


@cache
def grammar(size: int):
    tok = tokenizer(size)
    return schema_grammar(tok, size, [tok.eos_token_id])


@pytest.mark.parametrize("size", VOCABULARIES)
def bench_make_tokenizer_ready(measure, size):
    tok = tokenizer(size)
    measure(schema_grammar, tok, size, [tok.eos_token_id], rounds=2, v=size, tokens=len(tok))


@pytest.mark.parametrize("size", VOCABULARIES)
def bench_grammar_of_fields(measure, size):
    measure(grammar(size), fields_schema(), v=size)


@cache
def answer_ids(size: int) -> list[int]:
    """The answer in the longest tokens that may come."""
    tok, mask = tokenizer(size), grammar(size)(fields_schema())
    numbers = {tok.decode([token]): token for token in range(len(tok))}
    rest, ids = json.dumps(ANSWER, separators=(",", ":")), list[int]()
    while rest:
        allowed = mask(len(ids), torch.tensor([ids], dtype=torch.int64))
        pieces = [rest[:length] for length in range(min(len(rest), 40), 0, -1)]
        piece = next(piece for piece in pieces if piece in numbers and allowed[numbers[piece]])
        ids.append(numbers[piece])
        rest = rest[len(piece) :]
    return ids


@pytest.mark.parametrize("size", VOCABULARIES)
def bench_masks_of_an_answer(measure, benchmark, size):
    """extra_info has the milliseconds of a token."""
    ids = torch.tensor([answer_ids(size)])

    def masks() -> torch.Tensor:
        mask = grammar(size)(fields_schema())
        for step in range(ids.shape[1] + 1):
            allowed = mask(step, ids[:, :step])
        return allowed

    end = measure(masks, v=size, tokens=ids.shape[1])
    assert end[tokenizer(size).eos_token_id]
    if benchmark.enabled:
        benchmark.extra_info["ms_per_token"] = round(1e3 * benchmark.stats.stats.median / ids.shape[1], 3)
