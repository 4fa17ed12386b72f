"""Calls that were checked before: what depends on shapes, types, places and settings alone is not asked again.

A call is known by all that the checks look at. What its tensors hold is looked at each time, as ever.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from typing import Any

from trtkern import backends
from trtkern.ops import checks
from trtkern.ops._library import kinds, plain

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

    None where it has to be checked each time: somebody compiles, records, transforms or debugs, or a value is of a kind
    of its own.

    Args:
        settings: where a check may tell True from 1, with its type: to a dict they are one.
        values: tensors, numbers and None.
    """
    if not plain() or checks.debugging():
        return None
    found = kinds(values)
    if found is None:
        return None
    return settings, found, os.environ.get("TRITON_INTERPRET")
