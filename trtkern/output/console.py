"""Standard output, of commands and of programs."""

from __future__ import annotations

from functools import partial

from rich.console import Console


def console() -> Console:
    """Standard output, for every command. Text stands there as it is: a path is no markup, no emoji and no number to
    colour; who wants a style passes a ``Text``. Where it is no terminal lines are not cut to a width of 80.
    """
    plain = partial(Console, markup=False, emoji=False, highlight=False)
    made = plain()
    return made if made.is_terminal else plain(width=140)
