"""The time container: what its layers see, static inputs, packed spikes, torch.compile."""

import copy

import pytest
import torch
from timed import B, C, H, T, images, network
from torch import nn

from trtkern import nn as snn
from trtkern.nn.spike_layers import SpikeConv2d
from trtkern.nn.time import OverTime, TimeSequential


class Probe(nn.Module):
    """Lets x through and keeps it."""

    def forward(self, x):
        self.seen = x
        return x.view_as(x)


class Block(nn.Module):
    """A layer without time that is no Sequential."""

    def __init__(self, *layers):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x):
        return self.inner(x)


class Residual(nn.Module):
    """Somebody's layer that holds neurons."""

    def __init__(self, *layers):
        super().__init__()
        self.inner = TimeSequential(*layers)

    def forward(self, x):
        return x + self.inner(x)


def compare_static(net, x, sequence=None, rtol=1e-12):
    """net on x shown T times by the container, against the same network on T equal frames, and the gradients."""
    unrolled = copy.deepcopy(net)
    unrolled.timesteps = None
    leaf = x.clone().requires_grad_()
    got = net(leaf if sequence is None else leaf.expand(sequence, *x.shape))
    other = x.clone().requires_grad_()
    want = unrolled(torch.stack([other] * (sequence or net.timesteps)))
    g = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)
    grads = torch.autograd.grad(got, [leaf, *net.parameters()], g)
    want_grads = torch.autograd.grad(want, [other, *unrolled.parameters()], g)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)
    assert any(a.abs().sum() > 0 for a in grads)
    for (name, a), b in zip(net.named_buffers(), unrolled.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-14, msg=name)
    return got


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("make", [TimeSequential, OverTime])
def test_layers_without_time_see_a_view(make, layout):
    probe = Probe()
    x = images(layout)
    y = make(probe)(x)
    assert probe.seen.shape == (T * B, C, H, H) and probe.seen.data_ptr() == x.data_ptr()
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert probe.seen.is_contiguous(memory_format=memory)
    assert y.shape == x.shape and y.stride() == x.stride() and y.data_ptr() == x.data_ptr()


def test_nothing_is_copied_from_layer_to_layer():
    net = TimeSequential(nn.Conv2d(C, 4, 3), nn.Conv2d(4, 4, 3), nn.AvgPool2d(2))
    addresses = []
    for layer in net:
        layer.register_forward_hook(lambda layer, args, y: addresses.append((args[0].data_ptr(), y.data_ptr())))
    x = images("channels_last")
    y = net(x)
    assert y[0].is_contiguous(memory_format=torch.channels_last)
    given, made = zip(*addresses, strict=True)
    assert [*given, y.data_ptr()] == [x.data_ptr(), *made]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_container_is_the_loop_by_hand(layout):
    net = network()
    x = images(layout, dtype=torch.float64)
    by_hand = copy.deepcopy(net)
    y = x
    for layer in by_hand:
        y = layer(y) if isinstance(layer, snn.LIF | snn.PLIF) else layer(y.flatten(0, 1)).unflatten(0, (T, B))
    got = net(x)
    assert torch.equal(got, y) and got.shape == (T, B, 7)
    got.sum().backward()
    y.sum().backward()
    for a, b in zip(net.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    in_sequential = nn.Sequential(
        *(layer if isinstance(layer, snn.LIF | snn.PLIF) else OverTime(layer) for layer in net)
    )
    assert torch.equal(in_sequential.eval()(x), net.eval()(x))


@pytest.mark.parametrize(
    ("timesteps", "settings"),
    [(1, {}), (4, {}), (3, {"momentum": None}), (2, {"affine": False}), (2, {"track_running_stats": False})],
    ids=str,
)
def test_a_static_image_is_T_equal_frames(timesteps, settings):
    net = network(timesteps, **settings)
    x = images(time=False, dtype=torch.float64)
    rows = []
    net[0].register_forward_hook(lambda layer, args, y: rows.append(len(args[0])))
    for _ in range(2):
        compare_static(net, x)
    # One step by the container and T by its unrolled copy, whose hook this is too.
    assert rows == [B, timesteps * B] * 2
    compare_static(net.eval(), x)


def test_static_statistics_in_every_kind_of_layer():
    """A BatchNorm in a Sequential, in OverTime, in a container, in somebody's block; also from expanded input."""
    x = images(time=False, dtype=torch.float64)
    conv = nn.Conv2d(C, 4, 3)
    for layer in (
        nn.Sequential(conv, nn.BatchNorm2d(4)),
        OverTime(nn.Sequential(conv, nn.BatchNorm2d(4))),
        TimeSequential(conv, nn.BatchNorm2d(4)),
        Block(conv, nn.BatchNorm2d(4)),
        nn.Sequential(conv, nn.InstanceNorm2d(4, track_running_stats=True)),
        nn.Sequential(conv, nn.GroupNorm(2, 4), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm2d(4)),
    ):
        net = TimeSequential(copy.deepcopy(layer), snn.LIF()).double()
        compare_static(net, x, sequence=T)
        static = compare_static(TimeSequential(*net, timesteps=T), x)
        assert static.shape[:2] == (T, B)


def test_a_lazy_batch_norm_starts_with_all_steps():
    x = images(time=False, dtype=torch.float64)
    nets = [TimeSequential(nn.LazyBatchNorm2d(dtype=torch.float64), timesteps=T) for _ in range(2)]
    nets[1].timesteps = None
    assert torch.equal(nets[0](x), nets[1](torch.stack([x] * T)))
    assert torch.equal(nets[0][0].running_var, nets[1][0].running_var)


def test_one_value_a_channel_is_enough_over_time():
    net = TimeSequential(nn.Linear(5, 3), nn.BatchNorm1d(3), snn.LIF(), timesteps=T).double()
    nn.init.constant_(net[1].bias, 0.6)
    compare_static(net, torch.randn(1, 5, dtype=torch.float64))
    net.timesteps = 1
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 5, dtype=torch.float64))


