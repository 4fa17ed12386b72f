"""A run on one page: a single HTML file that needs no network and no script."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from trtkern.output import style
from trtkern.output.files import naming
from trtkern.output.files import write as write_whole
from trtkern.output.page import Section, document, escaped, figure, html_table, origin
from trtkern.output.pictures import svg
from trtkern.profiling.firing.activity import LayerActivity, problems
from trtkern.profiling.step.spread import spread
from trtkern.training import figures
from trtkern.training.settings import flat

TOP = 10
"""Confusions that the table lists."""


def write(
    path: Path,
    *,
    title: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    final: Mapping[str, Mapping[str, float]],
    versions: Mapping[str, str],
    confusion: Tensor | None = None,
    classes: Sequence[str] = (),
    activity: Mapping[str, LayerActivity] | None = None,
    memory: str | None = None,
    command: Sequence[str] | None = None,
) -> None:
    """Write the page whole or not at all; the same input gives the same bytes.

    Args:
        path: the file, in a folder that is there.
        settings: the configuration, of plain JSON types.
        rows: those of metrics.jsonl; none draws no curves.
        final: the averages of each split at the end.
        versions: of what has a say in the numbers.
        confusion: counts [C, C], a row a true class.
        classes: their C names.
        activity: firing rates by layer.
        memory: what a step keeps, in words.
        command: the command line.

    Raises:
        ValueError: a confusion matrix that is not one, or of other classes.
        OSError: the file cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"report: expected a file in a folder that is there, got {path}; make the folder first")
    counts = None if confusion is None else _checked(confusion, classes)
    sections = [_results(rows, final)]
    if rows:
        sections.append(curves(rows))
    if counts is not None:
        sections += [_confusions(counts, classes), _classes(counts, classes)]
    if activity:
        sections.append(_firing(activity))
    sections.append(origin(flat(settings), versions, memory, command))
    hint = f"<code>trtkern report {escaped(shlex.quote(str(path.parent)))}</code> makes the page of its analyses."
    write_whole(path, document(title, sections, linked(hint)))


def linked(said: str) -> str:
    """The paragraph of the page that leads to the analyses of the run, with that HTML."""
    return f'<p id="analyses">{said}</p>'


def link(path: Path, target: str) -> None:
    """Let the page lead to that of the analyses; once, however often it is told.

    Args:
        path: the page; where there is none, nothing is done.
        target: the file of the other one, relative to this.

    Raises:
        OSError: it cannot be read or written.
    """
    with naming(path, "a file that can be read"):
        if not path.is_file():
            return
        before = path.read_bytes()
    said = f'What its network learnt, and how: <a href="{escaped(quote(os.fsencode(target)))}">the analyses</a>.'
    text = linked(said).encode()
    after, count = re.subn(rb'<p id="analyses">.*?</p>', lambda _: text, before, count=1, flags=re.DOTALL)
    if not count:  # a page of before there was that paragraph
        after = before.replace(b"</h1>", b"</h1>" + text, 1)
    if after != before:
        write_whole(path, after)


def _checked(confusion: Tensor, classes: Sequence[str]) -> Tensor:
    """The counts on the CPU."""
    number = len(classes)
    if tuple(confusion.shape) != (number, number) or confusion.is_floating_point() or number == 0:
        raise ValueError(
            f"report: expected a confusion matrix of counts [{number}, {number}] for {number} classes, got "
            f"{confusion.dtype} {list(confusion.shape)}"
        )
    confusion = confusion.long().cpu()
    if int(confusion.min()) < 0:
        raise ValueError(f"report: expected counts of at least 0 in the confusion matrix, got {int(confusion.min())}")
    return confusion


