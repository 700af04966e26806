"""Micro-batches by tokens and packing in a run: what is computed, that it goes on after a stop, what is refused."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from attrs import evolve

from medvl.base import config, processes
from medvl.base.tree import flatten, map_leaves
from medvl.hub import skeletons
from medvl.language import chat, system, vlm
from medvl.language.chat import ChatConfig
from medvl.training import states
from medvl.training.interrupt import Stopped
from medvl.training.record import TrainConfig
from medvl.training.stages import make_gradient
from tests import tiny
from tests.language import test_system
from tests.language.test_system import ADAPTER, COLOURS, Config, squares
from tests.together import run_together
from tests.training.test_record import STAGE, Language

ROOT = Path(__file__).resolve().parents[2]
# Long and short conversations, with two, one and no squares.
LONG = [
    evolve(squares(a, b), messages=squares(a, b).messages * 3, items=(a, b) * 3)
    for a in COLOURS
    for b in COLOURS
]
TALKS = test_system.TRAIN + LONG
SETTINGS = {"by tokens": {"tokens": 160}, "packed": {"tokens": 160, "packing": True}, "longer": {"tokens": 9}}


def opened(folder, dropout=0.0, **change):
    train = TrainConfig(
        stages=(evolve(ADAPTER, steps=4),),
        batch=12,
        chunk=4,
        log=1,
        save=0,
        validate=0,
        keep="last",
        device="cpu",
    )
    cfg = Config(train=evolve(train, **change), chat=ChatConfig(context=128, template="chatml"))
    cfg = evolve(cfg, lora=evolve(cfg.lora, dropout=dropout))
    model, params = system.init_model(
        cfg, folder, system.message_texts(TALKS), extend=test_system.add_squares
    )
    return model, params, chat.encode_conversations(model.chat, TALKS)


def gradient_of(model, params, data, change):
    """Loss, gradient and the micro-batches of batch 1, in float64."""
    train = evolve(model.train, **change)
    model = evolve(model, train=train, chat=evolve(model.chat, dtype=torch.float64))
    params = map_leaves(torch.Tensor.double, params)
    batch_at = chat.training_batches(
        model.chat, data, train.batch, 0, tokens=train.tokens, packing=train.packing
    )
    grad = make_gradient(train, system.loss_function(model), partial(chat.micro_batch, model.chat))
    loss, aux, grads = grad(params, batch_at(1))
    return loss, aux.metrics["tokens"], flatten(grads), batch_at(1)


@pytest.mark.parametrize("way", ["by tokens", "packed"])
def test_micro_batches_that_do_not_fit_are_halved_with_the_same_gradient(tmp_path, way, monkeypatch):
    model, params, data = opened(tmp_path)
    settings = SETTINGS[way] | {"tokens": 400}
    want, tokens, want_grads, parts = gradient_of(model, params, data, settings)
    assert max(len(part["ids"]) for part in parts) > 1
    loss_function = system.loss_function

    def short_of_memory(model):
        loss = loss_function(model)

        def loss_sum(p, batch):
            if len(batch["ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss(p, batch)

        return loss_sum

    monkeypatch.setattr(system, "loss_function", short_of_memory)
    loss, count, grads, _ = gradient_of(model, params, data, settings)
    assert count == tokens
    assert abs(loss - want) < 1e-10
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("way", SETTINGS)
def test_loss_and_gradient_are_those_of_single_rows(tmp_path, way):
    model, params, data = opened(tmp_path)
    want, tokens, want_grads, _ = gradient_of(model, params, data, {"chunk": 1})
    loss, count, grads, parts = gradient_of(model, params, data, SETTINGS[way])
    assert count == tokens
    assert abs(loss - want) < 1e-9
    assert sum(len(part["ids"]) for part in parts) < 12 or way != "packed"
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-6, atol=1e-9, msg=name)
    longest = max(len(sample.ids) for sample in data.samples)
    assert all(part["ids"].numel() <= max(SETTINGS[way]["tokens"], longest) for part in parts)
    # Squares belong to their conversations.
    assert all(int(part["images"].sum()) == len(part["colours"]) for part in parts)


@pytest.mark.parametrize("way", ["by tokens", "packed"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, way):
    """Dropout, too: micro-batches are a function of seed and step."""
    ends = []
    for stop in (None, 2):
        folder = tmp_path / str(stop)
        model, params, data = opened(folder, dropout=0.3, **SETTINGS[way])
        same = partial(lambda data, stage: data, data)
        run = partial(system.fit_model, model, params, same, lambda stage: None, folder)
        if stop:
            lines = []

            def signal_at_step_2(line, lines=lines):
                lines.append(line)
                if len(lines) == 4:  # two lines of the stage come before its steps
                    os.kill(os.getpid(), signal.SIGTERM)

            with pytest.raises(Stopped):
                run(signal_at_step_2)
            assert 0 < states.read_state(folder / "0-adapter" / "last.pt").step < 4
        run(lambda line: None)
        ends.append(states.read_state(folder / "0-adapter" / "last.pt").params)
    for name, weight in flatten(ends[0]).items():
        assert torch.equal(weight, flatten(ends[1])[name]), name


# Two processes ----------------------------------------------------------------------------------------------
def train_whole(folder, shard, change):
    """Losses of the steps of a run that trains the model itself, in float32."""
    stage = evolve(test_system.WHOLE, steps=3, lr=1e-3)
    model, params, data = opened(folder, stages=(stage,), shard=shard, **change)
    system.fit_model(model, params, lambda stage: data, lambda stage: None, folder, lambda line: None)
    lines = (folder / "0-whole" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def share(out):
    """What one of two processes computes."""
    for name, change in SETTINGS.items():
        for shard in (False, True):
            train_whole(out / f"{name} {shard}", shard, change)
    # Eleven conversations can be eleven micro-batches, which two processes cannot share evenly.
    with pytest.raises(ValueError, match=r"train\.batch must be a multiple of the 2 processes, got 11"):
        train_whole(out / "refused", True, {"batch": 11, "tokens": 9})
    processes.wait_for_all()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    run_together(__name__, "share", out, 2)
    return out


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("way", SETTINGS)
def test_two_processes_train_as_one_that_takes_rows(tmp_path, two, way, shard):
    want = train_whole(tmp_path, False, {"chunk": 2})
    lines = (two / f"{way} {shard}" / "0-whole" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(want, rel=1e-5)


# What is refused --------------------------------------------------------------------------------------------
def test_packing_needs_a_bound_and_a_bound_needs_no_chunk_that_divides():
    with pytest.raises(ValueError, match=r"train.packing fills micro-batches of train.tokens: .* got 0"):
        TrainConfig(stages=(ADAPTER,), packing=True)
    with pytest.raises(ValueError, match="tokens"):
        TrainConfig(stages=(ADAPTER,), tokens=-1)
    assert config.structure({"train": {"stages": [STAGE], "batch": 5, "chunk": 2, "tokens": 64}}, Language)
    with pytest.raises(config.ConfigError, match=r"train\.chunk must divide train.batch"):
        config.structure({"train": {"stages": [STAGE], "batch": 5, "chunk": 2}}, Language)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_conversations_apart_may_pack(kind, dtype):
    skeleton, params = tiny.model(kind)
    vlm.check_packing(skeleton, {name: weight.to(dtype) for name, weight in params.items()})


LFM2 = {"model_type": "lfm2", "num_key_value_heads": 4, "layer_types": ["conv", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}, "alone, hidden states differ by"),
        ({"model_type": "bloom"}, "takes no position_ids"),
        (LFM2, "layers keep a state of all tokens before"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_do_not_are_refused(kind, message, dtype):
    sizes = {"vocab_size": 160, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    skeleton, params = skeletons.init_skeleton(
        {**sizes, **kind}, torch.Generator().manual_seed(0), head="language"
    )
    params = {name: weight.to(dtype) for name, weight in params.items()}
    with pytest.raises(
        ValueError, match=rf"does not keep packed conversations apart.*{message}.*train.tokens"
    ):
        vlm.check_packing(skeleton, params)


def test_segments_of_another_shape_are_refused():
    skeleton, params = tiny.model("qwen2")
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"segments must be whole numbers \[1, 4\]"):
        vlm.hidden_states(skeleton, params, ids=ids, segments=ids[:, :3])


# The estimate of memory -------------------------------------------------------------------------------------
def fullest(opened, talks, size=12, item=None, **change):
    batch = chat.fullest_batch(opened, talks, size, item, **change)
    return [list(part["ids"].shape) for part in batch]


def test_an_estimate_counts_the_two_fullest_micro_batches(tmp_path):
    model, _, data = opened(tmp_path)
    lengths = sorted((len(sample.ids) for sample in data.samples), reverse=True)
    assert (lengths[0], lengths[9]) == (97, 33)
    assert fullest(model.chat, TALKS, tokens=200) == [[6, 33], [2, 97]]
    assert fullest(model.chat, TALKS, size=5, tokens=200) == [[5, 33]]  # the share of many processes
    assert fullest(model.chat, TALKS, tokens=10) == [[1, lengths[0]], [1, lengths[1]]]
    # Without data: the context of 128 tokens, or rows that fill the bound better.
    assert fullest(model.chat, [], item="red", tokens=300) == [[3, 100], [3, 100]]
    assert fullest(model.chat, [], tokens=64, packing=True) == [[1, 128], [1, 128]]
    packed = chat.fullest_batch(model.chat, [], 12, "red", tokens=300, packing=True)
    assert all(part["segments"].unique().tolist() == [1, 2] and part["ids"].numel() == 300 for part in packed)


def test_memory_follows_the_bound(tmp_path):
    _, params, _ = opened(tmp_path)
    sums = []
    for change in ({"tokens": 128}, {"tokens": 512}, {"tokens": 512, "packing": True}):
        cfg = Config(chat=ChatConfig(context=128, template="chatml"))
        cfg = evolve(cfg, train=evolve(cfg.train, batch=12, **change))
        model, params = system.init_model(
            cfg, tmp_path, device=torch.device("meta"), extend=test_system.add_squares
        )
        step = system.estimate_steps(model, params, [], item="red")["whole"]
        # Twelve conversations that fill the context, or a bound that holds more.
        assert 12 * 100 <= step.tokens <= 12 * 300
        sums.append(step.memory["activations and gradients"])
    assert sums[0] < sums[1] < sums[2] < 2 * sums[1]
