"""What a run that goes on may be told otherwise, and whether its folder says what its checkpoint does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trtkern.data import difference
from trtkern.training import run
from trtkern.training.checkpoint import Checkpoint
from trtkern.training.options import FREE
from trtkern.training.plan import absolute
from trtkern.training.settings import Settings, fits_device, flat, resolve_device


def differences(before: Settings, now: Settings) -> dict[str, tuple[Any, Any]]:
    """{dotted name: (before, now)} of what is not the same."""
    old, new = flat(before.to_json()), flat(now.to_json())
    names = dict.fromkeys([*old, *new])
    return {name: pair for name in names if (pair := (old.get(name), new.get(name)))[0] != pair[1]}


def words(different: Mapping[str, tuple[Any, Any]]) -> str:
    """Them in words."""
    return ", ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in different.items())


def settings(folder: Path, saved: Checkpoint | None, given: Mapping[str, Any]) -> Settings:
    """The settings with which a run goes on.

    They are those of config.json, which must be the checkpoint's but for what is ``options.FREE``; where there is no
    such file, the checkpoint's, or without one those of the plan.

    Args:
        folder: the run folder.
        saved: the checkpoint to go on from; None begins anew.
        given: what the user wants otherwise, of ``options.FREE``; None is nothing.

    Raises:
        ValueError: the files disagree, are damaged, or a value is out of range.
        RuntimeError: a device that this machine does not have.
    """
    kept = None if saved is None else settings_in(saved)
    found = run.config_of(folder)
    if kept is not None and found is not None:
        other = {name: pair for name, pair in differences(kept, found).items() if name not in FREE}
        if other:
            path = folder / run.CONFIG
            raise ValueError(
                f"--resume: expected in {path} the settings of the run's checkpoint, got others: {words(other)}; put "
                f"them back, or delete {path.name}, which is written anew from the checkpoint; for other settings "
                f"begin another run"
            )
    base = found or kept or run.settings_of(folder)
    wanted = {name: value for name, value in given.items() if value is not None}
    for name in wanted:
        if name not in FREE:
            raise TypeError(f"resume: expected one of {', '.join(FREE)}, got {name}")
    wanted = {name: absolute(name, value) for name, value in wanted.items()}
    made = Settings.from_json({**base.to_json(), **wanted})
    made = replace(made, device=resolve_device(made.device))
    fits_device(made.to_json(), made.device)
    begun = 0 if saved is None else saved.metadata["epoch"]
    if made.epochs < begun:
        raise ValueError(f"--epochs: expected at least {begun}, as many as the run has begun, got {made.epochs}")
    return made


def settings_in(saved: Checkpoint) -> Settings:
    """The settings that a checkpoint was written with.

    Raises:
        ValueError: it has none, or damaged ones.
    """
    values = saved.metadata.get("settings")
    if not isinstance(values, dict):
        raise ValueError("checkpoint: expected one of a training, which has its settings, got one without")
    try:
        return Settings.from_json(values)
    except ValueError as error:
        raise ValueError(f"checkpoint: expected the settings of a training; {error}") from None


def notes(
    before: Settings, now: Settings, versions: dict[str, str], files: str | None, processes: tuple[int, int] = (1, 1)
) -> list[str]:
    """What the user should know of a run that goes on with other settings, or on another machine.

    Args:
        before: the checkpoint's.
        now: those of the run.
        versions: of the checkpoint.
        files: how the data set differs (``other_files``), if it does.
        processes: how many trained before, and do now.
    """
    different = differences(before, now)
    said = []
    if "epochs" in different:
        said.append(
            f"{now.epochs} epochs instead of {before.epochs}: the learning rate of the steps that are left is that of "
            f"a run of {now.epochs} epochs; the steps that were made had the other one"
        )
    if files:
        said.append(f"from here on another run, with other files than before: {files}")
    inexact = [words({name: different[name]}) for name in ("device", "threads", "parallel") if name in different]
    if processes[0] != processes[1]:
        inexact.append(words({"processes": processes}))
    inexact += [other] if (other := run.differences(versions)) else []
    if inexact:
        said.append(f"the same numbers to the last bit are not promised: {', '.join(inexact)}")
    return said


def same_classes(saved: Checkpoint, classes: Sequence[str]) -> None:
    """Raise a ValueError if the data set has other classes than that of the training; it names the first.

    Data of the user's that name no classes have as many as the network has outputs, which is seen once it is made.
    """
    before = saved.metadata.get("classes") or []
    if not classes or before == list(classes):
        return
    pairs = list(zip_longest(before, classes))
    place = next(index for index, (old, new) in enumerate(pairs) if old != new)
    old, new = ("none" if name is None else repr(name) for name in pairs[place])
    raise ValueError(
        f"checkpoint: expected one for the classes of these files; class {place} was {old} in training "
        f"({len(before):,} classes), is {new} here ({len(classes):,} classes): the network's answers would get other "
        f"names"
    )


def other_files(saved: Checkpoint, files: dict[str, Any]) -> str | None:
    """How a data set differs from that of the training, in words; empty if it does not, None if that is not known.

    Args:
        saved: the checkpoint.
        files: the fingerprint of the data set (``trtkern.data.fingerprint``).
    """
    before = saved.metadata.get("data")
    return None if before is None else difference(before, files)
