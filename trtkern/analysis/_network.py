"""What is analysed: any module whose output is [T, B, C], and the samples that it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.nn._neuron import NeuronLayer
from trtkern.ops import checks
from trtkern.profiling.unchanged import unchanged, uncompiled

Progress = Callable[[int, int], None]
"""Told now and then how many of how many parts of the work are done."""
Data = Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor]
"""Batches (inputs, labels), such as a DataLoader or a list has them; or all inputs and all labels, two tensors."""


@dataclass(frozen=True)
class Samples:
    """Labelled inputs in batches, the same ones in the same order whenever they are looked at.

    Args:
        batches: (inputs, labels [B] int64), on one device.
        batch_dim: the axis of the inputs that the samples are on: 0 of images [B, C, H, W], 1 of frames
            [T, B, C, H, W].
    """

    batches: tuple[tuple[Tensor, Tensor], ...]
    batch_dim: int = 0

    @classmethod
    def of(
        cls,
        who: str,
        data: Data | Samples,
        *,
        count: int | None = None,
        batch_size: int | None = None,
        batch_dim: int = 0,
        device: torch.device | None = None,
    ) -> Samples:
        """The first ``count`` samples of some data, in batches of ``batch_size``.

        Args:
            who: the function that asks, for its messages.
            data: batches, or two tensors.
            count: None is all.
            batch_size: None leaves batches as they come, and makes batches of 64 of two tensors.
            batch_dim: of the inputs.
            device: where the batches go; None leaves them where they are.

        Raises:
            TypeError, ValueError: no samples, fewer than ``count``, no int64 labels [B], or sizes that do not agree.
        """
        if isinstance(data, Samples):
            batch_dim, data = data.batch_dim, data.batches
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
            data = [(data[0], data[1])]
            batch_size = 64 if batch_size is None else batch_size
        for name, value in (("count", count), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{who}: expected {name} to be an int of at least 1, got {value!r}")
        found: list[tuple[Tensor, Tensor]] = []
        seen = 0
        for batch in data:
            inputs, labels = _pair(who, batch, batch_dim)
            left = labels.numel() if count is None else min(labels.numel(), count - seen)
            seen += left
            size = left if batch_size is None else batch_size
            for start in range(0, left, size):
                part = min(size, left - start)
                found.append((inputs.narrow(batch_dim, start, part), labels.narrow(0, start, part)))
            if seen == count:
                break
        if not found or (count is not None and seen < count):
            wanted = "some samples" if count is None else f"{count:,} samples"
            raise ValueError(f"{who}: expected {wanted}, got {seen:,}; give more data, or ask for fewer")
        if device is not None:
            found = [(inputs.to(device), labels.to(device)) for inputs, labels in found]
        return cls(tuple(found), batch_dim)

    def __len__(self) -> int:
        return sum(labels.numel() for _, labels in self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def again(self, batch_size: int) -> Samples:
        """The same samples in batches of another size."""
        inputs = torch.cat([x for x, _ in self.batches], self.batch_dim).split(batch_size, self.batch_dim)
        labels = torch.cat([y for _, y in self.batches]).split(batch_size)
        return Samples(tuple(zip(inputs, labels, strict=True)), self.batch_dim)


def _pair(who: str, batch: Any, batch_dim: int) -> tuple[Tensor, Tensor]:
    """The inputs and the labels of a batch."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise TypeError(f"{who}: expected batches (inputs, labels) of two tensors, got {checks.describe(batch)}")
    inputs, labels = batch
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise TypeError(f"{who}: expected int64 labels [B], got {checks.describe(labels)}")
    if not 0 <= batch_dim < inputs.dim() or inputs.shape[batch_dim] != labels.numel():
        raise ValueError(
            f"{who}: expected inputs with {labels.numel()} samples on axis {batch_dim}, as there are labels, got "
            f"{checks.describe(inputs)}; batch_dim names the axis, 1 for frames [T, B, ...]"
        )
    return inputs, labels


def logits_of(who: str, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The output [T, B, C] of the model.

    Raises:
        TypeError, ValueError: it is something else; the message says what to do.
    """
    out = model(inputs)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise TypeError(
            f"{who}: expected a model that returns logits [T, B, C], got {checks.describe(out)}; wrap it in a module "
            "that returns them"
        )
    if out.dim() != 3 or out.shape[1] != labels.numel() or 0 in out.shape:
        raise ValueError(
            f"{who}: expected logits [T, B, C] with B = {labels.numel()}, got {checks.describe(out)}; return the "
            "output of every time step, time first, not their mean"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= out.shape[2]:
        raise ValueError(
            f"{who}: expected labels in [0, {out.shape[2]}), got labels from {low} to {high}; check the number of "
            "classes"
        )
    return out


@contextmanager
def still(who: str, model: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Inside, the model is in evaluation mode and runs uncompiled; afterwards mode, attributes, buffers, gradients,
    ``requires_grad`` and all random states are as they were.

    Args:
        gradients: whether gradients are asked of it.

    Raises:
        TypeError: no module.
        ValueError: gradients, and no parameters that a gradient can flow to.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected model to be a torch.nn.Module, got {checks.describe(model)}")
    parameters = list(model.parameters())
    if gradients and not any(p.requires_grad for p in parameters):
        raise ValueError(f"{who}: expected a model with trainable parameters, got none")
    held = [(p, p.requires_grad, p.grad) for p in parameters]
    with unchanged(model), uncompiled():
        model.eval()
        try:
            yield
        finally:
            for p, wanted, grad in held:
                p.requires_grad_(wanted)
                p.grad = grad


@contextmanager
def on_reference(model: nn.Module) -> Iterator[None]:
    """Inside, the layers of trtkern compute in plain torch, which can be differentiated twice and in both modes: on
    the reference, from dense spikes, with nothing computed again. Afterwards they are as they were.
    """
    wanted = {"packed": False, "checkpoint": False}
    changed: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        new: dict[str, Any] = {n: value for n, value in wanted.items() if type(getattr(module, n, None)) is bool}
        if isinstance(module, NeuronLayer):
            new["backend"] = "reference"
        if any(kind.__module__.startswith("trtkern.") for kind in type(module).__mro__):
            changed += [(module, name, getattr(module, name)) for name in new]
            for name, value in new.items():
                setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
