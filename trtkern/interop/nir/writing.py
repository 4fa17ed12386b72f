"""A model as a graph of NIR."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from trtkern.interop.nir.building import Builder, Joint, Value
from trtkern.interop.nir.dialects import clock, dialect_of
from trtkern.interop.nir.graph import INPUT, OUTPUT, NodeGraph
from trtkern.interop.nir.problems import Problems, package, refuse
from trtkern.interop.nir.writing_layers import LEAVES, leaf
from trtkern.interop.stepping import FromStart, OverTimeNetwork, Stepping
from trtkern.nn import BatchNormLIF, ConvBatchNormLIF, OverTime, TimeSequential, UnfusedBatchNormLIF
from trtkern.nn._leaf import Leaf
from trtkern.nn.convert import hooks_of
from trtkern.nn.time import takes_time
from trtkern.ops import checks

OP = "to_nir"


def to_nir(
    model: nn.Module,
    input_shape: int | Sequence[int],
    *,
    dt: float,
    unit: str = "s",
    graph_unit: str = "s",
    method: str | None = None,
    dialect: str = "nir",
) -> Any:
    """The NIR graph of a model, a ``nir.NIRGraph``; ``nir.write(path, graph)`` writes the file.

    A step of v = decay v + gain x is written as tau dv/dt = (v_leak - v) + r I with decay = 1 - dt / tau ("euler") or
    exp(-dt / tau) ("exponential"), and r = gain / (1 - decay). A BatchNorm is written with its running statistics: into
    the weights of the convolution or Linear before it, where that has no other reader. This differs from the norm by
    what float32 rounds. The parameters of neurons are written in float64, the weights as they are.

    Args:
        model: layers of ``trtkern.nn`` and ``torch.nn``, in ``eval()`` where it has a BatchNorm or dropout. What is no
            chain is found by ``torch.fx``.
        input_shape: (C, H, W) or (N,) of one sample, without time and batch.
        dt: the length of a step.
        unit, graph_unit: what dt and the times of the graph are measured in: "s", "ms", "us" or "ns".
        method: "euler" or "exponential"; None is that of the dialect.
        dialect: who reads the graph: "nir" for its definition, "trtkern" for a file that is read here again and may
            hold in its metadata what NIR has no field for, or "spikingjelly", "snntorch", "norse", "sinabs".

    Raises:
        ImportError: the package nir is missing or too old.
        TypeError, ValueError: an argument is out of range; or the model has layers or settings that NIR, or the reader,
            has no equal for. All of them are named together, and the model is left as it is.
    """
    spoken = dialect_of(OP, dialect)
    measure = clock(OP, dt, unit, graph_unit, method, spoken, False)
    if not isinstance(model, nn.Module):
        refuse(OP, "a model", checks.describe(model), "pass an nn.Module", TypeError)
    shape = _shape(input_shape)
    nir, problems = package(OP), Problems(OP)
    builder = Builder(nir, measure, spoken, problems)
    # A network for loops over time has no axis of time.
    kinds = {type(module) for module in model.modules()}
    by_steps = Stepping in kinds and OverTimeNetwork not in kinds
    given = builder.add(INPUT, nir.Input(list(shape)), Value({}, shape, by_steps), shape)
    if isinstance(model, NodeGraph):
        made = _nodes(builder, "", model, given)
    else:
        made = convert(builder, "", model, given)
    builder.add(OUTPUT, nir.Output(list(made.shape or ())), made, made.shape)
    problems.settle()
    graph = builder.graph({"dt": measure.step, "method": measure.method, "dialect": dialect})
    _readable(graph, "", spoken.reads, problems, dialect)
    problems.settle()
    return graph


def _shape(input_shape: Any) -> tuple[int, ...]:
    found = (input_shape,) if isinstance(input_shape, int) else input_shape
    sizes = isinstance(found, (tuple, list)) and len(found) > 0
    if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in found):
        got = checks.describe(input_shape)
        refuse(OP, "input_shape as (C, H, W) or (N,), ints > 0", got, "leave out time and batch", TypeError)
    return tuple(found)


def _readable(graph: Any, path: str, reads: frozenset[str] | None, problems: Problems, dialect: str) -> None:
    """A problem for each node that the reader does not know."""
    for name, node in graph.nodes.items():
        kind = type(node).__name__
        if reads is not None and kind not in reads:
            known = ", ".join(sorted(reads - {"Input", "Output", "NIRGraph"}))
            do = "replace the layer, or write the graph for another reader"
            problems.add(path + name, kind, f"a node that the reader of {dialect} knows ({known})", kind, do)
        if kind == "NIRGraph":
            _readable(node, f"{path}{name}.", reads, problems, dialect)


def convert(builder: Builder, path: str, module: nn.Module, value: Value, *others: Any, **named: Any) -> Value:
    """What a module makes of a value, with its nodes added."""
    own = type(module).forward
    if (hooks := hooks_of(module)) is not None:
        _refuse(builder, path, module, "a layer without hooks", hooks, "remove them, or make them layers")
    if isinstance(module, (BatchNormLIF, ConvBatchNormLIF, UnfusedBatchNormLIF)):
        return _normed(builder, path, module, value, *others, **named)
    if others or any(setting not in (None, False) for setting in named.values()):
        _refuse(builder, path, module, "a call with one input", "more arguments", "call it with x alone")
    if isinstance(module, OverTime):
        inner = convert(builder, _join(path, "module"), module.module, value._replace(folded=True))
        return inner._replace(folded=value.folded)
    if isinstance(module, OverTimeNetwork):
        inner = convert(builder, _join(path, "net"), module.net, value._replace(folded=True))
        return inner._replace(folded=value.folded)
    if isinstance(module, (Stepping, FromStart)):
        if module.start != 0:
            do = "NIR says nothing of the start; pass start=0.0"
            _refuse(builder, path, module, "a potential of 0 before the first step", f"start={module.start:g}", do)
        inner = convert(builder, _join(path, "neuron"), module.neuron, value._replace(folded=False))
        return inner._replace(folded=value.folded)
    if isinstance(module, NodeGraph):
        return _inside(builder, path, module, value)
    if own in (nn.Sequential.forward, TimeSequential.forward):
        for name, child in module._modules.items():
            if child is None:
                continue
            folds = own is TimeSequential.forward and not takes_time(child)
            made = convert(builder, _join(path, name), child, value._replace(folded=value.folded or folds))
            value = made._replace(folded=value.folded)
        return value
    if (single := leaf(builder, path, module, value)) is not None:
        return single
    if isinstance(module, Leaf) or type(module).__module__.startswith("torch.nn.") or not list(module.children()):
        do = "replace it by layers that NIR has; docs/nir.md lists them"
        _refuse(builder, path, module, "a layer that has a node in NIR", type(module).__name__, do)
        return Value({}, None, value.folded)
    return _traced(builder, path, module, value)


def _refuse(builder: Builder, path: str, module: nn.Module, expected: str, got: str, do: str) -> None:
    builder.problems.add(path, type(module).__name__, expected, got, do)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _normed(
    builder: Builder, path: str, module: Any, value: Value, residual: Any = None, v0: Any = None, **named: Any
) -> Value:
    """(A convolution,) a BatchNorm, a residual, neurons, a pooling."""
    if v0 is not None or named.get("return_state"):
        _refuse(builder, path, module, "a call without states", "v0 or return_state", "call it with x alone")
    residual = named.get("residual", residual)
    if isinstance(module, ConvBatchNormLIF):
        value = convert(builder, _join(path, "conv"), module.conv, value)
        return convert(builder, _join(path, "norm"), module.norm, value, residual)
    fused = isinstance(module, BatchNormLIF)
    norm = module if fused else module.norm
    normed = leaf(builder, _join(path, "norm"), norm, value._replace(folded=True), module.channel_dim)
    value = (normed or value)._replace(folded=value.folded)
    if residual is not None:
        value = builder.total(path, type(module).__name__, [value, residual])
    value = convert(builder, _join(path, "lif"), module.lif, value)
    pool = nn.AvgPool2d(2) if fused and module.pool == 2 else module._modules.get("pool")
    if pool is not None:
        pooled = convert(builder, _join(path, "pool"), pool, value._replace(folded=True))
        value = pooled._replace(folded=value.folded)
    return value


def _inside(builder: Builder, path: str, module: NodeGraph, value: Value) -> Value:
    """A graph within a model as a graph within the graph."""
    nir = builder.nir
    inner = Builder(nir, builder.clock, builder.dialect, builder.problems, _join(builder.path, path))
    given = inner.add(INPUT, nir.Input(list(value.shape or ())), Value({}, value.shape), value.shape)
    made = _nodes(inner, "", module, given)
    inner.add(OUTPUT, nir.Output(list(made.shape or ())), made, made.shape)
    if builder.problems.lines:
        return Value({}, made.shape, value.folded)
    return builder.add(path, inner.graph(), value, made.shape)


def _nodes(builder: Builder, path: str, module: NodeGraph, value: Value) -> Value:
    """The nodes of a graph; a node of it waits for one input, and gets the others when they are there."""
    made: dict[str, Value] = {INPUT: value}
    joints: dict[str, str] = {}
    rest = [name for part in module.parts for name in part.names]
    while rest:
        known = [name for name in rest if any(a in made for a in module._into[name])]
        if not known:
            break
        name = known[0]
        rest.remove(name)
        first = next(made[a] for a in module._into[name] if a in made)
        joint = builder.add(f"{_join(path, name)} joint", Joint(), Value({}, first.shape), first.shape)
        joints[name] = next(iter(joint.sources))
        layer = module.layer(name)
        made[name] = convert(builder, _join(path, name), layer, joint._replace(folded=not takes_time(layer)))
    for name, joint_name in joints.items():
        for a in module._into[name]:
            for source, count in made[a].sources.items():
                builder.edges[source, joint_name] += count
        builder.total(_join(path, name), "NodeGraph", [made[a] for a in module._into[name]])
    into = [made[a] for a in module._into[OUTPUT] if a in made]
    return builder.total(path, "NodeGraph", into)._replace(folded=value.folded)


class _Tracer(fx.Tracer):
    """Opens what is neither of torch.nn nor a layer that has nodes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        held = (*LEAVES, Leaf, OverTime, OverTimeNetwork, Stepping, FromStart, nn.Sequential)
        return isinstance(m, held) or super().is_leaf_module(m, module_qualified_name)


