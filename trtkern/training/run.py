"""What a run writes into its folder besides the checkpoints."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trtkern import __version__
from trtkern.output.files import naming, parse, read_json, write
from trtkern.profiling import MemoryReport
from trtkern.training import plan as plans
from trtkern.training.folder import CONFIG, PLAN, read_plan
from trtkern.training.settings import Settings, settle
from trtkern.training.tally import Tally

METRICS, CURVES, RESULT = "metrics.jsonl", "curves.png", "result.json"
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


def write_config(
    folder: Path,
    settings: Settings,
    layers: dict[str, str],
    called: Sequence[str],
    kept: MemoryReport | None = None,
    resumed: Sequence[dict[str, Any]] = (),
    processes: int = 1,
) -> None:
    """config.json: the resolved settings, versions, the command that began the run (``called``, if the file has none),
    the backend of each LIF layer, memory of a step, how the run was resumed, and how many processes train."""
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
        "command": command(folder) or list(called),
        "resumed": list(resumed),
        "processes": processes,
    }
    write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def command(folder: Path) -> list[str]:
    """The command that began the run in ``folder``, as config.json has it."""
    return _noted(folder, "command", str)


def resumed(folder: Path) -> list[dict[str, Any]]:
    """How the run was resumed so far, as config.json has it."""
    return _noted(folder, "resumed", dict)


def _noted(folder: Path, name: str, kind: type) -> list[Any]:
    """That list of config.json; empty where there is none."""
    try:
        found = read_json(folder / CONFIG).get(name)
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) and all(isinstance(part, kind) for part in found) else []


def write_result(folder: Path, settings: Settings, epoch: int, splits: dict[str, dict[str, float]]) -> None:
    """result.json: the chosen epoch, of how many, by what it was chosen, and what its weights reach."""
    result = {"epoch": epoch, "epochs": settings.epochs, "select": settings.select, **splits, "versions": versions()}
    write(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json; None before the end of the run, or if it is damaged."""
    try:
        result = read_json(folder / RESULT)
    except (FileNotFoundError, ValueError):
        return None
    return result if _averages(result.get("test")) else None


def reopen(folder: Path) -> None:
    """Remove what only a run at its end has: it goes on."""
    for path in (folder / RESULT, folder / REPORT):
        with naming(path, "to remove"):
            path.unlink(missing_ok=True)


def config_of(folder: Path) -> Settings | None:
    """The settings of config.json; None where there is no such file.

    Raises:
        ValueError: it holds no settings, or some that no command line may have; the message names the file.
    """
    path = folder / CONFIG
    try:
        found = read_json(path).get("settings")
        if not isinstance(found, dict):
            raise ValueError('"settings" is missing')
        return Settings.from_json(found)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"--resume: expected the {CONFIG} of a run, got {path} ({error})") from None


def settings_of(folder: Path) -> Settings:
    """The settings of a run that was begun in ``folder``: those of config.json, else of its plan.

    Raises:
        ValueError: there is no run, or its files are damaged.
        RuntimeError: a plan that was never begun wants a device that this machine does not have.
    """
    if (found := config_of(folder)) is not None:
        return found
    try:
        plan = plans.checked(read_plan(folder))
    except ValueError as error:
        raise ValueError(f"{error} (in {folder / PLAN})") from None
    return settle(plan)


def read_metrics(folder: Path, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The good rows of metrics.jsonl, by epoch.

    Args:
        folder: the run folder.
        say: told about each line that is no row. Half a line at the end is not worth a word: a crash cuts it off.
    """
    path = folder / METRICS
    try:
        with naming(path, "a file that can be read"):
            *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate([*lines, last] if last else lines, 1):
        try:
            row = _row(line)
            if row["epoch"] in rows:
                raise ValueError(f"epoch {row['epoch']} has a row already")
        except ValueError as error:
            if say is not None and number <= len(lines):
                say(f"line {number} of {path} is no row of a run ({error}); it is left out")
        else:
            rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


def _row(line: bytes) -> dict[str, Any]:
    """A row; a ValueError says what is wrong with it."""
    row = parse(line)
    for name in ("epoch", "step"):
        if type(row.get(name)) is not int or row[name] < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {row.get(name)!r}")
    for name in ("lr", "seconds", "samples_per_s", "loader_share"):
        if not _finite(row.get(name)):
            raise ValueError(f"{name}: expected a finite number, got {row.get(name)!r}")
    measured = [name for name in ("train", "validation", "test") if name in row]
    for name in ("train", *measured):
        if not _averages(row.get(name)):
            raise ValueError(f"{name}: expected finite numbers of {', '.join(Tally.NAMES)}, got {row.get(name)!r}")
    if len(measured) < 2:
        raise ValueError("expected validation or test, got neither")
    return row


def _averages(found: Any) -> bool:
    """Whether that is what ``Tally.read`` gives."""
    parts = (*Tally.NAMES, "accuracy")
    return isinstance(found, dict) and all(
        _finite(found.get(part, 0.0 if part == "accuracy" else None)) for part in parts
    )


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def cut_metrics(
    folder: Path, epoch: int, last: dict[str, Any] | None, say: Callable[[str], None] | None = None
) -> None:
    """Make metrics.jsonl end where a checkpoint does: no row from ``epoch`` on but ``last``, the one that it holds."""
    rows = [row for row in read_metrics(folder, say) if row["epoch"] < epoch] + ([] if last is None else [last])
    write(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def differences(before: dict[str, str]) -> str:
    """Which versions are others than in ``before``, in words; empty if none."""
    now = versions()
    return ", ".join(f"{name} was {old}, is {now.get(name)}" for name, old in before.items() if now.get(name) != old)


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    path = folder / METRICS
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
