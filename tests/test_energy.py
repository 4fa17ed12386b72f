"""Operations counted by the model against sums by hand, plain loops, and the conventions of SpikingJelly's counters."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from trtkern import nn
from trtkern.analysis import Energy, Memory, Samples, energy
from trtkern.analysis._inputs import Values, dense_operations, reached
from trtkern.models import ConvSNN
from trtkern.nn import IF, BatchNormLIF, SpikeConv2d, SpikeLinear, TimeSequential


def fixed(layer, rows):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return layer


def two_layers():
    """3 inputs, 4 neurons that sum up what they get with threshold 1, 2 outputs."""
    first = fixed(torch.nn.Linear(3, 4, bias=False), [[2.0, 0, 0], [0, 2.0, 0], [0.6, 0, 0], [0, 0, 0]])
    second = fixed(torch.nn.Linear(4, 2, bias=False), [[1.0, 1, 1, 1], [0, 0, 0, 0]])
    return TimeSequential(first, IF(), second)


# Frames of one sample: T = 2, three numbers a step.
FRAMES = torch.tensor([[[1.0, 0.25, 0.0]], [[1.0, 0.0, 0.0]]])
LABEL = torch.tensor([0])


def test_two_layers_by_hand():
    found = energy(two_layers(), Samples.of("t", (FRAMES, LABEL), batch_dim=1))
    # Layer 0: two inputs are not 0 at step 1, one at step 2; each reaches 4 neurons: 8 and 4 MACs.
    # Neurons, step 1: currents 2, 0.5, 0.6, 0: the first fires. Step 2: 2, 0 (0.5 stays), 0.6 + 0.6 = 1.2, 0: two fire.
    # Layer 2: 1 and 2 spikes, each reaches 2 outputs: 2 and 4 sums.
    first, second = found.layers["0"], found.layers["2"]
    assert (first.kind, first.values, second.kind, second.values) == ("analog", 3, "spikes", 2)
    assert first.macs.tolist() == [8, 4] and first.sums.tolist() == [0, 0]
    assert second.sums.tolist() == [2, 4] and second.macs.tolist() == [0, 0]
    assert first.rate.tolist() == pytest.approx([2 / 3, 1 / 3]) and second.rate.tolist() == [0.25, 0.5]
    assert found.activity["1"].rate.tolist() == [0.25, 0.5]
    assert (first.dense, second.dense, found.dense) == (12, 8, 20)
    assert found.by_step.tolist() == pytest.approx([8 * 4.6 + 2 * 0.9, 4 * 4.6 + 4 * 0.9], rel=1e-15)
    assert found.synaptic == found.total == pytest.approx(12 * 4.6 + 6 * 0.9, rel=1e-15)
    assert found.relu == pytest.approx(20 * 4.6) and (found.sums, found.macs) == (6, 12)
    cheap = energy(two_layers(), Samples.of("t", (FRAMES, LABEL), batch_dim=1), sum_pj=2, mac_pj=3)
    assert cheap.total == 12 * 3 + 6 * 2


def test_updates_and_memory_by_hand():
    memory = Memory(bits=8, sizes=((0, 0.0), (10, 10.0), (20, 30.0)))
    assert [memory.access(words) for words in (0, 5, 10, 15, 20, 400)] == [0, 5, 10, 20, 30, 30]
    found = energy(
        two_layers(), Samples.of("t", (FRAMES, LABEL), batch_dim=1), updates=True, memory=memory, sum_pj=1, mac_pj=10
    )
    # 4 neurons over 2 steps and 3 spikes: 8 + 3 sums; an IF neuron has no leak.
    assert (found.updates["1"].neurons, found.updates["1"].sums, found.updates["1"].macs) == (4, 11, 0)
    # Layer 0: 12 operations on 12 weights (14 pJ an access), 4 potentials (4 pJ) over 2 steps, 3 values of 3 (3 pJ).
    assert found.layers["0"].memory == {
        "weights": 12 * 14,
        "potentials": 2 * (12 + 8) * 4,
        "values": 18,
        "addresses": 12,
    }
    # Layer 2: 6 operations on 8 weights (8 pJ), 2 potentials (2 pJ), 3 values of 4 (4 pJ).
    assert found.layers["2"].memory == {"weights": 48, "potentials": 2 * (6 + 4) * 2, "values": 24, "addresses": 6}
    assert found.total == 120 + 6 + 11 + found.memory
    leaky = TimeSequential(torch.nn.Conv2d(1, 2, 3), nn.LIF(0.5), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    frames = Samples.of("t", (torch.ones(3, 1, 1, 3, 3), LABEL), batch_dim=1)
    found = energy(leaky, frames, memory=memory, updates=True)
    assert found.updates["1"].macs == 3 * 2
    # A convolution: two MACs to find where a value goes; its bias is read for each output and step.
    assert found.layers["0"].memory["addresses"] == pytest.approx(27 * 2 * 4.6 + 54 * 0.9)
    assert found.layers["0"].memory["weights"] == pytest.approx(54 * memory.access(18) + 6 * memory.access(2))


CONVOLUTIONS = [
    (torch.nn.Conv1d, {"kernel_size": 3, "padding": 2, "stride": 2}, (4, 9)),
    (torch.nn.Conv2d, {"kernel_size": (3, 2), "padding": (1, 0), "groups": 2}, (4, 5, 6)),
    (torch.nn.Conv2d, {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 1}, (4, 8, 7)),
    (torch.nn.Conv2d, {"kernel_size": 1, "stride": 2}, (4, 5, 5)),
    (torch.nn.Conv2d, {"kernel_size": 5, "padding": 9}, (4, 3, 2)),
    (torch.nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2), "groups": 4}, (4, 5, 6)),
    (torch.nn.Conv2d, {"kernel_size": 3, "padding": "valid"}, (4, 5, 6)),
    (torch.nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "stride": 2}, (4, 5, 6)),
    (torch.nn.Conv2d, {"kernel_size": (4, 2), "padding": "same", "padding_mode": "reflect"}, (4, 5, 6)),
    (torch.nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": (0, 1, 1), "stride": (2, 1, 3)}, (4, 3, 4, 5)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("kind", "options", "shape"), CONVOLUTIONS)
def test_fan_out_is_exact(kind, options, shape):
    layer = kind(4, 8, bias=False, **options)
    torch.nn.init.ones_(layer.weight)
    amounts = torch.randint(0, 3, (5, *shape)).float()
    # With weights of one, the sum of all outputs is the sum of amount times fan-out.
    wanted = layer(amounts).flatten(1).sum(1).double()
    assert torch.equal(reached(layer, amounts), wanted)
    # What a layer without zeros to skip computes: a product for each output and place of its kernel.
    assert dense_operations(layer, amounts) == layer(amounts)[0].numel() * layer.weight[0].numel()


def test_a_convolution_step_by_step_against_plain_loops():
    torch.manual_seed(0)
    layer = SpikeConv2d(2, 6, 3, stride=2, padding=1, groups=2, bias=False)
    frames = (torch.rand(3, 2, 2, 5, 5) < 0.3).float()
    model = TimeSequential(layer, torch.nn.Flatten(), torch.nn.Linear(54, 2))
    found = energy(model, Samples.of("t", (frames, torch.zeros(2, dtype=torch.long)), batch_dim=1)).layers["0"]
    wanted = [0.0, 0.0, 0.0]
    for t, b, c, y, x in product(*map(range, frames.shape)):
        if frames[t, b, c, y, x]:
            inside = [o * 2 - 1 + k == at for at in (y, x) for o in range(3) for k in range(3)]
            wanted[t] += sum(inside[:9]) * sum(inside[9:]) * 3 / 2
    assert found.sums.tolist() == pytest.approx(wanted, rel=1e-12) and found.kind == "spikes"
    assert (found.inputs, found.outputs, found.dense) == (50, 54, 54 * 9)


class Loop(torch.nn.Module):
    """The layers of a TimeSequential, step by step, with the potentials in its own hands."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, frames):
        held, out = {}, []
        for x in frames:
            for i, layer in enumerate(self.layers):
                if isinstance(layer, nn.LIF):
                    x, held[i] = layer.step(x, held.get(i))
                else:
                    x = layer(x)
            out.append(x)
        return torch.stack(out)


