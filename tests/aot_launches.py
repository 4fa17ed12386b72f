"""Launches of the Triton kernels as the ops ask for them, and the cases that ``aot_triton.py`` compiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trtkern import surrogates
from trtkern.backends.base import LIFBackward, LIFForward, LIFGrads, LIFInputs, Norm, Pool, RegularizerSpec
from trtkern.kernels import batch_norm, lif_launch, regularizer, spikes
from trtkern.kernels.launch import Launch
from trtkern.kernels.pooling import POSITIONS
from trtkern.spec import LIFSpec
from trtkern.surrogates import exp

SCALARS = (0.5, 1.0, 0.0, 1.0, 1.0, 0.0)
STEEPNESS = 1.5


def own_surrogate(u, alpha):
    """What a user might write, with a number of the module."""
    return STEEPNESS * exp(-alpha * abs(u))


def edges_of(T: int, N: int) -> Tensor | None:
    return torch.empty(max(-(-T // 16) - 1, 0), 1).expand(-1, N) if T > 16 else None


def forward(
    T: int, N: int, dtype: torch.dtype, offset: int = 0, scalars: tuple = SCALARS, x: Tensor | None = None
) -> Launch:
    """The launch of a forward pass as training asks for it: spikes, edges if T > 16, the flag."""
    if x is None:
        x = torch.empty(T * N + offset, dtype=dtype)[offset:].view(T, N)
    out = LIFForward(x, None, None, edges_of(T, N), torch.zeros(1, dtype=torch.int32))
    return lif_launch.forward_launch(LIFInputs(x, None, None, scalars, LIFSpec(), 1), out)


def backward(
    T: int, N: int, dtype: torch.dtype, offset: int = 0, scalars: tuple = SCALARS, x: Tensor | None = None,
    channels: int = 0, surrogate: str = "triangle", reset: str = "hard",
) -> Launch:  # fmt: skip
    """The launch of a backward pass from the gradient of the spikes, with gradients of parameters if channels > 0."""
    if x is None:
        x = torch.empty(T * N + offset, dtype=dtype)[offset:].view(T, N)
    params = torch.empty(6, channels) if channels else None
    inputs = LIFInputs(x, None, params, scalars, LIFSpec(reset, surrogate), 1)
    out = LIFBackward(x, None, params)
    return lif_launch.backward_launch(inputs, edges_of(T, N), LIFGrads(x, None, None), out)[0]


def normed(
    T: int, N: int, dtype: torch.dtype, residual: bool = False, pool: str = "none", x: Tensor | None = None
) -> LIFInputs:
    """Images of 16 x 16 in 16 channels behind a norm, without learnt parameters; pool "places": channels last."""
    if x is None:
        x = torch.empty(T, N, dtype=dtype)
    shape = {"none": None, "rows": Pool(16, 1), "places": Pool(256, 16)}[pool]
    norm = Norm(torch.empty(3, 16), x if residual else None)
    return LIFInputs(x, None, None, SCALARS, LIFSpec(), 1 if pool == "places" else 256, norm, shape)


def norm_forward(T: int, N: int, dtype: torch.dtype, packed: bool = False, **options: Any) -> Launch:
    """Normalise (and add the residual), all steps, spikes (and the words)."""
    inputs = normed(T, N, dtype, **options)
    words = torch.empty(1, 1, dtype=torch.uint8).expand(-(-T // 8), N) if packed else None
    out = LIFForward(inputs.x, None, None, edges_of(T, N), torch.zeros(1, dtype=torch.int32), words)
    return lif_launch.forward_launch(inputs, out)


def norm_sums(T: int, N: int, dtype: torch.dtype, **options: Any) -> Launch:
    """The first pass of the backward: sums for each channel, and the residual's gradient if there is one."""
    inputs = normed(T, N, dtype, **options)
    gx = inputs.x if inputs.norm.residual is not None else None
    out = LIFBackward(gx, None, None, torch.empty(2, 16, dtype=torch.float64))
    return lif_launch.backward_launch(inputs, edges_of(T, N), LIFGrads(inputs.x, None, None), out)[0]


