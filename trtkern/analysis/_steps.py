"""Looking at what layers take or give, step by step, however a model runs through time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.analysis._network import Progress, Samples, logits_of, still
from trtkern.ops import checks
from trtkern.ops.spikes import Spikes
from trtkern.profiling.firing.activity import dense_spikes

See = Callable[[str, Tensor, "int | None"], None]
"""Told the name of a layer, what it took or gave as [S, B, ...], and which step is the first of those S; None where one
step is all there is: what is the same at every step, computed once."""


class _Calls(NamedTuple):
    """How the calls of a layer lie in time."""

    order: str
    """"time": a call sees [T, B, ...] or [T * B, ...]; "batch": [B, T, ...]; "step": a call a step sees [B, ...];
    "once": one call for all steps sees [B, ...]."""
    number: int
    """Calls a forward pass."""


class Watched:
    """A model whose layers are looked at while it runs; made by ``watching``."""

    def __init__(self, who: str, model: nn.Module, samples: Samples, see: See) -> None:
        self._who, self._model, self._samples, self._see = who, model, samples, see
        self._shapes: dict[str, list[tuple[int, ...]]] | None = {}
        self._calls: dict[str, _Calls] = {}
        self._call: dict[str, int] = {}
        self._batch = 1
        self.steps = 0
        """T."""

    @property
    def names(self) -> list[str]:
        """The layers that ran, in the order in which the model came to them."""
        return list(self._calls)

    def learn(self) -> None:
        """T, and how the calls of each layer lie in time, from one sample; ``see`` is told nothing of it."""
        inputs, labels = next(iter(self._samples))
        self.steps = self._logits(inputs.narrow(self._samples.batch_dim, 0, 1), labels[:1]).shape[0]
        shapes, self._shapes = self._shapes or {}, None
        for name, seen in shapes.items():
            self._calls[name] = _Calls(_order(seen[0], len(seen), self.steps), len(seen))

    def run(self, progress: Progress | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(labels, logits [T, B, C]) of every batch, while ``see`` is told of it."""
        done = 0
        for inputs, labels in self._samples:
            self._batch, self._call = labels.numel(), {}
            logits = self._logits(inputs, labels)
            if logits.shape[0] != self.steps:
                raise ValueError(
                    f"{self._who}: expected {self.steps} time steps of every batch, as the first one has, got "
                    f"{checks.describe(logits)}; analyse samples of each length by themselves"
                )
            yield labels, logits
            done += labels.numel()
            if progress is not None:
                progress(done, len(self._samples))

    def _logits(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Of one batch, on the model's device."""
        device = next((t.device for t in (*self._model.parameters(), *self._model.buffers())), None)
        return logits_of(self._who, self._model, inputs.to(device), labels)

    def told(self, name: str, x: Tensor, axes: int | None) -> None:
        """A layer took or gave x; its last ``axes`` axes are those of one sample and step, None if that is unknown."""
        lead = tuple(x.shape if axes is None else x.shape[: x.dim() - axes])
        if self._shapes is not None:
            self._shapes.setdefault(name, []).append(lead)
            return
        if name not in self._calls:
            raise ValueError(
                f"{self._who}: expected every sample to run the same layers, got one that runs {name!r} and one that "
                "does not; analyse them by themselves"
            )
        order, count = self._calls[name]
        call = self._call[name] = self._call.get(name, -1) + 1
        self._see(name, *self._placed(name, x, lead, order, call, count))

    def _placed(
        self, name: str, x: Tensor, lead: tuple[int, ...], order: str, call: int, count: int
    ) -> tuple[Tensor, int | None]:
        """x as [S, B, ...], and its first step."""
        steps, batch = self.steps, self._batch
        if order == "time":
            if lead[:2] == (steps, batch):
                return (x[:1], None) if steps > 1 and x.stride(0) == 0 else (x, 0)
            if lead[:1] == (steps * batch,):
                return x.unflatten(0, (steps, batch)), 0
        if order == "batch" and lead[:2] == (batch, steps):
            return x.transpose(0, 1), 0
        if order in ("step", "once"):
            first = call * steps // count if order == "step" else None
            if batch > 1 and lead[:2] == (1, batch):
                return x, first
            if lead[:1] == (batch,):
                return x[None], first
        raise ValueError(
            f"{self._who}: expected layer {name!r} to see [T, B, ...], [T * B, ...] or, step by step, [B, ...] with "
            f"T = {steps}, the T of the first batch, and B = {batch}, got {checks.describe(x)}"
        )


def _order(lead: tuple[int, ...], calls: int, steps: int) -> str:
    """How calls with such leading axes lie in time, where the batch is one sample."""
    if lead[:1] == (steps,):
        return "time"
    if calls % steps == 0:
        return "step"
    return "batch" if lead[:2] == (1, steps) else "once"


@contextmanager
def watching(
    who: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    samples: Samples,
    see: See,
    *,
    axes: Callable[[nn.Module, Any], int] | None = None,
) -> Iterator[Watched]:
    """Inside, ``Watched.run`` runs the model over the samples in evaluation mode, without gradients, and ``see`` is
    told what each layer gives; with ``axes`` what it takes.

    Args:
        who: for messages.
        layers: by name.
        axes: how many axes at the end of a layer's input belong to one sample and step.
    """
    watched = Watched(who, model, samples, see)

    def hook(name: str, layer: nn.Module) -> Callable[..., None]:
        def heard(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if axes is None:
                watched.told(name, dense_spikes(output).movedim(getattr(layer, "time_dim", 0), 0), None)
                return
            x = next(iter((*args, *kwargs.values())), None)
            if isinstance(x, (Tensor, Spikes)):
                watched.told(name, dense_spikes(x), axes(layer, x))

        return heard

    hooks: list[Any] = []
    with still(who, model, gradients=False), torch.no_grad():
        try:
            for name, layer in layers.items():
                hooks.append(layer.register_forward_hook(hook(name, layer), with_kwargs=True))
            watched.learn()
            yield watched
        finally:
            for each in hooks:
                each.remove()
