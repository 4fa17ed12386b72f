"""What one call allocates at its peak."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from trtkern.profiling.unchanged import quiet


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak of one call, above what was allocated before it.

    On a GPU from the statistics of torch's allocator; on a CPU from the allocations that torch reports to its profiler,
    which leaves out what a library allocates by itself. What it frees of earlier calls (gradients) is not taken off.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    return _highest(profile)


def _highest(profile: torch.profiler.profile) -> int:
    """Bytes at the peak of what was allocated under the profiler."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    todo, changes = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while todo:
        event = todo.pop()
        todo += event.children
        what = event.extra_fields
        if isinstance(what, torch._C._profiler._ExtraFields_Allocation):
            changes.append((event.start_time_ns, -what.alloc_size, what.ptr))
    own: set[int] = set()
    held = highest = 0
    for _, less, address in sorted(changes):
        change = -less
        if change > 0:
            own.add(address)
        elif address in own:
            own.remove(address)
        else:
            continue
        held += change
        highest = max(highest, held)
    return highest
