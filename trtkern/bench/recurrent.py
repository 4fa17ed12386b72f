"""Neurons that feed each other, forward and backward, against loops around the neurons of others.

All have the same x [T, B, N] and the same recurrent weights; each its own neuron, and so its own share of spikes, which
its row says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtkern import nn as snn
from trtkern import reference
from trtkern.bench import gate
from trtkern.bench.cases import Case
from trtkern.bench.contest import Contestant, Inputs, Passes
from trtkern.bench.layers import Layer, Neuron, Where, numbers_of

KIND = "ALIF"
OWN = {"ALIF": {"decay": 0.5, "gain": 1.0, "decay_a": 0.9, "gain_a": 0.1}, "LIF": {}}
"""What our layers are given: numbers with which all that are compared fire about as often."""
SAMPLES = 4
"""Of a batch, which the gate looks at: a sample knows of no other."""
NEAR = 1e-4
"""How far from its threshold a potential may be whose spike is another."""
MEAN, DEVIATION = 0.1, 0.7
"""Of x: about an eighth of the neuron-steps fire."""


def weights(case: Case, device: torch.device) -> nn.Parameter:
    """W [N, N], small enough that the neurons do not drive each other to fire always."""
    N = case.shape[2]
    draw = torch.Generator(device).manual_seed(1)
    made = torch.randn(N, N, generator=draw, device=device) / N**0.5
    return nn.Parameter(made.to(case.torch_dtype))


def own(names: Sequence[str], weight: nn.Parameter) -> list[Layer]:
    """This project's layer on each backend, around the neuron of the case and around LIF."""
    made = []
    for kind, suffix in ((KIND, ""), ("LIF", ", LIF")):
        for name in names:
            neuron = getattr(snn, kind)(**OWN[kind], backend=name)
            layer = snn.Recurrent(neuron, _around(weight))
            made.append(Layer(f"trtkern {name}{suffix}", layer, numbers_of(neuron), exact=True, strong=True))
    return made


def _around(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(len(weight), len(weight), bias=False, device="meta")
    linear.weight = weight
    return linear


class _Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].abs()).clamp_min(0)


def eager(where: Where, weight: nn.Parameter) -> list[Layer]:
    """The loop that users write around a cell in plain torch, and around the cell compiled."""
    neuron = numbers_of(getattr(snn, KIND)(**OWN[KIND]))
    decay, gain, bias, decay_a, gain_a, beta, reset_amount, v_threshold, _ = neuron.numbers

    def cell(x: Tensor, s: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = decay * v + gain * (x + F.linear(s, weight)) + bias
        s = _Triangle.apply(h - (v_threshold + beta * a))
        return s, h - reset_amount * s, decay_a * a + gain_a * s

    def loop(step: Callable[..., tuple[Tensor, Tensor, Tensor]], x: Tensor) -> Tensor:
        s = v = a = torch.zeros_like(x[0])
        spikes = []
        for current in x.unbind(0):
            s, v, a = step(current, s, v, a)
            spikes.append(s)
        return torch.stack(spikes)

    made = [Layer("eager loop, unbind", lambda x: loop(cell, x), neuron, strong=True)]
    if where.compiled:
        compiled = torch.compile(cell, dynamic=False)
        name = "torch.compile of the cell, unbind"
        made.append(Layer(name, lambda x: loop(compiled, x), neuron, compiled=True, strong=True))
    return made


def contestants(
    case: Case, device: torch.device, layers: Sequence[Layer], weight: nn.Parameter
) -> Iterator[Contestant]:
    """Each layer on the same x and W."""
    given = Inputs(case, device, case.shape, MEAN, DEVIATION).time_first
    for layer in layers:
        passes = Passes(layer.run, given, [weight], leaf=True)
        made = Contestant(
            layer.name, passes.inference, passes.forward, passes.backward, lambda: gate.Verdict(True, ""),
            passes.release, compiled=layer.compiled, note=layer.note,
        )  # fmt: skip
        made.check = _check(made, layer, passes, given[0], weight)
        yield made


def _check(
    who: Contestant, layer: Layer, passes: Passes, given: tuple[Tensor, Tensor], weight: nn.Parameter
) -> Callable[[], gate.Verdict]:
    def check() -> gate.Verdict:
        s, gx = passes.results(given)
        rate = f"{s.float().mean().item():.1%} fire"
        who.note = "; ".join(filter(None, (layer.note, rate)))
        assert weight.grad is not None
        return judge(layer, given, weight, s, gx, weight.grad)

    return check


def judge(
    layer: Layer, given: tuple[Tensor, Tensor], weight: Tensor, s: Tensor, gx: Tensor, gweight: Tensor
) -> gate.Verdict:
    """Spikes and gradients of some samples against the plain loop in float64, which goes on from the spikes that were
    found: where a potential lies within rounding of its threshold, all that follows is another sequence. The gradient
    of W against the sum of its parts, in float64."""
    x, g = (t.detach()[:, :SAMPLES] for t in given)
    u, gradient = truth(x, g, weight, s[:, :SAMPLES], layer.neuron, layer.lag)
    other = (u > 0) != (s[:, :SAMPLES] != 0)
    far = u[other].abs().max().item() if other.any() else 0.0
    tolerance = gate.TOLERANCE[s.dtype]
    error = ((gx[:, :SAMPLES].double() - gradient).abs().max() / gradient.abs().max()).item()
    sums = gx[layer.lag :].flatten(0, 1).double().T @ s[: -layer.lag].flatten(0, 1).double()
    apart = ((gweight.double() - sums).abs().max() / sums.abs().max()).item()
    right = far < NEAR * max(1.0, tolerance / 1e-4) and error < tolerance and apart < tolerance
    return gate.Verdict(
        right,
        f"{other.float().mean().item():.1e} of the spikes differ, by potentials up to {far:.1e} from the threshold; "
        f"gradients by up to {error:.1e}, of W {apart:.1e}",
    )


def truth(x: Tensor, g: Tensor, weight: Tensor, spikes: Tensor, neuron: Neuron, lag: int) -> tuple[Tensor, Tensor]:
    """potential - threshold of every step, and the gradient of x, in float64, with the spikes that were found; they
    reach the others ``lag`` steps later."""
    numbers, spec = neuron
    charge, fire, settle = reference.steps(spec.neuron, spec.reset)
    leaf, w = x.double().requires_grad_(), weight.detach().double()
    nothing = torch.zeros_like(leaf[0])
    state, found, differences = (nothing,) * len(spec.row.states), [nothing] * lag, []
    for given, known in zip(leaf, spikes.double(), strict=True):
        trace = charge(given + F.linear(found[-lag], w), state, numbers)
        potential, threshold = fire(trace, numbers)
        s = reference.spike(potential - threshold, spec, known)
        state = settle(trace, s > 0 if spec.detach_reset else s, numbers)
        found.append(s)
        differences.append((potential - threshold).detach())
    (gradient,) = torch.autograd.grad(torch.stack(found[lag:]), leaf, g.double())
    return torch.stack(differences), gradient
