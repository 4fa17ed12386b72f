"""What a person sees of a run: a line an epoch, on a terminal a moving bar below, and a table at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from trtkern.training import checkpoint, run, seeds, selection
from trtkern.training.loop import Result, Trainer
from trtkern.training.observer import Observer

# Which parts a loss has besides its total.
PARTS = {
    "trt": {"cross_entropy": "CE", "mse": "MSE", "regularizer": "R"},
    "tet": {"cross_entropy": "CE", "mse": "MSE"},
}
"""Of another loss its total says all."""
COLUMNS = {"validation": "val", "test": "test"}


class Lines(Observer):
    """A line an epoch, and one every half minute within a long one: for files, pipes and logs."""

    interval = 30.0

    def __init__(self, console: Console) -> None:
        self.console = console
        self.parts: dict[str, str] = {}
        self._noted: set[str] = set()

    def start(self, trainer: Trainer) -> None:
        """How the blocks run, what a step keeps in memory, and the header."""
        if trainer.plan is not None:
            self._print(f"{trainer.plan}\n")
        if trainer.kept is not None:
            self._print(trainer.kept.summary(f" a step of {trainer.part_size} images"))
        self.parts, self.figure = PARTS.get(trainer.settings.loss, {}), trainer.figure
        self.epochs, self.steps, self.watched = trainer.settings.epochs, trainer.steps, trainer.watched
        names = "".join(f"{name:>9}" for name in ("loss", *self.parts.values()))
        figure = "acc" if self.figure == "accuracy" else "loss"
        columns = f"{f'train {figure}':>12}{f'{COLUMNS[self.watched]} {figure}':>11}"
        self._print(f"{'epoch':>9}{names}{columns}{'samples/s':>12}", style="bold")

    def epoch(self, row: dict[str, Any]) -> None:
        """The line: training averages, then both accuracies."""
        train, watched = row["train"], row[self.watched]
        self._print(
            f"{row['epoch']:>4}/{self.epochs:<4}{self._losses(train, 9)}{shown(train, self.figure):>11} "
            f"{shown(watched, self.figure):>10} {row['samples_per_s']:>11,.0f}"
        )
        if (fisher := row.get("fisher")) and fisher["centroid"] is not None:
            self._print(
                f"{'':9} information centroid {fisher['centroid']:.3f} of {len(fisher['information'])} steps "
                f"({fisher['samples']} images, {fisher['seconds']:.1f} s)"
            )

    def step(self, epoch: int, step: int, averages: dict[str, float]) -> None:
        """How far the epoch is, with its averages so far."""
        self._print(f"{epoch:>4}/{self.epochs:<4} step {step}/{self.steps}: {self._state(averages)}")

    def note(self, line: str) -> None:
        """The line, once."""
        what = line.partition(": ")[2]
        if what not in self._noted:
            self._noted.add(what)
            self._print(f"     note: {line}", style="yellow")

    def _state(self, averages: dict[str, float]) -> str:
        parts = "  ".join(f"{label} {averages[name]:.4f}" for name, label in {"loss": "loss", **self.parts}.items())
        scored = f"  acc {averages['accuracy']:.2%}" if "accuracy" in averages else ""
        return f"{parts}{scored}  {averages['samples_per_s']:,.0f} samples/s"

    def _losses(self, averages: dict[str, float], width: int) -> str:
        return "".join(f"{averages[name]:>{width}.4f}" for name in ("loss", *self.parts))

    def _print(self, line: str, style: str | None = None) -> None:
        # Plain text as it is: no markup, no wrapping, no highlighting of numbers.
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


class Live(Lines):
    """The same lines above a bar that moves with every step."""

    interval = 0.2

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("epoch 1", state="")

    def start(self, trainer: Trainer) -> None:
        """The header and the bar."""
        super().start(trainer)
        self._progress.update(self._task, total=self.epochs * self.steps)
        self._progress.start()

    def step(self, epoch: int, step: int, averages: dict[str, float]) -> None:
        """Moves the bar, with the averages of the epoch so far."""
        self._move(f"epoch {epoch}/{self.epochs}", (epoch - 1) * self.steps + step, self._state(averages))

    def epoch(self, row: dict[str, Any]) -> None:
        """Prints the line and moves the bar to the end of the epoch."""
        super().epoch(row)
        self._move(f"epoch {row['epoch']}/{self.epochs}", row["step"], "")

    def _move(self, description: str, completed: int, state: str) -> None:
        self._progress.update(self._task, description=description, completed=completed, state=state)

    def close(self) -> None:
        """Removes the bar."""
        self._progress.stop()


class Making:
    """Says every few seconds how far a data set is made or read."""

    EVERY = 5.0

    def __init__(self, console: Console) -> None:
        self._console, self._said = console, time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if now - self._said >= self.EVERY:
            self._said = now
            self._console.print(f"reading {what}: {done:,} of {total:,}", highlight=False, soft_wrap=True)


def observer(console: Console) -> Observer:
    """The one that suits the console."""
    return Live(console) if console.is_terminal else Lines(console)


def facts(title: str, rows: dict[str, str]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def shown(averages: dict[str, float], figure: str) -> str:
    """The accuracy in per cent, or a loss."""
    return f"{averages[figure]:.2%}" if figure == "accuracy" else f"{averages[figure]:.4g}"


def series(summary: dict[str, Any], title: str, figure: str = "accuracy") -> Table:
    """Accuracies, or losses, of the runs of several seeds, in evaluation mode, with mean and standard deviation."""
    unit, scale, digits = ("%", 100, 2) if figure == "accuracy" else ("loss", 1, 4)
    table = Table("seed", *(f"{name} ({unit})" for name in summary["mean"]), title=title, title_justify="left")
    for seed, row in summary["seeds"].items():
        table.add_row(seed, *(f"{scale * value:.{digits}f}" for value in row.values()))
    table.add_section()
    table.add_row("mean", *seeds.shown(summary, figure))
    return table


def scores(values: dict[str, float], loss: str, images: int) -> dict[str, str]:
    """An evaluation of the test images as rows of a table: the accuracy with its counts, the loss with its parts."""
    rows = {}
    if "accuracy" in values:
        correct = round(values["accuracy"] * images)
        rows["test accuracy"] = f"{values['accuracy']:.2%} ({correct:,} of {images:,})"
    parts = ", ".join(f"{label} {values[name]:.4f}" for name, label in PARTS.get(loss, {}).items())
    rows["test loss"] = f"{values['loss']:.4f}" + (f" ({parts})" if parts else "")
    return rows


def place(trainer: Trainer) -> str:
    """What the LIF layers run on."""
    threads = trainer.settings.threads
    where = f"{trainer.settings.device}, {threads} CPU thread{'s' if threads > 1 else ''}"
    return f"{', '.join(trainer.watch.used())} on {where}"


def summary(trainer: Trainer, result: Result, folder: Path) -> Table:
    """The table at the end of a run; of one that was stopped, without what only the end has."""
    settings = trainer.settings
    last = result.rows[-1]
    seconds = sum(row["seconds"] for row in result.rows)
    images = round(sum(row["samples_per_s"] * row["seconds"] for row in result.rows))
    waited = sum(row["seconds"] * row["loader_share"] for row in result.rows) / seconds
    parameters = sum(p.numel() for p in trainer.model.parameters())
    rows: dict[str, str] = {}
    if result.final is not None:
        rows |= scores(result.final.splits["test"], settings.loss, len(trainer.data.test.images))
        rows["weights"] = f"of epoch {result.final.epoch}, {CHOICES[settings.select]}"
    if "validation" in last:
        chosen = last["validation"] if result.final is None else result.final.splits["validation"]
        rows[f"validation {trainer.figure}"] = shown(chosen, trainer.figure)
    elif result.final is None:
        rows |= scores(last["test"], settings.loss, len(trainer.data.test.images))
    rows |= {
        f"train {trainer.figure}": f"{shown(last['train'], trainer.figure)} in epoch {last['epoch']}",
        "speed": f"{images / seconds:,.0f} samples/s ({seconds:.1f} s of training, {len(result.rows)} epochs; "
        f"{waited:.0%} of it waiting for data)",
        "model": f"{parameters:,} parameters, T={settings.timesteps}, {settings.loss} loss",
        "LIF backend": place(trainer),
        "run folder": str(folder),
        "files": ", ".join(path.name for path in _files(folder)),
    }
    return facts(f"{settings.data}, seed {settings.seed}", rows)


CHOICES = {"validation": "the best on the held-out images", "test": "the best on the test images", "last": "the last"}


def _files(folder: Path) -> list[Path]:
    """What a user looks for in a run folder."""
    weights = checkpoint.found(folder, selection.BEST)[:1] or checkpoint.found(folder)[:1]
    others = (folder / name for name in (run.METRICS, run.RESULT, run.REPORT, run.CURVES, run.CONFIG))
    return [*weights, *(path for path in others if path.exists())]
