"""The run folder: where it is, and what is written there."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trtkern import __version__
from trtkern.profiling import MemoryReport
from trtkern.training import checkpoint
from trtkern.training.settings import Settings

METRICS, CONFIG, CURVES = "metrics.jsonl", "config.json", "curves.png"


def create(settings: Settings, run_dir: str | None) -> Path:
    """Make the run folder: ``run_dir``, or the first free runs/<data>-<loss>-seed<k>[-n]. Never one that holds a run.

    Raises:
        ValueError: ``run_dir`` holds something already.
        OSError: it cannot be made or written.
    """
    if run_dir is not None:
        folder = Path(run_dir)
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--run-dir: expected an empty or new folder, got {folder}, which holds files")
        _make(folder, exist_ok=True)
        return folder
    base = Path("runs") / f"{settings.data}-{settings.loss}-seed{settings.seed}"
    number = 1
    while True:
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            _make(folder, exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return folder


def _make(folder: Path, exist_ok: bool) -> None:
    """``mkdir -p`` and a trial of writing there."""
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        if not exist_ok and folder.is_dir():
            raise
        raise OSError(f"--run-dir: expected a folder that can be written, got {folder}, which is a file") from None
    except OSError as error:
        raise OSError(
            f"--run-dir: expected a folder that can be written, got {folder} ({error.strerror}); name another"
        ) from None


def versions() -> dict[str, str]:
    """Of everything that has a say in the numbers."""
    found = {"trtkern": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "triton", "numpy"):
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
        "command": sys.argv,
    }
    checkpoint.write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read_settings(folder: Path) -> Settings:
    """The settings of a run that was begun in ``folder``.

    Raises:
        ValueError: there is no run, or its config.json is not one.
    """
    try:
        return Settings.from_json(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["settings"])
    except FileNotFoundError:
        raise ValueError(f"--resume: expected a run folder with {CONFIG}, got {folder}; start the run anew") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: expected the {CONFIG} of a run, got {folder / CONFIG} ({error})") from None


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
    checkpoint.write(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def differences(before: dict[str, str]) -> str:
    """Which versions are others than in ``before``, in words; empty if none."""
    now = versions()
    return ", ".join(f"{name} was {old}, is {now.get(name)}" for name, old in before.items() if now.get(name) != old)


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
