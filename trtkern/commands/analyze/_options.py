"""The options that the analyses share; nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from trtkern import names
from trtkern.commands._common import need, user_errors

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder of `trtkern train`, or one of its checkpoint files.")
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", help="How many images to look at: drawn at random, always the same."),
]
SplitOption = Annotated[
    str, typer.Option("--split", help=f"Which images: {', '.join(names.SPLITS)}; never with random changes.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="How many images are computed at a time.")]
DataDirOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The folder with the files of the data set.", show_default="as in training"),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        help=f"What computes the spiking neurons: {', '.join(names.BACKENDS)}.", show_default="as in training"
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:N.", show_default="as in training"
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(help="How many CPU threads to use.", show_default="as in training")]
OutOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Where the numbers go, as JSON; the picture lies beside it.", show_default="RUN/analysis"
    ),
]


@contextmanager
def asked() -> Iterator[None]:
    """Around the part of a command that the user can put right: each such error is one line."""
    need("train", "matplotlib", "safetensors")
    with user_errors():
        yield
