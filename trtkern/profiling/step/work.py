"""How much each layer computes and moves in a step: counted while the step runs once, untimed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trtkern.backends import choose
from trtkern.nn import BatchNormLIF, ConvBatchNormLIF, Delay, Recurrent, SpikeConv2d, SpikeLinear, Spikes
from trtkern.nn._neuron import Readout, Spiking
from trtkern.ops import layout
from trtkern.ops.spikes import dense, lazily
from trtkern.profiling import traffic
from trtkern.profiling.memory.kept import Call, span
from trtkern.profiling.memory.spiking import checkpoints
from trtkern.profiling.step.ranges import Ranges
from trtkern.profiling.step.timeline import Direction, Share

MODEL_BYTES, SIZES = "traffic model", "sizes"
"""How the bytes of a layer were counted: by the formula of its kind, or as the sizes of input, parameters and output
(backward: of input, parameters, the output's gradient and the gradients that are made)."""


class Moved(NamedTuple):
    """Bytes that a call moves at the least."""

    forward: float
    backward: float
    how: str


class Work:
    """What was counted of a step, by layer."""

    def __init__(self) -> None:
        self.flops: dict[Share, int] = defaultdict(int)
        self.bytes: dict[Share, float] = defaultdict(float)
        self.how: dict[str, str] = {}
        self.kinds: dict[str, type[nn.Module]] = {}
        self.order: list[str] = []
        """The layers, in the order in which they first ran."""
        self.outputs: dict[str, Tensor] = {}
        """Of each layer the first tensor that it gave, without memory."""
        self._made: dict[int, Tensor] = {}

    def enter(self, name: str, module: nn.Module, args: tuple) -> None:
        """A layer begins."""
        if name not in self.kinds:
            self.order.append(name)
            self.kinds[name] = type(module)

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A layer ends: count what it moved."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors:
            return
        first = tensors[0]
        bare = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device="meta")
        self._made[id(module)] = self.outputs[name] = bare
        found = moved(Call(module, args, kwargs, output, self._made))
        if found is None:
            return
        again = torch._C._current_graph_task_id() != -1  # run again for the backward pass
        directions: tuple[Direction, Direction] = ("backward" if again else "forward", "backward")
        for direction, count in zip(directions, found[:2], strict=True):
            self.bytes[Share(name, direction)] += count
        self.how[name] = found.how


@contextmanager
def counted(ranges: Ranges) -> Iterator[Work]:
    """Inside, the calls of the layers are counted; they run eagerly, with every operator seen."""
    work = Work()
    with ranges.layers(work.enter, work.leave), _Flops(ranges, work):
        yield work


class _Flops(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products, convolutions and attention, by torch's formulas."""

    def __init__(self, ranges: Ranges, work: Work) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

        super().__init__()
        self._ranges, self._work = ranges, work
        self._formulas = FlopCounterMode(display=False).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        place = None if formula is None else self._ranges.here()
        if formula is not None and place is not None:
            direction: Direction = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
            self._work.flops[Share(place, direction)] += formula(*args, **(kwargs or {}), out_val=out)
        return out


def moved(call: Call) -> Moved | None:
    """The bytes of one call; None for a container, whose layers move."""
    module = call.module
    if isinstance(module, ConvBatchNormLIF):
        return _norm(module.norm, call, call.made[id(module.conv)]) if checkpoints(call) else None
    if isinstance(module, BatchNormLIF):
        return _norm(module, call, call.given(0, "y"))
    if isinstance(module, Recurrent):
        return _recurrent(call)
    if isinstance(module, (Spiking, Readout)):
        return _neuron(call)
    if isinstance(module, Delay):
        return _delay(call)
    return _sizes(call) if next(module.children(), None) is None else None


def _neuron(call: Call) -> Moved:
    module, x = call.module, call.given(0, "x")
    backend = choose(module.backend, "lif", x.device.type, x.dtype, module.spec.token)
    if backend == "reference":
        return _sizes(call)
    x = x.movedim(module.time_dim, 0)
    e, steps, static = x.element_size(), x.shape[0], layout.is_static(x)
    grad = torch.is_grad_enabled() and x.requires_grad
    returns_v = bool(call.kwargs.get("return_v") or call.kwargs.get("return_h"))
    packed = getattr(module, "packed", False)
    unwritten = packed and lazily(x, backend)
    forward = traffic.lif_forward(
        e, steps, packed=packed, unwritten=unwritten, returns_v=returns_v, grad=grad, static=static, spec=module.spec
    )
    backward = traffic.lif_backward(e, steps, returns_v=returns_v, static=static, spec=module.spec) if grad else ()
    return Moved(traffic.moved(forward) * x.numel(), traffic.moved(backward) * x.numel(), MODEL_BYTES)


def _delay(call: Call) -> Moved:
    module, x = call.module, dense(call.given(0, "x"))
    if choose(module.backend, "delay", x.device.type, x.dtype) == "reference":
        return _sizes(call)
    e, learned = x.element_size(), module.learnable
    grad = torch.is_grad_enabled() and (x.requires_grad or learned)
    backward = traffic.delay_backward(e, learned=learned) if grad else ()
    return Moved(traffic.moved(traffic.delay_forward(e)) * x.numel(), traffic.moved(backward) * x.numel(), MODEL_BYTES)


def _recurrent(call: Call) -> Moved:
    neuron, x = call.module.neuron, call.given(0, "x")
    if choose(neuron.backend, "recurrent", x.device.type, x.dtype, neuron.spec.token) == "reference":
        return _sizes(call)
    e, steps = x.element_size(), x.shape[neuron.time_dim]
    grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in call.module.parameters()))
    returns_v = bool(call.kwargs.get("return_v") or call.kwargs.get("return_h"))
    packed, spec = neuron.packed, neuron.spec
    forward = traffic.recurrent_forward(e, steps, packed=packed, returns_v=returns_v, grad=grad, spec=spec)
    backward = traffic.recurrent_backward(e, steps, returns_v=returns_v, spec=spec) if grad else ()
    return Moved(traffic.moved(forward) * x.numel(), traffic.moved(backward) * x.numel(), MODEL_BYTES)


