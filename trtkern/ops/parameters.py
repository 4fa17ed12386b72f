"""The parameters of a neuron on their way to a backend: numbers, or one tensor [P, C] where any is a tensor."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from trtkern.ops import checks
from trtkern.ops._known import MOST
from trtkern.ops._library import plain
from trtkern.ops.checks import Number


def state_dtype(x: Tensor) -> torch.dtype:
    """In what the reference computes: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def firing(op: str, values: dict[str, Number], on_equal: bool, x: Tensor) -> dict[str, Number]:
    """The values of a neuron that fires where h > v_threshold; ``on_equal``: of one that fires where h >= it.

    That is the same neuron with the number before the threshold for one, in the precision of the potential.
    """
    if not on_equal:
        return values
    threshold, dtype = values["v_threshold"], state_dtype(x)
    checks.above_zero(op, threshold)
    if not isinstance(threshold, Tensor):
        return {**values, "v_threshold": _number_before(float(threshold), dtype == torch.float64)}
    held = threshold.to(dtype)
    before = torch.nextafter(held.detach(), torch.full_like(held, -torch.inf))
    # Exactly the number before; the gradient is the threshold's.
    return {**values, "v_threshold": held + (before - held.detach())}


def _number_before(value: float, double: bool) -> float:
    """The float32 (float64 if ``double``) number before ``value`` as that dtype has it."""
    held = torch.tensor(value, dtype=torch.float64 if double else torch.float32)
    return torch.nextafter(held, torch.full_like(held, -torch.inf)).item()


_number_before._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as ``trtkern.backends.choose``


def scalars(op: str, values: dict[str, Number], on_equal: bool, x: Tensor) -> tuple[float, ...] | None:
    """The numbers that a kernel takes, those of ``firing``; None where one of the values is a tensor."""
    if any(isinstance(value, Tensor) for value in values.values()):
        return None
    return tuple(float(value) for value in firing(op, values, on_equal, x).values())


def stack(
    op: str, x: Tensor, values: dict[str, Number], channel_dim: int, dtype: torch.dtype
) -> tuple[Tensor | None, int | None]:
    """The parameters as one tensor [P, C] and the axis of the channels; (None, None) when all are numbers."""
    if not any(isinstance(value, Tensor) for value in values.values()):
        return None, None
    axis = checks.channel_axis(op, values, channel_dim, x)
    count = 1 if axis is None else x.shape[axis]
    parts: list[Tensor] = []
    numbers: list[float] = []
    for value in [*values.values(), None]:
        if isinstance(value, (int, float)):
            numbers.append(float(value))
            continue
        if numbers:
            parts.append(_constant(tuple(numbers), count, dtype, x.device))
            numbers = []
        if value is not None:
            row = value.to(dtype).reshape(1, -1)
            parts.append(row if row.shape[1] == count else row.expand(1, count))
    return torch.cat(parts), axis


_kept: dict[Hashable, Tensor] = {}


def _constant(numbers: tuple[float, ...], count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as rows [P, count]; kept for the next call that nobody traces, transforms or captures."""
    usual = plain() and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    if not usual:
        return _rows(numbers, count, dtype, device)
    kind = (array("d", numbers).tobytes(), count, dtype, device)  # as bytes 0.0 and -0.0 are two
    if kind not in _kept:
        if len(_kept) >= MOST:
            _kept.clear()
        with torch.inference_mode(False):  # autograd takes no tensor that was made in it
            _kept[kind] = _rows(numbers, count, dtype, device)
    return _kept[kind]


def _rows(numbers: tuple[float, ...], count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat([torch.full((1, count), number, dtype=dtype, device=device) for number in numbers])


def reference_rows(
    params: Tensor | None, axis: int | None, values: dict[str, Number], x: Tensor, ranges: checks.Ranges = None
) -> list[Any]:
    """The parameters as the reference takes them: numbers, or tensors that broadcast with x[0]."""
    if params is None:
        return list(values.values())
    checks.parameter_values("lif", params, tuple(values), ranges)
    trailing = 0 if axis is None else x.dim() - axis - 1
    return list(params.reshape(len(values), -1, *[1] * trailing).unbind(0))
