"""Launches of the Triton kernels as the ops ask for them, on tensors of the CPU: to compile them, not to run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trtkern.backends.base import (
    DelayGrads,
    Delays,
    Finish,
    Finished,
    LIFBackward,
    LIFForward,
    LIFGrads,
    LIFInputs,
    Norm,
    Pool,
    RegularizerSpec,
)
from trtkern.kernels import batch_norm, delay, lif_launch, regularizer, spikes
from trtkern.kernels.launch import Launch
from trtkern.neurons import lookup
from trtkern.spec import LIFSpec

SCALARS = (0.5, 1.0, 0.0, 1.0, 1.0, 0.0)
"""Of LIF."""


def _spec(neuron: str, reset: str | None = None, surrogate: str = "triangle") -> LIFSpec:
    return LIFSpec(reset or next(iter(lookup(neuron).settle)), surrogate, neuron=neuron)


def _numbers(spec: LIFSpec) -> tuple[float, ...]:
    """Parameters: only how many there are shows in the code."""
    return SCALARS if spec.neuron == "LIF" else (0.5,) * len(spec.row.params)


def edges_of(T: int, N: int, spec: LIFSpec) -> Tensor | None:
    count = (T - 1) // spec.chunk * len(spec.row.states)
    return torch.empty(count, 1).expand(-1, N) if count else None


def forward(
    T: int, N: int, dtype: torch.dtype, offset: int = 0, scalars: tuple | None = None, x: Tensor | None = None,
    neuron: str = "LIF",
) -> Launch:  # fmt: skip
    """The launch of a forward pass as training asks for it: spikes, edges if T exceeds a chunk, the flag."""
    spec = _spec(neuron)
    if x is None:
        x = torch.empty(T * N + offset, dtype=dtype)[offset:].view(T, N)
    out = LIFForward(x, None, None, edges_of(T, N, spec), torch.zeros(1, dtype=torch.int32))
    return lif_launch.forward_launch(LIFInputs(x, None, None, scalars or _numbers(spec), spec, 1), out)


def backward(
    T: int, N: int, dtype: torch.dtype, offset: int = 0, scalars: tuple | None = None, x: Tensor | None = None,
    channels: int = 0, surrogate: str = "triangle", reset: str | None = None, neuron: str = "LIF",
) -> Launch:  # fmt: skip
    """The launch of a backward pass from the gradient of the spikes, with gradients of parameters if channels > 0."""
    if x is None:
        x = torch.empty(T * N + offset, dtype=dtype)[offset:].view(T, N)
    spec = _spec(neuron, reset, surrogate)
    params = torch.empty(len(spec.row.params), channels) if channels else None
    inputs = LIFInputs(x, None, params, scalars or _numbers(spec), spec, 1)
    out = LIFBackward(x, None, params)
    return lif_launch.backward_launches(inputs, edges_of(T, N, spec), LIFGrads(x, None, None), out)[0]


def normed(
    T: int, N: int, dtype: torch.dtype, residual: bool = False, pool: str = "none", x: Tensor | None = None,
    neuron: str = "LIF",
) -> tuple[LIFInputs, Norm]:  # fmt: skip
    """Images of 16 x 16 in 16 channels behind a norm, without learnt parameters; pool "places": channels last."""
    if x is None:
        x = torch.empty(T, N, dtype=dtype)
    shape = {"none": None, "rows": Pool(16, 1), "places": Pool(256, 16)}[pool]
    norm = Norm(torch.empty(3, 16), x if residual else None)
    spec = _spec(neuron)
    return LIFInputs(x, None, None, _numbers(spec), spec, 1 if pool == "places" else 256, norm, shape), norm


def norm_forward(T: int, N: int, dtype: torch.dtype, packed: bool = False, **options: Any) -> Launch:
    """Normalise (and add the residual), all steps, spikes (and the words)."""
    inputs, _ = normed(T, N, dtype, **options)
    words = torch.empty(1, 1, dtype=torch.uint8).expand(-(-T // 8), N) if packed else None
    out = LIFForward(inputs.x, None, None, edges_of(T, N, inputs.spec), torch.zeros(1, dtype=torch.int32), words)
    return lif_launch.forward_launch(inputs, out)


def norm_sums(T: int, N: int, dtype: torch.dtype, **options: Any) -> Launch:
    """The first pass of the backward: sums for each channel, and the residual's gradient if there is one."""
    inputs, norm = normed(T, N, dtype, **options)
    gx = inputs.x if norm.residual is not None else None
    out = LIFBackward(gx, None, None, torch.empty(2, 16, dtype=torch.float64))
    return lif_launch.backward_launches(inputs, edges_of(T, N, inputs.spec), LIFGrads(inputs.x, None, None), out)[0]


