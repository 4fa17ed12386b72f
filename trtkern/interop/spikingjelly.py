"""The neurons of SpikingJelly, 0.0.0.0.4 to 2.0: which of them have an equal here, and with which numbers.

The names of old versions (``MultiStepLIFNode``, ...) are what papers' code uses; they differ in how they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trtkern import nn as snn
from trtkern.interop._spikingjelly_layers import dropout, readout, stepwise
from trtkern.interop._spikingjelly_surrogates import surrogate_of
from trtkern.interop.adapters import Adapter, CannotConvert, base_names, unlike
from trtkern.interop.stepping import FromStart, Stepping
from trtkern.nn._neuron import Spiking

PACKAGE = "spikingjelly"
OFF = {"store_v_seq": False, "store_state_seqs": False, "_neuron_precision": None, "detach_input": False}
"""Settings that have to be off: potentials kept for the user, precisions of its own, another gradient of the input."""


def number(node: Any, name: str) -> Any:
    """A setting of a neuron: a number, or the Parameter or tensor of one value that it is.

    Raises:
        CannotConvert: it is something else.
    """
    value = getattr(node, name)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise CannotConvert(f"expected {name} to be one number, got {shown}")
    return float(value)


def rate(node: Any) -> Any:
    """1 / tau."""
    # The neurons that were compiled for CUDA hold it as such.
    value = number(node, "reciprocal_tau") if hasattr(node, "reciprocal_tau") else 1 / number(node, "tau")
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise CannotConvert("expected tau to be a number, got one that is trained; ParametricLIFNode trains it")
        return float(value)
    return value


def common(node: Any) -> dict[str, Any]:
    """What all spiking neurons of SpikingJelly have."""
    unlike(node, f"a {type(node).__name__}", **OFF)
    return {
        "v_threshold": number(node, "v_threshold"),
        "v_reset": None if node.v_reset is None else number(node, "v_reset"),
        "detach_reset": bool(node.detach_reset),
        "fire_on_equal": True,
        **surrogate_of(node),
    }


def rest(node: Any) -> Any:
    """The potential that its membrane leaks to: v_reset, or 0 with the soft reset."""
    return 0.0 if node.v_reset is None else number(node, "v_reset")


def integrate_and_fire(node: Any) -> Spiking:
    """IFNode."""
    return snn.IF(**common(node))


def leaky(node: Any) -> Spiking:
    """LIFNode: the input decays too unless ``decay_input=False``."""
    gain = rate(node) if getattr(node, "decay_input", True) else 1.0
    return snn.LIF(1 - rate(node), gain, v_leak=rest(node), **common(node))


def parametric(node: Any) -> Spiking:
    """ParametricLIFNode: 1 / tau is sigmoid(w), and w stays the same Parameter."""
    layer = snn.PLIF(decay_input=bool(getattr(node, "decay_input", True)), v_leak=rest(node), **common(node))
    layer.w = node.w
    return layer


def quadratic(node: Any) -> Spiking:
    """QIFNode."""
    own = {name: number(node, name) for name in ("tau", "a0", "v_rest", "v_c")}
    return snn.QIF(**own, **common(node))


def exponential(node: Any) -> Spiking:
    """EIFNode."""
    own = {name: number(node, name) for name in ("tau", "theta_rh", "v_rest")}
    return snn.EIF(delta_t=number(node, "delta_T"), **own, **common(node))


def izhikevich(node: Any) -> Spiking:
    """IzhikevichNode."""
    unlike(node, "an IzhikevichNode", w_rest=0.0)
    if node.detach_reset and node.b != 0:
        raise CannotConvert(
            f"expected b=0 where detach_reset=True, got b={node.b!r}: here nothing that follows a spike has a gradient "
            "then, there the recovery has one"
        )
    own = {name: number(node, name) for name in ("tau", "a0", "v_rest", "v_c", "tau_w", "a", "b")}
    return snn.Izhikevich(**own, **common(node))


def complementary(node: Any) -> Spiking:
    """ComplementaryLIFNode."""
    return snn.CLIF(1 - rate(node), 1.0, rate(node), **common(node))


def current_based(node: Any) -> Spiking:
    """CUBALIFNode: neither the current nor the potential scales what comes in."""
    return snn.CUBALIF(number(node, "c_decay"), 1.0, number(node, "v_decay"), 1.0, **common(node))


def placed(make: Callable[[Any], Spiking], start: Callable[[Any], Any]) -> Callable[[Any], nn.Module]:
    """The function of a row: the layer, called as the neuron's step mode has it, from where its potential starts."""

    def row(node: Any) -> nn.Module:
        mode = getattr(node, "step_mode", "m" if type(node).__name__.startswith("MultiStep") else "s")
        layer, begun = make(node), start(node)
        if isinstance(begun, Tensor):
            raise CannotConvert(f"expected v_reset to be a number, got a tensor {list(begun.shape)}")
        if mode == "s":
            return Stepping(layer, begun)
        return layer if begun == 0 else FromStart(layer, begun)

    return row


