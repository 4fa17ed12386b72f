"""A graph of NIR as a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn

from trtkern.interop.nir.dialects import Clock, array, clock, dialect_of, plain
from trtkern.interop.nir.graph import INPUT, OUTPUT, NodeGraph, keys_of, objections_to
from trtkern.interop.nir.layers import PerNeuron, Scale
from trtkern.interop.nir.problems import Problems, one_of, package, refuse
from trtkern.interop.nir.reading_neurons import FIELDS, LEARNED, Wishes, neuron, varies
from trtkern.nn import Delay, TimeSequential

OP = "from_nir"


def from_nir(
    graph: Any,
    *,
    dt: float,
    unit: str = "s",
    graph_unit: str = "s",
    method: str | None = None,
    dialect: str = "nir",
    reset: str | None = None,
    fire_on_equal: bool | None = None,
    learn: Iterable[str] = (),
    round_delays: bool = False,
    surrogate: Any = "triangle",
    alpha: float | None = None,
    detach_reset: bool = False,
    backend: str = "auto",
) -> nn.Module:
    """The model of a NIR graph, over sequences [T, B, ...].

    A chain is a ``TimeSequential``; a graph with sums or cycles is a ``NodeGraph``. Graphs inside the graph become
    part of it, their nodes named "graph.node". Weights are Parameters; ``learn`` says what of the neurons is learned.

    NIR writes tau dv/dt = (v_leak - v) + r I. Of that a step of the length dt makes v = decay v + (1 - decay)
    (v_leak + r I), with decay = 1 - dt / tau ("euler") or exp(-dt / tau) ("exponential").

    Args:
        graph: a ``nir.NIRGraph``, or the path of a file that ``nir.write`` wrote.
        dt: the length of a step.
        unit, graph_unit: what dt and the times of the graph are measured in: "s", "ms", "us" or "ns".
        method: "euler" or "exponential"; None is that of the dialect.
        dialect: who wrote the graph: "nir" for its definition, or "spikingjelly", "snntorch", "norse", "sinabs".
        reset: "hard", to v_reset, or "soft", by the threshold; None is what the graph says. NIR knows the hard one.
        fire_on_equal: whether neurons fire where v equals the threshold; None is what the graph and the dialect say.
        learn: names from "decay", "gain", "decay_syn", "gain_syn", "v_leak", "v_threshold", "v_reset".
        round_delays: round delays to whole steps, instead of refusing others.
        surrogate, alpha, detach_reset, backend: of all neurons, as in ``LIF``.

    Raises:
        ImportError: the package nir is missing or too old.
        TypeError, ValueError: an argument is out of range; or the graph has nodes that have no equal here, numbers that
            a layer does not take, lost edges, or a cycle without a state. All of them are named together.
    """
    spoken = dialect_of(OP, dialect)
    measure = clock(OP, dt, unit, graph_unit, method, spoken, True)
    learned = frozenset([learn] if isinstance(learn, str) else learn)
    if not learned <= set(LEARNED):
        strange = ", ".join(sorted(map(str, learned - set(LEARNED))))
        refuse(OP, f"learn to hold {one_of(LEARNED)}", strange, "take it out")
    if reset not in (None, "hard", "soft"):
        refuse(OP, "reset to be 'hard', 'soft' or None", repr(reset), "choose one of them")
    spiking = {"surrogate": surrogate, "alpha": alpha, "detach_reset": detach_reset}
    wishes = Wishes(measure, spoken, reset, fire_on_equal, learned, spiking, backend)
    graph = _graph(graph)
    problems = Problems(OP)
    nodes, edges = _flat(graph, problems)
    problems.settle()
    layers: dict[str, nn.Module | None] = {
        name: _layer(name, node, wishes, round_delays, problems) for name, node in nodes.items()
    }
    held = [name for name, node in nodes.items() if type(node).__name__ in STATES and not _instant(node, measure)]
    for objection in objections_to(list(nodes), edges, held):
        problems.lines.append(objection)
    _same_sizes(nodes, edges, problems)
    problems.settle()
    made = {name: layer for name, layer in layers.items() if layer is not None}
    order = _chain(list(made), edges)
    if order is None:
        return NodeGraph(made, edges)
    keys = keys_of(order)
    return TimeSequential(OrderedDict((keys[name], made[name]) for name in order))


STATES = ("LIF", "IF", "LI", "I", "CubaLIF", "CubaLI", "Delay")
"""The nodes that keep something from step to step."""


def _graph(graph: Any) -> Any:
    nir = package(OP)
    if isinstance(graph, (str, PathLike)):
        # Its check of types fails for kernels that are not square and for groups; what matters is checked here.
        graph = nir.read(graph, type_check=False)
    if not isinstance(graph, nir.NIRGraph):
        got = type(graph).__name__
        refuse(OP, "a nir.NIRGraph or the path of one", got, "a node alone is nir.NIRGraph.from_list(node)", TypeError)
    return graph


def _flat(graph: Any, problems: Problems) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Nodes and edges without graphs inside, and without the Inputs and Outputs that join them."""
    nodes: dict[str, Any] = {}
    edges: list[tuple[str, str]] = []
    _inline(graph, "", nodes, edges, problems)
    known, names = set(nodes), {}
    for a, b in edges:
        for name in (a, b):
            if name not in known:
                problems.add(name, "edge", "the name of a node", f"an edge ({a!r}, {b!r})", "add the node or remove it")
    for kind, end, joined in (("Input", INPUT, 1), ("Output", OUTPUT, 0)):
        outer = [name for name in graph.nodes if type(graph.nodes[name]).__name__ == kind]
        if len(outer) != 1:
            got = ", ".join(map(repr, outer)) or "none"
            problems.add("", "NIRGraph", f"one {kind}", got, f"give the graph one {kind} node")
        elif not any(edge[1 - joined] == outer[0] for edge in edges):
            problems.add(outer[0], kind, "an edge at it", "none", "connect it")
        names.update(dict.fromkeys(outer, end))
    inner = [n for n, node in nodes.items() if type(node).__name__ in ("Input", "Output") and n not in names]
    for name in inner:
        before, behind = [a for a, b in edges if b == name], [b for a, b in edges if a == name]
        edges = [edge for edge in edges if name not in edge] + [(a, b) for a in before for b in behind]
    for name in nodes:
        if name not in names:
            names[name] = f"{name}_" if name in (INPUT, OUTPUT) else name
    kept = {names[n]: node for n, node in nodes.items() if type(node).__name__ not in ("Input", "Output")}
    return kept, list(dict.fromkeys((names.get(a, a), names.get(b, b)) for a, b in edges))


