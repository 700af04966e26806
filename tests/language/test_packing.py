"""Several conversations in a row, apart from each other: each alone is the naive formula."""

import functools

import pytest
import torch

from medvl.base.tree import flatten
from medvl.hub import skeletons
from medvl.language import encoding, vlm
from medvl.language.encoding import IGNORE, Sample
from medvl.training.gradients import Aux, value_and_grad
from tests import tiny

IMAGES = (1, 0, 2, 1)  # of each conversation; the rows of a packed batch hold the first three, and the last
ROWS = ((0, 1, 2), (3,))
KINDS = (*tiny.CONFIGS,)


@functools.cache
def model(kind):
    """In float64, so that sums of many tokens can be compared."""
    skeleton, params = tiny.model(kind)
    return skeleton, {name: weight.double() for name, weight in params.items()}


def conversations(kind):
    """(samples, batch of each alone) with images where the architecture sees them."""
    inputs = tiny.batch(kind, IMAGES, side="right", seed=4)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    samples, alone = [], []
    for row in range(len(IMAGES)):
        batch = tiny.renamed(tiny.sample(kind, inputs, row, IMAGES))
        (ids,) = batch["ids"]
        # The first token is trained, too: nothing stands before it, so it must never count.
        labels = ids.masked_fill((ids > 140) | (torch.arange(len(ids)) % 3 == 1), IGNORE)
        samples.append(Sample(ids=ids, labels=labels))
        alone.append(batch | {"labels": labels[None]})
    return inputs, samples, alone


def packed_batch(kind, rows=ROWS):
    inputs, samples, _ = conversations(kind)
    batch = encoding.collate_packed([[samples[i] for i in row] for row in rows], 0)
    if "mm_token_type_ids" in inputs:
        batch["mm_token_type_ids"] = (batch["ids"] == 150).long()
    # Images lie one behind the other in the order of conversations.
    return batch | {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_conversation_is_computed_as_alone(kind):
    skeleton, params = model(kind)
    batch = packed_batch(kind)
    with torch.no_grad():
        hidden = vlm.hidden_states(skeleton, params, **batch)
        for row, numbers in enumerate(ROWS):
            for k, number in enumerate(numbers, 1):
                alone = vlm.hidden_states(skeleton, params, **conversations(kind)[2][number])
                torch.testing.assert_close(
                    hidden[row, batch["segments"][row] == k], alone[0], rtol=1e-10, atol=1e-10
                )


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3", "gpt2", "qwen2_5_vl", "internvl"])
def test_packed_losses_and_gradients_are_those_of_single_rows(kind, again):
    skeleton, params = model(kind)
    if again:
        skeleton = skeletons.checkpointed(skeleton)

    def loss(leaves, batches):
        sums = [vlm.answer_loss(skeleton, leaves, batch, chunk=5) for batch in batches]
        return sum(total.double() for total, _ in sums), Aux(metrics={"n": sum(n for _, n in sums)})

    want, want_aux, want_grads = value_and_grad(loss)(params, conversations(kind)[2])
    got, aux, grads = value_and_grad(loss)(params, [packed_batch(kind)])
    assert aux.metrics["n"] == want_aux.metrics["n"]
    assert abs(got - want) < 1e-6 * want
    for name, grad in flatten(grads).items():
        torch.testing.assert_close(grad, flatten(want_grads)[name], rtol=1e-6, atol=1e-6, msg=name)
