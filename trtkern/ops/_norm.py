"""A BatchNorm: what is checked of it, statistics of a batch, running ones, the small vectors that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import named
from trtkern.backends.base import Finish
from trtkern.ops import checks, layout
from trtkern.ops._beneath import beneath, transformed
from trtkern.ops._library import define, refuse_mapped
from trtkern.ops._mapped import Fold, sample
from trtkern.ops._prepared import WANT_H, Prepared, allocate, outputs, prepared_for
from trtkern.ops._room import finished, norm_grads
from trtkern.ops.spikes import Spikes

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


Statistics = tuple[Tensor, Tensor, int | Tensor]
"""Mean and biased variance, [C] float64, and the number of values behind each; where processes share them that is a
0-dim tensor, for which nobody waits."""


def check(
    y: Tensor,
    norm: BatchNorm,
    residual: Tensor | Spikes | None,
    v0: Tensor | None,
    pool: bool,
    channel_dim: int,
    states: Sequence[str] = ("v",),
) -> int:
    """Everything that can be wrong with the inputs, before anything runs; returns the axis of the channels."""
    checks.sequence(OP, y)
    axis = checks.axis(OP, "channel_dim", channel_dim, y)
    if axis == 0:
        raise ValueError(f"{OP}: expected channel_dim to differ from the time axis, got the time axis for both")
    channels = y.shape[axis]
    for name, tensor in norm._asdict().items():
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            continue
        checks.plain(OP, name, tensor)
        if tensor.numel() != channels:
            raise ValueError(
                f"{OP}: expected y with {tensor.numel()} channels (num_features), got {channels} on axis {axis} of "
                f"{checks.describe(y)}; check num_features and channel_dim"
            )
        if tensor.device != y.device:
            raise ValueError(
                f"{OP}: expected {name} on {y.device} like y, got {checks.describe(tensor)}; move the layer with "
                "layer.to(y.device)"
            )
    if norm.batch_statistics and norm.group is None and y.numel() <= channels:
        raise ValueError(
            f"{OP}: expected more than 1 value per channel when training, got {checks.describe(y)}; use a larger batch "
            "or layer.eval()"
        )
    if norm.batch_statistics and not y.numel():
        raise ValueError(
            f"{OP}: expected values to share the statistics of, got {checks.describe(y)}; give each process a sample"
        )
    if not norm.batch_statistics and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(f"{OP}: expected running statistics to normalise with, got none; pass batch_statistics")
    dense = residual.spikes if isinstance(residual, Spikes) else residual
    if dense is not None:
        if not isinstance(dense, Tensor):
            raise TypeError(f"{OP}: expected a residual in {y.dtype} like y, got {checks.describe(dense)}")
        checks.plain(OP, "residual", dense)
        if dense.dtype not in checks.FLOATS or (dense.dtype == torch.float64) > (y.dtype == torch.float64):
            raise TypeError(
                f"{OP}: expected a residual in {y.dtype} like y, or in what it is cast from (float32, bfloat16, "
                f"float16), got {checks.describe(dense)}; convert it with residual.to(y.dtype)"
            )
        if dense.shape != y.shape or dense.device != y.device:
            raise ValueError(
                f"{OP}: expected a residual of shape {tuple(y.shape)} on {y.device} like y, got "
                f"{checks.describe(dense)}; project it with a convolution first"
            )
    if isinstance(residual, Spikes) and residual.pooled:
        raise ValueError(f"{OP}: expected the words of a residual to be its own, got those of what was pooled")
    checks.state(OP, v0, y, states)
    if pool and (y.dim() != 5 or axis != 2 or min(y.shape[-2:]) < 2):
        raise ValueError(
            f"{OP}: expected y as [T, B, C, H, W] with H and W of 2 or more to pool, got {checks.describe(y)} with "
            f"channels on axis {axis}; use pool=1"
        )
    if norm.batch_statistics and norm.group is not None:
        what = "statistics that processes share (sync=True)"
        refuse_mapped(OP, what, "construct the layer with sync=False, or call layer.eval()", y, dense)
    return axis


def running(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The running mean and variance."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{OP}: expected running statistics, got none")
    return norm.running_mean, norm.running_var


def in_place(norm: BatchNorm) -> bool:
    """Whether a kernel can move the running statistics by their addresses, or there are none."""
    held = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return all(t is None for t in held)
    return norm.running_mean.dtype == norm.running_var.dtype and all(t is not None and t.is_contiguous() for t in held)


def copies(norm: BatchNorm) -> list[Tensor] | None:
    """The running statistics as they are, to be put back after an error; None where nothing moves."""
    held = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    if not norm.batch_statistics or transformed() or any(t is None for t in held):
        return None
    return [t.clone() for t in held if t is not None]


def put_back(norm: BatchNorm, before: list[Tensor] | None) -> None:
    """The running statistics as they were."""
    held = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    for t, old in zip(held, before or [], strict=False):
        if t is not None:
            t.copy_(old)


def batch(y: Tensor, norm: BatchNorm, channels: int, inner: int, backend: str) -> Statistics:
    """The statistics of y, of all processes together where they share them."""
    with torch.no_grad():
        # The statistics of T equal steps are those of one.
        one = y.detach()[:1] if layout.is_static(y) else y.detach()
        mean, squares = statistics(one, channels, inner, backend).unbind(0)
        return together_with(norm.group, mean, squares / (one.numel() // channels), y.numel() // channels)


def reference_statistics(y: Tensor, norm: BatchNorm, axis: int) -> Statistics:
    """The same for the reference, with autograd through the statistics."""
    return together_with(norm.group, *reference.statistics(y, axis), y.numel() // y.shape[axis])


def differentiable(y: Tensor, rstd: Tensor, axis: int, group: Any) -> tuple[Tensor, Tensor]:
    """The mean of y, and its rstd as it is known, [C] float64, with autograd through both."""
    mean, var, _ = together_with(group, *reference.statistics(y, axis), y.numel() // y.shape[axis])
    return mean, (rstd.detach() ** -2 + (var - var.detach())).rsqrt()


def together_with(group: Any, mean: Tensor, var: Tensor, count: int) -> Statistics:
    """The statistics of the values of all processes of the group, of those of this one; None: they are these.

    One all-reduce, of the sum, the sum of squares and the number of values, 2 C + 1 in float64. Squares lose the square
    of how many standard deviations the mean is: at 10,000 of them 8 of 16 digits, which leaves what float32 has. The
    number of values stays on the device, and nobody waits for it.
    """
    if group is None or torch.distributed.get_world_size(group) == 1:
        enough(count)
        return mean, var, count
    own = torch.cat((mean, var + mean.square(), mean.new_ones(1))) * count
    *sums, values = _Sum.apply(own, group).split((mean.numel(), mean.numel(), 1))
    mean, squares = (total / values for total in sums)
    return mean, (squares - mean.square()).clamp(min=0), values[0].detach()


def summed(sums: Tensor, count: int, group: Any) -> Tensor:
    """The sums [2, C] of all processes, times ``count`` over the number of all values: divided by the number of values
    here, they are means over the values of all processes. One all-reduce of 2 C + 1 numbers, with autograd."""
    total = _Sum.apply(torch.cat((sums.flatten(), sums.new_full((1,), count))), group)
    return (total[:-1] * (count / total[-1].detach())).view_as(sums)


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


def enough(count: int) -> None:
    if count < 2:
        raise ValueError(f"{OP}: expected more than 1 value per channel when training, got {count}")


def update(norm: BatchNorm, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
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


def _statistics(y: Tensor, channels: int, inner: int, backend: str) -> Tensor:
    stats = _statistics_fake(y, channels, inner, backend)
    named(backend).ops["batch_norm_lif_statistics"](y, channels, inner, stats)
    return stats


def _statistics_fake(y: Tensor, channels: int, inner: int, backend: str) -> Tensor:
    return torch.empty((2, channels), dtype=torch.float64, device=y.device)


def _statistics_mapped(info: Any, dims: tuple, y: Tensor, channels: int, inner: int, backend: str) -> tuple:
    fold = Fold(y, dims[0], info.batch_size, channels, inner)
    folded = fold.steps(y, dims[0])
    return fold.out_rows(
        torch.ops.trtkern.batch_norm_lif_statistics(folded, info.batch_size * channels, fold.inner, backend)
    )


statistics = define(
    "batch_norm_lif_statistics(Tensor y, SymInt channels, SymInt inner, str backend) -> Tensor",
    _statistics,
    _statistics_fake,
    _statistics_mapped,
)


def moved(*held: Tensor | None) -> None:
    """Kernels write to addresses: autograd is told, as torch's own operations tell it."""
    there = [t for t in held if t is not None and not t.is_inference()]
    if there:
        torch.autograd.graph.increment_version(there)


