"""All cases on a pretended GPU: no tensor on the wrong device, the numbers of the CPU, and no more waits than now."""

import importlib
import inspect

import pytest

from tests.gpu import cases
from tests.gpu.pretend import GPU, pretended_gpu


def run_on_gpu(compute):
    with pretended_gpu():
        return compute(GPU)


@pytest.mark.parametrize("name", cases.CASES)
def test_a_case_gives_the_numbers_of_the_cpu(name):
    case = cases.CASES[name]
    # The CPU first: what is imported on the way must not be imported on the pretended GPU.
    expected = case.compute("cpu")
    errors = cases.difference(expected, run_on_gpu(case.compute))
    # The values are computed by the CPU here too, so that even a case with a wide tolerance is close.
    assert max(errors.values()) <= max(case.tolerance, 1e-5), errors


def test_slices_that_find_no_room_are_computed_again():
    """What costs products more, and leaves the gradient as it is."""
    settings = {"encode__checkpoint": True}
    expected = cases.ct_clip_step("cpu", steps=0, **settings)
    products = []
    for free in (2**36, 2**22):
        with pretended_gpu() as gpu:
            gpu.free_bytes = free
            errors = cases.difference(expected, cases.ct_clip_step(GPU, steps=0, **settings))
            products.append(gpu.count["op gelu"])
        assert max(errors.values()) <= 1e-4, errors
    assert products[0] < products[1]


# (function, its code, the error that is planted there, a case that must find it)
PLANTED = [
    ("components.losses.clip_loss", ", device=image.device", "", "ct_clip gradient by chunks"),
    (
        "components.losses.siglip_loss",
        ", device=logits.device",
        "",
        "ct_clip gradient, siglip, standardise, max pool",
    ),
    ("components.layers.rotary", "device=position.device, ", "", "ct_clip gradient by chunks"),
    (
        "components.encode.encode_slices",
        "transfer.to_device(mask.flatten().nonzero()[:, 0], device)",
        "mask.flatten().nonzero()[:, 0]",
        "encode_slices of every pool, voxels on the CPU",
    ),
    (
        "components.slots.block_buffer",
        ", device=device)",
        ")",
        "compress of every kind: gradient, streaming, weights",
    ),
    (
        "systems.ct_clip.model.embed_volumes",
        'transfer.to_device(batch["position_mm"], device)',
        'batch["position_mm"]',
        "ct_clip volumes, placed by running means",
    ),
    (
        "language.token_steps.start_batch",
        "dtype=torch.int64, device=device)",
        "dtype=torch.int64)",
        "generation: greedy, sampled, masked, likelihoods of options",
    ),
    (
        "language.sampling.draw_uniform",
        "drawn.to(device)",
        "drawn",
        "generation: greedy, sampled, masked, likelihoods of options",
    ),
    (
        "language.likelihood._pad_options",
        "torch.tensor(padded, device=device)",
        "torch.tensor(padded)",
        "generation: greedy, sampled, masked, likelihoods of options",
    ),
    (
        "weights.compose._layout",
        ".to(scale.device)",
        "",
        "mixture per sample, in the vision encoder too, over NF4 too",
    ),
    (
        "components.losses.token_cross_entropy",
        "to_device(places, hidden.device), to_device",
        "places, to_device",
        "token_cross_entropy, over a plain head and one with LoRA",
    ),
    ("training.optim.zero_moment", "dtype=dtype, device=tensor.device)", "dtype=dtype)", "tune H-LoRA"),
    (
        "weights.rounding.round_stochastic",
        "device=values.device, ",
        "",
        "tune bfloat16 whole, 8-bit moments, stochastic rounding",
    ),
]


@pytest.mark.parametrize(("function", "code", "error", "case"), PLANTED, ids=[p[0] for p in PLANTED])
def test_a_planted_error_is_found(function, code, error, case, monkeypatch):
    module_name, _, name = f"medvl.{function}".rpartition(".")
    module = importlib.import_module(module_name)
    source = inspect.getsource(getattr(module, name))
    assert code in source
    namespace = dict(vars(module))
    exec(source.replace(code, error), namespace)
    monkeypatch.setattr(module, name, namespace[name])
    cases.CASES[case].compute("cpu")  # an error of the device alone: the CPU does not see it
    with pytest.raises(RuntimeError, match="device"):
        run_on_gpu(cases.CASES[case].compute)
