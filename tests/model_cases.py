"""What the tests of the model share: sizes that train in a second, and models made once."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from contrec_fast.config import Config, apply_overrides
from contrec_fast.data import synthetic_shop
from contrec_fast.data.prompts import Prompts, Window
from contrec_fast.models.quantizer import ResidualQuantizer
from contrec_fast.training import train
from contrec_fast.training.build import build

FOLDER = tempfile.TemporaryDirectory()
RESIDUAL = "tokenizer.kind=residual-quantizer"  # an override


class Recorder:
    """Stands in for `ProgressBars` and keeps what it was told, per stage."""

    def __init__(self):
        self.figures, self.totals, self.lines = {}, {}, []

    def say(self, text):
        self.lines.append(text)

    def stage(self, name, total, unit, done=0):
        self.totals[name], self.figures[name] = total, []
        return lambda **figures: self.figures[name].append(figures)


class Log:
    """Stands in for `TrainingLog`: the figures of each epoch; `last` ends the run."""

    def __init__(self, last=None):
        self.lines, self.last = {}, last

    def epoch(self, number, **figures):
        assert number == len(self.lines) + 1
        if number == self.last:
            raise KeyboardInterrupt
        self.lines[number] = figures

    def __getitem__(self, name):
        return [figures[name] for figures in self.lines.values() if name in figures]


def small_config(*overrides, **training):
    """A configuration that trains in about a second.

    overrides: settings as on the command line, "head.steps=5"; keywords go to `training`.
    """
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
    return apply_overrides(config, overrides)


@functools.cache
def small_shop(users=30):
    return synthetic_shop(users=users, items=60, seed=1)


@functools.cache
def trained_model(*overrides):
    """A model of `small_config(*overrides)` trained on `small_shop`; not to be changed."""
    with torch.random.fork_rng([]):  # training seeds anew: tests' inputs stay random
        return train(small_shop(), small_config(*overrides), Recorder())


@functools.cache
def random_model(*overrides):
    """The same with random weights instead of trained ones, at once; not to be changed."""
    with torch.random.fork_rng([]), torch.no_grad():
        model, _ = build(small_shop(), small_config(*overrides), Recorder(), pretrain=False)
        torch.nn.init.normal_(model.item_vectors)
        torch.nn.init.normal_(model.text_map)
        for parameter in model.head.parameters():  # modulations start at zero
            torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
        model.collaborative.copy_(model.item_vectors)
        if isinstance(model.tokenizer, ResidualQuantizer):
            model.tokenizer.fit(model.item_vectors, 4, lambda **_: None)
        model.calibrate()
    return model.eval()


def prompts_of(model, items=None):
    config, items = model.config, items or small_shop().items
    return Prompts(items, model.text_tokenizer, config.tokenizer.tokens, config.prompt)


def random_history(length):
    """Different items of `small_shop` in random order."""
    return np.random.permutation(len(small_shop().items))[:length]


def training_batch(model, *lengths):
    """Windows into random histories of these lengths that begin at 0, 1, 2, ..."""
    return prompts_of(model).training_batch(
        [Window(random_history(length), start) for start, length in enumerate(lengths)]
    )


@functools.cache
def backbone_of(kind):
    """The override that chooses a language model: "tiny", "llama" or "gpt2"."""
    if kind == "tiny":
        return "backbone.path=tiny"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        write_backbone(Path(FOLDER.name) / kind, kind)
    return f"backbone.path={FOLDER.name}/{kind}"


def write_backbone(path, kind, dtype=torch.float32, eos="<|end|>", spare_rows=0):
    """A folder as others publish them: neither <diff> nor a padding token."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(small_shop().items.titles, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=eos)
    vocabulary = len(tokenizer) + spare_rows
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=1024,
            bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)


def assert_same_weights(first, second):
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
