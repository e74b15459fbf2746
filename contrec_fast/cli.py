"""The command `contrec`."""

import csv
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Generative recommendation with continuous tokens, made fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Run = Annotated[Path, typer.Argument(help="Folder that `contrec train` wrote.")]


@contextmanager
def _one_line_errors():
    """Bad input ends the program with one line and exit status 1."""
    try:
        yield
    except BrokenPipeError:  # whoever reads the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"contrec: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the trained run in this folder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of shop and training.")] = 0,
):
    """Train on a small made-up shop and show what is recommended, in a few minutes on a CPU."""
    from contrec_fast.data import synthetic_shop, write_folder
    from contrec_fast.demo import show_users
    from contrec_fast.presets import demo_config

    with _one_line_errors(), tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        if out is not None:
            _require_free(out)
        write_folder(synthetic_shop(seed=seed), Path(folder) / "shop")
        config = demo_config()
        config.seed = seed
        run = out or Path(folder) / "run"
        _train(Path(folder) / "shop", run, config)
        recommender = _load(run)
        _evaluate(recommender, run)
        show_users(recommender, users=3, k=5, console=Console())
        print(f"\nDone in {time.monotonic() - started:.0f} s.", end=" ")
        print(f"The run is in {out}." if out else "Keep the run with --out FOLDER.")


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Folder or file of interactions.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as head.steps=5 seed=1."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML file; any RUN/config.yaml is one.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Configuration to start from: default, contrec, deftrec, tokens.")
    ] = "default",
):
    """Train on DATA and write a run.

    A setting is that of KEY=VALUE, else of the --config file, else of the --preset.
    """
    from contrec_fast import presets
    from contrec_fast.config import apply_overrides, load_config

    with _one_line_errors():
        _require_free(out)
        chosen = presets.preset(preset)
        if config:
            chosen = load_config(config, chosen)
        _train(data, out, apply_overrides(chosen, overrides or []))


@app.command()
def evaluate(run: Run):
    """Rank the held-out items of a run's users; writes RUN/metrics.json."""
    with _one_line_errors():
        _evaluate(_load(run), run)


@app.command()
def recommend(
    run: Run,
    users: Annotated[
        list[str], typer.Option(help="User ids, separated by commas; may be repeated.")
    ],
    k: Annotated[int, typer.Option(help="Items per user.")] = 10,
):
    """Print top-K lists as CSV: user_id, item_id, title, score, rank, matched, text."""
    with _one_line_errors():
        recommender = _load(run)
        dataset = recommender.dataset
        row_of = {user: row for row, user in enumerate(dataset.user_ids)}
        # An id may itself hold a comma.
        wanted = [
            user.strip()
            for part in users
            for user in ([part] if part in row_of else part.split(","))
        ]
        unknown = [user for user in wanted if user not in row_of]
        if unknown:
            raise ValueError(f"users: expected users of the run's data, got {unknown[0]!r}")
        lists = recommender.recommend([row_of[user] for user in wanted], k)
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["user_id", "item_id", "title", "score", "rank", "matched", "text"])
        for i, user in enumerate(wanted):
            for rank, item in enumerate(lists.ids[i][lists.ids[i] >= 0]):
                writer.writerow([
                    user, dataset.items.ids[item], dataset.items.titles[item],
                    f"{lists.scores[i, rank]:.6f}", rank + 1, lists.matched[i, rank],
                    lists.texts[i],
                ])  # fmt: skip
        sys.stdout.flush()  # a closed pipe shows here, not when the program ends


@app.command()
def info():
    """Show versions, devices and which backends can run here, and why others cannot."""
    from contrec_fast.environment import describe_environment

    table = Table(show_header=False, box=None)
    for name, value in describe_environment().items():
        table.add_row(name, escape(value))
    Console().print(table)


def _train(data: Path, out: Path, config) -> None:
    """Train and write the run as a whole: under a temporary name, renamed when complete."""
    from contrec_fast.data import read_folder, write_folder
    from contrec_fast.progress import ProgressBars
    from contrec_fast.training import train as train_model

    _quiet_transformers()
    dataset = read_folder(data, config.data.holdout)
    dataset = dataset.of_users(np.flatnonzero(dataset.targets >= 0))
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    # Ended from outside, it cleans up as after an error.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    partial.mkdir(parents=True)  # now, so that a place that cannot be written to costs no time
    try:
        with ProgressBars() as progress:
            model = train_model(dataset, config, progress)
        model.save_pretrained(partial)
        write_folder(dataset, partial / "data")
        os.rename(partial, out)
        progress.say(f"wrote {out}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _quiet_transformers() -> None:
    """Loading and saving a small model needs no progress bars of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _require_free(out: Path) -> None:
    if out.exists():
        raise ValueError(f"out: expected a folder that does not exist yet, got {out}")


def _load(run: Path):
    from contrec_fast.data import read_folder
    from contrec_fast.engine import Recommender
    from contrec_fast.environment import default_device
    from contrec_fast.models.contrec import ContRec

    _quiet_transformers()
    model = ContRec.from_pretrained(run).to(default_device())
    return Recommender(model, read_folder(run / "data"))


def _evaluate(recommender, run: Path) -> None:
    """Measure the model and the baselines, write metrics.json, print the table."""
    from contrec_fast.evaluation.protocol import evaluate as measure
    from contrec_fast.progress import ProgressBars

    with ProgressBars() as progress:
        metrics = measure(recommender, progress)
    temporary = run / ".metrics.json"
    temporary.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(temporary, run / "metrics.json")
    table = Table(title="Whole catalog ranked, history excluded")
    table.add_column("")
    names = list(metrics["model"])
    for name in names:
        table.add_column(name, justify="right")
    for label, values in {"ContRec": metrics["model"], **metrics["baselines"]}.items():
        table.add_row(label, *(f"{values[name]:.4f}" for name in names))
    Console().print(table)
    counts = metrics["targets"]
    print(
        f"{counts['total']} targets. Out of reach, being in the user's own history: "
        f"{counts['in_history']}.\nIn nobody's history: {counts['unseen']}."
    )
