"""The TRT weight regulariser: value and gradient over a whole list of tensors in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from trtkern import reference
from trtkern.backends import choose, named
from trtkern.backends.base import RegularizerSpec
from trtkern.ops import checks, layout
from trtkern.ops._beneath import transformed
from trtkern.ops._library import (
    apply,
    define,
    differentiated,
    pushed,
    refuse_duals,
    refuse_mapped,
    refuse_second_derivative,
)
from trtkern.ops._mapped import sample
from trtkern.ops._saved import keep, kept

__all__ = ["RegularizerSpec", "add_regularizer_grad_", "regularizer"]


def regularizer(weights: Sequence[Tensor], spec: RegularizerSpec, *, backend: str = "auto") -> Tensor:
    """``R(w) = (lam / T) sum_t sum_w w^2 / (1 + (e^(delta t) - 1) (|w| + eps))``, t = 0 .. T-1 (arXiv 2506.19256).

    Args:
        weights: tensors of any shape, all on one device; float32 runs fused, other dtypes on the reference. Of a
            DTensor each process takes its own part, and all of them call this together: one all-reduce of one number
            makes the value, and the gradient stays where its part is.
        spec: timesteps, lam, delta, eps.
        backend: "auto", or one of ``trtkern.backends.NAMES``.

    Returns:
        R, a 0-dim tensor, differentiable once (twice with ``backend="reference"``). The gradient is made in the same
        pass as the value: backward hands it over. Derivatives while a forward mode is active are the reference's.

    Raises:
        TypeError, ValueError: a hyper-parameter out of range, no weights, weights on several devices.
    """
    weights = list(weights)
    if (shards := _shards(weights)) is not None:
        parts = [shards.part(w) for w in weights]
        return shards.total(
            "regularizer", weights, lambda at: regularizer([parts[i] for i in at], spec, backend=backend)
        )  # fmt: skip
    name = _gate(weights, spec, backend)
    if name == "reference":
        return reference.regularizer(weights, spec)
    dense = [layout.flat(w) for w in weights]
    if pushed("regularizer", *weights):
        own = reference.regularizer(weights, spec)
        known = torch.ops.trtkern.regularizer([w.detach() for w in dense], spec.timesteps, spec[1:], False, name)[0]
        apart = known - own.detach()  # of two infinities nothing
        return own + torch.where(apart.isfinite(), apart, 0)
    if differentiated(*weights):
        return apply(_Regularizer, "regularizer", spec.timesteps, spec[1:], name, *dense)[0]
    return torch.ops.trtkern.regularizer(dense, spec.timesteps, spec[1:], False, name)[0]


def add_regularizer_grad_(
    weights: Sequence[Tensor], spec: RegularizerSpec, *, scale: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Add scale * dR/dw into every ``w.grad`` (made where it is None) and return R, in one pass over both.

    Args and errors as for ``regularizer``; the weights are leaves.

    Args:
        weights: tensors of any shape, all on one device.
        spec: timesteps, lam, delta, eps.
        scale: what the gradient is multiplied by.
        backend: "auto", or one of ``trtkern.backends.NAMES``.
    """
    weights = list(weights)
    shards = _shards(weights)
    with torch.no_grad():
        parts = weights if shards is None else [shards.part(w) for w in weights]
    name = _gate(parts, spec, backend)
    # Also of the reference: a gradient that is added in place has no tangent.
    instead = "use regularizer(weights), whose value has one"
    refuse_duals("add_regularizer_grad_", "of a gradient that is added in place", instead, *weights)
    refuse_mapped("add_regularizer_grad_", "weights", "use regularizer(weights), which has a gradient", *weights)
    with torch.no_grad():
        grads = [shards.gradient(w) if checks.is_distributed(w) else _gradient(w) for w in weights]
    if shards is None:
        return _add(parts, grads, spec, scale, name)

    def add(at: list[int]) -> Tensor:
        own = [parts[i] for i in at]
        return _add(own, [grads[i] for i in at], spec, scale, _gate(own, spec, backend))

    return shards.total("regularizer", weights, add)