def _inline(graph: Any, path: str, nodes: dict[str, Any], edges: list[tuple[str, str]], problems: Problems) -> None:
    """Add the nodes and edges of a graph under ``path``; an edge to a graph leads to its Input, one from it comes from
    its Output."""
    ends: dict[str, tuple[str, str]] = {}
    for name, node in graph.nodes.items():
        whole = path + name
        if type(node).__name__ != "NIRGraph":
            nodes[whole] = node
            continue
        _inline(node, f"{whole}.", nodes, edges, problems)
        found = []
        for kind in ("Input", "Output"):
            own = [n for n, inside in node.nodes.items() if type(inside).__name__ == kind]
            if len(own) != 1:
                got = ", ".join(map(repr, own)) or "none"
                problems.add(whole, "NIRGraph", f"one {kind}", got, f"give the graph one {kind} node")
            found.append(f"{whole}.{own[0]}" if own else whole)
        ends[name] = (found[0], found[1])
    for a, b in graph.edges:
        edges.append((ends[a][1] if a in ends else path + a, ends[b][0] if b in ends else path + b))


def _layer(path: str, node: Any, wishes: Wishes, round_delays: bool, problems: Problems) -> nn.Module | None:
    kind = type(node).__name__
    if kind in FIELDS:
        return neuron(path, node, wishes, problems)
    if kind == "Delay":
        return _delay(path, node, wishes.clock, round_delays, problems)
    if kind in OTHERS:
        return OTHERS[kind](path, node, problems)
    known = ", ".join(sorted({*FIELDS, *OTHERS, "Delay", "Input", "Output", "NIRGraph"}))
    problems.add(path, kind, f"a node that has an equal here ({known})", kind, "replace it in the graph")
    return None


def _weights(layer: Any, weight: Any, bias: Any) -> Any:
    """The layer, made on "meta", with these numbers as its Parameters."""
    layer.weight = nn.Parameter(_tensor(weight))
    if bias is not None:
        layer.bias = nn.Parameter(_tensor(bias))
    return layer


def _tensor(value: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(plain(value)), dtype=torch.float32)


def _linear(path: str, node: Any, problems: Problems) -> nn.Module | None:
    weight, bias = np.asarray(plain(node.weight)), getattr(node, "bias", None)
    if weight.ndim != 2:
        do = "one matrix goes with vectors; write a graph with one such node for each"
        problems.add(path, type(node).__name__, "a weight (out, in)", f"the shape {weight.shape}", do)
        return None
    return _weights(nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta"), weight, bias)


def _conv(path: str, node: Any, problems: Problems) -> nn.Module | None:
    kind, weight = type(node).__name__, np.asarray(plain(node.weight))
    axes, layer = (1, nn.Conv1d) if kind == "Conv1d" else (2, nn.Conv2d)
    groups = int(np.asarray(plain(node.groups)))
    if weight.ndim != axes + 2:
        problems.add(path, kind, f"a weight with {axes + 2} axes", f"the shape {weight.shape}", "write the node again")
        return None
    if groups < 1 or weight.shape[0] % groups:
        problems.add(path, kind, "groups that divide the channels", f"{groups} of {weight.shape[0]}", "change them")
        return None
    padding = node.padding.decode() if isinstance(node.padding, bytes) else node.padding
    numbers = {"stride": _ints(node.stride, axes), "dilation": _ints(node.dilation, axes), "groups": groups}
    numbers["padding"] = padding if isinstance(padding, str) else _ints(padding, axes)
    sizes = weight.shape[1] * groups, weight.shape[0], weight.shape[2:]
    try:
        made = layer(*sizes, bias=node.bias is not None, device="meta", **numbers)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        problems.add(path, kind, "a convolution that torch has", str(error), "change the node")
        return None
    return _weights(made, weight, node.bias)


def _ints(value: Any, axes: int) -> tuple[int, ...]:
    found = [int(n) for n in np.asarray(plain(value)).reshape(-1)]
    return tuple(found * axes if len(found) == 1 else found)


def _pair(value: Any) -> tuple[int, int]:
    first, second = _ints(value, 2)
    return first, second


def _pool(path: str, node: Any, problems: Problems) -> nn.Module:
    kernel, stride, padding = (_pair(value) for value in (node.kernel_size, node.stride, node.padding))
    # A sum is an average that is divided by 1.
    divisor = 1 if type(node).__name__ == "SumPool2d" else None
    return nn.AvgPool2d(kernel, stride, padding, divisor_override=divisor)


def _flatten(path: str, node: Any, problems: Problems) -> nn.Module:
    start, end = int(np.asarray(node.start_dim)), int(np.asarray(node.end_dim))
    # In front of a sample stands the batch.
    return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)


