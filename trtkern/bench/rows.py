"""A row a measurement, or a word on why there is none: what the table, the CSV file and the page are made of."""

from __future__ import annotations

import csv
import math
import platform
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtkern.bench import measure

STATUS = ("ok", "WRONG", "failed", "skipped")
"""Measured; its results disagree, so not timed; it raised an error; not installed, or too slow for the budget."""


@dataclass(frozen=True)
class Row:
    """One candidate in one case and direction. Times in milliseconds; ratios are medians over the rounds that have
    both, with their 90 % interval; numbers that were not measured are NaN."""

    date: str
    commit: str
    machine: str
    versions: str
    threads: int
    malloc: str
    suite: str
    case: str
    op: str
    shape: str
    dtype: str
    direction: str
    candidate: str
    library: str
    status: str
    note: str
    rounds: int = 0
    p20_ms: float = math.nan
    p50_ms: float = math.nan
    p80_ms: float = math.nan
    bytes: int = 0
    gb_per_s: float = math.nan
    copy_share: float = math.nan
    """Of the rate of copy_ in the same rounds."""
    times_ours: float = math.nan
    """Its time over that of this project's first candidate in the same rounds."""
    times_ours_low: float = math.nan
    times_ours_high: float = math.nan
    peak_bytes: int = -1
    """Allocated at the peak of one call, above what was there before it; -1: not measured."""
    compile_s: float = math.nan
    command: str = ""


def figures(mine: list[float], copies: list[float], ours: list[float], bytes_: int, copy_bytes: int) -> dict[str, Any]:
    """The numbers of a row from the seconds of the rounds; NaN where a round left a candidate out."""
    timed = [seconds for seconds in mine if seconds == seconds]
    p50 = statistics.median(timed)
    made: dict[str, Any] = {
        "rounds": len(timed),
        "p20_ms": round(1e3 * float(np.quantile(timed, 0.2)), 4),
        "p50_ms": round(1e3 * p50, 4),
        "p80_ms": round(1e3 * float(np.quantile(timed, 0.8)), 4),
        "bytes": bytes_,
    }
    if bytes_:
        limit, _, _ = measure.median_ratio(mine, copies, bytes_ / copy_bytes)
        made |= {"gb_per_s": round(bytes_ / p50 / 1e9, 2), "copy_share": round(1 / limit, 4)}
    if any(a == a and b == b for a, b in zip(mine, ours, strict=True)):
        middle, low, high = measure.median_ratio(mine, ours)
        made |= {"times_ours": round(middle, 3), "times_ours_low": round(low, 3), "times_ours_high": round(high, 3)}
    return made


def library(candidate: str) -> str:
    """What a candidate that is of no other library belongs to."""
    return "trtkern" if candidate.startswith("trtkern") else f"torch {torch.__version__}"


def words(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def origin(device: torch.device) -> dict[str, Any]:
    """Of a row measured now in this process: date, commit, machine, versions, threads."""
    return {
        "date": measure.today(), "commit": measure.commit(), "machine": measure.machine(device),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def slug(name: str) -> str:
    """A machine's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def append(rows: Iterable[Row], path: Path) -> None:
    """Add rows to a CSV file, on the disk at once."""
    measure.append([asdict(row) for row in rows], path)


def check_writable(path: Path) -> None:
    """An OSError now, and not after the measurement, if rows cannot be added to the file; ValueError if it holds other
    rows."""
    fresh = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise OSError(f"--csv: expected a file that can be written, got {path}: {error.strerror}") from error
    if fresh:
        path.unlink()
        return
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), None)
    if header is None:
        path.unlink()
    elif header != [field.name for field in fields(Row)]:
        raise ValueError(f"--csv: expected {path} to be new or to hold rows of `trtkern bench`, got other columns")


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, or of all in a folder.

    Raises:
        OSError, ValueError: no such file, none in the folder, or other columns.
    """
    paths = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"--csv: expected a file of rows or a folder with some, got {path} without any; measure first")
    made = []
    for each in paths:
        with each.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != [field.name for field in fields(Row)]:
                raise ValueError(f"--csv: expected rows of `trtkern bench` in {each}, got other columns")
            made += [_row(line) for line in reader]
    return made


def _row(line: Mapping[str, str]) -> Row:
    kinds = {"int": int, "float": float, "str": str}
    return Row(**{field.name: kinds[str(field.type)](line[field.name]) for field in fields(Row)})
