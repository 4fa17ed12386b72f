"""The calls of a model's layers in one forward pass, each with the sizes of what it is given, makes and keeps.

They are counted on two small batches and carried on to a batch of any size: every size is so many bytes a sample, and
so many besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from trtkern._torch import nodes
from trtkern.nn import ConvBatchNormLIF, SpikeConv2d, SpikeLinear, Spikes
from trtkern.ops._lazy import Lazy
from trtkern.profiling.memory.kept import Call, formula, span
from trtkern.profiling.memory.ledger import Charge
from trtkern.profiling.memory.measured import kept_calls, trained
from trtkern.profiling.memory.report import MemoryReport
from trtkern.profiling.memory.ways import Block, blocks

SMALL = (2, 3)
"""Samples of the two batches. One would leave a BatchNorm of few numbers without a variance."""
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
MEMORY = -1
"""The place of memory that no layer's output lies in: nobody else is asked for it."""


class Given(NamedTuple):
    """A tensor that a call is given."""

    place: int
    """The memory that it lies in, of ``Spikes`` that of the words, as a number; ``MEMORY`` is not known."""
    gradient: int
    """Bytes of its gradient; 0 where none flows to it."""
    packed: bool
    made_of: tuple[int, ...] = ()
    """Of what no layer made, but code between the layers: where the outputs lie that it was made of."""


class Held(NamedTuple):
    """A tensor that a call keeps, and that no call before it kept."""

    place: int
    bytes: int
    is_y: bool
    """Whether it is what a BatchNorm with neurons normalises, which a checkpoint makes again."""


@dataclass(frozen=True)
class Passed:
    """One call of a layer."""

    name: str
    given: tuple[Given, ...]
    place: int
    """Where its output lies."""
    gradient: int
    """Bytes of the gradient of its output, which are those of the output, dense."""
    kept: tuple[Held, ...]
    weights: int
    """Bytes of its parameters that have a gradient, and that no layer before it has."""
    flops: int
    """Of a convolution or a matrix product, forward; 0 for another layer."""
    convolves: bool
    kernels: tuple[bool, bool]
    """Whether kernels compute it from packed spikes: forward, and for the gradient of the weight."""
    exact: bool
    """Whether torch computes it of packed spikes as of dense ones, bit for bit."""


@dataclass
class _Recorder:
    """Hears of the calls of one forward pass."""

    passed: list[Passed] = field(default_factory=list)
    places: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)
    owned: set[int] = field(default_factory=set)
    nodes: dict[Any, int] = field(default_factory=dict)
    """The nodes of autograd that made what lies at a place."""

    def tell(self, name: str, call: Call, charges: Sequence[Charge]) -> None:
        """A call has ended."""
        module = call.module
        if isinstance(module, ConvBatchNormLIF) or (formula(module) is None and next(module.children(), None)):
            return
        outputs = _leaves(call.output)
        given = tuple(self._given(leaf) for leaf in _leaves([call.args, call.kwargs]))
        kept = [Held(self._place(each.item.tensor), each.bytes, each.item.what.startswith("y ")) for each in charges]
        self.passed.append(
            Passed(
                name,
                given,
                self._made(outputs[0]),
                sum(_gradient(_dense(leaf)) for leaf in outputs),
                tuple(kept),
                self._weights(module),
                _flops(module, _dense(outputs[0])),
                isinstance(module, _CONVOLUTIONS),
                *_by_kernel(call),
            )
        )

    def _given(self, leaf: Tensor | Spikes) -> Given:
        if isinstance(leaf, Spikes):
            return Given(self._place(leaf.words), _gradient(leaf.spikes), True)
        place = self._place(leaf)
        if place == MEMORY or leaf.grad_fn is None or place in self.nodes.values():
            return Given(place, _gradient(leaf), False)
        edge = get_gradient_edge(leaf)
        made_of = {self.nodes[node] for node in nodes([edge], until=self.nodes) if node in self.nodes}
        self.nodes[edge.node] = place
        return Given(place, _gradient(leaf), False, tuple(sorted(made_of)))

    def _made(self, leaf: Tensor | Spikes) -> int:
        """The place of an output: dense spikes that were written beside their words are found there too."""
        place = self._place(leaf.words if isinstance(leaf, Spikes) else leaf)
        if _dense(leaf).grad_fn is not None:
            self.nodes[get_gradient_edge(_dense(leaf)).node] = place
        if not isinstance(leaf, Spikes):
            return place
        if not isinstance(leaf.spikes, Lazy):
            ref = StorageWeakRef(leaf.spikes.untyped_storage())
            self.places[ref.cdata] = ref, place
        return place

    def _place(self, tensor: Tensor | None) -> int:
        if tensor is None or isinstance(tensor, Lazy) or tensor.device.type == "meta":
            return MEMORY
        ref = StorageWeakRef(tensor.untyped_storage())
        # The reference is held: the address is not given to another.
        return self.places.setdefault(ref.cdata, (ref, len(self.places)))[1]

    def _weights(self, module: nn.Module) -> int:
        new = [p for p in module.parameters() if p.requires_grad and id(p) not in self.owned]
        self.owned |= {id(p) for p in new}
        return sum(p.nbytes for p in new)


