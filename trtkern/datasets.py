"""The data sets by name, and what is known of each without its files; the standard library only.

A row of ``DATASETS`` is all that a new one takes: the command line, its messages, recipes, dry runs and ``data.load``
know it from there. What makes it is named as text and imported when it is loaded, so that torch need not be loaded for
a list of names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Maker = Callable[..., Any]
"""(name, data.Source) -> data.Dataset."""


@dataclass(frozen=True)
class Row:
    """A data set as it is published."""

    make: str | Maker
    """What makes it of its name and a ``data.Source``: a function, or "module:function"."""
    classes: int
    """How many."""
    shape: tuple[int, int, int] | None
    """(C, H, W) of an image or frame; None is 3 x size x size, with the size that is asked for."""
    train: int | None
    """Images to train on; None where that is not the same for everybody."""
    frames: bool = False
    """Whether a sample is a sequence of T frames."""
    takes: tuple[str, ...] = ()
    """Of the fields of ``data.Source`` that not every data set takes, those that this one does."""

    def maker(self) -> Maker:
        """``make``, imported."""
        if not isinstance(self.make, str):
            return self.make
        module, _, name = self.make.partition(":")
        found: Maker = getattr(import_module(module), name)
        return found


_SETS = "trtkern.data.sets"
DATASETS: dict[str, Row] = {
    "digits": Row(f"{_SETS}:digits", 10, (1, 8, 8), 1437),
    "fashion-mnist": Row(f"{_SETS}:fashion_mnist", 10, (1, 28, 28), 60_000),
    "cifar10": Row(f"{_SETS}:cifar10", 10, (3, 32, 32), 50_000),
    "cifar100": Row(f"{_SETS}:cifar100", 100, (3, 32, 32), 50_000),
    "imagenet100": Row(f"{_SETS}:imagenet100", 100, None, None, takes=("class_list",)),
    "imagenet": Row(f"{_SETS}:imagenet", 1000, None, 1_281_167, takes=("class_list",)),
    "dvs-cifar10": Row(f"{_SETS}:events", 10, (2, 48, 48), 9_000, frames=True, takes=("resize",)),
    "n-caltech101": Row(f"{_SETS}:events", 101, (2, 48, 48), None, frames=True),
    "n-mnist": Row(f"{_SETS}:events", 10, (2, 34, 34), 60_000, frames=True),
    "dvs-gesture": Row(f"{_SETS}:events", 11, (2, 128, 128), 1_176, frames=True),
    "shd": Row(f"{_SETS}:events", 20, (1, 1, 700), 8_156, frames=True),
}
"""Every data set by its name: how it is made, its classes, and the options that it takes."""


def takers(option: str) -> list[str]:
    """The data sets that take an option which not every one does."""
    return [name for name, row in DATASETS.items() if option in row.takes]
