"""Neurons that feed each other, over whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from trtkern.backends import explain, resolve
from trtkern.backends.base import Case
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import AnyState, Spiking, carrier, one_step, spikes_of, warn_of_one_step
from trtkern.nn._states import state_type
from trtkern.nn.spike_layers import SpikeLinear
from trtkern.ops import checks
from trtkern.ops._library import undisturbed
from trtkern.ops._prepared import WANT_STATE
from trtkern.ops.lif import wanted
from trtkern.ops.recurrent import OP, recurrent
from trtkern.ops.spikes import Spikes, dense, packing

fx.wrap("dense")
fx.wrap("one_step")


class Recurrent(Leaf):
    """Neurons that feed each other: current[t] = x[t] + W s[t-1] + b, then the neuron's step; s[-1] is zero.

    All T steps are one call a direction, the product with W within each step. The gradient through time is exact: that
    of s[t] is what comes from outside plus W^T times the gradient of current[t+1].

    Neither of the two layers inside is called. The forward hooks of ``linear`` see, after each call, the spikes of all
    steps that it fed back.

    Args:
        neuron: a layer of spiking neurons, such as ``LIF``, ``ALIF`` or ``AdLIF``, with time on any axis; its
            ``backend``, ``packed`` and ``time_dim`` are those of this layer. Learned parameters are [] or [N].
        linear: ``torch.nn.Linear(N, N)``: W is its weight, [N, N], from neuron k to neuron j at [j, k], b its bias.

    Raises:
        TypeError, ValueError: no spiking neuron, no Linear, or one that is not square; a layer with a forward of its
            own.
    """

    takes_time = True
    takes_lengths = True
    """Which it refuses by name."""

    def __init__(self, neuron: Spiking, linear: nn.Linear) -> None:
        super().__init__()
        if not isinstance(neuron, Spiking):
            raise TypeError(
                f"Recurrent: expected a layer of spiking neurons such as trtkern.nn.LIF(), got {_kind(neuron)}; what "
                "has no spikes feeds nothing back"
            )
        if not isinstance(linear, nn.Linear) or linear.in_features != linear.out_features:
            got = (
                f"Linear({linear.in_features}, {linear.out_features})"
                if isinstance(linear, nn.Linear)
                else _kind(linear)
            )
            raise (ValueError if isinstance(linear, nn.Linear) else TypeError)(
                f"Recurrent: expected torch.nn.Linear(N, N), from the N neurons to themselves, got {got}"
            )
        for layer, own in ((neuron, Spiking.forward), (linear, nn.Linear.forward)):
            # SpikeLinear computes what Linear does, and its weights are what is read here.
            if type(layer).forward is not own and not isinstance(layer, SpikeLinear):
                raise TypeError(
                    f"Recurrent: expected a layer with the forward of {own.__qualname__}, got {_kind(layer)} with one "
                    "of its own, which would not be called; write the loop over time yourself, with layer.step"
                )
        self.neuron, self.linear = neuron, linear

    @property
    def nonfinite(self) -> Tensor:
        """int32 [1], set to 1 by the kernel when a potential is not finite."""
        return self.neuron.nonfinite

    @property
    def time_dim(self) -> int:
        """The axis of x that time is on."""
        return self.neuron.time_dim

    @property
    def packed(self) -> bool:
        """Whether it returns packed ``Spikes``."""
        return self.neuron.packed

    @packed.setter
    def packed(self, value: bool) -> None:
        self.neuron.packed = value

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of its states: the spikes of the last step, and the states of the neuron."""
        return ("s", *self.neuron.state_names)

    def forward(
        self, x: Tensor, v0: AnyState = None, *, return_state: bool = False, return_v: bool = False,
        return_h: bool = False, lengths: Tensor | None = None,
    ) -> Tensor | Spikes | tuple[Any, ...]:  # fmt: skip
        """Spikes [T, B, N] in x's dtype; with ``return_state`` also the state after the last step, with ``return_v`` or
        ``return_h`` the potentials after or before the reset of every step, [T, B, N], as the neuron alone gives them.

        Args:
            x: [T, B, N], what comes from outside (the axes are the neuron's ``time_dim`` and the last one).
            v0: the state before the first step, as ``return_state`` gives it: a NamedTuple of ``state_names``, each
                [B, N] float32, or a plain tuple; None is zero.
            lengths: None; samples that end before T are not told apart.

        Raises:
            TypeError, ValueError: x or v0 of another kind, shape or device; lengths.
        """
        if is_proxy(x):
            return self(x, v0, return_state=return_state, return_v=return_v, return_h=return_h, lengths=lengths)
        name, neuron = type(self).__name__, self.neuron
        if lengths is not None:
            raise ValueError(
                f"{name}: expected lengths=None, got lengths: neurons that feed each other go on behind the end of a "
                "sample; leave lengths out, and take the outputs at the end of each sample"
            )
        if "weight" not in self.linear._parameters and "parametrizations" not in self.linear._modules:
            raise RuntimeError(
                f"{name}: expected W to be a parameter of the Linear, or parametrized, got one that a hook makes "
                "before each call of the Linear, as torch.nn.utils.prune and weight_norm do, and the Linear is not "
                "called; use torch.nn.utils.parametrizations, or prune.remove()"
            )
        if not isinstance(x, Tensor):
            checks.sequence(name, x)
        if x.dim() < 3:
            warn_of_one_step(name, x)
        time = checks.axis(name, "time_dim", neuron.time_dim, x)
        x = x.movedim(time, 0)
        held = carrier()
        if held is not None:
            v0 = held.start(self, x, v0)
        s0, state = self._given(x, v0)
        want = wanted(True, return_v, return_state, packing(neuron.packed), return_h)
        asked = want if held is None else want | WANT_STATE
        out = recurrent(
            x, s0, state, self.linear.weight, self.linear.bias, neuron.values(), neuron.spec, asked, neuron.backend,
            neuron.fire_on_equal, neuron.flag_for(x),
        )  # fmt: skip
        last = self._last(out.spikes, out.state) if asked & WANT_STATE else None
        if held is not None:
            held.end(self, last)
            last = last if return_state else None
        if self.linear._forward_hooks and undisturbed():
            self._show(out.spikes, s0)
        out = out._replace(
            **{k: t.movedim(0, time) for k, t in out._asdict().items() if k != "state" and t is not None}
        )
        made = tuple(each for each in (spikes_of(out), last, out.v, out.h) if each is not None)
        return made if len(made) > 1 else made[0]

    def _given(self, x: Tensor, v0: Any) -> tuple[Tensor | None, Tensor | None]:
        """The spikes and the state before the first step, as the op takes them."""
        if v0 is None:
            return None, None
        if not isinstance(v0, (tuple, list)):
            raise TypeError(
                f"Recurrent: expected v0 to be the states {', '.join(self.state_names)} as a tuple, got "
                f"{checks.describe(v0)}; pass what return_state=True gave"
            )
        checks.states("Recurrent", v0, x, self.state_names)
        s0, *state = v0
        return s0.to(x.dtype), state[0] if len(state) == 1 else torch.stack(state)

    def _last(self, spikes: Any, state: Any) -> Any:
        neuron = self.neuron
        s = spikes[-1]
        parts = (state,) if len(neuron.state_names) == 1 else state.unbind(0)
        return state_type("RecurrentState", self.state_names)(s.to(parts[0].dtype), *parts)

    @torch.no_grad()
    def _show(self, spikes: Any, s0: Tensor | None) -> None:
        """Call the Linear for its hooks, on what was fed back: they count it."""
        first = torch.zeros_like(spikes[0]) if s0 is None else s0
        self.linear(torch.cat([first.unsqueeze(0), spikes[:-1]]).to(self.linear.weight.dtype))

    def step(self, x: Tensor, v: AnyState = None) -> tuple[Tensor, Any]:
        """One step: x [B, N] and the state after the step before (None at the start) -> spikes [B, N] and the state."""
        time = self.neuron.time_dim
        out, state = self(one_step("Recurrent", x, time), v, return_state=True)
        return dense(out).squeeze(time), state

    def backend_for(self, x: Tensor) -> str:
        """The backend that runs this layer on x; for "auto" also why the ones before it do not."""
        case = Case(OP, x.device.type, x.dtype, self.neuron.spec)
        backend = self.neuron.backend
        return explain(case) if backend == "auto" else resolve(backend, case).name

    def extra_repr(self) -> str:
        return ""


def _kind(value: object) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)
