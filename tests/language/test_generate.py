"""generate: transformers' generate is the peer for greedy decoding, whole texts for pieces."""

import copy
import functools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

from medvl.hub import skeletons, tokens
from medvl.language import cached_forward, qwen_vl, vlm
from medvl.language.generate import Answer, add_token, generate
from medvl.language.sampling import Sampling, allow_in_phases, allow_only
from medvl.weights import four_bit, lazy, lora
from tests import tiny

COUNTS = (1, 2)
model = functools.cache(tiny.model)


def forced(*rows):
    """A mask that lets every row write just these ids."""

    def allowed(step, so_far):
        mask = torch.zeros(len(rows), max(map(max, rows)) + 1, dtype=torch.bool)
        for i, row in enumerate(rows):
            mask[i, row[min(step, len(row) - 1)]] = True
        return mask

    return allowed


# Greedy ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_greedy_is_that_of_transformers_whatever_the_padding(kind):
    """20 tokens: more than phi3's window of 6 and behind it."""
    skeleton, params = model(kind)
    left, right = (tiny.batch(kind, COUNTS, side) for side in ("left", "right"))
    want = tiny.peer_tokens(skeleton, params, left, 20, min_new_tokens=20, eos_token_id=None)
    assert len(want.unique()) > 5
    for inputs in (left, right):
        got = generate(Sampling(max_tokens=20), skeleton, params, tiny.renamed(inputs))
        assert got.ids == tuple(map(tuple, want.tolist()))
        assert got.reasons == ("length", "length")
        assert got.prompt_tokens == tuple(left["attention_mask"].sum(1).tolist())
    for i in range(2):
        one = generate(
            Sampling(max_tokens=20), skeleton, params, tiny.renamed(tiny.sample(kind, left, i, COUNTS))
        )
        assert one.ids[0] == got.ids[i]


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_greedy_is_decoding_without_a_cache(kind):
    skeleton, params = model(kind)
    one = tiny.renamed(tiny.sample(kind, tiny.batch(kind, COUNTS), 1, COUNTS))
    one.pop("mm_token_type_ids", None)
    texts = range(3, 140)  # a placeholder that the model writes would be one of the prompt below
    got = generate(Sampling(max_tokens=12), skeleton, params, one, allowed=allow_only(texts)).ids[0]
    for token in got:
        with torch.no_grad():
            hidden = vlm.hidden_states(skeleton, params, **{k: v for k, v in one.items() if k != "mask"})
        logits = F.linear(hidden[0, -1], params[vlm.language_head_names(skeleton)[0]])
        assert logits[3:140].argmax() + 3 == token
        one["ids"] = torch.cat([one["ids"], torch.tensor([[token]])], 1)
        one["mask"] = torch.ones_like(one["ids"])


def test_layers_with_and_without_a_window():
    config = tiny.CONFIGS["qwen2"] | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    skeleton, params = skeletons.init_skeleton(config, torch.Generator().manual_seed(0), head="language")
    params = {n: t * (4 if t.dim() == 2 else 1) for n, t in params.items()}
    assert set(skeleton.config["layer_types"]) == {"full_attention", "sliding_attention"}
    inputs = tiny.batch("qwen2")
    want = tiny.peer_tokens(skeleton, params, inputs, 16, min_new_tokens=16, eos_token_id=None)
    assert generate(Sampling(max_tokens=16), skeleton, params, tiny.renamed(inputs)).ids == tuple(
        map(tuple, want.tolist())
    )


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5_vl"])
def test_a_repetition_penalty_is_that_of_transformers_but_for_padding(kind):
    skeleton, params = model(kind)
    inputs = tiny.batch(kind, COUNTS)
    plain = generate(Sampling(max_tokens=20), skeleton, params, tiny.renamed(inputs))
    got = generate(Sampling(max_tokens=20, repetition_penalty=1.3), skeleton, params, tiny.renamed(inputs))
    assert got.ids != plain.ids
    for i in range(2):
        one = tiny.sample(kind, inputs, i, COUNTS)
        want = tiny.peer_tokens(
            skeleton, params, one, 20, min_new_tokens=20, eos_token_id=None, repetition_penalty=1.3
        )
        assert got.ids[i] == tuple(want[0].tolist())


