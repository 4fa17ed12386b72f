"""The numbers of a BatchNorm: statistics of a batch, running ones, and the small vectors that the kernels take.

Per-channel arithmetic is float64: it costs nothing, and neither a large mean nor a small variance loses anything there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import named
from trtkern.ops import layout
from trtkern.ops._beneath import beneath
from trtkern.ops._library import define
from trtkern.ops._mapped import Fold, sample

OP = "batch_norm_lif"
"""The op that the errors name."""


class BatchNorm(NamedTuple):
    """The state and the settings of a BatchNorm, as torch's layers keep them; tensors are [C]."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    """Updated in place with batch statistics, as is what follows; None: not kept."""
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    eps: float
    momentum: float | None
    """None: the running statistics are plain averages over all batches."""
    batch_statistics: bool
    """Normalise with the statistics of y; else with the running ones."""
    group: Any = None
    """The torch.distributed group whose processes share their statistics; None: this process alone."""


Statistics = tuple[Tensor, Tensor, int]
"""Mean and biased variance, [C] float64, and the number of values behind each."""


def running(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The running mean and variance, float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{OP}: expected running statistics, got none")
    return norm.running_mean.double(), norm.running_var.double()


def batch(y: Tensor, norm: BatchNorm, channels: int, inner: int, backend: str) -> Statistics:
    """The statistics of y."""
    with torch.no_grad():
        # The statistics of T equal steps are those of one.
        one = y.detach()[:1] if layout.is_static(y) else y.detach()
        mean, squares = torch.ops.trtkern.batch_norm_lif_statistics(one, channels, inner, backend).unbind(0)
        var, count = squares / (one.numel() // channels), y.numel() // channels
        if norm.group is not None:
            mean, var, count = _shared(mean, var, count, norm.group)
    _enough(count)
    return mean, var, count


def reference_statistics(y: Tensor, norm: BatchNorm, axis: int) -> Statistics:
    """The same for the reference, with autograd through the statistics."""
    mean, var = reference.statistics(y, axis)
    count = y.numel() // y.shape[axis]
    if norm.group is not None:
        mean, var, count = _merged(mean, var, count, norm.group)
    _enough(count)
    return mean, var, count


def _merged(own: Tensor, spread: Tensor, count: int, group: Any) -> Statistics:
    """Statistics of all processes together, with autograd."""
    total = own.new_tensor(float(count))
    torch.distributed.all_reduce(total, group=group)
    share = count / total
    mean = summed(own * share, group)
    var = summed((spread + (own - mean).square()) * share, group)
    return mean, var, int(total.item())


def differentiable(y: Tensor, rstd: Tensor, axis: int, group: Any) -> tuple[Tensor, Tensor]:
    """The mean of y, and its rstd as it is known, [C] float64, with autograd through both."""
    mean, var = reference.statistics(y, axis)
    if group is not None:
        mean, var, _ = _merged(mean, var, y.numel() // y.shape[axis], group)
    return mean, (rstd.detach() ** -2 + (var - var.detach())).rsqrt()


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum over the processes of a group, with autograd."""
    return _Sum.apply(x, group)


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group. What torch has for it, torch.distributed.nn, is deprecated."""

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(incoming[0], ctx.group), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Sum.apply(tangents[0], ctx.group)

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, group: Any) -> tuple[Tensor, int | None]:
        return _Sum.apply(x, group), dims[0]


def _shared(mean: Tensor, var: Tensor, count: int, group: Any) -> Statistics:
    """Statistics of all processes together, merged in the order of their ranks: the same on each."""
    own = torch.stack((mean, var, torch.full_like(mean, count)))
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, own, group=group)
    means, variances, counts = torch.stack(parts, 1).unbind(0)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean, var, int(total[0].item())


def _enough(count: int) -> None:
    if count < 2:
        raise ValueError(f"{OP}: expected more than 1 value per channel when training, got {count} in all processes")


def update(norm: BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """The running statistics after a batch, as torch's BatchNorm has them; untouched where one is not finite.

    The last thing that a call does: whatever raises an error before has changed nothing.
    """
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    momentum = norm.momentum

    def move(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor) -> None:
        finite = (torch.isfinite(mean) & torch.isfinite(var)).all(-1)
        _own(mean, running_mean, "running_mean")
        _own(var, running_var, "running_var")
        _own(finite, batches, "num_batches_tracked")
        batches.add_(finite)
        factor = 1.0 / batches.double().unsqueeze(-1) if momentum is None else momentum
        for held, value in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            moved = held + factor * (value - held)
            held.copy_(torch.where(finite.unsqueeze(-1), moved, held))

    beneath(move, mean, var, norm.running_mean, norm.running_var, norm.num_batches_tracked)


def _own(value: Tensor, held: Tensor, name: str) -> None:
    """What is written to has the mapped axes (``torch.vmap``) of what is written."""
    if torch.broadcast_shapes(value.shape, held.shape) != held.shape:
        raise RuntimeError(
            f"{OP}: expected {name} to be mapped by torch.vmap as the statistics of y are, got one that all samples "
            "would move; give each its own: pass the buffers through torch.func.functional_call, with an axis in "
            "in_dims, or call layer.eval(), or construct the layer with track_running_stats=False"
        )


def affine(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """center, scale, shift as [3, C] float32: the normalisation is scale * (y - center) + shift.

    The center is the mean as float32 has it, and the shift makes up for the rest: exact however large the mean is.
    """
    scale = rstd if weight is None else rstd * weight
    center = mean.float()
    shift = (center - mean) * scale
    return torch.stack((center, scale.float(), (shift if bias is None else shift + bias).float()))


def coefficients(sums: Tensor | None, mean: Tensor, rstd: Tensor, affine: Tensor, count: int, group: Any) -> Tensor:
    """[3, C] float32: gy = coef[0] * gx + coef[1] * (y - center) + coef[2].

    With xhat = (y - mean) * rstd: gy = scale * (gx - mean(gx) - xhat * mean(gx * xhat)); with running statistics
    (count = 0) gy = scale * gx.
    """
    center, scale, _ = affine.double().unbind(0)
    if count == 0 or sums is None:
        return torch.stack((scale, torch.zeros_like(scale), torch.zeros_like(scale))).float()
    if group is not None:
        sums = sums.clone()
        torch.distributed.all_reduce(sums, group=group)
    offset = mean - center
    slope = scale * rstd * rstd * (sums[1] - offset * sums[0]) / count
    return torch.stack((scale, -slope, slope * offset - scale * sums[0] / count)).float()


def affine_grads(
    sums: Tensor | None, mean: Tensor, rstd: Tensor, affine: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, those of this process (DDP averages them)."""
    if sums is None or weight is None or sums.numel() == 0:
        return None, None
    gweight = rstd * (sums[1] - (mean - affine[0].double()) * sums[0])
    return gweight.to(weight.dtype), sums[0].to(weight.dtype)


def _statistics(y: Tensor, channels: int, inner: int, backend: str) -> Tensor:
    stats = _statistics_fake(y, channels, inner, backend)
    named(backend).ops["batch_norm_lif_statistics"](y, channels, inner, stats)
    return stats


def _statistics_fake(y: Tensor, channels: int, inner: int, backend: str) -> Tensor:
    return y.new_empty((2, channels), dtype=torch.float64)


def _input_grad(gx: Tensor, y: Tensor, affine: Tensor, coef: Tensor, inner: int, backend: str) -> Tensor:
    out = layout.empty(y)
    if gx.numel():
        named(backend).ops["batch_norm_lif_input_grad"](gx, y, affine, coef, inner, out)
    return out


def _statistics_mapped(info: Any, dims: tuple, y: Tensor, channels: int, inner: int, backend: str) -> tuple:
    fold = Fold(y, dims[0], info.batch_size, channels, inner)
    folded = fold.steps(y, dims[0])
    return fold.out_rows(
        torch.ops.trtkern.batch_norm_lif_statistics(folded, info.batch_size * channels, fold.inner, backend)
    )


def _input_grad_mapped(
    info: Any, dims: tuple, gx: Tensor, y: Tensor, affine: Tensor, coef: Tensor, inner: int, backend: str
) -> tuple:
    own = None if dims[2] is None and dims[3] is None else sample(affine, dims[2]).shape[1]
    fold = Fold(y, dims[1], info.batch_size, own, inner)
    steps = fold.steps(gx, dims[0]), fold.steps(y, dims[1])
    rows = fold.rows(affine, dims[2]), fold.rows(coef, dims[3])
    return fold.out_steps(torch.ops.trtkern.batch_norm_lif_input_grad(*steps, *rows, fold.inner, backend))


define(
    "batch_norm_lif_statistics(Tensor y, SymInt channels, SymInt inner, str backend) -> Tensor",
    _statistics,
    _statistics_fake,
    _statistics_mapped,
)
define(
    "batch_norm_lif_input_grad(Tensor gx, Tensor y, Tensor affine, Tensor coef, SymInt inner, str backend) -> Tensor",
    _input_grad,
    lambda gx, y, affine, coef, inner, backend: layout.empty(y),
    _input_grad_mapped,
)
