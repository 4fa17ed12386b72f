"""What a model keeps for its backward pass: predicted by the traffic model, and measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from trtkern.ops import checks
from trtkern.profiling.memory.ledger import Ledger, Told
from trtkern.profiling.memory.report import MemoryReport
from trtkern.profiling.unchanged import unchanged, uncompiled


def memory(model: nn.Module, input: Any, *, loss: Callable[[Any], Tensor] | None = None) -> MemoryReport:
    """What one forward pass of a model keeps in memory for its backward pass, layer by layer.

    Every layer's share is predicted by the formula of its kind (``trtkern.profiling.memory.kept.FORMULAS``, for this
    project's layers the traffic model) and measured: the storages that autograd saves while that layer's ``forward`` is
    the innermost one, at the size that they have in memory. A storage counts once, at the layer that saved it first;
    parameters and buffers of the model do not count, the input does where a layer keeps it. On a GPU the total is
    measured by the allocator as well.

    The model runs in training mode (with what is in evaluation mode left so, if the model itself is training) under the
    autocast of the caller, not under hooks of the caller's for saved tensors (``packed_activations``, which reports
    itself); what torch.compile compiled runs as it was. Nothing is changed by it: mode, buffers,
    attributes and random state are put back, gradients are not touched. On a GPU the model runs twice, and the peak
    statistics of the allocator begin anew.

    Args:
        model: any module; layers without a formula are reported as unknown, with what they were measured to keep.
        input: what it is called with: a tensor, or a tuple of arguments.
        loss: a function of the model's output, whose share is reported too: ``lambda out: criterion(out, target)``.

    Raises:
        TypeError, ValueError: no module, no tensor among the inputs, a model with lazy parameters.
    """
    inputs = input if isinstance(input, tuple) else (input,)
    device = check_call(model, inputs)

    forward = partial(_forward, model, inputs, loss)
    ledger = Ledger(model, tensors_of(inputs))
    with trained(model, device):
        if device.type != "cuda":
            with ledger.listening():
                graph = forward()
            return ledger.report(graph, str(device))
        return _on_gpu(ledger, forward, device)


def kept_calls(model: nn.Module, inputs: tuple, told: Told) -> MemoryReport:
    """One forward pass in the mode that the model is in, of which ``told`` hears each call; what it keeps."""
    ledger = Ledger(model, tensors_of(inputs), told)
    with ledger.listening():
        graph = _forward(model, inputs)
    return ledger.report(graph, str(tensors_of(inputs)[0].device))


@contextmanager
def trained(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model runs eagerly in training mode and with gradients; afterwards it is as it was."""
    with unchanged(model, device), uncompiled(), torch.enable_grad():
        if not model.training:
            model.train()
        yield


def _forward(model: nn.Module, inputs: tuple, loss: Callable[[Any], Tensor] | None = None) -> list[GradientEdge]:
    """The graph alone of a forward pass: what is not kept for the backward pass goes."""
    out = model(*inputs)
    if loss is not None:
        out = (out, loss(out))
    return [get_gradient_edge(leaf) for leaf in tensors_of(out) if leaf.grad_fn is not None]


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors of nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _on_gpu(ledger: Ledger, forward: Callable[[], list[GradientEdge]], device: torch.device) -> MemoryReport:
    forward()  # workspaces of libraries and the like come with the first call and stay
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with ledger.listening():
        graph = forward()
    grown = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    report = ledger.report(graph, str(device))
    del graph
    # What outlives the graph belonged to somebody before: the input, a target. It is kept, but did not grow.
    return report.allocated(grown + ledger.alive(), peak)


def check_call(model: nn.Module, inputs: tuple) -> torch.device:
    """The device of the inputs, all of which are fit to run."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"memory: expected model to be a torch.nn.Module, got {checks.describe(model)}")
    tensors = tensors_of(inputs)
    if not tensors:
        raise TypeError(f"memory: expected input to be a tensor or a tuple with tensors, got {checks.describe(inputs)}")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"memory: expected a model with all its parameters, got a lazy one, {lazy[0]}; run it once before"
        )
    return tensors[0].device
