"""``layer.step`` beside the cell of plain torch that a loop would call: rows of ``trtkern bench --op overhead``.

A call is one step: spikes and states of the step, and with a gradient also those of x, of the states before and of
learned parameters. One thread has all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern import nn as snn
from trtkern.bench import gate, measure, plain, rounds, rows
from trtkern.bench.cases import Case

SHAPES = ((64, 512), (64, 4096))
"""[B, N] of a step."""
LEARNED = "learned"
CELLS: dict[str, Callable[..., nn.Module]] = {"LIF": snn.LIF, "ALIF": snn.ALIF, "CUBALIF": snn.CUBALIF}
"""The layers, each with a cell of ``trtkern.bench.plain`` by its name; behind a blank, what is special about it."""
KINDS = (*CELLS, f"LIF {LEARNED}")
CALLS = 200
"""Of which a round takes the median; a quarter of them of a large step."""
LARGE = 1 << 17
"""Numbers of a step."""
DIRECTIONS = ("both", "fwd")
NAMES = ("trtkern cpu", "eager cell", "ReLU")


class Cell(NamedTuple):
    """One step of a neuron, with what it is called on."""

    name: str
    run: Callable[[Tensor, Any], tuple[Tensor, Any]]
    parameters: tuple[Tensor, ...]
    x: Tensor
    """A leaf."""
    state: tuple[Tensor, ...]
    """Leaves; none: it has no state."""
    gradients: tuple[Tensor, ...]
    """Of its output and of each state."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are wanted of."""
        return (self.x, *self.state, *self.parameters)

    def outputs(self) -> tuple[Tensor, ...]:
        """The output and the states."""
        out, state = self.run(self.x, self.state[0] if len(self.state) == 1 else self.state)
        return (out, *(state if isinstance(state, tuple) else (state,))) if self.state else (out,)

    def both(self) -> None:
        """Forward and backward; the gradients go, as a training step's do."""
        torch.autograd.backward(self.outputs(), self.gradients)
        for leaf in self.leaves:
            leaf.grad = None

    def inference(self) -> None:
        """Forward alone, without a graph."""
        with torch.no_grad():
            self.outputs()

    def calls(self, direction: str) -> Callable[[], None]:
        """What is timed."""
        return self.both if direction == "both" else self.inference

    def results(self) -> list[Tensor]:
        """Everything that comes out of it, both ways, side by side for each neuron."""
        made = self.outputs()
        return [*made, *torch.autograd.grad(made, self.leaves, self.gradients)]


def cells(kind: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Cell]:
    """The layer's step, the cell in plain torch, and ReLU on the same x."""
    name, _, special = kind.partition(" ")
    settings: dict[str, Any] = {}
    if special == LEARNED:
        settings = {"decay": nn.Parameter(torch.full(shape[1:], 0.5)), "channel_dim": -1}
    layer: Any = CELLS[name](backend="cpu", **settings)
    cell = getattr(plain, f"{name}Cell")(**{key: value for key, value in settings.items() if key == "decay"})
    count = len(layer.state_names)
    draw = torch.Generator().manual_seed(0)
    x, *others = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2 + 2 * count))
    state, gradients = [t.abs() if name == "ALIF" else t for t in others[:count]], others[count:]

    def made(title: str, run: Callable, state: Sequence[Tensor], parameters: Sequence[Tensor]) -> Cell:
        leaf, held = x.clone().requires_grad_(), [t.requires_grad_() for t in _side_by_side(state)]
        incoming = gradients[:1] + _side_by_side(gradients[1 : 1 + len(state)])
        return Cell(title, run, tuple(parameters), leaf, tuple(held), tuple(incoming))

    return [
        made(NAMES[0], layer.step, state, [*layer.parameters()]),
        made(NAMES[1], cell, state, [*cell.parameters()]),
        made(NAMES[2], lambda x, state: (torch.relu(x), None), (), ()),
    ]


def _side_by_side(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies that lie in memory as the states do that a step gives, and the gradients that its backward pass gives."""
    return list(torch.unsafe_split(torch.cat(list(parts)), len(parts[0]))) if parts else []


def verdict(kind: str, shape: tuple[int, int], which: int) -> gate.Verdict:
    """Whether the layer's step (0), or the cell (1), is what the cell is in float64."""
    found = cells(kind, shape)[which].results()
    double = cells(kind, shape)[1]
    exact = double._replace(
        x=double.x.detach().double().requires_grad_(),
        state=tuple(t.detach().double().requires_grad_() for t in double.state),
        gradients=tuple(t.double() for t in double.gradients),
    ).results()  # fmt: skip
    at = 1 + len(double.state)
    want = gate.Truth((exact[0].detach() != 0).reshape(1, -1), exact[at].float().reshape(1, -1))
    judged = gate.judge(found[0].detach().reshape(1, -1), found[at].reshape(1, -1), want)
    apart = max(
        float(((a - b).abs() > 1e-3 * (1 + b.abs().max())).float().mean())
        for a, b in zip(found, (t.float() for t in exact), strict=True)
    )
    if judged.right and apart > 1e-3:
        return gate.Verdict(False, f"states or their gradients differ at {apart:.1e} of the numbers")
    return judged


def tables(options: rounds.Options) -> Iterator[list[rows.Row]]:
    """The rows: layer after layer, size after size, with gradients and without."""
    for kind in KINDS:
        for shape in SHAPES:
            wrong = {NAMES[i]: judged.words for i in (0, 1) if not (judged := verdict(kind, shape, i)).right}
            fit = [cell for cell in cells(kind, shape) if cell.name not in wrong]
            for direction in DIRECTIONS:
                yield _rows(kind, shape, direction, fit, wrong, options)


def _rows(
    kind: str, shape: tuple[int, int], direction: str, fit: list[Cell], wrong: dict[str, str], options: rounds.Options
) -> list[rows.Row]:  # fmt: skip
    case = Case("overhead", shape, neuron=f"{kind} step")
    candidates = [measure.Candidate(cell.name, cell.calls(direction), 0) for cell in fit]
    for candidate in candidates:
        measure.warm_up(candidate, calls=CALLS)
    timer = median if math.prod(shape) < LARGE else partial(median, share=4)
    times = measure.interleave(candidates, [options.rounds] * len(candidates), f"{case.name} {direction}", timer=timer)
    same, none = rounds.common(case, options, direction), [math.nan] * options.rounds
    ours, made = times.get(NAMES[0], none), []
    for name in NAMES:
        said: dict[str, Any] = {"candidate": name, "library": rows.library(name)}
        if name in wrong:
            made.append(rows.Row(**same, **said, status="WRONG", note=wrong[name]))
            continue
        note = {NAMES[1]: "the same neuron in plain torch", NAMES[2]: "no state: what one operation costs"}.get(
            name, ""
        )
        note = ", ".join(filter(None, (note, "with gradients" if direction == "both" else "without gradients")))
        made.append(rows.Row(**same, **said, status="ok", note=note, **rows.figures(times[name], [], ours, 0, 0)))
    return made


def median(run: Callable[[], object], share: int = 1) -> float:
    """Seconds of a call: the median of many, so that what interrupts the process does not count."""
    calls = max(1, CALLS // share)
    return float(torch.tensor([measure.on_cpu(run) for _ in range(calls)], dtype=torch.float64).median())