def test_the_correction_does_not_disturb_an_earlier_backward():
    net = network(T)
    first, second = (net(images(time=False, dtype=torch.float64)) for _ in range(2))
    (first.sum() + second.sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_only_what_is_static_runs_once():
    before, after = Probe(), Probe()
    net = TimeSequential(before, nn.Identity(), nn.Dropout(0.5), snn.LIF(decay=0.7), after, timesteps=T)
    y = net(torch.rand(B, 50))
    assert before.seen.shape == (B, 50) and after.seen.shape == (T * B, 50)
    assert not all(torch.equal(y[0], step) for step in y)
    y = net[:3](torch.ones(B, 50))
    assert y.stride(0) == 0 and 0 < (y == 0).sum() < y.numel()
    for make in (TimeSequential, OverTime):
        y = make(before)(torch.rand(B, 50).expand(T, B, 50))
        assert before.seen.shape == (B, 50) and y.shape == (T, B, 50) and y.stride(0) == 0


def test_neurons_first_and_nothing_at_all():
    x = torch.rand(B, 5, requires_grad=True)
    y = TimeSequential(snn.LIF(), timesteps=T)(x)
    assert torch.equal(y, snn.LIF()(torch.stack([x] * T)))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert TimeSequential()(x) is x and TimeSequential(timesteps=2)(x).shape == (2, B, 5)


def test_layers_that_hold_neurons_get_the_sequence():
    inner = [nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), snn.LIF()]
    x = images()
    residual = Residual(*inner)
    assert torch.equal(TimeSequential(residual)(x), residual(x))
    plain = nn.Sequential(OverTime(inner[0]), snn.LIF())
    assert torch.equal(TimeSequential(plain)(x), plain(x))
    residual.takes_time = False
    probe = Probe()
    residual.inner = TimeSequential(probe)
    TimeSequential(residual)(x)
    assert probe.seen.shape == (T * B * C, H, H)


class Taker(nn.Module):
    takes_time = takes_spikes = True

    def forward(self, x):
        self.seen = x
        return x


def test_packed_spikes_reach_those_who_take_them():
    taker, probe, blind = Taker(), Probe(), Taker()
    blind.takes_spikes = False
    x = torch.rand(T, B, 3, 4, 4) * 2
    net = TimeSequential(snn.LIF(packed=True), nn.Identity(), taker, TimeSequential(taker), nn.Sequential(taker))
    made = net(x)
    assert isinstance(made, snn.Spikes) and taker.seen is made
    got = TimeSequential(probe)(made)
    assert torch.equal(got, made.spikes) and probe.seen.data_ptr() == made.spikes.data_ptr()
    assert torch.equal(OverTime(probe)(made), made.spikes)
    assert TimeSequential(blind)(made) is made.spikes and TimeSequential(snn.LIF())(made).shape == x.shape
    with pytest.raises(ValueError, match="timesteps=9 steps"):
        TimeSequential(taker, timesteps=9)(made)
    assert TimeSequential(taker, timesteps=T)(made) is made


def test_packed_convolutions_keep_the_words():
    conv = SpikeConv2d(3, 2, 3)
    x = torch.rand(T, B, 3, 6, 6, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        TimeSequential(snn.LIF(packed=True), conv)(x)
    assert any(t.dtype == torch.uint8 for t in saved)


def test_time_counted_from_the_end():
    x = torch.rand(T, B, 5)
    assert torch.equal(TimeSequential(snn.LIF(time_dim=-3))(x), snn.LIF()(x))


@pytest.mark.parametrize("timesteps", [None, T])
def test_fullgraph(timesteps):
    torch._dynamo.reset()
    net = TimeSequential(nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4), snn.LIF(), nn.AvgPool2d(2), timesteps=timesteps)
    want_net = copy.deepcopy(net)
    x = images("channels_last", time=timesteps is None)
    got, want = torch.compile(net, fullgraph=True, backend="aot_eager")(x), want_net(x)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    want.sum().backward()
    for a, b in zip(net.parameters(), want_net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(net.buffers(), want_net.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_new_sizes_do_not_compile_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    net = TimeSequential(nn.Flatten(), nn.Linear(C * H * H, 4), OverTime(nn.BatchNorm1d(4)), snn.LIF(), nn.Linear(4, 2))
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    # No size that is also a number of channels, which torch.compile would take for the same symbol.
    for timesteps, batch in ((5, 7), (5, 8), (9, 11)):
        assert compiled(torch.randn(timesteps, batch, C, H, H)).shape == (timesteps, batch, 2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("wrap", [TimeSequential, OverTime])
def test_the_gradient_of_one_image_in_channels_last(wrap, static):
    """Whose stride along the rows says nothing, and misleads an evaluating BatchNorm of torch 2.13."""
    steps = 2 if static else 1
    norm = nn.BatchNorm2d(6).double().eval()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 2, 2, 6, dtype=torch.float64).permute(0, 3, 1, 2)
    x = x.as_strided(x.shape, (6, 1, 12, 6)).requires_grad_()
    y = wrap(norm)(x.expand(steps, *x.shape))
    g = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    (found,) = torch.autograd.grad(y, x, g.expand(y.shape) if static else g.unsqueeze(0))
    scale = (norm.running_var + norm.eps).rsqrt().view(6, 1, 1)
    torch.testing.assert_close(found, steps * g * scale, rtol=1e-12, atol=0.0)
