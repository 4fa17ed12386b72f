"""Second derivatives on the reference: each way to them gives the same; where nothing jumps, the differences."""

import pytest
import torch
from torch.func import functional_call, grad, jvp

from trtkern import nn


def sizes(*shape):
    return (1.5 * torch.randn(shape) + 0.5).double()


def model(kind):
    fixed = {"surrogate": "atan", "backend": "reference"}
    made = {
        "LIF": lambda: nn.LIF(**fixed),
        "soft LIF": lambda: nn.LIF(v_reset=None, detach_reset=True, **fixed),
        "PLIF": lambda: nn.PLIF(**fixed),
        "LI": lambda: nn.LI(backend="reference"),
        "norm": lambda: nn.BatchNormLIF(4, **fixed),
        "norm, eval": lambda: nn.BatchNormLIF(4, **fixed).eval(),
        "model": lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), nn.LIF(**fixed), torch.nn.Linear(5, 3)),
    }[kind]()
    return made.double()


@pytest.mark.parametrize("kind", ["LIF", "soft LIF", "PLIF", "LI", "norm", "norm, eval", "model"])
def test_every_way_to_a_second_derivative_gives_the_same(kind):
    made, x = model(kind), sizes(3, 2, 4)
    direction = torch.randn_like(x)

    def of(x):
        return made(x).sin().sum()

    _, forward = jvp(grad(of), (x,), (direction,))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(of(leaf), leaf, create_graph=True)
    (reverse,) = torch.autograd.grad(first, leaf, direction, retain_graph=True)
    _, product = torch.autograd.functional.hvp(of, x, direction)
    _, transposed = torch.autograd.functional.vhp(of, x, direction)
    # The derivative of the surrogate gradient is no Hessian, and need not be symmetric: forward over reverse is H v,
    # reverse over reverse v H.
    other = torch.randn_like(x)
    (back,) = torch.autograd.grad(first, leaf, other)
    torch.testing.assert_close((forward * other).sum(), (back * direction).sum())
    torch.testing.assert_close(transposed, reverse)
    torch.testing.assert_close((product * other).sum(), (back * direction).sum())
    assert forward.abs().sum() > 0


def test_where_nothing_jumps_it_is_the_difference_of_gradients():
    target = torch.tensor([0, 1])
    li = nn.LI(backend="reference").double()

    def of(w, x):
        held = nn.TRTLoss([("w", w)], lam=0.1, backend="reference")
        return held(torch.nn.functional.linear(functional_call(li, {}, (x,)), w), target)

    x, w = sizes(3, 2, 4), torch.randn(3, 4).double()
    direction, step = torch.randn_like(w), 1e-6
    got = jvp(grad(of), (w, x), (direction, torch.zeros_like(x)))[1]
    want = (grad(of)(w + step * direction, x) - grad(of)(w - step * direction, x)) / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
