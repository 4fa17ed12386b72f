"""How much a loss rises in a small ball around the weights: the sharpness that ascent finds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trtkern.analysis._directions import lengths
from trtkern.analysis._objective import Objective

BALLS = {"filters": 0.05, "box": 1e-3, "sphere": 0.05}
"""The balls, with their usual radii."""
WORDS = {
    "filters": "each filter moves by at most {radius:g} of its own length; norms and biases stay",
    "box": "each weight w moves by at most {radius:g} (|w| + 1): Keskar et al. 2017, arXiv 1609.04836",
    "sphere": "all weights together move by at most {radius:g}: Foret et al. 2021 (SAM), arXiv 2010.01412",
}

_TINY = 1e-30


class Sharpness(NamedTuple):
    """The largest loss that was found in a ball, less the loss in its middle."""

    radius: float
    increase: float
    """Of the true loss."""
    percent: float
    """100 increase / (1 + loss), the number of Keskar et al."""
    spread: float
    """Standard deviation over the points that ascent started from."""
    error: float
    """Standard error over the samples."""


def sharpness(
    objective: Objective,
    ball: str,
    radius: float,
    filters: list[bool],
    *,
    steps: int,
    starts: int,
    generator: torch.Generator,
    told: Callable[[], None],
) -> Sharpness:
    """The largest loss in a ball, looked for by ascent along the surrogate gradient, judged by the true loss.

    The first start is the middle; the others are drawn at random in the ball. Each step goes on by half the radius
    along the steepest ascent of the ball's norm, and back into the ball. What is found is a lower bound.

    Args:
        objective: the loss.
        ball: a name of ``BALLS``.
        radius: of the ball.
        filters: which parameters have filters.
        steps, starts: of the ascent.
        generator: of the starts.
        told: called after each pass over the samples.
    """
    here = objective.value().losses
    rises: list[float] = []
    best = torch.zeros_like(here)
    for start in range(starts):
        delta = objective.split(torch.zeros(objective.size, dtype=objective.dtype, device=objective.device))
        if start:
            drawn = torch.randn(objective.size, generator=generator).to(delta[0])
            delta = _along(objective, ball, radius, filters, objective.split(drawn))
        top = float("-inf")
        for step in range(steps + 1):
            objective.move((1.0, delta))
            losses, total = [], torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
            for share, (loss, gradient) in zip(objective.shares, objective.gradients(), strict=True):
                losses.append(loss)
                total.add_(gradient, alpha=float(share))
            told()
            rise = torch.stack(losses) - here
            # A loss that is not a number is no rise; ascent ends there.
            if not bool(torch.isfinite(total).all()):
                break
            if (found := objective.mean(rise)) > top:
                top = found
                if found >= max(rises, default=float("-inf")):
                    best = rise
            if step < steps:
                ahead = _along(objective, ball, radius, filters, objective.split(total))
                on = [d + a / 2 for d, a in zip(delta, ahead, strict=True)]
                delta = _inside(objective, ball, radius, filters, on)
        rises.append(top)
    objective.move()
    increase = max(rises)
    return Sharpness(
        radius,
        increase,
        100 * increase / (1 + objective.mean(here)),
        statistics.stdev(rises) if len(rises) > 1 else float("nan"),
        objective.deviation(best),
    )


def _along(objective: Objective, ball: str, radius: float, filters: list[bool], to: list[Tensor]) -> list[Tensor]:
    """The point of the ball that is farthest along ``to``."""
    if ball == "sphere":
        length = torch.linalg.vector_norm(objective.flat(to)).clamp(min=_TINY)
        return [t * (radius / length) for t in to]
    if ball == "box":
        return [t.sign() * (radius * (w.abs() + 1)) for t, w in zip(to, objective.start, strict=True)]
    return [
        t * (radius * lengths(w) / lengths(t).clamp(min=_TINY)) if moves else torch.zeros_like(t)
        for t, w, moves in zip(to, objective.start, filters, strict=True)
    ]


def _inside(objective: Objective, ball: str, radius: float, filters: list[bool], at: list[Tensor]) -> list[Tensor]:
    """The point of the ball that is nearest to ``at``."""
    if ball == "sphere":
        length = torch.linalg.vector_norm(objective.flat(at)).clamp(min=_TINY)
        return [t * (radius / length).clamp(max=1.0) for t in at]
    if ball == "box":
        limits = [radius * (w.abs() + 1) for w in objective.start]
        return [torch.maximum(torch.minimum(t, limit), -limit) for t, limit in zip(at, limits, strict=True)]
    return [
        t * (radius * lengths(w) / lengths(t).clamp(min=_TINY)).clamp(max=1.0) if moves else torch.zeros_like(t)
        for t, w, moves in zip(at, objective.start, filters, strict=True)
    ]
