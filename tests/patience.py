"""How long a test waits for another process or thread: only what hangs takes so long, however busy the machine is."""

PATIENCE = 1800
"""Seconds."""
