"""The kernels that compute on packed spikes against torch's own, over shapes and firing rates.

    python bench/spike_thresholds.py                    every shape; rows go to bench/spike_thresholds.csv
    python bench/spike_thresholds.py --only linear      the shapes whose name starts so

Which kernel is the fastest depends on the shape, the instruction set and the firing rate: lists cost in proportion to
the rate, the others cost the same at any. Each kernel that the instruction set in use has is compared with float64,
and then all of them and torch take turns. The rows have the median of its times and of its ratios to torch. At the end
stands, for each class of shapes, the firing rate below which lists are faster than the best of the others (torch, where
the instruction set has no other kernel).

torch convolves the same spikes as dense float32, channels last. Kernels include all that they prepare. With one thread
times are processor time, which other work on the machine changes less, with more they are time on the clock.
TRTKERN_CPU_ISA chooses the instruction set of the kernels; ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and
MKL_ENABLE_INSTRUCTIONS those of torch.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests.spike_convs, which also makes the cases of the tests

from tests.spike_convs import Convolution, _cpu  # noqa: E402
from trtkern.bench import rows  # noqa: E402
from trtkern.bench.measure import (  # noqa: E402
    Candidate,
    append,
    interleave,
    median_ratio,
    on_cpu,
    on_processor,
    warm_up,
)
from trtkern.malloc import keep_pages  # noqa: E402

PASSES = ("forward", "weight_grad")
RATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
POINT: dict[str, Any] = {"kernel": (1, 1), "padding": (0, 0)}
LINEAR = POINT | {"H": 1, "W": 1, "T": 100, "B": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "3x3 64-128 at 48": {"C": 64, "K": 128, "H": 48, "W": 48, "T": 4, "B": 8},
    "3x3 128-128 at 32": {"C": 128, "K": 128, "H": 32, "W": 32, "T": 6, "B": 4},
    "3x3 256-256 at 16": {"C": 256, "K": 256, "H": 16, "W": 16, "T": 6, "B": 4},
    "3x3 512-512 at 6": {"C": 512, "K": 512, "H": 6, "W": 6, "T": 4, "B": 8},
    "3x3 stride 2 128-256 at 32": {"C": 128, "K": 256, "H": 32, "W": 32, "T": 6, "B": 4, "stride": (2, 2)},
    "3x3 stride 2 256-512 at 16": {"C": 256, "K": 512, "H": 16, "W": 16, "T": 6, "B": 4, "stride": (2, 2)},
    "1x1 256-256 at 16": POINT | {"C": 256, "K": 256, "H": 16, "W": 16, "T": 6, "B": 4},
    "1x1 stride 2 128-256 at 32": POINT | {"C": 128, "K": 256, "H": 32, "W": 32, "T": 6, "B": 4, "stride": (2, 2)},
    "linear 784-512": LINEAR | {"C": 784, "K": 512},
    "linear 512-512": LINEAR | {"C": 512, "K": 512},
    "linear 1536-384": LINEAR | {"C": 1536, "K": 384, "T": 4, "B": 256},
    "pooled 3x3 128-256 at 24": {"C": 128, "K": 256, "H": 24, "W": 24, "T": 4, "B": 8, "pool": 2},
    "pooled 3x3 256-512 at 12": {"C": 256, "K": 512, "H": 12, "W": 12, "T": 4, "B": 8, "pool": 2},
    "sums 3x3 128-128 at 32": {"C": 128, "K": 128, "H": 32, "W": 32, "T": 6, "B": 4, "addends": 2},
}
"""By name, which starts with the class of the shape: all that comes before its channels."""


def class_of(shape: str) -> str:
    """What a threshold is for: the name up to the channels."""
    words = shape.split()
    return " ".join(words[: next(i for i, word in enumerate(words) if "-" in word)])


def torch_run(case: Convolution, direction: str) -> Callable[[], Tensor]:
    """What torch does with the same spikes."""
    x = case.values.float().contiguous(memory_format=torch.channels_last)
    if case.H * case.W * case.kernel[0] * case.kernel[1] == 1:
        rows_x, rows_g, weight = x.flatten(1), case.g.flatten(1), case.weight.flatten(1)
        if direction == "forward":
            return lambda: functional.linear(rows_x, weight)
        return lambda: rows_g.t().mm(rows_x)
    if direction == "forward":
        return lambda: functional.conv2d(x, case.weight, None, case.stride, case.padding)
    where = (None, case.stride, case.padding, (1, 1), False, (0, 0), 1, (False, True, False))
    return lambda: torch.ops.aten.convolution_backward(case.g, x, case.weight, *where)[1]


def kernel_run(case: Convolution, kernel: str, direction: str, threads: int) -> Callable[[], object]:
    """A launch of a kernel, into memory of its own."""
    a = case.arguments(kernel, threads)
    y, gweight = torch.empty_like(case.g), torch.empty_like(case.weight)
    a.y, a.gweight = y.data_ptr(), gweight.data_ptr()
    launch = _cpu.spike_conv_forward if direction == "forward" else _cpu.spike_conv_weight_grad
    return lambda: (launch(a), y, gweight)


def check(case: Convolution, kernel: str, direction: str, expected: Tensor, threads: int) -> None:
    """Ends the program where a kernel is wrong."""
    got = case.forward(kernel, threads) if direction == "forward" else case.weight_grad(kernel, threads)
    error = math.inf if got is None else float((got.double() - expected).abs().max() / expected.abs().max())
    if not error <= 1e-5:
        sys.exit(f"{kernel}, {direction}, {case}: WRONG and not timed: off by {error:.1e} of the largest")


def measured(shape: str, rate: float, direction: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """A row for torch and for each kernel that takes the shape."""
    case = Convolution(rate=rate, **SHAPES[shape])
    kernels = [kernel for kernel in _cpu.SPIKE_KERNELS if case.takes(kernel, direction == "weight_grad")]
    expected = case.expected() if direction == "forward" else case.expected_weight_grad()
    for kernel in kernels:
        check(case, kernel, direction, expected, threads)
    candidates = [Candidate("torch", torch_run(case, direction), 0)]
    candidates += [Candidate(kernel, kernel_run(case, kernel, direction, threads), 0) for kernel in kernels]
    for candidate in candidates:
        warm_up(candidate, 2)
    timer = on_processor if threads == 1 else on_cpu
    times = interleave(candidates, [rounds] * len(candidates), f"{shape}, {rate}", timer=timer)
    origin = rows.origin(torch.device("cpu"))
    active = float((case.values != 0).double().mean())
    return [
        {
            **origin, "isa": _cpu.isa(), "shape": shape, "rate": rate, "active": active,
            "kernel": candidate.name, "pass": direction, "rounds": rounds,
            "ms": 1e3 * statistics.median(times[candidate.name]),
            "ratio": median_ratio(times[candidate.name], times["torch"])[0],
            "command": " ".join(["python", "bench/spike_thresholds.py", *sys.argv[1:]]),
        }
        for candidate in candidates
    ]  # fmt: skip


def crossing(found: dict[float, tuple[float, float]]) -> float:
    """The rate at which lists get slower than the others, of the ratios (lists, best other) at each rate: on a line
    between two of them; 0 and infinity: never and always faster."""
    last = None
    for rate, (lists, other) in sorted(found.items()):
        if lists > other:
            if last is None:
                return 0.0
            gain = found[last][1] - found[last][0]
            return last + (rate - last) * gain / (gain + lists - other)
        last = rate
    return math.inf


def thresholds(made: list[dict[str, Any]]) -> list[str]:
    """A line for each class of shapes and pass: the rate below which lists are the fastest, of each of its shapes."""
    found: dict[tuple[str, str], list[float]] = {}
    for shape in dict.fromkeys(row["shape"] for row in made):
        for direction in PASSES:
            of = [row for row in made if row["shape"] == shape and row["pass"] == direction]
            ratios = {}
            for rate in dict.fromkeys(row["rate"] for row in of):
                at = {row["kernel"]: row["ratio"] for row in of if row["rate"] == rate}
                others = [value for name, value in at.items() if name not in ("lists", "torch")] or [at["torch"]]
                if "lists" in at:
                    ratios[rate] = (at["lists"], min(others))
            if ratios:
                found.setdefault((class_of(shape), direction), []).append(crossing(ratios))
    return [
        f"{name:16} {direction:12} lists are the fastest below a rate of {', '.join(f'{rate:.2f}' for rate in rates)}"
        for (name, direction), rates in found.items()
    ]


def main() -> None:
    """Measure the shapes that the command line asks for, show their rows and append them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only shapes whose name starts with this")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="firing rates")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "spike_thresholds.csv", help="CSV to append to")
    options = parser.parse_args()
    chosen = [shape for shape in SHAPES if shape.startswith(options.only)]
    if not chosen or options.rounds < 3:
        parser.error(f"expected at least 3 rounds, and a shape of {', '.join(SHAPES)}")
    torch.set_num_threads(options.threads)
    _cpu.use_isa(os.environ.get("TRTKERN_CPU_ISA", ""))
    keep_pages()
    made = []
    for shape in chosen:
        for rate in options.rates:
            for direction in PASSES:
                new = measured(shape, rate, direction, options.threads, options.rounds)
                append(new, options.output)
                made += new
                figures = "  ".join(f"{row['kernel']} {row['ms']:.2f} ms {row['ratio']:.2f}" for row in new)
                print(f"{shape}, {rate:g}, {direction}: {figures}", flush=True)
    print("\n".join(thresholds(made)))


if __name__ == "__main__":
    main()
