"""The cases that ``aot_triton.py`` compiles beside those that ``trtkern inspect`` shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from trtkern import surrogates
from trtkern.backends.base import (
    Finish,
    Finished,
    LIFBackward,
    LIFForward,
    LIFGrads,
    LIFInputs,
    NormGrads,
    RecurrentBackward,
    RecurrentForward,
    RecurrentInputs,
)
from trtkern.kernels import batch_norm, batch_norm_finish, lif_launch, recurrent_launch, spike_conv_launch
from trtkern.kernels.launch import Launch
from trtkern.profiling.inspect import launches
from trtkern.spec import LIFSpec
from trtkern.surrogates import exp

STEEPNESS = 1.5

Case = tuple[str, int, torch.dtype, dict[str, Any]]


def own_surrogate(u, alpha):
    """What a user might write, with a number of the module."""
    return STEEPNESS * exp(-alpha * abs(u))


def finishes(dtype: torch.dtype) -> list[Launch]:
    """All that runs between the passes of a norm whose parameters are of that type, and behind a pass with sums: first
    the four whose code depends on the type."""
    C, P = 16, 10
    draw = [torch.empty(C, dtype=dtype) for _ in range(4)]
    out = Finished(torch.empty(3, C), torch.empty(2, C).double(), torch.empty(3, C))
    norm = Finish(*draw, torch.tensor(0), 1e-5, 0.1, 100)
    grads = NormGrads(out.affine, out.moments, 100, out.coef, *draw[:2])
    learned, summed, gparams = torch.empty(P, 4, C, 8), torch.empty(2, 4, C, 8), torch.empty(P, C)
    return [
        batch_norm.affine_launches(torch.empty(4, 256 * C), 256, norm, out)[1],
        batch_norm_finish.known_launch(*draw[:2], norm, out),
        batch_norm_finish.coefficients_launch(out.moments, out.moments, grads),
        batch_norm_finish.add_up_launch(learned, summed, gparams, out.moments, grads),
        batch_norm.statistics_launches(torch.empty(4, 256 * C), C, 256, out.moments)[1],
        batch_norm_finish.add_up_launch(learned[:6], None, gparams[:6], None, None),
        batch_norm_finish.add_up_launch(None, summed, None, out.moments, None),
    ]


def with_lengths() -> Iterator[tuple[str, Launch]]:
    """Passes over samples that end each at a step of its own."""
    ends, spec = torch.empty(16, dtype=torch.int32), LIFSpec()
    for T, dtype in ((4, torch.float32), (40, torch.float32), (40, torch.bfloat16)):
        x, edges = torch.empty(T, 65536, dtype=dtype), launches.edges_of(T, 65536, spec)
        inputs = LIFInputs(x, None, None, (0.5,) * 6, spec, 1, lengths=ends)
        out = LIFForward(x, None, torch.empty(65536), edges, torch.zeros(1, dtype=torch.int32))
        yield f"forward {T} {dtype}", lif_launch.forward_launch(inputs, out)
        back = lif_launch.backward_launches(inputs, edges, LIFGrads(x, None, None), LIFBackward(x, None, None))
        yield f"backward {T} {dtype}", back[0]
    for pool in ("rows", "places"):
        inputs, _ = launches.normed(4, 65536, torch.float32, True, pool)
        inputs, x = inputs._replace(lengths=ends), inputs.x
        yield f"pooled forward {pool}", lif_launch.forward_launch(inputs, LIFForward(x, None, None, None, None))
        summed = LIFBackward(x, None, None, torch.empty(2, 16).double())
        grads = LIFGrads(x, None, None, torch.empty(3, 16))
        yield f"pooled backward {pool}", lif_launch.backward_launches(inputs, None, grads, summed)[0]


def spike_convs(
    precision: str, dtype: torch.dtype = torch.float32, T: int = 4, C: int = 64, K: int = 128, pooled: bool = False,
    bias: bool = False, window: int = 3,
) -> list[Launch]:  # fmt: skip
    """All that a layer of packed spikes launches, both directions: 8 x 8 pixels, or a linear layer (window 0)."""
    side = 16 if pooled else 8
    packed = torch.empty(-(-T // 8), 2, side, side, C, dtype=torch.uint8).movedim(-1, 2)
    weight = torch.empty(K, window, window, C, dtype=dtype).movedim(-1, 1)
    out = torch.empty(2 * T, 8, 8, K, dtype=dtype).movedim(-1, 1)
    if not window:
        packed, weight, out = (torch.empty(s, dtype=t.dtype) for s, t in (
            ((-(-T // 8), 32, C), packed), ((K, C), weight), ((T * 32, K), out))
        )  # fmt: skip
    options = {"padding": window // 2, "pooled": pooled}
    given = torch.empty(K, dtype=dtype) if bias else None
    back = "bf16x3" if precision == "int8x3" else precision
    return [
        *spike_conv_launch.forward_launches(packed, weight, given, out, precision=precision, **options),
        *spike_conv_launch.weight_gradient_launches(packed, out, weight, precision=back, **options),
    ]


def recurrents(
    N: int, dtype: torch.dtype = torch.float32, T: int = 40, B: int = 6, neuron: str = "LIF", params: int = 0,
    every: bool = False, surrogate: str = "atan",
) -> list[Launch]:  # fmt: skip
    """Both directions of neurons that feed each other, as training asks for them.

    params: 0 for numbers, else 1 or N columns that are learnt; every: also what is seldom asked for.
    """
    spec = LIFSpec("soft", surrogate, neuron=neuron)
    S, P = len(spec.row.states), len(spec.row.params)
    x, weight = torch.empty(T, B, N, dtype=dtype), torch.empty(N, N)
    edges, rows = torch.empty((T - 1) // spec.chunk * S, B * N), torch.empty(P, params) if params else None
    state, v = (torch.empty(S, B, N), x) if every else (None, None)
    words = torch.empty(-(-T // 8), B, N, dtype=torch.uint8) if every else None
    bias = torch.empty(N)
    inputs = RecurrentInputs(x, x[0] if every else None, state, weight, bias, rows, (0.5,) * P, spec)
    out = RecurrentForward(x, x, v, state, edges, torch.zeros(1, dtype=torch.int32), words)
    back = RecurrentBackward(x, state, rows)
    return [
        *recurrent_launch.forward_launches(inputs, out),
        *recurrent_launch.backward_launches(inputs, edges, LIFGrads(x, v, state), back),
    ]


def lif_cases() -> Iterator[Case]:
    """Arguments of ``inspect.triton.case``, on sm_90: a representative of every class without a norm."""
    f32, bf16 = torch.float32, torch.bfloat16
    both, few = ("forward", "backward"), {"neurons": 1024}
    yield from ((direction, T, f32, few) for direction in both for T in (8, 16, 40))
    yield from ((direction, 16, bf16, few) for direction in both)
    yield from (("backward", 4, f32, {**few, "surrogate": name}) for name in (*surrogates.BUILTIN[1:], "own"))
    yield "backward", 4, torch.float16, {**few, "reset": "soft"}
    yield from (("backward", 16, f32, {**few, "channels": channels}) for channels in (1, 8))
    yield from ((direction, 4, f32, {"neurons": 1009}) for direction in both)
    yield from ((direction, 20, f32, {**few, "neuron": "ALIF"}) for direction in both)
    yield "backward", 4, f32, {**few, "neuron": "EIF"}
    yield "backward", 8, bf16, {**few, "neuron": "CUBALIF", "channels": 8}


def norm_grid() -> Iterator[Case]:
    """Each kernel over neurons behind a norm: every class of T, dtype, and what it may do besides."""
    f32, bf16 = torch.float32, torch.bfloat16
    for T, dtype in itertools.product((4, 8, 16), (f32, bf16)):
        if (T, dtype) == (4, f32):  # what trtkern inspect shows
            continue
        yield "norm_forward", T, dtype, {}
        yield "norm_forward", T, dtype, {"residual": True, "packed": True}
        yield "norm_sums", T, dtype, {}
        yield "norm_sums", T, dtype, {"residual": True}
        yield "norm_input", T, dtype, {}


def pooled_grid() -> Iterator[Case]:
    """The same where averages of 2 x 2 neurons go out."""
    f32, bf16 = torch.float32, torch.bfloat16
    for T, dtype, pool in itertools.product((8, 16), (f32, bf16), ("rows", "places")):
        yield "norm_forward", T, dtype, {"residual": True, "packed": True, "pool": pool}
        yield "norm_sums", T, dtype, {"residual": True, "pool": pool}
        yield "norm_input", T, dtype, {"pool": pool}


def norm_cases(whole: bool) -> Iterator[Case]:
    """The same with a norm, images of 4096 neurons: all that the traffic contract names, pooling, packing.

    whole: whole grids, else every sixth or fifth of them, so that each value of each axis stays in.
    """
    f32, bf16 = torch.float32, torch.bfloat16
    yield from itertools.islice(norm_grid(), 0, None, 1 if whole else 6)
    yield from itertools.islice(pooled_grid(), 0, None, 1 if whole else 5)
    yield from ((name, 4, bf16, {}) for name in ("norm_statistics", "norm_input_grad", "spikes_packed"))
    yield from (("spikes_unpacked", 8, bf16, {"pool": pool}) for pool in ("none", "rows", "places"))
    yield "spikes_unpacked", 8, f32, {"pool": "places"}
