"""Convolutions and linear layers of packed spikes in Triton, against torch's in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from spike_products import DEVICE, REASON, agrees, convolved, drawn, forward, gradient, last

from trtkern import reference

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def compared(T, B, C, K, window, side, stride, pooled, rate, dtype, precision):
    """Both directions of a layer, its window a number (0: linear)."""
    spikes, words = drawn(T, B, C, side, rate)
    weight = torch.randn(K, C, *((window, window) if window else ())).to(dtype)
    bias = torch.randn(K).to(dtype) if T != 8 else None
    options = {"stride": stride, "padding": window // 2, "pooled": pooled} if window else {}
    leaf = weight.double().requires_grad_()
    want = convolved(spikes, leaf, None if bias is None else bias.double(), **options)
    agrees(forward(words, weight, bias, want, precision, **options), want.detach(), dtype)
    g = torch.randn(want.shape).to(dtype)
    (exact,) = torch.autograd.grad(want, leaf, g.double())
    agrees(gradient(words, g, weight, "bf16x3" if precision == "int8x3" else precision, **options), exact, dtype)


HALVES = (torch.bfloat16, torch.float16)
WAYS = [*((torch.float32, way) for way in ("ieee", "bf16x3", "int8x3")), *((dtype, "ieee") for dtype in HALVES)]
LAYERS = [
    # window, side, stride, pooled, T, B, C, K, rate; C and K are also no multiples of any block
    (0, 0, 1, False, 4, 3, 64, 10, 0.1),
    (0, 0, 1, False, 9, 2, 5, 3, 0.5),
    (0, 0, 1, False, 1, 1, 100, 80, 1.0),
    (1, 5, 1, False, 6, 2, 16, 32, 0.1),
    (1, 5, 2, False, 3, 2, 17, 7, 0.5),
    (1, 6, 1, True, 4, 1, 32, 16, 0.5),
    (3, 4, 1, False, 4, 2, 32, 48, 0.1),
    (3, 6, 2, False, 10, 1, 3, 5, 0.5),
    (3, 3, 1, False, 8, 1, 33, 66, 0.0),
    (3, 9, 2, True, 5, 1, 16, 16, 1.0),
    (5, 4, 2, False, 16, 1, 2, 20, 0.5),
    (5, 8, 1, True, 2, 2, 19, 6, 0.1),
]
# Of large windows, which take the interpreter longest, every third way: each comes with a window of 3, int8x3 with none
# of 5, and all with sums that are as long in smaller windows.
CASES = [
    (*layer, *way)
    for (i, layer), (j, way) in itertools.product(enumerate(LAYERS), enumerate(WAYS))
    if layer[0] < 3 or (i + j) % 3 == 2
]


@pytest.mark.parametrize("window, side, stride, pooled, T, B, C, K, rate, dtype, precision", CASES, ids=str)
def test_layers_against_float64(window, side, stride, pooled, T, B, C, K, rate, dtype, precision):
    compared(T, B, C, K, window, side, stride, pooled, rate, dtype, precision)


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17])
def test_every_number_of_steps(T, rate):
    compared(T, 3, 20, 6, 0, 0, 1, False, rate, torch.float32, "int8x3")


def test_steps_of_a_program():
    """They divide a byte, and few rows of a program are of no step."""
    from trtkern.kernels.spike_conv_launch import steps_of

    assert [steps_of(T) for T in (1, 2, 3, 4, 5, 6, 7, 8, 10, 16)] == [1, 2, 1, 4, 2, 2, 8, 8, 4, 8]
    assert all(-(-T // steps_of(T)) * steps_of(T) <= 1.25 * T for T in range(1, 100))


def test_bits_behind_the_last_step_do_not_matter():
    spikes, words = drawn(7, 2, 16, 4, 0.5)
    noisy = words | 0x80
    weight, g = torch.randn(16, 16, 1, 1), torch.randn(14, 16, 4, 5)
    for each, precision in itertools.product((words, noisy), ("ieee", "int8x3")):
        agrees(forward(each, weight, None, g, precision), convolved(spikes, weight.double()))
    assert torch.equal(gradient(words, g, weight), gradient(noisy, g, weight))


@pytest.mark.parametrize("precision", ["ieee", "bf16x3", "int8x3"])
def test_tensors_that_are_not_aligned(precision):
    """Sizes that are multiples of 16, and words that begin at no multiple of 16 bytes: the same bits."""
    _, words = drawn(4, 2, 32, 3, 0.5)
    shifted = torch.empty(words.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(4 // 4, 2, 3, 4, 32)
    shifted = shifted.copy_(words.movedim(2, -1)).movedim(-1, 2)
    weight, g = torch.randn(16, 32, 3, 3), torch.randn(8, 16, 3, 4)
    assert shifted.data_ptr() % 16 and torch.equal(shifted, words)
    both = [forward(each, weight, None, g, precision, padding=1) for each in (words, shifted)]
    assert torch.equal(*both)
    if precision != "int8x3":
        assert torch.equal(*(gradient(each, g, weight, precision, padding=1) for each in (words, shifted)))


@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_a_split_sum_is_added_up_in_order(precision, monkeypatch):
    """Of a long sum there are ranges: two runs agree bit for bit, and one range alone agrees with float64 too."""
    from trtkern.kernels import spike_conv_launch

    spikes, words = drawn(4, 4, 16, 6, 0.3)
    weight, g = torch.randn(24, 16, 1, 1), torch.randn(16, 24, 6, 7)
    leaf = weight.double().requires_grad_()
    (want,) = torch.autograd.grad(convolved(spikes, leaf), leaf, g.double())
    launches = spike_conv_launch.weight_gradient_launches(words, last(g).to(DEVICE), weight.to(DEVICE))
    assert [launch.kernel.__name__ for launch in launches] == ["spike_conv_weight_gradient", "add_ranges"]
    got = [gradient(words, g, weight, precision) for _ in range(2)]
    assert torch.equal(*got)
    agrees(got[0], want)
    monkeypatch.setattr(spike_conv_launch, "PROGRAMS", 1)
    one = gradient(words, g, weight, precision)
    agrees(one, want)
    assert not torch.equal(one, got[0])  # other roundings


def test_no_range_is_empty():
    from trtkern.kernels.spike_conv_launch import FEWEST_PIECES, PROGRAMS, _ranges

    for pieces, tiles in itertools.product((0, 1, 7, 8, 9, 15, 16, 17, 100, 513, 10_007), (1, 3, 9, 200, 5000)):
        ranges = _ranges(pieces, tiles)
        each = -(-pieces // ranges)
        assert ranges == 1 or ((ranges - 1) * each < pieces <= ranges * each and each >= FEWEST_PIECES)
        assert ranges * tiles < PROGRAMS + 2 * tiles


@pytest.mark.parametrize("precision", ["ieee", "bf16x3", "int8x3"])
def test_weights_that_are_not_finite(precision):
    """0 * NaN is NaN, and so is 0 * infinity; other output channels are as they were. int8x3 has no infinity."""
    spikes, words = drawn(4, 2, 20, 0, 0.4)
    spikes[0] = 1
    words = reference.spikes_pack(spikes).to(DEVICE)
    weight = torch.randn(5, 20)
    weight[1, 3], weight[2, 0], weight[3, 19] = torch.nan, torch.inf, -torch.inf
    want = convolved(spikes, weight.double())
    got = forward(words, weight, torch.zeros(5), want, precision).double()
    assert want[0, 2] == torch.inf and want[0, 3] == -torch.inf and want[:, 1:4].isnan().any(0).all()
    if precision == "int8x3":
        assert got[:, 1:4].isnan().all()
    else:
        assert torch.equal(got[:, 1:4], want[:, 1:4]) or (
            torch.equal(got[:, 1:4].isnan(), want[:, 1:4].isnan())
            and torch.equal(got[:, 1:4].nan_to_num(0.0, 1.0, -1.0), want[:, 1:4].nan_to_num(0.0, 1.0, -1.0))
        )
    agrees(got[:, ::4], want[:, ::4])


@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_a_gradient_that_is_not_finite(precision):
    _, words = drawn(4, 2, 20, 0, 0.4)
    g = torch.randn(8, 5)
    g[3, 2] = torch.nan
    got = gradient(words, g, torch.empty(5, 20), precision)
    assert got[2].isnan().all() and not got[[0, 1, 3, 4]].isnan().any()


def test_nothing_to_compute():
    """No output: no launch. Nothing to sum over: a gradient of zeros, an output that is the bias."""
    from trtkern.kernels.spike_conv_launch import forward_launches

    empty, none = torch.empty(1, 0, 16, dtype=torch.uint8, device=DEVICE), torch.empty(0, 8, device=DEVICE)
    assert forward_launches(empty, torch.ones(8, 16, device=DEVICE), None, none) == []
    assert (gradient(empty, none.cpu(), torch.empty(8, 16)) == 0).all()
    blind, bias = torch.empty(1, 3, 0, dtype=torch.uint8, device=DEVICE), torch.randn(8)
    assert torch.equal(forward(blind, torch.empty(8, 0), bias, torch.empty(6, 8)), bias.expand(6, 8))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"packed": torch.zeros(1, 2, 16, 4, 4, dtype=torch.uint8)}, "packed spikes with channels last"),
        ({"weight": torch.zeros(8, 16, 3, 3)}, "weight with channels last"),
        ({"out": last(torch.zeros(8, 8, 3, 4))}, r"\[T \* B, K, 4, 4\]"),
        ({"out": last(torch.zeros(18, 8, 4, 4))}, "packed spikes"),
        ({"precision": "tf32"}, "expected a precision of .*ieee.*, got 'tf32'"),
    ],
)
def test_errors_say_what_was_expected(change, words):
    from trtkern.kernels.spike_conv_launch import forward_launches

    right = {
        "packed": last(torch.zeros(1, 2, 16, 4, 4, dtype=torch.uint8)), "weight": last(torch.zeros(8, 16, 3, 3)),
        "bias": None, "out": last(torch.zeros(8, 8, 4, 4)), "padding": 1,
    }  # fmt: skip
    forward_launches(**right)
    with pytest.raises(ValueError, match=words):
        forward_launches(**{**right, **change})


def test_what_int8x3_does_not_take():
    from trtkern.kernels.spike_conv_launch import forward_launches, weight_gradient_launches

    packed, weight = torch.zeros(1, 1, 16, dtype=torch.uint8), torch.zeros(8, 16)
    with pytest.raises(ValueError, match=r"expected a precision of .*, got 'int8x3'"):
        weight_gradient_launches(packed, torch.zeros(4, 8), weight, precision="int8x3")
    packed, weight = (torch.zeros(1, 1 << 17, dtype=t) for t in (torch.uint8, torch.float32))
    forward_launches(packed[None], weight, None, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="fewer inputs than int32"):
        forward_launches(packed[None], weight, None, torch.zeros(1, 1), precision="int8x3")
