"""Keeping memory pages between calls, for programs that allocate large tensors again and again on a CPU."""

from __future__ import annotations

import ctypes

# glibc's <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_pages() -> bool:
    """Tell glibc to keep freed memory in the process; returns whether it took.

    By default it maps blocks of 32 MiB and more anew on each allocation, and the page faults cost more than the kernels
    that write there. This is a setting of the whole process, so programs call it; the library never does.

    It takes some ten rounds of equal allocations to settle: glibc parks the small remainder of an aligned block in its
    per-thread cache, and until that is full a block given back is too small for the next request of its own size.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # no glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