def norm_input(T: int, N: int, dtype: torch.dtype, **options: Any) -> Launch:
    """The second pass of the backward: the gradient of what was normalised."""
    inputs, norm = normed(T, N, dtype, **options)
    grads = LIFGrads(inputs.x, None, None, norm.affine)
    edges = edges_of(T, N, inputs.spec)
    return lif_launch.backward_launches(inputs, edges, grads, LIFBackward(inputs.x, None, None))[0]


def norm_input_grad(T: int, N: int, dtype: torch.dtype) -> Launch:
    """The same behind a residual: elementwise."""
    x, affine = torch.empty(T, N, dtype=dtype), torch.empty(3, 16)
    return batch_norm.input_gradient_launch(x, x, affine, affine, 256, x)


def spikes_packed(T: int, N: int, dtype: torch.dtype) -> Launch:
    """Words from spikes."""
    return spikes.pack_launch(torch.empty(T, N, dtype=dtype), torch.empty(-(-T // 8), N, dtype=torch.uint8))


def spikes_unpacked(T: int, N: int, dtype: torch.dtype, pool: str = "none") -> Launch:
    """Spikes, or their averages, from words."""
    shape = {"none": None, "rows": Pool(16, 1), "places": Pool(256, 16)}[pool]
    out = torch.empty(T, N // (1 if shape is None else 4), dtype=dtype)
    return spikes.unpack_launch(torch.empty(-(-T // 8), N, dtype=torch.uint8), 0, shape, out)


def norm_statistics(T: int, N: int, dtype: torch.dtype) -> Launch:
    """The first of the two launches: all that reads x."""
    affine, running = torch.empty(3, 16), torch.empty(16)
    norm = Finish(running, running, running, running, torch.tensor(0), 1e-5, 0.1, T * N // 16)
    out = Finished(affine, torch.empty(2, 16, dtype=torch.float64))
    return batch_norm.affine_launches(torch.empty(T, N, dtype=dtype), 256, norm, out)[0]


def regularize(accumulate: bool) -> Launch:
    """The launch over two tensors, one of them odd in size."""
    weights = [torch.empty(5000), torch.empty(7)]
    return regularizer.regularizer_launch(weights, RegularizerSpec(6, 1e-5, 0.25, 1e-5), weights, accumulate, 1.0)[0]


def delay_forward(T: int, N: int, dtype: torch.dtype, inner: int = 256) -> Launch:
    """16 channels, each delayed by up to 25 steps."""
    x = torch.empty(T, N, dtype=dtype)
    return delay.forward_launch(x, None, Delays(torch.empty(16), inner, 25, False), x)


def delay_backward(T: int, N: int, dtype: torch.dtype, channels: int = 0, inner: int = 256) -> Launch:
    """The same backward, with the gradient of the delays if channels > 0."""
    x = torch.empty(T, N, dtype=dtype)
    delays = Delays(torch.empty(channels or 16), inner, 25, False)
    out = DelayGrads(x, None, delays.steps if channels else None)
    return delay.backward_launch(x, x, None, delays, out)[0]
