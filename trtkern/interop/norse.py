"""The neurons of norse: which of them have an equal here, and with which numbers."""

from __future__ import annotations

from torch import nn

from trtkern.interop.adapters import Adapter

ADAPTERS: tuple[Adapter, ...] = ()


def is_neuron(module: nn.Module) -> bool:
    """Whether a class of norse without a row is a neuron, which is then named as left alone."""
    return False