def _leaves(values: Any) -> list[Tensor | Spikes]:
    leaves = tree_leaves(values, is_leaf=lambda value: isinstance(value, Spikes))
    return [leaf for leaf in leaves if isinstance(leaf, (Tensor, Spikes))]


def _dense(leaf: Tensor | Spikes) -> Tensor:
    return leaf.spikes if isinstance(leaf, Spikes) else leaf


def _gradient(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.requires_grad else 0


def _flops(module: nn.Module, output: Tensor) -> int:
    """Two for each weight and place that it is multiplied at; of what is expanded along time once."""
    if not isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
        return 0
    channels = module.weight.shape[0] if isinstance(module, nn.Linear) else module.out_channels
    return 2 * module.weight.numel() * (span(output) // output.element_size() // channels)


def _by_kernel(call: Call) -> tuple[tuple[bool, bool], bool]:
    """Which kernels compute the call from packed spikes; whether torch computes it as of dense ones."""
    x = call.given(0, "x")
    if not isinstance(call.module, (SpikeConv2d, SpikeLinear)) or not isinstance(x, Spikes):
        return (False, False), True
    forward, gradient = (name is not None for name, _ in call.module.kernels(x))
    return (forward, gradient), x.words.device.type != "cpu" or call.module.exact


@dataclass(frozen=True)
class Tape:
    """The calls of a forward pass in training, with every convolution's output kept."""

    calls: tuple[Passed, ...]
    blocks: tuple[Block, ...]
    device: torch.device
    left: int
    """Bytes of parameters with a gradient that no layer's call showed."""


def tape(model: nn.Module, inputs: Callable[[int], Any], batch: int) -> Tape:
    """The calls of the model on a batch of that many samples, of which no more than three are run.

    Args:
        model: any module.
        inputs: what it is called with for so many samples: a tensor, or a tuple of arguments.
        batch: samples.

    Raises:
        ValueError: other layers run where there are more samples.
    """
    sizes = SMALL if batch > SMALL[0] else (batch,)
    found = [_recorded(model, inputs(size)) for size in sizes]
    first = found[0]
    if len(found) == 1:
        return first
    for one, other in zip(first.calls, found[1].calls, strict=False):
        if _form(one) != _form(other):
            break
    else:
        if len(first.calls) == len(found[1].calls):
            at = partial(_at, batch)
            calls = [_carried(one, other, at) for one, other in zip(first.calls, found[1].calls, strict=True)]
            return replace(first, calls=tuple(calls))
    raise ValueError(
        f"memory: expected a network whose layers are the same for {SMALL[0]} samples as for {SMALL[1]}, got others; "
        "leave --memory out"
    )


def _form(call: Passed) -> tuple[object, ...]:
    """What of a call does not depend on the batch."""
    given = [(each.place, each.packed, bool(each.gradient), each.made_of) for each in call.given]
    return call.name, call.place, given, [(held.place, held.is_y) for held in call.kept]


def _at(batch: int, one: int, other: int) -> int:
    few, more = SMALL
    return one + (other - one) * (batch - few) // (more - few)


def _carried(one: Passed, other: Passed, at: Callable[[int, int], int]) -> Passed:
    return replace(
        one,
        given=tuple(
            a._replace(gradient=at(a.gradient, b.gradient)) for a, b in zip(one.given, other.given, strict=True)
        ),
        gradient=at(one.gradient, other.gradient),
        kept=tuple(a._replace(bytes=at(a.bytes, b.bytes)) for a, b in zip(one.kept, other.kept, strict=True)),
        flops=at(one.flops, other.flops),
        kernels=other.kernels,
    )


def _recorded(model: nn.Module, inputs: Any) -> Tape:
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    device = next(leaf.device for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
    found, recorder = blocks(model), _Recorder()
    with trained(model, device):
        for block in found:
            if isinstance(block.module, ConvBatchNormLIF):
                block.module.checkpoint = False
        report = kept_calls(model, given, recorder.tell)
    recorder.nodes.clear()  # the graph keeps the hooks that keep the recorder, and would never go
    calls = _with_unknown(recorder.passed, report)
    left = sum(p.nbytes for p in model.parameters() if p.requires_grad and id(p) not in recorder.owned)
    return Tape(tuple(calls), tuple(found), device, left)


def _with_unknown(calls: list[Passed], report: MemoryReport) -> list[Passed]:
    """The calls with what was measured of layers that have no formula; of a container at the first layer in it."""
    for row in report.rows:
        if row.predicted is not None or not row.measured:
            continue
        inside = [i for i, call in enumerate(calls) if call.name == row.name or call.name.startswith(f"{row.name}.")]
        place = inside[0] if inside else 0
        calls[place] = replace(calls[place], kept=(*calls[place].kept, Held(MEMORY, row.measured, False)))
    return calls
