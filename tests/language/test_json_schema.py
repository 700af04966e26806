"""Answers under a JSON schema: random schemas and random logits give valid documents, and loops end."""

import json
import random
import string

import pytest
import torch

from medvl.hub import tokens
from medvl.language.generate import generate
from medvl.language.json_schema import _byte_tokenizer, schema_grammar
from medvl.language.sampling import Sampling, full_mask
from tests import tiny
from tests.naive_schema import is_valid, read_document

llguidance = pytest.importorskip("llguidance")

VOCABULARY = 420  # more logits than the tokenizer has tokens
END = 1
LETTERS = "The heart is normal; no effusion. " + string.printable


@pytest.fixture(scope="module")
def tok():
    return tokens.train_bpe(
        [LETTERS, '{"a": 1, "b": ["x", true, null]}', "0123456789 " * 9], 400, lower=False
    )


@pytest.fixture(scope="module")
def grammar(tok):
    return schema_grammar(tok, VOCABULARY, [END])


def random_schema(rng, depth=3, definitions=()):
    """A schema of one of the kinds that can be written in many ways."""
    draw = rng.random
    if depth == 0 or draw() < 0.5:
        kind = rng.choice(
            ["string", "pattern", "integer", "number", "enum", "const", "any", "boolean", "ref", "types"]
        )
        if kind == "string":
            low = rng.randrange(4)
            schema = {"type": "string"}
            schema |= {"minLength": low} if draw() < 0.5 else {}
            return schema | ({"maxLength": low + rng.randrange(9)} if draw() < 0.7 else {})
        if kind == "pattern":
            patterns = [r"^\d{4}-\d{2}$", "^[A-C]+$", r"^(mg|g)/d?L$", "x", r"^[<>]?\d+(\.\d+)?$"]
            return {"type": "string", "pattern": rng.choice(patterns)}
        if kind in ("integer", "number"):
            schema = {"type": kind}
            low = rng.choice([-5, 0, 1, 40])
            schema |= {rng.choice(["minimum", "exclusiveMinimum"]): low} if draw() < 0.5 else {}
            schema |= {rng.choice(["maximum", "exclusiveMaximum"]): low + 9} if draw() < 0.5 else {}
            return schema | ({"multipleOf": 3 if kind == "integer" else 0.25} if draw() < 0.3 else {})
        if kind == "types":
            types = rng.sample(["string", "null", "integer", "array", "boolean", "object"], 2)
            return {"type": types, "maxLength": 5, "minimum": 3, "maxItems": 2}
        if kind == "ref" and definitions:
            return {"$ref": f"#/$defs/{rng.choice(definitions)}"}
        values = ["H", "", 1, 2.5, None, True, ["a", {"b": 0}], {"c": "é\n"}]
        if kind == "enum":
            return {"enum": rng.sample(values, rng.randint(1, 4))}
        if kind == "const":
            return {"const": rng.choice(values)}
        return {"any": {}, "boolean": {"type": "boolean"}}.get(kind, True)
    inner = lambda: random_schema(rng, depth - 1, definitions)
    kind = rng.choice(["object", "object", "array", "tuple", "anyOf", "map", "one"])
    if kind == "object":
        names = rng.sample(["a", "name", "b c", 'q"uote', "é", "value", "0"], rng.randint(1, 4))
        schema = {
            "properties": {name: inner() for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
        }
        schema |= {"type": "object"} if draw() < 0.8 else {}
        return schema | ({"additionalProperties": False, "title": "T"} if draw() < 0.5 else {})
    if kind == "array":
        low = rng.randrange(3)
        return {"type": "array", "items": inner(), "minItems": low, "maxItems": low + rng.randrange(4)}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [inner(), inner()], "items": draw() < 0.5, "minItems": 1}
    if kind == "anyOf":
        return {"anyOf": [inner(), inner(), {"type": "null"}]}
    if kind == "map":
        return {"type": "object", "additionalProperties": inner(), "minProperties": 1, "maxProperties": 3}
    return {"allOf": [inner()], "description": "one"}


def write(tok, allowed, logits, most=6000):
    """(text, whether it ended) of an answer of which every token is the likeliest that is allowed."""
    ids = []
    for step in range(most):
        mask = allowed(step, torch.tensor([ids], dtype=torch.int64))
        token = int(logits(step).masked_fill(~mask, -torch.inf).argmax())
        if token == END:
            return tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False), True
        ids.append(token)
    return tok.decode(ids), False


def random_logits(seed):
    gen = torch.Generator().manual_seed(seed)
    # In lists and maps the end must come sooner or later.
    return lambda step: torch.randn(VOCABULARY, generator=gen) * 2


