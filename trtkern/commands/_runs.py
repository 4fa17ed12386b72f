"""What ``trtkern train`` and ``trtkern evaluate`` do with runs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trtkern.commands._common import FAILURE, INTERRUPTED, Quit, need, quits, user_errors
from trtkern.commands._json import tell
from trtkern.data import Dataset, difference, fingerprint
from trtkern.data.blank import blank
from trtkern.data.folder import DataError, read_classes
from trtkern.datasets import DATASETS
from trtkern.malloc import keep_pages
from trtkern.output.console import console
from trtkern.own import OwnError
from trtkern.parallel.job import ALONE, Job, JobError
from trtkern.training import (
    budget,
    checkpoint,
    gathering,
    observer,
    options,
    progress,
    resuming,
    run,
    selection,
    session,
)  # fmt: skip
from trtkern.training import folder as folders
from trtkern.training import ranks as ranked
from trtkern.training import seeds as several
from trtkern.training.loop import Trainer
from trtkern.training.selection import Best
from trtkern.training.settings import Settings, resolve_device, settle

SHOWN = 2**16
"""Values of images over all steps that a dry run shows the network, roughly."""
FAILURES = (RuntimeError, OSError, MemoryError, DataError, OwnError, checkpoint.DamagedError)
"""What may befall a run: numbers that are not finite, a dead worker, a full disk or device memory, bad files, code."""


def gather(settings: Settings, download: bool = False, job: Job = ALONE) -> tuple[Dataset, dict[str, Any]]:
    """The data set of these settings and its fingerprint, with this process set to them.

    Where several processes train together one of each machine makes or fetches the files, and the others find them.
    """
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run on a GPU as well
    keep_pages()
    with job.first_alone("data"):
        data = gathering.gather(settings, download, progress.Making(console()))
    return data, fingerprint(data)


def prepare(settings: Settings, download: bool = False, job: Job = ALONE) -> Trainer:
    """A trainer of these settings, with this process set to them."""
    return Trainer.of(settings, *gather(settings, download, job))


@contextmanager
def refusing(job: Job) -> Iterator[None]:
    """``user_errors`` of what several processes do: that another one of them is gone is no fault of the user's."""
    with user_errors(), quits(FAILURE, JobError), job.listening():
        yield


def begin(plan: dict[str, Any], folder: Path, download: bool, job: Job = ALONE) -> int:
    """Run a plan in its new folder, which goes again if the user can put something right."""
    try:
        with refusing(job):
            trainer = prepare(settle(plan), download, job)
    except Quit:
        if job.first:
            folders.discard(folder)
        raise
    return run_one(trainer, folder)


