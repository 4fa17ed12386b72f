"""Words and dense spikes: one made out of the other, bit for bit, on every backend and in every layout."""

import pytest
import torch
from torch.nn import functional as F

from trtkern import nn
from trtkern.backends import BACKENDS
from trtkern.ops.spikes import Spikes, listen, pack, unpack
from trtkern.selftest import device_of

DEVICE = {b.name: device_of(b) for b in BACKENDS if b.missing() is None and b.holds("spikes_pack")}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def spikes(*shape, dtype=torch.float32, channels_last=False, device="cpu"):
    """Random spikes [T, B, ...]."""
    s = (torch.rand(shape) < 0.4).to(dtype).to(device)
    return in_channels_last(s) if channels_last else s


def in_channels_last(s):
    return s.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, s.shape[:2])


def pooled(s):
    """2x2 averages."""
    return F.avg_pool2d(s.flatten(0, 1), 2).unflatten(0, s.shape[:2])


@pytest.fixture(params=DEVICE)
def holder(request):
    """Each backend that packs and unpacks here."""
    return request.param


@pytest.mark.parametrize("timesteps", [1, 7, 8, 9, 17])
def test_there_and_back(holder, timesteps):
    cases = (((3,), False), ((2, 3, 5, 7), False), ((2, 3, 5, 7), True), ((131,), False))
    for (shape, channels_last), dtype in zip(cases, (*FLOATS, torch.float32), strict=True):
        s = spikes(timesteps, *shape, dtype=dtype, channels_last=channels_last, device=DEVICE[holder])
        words = torch.ops.trtkern.spikes_pack(s, holder)
        assert words.shape == ((timesteps + 7) // 8, *shape) and words.dtype == torch.uint8
        assert words.stride()[1:] == s.stride()[1:]
        for t in range(8 * words.shape[0]):
            bit = words[t // 8] >> t % 8 & 1
            assert torch.equal(bit, (s[t] if t < timesteps else torch.zeros_like(s[0])).to(torch.uint8))
        back = torch.ops.trtkern.spikes_unpack(words, 0, timesteps, False, dtype, holder)
        assert torch.equal(back, s) and back.stride() == s.stride()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_some_of_the_steps(holder, dtype, channels_last):
    s = spikes(19, 2, 3, 4, 6, dtype=dtype, channels_last=channels_last, device=DEVICE[holder])
    words = torch.ops.trtkern.spikes_pack(s, holder)
    for start, steps in ((3, 4), (6, 12), (18, 1)):
        part = torch.ops.trtkern.spikes_unpack(words, start, steps, False, dtype, holder)
        assert torch.equal(part, s[start : start + steps])
        part = torch.ops.trtkern.spikes_unpack(words, start, steps, True, dtype, holder)
        want = pooled(s[start : start + steps])
        assert torch.equal(part, want) and part.stride() == want.stride()


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 4), (4, 7), (5, 6), (3, 5)])
def test_averages_of_any_size(holder, height, width):
    for channels_last in (False, True):
        s = spikes(2, 3, 4, height, width, channels_last=channels_last, device=DEVICE[holder])
        words = torch.ops.trtkern.spikes_pack(s, holder)
        averages = torch.ops.trtkern.spikes_unpack(words, 0, 2, True, torch.float32, holder)
        assert torch.equal(averages, pooled(s)) and averages.stride() == pooled(s).stride()


def test_the_public_functions():
    s = spikes(9, 2, 3, 4, 6, dtype=torch.float64)
    words = pack(s)
    assert torch.equal(unpack(words, 9, dtype=torch.float64), s)
    assert torch.equal(unpack(words, 2, start=7, dtype=torch.float64), s[7:])
    assert torch.equal(unpack(words, 9, pooled=True, dtype=torch.float64), pooled(s))
    assert Spikes(pooled(s), words).pooled and not Spikes(s, words).pooled
    # A layout with no name, one with holes, one that is the same at every step.
    odd = s.permute(0, 3, 1, 4, 2)
    assert torch.equal(unpack(pack(odd), 9, dtype=torch.float64), odd)
    assert torch.equal(unpack(pack(odd), 9, pooled=True, dtype=torch.float64), pooled(odd))
    assert torch.equal(unpack(pack(s[..., ::2]), 9, dtype=torch.float64), s[..., ::2])
    static = s[:1].expand(12, *s.shape[1:])
    assert torch.equal(unpack(pack(static), 12, dtype=torch.float32), static.float())
    assert torch.equal(unpack(pack(static.float()), 12, dtype=torch.float32), static.float())
    assert pack(s[:, :0]).shape == (2, 0, 3, 4, 6)
    assert unpack(words[:, :0], 9, dtype=torch.float32).shape == (9, 0, 3, 4, 6)


def test_whatever_is_not_zero_is_a_spike():
    s = torch.tensor([0.0, 1.0, -0.0, 0.25, -2.0, torch.nan, 1e-40]).reshape(7, 1)
    assert pack(s).item() == 0b1111010


def test_what_a_neuron_packs_is_what_it_fires():
    x = 2 * torch.randn(11, 2, 3, 4, 6)
    for layer in (nn.LIF(packed=True), nn.BatchNormLIF(3, packed=True)):
        out = layer(x)
        assert 0 < out.spikes.mean() < 1 and torch.equal(out.words, pack(out.spikes))
        assert torch.equal(unpack(out.words, 11, dtype=torch.float32), out.spikes)
    out = nn.BatchNormLIF(3, packed=True, pool=2)(x)
    assert out.pooled and torch.equal(unpack(out.words, 11, pooled=True, dtype=torch.float32), out.spikes)


def test_listeners_hear_of_every_neuron():
    heard = []
    layer, x = nn.LIF(), torch.randn(4, 2, 3)
    with listen(lambda s, words: heard.append((s, words))):
        s = layer(x)
    layer(x)
    assert len(heard) == 1 and heard[0][0] is s and torch.equal(heard[0][1], pack(s))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack(torch.ones(3, dtype=torch.int32)), TypeError, "float32"),
        (lambda: pack(torch.ones(0, 3)), ValueError, "T >= 1"),
        (lambda: unpack(torch.ones(2, 3), 9, dtype=torch.float32), TypeError, "uint8"),
        (lambda: unpack(torch.ones(2, 3, dtype=torch.uint8), 17, dtype=torch.float32), ValueError, "16"),
        (lambda: unpack(torch.ones(2, 3, dtype=torch.uint8), 9, start=8, dtype=torch.float32), ValueError, "8 to 16"),
        (lambda: unpack(torch.ones(2, 3, dtype=torch.uint8), 0, dtype=torch.float32), ValueError, "steps"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_opcheck(holder):
    s = spikes(10, 2, 3, 4, 6, device=DEVICE[holder])
    torch.library.opcheck(torch.ops.trtkern.spikes_pack, (s, holder))
    words = torch.ops.trtkern.spikes_pack(s, holder)
    for pool in (False, True):
        torch.library.opcheck(torch.ops.trtkern.spikes_unpack, (words, 1, 9, pool, torch.bfloat16, holder))
