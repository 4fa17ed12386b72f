"""The neurons of Norse: which of them have an equal here, and with which numbers.

Norse integrates with a step dt of Euler: v += dt tau_mem_inv (v_leak - v + i), so the decay is 1 - dt tau_mem_inv. Its
resets let gradients through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.interop._norse_lift import lift
from trtkern.interop._norse_neurons import (
    LIVE,
    AdaptiveDynamics,
    Dynamics,
    NorseCell,
    NorseLayer,
    SynapticDynamics,
    Weighted,
)
from trtkern.interop.adapters import Adapter, CannotConvert, base_names
from trtkern.interop.parameters import Channels
from trtkern.interop.surrogates import surrogate
from trtkern.nn.neurons import ALIF, CUBALI, CUBALIF, LI, LIF

Numbers = Callable[[Any, float], Mapping[str, Any]]


def _rate(dt: float, tau_inv: Any) -> Any:
    """dt * tau_inv as the library rounds it."""
    made = dt * tau_inv
    return made.double() if isinstance(made, Tensor) else made


def lif_numbers(p: Any, dt: float) -> Mapping[str, Any]:
    """Of ``LIFParameters``, as ``CUBALIF`` takes them."""
    membrane = {"decay": 1 - _rate(dt, p.tau_mem_inv), "v_leak": p.v_leak, "v_threshold": p.v_th, "v_reset": p.v_reset}
    return {"decay_syn": 1 - _rate(dt, p.tau_syn_inv), "gain_syn": 1.0, **membrane}


def li_numbers(p: Any, dt: float) -> Mapping[str, Any]:
    """Of ``LIParameters``, as ``CUBALI`` takes them."""
    decays = {"decay_syn": 1 - _rate(dt, p.tau_syn_inv), "decay": 1 - _rate(dt, p.tau_mem_inv)}
    return {**decays, "gain_syn": 1.0, "v_leak": p.v_leak}


def box_numbers(p: Any, dt: float) -> Mapping[str, Any]:
    """Of ``LIFBoxParameters`` with ``reset_value``, as ``LIF`` takes them."""
    return {**li_box_numbers(p, dt), "v_threshold": p.v_th, "v_reset": p.v_reset}


def soft_box_numbers(p: Any, dt: float) -> Mapping[str, Any]:
    """Of ``LIFBoxParameters`` with ``reset_subtract``, as ``LIF`` takes them."""
    return {**li_box_numbers(p, dt), "v_threshold": p.v_th, "v_reset": None, "reset_amount": p.v_th}


def li_box_numbers(p: Any, dt: float) -> Mapping[str, Any]:
    """Of ``LIBoxParameters``, as ``LI`` takes them."""
    rate = _rate(dt, p.tau_mem_inv)
    return {"decay": 1 - rate, "gain": rate, "v_leak": p.v_leak}


def iaf_numbers(p: Any, dt: float) -> Mapping[str, Any]:
    """Of ``IAFParameters``, as ``LIF`` takes them."""
    return {"decay": 1.0, "gain": 1.0, "v_threshold": p.v_th, "v_reset": p.v_reset}


def lsnn_numbers(p: Any, dt: float) -> Mapping[str, Any]:
    """Of ``LSNNParameters``, as ``ALIF`` takes them: b is the threshold with its adaptation, which decays first."""
    decay, kept = 1 - _rate(dt, p.tau_mem_inv), 1 - _rate(dt, p.tau_adapt_inv)
    membrane = {"decay": decay, "v_leak": p.v_leak, "v_threshold": p.v_th, "v_reset": p.v_reset}
    return {**membrane, "decay_a": kept, "gain_a": p.beta, "beta": kept}


def lsnn_current(p: Any, dt: float) -> Mapping[str, Any]:
    """Of ``LSNNParameters``, as ``LI`` takes them for the current."""
    return {"decay": 1 - _rate(dt, p.tau_syn_inv), "gain": 1.0}


def _neuron(kind: type[Any], numbers: Numbers, node: Any, channels: Channels, **options: Any) -> Any:
    """A neuron of these numbers; one that follows them where one of them is trained."""
    found = numbers(node.p, node.dt)
    held = {name: None if value is None else channels.held(name, _still(value)) for name, value in found.items()}
    trained = any(isinstance(value, Tensor) and value.requires_grad for value in found.values())
    chosen: Any = LIVE[kind] if trained else kind
    made = chosen(**held, **options, channel_dim=channels.dim)
    if trained:
        made.numbers, made.p, made.dt = numbers, node.p, node.dt
    return made


def _still(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _expect(node: Any, step: str) -> None:
    """The settings that must be as they are by default, and the function that the layer runs."""
    found = getattr(node.activation, "__name__", type(node.activation).__name__)
    if found != step:
        raise CannotConvert(f"expected {step}, got {found}, which has gradients of another kind")
    if getattr(node, "record_states", False):
        raise CannotConvert("expected record_states=False, got True, which also returns the states of every step")


def _start(value: Any) -> float:
    """A potential that all neurons start at."""
    if isinstance(value, Tensor) and value.numel() > 1:
        raise CannotConvert(f"expected one potential to start at, got {value.numel()}")
    return float(_still(value))


def _state(path: str, name: str) -> type[Any]:
    return getattr(import_module(f"norse.torch.functional.{path}"), name)


def _lif(node: Any) -> Dynamics:
    _expect(node, "lif_feed_forward_step")
    neuron = _neuron(CUBALIF, lif_numbers, node, Channels(), **_surrogate(node.p))
    return SynapticDynamics(neuron, _state("lif", "LIFFeedForwardState"), _start(node.p.v_leak))


def _li(node: Any) -> Dynamics:
    neuron = _neuron(CUBALI, li_numbers, node, Channels())
    return SynapticDynamics(neuron, _state("leaky_integrator", "LIState"), _start(node.p.v_leak))


def _li_of_activation(node: Any) -> Dynamics:
    _expect(node, "li_feed_forward_step")
    return _li(node)


def _li_linear(node: Any) -> Dynamics:
    return Weighted(node.input_weights, _li(node))


def _li_box(node: Any) -> Dynamics:
    _expect(node, "li_box_feed_forward_step")
    neuron = _neuron(LI, li_box_numbers, node, Channels())
    return Dynamics(neuron, _state("leaky_integrator_box", "LIBoxState"), _start(node.p.v_leak))


def _lif_box(node: Any) -> Dynamics:
    _expect(node, "lif_box_feed_forward_step")
    resets = {"reset_value": box_numbers, "reset_subtract": soft_box_numbers}
    reset = getattr(node.p.reset_method, "__name__", "")
    if reset not in resets or node.p.reset_method.__module__ != "norse.torch.functional.reset":
        raise CannotConvert(f"expected reset_method to be one of {', '.join(resets)}, got {reset}")
    neuron = _neuron(LIF, resets[reset], node, Channels(), **_surrogate(node.p))
    return Dynamics(neuron, _state("lif_box", "LIFBoxFeedForwardState"), _start(node.p.v_leak))


def _iaf(node: Any) -> Dynamics:
    _expect(node, "iaf_feed_forward_step")
    neuron = _neuron(LIF, iaf_numbers, node, Channels(), **_surrogate(node.p))
    return Dynamics(neuron, _state("iaf", "IAFFeedForwardState"), _start(node.p.v_reset), "v_reset")


def _lsnn(node: Any) -> Dynamics:
    _expect(node, "lsnn_feed_forward_step")
    channels = Channels()
    current = _neuron(LI, lsnn_current, node, channels)
    neuron = _neuron(ALIF, lsnn_numbers, node, channels, **_surrogate(node.p))
    current.channel_dim = neuron.channel_dim
    return AdaptiveDynamics(current, neuron, _state("lsnn", "LSNNFeedForwardState"), _start(node.p.v_leak))


ERFC = 2 / float(torch.tensor(math.pi).sqrt())
"""2 / sqrt(pi), the height of the derivative of erfc, as the library rounds it: in float32."""
SURROGATES: dict[str, Callable[[float], tuple[Any, Any]]] = {
    "super": lambda alpha: ("fast_sigmoid", 1.0),  # the library's derivative does not look at alpha
    "triangle": lambda alpha: (surrogate("tent", height=alpha), 1.0),
    "tanh": lambda alpha: (surrogate("squared_sech"), alpha),
    "heavi_erfc": lambda alpha: (surrogate("gaussian", height=ERFC), alpha * math.sqrt(2)),
    "heaviside": lambda alpha: (surrogate("levels", above=0.0, below=0.0, at=0.0), None),
}
"""By the library's ``method``, the surrogate and its sharpness here for its alpha."""


