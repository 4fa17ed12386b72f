"""The one training loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtkern import own
from trtkern.analysis import Samples
from trtkern.data import Dataset, Split, fingerprint
from trtkern.data.augment import Pipeline
from trtkern.data.mix import of as mixed
from trtkern.data.own import OwnDataset
from trtkern.data.samples import Loaded
from trtkern.parallel.job import ALONE, join
from trtkern.parallel.launch import divided
from trtkern.profiling import MemoryReport, memory
from trtkern.training import (
    budget,
    checkpoint,
    optimizers,
    outputs,
    run,
    schedules,
    session,
    snapshot,
    together,
)
from trtkern.training.build import build_loss, build_model
from trtkern.training.callbacks import Callbacks
from trtkern.training.epochs import Epochs
from trtkern.training.given import Given, asked
from trtkern.training.looked_at import drawn
from trtkern.training.measure import Final, Result
from trtkern.training.observer import Observer
from trtkern.training.selection import Best
from trtkern.training.settings import Settings
from trtkern.training.step import DTYPES, CapturedStep, Step
from trtkern.training.tally import Begun, Tally
from trtkern.training.together import Wishes
from trtkern.training.watch import StopSignal, Watch


class Trainer(Epochs):
    """Trains a network on data: your own, or those of trtkern by name.

    >>> trainer = Trainer(network, (train, test), loss="sdt", epochs=5)
    >>> result = trainer.fit("runs/mine")  # the same lines again go on with that run where it was ended

    Everything but the network and the data has a default. What is said by name can be said on the command line and in
    a recipe as well, and a run all of whose parts have names is one that ``trtkern evaluate``, ``analyze`` and
    ``profile`` can make again. An object is handed on as it is; the run can then go on with the same program alone.

    Args:
        model: what takes a batch and gives logits [T, B, C], for ``loss="mse"`` any outputs [T, B, ...]: a module,
            whose weights stay as they are at first; a function or class that makes one, called under the seed with
            ``model_options``, and with ``timesteps``, ``classes``, ``shape``, ``backend`` and ``exact_convolutions`` if
            it has parameters of these names; the name of one, "module:function"; or a name of ``trtkern.models.build``.
        data: pairs of a sample and its target: a pair of tensors, a torch Dataset with a length, a DataLoader, with its
            order and batches, or (train, test) of these; a function that gives such a thing, called with
            ``data_options``, or its name; a folder of files by class, "folder:DIR"; a name of
            ``trtkern.data.DATASETS``, or a ``trtkern.data.Dataset``. Of tensors and Datasets alone a fifth becomes the
            test split.
        loss: "trt", "tet" or "sdt" (``trtkern.nn``) for classes, "mse" for numbers, or a function of logits and targets
            that gives a 0-dim tensor. {"name": ..., ...} says what it takes.
        optimizer: "adam", "adamw", "sgd", a name of torch.optim, or {"name": ..., ...} with its arguments; a function
            of the weights; or an optimiser. The rates of the last two are the highest ones.
        schedule: a key of ``trtkern.names.SCHEDULES``, or {"name": ..., ...}; or a function of (step, steps of the
            run) that gives what the highest rate is multiplied with.
        lr: the highest learning rate.
        epochs: how often all samples are seen.
        batch_size: samples of a step; a DataLoader has its own.
        accumulate: batches whose gradients are averaged for one update.
        augment: a list of changes by name (``trtkern.data.augment``), or a function of (batch, generator).
        mix: "mixup", "cutmix", or {"name": ..., "alpha": ..., "p": ...}.
        callbacks: ``Callback`` objects.
        timesteps: T, which a network by name or a function that asks for it gets.
        classes: how many, or their names; None: what the data say, else as many as the network has outputs.
        time_first: whether samples are sequences [T, ...], which the network gets as [T, B, ...]; None: those of four
            axes, [T, C, H, W], are.
        collate: makes a batch of the items of a torch Dataset; None is torch's.
        name: of data that are objects, in the name of the run folder and in reports.
        model_options, data_options: what the functions of ``model`` and ``data`` take.
        more: every other option of ``trtkern train`` by its name: ``seed``, ``select``, ``validation``, ``clip``,
            ``warmup``, ``label_smoothing``, ``train_images``, ``device``, ``backend``, ``threads``, ``workers``,
            ``amp``, ``compile``, ``cuda_graphs``, ``keep_every``, ``tensorboard``, ``data_dir``, ...

    Raises:
        TypeError, ValueError: something that is not as said here, found before any step; the message says what was
            expected, what came and what to do. A function of yours that raises is named with its line.
        RuntimeError: a device or a backend that cannot run this network here.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        *,
        loss: Any = "trt",
        optimizer: Any = "adam",
        schedule: Any = "cosine",
        lr: float = 1e-3,
        epochs: int = 10,
        batch_size: int = 64,
        accumulate: int = 1,
        augment: Any = (),
        mix: Any = None,
        callbacks: Sequence[object] = (),
        timesteps: int = 4,
        classes: int | Sequence[str] | None = None,
        time_first: bool | None = None,
        collate: Callable[[list], Any] | None = None,
        name: str | None = None,
        model_options: dict[str, Any] | None = None,
        data_options: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        settings, dataset, given = asked(
            model, data, loss=loss, optimizer=optimizer, schedule=schedule, lr=lr, epochs=epochs, batch_size=batch_size,
            accumulate=accumulate, augment=augment, mix=mix, callbacks=callbacks, timesteps=timesteps, classes=classes,
            time_first=time_first, collate=collate, name=name, model_options=model_options or {},
            data_options=data_options or {}, **more,
        )  # fmt: skip
        self._set_up(settings, dataset, fingerprint(dataset), given)
        self.command = ["python", *sys.argv]

    @classmethod
    def of(
        cls, settings: Settings, data: Dataset, files: dict[str, Any] | None = None, given: Given | None = None
    ) -> Trainer:
        """Of settings, as ``trtkern train`` has them.

        Args:
            settings: what to do.
            data: the data set, on any device. With ``settings.select`` "validation" a share of its training images is
                held out first, then ``train_images`` are drawn from the rest.
            files: what ``trtkern.data.fingerprint`` says of the data set, for the checkpoints; None is not known.
            given: what there is as an object.

        Raises:
            ValueError, RuntimeError: as ``Trainer``.
        """
        trainer = cls.__new__(cls)
        trainer._set_up(settings, data, files, given or Given())
        return trainer

    def _set_up(self, settings: Settings, data: Dataset, files: dict[str, Any] | None, given: Given) -> None:
        self.settings, self.files, whole = settings, files, data
        self.job = join(settings.timeout)
        self.device = torch.device(settings.device)
        if self.device.type == "cuda" and not self.job.alone:
            self.device = torch.device("cuda", self.job.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # streams and graphs are those of the current one
        held_out: Split | None = None
        if settings.select == "validation":
            data, held_out = data.hold_out(settings.validation)
        data = data if settings.train_images is None else data.fewer(settings.train_images)
        self.data = data.to(self.device)
        self.model = build_model(settings, data.shape, len(data.classes) or None, given.model, self.device)
        together.expect_whole(self.model, self.job)
        self._class = own.class_of(self.model)
        self.loss = build_loss(settings, self.model, given.loss)
        self.watch = Watch(self.model, partial(self._tried, whole))
        self.splits = {"train": self.data.train, "test": self.data.test}
        if held_out is not None:
            self.splits["validation"] = held_out.to(self.device)
        self.watched = "test" if held_out is None else "validation"
        self._divide(settings)
        together.agree(self.job, settings, files, self.splits, self.model)
        few = self._loader(self.data.train.take(slice(2)), workers=0, job=ALONE)
        self.settings, self.plan = budget.settled(self, few, given.optimizer)
        settings = self.settings
        self._before = self.memory() if together.in_parts(self.job, settings) else None
        laid = together.laid(self.model, self.job, settings)
        self._network, apart = laid
        self.optimizer = optimizers.build(settings, self.model, given.optimizer)
        self._rates = optimizers.Rates(self.optimizer, settings.lr)
        total = self.steps * settings.epochs
        self.schedule = schedules.made(settings.schedule, settings.warmup, total, given.schedule)
        self.callbacks = Callbacks(given.callbacks)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        changes = Pipeline.from_recipe(settings.augment) if given.augment is None else given.augment
        self.loader = self._loader(self.data.train, augment=changes, mix=mixed(settings.mix))
        kind = CapturedStep if settings.cuda_graphs else Step
        self._step = kind(
            self._training_logits, self.loss, self.optimizer, self.scaler, settings.clip, self._look, apart
        )
        self._tally = Tally(str(self.device), scored=self.scored)
        self._wanted: Callable[[bool], Wishes] = Wishes
        self._told = Wishes()
        self._writer = checkpoint.Writer(beside=not self.job.alone or self.device.type == "cuda")
        self._shuffle = torch.Generator().manual_seed(settings.seed)
        self._drawn = self._drawing()  # before the order of the epoch was drawn
        self._changes = torch.Generator().manual_seed(settings.seed)
        self._changes.manual_seed(int(torch.randint(2**62, (), generator=self._changes)))  # not those of the order
        self._first, self._begun, self._when = 1, Begun(), ""
        self._base = 0  # steps made before the epoch ``_first``
        self._resumed: checkpoint.Checkpoint | None = None
        self._stop: StopSignal | None = None
        self.command = ["trtkern", *sys.argv[1:]]
        """What began the run, for config.json."""
        self.history: list[dict[str, Any]] = []
        """How the run was resumed, for config.json."""
        self.best: Best | None = None
        self.kept: MemoryReport | None = None

    def _divide(self, settings: Settings) -> None:
        """How many samples a batch has, and of these this process, and how many steps an epoch has."""
        images = self.data.train.images
        if isinstance(images, Loaded):
            self.batch_size, self.steps = images.batch_size, -(-images.steps // settings.accumulate)
            self.part_size = divided(self.job.world_size, self.batch_size)
            return
        count = len(images)
        self.batch_size = min(settings.batch_size, count)
        self.part_size = divided(self.job.world_size, self.batch_size)
        self.steps = count // self.batch_size // settings.accumulate
        if not self.steps:
            raise ValueError(
                f"--set accumulate: expected at most {count // self.batch_size}, the batches of an epoch, got "
                f"{settings.accumulate}"
            )

    @property
    def figure(self) -> str:
        """What says how good it is: the accuracy, or the loss of numbers instead of classes."""
        return "accuracy" if self.scored else "loss"

    def _tried(self, whole: Dataset) -> None:
        """Run the network once, and look at what it gives, where it or ``whole``, all data, are the user's."""
        images = self._sample(1)
        if not outputs.own(self.settings, self.data):
            self.logits(images)
            return
        found = outputs.tried(self.settings, whole, self.loss, self.model, self.logits, images)
        if isinstance(self.data, OwnDataset):
            self.data = self.data.named(found.classes)

    def stop(self) -> None:
        """End the run after the step that is under way, with a checkpoint, as Ctrl-C does."""
        if self._stop is not None:
            self._stop.requested = True

    def logits(self, images: Tensor) -> Tensor:
        """Logits [T, B, C] in float32 of raw images, computed in the training's precision."""
        with self._autocast():
            return outputs.tensor(self.model(self.data.normalise(images))).float()

    def _training_logits(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self._network(self.data.normalise(images)).float()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.amp == "none" or together.in_parts(self.job, self.settings):  # FSDP has a policy instead
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.settings.amp])

    def _sample(self, count: int) -> Tensor:
        """The first training images, as a batch."""
        return next(self._loader(self.data.train.take(slice(count)), workers=0).whole(count))[0]

    def samples(self, split: str = "test", count: int | None = None, batch_size: int = 64) -> Samples:
        """Samples of a split as the network takes them, without random changes, for ``trtkern.analysis``.

        Args:
            split: "train", "test", or "validation" where samples are held out.
            count: so many, drawn at random and always alike, in the order of the data; None, or more than there are, is
                all.
            batch_size: of the samples.

        Raises:
            ValueError: no such split, or targets that are not one label a sample.
        """
        return drawn(partial(self._loader, job=ALONE), self.data, self.splits, split, count, batch_size)

    def memory(self) -> MemoryReport:
        """What the network keeps for the backward pass of one step; nothing is changed by looking."""
        with self._autocast():
            return memory(self.model, self.data.normalise(self._sample(self.batch_size)))

    def fit(self, folder: str | Path | None = None, *, show: bool = True) -> Result:
        """Train in a run folder; one that holds a run of these settings already goes on with it, bit for bit.

        Args:
            folder: None is runs/<data>-<loss>-seed<k>, or that with -2, -3, ...: always a new one.
            show: a line an epoch on standard output.

        Raises:
            ValueError: the folder holds another run, or other files.
            RuntimeError: a new run of a trainer that has trained already.
            NonFiniteError, CallbackError, OSError: as ``run``; the checkpoints stay.
        """
        return session.fit(self, None if folder is None else Path(folder), show)

    def run(self, folder: Path, observer: Observer | None = None) -> Result:
        """Train, writing config.json, metrics.jsonl and a checkpoint after each epoch into ``folder``.

        Within a long epoch a checkpoint is written every ``SAVE_EVERY`` seconds. SIGINT and SIGTERM end it after the
        step that is under way, with a checkpoint. After ``resume`` it goes on where that checkpoint was written. At the
        end the chosen weights are measured once, and stay in the model.

        Raises:
            NonFiniteError: a NaN or Inf appeared; the last checkpoint written is a good one.
            CallbackError: a callback raised.
            OSError: the folder cannot be written.
        """
        observer = observer or Observer()
        if self._resumed is None:
            torch.manual_seed((self.settings.seed + self.job.rank) % 2**63)
        else:
            snapshot.restore_random(self._resumed.state, self.job)
        write = partial(
            run.write_config, folder, self.settings, self.watch.backends, self.command, resumed=self.history,
            processes=self.job.world_size,
        )  # fmt: skip
        if self.job.first:
            write()
        rows = self.job.told(run.read_metrics(folder) if self.job.first else [])
        self.kept = self._before or self.memory()
        if self.job.first:
            write(kept=self.kept)
        stopped, final = None, None
        observer.start(self)
        try:
            with StopSignal(patient=not self.job.alone) as stop, self.job.listening():
                self._stop = stop
                self.callbacks.tell("start", self)
                for epoch in range(self._first, self.settings.epochs + 1):
                    row, done = self._epoch(epoch, observer, stop, folder)
                    if done < self.steps:
                        stopped = (epoch, done)
                        break
                    failed = self._end_epoch(folder, row, observer)
                    rows.append(row)
                    if self.job.first:
                        run.append_metrics(folder, row)
                    observer.epoch(row)
                    if failed is not None:
                        raise failed
                    if Wishes(stops=stop.requested).of_all(self.job).stops:
                        stopped = (epoch, done)
                        break
                self._writer.settle()
                if stopped is None:
                    final = self.finish(folder)
                    observer.final(self, final)
                result = Result(rows, stopped, final)
                self.callbacks.tell("end", self, result)
        finally:
            self._stop = None
            observer.close()
            self._writer.close()
        return result

    def finish(self, folder: Path) -> Final:
        """Take the chosen weights of the run in ``folder``, which is at its end, and measure them once."""
        self.restore(self.chosen(folder))
        test = self._measure(self.splits["test"], watch=None)
        splits = {"test": test.averages}
        if self.watched != "test":
            splits[self.watched] = self.evaluate(self.splits[self.watched])
        epoch = self.settings.epochs if self.best is None else self.best.epoch
        final = Final(epoch, splits, test.confusion, test.rates)
        if self.job.first:
            run.write_result(folder, self.settings, final.epoch, final.splits)
        return final
