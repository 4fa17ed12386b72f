"""Neurons that are called as snnTorch's are: ``spk, mem = lif(cur, mem)``, or ``spk = lif(cur)`` with a hidden state.

They are objects of snnTorch's classes too, with its methods, so that ``snntorch.utils.reset(net)``, ``reset_mem()`` and
``detach_hidden()`` treat them as they treat its own. snnTorch is imported when the first of them is made or loaded.
"""

from __future__ import annotations

import weakref
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.interop.parameters import along
from trtkern.interop.stepping import Stepping, never_again, unfold
from trtkern.nn._neuron import NeuronLayer
from trtkern.nn.neurons import LI, AdLIF
from trtkern.ops.checks import Number


class _Membrane(Stepping):
    """What the neurons here share: the call of the library, and the potential that it calls mem.

    mem is the potential as it is compared with the threshold: the library takes what a spike resets away at the step
    after it (``reset_delay``). So the state before a step is made of mem and of whether it is above the threshold.

    Args:
        neuron: what gives spikes and potentials of a sequence.
        settings: the attributes of the library's object that a caller may read, such as ``init_hidden``.
        delayed: whether mem is the potential before the reset.
        gain: what the input is multiplied by before the neuron.
    """

    names: tuple[str, ...] = ("mem",)
    """The states that the library hands out, in its order."""
    instances: list[Any]

    def __init__(self, neuron: NeuronLayer, settings: dict[str, Any], delayed: bool = True, gain: float = 1.0) -> None:
        nn.Module.__init__(self)  # the library's own would make its parameters once more
        self.__dict__.update(settings)
        self.neuron, self.start, self.state = neuron, 0.0, None
        self.delayed, self.gain, self._listed = delayed, gain, False
        self._left: _Left | None = None
        for name in self.names:
            self.register_buffer(name, torch.zeros(0), persistent=False)

    def forward(  # type: ignore[override]
        self, input_: Tensor, *states: Tensor | None, **named: Tensor | None
    ) -> Any:
        """The spikes of one step, and the states after it unless they are hidden; of all T within ``over_time``.

        A state of another shape than the input's begins at 0, and one that is not given goes on from the last call, as
        in snnTorch. The spikes come in the dtype of the input, where snnTorch's are float32.

        Raises:
            TypeError: a state with ``init_hidden=True``, or one of another name.
            ValueError: a state within ``over_time``.
        """
        given = self._given(states, named)
        if steps := self._steps():
            if given:
                raise ValueError(
                    f"over_time: expected neurons that begin anew, got {', '.join(given)} in a call of "
                    f"{type(self).__name__}; leave the states out, or make it with init_hidden=True"
                )
            found = [each.flatten(0, 1) for each in self._shaped(unfold(input_, steps), None)]
        else:
            if len(given) < len(self.names):
                never_again(self)
            self._enlist()
            held = [given.get(name, getattr(self, name)) for name in self.names]
            held = [each if each.shape == input_.shape else torch.zeros_like(input_) for each in held]
            found = [_alone(each) for each in self._shaped(input_.unsqueeze(0), held)]
            for name, value in zip(self.names, found[1:], strict=True):
                setattr(self, name, value)
            if self._left is not None:
                self._left.remember(found[-1])
        return tuple(found) if self.output or not self.init_hidden else found[0]

    def _given(self, states: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Tensor]:
        if len(states) > len(self.names) or any(name not in self.names for name in named):
            raise TypeError(f"{type(self).__name__}: expected states {', '.join(self.names)}, got others or more")
        given = {**dict(zip(self.names, states, strict=False)), **named}
        given = {name: value for name, value in given.items() if value is not None}
        if given and self.init_hidden:
            raise TypeError(
                f"{type(self).__name__}: expected no states with init_hidden=True, got {', '.join(given)}; leave "
                "them out"
            )
        return given

    def _shaped(self, x: Tensor, states: list[Tensor] | None) -> list[Tensor]:
        """``run`` where x [T, ...] may have fewer axes than a sequence [T, B, C]."""
        if x.dim() >= 3:
            return self.run(x, states)
        shape = (x.shape[0], 1, -1) if x.dim() == 2 and states is not None else (x.shape[0], -1, 1)
        states = states and [each.reshape(shape[1:]) for each in states]
        return [each.reshape(x.shape) for each in self.run(x.reshape(shape), states)]

    def run(self, x: Tensor, states: list[Tensor] | None) -> list[Tensor]:
        """Spikes and states of every step of x [T, B, C, ...]; ``states`` are those before the first, None is 0."""
        return self._potential(x, None if states is None else states[-1])

    def _potential(self, x: Tensor, mem: Tensor | None) -> list[Tensor]:
        """Spikes and mem of every step."""
        x = x if self.gain == 1.0 else x * self.gain
        wanted = {"return_h": self.delayed, "return_v": not self.delayed}
        if mem is None:
            return list(self.neuron(x, None, **wanted))
        spikes, state, after = self.neuron(x, self._before(mem), return_state=True, **wanted)
        self._left = _Left(state)
        return [spikes, after]

    def _before(self, mem: Tensor) -> Any:
        """The neuron's state of mem: what the call before left with it, if it is that mem; else it is made of it."""
        if self._left is not None and (state := self._left.of(mem)) is not None:
            return state
        mem = mem.to(torch.promote_types(mem.dtype, torch.float32))
        if not self.delayed:
            return mem
        neuron = self.neuron
        fired, hard = mem > self._along("v_threshold"), neuron.spec.reset == "hard"
        if isinstance(neuron, AdLIF):
            return neuron.State(v=mem, w=fired.to(mem.dtype) * self._along("b"))
        if hard:
            return mem.masked_fill(fired, 0.0)
        amount = self._along("reset_amount")
        return mem if isinstance(amount, float) and amount == 0.0 else torch.where(fired, mem - amount, mem)

    def _along(self, name: str) -> Number:
        """A parameter of the neuron as it broadcasts with one step."""
        return along(self.neuron._value(name), self.neuron.channel_dim)

    def reset(self) -> None:
        """Forget the state: the next call is a first step."""
        for name in self.names:
            setattr(self, name, torch.zeros_like(getattr(self, name)))

    def detach(self, *states: Tensor) -> None:
        """Let no gradient through the state to the steps before."""
        for name in self.names:
            setattr(self, name, getattr(self, name).detach())

    def _enlist(self) -> None:
        """Into the list that the library resets and detaches by; out of it when nobody holds the layer any more."""
        if not self._listed:
            instances, entry = self.instances, weakref.proxy(self)
            instances.append(entry)
            weakref.finalize(self, _strike, instances, entry)
            self._listed = True

    def __getstate__(self) -> dict[str, Any]:
        # A copy and a file hold the network, not what one of its sequences has left.
        states = {name: getattr(self, name).new_zeros(0) for name in self.names}
        return {**self.__dict__, "_buffers": {**self._buffers, **states}, "_listed": False, "_left": None}

    def extra_repr(self) -> str:
        """Whether the state is hidden, and what the input is multiplied by."""
        gain = "" if self.gain == 1.0 else f", gain={self.gain:g}"
        return f"init_hidden={self.init_hidden}, output={self.output}{gain}"