@pytest.mark.parametrize("kind", ["qwen3", "qwen2_5_vl"])
def test_rows_end_by_themselves(kind):
    skeleton, params = model(kind)
    inputs = tiny.batch(kind, COUNTS)
    free = generate(Sampling(max_tokens=16), skeleton, params, tiny.renamed(inputs))
    ends = (free.ids[0][5], free.ids[1][9])
    want = tiny.peer_tokens(skeleton, params, inputs, 16, eos_token_id=list(ends))
    got = generate(Sampling(max_tokens=16, end=ends), skeleton, params, tiny.renamed(inputs))
    cut = [next((k for k, t in enumerate(row) if t in ends), 16) for row in free.ids]
    assert got.ids == tuple(row[:k] for row, k in zip(free.ids, cut, strict=True))
    assert got.reasons == tuple("end" if k < 16 else "length" for k in cut)
    assert max(cut) < 16
    for row, ids, k in zip(want.tolist(), got.ids, cut, strict=True):
        assert tuple(row[: k + 1]) == (*ids, row[k])
        assert row[k] in ends
    late = generate(Sampling(max_tokens=16, min_tokens=12, end=ends), skeleton, params, tiny.renamed(inputs))
    want = tiny.peer_tokens(skeleton, params, inputs, 16, min_new_tokens=12, eos_token_id=list(ends))
    assert [row[:12] for row in late.ids] == [tuple(r[:12]) for r in want.tolist()]


def test_it_stops_when_all_rows_have_and_projects_one_position():
    skeleton, params = model("qwen2")
    seen, batch = [], tiny.renamed(tiny.batch("qwen2"))
    skeleton = copy.deepcopy(skeleton)
    skeleton.module.lm_head.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    free = generate(Sampling(max_tokens=9), skeleton, params, batch)
    assert seen == [(2, 1, 160)] * 9
    seen.clear()
    generate(Sampling(max_tokens=9, end=(free.ids[0][2], free.ids[1][4])), skeleton, params, batch)
    assert len(seen) <= 5


def rows_that_end(kind, **settings):
    """(settings under which 5 rows end at different steps, inputs, what the rows are before their ends)."""
    skeleton, params = model(kind)
    inputs = tiny.renamed(tiny.batch(kind, (1, 2, 0, 1, 2)))
    free = generate(Sampling(max_tokens=24, **settings), skeleton, params, inputs)
    # So few of the tokens that some rows go on to their limit.
    ends = tuple({free.ids[0][2], free.ids[3][5], free.ids[1][9]})
    cut = [next((k for k, token in enumerate(row) if token in ends), 24) for row in free.ids]
    assert len(set(cut)) > 2
    want = tuple(row[:k] for row, k in zip(free.ids, cut, strict=True))
    return Sampling(max_tokens=24, end=ends, **settings), inputs, want


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2}, {"repetition_penalty": 1.2}], ids=str)
def test_rows_that_end_leave_and_change_nothing(kind, settings):
    cfg, inputs, want = rows_that_end(kind, **settings)
    skeleton, params = model(kind)
    skeleton, seen = copy.deepcopy(skeleton), []
    skeleton.module.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(len(out)))
    assert generate(cfg, skeleton, params, inputs).ids == want
    assert seen == sorted(seen, reverse=True)
    # Of n rows that are computed, more than half are not done.
    for step, rows in enumerate(seen):
        assert 2 * sum(len(row) >= step for row in want) > rows


