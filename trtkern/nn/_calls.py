"""The latest calls of a neuron layer, which are made again without what follows from their kind (``ops/_again.py``)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules import module

from trtkern.ops._prepared import WANT_STATE
from trtkern.ops.batch_norm_lif import known_by as known_by_norm
from trtkern.ops.lif import known_by

if TYPE_CHECKING:
    from trtkern.nn._neuron import NeuronLayer
    from trtkern.nn.batch_norm_lif import BatchNormLIF

ABSENT: Any = ...
EMPTY: Any = NotImplemented
"""As ``trtkern.ops._same`` has them, which is imported with the first call that is kept."""
MOST = 8
"""Calls that a layer keeps, the latest first."""
PREPARED = 256
"""Calls that a layer prepares in all: one whose calls are ever others gains nothing from it."""
hooked = torch._C._autograd._top_saved_tensors_default_hooks
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
NORM_SETTINGS = (
    "training", "eps", "momentum", "channel_dim", "sync", "pool", "packed", "norm", "neuron", "_tensors",
)  # fmt: skip
"""What a call of a BatchNorm + neuron follows from besides its tensors."""
NORM_METHODS = ("norm", "neuron", "_tensors")
METHODS = (
    "forward", "outputs", "values", "_value", "_bias", "stacked", "named_state", "_run", "flag_for", "axes"
)  # fmt: skip
"""What a subclass may have put in the place of the layers' own: its calls are then made as ever."""