def _finish(mean, var, weight, bias, running_mean, running_var, batches, count, eps, momentum, coef, backend):
    norm = Finish(weight, bias, running_mean, running_var, batches, eps, momentum, count)
    out = finished(mean, mean.shape[0], coef)
    # Of one type, each dense, for a kernel.
    mean, var = mean.contiguous(), (var if var.dtype == mean.dtype else var.to(mean.dtype)).contiguous()
    named(backend).ops["batch_norm_lif_finish"](mean, var, norm, out)
    moved(running_mean, running_var, batches)
    return tuple(out)


def _finish_fake(mean, var, weight, bias, running_mean, running_var, batches, count, eps, momentum, coef, backend):
    return tuple(finished(mean, mean.shape[0], coef))


def _finish_mapped(info: Any, dims: tuple, *arguments: Any) -> tuple:
    *tensors, _, _, _, count, eps, momentum, coef, backend = arguments
    M = info.batch_size
    rows = [_all_samples(t, dim, M) for t, dim in zip(tensors, dims, strict=False)]
    made = torch.ops.trtkern.batch_norm_lif_finish(*rows, None, None, None, count, eps, momentum, coef, backend)
    apart = [t.view(t.shape[0], M, -1) if t.dim() == 2 else t for t in made]
    return tuple(apart), tuple(1 if t.dim() == 3 else None for t in apart)