def test_rows_stay_where_the_cache_is_of_an_unknown_kind(monkeypatch):
    from medvl.hub import kv_cache

    cfg, inputs, want = rows_that_end("qwen2")
    monkeypatch.setattr(kv_cache, "reserve_room", lambda cache, tokens: None)
    skeleton, params = model("qwen2")
    skeleton, seen = copy.deepcopy(skeleton), []
    skeleton.module.lm_head.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    assert generate(cfg, skeleton, params, inputs).ids == want
    assert set(seen) == {5}


def test_masks_are_of_the_rows_of_the_prompts_when_some_have_left():
    """Each row has an alphabet of its own, from which it may not write a token twice."""
    skeleton, params = model("qwen3")
    inputs = tiny.renamed(tiny.batch("qwen3", (1, 2, 0, 1)))
    alphabet = torch.zeros(4, 160, dtype=torch.bool)
    for row in range(4):
        alphabet[row, 20 + 30 * row : 40 + 30 * row] = True
    lengths, end, shapes = torch.tensor([3, 15, 7, 5]), 7, []

    def allowed(step, so_far):
        shapes.append(tuple(so_far.shape))
        mask = alphabet.scatter(1, so_far, False)
        mask[step >= lengths] = torch.arange(160) == end
        return mask

    got = generate(Sampling(max_tokens=20, end=(end,)), skeleton, params, inputs, allowed=allowed)
    assert shapes == [(4, step) for step in range(16)]
    assert [len(row) for row in got.ids] == lengths.tolist()
    for row, ids in enumerate(got.ids):
        assert len(set(ids)) == len(ids)
        assert all(alphabet[row, token] for token in ids)
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        own = lambda step, so_far, row=row: alphabet[row].scatter(0, so_far[0], False)
        assert generate(Sampling(max_tokens=len(ids)), skeleton, params, one, allowed=own).ids[0] == ids


