"""Profile a step: which layer, and which other part, takes how long, moves and computes how much."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils._pytree import tree_leaves

from trtkern import __version__
from trtkern.nn import BatchNormLIF, ConvBatchNormLIF, Recurrent
from trtkern.nn._neuron import NeuronLayer
from trtkern.ops import checks
from trtkern.profiling.firing.activity import FiringRates, firing_rates
from trtkern.profiling.memory.ledger import LOSS
from trtkern.profiling.memory.report import MemoryReport
from trtkern.profiling.step import advice, timeline
from trtkern.profiling.step.conditions import Watch, load, machine, memory_free
from trtkern.profiling.step.parts import Operator, Part, PartTime
from trtkern.profiling.step.ranges import INPUT, LOADER, METRICS, OPTIMIZER, PHASES, STEP, Ranges
from trtkern.profiling.step.rates import Machine, wait
from trtkern.profiling.step.report import StepProfile
from trtkern.profiling.step.subject import ModelStep, Subject
from trtkern.profiling.step.timeline import Ran, Share, Timeline
from trtkern.profiling.step.trail import Trail, changes
from trtkern.profiling.step.work import Work, counted
from trtkern.profiling.unchanged import quiet, unchanged, uncompiled

WARM_UP, WARM_UP_SECONDS = 10, 2.0
"""Steps before the first that is timed, at most, and until when: the allocator takes some ten to keep its pages."""

STEPS = 8
"""Profiled steps where nobody says how many: the interval of a median is then without the fastest and the slowest."""

GROUPS: dict[str, tuple[type[nn.Module], ...]] = {
    "convolutions": (nn.modules.conv._ConvNd,),
    "linear layers": (nn.Linear,),
    "neurons": (NeuronLayer, BatchNormLIF, ConvBatchNormLIF, Recurrent),
    "normalisation": (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm),
}
"""Kinds of layers that the verdict sums up."""
SAID = {
    LOADER: "the loader", INPUT: "preparing the input", LOSS: "the loss", METRICS: "the metrics",
    OPTIMIZER: "the optimizer",
}  # fmt: skip


def profile(
    model: nn.Module,
    input: Any,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    backward: bool = True,
    amp: torch.dtype | None = None,
    steps: int = STEPS,
) -> StepProfile:
    """Where the time of a training step goes: layer by layer, forward and backward, loss, optimiser and loader.

    The step runs once untimed, to count what is computed, moved and spiked, then ``steps`` times under torch.profiler
    and as often without it; in between the machine copies memory and multiplies matrices, which is the roofline. A
    layer's time is that of its ``forward`` without the layers inside it, and of the nodes of autograd's graph that this
    made; on a GPU it is that of the kernels launched there.

    The model is put in training mode (with ``backward=False`` in evaluation mode, without gradients). Weights,
    gradients, buffers, optimiser, random state and mode are as before afterwards; what torch.compile compiled runs as
    it was. ``loss`` and what ``input`` draws from are the caller's.

    Args:
        model: any module.
        input: what it is called with: a tensor, a tuple of arguments, or a function that gives either, which is timed
            as the loader.
        loss: of the model's output; None is the mean of its squares.
        optimizer: of the model's parameters; None updates nothing.
        backward: False profiles the forward pass alone.
        amp: the dtype of autocast around the forward pass; None is none.
        steps: profiled steps; below 3 there is no verdict, since nothing says how times scatter.

    Raises:
        TypeError, ValueError: no module, no tensor among the inputs, fewer than one step, an input that does not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"profile: expected steps as an integer of at least 1, got {steps!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"profile: expected model to be a torch.nn.Module, got {checks.describe(model)}")
    return profile_subject(ModelStep(model, input, loss, optimizer, backward, amp), steps)


def profile_subject(subject: Subject, steps: int) -> StepProfile:
    """``profile`` of any step.

    Raises:
        ValueError: the model does not take its input.
    """
    device, gpu = subject.device, subject.device.type == "cuda"
    ranges = Ranges(subject.model, nvtx=gpu)
    with quiet(), _put_back(subject), unchanged(subject.model, device), uncompiled(), torch.set_grad_enabled(True):
        if not subject.backward:
            subject.model.eval()
        elif not subject.model.training:
            subject.model.train()
        _try(subject)
        kept = subject.kept() if subject.backward else None
        with firing_rates(subject.model) as fired, counted(ranges) as work:
            subject.step(ranges)
        rounds, watch, busy = Machine(device, subject.dtype), Watch(), load()
        begin = time.perf_counter()
        for _ in range(WARM_UP):
            _timed(subject, ranges)
            if time.perf_counter() - begin > WARM_UP_SECONDS:
                break
        _traced(subject, ranges, Watch())  # what the profiler does once
        plain, traced, trails = [], [], []
        for _ in range(steps):
            plain.append(_timed(subject, ranges))
            trace, line, trail = _traced(subject, ranges, watch)
            traced.append(line)
            trails.append(trail)
            rounds.round()
    rows = _rows(work, traced, kept, fired)
    about = {**subject.about, "device": str(device), "dtype": str(subject.dtype).removeprefix("torch.")}
    if not gpu:
        about["threads"] = str(torch.get_num_threads())
    found = StepProfile(
        subject.title, rows, tuple(line.wall for line in traced), tuple(plain), tuple(rounds.found), gpu, about,
        machine(device), None if kept is None else kept.summary(), tuple(watch.found), busy, tuple(changes(trails)),
        tuple(_ran(line) for line in traced), versions=versions(), trace=timeline.named(trace, traced[-1]),
    )  # fmt: skip
    bare = dict(subject.model.named_children()).get("_orig_mod", subject.model)
    seen = advice.Seen(
        bare, rows, found.wall, found.unattributed, found.rates, work.outputs,
        {name: int(median(trail.calls[name] for trail in trails)) for name in work.order}, subject.optimizer, device,
        subject.dtype, subject.backward, None if kept is None else kept.measured, memory_free(device), rounds.shorter,
    )  # fmt: skip
    return replace(found, advice=advice.advice(seen))


