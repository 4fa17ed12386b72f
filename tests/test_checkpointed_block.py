"""``ConvBatchNormLIF(checkpoint=True)`` around whatever convolves: the gradients without it, or a refusal at once."""

import pytest
import torch
from packing import equal, spikes
from torch import nn as tnn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from trtkern import nn

SHAPE = (3, 2, 4, 6, 6)


class Gain(nn.SpikeConv2d):
    """A gain of its own behind the convolution."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = tnn.Parameter(torch.full((1,), 1.5))

    def forward(self, x):
        return super().forward(x) * self.gain


class LowRank(nn.SpikeConv2d):
    """A frozen convolution and a trained one of low rank beside it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.SpikeConv2d(4, 2, 1, bias=False), nn.SpikeConv2d(2, 6, 3, padding=1, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Half(tnn.Module):
    def forward(self, weight):
        return weight / 2


def plain():
    return nn.SpikeConv2d(4, 6, 3, padding=1)


def with_hook():
    conv = plain()
    conv.register_forward_hook(lambda module, inputs, y: torch.nn.functional.dropout(2 * y, 0.2))
    return conv


CONVOLUTIONS = {
    "plain": plain,
    "pruned": lambda: prune.l1_unstructured(plain(), "weight", 0.3),
    "weight_norm, old": lambda: weight_norm(plain()),
    "weight_norm": lambda: parametrizations.weight_norm(plain()),
    "parametrized": lambda: parametrize.register_parametrization(plain(), "weight", Half()),
    "parametrized bias": lambda: parametrize.register_parametrization(plain(), "bias", Half()),
    "spectral_norm in evaluation": lambda: parametrizations.spectral_norm(plain()).eval(),
    "gain": lambda: Gain(4, 6, 3, padding=1),
    "low rank": lambda: LowRank(4, 6, 3, padding=1),
    "hook with dropout": with_hook,
    "wrapped": lambda: nn.OverTime(tnn.Conv2d(4, 6, 3, padding=1)),
    "sequence": lambda: nn.TimeSequential(plain(), tnn.Dropout(0.3), tnn.Conv2d(6, 6, 1)),
    "frozen": lambda: plain().requires_grad_(False),
    "no bias": lambda: nn.SpikeConv2d(4, 6, 3, padding=1, bias=False),
}


def run(layer, x, checkpoint, **context):
    layer.checkpoint = checkpoint
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, **context):
        s = layer(x)
    after = torch.get_rng_state()
    torch.manual_seed(4)  # what the backward pass finds
    drawn = torch.get_rng_state()
    dense = x.spikes if isinstance(x, nn.Spikes) else x
    wanted = {"x": dense, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(s.sin().sum(), list(wanted.values()))
    assert torch.equal(torch.get_rng_state(), drawn)
    return dict(zip(wanted, found, strict=True)), after


@pytest.mark.parametrize(("packed", "autocast"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_same_gradients_of_everything_that_takes_part(name, packed, autocast):
    layer = nn.ConvBatchNormLIF(CONVOLUTIONS[name](), nn.BatchNormLIF(6, decay=0.6))
    x = spikes(*SHAPE)
    x = x if packed else x.spikes
    want, drawn = run(layer, x, False, enabled=autocast)
    got, after = run(layer, x, True, enabled=autocast)
    assert torch.equal(drawn, after)
    for key, g in want.items():
        assert torch.equal(got[key], g) and g.isfinite().all(), key
    assert len(want) > 2 and sum(g.abs().sum() for g in want.values()) > 0


@pytest.mark.parametrize(
    ("conv", "changed"),
    [
        (lambda: spectral_norm(plain()), "weight_u"),
        (lambda: parametrizations.spectral_norm(plain()), "parametrizations.weight.0._u"),
        (lambda: nn.TimeSequential(plain(), tnn.BatchNorm2d(6)), "1.num_batches_tracked"),
    ],
)
def test_what_changes_as_it_runs_is_refused_at_the_first_call(conv, changed):
    layer = nn.ConvBatchNormLIF(conv(), nn.BatchNormLIF(6), checkpoint=True)
    with pytest.raises(ValueError, match=rf"ConvBatchNormLIF: expected a convolution .*{changed}.*checkpoint=False"):
        layer(spikes(*SHAPE))
    layer.checkpoint = False
    layer(spikes(*SHAPE)).sum().backward()


def test_a_weight_or_bias_that_changed_before_the_backward_pass_is_an_error():
    for name in ("weight", "bias"):
        layer = nn.ConvBatchNormLIF(plain(), nn.BatchNormLIF(6), checkpoint=True)
        s = layer(spikes(*SHAPE))
        with torch.no_grad():
            getattr(layer.conv, name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            s.sum().backward()


def test_a_weight_that_was_replaced_before_the_backward_pass_does_no_harm():
    layer, x = nn.ConvBatchNormLIF(plain(), nn.BatchNormLIF(6)), spikes(*SHAPE)
    want, _ = run(layer, x, False, enabled=False)
    layer.checkpoint = True
    s, old = layer(x), dict(layer.named_parameters())
    layer.conv.load_state_dict({k: torch.zeros_like(v) for k, v in layer.conv.state_dict().items()}, assign=True)
    got = torch.autograd.grad(s.sin().sum(), [x.spikes, *old.values()])
    assert equal(got, want.values())


def test_another_norm_is_refused():
    norm = nn.UnfusedBatchNormLIF(tnn.BatchNorm2d(6), nn.LIF())
    with pytest.raises(TypeError, match="expected a BatchNormLIF with checkpoint=True, got UnfusedBatchNormLIF"):
        nn.ConvBatchNormLIF(plain(), norm, checkpoint=True)(spikes(*SHAPE))


def test_gradients_of_torch_func():
    layer, x = nn.ConvBatchNormLIF(plain(), nn.BatchNormLIF(6).eval()), spikes(*SHAPE)
    parameters, made = dict(layer.named_parameters()), []
    for checkpoint in (False, True):
        layer.checkpoint = checkpoint
        gradient = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sin().sum())(parameters)
        made.append(list(gradient.values()))
    assert equal(*made) and made[0][0].abs().sum() > 0
