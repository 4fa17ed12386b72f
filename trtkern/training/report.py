"""A run on one page: a single HTML file that needs no network and no script."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtkern.profiling.activity import LayerActivity, problems
from trtkern.training import figures
from trtkern.training.folder import write as write_whole
from trtkern.training.settings import flat

TOP = 10
"""Confusions that the table lists."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; } figcaption { color: #444; font-size: .85rem; }
figure svg { width: 100%; height: auto; overflow: visible; }
.wide { overflow-x: auto; } .wide svg { width: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td.n, th.n { text-align: right; }
.problem { border-left: 4px solid #c0392b; padding-left: .6rem; }
pre { white-space: pre-wrap; font-size: .85rem; }
@media print { html { font-size: 12px; } body { max-width: none; padding: 0; font-size: 12px; }
  figure, tr, caption, thead { break-inside: avoid; } h2, caption { break-after: avoid; }
  .row { display: block; }
  .row > figure { display: inline-block; vertical-align: top; width: 46%; margin: 0 1rem 1rem 0; }
  .wide { overflow: visible; } .wide svg { max-width: 100%; height: auto; } }
"""


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
    sections = [_results(rows, final), _curves(rows)]
    if counts is not None:
        sections.append(_confusions(counts, classes))
    if activity:
        sections.append(_firing(activity))
    sections.append(origin(settings, versions, memory, command))
    write_whole(path, document(title, "\n".join(sections)))


def document(title: str, body: str) -> bytes:
    """The whole page: its head with the styles, its title and that body."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>\n"
    )
    return f"{head}<body><h1>{escaped(title)}</h1>\n{body}\n</body></html>\n".encode()


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


def escaped(value: object) -> str:
    """For people and for HTML."""
    return escape(figures.printable(value))


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", words: int = 1) -> str:
    """A table whose first ``words`` columns are words, the others numbers."""
    kinds = ["" if i < words else ' class="n"' for i in range(len(head))]
    top = "".join(f"<th{kind}>{escaped(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    lines = (
        "<tr>" + "".join(f"<td{kind}>{escaped(value)}</td>" for kind, value in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    shown = f"<caption>{escaped(caption)}</caption>" if caption else ""
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{shown}{top}<tbody>{"".join(lines)}</tbody></table></div>'


def figure(svg: str, caption: str, wide: bool = False) -> str:
    """A picture, as SVG, with its caption."""
    kind = ' class="wide"' if wide else ""
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escaped(caption)}" ', 1)
    return f"<figure{kind}>{svg}<figcaption>{escaped(caption)}</figcaption></figure>"


def _results(rows: Sequence[Mapping[str, Any]], final: Mapping[str, Mapping[str, float]]) -> str:
    parts = list(dict.fromkeys(part for averages in final.values() for part in averages))
    lines = []
    for split, averages in final.items():
        shown = (
            f"{averages[p]:.2%}" if p == "accuracy" else f"{averages[p]:.4g}" if p in averages else "" for p in parts
        )
        lines.append([split, *shown])
    table = html_table(["split", *(part.replace("_", " ") for part in parts)], lines) if final else ""
    if not rows:
        return f"<section><h2>Result</h2>{table}<p>No epoch was finished.</p></section>"
    seconds = sum(row["seconds"] for row in rows)
    speed = sorted(row["samples_per_s"] for row in rows)[len(rows) // 2]
    epochs = f"{len(rows)} epoch{'s' if len(rows) > 1 else ''}"
    text = f"{epochs} in {_duration(seconds)} of training, {speed:,.0f} samples/s (median of the epochs)"
    waits = [row["loader_share"] for row in rows if row.get("loader_share") is not None]
    if waits:
        text += f", {sum(waits) / len(waits):.1%} of the time waiting for data"
    return f"<section><h2>Result</h2>{table}<p>{escaped(text)}.</p></section>"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    size = (5.2, 3.6)
    drawn = {
        "Loss; training: averages over the epoch while the weights move, otherwise at its end.": figures.loss,
        "Accuracy, taken likewise.": figures.accuracy,
        "Learning rate at the beginning of each epoch.": figures.learning_rate,
    }
    pictures = (
        figure(figures.svg(partial(draw, rows=rows), size, f"curve {i}"), caption)
        for i, (caption, draw) in enumerate(drawn.items())
    )
    return f'<section><h2>Learning curves</h2><div class="row">{"".join(pictures)}</div></section>'


def _confusions(counts: Tensor, classes: Sequence[str]) -> str:
    number = len(classes)
    side = min(4.2 + 0.2 * number, 8.0)
    shade = "Shade: root of the share of the row" + ("; number: count." if number <= figures.NUMBERED else ".")
    draw = partial(figures.confusion, counts=counts, classes=classes)
    picture = figure(figures.svg(draw, (side, side), "confusion"), f"A row is a true class. {shade}", wide=True)
    totals, right, taken = counts.sum(1), counts.diagonal(), counts.sum(0)
    wrong = (counts - torch.diag(right)).flatten()
    order = wrong.argsort(descending=True, stable=True)[:TOP]
    top = []
    for place in order.tolist():
        true, guess, count = place // number, place % number, int(wrong[place])
        if count:
            top.append([classes[true], classes[guess], f"{count:,}", _share(count, totals[true])])
    heading = f"Most frequent confusions (of {int(wrong.sum()):,} errors in {int(totals.sum()):,})"
    confusions = html_table(["true class", "taken for", "count", "share of the class"], top, heading, words=2)
    lines = [
        [name, f"{int(totals[i]):,}", _share(right[i], totals[i]), _share(right[i], taken[i])]
        for i, name in enumerate(classes)
    ]
    head, chunk = ["class", "images", "accuracy", "precision"], 26
    each = "".join(html_table(head, lines[i : i + chunk]) for i in range(0, number, chunk))
    note = "Accuracy: share of the images of a class that are found; precision: share of its answers that are right."
    return (
        f'<section><h2>Confusions</h2>{picture}{confusions}<h2>Classes</h2><p>{note}</p><div class="row">{each}</div>'
        "</section>"
    )


def _share(part: Any, whole: Any) -> str:
    return f"{int(part) / int(whole):.1%}" if int(whole) else "-"


def _firing(activity: Mapping[str, LayerActivity]) -> str:
    steps = max(len(layer.rate) for layer in activity.values())
    size = (min(4.6 + 0.25 * steps, 9.0), max(2.2, 1.2 + 0.2 * len(activity)))
    caption = "Mean firing rate of each layer at each timestep."
    picture = figure(figures.svg(partial(figures.firing, activity=activity), size, "firing"), caption, wide=True)
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
    return f"<section><h2>Firing rates</h2>{found}{picture}{html_table(head, lines, words=2)}<p>{note}</p></section>"


def origin(
    settings: Mapping[str, Any], versions: Mapping[str, str], memory: str | None, command: Sequence[str] | None
) -> str:
    """Settings, versions, memory, command."""
    parts = ["<section><h2>Where it comes from</h2>"]
    if command:
        parts.append(f"<p>Command:</p><pre>{escaped(shlex.join(map(str, command)))}</pre>")
    if memory:
        parts.append(f"<p>Memory:</p><pre>{escaped(memory)}</pre>")
    said = [(name, v if isinstance(v, str) else json.dumps(v, default=str)) for name, v in flat(settings).items()]
    tables = html_table(["", ""], said, "Settings", words=2) + html_table(
        ["", ""], versions.items(), "Versions", words=2
    )
    return "".join([*parts, f'<div class="row">{tables}</div></section>'])
