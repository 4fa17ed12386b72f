"""Synaptic operations and the energy that they would take: a model, not a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from trtkern import names
from trtkern.analysis._inputs import Counted, Values, axes_of, dense_operations, outputs_of, reached
from trtkern.analysis._memory import Memory, Work
from trtkern.analysis._network import Data, Progress, Samples
from trtkern.analysis._result import Picture, Result, Table
from trtkern.analysis._steps import watching
from trtkern.nn._neuron import NeuronLayer, feeds_back
from trtkern.output import style
from trtkern.output.text import short
from trtkern.profiling.firing.activity import LayerActivity, firing_rates, neuron_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHO = "energy"


@dataclass(frozen=True)
class LayerEnergy:
    """What one layer with weights does, per sample; a mean over the samples.

    Args:
        module: the name of its class.
        kind: what its inputs are: "spikes" (0 and 1), "integers" (others too, such as sums of spikes), "fractions"
            (multiples of 1 / parts, such as averages of spikes) or "analog". The layer that runs first takes no
            averages of spikes: fractions are analog there.
        parts: of the fractions; 1 otherwise.
        values: how many different values its inputs had; None if they are too many, or no fractions.
        low, high: the least and the largest of them.
        once: whether its inputs are the same at every step, so that one step is computed.
        inputs, outputs: numbers of one step.
        rate: [T] float64, the share of inputs that are not 0 at each step.
        sums: [T] float64, additions of a weight (accumulates, AC).
        macs: [T] float64, multiplications with a weight, each with its addition.
        dense: operations of one step if every input counted, as in a network with ReLU.
        energy: [T] float64, pJ.
        memory: pJ by purpose, as ``Memory.traffic`` has it; empty if it was not asked for.
    """

    module: str
    kind: str
    parts: int
    values: int | None
    low: float
    high: float
    once: bool
    inputs: int
    outputs: int
    rate: Tensor
    sums: Tensor
    macs: Tensor
    dense: int
    energy: Tensor
    memory: dict[str, float]

    @property
    def pj(self) -> float:
        """pJ of all steps, with memory where that was asked for."""
        return float(self.energy.sum()) + sum(self.memory.values())

    @property
    def said(self) -> str:
        """The kind of its inputs in words."""
        return f"multiples of 1/{self.parts}" if self.kind == "fractions" else self.kind


@dataclass(frozen=True)
class NeuronEnergy:
    """What the updates of one layer of neurons take, per sample.

    Args:
        neurons: how many.
        sums: for the bias of each neuron at each step, and for the reset of each spike.
        macs: for the leak of each neuron at each step; 0 without a leak.
        energy: pJ.
    """

    neurons: int
    sums: float
    macs: float
    energy: float


@dataclass(frozen=True, kw_only=True)
class Energy(Result):
    """Operations and modelled energy of a spiking network, per sample.

    Args:
        timesteps: T.
        samples: how many were looked at.
        sum_pj, mac_pj: energy of an addition, and of a multiplication with its addition.
        static, zeros, integers: how it was counted (``energy``).
        layers: by name, in the order in which the model ran them.
        activity: the layers of spiking neurons of trtkern, by name: firing rates at each step.
        updates: what those neurons' own updates take; empty if that was not asked for.
        left_out: layers with weights whose operations are not counted.
    """

    NAME = "energy"

    timesteps: int
    samples: int
    sum_pj: float
    mac_pj: float
    static: str
    zeros: str
    integers: str
    layers: dict[str, LayerEnergy]
    activity: dict[str, LayerActivity]
    updates: dict[str, NeuronEnergy]
    left_out: list[str]

    @property
    def sums(self) -> float:
        """Additions of a weight, all layers and steps."""
        return sum(float(layer.sums.sum()) for layer in self.layers.values())

    @property
    def macs(self) -> float:
        """Multiplications with a weight, all layers and steps."""
        return sum(float(layer.macs.sum()) for layer in self.layers.values())

    @property
    def dense(self) -> int:
        """Multiplications of the same network with ReLU in place of the neurons, run once."""
        return sum(layer.dense for layer in self.layers.values())

    @property
    def by_step(self) -> Tensor:
        """[T] pJ of the synaptic operations of each step."""
        return torch.stack([layer.energy for layer in self.layers.values()]).sum(0)

    @property
    def synaptic(self) -> float:
        """pJ of all synaptic operations."""
        return float(self.by_step.sum())

    @property
    def memory(self) -> float:
        """pJ of memory and addresses; 0 if that was not asked for."""
        return sum(sum(layer.memory.values()) for layer in self.layers.values())

    @property
    def total(self) -> float:
        """pJ of everything that was counted."""
        return self.synaptic + self.memory + sum(update.energy for update in self.updates.values())

    @property
    def relu(self) -> float:
        """pJ of the operations of the same network with ReLU in place of the neurons, run once: ``dense`` MACs."""
        return self.dense * self.mac_pj

    def table(self) -> Table:
        """A row a layer, and the sum of all."""
        total, rows = self.total or 1.0, []
        for name, layer in self.layers.items():
            rows.append(
                (name, layer.said + (", once" if layer.once else ""), f"{float(layer.rate.mean()):.1%}",
                 _count(layer.sums.sum()), _count(layer.macs.sum()), _count(layer.dense), _energy(layer.pj),
                 f"{layer.pj / total:.1%}")
            )  # fmt: skip
        for name, update in self.updates.items():
            rows.append(
                (name, "updates", "", _count(update.sums), _count(update.macs), "", _energy(update.energy),
                 f"{update.energy / total:.1%}")
            )  # fmt: skip
        sums = self.sums + sum(update.sums for update in self.updates.values())
        macs = self.macs + sum(update.macs for update in self.updates.values())
        rows.append(("all", "", "", _count(sums), _count(macs), _count(self.dense), _energy(self.total), "100.0%"))
        head = ("layer", "inputs", "not 0", "sums", "MACs", "dense MACs", "energy", "share")
        return Table(head, rows, words=2)

    def remarks(self) -> list[str]:
        """How it was counted, and what that does not say."""
        said = [
            "This is a model, not a measurement: operations are counted exactly, and each is given a fixed energy. No "
            "hardware was asked.",
            f"Means per sample over {self.samples:,} samples of T = {self.timesteps} steps. A sum costs "
            f"{self.sum_pj:g} pJ, a MAC (a multiplication with its sum) {self.mac_pj:g} pJ"
            + (
                ": 32-bit floating point in 45 nm (Horowitz, ISSCC 2014)."
                if (self.sum_pj, self.mac_pj) == (0.9, 4.6)
                else "."
            ),
            "A spike costs one sum for each output that it reaches, counted input by input with borders, strides and "
            "groups; what is 0 costs nothing. An input that is neither 0 nor 1 needs a MAC for each output.",
            *self._of_inputs(),
            f"The same network with ReLU in place of the neurons, run once, takes {_count(self.dense)} MACs: "
            f"{_energy(self.relu)}"
            + (f", {self.relu / self.synaptic:.2g} times the synaptic operations here." if self.synaptic > 0 else "."),
            "Normalisation is taken to be folded into the weights and costs nothing; so do pooling, the sums of "
            "residuals, and "
            + ("biases." if self.updates else "biases and the neurons' own updates (updates=True counts them).")
            if not self.memory
            else "Normalisation is taken to be folded into the weights and costs nothing, nor do pooling and the sums "
            "of residuals.",
        ]
        if self.memory:
            said.append(
                f"Memory takes {_energy(self.memory)} of it, after Lemaire et al. 2022 (arXiv 2210.13107): one on-chip "
                "memory for each layer's weights, potentials and inputs, whose access costs more the larger it is."
            )
        else:
            said.append(
                "Moving weights and potentials to and from memory usually takes more than the operations; it is left "
                "out (memory=Memory() counts it)."
            )
        if self.left_out:
            said.append(f"Not counted, for their operations are of other kinds: {', '.join(self.left_out)}.")
        return said

    def _of_inputs(self) -> list[str]:
        """Which layers do not take spikes, and what that means."""
        said = []
        named: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            named.setdefault(layer.kind, []).append(name)
        if found := named.get("analog"):
            counted = "that is not 0" if self.zeros == "skipped" else "and for what is 0 too, as it is usual"
            said.append(f"Analog values, such as images, go to {_listed(found)}: a MAC for each one {counted}.")
        if found := named.get("fractions"):
            said.append(
                f"Fractions, as average pooling makes them of spikes, go to {_listed(found)}: no longer 0 or 1, so MACs"
                ". Hardware that weighs the spikes before it averages them would need sums."
            )
        if found := named.get("integers"):
            how = "MACs" if self.integers == "mac" else "counted as repeated sums, n for the value n"
            said.append(
                f"Integers that are not only 0 and 1, as sums of spikes are behind a SEW block, go to "
                f"{_listed(found)}: {how}."
            )
        once = [name for name, layer in self.layers.items() if layer.once]
        if once and self.timesteps > 1:
            how = (
                "counted once, at the first step (static='every step' counts all T, as some papers do)"
                if self.static == "once"
                else f"counted at each of the {self.timesteps} steps, though once would do"
            )
            said.append(f"The same input at every step goes to {_listed(once)}: {how}.")
        return said

    @classmethod
    def pictures(cls, results: Mapping[str, Energy]) -> dict[str, Picture]:
        """Energy by layer and by step, and how often the inputs are not 0."""
        found = dict(results)
        rows = max(len(result.layers) for result in found.values())
        tall = (style.WIDTH, style.tall(round(rows * len(found) ** 0.5), least=2.8, around=1.6))
        return {
            "Modelled energy of each layer, per sample.": Picture(partial(_by_layer, found), tall),
            "Modelled energy of the synaptic operations of each step, per sample.": Picture(partial(_by_step, found)),
        }


def energy(
    model: nn.Module,
    data: Data | Samples,
    *,
    sum_pj: float = 0.9,
    mac_pj: float = 4.6,
    static: str = "once",
    zeros: str = "skipped",
    integers: str = "mac",
    updates: bool = False,
    memory: Memory | None = None,
    progress: Progress | None = None,
) -> Energy:
    """The synaptic operations of every Linear and convolution, from what they are given, and their modelled energy.

    Energy = sum_pj * (sums) + mac_pj * (MACs), with the constants of Horowitz (ISSCC 2014) for 45 nm and float32.

    Args:
        model: its output is [T, B, C]. A layer may see [T, B, ...], [T * B, ...] or, called step by step, [B, ...].
        data: labelled samples; the labels are not used.
        sum_pj: energy of a sum (accumulate) in pJ.
        mac_pj: energy of a multiplication with its sum.
        static: what a layer costs whose input is the same at every step: "once" (direct encoding computed once, as
            this package does) or "every step".
        zeros: of analog inputs: "skipped", or "counted" as in a dense layer, padding included, as it is usual for the
            first layer.
        integers: what an input n > 1 costs for each output: "mac", or "sums", that is n sums.
        updates: whether the neurons' own updates count too: a MAC for the leak and a sum for the bias of each neuron
            and step, and a sum for each reset (Lemaire et al. 2022).
        memory: what accesses to memory cost; None leaves them out.
        progress: told how many samples are done.

    Raises:
        TypeError, ValueError: an argument or an output of another kind, no Linear and no convolution that runs, or
            inputs that are not finite; the message says what to do.
    """
    for name, value in (("sum_pj", sum_pj), ("mac_pj", mac_pj)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (isfinite(value) and value >= 0):
            raise ValueError(f"{_WHO}: expected {name} to be a number of pJ, 0 or more, got {value!r}")
    for name, given, known in (
        ("static", static, names.STATIC),
        ("zeros", zeros, names.ZEROS),
        ("integers", integers, names.INTEGERS),
    ):
        if given not in known:
            raise names.unknown(f"{_WHO}: {name}", given, known)
    if memory is not None and not isinstance(memory, Memory):
        raise TypeError(f"{_WHO}: expected memory to be None or trtkern.analysis.Memory(), got {memory!r}")
    samples = Samples.of(_WHO, data)
    meters = {name: _Meter(name, layer) for name, layer in _weighted(model).items()}
    counted = {name: meter.layer for name, meter in meters.items()}
    neurons = {name: layer for name, layer, _ in neuron_layers(model)} if updates else {}
    for name, layer in neurons.items():
        kind = _neuron_in(layer)
        if isinstance(kind, NeuronLayer) and kind.kind != "LIF":
            raise ValueError(
                f"energy: expected neurons whose update is a leak and a bias (LIF, IF, PLIF) with updates=True, got "
                f"{name} with {type(kind).__name__}; pass updates=False"
            )
    sizes: dict[str, int] = {}

    def see(name: str, x: Tensor, step: int | None) -> None:
        if name in meters:
            meters[name].add(x, step, watched.steps)
        else:
            sizes[name] = x[0, 0].numel()

    def axes(layer: nn.Module, x: Any) -> int:
        return axes_of(layer, x) if isinstance(layer, Counted) else x.dim() - 2

    with watching(_WHO, model, {**counted, **neurons}, samples, see, axes=axes) as watched:
        with firing_rates(model) as rates:
            for _ in watched.run(progress):
                pass
        activity = rates.layers
    ran = [name for name in watched.names if name in meters]
    if not ran:
        raise ValueError(
            f"{_WHO}: expected a model that calls layers of {', '.join(kind.__name__ for kind in Counted)}, got none "
            f"that ran in {type(model).__name__}"
        )
    how = _How(watched.steps, len(samples), sum_pj, mac_pj, static, zeros, integers, memory)
    return Energy(
        timesteps=how.steps,
        samples=how.samples,
        sum_pj=float(sum_pj),
        mac_pj=float(mac_pj),
        static=static,
        zeros=zeros,
        integers=integers,
        layers={name: meters[name].read(how, name == ran[0]) for name in ran},
        activity=activity,
        updates={name: _update(neurons[name], size, activity.get(name), how) for name, size in sizes.items()},
        left_out=_left_out(model, ran),
    )


@dataclass(frozen=True)
class _How:
    """How operations become energy."""

    steps: int
    samples: int
    sum_pj: float
    mac_pj: float
    static: str
    zeros: str
    integers: str
    memory: Memory | None


class _Meter:
    """What one layer was given so far."""

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer, self.values = name, layer, Values()
        # By step; the last place is for what is computed once for all steps.
        self.series: dict[str, Tensor] = {}

    def add(self, x: Tensor, first: int | None, steps: int) -> None:
        """x [S, B, ...] was given, from step ``first`` on."""
        rows = x.flatten(0, 1)
        try:
            binary = self.values.add(rows)
        except ValueError as error:
            raise ValueError(f"{_WHO}: layer {self.name}: {error}; look at the model's weights and data") from None
        there = (rows != 0).float()
        operations = reached(self.layer, there)
        repeated = operations if binary else reached(self.layer, rows.float().abs())
        place = slice(steps, steps + 1) if first is None else slice(first, first + x.shape[0])
        found: dict[str, Any] = {
            "operations": operations,
            "repeated": repeated,
            "values": there.flatten(1).sum(1, dtype=torch.float64),
            "inputs": rows[0].numel(),
            "outputs": outputs_of(self.layer, rows),
            "dense": dense_operations(self.layer, rows),
        }
        for name, numbers in found.items():
            held = self.series.setdefault(name, torch.zeros(steps + 1, dtype=torch.float64))
            held[place] += (
                numbers.view(x.shape[:2]).sum(1).cpu() if isinstance(numbers, Tensor) else numbers * x.shape[1]
            )

    def read(self, how: _How, first: bool) -> LayerEnergy:
        """What the layer does, per sample; whether it is the first."""
        every = {name: held[:-1] + held[-1] for name, held in self.series.items()}
        once = bool(self.series["inputs"][-1] > 0 and self.series["inputs"][:-1].sum() == 0)
        spent = every
        if how.static == "once":
            spent = {name: held[:-1].clone() for name, held in self.series.items()}
            for name, held in self.series.items():
                spent[name][0] += held[-1]
        kind = "analog" if first and self.values.kind == "fractions" else self.values.kind
        nothing = torch.zeros(how.steps, dtype=torch.float64)
        counted, read = spent["operations"], spent["values"]
        if kind == "analog" and how.zeros == "counted":
            counted, read = spent["dense"], spent["inputs"]
        as_sums = kind == "spikes" or (kind == "integers" and how.integers == "sums")
        sums = spent["repeated"] / how.samples if as_sums else nothing
        macs = nothing if as_sums else counted / how.samples
        one = {name: round(float(every[name].sum() / (every["inputs"] > 0).sum()) / how.samples)
               for name in ("inputs", "outputs", "dense")}  # fmt: skip
        work = Work(
            operations=float(counted.sum()) / how.samples,
            values=float(read.sum()) / how.samples,
            steps=how.steps,
            inputs=one["inputs"],
            outputs=one["outputs"],
            weights=self.layer.weight.numel(),
            biases=0 if self.layer.bias is None else self.layer.bias.numel(),
            convolution=not isinstance(self.layer, nn.Linear),
        )
        return LayerEnergy(
            module=type(self.layer).__name__,
            kind=kind,
            parts=self.values.parts if kind == "fractions" else 1,
            values=None if self.values.seen is None else len(self.values.seen),
            low=self.values.low,
            high=self.values.high,
            once=once,
            rate=every["values"] / every["inputs"].clamp(min=1),
            sums=sums,
            macs=macs,
            energy=how.sum_pj * sums + how.mac_pj * macs,
            memory={} if how.memory is None else how.memory.traffic(work, how.sum_pj, how.mac_pj),
            **one,
        )


def _neuron_in(layer: Any) -> Any:
    """The neurons of a layer of neurons: itself, or what stands behind a norm or is fed by itself."""
    return layer.neuron if feeds_back(layer) else getattr(layer, "lif", layer)


def _update(layer: nn.Module, neurons: int, activity: LayerActivity | None, how: _How) -> NeuronEnergy:
    """A leak and a bias for every neuron and step, a reset for every spike."""
    neuron = _neuron_in(layer)
    decay = neuron.values()["decay"] if isinstance(neuron, NeuronLayer) else 0.0
    leaks = not bool((torch.as_tensor(decay) == 1).all())
    spikes = 0.0 if activity is None else activity.mean * how.steps * neurons
    sums, macs = how.steps * neurons + spikes, float(how.steps * neurons * leaks)
    return NeuronEnergy(neurons, sums, macs, how.sum_pj * sums + how.mac_pj * macs)


def _weighted(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose operations are counted, by name."""
    found = model.named_modules() if isinstance(model, nn.Module) else ()
    return {_named(name, layer): layer for name, layer in found if isinstance(layer, Counted)}


