"""The rows of a run as scalars for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtkern.output.files import naming
from trtkern.training.observer import Observer

FOLDER = "tensorboard"


class TensorBoard(Observer):
    """Writes every number of a row of metrics.jsonl into RUN/tensorboard, with the epoch as its step.

    "train/loss", "test/accuracy", "lr", "samples_per_s", "firing/<layer>". What an earlier part of the run wrote for
    the first epoch that is told, or a later one, is taken back: a run that is resumed has each epoch once.

    Args:
        folder: the run folder.

    Raises:
        ImportError: the package tensorboard is missing.
        ValueError: the folder's name is not UTF-8, which that package cannot write to.
    """

    interval = math.inf

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoard: expected the package tensorboard, got none ({error}); type: pip install "
                "'trtkern[tensorboard]'"
            ) from None
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"TensorBoard: expected a run folder with a name in UTF-8, got {str(folder)!a}; name another, or leave "
                f"--tensorboard out"
            ) from None
        self._make, self._folder = SummaryWriter, folder / FOLDER
        self._writer: Any = None

    def epoch(self, row: dict[str, Any]) -> None:
        """Writes the row, to the disk.

        Raises:
            OSError: it cannot be written; the message names the folder.
        """
        with naming(self._folder):
            if self._writer is None:
                self._writer = self._make(str(self._folder), purge_step=row["epoch"])
            for tag, value in scalars(row):
                self._writer.add_scalar(tag, value, row["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with naming(self._folder):
                writer.close()


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of every number in a row."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{part}", number) for part, number in value.items() if _number(number))
        elif name not in ("epoch", "step") and _number(value):
            yield name, value


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
