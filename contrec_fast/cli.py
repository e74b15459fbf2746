"""The command `contrec`."""

import glob
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contrec_fast import names

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
OUT_OF_MEMORY = re.compile("out of memory|allocate memory", re.IGNORECASE)
Run = Annotated[Path, typer.Argument(help="Folder that `contrec train` wrote.")]


@contextmanager
def _one_line_errors():
    """Bad input ends the program with one line and exit status 1."""
    try:
        yield
    except BrokenPipeError:  # whoever reads the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        _say(str(error))
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        # Torch has a class of its own for a GPU's memory and none for the CPU's.
        text = str(error)
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(text):
            raise
        _say(f"out of memory{text and ': '}{text}")
        raise typer.Exit(1) from None


def _say(text: str) -> None:
    print(f"contrec: {' '.join(text.split())}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        from contrec_fast import __version__

        print(f"contrec {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
):
    """Generative recommendation with continuous tokens, made fast."""


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the trained run in this folder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of shop and training.")] = 0,
):
    """Train on a small made-up shop and show what is recommended: about a minute on a CPU."""
    from contrec_fast.presets import demo_config

    with _one_line_errors(), tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        run = out or Path(folder) / "run"
        config = demo_config()
        config.seed = seed

        def make_shop(say):
            from contrec_fast.data import synthetic_shop

            return synthetic_shop(seed=seed)

        _train(make_shop, run, config)
        _evaluate(run, "quick")
        from contrec_fast.demo import show_users

        show_users(_load(run), users=3, k=5, console=Console())
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
    """Train on DATA and write a run; if interrupted, the same command goes on.

    A setting is that of KEY=VALUE, else of the --config file, else of the --preset. Until the run
    is complete, what there is of it is kept in OUT.checkpoint.
    """
    from contrec_fast import presets
    from contrec_fast.config import apply_overrides, check, load_config

    with _one_line_errors():
        chosen = presets.preset(preset)
        if config:
            chosen = load_config(config, chosen)
        chosen = apply_overrides(chosen, overrides or [])
        check(chosen)
        if not data.exists():
            raise ValueError(f"{data}: expected a file or folder, got nothing")

        def read(say):
            from contrec_fast.data import read_data

            return read_data(data, chosen.data, chosen.seed, say)

        _train(read, out, chosen)


@app.command()
def evaluate(
    run: Run,
    baselines: Annotated[
        str, typer.Option(help="What to compare with: all, quick (those that only count) or none.")
    ] = "all",
):
    """Rank the held-out items of a run's users; writes RUN/metrics.json and RUN/metrics.png.

    Baselines that were measured before and are not asked for now stay in them.
    """
    with _one_line_errors():
        _evaluate(run, baselines)


@app.command()
def recommend(
    run: Run,
    users: Annotated[
        list[str] | None, typer.Option(help="User ids, separated by commas; may be repeated.")
    ] = None,
    users_file: Annotated[Path | None, typer.Option(help="Text file, a user id per line.")] = None,
    histories: Annotated[
        Path | None, typer.Option(help="New users: CSV with user_id,item_id, oldest item first.")
    ] = None,
    k: Annotated[int, typer.Option(help="Items per user.")] = 10,
    out: Annotated[
        Path,
        typer.Option(
            help="File to write, .csv or .parquet; one that exists is replaced once all lists are "
            "there. An interrupted .parquet goes on where it was. - is CSV on standard output."
        ),
    ] = Path("-"),
):
    """Write top-K lists: user_id, item_id, title, score, rank, matched, text.

    Without any users named they are for everybody in the run's data.
    """
    with _one_line_errors():
        given = {"--users": users, "--users-file": users_file, "--histories": histories}
        given = [name for name, value in given.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"users: expected one of {', '.join(given)}, got {len(given)}")
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        _require_run(run)
        from contrec_fast.cli_files import read_histories, read_lines, require_table, write_table
        from contrec_fast.progress import ProgressBars

        require_table(out)
        listed = read_lines(users_file) if users_file else None
        new = read_histories(histories) if histories else None
        model = _load(run)
        if users is not None:
            known = set(model.dataset.user_ids)  # an id may itself hold commas and blanks
            parts = [
                [part] if part in known else [user.strip() for user in part.split(",")]
                for part in users
            ]
            listed = [user for part in parts for user in part]
        from contrec_fast.engine import Recommender

        recommender = Recommender(model)
        with ProgressBars() as progress:
            if out.suffix == ".parquet":
                return recommender.write_lists(out, listed, new, k, progress=progress)
            table = recommender.recommend(listed, new, k, progress)
        write_table(table, out)


