"""The middle of some numbers, how far they scatter, and between which numbers their median lies."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """The quantiles of some numbers."""

    p20: float
    p50: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """A fifth of the values are below p20, half below p50, four fifths below p80; between two values it is a line."""
    low, high = (float(np.quantile(values, share)) for share in (0.2, 0.8))
    return Spread(low, median(values), high)


def interval(values: Sequence[float], miss: float = 0.1) -> tuple[float, float]:
    """Two of the values, between which the median of what they are drawn from lies.

    It is outside of the smallest and the largest of n with a chance of 2^(1-n), whatever they are drawn from; without k
    of them at either end with one of 2^(1-n) (C(n, 0) + ... + C(n, k)). As many go as that chance allows: of fewer than
    five values none, and then ``miss`` is not reached.

    Args:
        values: drawn independently, at least one.
        miss: the chance that the median is outside.
    """
    ordered = sorted(values)
    count = len(ordered)
    drop, ways = 0, 1  # those that can go at either end
    while 2 * (ways + comb(count, drop + 1)) <= miss * 2**count:
        drop += 1
        ways += comb(count, drop)
    return ordered[drop], ordered[count - 1 - drop]
