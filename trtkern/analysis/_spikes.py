"""Which neurons fire and when: rasters of a few samples, rates and intervals of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trtkern.analysis._network import Data, Progress, Samples
from trtkern.analysis._result import Picture, Result, Table
from trtkern.analysis._steps import watching
from trtkern.ops import checks
from trtkern.output import style
from trtkern.output.text import short
from trtkern.profiling.firing.activity import LayerActivity, neuron_layers, problems

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHO = "spikes"


@dataclass(frozen=True)
class LayerSpikes:
    """What one layer of neurons did.

    Args:
        activity: rates by step, shares of silent and of saturated neurons.
        histogram: [bins], how many neurons have a mean rate in each of as many equal parts of [0, 1].
        intervals: [T], how often a neuron's next spike came so many steps later; place 0 is unused.
        chosen: [K], the neurons of the rasters: numbers of the flattened layer.
        rasters: one [T, K] for each sample that is shown: what those neurons gave at each step.
    """

    activity: LayerActivity
    histogram: Tensor
    intervals: Tensor
    chosen: list[int]
    rasters: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class SpikeStatistics(Result):
    """Firing of every layer of neurons.

    Args:
        timesteps: T.
        samples: how many.
        shown: which of them have rasters.
        layers: by name, in the order in which the model ran them.
    """

    NAME = "spikes"

    timesteps: int
    samples: int
    shown: list[int]
    layers: dict[str, LayerSpikes]

    def table(self) -> Table:
        """A row a layer."""
        rows = []
        for name, layer in self.layers.items():
            seen = layer.activity
            total = float(layer.intervals.sum())
            steps = torch.arange(len(layer.intervals), dtype=torch.float64)
            interval = f"{float(layer.intervals @ steps) / total:.2f}" if total else "none"
            rows.append(
                (name, f"{seen.neurons:,}", f"{seen.mean:.1%}", f"{seen.rate[0]:.1%}", f"{seen.rate[-1]:.1%}",
                 f"{seen.silent:.1%}", f"{seen.saturated:.1%}", interval)
            )  # fmt: skip
        head = ("layer", "neurons", "rate", "first step", "last step", "silent", "saturated", "mean interval")
        return Table(head, rows)

    def remarks(self) -> list[str]:
        """What the numbers are."""
        return [
            f"Over {self.samples:,} samples of T = {self.timesteps} steps, in evaluation mode. A rate is the spikes "
            "per neuron, sample and step.",
            "A silent neuron fired for no sample at any step, a saturated one for every sample at every step. An "
            "interval is the number of steps from a neuron's spike to its next one for the same sample; none is longer "
            "than T - 1, so short T hides long ones.",
            "Where a layer gives 2x2 averages of its spikes, a neuron is a pooled position and fires where any of the "
            "four does.",
            *problems({name: layer.activity for name, layer in self.layers.items()}),
        ]

    @classmethod
    def pictures(cls, results: Mapping[str, SpikeStatistics]) -> dict[str, Picture]:
        """Rates over steps, rates over neurons, and the raster of a sample."""
        found = dict(results)
        pictures = {
            "Mean firing rate at each time step.": Picture(partial(_rates, found)),
            "How many neurons fire how often.": Picture(partial(_histograms, found)),
        }
        for label, result in found.items():
            if result.shown:
                of = f", {label}" if label else ""
                pictures[f"Spikes of sample {result.shown[0]}: a row a neuron, some of each layer{of}."] = Picture(
                    partial(_raster, result, label), (style.WIDTH, 1.2 * style.HEIGHT)
                )
        return pictures


def spikes(
    model: nn.Module,
    data: Data | Samples,
    *,
    layers: Sequence[str] | None = None,
    shown: Sequence[int] = (0,),
    neurons: int = 256,
    bins: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpikeStatistics:
    """The firing of every layer of neurons: rates, intervals, and rasters of some samples, in evaluation mode.

    What is kept are numbers for every neuron of one sample and the spikes of one batch, however many samples there are.

    Args:
        model: its output is [T, B, C]. A layer may give [T, B, ...], [T * B, ...] or, called step by step, [B, ...].
        data: labelled samples; the labels are not used.
        layers: names of the modules that give spikes; None is every layer of neurons of trtkern.
        shown: numbers of the samples with rasters.
        neurons: how many of a layer are in a raster at most, drawn at random.
        bins: of the histogram of rates.
        seed: of that draw; the same layer gets the same neurons every time.
        progress: told how many samples are done.

    Raises:
        TypeError, ValueError: an argument or an output of another kind, or no layer of neurons that runs.
    """
    for name, value in (("neurons", neurons), ("bins", bins)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{_WHO}: expected {name} to be an int of at least 1, got {value!r}")
    samples = Samples.of(_WHO, data)
    for sample in shown:
        if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < len(samples):
            raise ValueError(f"{_WHO}: expected shown to be numbers from 0 to {len(samples) - 1}, got {sample!r}")
    watched_layers, kinds = _layers(model, layers)
    meters = {name: _Meter(kinds[name], list(shown), neurons, seed) for name in watched_layers}

    def see(name: str, x: Tensor, first: int | None) -> None:
        meters[name].add(x, first, watched.steps)

    with watching(_WHO, model, watched_layers, samples, see) as watched:
        if not watched.names:
            raise ValueError(
                f"{_WHO}: expected a model that runs layers of spiking neurons, got none in {type(model).__name__}; "
                "name those of another library with layers="
            )
        for _ in watched.run(progress):
            pass
    return SpikeStatistics(
        timesteps=watched.steps,
        samples=len(samples),
        shown=list(shown),
        layers={name: meters[name].read(bins) for name in watched.names},
    )


def _layers(model: nn.Module, layers: Sequence[str] | None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules that give spikes, and the names of their kinds."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_WHO}: expected model to be a torch.nn.Module, got {checks.describe(model)}")
    if layers is None:
        found = {name or type(layer).__name__: (layer, module) for name, layer, module in neuron_layers(model)}
        return {n: module for n, (_, module) in found.items()}, {
            n: type(layer).__name__ for n, (layer, _) in found.items()
        }
    known = dict(model.named_modules())
    for name in layers:
        if name not in known:
            from trtkern.names import unknown

            raise unknown(f"{_WHO}: layers", name, [n for n in known if n])
    return {n: known[n] for n in layers}, {n: type(known[n]).__name__ for n in layers}


class _Meter:
    """What one layer gave so far."""

    def __init__(self, kind: str, shown: list[int], neurons: int, seed: int) -> None:
        self.kind, self.shown, self.neurons, self.seed = kind, shown, neurons, seed
        self.parts: list[Tensor] = []
        self.counts: Tensor | None = None
        self.chosen = torch.zeros(0, dtype=torch.int64)
        self.rasters: dict[int, Tensor] = {}
        self.samples = 0

    def add(self, x: Tensor, first: int | None, steps: int) -> None:
        """x [S, B, ...] was given; a layer that is called step by step is heard until its last step."""
        if first is None:
            x = x.expand(steps, *x.shape[1:])
        self.parts.append(x.flatten(2) if x.dim() > 2 else x[..., None])
        if sum(len(part) for part in self.parts) < steps:
            return
        spikes = torch.cat(self.parts) if len(self.parts) > 1 else self.parts[0]
        self.parts = []
        self._whole(spikes.float())

    def _whole(self, spikes: Tensor) -> None:
        """[T, B, N] of a batch."""
        steps, batch, size = spikes.shape
        if self.counts is None:
            self.rate = torch.zeros(steps, dtype=torch.float64)
            self.intervals = torch.zeros(steps, dtype=torch.float64)
            self.counts = torch.zeros(size, dtype=torch.float64)
            order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
            self.chosen = order[: self.neurons].sort().values
        fired = spikes.sum(1).double().cpu()
        self.rate += fired.sum(1)
        self.counts += fired.sum(0)
        last = torch.full((batch, size), -1, device=spikes.device)
        for t in range(steps):
            here = spikes[t] != 0
            since = (t - last)[here & (last >= 0)]
            self.intervals += torch.bincount(since, minlength=steps).cpu()
            last = torch.where(here, t, last)
        for sample in self.shown:
            if self.samples <= sample < self.samples + batch:
                self.rasters[sample] = spikes[:, sample - self.samples].cpu()[:, self.chosen].double()
        self.samples += batch

    def read(self, bins: int) -> LayerSpikes:
        """The statistics."""
        assert self.counts is not None
        steps, size = len(self.rate), self.counts.numel()
        always = steps * self.samples
        activity = LayerActivity(
            kind=self.kind,
            rate=self.rate / (self.samples * size),
            silent=float((self.counts == 0).double().mean()),
            saturated=float((self.counts >= always).double().mean()),
            neurons=size,
            samples=self.samples,
        )
        places = (self.counts / always * bins).long().clamp(0, bins - 1)
        return LayerSpikes(
            activity,
            torch.bincount(places, minlength=bins).double(),
            self.intervals,
            self.chosen.tolist(),
            [self.rasters[sample] for sample in self.shown],
        )


def _depth(result: SpikeStatistics) -> list[Any]:
    """A colour a layer, darker at the beginning."""
    from matplotlib import colormaps

    count = len(result.layers)
    return [colormaps[style.SHADES](0.3 + 0.45 * i / max(1, count - 1)) for i in range(count)]


def _rates(found: Mapping[str, SpikeStatistics], axes: Axes) -> None:
    """Lines over the steps: a layer each, or a result each."""
    from trtkern.output.pictures import over_steps

    for i, (label, result) in enumerate(found.items()):
        steps = range(1, result.timesteps + 1)
        if len(found) > 1:
            layers = [layer.activity for layer in result.layers.values()]
            fired = torch.stack([layer.rate * layer.neurons for layer in layers]).sum(0)
            mean = 100 * fired / sum(layer.neurons for layer in layers)
            axes.plot(steps, mean.tolist(), marker="o", color=style.series(i), label=label)
            continue
        for color, (name, layer) in zip(_depth(result), result.layers.items(), strict=True):
            axes.plot(steps, (100 * layer.activity.rate).tolist(), marker="o", color=color, label=short(name, 28))
    axes.set(xlabel="time step", ylabel="neurons that fire (%)", title="How many neurons fire at each step")
    axes.set_ylim(bottom=0)
    over_steps(axes)


def _histograms(found: Mapping[str, SpikeStatistics], axes: Axes) -> None:
    """Shares of the neurons by their mean rate."""
    from trtkern.output.pictures import below

    for i, (label, result) in enumerate(found.items()):
        if len(found) > 1:
            total = torch.stack([layer.histogram for layer in result.layers.values()]).sum(0)
            rows, colors = {label: total}, [style.series(i)]
        else:
            rows, colors = {short(n, 28): layer.histogram for n, layer in result.layers.items()}, _depth(result)
        for color, (name, row) in zip(colors, rows.items(), strict=True):
            edges = [j / len(row) for j in range(len(row) + 1)]
            axes.stairs((100 * row / row.sum()).tolist(), edges, color=color, label=name, linewidth=1.6)
    axes.set(
        xlabel="mean firing rate of a neuron",
        ylabel="neurons of the layer (%)",
        title="How often the single neurons fire",
    )
    axes.grid()
    below(axes)


def _raster(result: SpikeStatistics, label: str, axes: Axes) -> None:
    """The layers above each other, the first on top."""
    from trtkern.output.pictures import whole

    start, ticks, names = 0, [], []
    for color, (name, layer) in zip(_depth(result), result.layers.items(), strict=True):
        raster = layer.rasters[0]
        at = raster.nonzero()
        axes.scatter((at[:, 0] + 1).tolist(), (at[:, 1] + start).tolist(), s=3, marker="s", linewidths=0, color=color)
        ticks.append(start + raster.shape[1] / 2)
        names.append(short(name, 28))
        start += raster.shape[1]
        axes.axhline(start - 0.5, color=style.ASIDE, linewidth=0.6)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set(xlabel="time step", title=f"Every spike of one sample{f', {label}' if label else ''}")
    axes.set_xlim(0.5, result.timesteps + 0.5)
    axes.set_ylim(start - 0.5, -0.5)
    whole(axes, grid=False)
