"""Layers that compute on packed spikes: the op against its reference, the layers against torch's, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trtkern import reference
from trtkern.backends import _spike_kernels, cpu
from trtkern.models import from_topology
from trtkern.models._blocks import Convolution, SEWBlock, Style
from trtkern.nn import LIF, BatchNormLIF, ConvBatchNormLIF, SpikeConv2d, SpikeLinear
from trtkern.ops.spike_conv import Shape, kernel, objection, spike_conv, spike_conv_weight_grad
from trtkern.ops.spikes import Spikes, add, pack, packed_input, unwritten

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason="the CPU extension is not built")
isa = cpu._extension().isa() if cpu.missing() is None else ""
fast = pytest.mark.skipif(
    not isa or _spike_kernels.row(cpu._extension()) is None, reason=f"{isa} has no kernels for packed spikes"
)


def spikes(T=4, B=2, C=64, H=8, W=8, *, rate=0.2, last=True, pooled=False, seed=0):
    """Random ``Spikes`` that want a gradient; H and W are those of the dense part."""
    torch.manual_seed(seed)
    side = 2 if pooled else 1
    s = (torch.rand(T, B, C, side * H, side * W) < rate).float()
    if last:
        s = s.movedim(2, -1).contiguous().movedim(-1, 2)
    words = pack(s)
    s = F.avg_pool2d(s.flatten(0, 1), 2).unflatten(0, (T, B)) if pooled else s
    return Spikes(s.requires_grad_(), words)


def rows(T=20, B=8, features=512, rate=0.2):
    torch.manual_seed(0)
    s = (torch.rand(T, B, features) < rate).float()
    return Spikes(s.requires_grad_(), pack(s))


def close(got, expected, what):
    assert got.shape == expected.shape
    difference = (got.double() - expected.double()).abs()
    assert bool((difference <= 1e-5 * expected.abs().max()).all()), f"{what}: off by {difference.max()}"


def gradients(layer, x, g):
    y = layer(x)
    s = x.spikes if isinstance(x, Spikes) else x
    return y, dict(zip(("x", "weight", "bias"), torch.autograd.grad(y, [s, *layer.parameters()], g(y)), strict=False))


CASES = {
    "conv": (lambda: SpikeConv2d(64, 64, 3, padding=1), spikes),
    "conv, no bias": (lambda: SpikeConv2d(64, 64, 3, padding=1, bias=False), spikes),
    "contiguous": (lambda: SpikeConv2d(64, 64, 3, padding=1), lambda: spikes(last=False)),
    "stride": (lambda: SpikeConv2d(64, 128, 3, stride=2, padding=1), lambda: spikes(H=16, W=10)),
    "same": (lambda: SpikeConv2d(64, 64, 5, padding="same"), spikes),
    "pooled": (
        lambda: SpikeConv2d(64, 64, 3, padding=1),
        lambda: spikes(pooled=True, rate=0.03),
    ),  # few enough for lists
    "nine steps": (lambda: SpikeConv2d(64, 64, 3, padding=1), lambda: spikes(T=9, B=3)),
    "linear": (lambda: SpikeLinear(512, 256), rows),
    "linear of images": (lambda: SpikeLinear(64 * 64, 256), lambda: spikes(T=16, B=4)),
    "linear of pooled images": (
        lambda: SpikeLinear(64 * 64, 256, bias=False),
        lambda: spikes(T=16, B=4, pooled=True, rate=0.03),
    ),
}


@fast
@pytest.mark.parametrize("case", CASES)
def test_layers_compute_on_words(case):
    make, given = CASES[case]
    torch.manual_seed(1)
    layer, x = make(), given()
    theirs = copy.deepcopy(layer)
    theirs.exact = True
    torch.manual_seed(2)
    noise = None

    def g(y):
        nonlocal noise
        noise = torch.randn_like(y) if noise is None else noise
        return noise

    assert "torch's own: exact is true" in theirs.kernel_for(x)
    assert "forward: " in layer.kernel_for(x) and layer.kernel_for(x).count("torch's own") < 2
    # Nothing looks at the dense spikes, which are not there.
    blind = Spikes(torch.full_like(x.spikes, float("nan")).requires_grad_(), x.words)
    y, mine = gradients(layer, blind, g)
    want, expected = gradients(theirs, x, g)
    close(y, want, "y")
    # The sums may agree bit for bit where both add in one order; blind spikes are NaN to whatever reads them.
    same = torch.equal(y, want) and torch.equal(mine["weight"], expected["weight"])
    assert not same or "torch's own" in layer.kernel_for(x)
    for name, grad in expected.items():
        close(mine[name], grad, name)
    assert mine["weight"].stride() == layer.weight.stride()
    if _spike_kernels.TABLE[_spike_kernels.row(cpu._extension())].image is None or isinstance(layer, SpikeLinear):
        assert torch.equal(mine["x"], expected["x"])  # which stays torch's
    with torch.no_grad():
        assert torch.equal(layer(blind), y)


def shaped(x, window):
    return Shape(x.spikes.shape[0], x.pooled, *window)


@pytest.mark.parametrize("name", ["reference", "best"])
@pytest.mark.parametrize("pooled", [False, True])
def test_op_is_its_reference(name, pooled):
    x = spikes(H=6, W=7, pooled=pooled)
    weight, bias = torch.randn(32, 64, 3, 3), torch.randn(32)
    shape = shaped(x, ((2, 1), (1, 0)))
    chosen = "reference" if name == "reference" or isa != "amx" else "tiles"
    y = spike_conv(x.words, weight, bias, shape, chosen)
    images = x.spikes.detach().flatten(0, 1).double()
    want = F.conv2d(images, weight.double(), bias.double(), (2, 1), (1, 0))
    close(y, want, "y")
    g = torch.randn_like(y)
    close(
        spike_conv_weight_grad(x.words, g, weight, shape, chosen),
        torch.nn.grad.conv2d_weight(images, weight.shape, g.double(), (2, 1), (1, 0)),
        "gweight",
    )


def test_ops_are_what_torch_asks_of_ops():
    x = spikes(H=4, W=4)
    weight = torch.randn(16, 64, 3, 3)
    sizes = (4, False, [1, 1], [1, 1], "reference")
    torch.library.opcheck(torch.ops.trtkern.spike_conv, (x.words, weight, None, *sizes))
    g = torch.randn(8, 16, 4, 4)
    torch.library.opcheck(torch.ops.trtkern.spike_conv_weight_grad, (x.words, g, weight, *sizes))


@fast
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_give_what_torch_gives(value):
    """0 times NaN, and 0 times infinity, are NaN: in every output that saw the weight, also where nothing fired."""
    layer, x = SpikeConv2d(64, 64, 3, padding=1), spikes()
    theirs = copy.deepcopy(layer)
    theirs.exact = True
    with torch.no_grad():
        for each in (layer, theirs):
            each.weight[3, 5, 1, 1] = value
        got, want = layer(x), theirs(x)
    assert got[:, :, 3].isnan().any() and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0))


@fast
def test_gradients_that_are_not_finite_give_what_torch_gives():
    layer, x = SpikeConv2d(64, 64, 3, padding=1, bias=False), spikes()
    theirs = copy.deepcopy(layer)
    theirs.exact = True
    found = []
    for each in (layer, theirs):
        y = each(x)
        g = torch.ones_like(y)
        g[0, 0, 3, 2, 2] = float("nan")
        found.append(torch.autograd.grad(y, each.weight, g)[0])
    assert found[0][3].isnan().any() and torch.equal(found[0].isnan(), found[1].isnan())


def test_what_runs_as_before():
    x = spikes()
    layers = {
        "exact is true": SpikeConv2d(64, 64, 3, exact=True),
        "groups=2": SpikeConv2d(64, 64, 3, groups=2),
        "dilation=(2, 2)": SpikeConv2d(64, 64, 3, dilation=2),
        "padding='same' with an even kernel": SpikeConv2d(64, 64, 4, padding="same"),
        "padding_mode='reflect'": SpikeConv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        "are fewer than": SpikeConv2d(64, 1, 1),
    }
    for why, layer in layers.items():
        assert why in layer.kernel_for(x), layer.kernel_for(x)
        theirs = nn.Conv2d.forward(layer, x.spikes.flatten(0, 1)).unflatten(0, x.spikes.shape[:2])
        assert torch.equal(layer(x), theirs)
    assert "no words" in layers["groups=2"].kernel_for(x.spikes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in SpikeConv2d(64, 64, 3).kernel_for(x)
    double = Spikes(x.spikes.detach().double(), x.words)
    assert "float64" in SpikeConv2d(64, 64, 3).double().kernel_for(double)
    assert "parameters in torch.float64" in SpikeConv2d(64, 64, 3).double().kernel_for(x)
    assert objection(x.words, torch.ones(1), None, torch.float32) is None
    seen = []
    torch.vmap(lambda w: (seen.append(objection(x.words, w, None, torch.float32)), w)[1])(torch.ones(2, 1))
    assert "torch.func" in seen[0]


@fast
def test_the_choice_follows_from_sizes_and_spikes_alone():
    for rate in (0.0, 0.05, 0.5):
        x = spikes(rate=rate)
        weight = torch.randn(64, 64, 3, 3)
        said = {kernel(x.words, weight, shaped(x, ((1, 1), (1, 1))), weight_grad=False) for _ in range(3)}
        assert len(said) == 1
    x = spikes()
    torch.set_num_threads(2)
    try:
        two = SpikeConv2d(64, 64, 3).kernel_for(x)
    finally:
        torch.set_num_threads(1)
    assert two == SpikeConv2d(64, 64, 3).kernel_for(x)


def test_nothing_to_do():
    layer = SpikeConv2d(64, 64, 3, padding=1)
    none = Spikes(torch.zeros(4, 0, 64, 8, 8), torch.zeros(1, 0, 64, 8, 8, dtype=torch.uint8))
    assert layer(none).shape == (4, 0, 64, 8, 8)


@fast
def test_bits_are_all_that_is_kept_and_a_written_spike_is_seen():
    layer, x = SpikeConv2d(64, 64, 3, padding=1), spikes()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    kept = [t for t in saved if not isinstance(t, nn.Parameter)]
    assert sum(t.numel() * t.element_size() for t in kept) == x.words.numel()
    with torch.no_grad():
        x.spikes.mul_(2)
    close(layer(x), nn.Conv2d.forward(layer, x.spikes.flatten(0, 1)).unflatten(0, (4, 2)), "doubled")


@fast
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_block_trains(checkpoint):
    """Layer by layer: what a block gives of the same spikes differs by what float32 rounds."""
    torch.manual_seed(0)
    block = ConvBatchNormLIF(
        SpikeConv2d(64, 64, 3, padding=1, bias=False), BatchNormLIF(64, packed=True), checkpoint=checkpoint
    )
    exact = copy.deepcopy(block)
    exact.conv.exact = True
    x = spikes()
    found = []
    for each in (block, exact):
        out = each(x)
        found.append((out.words, *torch.autograd.grad(out.spikes.sum(), [x.spikes, *each.parameters()])))
    flips = (found[0][0] != found[1][0]).float().mean()
    assert flips < 1e-3  # a potential at the threshold may fall on either side
    if flips == 0:
        for got, want in zip(found[0][1:], found[1][1:], strict=True):
            close(got, want, "gradient")


def sew(stage):
    style = Style.of(False, True)
    conv = Convolution(32, 32)
    return nn.Sequential(style.block(Convolution(8, 32)), *(SEWBlock(conv, conv, None, style) for _ in range(stage)))


@pytest.mark.parametrize("stage", [1, 3, 9])
def test_sums_of_spikes_are_words_too(stage):
    """A SEW block adds its input: its words are those of all addends, up to eight, and what they make is the same."""
    torch.manual_seed(0)
    model, x = sew(stage), 2 * torch.randn(3, 2, 8, 6, 6)
    for layer in model.modules():
        if hasattr(layer, "exact"):
            layer.exact = True
    found = []
    for enabled in (False, True):
        with unwritten(enabled):
            y = model(x)
            if enabled:
                assert isinstance(y, Spikes) == (stage < 8) and (stage > 8 or y.addends == stage + 1)
            total = y.spikes if isinstance(y, Spikes) else y
            found.append((total * 1, *torch.autograd.grad(total.sin().sum(), model.parameters())))
    assert found[0][0].max() > 1 or stage == 1
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found, strict=True))


@fast
def test_layers_compute_on_words_of_sums():
    torch.manual_seed(0)
    with unwritten():
        one, other = (LIF(packed=True)(2 * torch.randn(4, 2, 64, 8, 8).requires_grad_()) for _ in range(2))
        both = add(add(one, other), one)
    assert both.addends == 3 and not both.spikes.is_made
    conv, linear = SpikeConv2d(64, 64, 3, padding=1), SpikeLinear(64 * 64, 512)
    for layer in (conv, linear):
        exact = copy.deepcopy(layer)
        exact.exact = True
        y, want = layer(both), exact(both.spikes)
        close(y, want, "y")
        g = torch.randn_like(want)
        grads = [
            torch.autograd.grad(made, [each.weight, one.spikes, other.spikes], g, retain_graph=True)
            for made, each in ((y, layer), (want, exact))
        ]
        for got, expected in zip(*grads, strict=True):
            close(got, expected, "gradient")


@fast
def test_spikes_of_a_neuron():
    lif = LIF(packed=True)
    x = lif(2 * torch.randn(16, 4, 256))
    layer = SpikeLinear(256, 2048)
    y = layer(x)
    close(y, F.linear(x.spikes, layer.weight, layer.bias), "y")
    assert "forward: " in layer.kernel_for(x) and reference.spikes_pack(x.spikes).equal(x.words)


def test_an_input_of_spikes_is_packed():
    """What a rate code makes of images goes to the first layer with its words; anything else as it is."""
    x = (torch.rand(20, 8, 28 * 64) < 0.2).float()
    found = packed_input(x)
    assert isinstance(found, Spikes) and found.spikes is x and torch.equal(found.words, reference.spikes_pack(x))
    assert isinstance(packed_input(torch.where(x == 0, -0.0, x)), Spikes)
    for value in (0.5, -1.0, 2.0, float("nan"), float("inf"), 1e-45):
        for place in (0, x.numel() // 2, -1):
            other = x.clone()
            other.view(-1)[place] = value
            assert packed_input(other) is other
    for other in (x[:2, :2], x.double(), x.transpose(0, 1), x.clone().requires_grad_(), x[:1].expand(20, -1, -1)):
        assert packed_input(other) is other
    recorded = []
    torch.vmap(lambda each: (recorded.append(type(packed_input(each))), each)[1])(x)
    assert recorded[0] is not Spikes


def test_a_fully_connected_network_takes_spikes_as_words():
    torch.manual_seed(0)
    x = (torch.rand(20, 8, 1, 28, 64) < 0.2).float()
    found = []
    for exact in (False, True):
        torch.manual_seed(1)
        net = from_topology("FC-64_L-10", shape=(1, 28, 64), timesteps=20, exact_convolutions=exact)
        seen = []
        net.layers[0].linear.register_forward_hook(lambda layer, given, y, seen=seen: seen.append((given[0], y)))
        net(x).square().sum().backward()
        assert isinstance(seen[0][0], Spikes)
        found.append((seen[0][1].detach(), net.layers[0].linear.weight.grad))
    close(found[0][0], found[1][0], "y")
    assert found[0][1].isfinite().all() and found[0][1].abs().sum() > 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_sum_that_is_written_to_is_seen(exact):
    torch.manual_seed(0)
    with unwritten():
        both = add(*(LIF(packed=True)(2 * torch.randn(4, 2, 64, 8, 8)) for _ in range(2)))
    layer = SpikeConv2d(64, 64, 3, padding=1, exact=exact)
    with torch.no_grad():
        both.spikes.mul_(0.5)
    y, want = layer(both), layer(both.spikes.clone())
    assert torch.equal(y, want)
    grads = [torch.autograd.grad(each.square().sum(), layer.weight)[0] for each in (y, want)]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("case", ["conv", "linear"])
def test_a_parametrized_weight_is_made_once(case, exact):
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight

    make, given = CASES[case]
    layer, counted = make(), Counted()
    layer.exact = exact
    nn.utils.parametrize.register_parametrization(layer, "weight", counted)
    counted.calls = 0
    layer(given()).sum().backward()
    assert counted.calls == 1


def test_few_rows_are_left_to_torch():
    layer = SpikeLinear(4096, 4096)
    assert "fewer than 64" in layer.kernel_for(rows(T=4, B=4, features=4096))
