"""What programs do to models that train: checkpoints, averages, parametrizations, quantised layers, autocast.

``test_tracing.py`` has copies, pickles and tracers; this is the rest.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from trtkern import nn as snn

T, B, C = 4, 3, 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(C, 6), snn.BatchNormLIF(6, packed=True, decay=snn.Bounded(0.6)), snn.SpikeLinear(6, C),
        snn.ALIF(beta=nn.Parameter(torch.tensor(0.5))), nn.Linear(C, 2), snn.LI(),
    )  # fmt: skip


def inputs():
    torch.manual_seed(1)
    return (3 * torch.rand(T, B, C)).requires_grad_()


def step(run, model, x):
    y = run(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_checkpoint_gives_the_same_gradients(reentrant):
    """Every part that trains, in both modes; as with BatchNorm2d, running statistics move again with the second run."""
    model, x = network(), inputs()
    want = step(model, model, x)
    for each in model.modules():
        if isinstance(each, snn.BatchNormLIF):
            each.reset_running_stats()

    def run(x):
        for part in (model[:3], model[3:]):
            x = checkpoint(lambda x, part=part: part(x), x, use_reentrant=reentrant)
        return x

    x.grad = None
    model.zero_grad()
    y = run(x)
    y.sin().sum().backward()
    got = [y, x.grad, *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_moving_average_of_a_model_is_a_model():
    """``AveragedModel`` by deepcopy; weights, learned decays and running statistics are averaged, flags stay flags."""
    model, x = network(), inputs()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    before = copy.deepcopy(dict(model.state_dict()))
    for _ in range(2):
        average.update_parameters(model)
        model(x.detach())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
    average.update_parameters(model)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            assert not torch.equal(value, before[name]) or "running" in name
    held = average.module[1].lif.decay.raw
    torch.testing.assert_close(held, 0.9 * (0.9 * before["1.lif.decay.raw"] + 0.1 * (before["1.lif.decay.raw"] + 0.1))
                               + 0.1 * (before["1.lif.decay.raw"] + 0.2))  # fmt: skip
    assert average.module[1].nonfinite.dtype == torch.int32 and not average.module[1].nonfinite.any()
    y = average.eval()(x)
    assert y.isfinite().all() and pickle.loads(pickle.dumps(average.module))(x).equal(y)


class Squashed(nn.Module):
    def forward(self, raw):
        return raw.sigmoid()

    def right_inverse(self, value):
        return value.logit()


PARAMETRIZED = {
    "SpikeConv2d": lambda: (snn.SpikeConv2d(2, 3, 3), "weight", None, (T, B, 2, 6, 6)),
    "SpikeLinear": lambda: (snn.SpikeLinear(C, 3), "weight", None, (T, B, C)),
    "decay of LIF": lambda: (snn.LIF(nn.Parameter(torch.full((C,), 0.7))), "decay", Squashed, (T, B, C)),
    "weight of BatchNormLIF": lambda: (snn.BatchNormLIF(C), "weight", Squashed, (T, B, C)),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrize(name):
    """A parametrised tensor computes as the tensor that it stands for, and its gradient reaches what it is made of."""
    torch.manual_seed(0)
    layer, tensor, kind, shape = PARAMETRIZED[name]()
    if name == "weight of BatchNormLIF":
        nn.init.constant_(layer.weight, 0.8)
    plain, x = copy.deepcopy(layer), 2 * torch.rand(shape)
    if kind is None:
        parametrizations.weight_norm(layer, tensor)
    else:
        parametrize.register_parametrization(layer, tensor, kind())
    want = plain(x)
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    got.sin().sum().backward()
    made = layer.parametrizations[tensor].parameters()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in made)
    parametrize.remove_parametrizations(layer, tensor)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)


def test_dynamic_quantisation_of_the_linear_layers_beside():
    """torch.ao replaces ``nn.Linear`` and nothing else; neurons and SpikeLinear take what a quantised layer gives."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model, x = network().eval(), inputs().detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(layer) for layer in quantised]
    assert kinds[1:4] == [snn.BatchNormLIF, snn.SpikeLinear, snn.ALIF] and kinds[5] is snn.LI
    assert kinds[0].__module__ == kinds[4].__module__ != nn.Linear.__module__
    first = quantised[0](x)
    assert torch.equal(quantised[1](first).spikes, model[1](first).spikes)
    assert (
        (first - model[0](x)).abs().max() < 0.05 and quantised(x).shape == (T, B, 2) and quantised(x).isfinite().all()
    )


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_multiplies_and_leaves_neurons_as_they_are_fed(lower):
    """The dtype of every layer's output, of float32 input and of lower input; a state is float32 in any case."""
    x, image = 2 * torch.rand(T, B, C), torch.rand(T, B, 2, 6, 6)
    with torch.autocast("cpu", lower):
        for layer in (snn.SpikeLinear(C, 3), nn.Linear(C, 3)):
            assert layer(x).dtype == layer(x.to(lower)).dtype == lower
        assert snn.SpikeConv2d(2, 3, 3)(image).dtype == lower
        for make in (snn.LIF, snn.IF, snn.PLIF, snn.ALIF, snn.LI, lambda: snn.BatchNormLIF(C)):
            for given in (x, x.to(lower)):
                y, state = make()(given, return_state=True)
                assert y.dtype == given.dtype
                parts = state if isinstance(state, tuple) else (state,)
                assert {part.dtype for part in parts} == {torch.float32}
        packed = snn.LIF(packed=True)(x)
        assert packed.spikes.dtype == torch.float32 and snn.SpikeLinear(C, 3)(packed).dtype == lower
        model, target = network(), torch.tensor([0, 1, 0])
        norm = model[1]
        y = model(x)
        assert y.dtype == lower and norm.running_mean.dtype == torch.float32
        loss = snn.TRTLoss(model)(y, target)
        assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


SECOND = {
    "lif": lambda: snn.PLIF(),
    "alif": lambda: snn.ALIF(),
    "li": lambda: snn.LI(),
    "batch_norm_lif": lambda: snn.BatchNormLIF(C),
}


@pytest.mark.parametrize("name", SECOND)
def test_a_second_derivative_names_the_reference(name):
    x = inputs()
    (first,) = torch.autograd.grad(SECOND[name]()(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'a first derivative, got a second one.* pass backend="reference"'):
        first.sum().backward()
