"""``trtkern analyze spikes``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from trtkern.commands._common import USER, quits
from trtkern.commands._json import as_json
from trtkern.commands.analyze._options import (
    BackendOption,
    BatchOption,
    DataDirOption,
    DeviceOption,
    OutOption,
    RunArgument,
    SamplesOption,
    SplitOption,
    ThreadsOption,
    asked,
)


@as_json("analyze spikes")
def spikes(
    run: RunArgument,
    samples: SamplesOption = 512,
    split: SplitOption = "test",
    sample: Annotated[int, typer.Option(help="The number of the image, of those looked at, that a raster shows.")] = 0,
    neurons: Annotated[int, typer.Option(help="How many neurons of a layer the raster shows at most.")] = 256,
    batch_size: BatchOption = 64,
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    out: OutOption = None,
) -> int:
    """Show which neurons fire and when: a raster, rates by step and by neuron, silent and saturated neurons."""
    with asked(
        run, split=split, samples=samples, batch_size=batch_size, backend=backend, device=device, threads=threads,
    ):  # fmt: skip
        from trtkern import analysis
        from trtkern.commands.analyze import _opened

        opened = _opened.opened(
            run, split=split, samples=samples, batch_size=batch_size, data_dir=data_dir, backend=backend, device=device,
            threads=threads,
        )  # fmt: skip
    with _opened.bar("spikes") as told, quits(USER, ValueError, TypeError):
        found = analysis.spikes(opened.trainer.model, opened.samples, shown=[sample], neurons=neurons, progress=told)
    return _opened.finish(replace(found, about=opened.about), _opened.place_of(opened, run, "spikes", out))
