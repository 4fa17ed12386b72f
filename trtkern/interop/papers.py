"""The neurons of papers' code, by the names and fields of their classes, wherever those are defined.

Papers copy neurons from each other and from SpikingJelly, and change them. So the fields decide which class an object
is, and then it is tried: a row's layer and a copy of the object get the same random input, and have to return the same
spikes and the same gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trtkern import nn as snn
from trtkern.interop.adapters import Adapter, CannotConvert
from trtkern.interop.spikingjelly import number, rows
from trtkern.interop.stepping import Stepping

PROBE = (3, 5, 2, 4, 3)
"""The sizes of the input that a layer and the object are compared on: no two of time, batch and channels are equal."""
APART = 1e-4
"""Of the largest gradient: how far two gradients in float32 may differ."""


def compared(make: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    """The function of a row, whose layer is then compared with the object.

    Raises:
        CannotConvert: the object cannot be run on a CPU, or computes something else.
    """

    def row(node: Any) -> nn.Module:
        layer = make(node)
        name = type(node).__name__
        one_step = isinstance(layer, Stepping)
        x = probe(float(getattr(node, "thresh", getattr(node, "v_threshold", 1.0))))
        try:
            theirs = _tried(copy.deepcopy(node).cpu().float(), x, one_step)
        except Exception as error:
            raise CannotConvert(
                f"expected a {name} that runs on a CPU, to compare it with a layer of this project, got "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from None
        ours = _tried(copy.deepcopy(layer).cpu(), x, one_step)
        for what, a, b in zip(("outputs", "gradients"), theirs, ours, strict=True):
            far = (a - b).abs().max() if a.shape == b.shape else torch.tensor(torch.inf)
            if not far <= (0.0 if what == "outputs" else APART * a.abs().max()):
                raise CannotConvert(
                    f"expected a {name} that computes what the class of these fields does, got other {what} on "
                    f"random input; trtkern.interop.register({name!r}, ...) says what it is"
                )
        return layer

    return row


def probe(threshold: float) -> Tensor:
    """Random input at which some neurons fire at once, some after steps and some never; the first meet the threshold
    exactly where their input is multiplied by 1, 1/2 or 1/4."""
    generator = torch.Generator().manual_seed(0)
    x = threshold * (4 * torch.rand(PROBE, generator=generator) - 0.5)
    x[0, 0] = threshold * 2.0 ** torch.randint(3, PROBE[2:], generator=generator)
    return x


def _tried(layer: Any, x: Tensor, one_step: bool) -> tuple[Tensor, Tensor]:
    """Outputs and the gradient of x; a neuron of one step is called along the first axis."""
    if callable(reset := getattr(layer, "reset", None)):
        reset()
    if getattr(layer, "backend", None) in ("cupy", "lava"):
        layer.backend = "torch"
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        y = torch.stack([layer(step) for step in x]) if one_step else layer(x)
        weight = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) + 0.5
        (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    return y.detach(), gradient


def tet(node: Any) -> nn.Module:
    """LIFSpike of TET and of the code that came from it: [B, T, ...], a triangle of width gama, hard reset to 0."""
    return snn.LIF(
        number(node, "tau"), v_threshold=number(node, "thresh"), alpha=number(node, "gama"), time_dim=1, channel_dim=2
    )


def trt(node: Any) -> nn.Module:
    """LIFNode of TRT: [B, T, ...], the potential is divided by tau, the input is not."""
    surrogate = node.surrogate_type
    if surrogate not in ("sigmoid", "triangle"):
        raise CannotConvert(f"expected surrogate_type to be sigmoid or triangle, got {surrogate!r}")
    return snn.LIF(
        1 / number(node, "tau"),
        v_threshold=number(node, "v_threshold"),
        v_reset=None if node.v_reset is None else number(node, "v_reset"),
        surrogate=surrogate,
        alpha=number(node, "surrogate_param"),
        time_dim=1,
        channel_dim=2,
    )


ADAPTERS: tuple[Adapter, ...] = (
    Adapter("LIFSpike", compared(tet), fields=("thresh", "tau", "gama")),
    Adapter("LIFNode", compared(trt), fields=("v_threshold", "v_reset", "tau", "surrogate_type", "surrogate_param")),
    # Copies of SpikingJelly's classes, and those of what papers installed: it is SpikingJelly by another name.
    *rows("", compared),
)
