"""What a run writes into its folder besides the checkpoints."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trtkern import __version__
from trtkern.profiling import MemoryReport
from trtkern.training.folder import named, read_plan, write
from trtkern.training.settings import Settings, settle

METRICS, CONFIG, CURVES, RESULT = "metrics.jsonl", "config.json", "curves.png", "result.json"
REPORT = "report.html"


def versions() -> dict[str, str]:
    """Of everything that has a say in the numbers."""
    found = {"trtkern": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found["torch"] = str(torch.__version__)  # says which build it is, which its package's name may not
    for package in ("triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    found["instruction set"] = torch.backends.cpu.get_cpu_capability()
    return found


def write_config(folder: Path, settings: Settings, layers: dict[str, str], kept: MemoryReport | None = None) -> None:
    """config.json: the resolved settings, versions, command line, the backend of each LIF layer, memory of a step."""
    memory = (
        None
        if kept is None
        else {
            "bytes": kept.measured,
            "predicted_bytes": kept.predicted,
            "unknown_bytes": kept.unknown,
            "neuron_steps": kept.neuron_steps,
        }
    )
    config = {
        "settings": settings.to_json(),
        "backends": layers,
        "kept_for_backward": memory,
        "versions": versions(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else None,
        "command": command(folder),
    }
    write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def command(folder: Path) -> list[str]:
    """The command that began the run in ``folder``: that of config.json, or this one."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError):
        return ["trtkern", *sys.argv[1:]]


def write_result(folder: Path, settings: Settings, epoch: int, splits: dict[str, dict[str, float]]) -> None:
    """result.json: the chosen epoch, by what it was chosen, and what its weights reach."""
    result = {"epoch": epoch, "select": settings.select, **splits, "versions": versions()}
    write(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json; None before the end of the run, or if it is damaged."""
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def settings_of(folder: Path) -> Settings:
    """The settings of a run that was begun in ``folder``: those of config.json, else of its plan.

    Raises:
        ValueError: there is no run, or its files are damaged.
        RuntimeError: a plan that was never begun wants a device that this machine does not have.
    """
    path = folder / CONFIG
    if not path.exists():
        return settle(read_plan(folder))
    try:
        return Settings.from_json(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: expected the {CONFIG} of a run, got {path} ({error})") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to a line that was cut off by a crash."""
    rows: list[dict[str, Any]] = []
    path = folder / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_metrics(folder: Path, epoch: int, last: dict[str, Any] | None) -> None:
    """Make metrics.jsonl end where a checkpoint does: no row from ``epoch`` on but ``last``, the one that it holds."""
    rows = [row for row in read_metrics(folder) if row["epoch"] < epoch] + ([] if last is None else [last])
    write(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def differences(before: dict[str, str]) -> str:
    """Which versions are others than in ``before``, in words; empty if none."""
    now = versions()
    return ", ".join(f"{name} was {old}, is {now.get(name)}" for name, old in before.items() if now.get(name) != old)


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    path = folder / METRICS
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise named(error, path) from None
