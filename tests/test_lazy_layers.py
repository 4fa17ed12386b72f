"""Layers and networks around spikes that a neuron leaves unwritten."""

import pytest
import torch
from lazily import SHAPE, both, fire, same, x_of

from trtkern import nn
from trtkern.models import from_topology, resnet19, vggsnn
from trtkern.models._blocks import Convolution, ResidualBlock, SEWBlock, Style
from trtkern.ops import spikes as spikes_ops
from trtkern.ops._lazy import Lazy
from trtkern.ops._library import unseen
from trtkern.ops.spikes import Spikes, Unwritten, unwritten
from trtkern.profiling.memory.peak import peak


class Between(torch.nn.Module):
    """Spikes, a layer that takes them, and whether the spikes were made by then."""

    def __init__(self, make, user):
        super().__init__()
        self.make, self.user, self.made = make, user, None

    def forward(self, x):
        given = self.make(x)
        out = self.user(given)
        self.made = type(given.spikes) is Lazy and given.spikes.is_made
        return out, given


USERS = {
    "conv": (lambda: nn.SpikeConv2d(4, 3, 3, padding=1), 1),
    "strided": (lambda: nn.SpikeConv2d(4, 6, 3, stride=2, padding="valid", groups=2, bias=False), 1),
    "same": (lambda: nn.SpikeConv2d(4, 3, 2, padding="same"), 1),
    "pooled conv": (lambda: nn.SpikeConv2d(4, 3, 3, padding=1), 2),
    "linear": (lambda: nn.SpikeLinear(96, 5), 1),
    "pooled linear": (lambda: nn.SpikeLinear(24, 5), 2),
    "last axis": (lambda: nn.SpikeLinear(6, 5), 1),
    "block": (lambda: nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3)), 1),
    "checkpointed": (lambda: nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3), checkpoint=True), 1),
    "checkpointed, pooled": (
        lambda: nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3), checkpoint=True),
        2,
    ),
}


