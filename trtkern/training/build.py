"""What the settings name, made: network, loss, optimiser."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from trtkern.models import SpikingNetwork
from trtkern.models.build import build
from trtkern.names import LOSSES
from trtkern.nn import SDTLoss, TETLoss, TRTLoss
from trtkern.training.settings import Settings

Loss = TRTLoss | TETLoss | SDTLoss


def build_model(settings: Settings, shape: tuple[int, int, int], classes: int) -> SpikingNetwork:
    """The network of the settings, initialised from their seed, on their device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        options = {**settings.model, "timesteps": settings.timesteps, "backend": settings.backend}
        model = build(options.pop("name"), shape, classes, **options)
    return model.to(settings.device)


def build_loss(settings: Settings, model: SpikingNetwork) -> Loss:
    """The loss of the settings."""
    options = {**settings.loss_options, "label_smoothing": settings.label_smoothing}
    if settings.loss == "trt":
        return TRTLoss(model, **options)
    return TETLoss(**options) if settings.loss == "tet" else SDTLoss(**options)


def build_losses(settings: Settings, model: SpikingNetwork) -> dict[str, Loss]:
    """One loss of each kind, by its name in capitals: the kind of the run with its options, the others with theirs."""
    options = {**LOSSES, settings.loss: settings.loss_options}
    kinds = {kind: replace(settings, loss=kind, loss_options=options[kind]) for kind in reversed(LOSSES)}
    return {kind.upper(): build_loss(each, model) for kind, each in kinds.items()}


def build_optimizer(settings: Settings, model: SpikingNetwork) -> torch.optim.Optimizer:
    """The optimiser of the settings, all its arithmetic in one kernel.

    For a CUDA graph the learning rate is a tensor on the device: a graph reads it anew at each replay.
    """
    options = {name: value for name, value in settings.optimizer.items() if name != "name"}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if settings.optimizer["name"] == "sgd":
        descent = torch.optim.SGD(model.parameters(), lr=settings.lr, fused=True, **options)
        if options["momentum"]:  # torch leaves them uninitialised where the first step overflows
            for weight in model.parameters():
                descent.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return descent
    kind = torch.optim.AdamW if settings.optimizer["name"] == "adamw" else torch.optim.Adam
    rate: float | Tensor = settings.lr
    if settings.cuda_graphs:
        rate = torch.tensor(settings.lr, device=settings.device)
    return kind(model.parameters(), lr=rate, fused=True, capturable=settings.cuda_graphs, **options)


def rate_factor(step: int, total: int, warmup: float) -> float:
    """What the learning rate is multiplied with: a linear rise over the share ``warmup``, then half a cosine to 0."""
    rising = round(total * warmup)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
