"""A convolution (or Linear) and the BatchNorm + LIF behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trtkern._torch import recording
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import AnyState
from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear
from trtkern.ops._lazy import Lazy
from trtkern.ops.batch_norm_lif import Source
from trtkern.ops.spikes import Spikes, Unwritten, current


class ConvBatchNormLIF(Leaf):
    """A convolution over every step, then ``BatchNormLIF``: [T, B, C, H, W] -> spikes.

    Args:
        conv: ``SpikeConv2d`` or ``SpikeLinear``, which keep the words of packed input in place of the dense spikes; or
            any module that takes what they take.
        norm: the ``BatchNormLIF`` behind it.
        checkpoint: do not keep the convolution's output y, which is nearly all that is kept otherwise: the backward
            pass runs ``conv`` once more to make it, with the same random numbers and under the same autocast. Gradients
            are the same bit for bit where the convolution repeats itself, as it does on a CPU. Without effect in what
            torch.compile compiles, torch.export or torch.jit.trace records, and on the reference.

    A static input (expanded along time) is convolved once.

    Raises:
        TypeError: checkpoint=True and norm is no ``BatchNormLIF``.
        ValueError: checkpoint=True and ``conv`` changes its own parameters or buffers as it runs (spectral_norm,
            running statistics): a second run would make another y.
    """

    takes_time = takes_lengths = True

    def __init__(self, conv: nn.Module, norm: BatchNormLIF, *, checkpoint: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.checkpoint = conv, norm, checkpoint

    def forward(
        self,
        x: Tensor | Spikes,
        residual: Tensor | Spikes | None = None,
        v0: AnyState = None,
        *,
        return_state: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor | Spikes | tuple[Any, ...]:
        """As ``BatchNormLIF.forward`` of the convolved x [T, B, C, H, W]."""
        if is_proxy(x):
            return self(x, residual, v0, return_state=return_state, lengths=lengths)
        if not self.checkpoint or not torch.is_grad_enabled() or torch.compiler.is_compiling() or recording():
            # A norm of one's own need not know lengths, where none are given.
            more = {} if lengths is None else {"lengths": lengths}
            return self.norm(self.conv(x), residual, v0, return_state=return_state, **more)
        if not isinstance(self.norm, BatchNormLIF):
            raise TypeError(
                f"ConvBatchNormLIF: expected a BatchNormLIF with checkpoint=True, got {type(self.norm).__name__}; pass "
                "checkpoint=False"
            )
        if isinstance(x, Spikes):
            x = current(x)
        y, source = _repeatable(self.conv, x)
        return self.norm.run(y, residual, v0, return_state, lengths, source)


def _repeatable(conv: nn.Module, x: Tensor | Spikes) -> tuple[Tensor, Source]:
    """conv(x), with its graph, and how to make it again."""
    random, before = _random_numbers(conv, x), _versions(conv)
    y = conv(x)
    for name, (tensor, version) in before.items():
        if tensor._version != version:
            raise ValueError(
                f"ConvBatchNormLIF: expected a convolution that leaves its tensors as they are, got one that changes "
                f"{name!r} as it runs, and so would not repeat itself; pass checkpoint=False"
            )
    held = _tensors(conv)
    names, kind = list(held), y.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    load = _loader(x)

    def make(x: Tensor, *tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        with torch.no_grad(), random(), torch.autocast(kind, autocast[1], enabled=autocast[0]):
            return torch.func.functional_call(conv, given, (load(x),))

    return y, Source(make, (x.words if isinstance(x, Spikes) else x, *held.values()))


def _tensors(conv: nn.Module) -> dict[str, Tensor]:
    return {**dict(conv.named_parameters()), **dict(conv.named_buffers())}


def _versions(conv: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The tensors of the module and how often each was written to."""
    counted = {name: held for name, held in _tensors(conv).items() if not is_lazy(held) and not held.is_inference()}
    return {name: (held, held._version) for name, held in counted.items()}


def _loader(x: Tensor | Spikes) -> Callable[[Tensor], Tensor | Spikes]:
    """x out of what is kept of it: itself, or its words."""
    if not isinstance(x, Spikes):
        return lambda kept: kept
    like = Unwritten.like(x)
    make = like.of if isinstance(x.spikes, Lazy) else like.written
    return lambda words: Spikes(make(words), words)


def _random_numbers(conv: nn.Module, x: Tensor | Spikes) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the random numbers are those that come now; for layers that draw none, an empty one."""
    hooks = bool(conv._forward_hooks or conv._forward_pre_hooks)
    if type(conv) in (nn.Conv2d, nn.Linear, SpikeConv2d, SpikeLinear) and not hooks:
        return nullcontext
    device = (x.spikes if isinstance(x, Spikes) else x).device
    state = torch.get_rng_state()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    own = None if module is None else module.get_rng_state(device)

    @contextmanager
    def same() -> Iterator[None]:
        with torch.random.fork_rng([] if module is None else [device], device_type=device.type):
            torch.set_rng_state(state)
            if module is not None:
                module.set_rng_state(own, device)
            yield

    return same
