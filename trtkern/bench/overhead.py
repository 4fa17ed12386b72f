"""``trtkern bench --op overhead``: the time of the host for one layer's forward and backward pass.

On the cpu backend it is measured on a tensor so small that the kernels take next to no time, beside ReLU, or
BatchNorm2d and ReLU on images whose steps are folded into the batch. Where no GPU is, the GPU backends are measured in
a process of their own, ``stubbed``, in which launches do nothing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trtkern import nn as snn
from trtkern.bench import cells, contest, gate, layers, measure, rounds, rows
from trtkern.bench.cases import Case
from trtkern.ops._library import unseen
from trtkern.profiling.unchanged import quiet

PAIRS = {"LIF": "ReLU", "PLIF": "ReLU", "BatchNormLIF": "BatchNorm2d + ReLU"}
"""The layers, and what each is set beside."""
STUBBED = (4, 64, 32, 8, 8)
"""The shape on which the GPU backends are measured without a GPU: a layer's, since it decides which kernels run."""
ON_GPU = ("triton", "cuda")
UNCHECKED = ("cuda",)
"""Of these, what cannot be compared with float64 without a GPU; the rows say so."""


class Subject(NamedTuple):
    """A layer, with what it is called on and what it is judged by."""

    name: str
    run: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    x: Tensor
    """A leaf."""
    g: Tensor
    want: Callable[[], gate.Truth]

    def both(self) -> None:
        """Forward and backward; the gradients go, as a training step's do."""
        self.run(self.x).backward(self.g)
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    def verdict(self) -> gate.Verdict:
        """Whether what is above 0, and the gradient of x, are those of float64."""
        out = self.run(self.x)
        out.backward(self.g)
        assert self.x.grad is not None
        found, gx = (out.detach() > 0).to(out.dtype).flatten(1), self.x.grad.flatten(1)
        self.x.grad = None
        return gate.judge(found, gx, self.want())

    def aten_ops(self) -> tuple[int, int]:
        """How many of torch's own operators run in a forward and in a backward pass, those inside others included."""
        made: list[Tensor] = []
        forward = _counted(lambda: made.append(self.run(self.x)))
        backward = _counted(lambda: made.pop().backward(self.g))
        self.x.grad = None
        return forward, backward


def _counted(run: Callable[[], Any]) -> int:
    with warnings.catch_warnings(), quiet(), unseen():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
    return sum(event.name.startswith("aten::") for event in profile.events())


def own(kind: str, case: Case, backend: str) -> Subject:
    """This project's layer of that name."""
    x, g = _inputs(case)
    layer = snn.BatchNormLIF(case.shape[2], backend=backend) if kind == "BatchNormLIF" else _neuron(kind, backend)
    neuron = layers.OWN if kind == "BatchNormLIF" else layers.defaults(kind)
    truth = contest.normed_truth if kind == "BatchNormLIF" else gate.truth
    return Subject(f"trtkern {backend}", layer, tuple(layer.parameters()), x, g, lambda: truth(x, g, neuron))


def _neuron(kind: str, backend: str) -> nn.Module:
    layer: nn.Module = getattr(snn, kind)(backend=backend)
    return layer


def other(name: str, case: Case) -> Subject:
    """What stands in the place of the layer in a network without spikes, on [T * B, C, H, W]."""
    x, g = (each.detach().flatten(0, 1) for each in _inputs(case))
    x.requires_grad_()
    run, parameters = _module(name, case.shape[2])

    def want() -> gate.Truth:
        leaf = x.detach().double().requires_grad_()
        exact = _module(name, case.shape[2], torch.float64)[0](leaf)
        (gx,) = torch.autograd.grad(exact, leaf, g.double())
        return gate.Truth((exact.detach() > 0).flatten(1), gx.float().flatten(1))

    return Subject(name, run, parameters, x, g, want)


def _module(
    name: str, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]:
    if name == "ReLU":
        return nn.ReLU(), ()
    norm, relu = nn.BatchNorm2d(channels).to(dtype), nn.ReLU(inplace=True)
    return lambda x: relu(norm(x)), tuple(norm.parameters())


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Currents, a leaf, and the gradient of what is made of them."""
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(case.shape, generator=draw).to(case.torch_dtype) for _ in range(2))
    return x.requires_grad_(), g


def timed(subjects: Sequence[Subject], visits: int, label: str) -> dict[str, list[float]]:
    """Seconds of a call by the subject's name, a number a round; the subjects take turns."""
    candidates = [measure.Candidate(subject.name, subject.both, 0) for subject in subjects]
    for candidate in candidates:
        measure.warm_up(candidate, calls=cells.CALLS)
    return measure.interleave(candidates, [visits] * len(candidates), label, timer=cells.median)


