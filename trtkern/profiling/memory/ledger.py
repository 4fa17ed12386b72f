"""Who keeps what while a model runs: the hooks behind ``memory``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_leaves

from trtkern._torch import nodes
from trtkern.profiling.memory.kept import Call, Kept, formula, span
from trtkern.profiling.memory.report import LayerMemory, MemoryReport
from trtkern.profiling.memory.spiking import neuron_steps

MODEL, LOSS, ATTRIBUTES = "(model)", "(loss)", "(autograd attributes)"
"""Names of rows: the model's own forward, what a loss does outside of modules, tensors that a custom
``autograd.Function`` keeps as attributes instead of with ``save_for_backward``."""

OTHERS = "what hooks inside the model keep for it: a checkpoint, say"
"""Said of a layer that runs where other hooks for saved tensors are active: what they keep is not seen from here."""


class Charge(NamedTuple):
    """One tensor that a call keeps, and that no call before it kept."""

    item: Kept
    bytes: int


Told = Callable[[str, Call, Sequence[Charge]], None]
"""Hears of each call of a layer: the layer's name, the call, and what it keeps."""


@dataclass
class _Row:
    """What is known of a layer so far."""

    kind: str
    known: bool
    container: bool
    shape: tuple[int, ...] = ()
    predicted: int = 0
    measured: int = 0
    kept: dict[str, None] = field(default_factory=dict)


@dataclass
class _Saved:
    storage: StorageWeakRef
    row: _Row
    bytes: int


def _storage(tensor: Tensor) -> StorageWeakRef:
    # Held weakly: the storage may go, and its address is not given to another while the reference is there.
    return StorageWeakRef(tensor.untyped_storage())


