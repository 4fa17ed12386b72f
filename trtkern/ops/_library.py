"""The ``torch.ops.trtkern`` namespace: private ops that the public functions call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trtkern._torch import exporting, recording, within
from trtkern.ops._beneath import has_tangent, is_mapped
from trtkern.ops._saved import keep

LIBRARY = torch.library.Library("trtkern", "DEF")


def define(schema: str, run: Callable, fake: Callable, mapped: Callable | None) -> Any:
    """Register a private op: its schema, what runs it on every device, what predicts its outputs, and the op of all
    samples that ``torch.vmap`` maps over (``torch.library.register_vmap``); None: its caller refuses those.

    Returns the op as it is called: through torch's dispatcher where somebody there is to see it, else directly, at a
    fraction of the price. ``run`` and ``fake`` give None for what is not wanted; a schema has no such output, so that
    what comes through the dispatcher is an empty tensor there.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _as_schema(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"trtkern::{name}", _as_schema(fake), lib=LIBRARY)
    if mapped is not None:
        torch.library.register_vmap(f"trtkern::{name}", mapped, lib=LIBRARY)
    dispatched = getattr(torch.ops.trtkern, name)

    def op(*arguments: Any) -> Any:
        return run(*arguments) if plain() and bare(arguments) else dispatched(*arguments)

    return op


def _as_schema(run: Callable) -> Callable:
    def outputs(*arguments: Any) -> Any:
        made = run(*arguments)
        if not isinstance(made, tuple):
            return made
        return tuple(arguments[0].new_empty(0) if tensor is None else tensor for tensor in made)

    return outputs


_VMAP = torch._C._dispatch_key_parse("VmapMode")


def plain() -> bool:
    """Whether nothing stands between a call and its kernel: nobody compiles, records, transforms, watches or times."""
    return undisturbed() and not _profiled()


def undisturbed() -> bool:
    """The same but for a profile, which times what is computed and has no hand in it."""
    if torch.compiler.is_compiling():
        return False
    return not (
        _transforms()
        or forward_ad._current_level >= 0
        or _modes()
        or _tracing()
        or exporting()
        or _included(_VMAP)  # of is_grads_batched
    )


# Looked up once: each call asks.
_transforms, _modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
_profiled, _tracing = torch.autograd._profiler_enabled, torch._C._is_tracing
_included = torch._C._dispatch_tls_is_dispatch_key_included
left_behind = torch._C._functorch.is_functorch_wrapped_tensor


@contextmanager
def unseen() -> Iterator[None]:
    """A profile within sees what runs without one: no op goes through the dispatcher for its sake."""
    global _profiled
    before, _profiled = _profiled, lambda: False
    try:
        yield
    finally:
        _profiled = before


_Parameter = torch.nn.Parameter
_PLAIN_ARGUMENTS = frozenset({type(None), bool, int, float, str, tuple, list, torch.dtype})


def bare(arguments: Iterable[Any]) -> bool:
    """Whether all tensors among the arguments are what they say: no subclass, none that a transform left behind, none
    whose sign is still to be turned."""
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is _Parameter:
            if argument.is_neg() or left_behind(argument):
                return False
        elif kind not in _PLAIN_ARGUMENTS:
            return False
    return True


