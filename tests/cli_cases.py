"""What the tests of the command `contrec` share: calling it, and a run of it."""

import pytest
from model_cases import small_config, small_shop
from typer.testing import CliRunner

from contrec_fast import cli
from contrec_fast.config import save_config
from contrec_fast.data import write_folder

COLUMNS = ["user_id", "item_id", "title", "score", "rank", "matched", "text"]


def contrec(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeeded(*arguments):
    result = contrec(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(*arguments):
    """The one line that a command ends with; it has printed nothing else."""
    result = contrec(*arguments)
    assert result.exit_code == 1 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("contrec: ")
    return line


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the data `shop`, `config.yaml`, and the run `deep/run` trained on them."""
    folder = tmp_path_factory.mktemp("world")
    write_folder(small_shop(), folder / "shop")
    save_config(small_config(), folder / "config.yaml")
    result = succeeded(
        "train", folder / "shop", "--out", folder / "deep" / "run", "--config",
        folder / "config.yaml",
    )  # fmt: skip
    assert result.stdout == "" and "users/s" in result.stderr
    return folder


@pytest.fixture
def run(world):
    return world / "deep" / "run"


@pytest.fixture
def train_arguments(world, tmp_path):
    return ["train", world / "shop", "--out", tmp_path / "run", "--config", world / "config.yaml"]
