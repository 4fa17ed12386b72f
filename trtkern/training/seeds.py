"""The same run from several seeds: mean and standard deviation of what they reach."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from trtkern.output.files import write as write_whole

SUMMARY = "seeds.json"


def parse(text: str) -> list[int]:
    """ "0,1,2" as numbers.

    Raises:
        ValueError: no such list, or a seed that is there twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ValueError(f"--seeds: expected different integers of at least 0 such as 0,1,2, got {text!r}")
    return [int(part) for part in parts]


def summarise(rows: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Of {seed: {quantity: value}}: mean and standard deviation (of a sample: n - 1) of each quantity, and the rows."""
    quantities = list(next(iter(rows.values())))
    columns = {name: [row[name] for row in rows.values()] for name in quantities}
    return {
        "seeds": {str(seed): row for seed, row in rows.items()},
        "mean": {name: statistics.fmean(values) for name, values in columns.items()},
        "sd": {name: statistics.stdev(values) if len(values) > 1 else None for name, values in columns.items()},
    }


def shown(summary: dict[str, Any], figure: str) -> list[str]:
    """Mean and standard deviation of each quantity, in percent where the figure is "accuracy"."""
    scale, digits = (100, 2) if figure == "accuracy" else (1, 4)
    pairs = zip(summary["mean"].values(), summary["sd"].values(), strict=True)
    return [f"{scale * mean:.{digits}f}" + ("" if sd is None else f" ± {scale * sd:.{digits}f}") for mean, sd in pairs]


def write(folder: Path, summary: dict[str, Any]) -> None:
    """seeds.json."""
    write_whole(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