class Calls:
    """Of one layer. It is no part of the layer's state: a copy of the layer, and a pickled one, has none."""

    __slots__ = ("left", "made")

    def __init__(self) -> None:
        self.made: tuple[Any, ...] = ()
        self.left = PREPARED

    def __reduce__(self) -> tuple:
        return Calls, ()

    def again(self, layer: NeuronLayer, x: Any, v0: Any, want: int, step: bool = False) -> Any:
        """The outputs that are wanted (``Again``), or None where the call is to be made as ever."""
        if not self.made:
            return None
        state = _parts(layer, v0)
        if state is None:
            return None
        own = layer.__dict__
        flag = own["_buffers"]["nonfinite"]
        owns, tensors = (own,), (x, flag, *state)
        for call in self.made:
            if call.want == want and call.step is step:
                if call.learned:
                    values = layer.values()
                    learned = tuple([values.get(name) for name in call.learned])
                    if call.fits((own, values), (x, flag, *learned, *state)):
                        return call(x, flag, learned, state)
                elif call.fits(owns, tensors):
                    return call(x, flag, state)
        return None

    def keep(
        self, layer: NeuronLayer, x: Tensor, v0: Any, want: int, channel: int, on_equal: bool, step: bool = False,
        values: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """A call was made as ever: prepare it, if it is of a sort that can be made again.

        Args:
            values: the parameters of that call, where the caller has them.
        """
        if not self.left or hooked(True) is not None:
            return
        self.left -= 1
        state, own = _parts(layer, v0), _own(layer, step)
        if state is None or not own or type(x) is not Tensor:
            return
        if step and (getattr(layer, "packed", False) or x.dim() < 2):
            return
        if values is None:
            with torch.no_grad():
                values = layer.values()
        spec, flag, asked = layer.spec, layer.nonfinite, _ASKED if step else ()
        learns = any(isinstance(value, Tensor) for value in values.values())
        with torch.no_grad():
            sequence = x.unsqueeze(0) if step else x
            told = (values, spec, want, layer.backend, channel, on_equal, flag)
            key = known_by(sequence, None if v0 is None else layer.stacked(sequence, v0), *told)
        numbers = _numbers(layer)
        if numbers:
            self._add(_of("_again").again(key, x, flag, state, step, spec, want, (numbers + own,), asked))
        elif learns and not on_equal:
            rows = {name: values[name] for name in spec.row.params}
            fixed = tuple((name, value) for name, value in rows.items() if not isinstance(value, Tensor))
            self._add(
                _of("_again_learned").again_learned(key, x, flag, rows, state, step, spec, want, (own, fixed), asked)
            )

    def normed_again(self, layer: BatchNormLIF, y: Any, v0: Any, want: int) -> Any:
        """``again`` of a BatchNorm + neuron without a residual."""
        if not self.made:
            return None
        own = layer.__dict__
        lif = own["_modules"]["lif"]
        state = _parts(lif, v0)
        if state is None:
            return None
        neuron, parameters, buffers = lif.__dict__, own["_parameters"], own["_buffers"]
        norm = tuple([(parameters if i < 2 else buffers).get(name) for i, name in enumerate(NORM)])
        flag = neuron["_buffers"]["nonfinite"]
        owns, tensors = (own, neuron), (y, flag, *norm, *state)
        for call in self.made:
            if call.want == want and call.fits(owns, tensors):
                return call(y, norm, flag, state)
        return None

    def keep_normed(self, layer: BatchNormLIF, y: Tensor, v0: Any, want: int) -> None:
        """``keep`` of a BatchNorm + neuron without a residual."""
        if not self.left or hooked(True) is not None or not _numbers(layer.lif):
            return
        self.left -= 1
        lif, held = layer.lif, {**layer._parameters, **layer._buffers}
        state, own = _parts(lif, v0), _own(lif, False)
        norm, neuron = layer.norm(), layer.neuron(state=bool(want & WANT_STATE))
        own_ways = any(getattr(type(layer), name).__module__ != "trtkern.nn.batch_norm_lif" for name in NORM_METHODS)
        numbers = _numbers(lif)
        if (
            state is None
            or not own
            or not numbers
            or own_ways
            or layer.sync
            or type(y) is not Tensor
            or neuron.want != want
        ):
            return
        if any(held.get(name) is not t for name, t in zip(NORM, norm, strict=False)):
            return
        entries = tuple((name, layer.__dict__.get(name, ABSENT)) for name in NORM_SETTINGS)
        with torch.no_grad():
            v = None if v0 is None else lif.stacked(y, v0)
            key = known_by_norm(y, norm, neuron, None, v, layer.channel_dim)
        self._add(_of("_again_normed").again_normed(key, y, norm, neuron, state, (entries, numbers + own)))

    def _add(self, made: Any) -> None:
        if made is not None:
            self.made = (made, *self.made[: MOST - 1])


def _of(name: str) -> Any:
    return import_module(f"trtkern.ops.{name}")


def _hooked() -> bool:
    """Whether there is a hook of all modules."""
    return bool(module._has_any_global_hook())


_ASKED = ((_hooked, (), False),)


def _parts(layer: NeuronLayer, v0: Any) -> tuple[Tensor, ...] | None:
    """The states as tensors of their own; None where they are not."""
    if v0 is None:
        return ()
    if layer.State is None:
        return None if isinstance(v0, (tuple, list)) else (v0,)
    return tuple(v0) if isinstance(v0, tuple) and len(v0) == len(layer.state_names) else None


def _own(layer: NeuronLayer, step: bool) -> tuple[tuple[str, object], ...]:
    """The settings that a call of the layer follows from; () where it may follow from others as well."""
    kind, held = type(layer), layer.__dict__
    if any(getattr(kind, name).__module__ != "trtkern.nn._neuron" for name in METHODS):
        return ()
    if kind.__call__.__module__ != "trtkern.nn._leaf" or "parametrizations" in held["_modules"]:
        return ()  # what is evaluated at each call is evaluated once
    names = ("spec", "backend", "channel_dim", "time_dim", "fire_on_equal", "packed", *METHODS)
    own = [(name, held.get(name, ABSENT)) for name in names]
    if step:
        # It goes past Module.__call__.
        own += [(name, EMPTY) for name in HOOKS] + [("_compiled_call_impl", ABSENT), ("forward", ABSENT)]
    return tuple(own)


def _numbers(layer: NeuronLayer) -> tuple[tuple[str, object], ...]:
    """The parameters of a layer all of whose are numbers; () of another one."""
    kind, held, names = type(layer), layer.__dict__, [*layer.spec.row.params]
    if "bias" in names:
        names[names.index("bias")] = "v_leak"
    for name in names:
        # A readout has some as numbers of its class; what is a property there may be another one at the next call.
        if type(held.get(name, _of_class(kind, name))) not in (float, int, type(None)):
            return ()
    return tuple((name, held.get(name, ABSENT)) for name in names)


def _of_class(kind: type, name: str) -> Any:
    """What the class itself has by that name, a property as such."""
    return next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), ())
