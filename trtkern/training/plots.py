"""The learning curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

TRAIN, TEST = "#3b6ea8", "#d1603d"


def learning_curves(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy over the epochs, training and test, drawn from the rows of metrics.jsonl alone.

    The training figures are averages over the epoch while the weights move (and with mirrored images, where a recipe
    has them); the test figures are taken at its end.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) <= 30 else None
    for name, color in (("train", TRAIN), ("test", TEST)):
        style = {"color": color, "marker": marker, "markersize": 3}
        total, cross_entropy = ([row[name][part] for row in rows] for part in ("loss", "cross_entropy"))
        loss.plot(epochs, total, label=f"{name} loss", **style)
        if cross_entropy != total:
            loss.plot(epochs, cross_entropy, label=f"{name} cross entropy", linestyle="--", linewidth=1, **style)
        accuracy.plot(epochs, [100 * row[name]["accuracy"] for row in rows], label=name, **style)
    loss.set(xlabel="epoch", ylabel="loss", yscale="log", title="loss")
    loss.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    last = 100 * rows[-1]["test"]["accuracy"]
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)", title=f"test accuracy after epoch {epochs[-1]}: {last:.2f} %")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
