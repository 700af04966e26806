"""Generation on a pretended GPU, where tokens are read a step late: answers, errors and texts are those of the CPU."""

import pytest
import torch

from medvl.language.generate import generate
from medvl.language.sampling import Sampling
from medvl.weights import lazy
from tests import tiny
from tests.gpu.pretend import GPU, pretended_gpu


class Letters:
    """A tokenizer whose every token is a letter."""

    all_special_tokens = ()

    def decode(self, ids, **options):
        return "".join(chr(ord("a") + token % 26) for token in ids)


def answers(device, cfg, **options):
    skeleton, params = tiny.model("qwen3")
    inputs = tiny.renamed(tiny.batch("qwen3", (1, 2, 0)))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return generate(cfg, skeleton, lazy.move_params(params, device), inputs, **options)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5}, {"repetition_penalty": 1.3, "min_tokens": 5}], ids=str
)
def test_rows_end_where_they_do_on_the_cpu(settings):
    free = answers("cpu", Sampling(max_tokens=20, **settings))
    ends = (free.ids[0][6], free.ids[1][11])
    cfg = Sampling(max_tokens=20, end=ends, **settings)
    pieces = {"cpu": [], "gpu": []}
    want = answers("cpu", cfg, tok=Letters(), on_token=lambda *piece: pieces["cpu"].append(piece))
    assert len({len(row) for row in want.ids}) > 1
    with pretended_gpu():
        got = answers(GPU, cfg, tok=Letters(), on_token=lambda *piece: pieces["gpu"].append(piece))
    assert got == want
    assert pieces["gpu"] == pieces["cpu"]


def test_stop_strings():
    free = answers("cpu", Sampling(max_tokens=20))
    stop = Letters().decode(free.ids[0][4:7])
    cfg = Sampling(max_tokens=20, stop=(stop,))
    want = answers("cpu", cfg, tok=Letters())
    assert want.reasons[0] == "stop"
    with pretended_gpu():
        assert answers(GPU, cfg, tok=Letters()) == want


@pytest.mark.parametrize("last", [3, 7])
def test_errors_name_their_row_and_step(last):
    """Also in the last step, behind which there is none."""

    def allowed(step, so_far):
        mask = torch.ones(3, 160, dtype=torch.bool)
        mask[1] = step < last
        return mask

    with pretended_gpu(), pytest.raises(ValueError, match=f"row 1 at step {last}: its mask is empty"):
        answers(GPU, Sampling(max_tokens=8), allowed=allowed)


def count_steps(device, cfg, rows):
    skeleton, params = tiny.model("qwen3")
    seen = []
    skeleton.module.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))
    inputs = {"ids": torch.tensor([[5, 6, 7]] * rows).to(device)}
    ids = generate(cfg, skeleton, lazy.move_params(params, device), inputs).ids[0]
    return ids, len(seen)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_step_is_computed_too_far_at_most(rows):
    free, steps = count_steps("cpu", Sampling(max_tokens=8), rows)
    assert steps == 8
    ending = Sampling(max_tokens=8, end=(free[2],))
    ids, steps = count_steps("cpu", ending, rows)
    assert steps == len(ids) + 1
    with pretended_gpu():
        assert count_steps(GPU, Sampling(max_tokens=8), rows) == (free, 8)
        assert count_steps(GPU, ending, rows) == (ids, steps + 1)
