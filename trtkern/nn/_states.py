"""NamedTuples that are made of the names of their parts, and pickle."""

from __future__ import annotations

import re
from collections import namedtuple
from functools import cache
from typing import Any


@cache
def state_type(kind: str, names: tuple[str, ...]) -> Any:
    """A NamedTuple class of that name with these parts; its values pickle by both."""

    def reduce(self: Any) -> tuple:
        return _restored, (kind, names, tuple(self))

    made = namedtuple(re.sub(r"[^0-9A-Za-z_]", "_", kind), names)  # type: ignore[misc]
    made.__reduce__ = reduce  # type: ignore[method-assign]
    made.__module__ = __name__
    return made


def _restored(kind: str, names: tuple[str, ...], parts: tuple) -> Any:
    return state_type(kind, names)(*parts)
