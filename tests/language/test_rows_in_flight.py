"""Rows that join and leave a batch say what they say alone."""

import pytest
import torch

from medvl.hub import kv_cache
from medvl.language import generate, rows_in_flight, vlm
from medvl.language.sampling import Sampling
from tests import tiny

NEW = 20  # tokens of each answer
STARTS = (0, 0, 2, 5, 6)  # the step at which each prompt joins
KINDS = [*tiny.CONFIGS, "gemma3_text"]


def model_of(kind):
    if kind != "gemma3_text":
        return tiny.model(kind)
    # Layers with a window beside layers without.
    layers = {
        "num_hidden_layers": 4,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    tiny.CONFIGS[kind] = {"model_type": kind, **tiny.TEXT, "head_dim": 8, **layers}
    try:
        return tiny.model(kind)
    finally:
        del tiny.CONFIGS[kind]


def together(skeleton, params, prompts, starts, cells=10_000):
    """Greedy tokens of prompts that join at their steps, and the shapes that the memory had."""
    answers = [[] for _ in prompts]
    shapes = set()

    def write(model):
        rows, order = None, []
        for step in range(1000):
            for i, start in enumerate(starts):
                if start == step:
                    prompt = rows_in_flight.run_prompt(model, vlm.model_inputs(skeleton, {"ids": prompts[i]}))
                    rows = rows or rows_in_flight.no_rows(model, prompt)
                    longest = max(prompts[j].shape[1] for j in [*order, i]) + NEW
                    rows_in_flight.join(rows, prompt, (len(order) + 1, longest), cells)
                    order.append(i)
                    answers[i].append(int(prompt.logits.argmax()))
            for i in [i for i in order if len(answers[i]) == NEW]:
                row = order.index(i)
                rows_in_flight.leave(rows, row)
                order[row] = order[-1]
                order.pop()
            if order:
                shapes.add(rows.cache.layers[0].key_room.shape[::2])
                logits = rows_in_flight.decode(model, rows, torch.tensor([answers[i][-1] for i in order]))
                for i, token in zip(order, logits.argmax(-1).tolist(), strict=True):
                    answers[i].append(token)
            elif step > max(starts):
                return

    with torch.no_grad():
        skeleton.run(params, write)
    return [tuple(answer) for answer in answers], shapes


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_answered_as_alone(kind, gen):
    skeleton, params = model_of(kind)
    prompts = [torch.randint(3, 140, (1, n), generator=gen) for n in (5, 17, 3, 9, 12)]
    answers, _ = together(skeleton, params, prompts, STARTS)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert generate.generate(Sampling(max_tokens=NEW), skeleton, params, {"ids": prompt}).ids == (answer,)
    assert len({*answers}) == len(answers)  # or rows that are swapped would not be seen


@pytest.mark.parametrize(("failed", "next_length"), [(0, 25), (1, 3)])
def test_a_row_that_was_not_finite_leaves_nothing_behind(failed, next_length, gen):
    """What a mask hides is multiplied by 0, which makes nan of nan: the next row would fail where that lies."""
    skeleton, params = tiny.model("qwen2")
    long, kept, joined = (torch.randint(3, 140, (1, n), generator=gen) for n in (30, 20, next_length))

    def write(model):
        prompts = [
            rows_in_flight.run_prompt(model, vlm.model_inputs(skeleton, {"ids": ids}))
            for ids in (long, kept, joined)
        ]
        rows = rows_in_flight.no_rows(model, prompts[0])
        first_two = prompts[:2] if failed == 0 else prompts[1::-1]
        for prompt in first_two:
            rows_in_flight.join(rows, prompt, (2, 60), 10_000)
        for layer in rows.cache.layers:
            layer.key_room[failed, :, :30] = torch.nan
            layer.value_room[failed, :, :30] = torch.nan
        rows_in_flight.leave(rows, failed)
        rows_in_flight.join(rows, prompts[2], (2, 60), 10_000)
        return rows_in_flight.decode(model, rows, torch.tensor([7, 7]))

    with torch.no_grad():
        together = skeleton.run(params, write)
        for ids, logits in zip((kept, joined), together, strict=True):
            call = vlm.model_inputs(skeleton, {"ids": torch.cat([ids, torch.tensor([[7]])], 1)})
            alone = skeleton.run(
                params, lambda model, call=call: rows_in_flight.run_prompt(model, call)
            ).logits[0]
            torch.testing.assert_close(logits, alone)


def test_memory_stays_within_its_cells(gen):
    """A long prompt makes the memory wide; it is not kept as wide for many rows as for one."""
    skeleton, params = tiny.model("qwen2")
    lengths = [100, 3, 4, 5, 6, 7, 8, 9, 10]
    prompts = [torch.randint(3, 140, (1, n), generator=gen) for n in lengths]
    starts = (0, *[30] * 8)
    answers, shapes = together(skeleton, params, prompts, starts, cells=8 * 30)
    assert max(rows * columns for rows, columns in shapes) <= 8 * 30
    for prompt, answer in zip(prompts, answers, strict=True):
        assert generate.generate(Sampling(max_tokens=NEW), skeleton, params, {"ids": prompt}).ids == (answer,)


def test_bytes_of_a_token_are_those_of_its_keys_and_values():
    skeleton, params = tiny.model("qwen2")
    call = vlm.model_inputs(skeleton, {"ids": torch.arange(3, 10)[None]})
    with torch.no_grad():
        prompt = skeleton.run(params, lambda model: rows_in_flight.run_prompt(model, call))
    # 2 layers of 2 heads of 8 numbers of 4 bytes, keys and values.
    assert kv_cache.token_nbytes(prompt.cache, 7) == 2 * 2 * 8 * 4 * 2


def test_a_model_with_states_is_refused(gen):
    """Linear attention keeps a state that every token changes: rows cannot join or leave it."""
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    heads = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    heads |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    tiny.CONFIGS["qwen3_next"] = {
        "model_type": "qwen3_next",
        **tiny.TEXT,
        **layers,
        **heads,
        "num_experts": 0,
    }
    try:
        skeleton, params = tiny.model("qwen3_next")
    finally:
        del tiny.CONFIGS["qwen3_next"]
    call = vlm.model_inputs(skeleton, {"ids": torch.arange(3, 10)[None]})

    def begin(model):
        return rows_in_flight.no_rows(model, rows_in_flight.run_prompt(model, call))

    with torch.no_grad(), pytest.raises(ValueError, match="must hold keys and values only"):
        skeleton.run(params, begin)