def small():
    torch.manual_seed(1)
    return TimeSequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), nn.LIF(0.5, v_threshold=0.3), torch.nn.AvgPool2d(2),
        torch.nn.Conv2d(4, 4, 3), nn.LIF(0.5, v_threshold=0.3), torch.nn.Flatten(), torch.nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5])
def test_however_a_model_runs_through_time(batch_size):
    """In whole sequences, step by step, with batches of the size of T too."""
    model = small()
    frames, labels = torch.rand(4, 9, 2, 8, 8).round(decimals=1), torch.arange(9) % 3
    samples = Samples.of("t", (frames, labels), batch_dim=1, batch_size=batch_size)
    whole, steps = energy(model, samples, updates=True), energy(Loop(model), samples, updates=True)
    for name, layer in whole.layers.items():
        other = steps.layers[f"layers.{name}"]
        for part in ("sums", "macs", "rate", "energy"):
            torch.testing.assert_close(getattr(layer, part), getattr(other, part), rtol=1e-12, atol=0)
        assert (layer.kind, layer.parts, layer.dense, layer.once) == (other.kind, other.parts, other.dense, False)
    assert [layer.kind for layer in whole.layers.values()] == ["analog", "fractions", "spikes"]
    assert whole.layers["3"].parts == 4 and whole.layers["0"].values == 11 and whole.layers["3"].values == 5
    assert {n: u.neurons for n, u in whole.updates.items()} == {"1": 256, "4": 16}
    assert {n: u.neurons for n, u in steps.updates.items()} == {"layers.1": 256, "layers.4": 16}


