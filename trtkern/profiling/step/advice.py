"""What can be done about a step: found from the model and the times of its rows, and said only where it holds there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.interop.adapters import adapter_for
from trtkern.interop.conversion import ConvertReport, convert
from trtkern.nn.convert import Pair, fusable, pools
from trtkern.nn.convert_spikes import packable
from trtkern.nn.unfused import bare
from trtkern.output.text import size
from trtkern.profiling import traffic
from trtkern.profiling.step.parts import PartTime
from trtkern.profiling.step.ranges import LOADER, OPTIMIZER
from trtkern.profiling.step.rates import Rates

LOADING, UPDATING = 0.1, 0.03
"""Shares of the step from which on the loader, and an optimiser that is not fused, are worth a word."""
IDLE, HOST = 0.3, 0.4
"""Shares of the step that a GPU waits, and that a CPU spends outside of operators, from which on the host is too
slow for layers so small."""
PRODUCTS = 0.2
"""Share of the step in products of matrices from which on a shorter dtype is worth a word, where it is faster by"""
FASTER = 1.5
LARGE = 0.3
"""Share of the free memory that what is kept for the backward pass may take."""
OFTEN = 4
"""Calls of a layer in a step that look like a loop over time."""
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
"""Optimisers that torch has fused."""


class Advice(NamedTuple):
    """What can be done."""

    what: str
    """What was found."""
    do: str
    """What to do about it."""
    saves: float | None = None
    """Seconds of a step, where the traffic model says so; at the copy rate of the machine."""

    def __str__(self) -> str:
        gain = (
            ""
            if self.saves is None
            else f" (the bytes that are moved no more take {1e3 * self.saves:.2f} ms of a step)"
        )
        return f"{self.what}: {self.do}{gain}"


@dataclass(frozen=True)
class Seen:
    """What there is to look at."""

    model: nn.Module
    rows: Sequence[PartTime]
    wall: float
    """Seconds of a profiled step, median."""
    unattributed: float
    """Of it, what no row has."""
    rates: Rates
    outputs: dict[str, Tensor]
    """Of each layer the first tensor that it gave, without memory."""
    calls: dict[str, int]
    """Of each layer in a step."""
    optimizer: torch.optim.Optimizer | None
    device: torch.device
    dtype: torch.dtype
    backward: bool
    kept: int | None
    """Bytes for the backward pass."""
    free: int | None
    """Bytes of the device that are free."""
    shorter: float | None
    """How much faster products in bfloat16 are than in the dtype of the step; None: not measured."""

    def row(self, name: str) -> PartTime | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)

    def share(self, seconds: float) -> str:
        """Of the step."""
        return f"{seconds / self.wall:.0%}"


def advice(seen: Seen) -> tuple[Advice, ...]:
    """All that holds, what saves most first; what has no number comes after it."""
    rules = (_foreign, _norms, _spikes, _loops, _loader, _optimizer, _dtype, _memory, _host)
    found = [each for rule in rules for each in rule(seen)]
    return tuple(sorted(found, key=lambda each: -(each.saves or 0.0)))


def _norms(seen: Seen) -> Iterator[Advice]:
    """BatchNorms and neurons that ``convert_norm_lif`` fuses."""
    found = list(fusable(seen.model))
    if not found:
        return
    saved = [_saved(pair, seen) for pair in found]
    known = [seconds for seconds in saved if seconds is not None]
    places = [_names(_parts(pair)) for pair in found]
    kinds = ", ".join(type(bare(layer)).__name__ for _, layer in _parts(found[0]))
    more = f", and so {_listed(places[1:])}" if places[1:] else ""
    yield Advice(
        f"layers {places[0]} are {kinds}{more}",
        "trtkern.nn.convert_norm_lif(model) makes one layer of each",
        max(0.0, sum(known)) if len(known) == len(found) else None,
    )


def _parts(pair: Pair) -> list[tuple[str, nn.Module]]:
    """Name and layer of what becomes one."""
    prefix = pair.place.removesuffix(pair.names[0])
    count = 3 if pools(pair) else 2
    return [(prefix + name, layer) for name, layer in zip(pair.names[:count], pair.layers, strict=False)]


def _saved(pair: Pair, seen: Seen) -> float | None:
    """Seconds at the copy rate for the bytes that the layers move and a fused one would not."""
    places, y = [name for name, _ in _parts(pair)], seen.outputs.get(pair.behind)
    rows = [row for row in seen.rows if any(f"{row.name}.".startswith(f"{place}.") for place in places)]
    if y is None:
        return None
    e, steps, pooled = y.element_size(), y.shape[0], pools(pair)
    spec = pair.neuron.spec
    forward = traffic.batch_norm_lif_forward(
        e, steps, pool=pooled, training=seen.backward, grad=seen.backward, spec=spec
    )
    backward = traffic.batch_norm_lif_backward(e, steps, pool=pooled, spec=spec) if seen.backward else ()
    moved = sum(row.bytes or 0.0 for row in rows)
    return (moved - (traffic.moved(forward) + traffic.moved(backward)) * y.numel()) / seen.rates.copy


def _foreign(seen: Seen) -> Iterator[Advice]:
    """Neurons of other libraries that ``convert`` knows."""
    rows = {name: adapter_for(module) for name, module in seen.model.named_modules()}
    if not any(row is not None and row.neuron for row in rows.values()):
        return
    report = ConvertReport()
    try:
        convert(deepcopy(seen.model), report)
    except Exception:  # a model of other people, of which no copy can be made, say
        return
    names = [name or "the model" for name in report.converted if (row := rows.get(name)) is not None and row.neuron]
    if names:
        what = f"{_listed(names)} {'are neurons' if len(names) > 1 else 'is a neuron'} of another library"
        loop = "; then interop.over_time(model) runs all steps of a sequence at once" if report.stepping else ""
        yield Advice(what, f"trtkern.interop.convert(model) puts fused ones in their place{loop}")


def _spikes(seen: Seen) -> Iterator[Advice]:
    """Convolutions and Linears that could take spikes as bits."""
    links = list(packable(seen.model)) if seen.backward else []
    if not links:
        return
    given = {gives: seen.outputs[gives] for gives, _ in links if gives in seen.outputs}
    less = sum(round(out.numel() * (out.element_size() - 1 / 8)) for out in given.values())
    kept = f", which keeps up to {size(less)} less for the backward pass" if less else ""
    yield Advice(
        f"{_listed([place for _, place in links])} compute{'s' * (len(links) == 1)} on spikes as numbers",
        f"trtkern.nn.convert_spike_layers(model) hands them on as bits{kept}",
    )


def _loops(seen: Seen) -> Iterator[Advice]:
    """Layers that are called once for each time step."""
    often = [row for row in seen.rows if seen.calls.get(row.name, 0) >= OFTEN]
    if sum(row.seconds for row in often) < LOADING * seen.wall:
        return
    names = [row.name for row in sorted(often, key=lambda row: -row.seconds)]
    yield Advice(
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} called {seen.calls[names[0]]} times in a step",
        "if that is once for each time step, call them once for all: trtkern.nn.OverTime for layers without a state, "
        "the neurons of trtkern.nn on [T, B, ...]",
    )


def _loader(seen: Seen) -> Iterator[Advice]:
    row = seen.row(LOADER)
    if row is not None and row.seconds >= LOADING * seen.wall:
        yield Advice(
            f"the loader takes {seen.share(row.seconds)} of the step",
            "load ahead in processes of their own: --workers 2 of `trtkern train`, num_workers of torch's DataLoader",
        )


def _optimizer(seen: Seen) -> Iterator[Advice]:
    row, optimizer = seen.row(OPTIMIZER), seen.optimizer
    if row is None or optimizer is None or type(optimizer) not in FUSED or row.seconds < UPDATING * seen.wall:
        return
    plain = not any(group.get("fused") for group in optimizer.param_groups)
    if plain and not any(group.get("differentiable") or group.get("foreach") for group in optimizer.param_groups):
        name = type(optimizer).__name__
        yield Advice(
            f"the optimizer takes {seen.share(row.seconds)} of the step and is not fused",
            f"torch.optim.{name}(..., fused=True)",
        )


def _dtype(seen: Seen) -> Iterator[Advice]:
    """Products in float32 where bfloat16 is faster."""
    products = sum(row.seconds for row in seen.rows if row.flops)
    if seen.shorter is None or seen.shorter < FASTER or products < PRODUCTS * seen.wall:
        return
    yield Advice(
        f"{seen.share(products)} of the step are layers with matrix products in float32, and on this machine those of "
        f"bfloat16 are {seen.shorter:.1f} times as fast",
        "--amp bf16, or torch.autocast; then look at the accuracy",
    )


def _memory(seen: Seen) -> Iterator[Advice]:
    if seen.kept is None or seen.free is None or seen.kept < LARGE * (seen.free + seen.kept):
        return
    yield Advice(
        f"{size(seen.kept)} are kept for the backward pass, of {size(seen.free)} that are free",
        "--memory 80% of `trtkern train`, or ConvBatchNormLIF(checkpoint=True), keeps less and computes it again",
    )


def _host(seen: Seen) -> Iterator[Advice]:
    """Layers so small that the host's time for calling them is what takes the time."""
    if seen.device.type == "cuda":
        if seen.unattributed >= IDLE * seen.wall:
            yield Advice(
                f"the GPU is without work for {seen.share(seen.unattributed)} of the step, since its host launches "
                "kernels more slowly than they run",
                "--cuda-graphs or --compile of `trtkern train`, torch.compile, or a larger batch",
            )
        return
    ran = sum(each.seconds for row in seen.rows for part in (row.forward, row.backward) for each in part.operators)
    layers = [row for row in seen.rows if row.kind]
    outside = sum(row.seconds for row in layers) - sum(
        each.seconds for row in layers for part in (row.forward, row.backward) for each in part.operators
    )
    if ran and outside >= HOST * seen.wall:
        yield Advice(
            f"{seen.share(outside)} of the step are spent in layers outside of operators: Python and autograd, whose "
            "time does not grow with the batch",
            "a larger batch, torch.compile or --compile of `trtkern train`",
        )


def _names(parts: Iterable[tuple[str, Any]]) -> str:
    """ "0.1 to 0.3" of layers that follow one another by number, "a.norm, a.lif" of others."""
    names = [name for name, _ in parts]
    ends = [name.rpartition(".")[2] for name in names]
    following = len(names) > 2 and all(map(str.isdecimal, ends)) and int(ends[-1]) - int(ends[0]) == len(ends) - 1
    return f"{names[0]} to {names[-1]}" if following else ", ".join(names)


def _listed(names: Sequence[str], most: int = 4) -> str:
    """The first few, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
