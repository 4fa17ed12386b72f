"""The CPU kernels that compute on packed spikes: each against float64, repeatable, for any number of threads."""

import pytest
import torch

from tests.spike_convs import Convolution, _cpu

KERNELS = _cpu.SPIKE_KERNELS
ISAS = [isa for isa in _cpu.isas() if isa != "wide"]
SHAPES = {
    "usual": {},
    "one step": {"T": 1, "B": 1},
    "nine steps": {"T": 9, "B": 3},
    "many images": {"T": 8, "B": 5, "H": 3, "W": 4},
    "wide image": {"H": 3, "W": 21},
    "many channels": {"C": 192, "K": 160},
    "few channels": {"C": 16, "K": 16},
    "odd channels": {"C": 70, "K": 65},
    "stride": {"stride": (2, 2), "H": 8, "W": 7},
    "stride, uneven": {"stride": (2, 1), "padding": (0, 1), "H": 7, "W": 6},
    "one place": {"kernel": (1, 1), "padding": (0, 0)},
    "one place, stride": {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 2)},
    "five": {"kernel": (5, 5), "padding": (2, 2)},
    "uneven kernel": {"kernel": (3, 1), "padding": (1, 0)},
    "whole image": {"kernel": (6, 6), "padding": (0, 0)},
    "linear": {"H": 1, "W": 1, "kernel": (1, 1), "padding": (0, 0), "T": 20, "B": 3, "C": 100, "K": 130},
    "bias": {"bias": True},
    "weight as it is": {"last": False},
    "pooled": {"pool": 2},
    "pooled, odd": {"pool": 2, "odd": 1, "last": False},
    "sum of two": {"addends": 2},
    "sum of five": {"addends": 5, "stride": (2, 2)},
}
RATES = (0.0, 0.01, 0.1, 0.3, 1.0)


@pytest.fixture(params=ISAS)
def isa(request):
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa("")


def close(got, expected):
    """Within 1e-5 of the largest; a NaN is not close."""
    assert got is not None and got.shape == expected.shape
    difference = (got.double() - expected).abs()
    assert bool((difference <= 1e-5 * expected.abs().max()).all()), f"off by {difference.max()}"


def taken(case, kernel, weight_grad):
    if not case.takes(kernel, weight_grad):
        pytest.skip(f"{kernel} does not take it with {_cpu.isa()}")


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward(isa, kernel, shape, rate):
    case = Convolution(rate=rate, **SHAPES[shape])
    taken(case, kernel, False)
    close(case.forward(kernel), case.expected())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_weight_grad(isa, kernel, shape, rate):
    case = Convolution(rate=rate, **SHAPES[shape])
    taken(case, kernel, True)
    close(case.weight_grad(kernel), case.expected_weight_grad())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_input_grad(isa, kernel, shape):
    """No spikes are in it; it is at least as exact as a product of float32."""
    case = Convolution(**SHAPES[shape])
    taken(case, kernel, 2)
    got, expected = case.input_grad(kernel), case.expected_input_grad()
    close(got, expected)
    assert (got.double() - expected).abs().max() <= 2e-6 * expected.abs().max()
    for threads in (2, 3):
        assert torch.equal(case.input_grad(kernel, threads), got)
    for read in (case.g, case.weight):
        read[(-1,) * 4] = float("nan")
        assert case.input_grad(kernel) is None
        read[(-1,) * 4] = 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_of_one_sign_lose_nothing(isa, kernel):
    """What is small beside the sum is not lost, all on one side: tiles are as exact as torch, others add in a row."""
    most = 2e-6 if kernel == "tiles" else 1e-5
    case = Convolution(C=16, K=16, H=24, W=24, T=8, B=16, kernel=(1, 1), padding=(0, 0), rate=0.5, bias=True)
    case.g, case.weight, case.added = case.g.abs(), case.weight.abs(), case.added.abs() * 1000
    for which, run, expected in (
        (0, case.forward, case.expected), (1, case.weight_grad, case.expected_weight_grad),
        (2, case.input_grad, case.expected_input_grad),
    ):  # fmt: skip
        if case.takes(kernel, which):
            want = expected()
            assert ((run(kernel).double() - want).abs() <= most * want.abs()).all(), which


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("shape", ["usual", "nine steps", "stride", "linear", "pooled", "many channels"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_and_repeats_change_no_bit(isa, kernel, shape, weight_grad):
    case = Convolution(**SHAPES[shape])
    taken(case, kernel, weight_grad)
    run = case.weight_grad if weight_grad else case.forward
    first = run(kernel)
    assert first is not None
    for threads in (1, 2, 3):
        for _ in range(10):
            assert torch.equal(run(kernel, threads), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_is_said(isa, kernel, weight_grad, value):
    case = Convolution(rate=0.0)
    taken(case, kernel, weight_grad)
    read = case.g if weight_grad else case.weight
    read[(-1,) * read.dim()] = value
    assert (case.weight_grad if weight_grad else case.forward)(kernel) is None


def test_spikes_are_counted():
    words = torch.randint(256, (3, 1001), dtype=torch.uint8)
    expected = sum(bin(word).count("1") for word in words.flatten().tolist())
    for threads in (1, 2):
        assert _cpu.spikes_count(words.data_ptr(), words.numel(), threads) == expected


def test_sizes_that_no_kernel_takes_are_an_error():
    case = Convolution()
    _cpu.use_isa("baseline")
    try:
        with pytest.raises(ValueError, match="registers does not take these sizes with baseline"):
            case.forward("registers")
    finally:
        _cpu.use_isa("")
