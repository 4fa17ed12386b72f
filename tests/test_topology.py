"""Topology strings: what they build, what is wrong with a wrong one, and the weights of the paper's code."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twins import compare, varied

from trtkern.backends import named
from trtkern.bench import plain
from trtkern.models import (
    ConvSNN,
    from_topology,
    load_reference_weights,
    parse_topology,
    reference_keys,
    resnet19,
    sew_resnet34,
    vggsnn,
)
from trtkern.nn import PLIF, Delay, Spikes

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"
EVERY = (
    "CONVEN-4-3-1-1-2-2-0_CONVAP-4-3-1-1_CONVNP-6-3-2-1_CONV-6-3-1-1-3-1-1_CONVAP-6-3-1-1-3-2-1_RES-6-3=3-1=1-1=1_"
    "RES-8-3=3-2=1-1=1_SEWRES~AND-8-3=3-1=1-1=1_SEWRES~ADD-8-3=3-2=1-1=1_SEWRES~IAND-8-1=3-1=1-0=1_FC-7_FCBN-6_FC-5_L-3"
)


def test_a_topology_comes_back():
    tokens = parse_topology(EVERY)
    assert "_".join(map(str, tokens)) == EVERY
    assert tokens[0].fields == {"out": (4,), "k": (3,), "stride": (1,), "pad": (1,), "pk": (2,), "ps": (2,), "pp": (0,)}
    assert tokens[5].fields == {"out": (6,), "k1=k2": (3, 3), "s1=s2": (1, 1), "p1=p2": (1, 1)}
    assert parse_topology(EVERY.replace("_", "-_")) == tokens
    net = from_topology(EVERY.replace("L-3", "L-3-"), shape=(2, 32, 32))
    assert net.topology == EVERY and EVERY in repr(net)
    again = from_topology(net.topology, shape=(2, 32, 32))
    again.load_state_dict(net.state_dict())


def dense(x):
    return x.spikes if isinstance(x, Spikes) else x


def test_every_layer_runs_forward_and_backward():
    net = from_topology(EVERY, shape=(2, 32, 32), timesteps=3, backend=BACKEND)
    sizes = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(dense(output).shape[2:])))
    logits = net(torch.rand(2, 2, 32, 32))
    logits.square().sum().backward()
    assert logits.shape == (3, 2, 3) and all(p.grad is not None for p in net.parameters())
    assert sizes == [
        (4, 32, 32), (4, 16, 16), (4, 8, 8), (6, 4, 4), (6, 4, 4), (6, 4, 4), (6, 4, 4), (6, 2, 2), (6, 2, 2),
        (8, 1, 1), (8, 1, 1), (8, 1, 1), (8, 1, 1), (8, 1, 1), (7,), (6,), (5,),
    ]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("topology", ["FC-5_FCBN-6_L-3", "FCBN-5_FC-6_L-3", "L-3"])
def test_a_network_without_convolutions(topology, packed):
    """Of frames whose numbers all lie on the last axis, and of images; the statistics are those of all steps."""
    for shape in ((1, 1, 700), (2, 3, 4)):
        net = from_topology(topology, shape=shape, timesteps=4, backend="reference", packed=packed)
        x = torch.rand(2, *shape)
        assert net(x).shape == (4, 2, 3)
        assert torch.equal(net.eval()(x), net(x.expand(4, *x.shape).contiguous()))
        if topology.startswith("FCBN"):
            linear, norm = net.train().layers[0].conv, net.layers[0].norm
            norm.reset_running_stats()
            frames = torch.rand(4, 2, *shape)
            net(frames)
            assert linear.bias is None
            torch.testing.assert_close(norm.running_mean, 0.1 * linear(frames.flatten(2)).mean((0, 1)))


def test_named_networks_are_topologies():
    pairs = [
        (vggsnn(shape=(2, 16, 16)), "CONVNP-64-3-1-1_CONVAP-128-3-1-1_CONVNP-256-3-1-1_CONVAP-256-3-1-1_"
         "CONVNP-512-3-1-1_CONVAP-512-3-1-1_CONVNP-512-3-1-1_CONVAP-512-3-1-1_L-10"),
        (ConvSNN((2, 16, 16), (4, "pool", 6), 10), "CONVAP-4-3-1-1_CONVNP-6-3-1-1_L-10"),
    ]  # fmt: skip
    for net, topology in pairs:
        other = from_topology(topology, shape=(2, 16, 16))
        assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    net = resnet19(shape=(3, 8, 8), width=2)
    assert net.topology.startswith("CONVNP-2-3-1-1_RES-4-3=3-1=1-1=1_") and net.topology.endswith("_FC-8_L-10")
    assert sew_resnet34(width=2).topology.startswith("CONV-2-7-2-3-3-2-1_SEWRES~ADD-2-3=3-1=1-1=1_")


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("CONVAP-4-3-1-x_L-10", "token 1, column 14: expected pad of CONVAP to be an integer >= 0, got 'x'"),
        ("CONVAP-0-3-1-1_L-10", "token 1, column 8: expected out of CONVAP to be an integer >= 1, got '0'"),
        ("CONVAP-4-3-1_L-10", r"token 1, column 1: expected CONVAP-out-k-stride-pad\[-pk-ps-pp\], got 'CONVAP-4-3-1'"),
        ("CONVNP-4-3-1-1-2-2-0_L-1", "token 1, column 1: expected CONVNP-out-k-stride-pad, got"),
        ("CONV-4-3-1-1_RES-4-3-1=1-1=1_L-1", "token 2, column 20: expected k1=k2 of RES to be two integers >= 1"),
        ("CONV-4-3-1-1_KONV-4_L-1", "token 2, column 14: expected a layer from CONV, .*, got 'KONV'"),
        ("SEWRES-4-3=3-1=1-1=1_L-1", "token 1, column 1: expected a layer from .*SEWRES~ADD, .*, got 'SEWRES'"),
        ("_L-3", "token 1, column 1: expected a layer from"),
        ("FC-3_L-3_", "token 3, column 10: expected a layer from"),
        ("FCBN-4-2_L-1", "token 1, column 1: expected FCBN-n, got 'FCBN-4-2'"),
        ("FC-4_CONV-4-3-1-1_L-1", "token 2, column 6: expected FC-n or L-n behind FC-4, got 'CONV-4-3-1-1'"),
        ("CONV-4-3-1-1_CONVEN-4-3-1-1_L-1", "token 2, column 14: expected CONVEN as the first token only"),
        ("CONV-4-3-1-1_FC-3", "token 2, column 14: expected L-n, the readout, as the last token, got 'FC-3'"),
        ("L-3_L-3", "token 1, column 1: expected L-n as the last token only, got 'L-3'"),
        ("CONVNP-4-3-2-1_CONVNP-4-5-1-0_L-2", "token 2, column 16: expected a layer that fits 4 x 4 pixels"),
        ("CONV-4-3-1-1-9-1-4_CONV-4-3-1-1-2-2-2_L-2", "token 2, column 20: expected pp of at most half of pk=2"),
        ("RES-2-3=3-1=1-0=1_L-2", "token 1, column 1: expected convolutions that keep the 8 x 8 pixels"),
    ],
)  # fmt: skip
def test_a_wrong_token_is_pointed_at(topology, message):
    with pytest.raises(ValueError, match=f"^from_topology: {message}") as caught:
        from_topology(topology, shape=(2, 8, 8))
    _, shown, caret = str(caught.value).splitlines()
    column = int(str(caught.value).partition("column ")[2].partition(":")[0])
    assert caret.index("^") == shown.index(topology) + column - 1


def test_the_caret_of_a_long_topology_stands_below_its_token():
    topology = "_".join([*["RES-4-3=3-1=1-1=1"] * 20, "OOPS-3", *["RES-4-3=3-1=1-1=1"] * 20, "L-10"])
    with pytest.raises(ValueError, match="token 21, column 361") as caught:
        parse_topology(topology)
    _, shown, caret = str(caught.value).splitlines()
    assert shown[caret.index("^") :].startswith("OOPS") and len(shown) < 100


def test_what_is_no_topology_is_refused():
    with pytest.raises(TypeError, match="expected a topology as a string, got 3"):
        from_topology(3, shape=(2, 8, 8))
    for shape in ((8, 8), (2, 8, 0), 8):
        with pytest.raises(ValueError, match="from_topology: expected shape as three integers"):
            from_topology("L-3", shape=shape)
    with pytest.raises(ValueError, match="expected timesteps >= 1, got 0"):
        from_topology("L-3", shape=(2, 8, 8), timesteps=0)
    with pytest.raises(TypeError, match=r"expected timesteps as an int, got 2\.0"):
        from_topology("L-3", shape=(2, 8, 8), timesteps=2.0)
    with pytest.raises(ValueError, match=r"expected images \[B, C, H, W\] or frames"):
        from_topology("L-3", shape=(2, 8, 8))(torch.rand(2, 8, 8))


def reference():
    """A network of the paper's kind, with its keys."""
    return plain.Plain(
        plain.Conv(2, 4, pool=nn.AvgPool2d(2)),
        plain.Residual(4, 6, 2),
        plain.SEW(6, 8, 2, 0.5),
        plain.Average(),
        plain.Full(8, 7),
        plain.Step(nn.Linear(7, 5)),
    )


