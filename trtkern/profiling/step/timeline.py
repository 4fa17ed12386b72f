"""Where the time of a step went: read off the trace of torch.profiler."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from trtkern.profiling.step.ranges import OPTIMIZER, PREFIX, STEP

Direction = Literal["forward", "backward"]


class Share(NamedTuple):
    """A place in a direction; what a place makes for its backward pass is "forward"."""

    place: str
    direction: Direction


EVALUATE = "autograd::engine::evaluate_function: "
ACCUMULATE = EVALUATE + "torch::autograd::AccumulateGrad"
_UNNAMED = Share(STEP, "forward")
_KERNELS, _LAUNCHES = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")


class Ran(NamedTuple):
    """All calls of an operator, or all runs of a kernel, for one place in one direction."""

    seconds: float
    """Without the operators that it calls itself."""
    calls: int


@dataclass
class Timeline:
    """One step, in seconds."""

    wall: float
    """From its begin to its end; on a GPU the end waits for it."""
    seconds: dict[Share, float]
    """Of the thread of the step; on a GPU of the kernels that were launched there."""
    spans: list[tuple[float, float, Share]]
    """(begin, end, whose) on the thread of the step, in the trace's microseconds."""
    operators: dict[Share, dict[str, Ran]] = field(default_factory=dict)
    """What ran, by name: on a CPU torch's operators on the thread of the step, on a GPU its kernels."""

    @property
    def unattributed(self) -> float:
        """Of the step, what no place has; on a GPU also when it had nothing to do."""
        return self.wall - sum(self.seconds.values())


@dataclass
class _Thread:
    """Who is at work on one thread: from ``times[i]`` on it is ``shares[i]``."""

    times: list[float] = field(default_factory=lambda: [float("-inf")])
    shares: list[Share | None] = field(default_factory=lambda: [None])

    def at(self, time: float) -> Share | None:
        return self.shares[bisect_right(self.times, time) - 1]