def show(plan: dict[str, Any], ranks: int | None = None) -> int:
    """What a run would be, told from what the data set is known to be: its files are not looked at.

    With ``ranks`` also what each of so many processes would have and send.
    """
    with user_errors():
        settings = settle(plan)
        torch.set_num_threads(settings.threads)
        known = DATASETS.get(settings.data)
        data: Dataset | None = None
        count: int | None
        if known is None:
            data, said = gathering.gather(settings), "The data set was made as a run makes it; nothing was trained."
            values, count = settings.timesteps * math.prod(data.shape), len(data.train.images)
        else:
            count = known.train
            channels, height, width = _blank(settings, 1).shape
            values = settings.timesteps * channels * height * width
        batch = min(settings.batch_size, settings.train_images or count or settings.batch_size)
        few = min(batch, max(2, SHOWN // values))  # the network runs once, and memory grows with the images
        if data is None:
            data = _blank(settings, few)
            said = (
                f"The data set was not looked at: its shape, {len(data.classes):,} classes and number of images are "
                f"those of {settings.data} as it is published."
            )
        else:
            data = replace(data, train=data.train.take(slice(few)))
        shown = replace(settings, select="last", train_images=None, accumulate=1, memory=None)
        trainer = Trainer.of(shown, data)
        blocks = [] if settings.memory is None or ranks is not None else [_blocks(trainer, settings, batch)]
        several = [] if ranks is None else [ranked.table(trainer, settings, batch, ranks)]
    parameters = sum(p.numel() for p in trainer.model.parameters())
    left = _images(settings, count) // batch // settings.accumulate
    steps = "as many steps as its files give" if count is None else f"{left:,} steps"
    more = "" if few == batch else f"; a step of {batch} images keeps {batch / few:.3g} times as much for them"
    kept = trainer.memory()
    tell(
        settings=settings.to_json(), parameters=parameters, images=batch, blocks=blocks, processes=several,
        memory={"images": few, "rows": kept.rows},
    )  # fmt: skip
    lines = [
        json.dumps(settings.to_json(), indent=2),
        str(trainer.model),
        str(trainer.loss),
        f"{kept}\n(of {few} images{more})",
        *blocks,
        *several,
        f"{parameters:,} parameters, {steps} of {batch} images an epoch, {settings.epochs} epochs",
        said,
    ]
    console().print("\n\n".join(lines), soft_wrap=True)
    return 0


def _blocks(trainer: Trainer, settings: Settings, batch: int) -> str:
    """How the blocks would run."""
    plan = budget.planned(trainer, settings, trainer.loader, budget.Share(1, batch))
    return f"{plan} (of {batch} images)"


def _blank(settings: Settings, count: int) -> Dataset:
    """What is known of a data set without its files."""
    listed = None if settings.class_list is None else len(read_classes(settings.class_list))
    crops = [step["size"] for step in settings.augment if step["name"] == "resized_crop"]
    size = crops[0] if crops else 224
    return blank(settings.data, count, timesteps=settings.timesteps, size=size, classes=listed)


def _images(settings: Settings, count: int | None) -> int:
    """Training images of an epoch, after those that are held out."""
    count = count or 0
    if settings.select == "validation":
        count -= round(count * settings.validation)
    return count if settings.train_images is None else min(count, settings.train_images)


def series(plan: dict[str, Any], seeds: str, folder: Path, download: bool, job: Job = ALONE) -> int:
    """A run of every seed in a folder of its own; those that are done are only evaluated again."""
    rows = {}
    with user_errors():
        plans = [{**plan, "seed": seed} for seed in several.parse(seeds)]
    for one in plans:
        place = folder / f"seed{one['seed']}"
        with refusing(job):
            settings = settle(one)
            if job.told(not (place / folders.PLAN).exists()):
                trainer, left = prepare(settings, download, job), True
                if job.first:
                    folders.create(one, str(place))
            else:
                _, before = session.opened(job, place, _teller("resume"))
                different = resuming.differences(before, settings)
                if other := {name: pair for name, pair in different.items() if name not in options.FREE}:
                    raise ValueError(
                        f"--seeds: expected a run of these settings in {place}, got others: {resuming.words(other)}; "
                        f"name another --run-dir"
                    )
                free = {name: getattr(settings, name) for name in different}
                trainer, left = go_on(place, free, download=download, job=job)
        if left:
            run_one(trainer, place)
        with quits(FAILURE, *FAILURES), job.listening():
            train = trainer.evaluate(trainer.splits["train"])[trainer.figure]
        result = job.told(run.read_result(place))
        assert result is not None
        test = result["test"][trainer.figure]
        rows[one["seed"]] = {"train": train, "test": test, "gap": train - test}
    summary = several.summarise(rows)
    if job.first:
        with quits(FAILURE, OSError):
            several.write(folder, summary)
    title = f"{plan['recipe']}, {plan['loss']} loss, {len(rows)} seeds"
    console().print(progress.series(summary, title, trainer.figure))
    return 0


def resume(folder: Path, given: dict[str, Any], other_data: bool = False, job: Job = ALONE) -> int:
    """Go on from the newest good checkpoint; without one, from the start.

    Args:
        folder: the run folder.
        given: what the user wants otherwise, of ``options.FREE``; None is nothing.
        other_data: go on also where the files are not those of the training.
        job: the processes that do.
    """
    with refusing(job):
        trainer, left = go_on(folder, given, other_data, job=job)
        if not left and job.kept("ran"):
            return 0  # one of its processes ended after all was written
        if not left:
            raise ValueError(
                f"--resume: expected a run that is not at its end, got all {trainer.settings.epochs} epochs in "
                f"{folder}; --epochs with more goes on"
            )
    return run_one(trainer, folder)


def go_on(
    folder: Path, given: dict[str, Any], other_data: bool = False, download: bool = False, job: Job = ALONE
) -> tuple[Trainer, bool]:
    """A trainer where the run in ``folder`` is; whether there is something left to do.

    Where nothing is left the model has the chosen weights.
    """
    say = _teller("resume")
    saved, before = session.opened(job, folder, say)
    now = resuming.settings(folder, saved, given).to_json() if job.first else {}
    settings = Settings.from_json(job.told(now))
    if settings.tensorboard:
        need("tensorboard", "tensorboard")
    data, files = gather(settings, download, job)
    other = None if saved is None else _other(saved, data, files, other_data, say)
    trainer = Trainer.of(settings, data, files)
    return trainer, session.take_up(trainer, folder, saved, before, other, say)


def _other(
    saved: checkpoint.Checkpoint, data: Dataset, files: dict[str, Any], allowed: bool, say: Callable[[str], None]
) -> str | None:
    """How the data set differs from that of the training, in words; None if it does not.

    Raises:
        ValueError: it has other classes, or other files and that is not ``allowed``.
    """
    resuming.same_classes(saved, data.classes)
    found = resuming.other_files(saved, files)
    if found is None:
        say("the checkpoint does not say which files it was trained on; they are not compared")
    elif found and not allowed:
        raise ValueError(
            f"--resume: expected the files of the training, got others: {found}; put them back, name their folder with "
            f"--data-dir, or go on with these by --other-data"
        )
    return found or None


def run_one(trainer: Trainer, folder: Path) -> int:
    """Train to the end, or to where the user stops it; curves, report and table."""
    out = console()
    settings = trainer.settings
    trainer.job.keep("ran", "1")
    counts = {name: len(split.images) for name, split in trainer.splits.items()}
    held = f", {counts['validation']:,} validation" if "validation" in counts else ""
    out.print(
        f"{settings.data}: {counts['train']:,} training{held} and {counts['test']:,} test images, "
        f"{trainer.steps} steps an epoch, run folder {folder}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    with user_errors():
        told = _observers(trainer, folder) if trainer.job.first else observer.Observer()
    try:
        with quits(FAILURE, *FAILURES):
            result = session.perform(trainer, folder, told)
    except Quit as error:
        saved = checkpoint.found(folder)
        kept = f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint was written"
        does = "goes on from it" if saved else "begins anew"
        again = f"`trtkern train --resume {shlex.quote(str(folder))}` {does}"
        raise Quit(f"{error}; {kept}: {again}", error.status) from error
    if result.rows:
        out.print(progress.summary(trainer, result, folder))
    if result.stopped:
        epoch, step = result.stopped
        place = shlex.quote(str(folder))
        raise Quit(
            f"stopped in epoch {epoch} after step {step} of {trainer.steps}, as asked; "
            f"`trtkern train --resume {place}` goes on, `trtkern evaluate {place}` tries its weights", INTERRUPTED,
        )  # fmt: skip
    return 0


def _observers(trainer: Trainer, folder: Path) -> observer.Observer:
    told = [progress.observer(console())]
    if trainer.settings.observe is not None:
        from trtkern.commands._observing import FisherObserver

        told.append(FisherObserver(trainer.settings.observe_every or 1))
    if trainer.settings.tensorboard:
        from trtkern.training.tensorboard import TensorBoard

        told.append(TensorBoard(folder))
    return observer.Observers(told)


def weights(path: Path) -> checkpoint.Checkpoint:
    """The weights that a run chose, or chose so far; or those of a file."""
    newest = checkpoint.load(path, _teller("evaluate"))
    best = newest.metadata.get("best") if path.is_dir() else None
    return newest if best is None else selection.chosen(path, Best(*best))


def to_evaluate(saved: checkpoint.Checkpoint, settings: Settings) -> Trainer:
    """A trainer with the weights of a checkpoint; it says where the test images are others than in training."""
    data, files = gather(settings)
    resuming.same_classes(saved, data.classes)
    before = saved.metadata.get("data")
    if before is not None and before["test"] != files["test"]:
        only = difference(before, {**before, "test": files["test"]})
        _teller("evaluate")(f"other test images than those of the training: {only}")
    trainer = Trainer.of(settings, data, files)
    trainer.restore(saved)
    return trainer


def _teller(command: str) -> Callable[[str], None]:
    """Says a line on the console."""
    out = console()

    def say(line: str) -> None:
        out.print(f"{command}: {line}", soft_wrap=True)

    return say


def with_options(settings: Settings, **given: Any) -> Settings:
    """The settings of a training with what the user wants otherwise; None is as in training."""
    wanted = {name: value for name, value in given.items() if value is not None}
    made = replace(settings, **wanted, compile=False, cuda_graphs=False)  # an evaluation has no steps
    return replace(made, device=resolve_device(made.device))
