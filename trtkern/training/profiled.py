"""The step of ``trtkern train`` as something to profile: of a recipe, or of a network by name on made-up images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.data import Split
from trtkern.models import SpikingNetwork
from trtkern.nn import TRTLoss
from trtkern.profiling.memory.ledger import LOSS
from trtkern.profiling.memory.measured import memory
from trtkern.profiling.memory.report import MemoryReport
from trtkern.profiling.step.ranges import INPUT, LOADER, METRICS, OPTIMIZER, Ranges
from trtkern.training.loader import Loader
from trtkern.training.loop import Trainer
from trtkern.training.losses import Loss
from trtkern.training.step import DTYPES, Step
from trtkern.training.tally import Tally


class TrainingStep:
    """``training.step.Step`` on batches of ``training.loader.Loader``, its parts in ranges.

    Args:
        title: what it is.
        model: the network.
        forward: logits of a batch, under autocast.
        loss: of the logits.
        optimizer: of the weights.
        loader: of the training images.
        batch: images in a step.
        batches: of an epoch; None is as many as there are.
        prepare: what ``forward`` does to a batch before the network.
        amp: a key of ``training.step.DTYPES``.
        clip: as in ``Step``.
        backward: False leaves the forward pass alone.
        about: what the report says of it beside its input, loss and optimiser.
    """

    def __init__(
        self,
        title: str,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        batch: int,
        *,
        batches: int | None = None,
        prepare: Callable[[Tensor], Tensor] = lambda images: images,
        amp: str = "none",
        clip: float | None = None,
        backward: bool = True,
        about: dict[str, str] | None = None,
    ) -> None:
        self.title, self.model, self.optimizer, self.backward = title, model, optimizer, backward
        self.device, self.dtype, self._amp = loader.device, DTYPES[amp], amp
        self._logits, self._loss, self._clip = forward, loss, clip
        self._prepare, self._loader, self._batch = prepare, loader, min(batch, len(loader.images))
        self._shuffle, self._changes = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        self._batches = self._endless(batches)
        self._images, _ = next(self._batches)
        self._step: Step | None = None
        self._tally = Tally(str(self.device))
        self.about = {"input": "x".join(map(str, self._images.shape)), **(about or {})}
        if backward:
            self.about |= {"loss": type(loss).__name__, "optimizer": type(optimizer).__name__}

    def forward(self) -> Tensor:
        """Logits of a batch."""
        return self._logits(self._images)

    def step(self, ranges: Ranges) -> None:
        """Load a batch, and train on it."""
        with ranges.phase(LOADER):
            images, labels = next(self._batches)
        if self.backward:
            self._made(ranges)(images, labels, self._tally)
            return
        with ranges.phase(INPUT), torch.no_grad():
            self._logits(images)

    def kept(self) -> MemoryReport:
        """Of the forward pass."""
        with torch.autocast(self.device.type, self.dtype, enabled=self._amp != "none"):
            return memory(self.model, self._prepare(self._images))

    def _made(self, ranges: Ranges) -> Step:
        """The step of these ranges: each part that it calls opens its own."""
        if self._step is None:
            scaler = torch.amp.GradScaler(self.device.type, enabled=self._amp == "fp16")
            marked = {"unscale_": OPTIMIZER, "step": OPTIMIZER, "update": OPTIMIZER}
            self._step = Step(
                _within(ranges, INPUT, self._logits),
                _Marked(ranges, self._loss, {"parts": LOSS, "add_grad_": LOSS}),  # type: ignore[arg-type]
                self.optimizer,
                _Scaler(ranges, scaler, marked),  # type: ignore[arg-type]
                self._clip,
                lambda total: None,
            )
            self._tally = _Marked(ranges, self._tally, {"add": METRICS})  # type: ignore[assignment]
        return self._step

    def _endless(self, batches: int | None) -> Any:
        """Batches of one epoch after the other, so many each; None is as many as there are."""
        while True:
            count = len(self._loader.images) // self._batch if batches is None else batches
            plan = self._loader.draw(count, self._batch, self._shuffle)
            yield from self._loader.batches(plan, 0, self._changes)


class _Marked:
    """An object some of whose methods run in ranges."""

    def __init__(self, ranges: Ranges, target: Any, places: dict[str, str]) -> None:
        self._ranges, self._target, self._places = ranges, target, places

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return _within(self._ranges, self._places[name], value) if name in self._places else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._target, name, value)


class _Scaler(_Marked):
    def scale(self, total: Tensor) -> Tensor:
        """What is to be differentiated."""
        scaled = self._target.scale(total)
        self._ranges.follow(scaled)
        return scaled


def _within(ranges: Ranges, place: str, run: Callable) -> Callable:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with ranges.phase(place):
            return run(*args, **kwargs)

    return marked


def of_trainer(trainer: Trainer, backward: bool) -> TrainingStep:
    """The step of a recipe, with its own data, changes, loss and optimiser."""
    settings = trainer.settings
    return TrainingStep(
        settings.recipe, trainer.model, trainer.logits, trainer.loss, trainer.optimizer, trainer.loader,
        trainer.batch_size, batches=trainer.batches, prepare=trainer.data.normalise, amp=settings.amp,
        clip=settings.clip, backward=backward,
        about={"data": settings.data, "T": str(settings.timesteps)},
    )  # fmt: skip


def of_network(
    title: str, model: SpikingNetwork, shape: tuple[int, ...], device: str, *, amp: str, backward: bool
) -> TrainingStep:
    """A network on random images of shape [B, C, H, W] or frames [T, B, C, H, W], with the TRT loss and Adam."""
    batch = shape[-4]
    single = shape[-3:] if len(shape) == 4 else (shape[0], *shape[-3:])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2 * batch, *single, generator=generator).to(device)
    labels = torch.randint(model.classifier.out_features, (2 * batch,), generator=generator)

    def logits(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, DTYPES[amp], enabled=amp != "none"):
            return model(images).float()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loader = Loader(Split(images, labels), torch.device(device))
    about = {} if len(shape) == 5 else {"T": str(model.timesteps)}
    return TrainingStep(
        title, model, logits, TRTLoss(model), optimizer, loader, batch, amp=amp, backward=backward, about=about
    )
