"""Layers and losses: drop them into any PyTorch model."""

from trtkern.nn.losses import LossParts, SDTLoss, TETLoss, TRTLoss
from trtkern.nn.neurons import IF, LI, LIF, PLIF

__all__ = ["IF", "LI", "LIF", "PLIF", "LossParts", "SDTLoss", "TETLoss", "TRTLoss"]