def test_batch_first():
    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x).transpose(0, 1)

    x = torch.tensor([[[1.0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], [[0.0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 1]]])
    found = energy(First(), (x, torch.zeros(2, dtype=torch.long)))
    assert found.layers["linear"].sums.tolist() == [1, 2, 0, 6]


def test_a_static_image_is_computed_once():
    image, label = torch.tensor([[0.5, 0.25, 0.0]]), torch.tensor([0])
    first, neuron, second = two_layers()
    for model in (
        TimeSequential(first, neuron, second, timesteps=4),
        TimeSequential(SpikeLinear(3, 4, bias=False), neuron, second, timesteps=4),
    ):
        once, always = energy(model, (image, label)), energy(model, (image, label), static="every step")
        assert once.layers["0"].macs.tolist() == [8, 0, 0, 0] and always.layers["0"].macs.tolist() == [8] * 4
        assert once.layers["0"].once and not once.layers["2"].once
        assert once.layers["0"].rate.tolist() == pytest.approx([2 / 3] * 4)
        assert torch.equal(once.layers["2"].sums, always.layers["2"].sums)
        assert once.dense == always.dense == 20
        assert any("counted once, at the first step" in line for line in once.remarks())
        assert any("counted at each of the 4 steps" in line for line in always.remarks())


def test_zeros_of_analog_inputs():
    model, samples = two_layers(), Samples.of("t", (FRAMES * math.e, LABEL), batch_dim=1)
    skipped, counted = energy(model, samples), energy(model, samples, zeros="counted")
    assert skipped.layers["0"].kind == "analog"
    assert skipped.layers["0"].macs.tolist() == [8, 4] and counted.layers["0"].macs.tolist() == [12, 12]
    assert torch.equal(skipped.layers["2"].sums, counted.layers["2"].sums)


def test_sums_of_spikes():
    """SEW blocks give integers; they are told from spikes, and may be counted as repeated sums."""
    model = torch.nn.Linear(3, 2)
    frames = torch.tensor([[[1.0, 0.0, 1.0]], [[2.0, 3.0, 0.0]]])
    samples = Samples.of("t", (frames, LABEL), batch_dim=1)
    as_macs, as_sums = energy(model, samples), energy(model, samples, integers="sums")
    assert as_macs.layers["Linear"].kind == "integers" and as_macs.layers["Linear"].values == 4
    assert as_macs.layers["Linear"].macs.tolist() == [4, 4] and as_macs.sums == 0
    assert as_sums.layers["Linear"].sums.tolist() == [4, 10] and as_sums.macs == 0
    assert any(
        "Integers that are not only 0 and 1" in line and "n for the value n" in line for line in as_sums.remarks()
    )


def test_kinds_of_values():
    def kind(*parts):
        values = Values()
        for part in parts:
            values.add(torch.as_tensor(part))
        return values.kind, values.parts, None if values.seen is None else len(values.seen)

    zero_one = torch.tensor([0.0, 1.0])
    assert kind(zero_one) == ("spikes", 1, 2) and kind(torch.zeros(3)) == ("spikes", 1, 1)
    assert kind(zero_one, zero_one * 2) == ("integers", 1, 3) and kind(-zero_one) == ("integers", 1, 2)
    # 2x2 averages, of which the average over 7x7 is taken as well.
    sums = torch.randint(0, 50, (1000,)).float()
    assert kind(zero_one, zero_one / 4, sums / 49)[:2] == ("fractions", 196)
    assert kind(sums / 49, torch.rand(100))[0] == "analog" and kind(torch.rand(100), zero_one)[0] == "analog"
    assert kind(torch.tensor([0.0, 1e6]))[0] == "analog"
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="expected finite inputs"):
            kind(torch.tensor([0.0, bad]))


