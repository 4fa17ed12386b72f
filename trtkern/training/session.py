"""A run from its folder's first file to its report: begun, taken up where it was ended, and shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trtkern.parallel.job import Job
from trtkern.training import checkpoint, figures, report, resuming, run, selection
from trtkern.training import folder as folders
from trtkern.training.measure import Result
from trtkern.training.observer import Observer
from trtkern.training.options import FREE
from trtkern.training.settings import Settings

if TYPE_CHECKING:
    from trtkern.training.loop import Trainer


def title(settings: Settings) -> str:
    """A run in words."""
    return f"{settings.data}, {settings.loss} loss, T={settings.timesteps}, seed {settings.seed}"


def perform(trainer: Trainer, folder: Path, told: Observer) -> Result:
    """Train to the end, or to where the user stops it; curves and report.

    Raises:
        RuntimeError, OSError: as ``Trainer.run``.
    """
    result = trainer.run(folder, told)
    if not trainer.job.first:
        return result
    if result.rows:
        figures.learning_curves(result.rows, title(trainer.settings), folder / run.CURVES)
    if result.final is not None:
        _report(trainer, folder, result)
    return result


def _report(trainer: Trainer, folder: Path, result: Result) -> None:
    final, kept = result.final, trainer.kept
    assert final is not None
    report.write(
        folder / run.REPORT, title=title(trainer.settings), settings=trainer.settings.to_json(), rows=result.rows,
        final=final.splits, versions=run.versions(), confusion=final.confusion if trainer.scored else None,
        classes=trainer.data.classes, activity=final.rates,
        memory=None if kept is None else kept.summary(f" a step of {trainer.part_size} images"),
        command=run.command(folder),
    )  # fmt: skip


def take_up(
    trainer: Trainer, folder: Path, saved: checkpoint.Checkpoint | None, before: Settings, other: str | None,
    say: Callable[[str], None],
) -> bool:  # fmt: skip
    """Bring a trainer to where the run in ``folder`` is; whether there is something left to do.

    Where nothing is left the model has the chosen weights.

    Args:
        trainer: of the settings with which the run goes on.
        folder: the run folder, held.
        saved: its newest good checkpoint; None begins anew.
        before: the settings that the run had.
        other: how the data set differs from that of the training, if it does.
        say: told what the user should know.

    Raises:
        ValueError: a checkpoint of another network or other classes.
    """
    first = trainer.job.first
    if saved is None:
        if first:
            run.cut_metrics(folder, 1, None)
            selection.forget(folder, 0)
        say(f"there is no checkpoint in {folder} yet; starts from the beginning")
    else:
        trainer.resume(saved, folder, say)
        if trainer.job.told(_ended(trainer, saved, folder)):
            trainer.restore(trainer.chosen(folder))
            return False
        say(f"goes on after epoch {saved.metadata['epoch']}, step {saved.metadata['step']} of {trainer.steps}")
        processes = saved.metadata.get("processes", 1), trainer.job.world_size
        for line in resuming.notes(before, trainer.settings, saved.metadata["versions"], other, processes):
            say(line)
    if first:
        run.reopen(folder)
    epoch, step = (0, 0) if saved is None else (saved.metadata["epoch"], saved.metadata["step"])
    changed = resuming.differences(before, trainer.settings)
    now = {"epoch": epoch, "step": step, "changed": changed, "other_data": other, "command": trainer.command}
    trainer.history = [*run.resumed(folder), now]
    return True


def _ended(trainer: Trainer, saved: checkpoint.Checkpoint, folder: Path) -> bool:
    """Whether the run has all its epochs, their result and its report."""
    if not trainer.finished(saved) or (result := run.read_result(folder)) is None:
        return False
    epochs = trainer.settings.epochs
    return result.get("epochs", epochs) == epochs and (folder / run.REPORT).exists()


def opened(job: Job, folder: Path, say: Callable[[str], None]) -> tuple[checkpoint.Checkpoint | None, Settings]:
    """The newest good checkpoint of the run in ``folder``, and the settings that it had: what the first process finds.

    Args:
        job: the processes that go on with it; the first one holds the folder from now on.
        folder: the run folder.
        say: told about each damaged checkpoint.

    Raises:
        ValueError, OSError: no run, one that another process is at, or damaged files.
    """
    saved, before = None, {}
    if job.first:
        folders.hold(folder)
        saved = checkpoint.load(folder, say) if checkpoint.found(folder) else None
        before = (run.settings_of(folder) if saved is None else resuming.settings_in(saved)).to_json()
    saved = checkpoint.spread(job, saved)
    return saved, Settings.from_json(job.told(before))


def fit(trainer: Trainer, folder: Path | None, show: bool) -> Result:
    """``Trainer.fit``."""
    torch.set_num_threads(trainer.settings.threads)
    plan, job = trainer.settings.to_json(), trainer.job
    show = show and job.first
    if folder is None or not job.told(_holds_run(folder)):
        if trainer.kept is not None:
            raise RuntimeError(
                "fit: expected a new Trainer for a new run, got one that has trained already, with the weights of that "
                "run; make another one"
            )
        named = None if folder is None else str(folder)
        place = job.told(folders.create(plan, named) if job.first else folder)
        assert place is not None
        return _performed(trainer, place, show)
    lines: list[str] = []
    saved, before = opened(job, folder, lines.append)
    different = resuming.differences(before, trainer.settings)
    if other := {name: pair for name, pair in different.items() if name not in FREE}:
        raise ValueError(
            f"fit: expected a run of these settings in {folder}, got others: {resuming.words(other)}; name another "
            f"folder"
        )
    if saved is not None and trainer.files is not None and (files := resuming.other_files(saved, trainer.files)):
        raise ValueError(
            f"fit: expected the data of the training, got others: {files}; put them back, or name another folder"
        )
    left = take_up(trainer, folder, saved, before, None, lines.append)
    if show:
        for line in lines:
            print(f"fit: {line}")
    if left:
        return _performed(trainer, folder, show)
    if show:
        print(f"fit: the run in {folder} is at its end; nothing was trained")
    return Result(run.read_metrics(folder), None, trainer.finish(folder))


def _performed(trainer: Trainer, folder: Path, show: bool) -> Result:
    result = perform(trainer, folder, _observer(show))
    if result.stopped and show:
        epoch, step = result.stopped
        print(
            f"fit: stopped in epoch {epoch} after step {step} of {trainer.steps}, as asked; the same program goes on "
            f"with the run in {folder}"
        )
    return result


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (folders.PLAN, run.CONFIG))


def _observer(show: bool) -> Observer:
    """What shows a run."""
    if not show:
        return Observer()
    from trtkern.output.console import console
    from trtkern.training import progress

    return progress.observer(console())
