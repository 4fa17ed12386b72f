"""Every cell of every backend against the float64 reference: what ``doctor``, the tests and docs/backends.md run.

A cell is one way to use a neuron (dtype, surrogate, reset, detach, learnable). Its inputs keep every potential away
from the threshold, and from the edges of the rectangle, by a margin: then spikes must agree exactly and gradients
within a bound that depends on the dtype alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference, surrogates
from trtkern.backends import BACKENDS
from trtkern.backends.base import PARAMS, Backend, Case, RegularizerSpec
from trtkern.ops.lif import lif
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer
from trtkern.spec import RESETS, LIFSpec

MARGIN = 1e-3
"""No potential comes closer to a discontinuity; float32 rounding moves it by about 1e-6."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}
"""Largest error of an output or an input gradient in that dtype, relative to the largest magnitude in it."""

PARAMETER_TOLERANCE = 1e-4
"""The same for gradients of learnable parameters: sums over many neurons in float32."""

REGULARIZER_TOLERANCE = 1e-6
"""Relative error of the regulariser's value and of each gradient."""


@dataclass(frozen=True)
class Cell:
    """One way to use a LIF neuron, and the size at which it is tried: x is [timesteps, *shape], channels on axis 2."""

    dtype: torch.dtype = torch.float32
    surrogate: str = "triangle"
    reset: str = "hard"
    detach_reset: bool = False
    learnable: str = "none"
    """"none", "scalar" or "channel": all six parameters as numbers, 0-dim tensors or per-channel tensors."""
    timesteps: int = 4
    shape: tuple[int, ...] = (3, 5, 7)
    layout: str = "contiguous"
    """"contiguous", "channels_last" or "strided" (every second column of a larger tensor)."""

    @property
    def spec(self) -> LIFSpec:
        """What selects code."""
        return LIFSpec(self.reset, self.surrogate, None, self.detach_reset)

    def __str__(self) -> str:
        detach = "detached" if self.detach_reset else "attached"
        dtype = str(self.dtype).removeprefix("torch.")
        size = "x".join(map(str, (self.timesteps, *self.shape)))
        return f"{dtype}-{self.surrogate}-{self.reset}-{detach}-{self.learnable}-{size}-{self.layout}"


class Errors(NamedTuple):
    """Spikes that differ, and the largest relative errors of v, of the gradients of x and v0, and of the parameters."""

    spikes: int
    output: float
    gradient: float
    parameter: float

    def within(self, dtype: torch.dtype) -> bool:
        """Whether they are inside the bounds of that dtype; a NaN is not."""
        bound = TOLERANCE[dtype]
        return (
            self.spikes == 0
            and self.output <= bound
            and self.gradient <= bound
            and self.parameter <= (bound if dtype == torch.float64 else PARAMETER_TOLERANCE)
        )


class Row(NamedTuple):
    """One line of the doctor: ok is None for a backend that is not available here, with the reason as detail."""

    name: str
    ok: bool | None
    detail: str


def cells(**sizes: object) -> Iterator[Cell]:
    """Every dtype x surrogate x reset x detach x learnable that the fused backends hold."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    grid = itertools.product(dtypes, surrogates.BUILTIN, RESETS, (False, True), ("none", "scalar", "channel"))
    for dtype, surrogate, reset, detach, learnable in grid:
        yield Cell(dtype, surrogate, reset, detach, learnable, **sizes)  # type: ignore[arg-type]


class _Problem(NamedTuple):
    x: Tensor
    v0: Tensor
    params: list[Tensor]
    gs: Tensor
    gv: Tensor
    gstate: Tensor


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout of the axes after time."""
    if layout == "channels_last":
        return t.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "strided":
        return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0]
    return t


def _broadcast(params: list[Tensor], x: Tensor) -> list[Tensor]:
    return [p.reshape(-1, *[1] * (x.dim() - 3)) if p.numel() > 1 else p for p in params]


