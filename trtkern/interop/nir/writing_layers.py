"""Layers that are one node of NIR each, or none: what stands between the neurons, and the neurons themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from trtkern.interop.nir.building import Builder, Norm, Value
from trtkern.interop.nir.layers import PerNeuron, Scale
from trtkern.interop.nir.writing_neurons import Place, neuron, over_neurons
from trtkern.nn import BatchNormLIF, Delay, SpikeConv2d, SpikeLinear
from trtkern.nn._neuron import NeuronLayer

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
IMAGES = (nn.Conv1d, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def leaf(builder: Builder, path: str, module: nn.Module, value: Value, channel_dim: int = 2) -> Value | None:
    """What a layer makes of a value, with its node added; None if it is no such layer.

    Args:
        builder: the graph.
        path: of the layer.
        module: the layer.
        value: what it takes.
        channel_dim: of a BatchNorm, the axis of the channels in a sequence.
    """
    if isinstance(module, (*BATCH_NORMS, BatchNormLIF)):
        return _norm(builder, path, module, value, channel_dim)
    if isinstance(module, NeuronLayer):
        return _neuron(builder, path, module, value)
    found = next((write for kind, write in LEAVES.items() if isinstance(module, kind)), None)
    if found is None:
        return None
    base = next(kind for kind in LEAVES if isinstance(module, kind))
    if isinstance(module, IMAGES) and not isinstance(module, SpikeConv2d) and not value.folded:
        do = "put it into TimeSequential or OverTime"
        _refuse(builder, path, module, "a layer without time over T * B images", "one over a sequence", do)
        return Value({}, None, value.folded)
    ours = type(module).__module__.startswith(("torch.nn.modules.", "trtkern."))
    if not ours and type(module).forward is not base.forward:
        _refuse(builder, path, module, f"the forward of {base.__name__}", "one of its own", "use the plain layer")
        return Value({}, None, value.folded)
    return found(builder, path, module, value)


def _refuse(builder: Builder, path: str, module: nn.Module, expected: str, got: str, do: str) -> None:
    builder.problems.add(path, type(module).__name__, expected, got, do)


def _numpy(tensor: Any) -> np.ndarray:
    held = tensor.detach().cpu()
    return (held if held.dtype in (torch.float32, torch.float64) else held.float()).contiguous().numpy().copy()


def _neuron(builder: Builder, path: str, layer: NeuronLayer, value: Value) -> Value:
    if value.shape is None:
        return value
    place = Place(
        path, type(layer).__name__, value.shape, builder.clock, builder.dialect, builder.problems, builder.nir
    )
    return builder.add(path, neuron(layer, place), value, value.shape)


def _per_neuron(builder: Builder, path: str, module: PerNeuron, value: Value) -> Value:
    if value.shape is None:
        return value
    layer, problems = module.layer, builder.problems
    if isinstance(layer, Delay):
        return _delay(builder, path, layer, value, value.shape)
    place = Place(path, type(layer).__name__, value.shape, builder.clock, builder.dialect, problems, builder.nir)
    count, numbers = (math.prod(value.shape),), {}
    with torch.no_grad():
        for name, held in {**layer.values(), "v_leak": layer._value("v_leak")}.items():
            spread = over_neurons(held, count, 0)
            if spread is None:
                place.refuse(f"{name} of {count[0]} neurons", f"{held.numel()} numbers", "set input_shape")
                return value
            numbers[name] = spread.reshape(value.shape)
    return builder.add(path, neuron(layer, place, numbers), value, value.shape)


def _linear(builder: Builder, path: str, module: nn.Linear, value: Value) -> Value:
    nir, shape = builder.nir, value.shape
    if shape is None:
        return Value({}, (module.out_features,), value.folded)
    flattens = isinstance(module, SpikeLinear) and len(shape) > 1 and shape[-1] != module.in_features
    if flattens and math.prod(shape) == module.in_features:
        flat = nir.Flatten(list(shape), -len(shape), -1)
        value, shape = builder.add(f"{path}.flatten", flat, value, (module.in_features,)), (module.in_features,)
    if shape != (module.in_features,):
        do = (
            "flatten before it" if math.prod(shape) == module.in_features else "NIR's Affine takes vectors; check sizes"
        )
        _refuse(builder, path, module, f"a vector of {module.in_features}", f"{shape}", do)
        return Value({}, None, value.folded)
    weight, bias = _numpy(module.weight), None if module.bias is None else _numpy(module.bias)
    if bias is None and builder.dialect.reads is not None and "Linear" not in builder.dialect.reads:
        bias = np.zeros(len(weight), weight.dtype)
    node = nir.Linear(weight=weight) if bias is None else nir.Affine(weight=weight, bias=bias)
    return builder.add(path, node, value, (module.out_features,))


def _conv(builder: Builder, path: str, module: Any, value: Value) -> Value:
    nir, axes = builder.nir, len(module.kernel_size)
    if module.groups != 1:
        do = "NIR's check of types knows no groups; take groups=1"
        _refuse(builder, path, module, "groups=1", f"a grouped convolution, groups={module.groups}", do)
    if module.padding_mode != "zeros":
        _refuse(builder, path, module, "padding_mode='zeros'", repr(module.padding_mode), "pad with zeros")
    if value.shape is None:
        return Value({}, None, value.folded)
    if len(value.shape) != axes + 1 or value.shape[0] != module.in_channels:
        expected = f"{module.in_channels} channels and {axes} axes of space"
        _refuse(builder, path, module, expected, f"{value.shape}", "check input_shape")
        return Value({}, None, value.folded)
    space = tuple(
        _windows(size, kernel, stride, padding, dilation)
        for size, kernel, stride, padding, dilation in zip(
            value.shape[1:], module.kernel_size, module.stride, _paddings(module, axes), module.dilation, strict=True
        )
    )
    if min(space) < 1:
        _refuse(builder, path, module, "an image that the kernel fits into", f"{value.shape}", "check input_shape")
        return Value({}, None, value.folded)
    weight = _numpy(module.weight)
    bias = np.zeros(len(weight), weight.dtype) if module.bias is None else _numpy(module.bias)
    fields: dict[str, Any] = {"weight": weight, "groups": 1, "bias": bias}
    for name in ("stride", "padding", "dilation"):
        numbers = getattr(module, name)
        fields[name] = numbers if isinstance(numbers, str) else numbers[0] if axes == 1 else tuple(numbers)
    node = nir.Conv1d if axes == 1 else nir.Conv2d
    taken = value.shape[1] if axes == 1 else value.shape[1:]
    return builder.add(path, node(input_shape=taken, **fields), value, (module.out_channels, *space))


def _paddings(module: Any, axes: int) -> tuple[Any, ...]:
    """Zeros on both sides together, for each axis."""
    if module.padding == "valid":
        return (0,) * axes
    if module.padding == "same":
        return tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return tuple(2 * n for n in module.padding)


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _pool(builder: Builder, path: str, module: nn.AvgPool2d, value: Value) -> Value:
    kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    stride = kernel if module.stride is None else _pair(module.stride)
    area = kernel[0] * kernel[1]
    sums = module.divisor_override == 1 and area != 1
    if module.ceil_mode:
        _refuse(builder, path, module, "ceil_mode=False", "ceil_mode=True", "pad the image instead")
    if any(padding) and not module.count_include_pad and not sums:
        _refuse(builder, path, module, "count_include_pad=True", "False", "NIR's average counts the padding")
    if module.divisor_override not in (None, 1, area):
        _refuse(builder, path, module, "divisor_override of None or 1", str(module.divisor_override), "leave it out")
    return _pooled(builder, path, module, value, kernel, stride, padding, sums)


def _pooled(
    builder: Builder, path: str, module: nn.Module, value: Value,
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], sums: bool = False,
) -> Value:  # fmt: skip
    if value.shape is None or len(value.shape) != 3:
        if value.shape is not None:
            _refuse(builder, path, module, "an image (C, H, W)", f"{value.shape}", "check input_shape")
        return Value({}, None, value.folded)
    behind = zip(value.shape[1:], kernel, stride, padding, strict=True)
    space = tuple(_windows(size, k, s, 2 * p) for size, k, s, p in behind)
    if min(space) < 1:
        _refuse(builder, path, module, "an image that the window fits into", f"{value.shape}", "check input_shape")
        return Value({}, None, value.folded)
    node = builder.nir.SumPool2d if sums else builder.nir.AvgPool2d
    made = node(kernel_size=np.array(kernel), stride=np.array(stride), padding=np.array(padding))
    return builder.add(path, made, value, (value.shape[0], *space))


def _adaptive(builder: Builder, path: str, module: nn.AdaptiveAvgPool2d, value: Value) -> Value:
    if value.shape is None or len(value.shape) != 3:
        return _pooled(builder, path, module, value, (1, 1), (1, 1), (0, 0))
    asked = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,) * 2
    size = [side if n is None else n for n, side in zip(asked, value.shape[1:], strict=True)]
    kernel = value.shape[1] // size[0], value.shape[2] // size[1]
    if any(side % n for side, n in zip(value.shape[1:], size, strict=True)):
        got = f"{tuple(size)} of {value.shape[1:]}"
        _refuse(builder, path, module, "an output size that divides the image", got, "take AvgPool2d")
        return Value({}, None, value.folded)
    return _pooled(builder, path, module, value, kernel, kernel, (0, 0))


def _flatten(builder: Builder, path: str, module: nn.Flatten, value: Value) -> Value:
    if value.shape is None:
        return value
    lead, rank = 1 if value.folded else 2, len(value.shape)
    start, end = (dim % (rank + lead) - lead for dim in (module.start_dim, module.end_dim))
    if start < 0 or end < start:
        got = f"start_dim={module.start_dim}, end_dim={module.end_dim}"
        _refuse(builder, path, module, "time and batch to stay axes of their own", got, f"take Flatten({lead})")
        return Value({}, None, value.folded)
    if start == end:
        return value
    shape = (*value.shape[:start], math.prod(value.shape[start : end + 1]), *value.shape[end + 1 :])
    # Counted from the end the axes are right for readers with a batch in front and for those without.
    last = end - rank
    return builder.add(path, builder.nir.Flatten(list(value.shape), start - rank, last), value, shape)


def _norm(builder: Builder, path: str, module: Any, value: Value, channel_dim: int) -> Value:
    if not value.folded and not isinstance(module, BatchNormLIF):
        do = "put it into TimeSequential or OverTime"
        _refuse(builder, path, module, "a norm over T * B samples", "one over a sequence", do)
        return value
    if module.running_mean is None or module.running_var is None:
        do = "NIR has no statistics of the batch; set track_running_stats=True"
        _refuse(builder, path, module, "running statistics", "none", do)
        return value
    if module.training:
        _refuse(builder, path, module, "a norm in evaluation", "one in training", "call model.eval()")
        return value
    if value.shape is None:
        return value
    axis = channel_dim - 2 if channel_dim >= 2 else channel_dim + len(value.shape)
    mean, var = (held.detach().cpu().double().numpy() for held in (module.running_mean, module.running_var))
    if not 0 <= axis < len(value.shape) or value.shape[axis] != len(mean):
        got = f"{value.shape}, whose axis {axis} is theirs"
        _refuse(builder, path, module, f"{len(mean)} channels", got, "check input_shape")
        return Value({}, None, value.folded)
    scale = 1.0 / np.sqrt(var + module.eps)
    if module.weight is not None:
        scale = scale * module.weight.detach().cpu().double().numpy()
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().cpu().double().numpy()
    return builder.add(path, Norm(scale, shift, value.shape, axis), value, value.shape)


def _same(builder: Builder, path: str, module: nn.Module, value: Value) -> Value:
    return value


def _dropout(builder: Builder, path: str, module: Any, value: Value) -> Value:
    if module.training and module.p > 0:
        _refuse(builder, path, module, "dropout in evaluation", "one in training", "call model.eval()")
    return value


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether numbers of that shape are one for each of the whole, or are broadcast to it."""
    if len(shape) > len(whole):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(whole), strict=False))