def _traced(builder: Builder, path: str, module: nn.Module, value: Value) -> Value:
    """What a module of anybody makes of a value, by the calls that torch.fx records."""
    try:
        recorded = _Tracer().trace(module)
    except Exception as error:
        do = "let its forward call layers and add their results, or pass its parts"
        got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        _refuse(builder, path, module, "a model that torch.fx can trace", got, do)
        return Value({}, None, value.folded)
    made: dict[fx.Node, Any] = {}
    taken = False
    for node in recorded.nodes:
        args, named = fx.node.map_arg((node.args, node.kwargs), lambda n: made[n])
        if node.op == "placeholder":
            made[node], taken = (value, True) if not taken else (node.args[0] if node.args else None, True)
        elif node.op == "output":
            result = args[0]
            if not isinstance(result, Value):
                _refuse(builder, path, module, "one tensor as its result", type(result).__name__, "return the spikes")
                return Value({}, None, value.folded)
            return result
        elif node.op == "call_module":
            inner = module.get_submodule(str(node.target))
            if not args or not isinstance(args[0], Value):
                _refuse(builder, _join(path, str(node.target)), inner, "x as its argument", "none", "pass it first")
                made[node] = Value({}, None)
            else:
                made[node] = convert(builder, _join(path, str(node.target)), inner, *args, **named)
        else:
            made[node] = _function(builder, path, module, node, args, named)
    return Value({}, None, value.folded)


ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
SAME = ("dense", "_unpooled", "_packed_again", "_shown", "_time_first", "contiguous", "clone")
"""Functions of the layers, and methods, that change no number and no axis of a sample."""


