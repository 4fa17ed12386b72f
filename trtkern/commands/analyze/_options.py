"""The options that the analyses share; nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from trtkern import names
from trtkern.commands._common import need, user_errors
from trtkern.commands._completion import among, runs
from trtkern.training.folder import somewhere

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder of `trtkern train`, or one of its checkpoint files.", autocompletion=runs
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", help="How many images to look at: drawn at random, always the same."),
]
SplitOption = Annotated[
    str,
    typer.Option(
        "--split",
        help=f"Which images: {', '.join(names.SPLITS)}; never with random changes.",
        autocompletion=among(names.SPLITS),
    ),
]
BatchOption = Annotated[int, typer.Option("--batch-size", help="How many images are computed at a time.")]
DataDirOption = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The folder with the files of the data set.", show_default="as in training"),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        help=f"What computes the spiking neurons: {', '.join(names.BACKENDS)}.",
        show_default="as in training",
        autocompletion=among(names.BACKENDS),
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
def asked(*runs: str, **said: object) -> Iterator[None]:
    """Around the part of a command that the user can put right: each such error is one line.

    Args:
        runs: folders or checkpoint files, which must be there.
        said: values of these options; what can be said of them without torch is said at once.
    """
    need("train", "matplotlib", "safetensors")
    with user_errors():
        for name, value in said.items():
            if value is not None and name in _CHOICES:
                names.one_of(name, str(value), _CHOICES[name])
            elif value is not None and name == "device":
                names.device(str(value))
            elif isinstance(value, int) and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected an integer of at least 1, got {value}")
        for run in runs:
            somewhere(Path(run))
        yield


_CHOICES = {
    "split": names.SPLITS, "backend": names.BACKENDS, "confidence": names.CONFIDENCES, "static": names.STATIC,
    "zeros": names.ZEROS, "integers": names.INTEGERS, "loss": names.VIEWS, "method": names.CURVATURES,
}  # fmt: skip
"""The values of the options that name something."""
