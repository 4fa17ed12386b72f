"""How long a test waits for another process or thread: only what hangs takes so long, however busy the machine is."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 1800
"""Seconds."""


@contextmanager
def no_hang() -> Iterator[None]:
    """What waits for ever inside fails its test instead of the whole run."""

    def fail(number, frame):
        raise TimeoutError(f"nothing within {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
