"""Every variant of ContRec trains and recommends: presets, heads, diffusions."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    RESIDUAL,
    Recorder,
    prompts_of,
    random_history,
    random_model,
    small_config,
    small_shop,
    trained_model,
    training_batch,
)

from contrec_fast.config import HeadConfig
from contrec_fast.data.prompts import Window
from contrec_fast.engine import Engine
from contrec_fast.models.diffusion import DiffusionHead
from contrec_fast.models.schedules import METHODS, PREDICTIONS, SCHEDULES
from contrec_fast.presets import PRESETS, preset
from contrec_fast.training import train


def shrunk(config):
    """A preset's switches with the sizes of `small_config`."""
    small = small_config()
    for section in ("lightgcn", "tokenizer", "backbone"):
        setattr(config, section, getattr(small, section))
    config.head.width, config.head.depth, config.head.timesteps = 16, 1, 20
    config.head.steps = min(config.head.steps, 20)
    config.prompt.response_tokens = 6
    config.training.epochs, config.training.batch_size, config.training.warmup_steps = 1, 16, 1
    return config


def check_lists(model):
    lists = Engine(model, small_shop()).recommend(range(9), 10)
    assert (lists.ids >= 0).all() and np.isfinite(lists.scores).all()
    assert len(np.unique(lists.ids)) > 10  # not the same for everybody
    alone = Engine(model, small_shop()).recommend([4], 10)
    np.testing.assert_allclose(alone.scores[0], lists.scores[4], atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_and_recommend(name):
    model = train(small_shop(), shrunk(preset(name)), Recorder())
    training = model.config.training
    assert torch.equal(model.item_vectors, model.collaborative) != training.train_items
    check_lists(model)


@pytest.mark.parametrize(
    "overrides",
    [
        ["head.space=tokenizer"],
        ["head.space=tokenizer", "training.train_tokens=false", "tokenizer.tokens=3"],
        ["head.source=response"],
        ["head.source=response", "head.space=tokenizer", "prompt.text=response"],
        ["head.diffusion=false"],
        ["head.denoiser=adaln"],
        ["head.bag=false", "prompt.user_token=true", "prompt.text=response"],
        [RESIDUAL, "prompt.user_token=true"],
    ],
    ids=",".join,
)
def test_variants_train_and_recommend(overrides):
    check_lists(trained_model(*overrides, "training.epochs=1"))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_diffusion_trains_a_step_and_samples(schedule, prediction, method):
    model = copy.deepcopy(random_model("prompt.text=none", "training.bpr_weight=1")).train()
    options = {"schedule": schedule, "prediction": prediction, "method": method}
    model.config.head = HeadConfig(
        **options, width=16, depth=1, timesteps=20, steps=4, guidance=0.5
    )
    model.head = DiffusionHead(16, model.config.head)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = copy.deepcopy(model.state_dict())
    sum(model(training_batch(model, 3, 8, 4)).values()).backward()
    optimizer.step()
    changed = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])]
    assert any("head.denoiser." in name for name in changed) and "item_vectors" in changed
    check = Engine(model.eval(), small_shop()).sample(range(9))[0]
    assert check.shape == (1, 9, 16) and check.isfinite().all() and check.std() > 0


def test_without_diffusion_the_condition_is_what_is_compared():
    model = random_model("head.diffusion=false", "retrieval.draws=3")
    recommender = Engine(model, small_shop(), text=False)
    condition = recommender.reader.read(small_shop().histories[:5])
    assert torch.equal(recommender.sample(range(5))[0], condition[None])


def test_tokenizer_space_is_decoded_to_item_space():
    model = random_model("head.space=tokenizer", "tokenizer.tokens=3")
    items = torch.randint(60, (7,))
    with torch.no_grad():
        y = model.targets(items)
        assert y.shape == (7, 3 * 16)
        codes = model.tokenizer.encode(model.item_vectors[items])
        expected = model.tokenizer.decode(codes)
        torch.testing.assert_close(model.to_item_space(y), expected, rtol=1e-4, atol=1e-5)
        draws = model.to_item_space(torch.stack([y, y.flip(0)]))
    torch.testing.assert_close(draws[1], expected.flip(0), rtol=1e-4, atol=1e-5)


def test_response_conditions_do_not_depend_on_padding():
    model = random_model("head.source=response", "prompt.response_tokens=12")
    histories = [random_history(length) for length in (2, 9, 20, 5)]
    whole, texts = model.write(prompts_of(model).inference_batch(histories))
    for line, history in enumerate(histories):
        alone, text = model.write(prompts_of(model).inference_batch([history]))
        assert text == texts[line : line + 1]
        torch.testing.assert_close(alone[0], whole[line], rtol=1e-4, atol=1e-5)
    batch = prompts_of(model).training_batch([Window(history, 0) for history in histories])
    answers = batch.answers[:, :9].clone()
    answers[1, 4:] = answers[3, 7:] = -1
    with torch.no_grad():
        found = model.response_conditions(F.pad(answers, (0, 5), value=-1))
        for line, length in enumerate([9, 4, 9, 7]):
            alone = model.response_conditions(answers[line : line + 1, :length])
            torch.testing.assert_close(found[line], alone[0], rtol=1e-4, atol=1e-5)


def test_a_written_response_ends_at_its_end(monkeypatch):
    """What a batch writes after a prompt's own end-of-text token is no part of its condition."""
    model = random_model("head.source=response")
    end = model.text_tokenizer.eos_token_id
    written = torch.tensor([[7, 9, end, end, end], [7, 9, end, 11, 5], [7, 9, 8, 11, 5]])

    class Output:
        sequences = written

    monkeypatch.setattr(model.backbone, "generate", lambda **_: Output)
    found, _ = model.write(prompts_of(model).inference_batch([random_history(3)] * 3))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    expected = model.response_conditions(torch.tensor([[7, 9, end]]))[0]
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
