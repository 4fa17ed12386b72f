"""A profile on one page: a single HTML file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

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
    high = max(3.6, 1.2 + 0.22 * len(roofline.uncounted(found)))
    drawn = {
        "Time of the parts of the step.": (roofline.share, (5.2, max(3.0, 1 + 0.22 * min(20, len(found.rows))))),
        "Roofline: rates measured in the same rounds.": (roofline.roofline, (5.2, 3.9)),
        "Bytes per second where FLOP are not counted.": (roofline.bandwidth, (5.2, high)),
    }
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
