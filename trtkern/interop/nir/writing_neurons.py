"""Layers of neurons as nodes of NIR: the numbers of a step as those of continuous time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trtkern.interop.nir.dialects import Clock, Dialect
from trtkern.interop.nir.layers import Threshold
from trtkern.interop.nir.problems import Problems
from trtkern.nn._neuron import NeuronLayer, Readout, Spiking

KINDS = ("LIF", "CUBALIF")
"""The rows of ``trtkern.neurons.TABLE`` that NIR has an equation for."""


class Place(NamedTuple):
    """Where a layer stands, and how it is written."""

    path: str
    kind: str
    shape: tuple[int, ...]
    """Of a sample."""
    clock: Clock
    dialect: Dialect
    problems: Problems
    nir: Any
    """The package."""

    def refuse(self, expected: str, got: str, do: str) -> None:
        """Add a problem."""
        self.problems.add(self.path, self.kind, expected, got, do)


def neuron(layer: NeuronLayer, place: Place, numbers: dict[str, np.ndarray] | None = None) -> Any:
    """The node of a layer; None, and problems, where NIR or the reader has none.

    Args:
        layer: of ``trtkern.nn``.
        place: where it stands.
        numbers: of every neuron, where they are known already (``PerNeuron``).
    """
    before = len(place.problems.lines)
    own = Readout.forward if isinstance(layer, Readout) else Spiking.forward
    if layer.kind not in KINDS or type(layer).forward is not own:
        do = "NIR has no equation for it; take LIF or CUBALIF, or keep the model here"
        place.refuse("LIF, IF, PLIF, LI, CUBALIF, CUBALI or Threshold", place.kind, do)
        return None
    if layer.time_dim != 0:
        place.refuse("time on axis 0", f"time_dim={layer.time_dim}", "move the axis before the layer")
        return None
    if numbers is None:
        numbers = _numbers(layer, place)
    if numbers is None:
        return None
    metadata = _reset(layer, numbers, place)
    if len(place.problems.lines) > before:
        return None
    if isinstance(layer, Threshold):
        return place.nir.Threshold(threshold=numbers["v_threshold"], metadata=metadata)
    _decays(layer, numbers, place)
    if isinstance(layer, Spiking):
        _gain(numbers, place)
    else:
        _readout(layer, numbers, place)
    if len(place.problems.lines) > before:
        return None
    return (_cuba if layer.kind == "CUBALIF" else _lif)(layer, numbers, place, metadata)


def _numbers(layer: NeuronLayer, place: Place) -> dict[str, np.ndarray] | None:
    """The parameters of every neuron in float64, [*shape]."""
    axis = layer.channel_dim - 2 if layer.channel_dim >= 2 else layer.channel_dim + len(place.shape)
    found = {}
    with torch.no_grad():
        for name, value in {**layer.values(), "v_leak": layer._value("v_leak")}.items():
            spread = over_neurons(value, place.shape, axis)
            if spread is None:
                got = f"{tuple(value.shape)} along axis {axis} of {place.shape}"
                place.refuse(f"{name} to have a number for each channel", got, "set channel_dim or input_shape")
                return None
            found[name] = spread
    return found


def over_neurons(value: Any, shape: tuple[int, ...], axis: int) -> np.ndarray | None:
    """A number, or a tensor over the channels, of every neuron; None where the channels are not on that axis."""
    if not isinstance(value, Tensor):
        return np.full(shape, float(value))
    held = value.detach().cpu().double().numpy()
    if held.size == 1:
        return np.full(shape, float(held.reshape(())))
    if not 0 <= axis < len(shape) or held.size != shape[axis]:
        return None
    along = [1] * len(shape)
    along[axis] = -1
    return np.ascontiguousarray(np.broadcast_to(held.reshape(along), shape))


def _reset(layer: NeuronLayer, numbers: dict[str, np.ndarray], place: Place) -> dict[str, Any]:
    """The metadata of a spiking node; a problem where neither it nor the reader can say the reset or the firing."""
    if not isinstance(layer, Spiking) or isinstance(layer, Threshold):
        return {}
    said: dict[str, Any] = {}
    dialect, soft = place.dialect, layer.spec.reset == "soft"
    by_threshold = bool((numbers["reset_amount"] == numbers["v_threshold"]).all())
    if soft and dialect.extra:
        said["reset"] = "soft"
        if not by_threshold:
            said["reset_amount"] = numbers["reset_amount"]
    elif soft and not dialect.soft:
        do = "use a hard reset (v_reset=0.0), or dialect='trtkern' for a file that is read here again"
        place.refuse("a hard reset, the only one that NIR has", "a soft reset (v_reset=None)", do)
    elif soft and not by_threshold:
        place.refuse("a soft reset by the threshold", "another reset_amount", "leave reset_amount out")
    elif dialect.soft and not soft:
        got = "a hard reset"
        place.refuse("a soft reset (v_reset=None), which this reader makes of all", got, "train with v_reset=None")
    if layer.fire_on_equal and dialect.extra:
        said["fire_on_equal"] = 1
    elif layer.fire_on_equal and not dialect.on_equal:
        do = "set fire_on_equal=False, or dialect='trtkern' for a file that is read here again"
        place.refuse("firing above the threshold", "fire_on_equal=True", do)
    return said


def _decays(layer: NeuronLayer, numbers: dict[str, np.ndarray], place: Place) -> None:
    """A problem for each decay without a time constant."""
    for name in ("decay", "decay_syn"):
        if name not in numbers:
            continue
        value = numbers[name]
        whole = layer.kind == "LIF" and (value == 1).all()
        if (value == 1).any() and not whole:
            do = "take IF for those that do not leak" if layer.kind == "LIF" else "choose a decay below 1"
            place.refuse(f"{name} < 1", f"{name} of 1", do)
        if place.clock.method == "exponential" and (value == 0).any():
            do = "choose a decay above 0, or method='euler'"
            place.refuse(f"{name} > 0 with the exponential method", f"{name} of 0", do)
        if (value < 0).any() or (value > 1).any():
            place.refuse(f"{name} in [0, 1]", f"{value.min():g} to {value.max():g}", "bring it back, see Bounded")


def _gain(numbers: dict[str, np.ndarray], place: Place) -> None:
    """Bring the gains to those that the reader makes, by another unit of the potential, which changes no spike."""
    dialect, cuba = place.dialect, "decay_syn" in numbers
    wanted = np.ones(place.shape)
    if dialect.gain == "any" or (dialect.gain == "complement" and cuba):
        wanted = numbers["gain"]
    elif dialect.gain == "complement" or (dialect.any_leak == "reset" and not cuba):
        leaks = numbers["decay"] < 1
        complement = 1 - numbers["decay"]
        same = np.isclose(numbers["gain"], complement, rtol=1e-12, atol=0)
        if dialect.gain == "complement" or same.all():
            wanted = np.where(leaks, complement, 1.0)
    change = wanted / numbers["gain"] if (numbers["gain"] > 0).all() else None
    if cuba and dialect.gain == "one" and change is not None:
        change = change / numbers["gain_syn"] if (numbers["gain_syn"] > 0).all() else None
    if change is None:
        if dialect.gain != "any":
            place.refuse("gains > 0, since this reader has one of its own", "a gain <= 0", "put it into the weights")
        return
    if not (change == 1).all():
        for name in ("v_threshold", "v_leak", "v_reset"):
            if name in numbers:
                numbers[name] = numbers[name] * change
        numbers["gain"] = wanted
        if cuba and dialect.gain == "one":
            numbers["gain_syn"] = np.ones(place.shape)
    _potentials(numbers, place)


def _potentials(numbers: dict[str, np.ndarray], place: Place) -> None:
    """A problem where the reader takes no such v_leak or v_reset."""
    dialect, hard = place.dialect, numbers["v_reset"] if not place.dialect.soft else np.zeros(())
    if not dialect.any_reset and (hard != 0).any():
        place.refuse(
            "v_reset = 0, to which this reader resets", "another v_reset", "shift the potential, as v - v_reset"
        )
    leaks = numbers["v_leak"][numbers["decay"] < 1]
    if dialect.any_leak == "zero" or (dialect.any_leak == "reset" and "decay_syn" in numbers):
        if (leaks != 0).any():
            place.refuse("v_leak = 0, which this reader takes", "another v_leak", "put it into the bias before")
    elif dialect.any_leak == "reset" and (leaks != numbers["v_reset"][numbers["decay"] < 1]).any():
        place.refuse("v_leak = v_reset, which this reader takes", "another v_leak", "make them equal")


def _readout(layer: NeuronLayer, numbers: dict[str, np.ndarray], place: Place) -> None:
    """A problem where the reader has a readout of another gain: no threshold can make up for it."""
    if place.dialect.plain_leak and (numbers["gain"] != 1).any():
        place.refuse("gain = 1, which this reader gives to every LI", "another gain", "put it into the weights before")
    if place.dialect.any_leak == "zero" and (numbers["v_leak"] != 0).any():
        place.refuse("v_leak = 0, which this reader takes", "another v_leak", "put it into the bias before")


def _lif(layer: NeuronLayer, numbers: dict[str, np.ndarray], place: Place, metadata: dict[str, Any]) -> Any:
    nir, clock, decay, gain = place.nir, place.clock, numbers["decay"], numbers["gain"]
    firing = {}
    if isinstance(layer, Spiking):
        soft = layer.spec.reset == "soft"
        v_reset = np.zeros(place.shape) if soft else numbers["v_reset"]
        firing = {"v_threshold": numbers["v_threshold"], "v_reset": v_reset}
    if (decay == 1).all():
        node = nir.IF if firing else nir.I
        return node(r=gain / clock.rate, **firing, metadata=metadata)
    if place.dialect.vectors and len(place.shape) > 1:
        place.refuse("a vector, since this reader fails on others", f"{place.shape}", "take IF for images, or flatten")
        return None
    r = gain / (1.0 - decay)
    if not firing and place.dialect.plain_leak:
        r = gain
    node = nir.LIF if firing else nir.LI
    return node(tau=clock.tau(decay), r=r, v_leak=numbers["v_leak"], **firing, metadata=metadata)


def _cuba(layer: NeuronLayer, numbers: dict[str, np.ndarray], place: Place, metadata: dict[str, Any]) -> Any:
    nir, clock, decay, decay_syn = place.nir, place.clock, numbers["decay"], numbers["decay_syn"]
    fields = {
        "tau_syn": clock.tau(decay_syn),
        "tau_mem": clock.tau(decay),
        "r": numbers["gain"] / (1.0 - decay),
        "v_leak": numbers["v_leak"],
        "w_in": numbers["gain_syn"] / (1.0 - decay_syn),
        "metadata": metadata,
    }
    if not isinstance(layer, Spiking):
        return nir.CubaLI(**fields)
    v_reset = np.zeros(place.shape) if layer.spec.reset == "soft" else numbers["v_reset"]
    return nir.CubaLIF(v_threshold=numbers["v_threshold"], v_reset=v_reset, **fields)