def _gradient(w: Tensor) -> Tensor:
    """``w.grad``, to add to it in place."""
    if w.grad is None:
        w.grad = torch.zeros_like(w)
    elif w.grad.layout != torch.strided:
        # The penalty is dense, and so is its sum with a sparse gradient: what autograd makes of the two.
        w.grad = w.grad.to_dense()
    return w.grad


def _add(weights: list[Tensor], grads: list[Tensor], spec: RegularizerSpec, scale: float, name: str) -> Tensor:
    """Add scale * dR/dw into the gradients, and return R."""
    # A gradient in another layout or dtype than its weight goes through a fresh one: rare, and torch adds it.
    fits = name != "reference" and all(
        g.stride() == w.stride() and g.dtype == w.dtype and layout.is_flat(w)
        for g, w in zip(grads, weights, strict=True)
    )
    if fits:
        return torch.ops.trtkern.regularizer_add_grad_(
            [w.detach() for w in weights], grads, spec.timesteps, spec[1:], float(scale), name
        )
    with torch.enable_grad():
        leaves = [w.detach().requires_grad_() for w in weights]
        value = regularizer(leaves, spec, backend=name)
        fresh = torch.autograd.grad(value, leaves)
    with torch.no_grad():
        for gradient, more in zip(grads, fresh, strict=True):
            gradient.add_(more, alpha=scale)
    return value.detach()


def _shards(weights: Sequence[Any]) -> Any:
    """What takes DTensors apart (``trtkern.ops._shards``), where there are any among the weights; else None."""
    return import_module("trtkern.ops._shards") if any(map(checks.is_distributed, weights)) else None


