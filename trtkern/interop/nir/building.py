"""A graph of NIR while it is written: values that go from node to node, and what is put right at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trtkern.interop.nir.dialects import Clock, Dialect
from trtkern.interop.nir.problems import Problems

Shape = tuple[int, ...] | None
"""Of a sample, without time and batch; None where a problem has hidden it."""


class Value(NamedTuple):
    """What a layer gives: a sum of what nodes give."""

    sources: dict[str, int]
    """How often each node is in the sum."""
    shape: Shape
    folded: bool = False
    """Time and batch are one axis."""


class Norm(NamedTuple):
    """y = scale * x + shift, a number for each channel: NIR has no node for it."""

    scale: np.ndarray
    shift: np.ndarray
    shape: tuple[int, ...]
    axis: int


class Joint(NamedTuple):
    """A point where edges meet, which is gone in the end."""


@dataclass
class Builder:
    """The nodes and edges of one graph.

    Args:
        nir: the package.
        clock, dialect, problems: of the whole conversion.
        path: of the graph within an outer one.
    """

    nir: Any
    clock: Clock
    dialect: Dialect
    problems: Problems
    path: str = ""
    nodes: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """What goes into each node and comes out of it."""
    edges: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, path: str, node: Any, value: Value, shape: Shape) -> Value:
        """A node that takes a value and gives one of that shape; None for a node is a problem that was named."""
        if node is None:
            return Value({}, shape, value.folded)
        name = self._free(path or type(node).__name__.lower())
        self.nodes[name], self.shapes[name] = node, (value.shape, shape)
        for source, count in value.sources.items():
            self.edges[source, name] += count
        return Value({name: 1}, shape, value.folded)

    def _free(self, path: str) -> str:
        name, count = path, 1
        while name in self.nodes:
            name, count = f"{path}_{count}", count + 1
        return name

    def total(self, path: str, kind: str, values: Iterable[Value]) -> Value:
        """The sum of values; a problem where their shapes differ."""
        values = list(values)
        sources: Counter[str] = Counter()
        for value in values:
            sources.update(value.sources)
        shapes = [value.shape for value in values if value.shape is not None]
        if any(shape != shapes[0] for shape in shapes):
            got = " and ".join(map(str, shapes))
            self.problems.add(path, kind, "a sum of values of one shape", got, "NIR broadcasts nothing; expand them")
            return Value(dict(sources), None, values[0].folded)
        shape = shapes[0] if len(shapes) == len(values) else None
        return Value(dict(sources), shape, values[0].folded)

    def graph(self, metadata: dict[str, Any] | None = None) -> Any:
        """The ``nir.NIRGraph``."""
        self._remove_joints()
        self._fold_norms()
        self._write_norms()
        self._multiply()
        for name, (taken, given) in self.shapes.items():
            node = self.nodes[name]
            if not isinstance(node, self.nir.NIRGraph):
                node.input_type, node.output_type = {"input": np.array(taken)}, {"output": np.array(given)}
        last = [name for name, node in self.nodes.items() if isinstance(node, self.nir.Output)]
        nodes = {name: node for name, node in self.nodes.items() if name not in last}
        nodes.update({name: self.nodes[name] for name in last})
        place = {name: i for i, name in enumerate(nodes)}
        edges = sorted(self.edges, key=lambda edge: place[edge[1]])
        return self.nir.NIRGraph(nodes, edges, metadata=dict(metadata or {}), type_check=False)

    def _drop(self, name: str) -> None:
        del self.nodes[name], self.shapes[name]
        self.edges = Counter({edge: count for edge, count in self.edges.items() if name not in edge})

    def _remove_joints(self) -> None:
        for name in [name for name, node in self.nodes.items() if isinstance(node, Joint)]:
            before = [(a, count) for (a, b), count in self.edges.items() if b == name]
            behind = [(b, count) for (a, b), count in self.edges.items() if a == name]
            self._drop(name)
            for a, more in before:
                for b, count in behind:
                    self.edges[a, b] += more * count

    def _fold_norms(self) -> None:
        """Put each norm into the convolution or matrix before it, where nobody else sees what that gives."""
        for name in [name for name, node in self.nodes.items() if isinstance(node, Norm)]:
            norm, before = self.nodes[name], [edge for edge in self.edges if edge[1] == name]
            if len(before) != 1 or self.edges[before[0]] != 1:
                continue
            (first, _) = before[0]
            kind = type(self.nodes[first]).__name__
            if kind not in ("Conv1d", "Conv2d", "Affine", "Linear") or norm.axis != 0:
                continue
            if sum(count for edge, count in self.edges.items() if edge[0] == first) != 1:
                continue
            del self.edges[before[0]]
            # In their places, so that sums keep their order.
            self.edges = Counter({(first if a == name else a, b): n for (a, b), n in self.edges.items()})
            self._drop(name)
            self.nodes[first] = self._folded(self.nodes[first], norm)

    def _folded(self, node: Any, norm: Norm) -> Any:
        weight = node.weight
        scale = norm.scale.reshape(-1, *[1] * (weight.ndim - 1))
        made = (weight * scale).astype(weight.dtype)
        bias = getattr(node, "bias", None)
        bias = norm.shift if bias is None else norm.shift + norm.scale * bias
        bias = bias.astype(weight.dtype)
        if type(node).__name__ in ("Affine", "Linear"):
            return self.nir.Affine(weight=made, bias=bias)
        node.weight, node.bias = made, bias
        return node

    def _write_norms(self) -> None:
        """The norms that are left: a Scale without a shift, else a matrix or 1x1 convolution with a diagonal."""
        nir = self.nir
        for name, norm in list(self.nodes.items()):
            if not isinstance(norm, Norm):
                continue
            channels, space = len(norm.scale), norm.shape[1:]
            if not norm.shift.any():
                along = [1] * len(norm.shape)
                along[norm.axis] = channels
                spread = np.broadcast_to(norm.scale.reshape(along), norm.shape)
                self.nodes[name] = nir.Scale(scale=np.ascontiguousarray(spread, dtype=np.float32))
            elif norm.axis != 0 or len(space) > 2:
                do = "put the BatchNorm behind a convolution or a Linear"
                self.problems.add(name, "BatchNorm", "channels on the first axis of a sample", str(norm.shape), do)
            else:
                weight, bias = np.diag(norm.scale).astype(np.float32), norm.shift.astype(np.float32)
                weight = weight.reshape(channels, channels, *[1] * len(space))
                self.nodes[name] = diagonal(nir, weight, bias, space)

    def _multiply(self) -> None:
        """A Scale for each edge that counts more than once: NIR has each edge once."""
        for (a, b), count in list(self.edges.items()):
            if count > 1:
                del self.edges[a, b]
                shape = self.shapes[a][1]
                times = self.nir.Scale(scale=np.full(shape or (), float(count), dtype=np.float32))
                between = self.add(f"{a}.times{count}", times, Value({a: 1}, shape), shape)
                self.edges[next(iter(between.sources)), b] += 1


def diagonal(nir: Any, weight: np.ndarray, bias: np.ndarray, space: tuple[int, ...]) -> Any:
    """An Affine, or a convolution whose kernel has one place."""
    if not space:
        return nir.Affine(weight=weight, bias=bias)
    if len(space) == 1:
        return nir.Conv1d(input_shape=space[0], weight=weight, stride=1, padding=0, dilation=1, groups=1, bias=bias)
    return nir.Conv2d(
        input_shape=space, weight=weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, bias=bias
    )