def _norm(module: BatchNormLIF, call: Call, y: Tensor) -> Moved:
    """BatchNorm + LIF of y, which may be without memory."""
    given = call.given(1, "residual")
    out = next(leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor))
    backend = choose(module.lif.backend, "batch_norm_lif", out.device.type, y.dtype, module.lif.spec.token)
    if backend == "reference":
        return _sizes(call)
    e, steps, static = y.element_size(), y.shape[0], layout.is_static(y)
    inside = module.pool == 2 and y.shape[-1] % 2 == y.shape[-2] % 2 == 0
    training = module.training or module.running_mean is None
    kind: traffic.Residual = None if given is None else "dense"
    if isinstance(given, Spikes):
        kind = "unwritten" if _unwritten(given) else "packed"
    unwritten = module.packed and inside == (module.pool == 2) and lazily(y, backend)
    forward = traffic.batch_norm_lif_forward(
        e, steps, residual=kind, packed=module.packed, unwritten=unwritten, pool=inside, training=training,
        grad=out.requires_grad, static=static, spec=module.lif.spec,
    )  # fmt: skip
    backward = traffic.batch_norm_lif_backward(
        e, steps, residual=kind, pool=inside, training=training, static=static, spec=module.lif.spec
    ) if out.requires_grad else ()  # fmt: skip
    return Moved(traffic.moved(forward) * y.numel(), traffic.moved(backward) * y.numel(), MODEL_BYTES)


def _sizes(call: Call) -> Moved:
    """Input, parameters and output once each; a result that is a view of the input moves nothing."""
    given = [tensor for tensor in _dense([call.args, call.kwargs]) if tensor.device.type != "meta"]
    made = _dense(call.output)
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    made = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
    if not made:
        return Moved(0.0, 0.0, SIZES)
    weights = list(call.module.parameters())
    read = sum(map(span, (*given, *weights)))
    both = read + sum(map(span, made))
    forward = both + _unpacked(call, before=True)
    if not any(tensor.requires_grad for tensor in made):
        return Moved(forward, 0.0, SIZES)
    gradients = sum(span(tensor) for tensor in (*given, *weights) if tensor.requires_grad)
    return Moved(forward, both + gradients + _unpacked(call), SIZES)


def _unwritten(x: Spikes) -> bool:
    """Whether the spikes are left unwritten where nobody counts: the counting sees every operator, and dense spikes."""
    return lazily(x.spikes, x.spikes.device.type)


def _unpacked(call: Call, before: bool = False) -> float:
    """Bytes to make dense spikes of words: of those that were kept, or (``before``) of those that came alone."""
    x = call.given(0, "x")
    if not isinstance(call.module, (SpikeConv2d, SpikeLinear)) or not isinstance(x, Spikes):
        return 0.0
    if (before and not _unwritten(x)) or call.module.kernels(x)[0 if before else 1][0] is not None:
        return 0.0  # they are there, or nobody asks for them
    steps = x.spikes.shape[0]
    terms = traffic.spikes_unpack(x.spikes.element_size(), steps, pool=x.pooled)
    return traffic.moved(terms) * steps * x.bits


def _dense(values: Any) -> list[Tensor]:
    """All tensors, of ``Spikes`` the spikes."""
    leaves = tree_leaves(values, is_leaf=lambda value: isinstance(value, Spikes))
    dense = (leaf.spikes if isinstance(leaf, Spikes) else leaf for leaf in leaves)
    return [leaf for leaf in dense if isinstance(leaf, Tensor)]
