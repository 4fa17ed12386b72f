"""BatchNorm, LIF, and what stands around them, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx, nn

from trtkern.backends import explain, resolve, sizes
from trtkern.backends.base import Case
from trtkern.nn._calls import Calls
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import AnyState, Spiking, carrier, one_step, spikes_of, warn_of_one_step
from trtkern.nn.neurons import LIF
from trtkern.ops import checks
from trtkern.ops._norm import BatchNorm
from trtkern.ops.batch_norm_lif import OP, Neuron, Source, batch_norm_lif
from trtkern.ops.lif import wanted
from trtkern.ops.spikes import Spikes, dense, packing

fx.wrap("dense")
fx.wrap("one_step")

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""What a BatchNorm holds, in the order of ``BatchNorm``."""


class BatchNormLIF(Leaf):
    """BatchNorm over time, batch and space together, a residual, LIF neurons and a 2x2 average, as one op.

    x = weight * (y - mean) / sqrt(var + eps) + bias (+ residual), then the neuron of ``LIF`` over all T steps.
    Statistics are per channel (the "tdBN" of the TRT paper, arXiv 2506.19256, is exactly this); running statistics are
    kept as ``torch.nn.BatchNorm2d`` keeps them. One pass reads y for the statistics, one normalises, integrates and
    fires; backward is two passes. What is kept for it is y, the residual and a few numbers a channel.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats: as in ``torch.nn.BatchNorm2d``.
        channel_dim: the axis of y that the channels are on: 2, or -1 for [T, B, L, C] after a Linear.
        sync: share the statistics with all processes of torch.distributed, once it is initialised.
        pool: 2 returns 2x2 averages of the spikes, [T, B, C, H // 2, W // 2], and never writes the spikes themselves.
        packed: return ``Spikes``, which carry the T bits of every neuron: what ``SpikeConv2d`` keeps.
        neuron: a class of spiking neurons: ``LIF``, ``PLIF``, ``CUBALIF``, ``ALIF``, ..., or the name of one of your
            own (``trtkern.neurons.register``).
        lif: what that neuron takes: decay, gain, v_threshold, surrogate, backend, ...

    The state dict has weight, bias, running_mean, running_var and num_batches_tracked, and ``lif.*`` for learned
    parameters of the neuron; ``convert_norm_lif`` makes this layer out of a pair, ``unfuse`` the pair out of it.

    Raises:
        TypeError, ValueError: a setting out of range.
    """

    takes_time = takes_lengths = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_dim: int = 2,
        sync: bool = False,
        pool: int = 1,
        packed: bool = False,
        neuron: Callable[..., Spiking] | str = LIF,
        **lif: Any,
    ) -> None:
        super().__init__()
        _settings(num_features, eps, momentum, pool)
        if "time_dim" in lif:
            raise TypeError(f"BatchNormLIF: expected time on axis 0, got time_dim={lif['time_dim']!r}; move the axis")
        self.num_features, self.eps, self.momentum = num_features, float(eps), momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.channel_dim, self.sync, self.pool, self.packed = channel_dim, sync, pool, packed
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features)) if affine else None)
        held = {"running_mean": torch.zeros, "running_var": torch.ones}
        for name, make in held.items():
            self.register_buffer(name, make(num_features) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if track_running_stats else None)
        neurons = import_module("trtkern.nn.own").maker(neuron) if isinstance(neuron, str) else neuron
        self.lif: Spiking = neurons(channel_dim=channel_dim, **lif)
        self._calls = Calls()
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_calls", Calls())

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch seen."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, the running statistics, the non-finite flag; ``lif`` resets parameters of its own."""
        self.reset_running_stats()
        with torch.no_grad():
            self.nonfinite.zero_()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    @property
    def nonfinite(self) -> Tensor:
        """int32 [1], set to 1 by the kernel when a potential is not finite."""
        return self.lif.nonfinite

    def norm(self) -> BatchNorm:
        """The normalisation of the next call."""
        weight, bias, running_mean, running_var, batches = self._tensors()
        training, group = self.training or running_mean is None, None
        if self.sync and self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            group = torch.distributed.group.WORLD
        return BatchNorm(weight, bias, running_mean, running_var, batches, self.eps, self.momentum, training, group)

    def _tensors(self) -> list[Any]:
        """``NORM_TENSORS`` as they are now, at a third of the price of five attributes; what torch has put in the place
        of a parameter (``parametrize``) is an attribute."""
        held = {**self._parameters, **self._buffers}
        return [held[name] if name in held else getattr(self, name) for name in NORM_TENSORS]

    def neuron(self, *, state: bool = False) -> Neuron:
        """What follows the normalisation in the next call."""
        lif, held = self.lif, self._buffers.get("running_mean")
        want = wanted(True, False, state, packing(self.packed))
        held = self.weight if held is None else held
        flag = lif.nonfinite if held is None else lif.flag_for(held)
        return Neuron(lif.values(), lif.spec, self.pool == 2, want, flag, lif.backend, lif.fire_on_equal)

    def forward(
        self,
        y: Tensor,
        residual: Tensor | Spikes | None = None,
        v0: AnyState = None,
        *,
        return_state: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor | Spikes | tuple[Any, ...]:
        """Spikes [T, B, C, ...] in y's dtype (2x2 averages with ``pool=2``; ``Spikes`` when packed); with
        ``return_state`` also the potentials after the last step, [B, C, ...] float32. Those of every step are left to
        ``LIF`` (``return_v``, ``return_h``) behind a BatchNorm.

        Args:
            y: [T, B, C, ...], contiguous or channels last as it is; expanded along time, the statistics read it once.
            residual: added to the normalised y; of its shape, in its dtype or cast to it, or packed ``Spikes``.
            v0: potential before the first step, [B, C, ...] float32; None is zero. Neurons with several states give and
                take them as their own layer does.
            lengths: int32 or int64 [B], the steps of each sample, as in ``LIF``; with running statistics only.
        """
        if is_proxy(y):
            return self(y, residual, v0, return_state=return_state, lengths=lengths)
        if isinstance(y, Tensor) and y.dim() < 3:
            warn_of_one_step(type(self).__name__, y)
        return self.run(y, residual, v0, return_state, lengths)

    def run(
        self,
        y: Tensor,
        residual: Tensor | Spikes | None,
        v0: AnyState,
        return_state: bool,
        lengths: Tensor | None,
        source: Source | None = None,
    ) -> Tensor | Spikes | tuple[Any, ...]:
        """What ``forward`` gives; with a ``source`` y is not kept."""
        lif, held = self.lif, carrier()
        if held is not None:
            v0 = held.start(lif, y, v0)
        plainly = residual is None and source is None and lengths is None and not torch.compiler.is_compiling()
        want = wanted(True, False, return_state or held is not None, False)
        made = self._calls.normed_again(self, y, v0, want) if plainly else None
        if made is None:
            state = None if v0 is None else lif.stacked(y, v0)
            neuron = self.neuron(state=return_state or held is not None)
            out = batch_norm_lif(y, self.norm(), neuron, residual, state, self.channel_dim, source, lengths)
            if plainly:
                self._calls.keep_normed(self, y, v0, want)
        else:
            out = lif.outputs(made, want)
        last = lif.named_state(out.state)
        if held is not None:
            held.end(lif, last)
        return (spikes_of(out), last) if return_state else spikes_of(out)

    def step(self, y: Tensor, residual: Tensor | Spikes | None = None, v: AnyState = None) -> tuple[Tensor, Any]:
        """One step: the same numbers as that step of a sequence, in evaluation.

        Args:
            y: one step, [B, C, ...]; ``channel_dim`` names the axis of a sequence, as everywhere.
            residual: of y's shape, dense.
            v: potential after the step before, [B, C, ...] float32; None at the start, where it is zero.

        Returns:
            Spikes [B, C, ...] in y's dtype (2x2 averages with ``pool=2``; dense where the layer is ``packed``), and the
            potential after the step, float32, which the next call takes.

        Raises:
            RuntimeError: the layer normalises with the statistics of the batch, which are those of all steps together.
            TypeError, ValueError: as ``forward``.
        """
        sequence = one_step("BatchNormLIF", y, 0)
        if self.norm().batch_statistics:
            raise RuntimeError(
                "BatchNormLIF.step: expected running statistics, got a layer that normalises with those of all steps "
                "of the batch together; call layer.eval(), or give it the whole sequence"
            )
        if residual is not None:
            residual = dense(residual)
            residual = residual.unsqueeze(0) if isinstance(residual, Tensor) or is_proxy(residual) else residual
        out, state = self(sequence, residual, v, return_state=True)
        return dense(out).squeeze(0), state

    def backend_for(self, y: Tensor, lengths: Tensor | None = None) -> str:
        """The backend that runs this layer on y; for "auto" also why the ones before it do not."""
        measured = (0, 0, 0) if self.packed else sizes(y)
        case = Case(OP, y.device.type, y.dtype, self.lif.spec, *measured, lengths is not None)
        return explain(case) if self.lif.backend == "auto" else resolve(self.lif.backend, case).name

    def extra_repr(self) -> str:
        """The settings, as they would be passed to the constructor."""
        names = ("eps", "momentum", "affine", "track_running_stats", "channel_dim", "sync", "pool", "packed")
        return ", ".join([str(self.num_features), *(f"{name}={getattr(self, name)!r}" for name in names)])


BatchNormNeuron = BatchNormLIF
"""The same class by the name that fits every neuron; reports, messages and pickles call it by its first one."""


def _settings(num_features: int, eps: float, momentum: float | None, pool: int) -> None:
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
        raise ValueError(f"BatchNormLIF: expected num_features to be an int >= 1, got {checks.describe(num_features)}")
    least = torch.finfo(torch.float32).tiny
    if not (isinstance(eps, (int, float)) and least <= eps <= checks.LARGEST):
        raise ValueError(
            f"BatchNormLIF: expected eps to be a number > 0 that float32 holds, {least:.1e} to {checks.LARGEST:.1e}, "
            f"got {checks.describe(eps)}"
        )
    if momentum is not None and not (isinstance(momentum, (int, float)) and 0 <= momentum <= 1):
        raise ValueError(f"BatchNormLIF: expected momentum in [0, 1] or None, got {checks.describe(momentum)}")
    if pool not in (1, 2):
        raise ValueError(f"BatchNormLIF: expected pool to be 1 or 2, got {pool!r}")
