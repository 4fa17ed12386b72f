"""Products of the second derivative of a loss with a vector: differentiated twice, or from two gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from trtkern._torch import nodes
from trtkern.analysis._objective import Objective


class Product(NamedTuple):
    """H v."""

    vector: Tensor
    """[n]."""
    quotients: Tensor
    """v^T H v of the mean loss of each batch, float64 [batches]."""


def exact(objective: Objective, v: Tensor) -> Product:
    """H v by differentiating <g, v> again, g being the gradient; the neurons must run on the reference.

    Reverse mode gives H^T v. Of a spiking network H is symmetric all the same: whatever number (0 or 1), first
    derivative (the surrogate) and second derivative (the surrogate's own) a neuron has at a step, there is a smooth
    function with these three, and H is the Hessian of the network that has these functions in place of the steps.
    """
    total = torch.zeros_like(v)
    quotients = torch.zeros(len(objective.shares), dtype=torch.float64)
    for i, (_, gradient) in enumerate(objective.gradients(twice=True)):
        if gradient.requires_grad:  # else the loss is linear in the weights
            found = torch.autograd.grad(gradient, objective.parameters, v.to(gradient), allow_unused=True)
            part = objective.flat(found)
            total.add_(part, alpha=float(objective.shares[i]))
            quotients[i] = torch.dot(part, v).double()
    return Product(total, quotients)


def differences(objective: Objective, v: Tensor, step: float) -> Product:
    """H v as (g(w + h v) - g(w - h v)) / 2h with h |v| = step |w| (step, where w is 0), on the backend that trains."""
    length = float(torch.linalg.vector_norm(objective.flat(objective.start)))
    h = step * (length or 1.0) / max(float(torch.linalg.vector_norm(v)), 1e-300)
    direction = objective.split(v)
    total = torch.zeros(v.shape, dtype=torch.float64, device=v.device)
    quotients = torch.zeros(len(objective.shares), dtype=torch.float64)
    for sign in (1.0, -1.0):
        objective.move((sign * h, direction))
        for i, (_, gradient) in enumerate(objective.gradients()):
            total.add_(gradient, alpha=sign * float(objective.shares[i]))
            quotients[i] += sign * torch.dot(gradient.double(), v.double()).cpu()
    objective.move()
    return Product((total / (2 * h)).to(v), quotients / (2 * h))


def twice_differentiable(objective: Objective) -> bool:
    """Whether the network can be differentiated twice: tried with the first batch.

    ``once_differentiable`` puts leaves of its own into the graph, behind a node that raises. A derivative with respect
    to the weights alone goes round that node, and lacks a part without a word; so those leaves are asked for as well.
    """
    try:
        gradient = next(objective.gradients(twice=True))[1]
        if gradient.requires_grad:
            inputs = [*objective.parameters, *_leaves(gradient)]
            torch.autograd.grad(gradient, inputs, torch.ones_like(gradient), allow_unused=True)
    except RuntimeError:
        return False
    return True


def _leaves(output: Tensor) -> list[Tensor]:
    """The tensors that a graph begins with."""
    if not output.requires_grad:
        return []
    made_of = (getattr(node, "variable", None) for node in nodes([get_gradient_edge(output)]))
    return [leaf for leaf in made_of if isinstance(leaf, Tensor)]
