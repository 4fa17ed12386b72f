"""``trtkern analyze energy``."""

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


@as_json("analyze energy")
def energy(
    run: RunArgument,
    samples: SamplesOption = 512,
    split: SplitOption = "test",
    sum_pj: Annotated[float, typer.Option("--sum-pj", metavar="PJ", help="Energy of an addition.")] = 0.9,
    mac_pj: Annotated[
        float, typer.Option("--mac-pj", metavar="PJ", help="Energy of a multiplication with its addition.")
    ] = 4.6,
    static: Annotated[
        str,
        typer.Option(help="What a layer costs whose input is the same at every step: `once` or `every step`."),
    ] = "once",
    zeros: Annotated[
        str,
        typer.Option(help="Zeros of analog inputs: `skipped`, or `counted` as in a dense layer."),
    ] = "skipped",
    integers: Annotated[
        str, typer.Option(help="What an integer n > 1 costs, a sum of spikes: a `mac`, or n `sums`.")
    ] = "mac",
    updates: Annotated[bool, typer.Option("--updates", help="Count the neurons' own updates too.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Count accesses to on-chip memory too (Lemaire et al. 2022).")
    ] = False,
    bits: Annotated[int, typer.Option(help="With --memory: bits of a weight and of a potential.")] = 32,
    batch_size: BatchOption = 64,
    data_dir: DataDirOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    out: OutOption = None,
) -> int:
    """Count the synaptic operations of a trained network, and model the energy that they take.

    The operations are counted exactly, from the spikes; the energy of each is a constant. It is a model, not a
    measurement.
    """
    with asked(
        run, split=split, samples=samples, batch_size=batch_size, backend=backend, device=device, threads=threads,
        static=static, zeros=zeros, integers=integers,
    ):  # fmt: skip
        from trtkern import analysis
        from trtkern.commands.analyze import _opened

        memory_of = analysis.Memory(bits=bits) if memory else None
        opened = _opened.opened(
            run, split=split, samples=samples, batch_size=batch_size, data_dir=data_dir, backend=backend, device=device,
            threads=threads,
        )  # fmt: skip
    with _opened.bar("synaptic operations") as told, quits(USER, ValueError, TypeError):
        found = analysis.energy(
            opened.trainer.model,
            opened.samples,
            sum_pj=sum_pj,
            mac_pj=mac_pj,
            static=static,
            zeros=zeros,
            integers=integers,
            updates=updates,
            memory=memory_of,
            progress=told,
        )
    return _opened.finish(replace(found, about=opened.about), _opened.place_of(opened, run, "energy", out))
