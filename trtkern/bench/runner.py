"""Running cases: who is in, compiled, checked against float64; rows as they come."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator

import torch

from trtkern.bench import contest, delays, layers, measure, others, overhead, peers, recurrent, rounds, rows, steps
from trtkern.bench.cases import Case, many
from trtkern.bench.layers import Layer, Where
from trtkern.bench.networks import LeftOut
from trtkern.bench.rounds import Bench, Interrupted, Options, Ready
from trtkern.profiling.step.rates import wait

_TIMING = 0.4
"""Of the budget of a case kept for the rounds: who has not been compiled and checked before is left out."""

_KERNELS = {"linear-lif": "lif", "bn-lif": "batch_norm_lif", "pack": "spikes_pack", "step": "batch_norm_lif"}
"""The op that a backend has to have for a case, where it is called otherwise."""


def run(cases: list[Case], options: Options, sink: Callable[[list[rows.Row]], None]) -> None:
    """Measure the cases in turn; ``sink`` gets the rows of each direction as soon as they are there, those of the
    rounds that are done also when the bench is interrupted.

    Raises:
        ValueError, RuntimeError: an unknown peer or backend, or one that cannot run here; nothing was measured then.
    """
    found = peers.choose(options.peers)
    for case in cases:
        _backends(case, options)
        if case.op == "overhead" and options.direction != "both":
            raise ValueError(f"--direction: expected both with --op {case.op}, got {options.direction}")
    measure.compile_apart()
    begin = time.monotonic()
    for at, case in enumerate(cases):
        share = max(0.0, options.budget - (time.monotonic() - begin)) / (len(cases) - at)
        _one(Bench(case, options, time.monotonic() + share, share), found, sink)


def _backends(case: Case, options: Options) -> list[str]:
    if case.op == "overhead":
        return overhead.backends(options.backend, options.device)
    op = _KERNELS.get(case.op, case.op)
    neuron = recurrent.KIND if op == "recurrent" else case.neuron
    where = Where(options.device, case.torch_dtype, case.timesteps, case.shape[-1], False, neuron)
    return layers.backends(options.backend, op, where)


def _one(bench: Bench, found: list[peers.Peer], sink: Callable[[list[rows.Row]], None]) -> None:
    options = bench.options
    if bench.case.op == "overhead":
        for made in overhead.tables(bench.case, options):
            sink(made)
        return
    directions: tuple[str, ...] = rounds.EACH if options.direction == "each" else (options.direction,)
    if bench.case.op == "linear-lif":
        directions = rounds.EACH[:2]
    for who, library in _contestants(bench, found):
        _admit(bench, who, library)
    for at, direction in enumerate(directions):
        share = max(0.0, bench.left) / (len(directions) - at)
        try:
            sink(rounds.measured(bench, direction, share))
        except Interrupted as stop:
            sink(stop.rows)
            raise
    bench.ready.clear()
    if options.compiled:
        torch._dynamo.reset()
    gc.collect()


def _contestants(bench: Bench, found: list[peers.Peer]) -> Iterator[tuple[contest.Contestant, str]]:
    """All that can run in the case, with the library that they are of; those that cannot go to ``left_out``."""
    case, options = bench.case, bench.options
    names = _backends(case, options)
    if case.op == "regularizer":
        made = others.regularizers(case, options.device, names, options.compiled)
        yield from ((who, rows.library(who.name)) for who in made)
        return
    if case.op == "pack":
        yield from (
            (who, rows.library(who.name)) for who in others.packs(case, options.device, names, options.compiled)
        )
        return
    if case.op == "delay":
        made = delays.delays(case, options.device, names, options.compiled)
        yield from ((who, rows.library(who.name)) for who in made)
        return
    if case.op == "step":
        for each in steps.steps(case, options.device, names, found, options.candidates):
            if isinstance(each, LeftOut):
                bench.left_out.append(each)
            else:
                yield each
        return
    width = math.prod(case.shape[2:]) if len(case.shape) > 2 else case.shape[1]
    where = Where(options.device, case.torch_dtype, case.timesteps, width, options.compiled, case.neuron)
    weight = recurrent.weights(case, options.device) if case.op == "recurrent" else None
    compared: list[Layer] = (
        [*layers.own(names, case.neuron), *layers.eager(where)]
        if weight is None
        else [*recurrent.own(names, weight), *recurrent.eager(where, weight)]
    )
    versions = {layer.name: rows.library(layer.name) for layer in compared}
    for peer in found:
        if peer.missing:
            if not many(options.suite):  # a hundred cases would say so, each
                bench.left_out.append((peer.name, "", "skipped", peer.missing))
            continue
        try:
            theirs = peer.layers(where) if weight is None else peer.recurrent(where, weight)
        except Exception as error:  # of whatever kind: the bench goes on without this library
            bench.left_out.append((peer.name, peer.version, "failed", rows.words(error)))
            continue
        compared += theirs
        versions |= {layer.name: f"{peer.name} {peer.version}" for layer in theirs}
    few = many(options.suite)
    if few:
        kept = case.op != "bn-lif"  # where this project's own is the fused one
        compared = [layer for layer in compared if layer.strong and (kept or versions[layer.name] != "trtkern")]
    # What may use up the budget comes last.
    compared.sort(key=lambda layer: (layer.compiled, layer.quadratic))
    if weight is not None:
        entries = recurrent.contestants(case, options.device, compared, weight)
    elif case.op == "lif":
        entries = contest.neurons(case, options.device, compared)
    elif case.op == "bn-lif":
        entries = contest.behind_norm(case, options.device, names, compared, alone=not few)
    else:
        entries = contest.behind_linear(case, options.device, compared)
    for who in entries:
        yield who, versions.get(who.name.removeprefix("BatchNorm, then "), rows.library(who.name))


def _admit(bench: Bench, who: contest.Contestant, library: str) -> None:
    """Compile, run and judge one contestant; what is wrong, fails, or would be too slow is said instead of timed."""

    def leave(status: str, note: str) -> None:
        bench.left_out.append((who.name, library, status, note))

    mine = library == "trtkern"
    if bench.left < _TIMING * bench.share and not mine and math.isfinite(bench.share):
        return leave("skipped", "what the budget has for checking and compiling was used up; give more seconds")
    try:
        if who.probe is not None and math.isfinite(bench.left) and 6 * (expected := who.probe()) > bench.left:
            return leave("skipped", f"over the budget: a run takes about {expected:.1f} s, by one sample of the batch")
        begin = time.perf_counter()
        if who.compiled:
            who.check()
        compile_s = time.perf_counter() - begin if who.compiled else 0.0
        verdict = who.check()
        if not verdict.right:
            return leave("WRONG", verdict.words)
        begin = time.perf_counter()
        who.both()
        wait(bench.options.device)
        seconds = time.perf_counter() - begin
    except Exception as error:  # of whatever kind: the others are measured
        return leave("failed", rows.words(error))
    said = verdict.words if bench.case.dtype != "float32" and not mine and verdict.words.startswith("keeps") else ""
    bench.ready.append(Ready(who, library, compile_s, seconds, "; ".join(filter(None, (who.note, said)))))
