"""The losses of a training: those of ``trtkern.nn`` by name, the squared error for numbers, and the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trtkern import own
from trtkern.names import LOSSES, OVER, one_of
from trtkern.nn import LossParts, SDTLoss, TETLoss, TRTLoss


class _Unpenalised:
    """What the losses of this file share: no penalty on the weights."""

    def add_grad_(self, scale: float = 1.0) -> Tensor:
        """Nothing to add: there is no regulariser. Returns 0."""
        return torch.zeros(())


class SquaredError(_Unpenalised):
    """The mean squared error of a readout, for numbers instead of classes, of outputs O_t [T, B, ...]::

        "mean": (1/T sum_t O_t - y)^2    "steps": 1/T sum_t (O_t - y)^2    "last": (O_{T-1} - y)^2

    each averaged over the batch and the outputs; with a target for each step, y_t [T, B, ...], it is that of the steps.

    Args:
        over: "mean", "steps" or "last".
    """

    def __init__(self, over: str = "mean") -> None:
        self.over = one_of("set loss.over", over, OVER)

    def __repr__(self) -> str:
        return f"SquaredError(over={self.over!r})"

    def parts(self, logits: Tensor, target: Tensor, *, regularize: bool = True) -> LossParts:
        """The loss, which is also its squared error.

        Raises:
            TypeError, ValueError: a target of another dtype or shape than the outputs of a sample have.
        """
        if not target.is_floating_point():
            raise TypeError(f"mse: expected a target of a floating dtype, got {target.dtype}; make it .float()")
        if target.shape not in (logits.shape, logits.shape[1:]):
            raise ValueError(
                f"mse: expected a target of shape {list(logits.shape[1:])}, or of every step {list(logits.shape)}, got "
                f"{list(target.shape)}"
            )
        target = target.to(logits.dtype)
        if target.dim() == logits.dim() or self.over == "steps":
            loss = (logits - target).square().mean()
        else:
            loss = ((logits.mean(0) if self.over == "mean" else logits[-1]) - target).square().mean()
        zero = loss.new_zeros(())
        return LossParts(loss, zero, loss.detach(), zero)


class OwnLoss(_Unpenalised):
    """A loss of the user's: a function of logits [T, B, C] in float32 and targets, which gives a 0-dim tensor.

    Args:
        function: that.
        name: of it, for messages.
        options: what it takes besides.
    """

    def __init__(self, function: Callable[..., Tensor], name: str, options: dict[str, Any]) -> None:
        if not callable(function):
            raise own.OwnError(f"loss: expected a function of (logits, target), got {function!r}")
        self._function, self._options = function, options
        self.name = getattr(function, "__qualname__", type(function).__qualname__) if ":" not in name else name

    def __repr__(self) -> str:
        return f"OwnLoss({self.name})"

    def parts(self, logits: Tensor, target: Tensor, *, regularize: bool = True) -> LossParts:
        """The loss; its other parts are 0.

        Raises:
            OwnError: the function raised, or gave something else.
        """
        try:
            loss = self._function(logits, target, **self._options)
        except Exception as error:
            wanted = f"loss: expected {self.name} to return for logits {list(logits.shape)} and targets"
            raise own.failed(error, f"{wanted} {list(target.shape)} {target.dtype}") from error
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            got = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise own.OwnError(f"loss: expected {self.name} to give a 0-dim tensor in a floating dtype, got {got}")
        zero = loss.detach().new_zeros(())
        return LossParts(loss, zero, zero, zero)


Loss = TRTLoss | TETLoss | SDTLoss | SquaredError | OwnLoss
CLASSES = tuple(name for name in LOSSES if name != "mse")
"""The losses of classes."""


def build(
    name: str, options: dict[str, Any], label_smoothing: float, model: nn.Module,
    given: Callable[..., Tensor] | None = None,
) -> Loss:  # fmt: skip
    """The loss of that name.

    Args:
        name: a key of ``trtkern.names.LOSSES``, or of the user's.
        options: what it takes.
        label_smoothing: of the losses of classes.
        model: whose weights TRT regularises.
        given: the user's function, where a program gave it.
    """
    if name == "trt":
        return TRTLoss(model, **options, label_smoothing=label_smoothing)
    if name in CLASSES:
        return (TETLoss if name == "tet" else SDTLoss)(**options, label_smoothing=label_smoothing)
    if name == "mse":
        return SquaredError(**options)
    return OwnLoss(given or own.imported(name, "loss"), name, options)


def arranged(target: Tensor, logits: Tensor) -> Tensor:
    """Targets as the losses take them: those of each step, which batches have as [B, T, ...], become [T, B, ...]."""
    steps, count = logits.shape[:2]
    labels = not target.is_floating_point() and target.dim() == 2
    if (labels or target.dim() == logits.dim()) and target.shape[:2] == (count, steps):
        return target.transpose(0, 1)
    return target
