"""Rows of bench/accuracy.csv from finished run folders of `trtkern train`.

trtkern train --seed 1 --run-dir runs/one
python bench/accuracy.py runs/one
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trtkern.bench.measure import ROOT, append, commit, machine, today


def row(folder: Path) -> dict[str, Any]:
    """What a run was asked for, where it ran and how it ended; a ValueError for one that did not end."""
    config = json.loads((folder / "config.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settings = config["settings"]
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder}: expected result.json, got {len(epochs)} epochs without it; let the run end first")
    result = json.loads((folder / "result.json").read_text())
    return {
        "date": today(),
        "commit": commit(),
        "machine": machine() if config["gpu"] is None else config["gpu"],
        "versions": f"python {config['versions']['python']}, torch {config['versions']['torch']}",
        "threads": settings["threads"],
        "backend": " ".join(sorted(set(config["backends"].values()))),
        "data": settings["data"],
        "loss": settings["loss"],
        "timesteps": settings["timesteps"],
        "seed": settings["seed"],
        "epochs": len(epochs),
        "train_accuracy": round(epochs[-1]["train"]["accuracy"], 4),
        "test_accuracy": round(result["test"]["accuracy"], 4),
        "train_seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
        "samples_per_s": round(sum(epoch["samples_per_s"] for epoch in epochs) / len(epochs)),
        "command": " ".join(config["command"]),
    }


def main() -> None:
    """Append a row a run and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "accuracy.csv", help="CSV to append rows to")
    options = parser.parse_args()
    try:
        rows = [row(folder) for folder in options.runs]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    append(rows, options.output)
    for made in rows:
        print(f"{made['command']}: test {made['test_accuracy']:.2%} after {made['train_seconds']} s")


if __name__ == "__main__":
    main()
