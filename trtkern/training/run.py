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
    return found


def write_config(folder: Path, settings: Settings, layers: dict[str, str], kept: MemoryReport) -> None:
    """config.json: the resolved settings, versions, command line, the backend of each LIF layer, memory of a step."""
    config = {
        "settings": settings.to_json(),
        "backends": layers,
        "kept_for_backward": {
            "bytes": kept.measured,
            "predicted_bytes": kept.predicted,
            "unknown_bytes": kept.unknown,
            "neuron_steps": kept.neuron_steps,
        },
        "versions": versions(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else None,
        "command": sys.argv,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
