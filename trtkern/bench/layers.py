"""Layers that are compared: what each takes, and the neuron that it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import nn, reference
from trtkern.backends import BACKENDS, resolve
from trtkern.backends.base import Case as BackendCase
from trtkern.spec import LIFSpec

WHOLE_LOOP = 16
"""T up to which a whole loop is compiled: each step adds about a second of compile time."""


class Neuron(NamedTuple):
    """A neuron as ``reference.lif`` takes it."""

    numbers: tuple[float, ...]
    """In the order of its row; of LIF: decay, gain, bias, reset_amount, v_threshold, v_reset."""
    spec: LIFSpec


OWN = Neuron((0.5, 1.0, 0.0, 1.0, 1.0, 0.0), LIFSpec())
"""The paper's neuron, hard reset and triangle, and the default here."""


class Where(NamedTuple):
    """What a layer is built for."""

    device: torch.device
    dtype: torch.dtype
    timesteps: int
    neurons: int
    """In one sample and step."""
    compiled: bool
    """Whether to offer layers that torch.compile makes."""
    neuron: str = "LIF"
    """A name of ``trtkern.neurons.TABLE``."""
    threshold: float = 1.0
    """Of the neurons; only those who are put into whole networks look at it."""


@dataclass(frozen=True)
class Layer:
    """A multi-step neuron of some library."""

    name: str
    run: Callable[[Tensor], Tensor]
    """[T, B, ...] -> spikes of that shape; [B, T, ...] with ``batch_first``."""
    neuron: Neuron
    """What it computes, for the gate."""
    batch_first: bool = False
    flat: bool = False
    """Takes three axes only."""
    exact: bool = False
    """Keeps its potential in float32 whatever x's dtype."""
    compiled: bool = False
    quadratic: bool = False
    """Indexes its input step by step, so that the time of its backward pass grows with T squared."""
    note: str = ""
    strong: bool = False
    """Whether it is among the fastest of its library at its T: those that a suite of many sizes is compared with."""
    lag: int = 1
    """Of neurons that feed each other: after how many steps a spike reaches the others."""


def loop(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, unbind: bool = True) -> Tensor:
    """Spikes of a one-step function of (v, x[t]) over all steps, which come from ``unbind`` or by indexing."""
    v, spikes = torch.zeros_like(x[0]), []
    for current in x.unbind(0) if unbind else (x[t] for t in range(len(x))):
        s, v = step(v, current)
        spikes.append(s)
    return torch.stack(spikes)


class _Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].abs()).clamp_min(0)


def cell(v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """One step of ``OWN``, as users write it."""
    h = 0.5 * v + x
    s = _Triangle.apply(h - 1.0)
    return s, h * (1 - s)


def backends(name: str, op: str, where: Where) -> list[str]:
    """The backends to measure: every one that takes the case here for "all", but not the reference, else that one.

    Raises:
        ValueError, RuntimeError: no such backend, or it cannot run the case here.
    """
    case = BackendCase(op, where.device.type, where.dtype, defaults(where.neuron).spec)
    if name != "all":
        return [resolve(name, case).name]
    return [each.name for each in BACKENDS if each.name != "reference" and each.objection(case) is None]


def defaults(name: str) -> Neuron:
    """The neuron of that name as this project's layer has it when it is given nothing."""
    return numbers_of(getattr(nn, name)())


def numbers_of(layer: Any) -> Neuron:
    """What a layer of neurons computes."""
    values = layer.values()
    numbers = (torch.as_tensor(values[each]).detach() for each in layer.spec.row.params)  # some may be learnt
    return Neuron(tuple(float(number) for number in numbers), layer.spec)


def own(names: list[str], neuron: str = "LIF") -> list[Layer]:
    """This project's layer on each of the backends; behind another neuron than LIF also LIF, to compare it with."""
    kinds = [(neuron, ""), *[("LIF", ", LIF")] * (neuron != "LIF")]
    return [
        Layer(f"trtkern {name}{suffix}", getattr(nn, kind)(backend=name), defaults(kind), exact=True, strong=True)
        for kind, suffix in kinds
        for name in names
    ]


def eager(where: Where) -> list[Layer]:
    """The same neuron in plain torch: the readable reference, the loop that users write, and both compiled.

    Of another neuron than LIF the reference is the loop that users write."""
    if where.neuron != "LIF":
        return _reference(where)
    whole = where.compiled and where.timesteps <= WHOLE_LOOP
    made = [
        Layer("eager loop, unbind", lambda x: loop(cell, x), OWN, strong=not whole),
        Layer("eager loop, x[t]", lambda x: loop(cell, x, unbind=False), OWN, quadratic=True),
        Layer("reference.py", lambda x: reference.lif(x, None, OWN.numbers, OWN.spec).s, OWN),
    ]
    if where.compiled:
        step = torch.compile(cell, dynamic=False)
        name, stepwise = "torch.compile of the cell, unbind", lambda x: loop(step, x)
        made.append(Layer(name, stepwise, OWN, compiled=True, strong=not whole))
    if whole:
        traced = torch.compile(lambda x: loop(cell, x), dynamic=False)
        made.append(Layer("torch.compile of the loop, unbind", traced, OWN, compiled=True, strong=True))
    return made


def _reference(where: Where) -> list[Layer]:
    neuron = defaults(where.neuron)

    def run(x: Tensor) -> Tensor:
        return reference.lif(x, None, neuron.numbers, neuron.spec).s

    made = [Layer("reference.py", run, neuron, strong=True)]
    if where.compiled and where.timesteps <= WHOLE_LOOP:
        traced = torch.compile(run, dynamic=False)
        made.append(Layer("torch.compile of reference.py", traced, neuron, compiled=True, strong=True))
    return made
