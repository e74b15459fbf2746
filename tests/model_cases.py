"""What the tests of the model share: sizes that train in a second, and a model trained once."""

import functools

import pytest
import torch

from contrec_fast.config import Config
from contrec_fast.data import synthetic_shop
from contrec_fast.training import train


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For modules that import it: tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorder:
    """Stands in for `ProgressBars` and keeps what it was told, per stage."""

    def __init__(self):
        self.figures, self.totals, self.lines = {}, {}, []

    def say(self, text):
        self.lines.append(text)

    def stage(self, name, total):
        self.totals[name], self.figures[name] = total, []
        return lambda **figures: self.figures[name].append(figures)


def small_config(**training):
    """A configuration that trains in about a second; keywords go to `training`."""
    config = Config(seed=3)
    config.lightgcn.dim, config.lightgcn.epochs, config.lightgcn.batch_size = 16, 3, 128
    config.tokenizer.epochs = 3
    config.backbone.hidden, config.backbone.layers, config.backbone.heads = 16, 1, 2
    config.backbone.vocabulary = 400
    config.prompt.response_tokens = 6
    config.head.width, config.head.depth, config.head.timesteps = 16, 1, 20
    config.training.epochs, config.training.batch_size, config.training.warmup_steps = 2, 8, 3
    for name, value in training.items():
        assert hasattr(config.training, name), name
        setattr(config.training, name, value)
    return config


@functools.cache
def small_shop(users=30):
    return synthetic_shop(users=users, items=60, seed=1)


@functools.cache
def trained_model():
    """A model of `small_config` trained on `small_shop`; not to be changed."""
    return train(small_shop(), small_config(), Recorder())
