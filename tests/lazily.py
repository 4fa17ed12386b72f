"""Neurons whose spikes are written, and left unwritten, and what is compared between the two."""

import torch

from trtkern import nn
from trtkern.ops.spikes import unwritten

SHAPE = (9, 2, 4, 4, 6)


def x_of(shape=SHAPE, channels_last=False, seed=0):
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else x


def fire(layer=None, shape=SHAPE, **how):
    """(a leaf that wants a gradient, ``Spikes`` of it)."""
    leaf = x_of(shape, **how).requires_grad_()
    return leaf, (layer or nn.LIF(packed=True))(1 * leaf)


def both(run):
    """What ``run`` returns where spikes are written, and where they are not."""
    made = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with unwritten(enabled):
            made.append(run())
    return made


def same(one, other):
    """Equal to the bit, in the same layout; tensors that want a gradient do so in both."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor) and one.requires_grad == other.requires_grad
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert torch.equal(one, other) and not one.isnan().any()
    elif isinstance(one, (tuple, list)):
        assert type(one) is type(other) and len(one) == len(other)
        for each in zip(one, other, strict=True):
            same(*each)
    else:
        assert one == other