def versions() -> dict[str, str]:
    """Of what computes a step."""
    return {"python": platform.python_version(), "torch": torch.__version__, "trtkern": __version__}


def _timed(subject: Subject, ranges: Ranges) -> float:
    wait(subject.device)
    begin = time.perf_counter()
    subject.step(ranges)
    wait(subject.device)
    return time.perf_counter() - begin


def _traced(subject: Subject, ranges: Ranges, watch: Watch) -> tuple[dict[str, Any], Timeline, Trail]:
    """A step under torch.profiler: its trace, what that says, and which layers ran on what."""
    activities = [ProfilerActivity.CPU]
    gpu = subject.device.type == "cuda"
    if gpu:
        activities.append(ProfilerActivity.CUDA)
    wait(subject.device)
    trail = Trail()
    profiled = torch.profiler.profile(activities=activities)
    with profiled as profiler, ranges.layers(leave=trail.leave), watch.step(), ranges.phase(STEP):
        subject.step(ranges)
        wait(subject.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return trace, timeline.read(trace, ranges.place_of, gpu), trail


def _ran(line: Timeline) -> int:
    """How many operators or kernels ran, without those for a batch, whose changes are drawn at random."""
    places = (share for share in line.operators if share.place not in (LOADER, INPUT))
    return sum(ran.calls for share in places for ran in line.operators[share].values())


def _rows(work: Work, traced: list[Timeline], kept: MemoryReport | None, fired: FiringRates) -> tuple[PartTime, ...]:
    """A row for each layer that took time, in the order in which they first ran, then the other parts."""
    saved = {} if kept is None else {row.name.replace("_orig_mod.", ""): row.measured for row in kept.rows}
    rates = {name: layer.mean for name, layer in fired.layers.items()}
    for name, block in work.kinds.items():
        if issubclass(block, ConvBatchNormLIF) and f"{name}.norm" not in work.kinds and f"{name}.norm" in rates:
            rates[name] = rates[f"{name}.norm"]  # which a checkpoint runs without calling it

    def part(name: str, direction: timeline.Direction) -> Part:
        share = Share(name, direction)
        times = tuple(line.seconds.get(share, 0.0) for line in traced)
        return Part(times, work.bytes.get(share), work.flops.get(share, 0), _operators(share, traced))

    seen = {share.place for line in traced for share in line.seconds}
    names = [name for name in work.order if name in seen] + [name for name in PHASES if name in seen]
    rows = []
    for name in names:
        kind = work.kinds.get(name)
        forward, backward = part(name, "forward"), part(name, "backward")
        rows.append(
            PartTime(
                name, "" if kind is None else kind.__name__, _group(name, kind), forward, backward,
                work.how.get(name, ""), saved.get(name), rates.get(name),
            )
        )  # fmt: skip
    return tuple(rows)


def _operators(share: Share, traced: list[Timeline]) -> tuple[Operator, ...]:
    """What ran for a part, the longest first."""
    ran = [line.operators.get(share, {}) for line in traced]
    nothing = Ran(0.0, 0)
    made = [
        Operator(
            name,
            tuple(each.get(name, nothing).seconds for each in ran),
            int(median(each.get(name, nothing).calls for each in ran)),
        )
        for name in dict.fromkeys(name for each in ran for name in each)
    ]
    return tuple(sorted(made, key=lambda each: -each.seconds))


def _group(name: str, kind: type[nn.Module] | None) -> str:
    if kind is None:
        return SAID[name]
    return next((group for group, kinds in GROUPS.items() if issubclass(kind, kinds)), "other layers")


def _try(subject: Subject) -> None:
    """Raise if the model does not take its input."""
    try:
        with torch.no_grad():
            subject.forward()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        given = subject.about.get("input", "its batch")
        raise ValueError(f"profile: expected an input that {subject.title} takes, got {given}: {error}") from error


@contextmanager
def _put_back(subject: Subject) -> Iterator[None]:
    """Afterwards weights, gradients and optimiser are as before."""
    groups = [] if subject.optimizer is None else subject.optimizer.param_groups
    weights = list(dict.fromkeys([*subject.model.parameters(), *(w for group in groups for w in group["params"])]))
    gradients = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None  # the step would clear it in place, or add to it
    state = {} if subject.optimizer is None else {key: dict(held) for key, held in subject.optimizer.state.items()}
    tensors = [*weights, *(leaf for leaf in tree_leaves(list(state.values())) if isinstance(leaf, Tensor))]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                if not torch.equal(tensor, value):
                    tensor.data.copy_(value)  # no new version: a graph made before stays valid
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        if subject.optimizer is not None:
            subject.optimizer.state.clear()
            subject.optimizer.state.update(state)
