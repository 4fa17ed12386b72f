"""The convolutional networks: their sizes, their static first layer, their memory layout, what they keep."""

from __future__ import annotations

import pytest
import torch
from twins import compare, varied

from trtkern import nn as snn
from trtkern.backends import named
from trtkern.bench import plain
from trtkern.models import ConvSNN, from_topology, resnet19, sew_resnet34, vggsnn
from trtkern.profiling import memory
from trtkern.training import recipes

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"


def test_networks_have_the_sizes_of_their_recipes():
    layers = recipes.load("fashion-mnist")["model"]["layers"]
    assert sum(p.numel() for p in ConvSNN((1, 28, 28), layers, 10).parameters()) == 54_778
    assert ConvSNN((1, 8, 8), (16, 32, "pool"), 10, timesteps=3)(torch.rand(2, 1, 8, 8)).shape == (3, 2, 10)


@pytest.mark.parametrize(("classes", "count"), [(10, 9_268_746), (101, 9_688_165)])
def test_vggsnn_has_the_papers_size(classes, count):
    assert sum(p.numel() for p in vggsnn(classes).parameters()) == count


def test_vggsnn_is_that_of_plain_torch():
    net = varied(plain.vggsnn(512))
    model = vggsnn(shape=(2, 16, 16), backend="reference").double()
    compare(model, net, torch.rand(3, 1, 2, 16, 16, dtype=torch.float64), 10)


@pytest.mark.parametrize(
    "layers", [(), ("pool", 8), (8, "max"), (8, "pool", "pool"), (8, "pool", 8, "pool", 8, "pool", 8, "pool")]
)
def test_network_of_impossible_layers_is_refused(layers):
    with pytest.raises(ValueError, match="ConvSNN: expected layers"):
        ConvSNN((1, 8, 8), layers, 10)


def test_an_image_is_the_sequence_of_its_copies():
    torch.manual_seed(1)
    images = torch.rand(5, 2, 9, 9)
    nets = [ConvSNN((2, 9, 9), (8, "pool", 6), 3, timesteps=4, backend=BACKEND) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    convolved = []
    nets[0].layers[0].conv.register_forward_hook(lambda module, inputs, output: convolved.append(output.stride(0)))
    once, frames = nets[0](images), nets[1](images.repeat(4, 1, 1, 1).unflatten(0, (4, 5)))
    assert once.shape == (4, 5, 3) and convolved == [0]
    torch.testing.assert_close(once, frames, rtol=1e-4, atol=1e-5)
    for name, value in nets[1].state_dict().items():
        torch.testing.assert_close(nets[0].state_dict()[name], value)
    (once.square().sum() + frames.square().sum()).backward()
    for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5 * theirs.grad.abs().max().item())


def test_spikes_stay_channels_last():
    net = ConvSNN((2, 8, 8), (16, 32, "pool"), 10, backend=BACKEND)
    strides = []
    for block in net.layers:
        block.register_forward_hook(lambda module, inputs, output: strides.append([t.stride(2) for t in output]))
    net(torch.rand(4, 2, 2, 8, 8)).sum().backward()
    assert strides == [[1, 1], [1, 1]]


@pytest.mark.parametrize(("checkpoint", "most"), [(False, 1.2), (True, 0.3)])
def test_little_more_is_kept_than_the_convolutions_outputs(checkpoint, most):
    net = ConvSNN((2, 16, 16), (64, 64, "pool", 128), 10, checkpoint=checkpoint, backend=BACKEND)
    y = 4 * 8 * 4 * (2 * 64 * 16 * 16 + 128 * 8 * 8)
    report = memory(net, torch.rand(4, 8, 2, 16, 16))
    assert report.measured <= most * y
    assert abs(report.agreement - 1) <= 0.05


@pytest.mark.parametrize(
    "make",
    [
        vggsnn,
        resnet19,
        sew_resnet34,
        lambda **options: ConvSNN((1, 8, 8), (4, "pool"), 10, **options),
        lambda **options: from_topology("CONV-4-3-1-1_RES-32-3=3-2=1-1=1_FC-8_FCBN-8_L-10", shape=(1, 8, 8), **options),
    ],
)
def test_exact_convolutions_reach_every_layer(make):
    kinds = (snn.SpikeConv2d, snn.SpikeLinear)
    for exact in (False, True):
        net = make(exact_convolutions=exact)
        found = [layer.exact for layer in net.modules() if isinstance(layer, kinds)]
        assert len(found) > 1 and set(found) == {exact}
    assert {layer.exact for layer in make().modules() if isinstance(layer, kinds)} == {False}
    snn.exact_convolutions(net, False)
    assert not any(layer.exact for layer in net.modules() if isinstance(layer, kinds))


def test_an_exact_network_is_torchs_bit_for_bit():
    """Where a kernel would compute otherwise: dense spikes are convolved by torch alone."""
    images, results, kernels = torch.rand(8, 1, 16, 16), {}, {}
    for name, options in {"exact": {"exact_convolutions": True}, "dense": {"packed": False}, "kernels": {}}.items():
        torch.manual_seed(3)
        net = ConvSNN((1, 16, 16), (32, 32, "pool", 64), 10, backend=BACKEND, **options)
        net.layers[1].conv.register_forward_pre_hook(
            lambda conv, given, name=name: kernels.update({name: conv.kernel_for(given[0])})
        )
        logits = net(images)
        logits.square().sum().backward()
        results[name] = [logits.detach(), *(p.grad for p in net.parameters())]
    assert kernels["exact"] == "torch's own: exact is true"
    assert kernels["dense"] == "torch's own: the input has no words"
    for mine, theirs in zip(results["exact"], results["dense"], strict=True):
        assert torch.equal(mine, theirs)
    if not kernels["kernels"].startswith(("torch's own", "forward: torch's own")):
        same = [torch.equal(a, b) for a, b in zip(results["kernels"], results["exact"], strict=True)]
        assert not all(same), "no kernel ran: this test says nothing"


def test_checkpointed_networks_train_the_same():
    torch.manual_seed(0)
    nets = [ConvSNN((2, 8, 8), (16, "pool", 32), 5, checkpoint=checkpoint, backend=BACKEND) for checkpoint in (0, 1)]
    nets[1].load_state_dict(nets[0].state_dict())
    frames = torch.rand(4, 3, 2, 8, 8)
    for net in nets:
        net(frames).square().sum().backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) or BACKEND == "reference"
