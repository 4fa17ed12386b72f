"""Calls that were checked before: what depends on shapes, types, places and settings alone is not asked again.

A call is known by all that the checks look at. What its tensors hold is looked at each time, as ever.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor, strided
from torch.nn import Parameter

from trtkern import backends
from trtkern.ops import checks
from trtkern.ops._lazy import Lazy
from trtkern.ops._library import left_behind, plain

MOST = 4096
"""Calls that are remembered; beyond, all are forgotten and checked again."""


_chosen: dict[Hashable, tuple[Any, object]] = {}


def recall(call: Hashable) -> Any:
    """What was remembered of a call that was checked before, among the same backends as now; else None."""
    if call is None:  # in compiled code, above all: torch.compile would guard every entry
        return None
    found = _chosen.get(call)
    return None if found is None or found[1] is not backends.BACKENDS else found[0]


def remember(call: Hashable, what: Any) -> None:
    """The call was checked; ``what``: all that it takes to make it again, and no tensor."""
    if call is None:
        return
    if len(_chosen) >= MOST:
        _chosen.clear()
    _chosen[call] = what, backends.BACKENDS


def known(settings: tuple[Any, ...], values: Iterable[Any]) -> Hashable:
    """By what a call is known: the settings and kinds of its values, and what chooses among the backends.

    None where it has to be checked each time: somebody compiles, records, transforms or debugs, one of the tensors is
    of a kind of its own, or a number is no plain float.

    Args:
        settings: where a check may tell True from 1, with its type: to a dict they are one.
        values: tensors, numbers and None.
    """
    if not plain() or checks.debugging():
        return None
    found: list[Any] = []
    try:
        for value in values:
            if value is None:
                found.append(None)
                continue
            kind = type(value)
            if kind is float:
                # To a dictionary 0.0 and -0.0 are one.
                found.append(value or str(value))
            elif kind is Tensor or kind is Parameter or kind is Lazy:
                if value.layout is not strided or value.is_neg() or left_behind(value):
                    return None
                found += (value.shape, value.stride(), value.dtype, value.device)
                if kind is Lazy:
                    found.append(Lazy)
            else:
                return None
    except RuntimeError:  # a nested tensor, which has no shape
        return None
    return settings, tuple(found), _environment.get(_INTERPRET)


# os.environ.get raises and catches a KeyError where there is no such variable, at ten times the price.
_environment, _INTERPRET = os.environ._data, os.environ.encodekey("TRITON_INTERPRET")  # type: ignore[attr-defined]
