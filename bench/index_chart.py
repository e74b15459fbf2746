"""The picture of `cpu_index.py`: recall against queries per second of processor time."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLOURS = {"exact": "#c2571a", "flat": "#8a8a8a", "ivf": "#2b6f9e", "hnsw": "#4e9a51"}
INK, PALE = "#333333", "#777777"


def draw(results: Sequence[dict], path: Path) -> None:
    """A row for each batch size, a column for each catalog; hollow and dashed with the bonus.

    The picture appears whole or not at all.
    """
    catalogs = list(dict.fromkeys(one["catalog"] for one in results))
    batches = list(dict.fromkeys(one["batch"] for one in results))
    size = (3.1 * len(catalogs) + 0.6, 2.9 * len(batches) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(batches), len(catalogs), squeeze=False)
    for axes_row, batch in zip(grid, batches):
        for axes, catalog in zip(axes_row, catalogs):
            chosen = [one for one in results if (one["catalog"], one["batch"]) == (catalog, batch)]
            _panel(axes, chosen)
            calls = "one query a call" if batch == 1 else f"{batch} queries a call"
            axes.set_title(f"{catalog}\n{calls}", fontsize=9, color=INK, loc="left")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel(
        "queries per second of processor time; hollow and dashed: with the bonus", fontsize=9
    )
    figure.supylabel("recall of the 20 best", fontsize=9)
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, format="png", dpi=130)
    temporary.replace(path)


def _panel(axes, results: Sequence[dict]) -> None:
    for kind, colour in COLOURS.items():
        for pi in sorted({one["pi"] for one in results}):
            points = [one for one in results if (one["kind"], one["pi"]) == (kind, pi)]
            axes.plot(
                [one["queries_per_cpu_s"] for one in points],
                [one["recall"] for one in points],
                color=colour,
                marker="*" if kind == "exact" else "o",
                markersize=12 if kind == "exact" else 5,
                markerfacecolor="white" if pi else colour,
                linestyle="--" if pi else "-",
                linewidth=1.2,
                label=None if pi else kind,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08)
    axes.set_ylim(-0.03, 1.05)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.tick_params(labelsize=8, color="#999999", labelcolor=PALE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
