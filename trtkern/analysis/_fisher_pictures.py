"""The pictures of the Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtkern.analysis._result import Picture
from trtkern.output import style
from trtkern.output.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trtkern.analysis._fisher import Epoch, Fisher


def pictures(results: Mapping[str, Fisher]) -> dict[str, Picture]:
    """{caption: picture}, several results in the same pictures, but a heat map for each."""
    drawn = {
        "Fisher information of the first t steps, per sample.": Picture(partial(_information, results)),
        "Share of each t in the sum over all t, by both estimators.": Picture(partial(_shares, results)),
    }
    if any(result.history for result in results.values()):
        drawn["Information centroid over the training."] = Picture(partial(_centroids, results))
    for name, result in results.items():
        behind = f", {name}" if name else ""
        drawn[f"Where in time each layer has its information{behind}."] = Picture(
            partial(_layers, result), (style.WIDTH, style.tall(len(result.layers)))
        )
        if result.history:
            drawn[f"Share of each t over the training{behind}."] = Picture(
                partial(_epochs, result.history), (style.WIDTH, style.tall(min(30, len(result.history))))
            )
    return drawn


def _information(results: Mapping[str, Fisher], axes: Axes) -> None:
    """I_t with its interval."""
    for color, (name, result) in zip(_colors(results), results.items(), strict=True):
        steps = range(1, len(result.information) + 1)
        axes.plot(steps, result.information.tolist(), color=color, marker="o", label=name or None)
        if result.interval is not None:
            axes.fill_between(steps, *result.interval.tolist(), color=color, alpha=0.2, linewidth=0)
    found = torch.cat([result.information for result in results.values()])
    if bool((found > 0).all()) and float(found.max() / found.min()) > 20:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    confidence = next((r.confidence for r in results.values() if r.interval is not None), None)
    band = "" if confidence is None else f" (band: {100 * confidence:g} % interval)"
    axes.set(xlabel=f"first t time steps{band}", ylabel="squared gradient norm", title="Fisher information $I_t$")
    _finished(axes)


def _shares(results: Mapping[str, Fisher], axes: Axes) -> None:
    """I_t / sum of I_t, and a mark at each centroid."""
    highest = 0.0
    for color, (name, result) in zip(_colors(results), results.items(), strict=True):
        behind = f", {name}" if name else ""
        mean = result.batch_mean
        for values, centre, look, label in (
            (result.information, result.centroid, "-", f"per sample (centroid {result.centroid:.2f}){behind}"),
            (mean.information, mean.centroid, "--", f"batches of {mean.size} (centroid {mean.centroid:.2f}){behind}"),
        ):
            share = _normal(values)
            highest = max(highest, float(share.max()))
            steps = range(1, len(share) + 1)
            axes.plot(steps, (100 * share).tolist(), color=color, linestyle=look, marker="o", label=label)
            axes.axvline(centre, color=color, linestyle=look, linewidth=0.8)
    axes.set(xlabel="first t time steps (upright: centroids)", ylabel="share of $I_t$ in the sum (%)")
    axes.set_title("Where in time the information is")
    axes.set_ylim(0, 105 * (highest or 1.0))
    _finished(axes)


def _centroids(results: Mapping[str, Fisher], axes: Axes) -> None:
    """IC over the epochs by both estimators."""
    for color, (name, result) in zip(_colors(results), results.items(), strict=True):
        if not (history := result.history):
            continue
        behind = f", {name}" if name else ""
        epochs = [one.epoch for one in history]
        each = [one.centroid for one in history]
        axes.plot(epochs, each, color=color, marker="o", markersize=3, label=f"per sample{behind}")
        intervals = [one.centroid_interval for one in history]
        if all(intervals):
            low, high = zip(*[pair for pair in intervals if pair], strict=True)
            axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
        label = f"batches of {result.batch_mean.size}{behind}"
        batch = [one.batch_centroid for one in history]
        axes.plot(epochs, batch, color=color, linestyle="--", marker="o", markersize=3, label=label)
    steps = {len(result.information) for result in results.values()}
    if len(steps) == 1:
        axes.axhline((steps.pop() + 1) / 2, color=style.ASIDE, linewidth=0.8, linestyle=":", label="same at all t")
    axes.set(xlabel="epoch", ylabel="centroid (time step)", title="Information centroid: lower is earlier")
    _finished(axes)


def _layers(result: Fisher, axes: Axes) -> None:
    """A row a layer, its shares over t."""
    total = float(result.by_layer.sum()) or 1.0
    names = [
        f"{short(name or 'the model', 24)}  {float(row.sum()) / total:4.0%}"
        for name, row in zip(result.layers, result.by_layer, strict=True)
    ]
    _heat(axes, result.by_layer, names, "layer, its part of all")
    axes.set(title="When each layer is informed")


def _epochs(history: list[Epoch], axes: Axes) -> None:
    """A row an epoch, its shares over t."""
    _heat(axes, torch.stack([one.information for one in history]), [str(one.epoch) for one in history], "epoch")
    axes.set(title="Share of each $I_t$ over the training")


def _heat(axes: Axes, values: Tensor, names: list[str], label: str) -> None:
    """Rows as shares in per cent."""
    from trtkern.output.pictures import few, heat

    shares = 100 * _normal(values)
    high = float(shares[~shares.isnan()].max()) if bool((~shares.isnan()).any()) else 1.0
    image = heat(axes, shares.tolist(), style.SHADES, high=high)
    places = range(0, len(names), max(1, len(names) // 30))
    axes.set_yticks(list(places), [names[i] for i in places], parse_math=False)
    axes.set_xticks(steps := few(values.shape[1]), [str(step + 1) for step in steps])
    axes.set(xlabel="first t time steps", ylabel=label)
    axes.figure.colorbar(image, ax=axes, label="share of the row (%)")


def _normal(values: Tensor) -> Tensor:
    """Shares of the last axis; NaN where all are 0."""
    return values / values.sum(-1, keepdim=True)


def _colors(results: Mapping[str, Any]) -> list[str]:
    return [style.series(i) for i in range(len(results))]


def _finished(axes: Axes) -> None:
    """Whole steps, a grid, names."""
    from trtkern.output.pictures import named, whole

    whole(axes)
    named(axes)
