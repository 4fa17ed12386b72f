"""The pictures of a run: each draws on the axes that it is given, from plain rows and tensors."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from torch import Tensor

from trtkern.output import style
from trtkern.output.files import write
from trtkern.output.pictures import few, heat, logarithmic, over_steps, sheet, whole
from trtkern.output.text import printable, short
from trtkern.profiling.firing.activity import LayerActivity

NUMBERED = 20
"""Classes up to which the confusion matrix shows its numbers."""

Row = Mapping[str, Any]


def scored(rows: Sequence[Row]) -> bool:
    """Whether the rows have accuracies: numbers instead of classes have none."""
    return any("accuracy" in row["train"] for row in rows)


def splits(rows: Sequence[Row]) -> list[str]:
    """The splits that the rows have averages of, training first."""
    return [name for name in style.SPLITS if any(name in row for row in rows)]


def loss(axes: Axes, rows: Sequence[Row]) -> None:
    """Total loss over the epochs, and the cross entropy where it is another."""
    positive = True
    for name in splits(rows):
        epochs, total = series(rows, name, "loss")
        _, cross_entropy = series(rows, name, "cross_entropy")
        look = _look(name, epochs)
        apart = cross_entropy != total and any(cross_entropy)
        axes.plot(epochs, total, label=f"{name}, loss" if apart else name, **look)
        if apart:
            axes.plot(epochs, cross_entropy, label=f"{name}, cross entropy", linestyle="--", linewidth=1, **look)
        drawn = (*total, *cross_entropy) if any(cross_entropy) else total
        positive = positive and all(value > 0 for value in drawn)
    axes.set(xlabel="epoch", ylabel="loss (logarithmic)" if positive else "loss", title="Loss over the training")
    if positive:
        logarithmic(axes)
    over_steps(axes)


def accuracy(axes: Axes, rows: Sequence[Row]) -> None:
    """Accuracy over the epochs, in per cent; the title has the last one of the held-out split."""
    for name in splits(rows):
        epochs, values = series(rows, name, "accuracy")
        axes.plot(epochs, [100 * value for value in values], label=name, **_look(name, epochs))
    name = splits(rows)[-1]
    epochs, values = series(rows, name, "accuracy")
    title = f"Accuracy: {100 * values[-1]:.2f} % ({name}) after epoch {epochs[-1]}"
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title=title)
    over_steps(axes)


def learning_rate(axes: Axes, rows: Sequence[Row]) -> None:
    """The learning rate at the beginning of each epoch."""
    epochs = [row["epoch"] for row in rows]
    axes.plot(epochs, [row["lr"] for row in rows], **_look("train", epochs))
    axes.set(xlabel="epoch", ylabel="learning rate", title="Learning rate at the start of each epoch")
    axes.set_ylim(bottom=0)
    whole(axes)


def confusion(axes: Axes, counts: Tensor, classes: Sequence[str]) -> None:
    """Counts [C, C], a row a true class; the shade is the root of the share of the row: small ones are seen too,
    and what never happened has none."""
    number = len(classes)
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    heat(axes, share.sqrt().masked_fill(counts == 0, math.nan).tolist(), style.COUNTS)
    if number <= NUMBERED:
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                if count:
                    ink = style.ON_SHADE[bool(share[i, j] > 0.3)]
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=style.SMALL, color=ink)
        shown = list(range(number))
    else:
        shown = list(range(0, number, 5 * math.ceil(number / 100)))
    labels = [short(classes[i], 18) for i in shown]
    axes.set_xticks(shown, labels, rotation=90 if max(map(len, labels)) > 2 else 0, parse_math=False)
    axes.set_yticks(shown, labels, parse_math=False)
    axes.set(xlabel="taken for", ylabel="true class", aspect="equal", title="What each class was taken for")
    axes.spines[:].set_visible(True)
    axes.tick_params(length=0)


def firing(axes: Axes, activity: Mapping[str, LayerActivity]) -> None:
    """Mean rate of each layer at each step."""
    steps = max(len(layer.rate) for layer in activity.values())
    cells = [layer.rate.tolist() + [math.nan] * (steps - len(layer.rate)) for layer in activity.values()]
    image = heat(axes, cells, style.SHADES, high=max(float(layer.rate.max()) for layer in activity.values()))
    names = [short(name, 28) for name in activity]
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xticks(ticks := few(steps), [str(step + 1) for step in ticks])
    axes.set(xlabel="time step", title="How often the neurons of each layer fire")
    axes.figure.colorbar(image, ax=axes, label="spikes a step")
    _frameless(axes)


def _frameless(axes: Axes) -> None:
    """Of a map, whose cells are frame enough."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def series(rows: Sequence[Row], split: str, part: str) -> tuple[list[int], list[float]]:
    """(epochs, values) of a part of the averages of a split, where they have it."""
    found = [(row["epoch"], row[split][part]) for row in rows if part in row.get(split, {})]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _look(name: str, epochs: Sequence[int]) -> dict[str, Any]:
    return {"color": style.SPLITS[name], "marker": "o" if len(epochs) <= 30 else None, "markersize": 3}


def learning_curves(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy (of numbers the learning rate) over the epochs, of every split in the rows, drawn from the rows
    of metrics.jsonl alone.

    The training figures are averages over the epoch while the weights move (and with mirrored images, where a recipe
    has them); the others are taken at its end.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    stream = io.BytesIO()
    with sheet(stream, (2 * style.WIDTH, 1.1 * style.HEIGHT), printable(title)) as figure:
        left, right = figure.subplots(1, 2)
        loss(left, rows)
        (accuracy if scored(rows) else learning_rate)(right, rows)
    write(path, stream.getvalue())
