"""Models are saved whole, load as the same, and name what is missing or damaged."""

import copy
import dataclasses
import shutil

import pytest
from model_cases import (
    RESIDUAL,
    assert_same_weights,
    backbone_of,
    random_model,
    small_shop,
    trained_model,
)
from ops_cases import refused

from contrec_fast.engine import Engine
from contrec_fast.models.contrec import ContRec


def recommendations(model):
    lists = Engine(model, small_shop()).recommend(range(7), 10)
    return [lists.ids.tolist(), lists.scores.tolist(), lists.matched.tolist(), lists.texts]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "deep" / "model"
    trained_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tiny", "llama", "gpt2"])
def test_saves_and_loads(kind, tmp_path):
    overrides = [] if kind == "tiny" else [backbone_of(kind), "training.epochs=1"]
    model = trained_model(*overrides)
    model.save_pretrained(tmp_path / "model")
    loaded = ContRec.from_pretrained(tmp_path / "model")
    assert not loaded.training and loaded.config == model.config
    assert_same_weights(model, loaded)
    assert recommendations(loaded) == recommendations(model)
    assert loaded.recommend(k=5).equals(model.recommend(k=5))
    assert dataclasses.asdict(loaded.dataset.items) == dataclasses.asdict(model.dataset.items)
    assert loaded.dataset.targets.tolist() == model.dataset.targets.tolist()


@pytest.mark.parametrize("overrides", [[RESIDUAL], ["head.source=response"]], ids=",".join)
def test_variants_are_saved_whole(overrides, tmp_path):
    model = random_model(*overrides)
    model.save_pretrained(tmp_path / "model")
    loaded = ContRec.from_pretrained(tmp_path / "model")
    assert_same_weights(model, loaded)
    assert recommendations(loaded) == recommendations(model)


def test_a_model_without_a_dataset_is_saved_without_one(tmp_path):
    model = copy.copy(random_model())
    model.dataset = None
    model.save_pretrained(tmp_path / "model")
    loaded = ContRec.from_pretrained(tmp_path / "model")
    assert loaded.dataset is None and not (tmp_path / "model" / "data").exists()
    with refused(ValueError, "model"):
        loaded.recommend()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = random_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="full: expected a new or empty folder"):
        model.save_pretrained(tmp_path / "full")
    monkeypatch.setattr(model.text_tokenizer, "save_pretrained", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "half")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["full", "full/mine.txt"]


def test_nothing_is_pickled(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    suffixes = {".yaml", ".json", ".safetensors", ".jinja", ".txt", ".parquet"}
    assert {path.suffix for path in files} <= suffixes
    names = {"config.yaml", "model.safetensors", "backbone", "data"}
    assert names == {path.name for path in saved.iterdir()}
    pickles = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert not [path for path in files if path.read_bytes().startswith(pickles)]


DAMAGED = {
    "config.yaml": ["{", "head: 3"],
    "model.safetensors": ["", "garbage" * 9],
    "backbone/config.json": ["{"],
    "backbone/model.safetensors": ["garbage" * 9],
    "data/items.parquet": ["garbage"],
    "data/users.parquet": ["garbage"],
}


@pytest.mark.parametrize("name", [*DAMAGED, "backbone"])
def test_names_a_file_that_is_missing_or_damaged(saved, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    path = folder / name
    for content in [None, *DAMAGED.get(name, [])]:
        if content is not None:
            path.write_text(content)
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(ValueError) as caught:
            ContRec.from_pretrained(folder)
        message = str(caught.value)
        assert str(folder) in message and name.split("/")[0] in message, message
        assert "\n" not in message


def test_names_a_file_that_does_not_fit(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    settings = (folder / "config.yaml").read_text()
    for old, new in (("denoiser: mlp", "denoiser: linear"), ("tokens: 2", "tokens: 7")):
        assert old in settings
        (folder / "config.yaml").write_text(settings.replace(old, new))
        with pytest.raises(ValueError, match="model.safetensors: does not fit: [^\n]*$"):
            ContRec.from_pretrained(folder)
    with pytest.raises(ValueError, match="absent: expected the folder of a trained model"):
        ContRec.from_pretrained(tmp_path / "absent")
