"""The training loop: reproducible, blind to targets, and it learns."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from model_cases import (
    Recorder,
    one_thread,  # noqa: F401
    small_config,
    small_shop,
    trained_model,
)

from contrec_fast.data import Dataset, Items
from contrec_fast.models.contrec import ContRec
from contrec_fast.training import loop, train


def history_dataset(lengths, items=60):
    """Users with these many distinct items, in ascending order."""
    names = [str(number) for number in range(items)]
    return Dataset(
        Items(names, names, [""] * items),
        [f"u{length}-{row}" for row, length in enumerate(lengths)],
        [np.arange(length) for length in lengths],
        np.full(len(lengths), -1),
    )


def assert_same_weights(first, second):
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def differ(first, second):
    return not torch.equal(first.item_vectors, second.item_vectors)


def test_the_same_seed_gives_the_same_weights():
    torch.seed()  # whatever went before
    assert_same_weights(trained_model(), train(small_shop(), small_config(), Recorder()))
    config = small_config()
    config.seed += 1
    assert differ(trained_model(), train(small_shop(), config, Recorder()))


def test_targets_are_not_looked_at():
    shop = small_shop()
    for targets in (np.full(len(shop.targets), -1), np.random.permutation(60)[:30]):
        other = dataclasses.replace(shop, targets=targets)
        assert_same_weights(trained_model(), train(other, small_config(), Recorder()))


def test_every_part_is_trained_but_the_tokenizer():
    start, end = train(small_shop(), small_config(epochs=0), Recorder()), trained_model()
    after = end.state_dict()
    for name, tensor in start.state_dict().items():
        frozen = name.startswith("tokenizer.") or name == "item_tokens"
        assert torch.equal(tensor, after[name]) == frozen, name
    assert not end.training


def test_progress_shows_every_unit_of_every_stage():
    recorder, config = Recorder(), small_config()
    train(small_shop(), config, recorder)
    epochs = {
        "LightGCN": config.lightgcn.epochs,
        "Tokenizer": config.tokenizer.epochs,
        "ContRec": config.training.epochs,
    }
    assert recorder.totals == epochs
    assert {name: len(figures) for name, figures in recorder.figures.items()} == epochs
    for figures in recorder.figures["ContRec"]:
        assert set(figures) == {"diffusion", "dispersive", "ranking", "text"}
        assert all(map(math.isfinite, figures.values()))
    assert any("tokenizer" in line for line in recorder.lines)


def test_losses_fall():
    recorder, config = Recorder(), small_config(epochs=12)
    config.lightgcn.epochs = config.tokenizer.epochs = 30
    train(small_shop(), config, recorder)
    for stage, name in [("LightGCN", "loss"), ("Tokenizer", "loss"), ("ContRec", "text")]:
        values = [figures[name] for figures in recorder.figures[stage]]
        assert np.mean(values[-3:]) < 0.95 * np.mean(values[:3]), (stage, values)
    ranking = [figures["ranking"] for figures in recorder.figures["ContRec"]]
    assert np.mean(ranking[-3:]) < np.mean(ranking[:3]) - 0.1


@pytest.mark.parametrize("name", ["diffusion_weight", "ranking_weight", "text_weight"])
def test_a_loss_that_is_not_finite_ends_the_training(name):
    with pytest.raises(
        FloatingPointError, match="^epoch 1: expected a finite loss, got "
    ) as caught:
        train(small_shop(), small_config(**{name: math.inf}), Recorder())
    assert "\n" not in str(caught.value)


def test_nothing_is_updated_by_a_loss_that_is_not_finite(monkeypatch):
    seen = []
    honest = ContRec.losses

    def losses(model, batch):
        values = honest(model, batch)
        if seen:
            values["text"] = values["text"] * math.nan
        seen.append((model, model.item_vectors.detach().clone()))
        return values

    monkeypatch.setattr(ContRec, "losses", losses)
    with pytest.raises(FloatingPointError, match="nan"):
        train(small_shop(), small_config(), Recorder())
    (_, before), (model, after) = seen
    assert not torch.equal(before, after) and torch.equal(after, model.item_vectors)


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers that training makes; each has `rates` and gradient `norms` of its steps."""
    made = []

    class Optimizer(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.rates, self.norms = [], []
            made.append(self)

        def step(self, *arguments, **options):
            (group,) = self.param_groups
            self.rates.append(group["lr"])
            squares = [p.grad.square().sum() for p in group["params"] if p.grad is not None]
            self.norms.append(float(sum(squares).sqrt()))
            return super().step(*arguments, **options)

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    return made


def test_learning_rate_warms_up_and_decays(optimizers):
    train(small_shop(), small_config(epochs=5, warmup_steps=4, learning_rate=0.01), Recorder())
    rates = optimizers[-1].rates
    assert len(rates) == 20  # five epochs of 30 users in batches of 8
    np.testing.assert_allclose(rates[:4], [0.0025, 0.005, 0.0075, 0.01])
    assert rates[4] == 0.01 and np.all(np.diff(rates[4:]) < 0)
    assert rates[-1] < 0.02 * rates[4]


def test_a_short_training_warms_up_and_decays_too(optimizers):
    train(small_shop(), small_config(epochs=3, warmup_steps=50, learning_rate=0.01), Recorder())
    rates = optimizers[-1].rates
    assert rates.index(max(rates)) == 5 and max(rates) == 0.01
    assert rates[-1] < 0.1 * max(rates)


def test_gradients_are_clipped(optimizers):
    train(small_shop(), small_config(epochs=1, clip_norm=0.01), Recorder())
    norms = optimizers[-1].norms
    assert norms and max(norms) == pytest.approx(0.01, rel=1e-3)


LENGTHS = (1, 2, 20, 21, 22, 45)


def windows_of(dataset, config, rng):
    """The windows of one epoch."""
    batches = loop._batches(dataset, config, rng)
    assert all(1 <= len(batch) <= config.training.batch_size for batch in batches)
    return [window for batch in batches for window in batch]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", [1, 3, 20])
def test_windows_cover_a_history(length, size):
    dataset, config = history_dataset([length]), small_config()
    config.prompt.history = size
    rng = np.random.default_rng()
    for _ in range(50):
        predicted = set()
        windows = windows_of(dataset, config, rng)
        assert len(windows) == math.ceil((length - 1) / size)
        for window in windows:
            assert 2 <= len(window) <= size + 1
            np.testing.assert_array_equal(window, np.arange(window[0], window[-1] + 1))
            predicted |= set(window[1:].tolist())
        if windows:
            assert max(window[-1] for window in windows) == length - 1
            latest = max(windows, key=lambda window: window[-1])
            assert len(latest) == min(length, size + 1)
        assert predicted == set(range(1, length))


def test_short_histories_are_one_window_each_epoch():
    dataset, config = history_dataset([2, 5, 21]), small_config()
    for _ in range(5):
        windows = windows_of(dataset, config, np.random.default_rng())
        assert sorted(map(len, windows)) == [2, 5, 21]


def test_every_window_is_in_one_batch_and_epochs_differ():
    dataset, config = history_dataset([*LENGTHS, *range(2, 50)] * 3), small_config()
    rng = np.random.default_rng(0)
    first, second = windows_of(dataset, config, rng), windows_of(dataset, config, rng)
    expected = sum(math.ceil((len(history) - 1) / 20) for history in dataset.histories)
    assert len(first) == len(second) == expected
    assert [w.tolist() for w in first] != [w.tolist() for w in second]
    again = windows_of(dataset, config, np.random.default_rng(0))
    assert [w.tolist() for w in first] == [w.tolist() for w in again]


def test_batches_hold_windows_of_similar_length():
    dataset, config = history_dataset([2, 21] * 32), small_config()
    batches = loop._batches(dataset, config, np.random.default_rng())
    assert all(len({len(window) for window in batch}) == 1 for batch in batches)


def test_refuses_histories_without_a_next_item():
    with pytest.raises(ValueError, match="^histories: expected a user with at least two items"):
        train(history_dataset([1, 1, 1]), small_config(), Recorder())


def test_the_smallest_dataset_trains():
    config = small_config()
    model = train(history_dataset([2], items=3), config, Recorder())
    assert model.item_vectors.shape == (3, 16) and model.item_vectors.isfinite().all()


def test_learning_rate_factors():
    factors = [loop._warmup_cosine(step, 2, 6) for step in range(7)]
    cosine = [0.5 + 0.5 * math.cos(math.pi * part / 4) for part in range(5)]
    np.testing.assert_allclose(factors, [0.5, 1.0, *cosine], atol=1e-12)
    assert loop._warmup_cosine(0, 0, 8) == 1.0
