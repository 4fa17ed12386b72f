"""Networks that were written for one time step: their neurons, and ``over_time``, which runs all steps at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from trtkern.interop.adapters import objection_to
from trtkern.nn._neuron import NeuronLayer
from trtkern.nn.convert import join
from trtkern.nn.time import takes_time
from trtkern.ops import checks
from trtkern.ops.spikes import dense

_FOLDED: ContextVar[tuple[int, int, list[Any]] | None] = ContextVar("_FOLDED", default=None)
"""Where an ``over_time`` network runs: T, T * B, and what has run in it that may run once."""


def folded() -> int | None:
    """T, where an ``over_time`` network runs: the first axis of every tensor in it is T * B; None elsewhere."""
    fold = _FOLDED.get()
    return None if fold is None else fold[0]


def once(what: Any, kind: str) -> None:
    """A layer, or a tensor that it updates, runs within ``over_time``: the loop would carry it from use to use.

    Raises:
        ValueError: it has run before.
    """
    fold = _FOLDED.get()
    if fold is None:
        return
    if any(each is what for each in fold[2]):
        raise ValueError(
            f"over_time: expected each layer that keeps something to run once a step, got a {kind} that runs twice: "
            "in the loop its second call goes on from the first; make it two layers, or keep the loop"
        )
    fold[2].append(what)


class Stepping(nn.Module):
    """A neuron that takes one step [B, C, ...] a call and keeps its state between calls, as loops over time expect it.

    Inside of ``over_time`` it takes all T steps in one call, begins them anew and keeps nothing.

    Args:
        neuron: the layer over sequences [T, B, C, ...] that computes it.
        start: the potential before the first step (SpikingJelly's is v_reset).
    """

    def __init__(self, neuron: NeuronLayer, start: float = 0.0) -> None:
        super().__init__()
        self.neuron, self.start = neuron, float(start)
        self.state: Any = None

    all_at_once = False
    """Whether its latest call was within ``over_time``."""

    @property
    def step_mode(self) -> str:
        """ "s": one step a call, as SpikingJelly calls it.

        Raises (when another is assigned):
            ValueError: the layer is made for that mode.
        """
        return "s"

    @step_mode.setter
    def step_mode(self, mode: str) -> None:
        if mode != "s":
            raise ValueError(
                f"{type(self).__name__}: expected step_mode 's', since it was made of a neuron of that mode, got "
                f"{mode!r}; set the mode before trtkern.interop.convert, or run all steps with over_time"
            )

    def forward(self, x: Tensor) -> Tensor:
        """The spikes (of a readout the potential) of one step, in x's shape; of all T within ``over_time``.

        Raises:
            ValueError, TypeError: x is not of the sequence that the state is of; a second call within ``over_time``.
            RuntimeError: a checkpoint runs it again.
        """
        if steps := self._steps():
            sequence = unfold(x, steps)
            return dense(self.neuron(sequence, begin(self.neuron, sequence[0], self.start))).flatten(0, 1)
        never_again(self)
        if self.state is None:
            self.state = begin(self.neuron, x, self.start)
        held = self.state
        try:
            y, self.state = self.neuron.step(x, held)
        except (TypeError, ValueError) as error:
            if held is None:
                raise
            raise type(error)(
                f"{error}. It is the state after the steps before: call reset() where other sequences begin"
            ) from None
        return y

    def _steps(self) -> int | None:
        """T of a call within ``over_time``; None of one that takes a step.

        Raises:
            ValueError: it has run in this pass.
            RuntimeError: a checkpoint within ``over_time`` runs it once more.
        """
        steps = folded()
        if steps:
            once(self, type(self).__name__)
            self.all_at_once = True
        elif self.all_at_once:
            if in_backward():
                raise RuntimeError(
                    f"over_time: expected no torch.utils.checkpoint within the network, got one around a "
                    f"{type(self).__name__}: when it runs again in the backward pass, the steps are not known; put "
                    "the checkpoint around the over_time network"
                )
            self.all_at_once = False
        return steps

    def reset(self) -> None:
        """Forget the state: the next call is a first step."""
        self.state = None

    def detach(self) -> None:
        """Let no gradient through the state to the steps before."""
        if isinstance(self.state, tuple):
            self.state = type(self.state)(*(part.detach() for part in self.state))
        elif self.state is not None:
            self.state = self.state.detach()

    def __getstate__(self) -> dict[str, Any]:
        # A copy and a file hold the network, not what one of its sequences has left.
        return {**self.__dict__, "state": None}

    def extra_repr(self) -> str:
        """Where the potential starts, if that is not 0."""
        return "" if self.start == 0.0 else f"start={self.start:g}"


def in_backward() -> bool:
    """Whether a backward pass is running: a layer that is called then is run again, by a checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def never_again(layer: nn.Module) -> None:
    """A layer takes a step from the state that it keeps.

    Raises:
        RuntimeError: a checkpoint runs it again, when its state has gone on.
    """
    if in_backward():
        raise RuntimeError(
            f"{type(layer).__name__}: expected no torch.utils.checkpoint around one step of a loop, got one: when it "
            "runs again in the backward pass, the state has gone on; put the checkpoint around "
            "trtkern.interop.over_time(net)"
        )


def begin(neuron: NeuronLayer, x: Tensor, start: float) -> Any:
    """The state before the first step for x [B, C, ...]: None where all of it is 0, else the potential at ``start``."""
    if start == 0.0:
        return None
    v = torch.full_like(x, start, dtype=torch.promote_types(x.dtype, torch.float32))
    if neuron.State is None:
        return v
    return neuron.State(*(v if name == "v" else torch.zeros_like(v) for name in neuron.state_names))


def folds(layer: nn.Module) -> bool:
    """Whether a layer takes one step a call, and all of them at once within ``over_time``."""
    return bool(getattr(layer, "folds", isinstance(layer, Stepping)))


class FromStart(nn.Module):
    """A neuron over sequences whose potential is ``start``, not 0, before the first step.

    Args:
        neuron: the layer over sequences.
        start: the potential.
    """

    takes_time = True

    def __init__(self, neuron: NeuronLayer, start: float) -> None:
        super().__init__()
        self.neuron, self.start = neuron, float(start)

    def forward(self, x: Tensor, **options: Any) -> Any:
        """What the neuron gives for x [T, B, C, ...]; ``options`` are the neuron's."""
        return self.neuron(x, begin(self.neuron, x.movedim(self.neuron.time_dim, 0)[0], self.start), **options)

    def extra_repr(self) -> str:
        """The potential."""
        return f"start={self.start:g}"


def unfold(x: Tensor, steps: int, place: str = "at a neuron") -> Tensor:
    """[T, B, ...] of x [T * B, ...], or of a multiple of so many rows.

    Raises:
        ValueError: they are no multiple of T * B.
    """
    fold = _FOLDED.get()
    least = steps if fold is None else fold[1]
    if x.dim() < 1 or (x.shape[0] % least if least else x.shape[0]):
        raise ValueError(
            f"over_time: expected [T * B, ...] with T={steps} and T * B={least} {place}, got {checks.describe(x)}; "
            "what runs before it must keep the first axis"
        )
    return x.unflatten(0, (steps, -1 if least else 0))


def over_time(net: nn.Module, timesteps: int | None = None) -> OverTimeNetwork:
    """A network that was written for one step, x_t [B, ...], over whole sequences [T, B, ...], with fused neurons.

    It takes the place of the loop::

        outputs = torch.stack([net(x_t) for x_t in x])  # and of net's reset before it

    and gives the same. The forward of ``net`` runs once, on T * B rows, and its neurons (``Stepping``, which
    ``convert`` makes) take their T steps in one pass. So whatever stands between them has to treat each row by
    itself, as convolutions, Linears, poolings, activations and residual sums do. Two kinds of layers that do not are
    taken care of: a BatchNorm in training takes its statistics step by step, as in the loop, and a Dropout draws a
    mask a step. ``torch.utils.checkpoint`` goes around the result, not into the network: what runs again in the
    backward pass would not know the steps.

    Args:
        net: the network; the same Parameter objects.
        timesteps: T, if the input is one step [B, ...] that is shown T times.

    Raises:
        TypeError: net is no module.
        ValueError: it has a layer that takes sequences itself, or a BatchNorm whose momentum is None, by its path.
    """
    return OverTimeNetwork(net, timesteps)


class OverTimeNetwork(nn.Module):
    """What ``over_time`` makes: [T, B, ...] -> what ``net`` gives, with a time axis in front of each tensor of it.

    The state dict has net's keys under "net.".

    Args:
        net: a network that was written for one step, x_t [B, ...].
        timesteps: T, where the network is given one image for all steps; None: the input is a sequence [T, B, ...].
    """

    takes_time = True

    def __init__(self, net: nn.Module, timesteps: int | None = None) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"over_time: expected an nn.Module, got {type(net).__name__}")
        if timesteps is not None and (isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1):
            raise ValueError(f"over_time: expected timesteps to be None or an int >= 1, got {timesteps!r}")
        if not any(folds(each) for each in net.modules()):
            raise ValueError(
                "over_time: expected a network with neurons that take one step a call, got none; "
                "trtkern.interop.convert makes them of another library's"
            )
        for path, layer in _outer(net, ""):
            if takes_time(layer) and not isinstance(layer, OverTimeNetwork):
                raise ValueError(
                    f"over_time: expected layers that take one step [B, ...], got {path!r} ({type(layer).__name__}), "
                    "which takes sequences; trtkern.nn.TimeSequential runs such layers"
                )
            if objection := uncountable(path, layer):
                raise ValueError(f"over_time: {objection}")
        for path, layer in net.named_modules():
            if (objection := objection_to(layer)) and getattr(layer, "takes_time", None) is None:
                raise ValueError(
                    f"over_time: expected layers that treat each row by itself, got {path!r} ({type(layer).__name__}): "
                    f"{objection}; one that does says so with takes_time = False"
                )
        self.net, self.timesteps = net, timesteps

    def forward(self, x: Tensor) -> Any:
        """Every tensor of what ``net`` returns, [T, ...], for x [T, B, ...] ([B, ...] with ``timesteps``).

        Raises:
            TypeError, ValueError: x is no tensor, has no time axis, or no step.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"over_time: expected a tensor, got {checks.describe(x)}")
        if self.timesteps is not None:
            x = x.expand(self.timesteps, *x.shape)
        if x.dim() < 2 or x.shape[0] < 1:
            raise ValueError(f"over_time: expected x [T, B, ...], got {checks.describe(x)}; one step is x.unsqueeze(0)")
        return at_once(self.net, self.net, x)

    def extra_repr(self) -> str:
        """timesteps, where given."""
        return "" if self.timesteps is None else f"timesteps={self.timesteps}"


class FoldedSequential(nn.Sequential):
    """A container that loops over the steps of a sequence [T, B, ...], without its loop: layers of one step, whose
    neurons are ``Stepping``, run all steps at once, as in ``over_time``."""

    takes_time = True

    def forward(self, x: Tensor) -> Any:
        """What the loop gives, stacked [T, ...]."""
        return at_once(self, super().forward, x)


def at_once(net: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """``call``, which runs the layers of ``net`` for one step, on all steps of x [T, B, ...]."""
    steps, rows = x.shape[0], x.shape[0] * x.shape[1]
    norms = [layer for layer in net.modules() if isinstance(layer, _BatchNorm)]
    with _folding(steps, rows) as ran, _StepByStep(steps):
        y = _each(call(x.flatten(0, 1)), lambda tensor: unfold(tensor, steps, "in what the network returns"))
    for layer in norms:
        if layer.num_batches_tracked is not None and any(each is layer.running_mean for each in ran):
            layer.num_batches_tracked.add_(steps - 1)
    return y


def uncountable(path: str, layer: nn.Module) -> str | None:
    """Why a BatchNorm cannot take its statistics step by step, or None."""
    if isinstance(layer, _BatchNorm) and layer.momentum is None and layer.track_running_stats:
        return (
            f"expected a BatchNorm with a momentum, got {path!r} with momentum=None, whose mean over all calls would "
            "count a sequence once"
        )
    return None


def _outer(layer: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """All layers but what is inside of neurons that take one step."""
    if folds(layer):
        return
    for name, child in layer._modules.items():
        if child is None or folds(child):
            continue
        if not child._modules or isinstance(child, NeuronLayer):
            yield join(path, name), child
        yield from _outer(child, join(path, name))


def _each(made: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """function of every tensor in a result, which keeps its form."""
    if isinstance(made, Tensor):
        return function(made)
    if isinstance(made, dict):
        changed = copy.copy(made)  # of its own class
        changed.update({key: _each(value, function) for key, value in made.items()})
        return changed
    if is_dataclass(made) and not isinstance(made, type):
        whole = copy.copy(made)
        for each in fields(made):
            object.__setattr__(whole, each.name, _each(getattr(made, each.name), function))
        return whole
    if isinstance(made, (list, tuple)):
        parts = [_each(part, function) for part in made]
        return type(made)(*parts) if hasattr(made, "_fields") else type(made)(parts)
    return made


@contextmanager
def _folding(steps: int, rows: int) -> Iterator[list[Any]]:
    ran: list[Any] = []
    token = _FOLDED.set((steps, rows, ran))
    try:
        yield ran
    finally:
        _FOLDED.reset(token)


class _StepByStep(TorchFunctionMode):
    """Normalisation in training, step by step: the statistics of a step are those of its own B rows.

    Of an InstanceNorm these are the running ones alone, which go from step to step.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.batch_norm:
            training = args[5] if len(args) > 5 else kwargs.get("training", False)
        elif function is functional.instance_norm:
            training = args[5] if len(args) > 5 else kwargs.get("use_input_stats", True)
        else:
            return function(*args, **kwargs)
        mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
        if not training or (mean is None and function is functional.instance_norm):
            return function(*args, **kwargs)
        if mean is not None:
            once(mean, "BatchNorm or InstanceNorm")
        x = args[0] if args else kwargs["input"]
        rest = {key: value for key, value in kwargs.items() if key != "input"}
        return torch.cat([function(part, *args[1:], **rest) for part in x.chunk(self.steps)])
