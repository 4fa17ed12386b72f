"""Whether a call finds everything as an earlier one of its kind did: what surrounds it, its layer, its tensors.

Numbers, shapes, strides and devices are compared by what they are, all else by identity: what is set anew is another
one, and is looked at again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trtkern import backends
from trtkern._torch import exporting
from trtkern.ops import _first_rows, _known, _library, checks, spikes

hooked = torch._C._autograd._top_saved_tensors_default_hooks
"""The hooks that see what is saved for a backward pass (of a checkpoint, which counts it), or None."""
ABSENT: Any = ...
"""As the value of an entry: there is no such one."""
EMPTY: Any = NotImplemented
"""The entry is a container with nothing in it."""


Entries = Sequence[tuple[str, object]]


class Same:
    """What a call finds, to be compared with what a later one does.

    Args:
        grad: whether autograd records.
        own: of each dict that ``fits`` is given, the entries that are to be the same, by identity.
        tensors: those of the call; of each the type, shape, strides, dtype, device, and whether it requires a gradient.
        asked: (function, arguments, what it says) each, that are to say so.
    """

    __slots__ = ("fits",)

    fits: Callable[[tuple[dict[str, Any], ...], tuple[Tensor | None, ...]], bool]
    """Whether a call finds the same: fits(own, tensors)."""

    def __init__(
        self, grad: bool, own: Sequence[Entries], tensors: Sequence[Tensor | None],
        asked: Sequence[tuple[Callable, tuple, Any]] = (),
    ) -> None:  # fmt: skip
        kinds = tuple(None if t is None else kind_of(t) for t in tensors)
        made = _class()(_held(), (*_asked(grad), *asked), tuple(own), kinds, _library.left_behind)
        self.fits = made.fits


def kind_of(t: Tensor) -> tuple[Any, ...]:
    """What is compared of a tensor."""
    return type(t), t.shape, t.stride(), t.dtype, t.layout, t.device, t.requires_grad


def _held() -> tuple[tuple[dict, Any, Any], ...]:
    """Entries of namespaces that are to be the same: what ``plain`` and ``known`` look at."""
    environment = _known._environment
    return (
        (vars(forward_ad), "_current_level", -1),
        (vars(_library), "_profiled", _library._profiled),
        (vars(checks), "_debugging", False),
        (vars(spikes), "_listeners", EMPTY),
        (vars(_first_rows), "recording", None),
        (vars(backends), "BACKENDS", backends.BACKENDS),
        (environment, _known._INTERPRET, environment.get(_known._INTERPRET, ABSENT)),
    )


def _asked(grad: bool) -> tuple[tuple[Callable, tuple, Any], ...]:
    """What functions are to say."""
    return (
        (torch.is_grad_enabled, (), grad),
        (torch.compiler.is_compiling, (), False),
        (_library._transforms, (), False),
        (_library._modes, (), 0),
        (_library._tracing, (), False),
        (exporting, (), False),
        (_library._included, (_library._VMAP,), False),
        (_library._profiled, (), False),
        (hooked, (True,), None),
    )


@cache
def _class() -> Any:
    """The class of the extension (``csrc/host/known.h``), or what does the same without it, at some times the price."""
    try:
        return import_module("trtkern._cpu").Known
    except (ImportError, AttributeError):
        return Plainly


class Plainly:
    """``Known`` of ``csrc/host/known.h``."""

    def __init__(self, held: tuple, asked: tuple, own: tuple, kinds: tuple, wrapped: Callable) -> None:
        self.held, self.asked, self.own, self.kinds, self.wrapped = held, asked, own, kinds, wrapped

    def fits(self, own: tuple[dict[str, Any], ...], tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether all of it is as it was."""
        try:
            return (
                len(tensors) == len(self.kinds)
                and all(self._is(t, kind) for t, kind in zip(tensors, self.kinds, strict=True))
                and all(_holds(names, *row) for names, rows in zip(own, self.own, strict=True) for row in rows)
                and all(_holds(*row) for row in self.held)
                and all(function(*arguments) is value for function, arguments, value in self.asked)
            )
        except RuntimeError:  # a nested tensor, which has no shape
            return False

    def _is(self, t: Tensor | None, kind: tuple | None) -> bool:
        if t is None or kind is None:
            return t is None and kind is None
        return type(t) is kind[0] and kind_of(t) == kind and not t.is_neg() and not self.wrapped(t)


def _holds(names: dict, key: Any, value: Any) -> bool:
    found = names.get(key, ABSENT)
    if value is EMPTY and found is not ABSENT:
        return len(found) == 0
    # 0.0 and -0.0 are two.
    numbers = type(found) is float and type(value) is float
    return found is value or (numbers and found == value and math.copysign(1.0, found) == math.copysign(1.0, value))
