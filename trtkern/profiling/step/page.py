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
from trtkern.profiling.step.report import LEGEND, StepProfile


def write(path: Path, found: StepProfile, versions: Mapping[str, str], command: Sequence[str] | None = None) -> None:
    """Write the page whole or not at all.

    Args:
        path: the file, in a folder that is there.
        found: the profile.
        versions: of what has a say in the numbers.
        command: the command line.

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
    said = "".join(f"<p>{escaped(line)}</p>" for line in (*found.verdict(), *found.notes()))
    title = f"Profile of a step: {found.title}"
    sections = [
        Section("What bounds it", said),
        Section(
            "Layer by layer",
            f'<div class="row">{pictures}</div>{html_table(found.HEAD, found.table(), words=2)}'
            f"<p>{escaped(LEGEND)}.</p>",
        ),
        origin(found.about, versions, found.kept, command),
    ]
    write_whole(path, document(title, sections))
