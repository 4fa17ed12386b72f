"""The residual networks against plain torch, their sizes, and what their options change."""

from __future__ import annotations

import pytest
import torch
from twins import compare, varied

from trtkern.backends import named
from trtkern.bench import plain
from trtkern.models import from_topology, resnet19, sew_resnet34, spiking_resnet34
from trtkern.models._blocks import Convolution, NarrowProjection
from trtkern.nn import IF, LIF, PLIF, Spikes, TRTLoss
from trtkern.nn._neuron import Spiking
from trtkern.ops.spikes import pack

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"
SMALL = {"shape": (3, 8, 8), "timesteps": 3, "width": 4, "backend": BACKEND}


@pytest.mark.parametrize(
    ("make", "count", "tensors", "regularized", "neurons"),
    [
        (resnet19, 12_630_858, 64, (42, 12_625_280), 18),
        (sew_resnet34, 21_335_972, 110, (73, None), 36),
        (spiking_resnet34, 21_335_972, 110, (73, None), 33),
    ],
)
def test_networks_have_the_papers_size(make, count, tensors, regularized, neurons):
    net = make()
    parameters = list(net.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (count, tensors)
    chosen = [p for _, p in TRTLoss(net).regularized()]
    assert len(chosen) == regularized[0]
    assert regularized[1] in (None, sum(p.numel() for p in chosen))
    assert sum(isinstance(module, Spiking) for module in net.modules()) == neurons


def test_resnet19_is_that_of_plain_torch():
    net = varied(plain.resnet19())
    model = resnet19(shape=(3, 8, 8), timesteps=3, backend="reference").double()
    compare(model, net, torch.rand(2, 3, 8, 8, dtype=torch.float64), 10)


def test_sew_resnet34_is_that_of_plain_torch():
    net = varied(plain.resnet34(plain.SEW, 1.0))
    model = sew_resnet34(shape=(3, 32, 32), timesteps=3, backend="reference").double()
    compare(model, net, torch.rand(2, 3, 32, 32, dtype=torch.float64), 100, gradients=False)


def test_spiking_resnet34_is_that_of_plain_torch():
    net = varied(plain.resnet34(plain.Residual, 0.5, width=8))
    model = spiking_resnet34(shape=(3, 32, 32), width=8, backend="reference").double()
    compare(model, net, torch.rand(3, 2, 3, 32, 32, dtype=torch.float64), 100)


def test_convolutions_are_drawn_as_in_the_paper():
    conv = resnet19(shape=(3, 8, 8), timesteps=1).layers[4].second.conv.weight
    assert conv.shape == (256, 256, 3, 3)
    assert abs(conv.std().item() / (2 / (256 * 9)) ** 0.5 - 1) < 0.01 and abs(conv.mean().item()) < 1e-3


def step(make, x, **options):
    """Logits and gradients of a small network, the same for the same options."""
    torch.manual_seed(1)
    net = make(5, **{**SMALL, "shape": x.shape[-3:], **options})
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("norm.bias"):
                parameter.fill_(0.4)
    logits = net(x)
    logits.square().sum().backward()
    return net, logits, {name: p.grad for name, p in net.named_parameters()}


NETWORKS = [resnet19, spiking_resnet34, sew_resnet34]


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("option", [{"packed": False}, {"checkpoint": True}])
def test_what_is_kept_changes_no_gradient(make, option):
    x = torch.rand(3, 2, 3, 32, 32)
    _, logits, grads = step(make, x)
    _, other, others = step(make, x, **option)
    assert logits.abs().sum() > 0 and torch.equal(logits, other)
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]) or BACKEND == "reference", name
    assert sum(grad.abs().sum() > 0 for grad in grads.values()) > 0.9 * len(grads)


@pytest.mark.parametrize("make", NETWORKS)
def test_an_image_is_the_sequence_of_its_copies(make):
    image = torch.rand(2, 3, 32, 32)
    frames = image.repeat(3, 1, 1, 1).unflatten(0, (3, 2))
    # Exactly the same arithmetic from the first spikes on, so long as no potential is at the threshold.
    (net, once, _), (other, always, _) = (step(make, x) for x in (image, frames))
    torch.testing.assert_close(once, always, rtol=1e-4, atol=1e-4)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["RES", "SEWRES~ADD"])