def _surrogate(p: Any) -> dict[str, Any]:
    """How the neuron's spikes are differentiated."""
    if p.method not in SURROGATES:
        raise CannotConvert(f"expected method to be one of {', '.join(SURROGATES)}, got {p.method!r}")
    if isinstance(p.alpha, Tensor) and (p.alpha.numel() > 1 or p.alpha.requires_grad):
        raise CannotConvert("expected alpha to be one number, got several, or one that is trained")
    made, alpha = SURROGATES[p.method](float(p.alpha))
    return {"surrogate": made, "alpha": alpha}


def _rows() -> tuple[Adapter, ...]:
    both = {"LIF": _lif, "LI": _li_of_activation, "LSNN": _lsnn, "IAF": _iaf}
    cells = {f"{name}Cell": make for name, make in both.items()}
    cells |= {"LIFBoxCell": _lif_box, "LIBoxCell": _li_box, "LILinearCell": _li_linear}

    def row(name: str, make: Callable[[Any], Dynamics], outer: Callable[[Dynamics], nn.Module]) -> Adapter:
        return Adapter(name, lambda node: outer(make(node)), "norse", ("p", "dt"))

    layers = [row(name, make, NorseLayer) for name, make in both.items()]
    return (*layers, *(row(name, make, NorseCell) for name, make in cells.items()), LIFT)


LIFT = Adapter("Lift", lift, "norse", ("lifted_module", "is_stateful"), neuron=False)
ADAPTERS: tuple[Adapter, ...] = _rows()

STATEFUL = (
    "SNN",
    "SNNCell",
    "SNNRecurrent",
    "SNNRecurrentCell",
    "CobaLIFCell",
    "LILinearCell",
    "LIFCorrelation",
    "ExpFilter",
)


def is_neuron(module: nn.Module) -> bool:
    """Whether a class of Norse without a row is a neuron, which is then named as left alone."""
    return any(name in STATEFUL for name in base_names(module))
