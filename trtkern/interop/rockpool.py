"""The neurons of Rockpool: which of them have an equal here, and with which numbers.

A layer of Rockpool is more than its equations: a node of Rockpool's own tree of modules, which its containers, its
training, its files and its mapping to hardware read. So what takes its place is a class derived from it, all of whose
equations are computed by fused ops; that class is made when Rockpool is there already, since a layer of it is.

The potential is kept in units of the threshold, w = v / threshold. Rockpool's surrogates are functions of
v / threshold, and a spike subtracts 1 of it, so that a threshold is no more than a factor of what comes in.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.interop.adapters import Adapter, CannotConvert, base_names
from trtkern.interop.surrogates import surrogate
from trtkern.ops.checks import Number
from trtkern.ops.lif import neuron as run_neuron
from trtkern.ops.lif import wanted
from trtkern.spec import LIFSpec

STATES = ("vmem", "isyn", "spikes")
PLACES = {
    "LIFTorch": "rockpool.nn.modules.torch.lif_torch",
    "LIFNeuronTorch": "rockpool.nn.modules.torch.lif_neuron_torch",
    "ExpSynTorch": "rockpool.nn.modules.torch.exp_syn_torch",
}
"""Where each class is that has an equal here."""
FILTER = LIFSpec("none")
"""A potential that leaks and never fires."""
NO_FIRING: dict[str, Number] = {"bias": 0.0, "reset_amount": 1.0, "v_threshold": 1.0, "v_reset": 0.0}


def filtered(x: Tensor, decay: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """i[t] = decay * (i[t-1] + x[t]) over x [T, B, N], i being ``start`` [B, N] before; and the last i."""
    values = {**NO_FIRING, "decay": decay, "gain": decay}
    made = run_neuron(x, start, values, FILTER, wanted(False, True, True, False))
    assert made.v is not None and made.state is not None
    return made.v, made.state


class _Fused:
    """What is derived from a class of Rockpool, in front of it: the state, and the steps that all of them share."""

    fused_spec: LIFSpec
    """The membrane's, in units of the threshold."""

    def __setattr__(self, key: str, value: Any) -> None:
        if key in STATES:
            vars(self)["_begun"] = True
        super().__setattr__(key, value)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        known: Any = self
        spec = self.__dict__.get("fused_spec")
        shown = "" if spec is None else f", surrogate={spec.surrogate!r}, alpha={spec.alpha:g}"
        return f"{type(self).__name__}(shape={known._shape}, dt={known.dt:g}{shown})"

    def _sequence(self, x: Tensor) -> Tensor:
        """x [B, T, N] or in the other forms that Rockpool takes, as [T, B, N]."""
        known: Any = self
        return known._auto_batch(x)[0].movedim(1, 0)

    def _start(self, name: str, x: Tensor) -> Tensor:
        """A state before the first step for x [T, B, ...]: what was assigned since the last call, else at rest."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        held = getattr(self, name).to(x.device, dtype)
        shape = x.shape[1], *held.shape
        return held.expand(shape) if vars(self).get("_begun") else held.new_zeros(shape)

    def _end(self, **states: Tensor) -> None:
        """Keeps the states [B, ...] after the last step as Rockpool does: those of the first of the batch."""
        for name, state in states.items():
            setattr(self, name, state[0].detach().to(getattr(self, name).dtype))
        vars(self)["_begun"] = False

    def _membrane(self, x: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """The spikes [T, B, N] of neurons that take the current x, which go into the record, and the last v."""
        known: Any = self
        threshold = known.threshold
        values = {
            "decay": decay, "gain": 1 / threshold, "bias": known.bias / threshold,
            "reset_amount": 1.0, "v_threshold": 1.0, "v_reset": 0.0,
        }  # fmt: skip
        start = self._start("vmem", x) / threshold.detach()
        made = run_neuron(
            x, start, values, self.fused_spec, wanted(True, known._record, True, False), fire_on_equal=True
        )
        assert made.spikes is not None and made.state is not None
        if made.v is not None:
            known._record_dict["vmem"] = (made.v * threshold).movedim(0, 1)
        known._record_dict["spikes"] = made.spikes.movedim(0, 1)
        return made.spikes, made.state * threshold


def _lif(base: Any) -> type:
    class LIFTorch(_Fused, base):
        """Rockpool's LIFTorch on fused ops: i[t] = beta * (i[t-1] + x[t]), v[t] = alpha * v[t-1] + sum(i[t]) + bias."""

        def forward(self, input_data: Tensor) -> Tensor:
            """Spikes [B, T, Nout] for x [B, T, Nin].

            Raises:
                ValueError: x has another number of inputs.
            """
            x = self._sequence(input_data)
            start = self._start("isyn", x).flatten(1)
            beta = self.beta.expand(self.size_out, self.n_synapses).flatten() if self.beta.numel() > 1 else self.beta
            isyn, last = (each.unflatten(-1, (self.size_out, self.n_synapses)) for each in filtered(x, beta, start))
            spikes, vmem = self._membrane(isyn.sum(-1), self.alpha)
            if self._record:
                self._record_dict["isyn"] = isyn.movedim(0, 1)
                self._record_dict["irec"] = torch.zeros_like(self._record_dict["isyn"])
            self._end(vmem=vmem, isyn=last, spikes=spikes[-1])
            return self._record_dict["spikes"]

    return LIFTorch


