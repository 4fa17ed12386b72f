"""The validation gate: every tensor passes here before its address is taken, every number before it is used.

Shapes, dtypes, devices and Python numbers are always checked. Values inside tensors are checked on the CPU; on a GPU
that would be a synchronisation, and is done under ``trtkern.debug()`` only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trtkern.backends.base import PARAMS
from trtkern.ops._beneath import look

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Number = float | int | Tensor
LARGEST = torch.finfo(torch.float32).max
"""The kernels compute in float32: a larger number is infinite to them."""

_debugging = False


@contextmanager
def debug() -> Iterator[None]:
    """Inside: values in GPU tensors are checked as well, and a non-finite potential raises at once.

    Each check waits for the device: for finding a fault, not for training.
    """
    global _debugging
    before, _debugging = _debugging, True
    try:
        yield
    finally:
        _debugging = before


def debugging() -> bool:
    """Whether ``trtkern.debug()`` is active."""
    return _debugging


def is_distributed(value: object) -> bool:
    """Whether it is a tensor that lies on several processes in parts: a DTensor, of which its module must know."""
    if type(value) is Tensor or type(value) is torch.nn.Parameter or not isinstance(value, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def describe(value: object) -> str:
    """A tensor as its kind, shape, dtype and device, a tuple or list of some part by part; else its repr and type."""
    if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
        return f"a {type(value).__name__} of {' and '.join(describe(part) for part in value)}"
    if not isinstance(value, Tensor):
        return f"{value!r} ({type(value).__name__})"
    if value.is_nested:  # of no one shape
        return f"a nested tensor of {value.size(0)} parts, {value.dtype}, on {value.device}"
    kind = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.').strip('_')} "
    kind = "distributed " if is_distributed(value) else kind
    return f"a {kind}tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"


def plain(op: str, name: str, value: Tensor) -> None:
    """A tensor of real numbers that lie in memory one by one, or a TypeError that says how to make one of it.

    The others have no address of a first element, or none that means anything to a kernel.
    """
    if value.is_nested:
        remedy = f"pad it with torch.nested.to_padded_tensor({name}, 0.0)"
    elif value.layout != torch.strided:
        remedy = f"convert it with {name}.to_dense()"
    elif value.is_quantized:
        remedy = f"convert it with {name}.dequantize()"
    elif value.is_complex():
        remedy = f"take {name}.real, or {name}.abs()"
    elif is_distributed(value):
        remedy = f"take {name}.full_tensor(), the whole of it, or {name}.to_local(), the part of this process"
    else:
        return
    raise TypeError(f"{op}: expected {name} to be a dense tensor of real numbers, got {describe(value)}; {remedy}")


def sequence(op: str, x: Tensor) -> None:
    """x is a floating tensor [T, ...] with T >= 1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a tensor [T, ...], got {describe(x)}")
    plain(op, "x", x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: expected x in float32, bfloat16, float16 or float64, got {describe(x)}; convert it with x.float()"
        )
    if x.dim() < 1 or x.shape[0] < 1:
        raise ValueError(f"{op}: expected x as [T, ...] with T >= 1, got {describe(x)}; put the time axis first")


def one_step(op: str, x: Tensor) -> None:
    """x is a floating tensor [B, ...], one step of a sequence."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}.step: expected x to be a tensor [B, C, ...], one step, got {describe(x)}")
    if x.dim() < 1:
        raise ValueError(f"{op}.step: expected x as [B, C, ...], one step, got {describe(x)}")


def state(op: str, v0: Tensor | None, x: Tensor, states: Sequence[str] = ("v",)) -> None:
    """v0 is None or a float32 (float64 for float64 x) tensor of x[0]'s shape, on x's device; of a neuron with several
    states [S, ...]."""
    if v0 is None:
        return
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (*[len(states)] * (len(states) > 1), *x.shape[1:])
    if not isinstance(v0, Tensor):
        value = v0 if isinstance(v0, (int, float)) else "..."
        raise TypeError(
            f"{op}: expected v0 to be a {dtype} tensor of shape {shape} or None, which is zero, got "
            f"{describe(v0)}; make one with torch.full({shape}, {value}, dtype={dtype}, "
            f"device={str(x.device)!r})"
        )
    if not is_distributed(x):
        plain(op, "v0", v0)
    if v0.dtype != dtype:
        raise TypeError(f"{op}: expected v0 to be a {dtype} tensor, got {describe(v0)}; convert it with v0.to({dtype})")
    if v0.shape != shape or v0.device != x.device:
        rows = f", after an axis for {', '.join(states)}" if len(states) > 1 else ""
        raise ValueError(
            f"{op}: expected v0 of shape {shape} on {x.device}, got {describe(v0)}; "
            f"v0 is one step without the time axis{rows}"
        )


def states(op: str, parts: Sequence[Tensor], x: Tensor, names: Sequence[str]) -> None:
    """The parts of a state are one tensor for each of the names, each as ``state`` has it."""
    listed = ", ".join(names)
    if len(parts) != len(names):
        raise ValueError(
            f"{op}: expected v0 with the {len(names)} states {listed}, got {len(parts)}: {describe(parts)}; pass what "
            "return_state=True gave"
        )
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"{op}: expected the state {name} of v0 to be a tensor, got {describe(part)}")
        state(f"{op}: state {name}", part, x)


def lengths(op: str, lengths: Tensor | None, x: Tensor) -> None:
    """The steps of each sample of x [T, B, ...] are None or an int32 or int64 tensor [B] on x's device."""
    if lengths is None:
        return
    cure = "torch.tensor([...]), the number of steps of each sample"
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: expected lengths to be an int32 or int64 tensor, got {describe(lengths)}; pass {cure}")
    plain(op, "lengths", lengths)
    if x.dim() < 2 or lengths.shape != (x.shape[1],):
        wanted = "x as [T, B, ...] with lengths" if x.dim() < 2 else f"lengths of shape ({x.shape[1]},), one a sample"
        raise ValueError(f"{op}: expected {wanted}, got {describe(lengths)} with x {tuple(x.shape)}; pass {cure}")
    if lengths.device != x.device:
        raise ValueError(
            f"{op}: expected lengths on {x.device} like x, got {describe(lengths)}; move it with lengths.to(x.device)"
        )


