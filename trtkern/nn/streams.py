"""Streaming: a model that gets its sequence in parts, a step or a chunk at a time, and gives what one call would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trtkern._torch import recording
from trtkern.nn._neuron import AnyState, NeuronLayer, carriers
from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.nn.delay import Delay
from trtkern.nn.recurrent import Recurrent
from trtkern.ops import checks
from trtkern.ops.spikes import Spikes, dense

Layer = NeuronLayer | Recurrent | Delay
"""What has a state of its own."""


class Stream:
    """A model over sequences that come in parts: what the parts give, put together, is what one call gives.

    The states of the neurons are held here and not in the layers, so that several streams of one model do not touch
    each other, and the model can be called as ever in between. Every neuron layer and every ``Delay`` in the model is
    carried, whatever holds it. Gradients flow from one part to those before it, as they do within a sequence, until
    ``detach()`` cuts them off. All else of the model has to treat each step by itself, as convolutions, poolings and
    a BatchNorm in evaluation do.

    Args:
        model: takes and gives sequences [T, B, ...], with neurons or delays of ``trtkern.nn`` among its layers. Its
            mode, its weights and its hooks are its own, and may change between calls.

    Raises:
        TypeError: no module; a compiled one, in which no Python of the layers runs; one with a recurrent layer of torch
            (``nn.GRU``), whose state is not carried.
        ValueError: neither neurons nor delays in it.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"stream: expected a module, got {checks.describe(model)}")
        self.model = model
        self._names: dict[Layer, str] = {}
        self._norms: list[tuple[str, Any]] = []
        inside = {id(module.neuron) for module in model.modules() if isinstance(module, Recurrent)}
        for name, module in model.named_modules():
            _refuse(name, module)
            if isinstance(module, (NeuronLayer, Delay, Recurrent)) and id(module) not in inside:
                self._names[module] = name or ITSELF
            elif isinstance(module, (_BatchNorm, BatchNormLIF)):
                self._norms.append((name or ITSELF, module))
        if not self._names:
            raise ValueError(
                f"stream: expected neurons of trtkern.nn in the model, got {type(model).__name__} without any; a model "
                "without neurons holds no state: call it with each part"
            )
        self._states: dict[str, AnyState] = {}
        self._lock = RLock()

    @property
    def state(self) -> dict[str, AnyState]:
        """The states after what came so far, by the path of each neuron layer in the model; empty at the start.

        A state is what the layer's ``return_state`` gives: [B, C, ...] float32, or a NamedTuple of them, or of a
        ``Delay`` the last steps of its input. What is
        assigned may have plain tuples in the places of those, and may lack layers, which then start at zero. A layer
        that a model calls several times has a state for each: "lif", "lif#2", ... A model that is a neuron layer
        itself has the path "itself".

        Raises (when assigned):
            TypeError: no dict, or a state that is no tensor and no tuple of tensors.
            ValueError: a path at which the model has no neuron layer, or another number of states than that has.
        """
        return dict(self._states)

    @state.setter
    def state(self, states: Mapping[str, AnyState]) -> None:
        if not isinstance(states, Mapping):
            raise TypeError(f"stream: expected state to be a dict of states by path, got {checks.describe(states)}")
        layers = {name: layer for layer, name in self._names.items()}
        for key, state in states.items():
            name = _path(key)
            if name not in layers:
                raise ValueError(
                    f"stream: expected the paths of neuron layers in state, got {key!r}; the model has "
                    f"{', '.join(layers)}"
                )
            _check_kind(_who(name, layers[name]), layers[name], state)
        with self._lock:
            self._states = dict(states)

    def reset(self) -> None:
        """Forget what came so far: the next step is the first one of new sequences."""
        with self._lock:
            self._states = {}

    def detach(self) -> None:
        """Let no gradient flow from later parts into those so far: backpropagation through time, truncated here."""
        with self._lock:
            self._states = {key: _each(Tensor.detach, state) for key, state in self._states.items()}

    def chunk(self, x: Any) -> Any:
        """What the model gives for the next steps, x [T, B, ...] with any T.

        Raises:
            RuntimeError: a BatchNorm that normalises with the statistics of all steps together; called within
                torch.compile, torch.export or torch.jit.trace; the model ran no neuron, or one that is not in it.
            TypeError, ValueError: as the model; another batch than before; a neuron that is given a ``v0``. The states
                are then as they were.
        """
        return self._run(x, lambda y: y)

    def step(self, x: Tensor) -> Tensor:
        """What the model gives for the next step, x [B, ...]: [B, ...], dense where it gives packed spikes.

        An image that is shown at every step is given at every step, also to a model that has ``timesteps``.

        Raises:
            TypeError: x is no tensor, or the model gives no tensor and no ``Spikes``.
            RuntimeError, ValueError: as ``chunk``.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"stream: expected one step [B, ...] as a tensor, got {checks.describe(x)}")
        axis = getattr(self.model, "time_dim", 0)
        return self._run(x.unsqueeze(axis), lambda y: _one(y, axis))

    def _run(self, x: Any, made: Callable[[Any], Any]) -> Any:
        if torch.compiler.is_compiling() or recording():
            raise RuntimeError(
                "stream: expected to be called as it is, got a call within torch.compile, torch.export or "
                "torch.jit.trace, which would take the states of the moment for constants; compile a function of one "
                "step and its states: layer.step(x, v)"
            )
        self._check_norms()
        with self._lock:
            held = _Held(self._names, self._states)
            token = carriers.set(held)
            try:
                y = made(self.model(x))
            finally:
                carriers.reset(token)
            if not held.ended:
                raise RuntimeError(
                    f"stream: expected {type(self.model).__name__} to run the neurons in it, in the thread that calls "
                    "it, got none; nn.DataParallel and compiled functions hide them: stream the model within"
                )
            self._states = {**self._states, **held.ended}
        return y

    def _check_norms(self) -> None:
        found = [(name, norm) for name, norm in self._norms if norm.training or norm.running_mean is None]
        if not found:
            return
        name, norm = found[0]
        mode = "without running statistics" if norm.running_mean is None else "in training"
        cure = "track_running_stats=True" if norm.running_mean is None else "model.eval() or freeze_norms(model)"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RuntimeError(
            f"stream: expected every BatchNorm to normalise with its running statistics, got {name!r} "
            f"({type(norm).__name__}) {mode}{more}: statistics of the batch are those of all steps together, which do "
            f"not come together here; use {cure}"
        )

    def __repr__(self) -> str:
        return f"Stream({type(self.model).__name__}, {len(self._names)} neuron layers, {len(self._states)} states)"


def stream(model: nn.Module) -> Stream:
    """A model over sequences that come in parts (``Stream``), from their beginning.

    Args:
        model: a module over sequences [T, B, ...]; it is not changed.
    """
    return Stream(model)


ITSELF = "itself"
"""The path of a model that is a layer."""


class _Held:
    """The states during one call of the model (``Carrier``)."""

    def __init__(self, names: Mapping[Layer, str], states: Mapping[str, AnyState]) -> None:
        self.ended: dict[str, AnyState] = {}
        self._names, self._states = names, states
        self._uses: dict[Layer, int] = {}

    def start(self, layer: Layer, x: Tensor, v0: AnyState) -> AnyState:
        """The state that the layer ended in, or v0 where that is what it gave within this call: a loop over time."""
        name = self._names.get(layer)
        if name is None:
            raise RuntimeError(
                f"stream: expected the neurons that run to be in the model since the stream was made, got another "
                f"{type(layer).__name__}; make it a submodule, and the stream after it"
            )
        who = _who(name, layer)
        if v0 is not None:
            last = self.ended.get(self._key(layer))
            if last is None or not all(a is b for a, b in zip(_parts(v0), _parts(last), strict=False)):
                raise ValueError(f"{who} expected no v0, since the stream holds the state, got one; leave v0 out")
            return v0
        self._uses[layer] = self._uses.get(layer, 0) + 1
        state = self._states.get(self._key(layer))
        if state is not None:
            _check_fit(who, layer, x, state)
        return state

    def end(self, layer: Layer, state: AnyState) -> None:
        """What the layer's latest call ended in."""
        self.ended[self._key(layer)] = state

    def _key(self, layer: Layer) -> str:
        use = self._uses.get(layer, 0)
        return self._names[layer] if use < 2 else f"{self._names[layer]}#{use}"


