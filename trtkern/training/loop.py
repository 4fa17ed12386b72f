"""The one training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtkern.data import Dataset, Split
from trtkern.data.augment import Pipeline
from trtkern.nn import LossParts
from trtkern.profiling import MemoryReport, memory
from trtkern.profiling.firing.activity import problems
from trtkern.training import checkpoint, resuming, run, selection, snapshot
from trtkern.training.build import build_loss, build_model, build_optimizer, rate_factor
from trtkern.training.loader import Loader
from trtkern.training.measure import Final, Measured, Result, measure
from trtkern.training.observer import Observer
from trtkern.training.selection import Best
from trtkern.training.settings import Settings
from trtkern.training.step import DTYPES, CapturedStep, Step
from trtkern.training.tally import Begun, Tally
from trtkern.training.watch import StopSignal, Watch

SAVE_EVERY = 600.0
"""Seconds between two checkpoints within an epoch."""
_NEEDED = ("epoch", "step", "row", "best", "seconds", "versions")
"""What the metadata of a checkpoint must have to go on from it."""


class Trainer:
    """A model with its loss, optimiser and data, ready to run.

    Args:
        settings: what to do.
        data: the data set, on any device. With ``settings.select`` "validation" a share of its training images is
            held out first, then ``train_images`` are drawn from the rest.
        files: what ``trtkern.data.fingerprint`` says of the data set, for the checkpoints; None is not known.

    Raises:
        ValueError, RuntimeError: the backend that was asked for cannot run this model here.
    """

    def __init__(self, settings: Settings, data: Dataset, files: dict[str, Any] | None = None) -> None:
        self.settings, self.files = settings, files
        self.device = torch.device(settings.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # streams and graphs are those of the current one
        held_out: Split | None = None
        if settings.select == "validation":
            data, held_out = data.hold_out(settings.validation)
        data = data if settings.train_images is None else data.fewer(settings.train_images)
        self.data = data.to(self.device)
        self.splits = {"train": self.data.train, "test": self.data.test}
        if held_out is not None:
            self.splits["validation"] = Split(held_out.images.to(self.device), held_out.labels.to(self.device))
        self.watched = "test" if held_out is None else "validation"
        self.model = build_model(settings, data.shape, len(data.classes))
        self.loss = build_loss(settings, self.model)
        count = len(self.data.train.labels)
        self.batch_size = min(settings.batch_size, count)
        self.steps = count // self.batch_size
        self.optimizer = build_optimizer(settings, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.loader = Loader(self.data.train, self.device, Pipeline.from_recipe(settings.augment), settings.workers)
        self.watch = Watch(self.model, lambda: self.logits(self._sample(1)))
        self._network = torch.compile(self.model) if settings.compile else self.model
        kind = CapturedStep if settings.cuda_graphs else Step
        self._step = kind(self._training_logits, self.loss, self.optimizer, self.scaler, settings.clip, self._look)
        self._tally = Tally(settings.device)
        self._shuffle = torch.Generator().manual_seed(settings.seed)
        self._drawn = self._shuffle.get_state()  # before the order of the epoch was drawn
        self._changes = torch.Generator().manual_seed(settings.seed)
        self._changes.manual_seed(int(torch.randint(2**62, (), generator=self._changes)))  # not those of the order
        self._first, self._begun, self._when = 1, Begun(), ""
        self._base = 0  # steps made before the epoch ``_first``
        self._resumed: checkpoint.Checkpoint | None = None
        self.history: list[dict[str, Any]] = []
        """How the run was resumed, for config.json."""
        self.best: Best | None = None
        self.kept: MemoryReport | None = None

    def rate(self, step: int) -> float:
        """The learning rate of a step of the run, from 0."""
        return self.settings.lr * rate_factor(step, self.steps * self.settings.epochs, self.settings.warmup)

    def _made(self, epoch: int, step: int) -> int:
        """The steps that the run has made after that one."""
        return self._base + (epoch - self._first) * self.steps + step

    def logits(self, images: Tensor) -> Tensor:
        """Logits [T, B, C] in float32 of raw images, computed in the training's precision."""
        with self._autocast():
            return self.model(self.data.normalise(images)).float()

    def _training_logits(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self._network(self.data.normalise(images)).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, DTYPES[self.settings.amp], enabled=self.settings.amp != "none")

    def _look(self, parts: LossParts) -> None:
        """Before the update, so that the weights stay good; on a GPU it would wait, and is done now and then."""
        if not parts.total.is_cuda:
            self.watch.check(parts.total, self._when, parts._asdict())

    def _sample(self, count: int) -> Tensor:
        """The first training images, as a batch."""
        first = Split(self.data.train.images[:count], self.data.train.labels[:count])
        return next(Loader(first, self.device).whole(count))[0]

    def memory(self) -> MemoryReport:
        """What the network keeps for the backward pass of one step; nothing is changed by looking."""
        with self._autocast():
            return memory(self.model, self.data.normalise(self._sample(self.batch_size)))

    def run(self, folder: Path, observer: Observer | None = None) -> Result:
        """Train, writing config.json, metrics.jsonl and a checkpoint after each epoch into ``folder``.

        Within a long epoch a checkpoint is written every ``SAVE_EVERY`` seconds. SIGINT and SIGTERM end it after the
        step that is under way, with a checkpoint. After ``resume`` it goes on where that checkpoint was written. At the
        end the chosen weights are measured once, and stay in the model.

        Raises:
            NonFiniteError: a NaN or Inf appeared; the last checkpoint written is a good one.
            OSError: the folder cannot be written.
        """
        observer = observer or Observer()
        if self._resumed is None:
            torch.manual_seed(self.settings.seed)
        else:
            snapshot.restore_random(self._resumed.state)
        run.write_config(folder, self.settings, self.watch.backends, resumed=self.history)
        rows = run.read_metrics(folder)
        self.kept = self.memory()
        run.write_config(folder, self.settings, self.watch.backends, self.kept, self.history)
        stopped, final = None, None
        observer.start(self)
        try:
            with StopSignal() as stop:
                for epoch in range(self._first, self.settings.epochs + 1):
                    row, done = self._epoch(epoch, observer, stop, folder)
                    if done < self.steps:
                        stopped = (epoch, done)
                        break
                    self._end_epoch(folder, row, observer)
                    rows.append(row)
                    run.append_metrics(folder, row)
                    observer.epoch(row)
                    if stop.requested:
                        stopped = (epoch, done)
                        break
            if stopped is None:
                final = self.finish(folder)
                observer.final(self, final)
        finally:
            observer.close()
        return Result(rows, stopped, final)

    def _epoch(self, epoch: int, observer: Observer, stop: StopSignal, folder: Path) -> tuple[dict[str, Any], int]:
        """One epoch, or what there is of it when the user stops; its row and the steps made."""
        self._drawn = self._shuffle.get_state()
        plan = self.loader.draw(self.steps, self.batch_size, self._shuffle)
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
        with closing(self.loader.batches(plan, begun.step, self._changes, lambda: stop.requested)) as batches:
            for step, (images, labels) in enumerate(batches, begun.step + 1):
                self._when = f"in epoch {epoch}, step {step}"
                self._step.set_rate(self.rate(before + step - 1))
                total = self._step(images, labels, self._tally)
                now = time.perf_counter()
                if now - shown >= observer.interval or stop.requested:
                    shown = now
                    averages = self._tally.read()
                    self.watch.check(total, f"by epoch {epoch}, step {step}", averages)
                    observer.step(epoch, step, {**averages, "samples_per_s": self._tally.images / (now - begin)})
                if step < self.steps and (stop.requested or now - saved >= SAVE_EVERY):
                    self._save(folder, epoch, step, None, Begun(step, self._tally.state(), now - begin))
                    saved, kept = now, step
                if stop.requested:
                    break
        if step < self.steps:  # stopped, perhaps while a batch was waited for
            if step > kept:
                self.watch.check(total, f"by epoch {epoch}, step {step}", self._tally.read())
                self._save(folder, epoch, step, None, Begun(step, self._tally.state(), time.perf_counter() - begin))
            return {}, step
        averages = self._tally.read()
        self.watch.check(total, f"by epoch {epoch}, step {step}", averages)
        now = time.perf_counter()
        row = {
            "epoch": epoch, "step": self._made(epoch, step), "lr": self.rate(before), "train": averages,
            "seconds": now - begin, "samples_per_s": self._tally.images / (now - begin),
            "loader_share": self.loader.waited / (now - resumed),
        }  # fmt: skip
        return row, step

    def _end_epoch(self, folder: Path, row: dict[str, Any], observer: Observer) -> None:
        """Measure the watched split, keep the weights if they are the best, write the checkpoint."""
        measured = self._measure(self.splits[self.watched], watch=1)
        row[self.watched] = measured.averages
        row["firing"] = {name: layer.mean for name, layer in measured.rates.items()}
        for line in problems(measured.rates):
            observer.note(f"epoch {row['epoch']}: {line}")
        observer.measured(self, row)
        epoch, every = row["epoch"], self.settings.keep_every
        best = None if self.settings.select == "last" else selection.better(self.best, row, self.watched)
        stays = every is not None and epoch % every == 0
        if best or stays:
            self.watch.check_weights(f"in epoch {epoch}, step {self.steps}")
            made = checkpoint.Checkpoint(self.model.state_dict(), self._metadata(epoch, self.steps, row), {})
            if best:
                self.best = best
                selection.keep(folder, made, row["step"])
            if stays:
                selection.keep_epoch(folder, made, row["step"])
        self._save(folder, row["epoch"], self.steps, row)

    def finish(self, folder: Path) -> Final:
        """Take the chosen weights of the run in ``folder``, which is at its end, and measure them once."""
        self.restore(selection.chosen(folder, self.best))
        test = self._measure(self.splits["test"], watch=None)
        splits = {"test": test.averages}
        if self.watched != "test":
            splits[self.watched] = self.evaluate(self.splits[self.watched])
        epoch = self.settings.epochs if self.best is None else self.best.epoch
        final = Final(epoch, splits, test.confusion, test.rates)
        run.write_result(folder, self.settings, final.epoch, final.splits)
        return final

    def evaluate(self, split: Split) -> dict[str, float]:
        """Averages over a split in eval mode, of the same loss parts as in training."""
        return self._measure(split, watch=0).averages

    def _measure(self, split: Split, watch: int | None) -> Measured:
        """A split in eval mode; the firing rates are those of the first ``watch`` batches, None being all."""
        self.model.eval()
        loader = Loader(split, self.device, workers=self.settings.workers)
        tally = Tally(self.settings.device, len(self.data.classes))
        measured = measure(self.logits, self.model, self.loss, loader, self.batch_size, tally, watch)
        self.watch.check(measured.last, "in an evaluation", measured.averages)
        return measured

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the weights of a checkpoint.

        Raises:
            ValueError: it belongs to another network, to images of another shape or to other classes.
        """
        if (shape := saved.metadata.get("shape")) != list(self.data.shape):
            raise ValueError(f"checkpoint: expected one for images {self.data.shape}, got {shape}")
        resuming.same_classes(saved, self.data.classes)
        try:
            self.model.load_state_dict(saved.model)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: expected one for this network; {error}") from None

    def finished(self, saved: checkpoint.Checkpoint) -> bool:
        """Whether the run was at its end when that checkpoint was written."""
        return saved.metadata["epoch"] == self.settings.epochs and saved.metadata["row"] is not None

    def resume(self, saved: checkpoint.Checkpoint, folder: Path, say: Callable[[str], None] | None = None) -> None:
        """Take over a checkpoint of the run in ``folder``: the next ``run`` goes on bitwise, on a CPU with the same
        versions. What the folder holds from after that checkpoint is removed.

        Args:
            saved: the checkpoint.
            folder: the run folder.
            say: told about each line of metrics.jsonl that is no row.

        Raises:
            ValueError: it belongs to another network or other classes, or has no more than weights.
        """
        if missing := [name for name in _NEEDED if name not in saved.metadata]:
            raise ValueError(f"checkpoint: expected the state of a run, got one without {', '.join(missing)}")
        epoch, step, row = (saved.metadata[name] for name in ("epoch", "step", "row"))
        self.restore(saved)
        snapshot.restore(saved, self.optimizer, self.scaler)
        self._shuffle.set_state(saved.state["shuffle"])
        self._changes.set_state(saved.state["changes"])
        self._resumed = saved
        self.best = None if saved.metadata["best"] is None else Best(*saved.metadata["best"])
        steps = saved.metadata.get("steps", self.steps)
        made = saved.metadata.get("made", (epoch - 1) * steps + step)
        selection.forget(folder, made)
        run.cut_metrics(folder, epoch, row, say)
        if row is not None:
            self._first, self._base = epoch + 1, made
        elif steps == self.steps:
            self._first, self._base = epoch, made - step
            self._begun = Begun(step, saved.state["sums"], saved.metadata["seconds"])
        else:  # other images: the epoch begins anew
            self._first, self._base = epoch, made

    def _metadata(self, epoch: int, step: int, row: dict[str, Any] | None) -> dict[str, Any]:
        """What rebuilds the network, and where the run is."""
        return {
            "settings": self.settings.to_json(),
            "shape": list(self.data.shape),
            "classes": list(self.data.classes),
            "data": self.files,
            "epoch": epoch,
            "step": step,
            "steps": self.steps,
            "made": self._made(epoch, step),
            "row": row,
            "versions": run.versions(),
        }

    def _save(
        self, folder: Path, epoch: int, step: int, row: dict[str, Any] | None, begun: Begun | None = None
    ) -> None:
        self.watch.check_weights(f"in epoch {epoch}, step {step}")
        # Within an epoch its order is drawn again when the run is resumed.
        drawn = self._shuffle.get_state() if begun is None else self._drawn
        state, loop = snapshot.capture(self.optimizer, self.scaler)
        state |= {"shuffle": drawn, "changes": self._changes.get_state()}
        if begun is not None and begun.sums is not None:
            state["sums"] = begun.sums
        metadata = {
            **self._metadata(epoch, step, row),
            "seconds": 0.0 if begun is None else begun.seconds,
            "best": self.best,
            "loop": loop,
        }
        made = checkpoint.Checkpoint(self.model.state_dict(), metadata, state)
        checkpoint.save(folder, made, self._made(epoch, step))
