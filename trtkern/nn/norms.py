"""What torch does to every BatchNorm of a model, done to ``BatchNormLIF`` too, which ``isinstance`` passes by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trtkern.nn.batch_norm_lif import BatchNormLIF


def batch_norms(model: nn.Module) -> Iterator[Any]:
    """Every BatchNorm of a model, torch's and ``BatchNormLIF``, for code that asks ``isinstance(m, _BatchNorm)``."""
    for module in model.modules():
        if isinstance(module, (_BatchNorm, BatchNormLIF)):
            yield module


def freeze_norms(model: nn.Module, *, affine: bool = False) -> nn.Module:
    """Put every BatchNorm into evaluation, so that it normalises with its running statistics and leaves them alone.

    Call it after ``model.train()``, which undoes it.

    Args:
        model: changed, and returned.
        affine: also train neither weight nor bias (``requires_grad_(False)``).
    """
    for norm in batch_norms(model):
        norm.eval()
        if affine:
            for parameter in (norm.weight, norm.bias):
                if parameter is not None:
                    parameter.requires_grad_(False)
    return model


@torch.no_grad()
def update_norms(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    """``torch.optim.swa_utils.update_bn`` for every BatchNorm: running statistics anew, as averages over the loader.

    Momentum and mode of the model are as before afterwards, also after an error.

    Args:
        loader: batches; of a list or tuple the first is the model's input.
        model: called with each.
        device: where inputs are moved to; None leaves them.
    """
    norms = [norm for norm in batch_norms(model) if norm.running_mean is not None]
    if not norms:
        return
    momenta, modes = [norm.momentum for norm in norms], [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for batch in loader:
            x = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(x if device is None else x.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training


def convert_sync_norms(model: nn.Module) -> nn.Module:
    """``nn.SyncBatchNorm.convert_sync_batchnorm`` for every BatchNorm: all processes share their statistics.

    torch's layers become ``nn.SyncBatchNorm``; a ``BatchNormLIF`` stays what it is, with ``sync=True``. Its processes
    are all of torch.distributed; there is no ``process_group``.

    Args:
        model: changed, and returned (a new module only where ``model`` itself is one of torch's BatchNorms).
    """
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            module.sync = True
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
