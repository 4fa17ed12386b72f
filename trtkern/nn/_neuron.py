"""What every neuron layer shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trtkern.backends import explain, named, resolve
from trtkern.backends.base import Case
from trtkern.ops import _check
from trtkern.ops._check import Number
from trtkern.ops.lif import LIFOutput, lif
from trtkern.ops.spikes import Spikes
from trtkern.spec import LIFSpec


class Neuron(nn.Module):
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

    def _hold(self, name: str, value: Number) -> None:
        """Keep a parameter of the neuron: a number as it is, a Parameter as such, any other tensor as a buffer."""
        _check.held_parameter(type(self).__name__, name, value)
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
            _check.sequence(name, x)
        time = _check.axis(name, "time_dim", self.time_dim, x)
        channel = self.channel_dim
        if time != 0:
            # channel_dim names an axis of x as the caller has it.
            if -x.dim() <= channel < x.dim():
                channel = channel % x.dim()
                channel = 0 if channel == time else channel + (channel < time)
            x = x.movedim(time, 0)
        spikes, state, v, packed = lif(
            x, v0, spec=self.spec, backend=self.backend, channel_dim=channel, flag=self.nonfinite, **values, **want
        )
        if time != 0:
            spikes, v, packed = (t if t is None else t.movedim(0, time) for t in (spikes, v, packed))
        return LIFOutput(spikes, state, v, packed)

    def _bias(self) -> Number:
        """(1 - decay) * v_leak: plain torch outside the op, so autograd closes the chain."""
        if isinstance(self.v_leak, float) and self.v_leak == 0.0:
            return 0.0
        return (1 - self.decay) * self.v_leak

    def backend_for(self, x: Tensor) -> str:
        """The backend that runs this layer on x; for "auto" also why the ones before it do not."""
        case = Case("lif", x.device.type, x.dtype, self.spec)
        return explain(case) if self.backend == "auto" else resolve(self.backend, case).name

    def _settings(self) -> dict[str, object]:
        return {}

    def extra_repr(self) -> str:
        """The settings, as they would be passed to the constructor."""
        settings = {**self._settings(), "time_dim": self.time_dim, "channel_dim": self.channel_dim}
        shown = [f"{name}={_shown(value)}" for name, value in settings.items()]
        return ", ".join([*shown, f"backend={self.backend!r}"])


def spikes_of(out: LIFOutput) -> Tensor | Spikes:
    """The spikes of an op, with their words where it made them."""
    if out.spikes is None:
        raise RuntimeError("expected an op that was asked for spikes, got none")
    return out.spikes if out.packed is None else Spikes(out.spikes, out.packed)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        kind = "Parameter" if isinstance(value, nn.Parameter) else "tensor"
        return f"{kind}{list(value.shape)}"
    return f"{value:g}" if isinstance(value, float) else repr(value)
