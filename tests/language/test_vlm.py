"""vlm: transformers with the same weights is the peer, a loop over tokens the naive formula."""

import functools

import pytest
import torch
import torch.nn.functional as F

from medvl.components.losses import token_cross_entropy
from medvl.hub import skeletons
from medvl.language import qwen_vl, vlm
from medvl.weights import lazy, lora
from tests import tiny

model = functools.cache(tiny.model)


def theirs(inputs):
    """What transformers needs to count positions as we do (it counts padding where nobody tells it better)."""
    if "image_grid_thw" in inputs:
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def labels_of(inputs, gen):
    labels = inputs["input_ids"].clone()
    return labels.masked_fill(
        (torch.rand(labels.shape, generator=gen) < 0.4) | (inputs["attention_mask"] == 0) | (labels > 140),
        -100,
    )


# Splice ---------------------------------------------------------------------------------------------------------------------------------
IDS = torch.tensor(
    [[9, 9, 3, 4, 9], [1, 2, 3, 4, 5], [0, 9, 5, 9, 9]]
)  # placeholder 9; the middle row is text alone


def naive_splice(ids, visual, table, token):
    rows, taken = [], 0
    for row in ids.tolist():
        parts = []
        for i in row:
            parts.append(visual[taken].to(table.dtype) if i == token else table[i])
            taken += i == token
        rows.append(torch.stack(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("token", [9, -200, 1000])
def test_splice_is_the_loop_over_tokens(gen, token):
    ids = IDS.masked_fill(IDS == 9, token)
    table, visual = (torch.randn(n, 4, generator=gen).requires_grad_() for n in (10, 6))
    pull = torch.randn(3, 5, 4, generator=gen)
    got, want = vlm.splice(ids, visual, table, token), naive_splice(ids, visual, table, token)
    assert torch.equal(got, want)
    for a, b in zip(
        torch.autograd.grad((got * pull).sum(), (visual, table)),
        torch.autograd.grad((want * pull).sum(), (visual, table)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert vlm.visual_rows(ids, token).tolist() == [0, 0, 0, 2, 2, 2]


def test_splice_takes_the_dtype_of_the_table_and_lazy_tables(gen):
    table, visual = torch.randn(10, 4, generator=gen), torch.randn(6, 4, generator=gen)
    assert vlm.splice(IDS, visual, table.bfloat16(), 9).dtype == torch.bfloat16
    a, b = torch.randn(2, 10, generator=gen), torch.randn(4, 2, generator=gen)
    adapted = lazy.low_rank(table, a, b, kind="embedding")
    torch.testing.assert_close(
        vlm.splice(IDS, visual, adapted, 9), vlm.splice(IDS, visual, lazy.dense(adapted), 9)
    )


def test_splice_counts_by_row(gen):
    table = torch.randn(10, 4, generator=gen)
    vlm.splice(IDS, torch.randn(6, 4), table, 9, counts=[3, 0, 3])
    for visual, counts, message in [
        (
            torch.randn(5, 4),
            None,
            r"6 placeholders \(id 9\) meet 5 visual tokens: row 0 has 3, row 1 has 0, row 2 has 3",
        ),
        (
            torch.randn(6, 4),
            [2, 0, 4],
            r"one placeholder \(id 9\) per visual token; row 0 has 3 for 2, row 2 has 3 for 4",
        ),
        (torch.randn(6, 4), [3, 3], "one number per row, got 2 for 3 rows"),
        (torch.randn(6, 5), None, r"visual must be floats \[n, 4\], got float32 \[6, 5\]"),
        (torch.ones(6, 4, dtype=torch.int64), None, r"got int64 \[6, 4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            vlm.splice(IDS, visual, table, 9, counts=counts)
    with pytest.raises(ValueError, match=r"splice: ids must be whole numbers \[b, t\], got float32 \[3, 5\]"):
        vlm.splice(IDS.float(), torch.randn(6, 4), table, 9)
    with pytest.raises(ValueError, match=r"visual_rows: ids must be whole numbers \[b, t\], got int64 \[5\]"):
        vlm.visual_rows(IDS[0], 9)


@pytest.mark.parametrize("kind", ["internvl", "qwen2_vl", "qwen2_5_vl"])
def test_splice_is_what_the_models_do_with_pixels(kind):
    skeleton, params = model(kind)
    inputs = tiny.batch(kind, (2, 0, 1))
    peer = tiny.peer(skeleton, params)
    with torch.no_grad():
        seen = peer.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
        ).pooler_output
        visual = seen.flatten(0, 1) if kind == "internvl" else torch.cat(seen)
        table = params["model.language_model.embed_tokens.weight"]
        embeds = vlm.splice(
            inputs["input_ids"], visual, table, 150, counts=(inputs["input_ids"] == 150).sum(1).tolist()
        )
        batch = tiny.renamed(inputs)
        spliced = {k: v for k, v in batch.items() if k != "pixel_values"} | {"inputs_embeds": embeds}
        torch.testing.assert_close(
            vlm.hidden_states(skeleton, params, **spliced), vlm.hidden_states(skeleton, params, **batch)
        )


# Hidden states --------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_hidden_states_and_loss_are_those_of_transformers(kind, side, gen):
    skeleton, params = model(kind)
    inputs = tiny.batch(kind, (1, 0, 2), side)
    labels = labels_of(inputs, gen)
    with torch.no_grad():
        want = tiny.peer(skeleton, params)(**theirs(inputs), labels=labels, output_hidden_states=True)
        got = vlm.hidden_states(skeleton, params, **tiny.renamed(inputs), labels=labels)
        total, count = vlm.answer_loss(skeleton, params, tiny.renamed(inputs) | {"labels": labels}, chunk=5)
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[keep], want.hidden_states[-1][keep], rtol=1e-5, atol=1e-5)
    name, _ = vlm.language_head_names(skeleton)
    torch.testing.assert_close(F.linear(got, params[name])[keep], want.logits[keep], rtol=1e-5, atol=1e-5)
    assert count == (labels[:, 1:] != -100).sum() > 5
    torch.testing.assert_close(total / count, want.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_those_of_transformers(kind, again, gen):
    """qwen3 is tied: its table gets the gradients of both its uses."""
    skeleton, params = model(kind)
    inputs = tiny.batch(kind)
    labels = labels_of(inputs, gen)
    peer = tiny.peer(skeleton, params)
    (peer(**theirs(inputs), labels=labels).loss * (labels[:, 1:] != -100).sum()).backward()
    leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
    total, _ = vlm.answer_loss(
        skeletons.checkpointed(skeleton) if again else skeleton,
        leaves,
        tiny.renamed(inputs) | {"labels": labels},
        chunk=7,
    )
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    want = dict(peer.named_parameters())
    for n, g in zip(leaves, grads, strict=True):
        torch.testing.assert_close(
            g, torch.zeros_like(g) if want[n].grad is None else want[n].grad, rtol=1e-3, atol=2e-4, msg=n
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_masks_made_here_are_those_of_transformers(kind, side):
    """To the bit, with padding and without."""
    skeleton, params = model(kind)
    name, _ = vlm.language_head_names(skeleton)
    without_head = params | {name: lazy.passed(params[name])}
    for counts in ((1, 0, 2), (1,)):
        batch = tiny.renamed(tiny.batch(kind, counts, side))
        inputs = vlm.model_inputs(skeleton, batch)
        assert inputs["attention_mask"].dim() == 2
        with torch.no_grad():
            want = skeleton(without_head, **inputs, use_cache=False).logits
            hidden = vlm.hidden_states(skeleton, params, **batch)
        keep = batch["mask"].bool()
        assert torch.equal(hidden[keep], want[keep])
        assert hidden.isfinite().all()


def test_a_head_with_a_bias():
    config = {k: v for k, v in tiny.TEXT.items() if k != "num_key_value_heads"}
    skeleton, params = skeletons.init_skeleton(
        {"model_type": "phi", **config}, torch.Generator().manual_seed(0), head="language"
    )
    params["lm_head.bias"] = torch.linspace(-1, 1, 160)
    assert vlm.language_head_names(skeleton) == ("lm_head.weight", "lm_head.bias")
    inputs = tiny.batch("qwen2")
    batch = tiny.renamed(inputs) | {"labels": inputs["input_ids"]}
    total, count = vlm.answer_loss(skeleton, params, batch)
    logits = skeleton(params, **vlm.model_inputs(skeleton, tiny.renamed(inputs))).logits
    torch.testing.assert_close(
        total,
        F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten(), reduction="sum"),
    )
    assert count == inputs["input_ids"][:, 1:].numel()


def test_a_lazy_head_and_weights_per_sample(gen):
    skeleton, params = model("phi3")
    batch = tiny.renamed(tiny.batch("phi3"))
    name, bias = vlm.language_head_names(skeleton)
    assert (name, bias) == ("lm_head.weight", None)
    a, b = torch.randn(3, 32, generator=gen), torch.randn(160, 3, generator=gen)
    adapted = params | {name: lazy.low_rank(params[name], a, b)}
    merged = params | {name: lazy.dense(adapted[name])}
    both = [vlm.answer_loss(skeleton, p, batch | {"labels": batch["ids"]})[0] for p in (adapted, merged)]
    torch.testing.assert_close(*both)
    gate = torch.tensor([[1.0, 0, 2], [0, 1, 0]])
    hidden = vlm.hidden_states(skeleton, params, **batch)
    mixed = lazy.low_rank(params[name], a, b, gate=gate)
    rows = [
        token_cross_entropy(hidden[i : i + 1], params[name] + (b * gate[i]) @ a, batch["ids"][i : i + 1])[0]
        for i in range(2)
    ]
    logits = F.linear(hidden, mixed)
    torch.testing.assert_close(
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="sum"),
        sum(rows),
    )


def test_a_tower_with_weights_per_sample(gen):
    skeleton, params = model("qwen2_5_vl")
    adapter = lora.init_lora(
        lora.LoraConfig(rank=2, pattern=r".*visual.*(qkv|fc|mlp\.\d)", vision=True), skeleton, gen
    )
    factors = {
        m: {k: torch.randn(t.shape, generator=gen) * 0.2 for k, t in f.items()}
        for m, f in adapter.factors.items()
    }
    inputs, counts = tiny.batch("qwen2_5_vl", (2, 1)), (2, 1)
    gate = torch.tensor([[1.0, 0.0], [0.0, 2.0]])

    def of(gates, rows):
        held = {
            f"{m}.weight": lazy.low_rank(params[f"{m}.weight"], f["a"], f["b"], gate=gates, rows=rows)
            for m, f in factors.items()
        }
        return params | held

    got = vlm.hidden_states(
        skeleton, of(gate, vlm.visual_rows(inputs["input_ids"], 150)), **tiny.renamed(inputs)
    )
    for i in range(2):
        one = tiny.sample("qwen2_5_vl", inputs, i, counts)
        want = vlm.hidden_states(skeleton, of(gate[i], None), **tiny.renamed(one))
        torch.testing.assert_close(got[i, inputs["attention_mask"][i].bool()], want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "qwen3_vl"])
def test_padding_and_other_rows_change_nothing(kind):
    skeleton, params = model(kind)
    left, right = (tiny.renamed(tiny.batch(kind, (1, 2), side)) for side in ("left", "right"))
    with torch.no_grad():
        a, b = (vlm.hidden_states(skeleton, params, **x)[x["mask"].bool()] for x in (left, right))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for i in range(2):
            one = tiny.renamed(tiny.sample(kind, tiny.batch(kind, (1, 2)), i, (1, 2)))
            alone = vlm.hidden_states(skeleton, params, **{k: v for k, v in one.items() if k != "mask"})
            torch.testing.assert_close(
                vlm.hidden_states(skeleton, params, **left)[i, -alone.shape[1] :],
                alone[0],
                rtol=1e-5,
                atol=1e-5,
            )


# Heads ----------------------------------------------------------------------------------------------------------------------------------
def test_heads_have_the_names_of_params():
    for kind in tiny.CONFIGS:
        skeleton, params = model(kind)
        name, bias = vlm.language_head_names(skeleton)
        assert name in params
        assert bias is None
        assert name == {"qwen3": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}.get(
            kind, name
        )
        assert params[name].shape == (160, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gemma2", "final_logit_softcapping": 30.0},
            "logits of gemma2 .*final_logit_softcapping 30.0",
        ),
        ({"model_type": "cohere", "logit_scale": 0.0625}, "logits of cohere .*logit_scale 0.0625"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits of granite .*logits_scaling 8.0"),
    ],
)
def test_heads_that_are_not_all_are_refused(config, message):
    skeleton = skeletons.empty_skeleton({**tiny.TEXT, **config}, head="language")
    with pytest.raises(ValueError, match=message):
        vlm.language_head_names(skeleton)


def test_scales_that_do_nothing_are_fine_and_encoders_have_no_head():
    assert vlm.language_head_names(
        skeletons.empty_skeleton(
            {**tiny.TEXT, "model_type": "granite", "logits_scaling": 1.0}, head="language"
        )
    )
    skeleton, params = model("qwen2", head="")
    with pytest.raises(ValueError, match="has no language head; load it with head='language'"):
        vlm.hidden_states(skeleton, params, **tiny.renamed(tiny.batch("qwen2")))


# Positions on three axes ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_what_an_earlier_call_left_is_neither_read_nor_written(kind):
    skeleton, params = model(kind)
    batch = tiny.renamed(tiny.batch(kind))
    text = tiny.renamed(tiny.batch("qwen2", seed=3))
    with torch.no_grad():
        want = [vlm.hidden_states(skeleton, params, **b) for b in (batch, text)]
        skeleton.module.model.rope_deltas = torch.tensor([[77], [-5]])
        got = [vlm.hidden_states(skeleton, params, **b) for b in (batch, text)]
        assert skeleton.module.model.rope_deltas.tolist() == [[77], [-5]]
        skeleton.module.model.rope_deltas = None
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_positions_may_be_given_or_made_of_any_of_their_sources():
    skeleton, params = model("qwen2_5_vl")
    batch = tiny.renamed(tiny.batch("qwen2_5_vl"))
    whole = vlm.hidden_states(skeleton, params, **batch)
    bare = {k: v for k, v in batch.items() if k != "mm_token_type_ids"}
    positions, _ = qwen_vl.mrope(batch["ids"], batch["mask"].bool(), batch["image_grid_thw"], image_token=150)
    for same in (
        bare,
        bare | {"position_ids": positions},
        bare | {"position_ids": torch.cat([positions[:1], positions])},
    ):
        assert torch.equal(vlm.hidden_states(skeleton, params, **same), whole)
    with torch.no_grad():  # the trap: transformers takes the same call for a text on one axis
        silent = tiny.peer(skeleton, params)(
            input_ids=batch["ids"],
            attention_mask=batch["mask"],
            **{k: batch[k] for k in ("pixel_values", "image_grid_thw")},
        ).logits
    mine = F.linear(whole, params[vlm.language_head_names(skeleton)[0]])
    assert (silent - mine)[batch["mask"].bool()].abs().max() > 0.01


# Errors ---------------------------------------------------------------------------------------------------------------------------------
def without(*names, **more):
    return lambda b: {k: v for k, v in b.items() if k not in names} | {k: f(b) for k, f in more.items()}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen2", without("ids"), r"needs ids \[b, t\] or inputs_embeds \[b, t, d\], got only mask"),
        (
            "qwen2",
            without(ids=lambda b: b["ids"].float()),
            r"ids must be whole numbers \[b, t\], got float32 \[2, 6\]",
        ),
        ("qwen2", without(ids=lambda b: b["ids"] > 0), r"ids must be whole numbers \[b, t\], got bool"),
        (
            "qwen2",
            without(ids=lambda b: b["ids"] + 100),
            "ids must be from 0 to 159, the token table's last, got 100 to",
        ),
        (
            "qwen2",
            without(ids=lambda b: b["ids"] - 1),
            "must be from 0 to 159, the token table's last, got -1 to",
        ),
        (
            "qwen2",
            without(mask=lambda b: b["mask"][:, 1:]),
            r"mask must be bool or whole numbers \[2, 6\], .*, got int64 \[2, 5\]",
        ),
        ("qwen2", without(mask=lambda b: b["mask"].float()), r"mask must be bool .* got float32"),
        (
            "qwen2",
            without(mask=lambda b: b["mask"] * torch.tensor([[1], [0]])),
            r"every row needs a token, rows \[1\] have none",
        ),
        (
            "qwen2",
            lambda b: {"ids": b["ids"][:0], "mask": b["mask"][:0]},
            r"needs rows and tokens, got \[0, 6\]",
        ),
        (
            "qwen2",
            without(position_ids=lambda b: b["mask"].float()),
            r"position_ids must be whole numbers \[2, 6\], got float32",
        ),
        (
            "qwen2",
            without(position_ids=lambda b: b["mask"].expand(3, -1, -1)),
            r"must be whole numbers \[2, 6\], got int64 \[3, 2, 6\]",
        ),
        (
            "qwen2",
            without(inputs_embeds=lambda b: torch.ones(2, 8, 32)),
            r"inputs_embeds must be floats \[b, t, d\], .* got float32 \[2, 8, 32\]",
        ),
        (
            "qwen2",
            without(pixel_valeus=lambda b: torch.ones(1)),
            r"qwen2 takes no pixel_valeus; it takes attention_mask, .*input_ids",
        ),
        (
            "internvl",
            without("pixel_values"),
            r"12 image placeholders \(id 150\) and no pixel_values: row 0 has 4, row 1 has 8",
        ),
        (
            "internvl",
            without(ids=lambda b: b["ids"].masked_fill(b["ids"] == 150, 3)),
            r"no placeholder \(id 150\) in any of 2 rows",
        ),
        (
            "internvl",
            without(pixel_values=lambda b: b["pixel_values"][1:]),
            r"make 8 visual tokens, the ids hold 12 .* row 1 has 8",
        ),
        (
            "internvl",
            without(pixel_values=lambda b: b["pixel_values"].byte()),
            r"pixel_values must be floats .* got uint8 \[3, 3, 16, 16\]",
        ),
        (
            "internvl",
            without("ids", inputs_embeds=lambda b: torch.ones(*b["ids"].shape, 32)),
            "pixel_values go with ids, not with inputs_embeds",
        ),
        ("qwen2_5_vl", without("image_grid_thw"), r"needs image_grid_thw \[n, 3\] beside pixel_values"),
        (
            "qwen2_5_vl",
            without(image_grid_thw=lambda b: b["image_grid_thw"][1:]),
            "says .* patches, pixel_values have",
        ),
        (
            "qwen2_5_vl",
            without(
                "pixel_values", "image_grid_thw", inputs_embeds=lambda b: torch.ones(*b["ids"].shape, 32)
            ),
            r"three axes; with inputs_embeds it needs position_ids \[3, b, t\] \(qwen_vl.mrope\)",
        ),
        (
            "qwen2_5_vl",
            without(video_grid_thw=lambda b: b["image_grid_thw"]),
            "with .*video_grid_thw it needs position_ids",
        ),
        ("qwen2_5_vl", without(mm_token_type_ids=lambda b: b["mm_token_type_ids"].flip(1)), "mrope: "),
        (
            "qwen2_5_vl",
            without("mm_token_type_ids", ids=lambda b: b["ids"].masked_fill(b["ids"] == 153, 151)),
            "video tokens .* for which there is no video grid left",
        ),
    ],
)
def test_bad_batches_are_refused(kind, change, message):
    skeleton, params = model(kind)
    batch = tiny.renamed(tiny.batch(kind))
    vlm.model_inputs(skeleton, batch)
    with pytest.raises(ValueError, match=message):
        vlm.hidden_states(skeleton, params, **change(batch))


def test_a_loss_needs_labels():
    skeleton, params = model("qwen2")
    batch = tiny.renamed(tiny.batch("qwen2"))
    with pytest.raises(
        ValueError, match=r"answer_loss: the batch must have labels \[b, t\], got only ids, mask"
    ):
        vlm.answer_loss(skeleton, params, batch)
    with pytest.raises(ValueError, match="labels int64"):
        vlm.answer_loss(skeleton, params, batch | {"labels": batch["ids"][:, 1:]})
