"""The layer of a neuron of a user's own (``trtkern.neurons.register``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from trtkern import neurons
from trtkern.names import nearest, unknown
from trtkern.nn._neuron import NeuronLayer, Spiking
from trtkern.nn._states import state_type
from trtkern.nn.bounded import Bounded
from trtkern.ops import checks
from trtkern.ops.checks import Number
from trtkern.rows import OPTIONS, Registered
from trtkern.spec import LIFSpec


class Neuron(Spiking):
    """Neurons of your own, over whole sequences: what ``trtkern.neurons.register`` was given, as a layer like ``LIF``::

        ADEX = trtkern.neurons.register("AdEx", states=("v", "w"), params={"tau": 2.0, ...}, ...)
        layer = snn.Neuron(ADEX, tau=snn.Bounded(3.0, "softplus", low=1e-3), surrogate="atan")

    Args:
        neuron: what ``register`` returned, or the name that it was given, whose latest neuron is then meant.
        surrogate, alpha, detach_reset, packed, time_dim, channel_dim, backend: as in ``LIF``.
        fire_on_equal: as in ``LIF``; of a neuron whose threshold is its parameter ``v_threshold`` alone.
        reset: "hard" or "soft", of a neuron with a settle function for each; None is soft where ``v_reset=None``,
            else the first one.
        values: its parameters by name: a number, a tensor of shape [] or [C], an ``nn.Parameter`` or a ``Bounded``.
            What is not given is the default that it was registered with.

    Inputs, outputs, state and errors are as ``LIF`` has them; ``state_names`` are those that it was registered with,
    and two states are a NamedTuple.

    Raises:
        TypeError: a parameter that the neuron does not have, or one without a default that is not given.
        ValueError: an unknown neuron, a parameter out of its range, a setting that it cannot have.
    """

    def __init__(
        self,
        neuron: str,
        /,
        *,
        surrogate: str | Callable = "triangle",
        alpha: float | None = None,
        detach_reset: bool = False,
        fire_on_equal: bool = False,
        packed: bool = False,
        reset: str | None = None,
        time_dim: int = 0,
        channel_dim: int = 2,
        backend: str = "auto",
        **values: Number | Bounded | None,
    ) -> None:
        row = registered(neuron)
        given = _given(row, values)
        chosen = _reset(row, given, reset)
        spec = LIFSpec(chosen, surrogate, alpha, detach_reset, row.name)
        NeuronLayer.__init__(self, spec, time_dim, channel_dim, backend)
        if taken := [name for name in given if hasattr(self, name)]:
            raise ValueError(
                f"{row.short}: expected parameters whose names no attribute of a layer has, got {taken[0]!r}; register "
                "the neuron with another name for it"
            )
        self.packed, self.fire_on_equal, self._own = packed, fire_on_equal, row.params
        self.State = _state_type(row)
        for name, value in given.items():
            if value is None:
                setattr(self, name, None)
            else:
                self._hold(name, value)
        if fire_on_equal and not row.still:
            raise ValueError(
                f"{row.short}: expected fire_on_equal=False, since its threshold is not its parameter v_threshold, got "
                f"{fire_on_equal!r}"
            )
        if fire_on_equal:
            checks.above_zero(row.short, self._value("v_threshold"))

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The neuron's whole name."""
        return self.spec.neuron

    @property
    def still_threshold(self) -> bool:  # type: ignore[override]
        """Whether there is a number before its threshold."""
        return registered(self.kind).still

    def _hold(self, name: str, value: Number | Bounded) -> None:
        row = registered(self.kind)
        if isinstance(value, Bounded):
            checks.held_range(row.short, name, value.low, value.high, row.ranges)
        else:
            checks.held_parameter(row.short, name, value, row.ranges)
        self._put(name, value)

    def values(self) -> dict[str, Number]:
        """The numbers and tensors of the next call by name."""
        numbers, found = self.__dict__, {}
        for name in self.spec.row.params:
            value = numbers[name] if name in numbers else self._value(name)
            found[name] = 0.0 if value is None else value
        return found

    def _settings(self) -> dict[str, object]:
        spec = self.spec
        return {
            **{name: getattr(self, name) for name in self._own},
            **({"reset": spec.reset} if len(spec.row.settle) > 1 else {}),
            "surrogate": spec.surrogate,
            "alpha": spec.alpha,
            "detach_reset": spec.detach_reset,
            **{name: True for name in ("fire_on_equal", "packed") if getattr(self, name)},
        }

    def extra_repr(self) -> str:
        """The settings, as they would be passed to the constructor."""
        return f"{registered(self.kind).short!r}, {super().extra_repr()}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "State"}  # which is made, not imported

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        row = registered(self.kind)
        self.State = _state_type(row)
        lost = [name for name in row.params if not hasattr(self, name)]
        if lost or set(self._own) != set(row.params):
            changed = [*lost, *(name for name in self._own if name not in row.params)]
            raise ValueError(
                f"{row.short}: expected the parameters {', '.join(row.params)} in a saved layer, got one with "
                f"{', '.join(self._own)}: {', '.join(changed)} came or went since; register the neuron as it was"
            )


def registered(name: str) -> Registered:
    """The row of a neuron of the user's own.

    Raises:
        TypeError, ValueError: no name of one.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"Neuron: expected what trtkern.neurons.register returned, or a name that was registered, got {name!r}"
        )
    row = neurons.lookup(name)
    if not isinstance(row, Registered):
        raise ValueError(f"Neuron: expected a neuron that was registered, got {name!r}, which is snn.{name}")
    return row


def maker(neuron: Any) -> Callable[..., Spiking]:
    """What makes layers of a neuron: a class of spiking neurons as it is, of a name of the user's own a partial.

    Raises:
        TypeError, ValueError: neither.
    """
    return neuron if isinstance(neuron, type) else partial(Neuron, registered(neuron).name)


def _given(row: Registered, values: dict[str, Any]) -> dict[str, Any]:
    """The parameters with their defaults."""
    for name in values:
        if name not in row.params:
            raise TypeError(str(unknown(row.short, name, (*row.params, *OPTIONS))))
    given = {name: values.get(name, row.defaults[name]) for name in row.params}
    for name, value in given.items():
        if value is None and not (name == "v_reset" and "soft" in row.settle and name in values):
            hint = nearest(name, [each for each in values if each not in row.params])
            raise TypeError(f"{row.short}: expected a value of {name}, which has no default, got none{hint}")
    return given


def _reset(row: Registered, given: dict[str, Any], asked: str | None) -> str:
    """Which settle function."""
    if asked is None:
        return "soft" if "v_reset" in given and given["v_reset"] is None else next(iter(row.settle))
    if asked not in row.settle:
        raise ValueError(f"{row.short}: expected reset to be {' or '.join(row.settle)}, got {asked!r}")
    return asked


def _state_type(row: Registered) -> Any:
    """The NamedTuple of the states of a neuron with two."""
    kind = f"{row.short.replace('.', '_').replace('-', '_')}State"
    return None if len(row.states) == 1 else state_type(kind, row.states)
