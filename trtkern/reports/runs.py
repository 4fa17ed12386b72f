"""Runs as a report shows them: what their folders hold, each with a short name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trtkern.analysis import Result
from trtkern.output import style
from trtkern.output.text import short
from trtkern.training import run
from trtkern.training.folder import reportable
from trtkern.training.settings import Settings, flat

LENGTH = 28
"""Characters of the name of a run."""
PLACE = ("data_dir", "cache_dir", "backend", "device", "threads", "workers", "keep_every", "tensorboard")
"""Settings that say where and how a run was computed, not what it is; nor does its seed make it another kind."""


class Run(NamedTuple):
    """What the folder of a run holds."""

    folder: Path
    label: str
    """Short, and of no other run on the page."""
    settings: Settings
    rows: list[dict[str, Any]]
    """Of metrics.jsonl."""
    result: dict[str, Any] | None
    """result.json; None before the end."""
    notes: list[str]
    """What is not as it should be, a sentence each."""

    @property
    def title(self) -> str:
        """The run in words."""
        at = self.settings
        return f"{at.data}, {at.loss} loss, T={at.timesteps}, seed {at.seed}"

    @property
    def held_out(self) -> str:
        """The split that was measured after each epoch."""
        return "validation" if any("validation" in row for row in self.rows) else "test"

    def final(self, split: str) -> dict[str, float] | None:
        """Averages of the chosen weights; of the training images those of its epoch, taken while the weights moved."""
        if self.result is None:
            return None
        if split == "train":
            return next((row["train"] for row in self.rows if row["epoch"] == self.result.get("epoch")), None)
        return self.result.get(split)


def read(paths: Sequence[str]) -> list[Run]:
    """The runs in these folders.

    Raises:
        ValueError: no run there, the same one twice, or more than a page can tell apart.
        OSError: files that cannot be read.
    """
    if len(paths) > len(style.SERIES):
        raise ValueError(
            f"report: expected at most {len(style.SERIES)} runs, as many as there are colours that can be told apart, "
            f"got {len(paths)}; make several pages"
        )
    folders = [Path(path) for path in paths]
    for index, folder in enumerate(folders):
        reportable(folder)
        if any(folder.samefile(other) for other in folders[:index]):
            raise ValueError(f"report: expected different runs, got {folder} twice")
    return [_read(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]


def _read(folder: Path, label: str) -> Run:
    notes: list[str] = []
    try:
        settings = run.settings_of(folder)
    except ValueError as error:
        raise ValueError(f"report: {str(error).removeprefix('--resume: ')}") from None
    rows = run.read_metrics(folder, lambda line: notes.append(f"{line[0].upper()}{line[1:]}."))
    result = run.read_result(folder)
    if result is None:
        done = f"{len(rows)} of {settings.epochs} epochs" if rows else f"none of {settings.epochs} epochs"
        notes.insert(0, f"The run is not finished: it has {done}, and no accuracy on the test images.")
    return Run(folder, label, settings, rows, result, notes)


def labels(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, with as much of the way to them as tells all of them apart, shortened."""
    ways = [folder.resolve().parts for folder in folders]
    count = 1
    while count < max(map(len, ways)) and len({way[-count:] for way in ways}) < len(ways):
        count += 1
    names = [short("/".join(way[-count:]).lstrip("/"), LENGTH) for way in ways]
    return [
        name if names.count(name) == 1 else f"{short(name, LENGTH - 4)} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{setting: its value in each run} of what the runs do not have in common, without what is no matter of theirs."""
    values = [flat(run.settings.to_json()) for run in runs]
    names = dict.fromkeys(name for found in values for name in found if name not in PLACE)
    shown = {name: ["" if name not in found else str(found[name]) for found in values] for name in names}
    return {name: cells for name, cells in shown.items() if len(set(cells)) > 1}


def trouble(runs: Sequence[Run]) -> list[str]:
    """What keeps the runs from being compared number by number, a sentence each."""
    said = []
    for name, words in (
        ("data", "The runs were trained on different data sets: their accuracies and losses are not comparable."),
        ("timesteps", "The runs have different numbers of time steps; curves over time end where their run ends."),
        ("select", "The runs chose their epochs in different ways (--select)."),
    ):
        if len({getattr(each.settings, name) for each in runs}) > 1:
            said.append(words)
    return said


class Analyses(NamedTuple):
    """One analysis of several runs."""

    name: str
    results: dict[str, Result]
    """By the labels of the runs that have it."""
    notes: list[str]
    """What is not as it should be, a sentence each."""
