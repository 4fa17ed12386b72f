"""Standard output, of commands and of programs."""

from __future__ import annotations

from functools import partial

from rich.console import Console

_quiet = False


def quieten() -> None:
    """From now on nothing is shown: this process is one of several, and another one shows what there is to see."""
    global _quiet
    _quiet = True


def console() -> Console:
    """Standard output, for every command. Text stands there as it is: a path is no markup, no emoji and no number to
    colour; who wants a style passes a ``Text``. Where it is no terminal lines are not cut to a width of 80.
    """
    plain = partial(Console, markup=False, emoji=False, highlight=False, quiet=_quiet)
    made = plain()
    return made if made.is_terminal else plain(width=140)
