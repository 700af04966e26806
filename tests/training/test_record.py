"""The record of training: bounds, defaults of each system, speeds, and tables that were written before."""

import pytest
import torch
from attrs import evolve, frozen

from medvl.base import config
from medvl.base.config import ConfigError
from medvl.base.tree import flatten
from medvl.training.record import (
    MATRICES,
    Speed,
    Stage,
    TrainConfig,
    language_training,
    plan_steps,
    refuse_settings,
)
from medvl.training.stages import check_trainable, make_optimizer

STAGE = {"name": "a", "steps": 3, "lr": 1e-3}


@frozen(kw_only=True)
class Language:
    train: TrainConfig = language_training()
    base: TrainConfig | None = language_training(None)


@frozen(kw_only=True)
class Inner:
    train: TrainConfig = config.table(
        config.structure({"stages": [STAGE]}, TrainConfig), defaults={"batch": 8, "stages": [STAGE]}
    )


@frozen(kw_only=True)
class Other:
    """A system with defaults of its own, one level down too."""

    train: TrainConfig = config.table(
        defaults={"batch": 128, "stages": {"weight_decay": 0.2, "train": [".*"]}}
    )
    inner: Inner = Inner()


def read(record, **raw):
    return config.structure(raw, record, "x.toml")


def test_a_system_fills_in_its_own_defaults_and_keeps_what_a_table_says():
    cfg = read(Other, train={"stages": [STAGE, STAGE | {"train": ["vit/.*"], "weight_decay": 0.0}]})
    assert (cfg.train.batch, cfg.train.chunk) == (128, 2)
    first, second = cfg.train.stages
    assert (first.weight_decay, first.train) == (0.2, (".*",))
    assert (second.weight_decay, second.train) == (0.0, ("vit/.*",))
    assert read(Other, train={"batch": 4, "stages": [STAGE]}).train.batch == 4
    assert read(Language, train={"stages": [STAGE]}).train.stages[0].train == ("lora/.*",)


def test_a_list_of_tables_with_a_default_may_be_left_out_and_one_without_may_not():
    cfg = read(Other, train={"stages": [STAGE]}, inner={"train": {"clip": 0.5}})
    assert (cfg.inner.train.clip, cfg.inner.train.batch, cfg.inner.train.stages[0].steps) == (0.5, 8, 3)
    cfg = read(Other, train={"stages": [STAGE]}, inner={"train": {"stages": [{"steps": 7}]}})
    assert (cfg.inner.train.stages[0].steps, cfg.inner.train.stages[0].name) == (7, "a")
    with pytest.raises(ConfigError, match=r"required key 'stages' is missing @ \$\.train"):
        read(Other, train={"batch": 4})


def test_a_record_that_is_stored_is_read_as_it_was():
    cfg = read(Other, train={"stages": [STAGE]}, inner={"train": {"clip": 0.5}})
    assert config.structure(config.unstructure(cfg), Other) == cfg


def test_muon_of_a_stage_is_a_speed_of_the_matrices():
    old = STAGE | {"muon": 0.02, "weight_decay": 0.1}
    (stage,) = read(Language, train={"stages": [old]}).train.stages
    assert stage.speeds == (Speed(match=MATRICES, lr=0.02, weight_decay=0.1, optimizer="muon"),)
    assert read(Language, train={"stages": [STAGE | {"muon": 0.0}]}).train.stages[0].speeds == ()
    cfg = read(Language, train={"stages": [STAGE]}, base={"stages": [old]})
    assert cfg.base.stages[0].has_muon
    assert not cfg.train.stages[0].has_muon
    later = old | {"speeds": [{"match": "lora/.*", "lr": 1.0, "weight_decay": 0.0}]}
    assert [s.match for s in read(Language, train={"stages": [later]}).train.stages[0].speeds] == [
        MATRICES,
        "lora/.*",
    ]
    with pytest.raises(ConfigError, match="lr must be 0 or more, got -1"):
        read(Language, train={"stages": [STAGE | {"muon": -1}]})
    with pytest.raises(ConfigError, match="expected float, got 'fast'"):
        read(Language, train={"stages": [STAGE | {"muon": "fast"}]})


PARAMS = {
    "model": {
        "layers.0.q_proj.weight": torch.zeros(4, 4),
        "layers.0.norm.weight": torch.zeros(4),
        "embed_tokens.weight": torch.zeros(8, 4),
        "lm_head.weight": torch.zeros(8, 4),
        "visual.pos_embed.weight": torch.zeros(8, 4),
    },
    "project": {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)},
}


