"""Why a network does not learn: dead and saturated layers, and how much gradient reaches each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trtkern.nn.losses import SDTLoss
from trtkern.ops import checks
from trtkern.output.text import aligned
from trtkern.profiling.firing.activity import (
    LayerActivity,
    Limits,
    dense_spikes,
    firing_rates,
    neuron_layers,
    padded_sum,
    problems,
)
from trtkern.profiling.unchanged import unchanged

LEGEND = (
    "rate: spikes per neuron, sample and step; silent, saturated: neurons that fired never, always; "
    "gradient: norm of dL/d(spikes) at each step"
)


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found. Printed, it is a table with the problems below."""

    layers: dict[str, LayerActivity]
    """By name, in the order of the forward pass."""
    gradients: dict[str, Tensor]
    """[T] float64 each, the norm over batch and neurons of dL/d(spikes) at each step; empty without a target."""
    loss: float | None
    """The loss of the batch; None where no target was given."""
    problems: list[str]
    """A line each, naming the layer; empty if all is well."""

    def __str__(self) -> str:
        head = ["layer", "type", "neurons", "rate", "silent", "saturated", "rate by step"]
        lines = [head + (["gradient by step"] if self.gradients else [])]
        for name, layer in self.layers.items():
            shares = [f"{value:.1%}" for value in (layer.mean, layer.silent, layer.saturated)]
            line = [name, layer.kind, f"{layer.neurons:,}", *shares, _series(layer.rate, ".3f")]
            if self.gradients:
                line.append(_series(self.gradients[name], ".1e") if name in self.gradients else "unknown")
            lines.append(line)
        table = aligned(lines, right=(2, 3, 4, 5))
        loss = [] if self.loss is None else [f"loss {self.loss:.4g}"]
        found = [f"problem: {line}" for line in self.problems] or ["no problem found"]
        return "\n".join(line.rstrip() for line in (*table, "", *loss, LEGEND, *found))


def _series(values: Tensor, form: str) -> str:
    """The numbers; of more than 8 the first and last three."""
    shown = [format(value, form) for value in values.tolist()]
    return " ".join(shown if len(shown) <= 8 else [*shown[:3], "...", *shown[-3:]])


def diagnose(
    model: nn.Module,
    batch: Any,
    target: Tensor | None = None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    *,
    limits: Limits | None = None,
) -> Diagnosis:
    """Firing rates of every neuron layer on one batch, with a target also how much gradient reaches each of its steps.

    The model runs once in the mode that it is in. Nothing is changed by it: buffers, attributes and random state are
    put back, ``grad`` is not touched. What is measured is what ``firing_rates`` counts; the gradient of a layer inside
    a reentrant checkpoint is not known.

    Args:
        model: any module with neuron layers.
        batch: what it is called with: a tensor, or a tuple of arguments.
        target: labels [B], or what ``loss`` takes.
        loss: a function of the model's output and the target; None is ``SDTLoss``.
        limits: what counts as a problem.

    Raises:
        TypeError, ValueError: no module or tensor, no neuron layer that ran, a loss without a target.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"diagnose: expected model to be a torch.nn.Module, got {checks.describe(model)}")
    if loss is not None and target is None:
        raise ValueError("diagnose: expected a target with the loss, got none; pass target=labels")
    inputs = batch if isinstance(batch, tuple) else (batch,)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise TypeError(
            f"diagnose: expected batch to be a tensor or a tuple with tensors, got {checks.describe(batch)}"
        )
    squares: dict[str, Tensor] = {}
    value = None
    with unchanged(model), torch.set_grad_enabled(target is not None):
        for _, layer, _ in neuron_layers(model):
            layer.nonfinite.zero_()  # type: ignore[operator]
        with firing_rates(model) as rates:
            if target is None:
                model(*inputs)
            else:
                value = _backward(model, inputs, target, SDTLoss() if loss is None else loss, squares)
        layers = rates.layers
        broken = [name for name, layer, _ in neuron_layers(model) if bool(layer.nonfinite)]
    if not layers:
        raise ValueError("diagnose: expected a model that runs a neuron layer (LIF, BatchNormLIF, ...), got none")
    norms = {name: squares[name].sqrt().cpu() for name in layers if name in squares}
    found = [_not_finite(name) for name in layers if name in broken]
    return Diagnosis(layers, norms, value, [*found, *problems(layers, limits), *_starved(norms)])


def _not_finite(name: str) -> str:
    return f"layer {name} is not finite: expected finite potentials, got NaN or Inf; look at what goes in before it"


def _starved(norms: dict[str, Tensor]) -> list[str]:
    """Layers whose spikes no gradient reaches, or one that is not a number."""
    lines = []
    for name, norm in norms.items():
        if not norm.isfinite().all():
            lines.append(
                f"layer {name}: expected a finite gradient, got NaN or Inf; lower the learning rate or its gain"
            )
        elif not norm.any():
            lines.append(
                f"layer {name}: expected a gradient of its spikes, got 0 at all {len(norm)} steps; look at what "
                "follows it: a dead layer, a surrogate that is 0 so far from the threshold, a detach"
            )
    return lines


def _backward(model: nn.Module, inputs: tuple, target: Tensor, loss: Callable, squares: dict[str, Tensor]) -> float:
    """The loss; adds up the squares of its gradient with respect to each layer's spikes, by step, in ``squares``."""
    inputs = tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )
    hooks = [
        module.register_forward_hook(_Listen(name, layer, squares)) for name, layer, module in neuron_layers(model)
    ]
    try:
        total = loss(model(*inputs), target)
    finally:
        for hook in hooks:
            hook.remove()
    if total.requires_grad:
        leaves = [x for x in (*inputs, *model.parameters()) if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(total, leaves, allow_unused=True)
    return float(total.detach())


class _Listen:
    """A forward hook that waits for the gradient of a layer's spikes and keeps its squares by step."""

    def __init__(self, name: str, layer: nn.Module, squares: dict[str, Tensor]) -> None:
        self.name, self.squares, self.time_dim = name, squares, getattr(layer, "time_dim", 0)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        spikes = dense_spikes(output)
        if not spikes.requires_grad:
            return
        spikes.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        steps = gradient.detach().movedim(self.time_dim, 0)
        squares = steps.reshape(len(steps), -1).double().square().sum(1)
        before = self.squares.get(self.name)
        self.squares[self.name] = squares if before is None else padded_sum(before, squares)
