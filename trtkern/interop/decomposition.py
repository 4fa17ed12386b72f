"""A model as plain torch: a loop over time in place of each operator of this project.

What is recorded so runs where trtkern is not installed, and is what ``trtkern.interop.to_onnx`` translates.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from trtkern import reference
from trtkern.backends.base import RegularizerSpec
from trtkern.nn import exact_convolutions
from trtkern.ops import checks
from trtkern.ops._prepared import WANT_H, WANT_PACKED, WANT_SPIKES, WANT_STATE, WANT_V
from trtkern.ops.parameters import state_dtype
from trtkern.spec import LIFSpec


def decompose(program: Any, *, scan: bool | None = None) -> Any:
    """The same in operators of torch alone; for inference.

    The numbers are those of ``trtkern.reference``: a step of a neuron is charge, fire and settle of its row in
    ``trtkern.neurons``, in float32 (float64 for float64). A kernel rounds a * b + c once and these operators twice, so
    that a spike may differ where a potential lies within rounding of its threshold.

    Args:
        program: what ``torch.export.export`` recorded of a model in evaluation; or a module. It is not changed.
        scan: of a program: whether the steps are one operator that runs T times (torch's ``scan``), or T copies of a
            step; None: one operator where T is dynamic, which needs it.

    Returns:
        Of a program, one with the same inputs, outputs, parameters and dynamic sizes; it does not raise the flags for
        potentials that are not finite. Of a module, a copy whose neurons, norms and losses have ``backend="reference"``
        and whose convolutions are torch's own; it can be trained.

    Raises:
        TypeError: no program and no module.
        ValueError: an operator that has no such form, as that of a BatchNorm which moves its running statistics has
            none; or ``scan=False`` where T is dynamic.
    """
    if scan not in (None, True, False):
        raise TypeError(f"decompose: expected scan to be None, True or False, got {scan!r}")
    if isinstance(program, nn.Module):
        return _on_reference(program)
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"decompose: expected a torch.export.ExportedProgram or a module, got {checks.describe(program)}; record "
            "one with torch.export.export(model.eval(), (example,))"
        )
    for node in operators(program):
        _expect_plain(node)
    with _Plain(scan), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)  # torch's own, of itself
        return program.run_decompositions({})


def operators(program: ExportedProgram) -> list[fx.Node]:
    """The nodes of a program that call operators of this project."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    return [node for graph in graphs for node in graph.nodes if _name(node.target) is not None]


def _name(target: Any) -> str | None:
    """That of an operator of this project."""
    if getattr(target, "namespace", None) != "trtkern":
        return None
    return target.name().partition("::")[2].partition(".")[0]


def _on_reference(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    for module in made.modules():
        if type(module).__module__.startswith("trtkern.") and hasattr(module, "backend"):
            module.backend = "reference"  # type: ignore[assignment]
    exact_convolutions(made)
    return made


def _expect_plain(node: fx.Node) -> None:
    name = _name(node.target)
    if name not in _PLAIN:
        raise ValueError(
            f"decompose: expected operators of trtkern from {', '.join(_PLAIN)}, got {name}, which is none of an "
            "evaluation; record model.eval()"
        )
    if "running_mean" in (given := _arguments(node)) and given["running_mean"] is not None:
        raise ValueError(
            "decompose: expected a BatchNorm in evaluation, got one that moves its running statistics; record "
            "model.eval()"
        )
    if given.get("lengths") is not None:
        raise ValueError(
            "decompose: expected sequences of one length, got samples with lengths; record the model without them"
        )
    if given.get("want", 0) & WANT_PACKED:
        raise ValueError(
            "decompose: expected dense spikes, got a neuron that makes their words; call it without return_packed"
        )


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


class _Plain(TorchFunctionMode):
    """Within, a call of an operator of this project runs its plain form, which is recorded in its place."""

    def __init__(self, scan: bool | None) -> None:
        super().__init__()
        self._scan = scan

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        plain = _PLAIN.get(_name(func) or "")
        if plain is None:
            return func(*args, **(kwargs or {}))
        return plain(self._scan, *args, **(kwargs or {}))


def _lif_forward(
    scan: bool | None, x: Tensor, v0: Tensor | None, params: Tensor | None, affine: Tensor | None,
    residual: Tensor | None, lengths: None, scalars: Sequence[float], token: str, inner: int, pool: bool,
    flag: Tensor | None, want: int, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``lif_forward`` of ``trtkern.ops._prepared``."""
    spec, dtype = LIFSpec.from_token(token), state_dtype(x)
    several = len(spec.row.states) > 1
    given = [x] if residual is None else [x, residual]
    held = [_rows(each.to(dtype), x, inner) for each in (affine, params) if each is not None]

    def step(state: Sequence[Tensor], x: Tensor, residual: Tensor | None, held: Sequence[Tensor]) -> list[Tensor]:
        """The states after a step, and what is wanted of it."""
        current = x.to(dtype)
        if affine is not None:
            center, scale, shift = held[0].unbind(0)
            current = (current - center) * scale + shift
        if residual is not None:
            current = current + residual.to(dtype)
        values = scalars if params is None else held[-1].unbind(0)
        fired, trace, state = reference.advance(current, tuple(state), values, spec)
        made = []
        if want & WANT_SPIKES:
            s = fired.to(x.dtype)
            made.append(nn.functional.avg_pool2d(s, 2) if pool else s)
        if want & (WANT_V | WANT_H):
            potential = trace[spec.row.potential] if want & WANT_H else state[spec.row.membrane]
            made.append(potential.to(x.dtype))
        return [t.clone() for t in (*state, *made)]  # which must not share memory

    state, outputs = _stepped(scan, step, _before(x, v0, spec), given, held)
    nothing = x.new_empty(0)
    s = outputs.pop(0) if want & WANT_SPIKES else nothing
    v = outputs.pop(0) if want & (WANT_V | WANT_H) else nothing
    last = (torch.stack(state) if several else state[0]) if want & WANT_STATE else nothing
    return s, v, last, nothing, nothing


def _before(x: Tensor, v0: Tensor | None, spec: LIFSpec) -> list[Tensor]:
    """The states before the first step of x, one by one."""
    dtype, several = state_dtype(x), len(spec.row.states) > 1
    zero = torch.zeros(x.shape[1:], dtype=dtype, device=x.device)
    before = [zero] * len(spec.row.states) if v0 is None else v0.to(dtype).unbind(0) if several else [v0.to(dtype)]
    return [t.clone() for t in before]


def _recurrent_forward(
    scan: bool | None, x: Tensor, s0: Tensor | None, v0: Tensor | None, weight: Tensor, bias: Tensor | None,
    params: Tensor | None, scalars: Sequence[float], token: str, flag: Tensor | None, want: int, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``recurrent_forward`` of ``trtkern.ops.recurrent``."""
    spec, dtype = LIFSpec.from_token(token), state_dtype(x)
    held = [weight.to(dtype), *(each.to(dtype) for each in (bias, params) if each is not None)]

    def step(state: Sequence[Tensor], x: Tensor, residual: Tensor | None, held: Sequence[Tensor]) -> list[Tensor]:
        """The spikes and the states after a step, and what is wanted of it."""
        s, *before = state
        current = x.to(dtype) + nn.functional.linear(s, held[0], None if bias is None else held[1])
        values = scalars if params is None else held[-1].unbind(0)
        fired, trace, after = reference.advance(current, tuple(before), values, spec)
        s, made = fired.to(dtype), [fired.to(x.dtype)]
        if want & (WANT_V | WANT_H):
            potential = trace[spec.row.potential] if want & WANT_H else after[spec.row.membrane]
            made.append(potential.to(x.dtype))
        return [t.clone() for t in (s, *after, *made)]

    first = torch.zeros(x.shape[1:], dtype=dtype, device=x.device) if s0 is None else s0.to(dtype).clone()
    (_, *state), outputs = _stepped(scan, step, [first, *_before(x, v0, spec)], [x], held)
    nothing = x.new_empty(0)
    v = outputs[1] if want & (WANT_V | WANT_H) else nothing
    last = (torch.stack(state) if len(state) > 1 else state[0]) if want & WANT_STATE else nothing
    return outputs[0], v, last, nothing, nothing, nothing


def _stepped(
    scan: bool | None, step: Callable[..., list[Tensor]], state: list[Tensor], given: list[Tensor], held: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The states after all steps, and of every step what else ``step`` gives, [T, ...] each.

    Args:
        scan: as in ``decompose``.
        step: of (states, x, residual or None, held); gives the states and the outputs.
        state: before the first step.
        given: [T, ...] each; what a step reads.
        held: what every step reads.
    """
    timesteps, count, inputs = given[0].shape[0], len(state), len(given)
    fixed = type(timesteps) is int
    if scan is False and not fixed:
        raise ValueError(
            "decompose: expected a fixed T with scan=False, got a program whose T is dynamic; pass scan=None, or "
            "record the model without a dynamic size for time"
        )

    def flat(*tensors: Tensor) -> list[Tensor]:
        now, read, other = tensors[:count], tensors[count : count + inputs], tensors[count + inputs :]
        return step(now, read[0], read[1] if inputs > 1 else None, other)

    if scan or not fixed:
        made = torch.ops.higher_order.scan(flat, state, given, tuple(held))
        return list(made[:count]), list(made[count:])
    found = []
    for t in range(timesteps):
        made = flat(*state, *(each[t] for each in given), *held)
        state = list(made[:count])
        found.append(made[count:])
    return state, [torch.stack(each) for each in zip(*found, strict=True)]


def _rows(numbers: Tensor, x: Tensor, inner: int) -> Tensor:
    """Numbers [K, C] as [K, ...], each of which broadcasts with a step of x."""
    count = numbers.shape[1]
    trailing = 0 if count == 1 else x.dim() - _channels(x, count, inner) - 1
    return numbers.reshape(len(numbers), count, *[1] * trailing)


def _channels(x: Tensor, count: int, inner: int) -> int:
    """The axis of the ``count`` channels of x, whose stride is ``inner``; the batch may be as large."""
    fixed = [axis for axis in range(1, x.dim()) if type(x.shape[axis]) is int and x.shape[axis] == count]
    return next(axis for axis in fixed if len(fixed) == 1 or x.stride(axis) == inner)


def _finish(
    scan: bool | None, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: None,
    running_var: None, batches: None, count: int, eps: float, momentum: float | None, coef: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``batch_norm_lif_finish`` of ``trtkern.ops._norm``: center, scale and shift as csrc/norm/finish.h has them."""
    mean = mean.double()
    rstd = (var.double() + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight.double()
    center = mean.float()
    shift = (center.double() - mean) * scale
    shift = shift if bias is None else shift + bias.double()
    affine = torch.stack([center, scale.float(), shift.float()])
    return affine, torch.stack([mean, rstd]), affine.new_empty(0)


def _moments(y: Tensor, channels: int, inner: int) -> tuple[Tensor, Tensor]:
    """``reference.statistics``, of means alone: torch.onnx divides a variance in float64 by a float32 number."""
    axis, wide = _channels(y, channels, inner), y.double()
    others = [each for each in range(y.dim()) if each != axis]
    mean = wide.mean(others, keepdim=True)
    return mean.flatten(), (wide - mean).square().mean(others)


def _statistics(scan: bool | None, y: Tensor, channels: int, inner: int, backend: str) -> Tensor:
    """``batch_norm_lif_statistics`` of ``trtkern.ops._norm``: the mean and the sum of squares around it."""
    mean, var = _moments(y, channels, inner)
    return torch.stack([mean, var * (y.numel() // channels)])


def _batch_norm_lif_forward(
    scan: bool | None, y: Tensor, v0: Tensor | None, params: Tensor | None, residual: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, running_mean: None, running_var: None, batches: None, eps: float,
    momentum: float | None, channels: int, scalars: Sequence[float], token: str, inner: int, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``batch_norm_lif_forward`` of ``trtkern.ops.batch_norm_lif``, with the statistics of y."""
    mean, var = _moments(y, channels, inner)
    affine, moments, _ = _finish(scan, mean, var, weight, bias, None, None, None, 0, eps, momentum, False, "")
    made = _lif_forward(scan, y, v0, params, affine, residual, None, scalars, token, inner, *rest)
    return *made, affine, moments


def _delay(
    scan: bool | None, x: Tensor, delays: Tensor, v0: Tensor | None, inner: int, most: int, rounded: bool, backend: str
) -> Tensor:
    """``delay_forward`` of ``trtkern.ops.delay``."""
    dtype, count = state_dtype(x), len(delays)
    steps = delays if count == 1 else _rows(delays.unsqueeze(0), x, inner)[0]
    made = reference.delay(x.to(dtype), steps, None if v0 is None else v0.to(dtype), most, rounded)
    return made.to(x.dtype)


def _regularizer(
    scan: bool | None, weights: Sequence[Tensor], timesteps: int, numbers: Sequence[float], with_grads: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """``regularizer`` of ``trtkern.ops.regularizer``."""
    return reference.regularizer(weights, RegularizerSpec(timesteps, *numbers)), []


_PLAIN: dict[str, Callable[..., Any]] = {
    "lif_forward": _lif_forward,
    "recurrent_forward": _recurrent_forward,
    "batch_norm_lif_finish": _finish,
    "batch_norm_lif_statistics": _statistics,
    "batch_norm_lif_forward": _batch_norm_lif_forward,
    "delay_forward": _delay,
    "regularizer": _regularizer,
}
