"""Runs side by side: learning curves and what they reached, a colour a run."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from trtkern.output import style
from trtkern.output.pictures import logarithmic, over_steps, rows
from trtkern.reports.runs import Run
from trtkern.training.figures import series


def label(name: str) -> str:
    """For a legend, where matplotlib would take what stands between two dollars for a formula."""
    return name.replace("$", r"\$")


def accuracies(axes: Axes, runs: Sequence[Run]) -> None:
    """Accuracy over the epochs in per cent: held-out images as a line, training images dashed."""
    _curves(axes, runs, "accuracy", 100.0)
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy (dashed: training images)")
    over_steps(axes)


def cross_entropies(axes: Axes, runs: Sequence[Run]) -> None:
    """The cross-entropy over the epochs: of SDT that of the mean answer, of TET and TRT the mean over the steps."""
    positive = _curves(axes, runs, "cross_entropy", 1.0)
    axes.set(xlabel="epoch", ylabel="cross-entropy", title="Cross-entropy (dashed: training images)")
    if positive:
        logarithmic(axes)
    over_steps(axes)


def _curves(axes: Axes, runs: Sequence[Run], part: str, scale: float) -> bool:
    """The curves of the runs that have epochs; whether all are above 0."""
    positive = True
    for each, color in zip(runs, style.SERIES, strict=False):
        for split, look in ((each.held_out, "-"), ("train", "--")):
            epochs, values = series(each.rows, split, part)
            if not epochs:
                continue
            marker = "o" if len(epochs) == 1 else None
            name = label(each.label) if split != "train" else None
            width = 1.6 if split != "train" else 1.0
            axes.plot(
                epochs, [scale * value for value in values], color=color, linestyle=look, linewidth=width, label=name,
                marker=marker, markersize=3,
            )  # fmt: skip
            positive = positive and all(value > 0 for value in values)
    return positive


def scored(runs: Sequence[Run]) -> list[Run]:
    """Those that are at their end and have an accuracy."""
    return [each for each in runs if "accuracy" in (each.final("test") or {})]


def gaps(axes: Axes, runs: Sequence[Run]) -> None:
    """A line a run from its accuracy on the test images to that on the training images, in per cent."""
    shown = [(each, color) for each, color in zip(runs, style.SERIES, strict=False) if each in scored(runs)]
    for place, (each, color) in enumerate(shown):
        test, train = each.final("test"), each.final("train")
        assert test is not None
        here = 100 * test["accuracy"]
        if train is not None:
            there = 100 * train["accuracy"]
            axes.plot([here, there], [place, place], color=color, linewidth=2)
            axes.plot(there, place, "o", markersize=7, markerfacecolor=style.EMPTY, markeredgecolor=color)
        axes.plot(here, place, "o", markersize=7, color=color)
    axes.margins(x=0.08)
    rows(axes, [each.label for each, _ in shown])
    axes.set(xlabel="accuracy (%), empty: training images", title="From test to training images")
