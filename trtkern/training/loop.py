"""The one training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern.data import Dataset, Split
from trtkern.data.augment import Pipeline
from trtkern.models import SpikingNetwork
from trtkern.models.build import build
from trtkern.nn import LossParts, SDTLoss, TETLoss, TRTLoss
from trtkern.profiling import MemoryReport, memory
from trtkern.training import checkpoint, run, snapshot
from trtkern.training.settings import Settings
from trtkern.training.tally import Begun, Tally
from trtkern.training.watch import StopSignal, Watch

SAVE_EVERY = 600.0
"""Seconds between two checkpoints within an epoch."""
EVALUATION_BATCH = 500
"""Images at once in an evaluation; fixed, so that one repeated later rounds in the same way."""


class Observer:
    """What a loop tells while it runs; this one is deaf. ``progress.py`` has the ones that show something."""

    interval = 0.25
    """Seconds between two calls of ``step``; each reads the running sums, which on a GPU waits for it."""

    def start(self, trainer: Trainer) -> None:
        """Before the first epoch."""

    def step(self, epoch: int, step: int, averages: dict[str, float]) -> None:
        """Within an epoch: the averages so far, as in a row's "train"."""

    def epoch(self, row: dict[str, Any]) -> None:
        """After an epoch: the row of metrics.jsonl."""

    def close(self) -> None:
        """At the end, however it comes."""


class Result(NamedTuple):
    """How a run ended: the rows of its epochs, and (epoch, step) where the user stopped it."""

    rows: list[dict[str, Any]]
    stopped: tuple[int, int] | None