def check_spec(spec: RegularizerSpec) -> None:
    """The hyper-parameters: timesteps an int >= 1, the others finite in float32 and not negative."""
    if isinstance(spec.timesteps, bool) or not isinstance(spec.timesteps, int) or spec.timesteps < 1:
        raise ValueError(f"regularizer: expected timesteps to be an int >= 1, got {spec.timesteps!r}")
    for field in ("lam", "delta", "eps"):
        value = getattr(spec, field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= checks.LARGEST:
            raise ValueError(
                f"regularizer: expected {field} to be a finite number >= 0, at most {checks.LARGEST:.1e} (float32), "
                f"got {value!r}"
            )


def _gate(weights: list[Tensor], spec: RegularizerSpec, backend: str) -> str:
    """Check what comes in; the name of the backend that takes it."""
    op = "regularizer"
    if not weights:
        raise ValueError(f"{op}: expected at least one weight, got none; check the model and exclude")
    for w in weights:
        if isinstance(w, Tensor):
            checks.plain(op, "weight", w)
        if not isinstance(w, Tensor) or not w.dtype.is_floating_point:
            raise TypeError(f"{op}: expected floating-point tensors, got {checks.describe(w)}")
        if w.device != weights[0].device:
            raise ValueError(
                f"{op}: expected all weights on {weights[0].device}, got {checks.describe(w)}; use one loss a device"
            )
    check_spec(spec)
    dtypes = {w.dtype for w in weights}
    if len(dtypes) > 1 and backend == "auto":
        return "reference"
    odd = next((w.dtype for w in weights if w.dtype != torch.float32), torch.float32)
    return choose(backend, op, weights[0].device.type, odd)


def _run(weights, timesteps, numbers, with_grads, backend):
    weights = [layout.flat(w) for w in weights]
    value = weights[0].new_empty(())
    grads = [torch.empty_like(w) for w in weights] if with_grads else None
    named(backend).ops["regularizer"](weights, RegularizerSpec(timesteps, *numbers), value, grads, False, 1.0)
    return value, grads or []


def _run_fake(weights, timesteps, numbers, with_grads, backend):
    return weights[0].new_empty(()), [torch.empty_like(w) for w in weights] if with_grads else []


def _mapped(info, dims, weights, timesteps, numbers, with_grads, backend):
    # A sum over all weights: one pass a sample.
    found = [
        torch.ops.trtkern.regularizer(
            [sample(w, dim, number) for w, dim in zip(weights, dims[0], strict=True)],
            timesteps, numbers, with_grads, backend,
        )
        for number in range(info.batch_size)
    ]  # fmt: skip
    grads = [torch.stack(of_one) for of_one in zip(*(grads for _, grads in found), strict=True)]
    return (torch.stack([value for value, _ in found]), grads), (0, [0] * len(grads))


# T by itself, as a SymInt: among the other numbers it would be a constant to compilers, and compiled for each anew.
define(
    "regularizer(Tensor[] weights, SymInt timesteps, float[] numbers, bool with_grads, str backend) "
    "-> (Tensor value, Tensor[] grads)",
    _run,
    _run_fake,
    _mapped,
)


def _add_grad(weights, grads, timesteps, numbers, scale, backend):
    for w, g in zip(weights, grads, strict=True):
        if w.stride() != g.stride() or w.dtype != g.dtype or w.device != g.device or not layout.is_flat(w):
            raise RuntimeError(f"regularizer: expected a gradient laid out like its weight, got {checks.describe(g)}")
    value = weights[0].new_empty(())
    spec = RegularizerSpec(timesteps, *numbers)
    named(backend).ops["regularizer"](list(weights), spec, value, list(grads), True, scale)
    return value


define(
    "regularizer_add_grad_(Tensor[] weights, Tensor(a!)[] grads, SymInt timesteps, float[] numbers, float scale, "
    "str backend) -> Tensor",
    _add_grad,
    lambda weights, grads, timesteps, numbers, scale, backend: weights[0].new_empty(()),
    None,
)


class _Regularizer(torch.autograd.Function):
    """The gradients are made in the forward pass and handed over once; a second backward makes them again."""

    @staticmethod
    def forward(timesteps, numbers, backend, *weights):
        value, grads = torch.ops.trtkern.regularizer(list(weights), timesteps, numbers, True, backend)
        return value, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.timesteps, ctx.numbers, ctx.backend, *weights = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            keep(ctx, *output[1:])
        elif transformed():
            ctx.grads = None
            keep(ctx, *weights, *output[1:])
        else:
            # Handed over uncopied, they become .grad: they must not be kept for another backward as well.
            keep(ctx, *weights)
            ctx.grads = list(output[1:])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple:
        saved, factor, count = kept(ctx), incoming[0], len(ctx.needs_input_grad) - 3
        if factor is None:
            return None, None, None, *[None] * count
        if torch.compiler.is_compiling():
            return None, None, None, *[g * factor for g in saved]
        weights, made = saved[:count], saved[count:]
        grads, ctx.grads = ctx.grads or made, None
        if not grads:
            detached = [w.detach() for w in weights]
            grads = torch.ops.trtkern.regularizer(detached, ctx.timesteps, ctx.numbers, True, ctx.backend)[1]
        return None, None, None, *apply(_Scale, "regularizer", factor, *grads, *weights)


def _is_one(factor: Tensor) -> bool:
    if factor.device.type != "cpu":  # looking at it would wait for it
        return False
    try:
        return factor.item() == 1.0
    except RuntimeError:  # torch.vmap, or autograd's is_grads_batched, maps over it: it is not one number
        return False


class _Scale(torch.autograd.Function):
    """factor * gradients; the gradients themselves, uncopied, where the factor is known to be 1.

    The weights come along so that whoever differentiates the result again meets an error, not a constant.
    """

    @staticmethod
    def forward(factor, *tensors):
        grads = tensors[: len(tensors) // 2]
        if _is_one(factor):
            return tuple(g.view_as(g) for g in grads)
        return tuple(g * factor for g in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        refuse_second_derivative("regularizer")
