"""The neurons of sinabs: which of them have an equal here, and with which numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.interop.adapters import Adapter, CannotConvert, base_names, unlike
from trtkern.interop.surrogates import surrogate
from trtkern.nn._leaf import is_proxy
from trtkern.nn._neuron import AnyState, NeuronLayer, Readout, Spiking, one_step, wide
from trtkern.nn.neurons import CUBALIFState
from trtkern.ops import checks
from trtkern.ops.checks import Number
from trtkern.ops.spikes import dense

TIME_CONSTANTS = ("tau_mem", "tau_syn", "alpha_mem", "alpha_syn")
"""The learned parameters of a layer: time constants in steps, or with ``train_alphas`` the decays themselves."""


class _Sinabs(NeuronLayer):
    """What the layers here share: sinabs' parameters under sinabs' names, its shapes [B, T, ...], and in the Squeeze
    forms [B * T, ...]."""

    complements = (("gain", "decay"),)
    rows: tuple[int, int] | None
    """(B, T) of a Squeeze form, one of them -1; None is a layer that takes [B, T, ...]."""

    def _take(self, layer: Any) -> None:
        """The parameters of sinabs' layer, the same objects, and its settings."""
        for name in TIME_CONSTANTS:
            if layer._parameters.get(name) is not None:
                self.register_parameter(name, layer._parameters[name])
        self.v_leak, self.gain = 0.0, None if layer.norm_input else 1.0
        self.rows = (layer.batch_size, layer.num_timesteps) if hasattr(layer, "batch_size") else None

    @property
    def decay(self) -> Number:
        """exp(-1 / tau_mem), or alpha_mem; 1 in an IAF layer."""
        return self._decay("mem")

    def _decay(self, of: str) -> Number:
        tau = self._parameters.get(f"tau_{of}")
        alpha = self._parameters.get(f"alpha_{of}") if tau is None else torch.exp(-1.0 / wide(tau))
        return 1.0 if alpha is None else alpha if alpha.dim() < 2 else alpha.flatten()

    def forward(self, x: Tensor, v0: AnyState = None, **options: Any) -> Any:
        """What a layer of this project returns (``Spiking.forward``, ``Readout.forward``), in sinabs' shapes.

        Args:
            x: [B, T, ...], or in a Squeeze form [B * T, ...].
            v0: the state before the first step; None is at rest.
            options: ``return_state`` and the others.

        Raises:
            ValueError: the rows of a Squeeze form are no multiple of its B or T.
        """
        if is_proxy(x):
            return self(x, v0, **options)
        if self.rows is None:
            return super().forward(x, v0, **options)
        known = max(self.rows)
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] % known:
            name = "batch_size" if self.rows[0] > 0 else "num_timesteps"
            raise ValueError(
                f"{type(self).__name__}: expected [B * T, ...] with {name}={known}, got {checks.describe(x)}; "
                f"set the layer's rows, (B, T) with one of them -1, to what comes"
            )
        made = super().forward(x.reshape(*self.rows, *x.shape[1:]), v0, **options)
        if isinstance(made, Tensor):
            return made.flatten(0, 1)
        state = 1 if options.get("return_state") else None
        return tuple(part if place == state else part.flatten(0, 1) for place, part in enumerate(made))

    def step(self, x: Tensor, v: AnyState = None) -> tuple[Tensor, Any]:
        """One step [B, ...], of a Squeeze form too (``NeuronLayer.step``)."""
        x = one_step(type(self).__name__, x, self.time_dim)
        out, state = super().forward(x, v, return_state=True)
        return dense(out).squeeze(self.time_dim), state

    def _settings(self) -> dict[str, object]:
        held = {name: value for name, value in self.named_parameters() if name in TIME_CONSTANTS}
        shown = {name: value.item() if value.numel() == 1 else value for name, value in held.items()}
        rows = {} if self.rows is None else {"rows": self.rows}
        return {**shown, "gain": "1 - decay" if self.gain is None else self.gain, **super()._settings(), **rows}


