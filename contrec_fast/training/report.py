"""The record of a training run: figures per epoch, TensorBoard events, and their curves."""

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch.utils.tensorboard import SummaryWriter

from contrec_fast.data.files import whole_file

METRICS = ("ndcg", "hr")  # how the names of validation figures start
NOT_DRAWN = ("rate", "learning_rate")


class TrainingLog:
    """Figures per epoch in `folder/log.jsonl` and, for TensorBoard, in `folder/tensorboard`.

    A line of log.jsonl is one epoch: {"epoch": 3, "diffusion": 0.41, ..., "rate": 812.0}. What the
    folder holds from an interrupted run stays, up to the epoch from which training goes on.
    """

    def __init__(self, folder: str | Path):
        self.folder, self._writer = Path(folder), None
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        self.epochs: list[dict[str, float]] = [json.loads(line) for line in lines]

    def epoch(self, number: int, **figures: float) -> None:
        """Record an epoch, counted from 1; it and later ones are forgotten if known already.

        figures: losses by their names, `rate` in users/s, `learning_rate`, and validation metrics,
        whose names start with "ndcg" or "hr".
        """
        self.epochs = [line for line in self.epochs if line["epoch"] < number]
        self.epochs.append({"epoch": number} | {n: float(v) for n, v in figures.items()})
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "log.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.epochs))
        if self._writer is None:
            self._writer = SummaryWriter(self.folder / "tensorboard", purge_step=number)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self) -> None:
        """End the TensorBoard file; another epoch would start a new one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def save_curves(self, path: str | Path) -> None:
        """Draw all epochs into a PNG file: losses on a log axis, those that are not always
        positive on a linear one, validation metrics in a panel of their own.

        Nothing is written where there is nothing to draw.
        """
        curves: dict[str, tuple[list[int], list[float]]] = {}
        for line in self.epochs:
            for name, value in line.items():
                if name not in ("epoch", *NOT_DRAWN):
                    numbers, values = curves.setdefault(name, ([], []))
                    numbers.append(line["epoch"])
                    values.append(value)
        panels: dict[str, list[str]] = {}
        for name, (_, values) in curves.items():
            if name.startswith(METRICS):
                panels.setdefault("Validation", []).append(name)
            elif min(values) > 0:
                panels.setdefault("Losses", []).append(name)
            else:
                panels.setdefault("Losses that may be negative", []).append(name)
        if not panels:
            return
        figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
        for axes, (title, names) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
        ):
            for name in names:
                axes.plot(*curves[name], marker=".", label=name)
            axes.set(title=title, xlabel="epoch", yscale="log" if title == "Losses" else "linear")
            if title == "Losses":  # 0.5 rather than 5 x 10^-1
                axes.yaxis.set_major_formatter(LogFormatter())
                axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path, dpi=120, format="png")