@pytest.mark.parametrize("kind", ["phi3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_calls_leave_nothing_behind_and_threads_do_not_meet(kind):
    skeleton, params = model(kind)
    batches = [tiny.renamed(tiny.batch(kind, counts, seed=s)) for s, counts in ((1, (1, 2)), (2, (0, 3, 1)))]
    other = {n: t * 0.8 for n, t in params.items()}
    cfg = Sampling(max_tokens=8)
    want = [
        generate(cfg, copy.deepcopy(skeleton), p, b) for p, b in zip((params, other), batches, strict=True)
    ]
    assert [generate(cfg, skeleton, p, b) for p, b in zip((params, other), batches, strict=True)] == want
    assert generate(cfg, skeleton, params, batches[0]) == want[0]
    assert getattr(skeleton.module.model, "rope_deltas", None) is None
    wrong = []

    def work(i):
        wrong.extend(
            i for _ in range(3) if generate(cfg, skeleton, (params, other)[i], batches[i]) != want[i]
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_generation_uses_no_name_that_goes_away():
    skeleton, params = model("qwen3")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        generate(Sampling(max_tokens=3), skeleton, params, tiny.renamed(tiny.batch("qwen3", COUNTS)))


def test_positions_go_on_as_the_delta_says():
    skeleton, params = model("qwen2_5_vl")
    batch = tiny.renamed(tiny.batch("qwen2_5_vl"))
    positions, delta = qwen_vl.mrope(
        batch["ids"], batch["mask"].bool(), batch["image_grid_thw"], image_token=150
    )
    call = vlm.model_inputs(skeleton, batch)
    assert torch.equal(
        cached_forward._next_position(call), (delta + batch["mask"].sum(1)[:, None]).expand(3, -1, -1)
    )
    plain = {k: v for k, v in batch.items() if k != "mm_token_type_ids"}
    given = generate(Sampling(max_tokens=6), skeleton, params, plain | {"position_ids": positions})
    assert given == generate(Sampling(max_tokens=6), skeleton, params, batch)


def test_prompts_may_be_embeddings():
    skeleton, params = model("qwen2")
    batch = tiny.renamed(tiny.batch("qwen2", side="right"))
    embeds = vlm.splice(batch["ids"], torch.zeros(0, 32), params["model.embed_tokens.weight"], 159)
    got = generate(Sampling(max_tokens=8), skeleton, params, {"inputs_embeds": embeds, "mask": batch["mask"]})
    assert got == generate(Sampling(max_tokens=8), skeleton, params, batch)


def test_four_bits_and_weights_per_sample(gen):
    """The base of a QLoRA, and adapters mixed for each row: the rows are those of calls of their own."""
    skeleton, params = model("phi3")
    base = four_bit.quantize(params, four_bit.QuantConfig(blocksize=64))
    adapter = lora.init_lora(lora.LoraConfig(rank=4, pattern="all-linear"), skeleton, gen)
    held = {
        f"{m}.weight": [torch.randn(t.shape, generator=gen) * 0.3 for t in (f["a"], f["b"])]
        for m, f in adapter.factors.items()
    }
    gate = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0.5, 0, 0, 0.5]])

    def of(rows):
        return base | {n: lazy.low_rank(base[n], a, b, gate=rows) for n, (a, b) in held.items()}

    inputs, counts = tiny.batch("phi3", (1, 2, 0)), (1, 2, 0)
    got = generate(Sampling(max_tokens=12), skeleton, of(gate), tiny.renamed(inputs))
    for i in range(3):
        one = tiny.renamed(tiny.sample("phi3", inputs, i, counts))
        assert generate(Sampling(max_tokens=12), skeleton, of(gate[i : i + 1]), one).ids[0] == got.ids[i]
    # Rows that go on when others have left keep their weights.
    ends = (got.ids[0][2], got.ids[1][4])
    cut = [next((k for k, token in enumerate(row) if token in ends), 12) for row in got.ids]
    assert len(set(cut)) == 3
    early = generate(Sampling(max_tokens=12, end=ends), skeleton, of(gate), tiny.renamed(inputs))
    assert early.ids == tuple(row[:k] for row, k in zip(got.ids, cut, strict=True))
    assert got.ids != generate(Sampling(max_tokens=12), skeleton, base, tiny.renamed(inputs)).ids


# Drawing --------------------------------------------------------------------------------------------------------------------------------
def test_draws_belong_to_their_row():
    skeleton, params = model("qwen3")
    batch = tiny.renamed(tiny.batch("qwen3", (1, 2, 0, 1)))
    cfg = Sampling(max_tokens=10, temperature=1.5, seed=4)

    def run(rows, **kwargs):
        return generate(
            kwargs.pop("cfg", cfg), skeleton, params, {k: v[rows] for k, v in batch.items()}, **kwargs
        ).ids

    whole = run([0, 1, 2, 3])
    assert run([0, 1, 2, 3]) == whole
    assert run([0]) == whole[:1]
    assert run([0, 1]) == whole[:2]
    assert run([0, 1, 2, 3], cfg=Sampling(max_tokens=10, temperature=1.5, seed=5)) != whole
    assert run([0, 1, 2, 3], gen=torch.Generator().manual_seed(4)) == whole
    assert [row[:6] for row in whole] == list(
        run([0, 1, 2, 3], cfg=Sampling(max_tokens=6, temperature=1.5, seed=4))
    )
    own = [torch.Generator().manual_seed(i) for i in range(4)]
    mine = run([0, 1, 2, 3], gen=own)
    assert run([3, 1], gen=[torch.Generator().manual_seed(i) for i in (3, 1)]) == (mine[3], mine[1])


def test_the_same_prompt_draws_differently_in_different_rows():
    skeleton, params = model("qwen3")
    ids = torch.tensor([[5, 6, 7]]).expand(3, -1)
    assert (
        len(set(generate(Sampling(max_tokens=10, temperature=2.0), skeleton, params, {"ids": ids}).ids)) == 3
    )


