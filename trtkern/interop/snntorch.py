"""The neurons of snnTorch: which of them have an equal here, and with which numbers.

snnTorch takes away what a spike resets at the step after it, and lets no gradient through that
(``reset_delay=True``): mem[t] = beta mem[t-1] + x[t] - threshold s[t-1] with "subtract",
mem[t] = beta mem[t-1] (1 - s[t-1]) + x[t] with "zero". beta is clamped to [0, 1] in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.interop._snntorch_neurons import kind_of
from trtkern.interop.adapters import Adapter, CannotConvert, base_names
from trtkern.interop.parameters import Channels, Clamped
from trtkern.interop.surrogates import surrogate
from trtkern.nn._neuron import NeuronLayer
from trtkern.nn.bounded import Bounded
from trtkern.nn.neurons import LI, LIF, AdLIF
from trtkern.ops.checks import Number

LEAST = 1e-3
"""The least decay for which the soft reset of ``LIF`` stands for the library's: it divides the threshold by it."""
SETTINGS = (
    "init_hidden",
    "inhibition",
    "output",
    "surrogate_disable",
    "_reset_mechanism",
    "state_quant",
    "reset_delay",
)
"""Attributes of the library's objects that the ones here have too."""
RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}
"""The library's resets by the function that a neuron has chosen when it was made."""


def leaky(node: Any) -> nn.Module:
    """``Leaky``: a LIF neuron with the reset of the step before."""
    channels = Channels()
    beta, threshold = _decay(channels, "beta", node.beta), channels.held("threshold", node.threshold)
    return kind_of("Leaky")(*_membrane(node, beta, threshold, channels), **_delay(node))


def lapicque(node: Any) -> nn.Module:
    """``Lapicque``: the same with decay 1 - time_step / (R C), and the input times time_step / C."""
    if _reset(node) == "zero":
        raise CannotConvert(
            "expected reset_mechanism='subtract' or 'none', got 'zero', which also drops the input of the step after a "
            "spike"
        )
    for name in ("R", "C", "time_step"):
        if getattr(node, name).requires_grad:
            raise CannotConvert(f"expected {name} without a gradient, got one (of learn_beta), which trains one step")
    channels = Channels()
    rate = node.time_step / (node.R * node.C)
    decay = channels.held("1 - time_step / (R * C)", 1 - rate)
    gain = channels.held("time_step / C", node.R * (1 / (node.R * node.C)) * node.time_step)
    threshold = channels.held("threshold", node.threshold)
    if isinstance(gain, Tensor):
        raise CannotConvert("expected one R, C and time_step for all neurons, got several")
    return kind_of("Lapicque")(*_membrane(node, decay, threshold, channels), gain=gain)


def synaptic(node: Any) -> nn.Module:
    """``Synaptic``: a current that decays by alpha in front of ``Leaky``."""
    if _reset(node) == "zero" and getattr(node, "reset_delay", True):
        raise CannotConvert(
            "expected reset_mechanism='subtract' or 'none' with reset_delay=True, got 'zero', which also drops the "
            "current of the step after a spike"
        )
    channels = Channels()
    alpha, beta = _decay(channels, "alpha", node.alpha), _decay(channels, "beta", node.beta)
    threshold = channels.held("threshold", node.threshold)
    neuron, settings = _membrane(node, beta, threshold, channels)
    current = LI(alpha, channel_dim=channels.dim)
    return kind_of("Synaptic")(current, neuron, settings, **_delay(node))


def alpha(node: Any) -> nn.Module:
    """``Alpha`` without a reset: the difference of two exponentials, and a threshold."""
    if _reset(node) != "none":
        raise CannotConvert(
            f"expected reset_mechanism='none', got {_reset(node)!r}, which resets the currents and drops the input of "
            "the step after a spike"
        )
    channels = Channels()
    fast, slow = _decay(channels, "alpha", node.alpha), _decay(channels, "beta", node.beta)
    threshold = channels.held("threshold", node.threshold)
    neuron, settings = _membrane(node, 0.0, threshold, channels)
    currents = [LI(decay, channel_dim=channels.dim) for decay in (fast, slow)]
    return kind_of("Alpha")(*currents, neuron, settings)


