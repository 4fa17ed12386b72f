"""The analyses of a run for its report: read where they are there, made where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtkern.analysis import Result
from trtkern.commands import analyze
from trtkern.commands._common import INTERRUPTED, Quit, one_line
from trtkern.commands._runs import weights
from trtkern.commands.analyze._opened import FOLDER, quiet, weights_in_words
from trtkern.output.console import console
from trtkern.reports.runs import Analyses, Run
from trtkern.training import resuming


class Gathered:
    """The analyses of a run: those that its folder holds, and those that are made now.

    Args:
        run: of that run.
        names: which ones are wanted.
        given: options of the commands that make them: data_dir, backend, device, threads.

    Raises:
        ValueError, OSError: checkpoints or files that cannot be read.
    """

    def __init__(self, run: Run, names: Sequence[str], given: dict[str, Any]) -> None:
        self.run, self.names, self.given = run, names, given
        self.notes: dict[str, str] = {}
        """Why one is not there, or not as it should be."""
        self.results: dict[str, Result] = {}
        self.damaged: dict[str, str] = {}
        self.now = self._weights()
        for name in names:
            try:
                self.results[name] = self._load(name)
            except FileNotFoundError:
                continue
            except ValueError as error:
                self.damaged[name] = one_line(error)

    def _load(self, name: str) -> Result:
        found = Result.load(self.place(name))
        if name != found.NAME:
            raise ValueError(
                f"analysis: expected a file that {name} saved, got {self.place(name)}, which is of {found.NAME}; make "
                "it anew"
            )
        return found

    def place(self, name: str) -> Path:
        """Its file."""
        return self.run.folder / FOLDER / f"{name}.json"

    def _weights(self) -> str | None:
        """Which weights the run has now; None before it has some."""
        try:
            saved = weights(self.run.folder)
        except FileNotFoundError:
            return None
        return weights_in_words(saved, resuming.settings_in(saved))

    def _old(self, name: str) -> bool:
        """Whether it is of other weights than the run has now."""
        return self.now is not None and self.results[name].about.get("weights", self.now) != self.now

    def whole(self) -> None:
        """Raise a ValueError if a file is damaged and nothing will make it anew."""
        for name, error in self.damaged.items():
            raise ValueError(f"{error} without --no-compute, or leave it out by --skip {name}")

    def fill(self, compute: bool) -> list[str]:
        """Make what is not there and what is of other weights; what went wrong, a line each.

        Args:
            compute: False leaves it as it is, and notes it.
        """
        failed = []
        for name in self.names:
            if name in self.results and not self._old(name):
                continue
            if not compute:
                self.notes[name] = self._lack(name)
            elif self.now is None:
                self.notes[name] = "not made: the run has no weights yet"
            elif error := self._make(name):
                self.results.pop(name, None)
                self.notes[name] = f"could not be made: {error}"
                failed.append(f"{name} of {self.run.label} could not be made ({error})")
        return failed

    def _lack(self, name: str) -> str:
        """What is not right with one that is not made."""
        if name not in self.results:
            return "not made yet (--no-compute)"
        made = self.results[name].about["weights"]
        return f"of other weights ({made}) than those that the run has now ({self.now})"

    def _make(self, name: str) -> str:
        """Make an analysis by its command; what went wrong in words, or nothing. A command may make several."""
        say = console().print
        if name in self.damaged:
            say(f"report: {self.damaged[name]}", soft_wrap=True)
        say(f"{name} of {self.run.label} ...", soft_wrap=True)
        every, path = analyze.reported(), str(self.run.folder)
        command = every[name]
        several = "runs" in command.__annotations__
        try:
            with quiet():
                command([path] if several else path, **self.given)
            for each in self.names:
                if every[each] is command:
                    self.results[each] = self._load(each)
        except (ValueError, TypeError, RuntimeError, OSError, Quit) as error:
            if isinstance(error, Quit) and error.status == INTERRUPTED:
                raise
            return one_line(error)
        return ""


def together(names: Sequence[str], gathered: Sequence[Gathered]) -> list[Analyses]:
    """The analyses of all runs, by analysis."""
    several = len(gathered) > 1
    made = []
    for name in names:
        results = {each.run.label: each.results[name] for each in gathered if name in each.results}
        said = [(each.run.label, each.notes[name]) for each in gathered if name in each.notes]
        notes = [f"{label}: {note}." if several else f"{note[0].upper()}{note[1:]}." for label, note in said]
        made.append(Analyses(name, results, notes))
    return made