def _all_samples(t: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    """[M * C] of [C] of each of M samples."""
    if t is None:
        return None
    return (t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0)).reshape(-1)


finish = define(
    "batch_norm_lif_finish(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? batches, SymInt count, float eps, float? momentum, bool coef, str backend) "
    "-> (Tensor affine, Tensor moments, Tensor made_coef)",
    _finish,
    _finish_fake,
    _finish_mapped,
)


def _coefficients(sums, own, affine, moments, count, dtype, backend):
    norm = norm_grads(affine, moments, count, True, dtype)
    named(backend).ops["batch_norm_lif_coefficients"](sums, own, norm)
    return norm[3:]


coefficients = define(
    "batch_norm_lif_coefficients(Tensor sums, Tensor? own, Tensor affine, Tensor moments, SymInt count, "
    "ScalarType? dtype, str backend) -> (Tensor coef, Tensor gweight, Tensor gbias)",
    _coefficients,
    lambda sums, own, affine, moments, count, dtype, backend: norm_grads(affine, moments, count, True, dtype)[3:],
    None,
)


def _input_grad(gx: Tensor, y: Tensor, affine: Tensor, coef: Tensor, inner: int, backend: str) -> Tensor:
    out = layout.empty(y)
    if gx.numel():
        named(backend).ops["batch_norm_lif_input_grad"](gx, y, affine, coef, inner, out)
    return out


def _input_grad_mapped(
    info: Any, dims: tuple, gx: Tensor, y: Tensor, affine: Tensor, coef: Tensor, inner: int, backend: str
) -> tuple:
    own = None if dims[2] is None and dims[3] is None else sample(affine, dims[2]).shape[1]
    fold = Fold(y, dims[1], info.batch_size, own, inner)
    steps = fold.steps(gx, dims[0]), fold.steps(y, dims[1])
    rows = fold.rows(affine, dims[2]), fold.rows(coef, dims[3])
    return fold.out_steps(torch.ops.trtkern.batch_norm_lif_input_grad(*steps, *rows, fold.inner, backend))


input_grad = define(
    "batch_norm_lif_input_grad(Tensor gx, Tensor y, Tensor affine, Tensor coef, SymInt inner, str backend) -> Tensor",
    _input_grad,
    lambda gx, y, affine, coef, inner, backend: layout.empty(y),
    _input_grad_mapped,
)


def together(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias as a kernel reads them: dense, and of one type."""
    if weight is None or bias is None:
        return weight if weight is None else weight.contiguous(), bias if bias is None else bias.contiguous()
    return weight.contiguous(), (bias if bias.dtype == weight.dtype else bias.to(weight.dtype)).contiguous()


def normed(
    prepared: Prepared, y, v0, params, residual, weight, bias, running_mean, running_var, batches, eps, momentum,
    channels, flag, want,
):  # fmt: skip
    """Statistics, finish, the fused pass. The running statistics move when all is checked and has its memory."""
    if params is not None:
        prepared.look(params)
    made, room = allocate(y, prepared.token, prepared.pool, want, flag), finished(y, channels, False)
    inputs = prepared.inputs(y, v0, params, room.affine, residual, None, bool(want & WANT_H))
    norm = Finish(weight, bias, running_mean, running_var, batches, eps, momentum, y.numel() // channels)
    # The statistics of T equal steps are those of one.
    prepared.run["batch_norm_lif_affine"](y[:1] if prepared.static else y, prepared.inner, norm, room)
    moved(running_mean, running_var, batches)
    prepared.launch(inputs, made)
    return *outputs(made), room.affine, room.moments


def _run_forward(
    y, v0, params, residual, weight, bias, running_mean, running_var, batches, eps, momentum, channels, scalars, spec,
    inner, pool, flag, want, backend,
):  # fmt: skip
    prepared = prepared_for(y, params, channels, scalars, spec, inner, pool, backend)
    return normed(
        prepared, y, v0, params, residual, weight, bias, running_mean, running_var, batches, eps, momentum, channels,
        flag, want,
    )  # fmt: skip


def _run_forward_fake(
    y, v0, params, residual, weight, bias, running_mean, running_var, batches, eps, momentum, channels, scalars, spec,
    inner, pool, flag, want, backend,
):  # fmt: skip
    return *outputs(allocate(y, spec, pool, want)), *finished(y, channels, False)[:2]


forward = define(
    "batch_norm_lif_forward(Tensor y, Tensor? v0, Tensor? params, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float eps, float? momentum, "
    "SymInt channels, float[] scalars, str spec, SymInt inner, bool pool, Tensor(d!)? flag, int want, str backend) "
    "-> (Tensor s, Tensor v, Tensor v_final, Tensor edges, Tensor packed, Tensor affine, Tensor moments)",
    _run_forward,
    _run_forward_fake,
    None,
)