def moved_by_muon(*speeds):
    cfg = TrainConfig(stages=(Stage(name="a", steps=1, lr=1.0, train=(".*",), speeds=speeds),))
    state = flatten(make_optimizer(cfg, cfg.stages[0], PARAMS).init(PARAMS))
    return {n.removeprefix("muon/mean/") for n in state if n.startswith("muon/")}


def test_matrices_are_those_inside_layers():
    muon = Speed(match=MATRICES, lr=0.02, weight_decay=0.0, optimizer="muon")
    assert moved_by_muon(muon) == {"model/layers.0.q_proj.weight", "project/weight"}
    adamw = Speed(match="project/.*", lr=0.1, weight_decay=0.0)
    assert moved_by_muon(muon, adamw) == {"model/layers.0.q_proj.weight"}
    assert moved_by_muon(evolve(muon, match="project/.*")) == {"project/weight"}
    with pytest.raises(ValueError, match=r"match(es)? no parameter"):
        moved_by_muon(evolve(muon, match="projector/.*"))


def test_a_speed_moves_what_it_matches_at_its_own_rate():
    """Adam's first step is as long as the rate, whatever the gradient."""
    cfg = TrainConfig(
        stages=(
            Stage(
                name="a",
                steps=1,
                lr=1e-3,
                train=(".*",),
                speeds=(Speed(match="project/.*", lr=7e-3, weight_decay=0.0),),
            ),
        )
    )
    params = {"model": {"w": torch.zeros(3, 3)}, "project": {"w": torch.zeros(3, 3)}}
    optimizer = make_optimizer(cfg, cfg.stages[0], params)
    grads = {"model": {"w": torch.full((3, 3), 5.0)}, "project": {"w": torch.full((3, 3), 0.1)}}
    moved, _ = optimizer.update(grads, optimizer.init(params), params, 0)
    assert float(moved["model"]["w"][0, 0]) == pytest.approx(-1e-3, rel=1e-3)
    assert float(moved["project"]["w"][0, 0]) == pytest.approx(-7e-3, rel=1e-3)


def test_muon_is_refused_for_16_bits_only_where_it_moves():
    params = {"a": {"w": torch.zeros(2, 2)}, "b": {"w": torch.zeros(2, 2, dtype=torch.bfloat16)}}
    muon = Speed(match="a/.*", lr=0.02, weight_decay=0.0, optimizer="muon")
    stage = Stage(name="s", steps=1, lr=1.0, train=(".*",), speeds=(muon,))
    check_trainable(stage, params)
    with pytest.raises(
        ValueError, match=r"stage s: muon needs whole float32 weights, b/w is torch\.bfloat16"
    ):
        check_trainable(evolve(stage, speeds=(evolve(muon, match=".*"),)), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patience": -1}, "train.patience must be 0 or more, got -1"),
        ({"patience": 2, "validate": 0}, "train.patience counts validations: train.validate must be above 0"),
        ({"keep_last": -1}, "train.keep_last must be 0 or more, got -1"),
        ({"beta2": 1.0}, "train.beta2 must be 0.999999 or less, got 1"),
        ({"eps": -1.0}, "train.eps must be 0 or more, got -1"),
        ({"precision": "float16"}, "must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"batch": 4, "chunk": 3}, "train.chunk must divide train.batch, got 3 and 4"),
        ({"stages": []}, "train.stages must hold at least one stage"),
        ({"stages": [STAGE | {"lr": 0.0}]}, "stage a: lr must be above 0, got 0"),
        ({"stages": [STAGE | {"epochs": 1.0}]}, "stage a: needs either steps or epochs, got 3 and 1"),
        ({"stages": [{"name": "a", "lr": 1.0}]}, "stage a.steps must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, message):
    with pytest.raises(ConfigError) as e:
        read(Language, train={"stages": [STAGE]} | change)
    assert message in str(e.value)


def test_a_setting_that_a_system_has_no_use_for_is_refused():
    cfg = TrainConfig(stages=(Stage(**STAGE),), shard=True)
    refuse_settings(cfg, "train", "why", valid=256)
    with pytest.raises(ValueError, match=r"^train\.shard = True: why$"):
        refuse_settings(cfg, "train", "why", valid=256, shard=False)


def test_epochs_become_steps_of_the_data():
    cfg = TrainConfig(stages=(Stage(name="a", epochs=1.5, lr=1.0),), batch=4)
    assert plan_steps(cfg, cfg.stages[0], 100).steps == 38
    assert plan_steps(cfg, cfg.stages[0], 1).steps == 1
    with pytest.raises(ValueError, match="warmup must lie within its 1 steps, got 5"):
        plan_steps(cfg, evolve(cfg.stages[0], warmup=5), 1)
