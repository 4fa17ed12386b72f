"""What ``gradients`` returns: its numbers, in words, in tables and in pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from torch import Tensor

from trtkern.analysis._result import Picture, Result, Table

_WIDTH = 0.025
EDGES = tuple((i - 41.5) * _WIDTH for i in range(84))
"""Of the bins of the factors; what is beyond an end is in the bin there. 0 and every twentieth are centres."""
TERMS = ("cross entropy", "squared error", "regulariser")


class Norms(NamedTuple):
    """Sizes of a gradient at every step, [T] each, over the neurons of a layer and all N samples.

    The loss is the mean over the N samples, so a sample's own gradient is in it with the factor 1/N.
    """

    h: Tensor
    """||dL/dh[t]||: the root of the sum of squares over neurons and samples, 1/N included."""
    v: Tensor | None
    """||dL/dv[t]|| likewise; 0 at the last step, whose v nothing uses unless the model does. None of other modules."""
    h_sample: Tensor
    """The mean over the samples of the norm of the gradient of a sample's own loss, without 1/N."""
    v_sample: Tensor | None


class Vanishing(NamedTuple):
    """How the gradient of the cross entropy of the last step, CE(O[T], y), falls on its way into the past."""

    ratio: float
    """What is left of its norm for each step back, by least squares of the logarithms; 1: it does not vanish."""
    first: float
    """||dL/dh[1]|| / ||dL/dh[T]||."""
    zeros: int
    """Steps at which it is exactly 0; the ratio leaves them out, and is 0 where fewer than two steps are left."""


class Factors(NamedTuple):
    """The temporal Jacobian dv[t]/dv[t-1], a diagonal matrix: a factor a neuron. Of t = 2 .. T."""

    decay: float
    """The largest of the layer."""
    silent: Tensor
    """Counts in the bins of ``EDGES``, of neurons that did not fire at t."""
    fired: Tensor
    """Counts of those that fired."""
    fired_zero: float
    """Share of exact zeros among those that fired; NaN if none did."""
    product: Tensor
    """[K] mean size of the product of k consecutive factors, k = 1 .. K."""
    zero: Tensor
    """[K] share of products that are exactly 0."""
    largest: Tensor
    """[K] the largest size."""
    bound: Tensor
    """[K] decay^k."""

    @property
    def exceeded(self) -> bool:
        """Whether a product was larger than decay^k, up to rounding: surrogates with a high or a wide peak do that."""
        return bool((self.largest > self.bound * (1 + 1e-5)).any())


class Origin(NamedTuple):
    """What the gradient of a parameter is made of."""

    numel: int
    norm: float
    """Of the sum of the parts."""
    parts: dict[str, float]
    """Norms of the gradients of the terms, with their weights in the loss."""
    cosines: dict[str, float]
    """Of a part and the sum of the others: -1 works against them, NaN: one is zero."""

    def share(self, part: str) -> float:
        """Its norm of the sum of the norms; 0 where all are 0."""
        whole = sum(self.parts.values())
        return self.parts.get(part, 0.0) / whole if whole else 0.0


@dataclass(frozen=True)
class Layer:
    """One layer of neurons, or one module of another kind."""

    kind: str
    """The name of its class."""
    ours: bool
    """Neurons of trtkern: gradients are those of potentials. Else "h" stands for the module's output."""
    neurons: int
    """Of one sample."""
    norms: dict[str, Norms]
    """By loss."""
    last: Norms
    """Of the cross entropy of the last step alone."""
    vanishing: Vanishing
    factors: Factors | None
    """None of modules of another kind."""
    silent: float | None
    """Share of neurons that never fired; with ``pool=2`` of pooled positions (``firing_rates``)."""
    saturated: float | None
    """Share that fired at every step of every sample."""
    dead: float | None
    """Share whose surrogate derivative was exactly 0 at every step of every sample: no gradient passes their spikes."""


@dataclass(frozen=True, kw_only=True)
class Gradients(Result):
    """How gradients reach the early time steps of a network, by layer.

    Args:
        layers: by name.
        weights: by loss and by parameter.
        vanishing: the mean over the layers of ``Vanishing.ratio``: what is left of the last step's gradient a step
            further back.
        timesteps: T.
        samples: N.
    """

    NAME = "gradients"

    layers: dict[str, Layer]
    weights: dict[str, dict[str, Origin]]
    vanishing: float
    timesteps: int
    samples: int

    @property
    def losses(self) -> list[str]:
        """Their names."""
        return list(self.weights)

    def table(self) -> Table:
        """A row for each layer."""
        ratios = [f"{loss}: first/last" for loss in self.losses]
        head = ["layer", "left per step", *ratios, "mean factor", "zero", "silent", "saturated", "dead"]
        rows = [
            [name, f"{x.vanishing.ratio:.3f}", *_first(x), *_chain(x), *_shares(x)] for name, x in self.layers.items()
        ]
        return Table(head, rows)

    def origins(self) -> Table:
        """A row for each parameter and each loss of more than one term: norm, shares, cosine of the penalty."""
        head = ["loss", "parameter", "norm", *TERMS, "cosine of the regulariser"]
        rows = []
        for loss in self.losses:
            for name, origin in self.weights[loss].items():
                if len(origin.parts) > 1:
                    shares = [f"{origin.share(term):.1%}" for term in TERMS]
                    rows.append(
                        [loss, name, f"{origin.norm:.2e}", *shares, _number(origin.cosines.get(TERMS[2]), ".3f")]
                    )
        return Table(head, rows, words=2)

    def __str__(self) -> str:
        """Both tables and the remarks as plain text."""
        tables = [self.table(), *([origins] if (origins := self.origins()).rows else [])]
        return "\n\n".join([*(table.text() for table in tables), "\n".join(self.remarks())])

    def remarks(self) -> list[str]:
        """What the numbers mean, how they were made, what they do not show."""
        return [*_how(self), *_seen(self)]

    @classmethod
    def pictures(cls, results: Mapping[str, Self]) -> dict[str, Picture]:
        """Norms by step under each loss, the last step's gradient, factors, their products, origins of the weights'."""
        from trtkern.analysis import _gradients_pictures

        return _gradients_pictures.pictures(results)