def norm_input(T: int, N: int, dtype: torch.dtype, **options: Any) -> Launch:
    """The second pass of the backward: the gradient of what was normalised."""
    inputs = normed(T, N, dtype, **options)
    grads = LIFGrads(inputs.x, None, None, inputs.norm.affine)
    return lif_launch.backward_launch(inputs, edges_of(T, N), grads, LIFBackward(inputs.x, None, None))[0]


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
    return batch_norm.statistics_launches(torch.empty(T, N, dtype=dtype), 16, 256, torch.empty(2, 16).double())[0]


def regularize(accumulate: bool) -> Launch:
    """The launch over two tensors, one of them odd in size."""
    weights = [torch.empty(5000), torch.empty(7)]
    return regularizer.regularizer_launch(weights, RegularizerSpec(6, 1e-5, 0.25, 1e-5), weights, accumulate, 1.0)[0]


def lif_cases() -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Arguments of ``lif_row``: a representative of every class without a norm."""
    f32, bf16 = torch.float32, torch.bfloat16
    both = ("forward", "backward")
    yield from ((("sm_90", direction, T, f32), {}) for direction in both for T in (4, 8, 16, 40))
    yield from ((("sm_90", direction, 16, bf16), {}) for direction in both)
    names = (*surrogates.BUILTIN[1:], "own")
    yield from ((("sm_90", "backward", 4, f32), {"surrogate": name}) for name in names)
    yield ("sm_90", "backward", 4, torch.float16), {"reset": "soft"}
    yield from ((("sm_90", "backward", 16, f32), {"channels": channels}) for channels in (1, 8))
    yield from ((("sm_90", direction, 4, f32), {"N": 1009}) for direction in both)
    yield from (((target, direction, 4, f32), {}) for target in ("sm_80", "gfx942") for direction in both)


def norm_grid() -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Each kernel over neurons behind a norm: every class of T, dtype, and what it may do besides."""
    f32, bf16 = torch.float32, torch.bfloat16
    for T, dtype in itertools.product((4, 8, 16), (f32, bf16)):
        yield ("sm_90", "norm_forward", T, dtype), {}
        yield ("sm_90", "norm_forward", T, dtype), {"residual": True, "packed": True}
        yield ("sm_90", "norm_sums", T, dtype), {}
        yield ("sm_90", "norm_sums", T, dtype), {"residual": True}
        yield ("sm_90", "norm_input", T, dtype), {}


def pooled_grid() -> Iterator[tuple[tuple, dict[str, Any]]]:
    """The same where averages of 2 x 2 neurons go out."""
    f32, bf16 = torch.float32, torch.bfloat16
    for T, dtype, pool in itertools.product((8, 16), (f32, bf16), ("rows", "places")):
        yield ("sm_90", "norm_forward", T, dtype), {"residual": True, "packed": True, "pool": pool}
        yield ("sm_90", "norm_sums", T, dtype), {"residual": True, "pool": pool}
        yield ("sm_90", "norm_input", T, dtype), {"pool": pool}


def norm_cases(whole: bool) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """The same with a norm, images of 4096 neurons: all that the traffic contract names, pooling, packing.

    whole: whole grids, else every fourth or fifth of them, so that each value of each axis stays in.
    """
    f32, bf16 = torch.float32, torch.bfloat16
    yield from itertools.islice(norm_grid(), 0, None, 1 if whole else 4)
    yield from itertools.islice(pooled_grid(), 0, None, 1 if whole else 5)
    for target, dtype in (("sm_90", f32), ("sm_90", bf16), ("sm_80", f32), ("gfx942", f32)):
        yield (target, "norm_statistics", 4, dtype), {}
        yield (target, "norm_input_grad", 4, dtype), {}
    for dtype in (f32, bf16):
        yield ("sm_90", "spikes_packed", 8, dtype), {}
        yield from ((("sm_90", "spikes_unpacked", 8, dtype), {"pool": pool}) for pool in POSITIONS)
    for target in ("sm_80", "gfx942"):
        yield from (((target, direction, 4, f32), {}) for direction in ("norm_forward", "norm_sums", "norm_input"))
        yield (target, "norm_sums", 4, f32), {"pool": "rows"}
