"""A handful of small cells on a GPU: what ``make gpu`` runs by itself first, then under compute-sanitizer.

    python bench/gpu_cells.py             the backends cuda and triton; exit status 1 if one is wrong or not built
    python bench/gpu_cells.py --sparse    the fewest cells, for a tool that makes each launch many times slower

Each is compared with float64 and told as it comes. Past ``TRTKERN_UNTIL`` (of ``time.time``) none begins.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import gpu_stages
import torch

from trtkern import selftest
from trtkern.backends import named
from trtkern.backends.base import RegularizerSpec
from trtkern.bench import rows
from trtkern.selftest.recurrent import RecurrentCell, compare_recurrent


def cells(backend: str, device: str, sparse: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What each is, and a function that is falsy, or raises, where the results are wrong."""
    shape = (2, 3, 11)
    # The second is long enough for every place of the rings of csrc/lif/cuda_ahead.h.
    kinds = (("triangle", "hard", 4), ("sigmoid", "soft", 130))[: 1 if sparse and backend != "cuda" else 2]
    for dtype in (torch.float32,) if sparse else (torch.float32, torch.bfloat16):
        for surrogate, reset, steps in kinds:
            returned = "v" if dtype == torch.float32 else "h"
            lif = selftest.Cell(
                dtype, surrogate, reset, learnable="channel", timesteps=steps, shape=shape, returned=returned
            )
            yield str(lif), lambda lif=lif: selftest.compare(backend, lif, device).within(lif.dtype)
    if named(backend).holds("batch_norm_lif"):
        norms = [
            selftest.NormCell(residual="packed", learnable="channel", shape=shape),
            selftest.NormCell(surrogate="atan", training=False, shape=(2, 3, 4, 6), pool=True),
        ]
        for norm in norms[: 1 if sparse else 2]:
            yield str(norm), lambda norm=norm: selftest.compare_norm(backend, norm, device).within(norm.dtype)
    if named(backend).holds("regularizer"):
        spec = RegularizerSpec(6, 1e-5, 0.25, 1e-5)
        yield (
            "regularizer",
            lambda: selftest.compare_regularizer(backend, spec, device) <= selftest.REGULARIZER_TOLERANCE,
        )
    if named(backend).holds("spikes_pack"):
        spikes = (torch.arange(5 * 67, device=device).view(5, 67) % 3 == 0).float()
        ops = torch.ops.trtkern
        words = lambda: ops.spikes_pack(spikes, backend)  # noqa: E731
        yield "packing", lambda: torch.equal(ops.spikes_unpack(words(), 0, 5, False, spikes.dtype, backend), spikes)
    if named(backend).holds("recurrent"):
        for neuron in ("ALIF",) if sparse else ("LIF", "ALIF"):
            fed = RecurrentCell(neuron, timesteps=9, batch=5)
            yield str(fed), lambda fed=fed: compare_recurrent(backend, fed, device).within(fed.dtype)
    if backend == "triton":
        yield from layers(torch.device(device), sparse)


def layers(device: torch.device, sparse: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same of layers that multiply packed spikes, each way that there is."""
    import gpu_spike_conv  # needs Triton

    for layer in gpu_spike_conv.SMALL[:1] if sparse else gpu_spike_conv.SMALL[::2]:
        given = gpu_spike_conv.Inputs(layer, device)
        for direction in ("fwd", "bwd"):
            want = gpu_spike_conv.dense(layer, given, torch.float64, direction)()
            for name, run, tolerance in gpu_spike_conv.candidates(layer, given, direction):
                if name.startswith("trtkern"):
                    test = partial(gpu_spike_conv.wrong, run, want, tolerance)
                    yield f"{layer.name}, {direction}, {name}", lambda test=test: not test()


def judged(name: str, run: Callable[[], Any]) -> bool:
    """Run one, say what came of it."""
    begin = time.monotonic()
    try:
        verdict = "ok" if run() else "WRONG"
    except Exception as error:  # of whatever kind: the others run
        verdict = f"FAILED: {rows.words(error)}"
    print(f"{name}: {verdict}, {time.monotonic() - begin:.1f} s", flush=True)
    return verdict == "ok"


def absent(backend: str, reason: str) -> bool:
    """Say that a backend is not here; whether it should be, for its compiler and a GPU are."""
    tool = {"cuda": shutil.which("nvcc"), "triton": find_spec("triton")}[backend]
    expected = tool is not None and torch.cuda.is_available()
    print(f"backend {backend} is not here{', though its compiler is' if expected else ''}: {reason}", flush=True)
    return expected


def main() -> int:
    """All cells of both backends; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse", action="store_true")
    sparse = parser.parse_args().sparse
    until, wrong, late, right = float(os.environ.get(gpu_stages.UNTIL, "inf")), 0, 0, 0
    for backend in ("cuda", "triton"):
        if (reason := named(backend).missing()) is not None:
            wrong += absent(backend, reason)
            continue
        for name, run in cells(backend, selftest.device_of(named(backend)), sparse):
            if time.time() > until:
                late += 1
            elif judged(f"{backend}, {name}", run):
                right += 1
            else:
                wrong += 1
    if late:
        print(f"{gpu_stages.CUT_MARK}{late} cells were not run; give GPU_MINUTES more")
    print(f"{right} cells are right, {wrong} are wrong, failed or without their backend")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
