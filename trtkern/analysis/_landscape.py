"""The loss on a line and on a plane through a network's weights, along filter-normalised directions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.analysis._directions import Directions
from trtkern.analysis._grid import Grid, Place, Point
from trtkern.analysis._journal import journal
from trtkern.analysis._network import Data, Progress, Samples, still
from trtkern.analysis._objective import WORDS, Loss, loss_called
from trtkern.analysis._result import Picture, Result, Table
from trtkern.output import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHO = "landscape"
LINE, PLANE = 51, 25
"""Points of the line, and of each side of the plane."""
_SHOWN = (0.1, 0.25, 0.5, 1.0)
"""Distances in the table, as shares of the radius."""


class Slice(NamedTuple):
    """The loss on a line, or on a plane."""

    alphas: Tensor
    """Coordinates along each direction, float64 [P]."""
    losses: Tensor
    """Mean loss, float64 [P], or [P, P]: along the first direction, along the second."""
    accuracies: Tensor
    """Share of the samples that are classified correctly, of the same shape."""


@dataclass(frozen=True, kw_only=True)
class Landscape(Result):
    """The loss around a network's weights.

    Args:
        loss_name: which loss.
        samples: how many.
        seed: of the directions.
        shapes: of the parameters that they are drawn for, by name.
        loss: at the weights themselves.
        accuracy: there.
        line: along the first direction.
        plane: along the first and the second; None with ``dims=1``.
    """

    NAME = "landscape"

    loss_name: str
    samples: int
    seed: int
    shapes: dict[str, tuple[int, ...]]
    loss: float
    accuracy: float
    line: Slice
    plane: Slice | None = None

    def table(self) -> Table:
        """The loss at some distances from the weights: means of both sides."""
        rows = [("0", f"{self.loss:.4g}", f"{100 * self.accuracy:.2f} %")]
        alphas = self.line.alphas
        middle = int(alphas.abs().argmin())
        nearest = [int((alphas - share * alphas[-1]).abs().argmin()) for share in _SHOWN]
        for ahead in dict.fromkeys(index for index in nearest if index != middle):
            both = torch.tensor([ahead, len(alphas) - 1 - ahead])
            loss, accuracy = (float(t[both].mean()) for t in (self.line.losses, self.line.accuracies))
            rows.append((f"{float(alphas[ahead]):.3g}", f"{loss:.4g}", f"{100 * accuracy:.2f} %"))
        return Table(("distance", "loss", "accuracy"), rows)

    def remarks(self) -> list[str]:
        """What the slices are."""
        return [
            f"The loss is {WORDS.get(self.loss_name, self.loss_name)}, without a regulariser, of {self.samples:,} "
            "samples in evaluation mode: running statistics are frozen, norms and biases stay as they are.",
            "A direction is random, and as long in each filter as the weights are: at distance 1 every filter has "
            "moved by its own length (Li et al. 2018, arXiv 1712.09913). Weights that are scaled before a norm leave "
            "the network as it is, and leave this picture as it is, so networks can be compared by it.",
            f"The random numbers belong to seed {self.seed} and the shapes of the parameters: runs of one architecture "
            "share their directions.",
            "The loss of a spiking network is a step function of its weights at a small enough scale, for a spike is "
            "there or not. These are true losses, no surrogate: fine steps between points are not seen.",
            "A slice shows one or two directions of very many: a wide bowl here does not show that all directions are "
            "wide. The Hessian's largest eigenvalues (curvature) say how steep the steepest ones are.",
        ]

    @classmethod
    def pictures(cls, results: Mapping[str, Landscape]) -> dict[str, Picture]:
        """The line's loss and accuracy, then a contour picture and a surface of each plane, in equal levels."""
        found = dict(results)
        pictures = {
            "Loss along the first direction.": Picture(partial(_lines, found, "losses")),
            "Accuracy along the first direction.": Picture(partial(_lines, found, "accuracies")),
        }
        planes = {name: result.plane for name, result in found.items() if result.plane is not None}
        levels = _levels(list(planes.values()))
        heights = [plane.losses[plane.losses.isfinite() & (plane.losses > 0)] for plane in planes.values()]
        limits = [float(t) for t in torch.cat(heights).aminmax()] if any(map(len, heights)) else [0.5, 1.0]
        for name, plane in planes.items():
            of = f" of {name}" if name else ""
            pictures[f"Loss{of} on the plane of both directions."] = Picture(
                partial(_contours, name, plane, levels), (style.WIDTH, 0.9 * style.WIDTH)
            )
        for name, plane in planes.items():
            of = f" of {name}" if name else ""
            pictures[f"Loss{of} as a surface over that plane."] = Picture(
                partial(_surface, name, plane, levels, limits), (style.WIDTH, 0.9 * style.WIDTH)
            )
        return pictures