# Allowed tokens -------------------------------------------------------------------------------------------------------------------------
def test_only_letters_and_codes_in_phases():
    skeleton, params = model("qwen2")
    batch = tiny.renamed(tiny.batch("qwen2"))
    with torch.no_grad():
        logits = skeleton(params, **vlm.model_inputs(skeleton, batch)).logits[:, -1]
    letters = [33, 34, 37, 40]
    got = generate(Sampling(max_tokens=1), skeleton, params, batch, allowed=allow_only(letters))
    assert [row[0] for row in got.ids] == [letters[k] for k in logits[:, letters].argmax(1).tolist()]
    codes, end = range(100, 140), 7
    for cfg in (Sampling(max_tokens=50, end=(end,)), Sampling(max_tokens=50, end=(end,), temperature=3.0)):
        got = generate(
            cfg,
            skeleton,
            params,
            batch,
            allowed=allow_in_phases((32, allow_only(codes)), (1, allow_only([end]))),
        )
        assert got.reasons == ("end", "end")
        assert all(len(row) == 32 and set(row) <= set(codes) for row in got.ids)


def test_a_mask_sees_what_was_written():
    skeleton, params = model("qwen2")
    seen = []

    def allowed(step, so_far):
        assert so_far.shape == (2, step)
        seen.append(so_far.clone())
        mask = torch.ones(2, 160, dtype=torch.bool)
        return mask.scatter(1, so_far, False)  # nothing twice

    got = generate(
        Sampling(max_tokens=30), skeleton, params, tiny.renamed(tiny.batch("qwen2")), allowed=allowed
    )
    assert all(len(set(row)) == 30 for row in got.ids)
    assert seen[-1].tolist() == [list(row[:29]) for row in got.ids]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            lambda s, i: torch.zeros(160, dtype=torch.bool),
            "no token is allowed in row 0 at step 0: its mask is empty",
        ),
        (
            lambda s, i: torch.arange(160).expand(2, -1) < torch.tensor([[160], [160 * (s < 3)]]),
            "row 1 at step 3: its mask is empty",
        ),
        (
            lambda s, i: torch.ones(160),
            r"allowed must give bool \[v\] or \[2, v\] with v <= 160, got torch.float32 \[160\]",
        ),
        (lambda s, i: torch.ones(3, 160, dtype=torch.bool), r"got torch.bool \[3, 160\]"),
        (lambda s, i: torch.ones(161, dtype=torch.bool), r"got torch.bool \[161\]"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_that_cannot_be_are_refused(mask, message, temperature):
    skeleton, params = model("qwen2")
    with pytest.raises(ValueError, match=message):
        generate(
            Sampling(max_tokens=8, temperature=temperature),
            skeleton,
            params,
            tiny.renamed(tiny.batch("qwen2")),
            allowed=mask,
        )


# Texts ----------------------------------------------------------------------------------------------------------------------------------
@functools.cache
def writer():
    """(tokenizer of single bytes and a few words, model with its vocabulary)."""
    tok = tokens.train_bpe(["the heart is normal. no nodule, no effusion."] * 4, 290)
    skeleton, params = skeletons.init_skeleton(
        tiny.CONFIGS["qwen2"] | {"vocab_size": len(tok) + 3},
        torch.Generator().manual_seed(0),
        head="language",
    )
    return tok, skeleton, {n: t * (5 if t.dim() == 2 else 1) for n, t in params.items()}


def ids_of(tok, text):
    return tok(text, add_special_tokens=False)["input_ids"]


def told(rows, **sampling):
    """What is said of rows of forced ids: (Generated, pieces of each row)."""
    tok, skeleton, params = writer()
    pieces = [[] for _ in rows]
    cfg = Sampling(**({"max_tokens": max(map(len, rows)), "end": (tok.eos_token_id,)} | sampling))
    rows = [[*row, tok.eos_token_id] for row in rows]
    out = generate(
        cfg,
        skeleton,
        params,
        {"ids": torch.ones(len(rows), 2, dtype=torch.int64)},
        tok=tok,
        allowed=forced(*rows),
        on_token=lambda r, p: pieces[r].append(p),
    )
    assert all(p for row in pieces for p in row)
    assert tuple("".join(row) for row in pieces) == out.texts
    return out, pieces


def test_pieces_are_whole_characters():
    tok = writer()[0]
    text = "größe 3×4 µm 结节 🫁 👩‍⚕️ normal"
    out, pieces = told([ids_of(tok, text), ids_of(tok, "no nodule")])
    assert [t.strip() for t in out.texts] == [text, "no nodule"]
    assert out.reasons == ("length", "end")
    assert len(pieces[0]) > 15
    assert not any("\ufffd" in p for row in pieces for p in row)
    cut, _ = told([ids_of(tok, "3 🫁")[:-1]], max_tokens=len(ids_of(tok, "3 🫁")) - 1)
    assert (
        cut.texts[0].strip() == "3 \ufffd"
    )  # the limit fell into a character: what the tokenizer makes of it


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("the heart is normal. no nodule", ("normal",), "the heart is "),
        ("the heart is normal. no nodule", ("is normal. no nod",), "the heart "),
        ("the heart is normal. no nodule", ("zz", "heart x", "no nodule"), "the heart is normal. "),
        ("aab aaab aaaab", ("aaaab",), "aab aaab "),
        ("größe 结节 🫁 normal", ("节 🫁",), "größe 结"),
        ("the heart is norma", ("normal",), "the heart is norma"),
        ("no effusion", ("no effusion",), ""),
        ("the heart is normal", ("rt", "ea"), "the h"),  # one token holds both
    ],
)
def test_stop_strings_of_several_tokens_are_cut(text, stop, want):
    tok, *_ = writer()
    out, _ = told([ids_of(tok, text), ids_of(tok, "no nodule xyz")], stop=stop)
    assert out.texts[0].lstrip() == want
    whole = want == text
    assert (out.reasons[0] == "stop") != whole
    first = out.ids[0]
    assert any(s in tok.decode(first) for s in stop) != whole
    assert whole or not any(s in tok.decode(first[:-1]) for s in stop)


