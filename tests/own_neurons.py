"""Neurons of a user's own for the tests: AdEx of examples/adex.py, and a small one to be spoilt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from trtkern import neurons
from trtkern import nn as snn
from trtkern.neurons import where

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from adex import ADEX  # noqa: E402

VALUES = {**neurons.lookup(ADEX).defaults, "v_threshold": 0.9}
T, B, C = 9, 2, 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(backend="reference", learnable=False, **settings):
    values = dict(VALUES)
    if learnable:
        spread = torch.tensor([0.95, 1.0, 1.1])
        values = {name: nn.Parameter(value * spread) for name, value in values.items()}
    return snn.Neuron(ADEX, surrogate="sigmoid", alpha=2.0, backend=backend, **{**values, **settings})


def charge(x, state, p):
    return (p.decay * state.v + x,)


def fire(trace, p):
    return trace.h, p.v_threshold


def settle(trace, s, p):
    return (where(s, 0.0, trace.h),)


PARAMS = {"decay": 0.5, "v_threshold": 1.0}


def registered(name="Mine", **changes):
    own = {"states": ("v",), "params": PARAMS, "charge": charge, "fire": fire, "settle": settle}
    return neurons.register(name, **{**own, **changes})
