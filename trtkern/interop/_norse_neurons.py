"""Neurons that are called as Norse's are: ``spikes, state = layer(x, state)``, with the library's own states.

A layer of Norse takes a sequence [T, B, ...], a cell one step [B, ...]. The states are Norse's NamedTuples, which are
imported when a layer is made or loaded; None begins where the library begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trtkern.interop.parameters import along
from trtkern.interop.stepping import Stepping, folded, unfold
from trtkern.nn._neuron import NeuronLayer
from trtkern.nn.neurons import ALIF, CUBALI, CUBALIF, LI, LIF


class Dynamics(nn.Module):
    """What the library's functions of one neuron compute, over sequences.

    Args:
        neuron: what computes it.
        kind: the class of the library's state.
        start: the potential where no state is given.
        field: which of the library's parameters that is.
    """

    def __init__(self, neuron: NeuronLayer, kind: type[Any], start: float = 0.0, field: str = "v_leak") -> None:
        super().__init__()
        self.neuron, self.kind, self.start, self.field = neuron, kind, start, field

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """What it gives at each step of x [T, ...], and the library's state after the last one."""
        if x.dim() >= 3:
            return self.run(x, state)
        # [T, B] and [T] as [T, 1, B] and [T, 1, 1]: a batch of one.
        y, last = self.run(x.reshape(x.shape[0], 1, -1), _mapped(state, lambda part: _placed(part, x, (1, -1))))
        return y.reshape(x.shape), _mapped(last, lambda part: part.reshape(x.shape[1:]))

    def run(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The same of x [T, B, C, ...]; here of a neuron with one state, the potential."""
        y, v = self.neuron(x, self._potential(x, state), return_state=True)
        return y, self.kind(v=v)

    def _potential(self, x: Tensor, state: Any) -> Tensor | None:
        """The potential before the first step; None is 0."""
        if state is not None:
            return _like_step(state.v, x)
        if isinstance(self.neuron, _Live):
            start = torch.as_tensor(getattr(self.neuron.p, self.field))
            # The library lets a gradient through where it starts at the reset.
            return _like_step(start.detach() if self.field == "v_leak" else start, x)
        return None if self.start == 0.0 else _like_step(torch.tensor(self.start, dtype=torch.float64), x)

    def extra_repr(self) -> str:
        """Where the potential starts."""
        return "" if self.start == 0.0 else f"start={self.start:g}"


class SynapticDynamics(Dynamics):
    """A membrane behind a synapse: the current i, which the library hands out after its decay.

    The library adds an input to i, lets the membrane see the sum, and then lets it decay. The neuron here lets i decay
    first, so the library's i is decay_syn times that one; a state that comes in is added to the first input.
    """

    def run(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As ``Dynamics.run``."""
        if state is not None:
            first = x[:1] + state.i
            x = torch.cat([first.to(x.dtype), x[1:]]) if x.shape[0] > 1 else first.to(x.dtype)
        v = self._potential(x, state)
        before = None if v is None else self.neuron.State(i=torch.zeros_like(v), v=v)  # type: ignore[misc]
        y, last = self.neuron(x, before, return_state=True)
        decay = along(self.neuron.values()["decay_syn"], self.neuron.channel_dim)
        return y, self.kind(v=last.v, i=(last.i * decay).to(last.i.dtype))


class AdaptiveDynamics(Dynamics):
    """LSNN: a current that the membrane sees one step later, and a threshold b that rises by its spikes.

    Args:
        current: what gives the current.
        dynamics: what ``Dynamics`` takes.
    """

    def __init__(self, current: LI, neuron: NeuronLayer, kind: type[Any], start: float) -> None:
        super().__init__(neuron, kind, start)
        self.current = current

    def run(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As ``Dynamics.run``."""
        threshold = along(self.neuron.values()["v_threshold"], self.neuron.channel_dim)
        i = None if state is None else _like_step(state.i, x)
        currents, last_i = self.current(x, i, return_state=True)
        first = torch.zeros_like(x[:1]) if i is None else i.to(x.dtype)[None]
        delayed = torch.cat([first, currents[:-1]])
        v, a = self._potential(x, state), None
        if state is not None:
            a = _like_step(state.b - threshold, x)
        elif isinstance(threshold, Tensor) and threshold.requires_grad:
            # b starts at the threshold, without a gradient to it, and is drawn to it with one.
            a = _like_step(threshold.detach() - threshold, x)
        before = None
        if v is not None or a is not None:
            zero = torch.zeros_like(v if a is None else a)  # type: ignore[arg-type]
            before = self.neuron.State(v=zero if v is None else v, a=zero if a is None else a)  # type: ignore[misc]
        y, last = self.neuron(delayed, before, return_state=True)
        return y, self.kind(v=last.v, i=last_i, b=(last.a + threshold).to(last.a.dtype))


class Weighted(Dynamics):
    """A Linear without a bias in front: the library's ``LILinearCell``.

    Args:
        weight: [outputs, inputs], the same Parameter.
        dynamics: what follows.
    """

    def __init__(self, weight: nn.Parameter, dynamics: Dynamics) -> None:
        nn.Module.__init__(self)
        self.input_weights, self.dynamics = weight, dynamics

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As ``Dynamics.forward``, of x [T, ..., inputs]."""
        return self.dynamics(functional.linear(x, self.input_weights), state)

    def extra_repr(self) -> str:
        """The sizes."""
        outputs, inputs = self.input_weights.shape
        return f"inputs={inputs}, outputs={outputs}"


class NorseLayer(nn.Module):
    """Over sequences: ``y, state = layer(x, state)`` for x [T, B, ...].

    Args:
        dynamics: what it computes.
    """

    takes_time = True

    def __init__(self, dynamics: Dynamics) -> None:
        super().__init__()
        self.dynamics = dynamics

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Spikes (of a leaky integrator the potentials) of every step, and the state after the last one."""
        return self.dynamics(input_tensor, state)


class NorseCell(Stepping):
    """Over one step: ``y, state = cell(x, state)`` for x [B, ...]; it keeps nothing between calls.

    Within ``over_time`` it takes all T steps, and gives None in place of the state.

    Args:
        dynamics: what it computes.
    """

    def __init__(self, dynamics: Dynamics) -> None:
        nn.Module.__init__(self)
        self.state, self.dynamics = None, dynamics

    def forward(self, input_tensor: Tensor, state: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        """Spikes (of a leaky integrator the potential) of the step, and the state after it.

        Raises:
            ValueError: a state within ``over_time``, whose neurons begin anew.
        """
        if steps := folded():
            if state is not None:
                raise ValueError("over_time: expected neurons that begin anew, got a state; leave it out")
            return self.dynamics(unfold(input_tensor, steps))[0].flatten(0, 1), None
        y, state = self.dynamics(input_tensor.unsqueeze(0), state)
        return y.squeeze(0), state

    def extra_repr(self) -> str:
        """Nothing: the dynamics say it."""
        return ""


class _Live(NeuronLayer):
    """A neuron whose numbers follow, at each call, from the library's parameters, some of which are trained.

    They are where the user has put them: Norse's ``p`` is a plain tuple, whose tensors no layer registers.
    """

    numbers: Callable[[Any, float], Mapping[str, Any]]
    p: Any
    dt: float

    def values(self) -> dict[str, Any]:
        """As ``NeuronLayer.values``."""
        found, fresh = super().values(), self.numbers(self.p, self.dt)
        fresh = {name: value.reshape(-1) if isinstance(value, Tensor) else value for name, value in fresh.items()}
        found.update({name: value for name, value in fresh.items() if name in found and value is not None})
        for name, decay in self.complements:
            if fresh.get(name) is None:
                found[name] = 1 - found[decay]
        if "bias" in found and "v_leak" in fresh:
            found["bias"] = (1 - found["decay"]) * fresh["v_leak"]
        return {name: float(value) if isinstance(value, (int, float)) else value for name, value in found.items()}


class LiveLIF(_Live, LIF):
    __doc__ = _Live.__doc__


class LiveLI(_Live, LI):
    __doc__ = _Live.__doc__


class LiveCUBALIF(_Live, CUBALIF):
    __doc__ = _Live.__doc__


class LiveCUBALI(_Live, CUBALI):
    __doc__ = _Live.__doc__


class LiveALIF(_Live, ALIF):
    __doc__ = _Live.__doc__


LIVE: dict[type[NeuronLayer], type[NeuronLayer]] = {
    LIF: LiveLIF, LI: LiveLI, CUBALIF: LiveCUBALIF, CUBALI: LiveCUBALI, ALIF: LiveALIF,
}  # fmt: skip


def _mapped(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return None if state is None else type(state)(*(function(part) for part in state))


def _placed(part: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A part of a state, which may be one number for all, in another shape than one step of x."""
    return part.expand(x.shape[1:]).reshape(shape)


def _like_step(part: Tensor, x: Tensor) -> Tensor:
    """A part of a state, which may be one number for all, in the shape of one step of x, as a neuron takes it."""
    return part.to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(x.shape[1:])
