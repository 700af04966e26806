"""How often the host waits for the GPU in a micro-batch of each system, and in a step of generation.

A host that waits queues no kernels, so that the GPU runs dry. The budgets are what is needed now: lower them with
the code, and raise none without a reason.
"""

import pytest
import torch

from medvl.language import chat, generate
from medvl.language.sampling import Sampling
from medvl.weights import lazy
from tests.gpu import cases
from tests.gpu.pretend import GPU, pretended_gpu


def count_waits(build):
    """{"operation @ place": waits} of `build(device)()`; what `build` and a first call move to the GPU, weights and
    the model's constants, is not counted."""
    with pretended_gpu() as gpu:
        step = build(GPU)
        step()
        gpu.waits.clear()
        step()
        return dict(gpu.waits)


def language_step(images, rows=1, **settings):
    def build(device):
        model, params = cases.tune_model(train__chunk=rows, **settings)
        trained, grad = cases.trained_gradient(device, model, params)
        batch = cases.conversation_batch(images)
        some_rows = chat.micro_batch(model.chat, batch, slice(0, rows))
        return lambda: grad(trained, some_rows)

    return build


def generation(tokens):
    def build(device):
        model, params = cases.tune_model()
        weights = lazy.move_params(params["model"], torch.device(device))
        batch = cases.conversation_batch()
        inputs = chat.model_inputs(model.chat, weights, batch)
        inputs.pop("labels", None)
        return lambda: generate.generate(Sampling(max_tokens=tokens), model.chat.skeleton, weights, inputs)

    return build


def slide_vqa_step(device):
    trained, grad, batch = cases.slide_vqa_gradient(device)
    return lambda: grad(trained, batch)


def ct_clip_step(device):
    _, params, grad = cases.ct_clip_gradient(device)
    batch = cases.ct_batch()
    return lambda: grad(params, batch)


BUDGETS = {
    "text": (language_step(images=False, model__config=cases.QWEN3), 1),
    "texts of two lengths": (language_step(images=False, rows=2, model__config=cases.QWEN3), 1),
    "image": (language_step(images=True), 2),
    "image, whole batch at once": (language_step(images=True, rows=2), 2),
    "ct_clip": (ct_clip_step, 0),
    "slide_vqa": (slide_vqa_step, 1),
}


@pytest.mark.parametrize("step", BUDGETS)
def test_waits_of_a_micro_batch(step):
    build, budget = BUDGETS[step]
    waits = count_waits(build)
    assert sum(waits.values()) <= budget, waits


def test_waits_of_a_generated_token():
    """None: the host reads a token while the GPU is at the next one."""
    short = sum(count_waits(generation(4)).values())
    long = count_waits(generation(12))
    assert sum(long.values()) == short, long