def by_spikingjelly(model, frames):
    """Sums and MACs of each layer as SpikingJelly 2.0's SynOpCounter and MACCounter count them.

    For each call (spikingjelly/activation_based/op_counter/ac.py, mac.py): of a binary input, as many sums as there are
    weights that its ones meet; of another, the MACs of the dense layer with its padding. The input of a layer is looked
    at in every call, and a static one counts at every step.
    """
    sums, macs = {}, {}

    def hook(layer, args, out):
        x = args[0]
        if bool(((x == 0) | (x == 1)).all()):
            if isinstance(layer, torch.nn.Linear):
                sums[layer] = x.count_nonzero().item() * layer.out_features
            else:
                ones = torch.ones_like(layer.weight)
                options = layer.stride, layer.padding, layer.dilation, layer.groups
                sums[layer] = F.conv2d(x, ones, None, *options).sum(dtype=torch.float64).item()
        else:
            macs[layer] = out.numel() * layer.weight[0].numel()

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    hooks = [layer.register_forward_hook(hook) for layer in layers.values()]
    with torch.no_grad():
        model(frames)
    for each in hooks:
        each.remove()
    return {name: (sums.get(layer, 0), macs.get(layer, 0)) for name, layer in layers.items()}


def test_the_conventions_of_spikingjelly():
    model = small()
    frames = torch.rand(4, 3, 2, 8, 8)
    samples = Samples.of("t", (frames, torch.zeros(3, dtype=torch.long)), batch_dim=1)
    theirs = by_spikingjelly(model, frames)
    ours = energy(model, samples, zeros="counted", static="every step").layers
    # Equal for the analog first layer and for spikes. Behind the average pooling theirs is the dense layer: what is not
    # 0 and lies inside the border is all that ours counts.
    for name in ("0", "6"):
        assert (float(ours[name].sums.sum()) * 3, float(ours[name].macs.sum()) * 3) == pytest.approx(theirs[name])
    assert theirs["3"] == (0, 12 * 16 * 36) and 0 < float(ours["3"].macs.sum()) * 3 < theirs["3"][1]
    assert ours["3"].dense * 12 == theirs["3"][1]


@pytest.mark.parametrize("pool", [1, 2])
def test_networks_of_this_package(pool):
    """Packed spikes, fused layers, a static image, average pooling; nothing of the model changes."""
    torch.manual_seed(0)
    model = ConvSNN((1, 8, 8), (4, "pool", 6) if pool == 2 else (4, 6), 10, timesteps=3)
    model.train()
    images, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    told = []
    found = energy(model, (images, labels), updates=True, progress=lambda *at: told.append(at))
    assert torch.equal(torch.get_rng_state(), before) and model.training and told == [(5, 5)]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    layers = list(found.layers.values())
    assert [layer.kind for layer in layers] == ["analog", "fractions" if pool == 2 else "spikes", "spikes"]
    assert [layer.once for layer in layers] == [True, False, False] and found.left_out == []
    assert layers[0].macs.tolist() == [22 * 22 * 4, 0, 0], "a 3x3 kernel reaches 3 * 8 - 2 places along each axis"
    assert layers[0].dense == 64 * 9 * 4 and found.samples == 5 and found.timesteps == 3
    assert [u.neurons for u in found.updates.values()] == [256, 96 if pool == 2 else 384]
    assert set(found.activity) == set(found.updates)
    # The rate of the readout's input is that of the layer before it.
    *_, last = found.activity.values()
    torch.testing.assert_close(layers[2].rate, last.rate, rtol=1e-12, atol=0)


