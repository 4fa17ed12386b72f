"""The pictures of ``gradients``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtkern.analysis._gradients_result import EDGES, TERMS, Factors, Gradients, Origin
from trtkern.analysis._result import Picture
from trtkern.output import style
from trtkern.output.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = 8
"""Layers up to which each has a line; more are rows of a heat map."""


def pictures(results: Mapping[str, Gradients]) -> dict[str, Picture]:
    """{caption: picture}; several results are lines of one picture where a line holds what is compared."""
    found: dict[str, Picture] = {}
    pooled = {name: factors for name, result in results.items() if (factors := _pooled(result)) is not None}
    if len(results) == 1:
        (result,) = results.values()
        for loss in result.losses:
            curves = {name: layer.norms[loss].h for name, layer in result.layers.items()}
            caption = f"Norm of the gradient of the {loss} loss by the potentials h[t], for each layer."
            found[caption] = _over_steps(curves, f"Gradient at each step, {loss} loss", "‖dL/dh[t]‖")
        curves = {name: layer.last.h / layer.last.h[-1] for name, layer in result.layers.items()}
        caption = f"{_LAST}, for each layer."
        shares = {"did not fire": f.silent, "fired": f.fired} if (f := pooled.get(next(iter(results)))) else {}
        chained = {name: layer.factors for name, layer in result.layers.items() if layer.factors is not None}
        products = chained if len(chained) <= _LINES else pooled
    else:
        curves = {name: _middle(result) for name, result in results.items()}
        caption = f"{_LAST}, geometric mean over the layers."
        shares = {name: f.silent + f.fired for name, f in pooled.items()}
        products = pooled
    found[caption] = _over_steps(curves, "What the last step's loss sends back", "‖dCE(O[T], y)/dh[t]‖, 1 at the end")
    if pooled:
        found["How often the factors dv[t]/dv[t-1] of all layers have which size."] = Picture(
            partial(_factors, shares=shares)
        )
        found["Mean size of the product of k consecutive factors, and decay^k, its bound where the leak sets it."] = (
            Picture(partial(_products, chained=products))
        )
    for name, result in results.items():
        for loss, origins in result.weights.items():
            if any(len(origin.parts) > 1 for origin in origins.values()):
                bars = by_layer(origins)
                caption = (
                    f"What the gradients of the parameters are made of, {loss} loss{f' ({name})' if name else ''}."
                )
                found[caption] = Picture(
                    partial(
                        _origins, bars=bars, title=f"Parts of the gradient, {loss} loss{f', {name}' if name else ''}"
                    ),
                    (style.WIDTH, style.tall(len(bars), around=1.8)),
                )
    return found


_LAST = "Norm of the gradient of the last step's cross entropy by the potentials h[t]: what only time carries back"


def _middle(result: Gradients) -> Tensor:
    """The geometric mean over the layers of the norms relative to the last step, less those that get no gradient at
    all; NaN where another has exactly 0."""
    there = [layer.last.h for layer in result.layers.values() if len(layer.last.h) == result.timesteps]
    curves = [norms / norms[-1] for norms in there if norms[-1] > 0]
    if not curves:
        return torch.full((result.timesteps,), math.nan, dtype=torch.float64)
    return torch.stack(curves).log().mean(0).exp()


def _pooled(result: Gradients) -> Factors | None:
    """The factors of all layers: counts added, means and shares averaged over the layers."""
    there = [layer.factors for layer in result.layers.values() if layer.factors is not None]
    longest = min((len(f.product) for f in there), default=0)
    if longest == 0:
        return None
    mean = {n: torch.stack([getattr(f, n)[:longest] for f in there]).mean(0) for n in ("product", "zero")}
    return Factors(
        decay=max(f.decay for f in there),
        silent=torch.stack([f.silent for f in there]).sum(0),
        fired=torch.stack([f.fired for f in there]).sum(0),
        fired_zero=math.nan,
        product=mean["product"],
        zero=mean["zero"],
        largest=torch.stack([f.largest[:longest] for f in there]).amax(0),
        bound=torch.stack([f.bound[:longest] for f in there]).amax(0),
    )


def by_layer(origins: Mapping[str, Origin]) -> dict[str, dict[str, float]]:
    """{module: {part: share}}: the parts' norms over all parameters of a module, of their sum."""
    squares: dict[str, dict[str, float]] = {}
    for name, origin in origins.items():
        held = squares.setdefault(name.rpartition(".")[0] or name, {})
        for part, norm in origin.parts.items():
            held[part] = held.get(part, 0.0) + norm**2
    norms = {module: {part: math.sqrt(s) for part, s in parts.items()} for module, parts in squares.items()}
    return {m: {part: n / (sum(parts.values()) or 1.0) for part, n in parts.items()} for m, parts in norms.items()}


