"""The ops without neurons: the regulariser, and packing spikes into bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends.base import RegularizerSpec
from trtkern.bench.cases import Case, rotations
from trtkern.bench.contest import Contestant
from trtkern.bench.gate import Verdict
from trtkern.ops.regularizer import add_regularizer_grad_, regularizer


def regularizers(case: Case, device: torch.device, backends: list[str], compiled: bool) -> Iterator[Contestant]:
    """The penalty of N weights over T steps, value and gradient: through autograd, and added in place."""
    spec = RegularizerSpec(case.timesteps, 1e-5, 0.25, 1e-5)
    draw = torch.Generator(device).manual_seed(0)
    weights = [
        (0.05 * torch.randn(case.elements, generator=draw, device=device)).to(case.torch_dtype).requires_grad_()
        for _ in range(rotations(case, device))
    ]
    exact = weights[0].detach().double().requires_grad_()
    value = reference.regularizer([exact], spec)
    (gradient,) = torch.autograd.grad(value, exact)
    want = (value.item(), gradient.float())
    makers: dict[str, Callable[[Tensor], Tensor]]
    makers = {f"trtkern {name}": partial(_own_penalty, spec, name) for name in backends}
    makers["reference.py"] = lambda w: reference.regularizer([w], spec)
    for name, make in makers.items():
        yield _penalty(name, make, weights, want)
    if compiled:
        made = torch.compile(lambda w: reference.regularizer([w], spec), dynamic=False)
        yield _penalty("torch.compile of reference.py", made, weights, want, compiled=True)
    for name in backends:
        yield _in_place(name, weights, spec, want)


def _own_penalty(spec: RegularizerSpec, backend: str, weight: Tensor) -> Tensor:
    return regularizer([weight], spec, backend=backend)


def _penalty(
    name: str,
    make: Callable[[Tensor], Tensor],
    weights: list[Tensor],
    want: tuple[float, Tensor],
    compiled: bool = False,
) -> Contestant:
    turns, made = itertools.cycle(weights), []

    def inference() -> None:
        with torch.no_grad():
            make(next(turns))

    def forward(weight: Tensor | None = None) -> None:
        weight = next(turns) if weight is None else weight
        weight.grad = None
        made.append(make(weight))

    def backward() -> None:
        made.pop().backward()

    def check() -> Verdict:
        forward(weights[0])
        value = made[0].item()
        backward()
        return _verdict(value, weights[0].grad, want)

    return Contestant(name, inference, forward, backward, check, compiled=compiled)


def _in_place(name: str, weights: list[Tensor], spec: RegularizerSpec, want: tuple[float, Tensor]) -> Contestant:
    twins = [weight.detach().clone().requires_grad_() for weight in weights]
    turns = itertools.cycle(twins)

    def run() -> None:
        add_regularizer_grad_([next(turns)], spec, backend=name)

    def check() -> Verdict:
        twins[0].grad = torch.zeros_like(twins[0])
        value = add_regularizer_grad_([twins[0]], spec, backend=name).item()
        return _verdict(value, twins[0].grad, want)

    note = "adds into .grad: a read more"
    return Contestant(
        f"trtkern {name}, add_grad_", run, run, lambda: None, check, note=note, directions=("both",)
    )  # fmt: skip


def _verdict(value: float, gradient: Tensor | None, want: tuple[float, Tensor]) -> Verdict:
    assert gradient is not None
    rounding = 1e-4 if gradient.dtype == torch.float32 else 2e-2
    scale = want[1].abs().max()
    error = ((gradient.float() - want[1]).abs() / scale).max().item()
    off = abs(value - want[0]) / abs(want[0])
    return Verdict(off <= rounding and error <= rounding, f"value off by {off:.1e}, gradient by {error:.1e}")


def packs(case: Case, device: torch.device, backends: list[str], compiled: bool) -> Iterator[Contestant]:
    """Dense spikes to words (forward) and back (backward: where a layer needs them again)."""
    draw = torch.Generator(device).manual_seed(0)
    dtype = case.torch_dtype
    spikes = [
        (torch.rand(*case.shape, generator=draw, device=device) < 0.25).to(dtype)
        for _ in range(rotations(case, device))
    ]
    ops = torch.ops.trtkern
    steps = case.timesteps
    Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

    def own(backend: str) -> Pair:
        return lambda s: ops.spikes_pack(s, backend), lambda w: ops.spikes_unpack(w, 0, steps, False, dtype, backend)

    pairs: dict[str, Pair] = {f"trtkern {name}": own(name) for name in backends}
    eager: Pair = (reference.spikes_pack, lambda w: reference.spikes_unpack(w, 0, steps, dtype))
    pairs["reference.py"] = eager
    if compiled:
        pairs["torch.compile of reference.py"] = (
            torch.compile(eager[0], dynamic=False),
            torch.compile(eager[1], dynamic=False),
        )
    for name, (pack, unpack) in pairs.items():
        yield _pair(name, pack, unpack, spikes)


def _pair(
    name: str, pack: Callable[[Tensor], Tensor], unpack: Callable[[Tensor], Tensor], spikes: list[Tensor]
) -> Contestant:
    turns, words = itertools.cycle(spikes), []

    def forward() -> None:
        words.append(pack(next(turns)))

    def inference() -> None:
        pack(next(turns))

    def backward() -> None:
        unpack(words.pop())

    def check() -> Verdict:
        made = pack(spikes[0])
        right = torch.equal(made, reference.spikes_pack(spikes[0])) and torch.equal(unpack(made), spikes[0])
        return Verdict(right, "the bits differ")

    return Contestant(name, inference, forward, backward, check, compiled=name.startswith("torch.compile"))
