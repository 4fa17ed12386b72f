"""Delays: values and every gradient against float64 autograd on each backend; parts, streams, lengths, training."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

from trtkern import nn as snn
from trtkern import reference
from trtkern.backends import BACKENDS, named
from trtkern.interop import decompose, record
from trtkern.ops.delay import delay
from trtkern.profiling import memory
from trtkern.profiling.memory.kept import Call
from trtkern.profiling.step.work import moved
from trtkern.selftest import DelayCell, compare_delay, device_of
from trtkern.selftest.delay import errors

HOLDERS = {b.name: device_of(b) for b in BACKENDS if b.missing() is None and b.holds("delay")}
FUSED = [name for name in HOLDERS if name != "reference"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}


@pytest.fixture(params=HOLDERS)
def holder(request):
    """Each backend that has delays here."""
    return request.param


@pytest.fixture(params=FUSED)
def fused(request):
    """Each but the reference."""
    return request.param


def drawn(channels, most, kind="mixed"):
    """Delays of all kinds: whole ones, fractions, both ends."""
    made = most * torch.rand(channels)
    if kind == "mixed":
        made[::2] = made[::2].round()
        made[0] = most
        if channels > 1:
            made[1] = 0.0
    return made


def numbers(steps, batch, channels, *space, dtype=torch.float32, device="cpu"):
    return torch.randn(steps, batch, channels, *space).to(dtype).to(device)


def loop(x, delays, most, v0=None):
    """Channel by channel and step by step, as the formula says it."""
    line = torch.cat([torch.zeros(most + 1, *x.shape[1:]) if v0 is None else torch.cat([v0[:1] * 0, v0]), x])
    y = torch.zeros_like(x)
    for c, d in enumerate(delays.tolist()):
        k = min(int(d), max(most - 1, 0))
        for t in range(len(x)):
            near, far = line[most + 1 + t - k, :, c], line[most + t - k, :, c]
            y[t, :, c] = near if d == k else far if d == k + 1 else (1 - (d - k)) * near + (d - k) * far
    return y


def relative(got, want):
    error = (got.detach().double().cpu() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
    return error.item()


def close(got, want, dtype=torch.float32):
    assert got.shape == want.shape
    if want.numel() and want.abs().max() > 0:
        assert relative(got, want) <= TOLERANCE[dtype]  # NaN is not
    else:
        assert not got.abs().sum().item() > 0


SHAPES = [
    (1, 2, 7, 3), (16, 3, 64, 5), (250, 2, 7, 25), (16, 2, 513, 9), (17, 5, 1, 4), (3, 2, 7, 20), (33, 1, 16, 1),
    (40, 2, 8, 100),
]  # fmt: skip
"""T, B, C, max_delay."""


@pytest.mark.parametrize(("steps", "batch", "channels", "most"), SHAPES)
def test_values_are_those_of_the_formula(holder, steps, batch, channels, most):
    x, delays, v0 = numbers(steps, batch, channels), drawn(channels, most), numbers(most, batch, channels)
    device = HOLDERS[holder]
    for before in (None, v0):
        given = None if before is None else before.to(device)
        y = delay(x.to(device), delays.to(device), given, max_delay=most, backend=holder)
        want = loop(x.double(), delays.double(), most, None if before is None else before.double())
        close(y, want)
        whole = delays == delays.round()
        assert torch.equal(y.cpu()[:, :, whole], want.float()[:, :, whole])  # a shift, bit for bit


@pytest.mark.parametrize(("steps", "batch", "channels", "most"), SHAPES)
def test_all_gradients(fused, steps, batch, channels, most):
    ways = [(started, rounded) for started in (True, False) for rounded in (False, True)]
    if fused == "triton" and HOLDERS[fused] == "cpu":  # the interpreter takes half a second for each
        ways = ways[SHAPES.index((steps, batch, channels, most)) % 4 :: 4]
    for started, rounded in ways:
        cell = DelayCell(torch.float32, steps, (batch, channels), most, rounded, started=started)
        found = compare_delay(fused, cell, HOLDERS[fused])
        assert found.within(cell.dtype), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(fused, dtype):
    for cell in (DelayCell(dtype, 20, (3, 37), 6), DelayCell(dtype, 20, (2, 3, 5), 6, shared=True, learnable=False)):
        found = compare_delay(fused, cell, HOLDERS[fused])
        assert found.within(dtype), found
    x, delays = numbers(20, 3, 37, dtype=dtype), drawn(37, 6)
    y = delay(x.to(HOLDERS[fused]), delays.to(HOLDERS[fused]), max_delay=6, backend=fused)
    whole = delays == delays.round()
    assert torch.equal(y.cpu()[:, :, whole], loop(x.double(), delays.double(), 6)[:, :, whole].to(dtype))


def compare(backend, x, delays, most, channel_dim=2):
    found = errors(
        backend, (x, delays, None), torch.randn(x.shape), most, channel_dim=channel_dim, device=HOLDERS[backend]
    )
    assert found.within(x.dtype), found


@pytest.mark.parametrize("kind", ["contiguous", "channels last", "last axis", "one delay", "number", "transposed"])
def test_layouts(fused, kind):
    delays, most, channel_dim = drawn(6, 4), 4, 2
    x = numbers(9, 2, 6, 5, 4)
    if kind == "channels last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (9, 2))
    elif kind == "last axis":
        x, channel_dim = numbers(9, 2, 5, 6), -1
    elif kind == "one delay":
        delays = torch.tensor(2.5)
    elif kind == "transposed":
        x = numbers(2, 9, 6, 5).transpose(0, 1)
    elif kind == "number":
        device = HOLDERS[fused]
        y = delay(x.to(device), 1.25, max_delay=4, backend=fused)
        return close(y, loop(x.double(), torch.full((6,), 1.25).double(), 4))
    compare(fused, x, delays, most, channel_dim)
    if kind == "channels last":
        assert delay(x.to(HOLDERS[fused]), delays.to(HOLDERS[fused]), max_delay=4, backend=fused).stride() == x.stride()


def test_a_gradient_in_another_layout(fused):
    device = HOLDERS[fused]
    x, delays = numbers(7, 2, 6, 5, 4, device=device), drawn(6, 4).to(device)
    g = torch.randn(7, 2, 5, 4, 6).permute(0, 1, 4, 2, 3).to(device)
    want = None
    for given in (g, g.contiguous(), torch.ones((), device=device).expand(g.shape)):
        for learned in (False, True):
            leaf, steps = x.clone().requires_grad_(), delays.clone().requires_grad_(learned)
            delay(leaf, steps, max_delay=4, backend=fused).backward(given)
            if given.dim() and given.stride(-1):
                want = leaf.grad if want is None else want
                assert torch.equal(leaf.grad, want)


def test_the_derivative_at_whole_delays():
    """The slope towards longer delays; at the end that towards shorter ones."""
    x = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0]).view(5, 1, 1)
    for most, at, towards in ((3, 0.0, 1.0), (3, 1.0, 2.0), (3, 3.0, 2.0), (1, 1.0, 0.0)):
        steps = torch.tensor([at], requires_grad=True)
        y = delay(x, steps, max_delay=most, backend="reference")
        (slope,) = torch.autograd.grad(y.sum(), steps)
        other = delay(x, torch.tensor([towards]), max_delay=most, backend="reference")
        assert slope.item() == pytest.approx(((other - y).sum() / (towards - at)).item())


def test_rounded_delays_are_whole_with_the_slope_of_their_line(holder):
    x, steps = numbers(12, 2, 4, device=HOLDERS[holder]), torch.tensor([0.4, 1.5, 2.6, 3.0], device=HOLDERS[holder])
    leaf = steps.clone().requires_grad_()
    y = delay(x, leaf, max_delay=3, rounded=True, backend=holder)
    assert torch.equal(y, delay(x, torch.tensor([0.0, 2, 3, 3], device=x.device), max_delay=3, backend=holder))
    plain = steps.clone().requires_grad_()
    got = torch.autograd.grad(y.sum(), leaf)
    want = torch.autograd.grad(delay(x, plain, max_delay=3, backend=holder).sum(), plain)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_place(holder, value):
    """0 * NaN is NaN: a whole delay reads one step alone, and no channel another."""
    x, delays = numbers(8, 2, 3), torch.tensor([2.0, 1.5, 3.0])
    x[3, 0, 0] = x[3, 1, 1] = value
    device = HOLDERS[holder]
    leaf, steps = x.to(device).requires_grad_(), delays.to(device).requires_grad_()
    y = delay(leaf, steps, max_delay=3, backend=holder)
    odd = (~torch.isfinite(y)).nonzero().tolist()
    assert odd == [[4, 1, 1], [5, 0, 0], [5, 1, 1]]
    g = torch.ones_like(y)
    g[6, 0, 0] = value
    gx, gsteps = torch.autograd.grad(y, (leaf, steps), g)
    assert (~torch.isfinite(gx)).nonzero().tolist() == [[4, 0, 0]]
    assert torch.isfinite(gsteps[2]).item()


def test_one_and_two_threads_agree_bit_for_bit():
    if "cpu" not in HOLDERS:
        pytest.skip("the CPU extension is not built")
    x, delays, g = numbers(250, 8, 64), drawn(64, 25), torch.randn(250, 8, 64)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaf, steps = x.clone().requires_grad_(), delays.clone().requires_grad_()
            y = delay(leaf, steps, max_delay=25, backend="cpu")
            found.append((y, *torch.autograd.grad(y, (leaf, steps), g)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_instruction_set_agrees_bit_for_bit():
    if "cpu" not in HOLDERS:
        pytest.skip("the CPU extension is not built")
    from trtkern import _cpu

    shapes = [((37, 3, 19), torch.float32), ((18, 2, 40), torch.bfloat16), ((18, 2, 33), torch.float16)]
    used = _cpu.isa()
    try:
        for shape, dtype in shapes:
            x, delays, g = numbers(*shape, dtype=dtype), drawn(shape[2], 5), torch.randn(shape).to(dtype)
            v0, want = numbers(5, *shape[1:], dtype=dtype), None
            for isa in _cpu.isas():
                if isa == "wide" and dtype != torch.float32:
                    continue
                _cpu.use_isa(isa)
                leaves = [t.clone().requires_grad_() for t in (x, delays, v0)]
                y = delay(*leaves, max_delay=5, backend="cpu")
                made = (y, *torch.autograd.grad(y, leaves, g))
                want = made if want is None else want
                assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True)), isa
    finally:
        _cpu.use_isa(used)


def test_large_outputs_bypass_the_caches():
    if "cpu" not in HOLDERS:
        pytest.skip("the CPU extension is not built")
    from trtkern import _cpu

    x, delays = numbers(35, 3, 37), drawn(37, 9)
    want = delay(x, delays, max_delay=9, backend="cpu")
    _cpu.stream_from(0)
    try:
        assert torch.equal(delay(x, delays, max_delay=9, backend="cpu"), want)
        compare("cpu", x, delays, 9)
    finally:
        _cpu.stream_from(4 << 20)


@pytest.mark.parametrize("most", [0, 1, 4, 30])
def test_parts_give_what_the_whole_gives(holder, most):
    device = HOLDERS[holder]
    layer = snn.Delay(5, most, drawn(5, most, "fractions"), backend=holder).to(device)
    x = numbers(20, 2, 5, device=device)
    whole, last = layer(x, return_state=True)
    state, seen = None, []
    for part in (x[:1], x[1:9], x[9:10], x[10:]):
        y, state = layer(part, state, return_state=True)
        seen.append(y)
    assert torch.equal(torch.cat(seen), whole) and torch.equal(state, last) and state.shape == (most, 2, 5)
    state, seen = None, []
    for x_t in x:
        y, state = layer.step(x_t, state)
        seen.append(y)
    assert torch.equal(torch.stack(seen), whole) and torch.equal(state, last)


def test_gradients_flow_through_the_state(holder):
    device = HOLDERS[holder]
    x, delays, g = numbers(20, 2, 5), drawn(5, 6), torch.randn(20, 2, 5)
    found = []
    for cut in (20, 8, 3):
        leaf, steps = x.to(device).requires_grad_(), delays.to(device).requires_grad_()
        layer = snn.Delay(5, 6, 0.0, backend=holder)
        layer.delay = steps
        first, state = layer(leaf[:cut], return_state=True)
        y = first if cut == 20 else torch.cat([first, layer(leaf[cut:], state)])
        found.append(torch.autograd.grad(y, (leaf, steps), g.to(device)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_a_stream_carries_delays():
    model = snn.TimeSequential(
        nn.Linear(6, 5), snn.Delay(5, 4, learnable=True), snn.LIF(0.9, v_threshold=0.2), snn.Delay(None, 2, 1.0)
    )
    x = 3 * torch.rand(15, 2, 6)
    whole, stream = model(x), model.stream()
    assert torch.equal(torch.cat([stream.chunk(x[:4]), stream.step(x[4]).unsqueeze(0), stream.chunk(x[5:])]), whole)
    assert set(stream.state) == {"1", "2", "3"} and stream.state["1"].shape == (4, 2, 5) and whole.sum() > 0
    saved = stream.state
    again = snn.stream(model)
    again.state = saved
    assert torch.equal(again.chunk(x[:3]), stream.chunk(x[:3]))
    with pytest.raises(ValueError, match=r"layer '1' \(Delay\): expected v0 of shape \(4, 3, 5\).*call reset\(\)"):
        stream.chunk(torch.rand(2, 3, 6))
    assert torch.equal(snn.stream(snn.Delay(5, 4, 2.5)).chunk(whole), snn.Delay(5, 4, 2.5)(whole))


@pytest.mark.parametrize("learnable", [False, True])
def test_lengths(holder, learnable):
    """What each sample gives alone, cut at its end; nothing behind it is read."""
    device = HOLDERS[holder]
    layer = snn.Delay(5, 4, drawn(5, 4), learnable, backend=holder).to(device)
    x, ends, v0 = numbers(9, 4, 5, device=device), [9, 3, 0, 6], numbers(4, 4, 5, device=device)
    for sample, end in enumerate(ends):
        x[end:, sample] = float("nan")
    x.requires_grad_()
    lengths = torch.tensor(ends, device=device)
    y, state = layer(x, v0, return_state=True, lengths=lengths)
    y.sum().backward()
    for sample, end in enumerate(ends):
        one, before = x.detach()[:end, sample : sample + 1], v0[:, sample : sample + 1]
        alone, last = layer(one, before, return_state=True) if end else (one, before)
        assert torch.equal(y[:end, sample : sample + 1], alone) and not y[end:, sample].any()
        assert torch.equal(state[:, sample : sample + 1], last) and not x.grad[end:, sample].any()
    assert torch.isfinite(x.grad).all() and (not learnable or torch.isfinite(layer.delay.raw.grad).all())
    assert torch.equal(snn.TimeSequential(layer)(x, lengths=lengths), layer(x, lengths=lengths))


def test_training_finds_a_known_delay():
    x = torch.randn(60, 8, 4)
    for _ in range(3):  # what changes slowly from step to step has a slope that leads far
        x = (x + x.roll(1, 0) + x.roll(2, 0) + x.roll(3, 0)) / 2
    target = snn.Delay(4, 8, torch.tensor([0.0, 2.0, 5.5, 8.0]))(x)
    layer = snn.Delay(4, 8, 4.0, learnable=True)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimiser.step()
    torch.testing.assert_close(layer.values().detach(), torch.tensor([0.0, 2.0, 5.5, 8.0]), rtol=0, atol=0.1)
    assert layer.round_() is layer and layer.values().tolist() in ([0, 2, 5, 8], [0, 2, 6, 8])


def test_whole_delays_are_trained_straight_through():
    x = torch.randn(40, 8, 2)
    for _ in range(2):
        x = (x + x.roll(1, 0) + x.roll(2, 0)) / 2
    target = snn.Delay(2, 6, torch.tensor([1.0, 5.0]))(x)
    layer = snn.Delay(2, 6, torch.tensor([2.4, 3.6]), learnable=True, rounded=True)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05, betas=(0.0, 0.99))  # stops where there is no error
    for _ in range(120):
        optimiser.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimiser.step()
    assert torch.equal(layer(x), target)


def test_learned_delays_stay_in_their_range_and_start_anew():
    torch.manual_seed(3)
    layer = snn.Delay(200, 7, learnable=True)
    first = layer.values().detach().clone()
    assert 0 <= first.min() < 1 and 6 < first.max() <= 7 and list(dict(layer.named_parameters())) == ["delay.raw"]
    with torch.no_grad():
        layer.delay.raw += 20
    assert (layer.values() == 7).all() and torch.equal(layer(torch.ones(3, 1, 200)), torch.zeros(3, 1, 200))
    torch.manual_seed(3)
    layer.reset_parameters()
    assert torch.equal(layer.values(), first)
    given = snn.Delay(3, 7, torch.tensor([1, 2, 3]), learnable=True)
    with torch.no_grad():
        given.delay.raw.zero_()
    given.reset_parameters()
    assert given.values().tolist() == [1, 2, 3] and given.learnable and given.least == 0
    shared = snn.Delay(None, 7, 2.0, learnable=True)
    assert shared.delay.raw.shape == () and shared(torch.ones(4, 2, 9)).sum() == 2 * 2 * 9


def test_copies_checkpoints_and_the_name_of_its_settings():
    layer = snn.Delay(4, 6, drawn(4, 6), learnable=True, rounded=True)
    x = numbers(9, 2, 4)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(made(x), layer(x)) and made.learnable and made.rounded
    other = snn.Delay(4, 6, learnable=True, rounded=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    fixed = snn.Delay(4, 6, torch.tensor([1, 2, 3, 4]))
    assert fixed.delay.dtype == torch.float32 and list(fixed.state_dict()) == ["delay"] and fixed.least == 1
    assert repr(fixed) == (
        "Delay(4, max_delay=6, delay=tensor[4], learnable=False, time_dim=0, channel_dim=2, backend='auto')"
    )
    assert "delay=2.5, learnable=False" in repr(snn.Delay(4, 6, 2.5)) and "learnable=True, rounded=True" in repr(layer)
    with torch.device("meta"):
        far = snn.Delay(4, 6, learnable=True)
    far.to_empty(device="cpu").reset_parameters()
    assert 0 <= far.values().min() <= far.values().max() <= 6


def test_other_axes_and_containers():
    delays, x = drawn(5, 4), numbers(9, 2, 5)
    want = snn.Delay(5, 4, delays)(x)
    assert torch.equal(snn.Delay(5, 4, delays, time_dim=1)(x.transpose(0, 1)), want.transpose(0, 1))
    last = snn.Delay(5, 4, delays, time_dim=-1, channel_dim=1)(x.permute(1, 2, 0))
    assert torch.equal(last, want.permute(1, 2, 0))
    y, state = snn.Delay(5, 4, delays, time_dim=1).step(x[0])
    assert y.shape == (2, 5) and state.shape == (4, 2, 5)
    image = torch.rand(2, 5)
    shown = snn.TimeSequential(snn.Delay(5, 4, delays), timesteps=9)(image)
    assert torch.equal(shown, snn.Delay(5, 4, delays)(image.repeat(9, 1, 1)))
    packed = snn.TimeSequential(snn.LIF(v_threshold=0.1, packed=True), snn.Delay(5, 4, delays))
    dense = snn.TimeSequential(snn.LIF(v_threshold=0.1), snn.Delay(5, 4, delays))
    assert torch.equal(packed(x), dense(x)) and dense(x).sum() > 0
    assert torch.equal(snn.Delay(5, 4, delays)(snn.LIF(v_threshold=0.1, packed=True)(x)), dense(x))
    assert snn.Delay(5, 4, delays)(x[:, :0]).shape == (9, 0, 5)
    assert "cpu" in snn.Delay(5, 4, 1.0).backend_for(x) or "cpu" not in HOLDERS


def test_a_fixed_delay_keeps_no_input():
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        snn.Delay(5, 4, drawn(5, 4))(numbers(9, 2, 5).requires_grad_())
        fixed = sum(held)
        snn.Delay(5, 4, learnable=True)(numbers(9, 2, 5))
    assert fixed <= 5 and sum(held) - fixed >= 90


def test_what_it_keeps_and_moves_is_that_of_the_traffic_model():
    if "cpu" not in HOLDERS:
        pytest.skip("the CPU extension is not built")
    x = numbers(30, 4, 8).requires_grad_()
    kept = {"number": 4, "fixed": 0, "learned": x.numel() * 4 + 8 * 4}
    layers = (snn.Delay(8, 4, 2.5), snn.Delay(8, 4, drawn(8, 4)), snn.Delay(8, 4, learnable=True))
    for layer, (name, expected) in zip(layers, kept.items(), strict=True):
        layer.backend = "cpu"
        found = memory(nn.Sequential(layer), x)
        assert found.predicted == found.measured == expected, (name, str(found))
        counted = moved(Call(layer, (x,), {}, layer(x), {}))
        assert counted[:2] == (8 * x.numel(), (12 if name == "learned" else 8) * x.numel())


BAD = [
    (lambda: snn.Delay(3, 4), ValueError, "got None, which is for learnable=True"),
    (lambda: snn.Delay(0, 4, 1.0), ValueError, "channels to be an int >= 1"),
    (lambda: snn.Delay(3, 2.5, 1.0), TypeError, "max_delay to be an int"),
    (lambda: snn.Delay(3, True, 1.0), TypeError, "max_delay to be an int"),
    (lambda: snn.Delay(3, -1, 0.0), ValueError, r"max_delay to be 0 to .* got -1"),
    (lambda: snn.Delay(3, 0, learnable=True), ValueError, "max_delay >= 1 with learnable"),
    (lambda: snn.Delay(3, 4, 4.5), ValueError, r"from 0 to max_delay=4 steps, got 4.5; pass a larger max_delay"),
    (lambda: snn.Delay(3, 4, -0.5), ValueError, r"from 0 to max_delay=4 steps, got -0.5"),
    (lambda: snn.Delay(3, 4, float("nan")), ValueError, "finite, got nan"),
    (lambda: snn.Delay(3, 4, torch.tensor([0.0, 5, 1])), ValueError, "got values from 0.0 to 5.0"),
    (lambda: snn.Delay(3, 4, torch.tensor([0.0, torch.nan, 1]), True), ValueError, "got nan"),
    (lambda: snn.Delay(3, 4, torch.ones(2)), ValueError, r"shape \[\] or \[3\], one a channel, got"),
    (lambda: snn.Delay(3, 4, torch.ones(3, 1)), ValueError, r"shape \[\] or \[3\]"),
    (lambda: snn.Delay(None, 4, torch.ones(3)), ValueError, "channels=None"),
    (lambda: snn.Delay(3, 4, "long"), TypeError, "a number or a tensor"),
    (lambda: snn.Delay(3, 4, 1.0, backend="gpu"), ValueError, "backend"),
    (lambda: snn.Delay(3, 4, 1.0, backend="cuda")(torch.ones(2, 2, 3)), ValueError, "'cuda' does not hold this op"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(3)), ValueError, r"a sequence \[T, B, C, ...\]"),
    (lambda: snn.Delay(3, 4, 1.0)([1.0]), TypeError, "x to be a tensor"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(2, 2, 3).long()), TypeError, "float32"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(2, 2, 5)), ValueError, "3 channels on axis 2"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(2, 3)), ValueError, "channel_dim to be an axis of x"),
    (lambda: snn.Delay(3, 4, 1.0, channel_dim=0)(torch.ones(3, 3, 3)), ValueError, "the same axis for both"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(2, 2, 3), torch.ones(3, 2, 3)), ValueError, r"v0 of shape \(4, 2, 3\)"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(2, 2, 3), torch.ones(4, 5, 3)), ValueError, r"v0 of shape \(4, 2, 3\)"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(2, 2, 3), torch.ones(4, 2, 3).double()), TypeError, "float32 like x"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(2, 2, 3), 0.0), TypeError, "v0 to be a tensor"),
    (lambda: snn.Delay(3, 4, 1.0)(torch.ones(2, 2, 3), lengths=torch.tensor([1, 3])), ValueError, "lengths of 0 to T"),
    (lambda: snn.Delay(3, 4, 1.0).step(torch.tensor(1.0)), ValueError, "one step"),
    (lambda: delay(torch.ones(2, 2, 3), torch.ones(3), max_delay=0), ValueError, "max_delay=0 steps, got 1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_second_derivatives_are_the_references(fused):
    device = HOLDERS[fused]
    x, steps = numbers(9, 2, 3, device=device), torch.tensor([0.5, 1.0, 2.25], device=device)
    leaf = x.clone().requires_grad_()
    (gx,) = torch.autograd.grad(delay(leaf, steps, max_delay=3, backend=fused).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="delay: expected a first derivative"):
        gx.sum().backward()


def test_the_reference_is_differentiable_twice():
    x, v0 = torch.randn(6, 2, 3).double().requires_grad_(), torch.randn(3, 2, 3).double().requires_grad_()
    steps = torch.tensor([0.5, 1.75, 2.25]).double().requires_grad_()

    def run(x, steps, v0):
        return delay(x, steps, v0, max_delay=3, backend="reference")

    assert torch.autograd.gradcheck(run, (x, steps, v0)) and torch.autograd.gradgradcheck(run, (x, steps, v0))


def test_forward_mode(holder):
    device = HOLDERS[holder]
    x, steps, v0 = numbers(7, 2, 3), torch.tensor([0.0, 1.5, 3.0]), numbers(3, 2, 3)
    tangents = tuple(torch.randn_like(t) for t in (x, steps, v0))

    def run(*given):
        return delay(*given, max_delay=3, backend=holder if given[0].dtype == torch.float32 else "reference")

    y, dy = torch.func.jvp(run, tuple(t.to(device) for t in (x, steps, v0)), tuple(t.to(device) for t in tangents))
    want, d_want = torch.func.jvp(run, (x.double(), steps.double(), v0.double()), tuple(t.double() for t in tangents))
    close(y, want)
    close(dy, d_want)


@pytest.mark.parametrize("own", [False, True])
def test_vmap_and_gradients_per_sample(holder, own):
    device = HOLDERS[holder]
    x, g = numbers(4, 7, 2, 5).to(device), torch.randn(4, 7, 2, 5).to(device)
    steps = torch.stack([drawn(5, 3) for _ in range(4)]).to(device)
    given = steps if own else steps[0]

    def loss(x, steps, g):
        return (delay(x, steps, max_delay=3, backend=holder) * g).sum()

    dims = (0, 0 if own else None, 0)
    made = torch.vmap(lambda x, s: delay(x, s, max_delay=3, backend=holder), dims[:2])(x, given)
    grads = torch.vmap(torch.func.grad(loss, (0, 1)), dims)(x, given, g)
    for i in range(4):
        mine = given[i] if own else given
        assert torch.equal(made[i], delay(x[i], mine, max_delay=3, backend=holder))
        one = torch.func.grad(loss, (0, 1))(x[i], mine, g[i])
        torch.testing.assert_close((grads[0][i], grads[1][i]), one, rtol=1e-5, atol=1e-5)


def test_opcheck():
    fused = FUSED[0]  # what it looks at is the same of all
    device = HOLDERS[fused]
    x, steps, v0 = (t.to(device) for t in (numbers(5, 2, 3, 4), torch.tensor([0.0, 1.5, 2.0]), numbers(2, 2, 3, 4)))
    torch.library.opcheck(torch.ops.trtkern.delay_forward, (x, steps, v0, 4, 2, False, fused))
    for needs in (1, 7):
        torch.library.opcheck(torch.ops.trtkern.delay_backward, (x, steps, x, v0, 4, 2, False, needs, fused))


def test_compiled_code_and_tracers():
    model = snn.TimeSequential(snn.Delay(5, 4, drawn(5, 4), learnable=True), snn.Delay(5, 3, 2.5))
    x = numbers(9, 2, 5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for each in (model, compiled):
        model.zero_grad()
        y = each(x)
        y.square().sum().backward()
        found.append((y.detach(), model[0].delay.raw.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    traced = fx.symbolic_trace(nn.Sequential(nn.Identity(), model))
    assert torch.equal(traced(x), model(x)) and "Delay" in {type(m).__name__ for m in traced.modules()}


def test_recorded_programs_take_any_length_and_become_plain_torch():
    model = snn.TimeSequential(nn.Linear(4, 5), snn.Delay(5, 4, drawn(5, 4)), snn.LIF(v_threshold=0.3)).eval()
    program = record(model, torch.rand(6, 3, 4))
    plain = decompose(program)
    assert not any("trtkern" in str(node.target) for node in plain.graph.nodes)
    for steps in (2, 11):
        x = 3 * torch.rand(steps, 4, 4)
        assert torch.equal(program.module()(x), model(x)) and torch.equal(plain.module()(x), model(x))
    x = 3 * torch.rand(9, 4, 4)
    assert torch.equal(decompose(model)(x), model(x))


def test_the_reference_is_the_backend_of_that_name():
    assert named("reference").ops["delay"] is reference.delay
    assert "reference" in snn.Delay(3, 4, 1.0).backend_for(torch.ones(2, 2, 3).double())