class _Left:
    """The state that a step has left, beside the mem that the caller got of it.

    Args:
        state: of the neuron, after its reset.
    """

    def __init__(self, state: Any) -> None:
        self.state, self.version = state, 0
        self.mem: Tensor | None = None

    def remember(self, mem: Tensor) -> None:
        """That it belongs to this mem."""
        self.mem, self.version = mem, -1 if mem.is_inference() else mem._version

    def of(self, mem: Tensor) -> Any:
        """The state of mem; None of another mem, of one that was changed, and of one that is cut from its graph."""
        if mem is not self.mem or self.version < 0 or mem._version != self.version:
            return None
        first = self.state[0] if isinstance(self.state, tuple) else self.state
        return self.state if mem.requires_grad or not first.requires_grad else None


class _Current(_Membrane):
    """A membrane behind a synaptic current: ``spk, syn, mem = lif(cur, syn, mem)``.

    Args:
        current: what gives the current of a sequence.
        membrane: what ``_Membrane`` takes.
    """

    names = ("syn", "mem")

    def __init__(self, current: LI, neuron: NeuronLayer, settings: dict[str, Any], **membrane: Any) -> None:
        super().__init__(neuron, settings, **membrane)
        self.current = current

    def run(self, x: Tensor, states: list[Tensor] | None) -> list[Tensor]:
        """Spikes, currents and potentials of every step."""
        syn = self.current(x, None if states is None else _wide(states[0]))
        spikes, mem = self._potential(syn, None if states is None else states[1])
        return [spikes, syn, mem]