def length_values(op: str, lengths: Tensor, x: Tensor) -> None:
    """Each of the lengths is 0 to T; looked at where that does not wait for a GPU."""
    if torch.compiler.is_compiling() or not (lengths.device.type == "cpu" or _debugging) or not lengths.numel():
        return
    steps = x.shape[0]

    def within(lengths: Tensor) -> None:
        low, high = (int(end) for end in lengths.aminmax())
        if low < 0 or high > steps:
            raise ValueError(
                f"{op}: expected lengths of 0 to T = {steps} steps, got {low if low < 0 else high}; a sample ends "
                "within the sequence that it is padded to"
            )

    look(within, lengths)


def flag(op: str, flag: Tensor | None, x: Tensor) -> None:
    """The non-finite flag is None or int32 [1] on x's device: a kernel writes to its address."""
    if flag is None:
        return
    if isinstance(flag, Tensor):
        plain(op, "flag", flag)
    if not isinstance(flag, Tensor) or flag.dtype != torch.int32 or flag.shape != (1,):
        raise TypeError(f"{op}: expected flag to be an int32 tensor of shape (1,), got {describe(flag)}")
    if flag.device != x.device:
        raise ValueError(
            f"{op}: expected flag on {x.device} like x, got {describe(flag)}; move the layer with layer.to(x.device)"
        )


def axis(op: str, name: str, dim: int, x: Tensor) -> int:
    """``dim`` as a non-negative axis of x."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: expected {name} to be an int, got {describe(dim)}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: expected {name} to be an axis of x, got {name}={dim} for {describe(x)}")
    return dim % x.dim()


Ranges = Mapping[str, tuple[float, float]] | None
"""Of the parameters of a user's own neuron, from where to where; None: that follows from their names."""


def parameters(op: str, values: Mapping[str, Number], ranges: Ranges = None) -> None:
    """The parameters of a neuron: numbers that float32 holds, or floating tensors of rank 0 or 1; decay in [0, 1],
    threshold >= 0, or as the ranges say.

    The threshold comes first: where it stands in for the reset amount it is the one to be named.
    """
    for name, value in sorted(values.items(), key=lambda item: item[0] != "v_threshold"):
        if isinstance(value, Tensor):
            plain(op, name, value)
            if not value.dtype.is_floating_point or value.dim() > 1 or value.numel() == 0:
                raise ValueError(
                    f"{op}: expected {name} to be a number or a floating tensor of shape [] or [C], "
                    f"got {describe(value)}"
                )
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: expected {name} to be a number or a tensor, got {describe(value)}")
        else:
            _within(op, name, value, value, ranges=ranges)


def held_parameter(op: str, name: str, value: Number, ranges: Ranges = None) -> None:
    """A parameter that a layer is constructed with: also the values of a tensor, wherever it is."""
    parameters(op, {name: value}, ranges)
    if isinstance(value, Tensor) and value.device.type != "meta":

        def within(value: Tensor) -> None:
            low, high = (end.item() for end in value.aminmax())
            _within(op, name, low, high, ranges=ranges)

        look(within, value.detach())


def _is_decay(name: str) -> bool:
    """Whether a parameter of that name lies within [0, 1]: ``decay``, ``decay_syn``, ..."""
    return name == "decay" or name.startswith("decay_")


def _divides(name: str) -> bool:
    """Whether a parameter of that name lies above 0: ``tau``, ``tau_w``, ..., and ``delta_t``."""
    return name in ("tau", "delta_t") or name.startswith("tau_")


