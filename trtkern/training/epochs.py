"""An epoch of a training: its steps, in which several processes may have to agree, and what is done at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from trtkern.data import Split
from trtkern.data.own import OwnDataset
from trtkern.data.samples import Loaded
from trtkern.nn import LossParts
from trtkern.parallel.job import Job
from trtkern.profiling.collectives import Timed, timed
from trtkern.profiling.firing.activity import problems
from trtkern.training import checkpoint, optimizers, selection
from trtkern.training.callbacks import CallbackError, Callbacks
from trtkern.training.keeping import Kept
from trtkern.training.loader import Batches, Loader
from trtkern.training.losses import Loss
from trtkern.training.measure import Measured, measure
from trtkern.training.observer import Observer
from trtkern.training.schedules import Schedule
from trtkern.training.step import Step
from trtkern.training.tally import Begun, Tally
from trtkern.training.together import Wishes
from trtkern.training.watch import StopSignal, refuse

SAVE_EVERY = 600.0
"""Seconds between two checkpoints within an epoch."""
SAMPLED = 3
"""Of several processes, the step of an epoch whose collectives are timed."""


class Epochs(Kept):
    """The epochs of a run: the part of the ``Trainer`` that makes its steps."""

    device: torch.device
    loss: Loss
    splits: Mapping[str, Split]
    watched: str
    callbacks: Callbacks
    schedule: Schedule
    batch_size: int
    _step: Step
    _rates: optimizers.Rates
    _tally: Tally
    _wanted: Callable[[bool], Wishes]
    """What this process wishes of the step that is under way."""
    _told: Wishes
    """What all of them do after it."""
    _when: str

    logits: Callable[[Tensor], Tensor]

    @property
    def batches(self) -> int:
        """Of an epoch: ``accumulate`` a step, but for the last step of a DataLoader."""
        images = self.data.train.images
        return images.steps if isinstance(images, Loaded) else self.steps * self.settings.accumulate

    @property
    def scored(self) -> bool:
        """Whether answers are classes, right or wrong."""
        return bool(self.data.classes)

    def _loader(self, split: Split, workers: int | None = None, job: Job | None = None, **more: Any) -> Loader:
        job = self.job if job is None else job
        workers = self.settings.workers if workers is None else workers
        time_first = self.data.time_first if isinstance(self.data, OwnDataset) else None
        classes = len(self.data.classes)
        return Loader(split, self.device, workers=workers, time_first=time_first, classes=classes, job=job, **more)

    def rate(self, step: int) -> float:
        """The learning rate of a step of the run, from 0; of an optimiser's first group where there are several."""
        return self._rate(self._rates.peaks[0], step)

    def _rate(self, peak: float, step: int) -> float:
        return self.schedule.rate(peak, step, self.steps, self.settings.epochs)

    def _epoch(self, epoch: int, observer: Observer, stop: StopSignal, folder: Path) -> tuple[dict[str, Any], int]:
        """One epoch, or what there is of it when the user stops; its row and the steps made."""
        self._drawn = self._drawing()
        plan = self.loader.draw(self.batches, self.batch_size, self._shuffle)
        self._tally.clear()
        begun, self._begun = self._begun, Begun()
        if begun.sums is not None:
            self._tally.restore(begun.sums)
        self.model.train()
        before = (epoch - 1) * self.steps
        step, self.loader.waited = begun.step, 0.0
        shown = saved = resumed = time.perf_counter()
        kept = begun.step
        begin = shown - begun.seconds
        share, sampled, sending = self.settings.accumulate, min(begun.step + SAMPLED, self.steps), 0.0

        def wanted(fails: bool = False) -> Wishes:
            now, first = time.perf_counter(), self.job.first
            late = first and now - saved >= SAVE_EVERY, first and now - shown >= observer.interval
            return Wishes(fails, stop.requested, *late)

        def ends() -> bool:  # alone: of several each makes all the batches of the steps that they make together
            return stop.requested and self.job.alone

        self._wanted = wanted
        with closing(self.loader.batches(plan, begun.step * share, self._changes, ends)) as batches:
            for step, ((images, labels), *more) in enumerate(_together(batches, share), begun.step + 1):
                self._when = f"in epoch {epoch}, step {step}"
                self._rates.set(partial(self._rate, step=before + step - 1))
                with self._timed(step == sampled) as took:
                    total = self._step(images, labels, self._tally, more)
                sending = sending if took is None else took.share
                if self.callbacks.steps:
                    self.callbacks.tell("step", self, epoch, step, total)
                told = wanted() if self.job.alone else self._told
                now = time.perf_counter()
                if told.shows or told.stops:
                    shown = now
                    whole = self._so_far(total, f"by epoch {epoch}, step {step}")
                    rate = whole.images / (now - begin)
                    observer.step(epoch, step, {**whole.read(), "samples_per_s": rate})
                if self.job.alone:
                    told = wanted()  # somebody may have wished to stop while it was shown
                if step < self.steps and (told.stops or told.saves):
                    self._save(folder, epoch, step, None, Begun(step, self._tally.state(), now - begin))
                    saved, kept = now, step
                if told.stops:
                    break
        if step < self.steps:  # stopped, perhaps while a batch was waited for
            if step > kept:
                self.watch.check(total, f"by epoch {epoch}, step {step}", self._tally.read())
                self._save(folder, epoch, step, None, Begun(step, self._tally.state(), time.perf_counter() - begin))
            return {}, step
        whole = self._so_far(total, f"by epoch {epoch}, step {step}")
        now = time.perf_counter()
        rate, loading = self._tally.images / (now - begin), self.loader.waited / (now - resumed)
        row = {
            "epoch": epoch, "step": self._made(epoch, step), "lr": self.rate(before), "train": whole.read(),
            "seconds": now - begin, "samples_per_s": whole.images / (now - begin), "loader_share": loading,
        }  # fmt: skip
        if not self.job.alone:
            own = {"samples_per_s": rate, "loader_share": loading, "communication_share": sending}
            row["processes"] = self.job.gathered(own)
        return row, step

    @contextmanager
    def _timed(self, wanted: bool) -> Iterator[Timed | None]:
        """Inside a step: of several processes, how long its collectives take."""
        if not wanted or self.job.alone:
            yield None
            return
        with timed(self.device) as took:
            yield took

    def _so_far(self, total: Tensor, when: str) -> Tally:
        """The sums of the epoch over all processes.

        Raises:
            NonFiniteError: a number is not finite, in one of them.
        """
        self._finite(self.watch.problem(total, self._tally.read()), when)
        return self._tally.over(self.job)

    def _end_epoch(self, folder: Path, row: dict[str, Any], observer: Observer) -> CallbackError | None:
        """Measure the watched split, keep the weights if they are the best, write the checkpoint; what a callback
        raised."""
        measured = self._measure(self.splits[self.watched], watch=1)
        row[self.watched] = measured.averages
        row["firing"] = {name: layer.mean for name, layer in measured.rates.items()}
        for line in problems(measured.rates):
            observer.note(f"epoch {row['epoch']}: {line}")
        observer.measured(cast(Any, self), row)
        failed = self._tell_epoch(row)
        epoch, every = row["epoch"], self.settings.keep_every
        best = None if self.settings.select == "last" else selection.better(self.best, row, self.watched)
        stays = every is not None and epoch % every == 0
        if best or stays:
            weights = self._weights(f"in epoch {epoch}, step {self.steps}")
            made = checkpoint.Checkpoint(weights, self._metadata(epoch, self.steps, row), {})
            self.best = best or self.best
            for wanted, save in ((best, selection.keep), (stays, selection.keep_epoch)):
                if wanted and self.job.first:
                    self._writer.write(save, folder, made, row["step"])
        self._save(folder, row["epoch"], self.steps, row)
        return failed

    def _tell_epoch(self, row: dict[str, Any]) -> CallbackError | None:
        """What a callback raised: the epoch is kept first. What they add to the row must be JSON's."""
        measured = dict(row)
        try:
            self.callbacks.tell("epoch", self, row)
            json.dumps(row)
        except (CallbackError, TypeError, ValueError) as error:
            row.clear()
            row.update(measured)
            if isinstance(error, CallbackError):
                return error
            return CallbackError(f"callback: expected what epoch adds to the row to be of JSON's types, got {error}")
        return None

    def _look(self, parts: LossParts) -> None:
        """Before the update, so that the weights stay good; on a GPU it would wait, and is done now and then."""
        place = None if parts.total.is_cuda else self.watch.problem(parts.total, parts._asdict())
        if self.job.alone:
            refuse([place], self._when)
            return
        self._told = self._wanted(place is not None).of_all(self.job)
        if self._told.fails:
            self._finite(place, self._when)

    def evaluate(self, split: Split) -> dict[str, float]:
        """Averages over a split in eval mode, of the same loss parts as in training."""
        return self._measure(split, watch=0).averages

    def _measure(self, split: Split, watch: int | None) -> Measured:
        """A split in eval mode; the firing rates are those of the first ``watch`` batches, None being all."""
        self.model.eval()
        self._same_buffers()
        loader = self._loader(split)
        tally = Tally(str(self.device), len(self.data.classes), self.scored)
        measured = measure(self.logits, self.model, self.loss, loader, self.batch_size, tally, watch)
        self._finite(self.watch.problem(measured.last, measured.averages), "in an evaluation")
        return measured


def _together(batches: Batches, share: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """So many batches at once; the last ones may be fewer."""
    while found := list(islice(batches, share)):
        yield found
