"""The regulariser against float64 autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends.base import RegularizerSpec
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer
from trtkern.selftest.lif import worst

REGULARIZER_TOLERANCE = 1e-6
"""Relative error of the regulariser's value and of each gradient."""


def compare_regularizer(backend: str, spec: RegularizerSpec, device: str = "cpu", seed: int = 0) -> float:
    """The largest relative error of R, of dR/dw and of ``add_regularizer_grad_`` against float64 autograd.

    Args:
        backend: its name.
        spec: the hyper-parameters.
        device: where: "cpu", "cuda", ...
        seed: of the numbers that are drawn.
    """
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
    return worst(*errors)


def _elementwise(got: Tensor | None, want: Tensor) -> float:
    if got is None:
        return float("inf")
    difference = (got.detach().double().cpu() - want).abs()
    return (difference / want.abs().clamp_min(1e-30)).max().item()
