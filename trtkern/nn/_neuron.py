"""What every neuron layer shares."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from trtkern.backends import explain, named, resolve, sizes
from trtkern.backends.base import Case
from trtkern.nn._leaf import Leaf
from trtkern.nn.bounded import Bounded
from trtkern.ops import checks
from trtkern.ops.checks import Number
from trtkern.ops.lif import LIFOutput, lif
from trtkern.ops.spikes import Spikes, dense
from trtkern.spec import LIFSpec

fx.wrap("dense")


class Neuron(Leaf):
    """What the neurons share: the axes, the backend, the non-finite flag and the call of the op."""

    takes_time = True
    """It takes [T, B, ...] itself (``TimeSequential``)."""

    nonfinite: Tensor
    # Numbers, parameters or buffers of a subclass; properties where one follows from another.
    decay: Any
    gain: Any
    v_leak: Any

    def __init__(self, spec: LIFSpec, time_dim: int, channel_dim: int, backend: str) -> None:
        super().__init__()
        if backend != "auto":
            named(backend)
        self.spec, self.time_dim, self.channel_dim, self.backend = spec, time_dim, channel_dim, backend
        # Set to 1 by the kernel when a potential is not finite: spikes hide NaN from the loss.
        self.register_buffer("nonfinite", torch.zeros(1, dtype=torch.int32), persistent=False)
        self._made_on_meta = self.nonfinite.is_meta

    def reset_parameters(self) -> None:
        """The non-finite flag to 0. Parameters that the layer was given stay; those that it made itself start anew."""
        with torch.no_grad():
            self.nonfinite.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The flag is in no state dict: what leaves it without a value (to_empty, a way from "meta") would leave it so.
        flag = self.nonfinite
        self._buffers["nonfinite"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["nonfinite"] = flag
        self._buffers["nonfinite"] = _moved(flag, fn)
        return self

    def flag_for(self, x: Tensor) -> Tensor:
        """The flag; on x's device if the layer was made on "meta", where ``load_state_dict(assign=True)`` leaves it."""
        if self._made_on_meta and self.nonfinite.is_meta and not x.is_meta:
            self.nonfinite = torch.zeros(1, dtype=torch.int32, device=x.device)
        return self.nonfinite

    def _hold(self, name: str, value: Number | Bounded) -> None:
        """Keep a parameter of the neuron: numbers, a Parameter and a ``Bounded`` as they are, a tensor as a buffer."""
        if isinstance(value, Bounded):
            checks.held_range(type(self).__name__, name, value.low, value.high)
            self.add_module(name, value)
            return
        checks.held_parameter(type(self).__name__, name, value)
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            setattr(self, name, float(value))

    def _run(self, x: Tensor, v0: Tensor | None, values: dict[str, Any], **want: bool) -> LIFOutput:
        """Call the op on x with its time axis moved first, and move it back in what comes out."""
        name = type(self).__name__
        if not isinstance(x, Tensor):
            checks.sequence(name, x)
        warn_of_one_step(name, x)
        time, channel = self.axes(x)
        if time != 0:
            x = x.movedim(time, 0)
        out = lif(
            x, v0, spec=self.spec, backend=self.backend, channel_dim=channel, flag=self.flag_for(x), **values, **want
        )
        if time == 0:
            return out
        moved = {name: t if t is None or name == "state" else t.movedim(0, time) for name, t in out._asdict().items()}
        return LIFOutput(**moved)

    def axes(self, x: Tensor) -> tuple[int, int]:
        """The axis of x that time is on, and the one that the channels are on once time has moved to the front."""
        time, channel = checks.axis(type(self).__name__, "time_dim", self.time_dim, x), self.channel_dim
        # channel_dim names an axis of x as the caller has it.
        if time != 0 and -x.dim() <= channel < x.dim():
            channel = channel % x.dim()
            channel = 0 if channel == time else channel + (channel < time)
        return time, channel

    def step(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: the same numbers as that step of a sequence, bit for bit, for loops over time.

        Args:
            x: input current of one step, [B, C, ...]: a sequence without its time axis.
            v: potential after the step before, float32 in x's shape; None at the start, where it is zero.

        Returns:
            What the layer gives for that step, [B, C, ...] in x's dtype (dense where the layer is ``packed``), and the
            potential after it, float32, which the next call takes. ``time_dim`` and ``channel_dim`` name the axes of a
            sequence, as everywhere.

        Raises:
            TypeError, ValueError: x or v of another shape, dtype or device.
        """
        out, state = self(one_step(type(self).__name__, x, self.time_dim), v, return_state=True)
        return dense(out).squeeze(self.time_dim), state

    def values(self) -> dict[str, Number]:
        """The numbers and tensors of the next call, as ``trtkern.ops.lif`` takes them."""
        raise NotImplementedError

    def _value(self, name: str) -> Any:
        """What a parameter is at this moment."""
        held = getattr(self, name)
        return held() if isinstance(held, Bounded) else held

    def _bias(self, decay: Number) -> Number:
        """(1 - decay) * v_leak: plain torch outside the op, so autograd closes the chain."""
        v_leak = self._value("v_leak")
        if isinstance(v_leak, float) and v_leak == 0.0:
            return 0.0
        return (1 - wide(decay)) * wide(v_leak)

    def backend_for(self, x: Tensor) -> str:
        """The backend that runs this layer on x; for "auto" also why the ones before it do not."""
        measured = (0, 0, 0) if getattr(self, "packed", False) else sizes(x.movedim(self.time_dim, 0))
        case = Case("lif", x.device.type, x.dtype, self.spec, *measured)
        return explain(case) if self.backend == "auto" else resolve(self.backend, case).name

    def _settings(self) -> dict[str, object]:
        return {}

    def extra_repr(self) -> str:
        """The settings, as they would be passed to the constructor."""
        settings = {**self._settings(), "time_dim": self.time_dim, "channel_dim": self.channel_dim}
        shown = [f"{name}={_shown(value)}" for name, value in settings.items()]
        return ", ".join([*shown, f"backend={self.backend!r}"])


def wide(value: Any) -> Any:
    """A parameter as arithmetic takes it: half precision as float32; all else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype.itemsize < 4 else value


def _moved(flag: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """fn(flag) with the flag's value; 0 where that was on "meta", from where torch copies nothing."""
    try:
        moved = fn(flag)
    except NotImplementedError:
        return fn(torch.zeros_like(flag, device="cpu"))
    if moved is not flag and not moved.is_meta:
        with torch.no_grad():
            moved.copy_(flag) if not flag.is_meta else moved.zero_()
    return moved


@fx.wrap
def one_step(op: str, x: Tensor, time_dim: int) -> Tensor:
    """x [B, C, ...] as a sequence of one step."""
    checks.one_step(op, x)
    return x.unsqueeze(time_dim)


def warn_of_one_step(name: str, x: Tensor) -> None:
    """A UserWarning, once a place of the caller's code, where x has too few axes for a sequence [T, B, C]."""
    if x.dim() not in (1, 2) or torch.compiler.is_compiling():
        return
    # The caller's own line: layers of torch and of this package stand between.
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_HOUSES):
        frame, level = frame.f_back, level + 1
    axes = "one axis" if x.dim() == 1 else f"{x.dim()} axes"
    warnings.warn(
        f"{name}: expected x as a sequence [T, B, C, ...], got {axes}, the first of which is taken for time; one step "
        "[B, C] goes to layer.step(x, v) or, alone, to layer(x.unsqueeze(0)), a sequence without a batch to "
        "layer(x.unsqueeze(1))",
        stacklevel=level,
    )


_HOUSES = tuple(os.path.join(os.path.dirname(m.__file__ or ""), "") for m in (torch, sys.modules["trtkern"]))


def spikes_of(out: LIFOutput) -> Tensor | Spikes:
    """The spikes of an op, with their words where it made them."""
    if out.spikes is None:
        raise RuntimeError("expected an op that was asked for spikes, got none")
    return out.spikes if out.packed is None else Spikes(out.spikes, out.packed)


def _shown(value: object) -> str:
    if isinstance(value, Bounded):
        return f"Bounded{list(value.raw.shape)}"
    if isinstance(value, Tensor):
        kind = "Parameter" if isinstance(value, nn.Parameter) else "tensor"
        return f"{kind}{list(value.shape)}"
    return f"{value:g}" if isinstance(value, float) else repr(value)