def backends(name: str, device: torch.device) -> list[str]:
    """The backends of the command line's name: all are cpu and the GPU's.

    Raises:
        ValueError: one whose host time is not measured, or another device than the CPU.
    """
    if device.type != "cpu":
        raise ValueError(f"--device: expected cpu with --op overhead, which is the host's time, got {device}")
    known = ("cpu", *ON_GPU)
    if name not in ("all", "auto", *known):
        raise ValueError(f"--backend: expected one of all, {', '.join(known)} with --op overhead, got {name!r}")
    return list(known) if name == "all" else ["cpu" if name == "auto" else name]


def tables(case: Case, options: rounds.Options) -> Iterator[list[rows.Row]]:
    """The rows of a case, layer after layer: of the cpu backend, with steps in a loop, then of the GPU's without a
    GPU."""
    for name in backends(options.backend, options.device):
        if name in ON_GPU:
            yield from _stubbed(name, case, options)
        else:
            yield from _on_cpu(name, case, options)
            yield from cells.tables(options)


def _on_cpu(backend: str, case: Case, options: rounds.Options) -> Iterator[list[rows.Row]]:
    twins = {name: other(name, case) for name in dict.fromkeys(PAIRS.values())}
    mine = {kind: own(kind, case, backend) for kind in PAIRS}
    wrong = {name: verdict.words for name, each in {**twins, **mine}.items() if not (verdict := each.verdict()).right}
    fit = {name: each._replace(name=name) for name, each in {**twins, **mine}.items() if name not in wrong}
    times = timed(list(fit.values()), options.rounds, case.name)
    for kind, twin in PAIRS.items():
        same, made = rounds.common(replace(case, neuron=kind), options, "both"), []
        for name, subject in ((kind, mine[kind]), (twin, twins[twin])):
            said: dict[str, Any] = {"candidate": subject.name, "library": rows.library(subject.name)}
            if name in wrong:
                made.append(rows.Row(**same, **said, status="WRONG", note=wrong[name]))
                continue
            note = "aten ops: {} forward, {} backward".format(*subject.aten_ops())
            ours = times.get(kind, [math.nan] * options.rounds)
            made.append(rows.Row(**same, **said, status="ok", note=note, **rows.figures(times[name], [], ours, 0, 0)))
        yield made


def _stubbed(backend: str, case: Case, options: rounds.Options) -> Iterator[list[rows.Row]]:
    """What ``stubbed`` measures of a GPU backend, after its kernels were compared with float64 where they can run."""
    large = replace(case, shape=STUBBED)
    said: dict[str, Any] = {"candidate": f"trtkern {backend}, no GPU", "library": "trtkern"}
    if torch.cuda.is_available():
        found: dict[str, Any] = {"skipped": "a GPU is here; its launches would have to be left out"}
    else:
        found = {} if backend in UNCHECKED else _child("check", backend, case, options)
        if not {"skipped", "failed"} & found.keys():
            found = {**_child("time", backend, large, options), **found}
    for kind in PAIRS:
        same = {**rounds.common(replace(large, neuron=kind), options, "both"), **said}
        if "skipped" in found or "failed" in found:
            status, note = next((status, found[status]) for status in ("skipped", "failed") if status in found)
            yield [rows.Row(**same, status=status, note=note)]
        elif isinstance(found[kind], str):
            yield [rows.Row(**same, status="WRONG", note=found[kind])]
        else:
            seconds, (forward, backward) = found[kind]["seconds"], found[kind]["launches"]
            note = f"launches, which do nothing: {forward} forward, {backward} backward"
            if backend in UNCHECKED:
                note += "; not compared with float64, which takes a GPU"
            figures = rows.figures(seconds, [], [math.nan] * len(seconds), 0, 0)
            yield [rows.Row(**same, status="ok", note=note, **figures)]


def _child(what: str, backend: str, case: Case, options: rounds.Options) -> dict[str, Any]:
    """What the process ``stubbed`` says; {"failed": why} if it ends with an error."""
    shape = ",".join(map(str, case.shape))
    command = [sys.executable, "-m", "trtkern.bench.stubbed", what, backend, shape, case.dtype]
    command += [str(options.rounds), str(torch.get_num_threads())]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if what == "check" else "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": " ".join(lines[-1].split())[:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
