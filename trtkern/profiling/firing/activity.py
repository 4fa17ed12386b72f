"""Which neurons fire, and how often: streaming statistics of every neuron layer while a model runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.nn._neuron import Readout
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.ops import checks
from trtkern.ops._lazy import read
from trtkern.ops.spikes import Spikes


class LayerActivity(NamedTuple):
    """What one layer of neurons did, over all of its calls."""

    kind: str
    """The name of its class."""
    rate: Tensor
    """[T] float64: spikes per neuron and sample at each step, in [0, 1]."""
    silent: float
    """Share of the neurons that never fired, in no sample and at no step."""
    saturated: float
    """Share of the neurons that fired in every sample at every step."""
    neurons: int
    """Of one sample."""
    samples: int
    """Samples seen, each call counted."""

    @property
    def mean(self) -> float:
        """Spikes per neuron, sample and step."""
        return float(self.rate.mean())

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**self._asdict(), "rate": self.rate.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LayerActivity:
        """The inverse of ``to_json``."""
        return cls(**{**values, "rate": torch.tensor(values["rate"], dtype=torch.float64)})


@dataclass(frozen=True)
class Limits:
    """What counts as a problem."""

    silent: float = 0.0
    """A layer never fires at a mean rate of this and below."""
    saturated: float = 0.99
    """A layer always fires at a mean rate of this and above."""
    share: float = 0.99
    """A layer that fires has too many silent (saturated) neurons where they are this share and above."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value <= 1):
                raise ValueError(f"Limits: expected {name} to be a number of 0 to 1, got {value!r}")


def dense_spikes(output: Any) -> Tensor:
    """The spikes in what a neuron layer returned: a tensor, ``Spikes``, or a tuple that begins with either."""
    if isinstance(output, tuple) and not isinstance(output, Spikes):
        output = output[0]
    return output.spikes if isinstance(output, Spikes) else output


def neuron_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, layer, module whose output is that layer's) of every layer with spiking neurons.

    They are the modules with a ``nonfinite`` flag, but those that give potentials (``LI``, ``CUBALI``).
    ``ConvBatchNormLIF`` runs its layer without calling it where it checkpoints, so the block's output is taken.
    """
    blocks = {id(block.norm): block for block in model.modules() if isinstance(block, ConvBatchNormLIF)}
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "nonfinite", None), Tensor) and not isinstance(layer, Readout):
            yield name.replace("_orig_mod.", ""), layer, blocks.get(id(layer), layer)


def padded_sum(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two series over time, of which either may be the longer, on the device of the second."""
    steps = max(first.numel(), second.numel())
    first, second = (nn.functional.pad(t, (0, steps - t.numel())) for t in (first.to(second.device), second))
    return first + second


class _Form(NamedTuple):
    """How much there is to add up of one layer's statistics."""

    steps: int
    shapes: list[tuple[int, ...]]
    """Of the outputs that it had, without steps and samples."""