@app.command()
def add_items(
    run: Run,
    items: Annotated[
        Path, typer.Argument(help="CSV with item_id,title and, optionally, category.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
):
    """Make new items recommendable without training, in a copy of a run."""
    with _one_line_errors():
        _require_free(out)
        _require_run(run)
        from contrec_fast.cli_files import read_items

        table = read_items(items)
        model = _load(run)
        model.add_items(table)
        model.save_pretrained(out)


@app.command()
def info():
    """Show versions, devices and which backends can run here, and why others cannot."""
    from contrec_fast.environment import describe_environment

    table = Table(show_header=False, box=None)
    for name, value in describe_environment().items():
        table.add_row(name, escape(value))
    Console().print(table)


def _train(read, out: Path, config) -> None:
    """Train on the dataset that `read(say)` gives and write the run as a whole.

    OUT.checkpoint holds what an interrupted run goes on from, and goes when the run is there.
    """
    _require_free(out)
    place = out.with_name(f"{out.name}.checkpoint")
    place.mkdir(parents=True, exist_ok=True)  # now: that it cannot be written to costs no time
    kept = place / names.CHECKPOINT
    others = [file for file in place.iterdir() if not file.name.startswith(f".{kept.name}.")]
    if others and not kept.exists():
        raise ValueError(f"{place}: expected an interrupted run, got something else; move it away")
    try:
        from accelerate import PartialState

        from contrec_fast.data.files import whole_folder
        from contrec_fast.environment import default_device
        from contrec_fast.progress import ProgressBars, Silent
        from contrec_fast.training import train as train_model
        from contrec_fast.training.report import TrainingLog

        _quiet_transformers()
        # Ended from outside, it cleans up as after an error.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        # Of the processes that torchrun or `accelerate launch` has started, one reads and writes.
        main = PartialState(cpu=default_device().type == "cpu").is_main_process
        with ProgressBars() if main else nullcontext(Silent()) as progress:
            dataset = read(progress.say)
            log = TrainingLog(place)
            model = train_model(dataset, config, progress, checkpoint=place, log=log)
        log.close()
        if not main:
            return
        _remove_unfinished(out)
        with whole_folder(out) as folder:
            model.save_pretrained(folder)
            if log.epochs:
                log.save_curves(folder / "curves.png")
                shutil.copy(place / "log.jsonl", folder)
                shutil.copytree(place / "tensorboard", folder / "tensorboard")
    except BaseException as error:
        # A loss that is not finite will be so again.
        stays = kept.exists() and not isinstance(error, FloatingPointError)
        if not stays:
            shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            _say(f"interrupted; the same command goes on from {place}" if stays else "interrupted")
            raise typer.Exit(130 if isinstance(error, KeyboardInterrupt) else 143) from None
        raise
    shutil.rmtree(place)
    progress.say(f"wrote {out}")


def _remove_unfinished(out: Path) -> None:
    """Remove what a process that was killed while saving left beside OUT (`whole_folder`)."""
    name, code = glob.escape(out.name), "[0-9a-f]" * 32
    for pattern in (f".{name}.{code}", f"..{name}.{code}.{code}"):
        for leftover in out.parent.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _evaluate(run: Path, baselines: str) -> None:
    """Measure the model and baselines, write metrics.json and metrics.png, print the table."""
    _require_run(run)
    if baselines not in names.BASELINE_SETS:
        expected = ", ".join(names.BASELINE_SETS)
        raise ValueError(f"baselines: expected one of {expected}, got {baselines!r}")
    from contrec_fast.data.files import whole_file
    from contrec_fast.engine import Engine
    from contrec_fast.evaluation.charts import NAMES, bar_chart
    from contrec_fast.evaluation.protocol import evaluate as measure
    from contrec_fast.evaluation.protocol import keep_baselines, read_metrics
    from contrec_fast.progress import ProgressBars

    before = read_metrics(run / "metrics.json")
    model = _load(run)
    with ProgressBars() as progress:
        metrics = measure(Engine(model, model.dataset), progress, baselines)
    metrics = keep_baselines(metrics, before)
    with whole_file(run / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    bar_chart(metrics, run / "metrics.png")

    seen = "excluded" if metrics["filter_seen"] else "included"
    table = Table(title=f"Whole catalog ranked, items of the history {seen}")
    table.add_column("")
    columns = list(metrics["model"])
    for name in columns:
        table.add_column(name, justify="right")
    for label, values in {"model": metrics["model"], **metrics["baselines"]}.items():
        table.add_row(NAMES[label], *(f"{values[name]:.4f}" for name in columns))
    Console().print(table)
    if metrics["against"]:
        parts = [
            f"{name} {best['difference']:+.4f} [{best['low']:+.4f}, {best['high']:+.4f}] "
            f"({NAMES[best['baseline']]})"
            for name, best in metrics["against"].items()
        ]
        print(f"Against the best baseline, with 95 % intervals: {'; '.join(parts)}.")
    counts = metrics["targets"]
    reach = ", out of reach" if metrics["filter_seen"] else ""
    print(
        f"{counts['total']} targets: {counts['in_history']} in the user's own history{reach}; "
        f"{counts['unseen']} in nobody's history."
    )


def _load(run: Path):
    from contrec_fast.environment import default_device
    from contrec_fast.models.contrec import ContRec

    _quiet_transformers()
    model = ContRec.from_pretrained(run).to(default_device())
    if model.dataset is None:
        raise ValueError(f"{run}: expected a trained model with its data, found no data")
    return model


def _quiet_transformers() -> None:
    """Loading and saving a small model needs no progress bars of its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _require_run(run: Path) -> None:
    """As `ContRec.from_pretrained` says it, before anything slow is imported."""
    if not run.is_dir():
        raise ValueError(f"{run}: expected the folder of a trained model, found none")


def _require_free(out: Path) -> None:
    if out.exists():
        raise ValueError(f"out: expected a folder that does not exist yet, got {out}")
