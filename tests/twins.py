"""A model of trtkern beside the one in plain torch (``trtkern.bench.plain``): the same outputs and gradients."""

import torch
from torch import nn

from trtkern.bench.plain import trt_loss
from trtkern.models import load_reference_weights, reference_keys
from trtkern.nn import TRTLoss


def varied(net):
    """In float64, with scales and shifts of BatchNorm that differ from channel to channel."""
    net = net.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.6)
    return net


def compare(model, net, x, classes, *, gradients=True):
    """The model of trtkern, with the weights of the plain one: outputs, TRT gradients and running statistics."""
    # Nothing here leaves memory unwritten, and to fill these networks' memory with NaN takes as long as they run.
    torch.utils.deterministic.fill_uninitialized_memory = False
    load_reference_weights(model, net.state_dict())
    target = torch.arange(x.shape[-4]) % classes
    with torch.set_grad_enabled(gradients):
        got, want = model(x), net(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    if gradients:
        loss, expected = TRTLoss(model), trt_loss(net, want, target)
        data = loss.parts(got, target, regularize=False).total
        data.backward()
        torch.testing.assert_close(data + loss.add_grad_(), expected, rtol=1e-9, atol=1e-9)
        expected.backward()
        keys = reference_keys(model)
        theirs = dict(net.named_parameters())
        for name, parameter in model.named_parameters():
            wanted = theirs[keys[name]].grad
            largest = wanted.abs().max()
            if name.endswith("conv.bias"):  # a BatchNorm behind takes it off again: what is left is rounding
                assert max(largest, parameter.grad.abs().max()) <= 1e-9, name
                continue
            assert largest > 0 and (parameter.grad - wanted).abs().max() <= 1e-9 * largest, name
        assert {keys[name] for name, _ in loss.regularized()} == {name for name in theirs if "bias" not in name}
    keys, theirs = reference_keys(model), dict(net.named_buffers())
    held = {name: held for name, held in model.named_buffers() if name in keys}
    assert len(held) == len(theirs)
    for name, statistic in held.items():
        torch.testing.assert_close(statistic, theirs[keys[name]], rtol=1e-9, atol=1e-9)