def landscape(
    model: nn.Module,
    data: Data | Samples,
    *,
    dims: int = 2,
    points: int | None = None,
    radius: float = 1.0,
    seed: int = 0,
    loss: Loss = "sdt",
    directions: Directions | str | Path | None = None,
    file: str | Path | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Landscape:
    """The true loss on a line, and on a plane, through the weights along random filter-normalised directions.

    Li et al. 2018 (arXiv 1712.09913): L(w + a d + b e), where d and e are Gaussian and each filter of them is as long
    as that filter of w; norms, biases and the neurons' parameters stay. In evaluation mode, without a regulariser.

    Args:
        model: its output is [T, B, C].
        data: labelled samples; of training, without augmentation.
        dims: 1 is the line alone, 2 the plane as well.
        points: with ``dims=1`` of the line (51), with ``dims=2`` of each side of the plane (25; the line has
            2 points + 1). An odd number has the weights themselves in the middle.
        radius: the slices go from -radius to radius.
        seed: of the directions.
        loss: "sdt", the cross entropy of the mean output; "tet", the mean of the cross entropy of every output; or a
            function of (logits, labels) that returns a mean over the batch.
        directions: ``Directions``, or a file of them, in place of ``seed``.
        file: points are written to it as they are done, and are not computed again when it is there.
        processes: that compute points, each with its share of torch's threads.
        progress: told how many points are done.

    Raises:
        TypeError, ValueError: an argument or an output of another kind, directions of another architecture, a file of
            other work; the message says which and what to do.
        RuntimeError: a process ended.
    """
    for name, value, least in (("dims", dims, 1), ("points", points, 3), ("processes", processes, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{_WHO}: expected {name} to be an int of at least {least}, got {value!r}")
    if dims > 2:
        raise ValueError(f"{_WHO}: expected dims to be 1 or 2, got {dims}")
    if not isinstance(radius, (int, float)) or not 0 < radius < math.inf:
        raise ValueError(f"{_WHO}: expected radius to be a number above 0, got {radius!r}")
    samples = Samples.of(_WHO, data)
    loss_name, _ = loss_called(_WHO, loss)
    with still(_WHO, model):
        chosen = _directions(model, directions, seed)
    plane = axis(points or PLANE, radius) if dims == 2 else None
    line = axis(points or LINE if dims == 1 else 2 * (points or PLANE) + 1, radius)
    header = {
        "landscape": 1, "dims": dims, "points": points or (LINE if dims == 1 else PLANE), "radius": float(radius),
        "seed": chosen.seed, "loss": loss_name, "samples": _hash(samples.batches),
        "weights": _hash(model.state_dict().items()),
    }  # fmt: skip
    wanted: dict[Place, Sequence[float]] = {(): ()}
    wanted.update({(i,): (a,) for i, a in enumerate(line.tolist())})
    if plane is not None:
        sides = list(enumerate(plane.tolist()))
        wanted.update({(i, j): (a, b) for i, a in sides for j, b in sides})
    grid = Grid(_WHO, model, samples, loss, chosen)
    found = _computed(grid, wanted, header, file, processes, progress)
    index = torch.arange(len(line)).unsqueeze(1)
    return Landscape(
        loss_name=loss_name, samples=len(samples), seed=chosen.seed, shapes=chosen.shapes,
        loss=found[()].loss, accuracy=found[()].correct / len(samples),
        line=_slice(line, index, found, len(samples)),
        plane=None if plane is None else _slice(plane, _pairs(len(plane)), found, len(samples)),
    )  # fmt: skip


def axis(points: int, radius: float) -> Tensor:
    """Coordinates from -radius to radius, float64; symmetric, and exactly 0 in the middle of an odd number."""
    return (torch.arange(points, dtype=torch.float64) - (points - 1) / 2) * (2 * radius / (points - 1))


def _pairs(count: int) -> Tensor:
    """All places of a plane, [count, count, 2]."""
    return torch.cartesian_prod(torch.arange(count), torch.arange(count)).view(count, count, 2)


def _slice(alphas: Tensor, places: Tensor, found: Mapping[Place, Point], samples: int) -> Slice:
    """What was found at places [..., dims]."""
    points = [found[tuple(place)] for place in places.flatten(0, -2).tolist()]
    losses = torch.tensor([point.loss for point in points], dtype=torch.float64).view(places.shape[:-1])
    correct = torch.tensor([point.correct for point in points], dtype=torch.float64).view(places.shape[:-1])
    return Slice(alphas, losses, correct / samples)


def _directions(model: nn.Module, directions: Directions | str | Path | None, seed: int) -> Directions:
    if directions is None:
        return Directions.of(model, seed)
    chosen = directions if isinstance(directions, Directions) else Directions.load(directions)
    chosen.check(_WHO, model)
    return chosen


def _computed(
    grid: Grid,
    wanted: Mapping[Place, Sequence[float]],
    header: dict[str, Any],
    file: str | Path | None,
    processes: int,
    progress: Progress | None,
) -> dict[Place, Point]:
    """All points: those of the file, and those that it lacks."""
    found: dict[Place, Point] = {}

    def gather(kept: Any = None) -> None:
        if kept is not None:
            found.update({at: Point(**piece) for at, piece in kept.pieces.items() if at in wanted})
        left = {place: coordinates for place, coordinates in wanted.items() if place not in found}
        for place, point in grid.points(left, processes):
            found[place] = point
            if kept is not None:
                kept.add(place, **point._asdict())
            if progress is not None:
                progress(len(found), len(wanted))
        if progress is not None and not left:
            progress(len(found), len(wanted))

    if file is None:
        gather()
    else:
        with journal(_WHO, file, header) as kept:
            gather(kept)
    return found


def _hash(parts: Any) -> str:
    """Of tensors, in whatever pairs."""
    digest = hashlib.sha256()
    for pair in parts:
        for part in pair:
            if isinstance(part, Tensor):
                flat = part.detach().contiguous().cpu()
                digest.update(f"{flat.dtype} {tuple(flat.shape)}".encode())
                digest.update(flat.flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(str(part).encode())
    return digest.hexdigest()[:16]


def _levels(planes: Sequence[Slice]) -> list[float]:
    """Of contours: round numbers, a factor of about 1.5 apart, from the lowest to the highest loss of all planes."""
    values = torch.cat([plane.losses.flatten() for plane in planes]) if planes else torch.ones(1)
    values = values[values.isfinite() & (values > 0)]
    if values.numel() == 0:
        return [0.5, 1.0]
    low, high = float(values.min()), float(values.max())
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        inner = [level for p in powers for m in steps if low < (level := m * 10.0**p) < high]
        if len(inner) >= 6:
            return inner
    if len(inner) < 4:  # a small range: evenly in logarithms
        inner = torch.logspace(math.log10(low), math.log10(max(high, low * 1.001)), 8).tolist()[1:-1]
    return inner


def _lines(results: Mapping[str, Landscape], of: str, axes: Axes) -> None:
    """The line of each run."""
    from trtkern.output.pictures import logarithmic, named

    for i, (name, result) in enumerate(results.items()):
        values = getattr(result.line, of)
        look: dict[str, Any] = {
            "color": style.series(i),
            "linestyle": ("-", "--", ":", "-.")[i % 4],
        }
        axes.plot(result.line.alphas, values * (100 if of == "accuracies" else 1), label=name or None, **look)
    axes.axvline(0, color=style.ASIDE, linewidth=0.8)
    what = {"losses": "loss", "accuracies": "accuracy (%)"}[of]
    title = f"{what.split(' (')[0].capitalize()} around the trained weights"
    axes.set(xlabel="distance from them, in lengths of each filter", ylabel=what, title=title)
    if of == "losses" and all(bool((result.line.losses > 0).all()) for result in results.values()):
        logarithmic(axes)
    axes.grid()
    named(axes)


def _contours(name: str, plane: Slice, levels: Sequence[float], axes: Axes) -> None:
    """Lines of equal loss."""
    alphas = plane.alphas.numpy()
    values = plane.losses.T.numpy()  # rows are the second direction, upwards
    shown = axes.contour(
        alphas, alphas, values, levels=list(levels), cmap=style.SHADES, linewidths=1.4, norm=_norm(levels)
    )  # fmt: skip
    axes.clabel(shown, fmt=lambda level: f"{level:.3g}", fontsize=style.SMALL)
    axes.plot([0], [0], marker="+", color=style.SERIES[1], markersize=9, markeredgewidth=1.6)
    axes.set(xlabel="first direction, in lengths of each filter", ylabel="second direction")
    axes.set_title(_title("Lines of equal loss (+: the weights)", name))
    axes.set_xticks(_ticks(plane))
    axes.set_yticks(_ticks(plane))
    axes.set_aspect("equal")


def _surface(name: str, plane: Slice, levels: Sequence[float], limits: Sequence[float], axes: Axes) -> None:
    """Height and colour are the loss, in logarithms, as the contours have it."""
    import matplotlib

    figure, place = axes.figure, axes.get_subplotspec()
    axes.remove()
    solid: Any = figure.add_subplot(*([] if place is None else [place]), projection="3d")
    x, y = torch.meshgrid(plane.alphas, plane.alphas, indexing="ij")
    losses = plane.losses.clamp(min=limits[0])
    colors = matplotlib.colormaps[style.SHADES](_norm(levels)(losses.numpy()))
    heights = losses.log10().numpy()
    solid.plot_surface(
        x.numpy(), y.numpy(), heights, facecolors=colors, rstride=1, cstride=1, linewidth=0.2, edgecolor=style.EMPTY,
        shade=False,
    )  # fmt: skip
    shown = levels[:: math.ceil(len(levels) / 6)]
    solid.set_zticks([math.log10(level) for level in shown], [f"{level:.2g}" for level in shown])
    if limits[0] < limits[1]:
        solid.set_zlim(*map(math.log10, limits))
    solid.set_xticks(_ticks(plane))
    solid.set_yticks(_ticks(plane))
    solid.set(xlabel="first direction", ylabel="second direction", title=_title("Height: loss", name))


def _norm(levels: Sequence[float]) -> Any:
    """Colours of losses: logarithmic, the highest one still dark enough on white."""
    from matplotlib.colors import LogNorm

    return LogNorm(levels[0], levels[-1] * (levels[-1] / levels[0]) ** 0.2, clip=True)


def _ticks(plane: Slice) -> list[float]:
    """-R, -R/2, 0, R/2, R."""
    return [float(plane.alphas[-1]) * share for share in (-1, -0.5, 0, 0.5, 1)]


def _title(what: str, name: str) -> str:
    return f"{what}, {name}" if name else what
