"""``trtkern data NAME``: makes tar shards of a folder of images, and reads a data set once to see what is broken."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtkern import names
from trtkern.commands._common import FAILURE, Commands, Quit, bar, need, quits, user_errors
from trtkern.commands._json import as_json, tell
from trtkern.datasets import DATASETS
from trtkern.output.console import console
from trtkern.output.text import parsed_size, size

if TYPE_CHECKING:
    from torch import Tensor

    from trtkern.data.checking import Blocks

LINES = 20
"""Of what is broken that are shown; --json has all of it."""

app = typer.Typer(
    cls=Commands,
    help="Look after the files of a data set: make tar shards of a folder of images, find what is broken.",
    rich_markup_mode="markdown",
)
ClassListOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A text file of the classes to take, one a line.", show_default="all"),
]


@app.command()
def shard(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder of images by class, with train and val in it or without.")
    ],
    target: Annotated[str, typer.Argument(metavar="DIR", help="The folder of the shards, new or empty.")],
    shard_size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="At how many bytes a shard is full.")
    ] = "256MiB",
    seed: Annotated[
        int, typer.Option(help="Of the order of the images, which spreads the classes over the shards.")
    ] = 0,
    class_list: ClassListOption = None,
) -> int:
    """Make tar shards of a folder of images, in the layout of webdataset, with an index and classes.txt beside them.

    The images stay as they are, byte for byte. A shard appears when it is whole; the same command goes on where it was
    stopped.
    """
    need("data", "safetensors", "PIL")
    with user_errors():
        limit = parsed_size(shard_size, "--size")
        from trtkern.data import tar_writer

        found = tar_writer.source(source, class_list)
        with bar("images in shards") as told:
            written = tar_writer.write(found, Path(target), limit, seed, told)
    before = f", {written.before:,} of them from before" if written.before else ""
    console().print(
        f"{target}: {written.images:,} images of {len(found.classes):,} classes in {written.shards:,} shards{before}, "
        f"{size(written.size)}; `trtkern data check {target}` reads them", soft_wrap=True,
    )  # fmt: skip
    return 0


@app.command()
@as_json("data check")
def check(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The folder with the files of the data set.")],
    name: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="NAME",
            help="Which data set it is, as of `trtkern train`.",
            show_default="images or recordings of your own, by class or in tar shards",
        ),
    ] = None,
    class_list: ClassListOption = None,
    workers: Annotated[
        int | None,
        typer.Option(help="How many processes read; 0: this one does.", show_default="one a core"),
    ] = None,
) -> int:
    """Read every file of a data set once and name all that is broken; the exit status is 1 if something is.

    Images are decoded to their end, the headers of tar shards are followed, recordings of events are made into frames.
    """
    need("data", "safetensors", "PIL")
    with user_errors():
        if workers is not None and workers < 0:
            raise ValueError(f"--workers: expected an integer of at least 0, got {workers}")
        if name is not None:
            names.one_of("data", name, [each for each in DATASETS if each != "digits"])
        if not Path(directory).is_dir():
            raise FileNotFoundError(
                f"data check: expected a folder with the files of a data set, got no folder {directory}"
            )
        from trtkern.data import checking

        found = checking.find(directory, name, class_list)
        blocks = checking.Blocks(found.parts)
    read: Counter[str] = Counter()
    for part in found.parts:
        read[part.what] += part.length
    broken = [*found.broken, *_broken(blocks, len(os.sched_getaffinity(0)) if workers is None else workers)]
    counts = ", ".join(f"{count:,} {what}" for what, count in read.items() if count) or "nothing"
    out = console()
    tell(directory=directory, data=name, read=read, broken=broken)
    for line in broken[:LINES]:
        out.print(line, soft_wrap=True)
    if len(broken) > LINES:
        out.print(f"and {len(broken) - LINES:,} more; --json - names all of them")
    if broken:
        raise Quit(f"data check: {len(broken):,} broken in {directory}, {counts} read", FAILURE)
    out.print(f"{directory}: {counts} read, nothing is broken", soft_wrap=True)
    return 0


def _broken(blocks: Blocks, workers: int) -> Iterator[str]:
    """What is broken, as the blocks are read."""
    from trtkern.data.checking import lines
    from trtkern.training.workers import ahead

    done, total = 0, sum(blocks.things(number) for number in range(len(blocks)))
    with bar("read") as told, quits(FAILURE, OSError):
        answers: Generator[Tensor, None, None]
        if not workers or not len(blocks):
            answers = (blocks(number) for number in range(len(blocks)))
        else:
            answers = ahead(blocks, len(blocks), workers, blocks.size)
        with closing(answers):
            for number, answer in enumerate(answers):
                yield from lines(answer)
                done += blocks.things(number)
                told(done, total)