def _number(value: float | None, how: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, how)


def _share(value: float | None) -> str:
    return _number(value, ".1%")


def _first(layer: Layer) -> list[str]:
    """Per loss: the gradient at the first step by that at the last."""
    found = [(norms.h[0], norms.h[-1]) for norms in layer.norms.values()]
    return [f"{float(first / last):.3f}" if last > 0 else "-" for first, last in found]


def _chain(layer: Layer) -> list[str]:
    """The mean size of a factor and the share of zeros."""
    if layer.factors is None or not len(layer.factors.product):
        return ["-", "-"]
    return [f"{float(layer.factors.product[0]):.3f}", _share(float(layer.factors.zero[0]))]


def _shares(layer: Layer) -> list[str]:
    return [_share(value) for value in (layer.silent, layer.saturated, layer.dead)]


def _how(result: Gradients) -> list[str]:
    """How the numbers were made."""
    lines = [
        f"All gradients are of losses that are means over the {result.samples:,} samples, in evaluation mode (running "
        "statistics): in training, the statistics of the batch tie every time step of every sample to every other one, "
        "and no gradient would belong to one step.",
        "first/last is the norm of dL/dh[1] by that of dL/dh[T], where h[t] is the potential before firing. A loss "
        "that acts on every step gives every step a gradient of its own; h[1] has one through all "
        "later steps beside it.",
        "Left per step is what remains of the gradient of the cross entropy of the last step alone for each step that "
        "it goes back: 1 would be no vanishing. It is fitted by least squares to the logarithms of the norms. "
        f"The mean over the layers is {_number(result.vanishing, '.3f')}.",
        "A factor is dv[t]/dv[t-1] = decay * dv[t]/dh[t], by which a gradient is multiplied for each step back within "
        "a neuron, as the surrogate has it; zero is the share of factors that are exactly 0.",
        "Silent neurons never fired, saturated ones fired at every step of every sample. Dead are those whose "
        "surrogate derivative was exactly 0 all the time: no gradient passes through their spikes.",
    ]
    if any(not layer.ours for layer in result.layers.values()):
        lines.append(
            "Of modules that are no neurons of trtkern the gradient of the output is measured, not that of a "
            "potential, and there are no factors: what such a module computes inside is not known."
        )
    if result.timesteps == 1:
        lines.append("With one time step there is no past: nothing can vanish, and there are no factors.")
    return lines


def _seen(result: Gradients) -> list[str]:
    """What the numbers show here."""
    lines = []
    if gone := [name for name, layer in result.layers.items() if layer.vanishing.zeros]:
        lines.append(
            f"The last step's gradient is exactly 0 at some steps of {', '.join(gone)}: these steps are left out of "
            "what is left per step, which is 0 where fewer than two steps remain. More is lost than the number "
            "says."
        )
    chained = {name: layer.factors for name, layer in result.layers.items() if layer.factors is not None}
    if over := [name for name, factors in chained.items() if factors.exceeded]:
        lines.append(
            f"Products of k factors are larger than decay^k in {', '.join(over)}: the derivative of the surrogate is "
            "high enough there for the reset to outweigh the leak. decay^k is a bound only where it is not."
        )
    elif any(len(factors.product) for factors in chained.values()):
        lines.append("No product of k factors was larger than decay^k, the bound that the leak alone sets.")
    for loss, origins in result.weights.items():
        if any(TERMS[2] in origin.parts for origin in origins.values()):
            lines.append(
                f"The regulariser of {loss} makes up {_largest(origins)}. It depends on the weights alone: it brings "
                "no information about the data and passes through no time step. Shares are those of the norms of the "
                "parts, which may point against each other: the cosine says how."
            )
    return lines


def _largest(origins: Mapping[str, Origin]) -> str:
    """Of the regulariser's shares, in words."""
    shares = {name: origin.share(TERMS[2]) for name, origin in origins.items() if origin.parts.get(TERMS[2])}
    if not shares:
        return "nothing of any gradient"
    name = max(shares, key=lambda name: shares[name])
    return f"{min(shares.values()):.1%} to {shares[name]:.1%} of the gradients that it reaches, most of {name}"