def test_a_row_that_stops_does_not_stop_the_others():
    tok, *_ = writer()
    out, _ = told(
        [ids_of(tok, "the heart is normal"), ids_of(tok, "no effusion, no nodule")], stop=("heart", "nodule")
    )
    assert [t.strip() for t in out.texts] == ["the", "no effusion, no"]
    assert out.reasons == ("stop", "stop")


def test_any_bytes_can_be_told(gen):
    """Random tokens are no UTF-8: pieces still make the tokenizer's own text, cut at the first stop string."""
    tok, *_ = writer()
    rows = [torch.randint(3, len(tok) - 3, (40,), generator=gen).tolist() for _ in range(12)]
    rows = [[t for t in row if t not in tok.all_special_ids] for row in rows]
    for stops in ((), ("e", "no"), ("heart", "s ")):
        out, _ = told(rows, stop=stops)
        for row, text, reason in zip(rows, out.texts, out.reasons, strict=True):
            whole = tok.decode(row, clean_up_tokenization_spaces=False)
            cut = min((whole.find(s) for s in stops if s in whole), default=len(whole))
            assert text == whole[:cut]
            assert (reason == "stop") == (cut < len(whole))


def test_texts_without_a_listener():
    tok, skeleton, params = writer()
    batch = {"ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    out = generate(Sampling(max_tokens=12), skeleton, params, batch, tok=tok)
    assert out.texts == tuple(
        tok.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in out.ids
    )
    assert generate(Sampling(max_tokens=12), skeleton, params, batch).texts == ()


@pytest.mark.parametrize(("name", "size"), [("phi-3-mini", 32064), ("qwen3", 151669)])
def test_real_tokenizers_are_told_in_pieces(shared_data, name, size):
    tok = tokens.tokenizer(shared_data / "tokenizers" / name)
    config = tiny.CONFIGS["qwen2"] | {"vocab_size": size, "hidden_size": 8, "num_hidden_layers": 1}
    skeleton, params = skeletons.init_skeleton(config, torch.Generator().manual_seed(0), head="language")
    text = "No 8 mm nodule;  größe 结节 🫁,\n\n- HbA1c 8.4 % .\nAnswer: B"
    ids = ids_of(tok, text)
    pieces = []
    cfg = Sampling(max_tokens=len(ids), stop=("Answer:",))
    out = generate(
        cfg,
        skeleton,
        params,
        {"ids": torch.tensor([[1, 2]])},
        tok=tok,
        allowed=forced(ids),
        on_token=lambda row, piece: pieces.append(piece),
    )
    assert "".join(pieces) == out.texts[0] == text.partition("Answer")[0]
    assert not any("\ufffd" in p for p in pieces)
    assert out.reasons == ("stop",)


def test_an_error_in_a_listener_ends_the_call():
    tok, skeleton, params = writer()

    def gone(row, piece):
        raise ConnectionError("the listener has gone")

    with pytest.raises(ConnectionError, match="has gone"):
        generate(
            Sampling(max_tokens=12), skeleton, params, {"ids": torch.tensor([[5, 6]])}, tok=tok, on_token=gone
        )
    assert all(p.is_meta for p in skeleton.module.parameters())


# Errors ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "change", "kwargs", "message"),
    [
        ("qwen2", {"ids": torch.ones(2, 6)}, {}, r"ids must be whole numbers \[b, t\], got float32 \[2, 6\]"),
        (
            "qwen2",
            {"ids": torch.ones(2, 4, dtype=torch.int64)},
            {},
            r"ids must be of the mask's rows and tokens \[2, 6\], got \[2, 4\]",
        ),
        ("qwen2", {"mask": torch.tensor([[1] * 6, [0] * 6])}, {}, r"rows \[1\] have none"),
        ("qwen2", {}, {"on_token": print}, r"need a tokenizer \(tok=tokens.tokenizer\(...\)\)"),
        ("qwen2", {}, {"cfg": Sampling(stop=("x",))}, r"need a tokenizer .*, got stop \('x',\)"),
        (
            "qwen2",
            {},
            {"cfg": Sampling(end=(160,))},
            r"end ids must be below the vocabulary's 160, got \[160\]",
        ),
        (
            "qwen2",
            {},
            {"cfg": Sampling(max_tokens=600)},
            "prompt of 6 tokens and max_tokens 600 are more than the 512 positions of qwen2",
        ),
        (
            "qwen2",
            {},
            {"cfg": Sampling(temperature=1.0), "gen": [torch.Generator()]},
            "one for each of 2 rows, got 1",
        ),
        ("internvl", {"pixel_values": None}, {}, "12 image placeholders .* and no pixel_values"),
        (
            "internvl",
            {"pixel_values": torch.ones(2, 3, 16, 16)},
            {},
            "images make 8 visual tokens, the ids hold 12",
        ),
        (
            "internvl",
            {"ids": torch.ones(2, 17, dtype=torch.int64), "mask": None},
            {},
            r"no placeholder \(id 150\) in any of 2 rows",
        ),
        ("qwen2_5_vl", {"image_grid_thw": None}, {}, "needs image_grid_thw"),
        (
            "qwen2_5_vl",
            {"position_ids": torch.ones(2, 3, dtype=torch.int64)},
            {},
            "must be of the mask's rows and tokens",
        ),
    ],
)
def test_bad_calls_are_refused(kind, change, kwargs, message):
    skeleton, params = model(kind)
    cfg = kwargs.pop("cfg", Sampling(max_tokens=2)) if "cfg" in kwargs else Sampling(max_tokens=2)
    with pytest.raises(ValueError, match=message):
        generate(cfg, skeleton, params, tiny.renamed(tiny.batch(kind)) | change, **kwargs)


