"""Images as sequences."""

from __future__ import annotations

import math

import pytest
import torch

from trtkern.data.encode import direct, latency, poisson

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_direct_is_a_view():
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    out = direct(images, 5)
    assert out.shape == (5, 2, 3, 4) and out.stride(0) == 0 and out.data_ptr() == images.data_ptr()
    assert all(torch.equal(frame, images) for frame in out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poisson_fires_at_the_rate_of_the_intensity(dtype):
    images = torch.tensor([0.0, 0.125, 0.5, 0.875, 1.0], dtype=dtype).expand(40, 5)
    out = poisson(images, 500, seeded())
    assert out.shape == (500, 40, 5) and out.dtype == dtype
    assert set(out.unique().tolist()) == {0.0, 1.0}
    rate, expected = out.double().mean((0, 1)), images[0].double()
    assert rate[0] == 0 and rate[-1] == 1
    assert ((rate - expected).abs() <= 4.5 * (expected * (1 - expected) / 20000).sqrt()).all()


def test_poisson_is_independent_between_steps_and_pixels():
    out = poisson(torch.full((200, 200), 0.5), 3, seeded()) - 0.5
    for product in (out[0] * out[1], out[1] * out[2], out[:, :, 1:] * out[:, :, :-1]):
        assert abs(float(product.mean())) < 4.5 * 0.25 / math.sqrt(product.numel())


def test_poisson_belongs_to_its_generator():
    images = torch.rand(4, 3, 5, generator=seeded(3))
    generator = seeded()
    first, second = poisson(images, 6, generator), poisson(images, 6, generator)
    torch.rand(2)
    assert torch.equal(first, poisson(images, 6, seeded())) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("timesteps", [1, 2, 4, 7])
def test_latency_agrees_with_a_loop(timesteps, dtype):
    images = torch.cat([torch.linspace(0, 1, 33), torch.tensor([1e-4])]).to(dtype).view(2, 17)
    out = latency(images, timesteps, threshold=0.25)
    assert out.shape == (timesteps, 2, 17) and out.dtype == dtype
    for index, value in enumerate(images.flatten().tolist()):
        when = min(timesteps - 1, math.floor(timesteps * (1 - value)))
        expected = [float(value > 0.25 and step == when) for step in range(timesteps)]
        assert out.flatten(1)[:, index].tolist() == expected


def test_latency_is_earlier_the_brighter_and_silent_in_the_dark():
    out = latency(torch.tensor([0.0, 1e-9, 0.3, 0.6, 1.0]), 4)
    assert out.sum(0).tolist() == [0, 1, 1, 1, 1]
    assert out.argmax(0).tolist() == [0, 3, 2, 1, 0]


def test_latency_gives_each_step_its_share():
    out = latency((torch.arange(4000) + 0.5) / 4000, 5)
    assert out.sum(1).tolist() == [800] * 5


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: direct([1.0], 2), TypeError, "encode: direct: expected images as a tensor, got list"),
        (lambda: direct(torch.zeros(2), 0), ValueError, "timesteps as an integer of at least 1, got 0"),
        (lambda: poisson(torch.zeros(2), 1.5, seeded()), ValueError, "got 1.5"),
        (lambda: poisson(torch.zeros(2, dtype=torch.uint8), 2, seeded()), TypeError, "got torch.uint8; .*/ 255"),
        (
            lambda: poisson(torch.tensor([0.5, 1.5]), 2, seeded()),
            ValueError,
            "images of 0..1, got values of 0.5 to 1.5",
        ),
        (lambda: poisson(torch.tensor([0.5, math.nan]), 2, seeded()), ValueError, "values of nan to nan"),
        (lambda: latency(torch.tensor([-0.1]), 2), ValueError, "got values of -0.1 to -0.1; encode before"),
        (lambda: latency(torch.zeros(2), 2, threshold=2.0), ValueError, "threshold of 0 to 1, got 2.0"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_unchecked_values_fire_always_or_never():
    out = poisson(torch.tensor([-1.0, 2.0]), 20, seeded(), check=False)
    assert out.sum(0).tolist() == [0, 20]
