"""Who runs in a case: every layer on the same inputs, with what to call for each direction."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trtkern import nn as snn
from trtkern import reference
from trtkern.bench import gate
from trtkern.bench.cases import Case, rotations
from trtkern.bench.layers import OWN, Layer, Neuron
from trtkern.malloc import mapping_anew
from trtkern.profiling.step.rates import wait

Run = Callable[[], Any]
Sets = list[tuple[Tensor, Tensor]]
"""x and the gradient g of the spikes, several times, so that they take turns."""


@dataclass
class Contestant:
    """One way to compute a case."""

    name: str
    inference: Run
    """The forward pass without a graph."""
    forward: Run
    """The forward pass, whose graph the next ``backward`` takes."""
    backward: Run
    check: Callable[[], gate.Verdict]
    """Runs both passes and judges the results."""
    release: Run = lambda: None
    """Lets go of the graph of a forward pass that no backward pass has taken."""
    probe: Callable[[], float] | None = None
    """Of what may take very long: the seconds of both passes, from a run on a share of the batch."""
    compiled: bool = False
    note: str = ""
    directions: tuple[str, ...] = ("fwd", "train-fwd", "bwd", "both")
    peak: int | None = None
    """Bytes at the peak of a call, where ``check`` has measured them."""

    def both(self) -> None:
        """Forward and backward, as a training step has them."""
        self.forward()
        self.backward()


class Inputs:
    """Random currents, of which about a quarter of the neuron-steps fire, and random gradients."""

    def __init__(self, case: Case, device: torch.device, shape: Sequence[int], mean: float, deviation: float) -> None:
        draw = torch.Generator(device).manual_seed(0)

        def one(scale: float, offset: float) -> Tensor:
            made = torch.randn(*shape, generator=draw, device=device)
            made = made.mul_(scale).add_(offset).to(case.torch_dtype)
            if case.layout == "channels_last":
                made = made.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
            return made

        self.time_first: Sets = [(one(deviation, mean), one(1.0, 0.0)) for _ in range(rotations(case, device))]
        self._batch_first: Sets = []

    def laid_out(self, layer: Layer) -> Sets:
        """In the layout that a layer takes, made before any timing."""
        if layer.batch_first and not self._batch_first:
            self._batch_first = [_batch_first(*one) for one in self.time_first]
        return self._batch_first if layer.batch_first else self.time_first


def _batch_first(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return x.detach().transpose(0, 1).contiguous(), g.transpose(0, 1).contiguous()


class Passes:
    """The two passes of a layer over sets of inputs that take turns."""

    def __init__(self, run: Callable[[Tensor], Tensor], sets: Sets, parameters: Sequence[Tensor], leaf: bool) -> None:
        self.run, self.parameters, self.leaf = run, parameters, leaf
        self.turns = itertools.cycle(sets)
        self.out: Tensor | None = None
        self.pages: Callable[[], AbstractContextManager[None]] = nullcontext
        """How the memory of a call is taken: a loop that indexes would break up a heap that keeps its pages."""

    def inference(self) -> None:
        """Forward without a graph."""
        with self.pages(), torch.no_grad():
            self.run(next(self.turns)[0])

    def forward(self, given: tuple[Tensor, Tensor] | None = None) -> None:
        """Forward on the next inputs, or on those; gradients are made anew each time, as in a training step."""
        x, self.g = next(self.turns) if given is None else given
        self.x = x.requires_grad_() if self.leaf else x
        for tensor in (self.x, *self.parameters):
            tensor.grad = None
        with self.pages():
            self.out = self.run(self.x)

    def backward(self) -> None:
        """Of the forward pass before."""
        assert self.out is not None
        with self.pages():
            self.out.backward(self.g)
            self.out = None

    def release(self) -> None:
        """Lets go of the graph."""
        self.out = None

    def results(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Spikes and the gradient of x."""
        self.forward(given)
        assert self.out is not None
        s = self.out.detach()
        self.backward()
        assert self.x.grad is not None
        return s, self.x.grad


def neurons(case: Case, device: torch.device, layers: list[Layer]) -> Iterator[Contestant]:
    """Neuron layers on currents [T, B, N]."""
    shape = (case.shape[0], 1, case.shape[1]) if len(case.shape) == 2 else case.shape
    given = Inputs(case, device, shape, 0.5, 0.8)
    truths = _Truths(gate.truth, given)
    for layer in layers:
        sets = given.laid_out(layer)
        yield _contestant(layer, Passes(layer.run, sets, [], leaf=True), truths, sets)


def behind_norm(
    case: Case, device: torch.device, backends: list[str], layers: list[Layer], alone: bool = True
) -> Iterator[Contestant]:
    """BatchNorm + LIF on y [T, B, C, ...]: fused, BatchNorm + ReLU, and BatchNorm with each of the layers behind it;
    with ``alone`` also BatchNorm with nothing behind it."""
    given = Inputs(case, device, case.shape, 0.0, 1.0)
    truths = _Truths(normed_truth, given)
    for name in backends:
        fused = snn.BatchNormLIF(case.shape[2], backend=name).to(device)
        passes = Passes(fused, given.time_first, list(fused.parameters()), leaf=True)
        yield _contestant(Layer(f"trtkern {name}", fused, OWN, exact=True), passes, truths, given.time_first)
    relu, nothing = nn.ReLU(inplace=True), nn.Identity()
    others = {"BatchNorm + ReLU": Layer("", relu, OWN)}
    if alone:
        others["BatchNorm alone"] = Layer("", nothing, OWN)
    behind = {f"BatchNorm, then {layer.name}": layer for layer in layers}
    for name, layer in (others | behind).items():
        norm = nn.BatchNorm2d(case.shape[2]).to(device)
        passes = Passes(_folded(norm, layer), given.time_first, list(norm.parameters()), leaf=True)
        made = _contestant(replace(layer, batch_first=False), passes, truths, given.time_first)
        made.name, made.probe = name, None
        yield _unjudged(made) if name in others else made


