"""Float32 weights as three bfloat16 or three int8, and how far a sum of spikes is off with them."""

from __future__ import annotations

import pytest
import torch
from spike_products import DEVICE, REASON, drawn, forward, run

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def split(weight, precision):
    """parts [3, K, R] in float64, and the scale or None."""
    from trtkern.kernels.spike_conv_launch import split_launch

    launch, parts, scale = split_launch(weight.to(DEVICE), precision)
    run([launch])
    return parts.cpu().double(), None if scale is None else scale.cpu().double()


def any_finite(K, R):
    """Any bits of float32 that are a finite number."""
    bits = torch.randint(-(2**31), 2**31, (K, R), dtype=torch.int64).to(torch.int32)
    return torch.where((bits >> 23 & 255) == 255, bits & 0x7FFFFF, bits).view(torch.float32)


DIGITS = 127 * 65536 + 127 * 256 + 127
"""The largest number of three digits."""
EDGES = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-126, 3.4028234663852886e38, 1 + 2.0**-23, 2 - 2.0**-23, 1 / 3])


def test_three_bfloat16_are_the_weight():
    weight = torch.cat((any_finite(8, 1500), EDGES.expand(8, -1)), 1)
    parts, scale = split(weight, "bf16x3")
    error = (parts.sum(0) - weight.double()).abs()
    assert scale is None and (error <= 2.0**-133).all()
    assert (error[weight.abs() >= 2.0**-110] == 0).all()
    assert (parts[1].abs() <= 2.0**-7 * parts[0].abs()).all()


def test_three_bfloat16_of_what_is_not_finite():
    parts, _ = split(torch.tensor([[torch.inf, -torch.inf, torch.nan]]), "bf16x3")
    assert parts[:, 0, 0].tolist() == [torch.inf, 0, 0] and parts[:, 0, 1].tolist() == [-torch.inf, 0, 0]
    assert parts[1, 0, 2].isnan()
    low_bits = torch.tensor([[0x7F800001]], dtype=torch.int32).view(
        torch.float32
    )  # NaN, whose upper half is infinity's
    assert split(low_bits, "bf16x3")[0].sum(0).isnan().all()


def rows_of_every_size():
    """Rows whose largest weight is anything from denormal to the largest number, with the edges of the digits."""
    weight = torch.randn(64, 1100)
    weight *= 2.0 ** torch.linspace(-140, 120, 64)[:, None]
    for i, significand in enumerate((0xFEFEFE, 0xFEFEFF, 0xFEFEFD, 0xFFFFFF, 0x800000, 0x800001)):
        weight[i + 20] = torch.rand(1100) - 0.5
        weight[i + 20, i] = significand * 2.0**-23
    weight[0] = 0
    weight[63, 0] = 3.4028234663852886e38
    return weight


def test_three_digits_are_near_the_weight():
    weight = rows_of_every_size()
    parts, scale = split(weight, "int8x3")
    assert parts.abs().max() == 128 and (torch.frexp(scale)[0] == 0.5).all()  # powers of two
    got = (parts[0] * 65536 + parts[1] * 256 + parts[2]) * scale[:, None]
    error = (got - weight.double()).abs()
    assert (error <= 0.5 * scale[:, None] * (1 + 2.0**-22)).all()
    largest = weight.double().abs().amax(1, keepdim=True)
    assert (error <= (largest / DIGITS).clamp(min=2.0**-127) * (1 + 2.0**-22)).all()
    assert (error.amax(1) / largest[:, 0])[30:].max() > 2.0**-25  # the bound is one that is nearly met


def test_digits_of_a_row_that_is_not_finite():
    weight = torch.randn(4, 30)
    weight[1, 3], weight[2, 29], weight[3, 0] = torch.nan, torch.inf, -torch.inf
    parts, scale = split(weight, "int8x3")
    assert scale.isnan().tolist() == [False, True, True, True] and parts[0].any()


def errors(weight, rate, precision, pooled=False):
    """How far outputs are off, the number of inputs that are active (in quarters, if pooled, a quarter of one), max|w|
    of each row, and the exact outputs."""
    spikes, words = drawn(7, 4, weight.shape[1], 4 if pooled else 0, rate)
    if pooled:
        weight, spikes = weight[..., None, None], torch.nn.functional.avg_pool2d(spikes.flatten(0, 1), 2)
        want = torch.nn.functional.conv2d(spikes, weight.double())
        active = spikes.sum(1, keepdim=True)
    else:
        want, active = spikes.flatten(0, 1) @ weight.double().T, spikes.flatten(0, 1).sum(1, keepdim=True)
    got = forward(words, weight, None, want, precision, **({"pooled": True} if pooled else {})).double()
    largest = weight.double().flatten(1).abs().amax(1)
    return (got - want).abs(), active, largest.view(1, -1, *[1] * (want.dim() - 2)), want


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
def test_the_error_of_a_sum_of_digits(rate, pooled):
    """At most sum(x) * max|w| / 8200000 and 2^-23 of the sum, whatever the weights beside the largest."""
    weight = torch.randn(6, 300) * 10 ** torch.linspace(-6, 6, 6)[:, None]
    weight[1] *= torch.rand(300) ** 8
    weight[2, 7] = 1e4
    error, active, largest, want = errors(weight, rate, "int8x3", pooled)
    assert (error <= active * largest / 8_200_000 + want.abs() / 2**23).all()


def test_sums_of_coarse_weights_are_exact():
    """Weights that are multiples of their row's largest over 2^22: integers all along, so nothing is rounded."""
    weight = torch.randint(-(2**10), 2**10 + 1, (5, 300)).float() * 2.0**-7
    for precision in ("int8x3", "bf16x3", "ieee"):
        error, *_ = errors(weight, 0.5, precision)
        assert (error == 0).all(), precision


@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_the_error_of_a_float32_sum(precision):
    """Products are exact, so what is left is the rounding of the additions: 300 of them, or thrice as many."""
    weight = torch.randn(6, 300) * 10 ** torch.linspace(-6, 6, 6)[:, None]
    error, active, largest, _ = errors(weight, 0.5, precision)
    assert (error <= 3 * active * active * largest / 2**24).all()
