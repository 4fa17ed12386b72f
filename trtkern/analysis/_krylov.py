"""Eigenvalues and trace of a matrix that is known by its products with vectors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]
"""A x of a vector x [n]."""
_GONE = 2 / 3
"""A vector that keeps less than this power of a rounding of its length next to others is a sum of them."""


class Pairs(NamedTuple):
    """Eigenvalues of the symmetric part (A + A^T) / 2 of a matrix A, in a space that grew until they stood still."""

    values: Tensor
    """The largest ones, falling, float64 [k]."""
    vectors: Tensor
    """Of length 1, [k, n]."""
    residuals: Tensor
    """How far each A y leaves the space, float64 [k]; where A is symmetric no value is further from an eigenvalue."""
    lowest: float
    """The smallest value that was seen."""
    asymmetry: float
    """|A - A^T| / |A + A^T| in the space, Frobenius norms."""
    products: int
    """How many were made."""


def lanczos(
    multiply: Multiply, start: Tensor, count: int, *, iterations: int, tolerance: float, generator: torch.Generator
) -> Pairs:
    """The largest eigenvalues by Lanczos' method with full reorthogonalisation.

    The space is spanned by x, A x, A A x, ...; Q holds an orthonormal basis of it. T = Q^T A Q is computed whole, not
    only its three diagonals: (T + T^T) / 2 = Q^T (A + A^T) / 2 Q exactly, so its eigenvalues are the Rayleigh-Ritz
    values of the symmetric part also where A is not symmetric, and no product with A^T is needed.

    Args:
        multiply: the product with A.
        start: x, [n], not zero.
        count: k, at most n.
        iterations: products at most.
        tolerance: it ends when all k residuals are below that share of the largest value.
        generator: of vectors to go on with where the space is exhausted.
    """
    size = start.numel()
    iterations = min(max(iterations, count), size)
    gone = torch.finfo(start.dtype).eps ** _GONE
    basis = [start / torch.linalg.vector_norm(start)]
    projected = torch.zeros(iterations, iterations, dtype=torch.float64)
    for j in range(iterations):
        image = multiply(basis[j])
        length = float(torch.linalg.vector_norm(image))
        rest, along = _beside(image, basis)
        projected[: j + 1, j] = along
        leaving = float(torch.linalg.vector_norm(rest))
        values, inside = torch.linalg.eigh((projected + projected.T)[: j + 1, : j + 1] / 2)
        residuals = leaving * inside[-1].abs()
        top = residuals.flip(0)[:count]
        done = j + 1 == size or (j + 1 >= count and bool(top.max() <= tolerance * values.abs().max()))
        # Where nothing leaves the space, all of its eigenvalues are known, and others may hide beside it.
        if leaving <= gone * max(length, 1e-300) and j + 1 < size:
            done = False
            rest = _beside(torch.randn(size, generator=generator).to(image), basis)[0]
            leaving = 0.0
        elif j + 1 < iterations:
            projected[j + 1, j] = leaving
        if done or j + 1 == iterations:
            break
        basis.append(rest / torch.linalg.vector_norm(rest))
    used = j + 1
    vectors = torch.zeros(count, size, dtype=start.dtype, device=start.device)
    for vector, coordinates in zip(vectors, inside.flip(1).T, strict=False):
        for q, part in zip(basis, coordinates.tolist(), strict=True):
            vector.add_(q, alpha=part)
    held = projected[:used, :used]
    return Pairs(values.flip(0)[:count], vectors, top, float(values[0]), ratio(held - held.T, held + held.T), used)


def ratio(part: Tensor, whole: Tensor) -> float:
    """The norm of one matrix by that of another; 0 where both are 0."""
    above, below = float(part.norm()), float(whole.norm())
    return above / below if below > 0 or above != above else 0.0


def _beside(vector: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What of a vector is orthogonal to an orthonormal basis, and its coordinates there, float64 on the CPU.

    Twice: what rounding left of the basis after the first time is gone after the second.
    """
    along = torch.zeros(len(basis), dtype=torch.float64)
    rest = vector.clone()
    for _ in range(2):
        for i, q in enumerate(basis):
            part = torch.dot(q, rest)
            rest.sub_(q * part)
            along[i] += float(part)
    return rest, along


def signs(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """A vector of +1 and -1 (Rademacher), drawn on the CPU, so alike on every device."""
    return torch.randint(0, 2, (size,), generator=generator).to(like).mul_(2).sub_(1)
