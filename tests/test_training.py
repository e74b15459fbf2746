"""The training loop: reproducible, blind to targets, it learns, and it knows when to stop."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from model_cases import (
    Log,
    Recorder,
    assert_same_weights,
    small_config,
    small_shop,
    trained_model,
)
from ops_cases import refused
from safetensors.torch import load_file

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


def test_the_same_seed_gives_the_same_weights():
    torch.seed()  # whatever went before
    assert_same_weights(trained_model(), train(small_shop(), small_config(), Recorder()))
    other = trained_model("seed=4")
    assert not torch.equal(trained_model().item_vectors, other.item_vectors)


def test_targets_are_not_looked_at():
    shop = small_shop()
    for targets in (np.full(len(shop.targets), -1), np.random.permutation(60)[:30]):
        other = dataclasses.replace(shop, targets=targets)
        assert_same_weights(trained_model(), train(other, small_config(), Recorder()))


def test_every_part_is_trained_but_what_is_settled_before():
    start, end = trained_model("training.epochs=0"), trained_model()
    settled = ("collaborative", "token_rms", "text_rms")
    after = end.state_dict()
    for name, tensor in start.state_dict().items():
        statistics = name.startswith("tokenizer.") and ("running" in name or "num_" in name)
        unused = name.startswith("tokenizer.decoder.") or name == "tokenizer.fill"
        frozen = name in settled or statistics or unused
        assert torch.equal(tensor, after[name]) == frozen, name
    assert not end.training and end.dataset is small_shop()


def test_progress_shows_every_unit_of_every_stage():
    recorder, config = Recorder(), small_config()
    train(small_shop(), config, recorder)
    units = {
        "LightGCN": config.lightgcn.epochs,
        "Tokenizer": config.tokenizer.epochs,
        "ContRec": config.training.epochs * 4,  # 30 users in batches of 8
    }
    assert recorder.totals == units
    assert {name: len(figures) for name, figures in recorder.figures.items()} == units
    for epoch, figures in enumerate(recorder.figures["ContRec"][3::4], 1):
        assert figures["epoch"] == epoch
        assert set(figures) == {"diffusion", "dispersive", "ranking", "text", "rate", "epoch"}
        assert all(map(math.isfinite, figures.values()))
    assert any("tokenizer keeps" in line for line in recorder.lines)


def test_losses_fall():
    recorder, config, log = Recorder(), small_config(epochs=12), Log()
    config.lightgcn.epochs = config.tokenizer.epochs = 30
    train(small_shop(), config, recorder, log=log)
    for stage in ("LightGCN", "Tokenizer"):
        values = [figures["loss"] for figures in recorder.figures[stage]]
        assert np.mean(values[-3:]) < 0.95 * np.mean(values[:3]), (stage, values)
    assert np.mean(log["text"][-3:]) < 0.95 * np.mean(log["text"][:3])
    assert np.mean(log["ranking"][-3:]) < np.mean(log["ranking"][:3]) - 0.1


def test_the_language_model_computes_in_bf16_and_later_runs_do_not():
    """Accelerate keeps a program's precision; a run's must not be that of the next."""
    half = trained_model("training.precision=bf16")
    assert_same_weights(trained_model(), train(small_shop(), small_config(), Recorder()))
    assert_same_weights(half, train(small_shop(), small_config(precision="bf16"), Recorder()))
    for name, tensor in trained_model().state_dict().items():
        assert tensor.dtype == half.state_dict()[name].dtype
        assert tensor.isfinite().all() and half.state_dict()[name].isfinite().all()
    difference = (half.item_vectors - trained_model().item_vectors).norm()
    moved = (trained_model().item_vectors - trained_model().collaborative).norm()
    assert 0 < difference < 0.5 * moved


@pytest.mark.parametrize("source", ["hidden", "response"])
def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, source):
    config, recorder = small_config(f"head.source={source}", learning_rate=1e30), Recorder()
    with pytest.raises(FloatingPointError) as caught:
        train(small_shop(), config, recorder, checkpoint=tmp_path)
    message = str(caught.value)
    assert message.startswith("epoch 1: expected a finite ") and "\n" not in message
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers that training makes; each has `rates` (first and last
    group) and gradient `norms` of its steps."""
    made = []

    class Optimizer(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.rates, self.norms = [], []
            made.append(self)

        def step(self, *arguments, **options):
            self.rates.append((self.param_groups[0]["lr"], self.param_groups[-1]["lr"]))
            parameters = [p for group in self.param_groups for p in group["params"]]
            squares = [p.grad.square().sum() for p in parameters if p.grad is not None]
            self.norms.append(float(sum(squares).sqrt()))
            return super().step(*arguments, **options)

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    return made


@pytest.mark.parametrize("epochs, warmup_steps, peak", [(5, 4, 4), (3, 50, 6)])
def test_learning_rate_warms_up_and_decays(optimizers, epochs, warmup_steps, peak):
    """Released defect 5: there it alternates between two values."""
    log = Log()
    config = small_config(epochs=epochs, warmup_steps=warmup_steps, learning_rate=0.01)
    config.training.item_learning_rate = 0.03
    train(small_shop(), config, Recorder(), log=log)
    rates, items = zip(*optimizers[-1].rates)
    np.testing.assert_allclose(items, 3 * np.array(rates))
    assert len(rates) == 4 * epochs  # 30 users in batches of 8
    np.testing.assert_allclose(rates[:peak], 0.01 * np.arange(1, peak + 1) / peak)
    assert rates[peak] == 0.01 and np.all(np.diff(rates[peak:]) < 0)
    assert rates[-1] < 0.07 * rates[peak]
    assert log["learning_rate"] == list(rates[3::4])


def test_learning_rate_factors():
    config = dataclasses.replace(small_config().training, warmup_steps=2)
    factors = [loop._warmup_cosine(step, config, 6) for step in range(7)]
    cosine = [0.5 + 0.5 * math.cos(math.pi * part / 4) for part in range(5)]
    np.testing.assert_allclose(factors, [0.5, 1.0, *cosine], atol=1e-12)
    config.warmup_steps = 0
    assert loop._warmup_cosine(0, config, 8) == 1.0


def test_gradients_are_clipped(optimizers):
    train(small_shop(), small_config(epochs=1, clip_norm=0.01), Recorder())
    norms = optimizers[-1].norms
    assert norms and max(norms) == pytest.approx(0.01, rel=1e-3)


# The search for the number of epochs


@pytest.mark.parametrize(
    "scores, patience, searched, best",
    [
        ([0.1, 0.3, 0.2, 0.3, 0.9], 2, 4, 2),  # equal is no better
        ([0.1, 0.2, 0.3], 1, 3, 3),
        ([0.0, 0.0, 0.0], 3, 3, 1),
    ],
)
def test_training_stops_early_and_starts_anew(
    monkeypatch, tmp_path, scores, patience, searched, best
):
    shop, script = small_shop(), iter(scores)

    def validate(model, dataset):
        assert [h.tolist() for h in dataset.histories] == [h[:-1].tolist() for h in shop.histories]
        assert dataset.targets.tolist() == [h[-1] for h in shop.histories]
        return next(script)

    monkeypatch.setattr(loop, "_validate", validate)
    config, log = small_config(epochs=len(scores), patience=patience), Log()
    recorder = Recorder()
    model = train(shop, config, recorder, log=log)
    assert log["ndcg@10"] == scores[:searched]
    assert list(log.lines) == list(range(1, searched + best + 1))
    assert recorder.lines[-2].startswith(f"best epoch {best} of {searched}")

    # The model is what a training without a search is after as many epochs of the same schedule.
    config.training.patience = 0
    if best < len(scores):
        with pytest.raises(KeyboardInterrupt):
            train(shop, config, Recorder(), tmp_path, Log(last=best + 1))
        saved = load_file(tmp_path / "checkpoint.safetensors")
    else:
        saved = train(shop, config, Recorder()).state_dict()
    for name in ("item_vectors", "condition.weight", "item_tokens"):
        assert torch.equal(model.state_dict()[name], saved[name]), name


def test_validation_is_the_metric_of_the_latent_path_on_the_last_items():
    dataset, model = small_shop().for_validation(), copy.deepcopy(trained_model())
    model.config.retrieval.bonus = 0.0
    names = dataset.items.ids
    histories = zip(dataset.user_ids, dataset.histories)
    lists = model.recommend(histories={u: [names[i] for i in h] for u, h in histories}, k=10)
    total = 0.0
    for user, target in zip(dataset.user_ids, dataset.targets):
        hits = lists[(lists.user_id == user) & (lists.item_id == names[target])]
        total += sum(1 / math.log2(1 + rank) for rank in hits["rank"])
    assert total > 0
    found = loop._validate(trained_model(), dataset)  # whose bonus it leaves out
    assert found == pytest.approx(total / len(dataset.targets), abs=1e-9)


def test_a_search_needs_three_items():
    with refused(ValueError, "training.patience"):
        train(history_dataset([2, 2, 1]), small_config(patience=1), Recorder())
    train(history_dataset([3, 1, 2]), small_config(patience=1), Recorder())


# Windows


LENGTHS = (1, 2, 20, 21, 22, 45)


def windows_of(dataset, config, rng):
    """The windows of one epoch."""
    batches = loop.epoch_batches(dataset, config, rng)
    assert all(1 <= len(batch) <= config.training.batch_size for batch in batches)
    return [window for batch in batches for window in batch]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", [1, 3, 20])
def test_windows_cover_a_history(length, size):
    dataset, config = history_dataset([length]), small_config(f"prompt.history={size}")
    (whole,), rng, cuts = dataset.histories, np.random.default_rng(), set()
    for _ in range(50):
        predicted = []
        windows = windows_of(dataset, config, rng)
        assert len(windows) == math.ceil((length - 1) / size)
        for window in windows:
            end = len(window.history)
            np.testing.assert_array_equal(window.history, whole[:end])  # nothing older is lost
            assert 2 <= end - window.start <= size + 1
            assert window.start == max(0, end - size - 1)
            predicted += range(window.start + 1, end)
            cuts.add(end)
        # Every item but the first is predicted, none more than twice, the latest always last.
        assert set(predicted) == set(range(1, length))
        assert max((predicted.count(item) for item in predicted), default=0) <= 2
        assert not windows or max(len(window.history) for window in windows) == length
    if length == 45 and size == 20:
        assert len(cuts) > 10  # cut at random


def test_every_window_is_in_one_batch_and_epochs_differ():
    dataset, config = history_dataset([*LENGTHS, *range(2, 50)] * 3), small_config()

    def named(rng):
        windows = windows_of(dataset, config, rng)
        return [(len(window.history), window.start) for window in windows]

    rng = np.random.default_rng(0)
    first, second = named(rng), named(rng)
    expected = sum(math.ceil((len(history) - 1) / 20) for history in dataset.histories)
    assert len(first) == len(second) == expected
    assert first != second and first == named(np.random.default_rng(0))


def test_batches_hold_windows_of_similar_length():
    dataset, config = history_dataset([2, 21] * 32), small_config()
    batches = loop.epoch_batches(dataset, config, np.random.default_rng())
    assert all(len({len(window.history) for window in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("batches", [1, 2, 5, 7])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_an_epoch(batches, processes):
    config, dataset = small_config(batch_size=1), history_dataset([5] * batches)
    run = loop._Run.__new__(loop._Run)
    run.config, shares = config, []
    for number in range(processes):
        run.accelerator = type("", (), {"process_index": number, "num_processes": processes})
        shares.append([id(batch[0].history.base) for batch in run._batches(dataset, 3)])
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) >= 1
    used = {identity for share in shares for identity in share}
    assert len(used) >= min(batches, batches // processes * processes)
    if batches >= processes:  # none twice
        assert len(used) == sum(map(len, shares))


def test_refuses_histories_without_a_next_item():
    with refused(ValueError, "histories"):
        train(history_dataset([1, 1, 1]), small_config(), Recorder())


def test_the_smallest_dataset_trains():
    model = train(history_dataset([2], items=3), small_config(), Recorder())
    assert model.item_vectors.shape == (3, 16) and model.item_vectors.isfinite().all()


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("dataset", ["log.csv"]),
        ("dataset", [None]),
        ("config", [small_shop(), {"seed": 1}]),
        ("config", [small_shop(), "config.yaml"]),
    ],
)
def test_fit_refuses_other_types(name, arguments):
    with refused(TypeError, name):
        ContRec.fit(*arguments)


def test_fit_is_train():
    assert_same_weights(ContRec.fit(small_shop(), small_config()), trained_model())