def test_a_sew_network_has_integers():
    from trtkern.models import from_topology

    torch.manual_seed(0)
    model = from_topology(
        "CONVNP-4-3-1-1_SEWRES~ADD-4-3=3-1=1-1=1_SEWRES~ADD-4-3=3-1=1-1=1_L-10", shape=(2, 6, 6), timesteps=3
    )
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            module.lif.v_threshold = 0.2
    frames = torch.randn(3, 8, 2, 6, 6)
    found = energy(model, Samples.of("t", (frames, torch.zeros(8, dtype=torch.long)), batch_dim=1))
    kinds = [layer.kind for layer in found.layers.values()]
    assert kinds == ["analog", "spikes", "spikes", "integers", "spikes", "fractions"]
    assert any("as sums of spikes are behind a SEW block" in line for line in found.remarks())


def test_the_result(tmp_path):
    found = energy(small(), Samples.of("t", (torch.rand(4, 2, 2, 8, 8), torch.zeros(2, dtype=torch.long)), batch_dim=1),
                   memory=Memory(), updates=True)  # fmt: skip
    found.save(tmp_path / "energy.json")
    again = Energy.load(tmp_path / "energy.json")
    assert str(again) == str(found) and torch.equal(again.by_step, found.by_step) and again.total == found.total
    words = str(found)
    assert "This is a model, not a measurement" in words and "0.9 pJ" in words and "Horowitz" in words
    assert "Fractions, as average pooling makes them of spikes, go to 3: no longer 0 or 1, so MACs" in words
    assert len(found.plot(tmp_path / "energy.png").axes) == 2 and (tmp_path / "energy.png").stat().st_size > 0
    assert len(Energy.pictures({"a": found, "b": again})) == 2


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.linear = torch.nn.MultiheadAttention(4, 1), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.attention(x, x, x)[0])


def test_what_is_left_out_is_named():
    found = energy(Attention(), Samples.of("t", (torch.rand(3, 2, 4), torch.zeros(2, dtype=torch.long)), batch_dim=1))
    assert list(found.layers) == ["linear"]
    assert found.left_out == [
        "attention (MultiheadAttention)", "attention.out_proj (NonDynamicallyQuantizableLinear)"
    ]  # fmt: skip
    assert any("Not counted" in line and "MultiheadAttention" in line for line in found.remarks())


class Mixed(torch.nn.Module):
    """A layer that sees neither steps nor samples."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x) + self.linear(torch.ones(7, 4)).sum()


def test_errors():
    model, samples = two_layers(), Samples.of("t", (FRAMES, LABEL), batch_dim=1)
    with pytest.raises(ValueError, match="energy: expected mac_pj to be a number of pJ, 0 or more, got nan"):
        energy(model, samples, mac_pj=math.nan)
    with pytest.raises(ValueError, match="energy: static: expected one of once, every step, got 'onse'; did you mean"):
        energy(model, samples, static="onse")
    with pytest.raises(TypeError, match=r"energy: expected memory to be None or trtkern.analysis.Memory\(\), got True"):
        energy(model, samples, memory=True)
    with pytest.raises(ValueError, match=r"Memory: expected bits >= 1 and sizes .* in rising order"):
        Memory(sizes=((8, 1), (8, 2)))
    with pytest.raises(ValueError, match=r"energy: expected a model that calls layers of Linear, Conv1d.*LIF"):
        energy(nn.LIF(0.5), samples)
    with pytest.raises(TypeError, match=r"energy: expected model to be a torch.nn.Module"):
        energy(torch.sin, samples)
    with pytest.raises(ValueError, match="energy: layer Linear: expected finite inputs, got some from nan to nan"):
        energy(torch.nn.Linear(3, 2), Samples.of("t", (FRAMES * math.nan, LABEL), batch_dim=1))
    with pytest.raises(ValueError, match=r"energy: expected layer 'linear' to see \[T, B, ...\].*B = 1, got"):
        energy(Mixed(), Samples.of("t", (torch.rand(2, 1, 4), LABEL), batch_dim=1))
    long = [(FRAMES, LABEL), (FRAMES[:1], LABEL)]
    with pytest.raises(ValueError, match=r"energy: expected layer '0' to see .*the T of the first batch"):
        energy(model, Samples.of("t", long, batch_dim=1))
    assert not any(module._forward_hooks for module in model.modules())