def _results(rows: Sequence[Mapping[str, Any]], final: Mapping[str, Mapping[str, float]]) -> Section:
    parts = list(dict.fromkeys(part for averages in final.values() for part in averages))
    lines = []
    for split, averages in final.items():
        shown = (
            f"{averages[p]:.2%}" if p == "accuracy" else f"{averages[p]:.4g}" if p in averages else "" for p in parts
        )
        lines.append([split, *shown])
    table = html_table(["split", *(part.replace("_", " ") for part in parts)], lines) if final else ""
    if not rows:
        return Section("Result", f"{table}<p>No epoch was finished.</p>")
    seconds = sum(row["seconds"] for row in rows)
    low, speed, high = spread([row["samples_per_s"] for row in rows])
    scatter = f"; p20 to p80: {low:,.0f} to {high:,.0f}" if len(rows) > 2 else ""
    epochs = f"{len(rows)} epoch{'s' if len(rows) > 1 else ''}"
    text = f"{epochs} in {_duration(seconds)} of training, {speed:,.0f} samples/s (median of the epochs{scatter})"
    waits = [row["loader_share"] for row in rows if row.get("loader_share") is not None]
    if waits:
        text += f", {sum(waits) / len(waits):.1%} of the time waiting for data"
    return Section("Result", f"{table}<p>{escaped(text)}.</p>")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def curves(rows: Sequence[Mapping[str, Any]]) -> Section:
    """Loss, accuracy and learning rate over the epochs of a run, of at least one row."""
    size = (style.WIDTH, style.HEIGHT)
    drawn: dict[str, tuple[Callable[..., None], tuple[float, float]]] = {
        "Of the training images an average over the epoch, while the weights move; of the others at its end.": (
            figures.loss, size,
        ),
        "Accuracy, taken likewise.": (figures.accuracy, size),
        "The learning rate, which the recipe sets.": (figures.learning_rate, (style.WIDTH, 0.6 * style.HEIGHT)),
    }  # fmt: skip
    if not figures.scored(rows):
        drawn.pop("Accuracy, taken likewise.")
    pictures = (
        figure(svg(partial(draw, rows=rows), shape, f"curve {i}"), caption)
        for i, (caption, (draw, shape)) in enumerate(drawn.items())
    )
    return Section("Learning curves", f'<div class="row">{"".join(pictures)}</div>')


def _confusions(counts: Tensor, classes: Sequence[str]) -> Section:
    number = len(classes)
    side = max(style.WIDTH, 1.2 + 0.34 * number) if number <= figures.NUMBERED else style.WHOLE
    shade = "Shade: root of the share of the row" + ("; number: count." if number <= figures.NUMBERED else ".")
    draw = partial(figures.confusion, counts=counts, classes=classes)
    picture = figure(svg(draw, (side, side), "confusion"), f"A row is a true class. {shade}")
    totals, right = counts.sum(1), counts.diagonal()
    wrong = (counts - torch.diag(right)).flatten()
    order = wrong.argsort(descending=True, stable=True)[:TOP]
    top = []
    for place in order.tolist():
        true, guess, count = place // number, place % number, int(wrong[place])
        if count:
            top.append([classes[true], classes[guess], f"{count:,}", _share(count, totals[true])])
    heading = f"Most frequent confusions (of {int(wrong.sum()):,} errors in {int(totals.sum()):,})"
    head = ["true class", "taken for", "count", "share of the class"]
    table = html_table(head, top, heading, words=2)
    return Section("Confusions", f'<div class="row">{picture}<div>{table}</div></div>')


def _classes(counts: Tensor, classes: Sequence[str]) -> Section:
    totals, right, taken = counts.sum(1), counts.diagonal(), counts.sum(0)
    lines = [
        [name, f"{int(totals[i]):,}", _share(right[i], totals[i]), _share(right[i], taken[i])]
        for i, name in enumerate(classes)
    ]
    head, chunk = ["class", "images", "accuracy", "precision"], 26
    each = "".join(html_table(head, lines[i : i + chunk]) for i in range(0, len(classes), chunk))
    note = "Accuracy: share of the images of a class that are found; precision: share of its answers that are right."
    return Section("Classes", f'<p>{note}</p><div class="row">{each}</div>')


def _share(part: Any, whole: Any) -> str:
    return f"{int(part) / int(whole):.1%}" if int(whole) else "-"


def _firing(activity: Mapping[str, LayerActivity]) -> Section:
    steps = max(len(layer.rate) for layer in activity.values())
    size = (style.WIDTH if steps <= 12 else style.WHOLE, style.tall(len(activity)))
    caption = "Mean firing rate of each layer at each timestep."
    picture = figure(svg(partial(figures.firing, activity=activity), size, "firing"), caption)
    shown = list(range(steps)) if steps <= 8 else [*range(4), *range(steps - 4, steps)]
    head = ["layer", "type", "neurons", "rate", "silent", "saturated", *(f"t={step + 1}" for step in shown)]
    lines = []
    for name, layer in activity.items():
        rates = [f"{layer.rate[step]:.3f}" if step < len(layer.rate) else "" for step in shown]
        shares = [f"{value:.1%}" for value in (layer.mean, layer.silent, layer.saturated)]
        lines.append([name, layer.kind, f"{layer.neurons:,}", *shares, *rates])
    found = "".join(f'<p class="problem">{escaped(line)}</p>' for line in problems(activity))
    note = "Silent and saturated: share of the neurons that never and that always fired, in all that was seen."
    if len(shown) < steps:
        note += f" Of the {steps} steps the table has the first and last four."
    return Section("Firing rates", f"{found}{picture}{html_table(head, lines, words=2)}<p>{note}</p>")
