"""Progress of long work on standard error."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBars:
    """One bar per stage, with the latest figures beside it. Use as a context manager.

    Where standard error is not a terminal, each stage prints about ten lines instead.
    """

    def __init__(self):
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
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
        self._console.print(text, soft_wrap=True)

    def stage(self, name: str, total: int):
        """Start a bar of `total` units.

        Returns:
            `advance(**figures)`, to be called after each unit with the figures to show.
        """
        task = self._bars.add_task(name, total=total, figures="")
        done = 0

        def advance(**figures: float) -> None:
            nonlocal done
            done += 1
            text = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
            self._bars.update(task, advance=1, figures=text)
            if not self._console.is_terminal and (done % max(total // 10, 1) == 0):
                print(f"{name} {done}/{total}  {text}", file=sys.stderr, flush=True)

        return advance
