"""Random directions in the space of the weights, the same for all networks of an architecture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.nn._neuron import NeuronLayer
from trtkern.nn.losses import NORMS
from trtkern.output.files import parse, write

_SHOWN = 4
"""Numbers of each direction that a file holds, to see that they are drawn again alike."""


def with_filters(model: nn.Module, names: Sequence[str]) -> list[bool]:
    """Whether a named parameter has filters: two axes or more, and not of a norm or a neuron."""
    kinds = (NeuronLayer, *NORMS)
    left_out = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    parameters = dict(model.named_parameters())
    return [parameters[name].dim() > 1 and id(parameters[name]) not in left_out for name in names]


@dataclass(frozen=True)
class Directions:
    """Gaussian directions in the space of the trainable weights: a seed and the shapes that it is drawn for.

    Networks of one architecture have the same random numbers; each network scales them to its own filters
    (``of_filters``), as Li et al. 2018 (arXiv 1712.09913) compare networks.

    Args:
        seed: of the random numbers.
        shapes: of the trainable parameters, by name, in the model's order.
    """

    seed: int
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module, seed: int = 0) -> Directions:
        """Those of a model's trainable parameters."""
        return cls(seed, {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad})

    def check(self, who: str, model: nn.Module) -> None:
        """That they are directions of this model.

        Raises:
            ValueError: of another architecture; the message names the first tensor that differs.
        """
        ours, found = self.shapes, Directions.of(model).shapes
        for name in [*ours, *found]:
            if ours.get(name) != found.get(name):
                raise ValueError(
                    f"{who}: expected directions of this network, got some of another architecture: {name} is "
                    f"{_shape(ours.get(name))} there and {_shape(found.get(name))} here; compare networks of one "
                    "architecture, or draw directions of their own"
                )
        if list(ours) != list(found):
            raise ValueError(
                f"{who}: expected directions of this network, got some of another architecture: the parameters stand "
                "in another order there; draw directions of their own"
            )

    def drawn(self, count: int) -> list[list[Tensor]]:
        """The random numbers, float32 on the CPU: ``count`` directions of a tensor for each parameter."""
        made = []
        for index in range(count):
            generator = torch.Generator().manual_seed(2 * self.seed + index)
            made.append([torch.randn(shape, generator=generator) for shape in self.shapes.values()])
        return made

    def of_filters(self, model: nn.Module, count: int) -> list[list[Tensor | None]]:
        """``count`` directions in which each filter is as long as the model's: ``d_f |w_f| / (|d_f| + 1e-10)``.

        A filter is what an output channel has: an entry of the first axis. Norms, biases and the neurons' own
        parameters are not moved: None.
        """
        filters = with_filters(model, list(self.shapes))
        parameters = dict(model.named_parameters())
        found: list[list[Tensor | None]] = []
        for direction in self.drawn(count):
            scaled: list[Tensor | None] = []
            for name, d, moves in zip(self.shapes, direction, filters, strict=True):
                w = parameters[name].detach()
                scaled.append(d.to(w).mul_(lengths(w) / (lengths(d.to(w)) + 1e-10)) if moves else None)
            found.append(scaled)
        return found

    def save(self, path: str | Path) -> None:
        """Write the seed and the shapes, as JSON.

        Raises:
            OSError: it cannot be written.
        """
        first = [[float(x) for x in d[0].flatten()[:_SHOWN]] for d in self.drawn(2)]
        content = {"directions": 1, "seed": self.seed, "shapes": self.shapes, "first": first}
        write(Path(path), (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Directions:
        """What ``save`` wrote.

        Raises:
            ValueError: no such file, or one whose random numbers this torch does not draw.
            OSError: it cannot be read.
        """
        try:
            content: dict[str, Any] = parse(Path(path).read_bytes())
            shapes = {str(name): tuple(map(int, shape)) for name, shape in content["shapes"].items()}
            made = cls(int(content["seed"]), shapes)
            first = torch.tensor(content["first"], dtype=torch.float64)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"directions: expected a file that Directions.save wrote, got {path} ({error!r}); make it anew"
            ) from None
        here = torch.stack([d[0].flatten()[:_SHOWN].double() for d in made.drawn(2)])
        if here.shape != first.shape or not torch.allclose(here, first, atol=1e-5):
            raise ValueError(
                f"directions: expected the random numbers that {path} was made with, got others: "
                f"torch {torch.__version__} draws them in another way; compare runs with one version of torch"
            )
        return made


def lengths(t: Tensor) -> Tensor:
    """Of each filter, an entry of the first axis; shaped to multiply t."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1).view(-1, *[1] * (t.dim() - 1))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
