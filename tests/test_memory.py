"""What must not stay in memory, nor be made for a whole catalog."""

import gc
import weakref

import torch
from model_cases import (
    Recorder,
    prompts_of,
    random_model,
    small_config,
    small_shop,
)

from contrec_fast.data.prompts import Prompts, Window
from contrec_fast.training import loop, train


def test_the_model_of_the_search_is_gone_when_training_starts_anew(monkeypatch):
    models, alive, honest = [], [], loop.build

    def build(*arguments, **options):
        gc.collect()
        alive.append([model() is not None for model in models])
        model, adapters = honest(*arguments, **options)
        models.append(weakref.ref(model))
        return model, adapters

    monkeypatch.setattr(loop, "build", build)
    train(small_shop(), small_config("training.patience=1"), Recorder())
    assert alive == [[], [False]]


def test_a_text_is_encoded_when_it_is_wanted_and_once():
    model, shop = random_model(), small_shop()
    asked = []

    class Tokenizer:
        def __getattr__(self, name):
            return getattr(model.text_tokenizer, name)

        def __call__(self, texts, **options):
            asked.extend(texts)
            return model.text_tokenizer(texts, **options)

    prompts = Prompts(shop.items, Tokenizer(), 2, model.config.prompt)
    assert not any(title in text for title in shop.items.titles for text in asked)
    fixed, histories = len(asked), shop.histories[:3]
    for _ in range(2):
        batch = prompts.inference_batch(histories)
    shown = {item for history in histories for item in history}
    assert len(asked) == fixed + len(shown)
    expected = prompts_of(model).inference_batch(histories)
    assert all(torch.equal(getattr(batch, name), of) for name, of in vars(expected).items())
    prompts.training_batch([Window(history, 0) for history in histories])
    answered = {history[-1] for history in histories}
    assert len(asked) == fixed + len(shown) + len(answered)
