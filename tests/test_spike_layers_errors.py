"""The layers that keep words: what they say to input that they cannot take."""

import pytest
import torch
from packing import spikes

from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear
from trtkern.ops.spikes import Spikes


def test_a_second_derivative_is_refused_and_the_dense_spikes_have_one():
    for layer, x in ((SpikeConv2d(4, 6, 3), spikes(4, 2, 4, 8, 6)), (SpikeLinear(12, 5), spikes(4, 2, 12))):
        g = torch.randn_like(layer(x)).requires_grad_()
        (first,) = torch.autograd.grad(layer(x), layer.weight, g, create_graph=True)
        with pytest.raises(RuntimeError, match=r"first derivative.*Spikes\.spikes"):
            first.sum().backward()
        (want,) = torch.autograd.grad(layer(x.spikes), layer.weight, g, create_graph=True)
        assert torch.equal(first, want)
        assert torch.autograd.grad(want.sum(), x.spikes)[0].abs().sum() > 0


GOOD = torch.zeros(4, 2, 3, 8, 6)
WORDS = torch.zeros(1, 2, 3, 8, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ("spikes", TypeError, "SpikeConv2d: expected a tensor or Spikes, got 'spikes'"),
        (torch.zeros(4, 2, 2, 8, 6), ValueError, "3 channels on axis 2"),
        (torch.zeros(2, 2, 8, 6), ValueError, "3 channels on axis 1"),
        (torch.zeros(8, 6), ValueError, r"\[T, B, C, H, W\]"),
        (Spikes(GOOD[:, :, :, 0], WORDS[:, :, :, 0]), ValueError, r"\[T, B, C, H, W\]"),
        (Spikes(GOOD[:, :, :2], WORDS[:, :, :2]), ValueError, "3 channels"),
        (Spikes(GOOD, WORDS.float()), TypeError, "uint8 words"),
        (Spikes(GOOD, None), TypeError, "uint8 words, got .* None"),
        (Spikes(GOOD, WORDS.expand(3, -1, -1, -1, -1)), ValueError, "words"),
        (Spikes(GOOD, WORDS[..., :5]), ValueError, "words"),
        (Spikes(GOOD[..., :4], WORDS), ValueError, "words"),
    ],
)
def test_bad_input_of_a_convolution(x, error, message):
    with pytest.raises(error, match=message):
        SpikeConv2d(3, 4, 3)(x)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "SpikeLinear: expected a tensor or Spikes, got None"),
        (torch.zeros(4, 2, 11), ValueError, "in_features=12"),
        (torch.zeros(()), ValueError, "in_features=12"),
        (Spikes(GOOD, WORDS), ValueError, "in_features=12"),
        (Spikes(torch.zeros(9, 2, 12), torch.zeros(1, 2, 12, dtype=torch.uint8)), ValueError, "words"),
        (Spikes(torch.zeros(12), torch.zeros(12, dtype=torch.uint8)), ValueError, "words"),
    ],
)
def test_bad_input_of_a_linear(x, error, message):
    with pytest.raises(error, match=message):
        SpikeLinear(12, 5)(x)
