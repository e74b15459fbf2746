"""What settings do: those that cannot work are refused in one line."""

import copy
import math

import pytest
import torch
from model_cases import (
    RESIDUAL,
    Recorder,
    backbone_of,
    prompts_of,
    random_history,
    random_model,
    small_config,
    small_shop,
    training_batch,
)
from ops_cases import refused

from contrec_fast.config import LARGEST, Config, apply_overrides, check
from contrec_fast.data.prompts import Window
from contrec_fast.data.templates import TEMPLATES
from contrec_fast.ops.topk import LARGEST_BONUS
from contrec_fast.presets import PRESETS, demo_config
from contrec_fast.training import train

NO_HEAD_LOSS = ("training.diffusion_weight=0", "training.dispersive_weight=0")


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("head.source", ["head.source=response", "prompt.text=none"]),
        ("head.space", ["head.space=tokenizer", RESIDUAL]),
        ("head.steps", ["head.steps=21"]),
        ("backbone.path", ["backbone.path=no/such/folder"]),
        ("backbone.hidden", ["backbone.hidden=18"]),
        ("tokenizer.batch_size", ["tokenizer.batch_size=1"]),
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
    "overrides",
    [
        ["head.steps=20"],
        ["tokenizer.batch_size=1", RESIDUAL],
        ["tokenizer.batch_size=2"],
        ["prompt.user_token=true", RESIDUAL],
        ["backbone.hidden=12", "backbone.heads=3"],
    ],
)
def test_settings_next_to_what_is_refused_train(overrides):
    check(small_config(*overrides))
    train(small_shop(), small_config("training.epochs=1", *overrides), Recorder())


@pytest.mark.parametrize("make", [*PRESETS.values(), demo_config])
def test_presets_can_work(make):
    check(make())


def test_values_set_in_python_are_checked_like_those_of_a_file():
    config = Config()
    config.training.learning_rate = 1  # a whole number is a number
    check(config)
    config.head.denoiser = "unet"
    with refused(ValueError, "head.denoiser"):
        check(config)


def test_settings_are_checked_without_torch(run_python):
    """Its import takes seconds."""
    code = "import sys, contrec_fast.cli, contrec_fast.presets; sys.exit('torch' in sys.modules)"
    run_python(code)


@pytest.mark.parametrize(
    "name", ["training.clip_norm", "training.dispersive_tau", "training.ranking_temperature"]
)
def test_refuses_a_divisor_of_zero(name):
    with refused(ValueError, name):
        apply_overrides(Config(), [f"{name}=0"])
    apply_overrides(Config(), [f"{name}=1e-9"])


@pytest.mark.parametrize(
    "name", ["prompt.templates", "head.timesteps", "retrieval.draws", "retrieval.bonus"]
)
def test_refuses_more_than_there_is(name):
    most = LARGEST[name.rpartition(".")[2]]
    apply_overrides(Config(), [f"{name}={most}"])
    more = most + 1 if isinstance(most, int) else math.nextafter(most, math.inf)
    with refused(ValueError, name):
        apply_overrides(Config(), [f"{name}={more}"])
    assert LARGEST["templates"] == len(TEMPLATES) and LARGEST["bonus"] == LARGEST_BONUS


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_refuses_prompts_longer_than_the_language_model_reads(kind):
    model = copy.deepcopy(random_model(backbone_of(kind)))
    batch = prompts_of(model).inference_batch([random_history(20)])
    longest = batch.token_ids.shape[1] + model.config.prompt.response_tokens
    model.backbone.config.max_position_embeddings = longest
    model.write(batch)
    model.backbone.config.max_position_embeddings = longest - 1
    with refused(ValueError, "prompt.history"):
        model.write(batch)
    model.read(batch)
    long = random_history(60).repeat(20)
    with refused(ValueError, "prompt.history"):
        model(prompts_of(model).training_batch([Window(long, 0)]))


def test_bf16_is_for_the_language_model_alone():
    model = random_model("training.precision=bf16", "prompt.user_token=true")
    parts = {
        model.tokenizer.encoders[0][-1]: torch.float32,
        model.backbone.base_model.layers[0].mlp: torch.bfloat16,
        model.condition: torch.float32,
    }
    found = {}
    hooks = [
        part.register_forward_hook(lambda part, _, output: found.update({part: output.dtype}))
        for part in parts
    ]
    model(training_batch(model, 3, 8))
    for hook in hooks:
        hook.remove()
    assert found == parts