def _styles() -> Iterator[dict[str, Any]]:
    for i in range(10_000):
        yield {"color": style.series(i), "marker": style.mark(i)}


def _over_steps(curves: Mapping[str, Tensor], title: str, label: str) -> Picture:
    if len(curves) <= _LINES:
        return Picture(partial(_lines, curves=curves, title=title, label=label))
    return Picture(partial(_heat_map, curves=curves, title=title, label=label), (style.WIDTH, style.tall(len(curves))))


def _lines(axes: Axes, curves: Mapping[str, Tensor], title: str, label: str) -> None:
    for (name, values), look in zip(curves.items(), _styles(), strict=False):
        axes.plot(range(1, len(values) + 1), _positive(values), label=_label(name), **look)
    _steps(axes, max(len(values) for values in curves.values()), "time step t")
    axes.set(ylabel=label, title=title)
    _finished(axes)


def _heat_map(axes: Axes, curves: Mapping[str, Tensor], title: str, label: str) -> None:
    """Rows of logarithms; white where the norm is exactly 0."""
    steps = max(len(values) for values in curves.values())
    rows = [_positive(values) + [math.nan] * (steps - len(values)) for values in curves.values()]
    cells = torch.tensor(rows, dtype=torch.float64).log10().numpy()
    image = axes.imshow(
        cells, aspect="auto", interpolation="none", cmap=style.SHADES, extent=(0.5, steps + 0.5, len(rows) - 0.5, -0.5)
    )
    axes.set_yticks(range(len(rows)), [_label(name) for name in curves], parse_math=False)
    _steps(axes, steps, "time step t")
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes, label=f"log10 of the {label} (white: 0)")


def _factors(axes: Axes, shares: Mapping[str, Tensor]) -> None:
    """Of all factors of a picture's line, the share in each bin; those of one network add up to 100 %."""
    together = sum(float(counts.sum()) for counts in shares.values()) if "fired" in shares else None
    centres = [(low + high) / 2 for low, high in pairwise(EDGES)]
    ends = [0.0]
    for (name, counts), look in zip(shares.items(), _styles(), strict=False):
        percent = 100 * counts / (together or float(counts.sum()))
        ends += [x for x, share in zip(centres, percent.tolist(), strict=True) if share]
        axes.step(centres, _positive(percent), where="mid", label=_label(name), color=look["color"])
    axes.set(xlabel="dv[t]/dv[t-1]", ylabel="share of the factors (%)", title="Factors of the chain through time")
    axes.set_xlim(min(ends) - 0.1, max(ends) + 0.1)
    _finished(axes)


def _products(axes: Axes, chained: Mapping[str, Factors]) -> None:
    for (name, factors), look in zip(chained.items(), _styles(), strict=False):
        axes.plot(range(1, len(factors.product) + 1), _positive(factors.product), label=_label(name), **look)
    bounds = {tuple(factors.bound.tolist()) for factors in chained.values()}
    for i, bound in enumerate(sorted(bounds)):
        label = "decay^k" if i == 0 else None
        axes.plot(range(1, len(bound) + 1), bound, color=style.ASIDE, linestyle="--", linewidth=1.2, label=label)
    _steps(axes, max(len(factors.product) for factors in chained.values()), "steps k")
    axes.set(ylabel="mean size of the product", title="What is left after k steps back")
    _finished(axes)


def _origins(axes: Axes, bars: Mapping[str, Mapping[str, float]], title: str) -> None:
    from trtkern.output.pictures import below, rows

    places, left = range(len(bars)), [0.0] * len(bars)
    for part, color, hatch in zip(TERMS, style.SERIES, ("", "//", ".."), strict=False):
        widths = [100 * parts.get(part, 0.0) for parts in bars.values()]
        if any(widths):
            axes.barh(
                places, widths, left=left, color=color, label=part, hatch=hatch, edgecolor=style.EMPTY, linewidth=0.5
            )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    rows(axes, [_label(name) for name in bars])
    axes.set(xlim=(0, 100), xlabel="share of the norms (%)", title=title)
    below(axes)


def _positive(values: Tensor) -> list[float]:
    """For a logarithmic axis: NaN in place of 0."""
    return [value if value > 0 else math.nan for value in values.tolist()]


def _label(name: str) -> str:
    return short(name, 26) or "model"


def _steps(axes: Axes, count: int, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel=label, xlim=(0.5, count + 0.5))


def _finished(axes: Axes) -> None:
    """A logarithmic axis where there is something above 0, a grid, names of several."""
    from trtkern.output.pictures import logarithmic, named

    if math.isfinite(axes.dataLim.y0) and axes.dataLim.y1 > 0:
        logarithmic(axes)
    axes.grid()
    if len(axes.get_legend_handles_labels()[1]) > 1:
        named(axes)
