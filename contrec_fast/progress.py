"""Progress of long work on standard error."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column


class ProgressBars:
    """One bar per stage, with the latest figures beside it. Use as a context manager.

    Where standard error is not a terminal, each stage prints about ten lines instead.
    """

    def __init__(self):
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=10)),
            BarColumn(bar_width=10, table_column=Column(min_width=10)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[unit]}", table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            # What gives way where the terminal is narrow.
            TextColumn(
                "{task.fields[figures]}",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            expand=True,
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *error) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line between the bars."""
        self._console.print(text, soft_wrap=True, markup=False)

    def stage(self, name: str, total: int, unit: str, done: int = 0):
        """Start a bar.

        Args:
            total: how many units there are: "epochs", "steps", "batches". done: how many of them
            an interrupted run has done already.

        Returns:
            `advance(**figures)`, to be called after each unit with the figures to show: losses
            and metrics by their name, `epoch`, `rate` in users/s, `learning_rate`. Without any,
            those of before stay.
        """
        task = self._bars.add_task(name, total=total, completed=done, unit=unit, figures="")
        text = ""

        def advance(**figures: float) -> None:
            nonlocal done, text
            done += 1
            text = "  ".join(_figure(name, value) for name, value in figures.items()) or text
            self._bars.update(task, advance=1, figures=text)
            if not self._console.is_terminal and (done % max(total // 10, 1) == 0 or done == total):
                print(f"{name} {done}/{total} {unit}  {text}".rstrip(), file=sys.stderr, flush=True)

        return advance


class Silent:
    """Stands in for `ProgressBars` where nothing is to be shown."""

    def say(self, text: str) -> None:
        pass

    def stage(self, name: str, total: int, unit: str, done: int = 0):
        return lambda **figures: None


def _figure(name: str, value: float) -> str:
    if name == "rate":
        return f"{value:,.0f} users/s"
    if name == "epoch":
        return f"epoch {value:.0f}"
    return f"{name.replace('_', ' ')} {value:{'.1e' if name == 'learning_rate' else '.3f'}}"
