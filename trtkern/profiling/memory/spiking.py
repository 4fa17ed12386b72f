"""What this project's layers and losses keep for their backward pass, by the traffic model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trtkern.backends import choose
from trtkern.nn import (
    PLIF,
    BatchNormLIF,
    ConvBatchNormLIF,
    Delay,
    Recurrent,
    SDTLoss,
    SpikeConv2d,
    SpikeLinear,
    Spikes,
    TETLoss,
    TRTLoss,
)
from trtkern.nn._neuron import AnyState, NeuronLayer, Readout, Spiking
from trtkern.ops import layout
from trtkern.ops.spikes import dense
from trtkern.profiling import traffic
from trtkern.profiling.memory.kept import FORMULAS, Call, Kept, convolved, met, multiplied, viewable


def neuron_steps(call: Call) -> int:
    """Timesteps times neurons of one call; 0 for a layer without neurons, or whose neurons are a layer inside it."""
    module = call.module
    if isinstance(module, ConvBatchNormLIF):
        return call.made[id(module.conv)].numel() if checkpoints(call) else 0
    if isinstance(module, BatchNormLIF):
        return call.given(0, "y").numel()
    return call.given(0, "x").numel() if isinstance(module, (NeuronLayer, Recurrent)) else 0


def _terms(terms: traffic.Terms, steps: int, tensors: Mapping[str, Tensor | None]) -> list[Kept]:
    """The terms of the traffic model over that many neuron-steps, each with the tensor that it is, if it was met."""
    return [
        Kept(f"{term.what} {term.formula}", round(term.bytes * steps), tensors.get(term.what))
        for term in terms
        if term.access == "keep"
    ]


def _parameters(neuron: NeuronLayer, channels: int | None = None) -> list[Kept]:
    """The parameters of a neuron, stacked if one of them is a tensor, over all channels or as many as they have."""
    counts = [value.numel() for value in neuron.values().values() if isinstance(value, Tensor)]
    if not counts:
        return []
    each = traffic.parameter_bytes(neuron.spec)
    kept = [Kept(f"parameters {each} a channel", each * (channels or max(counts)))]
    if isinstance(neuron, PLIF):
        kept.append(Kept("sigmoid(w)", (1 + neuron.decay_input) * neuron.w.numel() * max(4, neuron.w.element_size())))
    for name in (each for each in neuron._own if each.startswith("tau")):  # of which the kernels take the inverse
        tau = neuron._value(name)
        if isinstance(tau, Tensor) and tau.requires_grad:
            kept.append(Kept(f"1 / {name}", tau.numel() * max(4, tau.element_size())))
    return kept


def _state(v0: AnyState) -> list[Kept]:
    if isinstance(v0, tuple):  # the op takes, and keeps, one tensor that they are copied into
        return [Kept(f"v0 {4 * len(v0)} (copy)", sum(part.numel() * part.element_size() for part in v0))]
    return [] if v0 is None else [met("v0", v0)]


def _runs_as_it_is(x: Tensor, pool: bool = False) -> bool:
    """Whether the kernels take x in its layout; else what they take, and keep, is a copy."""
    if pool and not (x[0].is_contiguous() or x[0].is_contiguous(memory_format=torch.channels_last)):
        return False
    return layout.is_dense(x) or layout.is_static(x)


def _neuron(call: Call) -> list[Kept] | None:
    module, x, v0 = call.module, call.given(0, "x"), call.given(1, "v0")
    if choose(module.backend, "lif", x.device.type, x.dtype, module.spec.token) == "reference":
        return None
    x = x.movedim(module.time_dim, 0)
    terms = traffic.lif_kept(x.element_size(), x.shape[0], static=layout.is_static(x), spec=module.spec)
    kept = _terms(terms, x.numel(), {"x": x if _runs_as_it_is(x) else None})
    return [*kept, *_state(v0), *_parameters(module)]


def _delay(call: Call) -> list[Kept] | None:
    module, x, v0 = call.module, dense(call.given(0, "x")), call.given(1, "v0")
    if choose(module.backend, "delay", x.device.type, x.dtype) == "reference":
        return None
    learned = module.learnable
    made = (
        module.delay.raw.numel() if learned else not isinstance(module.delay, Tensor)
    )  # else they are the layer's own
    given = x if layout.is_dense(x.movedim(module.time_dim, 0)) else None
    kept = _terms(traffic.delay_kept(x.element_size(), learned=learned), x.numel(), {"x": given})
    return [*kept, *(_state(v0) if learned else []), Kept("delays 4 a channel", 4 * int(made))]


def _recurrent(call: Call) -> list[Kept] | None:
    module, x, v0 = call.module, call.given(0, "x"), call.given(1, "v0")
    neuron = module.neuron
    backend = choose(neuron.backend, "recurrent", x.device.type, x.dtype, neuron.spec.token)
    if backend == "reference":
        return None
    terms = traffic.recurrent_kept(x.element_size(), x.movedim(neuron.time_dim, 0).shape[0], neuron.spec)
    kept = [*_terms(terms, x.numel(), {}), *_state(v0), *_parameters(neuron)]
    return kept if module.linear.weight.dtype == torch.float32 else [*kept, Kept("W", 4 * module.linear.weight.numel())]


def _backend(module: BatchNormLIF, y: Tensor, device: str) -> str:
    return choose(module.lif.backend, "batch_norm_lif", device, y.dtype, module.lif.spec.token)


def _normed(
    module: BatchNormLIF,
    y: Tensor,
    residual: Tensor | Spikes | None,
    v0: AnyState,
    device: str,
    checkpoint: bool = False,
) -> list[Kept] | None:
    if _backend(module, y, device) == "reference":
        return None
    e, channels = y.element_size(), y.shape[module.channel_dim]
    inside = module.pool == 2 and y.shape[-1] % 2 == y.shape[-2] % 2 == 0
    tensors: dict[str, Tensor | None] = {"y": y if _runs_as_it_is(y, inside) else None}
    kind: traffic.Residual = None
    if isinstance(residual, Spikes):
        kind, tensors["words"] = "packed", residual.words
    elif residual is not None:
        kind, tensors["residual"] = "dense", residual
    terms = traffic.batch_norm_lif_kept(
        e, y.shape[0], residual=kind, checkpoint=checkpoint, static=layout.is_static(y), spec=module.lif.spec
    )
    kept = _terms(terms, y.numel(), tensors)
    if module.pool == 2 and not inside:
        kept.append(Kept("spikes e", y.numel() * e))  # pooled after they were written
    batch = module.training or module.running_mean is None
    per_channel = sum(traffic.PER_CHANNEL.values()) + (0 if batch else traffic.RUNNING)
    vectors = Kept(f"{', '.join(traffic.PER_CHANNEL)} {per_channel} a channel", per_channel * channels)
    return [*kept, *_state(v0), vectors, *_parameters(module.lif, channels)]


def _batch_norm_lif(call: Call) -> list[Kept] | None:
    y = call.given(0, "y")
    return _normed(call.module, y, call.given(1, "residual"), call.given(2, "v0"), y.device.type)


def checkpoints(call: Call) -> bool:
    """Whether a block made its spikes by itself, to make y again later, and not by calling its layers."""
    module = call.module
    if not module.checkpoint or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    y = call.made.get(id(module.conv))
    return y is not None and _backend(module.norm, y, module.conv.weight.device.type) != "reference"


def _block(call: Call) -> list[Kept] | None:
    if not checkpoints(call):
        return []  # its layers keep
    module, x, y = call.module, call.given(0, "x"), call.made[id(call.module.conv)]
    device = module.conv.weight.device.type
    kept = _normed(module.norm, y, call.given(1, "residual"), call.given(2, "v0"), device, checkpoint=True)
    return None if kept is None else [_input(x), *kept]


def _input(x: Tensor | Spikes) -> Kept:
    """The words, in place of the spikes, where there are words."""
    if not isinstance(x, Spikes):
        return met("input", x)
    (term,) = traffic.spike_input_kept(x.spikes.element_size(), x.spikes.shape[0])
    return Kept(f"words {term.formula}", round(term.bytes * x.spikes.shape[0] * x.bits), x.words)


def _spike_convolution(call: Call) -> list[Kept] | None:
    module, x = call.module, call.given(0, "x")
    if isinstance(x, Spikes):
        if not layout.is_static(x.spikes) and module.padding_mode == "zeros":
            return [_input(x)]
        x = x.spikes
    folded = x.dim() == 5 and not layout.is_static(x)
    return convolved(module, x, copied=folded and not viewable(x, (-1, *x.shape[2:])))


def _spike_product(call: Call) -> list[Kept]:
    module, x = call.module, call.given(0, "x")
    dense = x.spikes if isinstance(x, Spikes) else x
    static = dense.dim() > 2 and layout.is_static(dense)
    if isinstance(x, Spikes) and not static:
        return [_input(x)]
    # What is multiplied: one step of a static input; the axes behind the batch flattened, where that is in_features.
    step = dense[0] if static else dense
    first = step.dim() - 1
    while math.prod(step.shape[first:]) < module.in_features:
        first -= 1
    rows = (*step.shape[:first], module.in_features)
    return multiplied(module, step.reshape(rows), copied=not viewable(step, rows))


def _sdt(call: Call) -> list[Kept]:
    logits, target = call.given(0, "logits"), call.given(1, "target")
    return [Kept("log softmax 4", 4 * logits[0].numel()), met("target", target), Kept("count", 4)]


def _every_step(call: Call) -> list[Kept]:
    logits = call.given(0, "logits")
    rows = logits.shape[0] * logits.shape[1]
    each = (("log softmax 4", 4 * logits.numel()), ("difference 4", 4 * logits.numel()), ("targets 8 a row", 8 * rows))
    return [*(Kept(what, size) for what, size in each), Kept("count", 4)]


FORMULAS.update(
    {
        Spiking: _neuron,
        Readout: _neuron,
        Recurrent: _recurrent,
        BatchNormLIF: _batch_norm_lif,
        ConvBatchNormLIF: _block,
        Delay: _delay,
        SpikeConv2d: _spike_convolution,
        SpikeLinear: _spike_product,
        SDTLoss: _sdt,
        TETLoss: _every_step,
        TRTLoss: _every_step,
    }
)