@pytest.mark.parametrize("mode", ["grad", "frozen", "no_grad", "inference", "autocast"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("user", USERS)
def test_layers_that_take_words_make_no_spikes(user, channels_last, mode):
    build, pool = USERS[user]

    def run():
        net = Between(nn.BatchNormLIF(4, packed=True, pool=pool), build())
        if channels_last:
            net = net.to(memory_format=torch.channels_last)
        net.user.requires_grad_(mode != "frozen")
        leaf = x_of(channels_last=channels_last).requires_grad_()
        modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
        modes["autocast"] = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        with modes.get(mode, torch.enable_grad)():
            out, given = net(1 * leaf)
        assert not net.made and type(given.spikes) is (Lazy if spikes_ops.lazily(leaf, "cpu") else torch.Tensor)
        if mode in ("no_grad", "inference"):
            return [out, given.spikes]
        wanted = [leaf, given.spikes, *(p for p in net.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(out.float().sin().sum(), wanted)
        assert type(given.spikes) is torch.Tensor or not given.spikes.is_made
        return [out, *grads, given.spikes]

    dense, lazy = both(run)
    same(dense, lazy)
    assert dense[0].abs().sum() > 0


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("pool", [1, 2])
def test_a_residual_is_made_into_memory_that_is_not_kept(words, pool):
    if words and pool == 2:
        pytest.skip("words of pooled spikes are no residual")

    def run():
        leaf, x = fire(nn.BatchNormLIF(4, packed=True, pool=pool))
        y = x_of(x.spikes.shape, seed=7).requires_grad_()
        layer = nn.BatchNormLIF(4)
        for _ in range(2):  # the second call is known
            out = layer(y, x if words else x.spikes)
            grads = torch.autograd.grad(out.sin().sum(), [leaf, y, *layer.parameters()], retain_graph=True)
        assert type(x.spikes) is torch.Tensor or not x.spikes.is_made
        return [out, *grads]

    dense, lazy = both(run)
    same(dense, lazy)
    assert dense[1].abs().sum() > 0


def test_a_neuron_takes_unwritten_spikes_as_its_current():
    def run():
        leaf, x = fire()
        norm = nn.BatchNormLIF(4)
        made = [nn.LIF(v_threshold=0.5)(x.spikes), norm(x.spikes), nn.LIF()(x_of(), x.spikes[0].detach())]
        made.append(nn.LIF()(x_of((3, *SHAPE)), x.spikes.detach()))  # as a state
        grads = torch.autograd.grad(sum(s.sin().sum() for s in made), [leaf, *norm.parameters()])
        return [*made, *grads]

    same(*both(run))


def test_spikes_of_nothing():
    def run():
        made = []
        for layer in (nn.LIF(packed=True), nn.BatchNormLIF(4, packed=True, pool=2).eval()):
            leaf = torch.empty(5, 0, 4, 4, 6, requires_grad=True)
            x = layer(1 * leaf)
            made += [x.spikes * 1, x.words, *torch.autograd.grad(x.spikes.sum(), leaf)]
        return made

    same(*both(run))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_static_spikes_that_were_given_words(checkpointed):
    def run():
        step = (x_of()[0] > 1).float()
        x = Spikes(step.expand(SHAPE).requires_grad_(), spikes_ops.pack(step.expand(SHAPE).contiguous()))
        block = nn.ConvBatchNormLIF(nn.SpikeConv2d(4, 3, 1), nn.BatchNormLIF(3, packed=True), checkpoint=checkpointed)
        out = block(x).spikes
        return [out * 1, *torch.autograd.grad(out.sin().sum(), [x.spikes, *block.parameters()])]

    dense, lazy = both(run)
    same(dense, lazy)
    assert dense[2].abs().sum() > 0


def test_containers_and_time_axes():
    def run():
        torch.manual_seed(1)
        made = []
        for net in (
            nn.TimeSequential(
                nn.LIF(packed=True), torch.nn.Conv2d(4, 3, 3), nn.IF(packed=True), nn.SpikeConv2d(3, 2, 1)
            ),
            nn.TimeSequential(nn.LIF(packed=True), torch.nn.Identity(), nn.SpikeConv2d(4, 2, 1)),
            torch.nn.Sequential(nn.LIF(packed=True), nn.OverTime(torch.nn.AvgPool2d(2))),
            nn.TimeSequential(nn.LIF(packed=True), torch.nn.Flatten(), torch.nn.Linear(96, 2)),
            nn.TimeSequential(nn.BatchNormLIF(4, packed=True), torch.nn.BatchNorm2d(4), nn.LIF()),
        ):
            leaf = x_of().requires_grad_()
            out = net(1 * leaf)
            made += [out, *torch.autograd.grad(out.sin().sum(), [leaf, *net.parameters()])]
        leaf = x_of().movedim(0, 1).contiguous().requires_grad_()
        x = nn.LIF(packed=True, time_dim=1)(1 * leaf)
        made += [x.spikes * 1, x.words, *torch.autograd.grad(x.spikes.sin().sum(), leaf)]
        return made

    same(*both(run))


BLOCKS = {
    "residual": lambda: ResidualBlock(Convolution(4, 4), Convolution(4, 4), None, Style()),
    "checkpointed": lambda: ResidualBlock(Convolution(4, 4), Convolution(4, 4), None, Style(checkpoint=True)),
    "shortcut": lambda: ResidualBlock(Convolution(4, 6), Convolution(6, 6), Convolution(4, 6, 1, 1, 0), Style()),
    "sew": lambda: SEWBlock(Convolution(4, 4), Convolution(4, 4), None, Style()),
}


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("block", BLOCKS)
def test_residual_blocks(block, pool):
    def run():
        leaf, x = fire(nn.BatchNormLIF(4, packed=True, pool=pool))
        layer = BLOCKS[block]()
        made = layer(x)
        out = made.spikes if isinstance(made, Spikes) else made
        if block != "sew" and block != "shortcut":
            assert type(x.spikes) is torch.Tensor or not x.spikes.is_made
        grads = torch.autograd.grad(out.sin().sum(), [leaf, *layer.parameters()])
        return [out * 1, *grads, *layer.buffers()]

    dense, lazy = both(run)
    same(dense, lazy)
    assert dense[1].abs().sum() > 0


NETWORKS = {
    "vggsnn": lambda: vggsnn(5, shape=(2, 16, 16), timesteps=3),
    "checkpointed": lambda: vggsnn(5, shape=(2, 16, 16), timesteps=3, checkpoint=True),
    "resnet19": lambda: resnet19(5, shape=(2, 8, 8), timesteps=2, width=8),
    "topology": lambda: from_topology("CONV-8-3-1-1_CONVAP-8-3-1-1_FC-16_L-5", shape=(2, 8, 8), timesteps=3),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_of_a_network(network):
    def run():
        net = NETWORKS[network]()
        x = torch.randn(2, 2, 8, 8) if network != "vggsnn" and network != "checkpointed" else torch.randn(2, 2, 16, 16)
        out = net(x)
        out.sin().sum().backward()
        with torch.no_grad():
            shown = net.eval()(x)
        return [out, shown, *[p.grad for p in net.parameters()], *net.buffers()]

    dense, lazy = both(run)
    same(dense, lazy)
    assert all(g.abs().sum() > 0 for g in dense[2:4])


def test_the_layers_between_make_spikes_where_they_need_them_and_nowhere_else(monkeypatch):
    """Each convolution unpacks words once forward, into memory that goes with the call; no spikes are made to stay."""
    made, written = [], Unwritten.written
    monkeypatch.setattr(Unwritten, "written", lambda self, words: made.append(words) or written(self, words))
    net = torch.nn.Sequential(
        *(
            nn.ConvBatchNormLIF(nn.SpikeConv2d(n, 8, 3, padding=1), nn.BatchNormLIF(8, packed=True, pool=pool))
            for n, pool in ((4, 1), (8, 2), (8, 1))
        ),
        nn.SpikeLinear(8 * 2 * 3, 5),
    )
    with unwritten():
        net(fire()[1]).sin().sum().backward()
    assert not made and all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_neuron_takes_less_memory_by_its_dense_spikes():
    shape = (8, 4, 8, 16, 16)
    norm, x, held = nn.BatchNormLIF(8, packed=True), x_of(shape).requires_grad_(), []

    def bytes_at_the_peak():
        held[:] = [norm(x)]
        held.clear()
        with unseen():
            return peak(lambda: held.append(norm(x)), torch.device("cpu"))

    written, left = both(bytes_at_the_peak)
    assert written - left == 4 * x.numel()


def test_what_a_residual_block_holds_between_its_convolutions():
    """Its input stays alive until it is added: as words, where nobody computes with its spikes."""
    block = ResidualBlock(Convolution(8, 8), Convolution(8, 8), None, Style())
    leaf, x = x_of((8, 2, 8, 8, 8)).requires_grad_(), []

    def alive():
        """Bytes of spikes as floats that are there when the second convolution runs, counted by their storages."""
        seen = []

        def look(module, given):
            spikes = [x[0].spikes, given[0].spikes]
            seen.extend(4 * s.numel() for s in spikes if not isinstance(s, Lazy) or s.is_made)

        x[:] = [nn.BatchNormLIF(8, packed=True)(leaf)]
        handle = block.second.conv.register_forward_pre_hook(look)
        block(x[0])
        handle.remove()
        return sum(seen)

    assert both(alive) == [2 * 4 * leaf.numel(), 0]