def _lif_neuron(base: Any) -> type:
    class LIFNeuronTorch(_Fused, base):
        """Rockpool's LIFNeuronTorch on a fused op: v[t] = exp(-dt / tau_mem) * v[t-1] + x[t] + bias."""

        def forward(self, input_data: Tensor) -> Tensor:
            """Spikes [B, T, N] for x [B, T, N].

            Raises:
                ValueError: x has another number of inputs.
            """
            x = self._sequence(input_data)
            _, vmem = self._membrane(x, torch.exp(-self.dt / self.tau_mem))
            self._end(vmem=vmem)
            return self._record_dict["spikes"]

    return LIFNeuronTorch


def _exp_syn(base: Any) -> type:
    class ExpSynTorch(_Fused, base):
        """Rockpool's ExpSynTorch on a fused op: i[t] = exp(-dt / tau) * (i[t-1] + x[t])."""

        def forward(self, data: Tensor) -> Tensor:
            """The current [B, T, N] for x [B, T, N].

            Raises:
                ValueError: x has another number of inputs.
            """
            x = self._sequence(data)
            isyn, last = filtered(x, torch.exp(-self.dt / self.tau), self._start("isyn", x))
            self._end(isyn=last)
            return isyn.movedim(0, 1)

    return ExpSynTorch


MAKERS = {"LIFTorch": _lif, "LIFNeuronTorch": _lif_neuron, "ExpSynTorch": _exp_syn}


@cache
def fused(name: str) -> type:
    """The class in the place of Rockpool's of that name, which is there already, since a layer of it is."""
    return MAKERS[name](getattr(import_module(PLACES[name]), name))


def convert(layer: Any) -> nn.Module:
    """The layer in the place of one of Rockpool."""
    what = type(layer).__name__
    if float(layer.noise_std) != 0:
        raise CannotConvert(f"expected {what} with noise_std=0, got {float(layer.noise_std):g}")
    if what == "ExpSynTorch":
        _decays(what, torch.exp(-layer.dt / layer.tau))
        return _derived(layer, {})
    if getattr(layer, "_has_rec", False):
        raise CannotConvert(
            f"expected {what} with has_rec=False, got True: its steps need the spikes of the step before"
        )
    if float(layer.max_spikes_per_dt) != 1:
        raise CannotConvert(
            f"expected {what} with max_spikes_per_dt=1, since a neuron here fires at most once a step, got "
            f"{float(layer.max_spikes_per_dt):g}; build the layer with max_spikes_per_dt=torch.tensor(1.0)"
        )
    _decays(what, *((layer.alpha, layer.beta) if what == "LIFTorch" else (torch.exp(-layer.dt / layer.tau_mem),)))
    return _derived(layer, {"fused_spec": _spec(what, layer)})


def _decays(what: str, *decays: Tensor) -> None:
    for decay in decays:
        if not bool(((decay >= 0) & (decay <= 1)).all()):
            raise CannotConvert(f"expected {what} whose decays are in [0, 1], got {decay.tolist()}")


def _spec(what: str, layer: Any) -> LIFSpec:
    """The membrane, with the surrogate that is Rockpool's in units of the threshold."""
    threshold = layer.threshold
    if threshold.requires_grad:
        raise CannotConvert(
            f"expected {what} whose threshold is not trained, got a Parameter: the width of Rockpool's surrogate, in "
            "units of the threshold, would change with it; build the layer with threshold=Constant(...), or give it "
            "layer.threshold.requires_grad_(False)"
        )
    values = threshold.flatten()
    if not bool((values == values[0]).all()) or not float(values[0]) > 0:
        raise CannotConvert(f"expected {what} with one threshold above 0 for all neurons, got {threshold.tolist()}")
    function = getattr(layer.spike_generation_fn, "__self__", None)
    name = getattr(function, "__name__", repr(layer.spike_generation_fn))
    window = float(layer.learning_window) / float(values[0])
    if name == "StepPWL":
        return LIFSpec("soft", surrogate("above", window=window))
    if name == "PeriodicExponential" and window > 0:
        # The built-in row is alpha times as high.
        return LIFSpec("soft", "exponential" if window == 1 else surrogate("exponential"), 1 / window)
    raise CannotConvert(f"expected {what} with spike_generation_fn StepPWL or PeriodicExponential, got {name}")


def _derived(layer: Any, more: dict[str, Any]) -> nn.Module:
    """An object of the derived class with the same Parameters, buffers and settings."""
    made: Any = object.__new__(fused(type(layer).__name__))
    for name, value in {**vars(layer), **more, "_begun": False}.items():
        if isinstance(value, MethodType) and value.__self__ is layer:  # what to_torch() has put there
            value = MethodType(value.__func__, made)
        elif name == "_ModuleBase__registered_attributes":
            value = {key: list(row) for key, row in value.items()}
        elif isinstance(value, (dict, list, set)):
            value = value.copy()
        vars(made)[name] = value
    return made


ADAPTERS: tuple[Adapter, ...] = tuple(Adapter(name, convert, "rockpool", ("noise_std", "dt")) for name in MAKERS)


def is_neuron(module: nn.Module) -> bool:
    """Whether a class of Rockpool without a row is a neuron, which is then named as left alone."""
    names = set(base_names(module))
    return bool(names & {"LIFBaseTorch", "LIFNeuronTorch", "ExpSynTorch", "UpDownTorch", "aLIFTorch", "RateTorch"})