TOPOLOGY = "CONVAP-4-3-1-1_RES-6-3=3-2=1-1=1_SEWRES~ADD-8-3=3-2=1-1=1_FC-7_L-5"


def pair(**lif):
    return varied(reference()), from_topology(TOPOLOGY, shape=(2, 16, 16), timesteps=3, **lif).double()


def test_the_papers_weights_load():
    net, model = pair(backend="reference")
    compare(model, net, torch.rand(2, 2, 16, 16, dtype=torch.float64), 5)
    state = {theirs: model.state_dict()[ours] for ours, theirs in reference_keys(model).items()}
    assert list(state) == list(net.state_dict())
    net.load_state_dict(state)
    x = torch.rand(2, 2, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), net.eval()(x), rtol=1e-9, atol=1e-9)


def test_keys_are_those_of_the_paper():
    keys = reference_keys(from_topology(TOPOLOGY, shape=(2, 16, 16)))
    for ours, theirs in {
        "layers.0.conv.weight": "layers.0.conv2d_layer.module.0.weight",
        "layers.0.norm.running_var": "layers.0.conv2d_layer.module.1.running_var",
        "layers.1.second.norm.bias": "layers.1.conv2d_layer_2.module.1.bias",
        "layers.1.shortcut.conv.weight": "layers.1.downsample_layer.module.0.weight",
        "layers.2.shortcut.norm.weight": "layers.2.downsample_layer.0.module.1.weight",
        "layers.4.linear.bias": "layers.4.fc.module.bias",
        "classifier.weight": "layers.5.module.weight",
    }.items():
        assert keys[ours] == theirs
    assert reference_keys(vggsnn(shape=(2, 16, 16)))["classifier.bias"] == "layers.9.module.bias"


