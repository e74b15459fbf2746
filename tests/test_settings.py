"""Settings that cannot work are refused in one line, before anything is trained."""

import pytest
from model_cases import (
    RESIDUAL,
    Recorder,
    one_thread,  # noqa: F401
    small_config,
    small_shop,
)
from ops_cases import refused

from contrec_fast.config import LARGEST, Config, apply_overrides
from contrec_fast.data.templates import TEMPLATES
from contrec_fast.training import train

NO_HEAD_LOSS = ("training.diffusion_weight=0", "training.dispersive_weight=0")


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("head.source", ["head.source=response", "prompt.text=none"]),
        ("head.space", ["head.space=tokenizer", RESIDUAL]),
        ("steps", ["head.steps=21"]),
        ("training", ["training.ranking_weight=0", "training.text_weight=0", *NO_HEAD_LOSS]),
        ("training", ["training.ranking_weight=0", "prompt.text=none", *NO_HEAD_LOSS]),
        (
            "training",
            ["training.ranking_weight=0", "training.text_weight=0", "head.diffusion=false"],
        ),
    ],
)
def test_refuses_what_contradicts_itself_before_pretraining(name, overrides):
    recorder = Recorder()
    with refused(ValueError, name):
        train(small_shop(), small_config(*overrides), recorder)
    assert not recorder.totals


@pytest.mark.parametrize(
    "name", ["training.clip_norm", "training.dispersive_tau", "training.ranking_temperature"]
)
def test_refuses_a_divisor_of_zero(name):
    with refused(ValueError, name):
        apply_overrides(Config(), [f"{name}=0"])
    apply_overrides(Config(), [f"{name}=1e-9"])


@pytest.mark.parametrize("name", ["prompt.templates", "head.timesteps", "retrieval.draws"])
def test_refuses_more_than_there_is(name):
    most = LARGEST[name.rpartition(".")[2]]
    apply_overrides(Config(), [f"{name}={most}"])
    with refused(ValueError, name):
        apply_overrides(Config(), [f"{name}={most + 1}"])
    assert LARGEST["templates"] == len(TEMPLATES)