class _Meter:
    """A forward hook that adds up the spikes of one layer on their device; nothing in it waits for a GPU."""

    def __init__(self, name: str, layer: nn.Module, rates: FiringRates) -> None:
        self.name, self.rates = name, rates
        self.kind, self.time_dim = type(layer).__name__, getattr(layer, "time_dim", 0)
        self.sums: Tensor | None = None
        self.seen: list[int] = []
        self.samples = 0
        self.extremes: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.rates.paused or torch._C._current_graph_task_id() != -1:  # a checkpoint runs the layer again backward
            return
        spikes = read(dense_spikes(output)).movedim(self.time_dim, 0)
        if spikes.numel() == 0:
            return
        spikes = spikes.unsqueeze(1) if spikes.dim() == 1 else spikes
        steps, batch = spikes.shape[:2]
        if self.name not in self.rates._met:
            self.rates._met.append(self.name)
        # Sums of spikes, and of their 2x2 averages, are exact in float32.
        fired = spikes.sum(1, dtype=torch.float32)
        sums = fired.double().reshape(steps, -1).sum(1)
        neurons = fired[0].numel()
        self._add(sums, [batch * neurons] * steps)
        self.samples += batch
        counts, shape = fired.sum(0), tuple(fired.shape[1:])
        silent, saturated = counts == 0, counts >= steps * batch
        if shape in self.extremes:
            before = self.extremes[shape]
            silent = silent & before[0].to(silent.device)
            saturated = saturated & before[1].to(silent.device)
        self.extremes[shape] = silent, saturated

    def _add(self, sums: Tensor, seen: list[int]) -> None:
        """Another call's sums, of more or of fewer steps."""
        if self.sums is not None:
            sums = padded_sum(self.sums, sums)
            seen = [now + then for now, then in zip_longest(seen, self.seen, fillvalue=0)]
        self.sums, self.seen = sums, seen

    @property
    def form(self) -> _Form:
        """Of the sums so far."""
        return _Form(len(self.seen), list(self.extremes))

    def merge(self, forms: Sequence[_Form], add: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """As ``FiringRates.merge``; ``forms`` are those of the processes that have met the layer."""
        steps = max(form.steps for form in forms)
        numbers = torch.zeros(2 * steps + 1, dtype=torch.float64, device=device)
        if self.sums is not None:
            numbers[: len(self.sums)] = self.sums
            numbers[steps : steps + len(self.seen)] = numbers.new_tensor(self.seen)
            numbers[-1] = self.samples
        self.sums, counted = add(numbers).split([steps, steps + 1])
        *self.seen, self.samples = map(int, counted.tolist())
        for shape in dict.fromkeys(shape for form in forms for shape in form.shapes):
            pair = torch.zeros(2, *shape, dtype=torch.int32, device=device)
            if shape in self.extremes:
                pair.copy_(torch.stack(self.extremes[shape]))
            together = add(pair) == sum(shape in form.shapes for form in forms)
            self.extremes[shape] = together[0], together[1]

    def read(self) -> LayerActivity:
        """The statistics so far. On a GPU this waits for it."""
        assert self.sums is not None
        neurons = sum(silent.numel() for silent, _ in self.extremes.values())
        silent, saturated = (sum(int(pair[i].sum()) for pair in self.extremes.values()) / neurons for i in (0, 1))
        rate = self.sums.cpu() / torch.tensor(self.seen, dtype=torch.float64)
        return LayerActivity(self.kind, rate, silent, saturated, neurons, self.samples)


class FiringRates:
    """What ``firing_rates`` has seen so far."""

    def __init__(self) -> None:
        self._met: list[str] = []
        self._meters: dict[str, _Meter] = {}
        self.paused = False
        """While it is set nothing is counted."""

    def _meter(self, name: str, layer: nn.Module) -> _Meter:
        return self._meters.setdefault(name, _Meter(name, layer, self))

    def merge(
        self, add: Callable[[Tensor], Tensor], gathered: Callable[[Any], list[Any]], device: torch.device
    ) -> None:
        """Make them those of several processes together, each of which has seen other samples.

        They need not have met the same layers, nor with the same number of steps: one may have had no sample at all.

        Args:
            add: adds up a tensor over all processes, in place, and gives it back.
            gathered: what each process gives, by rank.
            device: of the tensors that are added up.
        """
        everybody = gathered({name: self._meters[name].form for name in self._met})
        self._met = list(dict.fromkeys(name for forms in everybody for name in forms))
        for name in self._met:
            self._meters[name].merge([forms[name] for forms in everybody if name in forms], add, device)

    @property
    def layers(self) -> dict[str, LayerActivity]:
        """By name, in the order in which the forward pass met them. On a GPU this waits for it."""
        return {name: self._meters[name].read() for name in self._met}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {name: layer.to_json() for name, layer in self.layers.items()}


@contextmanager
def firing_rates(model: nn.Module) -> Iterator[FiringRates]:
    """Inside: the spikes of every neuron layer of a model are counted in each of its forward passes.

    The counts are there as soon as a pass has run::

        with firing_rates(model) as rates:
            for images in batches:
                model(images)
        rates.layers["layers.0.norm"].rate  # [T]

    What is kept are a number a step and two bytes for every neuron of one sample, however many batches there are. The
    spikes are those that a layer returns, before a residual is added to them (``SEWBlock``). With ``pool=2`` they are
    2x2 averages: the rate is that of the neurons (an odd last row or column is dropped), and a "neuron" in the shares
    of silent and saturated ones is a position of the pooled image, silent where all four are. A layer that is called
    twice counts as one; one that never ran is absent. What a checkpoint runs again in a backward pass is not counted
    again, and what torch.compile compiled runs as it was.

    Output, gradients, random state and mode of the model stay as they are; the hooks go at the end, however it comes.

    Args:
        model: any module with layers of neurons of this package.

    Raises:
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"firing_rates: expected model to be a torch.nn.Module, got {checks.describe(model)}")
    rates = FiringRates()
    # Where nobody has the compiler, this would import it, which takes seconds.
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    hooks = []
    try:
        for name, layer, module in neuron_layers(model):
            hooks.append(module.register_forward_hook(rates._meter(name, layer)))
        with stance:
            yield rates
    finally:
        for hook in hooks:
            hook.remove()


def problems(rates: FiringRates | Mapping[str, LayerActivity], limits: Limits | None = None) -> list[str]:
    """A line for each layer that (nearly) never or (nearly) always fires; empty if all is well.

    Args:
        rates: of ``firing_rates``, or its ``layers``.
        limits: what counts as a problem; None: ``Limits()``.
    """
    layers = rates.layers if isinstance(rates, FiringRates) else rates
    limits = limits or Limits()
    return [line for name, layer in layers.items() if (line := _problem(name, layer, limits))]


def _problem(name: str, layer: LayerActivity, limits: Limits) -> str | None:
    seen = f"{layer.neurons:,} neurons over {len(layer.rate)} steps of {layer.samples:,} samples"
    quiet = "lower its threshold, raise its gain, or lengthen the warm-up of the learning rate"
    loud = "raise its threshold, or lower its gain or decay"
    mean = layer.mean
    if mean <= limits.silent:
        got = "none" if mean == 0 else f"{mean:.2%} of all"
        return f"layer {name} never fires: expected some spikes, got {got} from {seen}; {quiet}"
    if mean >= limits.saturated:
        return f"layer {name} always fires: expected silence at times, got {mean:.2%} of all spikes from {seen}; {loud}"
    if layer.silent >= limits.share:
        return f"layer {name} hardly fires: expected most neurons to, got {layer.silent:.1%} silent of {seen}; {quiet}"
    if layer.saturated >= limits.share:
        many = f"got {layer.saturated:.1%} that fire at every step, of {seen}"
        return f"layer {name} hardly rests: expected few neurons that always fire, {many}; {loud}"
    return None
