"""How the learning rate goes over a run: by name, or by a function of the user's. The standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from trtkern import own
from trtkern.names import OBJECT, OWN, SCHEDULES, is_own, unknown

Factor = Callable[[int, int], float]
"""(step, steps of the run) -> what the highest rate is multiplied with."""


class Schedule(NamedTuple):
    """The learning rate of every step.

    As torch.optim.lr_scheduler computes it: CosineAnnealingLR, StepLR, MultiStepLR and OneCycleLR (without its cycle of
    the momentum). A cosine and a one-cycle go over all steps of the run; StepLR and MultiStepLR count epochs.

    Args:
        name: a key of ``trtkern.names.SCHEDULES``, or of the user's.
        options: what it takes.
        warmup: share of all steps in which the rate rises linearly first; a cosine begins behind them.
        factor: the user's.
    """

    name: str
    options: dict[str, Any]
    warmup: float = 0.0
    factor: Factor | None = None

    def rate(self, peak: float, step: int, steps: int, epochs: int) -> float:
        """The rate of a step.

        Args:
            peak: the highest one.
            step: of the run, from 0.
            steps: of an epoch.
            epochs: of the run.
        """
        total = steps * epochs
        if self.factor is not None:
            return peak * self.factor(step, total)
        rising = round(total * self.warmup)
        if step < rising:
            return peak * ((step + 1) / rising)
        if self.name == "cosine":
            least = self.options["eta_min"]
            fall = 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
            return least + (peak - least) * fall
        if self.name == "one-cycle":
            return self._one_cycle(peak, step, total)
        epoch = step // steps
        falls = 0
        if self.name == "step":
            falls = epoch // self.options["step_size"]
        elif self.name == "multi-step":
            falls = sum(epoch >= milestone for milestone in self.options["milestones"])
        for _ in range(falls):  # one after the other, as torch rounds them
            peak *= self.options["gamma"]
        return peak

    def _one_cycle(self, peak: float, step: int, total: int) -> float:
        """From peak / div_factor up to the peak in the share pct_start of the steps, and down by final_div_factor."""
        first = peak / self.options["div_factor"]
        top = float(self.options["pct_start"] * total) - 1
        if step <= top:
            return _between(first, peak, step / top if top else 1.0)
        last = first / self.options["final_div_factor"]
        return _between(peak, last, (step - top) / (total - 1 - top))


def _between(start: float, end: float, share: float) -> float:
    """Half a cosine from one to the other."""
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


def checked(said: dict[str, Any], warmup: float) -> dict[str, Any]:
    """A schedule's name and all that it takes.

    Raises:
        ValueError: an unknown name or option, or a value out of range; the message lists what there is.
    """
    name = said.get("name", "cosine")
    if is_own(name):
        if warmup:
            raise ValueError(
                f"--set warmup: expected 0 with a schedule of your own, which says all rates, got {warmup}"
            )
        return said
    if name not in tuple(SCHEDULES):
        raise unknown("--set schedule.name", name, SCHEDULES, f", or {OWN}")
    given = {key: value for key, value in said.items() if key != "name"}
    if others := sorted(set(given) - set(SCHEDULES[name])):
        raise unknown(f"--set schedule: {name}", others[0], SCHEDULES[name])
    options = {**SCHEDULES[name], **given}
    for key, value in options.items():
        words, right = _RANGES[key]
        if not right(value):
            raise ValueError(f"--set schedule.{key}: expected {words}, got {value!r}")
    if name == "multi-step" and not options["milestones"]:
        raise ValueError("--set schedule.milestones: expected the epochs after which the rate falls, got none")
    if name == "one-cycle" and warmup:
        raise ValueError(f"--set warmup: expected 0 with one-cycle, whose rise is pct_start, got {warmup}")
    return {"name": name, **options}


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "eta_min": ("a finite number of at least 0", lambda value: _real(value) and value >= 0),
    "step_size": ("a number of epochs of at least 1", _count),
    "gamma": ("a number above 0, of at most 1", lambda value: _real(value) and 0 < value <= 1),
    "milestones": ("a list of epochs", lambda value: isinstance(value, list) and all(map(_count, value))),
    "pct_start": ("a share above 0 and below 1", lambda value: _real(value) and 0 < value < 1),
    "div_factor": ("a finite number of at least 1", lambda value: _real(value) and value >= 1),
    "final_div_factor": ("a finite number of at least 1", lambda value: _real(value) and value >= 1),
}


def made(said: dict[str, Any], warmup: float, total: int, given: Factor | None = None) -> Schedule:
    """The schedule of the settings, for a run of so many steps.

    Args:
        said: what ``checked`` gave.
        warmup: as there.
        total: steps of the run.
        given: the user's function, where a program gave it.

    Raises:
        ValueError: one of the user's that raises, or gives no finite number of at least 0.
    """
    name = said["name"]
    options = {key: value for key, value in said.items() if key != "name"}
    if not is_own(name):
        return Schedule(name, options, warmup)
    told = given or own.imported(name, "schedule")
    if not callable(told):
        raise own.OwnError(f"schedule: expected a function of (step, steps of the run), got {told!r}")

    def factor(step: int, steps: int) -> float:
        try:
            value = told(step, steps, **options)
        except Exception as error:
            raise own.failed(error, f"schedule: expected {_spoken(name, told)} to return for step {step}") from error
        if not _real(value) or value < 0:
            raise own.OwnError(
                f"schedule: expected {_spoken(name, told)} to give a finite number of at least 0, by which the highest "
                f"rate is multiplied, got {value!r} for step {step} of {steps}"
            )
        return float(value)

    for step in {0, total // 2, max(0, total - 1)}:
        factor(step, total)
    return Schedule(name, options, 0.0, factor)


def _spoken(name: str, function: Any) -> str:
    return getattr(function, "__qualname__", repr(function)) if name == OBJECT else name
