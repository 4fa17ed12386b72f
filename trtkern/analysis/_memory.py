"""What moving values to and from memory costs, as Lemaire et al. model it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import NamedTuple


class Work(NamedTuple):
    """What one layer does for one sample."""

    operations: float
    """Sums and multiplications: a weight and a potential each."""
    values: float
    """Inputs that are not 0."""
    steps: int
    inputs: int
    """Of one step."""
    outputs: int
    """Potentials: outputs of one step."""
    weights: int
    biases: int
    convolution: bool


@dataclass(frozen=True)
class Memory:
    """Memories on the chip, one for each layer's weights, biases, potentials and queue of inputs.

    Lemaire et al. 2022, "An Analytical Estimation of Spiking Neural Networks Energy Efficiency" (ICONIP; arXiv
    2210.13107), equations 5, 7 to 10 and 13 to 17 as implemented by their co-author in qualia-plugin-snn and in
    SpikingJelly 2.0 (``LemaireEnergyProfiler``). Where the equations estimate the operations of a spike from the size
    of the kernel, the exact count is taken.

    Args:
        bits: of a weight, a bias, a potential, a value in a queue.
        sizes: (bytes of a memory, pJ of one access to it), rising; between two of them the energy is on a line, and
            above the last it stays. The defaults are Horowitz's 45 nm caches (ISSCC 2014), from nothing for no memory.

    Raises:
        ValueError: sizes that do not rise, or numbers that are not finite or below 0.
    """

    bits: int = 32
    sizes: tuple[tuple[float, float], ...] = ((0.0, 0.0), (8192.0, 10.0), (32768.0, 20.0), (1048576.0, 100.0))

    def __post_init__(self) -> None:
        rising = len(self.sizes) > 0 and all(a[0] < b[0] for a, b in pairwise(self.sizes))
        if self.bits < 1 or not rising or not all(isfinite(v) and v >= 0 for pair in self.sizes for v in pair):
            raise ValueError(
                f"Memory: expected bits >= 1 and sizes (bytes, pJ) in rising order, got bits={self.bits}, "
                f"sizes={self.sizes}"
            )

    def access(self, words: float) -> float:
        """pJ of one access to a memory of so many words."""
        size = words * self.bits / 8
        place = bisect_left([at for at, _ in self.sizes], size)
        if place in (0, len(self.sizes)):
            return self.sizes[min(place, len(self.sizes) - 1)][1]
        (low, a), (high, b) = self.sizes[place - 1 : place + 1]
        return a + (b - a) * (size - low) / (high - low)

    def traffic(self, work: Work, sum_pj: float, mac_pj: float) -> dict[str, float]:
        """pJ a sample of one layer: "weights", "potentials", "values" (read and written), "addresses" (computed).

        An operation reads a weight, reads a potential and writes it (equations 7 to 10, 14, 15); every step reads and
        writes each potential once more, for the neuron's update; a bias is read at every step. A value that is not 0 is
        written to the queue of its reader and read from there once (5, 13). To find where it goes takes two
        multiplications in a convolution, and a sum for every operation (16, 17).
        """
        per_step = work.steps * work.outputs
        weights = work.operations * self.access(work.weights)
        if work.biases:
            weights += per_step * self.access(work.biases)
        return {
            "weights": weights,
            "potentials": 2 * (work.operations + per_step) * self.access(work.outputs),
            "values": 2 * work.values * self.access(work.inputs),
            "addresses": (2 * work.values * mac_pj if work.convolution else 0.0) + work.operations * sum_pj,
        }