def _scale(builder: Builder, path: str, module: Scale, value: Value) -> Value:
    if value.shape is None:
        return value
    scale = _numpy(module.scale)
    if not _fits(scale.shape, value.shape):
        _refuse(builder, path, module, f"a scale that fits {value.shape}", f"{scale.shape}", "check input_shape")
        return value
    node = builder.nir.Scale(scale=np.ascontiguousarray(np.broadcast_to(scale, value.shape)))
    return builder.add(path, node, value, value.shape)


def _delay(builder: Builder, path: str, module: Delay, value: Value, whole: tuple[int, ...] | None = None) -> Value:
    """whole: the shape of a value whose places each have a delay of their own; None: its channels have."""
    if value.shape is None:
        return value
    if module.time_dim != 0:
        do = "move the axis before the layer"
        _refuse(builder, path, module, "time on axis 0", f"time_dim={module.time_dim}", do)
    axis = module.channel_dim - 2 if module.channel_dim >= 2 else module.channel_dim + len(value.shape)
    shape, axis = (value.shape, axis) if whole is None else ((math.prod(whole),), 0)
    spread = over_neurons(module.values(), shape, axis)
    if spread is None or (module.channels is not None and shape[axis] != module.channels):
        _refuse(builder, path, module, f"delays that fit {value.shape}", f"{module.channels}", "check input_shape")
        return value
    steps = np.floor(spread + 0.5)
    if not module.rounded and (steps != spread).any():
        worst = spread.flat[int(np.abs(steps - spread).argmax())]
        do = "call its round_(), or set its rounded = True"
        _refuse(builder, path, module, "delays of whole steps", f"{worst:g} steps", do)
    node = builder.nir.Delay(delay=np.ascontiguousarray(steps.reshape(value.shape) * builder.clock.step))
    return builder.add(path, node, value, value.shape)


LEAVES: dict[type[nn.Module], Callable[[Builder, str, Any, Value], Value]] = {
    PerNeuron: _per_neuron,
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.Flatten: _flatten,
    nn.Identity: _same,
    **dict.fromkeys(DROPOUTS, _dropout),
    Scale: _scale,
    Delay: _delay,
}
"""The layers with a node, beside neurons and norms."""
