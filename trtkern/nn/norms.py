"""What torch does to every BatchNorm of a model, done to ``BatchNormLIF`` too, which ``isinstance`` passes by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trtkern import reference
from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.ops import _norm


class SyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm``, which runs on a CPU too, where torch's refuses to train among several processes.

    There it computes in float64, with one all-reduce forward and one backward, and leaves the running statistics alone
    where those of the batch are not finite. On all else it is torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """What ``torch.nn.BatchNorm`` gives for the batches of all processes together: [N, C, ...]."""
        group = self._group(input)
        if group is None:
            return super().forward(input)
        wide = input.double()
        held = _norm.BatchNorm(
            self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked, self.eps,
            self.momentum, True, group,
        )  # fmt: skip
        mean, var, count = _norm.reference_statistics(wide, held, 1)
        made = reference.batch_norm(wide, mean, (var + self.eps).rsqrt(), self.weight, self.bias, None, 1)
        _norm.update(held, mean.detach(), var.detach(), count)
        return made.to(input.dtype)

    def _group(self, input: Tensor) -> Any:
        """The processes to share the statistics with; None where torch's own layer does all that is to be done."""
        distributed = torch.distributed
        if not self.training or input.device.type != "cpu" or input.dim() < 2:
            return None
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        return self.process_group or distributed.group.WORLD


def batch_norms(model: nn.Module) -> Iterator[Any]:
    """Every BatchNorm of a model, torch's and ``BatchNormLIF``, for code that asks ``isinstance(m, _BatchNorm)``.

    Args:
        model: any module.
    """
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

    torch's layers become ``nn.SyncBatchNorm``, which here run on a CPU as well (``SyncBatchNorm`` of this file); a
    ``BatchNormLIF`` stays what it is, with ``sync=True``, and a BatchNorm that has its channels elsewhere says itself
    what it becomes (``synchronised``). Its processes are all of torch.distributed; there is no ``process_group``.

    Args:
        model: changed, and returned (a new module only where ``model`` itself is one of torch's BatchNorms).
    """
    special = {name: module.synchronised() for name, module in model.named_modules() if hasattr(module, "synchronised")}
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            module.sync = True
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, norm in special.items():
        if not name:
            return norm
        model.set_submodule(name, norm)
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SyncBatchNorm
    return model
