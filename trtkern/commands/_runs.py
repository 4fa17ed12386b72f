"""What ``trtkern train`` and ``trtkern evaluate`` do with runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trtkern.commands._common import FAILURE, INTERRUPTED, Quit, console, need, quits, user_errors
from trtkern.data import load
from trtkern.data.folder import DataError
from trtkern.training import checkpoint, observer, plots, progress, report, run, selection
from trtkern.training import folder as folders
from trtkern.training import seeds as several
from trtkern.training.loop import Result, Trainer
from trtkern.training.pages import keep_pages
from trtkern.training.selection import Best
from trtkern.training.settings import Settings, resolve_device, settle
from trtkern.training.watch import NonFiniteError

FAILURES = (NonFiniteError, OSError, DataError)
"""What may befall a run, and says all that a user needs."""


def prepare(settings: Settings, download: bool = False) -> Trainer:
    """A trainer of these settings, with this process set to them."""
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run on a GPU as well
    keep_pages()
    crops = [step["size"] for step in settings.augment if step["name"] == "resized_crop"]
    data = load(
        settings.data, settings.data_dir, download, timesteps=settings.timesteps, resize=settings.dvs_resize,
        cache=settings.cache_dir, class_list=settings.class_list, size=crops[0] if crops else 224,
        progress=progress.Making(console()),
    )  # fmt: skip
    return Trainer(settings, data)


def begin(plan: dict[str, Any], folder: Path, download: bool) -> int:
    """Run a plan in its new folder, which goes again if the user can put something right."""
    try:
        with user_errors():
            trainer = prepare(settle(plan), download)
    except Quit:
        folders.discard(folder)
        raise
    return run_one(trainer, folder)


def show(plan: dict[str, Any], download: bool) -> int:
    """What a run would be."""
    with user_errors():
        trainer = prepare(settle(plan), download)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    lines = [
        json.dumps(trainer.settings.to_json(), indent=2),
        str(trainer.model),
        str(trainer.loss),
        str(trainer.memory()),
        f"{parameters:,} parameters, {trainer.steps} steps of {trainer.batch_size} images an epoch, "
        f"{trainer.settings.epochs} epochs",
    ]
    console().print("\n\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0


def series(plan: dict[str, Any], seeds: str, folder: Path, download: bool) -> int:
    """A run of every seed in a folder of its own; those that are done are only evaluated again."""
    rows = {}
    with user_errors():
        plans = [{**plan, "seed": seed} for seed in several.parse(seeds)]
    for one in plans:
        place = folder / f"seed{one['seed']}"
        with user_errors():
            settings = settle(one)
            trainer = prepare(settings, download)
            if not (place / folders.PLAN).exists():
                folders.create(one, str(place))
                left = True
            elif run.settings_of(place) == settings:
                folders.hold(place)
                left = take_over(trainer, place)
            else:
                raise ValueError(
                    f"--seeds: expected a run of these settings in {place}, got others; name another --run-dir"
                )
        if left:
            run_one(trainer, place)
        with quits(FAILURE, *FAILURES):
            train = trainer.evaluate(trainer.splits["train"])["accuracy"]
        result = run.read_result(place)
        assert result is not None
        test = result["test"]["accuracy"]
        rows[one["seed"]] = {"train": train, "test": test, "gap": train - test}
    summary = several.summarise(rows)
    with quits(FAILURE, OSError):
        several.write(folder, summary)
    console().print(progress.series(summary, f"{plan['recipe']}, {plan['loss']} loss, {len(rows)} seeds"))
    return 0


def resume(folder: Path) -> int:
    """Go on from the newest good checkpoint; without one, from the start."""
    with user_errors():
        folders.hold(folder)
        settings = run.settings_of(folder)
        resolve_device(settings.device)
    if settings.tensorboard:
        need("tensorboard", "tensorboard")
    with user_errors():
        trainer = prepare(settings)
        if not take_over(trainer, folder):
            raise ValueError(
                f"--resume: expected a run that is not at its end, got all {settings.epochs} epochs in {folder}"
            )
    return run_one(trainer, folder)


def take_over(trainer: Trainer, folder: Path) -> bool:
    """Bring the trainer to where the run in ``folder`` is; whether there is something left to do.

    Where nothing is left the model has the chosen weights.
    """
    out = console()

    def say(line: str) -> None:
        out.print(f"resume: {line}", highlight=False, soft_wrap=True, markup=False)

    if not checkpoint.found(folder):
        run.cut_metrics(folder, 1, None)
        selection.forget(folder, 0)
        say(f"there is no checkpoint in {folder} yet; starts from the beginning")
        return True
    saved = checkpoint.load(folder, say)
    trainer.resume(saved, folder)
    if trainer.finished(saved) and run.read_result(folder) is not None and (folder / run.REPORT).exists():
        trainer.restore(selection.chosen(folder, trainer.best))
        return False
    epoch, step = saved.metadata["epoch"], saved.metadata["step"]
    say(f"goes on after epoch {epoch}, step {step} of {trainer.steps}")
    if different := run.differences(saved.metadata["versions"]):
        say(f"the same numbers to the last bit are not promised: {different}")
    return True


def run_one(trainer: Trainer, folder: Path) -> int:
    """Train to the end, or to where the user stops it; curves, report and table."""
    out = console()
    settings = trainer.settings
    counts = {name: len(split.labels) for name, split in trainer.splits.items()}
    held = f", {counts['validation']:,} validation" if "validation" in counts else ""
    out.print(
        f"{settings.data}: {counts['train']:,} training{held} and {counts['test']:,} test images, "
        f"{trainer.steps} steps an epoch, run folder {folder}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    title = f"{settings.data}, {settings.loss} loss, T={settings.timesteps}, seed {settings.seed}"
    try:
        with quits(FAILURE, *FAILURES):
            result = trainer.run(folder, _observers(trainer, folder))
            if result.rows:
                plots.learning_curves(result.rows, title, folder / run.CURVES)
            if result.final is not None:
                _report(folder, title, trainer, result)
    except Quit as error:
        saved = checkpoint.found(folder)
        kept = f"; the last good checkpoint is {saved[0]}" if saved else "; no checkpoint was written"
        raise Quit(f"{error}{kept}", error.status) from error
    if result.rows:
        out.print(progress.summary(trainer, result, folder))
    if result.stopped:
        epoch, step = result.stopped
        raise Quit(
            f"stopped in epoch {epoch} after step {step} of {trainer.steps}, as asked; "
            f"`trtkern train --resume {folder}` goes on, `trtkern evaluate {folder}` tries its weights", INTERRUPTED,
        )  # fmt: skip
    return 0


def _report(folder: Path, title: str, trainer: Trainer, result: Result) -> None:
    final, kept = result.final, trainer.kept
    assert final is not None
    report.write(
        folder / run.REPORT, title=title, settings=trainer.settings.to_json(), rows=result.rows, final=final.splits,
        versions=run.versions(), confusion=final.confusion, classes=trainer.data.classes, activity=final.rates,
        memory=None if kept is None else kept.summary(f" a step of {trainer.batch_size} images"),
        command=run.command(folder),
    )  # fmt: skip


def _observers(trainer: Trainer, folder: Path) -> observer.Observer:
    shown = progress.observer(console())
    if not trainer.settings.tensorboard:
        return shown
    from trtkern.training.tensorboard import TensorBoard

    return observer.Observers([shown, TensorBoard(folder)])


def weights(path: Path) -> checkpoint.Checkpoint:
    """The weights that a run chose, or chose so far; or those of a file."""
    newest = checkpoint.load(path)
    best = newest.metadata.get("best") if path.is_dir() else None
    return newest if best is None else selection.chosen(path, Best(*best))


def with_options(
    settings: Settings, data_dir: str | None, backend: str | None, device: str | None, threads: int | None
) -> Settings:
    """The settings of a training with what the user wants otherwise."""
    return replace(
        settings,
        data_dir=settings.data_dir if data_dir is None else data_dir,
        backend=settings.backend if backend is None else backend,
        device=resolve_device(settings.device if device is None else device),
        threads=settings.threads if threads is None else threads,
        compile=False,  # an evaluation has no steps
        cuda_graphs=False,
    )
