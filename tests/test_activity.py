"""Firing statistics against sums over the spikes themselves; dead and saturated layers are named."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trtkern.models import ConvSNN
from trtkern.models._blocks import Convolution, SEWBlock, Style
from trtkern.nn import LI, LIF, PLIF, BatchNormLIF, OverTime, SDTLoss, TRTLoss, packed_activations, unfuse
from trtkern.profiling.firing.activity import FiringRates, LayerActivity, Limits, firing_rates, problems
from trtkern.profiling.firing.diagnosis import diagnose


def by_hand(batches):
    """rate [T], silent, saturated of spikes [T, B, ...] of several batches, neuron by neuron in float64."""
    spikes = torch.cat([batch.double() for batch in batches], 1)
    flat = spikes.reshape(*spikes.shape[:2], -1)
    fired = (flat != 0).flatten(0, 1).any(0)
    always = (flat == 1).flatten(0, 1).all(0)
    return flat.mean((1, 2)), 1 - fired.double().mean().item(), always.double().mean().item()


def matches(layer, batches):
    rate, silent, saturated = by_hand(batches)
    torch.testing.assert_close(layer.rate, rate, rtol=1e-12, atol=0)
    assert (layer.silent, layer.saturated) == pytest.approx((silent, saturated), abs=1e-12)
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_rates_are_those_of_the_spikes(dtype, packed):
    model = LIF(decay=0.9, packed=packed)
    # Neuron 0 never fires, neuron 1 always; the others now and then, and more at later steps.
    offset = torch.tensor([-50.0, 50.0, 0.0, 0.2, 0.5])
    batches = [(torch.randn(4, 3, 5) + offset).to(dtype) for _ in range(3)]
    with firing_rates(model) as rates:
        made = [model(x) for x in batches]
    dense = [spikes.spikes if packed else spikes for spikes in made]
    layer = rates.layers[""]
    assert matches(layer, dense)
    assert (layer.kind, layer.neurons, layer.samples) == ("LIF", 5, 9)
    assert layer.silent == pytest.approx(0.2) and layer.saturated == pytest.approx(0.2)
    assert layer.rate.dtype == torch.float64 and layer.mean == pytest.approx(layer.rate.mean().item())


def spikes_of(model, x):
    """What each BatchNormLIF in a model gives, by the name of the layer, with hooks of our own."""
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda m, i, out, name=name: seen.update({name: getattr(out, "spikes", out)}))
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNormLIF)
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("keep", [{}, {"checkpoint": True}, {"packed": False}])
def test_every_layer_of_a_network_in_the_order_of_the_forward_pass(keep):
    model = ConvSNN((1, 8, 8), (4, "pool", 6), 3, timesteps=3, **keep)
    x = torch.rand(5, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # with gradients a checkpointed block does not call its layer
        wanted = spikes_of(model.eval(), x)
    with firing_rates(model) as rates, torch.no_grad():
        model(x)
    assert list(rates.layers) == list(wanted) == ["layers.0.norm", "layers.1.norm"]
    for name, layer in rates.layers.items():
        assert matches(layer, [wanted[name]]) and layer.kind == "BatchNormLIF"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with firing_rates(model) as again:
        model(x).sum().backward()
    assert again.layers["layers.0.norm"].samples == 5
    torch.testing.assert_close(again.layers["layers.1.norm"].rate, rates.layers["layers.1.norm"].rate)


def test_residual_networks_count_the_spikes_of_the_neurons_alone():
    model = SEWBlock(Convolution(2, 2), Convolution(2, 2), None, Style())
    x = torch.randint(0, 2, (3, 2, 2, 4, 4)).float()
    with firing_rates(model) as rates:
        out = model(x)
    assert out.max() > 1, "the sum of the block is no spike"
    assert list(rates.layers) == ["first.norm", "second.norm"]
    assert all(layer.rate.min() >= 0 and layer.rate.max() <= 1 for layer in rates.layers.values())


def test_nothing_is_changed_by_looking():
    model = nn.Sequential(OverTime(nn.Dropout(0.5)), nn.Linear(4, 6), LIF(), nn.Linear(6, 2), LI())
    model.train()
    x = torch.rand(3, 2, 4)
    torch.manual_seed(1)
    expected = model(x)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with firing_rates(model) as rates:
        got = model(x)
        inside = copy.deepcopy(model)
        pickle.dumps(model)
        inside(x[:1])
    assert torch.equal(got, expected) and got.requires_grad and model.training
    torch.manual_seed(1)
    model(x)
    assert torch.equal(torch.get_rng_state(), after)
    assert list(rates.layers) == ["2"], "LI gives potentials, no spikes"
    assert rates.layers["2"].samples == 2, "neither the copy nor what ran later counts"
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
    with pytest.raises(KeyError), firing_rates(model):
        raise KeyError
    assert all(not module._forward_hooks for module in model.modules())


def test_what_is_kept_does_not_grow_with_the_batches():
    model = nn.Sequential(nn.Linear(4, 8), PLIF())

    def kept(count):
        with firing_rates(model) as rates, torch.no_grad():
            for _ in range(count):
                model(torch.rand(2, 3, 4))
        meter = rates._meters["1"]
        return meter.sums.numel(), len(meter.seen), [t.numel() for pair in meter.extremes.values() for t in pair]

    assert kept(1) == kept(20) == (2, 2, [8, 8])


def test_a_layer_called_twice_other_lengths_and_states():
    model = LIF(decay=0.9)
    first, second, wide = torch.rand(4, 2, 3) * 2, torch.rand(2, 2, 3) * 2, torch.rand(2, 1, 5) * 2
    with firing_rates(model) as rates:
        made = [model(first), model(second, return_state=True)[0], model(wide)]
    layer = rates.layers[""]
    pairs = [
        (sum(s[t].sum() for s in made if t < len(s)), sum(s[t].numel() for s in made if t < len(s))) for t in range(4)
    ]
    torch.testing.assert_close(layer.rate, torch.tensor([float(a) / b for a, b in pairs], dtype=torch.float64))
    assert (layer.neurons, layer.samples) == (8, 5)
    both = torch.cat([made[0].flatten(0, 1), made[1].flatten(0, 1)])
    silent = (both.sum(0) == 0).sum() + (made[2].sum((0, 1)) == 0).sum()
    assert layer.silent == pytest.approx(silent.item() / 8)
    batch_first = LIF(time_dim=1)
    with firing_rates(batch_first) as rates:
        spikes = batch_first(first.movedim(0, 1))
    assert matches(rates.layers[""], [spikes.movedim(1, 0)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_runs_again_is_counted_once(reentrant):
    model = nn.Sequential(nn.Linear(4, 6), LIF())
    x = torch.rand(3, 2, 4, requires_grad=True)
    with firing_rates(model) as rates:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert rates.layers["1"].samples == 2


def test_around_packed_activations_inference_mode_and_unfused_layers():
    model = ConvSNN((1, 4, 4), (3,), 2, timesteps=2).eval()
    x = torch.rand(2, 1, 4, 4)
    with firing_rates(model) as rates:
        with packed_activations():
            model(x).sum().backward()
        with torch.inference_mode():
            model(x)
        model(x)
    fused = rates.layers["layers.0.norm"]
    with firing_rates(unfuse(model)) as rates:
        model(x)
    (layer,) = rates.layers.values()
    torch.testing.assert_close(layer.rate, fused.rate, rtol=0, atol=0.1)
    assert fused.samples == 6 and layer.kind == "LIF"


def planted():
    """A network with a dead layer, one that always fires, and a healthy one before them."""
    model = nn.Sequential(
        nn.Linear(8, 16), LIF(), nn.Linear(16, 12), LIF(v_threshold=1e3), nn.Linear(12, 9), LIF(), nn.Linear(9, 3)
    )
    with torch.no_grad():
        model[0].weight.uniform_(0, 0.5)
        model[4].bias.fill_(5.0)
    return model


def test_planted_dead_and_saturated_layers_are_named():
    model = planted()
    found = diagnose(model, torch.rand(4, 5, 8)).problems
    dead, loud = found
    assert dead.startswith("layer 3 never fires: expected some spikes, got none from 12 neurons over 4 steps of 5")
    assert loud.startswith("layer 5 always fires: ") and "9 neurons" in loud
    text = str(diagnose(model, torch.rand(4, 5, 8)))
    assert " ".join(text.split()).startswith("layer type neurons rate silent saturated rate by step 1 LIF 16 ")
    assert "problem: layer 3 never fires" in text
    model[3], model[5] = LIF(v_threshold=0.0), LIF(v_threshold=4.0, decay=0.5, v_reset=None)
    with torch.no_grad():
        model[4].bias.fill_(2.5)
    healthy = diagnose(model, torch.rand(4, 5, 8))
    assert healthy.problems == [] and "no problem found" in str(healthy)


def test_limits():
    rate = torch.full((4,), 0.5, dtype=torch.float64)
    layers = {"a": LayerActivity("LIF", rate, 0.95, 0.0, 100, 7), "b": LayerActivity("LIF", rate, 0.0, 0.96, 100, 7)}
    assert problems(layers) == []
    strict = problems(layers, Limits(share=0.95))
    assert "layer a hardly fires" in strict[0] and "95.0%" in strict[0] and "layer b hardly rests" in strict[1]
    assert len(problems(layers, Limits(silent=0.5))) == 2 and len(problems(layers, Limits(saturated=0.5))) == 2
    assert problems(FiringRates()) == []
    for wrong in (-0.1, 1.5, float("nan"), "1", True):
        with pytest.raises(ValueError, match="Limits: expected share to be a number of 0 to 1"):
            Limits(share=wrong)


def test_gradients_are_those_of_autograd():
    torch.manual_seed(3)
    first, lif, last = nn.Linear(6, 5), LIF(), nn.Linear(5, 3)
    with torch.no_grad():
        first.weight.uniform_(0, 0.6)
    model = nn.Sequential(first, lif, last)
    x, target = torch.rand(4, 2, 6), torch.tensor([0, 2])
    spikes = lif(first(x)).detach().requires_grad_()
    loss = nn.functional.cross_entropy(last(spikes).mean(0), target)
    (gradient,) = torch.autograd.grad(loss, spikes)
    found = diagnose(model, x, target)
    torch.testing.assert_close(found.gradients["1"], gradient.double().flatten(1).norm(dim=1))
    assert found.loss == pytest.approx(loss.item()) and found.problems == []
    assert all(p.grad is None for p in model.parameters())
    text = str(found)
    assert "gradient by step" in text and f"loss {loss.item():.4g}" in text
    lines = diagnose(model, x, target, lambda out, y: out.sum() * 0.0).problems
    assert len(lines) == 1 and lines[0].startswith("layer 1: expected a gradient of its spikes, got 0 at all 4 steps")


def test_diagnose_a_convolutional_network_and_leave_it_as_it_was():
    model = ConvSNN((1, 8, 8), (4, "pool", 6), 3, timesteps=3, checkpoint=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, state = torch.rand(4, 1, 8, 8), torch.get_rng_state()
    found = diagnose(model, images, torch.tensor([0, 1, 2, 0]), TRTLoss(model))
    assert list(found.gradients) == list(found.layers) == ["layers.0.norm", "layers.1.norm"]
    assert all(norm.shape == (3,) and norm.isfinite().all() for norm in found.gradients.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    model.layers[1].norm.lif.v_threshold = 1e6
    assert any("layers.1.norm never fires" in line for line in diagnose(model, torch.rand(4, 1, 8, 8)).problems)


def test_diagnose_finds_a_nan_that_spikes_hide():
    model = planted()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    found = diagnose(model, torch.rand(4, 5, 8), torch.zeros(5, dtype=torch.long)).problems
    assert found[0].startswith("layer 1 is not finite: expected finite potentials, got NaN or Inf")
    assert not model[1].nonfinite.any(), "the flag is put back"


def test_wrong_arguments():
    with pytest.raises(TypeError, match="firing_rates: expected model to be a"), firing_rates(3):
        pass
    with pytest.raises(TypeError, match="diagnose: expected model"):
        diagnose(None, torch.rand(2, 2))
    with pytest.raises(TypeError, match="diagnose: expected batch to be a tensor"):
        diagnose(LIF(), "x")
    with pytest.raises(ValueError, match="diagnose: expected a target with the loss, got none"):
        diagnose(LIF(), torch.rand(2, 2, 2), loss=SDTLoss())
    with pytest.raises(ValueError, match="diagnose: expected a model that runs a neuron layer"):
        diagnose(nn.Linear(2, 2), torch.rand(2, 2))
    layer = LayerActivity("LIF", torch.tensor([0.25, 0.5], dtype=torch.float64), 0.1, 0.2, 3, 4)
    back = LayerActivity.from_json(layer.to_json())
    assert torch.equal(back.rate, layer.rate) and back[2:] == layer[2:]