def _problem(cell: Cell, seed: int) -> _Problem:
    """Inputs whose potentials keep the margin; values in the cell's dtype, held in float64 where the oracle reads."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = cell.dtype) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    count = cell.shape[1] if cell.learnable == "channel" else 1
    centers = (0.6, 0.9, 0.1, 0.8, 1.0, 0.1)
    spread = 0.0 if cell.learnable == "none" else 0.1
    # Numbers that float32 holds exactly, so that every backend and the oracle read the same ones.
    params = [(c + spread * torch.rand(count, generator=draw)).double() for c in centers]
    x = normal(cell.timesteps, *cell.shape) + 0.5
    v0 = 0.3 * normal(*cell.shape, dtype=torch.float32)
    alpha = cell.spec.alpha or 1.0
    for _ in range(200):
        h = reference.lif(x.double(), v0.double(), _broadcast(params, x), cell.spec).h
        u = h - _broadcast(params, x)[PARAMS.index("v_threshold")]
        close = u.abs() < MARGIN
        if cell.surrogate == "rectangle":
            close |= (u.abs() - 0.5 / alpha).abs() < MARGIN
        bad = close.any(0)
        if not bad.any():
            break
        x = torch.where(bad, normal(*x.shape) + 0.5, x)
    else:
        raise RuntimeError(f"selftest: no inputs for {cell} keep a margin of {MARGIN} from the threshold")
    gs, gv = normal(*x.shape) + 0.2, normal(*x.shape)
    return _Problem(x, v0, params, gs, gv, normal(*cell.shape, dtype=torch.float32))


def _relative(got: Tensor, want: Tensor) -> float:
    scale = want.abs().max().item() if want.numel() else 0.0
    error = (got.detach().double().cpu() - want).abs().max().item() if want.numel() else 0.0
    return error / scale if scale else error


def compare(backend: str, cell: Cell, device: str = "cpu", seed: int = 0) -> Errors:
    """Run the cell on the backend and on the float64 reference, all outputs and all gradients; the errors."""
    problem = _problem(cell, seed)
    oracle_inputs = [t.double().requires_grad_() for t in (problem.x, problem.v0, *problem.params)]
    oracle = reference.lif(oracle_inputs[0], oracle_inputs[1], _broadcast(oracle_inputs[2:], problem.x), cell.spec)
    incoming = [g.double() for g in (problem.gs, problem.gv, problem.gstate)]
    wanted = torch.autograd.grad([oracle.s, oracle.v, oracle.v[-1]], oracle_inputs, incoming, materialize_grads=True)

    x = _laid_out(problem.x.to(device), cell.layout).requires_grad_()
    v0 = problem.v0.to(device).requires_grad_()
    exact = torch.float64 if cell.dtype == torch.float64 else torch.float32
    tensors = [p.to(device, exact).squeeze(0).requires_grad_() for p in problem.params]
    learn = cell.learnable != "none"
    values: dict[str, Any] = dict(zip(PARAMS, tensors if learn else [p.item() for p in problem.params], strict=True))
    if cell.dtype == torch.float64:
        v0 = problem.v0.double().to(device).requires_grad_()
    out = lif(x, v0, **values, spec=cell.spec, backend=backend, return_state=True, return_v=True)
    spikes, state, v = (tensor for tensor in out if tensor is not None)
    outputs = [spikes, v, state]
    grads = [_laid_out(g.to(device), cell.layout) for g in (problem.gs, problem.gv)]
    inputs = [x, v0, *(tensors if learn else [])]
    got = torch.autograd.grad(outputs, inputs, [*grads, problem.gstate.to(device, v0.dtype)], materialize_grads=True)
    return Errors(
        spikes=int((spikes.detach().double().cpu() != oracle.s.detach()).sum()),
        output=max(_relative(v, oracle.v.detach()), _relative(state, oracle.v[-1].detach())),
        gradient=max(map(_relative, got[:2], wanted[:2])),
        parameter=_relative(torch.stack(got[2:]), torch.stack(wanted[2:]).reshape(len(PARAMS), *got[2].shape))
        if learn
        else 0.0,
    )


def compare_regularizer(backend: str, spec: RegularizerSpec, device: str = "cpu", seed: int = 0) -> float:
    """The largest relative error of R, of dR/dw and of ``add_regularizer_grad_`` against float64 autograd."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((7,), (33, 5, 3, 3), (1,), (257, 129))
    exact = [(0.1 * torch.randn(*s, generator=draw)).double() for s in shapes]
    exact[0][0] = 0.0
    leaves = [w.clone().requires_grad_() for w in exact]
    value = reference.regularizer(leaves, spec)
    wanted = torch.autograd.grad(value, leaves)
    weights = [w.float().to(device).requires_grad_() for w in exact]
    got = regularizer(weights, spec, backend=backend)
    got.backward()
    errors = [abs(got.item() - value.item()) / value.item()]
    for w, want in zip(weights, wanted, strict=True):
        errors.append(_elementwise(w.grad, want))
        w.grad = torch.zeros_like(w)
    added = add_regularizer_grad_(weights, spec, scale=2.0, backend=backend)
    errors.append(abs(added.item() - value.item()) / value.item())
    errors += [_elementwise(w.grad, 2 * want) for w, want in zip(weights, wanted, strict=True)]
    return max(errors)


def _elementwise(got: Tensor | None, want: Tensor) -> float:
    if got is None:
        return float("inf")
    difference = (got.detach().double().cpu() - want).abs()
    return (difference / want.abs().clamp_min(1e-30)).max().item()


def device_of(backend: Backend) -> str:
    """The device on which a backend that is available can be tried."""
    for device in ("cuda", "cpu"):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        if backend.objection(Case("lif", device, torch.float32, LIFSpec())) is None:
            return device
    raise RuntimeError(f"selftest: backend {backend.name} is available but takes no device")


def run() -> list[Row]:
    """Try every backend that is available here on a handful of cells; takes about a second."""
    return [_row(backend) for backend in BACKENDS]


def _row(backend: Backend) -> Row:
    try:
        reason = backend.missing()
    except ValueError as error:  # a setting, such as TRTKERN_CPU_ISA, that asks for what is not there
        return Row(backend.name, False, str(error))
    if reason is not None:
        return Row(backend.name, None, reason)
    device = device_of(backend)
    trial = [
        Cell(dtype, surrogate, reset, learnable="channel", timesteps=timesteps, shape=(2, 3, 11))
        for dtype in (torch.float32, torch.bfloat16)
        for surrogate, reset, timesteps in (("triangle", "hard", 4), ("sigmoid", "soft", 17), ("atan", "none", 1))
    ]
    try:
        for cell in trial:
            errors = compare(backend.name, cell, device)
            if not errors.within(cell.dtype):
                return Row(backend.name, False, f"{cell} on {device}: {errors}")
        detail = f"{len(trial)} LIF cells"
        if backend.holds("regularizer"):
            worst = compare_regularizer(backend.name, RegularizerSpec(6, 1e-5, 0.25, 1e-5), device)
            if not worst <= REGULARIZER_TOLERANCE:
                return Row(backend.name, False, f"regularizer on {device}: relative error {worst:.1e}")
            detail += " and the regulariser"
    except Exception as error:  # a backend that cannot even run is what the doctor is for
        return Row(backend.name, False, f"{type(error).__name__} on {device}: {error}")
    return Row(backend.name, True, f"{detail} agree with float64 on {device}")
