"""A profile on one page: a single HTML file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from trtkern.output import style
from trtkern.output.files import write as write_whole
from trtkern.output.page import Section, document, escaped, figure, html_table, origin
from trtkern.output.pictures import svg
from trtkern.profiling.step import roofline
from trtkern.profiling.step.comparison import ProfileComparison
from trtkern.profiling.step.report import LEGEND, SMALL, StepProfile


def write(
    path: Path,
    found: StepProfile,
    versions: Mapping[str, str],
    command: Sequence[str] | None = None,
    compared: ProfileComparison | None = None,
) -> None:
    """Write the page whole or not at all.

    Args:
        path: the file, in a folder that is there.
        found: the profile.
        versions: of what has a say in the numbers.
        command: the command line.
        compared: with an earlier profile, if it was.

    Raises:
        OSError: the file cannot be written.
    """
    times, rates = roofline.heights(found)
    drawn = {
        "The parts of the step by the time that they take.": (roofline.share, (style.WIDTH, times)),
        "Layers whose arithmetic is not counted: how fast they move what must be moved, beside the rate of a copy in "
        "the same rounds.": (roofline.bandwidth, (style.WIDTH, rates)),
        "Roofline of the layers with matrix products and convolutions. Left of the bend memory is the limit, right of "
        "it arithmetic; both limits were measured in the same rounds.": (
            roofline.roofline, (style.WHOLE, style.WHOLE / 2),
        ),
    }  # fmt: skip
    pictures = "".join(
        figure(svg(partial(draw, found=found), size, f"profile {i}"), caption)
        for i, (caption, (draw, size)) in enumerate(drawn.items())
    )
    title = f"Profile of a step: {found.title}"
    sections = [
        Section("What bounds it", _said(found)),
        *([] if compared is None else [_compared(compared)]),
        Section(
            "Layer by layer",
            f'<div class="row">{pictures}</div>{html_table(found.HEAD, found.table(), words=2)}'
            f"<p>{escaped(LEGEND)}.</p>{_inside(found)}",
        ),
        origin(found.about, versions, found.kept, command),
    ]
    write_whole(path, document(title, sections))


def _said(found: StepProfile) -> str:
    """Warnings, the verdict, what can be done, and what ran."""
    warned = "".join(f'<p class="problem">{escaped(doubt)}</p>' for doubt in found.doubts())
    lines = "".join(f"<p>{escaped(line)}</p>" for line in found.verdict())
    tried = "".join(f"<li>{escaped(advice)}</li>" for advice in found.advice)
    advised = f"<p>What can be done:</p><ul>{tried}</ul>" if tried else ""
    return warned + lines + advised + "".join(f"<p>{escaped(line)}</p>" for line in found.notes())


def _inside(found: StepProfile) -> str:
    """What ran for each row that takes long enough to matter, folded."""
    what = "kernels" if found.gpu else "operators"
    head = (what.removesuffix("s"), *("calls", *found.HEAD[2:8]))
    parts = []
    for row in sorted(found.rows, key=lambda row: -row.seconds):
        lines = found.inside(row)
        if lines and row.seconds >= SMALL * found.wall:
            told = f"{row.name} {row.kind}: {1e3 * row.seconds:.2f} ms, {row.seconds / found.wall:.1%} of the step"
            table = html_table(head, lines, words=1)
            parts.append(f"<details><summary>{escaped(told)}</summary>{table}</details>")
    return f"<h3>What ran inside: {what}</h3>{''.join(parts)}" if parts else ""


def _compared(compared: ProfileComparison) -> Section:
    """Before and after."""
    notes = "".join(f"<p>{escaped(note)}</p>" for note in compared.notes)
    table = html_table(compared.HEAD, compared.table(), words=2)
    return Section("Before and after", f"<p>{escaped(compared.verdict())}</p>{notes}{table}", "Before")
