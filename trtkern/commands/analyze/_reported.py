"""The analyses of runs for their report: read where they are there, made where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from trtkern import names as known
from trtkern.analysis import Result
from trtkern.commands import analyze
from trtkern.commands._common import Quit, console, one_line
from trtkern.commands._runs import weights
from trtkern.commands.analyze._opened import FOLDER, Opened, bar, keep, opened, weights_in_words
from trtkern.reports.runs import Analyses, Run
from trtkern.training import resuming


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """The analyses of a report, in the order of its page.

    Raises:
        ValueError: one that is not known.
    """
    for option, given in (("only", only), ("skip", skip)):
        for name in given:
            known.one_of(option, name, analyze.REPORTED)
    return [name for name in analyze.REPORTED if (not only or name in only) and name not in skip]


class Gathered:
    """The analyses of a run: those that its folder holds, and those that are made now.

    Args:
        run: of that run.
        names: which ones are wanted.
        given: options of ``opened``: data_dir, backend, device, threads.
    """

    def __init__(self, run: Run, names: Sequence[str], given: dict[str, Any]) -> None:
        self.run, self.names, self.given = run, names, given
        self.results: dict[str, Result] = {}
        self.notes: dict[str, str] = {}
        """Why one is not there, or not as it should be."""
        self.damaged: dict[str, str] = {}
        self._opened: tuple[Any, Opened] | None = None
        self.now = self._weights()
        for name in names:
            analysis_of(name)  # loads the class that the file is of
            try:
                self.results[name] = Result.load(self.place(name))
            except FileNotFoundError:
                continue
            except ValueError as error:
                self.damaged[name] = str(error)

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
        """Raise a ValueError if a file is damaged: nothing will make it anew."""
        for name, error in self.damaged.items():
            raise ValueError(f"report: {error}: leave out --no-compute, or leave the analysis out by --skip {name}")

    def fill(self, compute: bool) -> list[str]:
        """Make what is not there and what is of other weights; what went wrong, a line each.

        Args:
            compute: False leaves it as it is, and notes it.
        """
        failed = []
        for name in self.names:
            old = name in self.results and self._old(name)
            if name in self.results and not old:
                continue
            if not compute:
                self._note(name, old)
            elif self.now is None:
                self.notes[name] = "not made: the run has no weights yet"
            elif error := self._make(name):
                self.results.pop(name, None)
                self.notes[name] = f"could not be made: {error}"
                failed.append(f"{name} of {self.run.label} could not be made ({error})")
        self._opened = None
        return failed

    def _note(self, name: str, old: bool) -> None:
        if old:
            made = self.results[name].about["weights"]
            self.notes[name] = f"of other weights ({made}) than those that the run has now ({self.now})"
        else:
            self.notes[name] = "not made yet (--no-compute)"

    def _make(self, name: str) -> str:
        """Make and keep an analysis; what went wrong in words, or nothing."""
        say = console().print
        if name in self.damaged:
            say(f"report: {self.damaged[name]}", soft_wrap=True)
        say(f"{name} of {self.run.label} ...", soft_wrap=True)
        module = analysis_of(name)
        try:
            looked_at = self._open(getattr(module, "OPENED", {}))
            with bar(f"{name} of {self.run.label}") as told:
                result = module.measure(looked_at, told)
            keep(result, self.place(name))
        except (ValueError, TypeError, RuntimeError, OSError, ImportError, Quit) as error:
            return one_line(error)
        self.results[name] = result
        return ""

    def _open(self, options: dict[str, Any]) -> Opened:
        """The run, opened once for analyses in a row that want the same of it."""
        if self._opened is None or self._opened[0] != options:
            self._opened = None
            self._opened = options, opened(str(self.run.folder), **{**options, **self.given})
        return self._opened[1]


def analysis_of(name: str) -> Any:
    """The module of an analysis."""
    return import_module(analyze.REPORTED[name])


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
