"""``trtkern evaluate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from trtkern import names
from trtkern.commands._common import FAILURE, need, quits, user_errors
from trtkern.commands._completion import runs
from trtkern.commands._json import as_json, tell
from trtkern.output.console import console
from trtkern.training.folder import somewhere


@as_json("evaluate")
def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run folder of `trtkern train`, or one of its checkpoint files.", autocompletion=runs
        ),
    ],
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The folder with the files of the data set.", show_default="as in training"),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help=f"What computes the spiking neurons: {', '.join(names.BACKENDS)}.", show_default="as in training"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:N.", show_default="as in training"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="How many CPU threads to use.", show_default="as in training")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="How many processes decode image files; 0: this one does.", show_default="as in training"),
    ] = None,
) -> int:
    """Measure the test accuracy of a trained network; of a run folder, with the weights that the run chose.

    With the options of its training it is exactly the accuracy that training printed at its end.
    """
    need("train", "matplotlib", "safetensors")
    with user_errors():
        for name, value, least in (("threads", threads, 1), ("workers", workers, 0)):
            if value is not None and value < least:
                raise ValueError(f"--{name}: expected an integer of at least {least}, got {value}")
        if backend is not None:
            names.one_of("backend", backend, names.BACKENDS)
        if device is not None:
            names.device(device)
        somewhere(Path(run))
        from trtkern.commands import _runs
        from trtkern.training import progress, resuming

        saved = _runs.weights(Path(run))
        settings = resuming.settings_in(saved)
        given = {"data_dir": data_dir, "backend": backend, "device": device, "threads": threads, "workers": workers}
        trainer = _runs.to_evaluate(saved, _runs.with_options(settings, **given))
    begin = time.perf_counter()
    with quits(FAILURE, *_runs.FAILURES):
        values = trainer.evaluate(trainer.data.test)
    seconds = time.perf_counter() - begin
    images = len(trainer.data.test.images)
    rows = {
        **progress.scores(values, settings.loss, images),
        "speed": f"{images / seconds:,.0f} samples/s",
        "model": f"{settings.loss} loss, T={settings.timesteps}, epoch {saved.metadata['epoch']} of {settings.epochs}",
        "LIF backend": progress.place(trainer),
    }
    tell(
        run=run, data=settings.data, images=images, scores=values, samples_per_second=images / seconds,
        loss=settings.loss, timesteps=settings.timesteps, epoch=saved.metadata["epoch"], epochs=settings.epochs,
        backend=progress.place(trainer),
    )  # fmt: skip
    console().print(progress.facts(f"{settings.data}, {run}", rows))
    return 0
