"""The one training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern.data import Dataset, Split
from trtkern.models import ConvSNN
from trtkern.nn import LossParts, SDTLoss, TETLoss, TRTLoss
from trtkern.profiling import MemoryReport, memory
from trtkern.training import checkpoint, run
from trtkern.training.settings import Settings
from trtkern.training.watch import StopSignal, Watch

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


class Tally:
    """Running sums of the loss parts and of correct answers, on the device: adding never waits for it."""

    NAMES = ("loss", "cross_entropy", "mse", "regularizer")

    def __init__(self, device: str) -> None:
        self._sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64, device=device)
        self.images = 0

    @torch.no_grad()
    def add(self, parts: tuple[Tensor, ...], logits: Tensor, target: Tensor) -> None:
        """One batch: its parts (means over the batch), its logits [T, B, C] and its labels [B]."""
        count = target.numel()
        correct = (logits.float().mean(0).argmax(1) == target).sum()
        self._sums += torch.stack([*(part.double() * count for part in parts), correct.double()])
        self.images += count

    def read(self) -> dict[str, float]:
        """Averages over the images, accuracy as a fraction."""
        values = [value / self.images for value in self._sums.tolist()]
        return dict(zip((*self.NAMES, "accuracy"), values, strict=True))


class Result(NamedTuple):
    """How a run ended: the rows of its epochs, and (epoch, step) where the user stopped it."""

    rows: list[dict[str, Any]]
    stopped: tuple[int, int] | None


def build_model(settings: Settings, shape: tuple[int, int, int], classes: int) -> ConvSNN:
    """The network of the settings, initialised from their seed, on their device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = ConvSNN(shape, settings.layers, classes, timesteps=settings.timesteps, backend=settings.backend)
    return model.to(settings.device)


def build_loss(settings: Settings, model: ConvSNN) -> TRTLoss | TETLoss | SDTLoss:
    """The loss of the settings."""
    options = settings.loss_options
    if settings.loss == "trt":
        return TRTLoss(model, lam=options["lam"], delta=options["delta"], eta=options["eta"])
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

        SIGINT and SIGTERM end it after the step that is under way, with a checkpoint.

        Raises:
            NonFiniteError: a NaN or Inf appeared; the last checkpoint written is a good one.
            OSError: the folder cannot be written.
        """
        observer = observer or Observer()
        self.kept = self.memory()
        run.write_config(folder, self.settings, self.watch.backends, self.kept)
        rows: list[dict[str, Any]] = []
        stopped = None
        observer.start(self)
        try:
            with StopSignal() as stop:
                for epoch in range(1, self.settings.epochs + 1):
                    row, done = self._epoch(epoch, observer, stop)
                    if done < self.steps:
                        stopped = (epoch, done)
                        self._save(folder, epoch, done, None)
                        break
                    row["test"] = self.evaluate(self.data.test)
                    self._save(folder, epoch, done, row["test"])
                    rows.append(row)
                    run.append_metrics(folder, row)
                    observer.epoch(row)
                    if stop.requested:
                        stopped = (epoch, done)
                        break
        finally:
            observer.close()
        return Result(rows, stopped)

    def _epoch(self, epoch: int, observer: Observer, stop: StopSignal) -> tuple[dict[str, Any], int]:
        """One epoch, or what there is of it when the user stops; its row and the steps made."""
        images, labels = self.data.train
        order = torch.randperm(images.shape[0], generator=self._shuffle)[: self.steps * self.batch_size]
        mirror = torch.rand(order.shape, generator=self._shuffle) < 0.5 if self.settings.flip else None
        order = order.to(images.device).view(self.steps, self.batch_size)
        mirror = None if mirror is None else mirror.to(images.device).view(order.shape)
        tally = Tally(self.settings.device)
        self.model.train()
        rate = self.optimizer.param_groups[0]["lr"]
        begin = shown = time.perf_counter()
        step = 0
        for step, index in enumerate(order, 1):
            batch = images[index]
            if mirror is not None:
                batch = torch.where(mirror[step - 1].view(-1, 1, 1, 1), batch.flip(-1), batch)
            total = self._step(batch, labels[index], tally, f"in epoch {epoch}, step {step}")
            now = time.perf_counter()
            if now - shown >= observer.interval or stop.requested:
                shown = now
                self.watch.check(total, f"by epoch {epoch}, step {step}")
                averages = tally.read()
                observer.step(epoch, step, {**averages, "samples_per_s": tally.images / (now - begin)})
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

    def _save(self, folder: Path, epoch: int, step: int, test: dict[str, float] | None) -> None:
        self.watch.check_weights(f"in epoch {epoch}, step {step}")
        metadata = {
            "settings": self.settings.to_json(),
            "shape": list(self.data.shape),
            "classes": list(self.data.classes),
            "epoch": epoch,
            "step": step,
            "test": test,
            "versions": run.versions(),
        }
        checkpoint.save(folder / checkpoint.NAME, checkpoint.Checkpoint(self.model.state_dict(), metadata))