def held_range(op: str, name: str, low: float, high: float, ranges: Ranges = None) -> None:
    """The range of a bounded parameter is one of allowed values; its ends may be infinite where those may."""
    least = 0.0 if name == "v_threshold" or _divides(name) else -math.inf
    allowed = (0.0, 1.0) if _is_decay(name) else (least, math.inf)
    if ranges is not None:
        allowed = ranges.get(name, (-math.inf, math.inf))
    if not allowed[0] <= low <= high <= allowed[1]:
        raise ValueError(
            f"{op}: expected {name} to be bounded within {allowed[0]:g} to {allowed[1]:g}, got {low:g} to {high:g}; "
            "pass low and high to Bounded"
        )


def above_zero(op: str, threshold: Number) -> None:
    """The threshold of a neuron that fires on equal, where looking at it costs no synchronisation."""
    if isinstance(threshold, Tensor):
        if torch.compiler.is_compiling() or not (threshold.device.type == "cpu" or _debugging):
            return
        look(lambda threshold: above_zero(op, threshold.min().item()), threshold.detach())
    elif not threshold > 0:
        raise ValueError(
            f"{op}: expected v_threshold to be > 0 with fire_on_equal, got {threshold!r}: the number before 0 is "
            "denormal, and a processor may take it for 0"
        )


def held_now(op: str, name: str, value: Number) -> None:
    """The value of this moment of a parameter that another one is made of, where looking at it is cheap."""
    if not isinstance(value, Tensor):
        _within(op, name, value, value)
    elif not torch.compiler.is_compiling() and (value.device.type == "cpu" or _debugging):
        hint = "; a learned one stays there as trtkern.nn.Bounded"
        look(lambda value: _within(op, name, value.min().item(), value.max().item(), hint), value.detach())


def parameter_values(op: str, params: Tensor | None, names: Sequence[str] = PARAMS, ranges: Ranges = None) -> None:
    """The values of a [P, C] parameter tensor, where looking at them costs no synchronisation; what torch compiles or
    exports has none yet."""
    if params is None or torch.compiler.is_compiling() or not (params.device.type == "cpu" or _debugging):
        return
    look(lambda params: _rows_within(op, params, names, ranges), params.detach())


def _rows_within(op: str, params: Tensor, names: Sequence[str], ranges: Ranges) -> None:
    if params.dim() > 2:
        params = params.movedim(-2, 0).flatten(1)
    low, high = params.aminmax(dim=1)
    rows = list(zip(names, low.tolist(), high.tolist(), strict=True))
    if any(_expected(*row, ranges) for row in rows):
        for name, lowest, highest in sorted(rows, key=lambda row: row[0] != "v_threshold"):
            _within(op, name, lowest, highest, "; a learned one stays there as trtkern.nn.Bounded", ranges)


def allowed(name: str) -> str:
    """The range of a parameter besides that it is finite in float32: "[0, 1]", ">= 0", "> 0" or ""."""
    return "[0, 1]" if _is_decay(name) else ">= 0" if name == "v_threshold" else "> 0" if _divides(name) else ""


def _within(op: str, name: str, low: float, high: float, hint: str = "", ranges: Ranges = None) -> None:
    if expected := _expected(name, low, high, ranges):
        came = repr(low) if low == high or low != low else f"values from {low!r} to {high!r}"
        raise ValueError(f"{op}: expected {name} to be {expected}, got {came}{hint}")


def _expected(name: str, low: float, high: float, ranges: Ranges = None) -> str | None:
    """What the values of a parameter should be where they are not, in the words of the errors; else None."""
    expected = None
    if not (abs(low) < math.inf and abs(high) < math.inf):
        expected = "finite"
    elif max(abs(low), abs(high)) > LARGEST:
        expected = f"finite in float32, at most {LARGEST:.1e}"
    elif ranges is not None:
        least, most = ranges.get(name, (-math.inf, math.inf))
        expected = None if least <= low <= high <= most else f"from {least:g} to {most:g}"
    elif _is_decay(name) and not 0 <= low <= high <= 1:
        expected = "in [0, 1]"
    elif name == "v_threshold" and low < 0:
        expected = ">= 0"
    elif _divides(name) and low <= 0:
        expected = "> 0"
    return expected


def channel_axis(op: str, values: Mapping[str, Number], channel_dim: int, x: Tensor) -> int | None:
    """The axis that the tensors with more than one value belong to, None if there are none.

    Every tensor among the values has one value, or one a channel, on x's device.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    found, count = None, 1
    if any(value.numel() > 1 for value in tensors.values()):
        found = axis(op, "channel_dim", channel_dim, x)
        if found == 0:
            raise ValueError(f"{op}: expected channel_dim to differ from the time axis, got the time axis for both")
        count = x.shape[found]
    for name, value in tensors.items():
        if value.numel() != 1 and value.numel() != count:  # "not in" is no comparison of symbols to torch.compile
            raise ValueError(
                f"{op}: expected {name} to have 1 or {count} values (the channels of x), got {describe(value)} for "
                f"{describe(x)}; check channel_dim"
            )
        if value.device != x.device:
            raise ValueError(
                f"{op}: expected {name} on {x.device} like x, got {describe(value)}; move the module to it"
            )
    return found
