"""``trtkern evaluate``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from trtkern import backends
from trtkern.commands._common import FAILURE, console, quits, user_errors
from trtkern.data import load
from trtkern.training import checkpoint
from trtkern.training.loop import Trainer
from trtkern.training.pages import keep_pages
from trtkern.training.settings import Settings, one_of, resolve_device
from trtkern.training.watch import NonFiniteError


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint file.")],
    data_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the data set's files are.", show_default="as in training")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help=f"{', '.join(backends.NAMES)}.", show_default="as in training")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.", show_default="as in training")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="as in training")] = None,
) -> int:
    """Measure the test accuracy of a trained network.

    With the options of its training it is exactly the accuracy that training printed at its end.
    """
    with user_errors():
        saved = checkpoint.load(Path(run))
        settings = _settings(saved, data_dir, backend, device, threads)
        torch.set_num_threads(settings.threads)
        keep_pages()
        trainer = Trainer(settings, load(settings.data, settings.data_dir))
        trainer.restore(saved)
    begin = time.perf_counter()
    with quits(FAILURE, NonFiniteError):
        values = trainer.evaluate(trainer.data.test)
    seconds = time.perf_counter() - begin
    from trtkern.training import progress

    images = trainer.data.test.labels.numel()
    rows = {
        **progress.scores(values, settings.loss, images),
        "speed": f"{images / seconds:,.0f} samples/s",
        "model": f"{settings.loss} loss, T={settings.timesteps}, epoch {saved.metadata['epoch']} of {settings.epochs}",
        "LIF backend": progress.place(trainer),
    }
    console().print(progress.facts(f"{settings.data}, {run}", rows))
    return 0


def _settings(
    saved: checkpoint.Checkpoint, data_dir: str | None, backend: str | None, device: str | None, threads: int | None
) -> Settings:
    """The settings of the training with what the user wants otherwise."""
    settings = Settings.from_json(saved.metadata["settings"])
    if threads is not None and threads < 1:
        raise ValueError(f"--threads: expected an integer of at least 1, got {threads}")
    return replace(
        settings,
        data_dir=settings.data_dir if data_dir is None else data_dir,
        backend=settings.backend if backend is None else one_of("backend", backend, backends.NAMES),
        device=resolve_device(settings.device if device is None else device),
        threads=settings.threads if threads is None else threads,
    )