def _scale(path: str, node: Any, problems: Problems) -> nn.Module:
    return Scale(_tensor(node.scale))


OTHERS = {
    "Affine": _linear, "Linear": _linear, "Conv1d": _conv, "Conv2d": _conv, "SumPool2d": _pool, "AvgPool2d": _pool,
    "Flatten": _flatten, "Scale": _scale,
}  # fmt: skip
"""The nodes that are no neurons."""


def _delay(path: str, node: Any, measure: Clock, rounds: bool, problems: Problems) -> nn.Module | None:
    steps = array(node.delay) / measure.step
    whole = np.rint(steps)
    if steps.size == 0 or not np.isfinite(steps).all() or steps.min() < 0:
        got = "no number" if steps.size == 0 else f"{steps.min():g} to {steps.max():g} steps"
        problems.add(path, "Delay", "finite delays >= 0", got, "change the delay")
        return None
    if not rounds and (np.abs(steps - whole) > 1e-6 * np.maximum(1.0, whole)).any():
        worst = steps.flat[int(np.abs(steps - whole).argmax())]
        do = "pass a dt that divides it, or round_delays=True"
        problems.add(path, "Delay", f"whole steps of {measure.step:g}", f"{worst:g} steps", do)
        return None
    most = int(whole.max())
    if (whole == whole.flat[0]).all():
        return Delay(None, most, float(most))
    axes = varies(whole)
    along = whole if len(axes) > 1 else np.moveaxis(whole, axes[0], 0).reshape(whole.shape[axes[0]], -1)[:, 0]
    layer = Delay(along.size, most, _tensor(along).flatten(), channel_dim=axes[0] + 2 if len(axes) == 1 else 2)
    return PerNeuron(layer) if len(axes) > 1 else layer


def _instant(node: Any, measure: Clock) -> bool:
    """Whether it is a delay by less than half a step, which keeps nothing."""
    return type(node).__name__ == "Delay" and bool((np.rint(array(node.delay) / measure.step) < 1).any())


def _same_sizes(nodes: dict[str, Any], edges: list[tuple[str, str]], problems: Problems) -> None:
    """A problem for each edge between vectors of different lengths."""
    for a, b in edges:
        given, taken = _length(nodes.get(a), -2), _length(nodes.get(b), -1)
        if given is not None and taken is not None and given != taken:
            kind = type(nodes[b]).__name__
            problems.add(b, kind, f"{taken} numbers", f"{given} from {a!r}", "connect nodes of one size")


def _length(node: Any, axis: int) -> int | None:
    """How many numbers a node of vectors gives (axis -2 of its weight) or takes (axis -1), where it says so."""
    kind = type(node).__name__
    if kind in ("Affine", "Linear"):
        shape = np.shape(plain(node.weight))
        return int(shape[axis]) if len(shape) == 2 else None
    if kind not in FIELDS:
        return None
    shapes = [np.shape(plain(getattr(node, name))) for name in FIELDS[kind]]
    longest = [shape[0] for shape in shapes if len(shape) == 1 and shape[0] > 1]
    return int(longest[0]) if longest and all(len(shape) < 2 for shape in shapes) else None


def _chain(names: list[str], edges: list[tuple[str, str]]) -> list[str] | None:
    """The nodes in their order, if each has one edge in and one out, and they are one line."""
    order = list(_followed(edges))
    return order if len(order) == len(names) and len(edges) == len(names) + 1 else None


def _followed(edges: list[tuple[str, str]]) -> Iterator[str]:
    following: dict[str, list[str]] = {}
    for a, b in edges:
        following.setdefault(a, []).append(b)
    name, passed = INPUT, {INPUT}
    while len(following.get(name, ())) == 1:
        name = following[name][0]
        if name == OUTPUT or name in passed:
            return
        passed.add(name)
        yield name
