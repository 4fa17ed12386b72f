"""Delays: each channel by a number of steps of its own, between two, up to 25; against what torch offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtkern import nn as snn
from trtkern import reference
from trtkern.bench.cases import Case
from trtkern.bench.contest import Contestant, Inputs, Passes
from trtkern.bench.gate import TOLERANCE, Verdict

LONGEST = 25
"""Steps: a tenth of those of a sample of SHD."""

Run = Callable[[Tensor], Tensor]


def delays(case: Case, device: torch.device, backends: list[str], compiled: bool) -> Iterator[Contestant]:
    """Fixed delays by this project, and learned ones by everybody."""
    sets = Inputs(case, device, case.shape, 0.0, 1.0).time_first
    draw = torch.Generator().manual_seed(0)
    drawn = (LONGEST * torch.rand(case.shape[2], generator=draw)).to(device)
    truth = _truth(*sets[0], drawn)
    for name in backends:
        for learnable in (False, True):
            layer = snn.Delay(case.shape[2], LONGEST, drawn, learnable, backend=name).to(device)
            learned = layer.delay.raw if learnable else None
            called = f"trtkern {name}{', learned' * learnable}"
            yield _contestant(called, layer, learned, sets, truth, note="reads x backward: e more" * learnable)
    loops: dict[str, Callable[..., Tensor]] = {"channel by channel": _slices, "reference.py": _gathered}
    for name, run in loops.items():
        learned = nn.Parameter(drawn.clone())
        yield _contestant(name, partial(run, delay=learned), learned, sets, truth)
    if compiled:
        learned = nn.Parameter(drawn.clone())
        made = partial(torch.compile(_gathered, dynamic=False), delay=learned)
        yield _contestant("torch.compile of reference.py", made, learned, sets, truth, compiled=True)


def _gathered(x: Tensor, delay: Tensor) -> Tensor:
    return reference.delay(x, delay.to(x.dtype), None, LONGEST)


def _slices(x: Tensor, delay: Tensor) -> Tensor:
    """The loop of indexing that delays are elsewhere: a slice of each channel, and one a step further back."""
    line = F.pad(x, (0, 0, 0, 0, LONGEST + 1, 0))
    whole = [min(int(d), LONGEST - 1) for d in delay.tolist()]
    channels, steps = line.unbind(-1), x.shape[0]
    near, far = (
        torch.stack([c[LONGEST + at - k :][:steps] for c, k in zip(channels, whole, strict=True)], -1) for at in (1, 0)
    )
    share = (delay - torch.tensor(whole, dtype=delay.dtype, device=delay.device)).to(x.dtype)
    return (1 - share) * near + share * far


def _truth(x: Tensor, g: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gradient of x and that of the delays, computed in float64."""
    y, gx = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x, dtype=torch.float32)
    total = torch.zeros_like(drawn, dtype=torch.float64)
    width = max(1, (1 << 22) // (x.shape[0] * x.shape[2]))
    for b in range(0, x.shape[1], width):
        some = slice(b, b + width)
        leaf, steps = x[:, some].detach().double().requires_grad_(), drawn.double().requires_grad_()
        made = reference.delay(leaf, steps, None, LONGEST)
        g_leaf, g_steps = torch.autograd.grad(made, (leaf, steps), g[:, some].double())
        y[:, some], gx[:, some], total = made.detach().float(), g_leaf.float(), total + g_steps
    return y, gx, total


def _contestant(
    name: str, run: Run, learned: nn.Parameter | None, sets: list[tuple[Tensor, Tensor]],
    truth: tuple[Tensor, Tensor, Tensor], note: str = "", compiled: bool = False,
) -> Contestant:  # fmt: skip
    passes = Passes(run, sets, [] if learned is None else [learned], leaf=True)

    def check() -> Verdict:
        y, gx = passes.results(sets[0])
        made = [(y, truth[0]), (gx, truth[1])]
        if learned is not None and learned.grad is not None:
            made.append((learned.grad, truth[2]))
        # NaN is within no bound.
        errors = [((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in made]
        right = all(error <= TOLERANCE[sets[0][0].dtype] for error in errors)
        return Verdict(right, f"y, the gradient of x and of the delays off by {', '.join(f'{e:.1e}' for e in errors)}")

    return Contestant(
        name, passes.inference, passes.forward, passes.backward, check, passes.release, compiled=compiled, note=note
    )  # fmt: skip