def _function(builder: Builder, path: str, module: nn.Module, node: fx.Node, args: Any, named: Any) -> Value:
    """What a function or a method makes of values: a sum, a flattening, or the same."""
    name = str(getattr(node.target, "__name__", node.target))
    values = [each for each in args if isinstance(each, Value)]
    first = values[0] if values else Value({}, None)
    connects = name == "_connected" and args[2] == "ADD"
    if node.target in ADDS or connects:
        if len(values) == 2 and not named:
            return builder.total(path, type(module).__name__, values)
    elif name in SAME:
        return first
    elif name == "join_time":
        return first._replace(folded=True)
    elif name == "part_time":
        return first._replace(folded=False)
    elif name == "_frames":
        # Images are shown at every step, frames come as they are; a flat network takes them as vectors.
        flat = nn.Flatten(2) if args[3] else nn.Identity()
        return convert(builder, _join(path, "frames"), flat, first)
    elif node.target in (torch.flatten, "flatten"):
        dims = [*args[1:], *named.values()]
        if all(isinstance(dim, int) for dim in dims):
            start = named.get("start_dim", args[1] if len(args) > 1 else 0)
            end = named.get("end_dim", args[2] if len(args) > 2 else -1)
            return convert(builder, _join(path, node.name), nn.Flatten(start, end), first)
    do = "NIR has sums of what layers give, and flattening; use layers for the rest"
    got = f"{name}({', '.join('x' if isinstance(a, Value) else repr(a) for a in args)})"
    builder.problems.add(_join(path, node.name), type(module).__name__, "sums and layers", got, do)
    return Value({}, None, first.folded)