def _named(name: str, layer: nn.Module) -> str:
    """The name of a layer as it was before torch.compile; of a model that is one layer, that of its class."""
    return name.replace("_orig_mod.", "") or type(layer).__name__


def _left_out(model: nn.Module, ran: list[str]) -> list[str]:
    """What holds a matrix of weights and was not counted."""
    return [
        f"{_named(name, layer)} ({type(layer).__name__})"
        for name, layer in model.named_modules()
        if any(p.dim() > 1 for p in layer.parameters(recurse=False))
        and _named(name, layer) not in ran
        and not isinstance(layer, ParametrizationList)
    ]


def _listed(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _count(number: Any) -> str:
    """A number of operations, short."""
    number = float(number)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:,.2f}{unit}"
    return f"{number:,.4g}"


def _energy(pj: float) -> str:
    """An energy, short."""
    for unit, scale in (("mJ", 1e9), ("µJ", 1e6), ("nJ", 1e3)):
        if pj >= scale:
            return f"{pj / scale:,.3g} {unit}"
    return f"{pj:,.4g} pJ"


def _by_layer(found: Mapping[str, Energy], axes: Axes) -> None:
    """Bars of each layer's energy, parted into sums, MACs and memory where there is one result."""
    from trtkern.output.pictures import below, rows

    names = list(dict.fromkeys(name for result in found.values() for name in result.layers))
    places = range(len(names))
    thick = 0.8 / len(found)
    for i, (label, result) in enumerate(found.items()):
        at = [place + (i - (len(found) - 1) / 2) * thick for place in places]
        layers = [result.layers.get(name) for name in names]
        parts = {
            "additions (spikes)": [result.sum_pj * float(x.sums.sum()) if x else 0.0 for x in layers],
            "multiply-adds": [result.mac_pj * float(x.macs.sum()) if x else 0.0 for x in layers],
            "memory traffic": [sum(x.memory.values()) if x else 0.0 for x in layers],
        }
        if len(found) > 1:
            parts = {label: [sum(values) for values in zip(*parts.values(), strict=True)]}
        left = [0.0] * len(names)
        for j, (part, values) in enumerate(parts.items()):
            if any(values):
                values = [value / 1e3 for value in values]
                axes.barh(at, values, thick, left=left, color=style.series(i + j), label=part)
                left = [a + b for a, b in zip(left, values, strict=True)]
    rows(axes, [short(name, 28) for name in names])
    axes.set(xlabel="nJ a sample, as modelled", title="Energy of each layer")
    below(axes)


def _by_step(found: Mapping[str, Energy], axes: Axes) -> None:
    """Energy over the time steps."""
    from trtkern.output.pictures import over_steps

    for i, (label, result) in enumerate(found.items()):
        steps, color = range(1, result.timesteps + 1), style.series(i)
        axes.plot(steps, (result.by_step / 1e3).tolist(), marker="o", color=color, label=label or None)
    axes.set(xlabel="time step", ylabel="nJ a sample, as modelled", title="Energy of each time step")
    axes.set_ylim(bottom=0)
    over_steps(axes)
