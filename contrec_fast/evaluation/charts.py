"""A picture of an evaluation."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from contrec_fast.data.files import whole_file

NAMES = {
    "model": "ContRec",
    "popularity": "Popularity",
    "itemknn": "ItemKNN",
    "markov": "Markov",
    "ease": "EASE",
    "lightgcn": "LightGCN",
    "sasrec": "SASRec",
}
FORMATS = (".png", ".svg")
OURS, THEIRS, INK = "#c2571a", "#9fb0bf", "#333333"


def bar_chart(metrics: dict, path) -> None:
    """Draw HR@10 and NDCG@10 of the model and the baselines as bars, best on top.

    Lines across the ends of bars are one standard error to either side. The picture appears whole
    or not at all.

    Args:
        metrics: what `evaluate` returns. path: a `.png` or `.svg` file.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path: expected a name ending in .png or .svg, got {str(path)!r}")
    rows = {"model": metrics["model"], **metrics["baselines"]}
    figure = Figure(figsize=(9, 1.5 + 0.36 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.06)
    for axes, metric in zip(figure.subplots(1, 2), ("hr@10", "ndcg@10")):
        _bars(axes, rows, metrics["standard_errors"], metric)
    seen = "excluded" if metrics["filter_seen"] else "included"
    users = metrics["targets"]["total"]
    figure.suptitle(
        f"{users:,} users, one held-out item each; whole catalog ranked, seen items {seen}",
        fontsize=11,
        color=INK,
    )
    figure.supxlabel("Lines: one standard error to either side", fontsize=8, color="#777777")
    kind = path.suffix.lower().removeprefix(".")
    undated = {"Date": None} if kind == "svg" else {}  # the same metrics give the same file
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=160, metadata=undated)


def _bars(axes, rows: dict, errors: dict, metric: str) -> None:
    order = sorted(rows, key=lambda name: rows[name][metric])
    values = [rows[name][metric] for name in order]
    spread = [errors[name][metric] for name in order]
    axes.barh(
        [NAMES.get(name, name) for name in order],
        values,
        height=0.7,
        color=[OURS if name == "model" else THEIRS for name in order],
        xerr=spread,
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5, "capthick": 1},
    )
    room = max(max(map(sum, zip(values, spread))), 1e-6)
    for at, (name, value, error) in enumerate(zip(order, values, spread)):
        axes.text(
            value + error + 0.015 * room,
            at,
            f"{value:.4f}",
            va="center",
            fontsize=9,
            color=INK,
            weight="bold" if name == "model" else "normal",
        )
    for label, name in zip(axes.get_yticklabels(), order):
        label.set_weight("bold" if name == "model" else "normal")
    axes.set_xlim(0, 1.22 * room)
    axes.margins(y=0.02)
    axes.set_title(metric.upper(), fontsize=10, color=INK, loc="left", weight="bold")
    axes.tick_params(axis="y", length=0, labelsize=9.5, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=8, color="#999999", labelcolor="#777777")
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#999999")