class SinabsLIF(_Sinabs, Spiking):
    """sinabs' LIF and IAF: h[t] = decay * v[t-1] + gain * x[t], decay = exp(-1 / tau_mem), gain 1 or 1 - decay.

    A ``trtkern.nn`` layer with sinabs' parameters, called as sinabs' layer is.
    """

    def __init__(self, layer: Any, axis: int, spiking: dict[str, Any]) -> None:
        super().__init__(**spiking, time_dim=1, channel_dim=axis)
        self._take(layer)


class SinabsCUBALIF(SinabsLIF):
    """The same with tau_syn: i[t] = decay_syn * (i[t-1] + x[t]), which the membrane takes for x."""

    kind = "CUBALIF"
    State = CUBALIFState

    @property
    def decay_syn(self) -> Number:
        """exp(-1 / tau_syn), or alpha_syn."""
        return self._decay("syn")

    @property
    def gain_syn(self) -> Number:
        """The same: sinabs' current decays in the step in which its input comes."""
        return self._decay("syn")


class SinabsLI(_Sinabs, Readout):
    """sinabs' ExpLeak: v[t] = decay * v[t-1] + gain * x[t], gain 1 or 1 - decay."""

    def __init__(self, layer: Any, axis: int) -> None:
        super().__init__({}, 1, axis, "auto")
        self._take(layer)


def neuron(layer: Any) -> nn.Module:
    """The layer in the place of LIF, IAF, ExpLeak and their Squeeze forms."""
    what = type(layer).__name__
    unlike(layer, what, record_states=False)
    if layer.min_v_mem is not None:
        raise CannotConvert(
            f"expected {what} with min_v_mem=None, got {layer.min_v_mem.tolist()}: no neuron here has a potential with "
            "a lower bound; a network trained with min_v_mem=None converts"
        )
    held = [layer._parameters[name] for name in TIME_CONSTANTS if layer._parameters.get(name) is not None]
    axis = _axis(what, [*held, *([] if layer.spike_fn is None else [layer.spike_threshold])])
    for name in ("alpha_mem_calculated", "alpha_syn_calculated"):
        decay = getattr(layer, name)
        if decay is not None and not bool(((decay >= 0) & (decay <= 1)).all()):
            raise CannotConvert(f"expected {what} whose decays are in [0, 1], got {name}={decay.tolist()}")
    synapse = layer.alpha_syn_calculated is not None
    if layer.spike_fn is None:
        if synapse:
            raise CannotConvert(f"expected {what} with spike_fn=None to have tau_syn=None, got a time constant")
        return SinabsLI(layer, axis)
    return (SinabsCUBALIF if synapse else SinabsLIF)(layer, axis, _spiking(what, layer))


def _axis(what: str, held: list[Tensor]) -> int:
    """The axis of x that parameters with several values belong to, counted from the last one as torch broadcasts."""
    axes = {axis - each.dim() for each in held for axis, size in enumerate(each.shape) if size > 1}
    if len(axes) > 1:
        shapes = ", ".join(str(list(each.shape)) for each in held)
        raise CannotConvert(f"expected {what} whose parameters are one number, or one a channel, got shapes {shapes}")
    return axes.pop() if axes else -1


def _spiking(what: str, layer: Any) -> dict[str, Any]:
    """What a spiking layer of this project is made with: threshold, reset and surrogate."""
    _single(what, layer.spike_fn)
    threshold = layer.spike_threshold
    if threshold.requires_grad:
        raise CannotConvert(
            f"expected {what} whose spike_threshold is not trained, got requires_grad=True: sinabs' spikes have no "
            "gradient for it"
        )
    if not bool((threshold > 0).all()):
        raise CannotConvert(f"expected {what} with spike_threshold > 0, got {threshold.tolist()}")
    values = threshold.detach().flatten()
    one = bool((values == values[0]).all())
    return {
        "v_threshold": values[0].item() if one else values.clone(),
        **_reset(what, layer.reset_fn),
        **_surrogate(what, layer.surrogate_grad_fn, values[0].item() if one else None),
        "fire_on_equal": True,
    }


