"""Delays of a sequence: whole steps or learned ones between them, a delay a channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from trtkern.backends import explain, named, resolve
from trtkern.backends.base import Case
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import carrier, one_step
from trtkern.nn.bounded import Bounded
from trtkern.ops import checks
from trtkern.ops.checks import Number
from trtkern.ops.delay import check_delays, check_max_delay, check_state, delay, state_after
from trtkern.ops.spikes import Spikes, dense

fx.wrap("dense")


class Delay(Leaf):
    """y[t] = (1 - f) x[t - k] + f x[t - k - 1]: each channel comes k + f steps later, k whole and 0 <= f < 1.

    What is before the first step is 0, or the state that is given. A whole delay is a shift, bit for bit; one between
    two steps mixes the two. The derivative by a delay is x[t - k - 1] - x[t - k], the slope of the line on which it
    lies. A whole delay lies at the end of two lines: it takes the slope towards longer delays, and ``max_delay`` that
    towards shorter ones, since there is nothing beyond it.

    Args:
        channels: how many; None: any number, with one delay for all.
        max_delay: no delay is longer, an int; the state is so many steps.
        delay: in steps, from 0 to ``max_delay``: a number, or a tensor of shape [] or [C]. None: drawn uniformly from
            all of them by torch's generator, where they are learned.
        learnable: train them; ``layer.delay`` is then a ``Bounded``, which keeps them in their range. From a number
            each channel gets a delay of its own, from a tensor of shape [] all have one.
        rounded: delays of whole steps, to the nearest (1/2 goes up), as hardware has them. Learned ones keep their
            fractions and get the gradient of the line on which they lie ("straight-through"); ``round_()`` drops them.
        time_dim, channel_dim: the axes of x.
        backend: "auto", or one of ``trtkern.backends.NAMES``; a named backend runs or raises.

    Raises:
        TypeError, ValueError: ``max_delay`` is no int >= 0; delays that are not in their range, or of another shape;
            none at all where they are not learned.
    """

    takes_time = takes_lengths = True
    state_names = ("inputs",)
    """Of its one state: the last ``max_delay`` steps of its input."""

    def __init__(
        self,
        channels: int | None,
        max_delay: int,
        delay: Number | None = None,
        learnable: bool = False,
        *,
        rounded: bool = False,
        time_dim: int = 0,
        channel_dim: int = 2,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
            raise ValueError(f"Delay: expected channels to be an int >= 1 or None, got {channels!r}")
        check_max_delay("Delay", max_delay)
        if learnable and max_delay == 0:
            raise ValueError(
                "Delay: expected max_delay >= 1 with learnable=True, got 0, with which no delay can change"
            )
        if backend != "auto":
            named(backend)
        self.channels, self.max_delay, self.rounded = channels, max_delay, bool(rounded)
        self.time_dim, self.channel_dim, self.backend = time_dim, channel_dim, backend
        self._drawn = delay is None
        value = self._start(delay, learnable)
        if learnable:
            self.delay: Any = Bounded(value, "clamp", low=0.0, high=float(max_delay))
        elif isinstance(value, Tensor):
            self.register_buffer("delay", value)
        else:
            self.delay = value

    def _start(self, delay: Number | None, learnable: bool) -> Number:
        """The delays as they are held."""
        shape = () if self.channels is None else (self.channels,)
        if delay is None:
            if not learnable:
                raise ValueError(
                    "Delay: expected delay to be a number or a tensor, got None, which is for learnable=True"
                )
            return torch.empty(shape).uniform_(0.0, float(self.max_delay))
        if isinstance(delay, Tensor):
            whole = not (delay.dtype.is_floating_point or delay.is_complex() or delay.dtype == torch.bool)
            delay = delay.detach().to(torch.float32 if whole else delay.dtype, copy=True)
            if delay.dim() and delay.shape != shape:
                raise ValueError(
                    f"Delay: expected delay to be a number or a tensor of shape [] or {list(shape)}, one a channel, "
                    f"got {checks.describe(delay)}; channels={self.channels}"
                )
        check_delays("Delay", delay, self.max_delay, held=True)
        return torch.full(shape, float(delay)) if learnable and not isinstance(delay, Tensor) else delay

    @property
    def learnable(self) -> bool:
        """Whether the delays are trained."""
        return isinstance(self.delay, Bounded)

    @property
    def least(self) -> int:
        """Whole steps by which everything comes later, whatever is learned: 0 of learned delays."""
        if self.learnable:
            return 0
        steps = _whole(torch.as_tensor(self.delay)) if self.rounded else torch.as_tensor(self.delay)
        return int(steps.min())

    def reset_parameters(self) -> None:
        """Learned delays as they were at first, or drawn anew where they were drawn."""
        if not self.learnable:
            return
        if self._drawn:
            with torch.no_grad():
                self.delay.raw.uniform_(0.0, float(self.max_delay))
        else:
            self.delay.reset_parameters()

    def values(self) -> Number:
        """The delays of the next call, in steps, before they are rounded: with gradient where they are learned."""
        return self.delay() if self.learnable else self.delay

    @torch.no_grad()
    def round_(self) -> Delay:
        """Make every delay a whole number of steps, in place, as ``rounded=True`` does from call to call; the layer."""
        if self.learnable:
            self.delay.raw.copy_(_whole(self.delay()))
        elif isinstance(self.delay, Tensor):
            self.delay.copy_(_whole(self.delay))
        else:
            self.delay = float(_whole(torch.tensor(self.delay, dtype=torch.float64)))
        return self

    def forward(
        self,
        x: Tensor | Spikes,
        v0: Tensor | None = None,
        *,
        return_state: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [T, B, C, ...] delayed, in its dtype (of packed ``Spikes`` the dense ones); with ``return_state`` also the
        state, the last ``max_delay`` steps of the input, [max_delay, B, C, ...] with the steps first. Gradients flow
        through both.

        Args:
            x: any sequence [T, B, C, ...] (the axes are ``time_dim`` and ``channel_dim``).
            v0: the state after the steps before, in x's dtype; None: zeros.
            lengths: int32 or int64 [B], the steps of each sample, 0 to T; None: each has T. What is behind its end is
                not read. y is 0 there, and the state is that at the end. They cost two passes more.
        """
        if is_proxy(x):
            return self(x, v0, return_state=return_state, lengths=lengths)
        x, channel = self._time_first(dense(x))
        held = carrier()
        if held is not None:
            v0 = held.start(self, x, v0)  # type: ignore[assignment]
        y = delay(
            x, self.values(), v0, max_delay=self.max_delay, rounded=self.rounded, channel_dim=channel,
            lengths=lengths, backend=self.backend,
        )  # fmt: skip
        if held is None and not return_state:
            return y.movedim(0, self.time_dim) if self.time_dim else y
        state = state_after(x, v0, self.max_delay, lengths)
        if held is not None:
            held.end(self, state)
        y = y.movedim(0, self.time_dim) if self.time_dim else y
        return (y, state) if return_state else y

    def _time_first(self, x: Tensor) -> tuple[Tensor, int]:
        """x with time moved to the front, and the axis of the channels there."""
        if not isinstance(x, Tensor):
            checks.sequence("Delay", x)
        if x.dim() < 2:
            raise ValueError(
                f"Delay: expected x as a sequence [T, B, C, ...], got {checks.describe(x)}; one step [B, C] goes to "
                "layer.step(x, v), a sequence without a batch to layer(x.unsqueeze(1))"
            )
        time, channel = checks.axis("Delay", "time_dim", self.time_dim, x), self.channel_dim
        if self.channels is not None:
            channel = self._channel(x, time)
        return (x.movedim(time, 0) if time else x), channel

    def _channel(self, x: Tensor, time: int) -> int:
        """The axis of the channels once time has moved to the front."""
        channel = checks.axis("Delay", "channel_dim", self.channel_dim, x)
        if channel == time:
            raise ValueError("Delay: expected channel_dim to differ from time_dim, got the same axis for both")
        if x.shape[channel] != self.channels:
            raise ValueError(
                f"Delay: expected x with {self.channels} channels on axis {self.channel_dim}, got "
                f"{checks.describe(x)}; check channels and channel_dim"
            )
        return channel + (channel < time)

    def check_state(self, who: str, state: Any, x: Tensor) -> None:
        """The state is one of sequences like x, whose time is on axis 0."""
        check_state(who, state, x, self.max_delay)

    def step(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: y [B, C, ...] of x [B, C, ...], and the state [max_delay, B, C, ...], which the next call takes."""
        y, state = self(one_step("Delay", x, self.time_dim), v, return_state=True)
        return y.squeeze(self.time_dim), state

    def backend_for(self, x: Tensor) -> str:
        """The backend that runs this layer on x; for "auto" also why the ones before it do not."""
        case = Case("delay", x.device.type, x.dtype)
        return explain(case) if self.backend == "auto" else resolve(self.backend, case).name

    def extra_repr(self) -> str:
        """The settings, as they would be passed to the constructor."""
        shown = f"{self.channels}, max_delay={self.max_delay}, "
        if not self.learnable:
            one = not isinstance(self.delay, Tensor)
            shown += f"delay={self.delay:g}, " if one else f"delay=tensor{list(self.delay.shape)}, "
        shown += f"learnable={self.learnable}, " + "rounded=True, " * self.rounded
        return shown + f"time_dim={self.time_dim}, channel_dim={self.channel_dim}, backend={self.backend!r}"


def _whole(delays: Tensor) -> Tensor:
    """The nearest whole numbers, 1/2 going up."""
    low = delays.floor()
    return low + (delays - low >= 0.5).to(delays.dtype)
