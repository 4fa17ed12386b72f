"""One page of runs and of everything that was found out about their networks."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

from trtkern.analysis import Picture, Result, Table
from trtkern.output import style
from trtkern.output.files import write as write_whole
from trtkern.output.page import Html, Section, document, escaped, figure, html_table
from trtkern.output.pictures import svg
from trtkern.reports import pictures
from trtkern.reports.runs import Analyses, Run, differences, trouble
from trtkern.training import report
from trtkern.training.run import REPORT

HEADINGS = {
    "fisher": "Fisher information over time", "gradients": "Gradients through time", "landscape": "Loss landscape",
    "curvature": "Curvature of the minimum", "energy": "Operations and energy", "spikes": "Who fires when",
    "early": "Answers after fewer time steps",
}  # fmt: skip
PAGE = "analysis.html"
"""Of a single run, in its folder."""
NAMED = 80
"""Characters of the names of runs in the name of a page."""
BESIDE = 5
"""Columns up to which the tables of two runs stand beside each other; wider ones stand below each other."""
COLUMNS = 12
"""Columns up to which the tables of several runs are one, a column a run."""


def place(runs: Sequence[Run], out: str | None) -> Path:
    """Where the page goes: ``out``, or in the folder of a single run, or by the names of several in this one.

    Raises:
        ValueError: a folder, or in one that is not there.
    """
    if out is None and len(runs) == 1:
        return runs[0].folder / PAGE
    names = "-".join(re.sub(r"[^\w.+]+", "-", each.label).strip("-") for each in runs)
    path = Path(f"report-{names[:NAMED]}.html" if out is None else out)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--out: expected a file in a folder that exists, got {path}")
    return path


def lead(run: Run, place: Path) -> None:
    """Let the own page of a run, if it has one, lead to this.

    Raises:
        OSError: it cannot be read or written.
    """
    report.link(run.folder / REPORT, os.path.relpath(place, run.folder))


def write(path: Path, runs: Sequence[Run], found: Sequence[Analyses], command: Sequence[str]) -> None:
    """Write the page whole or not at all; the same input gives the same bytes.

    Args:
        path: the file, in a folder that is there.
        runs: at least one.
        found: the analyses in order, each with those runs that have it.
        command: the command line.

    Raises:
        OSError: the file cannot be written.
    """
    several = len(runs) > 1
    title = " · ".join(each.label for each in runs) if several else f"{runs[0].title} ({runs[0].label})"
    sections = [_overview(runs, path.parent)]
    if any(each.rows for each in runs):
        sections.append(_curves(runs) if several else report.curves(runs[0].rows))
    sections += [_analysis(runs, each) for each in found if each.results or each.notes]
    sections.append(Section("How this page was made", f"<pre>{escaped(shlex.join(command))}</pre>", "Origin"))
    legend = f'<div class="legend">{" ".join(_swatch(runs, each) for each in runs)}</div>' if several else ""
    write_whole(path, document(title, sections, legend=legend))


def _swatch(runs: Sequence[Run], run: Run) -> Html:
    """The name of a run with its colour, where there are several."""
    if len(runs) == 1:
        return Html(escaped(run.label))
    return Html(f'<span class="run" style="--of:{style.SERIES[runs.index(run)]}">{escaped(run.label)}</span>')


def _problems(lines: Sequence[str]) -> str:
    return "".join(f'<p class="problem">{escaped(line)}</p>' for line in lines)


def _overview(runs: Sequence[Run], place: Path) -> Section:
    """What each run is and what it reached."""
    several = len(runs) > 1
    head = ["run", "test accuracy", "train accuracy", "gap", "chosen epoch", "data", "loss", "T", "seed"]
    lines = []
    for each in runs:
        test, train, at = each.final("test"), each.final("train"), each.settings
        numbers = ["", "", "", f"{len(each.rows)} of {at.epochs} so far"]
        if each.result is not None and test is not None:
            reached = None if train is None or "accuracy" not in test else train.get("accuracy")
            numbers = [
                f"{test['accuracy']:.2%}" if "accuracy" in test else f"loss {test['loss']:.4g}",
                "" if reached is None else f"{reached:.2%}",
                "" if reached is None else f"{100 * (reached - test['accuracy']):+.2f} points",
                f"{each.result.get('epoch', '?')} of {each.result.get('epochs', at.epochs)}",
            ]
        lines.append([_swatch(runs, each), *numbers, at.data, at.loss, str(at.timesteps), str(at.seed)])
    note = (
        "The test accuracy is that of the chosen weights. The train accuracy is the average over their epoch, taken "
        "while the weights still moved and with the random changes of the images, if the recipe has some. The gap is "
        "the difference of the two."
    )
    links = []
    for each in runs:
        if (each.folder / REPORT).is_file():
            target = quote(os.fsencode(os.path.relpath(each.folder / REPORT, place)))
            links.append(f'<a href="{escaped(target)}">{escaped(each.label if several else REPORT)}</a>')
    parts = [_problems(trouble(runs))]
    parts += [_problems([f"{each.label}: {line}" if several else line for line in each.notes]) for each in runs]
    parts += [html_table(head, lines), f"<p>{note}</p>"]
    finished = pictures.scored(runs)
    if several and finished:
        size = (style.WIDTH, 1.3 + 0.34 * len(finished))
        caption = "From the accuracy on the test images (filled) to that on the training images (empty): the gap."
        draw = partial(pictures.gaps, runs=runs)
        parts.append(f'<div class="row">{figure(svg(draw, size, "gaps"), caption)}</div>')
    if several and (other := differences(runs)):
        names = [_swatch(runs, each) for each in runs]
        parts.append(html_table(["setting", *names], [[n, *c] for n, c in other.items()], "What differs", words=9))
    if links:
        words = "Confusions, firing rates and all settings of each run are on its own page"
        parts.append(f"<p>{words if several else words.replace('each', 'the')}: {', '.join(links)}.</p>")
    return Section("Runs" if several else "Run", "".join(parts))


def _curves(runs: Sequence[Run]) -> Section:
    """The learning curves of several runs in the same pictures."""
    words = "held-out images at the end of each epoch as a line, training images (average over the epoch) dashed."
    drawn: dict[str, Callable[..., None]] = {
        f"Accuracy: {words}": pictures.accuracies,
        "Cross-entropy, of SDT that of the mean answer, of TET and TRT the mean over the steps, so that only runs of "
        f"one kind can be compared: {words}": pictures.cross_entropies,
    }
    shown = (
        figure(svg(partial(draw, runs=runs), (style.WIDTH, style.HEIGHT), f"runs {i}"), caption)
        for i, (caption, draw) in enumerate(drawn.items())
    )
    held = {each.held_out for each in runs if each.rows}
    note = f"Held out: {' or '.join(sorted(held))} images."
    return Section("Learning curves", f'<div class="row">{"".join(shown)}</div><p>{note}</p>')


def _analysis(runs: Sequence[Run], found: Analyses) -> Section:
    """An analysis of all runs that have it: what it says, its pictures and numbers, how it was made."""
    heading = HEADINGS.get(found.name, found.name)
    if not found.results:
        return Section(heading, _problems(found.notes), found.name.capitalize())
    mine = [each for each in runs if each.label in found.results]
    results = [found.results[each.label] for each in mine]
    names = [_swatch(runs, each) for each in mine]
    drawn = "".join(
        figure(_colored(svg(picture.draw, picture.size, f"{found.name} {i}"), runs, mine), caption)
        for i, (caption, picture) in enumerate(_drawn(runs, mine, results).items())
    )
    parts = [
        _problems(found.notes),
        f'<div class="row">{drawn}</div>' if drawn else "",
        _tables(names, [result.table() for result in results]),
        _remarks(names, results),
        _about(names, results),
    ]
    return Section(heading, "".join(parts), found.name.capitalize())


def _drawn(runs: Sequence[Run], mine: Sequence[Run], results: Sequence[Result]) -> dict[str, Picture]:
    """The pictures, of one result without a name, of several with all in the same."""
    named = {pictures.label(each.label): result for each, result in zip(mine, results, strict=True)}
    return type(results[0]).pictures(named if len(runs) > 1 else {"": results[0]})


def _colored(text: str, runs: Sequence[Run], mine: Sequence[Run]) -> str:
    """A picture of some of the runs, with the colours that these have everywhere on the page.

    The pictures give their series the colours in order.
    """
    places = [runs.index(each) for each in mine]
    if places == list(range(len(mine))):
        return text
    changed = {style.SERIES[i]: style.SERIES[place] for i, place in enumerate(places)}
    return re.sub("|".join(changed), lambda found: changed[found[0]], text)


def _tables(names: Sequence[Html], tables: Sequence[Table]) -> str:
    """The tables of the runs: one with a column a run where that is narrow enough, else one a run."""
    first = tables[0]
    if len(tables) == 1:
        return html_table(first.head, first.rows, words=first.words)
    keys: dict[tuple[str, ...], None] = {}
    cells: list[dict[tuple[str, ...], Sequence[str]]] = []
    for table in tables:
        cells.append({tuple(row[: table.words]): row[table.words :] for row in table.rows})
        keys |= dict.fromkeys(cells[-1])
    values = list(first.head[first.words :])
    alike = all(list(table.head) == list(first.head) and table.words == first.words for table in tables)
    single = all(len(found) == len(table.rows) for found, table in zip(cells, tables, strict=True))
    if not (alike and single and values and len(values) * len(tables) <= COLUMNS):
        each = (
            f"<div><h3>{name}</h3>{html_table(table.head, table.rows, words=table.words)}</div>"
            for name, table in zip(names, tables, strict=True)
        )
        return f'<div class="row">{"".join(each)}</div>' if len(first.head) <= BESIDE else "".join(each)
    rows = [
        [*key, *(found[key][column] if key in found else "-" for column in range(len(values)) for found in cells)]
        for key in keys
    ]
    head = [*first.head[: first.words], *(name for _ in values for name in names)]
    over = [("", first.words), *((value, len(tables)) for value in values)]
    return html_table(head, rows, words=first.words, over=over)


def _remarks(names: Sequence[Html], results: Sequence[Result]) -> str:
    """What the results say; once what they all say."""
    said = [result.remarks() for result in results]
    common = [line for line in said[0] if all(line in other for other in said)]
    parts = [f"<p>{escaped(line)}</p>" for line in common]
    for name, lines in zip(names, said, strict=True):
        own = "".join(f"<li>{escaped(line)}</li>" for line in lines if line not in common)
        if own:
            parts.append(f"<p>{name}:</p><ul>{own}</ul>")
    return f"<h3>What it says</h3>{''.join(parts)}" if parts else ""


def _about(names: Sequence[Html], results: Sequence[Result]) -> str:
    """Where the numbers come from; in one column where it is the same for all."""
    keys = dict.fromkeys(key for result in results for key in result.about)
    if not keys:
        return ""
    rows = [[key, *(result.about.get(key, "") for result in results)] for key in keys]
    head = ["", *(names if len(names) > 1 else [""])]
    return f"<details><summary>How it was made</summary>{html_table(head, rows, words=len(head))}</details>"
