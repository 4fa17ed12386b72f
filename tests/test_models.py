"""The small network: its sizes, its static first layer, its memory layout."""

from __future__ import annotations

import pytest
import torch

from trtkern.backends import named
from trtkern.models import SmallNet
from trtkern.training import settings

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"


def test_networks_have_the_sizes_of_their_recipes():
    layers = settings.RECIPES["fashion-mnist"].layers
    count = sum(p.numel() for p in SmallNet((1, 28, 28), layers, 10).parameters())
    assert count == 54_778
    assert SmallNet((1, 8, 8), (16, 32, "pool"), 10, timesteps=3)(torch.rand(2, 1, 8, 8)).shape == (3, 2, 10)


@pytest.mark.parametrize("layers", [(), ("pool", 8), (8, "max"), (8, "pool", "pool", "pool", "pool")])
def test_network_of_impossible_layers_is_refused(layers):
    with pytest.raises(ValueError, match="SmallNet: expected layers"):
        SmallNet((1, 8, 8), layers, 10)


def test_static_first_layer_equals_convolving_every_frame():
    torch.manual_seed(1)
    images = torch.rand(5, 2, 9, 9)
    block = SmallNet((2, 9, 9), (8,), 3, timesteps=4).layers[0]
    once = block(images)
    assert block.repeat == 4
    block.repeat = None
    frames = block(torch.cat([images] * 4).unflatten(0, (4, 5)))
    assert once.shape == (4, 5, 8, 9, 9) and 0 < once.detach().mean() < 1
    assert (once != frames).float().mean() < 1e-3  # BatchNorm sums in another order


def test_spikes_stay_channels_last():
    net = SmallNet((1, 8, 8), (16, 32, "pool"), 10, backend=BACKEND)
    strides = []
    for block in net.layers:
        block.register_forward_hook(lambda module, inputs, output: strides.append(output.stride(2)))
    net(torch.rand(2, 1, 8, 8)).sum().backward()
    assert strides == [1, 1, 1]
