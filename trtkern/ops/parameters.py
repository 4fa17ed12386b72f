"""The parameters of a neuron on their way to a backend: numbers, or one tensor [P, C] where any is a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trtkern.ops import checks
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


def scalars(values: dict[str, Number], params: Tensor | None) -> list[float]:
    """The numbers; zeros where a tensor holds them."""
    return [0.0] * len(values) if params is not None else [float(value) for value in values.values()]


def stack(
    op: str, x: Tensor, values: dict[str, Number], channel_dim: int, dtype: torch.dtype
) -> tuple[Tensor | None, int | None]:
    """The parameters as one tensor [P, C] and the axis of the channels; (None, None) when all are numbers."""
    if not any(isinstance(value, Tensor) for value in values.values()):
        return None, None
    axis = checks.channel_axis(op, values, channel_dim, x)
    count = 1 if axis is None else x.shape[axis]
    rows = [
        value.to(dtype).reshape(-1).expand(count)
        if isinstance(value, Tensor)
        else torch.full((count,), float(value), dtype=dtype, device=x.device)
        for value in values.values()
    ]
    return torch.stack(rows), axis


def reference_rows(params: Tensor | None, axis: int | None, values: dict[str, Number], x: Tensor) -> list[Any]:
    """The parameters as the reference takes them: numbers, or tensors that broadcast with x[0]."""
    if params is None:
        return list(values.values())
    checks.parameter_values("lif", params, tuple(values))
    trailing = 0 if axis is None else x.dim() - axis - 1
    return list(params.reshape(len(values), -1, *[1] * trailing).unbind(0))
