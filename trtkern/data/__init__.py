"""Data sets: tensors in memory, or image files. Their names are those of ``trtkern.datasets``."""

from __future__ import annotations

from typing import Any

from trtkern.data.dataset import Dataset, Split
from trtkern.data.identity import difference, fingerprint
from trtkern.data.sets import Source
from trtkern.datasets import DATASETS, takers
from trtkern.names import unknown

__all__ = ["DATASETS", "Dataset", "Source", "Split", "difference", "fingerprint", "load"]


def load(name: str, directory: str | None = None, download: bool = False, **options: Any) -> Dataset:
    """The data set of that name.

    Args:
        name: a key of ``DATASETS``.
        directory, download, options: the fields of ``Source``.

    Raises:
        ValueError: an unknown name (the message lists them), or a file that is not what it should be.
        OSError: a file is missing or cannot be read.
        ImportError: what reads its files is not installed.
    """
    if name not in DATASETS:
        raise unknown("data", name, DATASETS)
    row, source = DATASETS[name], Source(directory, download, **options)
    for option, flag in (("class_list", "--class-list"), ("resize", "--dvs-resize")):
        if getattr(source, option) != getattr(Source, option) and option not in row.takes:
            raise ValueError(f"data: expected {flag} with {' or '.join(takers(option))} only, got it with {name}")
    return row.maker()(name, source)
