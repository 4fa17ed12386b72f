"""BatchNorm + LIF against BatchNorm + ReLU, against BatchNorm and then LIF, and against the copy limit of the same run.

    python bench/norm.py                         both layouts; rows go to bench/results.csv
    python bench/norm.py --case bn-lif-nhwc      channels last only

y is (4, 8, 128, 32, 32) float32; all candidates see the same y and the same gradient. The limit is the traffic of
BatchNorm + LIF, 8 tensors (3 forward, 5 backward; docs/design.md), at the rate of torch's copy_ in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trtkern import nn as snn
from trtkern import reference
from trtkern.bench.measure import Candidate, command_line
from trtkern.spec import LIFSpec

SHAPE = (4, 8, 128, 32, 32)
CASES = {"bn-lif-nchw": torch.contiguous_format, "bn-lif-nhwc": torch.channels_last}
NUMBERS = (0.5, 1.0, 0.0, 1.0, 1.0, 0.0)


def folded(norm: nn.BatchNorm2d, then: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """BatchNorm over [T * B, C, H, W], then what takes [T, B, C, H, W]."""
    return lambda y: then(norm(y.flatten(0, 1)).unflatten(0, y.shape[:2]))


def run(layer: Callable[[Tensor], Tensor], y: Tensor, g: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and y's gradient, freshly allocated, as a training step makes them."""
    for leaf in (y, *parameters):
        leaf.grad = None
    out = layer(y)
    out.backward(g)
    return out.detach(), y.grad


def build(case: str, backend: str) -> tuple[list[Candidate], Candidate]:
    """Every candidate of a case; those that spike are gated against the readable loop in float64."""
    layout = CASES[case]
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(SHAPE, generator=draw).flatten(0, 1).contiguous(memory_format=layout).unflatten(0, SHAPE[:2])
    g = torch.randn(SHAPE, generator=draw).flatten(0, 1).contiguous(memory_format=layout).unflatten(0, SHAPE[:2])
    y.requires_grad_()
    norms = [nn.BatchNorm2d(SHAPE[2]) for _ in range(4)]
    fused, lif = snn.BatchNormLIF(SHAPE[2], backend=backend), snn.LIF(backend=backend)
    relu = nn.ReLU(inplace=True)
    layers = {
        f"trtkern {backend}": (fused, fused),
        "BatchNorm, then trtkern LIF": (folded(norms[0], lif), norms[0]),
        "BatchNorm + ReLU": (folded(norms[1], relu), norms[1]),
        "BatchNorm alone": (folded(norms[2], lambda x: x), norms[2]),
        "BatchNorm, eager loop": (folded(norms[3], lambda x: reference.lif(x, None, NUMBERS, LIFSpec()).s), norms[3]),
    }
    wide = nn.BatchNorm2d(SHAPE[2]).double()
    exact = y.detach().double().requires_grad_()
    want = run(folded(wide, lambda x: reference.lif(x, None, NUMBERS, LIFSpec()).s), exact, g.double(), [])
    size = y.numel() * y.element_size()
    candidates = []
    for name, (layer, module) in layers.items():
        got = run(layer, y, g, list(module.parameters()))
        if ("LIF" in name or "loop" in name or "trtkern" in name) and not gate(case, name, got, want):
            continue
        parameters = list(module.parameters())
        candidates.append(Candidate(name, lambda a=layer, b=parameters: run(a, y, g, b), 8 * size))
    source, target = y.detach().clone(), torch.zeros_like(y.detach())
    return candidates, Candidate("copy_", lambda: target.copy_(source), 2 * size)


def gate(case: str, name: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    """Whether spikes and gradients agree but for the neurons that rounding may move across the threshold."""
    flipped = (got[0] != want[0]).any(0)
    share = flipped.float().mean().item()
    error = ((got[1] - want[1])[:, ~flipped].abs().max() / want[1].abs().max()).item()
    if share < 1e-4 and error < 1e-4:
        return True
    print(f"{case}: {name} is WRONG and not timed: {share:.1e} of the neurons differ, gradient error {error:.1e}")
    return False


if __name__ == "__main__":
    command_line(__doc__ or "", dict.fromkeys(CASES, build))
