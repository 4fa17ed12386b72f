"""A graph of layers that need not be a chain: sums where edges meet, and cycles step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern.interop.nir.layers import PerNeuron
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import carrier
from trtkern.nn.delay import Delay
from trtkern.nn.time import TimeSequential, over_time, takes_time
from trtkern.ops import checks
from trtkern.ops.spikes import dense

INPUT, OUTPUT = "input", "output"
"""What the edges call the graph's own input and output."""


class GraphState(NamedTuple):
    """What a ``NodeGraph`` is after a step."""

    layers: dict[str, Any]
    """The state of each layer that has one."""
    before: dict[str, Tensor]
    """What the nodes that a cycle goes back to gave in that step, [B, ...]."""


class Part(NamedTuple):
    """Nodes that run together: one over the whole sequence, or those of a cycle step by step."""

    names: tuple[str, ...]
    """In the order in which a step runs them."""
    cyclic: bool


class NodeGraph(Leaf):
    """Layers and the edges between them, over sequences [T, B, ...]; where several edges meet, they are summed.

    What is in no cycle runs over the whole sequence, a layer at a time. What is in a cycle runs step by step. An edge
    that closes a cycle brings what its node gave in the step before, 0 in the first step; a ``Delay`` in the cycle
    takes as many steps as it says. Every cycle must have a state in it: a neuron or a ``Delay``.

    Args:
        nodes: the layers by name. One without time gets [T * B, ...], or [B, ...] in a cycle. One with a state has
            ``step``, as every neuron.
        edges: pairs of names, (from, to); "input" and "output" are the graph's own.

    Raises:
        ValueError: an edge without its node, a node that nothing reaches, a cycle without a state.
    """

    takes_time = True

    def __init__(self, nodes: Mapping[str, nn.Module], edges: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self.edges = list(dict.fromkeys((str(a), str(b)) for a, b in edges))
        self.names = list(nodes)
        objections = objections_to(self.names, self.edges, [n for n in nodes if has_state(nodes[n])])
        if objections:
            raise ValueError(f"NodeGraph: {'; '.join(objections)}")
        self._keys = keys_of(self.names)
        self.nodes = nn.ModuleDict({self._keys[name]: layer for name, layer in nodes.items()})
        self._into = {name: [a for a, b in self.edges if b == name] for name in [*self.names, OUTPUT]}
        lines = [name for name, layer in nodes.items() if _is_late(layer)]
        self.parts = parts_of(self.names, self._into, set(lines))
        self._late = {name for name in lines if any(p.cyclic and name in p.names for p in self.parts)}

    @property
    def carried(self) -> bool:
        """Whether a ``Stream`` carries all that it holds: there is no cycle, which holds what came before."""
        return not any(part.cyclic for part in self.parts)

    def layer(self, name: str) -> Any:
        """The layer of that name, as the edges have it."""
        return self.nodes[self._keys[name]]

    def forward(self, x: Tensor, v0: GraphState | None = None, *, return_state: bool = False) -> Any:
        """[T, B, ...] of x [T, B, ...]; with ``return_state`` also the state, which goes back in as ``v0``."""
        if is_proxy(x):
            return self(x, v0, return_state=return_state)
        x = dense(x)
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] < 1:
            raise ValueError(f"NodeGraph: expected x [T, B, ...], got {checks.describe(x)}; give it a sequence")
        state = GraphState({}, {}) if v0 is None else GraphState(dict(v0.layers), dict(v0.before))
        values: dict[str, Tensor] = {INPUT: x}
        for part in self.parts:
            if part.cyclic:
                self._steps(part, values, state)
            else:
                (name,) = part.names
                values[name] = self._sequence(name, _sum(values[a] for a in self._into[name]), state)
        y = _sum(values[a] for a in self._into[OUTPUT])
        return (y, state) if return_state else y

    def step(self, x: Tensor, v: GraphState | None = None) -> tuple[Tensor, GraphState]:
        """One step: y [B, ...] of x [B, ...], and the state for the next one."""
        y, state = self(x.unsqueeze(0), v, return_state=True)
        return y.squeeze(0), state

    def _sequence(self, name: str, x: Tensor, state: GraphState) -> Tensor:
        layer = self.layer(name)
        if has_state(layer):
            y, state.layers[name] = layer(x, state.layers.get(name), return_state=True)
            return dense(y)
        return dense(layer(x)) if takes_time(layer) else over_time(layer, x)

    def _step(self, name: str, x: Tensor, states: dict[str, Any]) -> Tensor:
        layer = self.layer(name)
        if has_state(layer):
            y, states[name] = layer.step(x, states.get(name))
            return y
        return dense(layer(x.unsqueeze(0))).squeeze(0) if takes_time(layer) else layer(x)

    def _steps(self, part: Part, values: dict[str, Tensor], state: GraphState) -> None:
        """Run a cycle over the sequence, and leave what each of its nodes gives in ``values``."""
        if carrier() is not None:
            raise RuntimeError(
                "stream: expected states of neurons and delays only, got a cycle, which has one that a stream does not "
                "carry; make the model a NodeGraph, and pass its state: y, state = model(x, state, return_state=True)"
            )
        own = {name: [a for a in self._into[name] if a in part.names] for name in part.names}
        given = {name: [values[a] for a in self._into[name] if a not in part.names] for name in part.names}
        # What comes from outside as steps: unbind has one backward for all of them, an index one each.
        outside = {name: [_sum(found).unbind(0)] if found else [] for name, found in given.items()}
        before = {name: state.before[name] for name in part.names if name in state.before}
        if not before:
            before = self._silence(part, own, outside)
        made: dict[str, list[Tensor]] = {name: [] for name in part.names}
        for t in range(next(iter(values.values())).shape[0]):
            now: dict[str, Tensor] = {}
            for name in part.names:
                if name in self._late:
                    # Its output is that of its buffer; what comes in now is put there when the step is done.
                    now[name] = self._oldest(name, before[name], state)
                    continue
                terms = [steps[t] for steps in outside[name]]
                terms += [now[a] if a in now else before[a] for a in own[name]]
                now[name] = self._step(name, _sum(terms), state.layers)
            for name in part.names:
                if name in self._late:
                    terms = [*(steps[t] for steps in outside[name]), *(now[a] for a in own[name])]
                    _, state.layers[name] = self.layer(name).step(_sum(terms), state.layers.get(name))
                made[name].append(now[name])
            before = now
        values.update({name: torch.stack(found) for name, found in made.items()})
        state.before.update(before)

    def _oldest(self, name: str, like: Tensor, state: GraphState) -> Tensor:
        """What a delay of a cycle gives before this step's input comes: it does not depend on that."""
        return self.layer(name).step(torch.zeros_like(like), state.layers.get(name))[0]

    def _silence(self, part: Part, own: dict[str, list[str]], outside: dict[str, list]) -> dict[str, Tensor]:
        """Zeros in the shapes that the nodes of a cycle give: what was before the first step."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for _ in part.names:
                for name in part.names:
                    terms = [steps[0] for steps in outside[name]]
                    terms += [found[a] for a in own[name] if a in found]
                    if name not in found and terms:
                        found[name] = torch.zeros_like(self._step(name, _sum(terms), {}))
        return found

    def extra_repr(self) -> str:
        """The edges."""
        return ", ".join(f"{a} -> {b}" for a, b in self.edges)


def has_state(layer: nn.Module) -> bool:
    """Whether it takes a state and gives one: a neuron, a ``Delay``, or another graph."""
    return hasattr(layer, "step")


def _is_late(layer: nn.Module) -> bool:
    """Whether what it gives never depends on what comes in at the same step: a delay by a step or more."""
    inner = layer.layer if isinstance(layer, PerNeuron) else layer
    return isinstance(inner, Delay) and inner.least >= 1


def keys_of(names: Sequence[str]) -> dict[str, str]:
    """A key for each name that torch takes as the name of a submodule: no dots, no attribute of a container."""
    keys: dict[str, str] = {}
    taken = {*dir(nn.ModuleDict()), *dir(TimeSequential())}
    for name in names:
        key = base = name.replace(".", "_") or "_"
        count = 1
        while key in taken:
            key, count = f"{base}_{count}", count + 1
        keys[name] = key
        taken.add(key)
    return keys


def objections_to(names: Sequence[str], edges: Sequence[tuple[str, str]], states: Iterable[str]) -> list[str]:
    """What stands against a graph, a sentence each: edges without nodes, nodes that nothing reaches or that lead
    nowhere, cycles in which nothing has a state."""
    known = {*names, INPUT, OUTPUT}
    lost = [f"edge {edge}: expected the names of nodes, got {name!r}" for edge in edges for name in edge
            if name not in known]  # fmt: skip
    lost += [f"edge {edge}: expected one from the input or to the output, got the other way round; remove it"
             for edge in edges if edge[0] == OUTPUT or edge[1] == INPUT]  # fmt: skip
    if lost:
        return lost
    found = []
    forth, back = _reached(INPUT, edges), _reached(OUTPUT, [(b, a) for a, b in edges])
    for name in [*names, OUTPUT]:
        if name not in forth:
            found.append(f"node {name!r}: expected a way from the input to it, got none; connect it or remove it")
        elif name not in back:
            found.append(f"node {name!r}: expected a way from it to the output, got none; connect it or remove it")
    held = set(states)
    still = [name for name in names if name not in held]
    inner = {name: [a for a, b in edges if b == name and a in still] for name in still}
    for component in components(still, inner):
        if len(component) > 1 or component[0] in inner[component[0]]:
            cycle = " -> ".join([*reversed(component), component[-1]])
            found.append(
                f"cycle {cycle}: expected a state in it, which takes a step, got none; put a neuron or a Delay there"
            )
    return found


def _reached(start: str, edges: Sequence[tuple[str, str]]) -> set[str]:
    found, front = {start}, [start]
    while front:
        name = front.pop()
        new = [b for a, b in edges if a == name and b not in found]
        found.update(new)
        front += new
    return found


def components(names: Sequence[str], into: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """The strongly connected components of a graph, each after those that it depends on (Tarjan 1972).

    Args:
        names: the nodes.
        into: those that each node gets its input from.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []
    for root in names:
        if root in index:
            continue
        work = [(root, iter(into[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            name, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    work.append((other, iter(into[other])))
                    break
                if other in stack:
                    low[name] = min(low[name], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == index[name]:
                    cut = stack.index(name)
                    found.append(tuple(stack[cut:]))
                    del stack[cut:]
    return found


def parts_of(names: Sequence[str], into: Mapping[str, Sequence[str]], lines: set[str]) -> list[Part]:
    """The components in the order in which they run, and the order of a step within a cycle.

    Args:
        names, into: the graph, whose input is ``INPUT``.
        lines: the delays of a step or more: a cycle can begin with them, since what they give is there already.
    """
    inner = {name: [a for a in into[name] if a != INPUT] for name in names}
    found = []
    for component in components(names, inner):
        # By name: a file does not keep the order of nodes.
        members = sorted(component)
        cyclic = len(members) > 1 or members[0] in inner[members[0]]
        found.append(Part(tuple(_order(members, into, lines) if cyclic else members), cyclic))
    return found


def _order(members: Sequence[str], into: Mapping[str, Sequence[str]], lines: set[str]) -> list[str]:
    """Nodes of a cycle: after what they need, as far as that goes; a cycle is opened where something comes in, at the
    first such node of ``members``."""
    done: list[str] = []
    while len(done) < len(members):
        rest = [name for name in members if name not in done]
        ready = [n for n in rest if n in lines or all(a in done for a in into[n] if a in members)]
        entries = [n for n in rest if any(a not in members for a in into[n])]
        done.append((ready or entries or rest)[0])
    return done


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