def needs_grad(*tensors: Tensor | None) -> bool:
    """What ``differentiated`` says where nothing stands between a call and its kernel."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def once(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may call its op directly: nobody watches, and nobody will differentiate it."""
    return not torch.is_grad_enabled() and plain() and bare(tensors)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow: something is kept for it then, and a Function stands around the op.

    Never in a recorded program: it runs without Python, where no Function is.
    """
    if not torch.is_grad_enabled() or recording():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        # Dynamo takes every tensor in there for one that needs no gradient, and the gradient for 0.
        raise RuntimeError(
            "a fused op: expected torch.func outside of what torch.compile compiles, got one of its transforms inside; "
            "call torch.func.grad, torch.vmap and the like without torch.compile around them"
        )
    # Beneath torch.vmap a tensor may need a gradient and not say so.
    return True


def refuse_mapped(op: str, what: str, instead: str, *tensors: Tensor | None) -> None:
    """Raise where ``torch.vmap`` maps over one of the tensors."""
    if is_mapped(*tensors):
        raise RuntimeError(f"{op}: expected no torch.vmap over {what}, got one; {instead}")


def refuse_second_derivative(op: str) -> NoReturn:
    """The ``backward`` of a Function around a private backward op.

    ``torch.autograd.function.once_differentiable`` will not do: it stays silent, and returns zeros, when the incoming
    gradient itself needs no gradient.
    """
    raise RuntimeError(
        f"{op}: expected a first derivative, got a second one; fused kernels are differentiable once: "
        'pass backend="reference" to differentiate twice'
    )


def is_dual(*tensors: object) -> bool:
    """Whether one of the tensors carries a tangent, as inside ``torch.func.jvp`` or of ``forward_ad.make_dual``."""
    if not _forward_mode():
        return False
    given = [t for t in tensors if isinstance(t, Tensor)]
    if torch.compiler.is_compiling():
        return any(forward_ad.unpack_dual(t).tangent is not None for t in given)
    return has_tangent(*given)


def _forward_mode() -> bool:
    """Whether a forward mode is active: tensors may then carry tangents, also where ``torch.vmap`` hides them."""
    # What unpack_dual asks first, at a tenth of its price; should torch rename it, only the price changes.
    return getattr(forward_ad, "_current_level", 0) >= 0


def pushed(op: str, *tensors: Tensor | None) -> bool:
    """Whether tangents may come, for which a Function has to stand around the op: it would drop them.

    Raises:
        RuntimeError: one comes in compiled code or in a recorded program, whose Functions have no forward mode.
    """
    if recording() or torch.compiler.is_compiling():
        refuse_duals(op, "in compiled code", "call it without torch.compile around it", *tensors)
        return False
    return _forward_mode()


def keep_for_both(
    ctx: Any, constants: tuple[Tensor | None, ...], *tensors: Tensor | None, held: dict[str, Any] | None = None
) -> None:
    """``keep`` the tensors for the backward pass, and where tangents may come for them too; both find the same ones.

    The outputs ``constants`` are marked as not differentiable. Where tangents may come they are not, for beneath
    torch.vmap torch forgets the mark: their tangents are zeros there.
    """
    keep(ctx, *tensors, held=held)
    if _forward_mode() and not torch.compiler.is_compiling():
        ctx.save_for_forward(*tensors)
    elif there := [t for t in constants if t is not None]:
        ctx.mark_non_differentiable(*there)


def refuse_duals(op: str, where: str, instead: str, *tensors: object) -> None:
    """Raise where one of the tensors carries a tangent: the op would drop it, and the derivative be 0.

    Dual tensors do not ``requires_grad``, so no Function need be around the op to refuse them.
    """
    if is_dual(*tensors):
        _refuse_forward_mode(op, where, instead)


def apply(function: type[torch.autograd.Function], op: str, *arguments: Any) -> Any:
    """``function.apply``, also beneath ``torch.vmap``, and with a ``jvp``.

    That is the method ``tangents(ctx, saved, *tangents)`` of the Function; one that has none, the Function of a
    gradient, refuses by name.

    torch.compile traces no Function that has a ``jvp``, and gets the bare one.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if plain():
        if not torch.is_grad_enabled():
            return function.forward(*arguments)
        return alone(function).apply(*arguments)
    if _forward_mode():
        return _in_both_modes(function, op, True).apply(
            *(_Whole(a) if isinstance(a, (tuple, list)) else a for a in arguments)
        )
    return _in_both_modes(function, op, False).apply(*arguments)


@cache
def alone(function: type[torch.autograd.Function], shown: Callable[[tuple], tuple] | None = None) -> Any:
    """The Function for calls that no transform looks into: in one method, for which torch does not take the signature
    of ``forward`` apart at every call.

    Each output has its price, and so those are none of it that are only kept for the backward pass: ``shown`` picks
    what the caller sees out of what ``forward`` gives.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output if shown is None else shown(output)

    names = {
        "forward": staticmethod(forward),
        "backward": staticmethod(function.backward),
        "__module__": function.__module__,
        "__doc__": function.__doc__,
        # Without what Function.apply does for transforms.
        "apply": torch._C._FunctionBase.__dict__["apply"],
    }
    return type(function.__name__, (torch.autograd.Function,), names)


class _Whole:
    """An argument with parts, as one: beneath torch.vmap, torch counts the parts, and has one tangent for all."""

    def __init__(self, value: tuple | list) -> None:
        self.value = value


def _opened(arguments: tuple) -> tuple:
    return tuple(a.value if isinstance(a, _Whole) else a for a in arguments)


@cache
def _in_both_modes(function: type[torch.autograd.Function], op: str, whole: bool) -> Any:
    def refuse(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_forward_mode(
            op,
            "of a gradient",
            'fused kernels are differentiable once: pass backend="reference" to differentiate twice',
        )

    def jvp(ctx: Any, *tangents: Any) -> Any:
        with within(ctx.saved_tensors) as saved:
            return function.tangents(ctx, saved, *tangents)  # type: ignore[attr-defined]

    def forward(*arguments: Any) -> Any:
        return function.forward(*_opened(arguments))

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        function.setup_context(ctx, _opened(inputs), output)

    run = jvp if hasattr(function, "tangents") else refuse
    # torch.vmap runs the methods of the Function on what it maps; the private ops know what that means.
    names = {"jvp": staticmethod(run), "generate_vmap_rule": True, "__module__": function.__module__}
    if whole:
        names |= {"forward": staticmethod(forward), "setup_context": staticmethod(setup_context)}
    return type(function.__name__, (function,), names)


def _refuse_forward_mode(op: str, where: str, instead: str) -> NoReturn:
    raise RuntimeError(
        f"{op}: expected no forward-mode derivative (jvp, jacfwd, dual tensors) {where}, got one; {instead}"
    )
