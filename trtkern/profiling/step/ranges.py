"""Names for what runs in a training step: ranges in the profiler's trace, and which layer made a node of the graph."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import (
    _global_forward_hooks_always_called,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from trtkern._torch import nodes
from trtkern.profiling.memory.ledger import LOSS, MODEL

STEP, LOADER, OPTIMIZER, INPUT, METRICS = "(step)", "(loader)", "(optimizer)", "(input)", "(metrics)"
"""Parts of a step beside layers and loss: the whole of it, getting a batch, the update, what is done to a batch before
the network and to what comes out of it (normalising, casting), what is added up."""
PHASES = (LOADER, INPUT, LOSS, METRICS, OPTIMIZER)
PREFIX = "trtkern: "
"""Of the names of all ranges in a trace."""

Enter = Callable[[str, nn.Module, tuple], None]
Leave = Callable[[str, nn.Module, tuple, dict, Any], None]


class Ranges:
    """Opens a range for each layer and each part of a step, and remembers who made which node of autograd's graph.

    Autograd numbers the nodes of a thread in the order in which they are made. What a layer's ``forward`` makes lies
    between the number at its begin and the one at its end, and a node of the backward pass says its number: whatever
    runs for it belongs to that layer.

    Args:
        model: whose modules are named; the names of an inner ``torch.compile`` go.
        nvtx: open NVTX ranges too, in the backward pass those of ``follow``.
    """

    def __init__(self, model: nn.Module, nvtx: bool = False) -> None:
        self._names = {id(module): name.replace("_orig_mod.", "") or MODEL for name, module in model.named_modules()}
        self._nvtx, self._thread = nvtx, threading.get_ident()
        self._open = threading.local()
        self._numbers: list[int] = [-1]
        self._places: list[str | None] = [None]

    def place_of(self, number: int) -> str | None:
        """Who made the node of that sequence number on the thread of the step; None: no layer and no part of it."""
        return self._places[bisect_right(self._numbers, number) - 1]

    def here(self) -> str | None:
        """The innermost place that is open on this thread, or the one whose gradients are being computed."""
        stack = self._stack()
        if stack and stack[-1][2] == torch._C._current_graph_task_id():
            return stack[-1][0]
        node = torch._C._current_autograd_node()
        return None if node is None else self.place_of(node._sequence_nr())

    @contextmanager
    def phase(self, place: str) -> Iterator[None]:
        """Inside, what runs is that part of the step."""
        self._enter(place)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def layers(self, enter: Enter | None = None, leave: Leave | None = None) -> Iterator[None]:
        """Inside, every call of a module of the model is a range; ``enter`` and ``leave`` are told of it as well."""

        def before(module: nn.Module, args: tuple) -> None:
            name = self._names.get(id(module))
            if name is not None:
                self._enter(name)
                if enter is not None:
                    enter(name, module, args)

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            name = self._names.get(id(module))
            if name is not None:
                if leave is not None and output is not None:
                    leave(name, module, args, kwargs, output)
                self._leave()

        hooks = [
            register_module_forward_pre_hook(before),
            register_module_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
                nn.modules.module._global_forward_hooks_with_kwargs.pop(hook.id, None)  # which remove() forgets
                _global_forward_hooks_always_called.pop(hook.id, None)

    def follow(self, total: Tensor) -> None:
        """Give every node behind ``total`` an NVTX range in the backward pass; nothing without ``nvtx``."""
        if not self._nvtx or total.grad_fn is None:
            return
        for node in nodes([get_gradient_edge(total)]):
            place = self.place_of(node._sequence_nr()) if hasattr(node, "_sequence_nr") else None
            if place is not None:
                node.register_prehook(_opens(f"{PREFIX}{place} backward"))
                node.register_hook(_closes)

    def _stack(self) -> list[tuple[str, Any, int]]:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
        return self._open.stack

    def _enter(self, place: str) -> None:
        made = torch.profiler.record_function(PREFIX + place)
        made.__enter__()
        if self._nvtx:
            torch.cuda.nvtx.range_push(PREFIX + place)
        self._stack().append((place, made, torch._C._current_graph_task_id()))
        self._mark(place)

    def _leave(self) -> None:
        stack = self._stack()
        _, made, _ = stack.pop()
        self._mark(stack[-1][0] if stack else None)
        if self._nvtx:
            torch.cuda.nvtx.range_pop()
        made.__exit__(None, None, None)

    def _mark(self, place: str | None) -> None:
        """From the next node on, this place makes them; each thread counts its own, and only this one's are kept."""
        if threading.get_ident() == self._thread:
            self._numbers.append(torch._C._autograd._get_sequence_nr())
            self._places.append(None if place == STEP else place)


def _opens(name: str) -> Callable[[Any], None]:
    def hook(gradients: Any) -> None:
        torch.cuda.nvtx.range_push(name)

    return hook


def _closes(made: Any, given: Any) -> None:
    torch.cuda.nvtx.range_pop()