def _membrane(node: Any, beta: Any, threshold: Any, channels: Channels) -> tuple[NeuronLayer, dict[str, Any]]:
    """What integrates, fires and resets as the node does, and the node's settings."""
    for name in ("inhibition", "state_quant"):
        if getattr(node, name):
            raise CannotConvert(f"expected {name}=False, got {getattr(node, name)!r}")
    factor = node.graded_spikes_factor
    if isinstance(factor, nn.Parameter) or bool((factor != 1).any()):
        raise CannotConvert("expected spikes of 0 and 1, got graded_spikes_factor other than 1, or learned")
    reset, delayed = _reset(node), bool(getattr(node, "reset_delay", True))
    settings = {name: getattr(node, name) for name in SETTINGS if hasattr(node, name)}
    common: dict[str, Any] = {"v_threshold": threshold, "channel_dim": channels.dim, "detach_reset": delayed}
    common["surrogate"], common["alpha"] = _surrogate(node)
    if reset == "zero":
        return LIF(beta, v_reset=0.0, **common), settings
    if reset == "none":
        return LIF(beta, v_reset=None, reset_amount=0.0, **common), settings
    if not delayed:
        raise CannotConvert(
            "expected reset_delay=True with reset_mechanism='subtract', got False: a potential that is above the "
            "threshold after its reset then loses the threshold once more before the next spike"
        )
    numbers = not any(isinstance(each, (Bounded, nn.Parameter)) for each in (beta, threshold))
    if numbers and float(torch.as_tensor(beta).min()) >= LEAST:
        return LIF(beta, v_reset=None, reset_amount=threshold / beta, **common), settings
    # The threshold leaves by a current of one step: exact where beta is 0, and where beta or threshold are learned.
    return AdLIF(beta, 1.0, 0.0, 0.0, threshold, reset_amount=0.0, **common), settings


def _reset(node: Any) -> str:
    """The node's reset; it is chosen when the node is made, and a later change of it has no effect in the library."""
    made, said = RESETS.get(node.state_function.__name__), node.reset_mechanism
    if made != said or int(node.reset_mechanism_val) != list(node.reset_dict).index(said):
        raise CannotConvert(f"expected a reset_mechanism as the neuron was made with, got {said!r} and {made!r}")
    return said


def _delay(node: Any) -> dict[str, bool]:
    """Whether mem is the potential before the reset; without one it is both."""
    return {"delayed": bool(getattr(node, "reset_delay", True)) or _reset(node) == "none"}


def _decay(channels: Channels, name: str, value: Tensor) -> Number | Bounded:
    """A decay as the library clamps it; a learned one is the same Parameter."""
    held = channels.held(name, value)
    if isinstance(held, nn.Parameter):
        return Clamped(held)
    return held.clamp(0, 1) if isinstance(held, Tensor) else min(max(held, 0.0), 1.0)


def _levels(above: float, below: float, at: float) -> tuple[Callable, None]:
    return surrogate("levels", above=above, below=below, at=at), None


SURROGATES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "atan": lambda alpha: ("atan", alpha),
    "fast_sigmoid": lambda slope: ("fast_sigmoid", slope),
    "sigmoid": lambda slope: ("sigmoid", slope),
    "straight_through_estimator": lambda: _levels(1.0, 1.0, 1.0),
    "heaviside": lambda: _levels(1.0, 0.0, 0.0),
    "triangular": lambda threshold: _levels(-threshold, threshold, -threshold),
    "spike_rate_escape": lambda beta, slope: (surrogate("escape_rate", height=slope, center=1.0), beta),
    "SFS": lambda slope, B: (surrogate("sparse_fast_sigmoid", center=B), slope),
}
"""By the name of the function that makes the library's surrogate, (name or function, alpha) here."""


def _surrogate(node: Any) -> tuple[Any, Any]:
    """The surrogate of a node and its sharpness.

    Raises:
        CannotConvert: one that draws random numbers, or a function of the user's own.
    """
    made = node.spike_grad
    if node.surrogate_disable:
        return _levels(0.0, 0.0, 0.0)
    code = getattr(made, "__code__", None)
    name = getattr(made, "__qualname__", "").partition(".")[0]
    if code is None or getattr(made, "__module__", None) != "snntorch.surrogate" or name not in SURROGATES:
        raise CannotConvert(
            f"expected spike_grad to be one of snntorch.surrogate's {', '.join(SURROGATES)}, got "
            f"{name or type(made).__name__}; trtkern.interop.register says what a neuron of your own is"
        )
    numbers = {key: cell.cell_contents for key, cell in zip(code.co_freevars, made.__closure__ or (), strict=True)}
    for key, value in numbers.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise CannotConvert(f"expected {name} with a number for {key}, got a tensor that is trained")
        numbers[key] = float(value)
    return SURROGATES[name](**numbers)


def is_neuron(module: nn.Module) -> bool:
    """Whether a class of snnTorch without a row is a neuron, which is then named as left alone."""
    return any(
        name in ("SpikingNeuron", "LeakyParallel", "StateLeaky", "AssociativeLeaky") for name in base_names(module)
    )


ADAPTERS: tuple[Adapter, ...] = tuple(
    Adapter(name, make, "snntorch")
    for name, make in {"Leaky": leaky, "Lapicque": lapicque, "Synaptic": synaptic, "Alpha": alpha}.items()
)
