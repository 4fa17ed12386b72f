"""Layers on packed spikes in Triton against torch's on dense ones: a stage of ``make gpu``, which writes rows.

    python bench/gpu_spike_conv.py --csv FILE                  the layers of VGGSNN, ResNet-19 and an MLP, on the GPU
    python bench/gpu_spike_conv.py --csv FILE --small          without a GPU: tiny layers, Triton in its interpreter

Forward ("fwd") and the weight's gradient ("bwd"), each way to multiply of ``trtkern.kernels.spike_conv_launch`` beside
cuDNN's and cuBLAS's float32, tf32 and bfloat16. All are compared with float64 before anything is timed. The gradient of
the input is a product of dense tensors in both, and is not timed.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import gpu_stages
import torch
from torch import Tensor
from torch.nn import functional as F

from trtkern.bench import measure, rows
from trtkern.bench.gate import TOLERANCE
from trtkern.kernels.spike_conv_launch import FORWARD_TILES, GRADIENT_TILES, forward_launches, weight_gradient_launches
from trtkern.ops.spikes import pack, unpack

ROUNDS = 20
RATE = 0.2
"""Of neuron-steps that fire; no candidate's time should depend on it."""
TF32 = 2e-3
"""Tolerance of tf32, relative to the largest number: it has 11 bits of each factor."""


class Layer(NamedTuple):
    """A layer without its neurons."""

    network: str
    T: int
    B: int
    C: int
    K: int
    side: int
    """Of the image that is convolved; 0: a linear layer."""
    window: int = 3
    stride: int = 1
    pooled: bool = False
    """Its input is the 2 x 2 averages of an image twice as large, whose words it is given."""

    @property
    def name(self) -> str:
        size = f"{self.C}-{self.K}" + (f" {self.window}x{self.window} on {self.side}x{self.side}" if self.side else "")
        more = f"{f' stride {self.stride}' if self.stride > 1 else ''}{' pooled' if self.pooled else ''}"
        return f"{self.network} {size}{more}, T={self.T}, B={self.B}"


LAYERS = (
    Layer("vggsnn", 10, 32, 64, 128, 48),
    Layer("vggsnn", 10, 32, 128, 256, 24, pooled=True),
    Layer("vggsnn", 10, 32, 512, 512, 12),
    Layer("resnet19", 6, 64, 128, 128, 32),
    Layer("resnet19", 6, 64, 128, 256, 32, stride=2),
    Layer("resnet19", 6, 64, 128, 256, 32, window=1, stride=2),
    Layer("resnet19", 6, 64, 512, 512, 8),
    Layer("mlp", 4, 256, 2048, 2048, 0),
    Layer("mlp", 16, 256, 512, 512, 0),
)
SMALL = (Layer("vggsnn", 4, 1, 16, 16, 4), Layer("vggsnn", 3, 1, 8, 5, 3, pooled=True), Layer("mlp", 4, 2, 16, 10, 0))


class Inputs:
    """Of a layer, channels last: words, dense spikes, weight and gradient in float64."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        draw = torch.Generator(device).manual_seed(0)
        side = layer.side * (2 if layer.pooled else 1)
        image = (side, side) if side else ()
        shape = (layer.T, layer.B, *image, layer.C)
        spikes = (torch.rand(shape, generator=draw, device=device) < RATE).to(torch.bfloat16)
        spikes = spikes.movedim(-1, 2)
        self.words = pack(spikes)
        self.dense = unpack(self.words, layer.T, pooled=layer.pooled, dtype=torch.bfloat16).flatten(0, 1)
        self.padding = layer.window // 2
        window = (layer.window, layer.window) if side else ()
        self.weight = self._drawn(draw, device, (layer.K, *window, layer.C), layer)
        out = (layer.side + 2 * self.padding - layer.window) // layer.stride + 1
        self.g = self._drawn(draw, device, (layer.T * layer.B, *((out, out) if side else ()), layer.K), layer)

    @staticmethod
    def _drawn(draw: torch.Generator, device: torch.device, shape: tuple[int, ...], layer: Layer) -> Tensor:
        """Numbers that float32 and bfloat16 hold alike, so that all candidates are given the same."""
        made = torch.randn(shape, generator=draw, device=device).bfloat16().double()
        return made.movedim(-1, 1) if layer.side else made


Run = Callable[[], Tensor]


def dense(layer: Layer, given: Inputs, dtype: torch.dtype, direction: str, tf32: bool = False) -> Run:
    """torch's own: cuDNN's convolution, cuBLAS's product."""
    x, weight, g = (each.to(dtype) for each in (given.dense, given.weight, given.g))

    def run() -> Tensor:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        if direction == "fwd":
            return F.conv2d(x, weight, None, layer.stride, given.padding) if layer.side else F.linear(x, weight)
        if not layer.side:
            return g.T @ x
        two = ([layer.stride] * 2, [given.padding] * 2, [1, 1])
        return torch.ops.aten.convolution_backward(g, x, weight, None, *two, False, [0, 0], 1, [False, True, False])[1]

    return run


