"""What must not stay in memory."""

import gc
import weakref

from model_cases import (
    Recorder,
    one_thread,  # noqa: F401
    small_config,
    small_shop,
)

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