def test_random_schemas_and_random_logits_give_valid_documents(tok, grammar):
    kinds = set()
    for seed in range(300):
        rng = random.Random(seed)
        definitions = {name: random_schema(rng, 1) for name in ("x", "y/z")}
        schema = random_schema(rng, 3, ["x", "y~1z"])
        schema = schema if isinstance(schema, dict) else {}
        schema = schema | {"$defs": definitions}
        text, ended = write(tok, grammar(schema), random_logits(seed))
        assert ended, seed
        document = read_document(text)
        assert is_valid(schema, document), (seed, schema, text)
        kinds.add(type(document))
    assert len(kinds) == 7 - 1  # dict, list, str, Decimal, bool, None


def lover(tok, letters):
    """Logits of a model that writes these characters as long as it may."""
    loved = torch.zeros(VOCABULARY)
    for token in range(len(tok)):
        text = tok.decode([token])
        loved[token] = 9.0 * (text != "" and {*text} <= {*letters})
    gen = torch.Generator().manual_seed(0)
    return lambda step: torch.randn(VOCABULARY, generator=gen) + loved


LOOPS = {"space": " \n\t", "string": "abc", "digits": "0123456789", "list": ", 1", "map": '":,{}a1'}


@pytest.mark.parametrize("letters", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "string"}},
            "required": ["a", "b"],
        },
        {"type": "array", "items": {"type": "integer"}},
        {"type": "object", "additionalProperties": {"type": "number"}, "maxProperties": 4},
        {"type": "string", "pattern": "^[a-c0-9]+$"},
    ],
    ids=["object", "list", "map", "pattern"],
)
def test_a_model_that_loves_something_ends_all_the_same(tok, grammar, schema, letters):
    text, ended = write(tok, grammar(schema), lover(tok, letters))
    assert ended
    assert is_valid(schema, read_document(text))


def test_with_white_space_that_may_come_at_will_there_is_no_end(tok):
    """Why documents are compact: llguidance's own default."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = llguidance.LLMatcher(_byte_tokenizer(tok, VOCABULARY, [END]), text, log_level=0)
    logits = lover(tok, " \n\t")
    for step in range(2000):
        bits = torch.tensor(list(matcher.compute_bitmask()), dtype=torch.uint8)
        mask = (bits[:, None] >> torch.arange(8)).bitwise_and(1).bool().flatten()[:VOCABULARY]
        assert matcher.consume_token(int(logits(step).masked_fill(~mask, -torch.inf).argmax()))
    assert not matcher.is_accepting()


def test_only_the_given_end_tokens_end(tok):
    """A chat's end token differs from the tokenizer's own, and a model may have several."""
    assert tok.eos_token_id == END
    start, pad = tok.bos_token_id, tok.pad_token_id
    allowed = schema_grammar(tok, VOCABULARY, [start, pad])({"const": 7})
    first = allowed(0, torch.zeros(1, 0, dtype=torch.int64)).nonzero().flatten().tolist()
    assert {tok.decode([token]) for token in first} <= {" ", "7", " 7"}  # one space may come first
    (seven,) = [token for token in first if tok.decode([token]) == "7"]
    mask = allowed(1, torch.tensor([[seven]]))
    assert mask.nonzero().flatten().tolist() == sorted([start, pad])
    # What comes behind the end, or is not allowed, has no meaning.
    ids = [seven]
    for step, token in enumerate((pad, start, 99), 2):
        ids.append(token)
        mask = allowed(step, torch.tensor([ids]))
        assert mask.nonzero().flatten().tolist() == sorted([start, pad])


def test_one_space_may_come_first_and_no_other(tok, grammar):
    """Tokenizers that put a space before a text have taught models to begin so: another beginning leads them astray."""
    allowed = grammar({"type": "object", "properties": {"a": {"const": 1}}})
    space = tok.convert_tokens_to_ids("Ġ")
    assert allowed(0, torch.zeros(1, 0, dtype=torch.int64))[space]
    behind = allowed(1, torch.tensor([[space]]))
    assert not behind[space]
    assert {tok.decode([token])[0] for token in behind.nonzero().flatten().tolist()} == {"{"}


@pytest.mark.parametrize("lower", [False, True])
def test_names_are_written_as_the_schema_has_them(lower):
    """Though the tokenizer would make others of them: spaces, a letter of two characters, capitals."""
    tok = tokens.train_bpe([LETTERS, "names  e\u0301 of Things"] * 3, 380, lower=lower)
    names = [" Two  spaces ", "e\u0301", "CAPITALS"]
    schema = {"type": "object", "properties": {name: {"const": " A "} for name in names}, "required": names}
    text, ended = write(tok, schema_grammar(tok, VOCABULARY, [END])(schema), random_logits(0))
    assert ended
    assert json.loads(text) == dict.fromkeys(names, " A ")


def allow_rows(rows, vocabulary):
    """A mask of its own for each row of a batch; None allows all tokens."""

    def allowed(step, so_far):
        masks = []
        for row, ids in zip(rows, so_far, strict=True):
            mask = torch.ones(vocabulary, dtype=torch.bool) if row is None else row(step, ids[None])
            masks.append(full_mask(mask, 1, vocabulary, so_far.device).view(vocabulary))
        return torch.stack(masks)

    return allowed


def test_rows_of_a_batch_have_schemas_of_their_own(tok, capfd):
    """Each equal to the same prompt alone, though they end at different steps."""
    skeleton, params = tiny.model("qwen2")
    size = skeleton.module.get_output_embeddings().weight.shape[0]
    small = tokens.train_bpe([LETTERS], 259, lower=False)
    assert len(small) > size  # fewer logits than tokens: those of the bytes must be among them
    grammar = schema_grammar(small, size, [END])
    schemas = [
        {"enum": [True, False]},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 9},
        None,
        {"enum": [17]},
    ]
    cfg = Sampling(max_tokens=40, end=(END,), temperature=1.0)
    ids = torch.tensor([[5, 9, 17, 11]]).expand(len(schemas), -1)
    made = lambda: [None if schema is None else grammar(schema) for schema in schemas]
    gens = lambda: [torch.Generator().manual_seed(i) for i in range(len(schemas))]
    batch = generate(
        cfg, skeleton, params, {"ids": ids}, tok=small, allowed=allow_rows(made(), size), gen=gens()
    )
    for row, schema in enumerate(schemas):
        alone = generate(
            cfg, skeleton, params, {"ids": ids[:1]}, tok=small, allowed=made()[row], gen=gens()[row : row + 1]
        )
        assert alone.texts[0] == batch.texts[row]
        assert alone.reasons[0] == batch.reasons[row]
        if schema is not None and batch.reasons[row] == "end":
            assert is_valid(schema, read_document(batch.texts[row]))
    assert batch.reasons[0] == "end"
    assert capfd.readouterr() == ("", "")  # llguidance prints answers where its log level is above 0


def test_a_row_that_a_stop_string_ended_takes_any_tokens(tok, grammar):
    """`generate` goes on with a done row's place in the batch and fills it with zeros."""
    allowed = grammar({"type": "string"})
    ids = []
    for step in range(3):
        mask = allowed(step, torch.tensor([ids], dtype=torch.int64))
        ids.append(int(mask.nonzero()[0]))
    allowed(3, torch.tensor([ids]))
    assert allowed(4, torch.tensor([[*ids, 0]])).nonzero().flatten().tolist() == [END]


