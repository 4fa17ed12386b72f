"""Neurons of NIR as layers: numbers of continuous time as those of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trtkern.interop.nir.dialects import Clock, Dialect, array
from trtkern.interop.nir.layers import PerNeuron, Threshold
from trtkern.interop.nir.problems import Problems
from trtkern.nn import CUBALI, CUBALIF, IF, LI, LIF, Bounded
from trtkern.nn._neuron import NeuronLayer

LEARNED = ("decay", "gain", "decay_syn", "gain_syn", "v_leak", "v_threshold", "v_reset")
"""What of a neuron can be learned after an import."""

FIELDS: dict[str, tuple[str, ...]] = {
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "IF": ("r", "v_threshold", "v_reset"),
    "LI": ("tau", "r", "v_leak"),
    "I": ("r",),
    "CubaLIF": ("tau_syn", "tau_mem", "r", "v_leak", "v_threshold", "v_reset", "w_in"),
    "CubaLI": ("tau_syn", "tau_mem", "r", "v_leak", "w_in"),
    "Threshold": ("threshold",),
}
"""The numbers of each node."""

LAYERS: dict[str, type[NeuronLayer]] = {
    "LIF": LIF, "IF": IF, "LI": LI, "I": LI, "CubaLIF": CUBALIF, "CubaLI": CUBALI, "Threshold": Threshold
}  # fmt: skip
"""The layer of each node."""


@dataclass(frozen=True)
class Wishes:
    """What the caller of ``from_nir`` asks of the neurons.

    Args:
        clock, dialect: the step, and who wrote the graph.
        reset: "hard", "soft", or None for what the node or the dialect says.
        on_equal: True, False, or None likewise.
        learn: names from ``LEARNED``.
        spiking: what ``LIF`` takes besides: surrogate, alpha, detach_reset.
        backend: of every layer.
    """

    clock: Clock
    dialect: Dialect
    reset: str | None = None
    on_equal: bool | None = None
    learn: frozenset[str] = frozenset()
    spiking: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "auto"


def neuron(path: str, node: Any, wishes: Wishes, problems: Problems) -> nn.Module | None:
    """The layer of a node; None, and a problem, where there is none.

    Args:
        path: of the node.
        node: LIF, IF, LI, I, CubaLIF, CubaLI or Threshold.
        wishes: how.
        problems: what stands against it.
    """
    kind = type(node).__name__
    fields = {name: array(value) for name in FIELDS[kind] if (value := getattr(node, name, None)) is not None}
    if not _sound(path, kind, fields, wishes, problems):
        return None
    numbers = _numbers(kind, fields, wishes)
    settings: dict[str, Any] = {"backend": wishes.backend}
    if "v_threshold" in numbers:
        said = dict(getattr(node, "metadata", None) or {})
        soft = _soft(said, wishes)
        settings.update(wishes.spiking)
        on_equal = said.get("fire_on_equal", wishes.dialect.on_equal) if wishes.on_equal is None else wishes.on_equal
        if bool(on_equal):
            settings["fire_on_equal"] = True
        if soft:
            numbers.pop("v_reset", None)
            settings["v_reset"] = None
            if "reset_amount" in said:
                numbers["reset_amount"] = array(said["reset_amount"])
            elif wishes.dialect.delayed and "decay" in numbers:
                if numbers["decay"].min() <= 0:
                    problems.add(path, kind, "a decay > 0, by which this reset is divided", "0", "pass reset='hard'")
                    return None
                numbers["reset_amount"] = numbers["v_threshold"] / numbers["decay"]
    axes = sorted({axis for value in numbers.values() for axis in varies(value)})
    spread = len(axes) > 1
    if not spread and axes and axes != [0]:
        settings["channel_dim"] = axes[0] + 2
    shape = np.broadcast_shapes(*(value.shape for value in numbers.values()))
    held = {name: _held(name, value, axes, shape, wishes.learn) for name, value in numbers.items()}
    try:
        layer = LAYERS[kind](**held, **settings)
    except (TypeError, ValueError) as error:
        problems.add(path, kind, "numbers that the layer takes", f"{error}", "change the node")
        return None
    return PerNeuron(layer) if spread else layer


def _soft(said: Mapping[str, Any], wishes: Wishes) -> bool:
    if wishes.reset is not None:
        return wishes.reset == "soft"
    return said["reset"] == "soft" if "reset" in said else wishes.dialect.soft


def _numbers(kind: str, fields: dict[str, np.ndarray], wishes: Wishes) -> dict[str, np.ndarray]:
    """The parameters of the layer by name."""
    clock, dialect = wishes.clock, wishes.dialect
    names = ("v_leak", "v_threshold", "v_reset")
    found = {name: fields[name] for name in names if name in fields}
    if kind == "Threshold":
        return {"v_threshold": fields["threshold"]}
    if kind in ("IF", "I"):
        found["gain"] = fields["r"] * clock.rate
        if kind == "I":
            found["decay"] = np.ones_like(found["gain"])
        return found
    found["decay"] = clock.decay(fields["tau_mem" if kind.startswith("Cuba") else "tau"])
    found["gain"] = fields["r"] * (1.0 if kind == "LI" and dialect.plain_leak else 1.0 - found["decay"])
    if kind.startswith("Cuba"):
        found["decay_syn"] = clock.decay(fields["tau_syn"])
        w_in = fields.get("w_in", np.ones(()))
        found["gain_syn"] = w_in if dialect.jump else w_in * (1.0 - found["decay_syn"])
    return found


def _sound(path: str, kind: str, fields: dict[str, np.ndarray], wishes: Wishes, problems: Problems) -> bool:
    """Whether the layer can have these numbers; else with a problem for each that it cannot."""
    before = len(problems.lines)
    for name, value in fields.items():
        if value.size == 0 or np.isnan(value).any() or (np.isinf(value).any() and not name.startswith("tau")):
            problems.add(path, kind, f"{name} to be finite", _range(value), f"give {name} numbers")
        elif name.startswith("tau"):
            _sound_time(path, kind, name, value, wishes, problems)
        elif name in ("v_threshold", "threshold") and value.min() < 0:
            problems.add(path, kind, f"{name} >= 0", _range(value), "shift the potential, as (v - v_leak)")
    try:
        np.broadcast_shapes(*(value.shape for value in fields.values()))
    except ValueError:
        got = ", ".join(f"{name} {value.shape}" for name, value in fields.items())
        problems.add(path, kind, "numbers of one shape", got, "write the node again")
    return len(problems.lines) == before


def _sound_time(path: str, kind: str, name: str, tau: np.ndarray, wishes: Wishes, problems: Problems) -> None:
    step = wishes.clock.step
    if tau.min() <= 0:
        problems.add(path, kind, f"{name} > 0", _range(tau), "give it a time constant")
    elif wishes.clock.method == "euler" and tau.min() < step * (1 - 1e-9):
        do = "pass a smaller dt or method='exponential', or check unit and graph_unit"
        problems.add(path, kind, f"{name} of at least one step, {step:g}", _range(tau), do)


def _range(value: np.ndarray) -> str:
    if value.size == 0:
        return "no number"
    return f"{value.min():g}" if value.size == 1 else f"{value.min():g} to {value.max():g}"


def varies(value: np.ndarray) -> list[int]:
    """The axes along which the numbers differ."""
    return [axis for axis, size in enumerate(value.shape) if size > 1 and (np.diff(value, axis=axis) != 0).any()]


def _held(name: str, value: np.ndarray, axes: list[int], shape: tuple[int, ...], learn: frozenset[str]) -> Any:
    """A parameter as a layer takes it: a number, or a tensor over the channels (over all neurons, if the numbers
    differ along several axes); ``Bounded`` or a Parameter where it is learned."""
    if name.startswith("decay"):
        value = value.clip(0.0, 1.0)  # tau may be a step but for what float32 rounds
    held: float | Tensor
    if not varies(value):
        held = float(value.flat[0])
    else:
        value = np.broadcast_to(value, shape)
        if len(axes) == 1:
            value = np.moveaxis(value, axes[0], 0).reshape(shape[axes[0]], -1)[:, 0]
        held = torch.tensor(np.ascontiguousarray(value).reshape(-1), dtype=torch.float32)
    if name not in learn:
        return held
    if name.startswith("decay"):
        return Bounded(held, "clamp")
    if name == "v_threshold":
        return Bounded(held, "clamp", low=0.0, high=math.inf)
    return nn.Parameter(torch.as_tensor(held, dtype=torch.float32))