SPIKING: dict[str, tuple[Callable[[Any], Spiking], Callable[[Any], Any], tuple[str, ...]]] = {
    "IFNode": (integrate_and_fire, rest, ()),
    "LIFNode": (leaky, rest, ()),
    "ParametricLIFNode": (parametric, rest, ("w",)),
    "QIFNode": (quadratic, rest, ("tau", "a0", "v_rest", "v_c")),
    "EIFNode": (exponential, rest, ("tau", "delta_T", "theta_rh", "v_rest")),
}
"""The neurons that old and new versions have: the layer, where its potential starts, and its own fields."""
FIELDS = ("v_threshold", "v_reset", "surrogate_function", "detach_reset")


def rows(package: str, wrap: Callable[[Callable[[Any], nn.Module]], Callable[[Any], nn.Module]]) -> list[Adapter]:
    """Rows for both names of each neuron, the plain one and MultiStep...: of that package, or of any with "".

    Args:
        wrap: changes the function of a row.
    """
    return [
        Adapter(prefix + name, wrap(placed(make, start)), package, (*FIELDS, *own))
        for name, (make, start, own) in SPIKING.items()
        for prefix in ("", "MultiStep")
    ]


def _zero(node: Any) -> float:
    return 0.0


def _half(node: Any) -> Any:
    return number(node, "v_threshold") / 2


ADAPTERS: tuple[Adapter, ...] = (
    *rows(PACKAGE, lambda make: make),
    # These start at 0 whatever v_reset is.
    Adapter("SimpleIFNode", placed(integrate_and_fire, _zero), PACKAGE, FIELDS),
    Adapter("SimpleLIFNode", placed(leaky, _zero), PACKAGE, (*FIELDS, "tau", "decay_input")),
    Adapter("HalfThresholdIFNode", placed(integrate_and_fire, _half), PACKAGE, FIELDS),
    Adapter("IzhikevichNode", placed(izhikevich, rest), PACKAGE, (*FIELDS, "tau_w", "a", "b")),
    Adapter("ComplementaryLIFNode", placed(complementary, rest), PACKAGE, (*FIELDS, "tau")),
    Adapter("CUBALIFNode", placed(current_based, rest), PACKAGE, (*FIELDS, "c_decay", "v_decay")),
    Adapter("NonSpikingIFNode", readout, PACKAGE, ("decode",)),
    Adapter("NonSpikingLIFNode", readout, PACKAGE, ("decode", "tau")),
    *(
        Adapter(name, dropout, PACKAGE, ("p",))
        for name in ("Dropout", "Dropout2d", "MultiStepDropout", "MultiStepDropout2d")
    ),
    Adapter("MultiStepContainer", stepwise, PACKAGE, neuron=False),
    Adapter("StepModeContainer", stepwise, PACKAGE, ("stateful", "step_mode"), neuron=False),
)


def is_neuron(module: nn.Module) -> bool:
    """Whether a layer of SpikingJelly without a row keeps a state, or fires: it is then named as left alone."""
    stateful = {"MemoryModule", "BaseNode", "NonSpikingBaseNode"}
    return not stateful.isdisjoint(base_names(module)) or hasattr(module, "surrogate_function")