def behind_linear(case: Case, device: torch.device, layers: list[Layer]) -> Iterator[Contestant]:
    """Linear(n, n) + LIF on inputs [T, B, n] that need no gradient: the Open Neuromorphic benchmark."""
    width = case.shape[2]
    given = Inputs(case, device, case.shape, 0.0, 1.0)
    linear = nn.Linear(width, width).to(device, case.torch_dtype)
    with torch.no_grad():
        # Currents as in the other cases, at every width.
        linear.weight.normal_(0.0, 0.8 / width**0.5, generator=torch.Generator(device).manual_seed(0))
        linear.bias.fill_(0.5)
        x, g = given.time_first[0]
        given_alone = [(linear(x), g)]
    truths = _Truths(gate.truth, None, given_alone)
    for layer in [Layer("Linear alone", nn.Identity(), OWN), *layers]:
        sets = given.laid_out(layer)

        def whole(x: Tensor, run: Callable[[Tensor], Tensor] = layer.run) -> Tensor:
            return run(linear(x))

        passes = Passes(whole, sets, list(linear.parameters()), leaf=False)
        made = _contestant(layer, passes, truths, sets)
        # What is judged is the layer, on the currents that the Linear makes.
        currents = [_batch_first(*given_alone[0])] if layer.batch_first else given_alone
        judged = _contestant(layer, Passes(layer.run, currents, [], leaf=True), truths, currents)
        made.check, made.probe = judged.check, judged.probe
        yield _unjudged(made) if layer.name == "Linear alone" else made


class _Truths:
    """The float64 results on the first set of inputs, made once for each neuron."""

    def __init__(self, make: Callable[..., gate.Truth], given: Inputs | None, sets: Sets | None = None) -> None:
        self.make, self.first = make, (sets or (given.time_first if given else []))[0]
        self.made: dict[Neuron, gate.Truth] = {}

    def __getitem__(self, neuron: Neuron) -> gate.Truth:
        if neuron not in self.made:
            self.made[neuron] = self.make(*self.first, neuron)
        return self.made[neuron]


def normed_truth(y: Tensor, g: Tensor, neuron: Neuron) -> gate.Truth:
    """What the neuron makes of y [T, B, C, ...] behind a BatchNorm, and the gradient of y, computed in float64."""
    leaf = y.detach().double().requires_grad_()
    x = nn.functional.batch_norm(leaf.flatten(0, 1), None, None, training=True).unflatten(0, y.shape[:2])
    s = reference.lif(x, None, neuron.numbers, neuron.spec).s
    (gy,) = torch.autograd.grad(s, leaf, g.double())
    return gate.Truth((s.detach() != 0).flatten(1), gy.float().flatten(1))


def _folded(norm: nn.Module, layer: Layer) -> Callable[[Tensor], Tensor]:
    """BatchNorm over [T * B, C, ...], then a layer in the axes that it takes; views, as far as the layout lets them."""

    def run(y: Tensor) -> Tensor:
        images = y.flatten(0, 1)
        x = norm(images if images.dim() == 4 else images[..., None, None])
        x = x.reshape(y.shape) if images.dim() == 2 else x.unflatten(0, y.shape[:2])
        flat = x.flatten(2) if layer.flat else x
        s = layer.run(flat.transpose(0, 1)).transpose(0, 1) if layer.batch_first else layer.run(flat)
        return s.reshape(y.shape)

    return run


def _unjudged(made: Contestant) -> Contestant:
    """Without a neuron there is nothing to compare: it is run only."""

    def check() -> gate.Verdict:
        made.both()
        return gate.Verdict(True, "")

    made.check, made.probe, made.note = check, None, "no neuron"
    return made


def _contestant(layer: Layer, passes: Passes, truths: _Truths, sets: Sets) -> Contestant:
    """The calls of a layer; ``sets`` are what it is judged and probed on, in its own layout."""

    def check() -> gate.Verdict:
        s, gx = passes.results(sets[0])
        if layer.batch_first:
            s, gx = s.transpose(0, 1), gx.transpose(0, 1)
        return gate.judge(s, gx, truths[layer.neuron], layer.exact)

    def probe() -> float:
        axis = 0 if layer.batch_first else 1
        x, g = (t.detach().narrow(axis, 0, 1).contiguous() for t in sets[0])
        start = time.perf_counter()
        passes.results((x, g))
        wait(x.device)
        return (time.perf_counter() - start) * sets[0][0].shape[axis]

    if layer.quadratic:
        passes.pages = mapping_anew
    long = layer.quadratic and sets[0][0].shape[0 if layer.batch_first else 1] > 1
    return Contestant(
        layer.name, passes.inference, passes.forward, passes.backward, check, passes.release,
        probe if long else None, layer.compiled, layer.note,
    )  # fmt: skip
