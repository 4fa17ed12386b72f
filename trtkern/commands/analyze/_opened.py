"""A run that is looked at: its weights, its samples, and where what was found goes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from trtkern import names
from trtkern.analysis import Result, Samples
from trtkern.analysis._network import Progress as Told
from trtkern.commands import _common
from trtkern.commands._common import FAILURE, quits
from trtkern.commands._json import tell
from trtkern.commands._runs import FAILURES, to_evaluate, weights, with_options
from trtkern.output.console import console
from trtkern.training import checkpoint, resuming, run
from trtkern.training.loop import Trainer
from trtkern.training.settings import Settings

FOLDER = "analysis"
"""Of a run folder: what was found out about it."""


class Opened(NamedTuple):
    """A run that is looked at."""

    folder: Path
    """Of the run."""
    trainer: Trainer
    """With the weights that are looked at; it trains nothing."""
    samples: Samples
    about: dict[str, str]
    """``Result.about``."""


def opened(
    path: str,
    *,
    split: str = "train",
    samples: int | None = 512,
    batch_size: int = 64,
    **given: Any,
) -> Opened:
    """A run with its chosen weights, or with those of a checkpoint file, and samples as its network takes them.

    Args:
        path: a run folder or a checkpoint file.
        split: "train" (as in training, without random changes), "validation" or "test".
        samples: so many, drawn at random and always alike; None, or more than there are, is all.
        batch_size: of the samples.
        given: data_dir, backend, device, threads; None is as in training.

    Raises:
        ValueError, OSError: no such run, a run without checkpoints, a split that it does not have.
    """
    names.one_of("split", split, names.SPLITS)
    for name, value in (("samples", samples), ("batch-size", batch_size), ("threads", given.get("threads"))):
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected an integer of at least 1, got {value}")
    place = Path(path)
    saved = weights(place)
    trainer = to_evaluate(saved, with_options(resuming.settings_in(saved), **given))
    if split not in trainer.splits:
        raise ValueError(
            f"--split: expected one of {', '.join(trainer.splits)}, which this run has, got {split}; validation images "
            "are held out with --select validation"
        )
    taken = trainer.samples(split, samples, batch_size)
    settings = trainer.settings
    about = {
        "run": f"{settings.data}, {settings.loss} loss, T={settings.timesteps}, seed {settings.seed}",
        "weights": weights_in_words(saved, settings),
        "samples": f"{len(taken):,} of {len(trainer.splits[split].images):,} {split} images, without random changes",
        "precision": "float32",
        "command": shlex.join(["trtkern", *sys.argv[1:]]),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions().items() if name != "platform"),
    }
    return Opened(place if place.is_dir() else place.parent, trainer, taken, about)


def weights_in_words(saved: checkpoint.Checkpoint, settings: Settings) -> str:
    """Which weights those are, as ``Result.about`` says it."""
    return f"epoch {saved.metadata['epoch']} of {settings.epochs}, step {saved.metadata.get('made', '?')}"


def epochs_of(path: str) -> list[Path]:
    """The weights of a run over its epochs, the earliest first: what --keep-every kept, else the checkpoints.

    Raises:
        ValueError: there are none.
    """
    folder = Path(path)
    found = checkpoint.found(folder, "epoch") or checkpoint.found(folder)
    if not folder.is_dir() or not found:
        raise ValueError(
            f"analyze: expected a run folder with the weights of its epochs, got {path}; train with --keep-every N"
        )
    return found[::-1]


@contextmanager
def bar(what: str) -> Iterator[Told]:
    """``_common.bar``; what befalls the analysis within ends the command."""
    with _common.bar(what) as told, quits(FAILURE, *FAILURES):
        yield told


def place_of(opened: Opened, path: str, kind: str, out: str | None) -> Path:
    """Where the numbers of an analysis go: ``out``, or its name in RUN/analysis."""
    if out is not None:
        return Path(out)
    stem = kind if Path(path).is_dir() else f"{kind}-{Path(path).stem}"
    return opened.folder / FOLDER / f"{stem}.json"


def finish(result: Result, place: Path) -> int:
    """Save the numbers and the picture, and show the table."""
    with quits(FAILURE, OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        result.save(place)
        result.plot(place.with_suffix(".png"))
    tell(analyses=[{"analysis": result.NAME, "file": place, **vars(result)}])
    if not _quiet.get():
        out = console()
        out.print(str(result), soft_wrap=True)
        out.print(f"{place} and {place.with_suffix('.png').name}", soft_wrap=True)
    return 0


_quiet = ContextVar("quiet", default=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, ``finish`` shows nothing."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)
