"""Records that runs were stored with before: a stage's `muon`, the steps and rates of `pretrain`, fewer settings of
`train`. They mean what they meant."""

import json
from pathlib import Path

import pytest

from medvl.base import config
from medvl.systems import run
from medvl.training.record import MATRICES, Speed

OLD = Path(__file__).parent / "old_records"


def read(system, *overrides):
    return config.structure(
        config.override(json.loads((OLD / f"{system}.json").read_text()), overrides),
        run.find_system(system).record,
        system,
    )


@pytest.mark.parametrize("system", run.system_names())
def test_everything_else_is_as_it_was_written(system):
    """Whatever an old record and the upgraded one both have is equal."""

    def same(old, new):
        if isinstance(old, dict):
            return all(same(old[k], new[k]) for k in old.keys() & new.keys())
        if isinstance(old, list):
            return len(old) == len(new) and all(same(a, b) for a, b in zip(old, new, strict=True))
        return old == new

    old, new = json.loads((OLD / f"{system}.json").read_text()), config.unstructure(read(system))
    assert same(old, new)
    gone = {"slide_vqa": {"pretrain"}}.get(system, set())
    for key in old.keys() - gone:
        if isinstance(old[key], dict):
            assert old[key].keys() <= new[key].keys()
    assert config.structure(new, run.find_system(system).record) == read(system)


def test_a_stage_with_muon_moves_the_matrices_by_it():
    first, second = read("tune").train.stages
    assert first.speeds == (Speed(match=MATRICES, lr=0.01, weight_decay=0.0, optimizer="muon"),)
    assert second.speeds == ()
    assert not any(s.speeds for part in (read("adapters").base, read("adapters").train) for s in part.stages)


def test_ct_clip_keeps_its_own_numbers():
    cfg = read("ct_clip").train
    assert (cfg.beta2, cfg.eps, cfg.stages[0].weight_decay, cfg.stages[0].train) == (0.98, 1e-6, 0.2, (".*",))


def test_steps_and_rates_of_a_compressor_are_those_of_its_stage():
    cfg = read("slide_vqa").pretrain
    (stage,) = cfg.train.stages
    assert (cfg.labels, cfg.most, cfg.aux) == (("class", "motif"), 4096, 0.01)
    assert (cfg.train.batch, cfg.train.log, cfg.train.save, cfg.train.validate) == (3, 1, 1, 2)
    assert (stage.name, stage.steps, stage.lr, stage.weight_decay, stage.warmup) == (
        "compressor",
        3,
        1e-3,
        1e-4,
        0,
    )
    assert stage.speeds == (Speed(match="compressor/gate/.*", lr=1e-2, weight_decay=1e-4),)
    changed = read("slide_vqa", "pretrain.router_lr=0.5", "pretrain.weight_decay=0.2").pretrain.train.stages[
        0
    ]
    assert changed.speeds == (Speed(match="compressor/gate/.*", lr=0.5, weight_decay=0.2),)


def test_a_compressor_s_old_and_new_settings_do_not_mix():
    raw = config.unstructure(read("slide_vqa"))
    with pytest.raises(config.ConfigError, match=r"pretrain\.lr is a setting of older records"):
        config.structure(config.override(raw, ("pretrain.lr=1",)), run.find_system("slide_vqa").record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.checkpoint=true", "train.checkpoint = True: ct_clip has encode.checkpoint instead"),
        ("train.valid=4", "train.valid = 4: ct_clip is validated on all volumes"),
        ("train.logits=8", "train.logits = 8: is for language systems"),
        ("train.tokens=8", "train.tokens = 8: is for language systems"),
        (
            'train.stages.0.data="captions"',
            "stage contrast: ct_clip has one kind of data, got data = 'captions'",
        ),
    ],
)
def test_what_ct_clip_cannot_do_is_refused_at_the_start(change, message):
    with pytest.raises(config.ConfigError) as e:
        read("ct_clip", "train.stages.0.speeds=[]", change)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("chunk=4", "pretrain.train.chunk = 4: the slots are balanced over a whole batch of slides"),
        ("shard=true", "pretrain.train.shard = True: the compressor is small"),
        ('device="cpu"', "pretrain.train.device = 'cpu': train.device is that of the whole run"),
        ("checkpoint=true", "pretrain.train.checkpoint = True: "),
    ],
)
def test_what_a_compressor_cannot_do_is_refused_at_the_start(change, message):
    raw = config.unstructure(read("slide_vqa"))
    with pytest.raises(config.ConfigError) as e:
        config.structure(
            config.override(raw, (f"pretrain.train.{change}",)), run.find_system("slide_vqa").record
        )
    assert message in str(e.value)
