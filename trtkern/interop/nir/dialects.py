"""Time, and how each library writes and reads NIR: the step, the method of integration, and its habits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtkern.interop.nir.problems import one_of, refuse
from trtkern.ops import checks

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""The units of time."""

METHODS = ("euler", "exponential")
"""How an equation in continuous time becomes steps."""


@dataclass(frozen=True)
class Dialect:
    """What a library does with NIR beyond, or against, its definition.

    Args:
        method: how it makes steps of tau dv/dt = (v_leak - v) + r I.
        soft: its reader resets softly: the threshold is subtracted, whatever ``v_reset`` says.
        delayed: its soft reset comes a step later, behind the decay: what is subtracted is the threshold / decay.
        on_equal: it fires where v >= v_threshold; NIR fires where v > v_threshold.
        steps: its times are numbers of steps.
        squared: its writer multiplies each time by the step, which its reader does not undo.
        per_step: r of its IF is what a step adds for an input of 1; in NIR that is r times the step.
        plain_leak: gain of its LI is r; in NIR r * (1 - decay).
        jump: gain of the synapse of its CubaLIF is w_in; in NIR w_in * dt / tau_syn.
        gain: of the spiking neurons that its reader makes: "any", "one", or "complement", 1 - decay.
        any_leak: its reader takes v_leak: "any", "zero", or "reset", where it must be v_reset.
        any_reset: its reader takes v_reset; else it resets to 0.
        vectors: its reader fails on a LIF or LI over images.
        fixed: the step in seconds that is written into its source, or None.
        reads: the nodes that its reader knows; None for all.
        extra: what NIR has no field for goes into the metadata of a node.
    """

    method: str = "euler"
    soft: bool = False
    delayed: bool = False
    on_equal: bool = False
    steps: bool = False
    squared: bool = False
    per_step: bool = False
    plain_leak: bool = False
    jump: bool = False
    gain: str = "any"
    any_leak: str = "any"
    any_reset: bool = True
    vectors: bool = False
    fixed: float | None = None
    reads: frozenset[str] | None = None
    extra: bool = False


_SHARED = ("Input", "Output", "NIRGraph", "Affine", "Conv2d", "Flatten", "SumPool2d", "LIF")

DIALECTS: dict[str, Dialect] = {
    "nir": Dialect(),
    "trtkern": Dialect(extra=True),
    "spikingjelly": Dialect(
        on_equal=True, gain="one", any_leak="reset",
        reads=frozenset((*_SHARED, "Linear", "Conv1d", "AvgPool2d", "IF", "CubaLIF")),
    ),
    "snntorch": Dialect(
        delayed=True, gain="one", any_leak="zero", any_reset=False, fixed=1e-4,
        reads=frozenset((*_SHARED, "Linear", "AvgPool2d", "CubaLIF")),
    ),
    "norse": Dialect(
        squared=True, per_step=True, jump=True, gain="complement", any_reset=False,
        reads=frozenset((*_SHARED, "Linear", "IF", "CubaLIF")),
    ),
    "sinabs": Dialect(
        method="exponential", soft=True, on_equal=True, steps=True, per_step=True, plain_leak=True, gain="one",
        any_leak="zero", any_reset=False, vectors=True, reads=frozenset((*_SHARED, "IF", "LI")),
    ),
}  # fmt: skip
"""The dialects by name; docs/nir.md says where each was found."""


def dialect_of(op: str, name: str) -> Dialect:
    """The dialect of that name; a ValueError with the list otherwise."""
    if name not in DIALECTS:
        refuse(op, f"dialect to be {one_of(DIALECTS)}", repr(name), "choose one of them")
    return DIALECTS[name]


@dataclass(frozen=True)
class Clock:
    """The length of a step in the units of a graph, and the steps that an equation becomes.

    Args:
        step: the length that time constants and delays are divided by.
        rate: what r of an IF or an I is multiplied by.
        method: "euler": v += dt / tau (v_leak - v + r I). "exponential": the solution for an input that is constant
            over the step. Both are v = decay v + (1 - decay) (v_leak + r I), with 1 - dt / tau or exp(-dt / tau).
    """

    step: float
    rate: float
    method: str

    def decay(self, tau: np.ndarray) -> np.ndarray:
        """What remains after a step."""
        with np.errstate(divide="ignore"):
            ratio = self.step / tau
        return 1.0 - ratio if self.method == "euler" else np.exp(-ratio)

    def tau(self, decay: np.ndarray) -> np.ndarray:
        """The time constant of a decay below 1; 0 for the exponential method where the decay is 0."""
        if self.method == "euler":
            return self.step / (1.0 - decay)
        with np.errstate(divide="ignore"):
            return -self.step / np.log(decay)


def clock(op: str, dt: float, unit: str, graph_unit: str, method: str | None, dialect: Dialect, reads: bool) -> Clock:
    """The clock of a conversion.

    Args:
        op: for messages.
        dt, unit: the length of a step, and what that is measured in.
        graph_unit: what the times of the graph are measured in.
        method: None is that of the dialect.
        reads: a graph is read; else one is written.

    Raises:
        TypeError, ValueError: a step that is no number above 0, an unknown unit or method, or a step that the dialect
            does not have.
    """
    if isinstance(dt, bool) or not isinstance(dt, (int, float)):
        refuse(op, "dt to be a number", checks.describe(dt), "pass the length of a step, such as dt=1e-4", TypeError)
    if not (math.isfinite(dt) and dt > 0):
        refuse(op, "dt to be finite and > 0", dt, "pass the length of a step, such as dt=1e-4")
    for name, value in (("unit", unit), ("graph_unit", graph_unit)):
        if value not in SECONDS:
            refuse(op, f"{name} to be {one_of(SECONDS)}", repr(value), "choose one of them")
    if method is not None and method not in METHODS:
        refuse(op, f"method to be {one_of(METHODS)}", repr(method), "choose one of them")
    seconds = dt * SECONDS[unit]
    if dialect.fixed is not None and not math.isclose(seconds, dialect.fixed, rel_tol=1e-9):
        refuse(op, f"dt = {dialect.fixed:g} s, which this library has in its source", f"{seconds:g} s", "pass that dt")
    step = seconds / SECONDS[graph_unit]
    rate = 1.0 if dialect.per_step else step
    if dialect.steps:
        step = 1.0
    elif dialect.squared and reads:
        step = step * step
    return Clock(step, rate, method or dialect.method)


def array(value: Any) -> np.ndarray:
    """The numbers of a field of a node in float64; some libraries leave tensors there."""
    return np.asarray(plain(value), dtype=np.float64)


def plain(value: Any) -> Any:
    """A tensor as a NumPy array; all else as it is."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