def _refuse(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        raise TypeError(
            f"stream: {name or ITSELF!r} ({kind}) expected to be a module that is not compiled, got one that "
            "torch.compile compiled: none of the Python that carries a state runs in it; stream the model that was "
            "given to torch.compile"
        )
    if not getattr(module, "carried", True):
        raise TypeError(
            f"stream: {name or ITSELF!r} ({kind}) expected to hold no state but that of neurons, got a cycle, "
            "whose state a stream does not carry; a NodeGraph's step(x, state) takes and returns all of it"
        )
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        raise TypeError(
            f"stream: {name or ITSELF!r} ({kind}) expected to be no recurrent layer of torch, whose state a stream "
            "does not carry; carry it by hand, and stream what is before and behind it"
        )


def _path(key: Any) -> str:
    """The path of the layer that a key of ``Stream.state`` names."""
    name, mark, use = str(key).rpartition("#")
    return name if mark and use.isdecimal() and int(use) > 1 else str(key)


def _who(name: str, layer: Layer) -> str:
    return f"stream: layer {name!r} ({type(layer).__name__})"


def _parts(state: AnyState) -> Iterator[Tensor | None]:
    return iter(state if isinstance(state, (tuple, list)) else (state,))


def _each(run: Callable[[Tensor], Tensor], state: AnyState) -> AnyState:
    """The state with run(part) in the place of each part."""
    if isinstance(state, Tensor) or state is None:
        return None if state is None else run(state)
    parts = [run(part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def _check_kind(who: str, layer: Layer, state: AnyState) -> None:
    names = layer.state_names
    parts = list(_parts(state))
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"{who} expected a state of tensors, got {checks.describe(part)}")
    several = isinstance(state, (tuple, list))
    if (several and len(parts) != len(names)) or (several and len(names) == 1):
        shown = "one tensor" if len(names) == 1 else f"the {len(names)} states {', '.join(names)}"
        raise ValueError(f"{who} expected {shown}, got {len(parts)} in a {type(state).__name__}")


def _check_fit(who: str, layer: Layer, x: Tensor, state: AnyState) -> None:
    """The state belongs to sequences like x."""
    try:
        if isinstance(layer, Delay):
            layer.check_state(who, state, x)
        elif isinstance(state, (tuple, list)):
            checks.states(who, state, x, layer.state_names)
        else:
            checks.state(who, state, x, layer.state_names)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}. It is the state after the steps before: call reset() where others begin") from None


def _one(y: Any, axis: int) -> Tensor:
    """The one step of what a model gave."""
    if isinstance(y, Spikes):
        y = dense(y)
    if not isinstance(y, Tensor):
        raise TypeError(
            f"stream: expected the model to give a tensor or Spikes, got {checks.describe(y)}; call "
            "chunk(x.unsqueeze(0)), which gives what the model gives"
        )
    if not -y.dim() <= axis < y.dim() or y.shape[axis] != 1:
        raise ValueError(
            f"stream: expected one step from the model for one step, with time on axis {axis}, got "
            f"{checks.describe(y)}; call chunk(x.unsqueeze(0)), which gives what the model gives"
        )
    return y.squeeze(axis)
