"""``trtkern doctor``, where typer is there: ``trtkern.doctor`` runs without."""

from __future__ import annotations

from trtkern import doctor as machine
from trtkern.commands._json import as_json, tell


@as_json("doctor")
def doctor() -> int:
    """Show what works on this machine, what does not and why, and try every backend on numbers.

    The exit status is 1 if a backend that is available computes something wrong.
    """
    return machine.main(tell)
