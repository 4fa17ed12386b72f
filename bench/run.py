"""LIF and the regulariser against the eager reference, torch.compile of it, and the copy limit of the same run.

    python bench/run.py                      every case; rows go to bench/results.csv
    python bench/run.py --case lif-4         one family of cases
    python bench/run.py --malloc default     with glibc's own thresholds (every large tensor is mapped anew)

The limit of a case is the time to move its bytes (docs/design.md, "The traffic contract") at the rate of torch's
copy_, measured in the same rounds. A candidate whose results disagree with the reference is reported, not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from trtkern import nn, reference
from trtkern.backends.base import RegularizerSpec
from trtkern.bench.layers import OWN, cell, loop
from trtkern.bench.measure import Candidate, command_line
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer

LIF_CASES = {"lif-4": (4, 2_097_152), "lif-500": (500, 8192)}
REGULARIZER_CASES = {"regularizer-6": 6, "regularizer-10": 10}


def forward_backward(layer: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """Spikes and x.grad, both freshly allocated, as a training step makes them."""
    x.grad = None
    s = layer(x)
    s.backward(g)
    return s.detach()


def readable(x: Tensor) -> Tensor:
    """The eager peer at its best: the reference loop, which takes its steps with unbind."""
    return reference.lif(x, None, OWN.numbers, OWN.spec).s


def timed_compile(run: Callable[[], object]) -> float:
    """Seconds of the first calls, which compile."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def lif_case(case: str, backend: str) -> tuple[list[Candidate], Candidate]:
    """Every candidate of a LIF case, gated against the reference."""
    steps, neurons = LIF_CASES[case]
    x = (0.5 + 0.8 * torch.randn(steps, neurons)).requires_grad_()
    g = torch.randn(steps, neurons)
    layers: dict[str, Callable[[Tensor], Tensor]] = {f"trtkern {backend}": nn.LIF(backend=backend)}
    layers["eager loop, unbind"] = lambda x: loop(cell, x)
    layers["reference"] = readable
    if steps <= 16:
        whole = torch.compile(lambda x: loop(cell, x), dynamic=False)
        layers["torch.compile of the unbind loop"] = whole
    step = torch.compile(cell, dynamic=False)
    layers["compiled cell, unbind loop"] = lambda x: loop(step, x)
    size = x.numel() * x.element_size()
    candidates = []
    want: tuple[Tensor, Tensor] | None = None
    for name in ("reference", *(n for n in layers if n != "reference")):
        layer = layers[name]
        compile_s = timed_compile(lambda layer=layer: forward_backward(layer, x, g)) if "compile" in name else 0.0
        s = forward_backward(layer, x, g)
        if want is None:
            want = s, x.grad.clone()
        elif not gate(case, name, (s, x.grad), want):
            continue
        candidates.append(Candidate(name, lambda layer=layer: forward_backward(layer, x, g), 5 * size, compile_s))
    mine = layers[f"trtkern {backend}"]
    current = x.detach()
    candidates.append(Candidate(f"trtkern {backend}, forward only", lambda: mine(current), 2 * size))
    target = torch.zeros_like(current)
    return candidates, Candidate("copy_", lambda: target.copy_(current), 2 * size)


def gate(case: str, name: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    """Whether spikes and gradients agree. A potential within rounding of the threshold may fall on either side, and
    takes its neuron's gradient along: fewer than one neuron-step in a million, and no other difference."""
    flipped = (got[0] != want[0]).any(0)
    share = flipped.float().mean().item()
    error = (got[1] - want[1])[:, ~flipped].abs().max().item()
    if share < 1e-4 and error < 1e-4:
        return True
    print(f"{case}: {name} is WRONG and not timed: {share:.1e} of the neurons differ, gradient error {error:.1e}")
    return False


def resnet19_weights() -> list[Tensor]:
    """The 42 tensors, 12,625,280 numbers, that TRT regularises in ResNet-19 (docs/trt.md)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,)]
    width = 64
    for out, count in ((128, 3), (256, 3), (512, 2)):
        for _ in range(count):
            shapes += [(out, width, 3, 3), (out,), (out, out, 3, 3), (out,)]
            if width != out:
                shapes += [(out, width, 1, 1), (out,)]
            width = out
    shapes += [(256, 512), (10, 256)]
    return [(0.05 * torch.randn(shape)).requires_grad_() for shape in shapes]


def regularizer_case(case: str, backend: str) -> tuple[list[Candidate], Candidate]:
    """Value and gradient through autograd, and in place."""
    spec = RegularizerSpec(REGULARIZER_CASES[case], 1e-5, 0.25, 1e-5)
    weights = resnet19_weights()
    twins = [w.detach().clone().requires_grad_() for w in weights]
    for twin in twins:
        twin.grad = torch.zeros_like(twin)

    def autograd(name: str) -> float:
        for w in weights:
            w.grad = None
        value = regularizer(weights, spec, backend=name)
        value.backward()
        return value.item()

    def in_place() -> float:
        return add_regularizer_grad_(twins, spec, backend=backend).item()

    compiled = torch.compile(reference.regularizer, dynamic=False)

    def inductor() -> float:
        for w in weights:
            w.grad = None
        value = compiled(weights, spec)
        value.backward()
        return value.item()

    want = autograd("reference")
    gradients = [w.grad.clone() for w in weights]
    size = sum(w.numel() * w.element_size() for w in weights)
    candidates = [Candidate("reference", lambda: autograd("reference"), 2 * size)]
    runs = {f"trtkern {backend}, autograd": lambda: autograd(backend), "torch.compile of the reference": inductor}
    for name, run in runs.items():
        compile_s = timed_compile(run)
        value, worst = run(), max((w.grad - g).abs().max().item() for w, g in zip(weights, gradients, strict=True))
        if abs(value - want) > 1e-5 * want or worst > 1e-9:
            print(f"{case}: {name} is WRONG and not timed: value {value!r} for {want!r}, gradient error {worst:.1e}")
            continue
        candidates.append(Candidate(name, run, 2 * size, compile_s if "compile" in name else 0.0))
    in_place()
    if max((w.grad - g).abs().max().item() for w, g in zip(twins, gradients, strict=True)) < 1e-9:
        candidates.append(Candidate(f"trtkern {backend}, add_grad_", in_place, 2 * size))
    flat, target = torch.randn(size // 4), torch.zeros(size // 4)
    return candidates, Candidate("copy_", lambda: target.copy_(flat), 2 * size)


if __name__ == "__main__":
    cases = {**dict.fromkeys(LIF_CASES, lif_case), **dict.fromkeys(REGULARIZER_CASES, regularizer_case)}
    command_line(__doc__ or "", cases)
