"""What every neuron layer shares."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from trtkern import neurons
from trtkern.backends import explain, named, resolve, sizes
from trtkern.backends.base import Case
from trtkern.nn._calls import Calls
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn.bounded import Bounded
from trtkern.ops import checks
from trtkern.ops._prepared import WANT_H, WANT_SPIKES, WANT_STATE, WANT_V
from trtkern.ops.checks import Number
from trtkern.ops.lif import LIFOutput, wanted
from trtkern.ops.lif import neuron as run_neuron
from trtkern.ops.spikes import Spikes, dense, packing
from trtkern.spec import LIFSpec

fx.wrap("dense")

AnyState = Tensor | tuple[Tensor, ...] | None
"""What a layer returns as its state and takes as ``v0``: the potential, or several states; None is zero."""


class Carrier(Protocol):
    """Holds the states of a model's neurons and delays from one call of the model to the next
    (``trtkern.nn.streams``)."""

    def start(self, layer: Any, x: Tensor, v0: AnyState) -> AnyState:
        """What a call of the layer on x, time on axis 0, starts from; v0: what the caller gave."""

    def end(self, layer: Any, state: AnyState) -> None:
        """Where that call ended."""


carriers: ContextVar[Carrier | None] = ContextVar("carriers", default=None)
"""Set while a stream calls its model."""


def carrier() -> Carrier | None:
    """Who holds the states of the call that this one is part of; None: its caller does, as ever."""
    return None if torch.compiler.is_compiling() else carriers.get()


class NeuronLayer(Leaf):
    """What the neurons share: the axes, the backend, the non-finite flag and the call of the op."""

    takes_time = True
    """It takes [T, B, ...] itself (``TimeSequential``)."""
    takes_lengths = True
    """And ``lengths``, the steps of each sample."""

    kind = "LIF"
    """The neuron that it runs, by its name in ``trtkern.neurons.TABLE``."""
    State: type[Any] | None = None
    """The NamedTuple of its states, of a neuron with several."""
    complements: tuple[tuple[str, str], ...] = ()
    """Parameters that are 1 - a decay where they are None: (name, that decay)."""

    _step_wants = WANT_SPIKES + WANT_STATE

    nonfinite: Tensor
    _own: tuple[str, ...]
    """What a spiking neuron takes beside ``Spiking``'s, and a readout takes in all."""

    def __init__(self, spec: LIFSpec, time_dim: int, channel_dim: int, backend: str) -> None:
        super().__init__()
        if backend != "auto":
            named(backend)
        self.spec, self.time_dim, self.channel_dim, self.backend = spec, time_dim, channel_dim, backend
        # Set to 1 by the kernel when a potential is not finite: spikes hide NaN from the loss.
        self.register_buffer("nonfinite", torch.zeros(1, dtype=torch.int32), persistent=False)
        self._made_on_meta = self.nonfinite.is_meta
        self._calls = Calls()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_calls", Calls())

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of its states, in the order in which ``return_state`` gives them."""
        return self.spec.row.states

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
        flag = self._buffers["nonfinite"]  # at a tenth of the price of self.nonfinite
        assert flag is not None
        if self._made_on_meta and flag.is_meta and not x.is_meta:
            self.nonfinite = flag = torch.zeros(1, dtype=torch.int32, device=x.device)
        return flag

    def _hold(self, name: str, value: Number | Bounded) -> None:
        """Keep a parameter of the neuron: numbers, a Parameter and a ``Bounded`` as they are, a tensor as a buffer."""
        if isinstance(value, Bounded):
            checks.held_range(type(self).__name__, name, value.low, value.high)
        else:
            checks.held_parameter(type(self).__name__, name, value)
        self._put(name, value)

    def _put(self, name: str, value: Number | Bounded) -> None:
        if isinstance(value, Bounded):
            self.add_module(name, value)
        elif isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            setattr(self, name, float(value))

    def _hold_all(self, values: Mapping[str, Number | Bounded | None]) -> None:
        """Keep them one by one; None is what follows from others (``values``)."""
        for name, value in values.items():
            if value is None:
                setattr(self, name, None)
            else:
                self._hold(name, value)

    def stacked(self, x: Tensor, state: Any) -> Tensor | None:
        """A state as the op takes it: of a neuron with several that is one tensor [S, ...].

        Args:
            x: the sequence with time on axis 0.
            state: what ``return_state`` gave, its parts as a plain tuple, or that one tensor.

        Raises:
            TypeError, ValueError: another count, or a part of another shape, dtype or device; the message names it.
        """
        if self.State is None or not isinstance(state, (tuple, list)) or not isinstance(x, Tensor):
            return state
        checks.states(type(self).__name__, state, x, self.state_names)
        return torch.stack(tuple(state))

    def named_state(self, state: AnyState) -> AnyState:
        """The op's state as ``return_state`` gives it: several as a NamedTuple."""
        if state is None or self.State is None or isinstance(state, tuple):
            return state
        return self.State(*[state[i] for i in range(len(self.state_names))])

    def _run(
        self, x: Tensor, v0: AnyState, want: int, lengths: Tensor | None, on_equal: bool = False
    ) -> LIFOutput:  # fmt: skip
        """Call the op on x with its time axis moved first, and move it back in what comes out."""
        if not isinstance(x, Tensor):
            checks.sequence(type(self).__name__, x)
        if x.dim() < 3:
            warn_of_one_step(type(self).__name__, x)
        time, channel = (0, self.channel_dim) if self.time_dim == 0 else self.axes(x)
        if time != 0:
            x = x.movedim(time, 0)
        held = carrier()
        asked = want
        if held is not None:
            v0, asked = held.start(self, x, v0), want | WANT_STATE
        made = None
        if lengths is None and not torch.compiler.is_compiling():
            made = self._calls.again(self, x, v0, asked)
        if made is None:
            out = self._anew(x, v0, asked, channel, on_equal, lengths)
        else:
            out = self.outputs(made, asked)
        if held is not None:
            last = self.named_state(out.state)
            held.end(self, last)
            out = out._replace(state=last if want & WANT_STATE else None)  # type: ignore[arg-type]
        if time == 0:
            return out
        moved = {name: t if t is None or name == "state" else t.movedim(0, time) for name, t in out._asdict().items()}
        return LIFOutput(**moved)

    def _shortly(self, x: Tensor) -> Tensor | None:
        """The spikes of the common call, if one before was like it."""
        if self.time_dim != 0 or carriers.get() is not None or type(x) is not Tensor or x.dim() < 3:
            return None
        spikes: Tensor | None = self._calls.again(self, x, None, WANT_SPIKES)
        return spikes

    def _anew(
        self, x: Tensor, v0: AnyState, want: int, channel: int, on_equal: bool, lengths: Tensor | None
    ) -> LIFOutput:  # fmt: skip
        """The same for a call that none before was like."""
        state, flag, values = None if v0 is None else self.stacked(x, v0), self.flag_for(x), self.values()
        out = run_neuron(x, state, values, self.spec, want, self.backend, channel, on_equal, flag, lengths)
        if lengths is None and not torch.compiler.is_compiling():
            self._calls.keep(self, x, v0, want, channel, on_equal, values=values)
        return out

    def outputs(self, made: Any, want: int) -> LIFOutput:
        """What a call gave that was made again, by name."""
        if want == WANT_SPIKES:
            return LIFOutput(made, None, None, None)
        parts = iter(made if isinstance(made, tuple) else (made,))
        s = next(parts) if want & WANT_SPIKES else None
        v = next(parts) if want & (WANT_V | WANT_H) else None
        state: Any = None
        if want & WANT_STATE:
            state = next(parts) if self.State is None else self.State(*parts)
        return LIFOutput(s, state, v if want & WANT_V else None, None, v if want & WANT_H else None)

    def axes(self, x: Tensor) -> tuple[int, int]:
        """The axis of x that time is on, and the one that the channels are on once time has moved to the front."""
        time, channel = checks.axis(type(self).__name__, "time_dim", self.time_dim, x), self.channel_dim
        # channel_dim names an axis of x as the caller has it.
        if time != 0 and -x.dim() <= channel < x.dim():
            channel = channel % x.dim()
            channel = 0 if channel == time else channel + (channel < time)
        return time, channel

    def step(self, x: Tensor, v: AnyState = None) -> tuple[Tensor, Any]:
        """One step: the same numbers as that step of a sequence, bit for bit, for loops over time.

        Args:
            x: input current of one step, [B, C, ...]: a sequence without its time axis.
            v: potential after the step before, float32 in x's shape; None at the start, where it is zero. Of a neuron
                with several states all of them, as the call before returned them.

        Returns:
            What the layer gives for that step, [B, C, ...] in x's dtype (dense where the layer is ``packed``), and the
            potential (the states) after it, float32, which the next call takes. ``time_dim`` and ``channel_dim`` name
            the axes of a sequence, as everywhere.

        Raises:
            TypeError, ValueError: x or v of another shape, dtype or device.
        """
        if not torch.compiler.is_compiling() and carriers.get() is None:
            made = self._calls.again(self, x, v, self._step_wants, True)
            if made is not None:
                return made if self.State is None else (made[0], self.State(*made[1:]))
        out, state = self(one_step(type(self).__name__, x, self.time_dim), v, return_state=True)
        if self.time_dim == 0 and not torch.compiler.is_compiling() and not is_proxy(x):
            on_equal = getattr(self, "fire_on_equal", False)
            self._calls.keep(self, x, v, self._step_wants, self.channel_dim, on_equal, True)
        return dense(out).squeeze(self.time_dim), state

    def values(self) -> dict[str, Number]:
        """The numbers and tensors of the next call by name, as ``trtkern.ops.lif.neuron`` takes them."""
        params, found, numbers = self.spec.row.params, {}, self.__dict__
        for name in params:
            if name != "bias":
                # What is in no other place is a number.
                found[name] = numbers[name] if name in numbers else self._value(name)
        for name, decay in self.complements:
            if found[name] is None:
                found[name] = 1 - wide(found[decay])
        if "bias" in params:
            found["bias"] = 0.0 if numbers.get("v_leak") == 0.0 else self._bias(found["decay"])
        # With the soft reset that has no potential, and an amount only where it was given.
        if found["reset_amount"] is None:
            found["reset_amount"] = found["v_threshold"]
        if "v_reset" in found and found["v_reset"] is None:
            found["v_reset"] = 0.0
        return found

    def _value(self, name: str) -> Any:
        """What a parameter is at this moment."""
        held = getattr(self, name)
        return held() if isinstance(held, Bounded) else held

    def _bias(self, decay: Number) -> Number:
        """(1 - decay) * v_leak: plain torch outside the op, so autograd closes the chain."""
        return (1 - wide(decay)) * wide(self._value("v_leak"))

    def backend_for(self, x: Tensor, lengths: Tensor | None = None) -> str:
        """The backend that runs this layer on x; for "auto" also why the ones before it do not."""
        measured = (0, 0, 0) if getattr(self, "packed", False) else sizes(x.movedim(self.time_dim, 0))
        case = Case("lif", x.device.type, x.dtype, self.spec, *measured, lengths is not None)
        return explain(case) if self.backend == "auto" else resolve(self.backend, case).name

    def _settings(self) -> dict[str, object]:
        return {}

    def extra_repr(self) -> str:
        """The settings, as they would be passed to the constructor."""
        settings = {**self._settings(), "time_dim": self.time_dim, "channel_dim": self.channel_dim}
        shown = [f"{name}={_shown(value)}" for name, value in settings.items()]
        return ", ".join([*shown, f"backend={self.backend!r}"])