def test_a_checkpointed_skeleton_has_no_cache():
    skeleton, params = model("qwen2")
    batch, again = tiny.renamed(tiny.batch("qwen2")), skeletons.checkpointed(skeleton)
    with pytest.raises(ValueError, match="qwen2 is checkpointed, its layers would leave the cache empty"):
        generate(Sampling(max_tokens=2), again, params, batch)


def test_special_tokens_are_no_stop_strings():
    tok, skeleton, params = writer()
    with pytest.raises(
        ValueError,
        match=rf"<\|endoftext\|> are tokens, not text; give their ids \[{tok.eos_token_id}\] as end",
    ):
        generate(Sampling(stop=("<|endoftext|>",)), skeleton, params, {"ids": torch.tensor([[5]])}, tok=tok)


def test_logits_that_are_not_finite_are_an_error():
    skeleton, params = model("qwen2")
    broken = params | {"lm_head.weight": params["lm_head.weight"] * torch.nan}
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="row 0 at step 0 are not finite"):
            generate(
                Sampling(max_tokens=2, temperature=temperature),
                skeleton,
                broken,
                tiny.renamed(tiny.batch("qwen2")),
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["phi3", "qwen2_5_vl", "internvl"])
def test_a_gpu_writes_the_same(kind):
    skeleton, params = model(kind)
    batch = tiny.renamed(tiny.batch(kind))
    there, held = ({k: t.cuda() for k, t in x.items()} for x in (batch, params))
    for cfg in (Sampling(max_tokens=12), Sampling(max_tokens=12, temperature=1.0, top_p=0.9)):
        allowed = allow_only(range(3, 140))
        assert generate(cfg, skeleton, held, there, allowed=allowed) == generate(
            cfg, skeleton, params, batch, allowed=allow_only(range(3, 140))
        )