def _single(what: str, spike_fn: Any) -> None:
    """Refuses what fires more than once a step."""
    name = getattr(spike_fn, "__name__", type(spike_fn).__name__)
    if name == "SingleSpike" or (name == "MaxSpike" and spike_fn.max_num_spikes_per_bin == 1):
        return
    raise CannotConvert(
        f"expected {what} with spike_fn=SingleSpike, since a neuron here fires at most once a step, got {name}; "
        "build the layer with spike_fn=sinabs.activation.SingleSpike"
    )


def _reset(what: str, reset_fn: Any) -> dict[str, Any]:
    name = type(reset_fn).__name__
    if name == "MembraneSubtract":
        amount = reset_fn.subtract_value
        return {"v_reset": None, "reset_amount": None if amount is None else float(amount)}
    if name == "MembraneReset" and reset_fn.reset_value == 0:
        # sinabs' reset asks whether there are spikes, which has no gradient.
        return {"v_reset": 0.0, "detach_reset": True}
    if name == "MembraneReset":
        raise CannotConvert(
            f"expected {what} with MembraneReset(reset_value=0), got {reset_fn.reset_value}, which sinabs adds to the "
            "potential of every neuron at every step, whether it fired or not"
        )
    raise CannotConvert(f"expected {what} with reset_fn=MembraneSubtract() or MembraneReset(), got {name}")


def _surrogate(what: str, function: Any, threshold: Any) -> dict[str, Any]:
    """The surrogate, and its sharpness; ``threshold`` is None where channels have their own."""
    name = type(function).__name__
    if threshold is None and name not in ("Gaussian", "MultiGaussian"):
        raise CannotConvert(f"expected {what} with {name} to have one spike_threshold, got one a channel")
    scale = float(getattr(function, "grad_scale", 1.0))
    if name == "SingleExponential":
        width = threshold * function.grad_width
        own = "exponential" if scale == 1.0 else surrogate("exponential", height=scale / width)
        return {"surrogate": own, "alpha": 1 / width}
    if name == "Heaviside":
        return {"surrogate": surrogate("above", height=1 / threshold, window=function.window)}
    if name in ("Gaussian", "MultiGaussian"):
        alpha, center = 1 / function.sigma, function.mu
        if name == "Gaussian" and center == 0 and scale == 1.0:
            return {"surrogate": "gaussian", "alpha": alpha}
        numbers = {"height": scale * alpha / math.sqrt(2 * math.pi), "center": center}
        if name == "Gaussian":
            return {"surrogate": surrogate("gaussian", **numbers), "alpha": alpha}
        return {"surrogate": surrogate("multi_gaussian", **numbers, dip=function.h, wider=function.s), "alpha": alpha}
    known = "SingleExponential, Gaussian, MultiGaussian or Heaviside"
    raise CannotConvert(f"expected {what} with the surrogate gradient {known}, got {name}")


def recurrent(layer: Any) -> nn.Module:
    """Refuses layers whose spikes come back in the next step."""
    raise CannotConvert(
        f"expected a layer with no recurrent connections, got {type(layer).__name__}: each of its steps needs the "
        "spikes of the step before, through a module of any kind"
    )


ADAPTERS: tuple[Adapter, ...] = (
    *(
        Adapter(name + form, neuron, "sinabs", ("spike_fn", "norm_input", "min_v_mem"))
        for name in ("LIF", "IAF", "ExpLeak")
        for form in ("", "Squeeze")
    ),
    *(Adapter(f"{name}Recurrent", recurrent, "sinabs") for name in ("LIF", "IAF", "ALIF")),
)


def is_neuron(module: nn.Module) -> bool:
    """Whether a class of sinabs without a row is a neuron, which is then named as left alone."""
    return "StatefulLayer" in base_names(module)