class Ledger:
    """Who keeps what: filled by hooks while a model runs.

    Args:
        model: whose layers have names.
        inputs: of the model.
        told: hears of each call as it ends; it may not hold its tensors.
    """

    def __init__(self, model: nn.Module, inputs: list[Tensor], told: Told | None = None) -> None:
        self._told = told
        self._names = {id(module): name or MODEL for name, module in model.named_modules()}
        owned = [_storage(t.detach()) for t in (*model.parameters(), *model.buffers())]
        self._owned = {ref.cdata: ref for ref in owned}
        # Of an input that is part of something larger, its own part counts.
        self._inputs: dict[int, int] = {}
        for (key, _), size in {(_storage(t).cdata, t.storage_offset()): span(t) for t in inputs}.items():
            self._inputs[key] = self._inputs.get(key, 0) + size
        self._rows: dict[str, _Row] = {}
        self._running: list[tuple[nn.Module, _Row]] = []
        self._saved: dict[int, _Saved] = {}
        self._predicted: dict[Any, StorageWeakRef] = {}
        self._made: dict[int, Tensor] = {}
        self._heard = self._deaf = False
        self._thread = threading.get_ident()  # hooks of modules are everybody's
        self._steps = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, what runs is written down."""
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, with_kwargs=True),
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()
                _global_forward_hooks_with_kwargs.pop(hook.id, None)  # which torch's remove() forgets

    def _row(self, name: str, kind: str, known: bool = False, container: bool = True) -> _Row:
        return self._rows.setdefault(name, _Row(kind, known, container))

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if threading.get_ident() != self._thread:
            return
        kind = type(module).__name__
        container = next(module.children(), None) is not None
        row = self._row(self._names.get(id(module), kind), kind, formula(module) is not None, container)
        self._running.append((module, row))

    def _save(self, tensor: Tensor) -> Tensor:
        self._heard = True
        ref = _storage(tensor)
        if not self._deaf and ref.cdata not in self._owned and ref.cdata not in self._saved:
            row = self._running[-1][1] if self._running else self._row(LOSS, "loss")
            size = min(tensor.untyped_storage().nbytes(), self._inputs.get(ref.cdata, 1 << 62))
            self._saved[ref.cdata] = _Saved(ref, row, size)
        # Without its graph: an output that kept itself would never go.
        return tensor.detach()

    def _hears(self) -> bool:
        """Whether what is saved now comes here, and not to other hooks: those of a checkpoint, say."""
        self._heard, self._deaf = False, True
        with torch.enable_grad():
            torch.ones((), requires_grad=True).exp()
        self._deaf = False
        return self._heard

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        ended, row = self._running.pop()
        while ended is not module:  # in between, layers may have ended with an error that the model caught
            ended, row = self._running.pop()
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors:
            return
        first = tensors[0]
        call = Call(module, args, kwargs, output, self._made)
        self._made[id(module)] = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device="meta")
        row.shape = tuple(first.shape)
        self._steps += neuron_steps(call)
        charges = [Charge(item, self._charge(row, item)) for item in self._items(row, call, tensors)]
        if self._told is not None:
            self._told(self._names.get(id(module), row.kind), call, [charge for charge in charges if charge.bytes])

    def _items(self, row: _Row, call: Call, outputs: list[Tensor]) -> list[Kept]:
        """What the formula of its kind says that a call keeps."""
        found = formula(call.module)
        if found is None or not any(tensor.requires_grad for tensor in outputs):
            return []
        if not self._hears():
            row.known = False
            row.kept[OTHERS] = None
            return []
        self._deaf = True
        items = found(call)
        self._deaf = False
        if items is None:
            row.known = False
        return items or []

    def _charge(self, row: _Row, item: Kept) -> int:
        """Add what a call keeps to its layer, unless it is kept already; the bytes that it adds."""
        what, size = item.what, item.bytes
        if item.tensor is not None:
            ref = _storage(item.tensor)
            if item.cast is None:
                if ref.cdata in self._owned:
                    return 0
                size = self._inputs.get(ref.cdata, max(size, _whole(item.tensor)))
            saved = self._saved.get(ref.cdata)
            elsewhere = saved is not None and saved.row is not row and not saved.row.known
            if (ref.cdata, item.cast) in self._predicted or (elsewhere and item.cast is None):
                what, size = f"({what})", 0
            self._predicted[ref.cdata, item.cast] = ref
        row.predicted += size
        if size or item.bytes:
            row.kept[what] = None
        return size

    def alive(self) -> int:
        """Bytes of what was saved and is in memory now."""
        return sum(saved.bytes for saved in self._saved.values() if not saved.storage.expired())

    def report(self, graph: list[GradientEdge], device: str) -> MemoryReport:
        """What there is in memory while nothing but the graph, and what is the caller's, is alive."""
        for saved in self._saved.values():
            if not saved.storage.expired():
                saved.row.measured += saved.bytes
        held = self._held_by_functions(graph)
        if held:
            self._row(ATTRIBUTES, ", ".join(sorted(held))).measured = sum(held.values())
        rows = [
            LayerMemory(
                name, row.kind, row.shape, row.predicted if row.known else None, row.measured, ", ".join(row.kept)
            )
            for name, row in self._rows.items()
            if row.predicted or row.measured or not row.container
        ]
        return MemoryReport(tuple(rows), self._steps, device)

    def _held_by_functions(self, graph: list[GradientEdge]) -> dict[str, int]:
        """Bytes by kind of node, of tensors that custom Functions keep where no hook sees them."""
        found: dict[str, int] = {}
        counted: dict[int, StorageWeakRef] = {}
        for node in nodes(graph):
            for tensor in tree_leaves(dict(getattr(node, "__dict__", {}))):
                if not isinstance(tensor, Tensor):
                    continue
                ref = _storage(tensor)
                if not any(ref.cdata in known for known in (self._owned, self._saved, counted)):
                    counted[ref.cdata] = ref
                    name = type(node).__name__
                    found[name] = found.get(name, 0) + tensor.untyped_storage().nbytes()
        return found


def _whole(tensor: Tensor) -> int:
    """Bytes of what a tensor is a view of: kept as a whole with any part of it."""
    return span(tensor._base) if tensor._is_view() and tensor._base is not None else span(tensor)
