"""Keeping memory pages between calls, for programs that allocate large tensors again and again on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_pages", "mapping_anew"]

# glibc's <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MMAP_MAX = 65536
"""glibc's default."""

_kept = False


def keep_pages() -> bool:
    """Tell glibc to keep freed memory in the process; returns whether it took.

    By default it maps blocks of 32 MiB and more anew on each allocation, and the page faults cost more than the kernels
    that write there. This is a setting of the whole process, so programs call it; the library never does.

    It takes some ten rounds of equal allocations to settle: glibc parks the small remainder of an aligned block in its
    per-thread cache, and until that is full a block given back is too small for the next request of its own size.
    """
    global _kept
    _kept = _mallopt(_M_MMAP_MAX, 0) and _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return _kept


@contextmanager
def mapping_anew() -> Iterator[None]:
    """After ``keep_pages()``: inside, a block that no kept page holds is mapped, and goes back when it is freed.

    For code that allocates many large tensors with small blocks between them: each small block takes a bite out of a
    large hole, into which the next large tensor does not fit any more, and a heap that keeps everything grows by a
    tensor a step.
    """
    if not _kept:
        yield
        return
    _mallopt(_M_MMAP_MAX, _MMAP_MAX)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_MAX, 0)


def _mallopt(parameter: int, value: int) -> bool:
    """Whether it took."""
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (OSError, AttributeError):  # no glibc
        return False