def read(trace: dict[str, Any], place_of: Callable[[int], str | None], gpu: bool) -> Timeline:
    """The step in a Chrome trace of torch.profiler that was taken under ``Ranges``.

    A range has the time that no range inside it has. What the engine does for a node is the backward time of the place
    that made it, by the sequence number in the trace; the accumulation of a parameter's gradient follows the node that
    made that, and is counted with it; what has no number is counted with what it runs inside of.

    Args:
        trace: as JSON; one step in it.
        place_of: who made the node of a sequence number (``Ranges.place_of``).
        gpu: count the time of kernels, each where it was launched.

    Raises:
        ValueError: no step in the trace.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    step = next((event for event in events if event["name"] == PREFIX + STEP), None)
    if step is None:
        raise ValueError(f"timeline: expected a range {PREFIX + STEP!r} in the trace, got none")
    numbered = [event["args"] for event in events if event["name"].startswith(EVALUATE) and "args" in event]
    owners = Counter(args["Fwd thread id"] for args in numbered if "Fwd thread id" in args)
    owner = owners.most_common(1)[0][0] if owners else None  # nodes of other threads are numbered on their own
    threads: dict[Any, _Thread] = {}
    for thread in {event["tid"] for event in events if _places(event)}:
        own = [event for event in events if event["tid"] == thread and _places(event)]
        threads[thread] = _sweep(own, place_of, owner)
    spans = _spans(threads[step["tid"]], step["ts"], step["ts"] + step["dur"])
    ran = list(_kernels(events, threads)) if gpu else list(_operators(events, step, threads[step["tid"]]))
    parts = [(took, share) for _, took, share in ran] if gpu else [(stop - go, share) for go, stop, share in spans]
    seconds: dict[Share, float] = {}
    for microseconds, share in parts:
        if share is not None and share != _UNNAMED:
            seconds[share] = seconds.get(share, 0.0) + 1e-6 * microseconds
    return Timeline(1e-6 * step["dur"], seconds, spans, _summed(ran))


def _summed(ran: Iterable[tuple[str, float, Share | None]]) -> dict[Share, dict[str, Ran]]:
    found: dict[Share, dict[str, Ran]] = {}
    for name, microseconds, share in ran:
        if share is not None and share != _UNNAMED:
            held = found.setdefault(share, {})
            before = held.get(name, Ran(0.0, 0))
            held[name] = Ran(before.seconds + 1e-6 * microseconds, before.calls + 1)
    return found


def _operators(
    events: Iterable[dict[str, Any]], step: dict[str, Any], thread: _Thread
) -> Iterable[tuple[str, float, Share | None]]:
    """(name, microseconds without what it calls, whose) of every operator of a CPU on the thread of the step."""
    end = step["ts"] + step["dur"]
    own = [event for event in events if event["tid"] == step["tid"] and step["ts"] <= event["ts"] <= end]
    own = [event for event in own if event.get("cat") in ("cpu_op", "user_annotation") and event is not step]
    left = [event["dur"] for event in own]
    order = sorted(range(len(own)), key=lambda at: (own[at]["ts"], -own[at]["dur"]))
    around: list[int] = []
    for at in order:
        while around and own[around[-1]]["ts"] + own[around[-1]]["dur"] <= own[at]["ts"]:
            around.pop()
        if around:
            left[around[-1]] -= own[at]["dur"]
        around.append(at)
    for at in order:
        if own[at].get("cat") == "cpu_op" and not own[at]["name"].startswith(EVALUATE):
            yield own[at]["name"], max(0.0, left[at]), thread.at(own[at]["ts"])


def _places(event: dict[str, Any]) -> bool:
    """Whether the event says who is at work."""
    name, kind = event["name"], event.get("cat")
    return name.startswith(EVALUATE) or (kind == "user_annotation" and name.startswith((PREFIX, "Optimizer.")))


def _sweep(events: list[dict[str, Any]], place_of: Callable[[int], str | None], owner: Any) -> _Thread:
    """Who is at work on a thread, from its nested events."""
    thread, open_events = _Thread(), [(float("inf"), None)]
    followed: Share | None = None  # the node before, whose gradient is accumulated

    def close(until: float) -> None:
        while open_events[-1][0] <= until:
            end, _ = open_events.pop()
            thread.times.append(end)
            thread.shares.append(open_events[-1][1])

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        close(event["ts"])
        outer: Share | None = open_events[-1][1]
        name = event["name"]
        if name.startswith(EVALUATE):
            share = followed if name == ACCUMULATE else _of_node(event.get("args", {}), place_of, owner)
            share = share or outer
            followed = share
        else:
            place = OPTIMIZER if name.startswith("Optimizer.") else name.removeprefix(PREFIX)
            inside = outer is not None and outer.direction == "backward"
            share = Share(place, "backward" if inside else "forward")
        thread.times.append(event["ts"])
        thread.shares.append(share)
        open_events.append((min(event["ts"] + event["dur"], open_events[-1][0]), share))  # type: ignore[arg-type]
    close(max((end for end, _ in open_events[1:]), default=0.0))
    return thread


def _of_node(args: dict[str, Any], place_of: Callable[[int], str | None], owner: Any) -> Share | None:
    if "Sequence number" not in args or args.get("Fwd thread id") != owner:
        return None
    place = place_of(args["Sequence number"])
    return None if place is None else Share(place, "backward")


def _spans(thread: _Thread, begin: float, end: float) -> list[tuple[float, float, Share]]:
    """What lies within the step, neighbours of one owner as one."""
    spans: list[tuple[float, float, Share]] = []
    edges = [*thread.times[1:], end]
    for start, stop, share in zip(thread.times, edges, thread.shares, strict=True):
        start, stop = max(start, begin), min(stop, end)
        if stop <= start or share is None:
            continue
        if spans and spans[-1][2] == share and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop, share)
        else:
            spans.append((start, stop, share))
    return spans


def _kernels(
    events: Iterable[dict[str, Any]], threads: dict[Any, _Thread]
) -> Iterable[tuple[str, float, Share | None]]:
    """(name, microseconds, who launched it) of everything that ran on a GPU."""
    launched = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    for event in events:
        if event.get("cat") in _KERNELS:
            launch = launched.get(event.get("args", {}).get("correlation"))
            thread = None if launch is None else threads.get(launch["tid"])
            yield event["name"], event["dur"], None if thread is None or launch is None else thread.at(launch["ts"])


def named(trace: dict[str, Any], timeline: Timeline) -> dict[str, Any]:
    """The trace with two tracks more: which layer's forward, and whose backward, runs when."""
    tracks = {"forward": 0, "backward": 1}
    process = "layers (trtkern)"
    added: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": process, "tid": number, "args": {"name": track}}
        for track, number in tracks.items()
    ]
    added += [
        {
            "ph": "X", "cat": "layer", "name": f"{share.place} {share.direction}", "pid": process,
            "tid": tracks[share.direction], "ts": begin, "dur": end - begin,
        }
        for begin, end, share in timeline.spans
        if share != _UNNAMED
    ]  # fmt: skip
    return {**trace, "traceEvents": [*trace["traceEvents"], *added]}
