"""Ctrl-C and SIGTERM: when they are not wanted, they wait."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, they wait: for what must not be interrupted half way, such as imports. They come at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
