"""``check``: a model before and after its conversion, outputs, gradients and the time of a step, on the same input."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.interop.stepping import OverTimeNetwork

ROUNDS = 5
"""How many steps of each are timed, in turn."""
FLOOR = 1e-3
"""Of the largest gradient of a model: what the difference of a smaller one is a share of."""


@dataclass
class Comparison:
    """What ``check`` found. Differences are relative to the largest number of what is compared; NaN equals nothing.

    A gradient that is 0 but for rounding, as that of a bias before a BatchNorm, is measured by the others: by a
    thousandth of the largest gradient of the model (``FLOOR``) where its own largest number is below that.
    """

    outputs: float
    """The largest difference of the outputs."""
    different: int
    """How many outputs are not the same number."""
    count: int
    """How many outputs there are."""
    fired: float
    """The share of the outputs that are not 0: where it is 0, nothing was compared."""
    gradients: dict[str, float] = field(default_factory=dict)
    """The largest difference of the gradient of each parameter that both have, and of "input"."""
    unmatched: list[str] = field(default_factory=list)
    """Parameters of the one that the other has not, since it holds another form of them."""
    seconds: tuple[float, float] | None = None
    """The median time of a step, forward and backward, before and after."""
    zeros: list[int] = field(default_factory=list)
    """Of several outputs those that are 0 throughout, counted from 0: spikes of neurons that never fired."""

    def within(self, outputs: float = 0.0, gradients: float = 1e-5) -> bool:
        """Whether nothing differs by more than that, and something was compared."""
        near = all(value <= gradients for value in self.gradients.values())
        return self.outputs <= outputs and near and self.fired > 0 and bool(self.gradients)

    def __str__(self) -> str:
        worst = max(self.gradients, key=lambda name: _rank(self.gradients[name])) if self.gradients else None
        lines = [
            f"outputs: {self.different} of {self.count} differ, by {self.outputs:.1e} of the largest at most; "
            f"{100 * self.fired:.1f} % are not 0",
            "gradients: none" if worst is None else f"gradients: {len(self.gradients)} compared, the farthest is "
            f"{worst!r}, by {self.gradients[worst]:.1e} of its largest",
        ]  # fmt: skip
        if self.zeros and self.fired > 0:
            which = ", ".join(map(str, self.zeros))
            lines.append(f"output {which} is 0 throughout, so nothing of it was compared: no neuron behind it fired")
        if self.unmatched:
            lines.append(f"held in another form, and not compared: {', '.join(self.unmatched)}")
        if self.seconds is not None:
            before, after = self.seconds
            lines.append(
                f"a step: {1e3 * before:.2f} ms before, {1e3 * after:.2f} ms after ({before / after:.2f} times)"
            )
        return "\n".join(lines)


def check(
    before: nn.Module,
    after: nn.Module,
    x: Tensor,
    *,
    run: Callable[[nn.Module, Tensor], Any] | None = None,
    run_after: Callable[[nn.Module, Tensor], Any] | None = None,
    timed: bool = False,
) -> Comparison:
    """Run two models on x, and the same loss of their outputs backward.

    Each runs as a copy, so that both keep their state, their statistics and their gradients. Random numbers are drawn
    from the same seed, and torch's own generators go on afterwards as if nothing had been drawn. The loss is a sum of
    the outputs with random weights, so that every output has a gradient of its own. Run both in float64
    (``before.double()``) to tell an error from rounding: a potential that two orders of summation leave on both sides
    of its threshold is a spike in the one and none in the other.

    Args:
        before: the model as it was: ``copy.deepcopy(model)`` before ``convert(model)``.
        after: the converted model.
        x: what ``run`` hands to them.
        run: (model, x) -> outputs, tensors in any nesting; the models are called with x if it is None.
        run_after: the same of ``after`` where that runs another way, ``over_time`` in place of a loop.
        timed: measure the time of a step too.

    Raises:
        ValueError: they return another number of tensors, or tensors of other shapes.
    """
    run = run or (lambda model, x: model(x))
    runs = (run, run_after or run)
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # named, or torch warns where there are several
        return _compared(before, after, x, runs, timed)


def _compared(before: nn.Module, after: nn.Module, x: Tensor, runs: Any, timed: bool) -> Comparison:
    """What ``check`` says; it draws from torch's own generators."""
    made = [_step(each, copy.deepcopy(model), x) for each, model in zip(runs, (before, after), strict=True)]
    (first, of_first), (second, of_second) = made
    if [tuple(y.shape) for y in first] != [tuple(y.shape) for y in second]:
        raise ValueError(
            f"check: expected outputs of the same shapes, got {[list(y.shape) for y in first]} before and "
            f"{[list(y.shape) for y in second]} after"
        )
    total = sum(y.numel() for y in first)
    result = Comparison(
        outputs=_worst(_apart(a, b) for a, b in zip(first, second, strict=True)),
        different=sum(int((a != b).sum()) for a, b in zip(first, second, strict=True)),
        count=total,
        fired=sum(int((y != 0).sum()) for y in first) / max(1, total),
        zeros=[number for number, y in enumerate(first) if not y.any()],
    )
    least = FLOOR * _worst(float(each.abs().max()) for each in of_first.values() if each.numel())
    for name, gradient in of_first.items():
        other = of_second.get(name)
        if other is None or other.shape != gradient.shape:
            result.unmatched.append(name)
        else:
            result.gradients[name] = _apart(gradient, other, least)
    result.unmatched += [name for name in of_second if name not in of_first]
    if timed:
        models = [copy.deepcopy(model) for model in (before, after)]
        result.seconds = _seconds(runs, models, x)
    return result


def _step(run: Callable[[nn.Module, Tensor], Any], model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The outputs, and the gradients by name."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    outputs = list(tensors(run(model, x)))
    generator = torch.Generator().manual_seed(1)
    with_gradient = [y for y in outputs if y.requires_grad]
    if with_gradient:
        loss = sum(
            (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum() for y in with_gradient
        )
        loss.backward()  # type: ignore[union-attr]
    inner = model.net if isinstance(model, OverTimeNetwork) else model
    gradients = {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}
    if x.grad is not None:
        gradients["input"] = x.grad
    return [y.detach() for y in outputs], gradients


def tensors(made: Any) -> Iterator[Tensor]:
    """Every tensor of floating-point numbers in a nested result."""
    if isinstance(made, Tensor):
        if made.is_floating_point():
            yield made
    elif isinstance(made, dict):
        for value in made.values():
            yield from tensors(value)
    elif isinstance(made, (list, tuple)):
        for part in made:
            yield from tensors(part)


def _apart(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """The largest difference, as a share of the largest number, or of ``least``; infinite where one is not finite."""
    if not a.numel():
        return 0.0
    far = float((a.double() - b.double()).abs().max())
    scale = max(least, float(a.double().abs().max()))
    share = far / scale if scale > 0 else far
    return share if share == share else float("inf")


def _worst(values: Iterator[float]) -> float:
    return max(values, key=_rank, default=0.0)


def _rank(value: float) -> float:
    return value if value == value else float("inf")


def _seconds(runs: Any, models: list[nn.Module], x: Tensor) -> tuple[float, float]:
    """The median time of a step of each, interleaved, on fresh copies after one step that is not counted."""
    times: list[list[float]] = [[], []]
    for turn in range(ROUNDS + 1):
        for index, (run, model) in enumerate(zip(runs, models, strict=True)):
            fresh = copy.deepcopy(model)
            begun = time.perf_counter()
            _step(run, fresh, x)
            if turn:
                times[index].append(time.perf_counter() - begun)
    return statistics.median(times[0]), statistics.median(times[1])