# Pieces ---------------------------------------------------------------------------------------------------------------------------------
def sentencepiece():
    """A tokenizer as of Llama: byte fallback, a space before every text, and none at its start when it is decoded."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "▁", "▁a"]
    tok = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a")], byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tok.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", unk_token="<unk>")


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tok):
        self.tok, self.decoded = tok, 0

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self.tok.decode(ids, **options)


# With byte fallback a broken byte makes those before it broken, too, which no pieces can tell: from 258 on are no bytes.
@pytest.mark.parametrize(
    ("make", "first"), [(lambda: tokens.train_bpe(["é 中 a b"], 300, lower=False), 2), (sentencepiece, 258)]
)
@pytest.mark.parametrize("seed", range(5))
def test_pieces_of_any_tokens_are_their_text_and_cost_as_much(make, first, seed):
    """Random tokens, broken characters among them: joined pieces are the text, which is not decoded again and again."""
    tok = Counting(make())
    gen = torch.Generator().manual_seed(seed)
    text_ids = tok.tok("aé 中 a 😀 b é" * 3, add_special_tokens=False)["input_ids"]
    drawn = torch.randint(first, len(tok.tok), (200,), generator=gen).tolist()
    ids = [*text_ids, *drawn, *text_ids]
    cfg = Sampling(max_tokens=len(ids), end=(1,))
    answer, pieces = Answer(), []
    for number, token in enumerate(ids, 1):
        before = len(answer.text)
        add_token(cfg, tok, answer, token, is_last=number == len(ids), stream=True)
        pieces.append(answer.text[before:])
    assert "".join(pieces) == tok.tok.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    # Broken characters are decoded until one is whole; without them it is two or three tokens a step.
    plain, tok.decoded = Answer(), 0
    for token in text_ids * 20:
        add_token(cfg, tok, plain, token, is_last=False, stream=True)
    assert tok.decoded < 8 * len(text_ids * 20)