def has_state(layer: Any) -> bool:
    """Whether it is a layer with a state of its own: it can be given, returned, and carried by a ``Stream``."""
    return isinstance(layer, Leaf) and hasattr(layer, "state_names")


def feeds_back(layer: Any) -> bool:
    """Whether it is a ``Recurrent`` around neurons; its file is imported where somebody asks for it."""
    return isinstance(getattr(layer, "neuron", None), NeuronLayer)


class Spiking(NeuronLayer):
    """What the spiking neurons share: threshold, reset, surrogate, outputs. A subclass has what its row has besides."""

    still_threshold = True
    """Its threshold is ``v_threshold`` alone: there is a number before it (``fire_on_equal``)."""

    def __init__(
        self,
        own: Mapping[str, Number | Bounded | None] = MappingProxyType({}),
        /,
        *,
        v_threshold: Number | Bounded = 1.0,
        v_reset: Number | Bounded | None = 0.0,
        reset_amount: Number | Bounded | None = None,
        surrogate: str | Callable = "triangle",
        alpha: float | None = None,
        detach_reset: bool = False,
        fire_on_equal: bool = False,
        packed: bool = False,
        time_dim: int = 0,
        channel_dim: int = 2,
        backend: str = "auto",
    ) -> None:
        reset, name = "soft" if v_reset is None else "hard", type(self).__name__
        possible = neurons.lookup(self.kind).settle
        if reset not in possible:
            raise ValueError(f"{name}: expected v_reset=None (its reset is {' or '.join(possible)}), got {v_reset!r}")
        spec = LIFSpec(reset, surrogate, alpha, detach_reset, self.kind)
        super().__init__(spec, time_dim, channel_dim, backend)
        if reset == "hard" and reset_amount is not None:
            raise ValueError(
                f"{name}: expected reset_amount with a soft reset only, got reset_amount="
                f"{reset_amount!r} and v_reset={v_reset!r}; pass v_reset=None"
            )
        self.packed, self.fire_on_equal, self._own = packed, fire_on_equal, tuple(own)
        self._hold_all(own)
        self._hold("v_threshold", v_threshold)
        if fire_on_equal and not self.still_threshold:
            raise ValueError(f"{name}: expected fire_on_equal=False, since the threshold adapts, got {fire_on_equal!r}")
        if fire_on_equal:
            checks.above_zero(name, self._value("v_threshold"))
        self._hold_all({"v_reset": v_reset, "reset_amount": reset_amount})

    def forward(
        self,
        x: Tensor,
        v0: AnyState = None,
        *,
        return_state: bool = False,
        return_v: bool = False,
        return_h: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor | Spikes | tuple[Any, ...]:
        """Spikes [T, B, C, ...] in x's dtype (``Spikes`` when packed); with ``return_state`` also the final v,
        [B, C, ...] float32; with ``return_v`` also v after the reset of every step, or with ``return_h`` h before it
        (what snnTorch calls ``mem``), [T, B, C, ...] in x's dtype; gradients flow through all of them.

        Args:
            x: input current [T, B, C, ...] (the axes are ``time_dim`` and ``channel_dim``).
            v0: potential before the first step, x's shape without time, float32; None is zero.
            lengths: int32 or int64 [B], the steps of each sample, 0 to T; None: each has T. What is behind its end is
                not read. The outputs are 0 there, no gradient comes from there, and the state stays that at the end.

        A neuron with several states (``state_names``) returns the final ones as a NamedTuple, and takes that, a plain
        tuple or one tensor [S, B, C, ...] as ``v0``.
        """
        if is_proxy(x):
            return self(x, v0, return_state=return_state, return_v=return_v, return_h=return_h, lengths=lengths)
        if (
            v0 is None
            and lengths is None
            and not (return_state or return_v or return_h or torch.compiler.is_compiling())
        ):
            spikes = self._shortly(x)
            if spikes is not None:
                return spikes
        want = wanted(True, return_v, return_state, packing(self.packed), return_h)
        out = self._run(x, v0, want, lengths, self.fire_on_equal)
        if not (return_state or return_v or return_h):
            return spikes_of(out)
        made = tuple(each for each in (spikes_of(out), self.named_state(out.state), out.v, out.h) if each is not None)
        return made

    def _settings(self) -> dict[str, object]:
        names = (*self._own, "v_threshold", "v_reset", "reset_amount")
        spec = self.spec
        return {
            **{name: getattr(self, name) for name in names},
            "surrogate": spec.surrogate,
            "alpha": spec.alpha,
            "detach_reset": spec.detach_reset,
            **{name: True for name in ("fire_on_equal", "packed") if getattr(self, name)},
        }


class Readout(NeuronLayer):
    """What the neurons without spikes share: their output is v of every step."""

    _step_wants = WANT_V + WANT_STATE

    # There is no reset: these numbers change nothing.
    reset_amount = v_threshold = 1.0
    v_reset = 0.0

    def __init__(
        self, own: Mapping[str, Number | Bounded | None], time_dim: int, channel_dim: int, backend: str
    ) -> None:
        super().__init__(LIFSpec("none", neuron=self.kind), time_dim, channel_dim, backend)
        self._own = tuple(own)
        self._hold_all(own)

    def forward(
        self, x: Tensor, v0: AnyState = None, *, return_state: bool = False, lengths: Tensor | None = None
    ) -> Tensor | tuple[Any, ...]:
        """v of every step, [T, B, C, ...] in x's dtype; with ``return_state`` also the last one (of a neuron with
        several states all of the last ones, as a NamedTuple) in float32. ``lengths`` are those of ``LIF``."""
        if is_proxy(x):
            return self(x, v0, return_state=return_state, lengths=lengths)
        out = self._run(x, v0, wanted(False, True, return_state, False), lengths)
        made = tuple(each for each in (out.v, self.named_state(out.state)) if each is not None)
        return made if len(made) > 1 else made[0]

    def _settings(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._own}


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
    """A UserWarning, once a place of the caller's code: x has too few axes for a sequence [T, B, C]."""
    if x.dim() == 0 or torch.compiler.is_compiling():
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