def sentencepiece(prefix):
    """A tokenizer as of Llama and Phi-3: byte fallback, and a space before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "▁", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tok = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    if prefix == "normalizer":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>")


@pytest.mark.parametrize("prefix", ["normalizer", "pre_tokenizer"])
def test_sentencepiece_tokenizers_write_valid_documents(prefix):
    tok = sentencepiece(prefix)
    grammar = schema_grammar(tok, VOCABULARY, [END])
    schema = {
        "type": "object",
        "properties": {"a a": {"type": "string", "maxLength": 9}},
        "required": ["a a"],
    }
    for seed in range(5):
        text, ended = write(tok, grammar(schema), random_logits(seed))
        assert ended
        assert is_valid(schema, read_document(text))


def test_tokenizers_that_cannot_be_used_are_refused(tok):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )
    with pytest.raises(ValueError, match="must be one on bytes"):
        schema_grammar(words, 10, [1])
    with pytest.raises(ValueError, match="fast tokenizer, got object"):
        schema_grammar(object(), 10, [1])
    for end in ([], [VOCABULARY], [-1]):
        with pytest.raises(ValueError, match="end must be tokens below 420"):
            schema_grammar(tok, VOCABULARY, end)


HOSTILE = {
    "nobody": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "lengths": {"type": "string", "minLength": 5, "maxLength": 4},
    "format": {"type": "string", "format": "regex"},
    "look": {"type": "string", "pattern": "^(?=a)b"},
    "unclosed": {"type": "string", "pattern": "(a"},
    "repeated": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "states": {"type": "string", "pattern": "^(a|b)*a(a|b){200}$"},
    "oneOf": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_schemas_without_documents_or_too_costly_are_refused(grammar, schema, capfd):
    with pytest.raises(ValueError, match=r"^schema: .{10,250}$"):
        grammar(schema)
    assert capfd.readouterr() == ("", "")


def test_a_pattern_that_grows_too_large_within_an_answer_is_an_error(tok, grammar, capfd):
    """It says nothing of the answer."""
    with pytest.raises(
        ValueError, match=r"^schema: it needs more than its limits allow; make its patterns simpler$"
    ):
        write(tok, grammar({"type": "string", "pattern": "^(.{0,500}){0,500}$"}), random_logits(0))
    assert capfd.readouterr() == ("", "")