def packed(layer: Layer, given: Inputs, dtype: torch.dtype, direction: str, precision: str) -> Run:
    """This project's kernels, with all that they launch and allocate."""
    weight, g = given.weight.to(dtype), given.g.to(dtype)
    options = {"stride": layer.stride, "padding": given.padding, "pooled": layer.pooled} if layer.side else {}

    def run() -> Tensor:
        if direction == "fwd":
            out = torch.empty_like(g)
            launches = forward_launches(given.words, weight, None, out, precision=precision, **options)
        else:
            out = torch.empty_like(weight)
            launches = weight_gradient_launches(given.words, g, out, precision=precision, **options)
        for launch in launches:
            launch()
        return out

    return run


def candidates(layer: Layer, given: Inputs, direction: str) -> Iterator[tuple[str, Run, float]]:
    """Name, what to run, tolerance; this project's first one is what the others are compared with."""
    f32, bf16 = torch.float32, torch.bfloat16
    known = FORWARD_TILES if direction == "fwd" else GRADIENT_TILES
    for way in sorted(known.keys() - {"half"}, reverse=True):
        yield f"trtkern {way}", packed(layer, given, f32, direction, way), TOLERANCE[f32]
    yield "trtkern bfloat16", packed(layer, given, bf16, direction, "ieee"), TOLERANCE[bf16]
    yield "torch float32", dense(layer, given, f32, direction), TOLERANCE[f32]
    if given.words.is_cuda:
        yield "torch tf32", dense(layer, given, f32, direction, tf32=True), TF32
    yield "torch bfloat16", dense(layer, given, bf16, direction), TOLERANCE[bf16]


def wrong(run: Run, want: Tensor, tolerance: float) -> str:
    """In what a result differs from float64; empty where it does not."""
    error = (run().double() - want).abs()
    worst = (error.nan_to_num(torch.inf).max() / want.abs().max()).item()
    return "" if worst <= tolerance else f"off by up to {worst:.1e}"


def measured(layer: Layer, device: torch.device, direction: str, seconds: float) -> list[rows.Row]:
    """The rows of one layer and direction, in that time."""
    given = Inputs(layer, device)
    want = dense(layer, given, torch.float64, direction)()
    operations = 2.0 * want.numel() * (given.weight[0].numel() if direction == "fwd" else len(given.g))
    if direction == "bwd" and layer.side:
        operations *= given.g[0, 0].numel()
    same = {
        **rows.origin(device), "malloc": "", "suite": "spike-conv", "case": f"spike-conv {layer.name}",
        "op": "spike-conv", "shape": ",".join(map(str, layer[1:6])), "dtype": "mixed", "direction": direction,
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    ready, made = [], []
    for name, run, tolerance in candidates(layer, given, direction):
        begin = time.monotonic()
        try:
            status, note = "WRONG", wrong(run, want, tolerance)
        except Exception as error:  # of whatever kind: the others run
            status, note = "failed", rows.words(error)
        if note:
            made.append(rows.Row(**same, candidate=name, library=rows.library(name), status=status, note=note))
        else:
            compiled = name.startswith("trtkern") * (time.monotonic() - begin)  # the comparison is in it
            ready.append(measure.Candidate(name, run, 0, round(compiled, 1)))
    del want
    longest = max((measure.warm_up(each, seconds=seconds / 20) for each in ready), default=1.0)
    rounds = max(3, min(ROUNDS, int(seconds / 2 / max(longest * len(ready), 1e-9))))
    times = measure.interleave(ready, [rounds] * len(ready), same["case"], timer=measure.clock(device))
    first = next((each for name, each in times.items() if rows.library(name) == "trtkern"), [math.nan] * rounds)
    for name, mine, compiled in ((each.name, times[each.name], each.compile_s) for each in ready):
        note = f"{operations / statistics.median(mine) / 1e12:.2f} TFLOP/s, as of dense spikes"
        figures = {**rows.figures(mine, mine, first, 0, 1), "compile_s": compiled}
        made.append(rows.Row(**same, candidate=name, library=rows.library(name), status="ok", note=note, **figures))
    return made


def main() -> int:
    """Measure every layer, rows as they come; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="rows are added to it")
    parser.add_argument("--seconds", type=float, default=120.0, help="of all together (default: 120)")
    parser.add_argument("--small", action="store_true", help="tiny layers, on the CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.small else "cuda")
    torch.backends.cudnn.benchmark = True
    todo = [(layer, way) for layer in (SMALL if options.small else LAYERS) for way in ("fwd", "bwd")]
    begin, late, found = time.monotonic(), 0, []
    quiet = nullcontext()
    if options.small:  # the interpreter computes with numpy, which warns of what is silent on a GPU
        import numpy

        quiet = numpy.errstate(all="ignore")
    with quiet, torch.no_grad():
        for at, (layer, direction) in enumerate(todo):
            left = options.seconds - (time.monotonic() - begin)
            if left <= 0:
                late += 1
                continue
            made = measured(layer, device, direction, left / (len(todo) - at))
            rows.append(made, options.csv)
            found += made
            for row in made:
                print(
                    f"{row.case} {row.direction}, {row.candidate}: {row.status} {row.p50_ms} ms {row.note}", flush=True
                )
    if late:
        print(f"{gpu_stages.CUT_MARK}{late} layers were not measured; give GPU_MINUTES more")
    return int(any(row.status in ("WRONG", "failed") and row.library == "trtkern" for row in found))


if __name__ == "__main__":
    sys.exit(main())