def build_model(settings: Settings, shape: tuple[int, int, int], classes: int) -> SpikingNetwork:
    """The network of the settings, initialised from their seed, on their device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        options = {**settings.model, "timesteps": settings.timesteps, "backend": settings.backend}
        model = build(options.pop("name"), shape, classes, **options)
    return model.to(settings.device)


def build_loss(settings: Settings, model: SpikingNetwork) -> TRTLoss | TETLoss | SDTLoss:
    """The loss of the settings."""
    options = settings.loss_options
    if settings.loss == "trt":
        return TRTLoss(model, **options)
    return TETLoss(lam=options["lam"]) if settings.loss == "tet" else SDTLoss()


class Trainer:
    """A model with its loss, optimiser and data, ready to run.

    Args:
        settings: what to do.
        data: the data set, on any device.

    Raises:
        ValueError, RuntimeError: the backend that was asked for cannot run this model here.
    """

    def __init__(self, settings: Settings, data: Dataset) -> None:
        self.settings = settings
        data = data if settings.train_images is None else data.fewer(settings.train_images)
        self.data = data.to(torch.device(settings.device))
        self.model = build_model(settings, data.shape, len(data.classes))
        self.loss = build_loss(settings, self.model)
        images = self.data.train.images
        self.batch_size = min(settings.batch_size, images.shape[0])
        self.steps = images.shape[0] // self.batch_size
        self.watch = Watch(self.model, lambda: self.logits(images[:1]))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate)
        self._shuffle = torch.Generator().manual_seed(settings.seed)
        self._drawn = self._shuffle.get_state()  # before the order of the epoch was drawn
        self._augment = Pipeline.from_recipe(settings.augment)
        self._changes = torch.Generator().manual_seed(settings.seed)
        self._changes.manual_seed(int(torch.randint(2**62, (), generator=self._changes)))  # not those of the order
        self._first, self._begun = 1, Begun()
        self._resumed: checkpoint.Checkpoint | None = None
        self.kept: MemoryReport | None = None

    def _learning_rate(self, step: int) -> float:
        """A linear rise over the warm-up, then half a cosine down to 0; a factor of the settings' lr."""
        total = self.steps * self.settings.epochs
        warmup = round(total * self.settings.warmup)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def logits(self, images: Tensor) -> Tensor:
        """Logits [T, B, C] in float32 of raw images; bfloat16 inside with ``amp``."""
        with self._autocast():
            return self.model(self.data.normalise(images)).float()

    def _autocast(self) -> torch.autocast:
        device = torch.device(self.settings.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.settings.amp)

    def memory(self) -> MemoryReport:
        """What the network keeps for the backward pass of one step; nothing is changed by looking."""
        with self._autocast():
            return memory(self.model, self.data.normalise(self.data.train.images[: self.batch_size]))

    def run(self, folder: Path, observer: Observer | None = None) -> Result:
        """Train, writing config.json, metrics.jsonl and a checkpoint after each epoch into ``folder``.

        Within a long epoch a checkpoint is written every ``SAVE_EVERY`` seconds. SIGINT and SIGTERM end it after the
        step that is under way, with a checkpoint. After ``resume`` it goes on where that checkpoint was written.

        Raises:
            NonFiniteError: a NaN or Inf appeared; the last checkpoint written is a good one.
            OSError: the folder cannot be written.
        """
        observer = observer or Observer()
        if self._resumed is None:
            torch.manual_seed(self.settings.seed)
        else:
            snapshot.restore_random(self._resumed.state)
        run.write_config(folder, self.settings, self.watch.backends)
        rows = run.read_metrics(folder)
        self.kept = self.memory()
        run.write_config(folder, self.settings, self.watch.backends, self.kept)
        stopped = None
        observer.start(self)
        try:
            with StopSignal() as stop:
                for epoch in range(self._first, self.settings.epochs + 1):
                    row, done = self._epoch(epoch, observer, stop, folder)
                    if done < self.steps:
                        stopped = (epoch, done)
                        break
                    row["test"] = self.evaluate(self.data.test)
                    self._save(folder, epoch, done, row)
                    rows.append(row)
                    run.append_metrics(folder, row)
                    observer.epoch(row)
                    if stop.requested:
                        stopped = (epoch, done)
                        break
        finally:
            observer.close()
        return Result(rows, stopped)

    def _epoch(self, epoch: int, observer: Observer, stop: StopSignal, folder: Path) -> tuple[dict[str, Any], int]:
        """One epoch, or what there is of it when the user stops; its row and the steps made."""
        images, labels = self.data.train
        self._drawn = self._shuffle.get_state()
        order = torch.randperm(images.shape[0], generator=self._shuffle)[: self.steps * self.batch_size]
        order = order.to(images.device).view(self.steps, self.batch_size)
        tally = Tally(self.settings.device)
        begun, self._begun = self._begun, Begun()
        if begun.sums is not None:
            tally.restore(begun.sums)
        self.model.train()
        rate = self.settings.lr * self._learning_rate((epoch - 1) * self.steps)
        shown = saved = time.perf_counter()
        begin = shown - begun.seconds
        for step, index in enumerate(order[begun.step :], begun.step + 1):
            batch = self._augment(images[index], self._changes)
            total = self._step(batch, labels[index], tally, f"in epoch {epoch}, step {step}")
            now = time.perf_counter()
            if now - shown >= observer.interval or stop.requested:
                shown = now
                self.watch.check(total, f"by epoch {epoch}, step {step}")
                averages = tally.read()
                observer.step(epoch, step, {**averages, "samples_per_s": tally.images / (now - begin)})
            if step < self.steps and (stop.requested or now - saved >= SAVE_EVERY):
                self._save(folder, epoch, step, None, Begun(step, tally.state(), now - begin))
                saved = now
            if stop.requested:
                break
        self.watch.check(total, f"by epoch {epoch}, step {step}")
        seconds = time.perf_counter() - begin
        row = {"epoch": epoch, "step": (epoch - 1) * self.steps + step, "lr": rate, "train": tally.read()}
        return {**row, "seconds": seconds, "samples_per_s": tally.images / seconds}, step

    def _step(self, images: Tensor, target: Tensor, tally: Tally, when: str) -> Tensor:
        """Forward, backward, update; the total loss."""
        logits = self.logits(images)
        parts = self.loss.parts(logits, target, regularize=False)
        self.optimizer.zero_grad(set_to_none=True)
        parts.total.backward()
        penalty = parts.regularizer + self.loss.add_grad_()
        total = parts.total.detach() + penalty
        if not total.is_cuda:
            self.watch.check(total, when)  # before the update: the weights stay good
        self.optimizer.step()
        self.schedule.step()
        tally.add(LossParts(total, parts.cross_entropy, parts.mse, penalty), logits, target)
        return total

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[str, float]:
        """Averages over a split in eval mode, of the same loss parts as in training."""
        self.model.eval()
        tally = Tally(self.settings.device)
        batches = (tensor.split(EVALUATION_BATCH) for tensor in split)
        for images, target in zip(*batches, strict=True):
            logits = self.logits(images)
            parts = self.loss.parts(logits, target)
            tally.add(parts, logits, target)
        self.watch.check(parts.total, "in an evaluation")
        return tally.read()

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the weights of a checkpoint.

        Raises:
            ValueError: it belongs to another network or to images of another shape.
        """
        if tuple(saved.metadata["shape"]) != self.data.shape:
            raise ValueError(f"checkpoint: expected one for images {self.data.shape}, got {saved.metadata['shape']}")
        try:
            self.model.load_state_dict(saved.model)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: expected one for this network; {error}") from None

    def finished(self, saved: checkpoint.Checkpoint) -> bool:
        """Whether the run was at its end when that checkpoint was written."""
        return (saved.metadata["epoch"], saved.metadata["step"]) == (self.settings.epochs, self.steps)

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Take over a checkpoint of this run: the next ``run`` goes on bitwise, on a CPU with the same versions.

        Raises:
            ValueError: it belongs to another network, or the run is at its end.
        """
        epoch, step = saved.metadata["epoch"], saved.metadata["step"]
        if self.finished(saved):
            raise ValueError(f"--resume: expected a run that is not at its end, got one with all {epoch} epochs")
        self.restore(saved)
        snapshot.restore(saved, self.optimizer, self.schedule)
        self._shuffle.set_state(saved.state["shuffle"])
        self._changes.set_state(saved.state["changes"])
        self._resumed = saved
        if step < self.steps:
            self._first, self._begun = epoch, Begun(step, saved.state["sums"], saved.metadata["seconds"])
        else:
            self._first = epoch + 1

    def _save(
        self, folder: Path, epoch: int, step: int, row: dict[str, Any] | None, begun: Begun | None = None
    ) -> None:
        self.watch.check_weights(f"in epoch {epoch}, step {step}")
        # Within an epoch its order is drawn again when the run is resumed.
        drawn = self._shuffle.get_state() if begun is None else self._drawn
        state, loop = snapshot.capture(self.optimizer, self.schedule)
        state |= {"shuffle": drawn, "changes": self._changes.get_state()}
        if begun is not None and begun.sums is not None:
            state["sums"] = begun.sums
        metadata = {
            "settings": self.settings.to_json(),
            "shape": list(self.data.shape),
            "classes": list(self.data.classes),
            "epoch": epoch,
            "step": step,
            "seconds": 0.0 if begun is None else begun.seconds,
            "row": row,
            "loop": loop,
            "versions": run.versions(),
        }
        made = checkpoint.Checkpoint(self.model.state_dict(), metadata, state)
        checkpoint.save(folder, made, (epoch - 1) * self.steps + step)
