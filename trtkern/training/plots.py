"""The learning curves of a run as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trtkern.training import figures
from trtkern.training.folder import write


def learning_curves(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Loss and accuracy over the epochs, of every split in the rows, drawn from the rows of metrics.jsonl alone.

    The training figures are averages over the epoch while the weights move (and with mirrored images, where a recipe
    has them); the others are taken at its end.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(figures.printable(title), parse_math=False)
    loss, accuracy = figure.subplots(1, 2)
    figures.loss(loss, rows)
    figures.accuracy(accuracy, rows)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120)
    write(path, stream.getvalue())