@pytest.mark.parametrize("out", [3, 4])
def test_a_block_takes_an_image(head, out):
    torch.manual_seed(2)
    net = from_topology(f"{head}-{out}-3=3-1=1-1=1_L-5", shape=(3, 8, 8), timesteps=3, backend=BACKEND)
    image = torch.rand(2, 3, 8, 8)
    frames = image.repeat(3, 1, 1, 1).unflatten(0, (3, 2))
    grads = [torch.autograd.grad(net(x).square().sum(), list(net.parameters())) for x in (image, frames)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_a_block_adds_what_was_pooled():
    grads = []
    for packed in (False, True):
        torch.manual_seed(3)
        topology = "CONVAP-4-3-1-1_RES-4-3=3-1=1-1=1_SEWRES~ADD-4-3=3-1=1-1=1_L-5"
        net = from_topology(topology, shape=(3, 8, 8), timesteps=3, packed=packed, backend=BACKEND)
        torch.manual_seed(4)
        logits = net(torch.rand(2, 3, 8, 8))
        grads.append([logits, *torch.autograd.grad(logits.square().sum(), list(net.parameters()))])
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two) or BACKEND == "reference"


@pytest.mark.parametrize("channels", [3, 16])
def test_a_strided_projection_is_a_convolution(channels):
    conv = Convolution(channels, 5, 1, 2, 0).make()
    assert isinstance(conv, NarrowProjection) == (channels < 16)
    other = torch.nn.Conv2d(channels, 5, 1, 2, bias=False)
    other.load_state_dict(conv.state_dict())
    spikes = (torch.rand(3, 2, channels, 7, 8) > 0.5).float().requires_grad_()
    for x in (spikes, Spikes(spikes, pack(spikes))):
        y, want = conv(x), other(spikes.flatten(0, 1)).unflatten(0, (3, 2))
        torch.testing.assert_close(y, want)
        g = torch.randn_like(y)
        got = torch.autograd.grad(y, [spikes, conv.weight], g)
        torch.testing.assert_close(got, torch.autograd.grad(want, [spikes, other.weight], g))


def test_spikes_go_packed_from_block_to_block_and_channels_last():
    seen = []
    net = resnet19(5, **SMALL)
    for block in net.layers[:-3]:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    assert all(isinstance(x, Spikes) and x.spikes.stride(2) == 1 for x in seen) and len(seen) == 8
    packed = []
    net = sew_resnet34(5, **{**SMALL, "shape": (3, 32, 32)})
    net.layers[1].register_forward_hook(lambda module, inputs, output: packed.append(output))
    net(torch.rand(2, 3, 32, 32)).sum().backward()
    assert torch.equal(packed[0].spikes.unique(), torch.tensor([0.0, 1.0])) and not packed[0].pooled
    with torch.no_grad():
        net(torch.rand(2, 3, 32, 32))
    assert isinstance(packed[1], torch.Tensor)


@pytest.mark.parametrize(
    ("connect", "expected"), [("ADD", [0, 1, 1, 2]), ("AND", [0, 0, 0, 1]), ("IAND", [0, 1, 0, 0])]
)
def test_sew_blocks_connect_spikes(connect, expected):
    net = from_topology(f"SEWRES~{connect}-4-3=3-1=1-1=1_L-2", shape=(4, 4, 4), timesteps=1, backend=BACKEND)
    block = net.layers[0]
    fired = torch.tensor([0.0, 0.0, 1.0, 1.0])
    block.second.register_forward_hook(lambda *args: fired.view(1, 1, 4, 1, 1).expand(1, 1, 4, 4, 4))
    given = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 4, 1, 1).expand(1, 1, 4, 4, 4)
    assert block(given)[0, 0, :, 0, 0].tolist() == expected


def test_neurons_are_those_that_are_asked_for():
    def decays(net):
        return {module.decay for module in net.modules() if isinstance(module, LIF)}

    assert decays(sew_resnet34(5, width=2)) == {1.0}
    assert decays(sew_resnet34(5, width=2, decay=0.5)) == {0.5} == decays(spiking_resnet34(5, width=2))
    assert decays(resnet19(5, width=2, neuron=IF)) == {1.0}
    net = sew_resnet34(5, width=2, neuron=PLIF)
    assert sum(name.endswith("lif.w") for name, _ in net.named_parameters()) == 36
    assert {name for name, _ in TRTLoss(net).regularized()}.isdisjoint(
        n for n, _ in net.named_parameters() if "lif" in n
    )


def test_networks_compute_in_half_precision():
    net = resnet19(5, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.rand(2, 3, 8, 8))
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_sync_reaches_every_norm():
    net = resnet19(5, sync=True, **SMALL)
    assert all(block.norm.sync for block in net.modules() if hasattr(block, "conv") and hasattr(block.norm, "sync"))
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in net.modules()) == 3