def test_wrappers_in_a_key_are_passed_over():
    net, model = pair()
    state = {f"module.{key}".replace("conv2d_layer.module", "conv2d_layer"): v for key, v in net.state_dict().items()}
    assert "module.layers.0.conv2d_layer.0.weight" in state
    load_reference_weights(model, state)
    assert torch.equal(model.layers[0].conv.weight, net.layers[0].conv2d_layer.module[0].weight)


def test_parameters_of_the_neurons_stay():
    net, model = pair(neuron=PLIF, init_tau=3.0)
    assert set(reference_keys(model).values()) == set(net.state_dict())
    before = model.layers[0].norm.lif.w.clone()
    load_reference_weights(model, net.state_dict())
    assert torch.equal(model.layers[0].norm.lif.w, before)


def test_weights_of_another_network_are_refused():
    net, model = pair()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = net.state_dict()
    state["layers.7.fc.module.weight"] = state.pop("layers.4.fc.module.weight")
    state["layers.5.module.bias"] = torch.zeros(6)
    with pytest.raises(ValueError, match="expected the keys of this network's layers") as caught:
        load_reference_weights(model, state)
    for part in (
        "1 missing: layers.4.fc.module.weight;",
        "1 unexpected: layers.7.fc.module.weight;",
        "1 of another shape: layers.5.module.bias (6,) for (5,);",
        "build the network of their topology",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"46 missing: .* and 38 more"):
        load_reference_weights(model, {})


def test_what_is_no_state_dict_is_refused():
    _, model = pair()
    with pytest.raises(TypeError, match="expected a state dict, got"):
        load_reference_weights(model, torch.zeros(3))
    with pytest.raises(TypeError, match=r"expected a state dict of tensors, got .* under 'net'; pass the state dict"):
        load_reference_weights(model, {"net": {}})
    with pytest.raises(TypeError, match=r"expected layers of convolution .*, got '0' \(ConvBatchNormLIF\)"):
        reference_keys(from_topology("FCBN-3_L-2", shape=(1, 1, 4)))
    with pytest.raises(TypeError, match=r"expected a network of trtkern\.models, got Linear"):
        reference_keys(nn.Linear(2, 2))


def test_learned_delays_before_the_layers_of_a_topology():
    """The same spikes as the parts one by one; what they are refused with."""
    torch.manual_seed(0)
    net = from_topology(
        "FC-5_FCBN-4_L-3", shape=(1, 1, 6), timesteps=7, recurrent=True, max_delay=3, neuron="AdLIF", backend=BACKEND
    ).eval()
    names = dict(net.named_parameters())
    delays = [name for name in names if "delay" in name]
    assert [tuple(names[name].shape) for name in delays] == [(6,), (5,)]
    x = 2 * torch.rand(7, 2, 1, 1, 6)
    first, second = (module for module in net.modules() if isinstance(module, Delay))
    hidden = net.layers[0]
    assert torch.equal(dense(hidden(x)), dense(hidden.lif(hidden.linear(first(x.flatten(2))))))
    net.train()(10 * x).square().mean().backward()
    assert first.delay.raw.grad.abs().sum() > 0 and second.delay.raw.grad is not None
    with pytest.raises(ValueError, match="expected max_delay=0 with convolutions, got 3"):
        from_topology("CONVAP-4-3-1-1_L-3", shape=(1, 4, 4), max_delay=3)
