"""Answers that are JSON under a schema: masks of the tokens that may come, for `generate(allowed=)`."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvl.language.bounded_schema import bounded_schema
from medvl.language.sampling import Allowed

# Compact: with white space that may come at will, a weak model writes nothing else. What a schema says itself is
# overruled, and what llguidance does not know is an error.
_OPTIONS: Any = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}

# One space may come first: tokenizers that put one before a text have taught models to begin their answers so.
_GRAMMAR = 'start: " "? document\ndocument: %json {schema}'
_TOO_MUCH = "schema: it needs more than its limits allow; make its patterns simpler"


def schema_grammar(tok: Any, vocabulary: int, end: Sequence[int]) -> Callable[[Mapping[str, Any]], Allowed]:
    """What makes a mask of a JSON schema, for answers of one model.

    The result is kept, as it takes seconds to make: `mask = grammar(schema)` takes milliseconds. A mask is of
    one answer, of one row, and is asked for its steps in order. Behind
    the whole document only end tokens are allowed. Documents are compact, but for a space that may come first, and
    bounded as `bounded_schema` says; names of objects come in the order of the schema. Where max_tokens ends an
    answer its JSON is not complete.

    Args:
        tok: fast tokenizer of Hugging Face on bytes (byte-level, or with byte fallback).
        vocabulary: how many logits the model has.
        end: tokens that end an answer, as in `Sampling.end`; others, as the tokenizer's own, do not come.
    Returns:
        a function of the schema. It raises ValueError for what `bounded_schema` refuses, and what has no document or
        needs too much; a mask does where that shows later.
    Raises:
        ValueError: no end token, or a tokenizer that cannot be used.
    """
    import llguidance

    tokenizer = _byte_tokenizer(tok, vocabulary, end)
    ends = {*end}
    special = [str(token) for token in tok.all_special_tokens]

    def grammar(schema: Mapping[str, Any]) -> Allowed:
        bounded = bounded_schema(schema) | {"x-guidance": _OPTIONS}
        # Written in an answer they would be read as the token itself, such as the end.
        written = json.dumps(bounded, ensure_ascii=False)
        if any(token in written for token in special):
            raise ValueError("schema: $: must not hold special tokens of the tokenizer; rename what does")
        text = llguidance.LLMatcher.grammar_from_lark(_GRAMMAR.format(schema=written))
        # At a level above 0 it prints errors, which hold the answer.
        matcher = llguidance.LLMatcher(tokenizer, text, log_level=0)
        # Schemas that no document fits show here at the latest.
        matcher.compute_bitmask()
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise ValueError(f"schema: it cannot be kept to: {reason[:200]}")
        return _mask_of(matcher, vocabulary, ends)

    return grammar


def _mask_of(matcher: Any, vocabulary: int, ends: set[int]) -> Allowed:
    taken = 0  # tokens that the matcher has
    is_over = False
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    end_mask = mask.index_fill(0, torch.tensor(sorted(ends)), True)

    def allowed(step: int, so_far: Tensor) -> Tensor:
        nonlocal taken, is_over, mask
        assert len(so_far) == 1
        assert step in (taken, taken + 1)
        if step > taken and not is_over:
            token = int(so_far[0, taken])
            # A row that is done may be given any tokens.
            is_over = token in ends or not mask[token]
            if not is_over and not matcher.consume_token(token):
                raise ValueError(_TOO_MUCH)
        taken = step
        if not is_over:
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if matcher.is_error():
                raise ValueError(_TOO_MUCH)
            mask = torch.from_numpy(np.unpackbits(bits, count=vocabulary, bitorder="little")).bool()
        return (end_mask if is_over else mask).to(so_far.device)

    return allowed


def _byte_tokenizer(tok: Any, vocabulary: int, end: Sequence[int]) -> Any:
    """llguidance's form of a tokenizer.

    It tokenizes what the grammar forces ('{"name":"') to find the usual tokens of it. That is text within an answer:
    without what a tokenizer puts before a text, or rewrites in it.
    """
    import llguidance

    if not end or not all(0 <= token < vocabulary for token in end):
        raise ValueError(f"schema_grammar: end must be tokens below {vocabulary}, got {[*end]}")
    backend = getattr(tok, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"schema_grammar: needs a fast tokenizer, got {type(tok).__name__}")
    parts = json.loads(backend.to_str())
    parts |= {"truncation": None, "padding": None}
    is_byte_level = (parts["decoder"] or {}).get("type") == "ByteLevel"
    parts["normalizer"] = None if is_byte_level else _without_prefix(parts["normalizer"])
    parts["pre_tokenizer"] = _without_prefix(parts["pre_tokenizer"])
    size = max(vocabulary, len(tok))  # a model may have less logits than the tokenizer has tokens
    sample = '{"name":"a b é"}'
    try:
        tokenizer = llguidance.LLTokenizer(json.dumps(parts), n_vocab=size, eos_token=[*end])
        exact = tokenizer.decode_bytes(tokenizer.tokenize_str(sample)) == sample.encode()
    except ValueError as e:
        raise ValueError(f"schema_grammar: the tokenizer must be one on bytes: {e}") from None
    if not exact:
        raise ValueError("schema_grammar: the tokenizer changes the text that it is given")
    return tokenizer


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if not isinstance(part, dict):
        return part
    part = dict(part)
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            part[key] = [_without_prefix(p) for p in part[key] if p["type"] not in ("Prepend", "Strip")]
    if "add_prefix_space" in part:
        part["add_prefix_space"] = False
    return None if part["type"] in ("Prepend", "Strip") else part