class _Kernel(_Membrane):
    """Two currents and no membrane: ``spk, syn_exc, syn_inh, mem = lif(cur, syn_exc, syn_inh, mem)``.

    mem is tau * (syn_exc + syn_inh), the convolution of the input with the difference of two exponentials, and
    tau = ln(alpha) / (ln(beta) - ln(alpha)) + 1.

    Args:
        excitatory, inhibitory: what gives the currents, of decay alpha and beta.
        neuron: one that keeps nothing from step to step.
        settings: as in ``_Membrane``.
    """

    names = ("syn_exc", "syn_inh", "mem")

    def __init__(self, excitatory: LI, inhibitory: LI, neuron: NeuronLayer, settings: dict[str, Any]) -> None:
        super().__init__(neuron, settings)
        self.excitatory, self.inhibitory = excitatory, inhibitory

    def run(self, x: Tensor, states: list[Tensor] | None) -> list[Tensor]:
        """Spikes, currents and potentials of every step."""
        first, second = (None, None) if states is None else (_wide(states[0]), _wide(states[1]))
        exc, inh = self.excitatory(x, first), self.inhibitory(-x, second)
        decays = (each._value("decay") for each in (self.excitatory, self.inhibitory))
        fast, slow = (torch.as_tensor(decay, dtype=torch.float64).log() for decay in decays)
        mem = along((fast / (slow - fast) + 1).to(x), self.neuron.channel_dim) * (exc + inh)
        return [self.neuron(mem), exc, inh, mem]


def _alone(sequence: Tensor) -> Tensor:
    """The only step of a sequence; a copy, since the library detaches states in place, which a view cannot be."""
    return sequence.squeeze(0).clone()


def _wide(state: Tensor) -> Tensor:
    """A state in the dtype that a neuron takes."""
    return state.to(torch.promote_types(state.dtype, torch.float32))


def _strike(instances: list[Any], entry: Any) -> None:
    instances[:] = [each for each in instances if each is not entry]


KINDS: dict[str, type[_Membrane]] = {
    "Leaky": _Membrane, "Lapicque": _Membrane, "Synaptic": _Current, "Alpha": _Kernel,
}  # fmt: skip
"""By the name of the library's class, what computes it here."""


def kind_of(name: str) -> Any:
    """The class whose objects are snnTorch's ``name``, and computed here."""
    held = globals().get(f"Fused{name}")
    if held is None:
        base = getattr(import_module("snntorch"), name)
        held = type(f"Fused{name}", (KINDS[name], base), {"__module__": __name__, "__doc__": KINDS[name].__doc__})
        globals()[f"Fused{name}"] = held
    return held


def __getattr__(name: str) -> Any:
    # A pickle finds the classes by their names here.
    if name.startswith("Fused") and name.removeprefix("Fused") in KINDS:
        return kind_of(name.removeprefix("Fused"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
