"""What a step really hands to torch.distributed, counted, and how long its collectives are under way, timed.

Both see whatever trains: DDP's reducer, FSDP2, the statistics of a BatchNorm, calls of one's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trtkern.profiling.scaling import Collective
from trtkern.profiling.unchanged import quiet

__all__ = ["Call", "Counted", "Timed", "timed"]

_OPS: dict[str, tuple[Collective, int]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
}
"""Of torch's operators for processes: the collective, and which argument is the whole tensor."""
_SILENT = ("barrier", "monitored_barrier_")
"""Those that carry no tensor."""


class Call(NamedTuple):
    """One collective."""

    collective: Collective
    """"all_reduce", "all_gather", ..."""
    bytes: int
    """Of the whole tensor: of all ranks together where it is gathered or scattered."""


class Counted(TorchDispatchMode):
    """Inside, every collective is noted; each operator takes some microseconds longer.

    >>> with Counted() as found:
    ...     step()
    >>> found.bytes("all_reduce")

    Raises:
        NotImplementedError: an operator for processes whose tensors are not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func.__name__.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        if name in _SILENT:
            return
        if name not in _OPS:
            raise NotImplementedError(
                f"Counted: expected collectives among {', '.join(_OPS)}, got {name}; its bytes are not known here"
            )
        collective, whole = _OPS[name]
        held = [leaf for leaf in tree_leaves(args[whole]) if isinstance(leaf, Tensor)]
        self.calls.append(Call(collective, sum(tensor.numel() * tensor.element_size() for tensor in held)))

    def bytes(self, collective: Collective) -> int:
        """Of the whole tensors of all calls of a collective."""
        return sum(call.bytes for call in self.calls if call.collective == collective)

    def times(self, collective: Collective) -> int:
        """How many calls of a collective there were."""
        return sum(call.collective == collective for call in self.calls)


class Timed:
    """How long the collectives of a step were under way on this process.

    With gloo they run on threads of its own, with NCCL as kernels; waiting for a slower process counts.
    """

    wall = 0.0
    """Seconds of the step; on a GPU its end is waited for."""
    seconds = 0.0
    """Of it, those in which a collective was under way."""
    alone: float | None = None
    """Of these, on a GPU those in which no other kernel ran; None: not known."""

    @property
    def share(self) -> float:
        """Of the step."""
        return self.seconds / self.wall


@contextmanager
def timed(device: torch.device | str = "cpu") -> Iterator[Timed]:
    """Inside, one step: torch.profiler sees it, which costs a step some milliseconds, and as many to read.

    One step says nothing of how its time scatters: take the median of several.

    Args:
        device: where the step computes.
    """
    gpu = torch.device(device).type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    found = Timed()
    with quiet(), torch.profiler.profile(activities=kinds) as profiler:
        begin = time.perf_counter()
        yield found
        if gpu:
            torch.cuda.synchronize(device)
        found.wall = time.perf_counter() - begin
    if gpu:
        kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        spans = [_span(kernel) for kernel in kernels if kernel.name.startswith("nccl")]
        others = [_span(kernel) for kernel in kernels if not kernel.name.startswith("nccl")]
        found.alone = 1e-6 * (covered(spans + others) - covered(others))
    else:
        spans = [_span(event) for event in profiler.events() if event.name.startswith("gloo:")]
    found.seconds = 1e-6 * covered(spans)


def _span(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much of a line (begin, end) pairs cover together, each place once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
