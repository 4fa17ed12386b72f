"""``trtkern bench``. What is asked for is checked before anything is measured."""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtkern import names, neurons
from trtkern.bench import cases
from trtkern.commands._common import INTERRUPTED, Quit, need, user_errors
from trtkern.commands._completion import among
from trtkern.commands._json import as_json, tell
from trtkern.output.console import console

if TYPE_CHECKING:
    import torch

    from trtkern.bench.cases import Case
    from trtkern.bench.rounds import Options
    from trtkern.bench.rows import Row

ROWS = "trtkern-bench.csv"


@as_json("bench")
def bench(
    op: Annotated[
        str,
        typer.Option(
            help="What to measure: lif (neurons), bn-lif (BatchNorm and neurons), regularizer (the TRT penalty), pack "
            "(spikes to bits), delay (a delay a channel), all of these; or recurrent (neurons that feed each other), "
            "step (whole training steps of networks), overhead (the host's time for a small layer beside ReLU, with "
            "one thread; of the GPU backends without a GPU).",
            autocompletion=among(cases.OPS),
        ),
    ] = "all",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T,N",
            help="Sizes: T,N or T,B,N (time steps, batch, neurons); for bn-lif T,B,C,H,W; for delay T,B,C; "
            "for step what its network takes, such as T,B,2,H,W of vggsnn; for overhead T,B,C,H,W. May be given again.",
            show_default="those of --suite",
        ),
    ] = None,
    neuron: Annotated[
        str,
        typer.Option(
            metavar="NAME", help=f"Of --op lif: {', '.join(neurons.TABLE)}.", autocompletion=among(neurons.TABLE)
        ),
    ] = "LIF",
    network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="all of --suite, or the first that takes --shape",
            help="Of --op step: resnet19, vggsnn, sew_resnet34, mlp (three Linear layers), spikformer (a block), "
            "spikformer_4_384 or sdt_2_512. May be given again.",
            autocompletion=among(cases.NETWORKS),
        ),
    ] = None,
    candidates: Annotated[
        str,
        typer.Option(
            help="Of --op step, what is compared: all, or a list of own (this project), relu (ReLU in place of the "
            "neurons), exact (this project with torch's own convolutions), peers (neurons and networks of --peers), "
            "plain (plain torch), captured (the step of `trtkern train`), checkpoint (checkpointed blocks)."
        ),
    ] = "all",
    dtype: Annotated[str, typer.Option(help="Of the inputs: float32, bfloat16, float16.")] = "float32",
    backend: Annotated[
        str,
        typer.Option(
            help=f"Which kernels of this package: all, {', '.join(names.BACKENDS)}.",
            autocompletion=among(("all", *names.BACKENDS)),
        ),
    ] = "all",
    direction: Annotated[
        str,
        typer.Option(
            help="fwd (forward, without autograd), bwd (backward; of a step with the update of the weights), both (in "
            "one, as a training step has them), each (forward with autograd, bwd and both, in turn).",
            autocompletion=among(cases.DIRECTIONS),
        ),
    ] = "both",
    suite: Annotated[
        str,
        typer.Option(
            help="Which sizes: default, long (T of 100 and more), open-neuromorphic (that benchmark: Linear + LIF, "
            "batch 16, T = 500), sizes (many T and N, and every layer of the networks, against the strongest alone).",
            autocompletion=among(cases.SUITES),
        ),
    ] = "default",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T=1,4,16",
            help="Sizes of an axis of --op: every combination of those that are given is measured, the small ones "
            "first, against the strongest others alone. --shape has the axes that are not swept. May be given again: "
            "--sweep T=1,4 --sweep N=1024,65536.",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Only every N-th of the cases, from the K-th on: 2/8.", show_default="all"),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help="Which other libraries to compare with: all that are installed, none, or a list of "
            "spikingjelly, snntorch, norse, sinabs, exodus, rockpool."
        ),
    ] = "all",
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure the others compiled with torch.compile as well.")
    ] = True,
    rounds: Annotated[int, typer.Option(help="How often each candidate is timed; all take turns.")] = 25,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Time for everything together; what is slow gets fewer rounds or is left out."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to measure: auto (a GPU if there is one), cpu, cuda, cuda:N.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="How many CPU threads to use.", show_default="what torch takes")
    ] = None,
    csv: Annotated[Path, typer.Option(metavar="FILE", help="The file that every measured row is added to.")] = Path(
        ROWS
    ),
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the rows of this call as a picture.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md",
            help="Measure nothing, but write a page about the rows in --csv, a file or a folder of files.",
        ),
    ] = None,
) -> int:
    """Measure the kernels against the eager loop, torch.compile, BatchNorm + ReLU and the SNN libraries installed here.

    Each candidate is compared with float64 first; what disagrees is reported as WRONG and not timed.
    """
    if page is not None:
        return _write_page(page, csv)
    with user_errors():
        _check_numbers(rounds, budget, threads)
        if plot is not None:
            need("bench", "matplotlib")
            _check_folder(plot)
        from trtkern.bench import peers as libraries

        names.one_of("backend", backend, ("all", *names.BACKENDS))
        names.one_of("direction", direction, cases.DIRECTIONS)
        names.one_of("suite", suite, cases.SUITES)
        names.device(device)
        libraries.named(peers)
        compared = cases.candidates(candidates, op)
        wanted = _wanted(op, shape or [], dtype, suite, neuron, network or [], sweep or [])
        chosen = wanted if part is None else cases.part(wanted, part)
        import torch

        from trtkern.bench import measure, rows
        from trtkern.bench import rounds as timing
        from trtkern.training.settings import resolve_device

        where = torch.device("cpu" if op == "overhead" and device == "auto" else resolve_device(device))
        libraries.choose(peers)
        chosen = _fitting(chosen, where, bool(shape) and not sweep)
        suite = "sweep" if sweep else suite
        rows.check_writable(csv)
        if threads is not None or op == "overhead":
            torch.set_num_threads(threads or 1)
        malloc = "default"
        if where.type == "cpu":
            from trtkern import malloc as allocator

            malloc = "keeps pages" if allocator.keep_pages() else "default"
        options = timing.Options(
            where, backend, direction, suite, rounds, math.inf if budget is None else budget, peers, compiled, compared,
            malloc,
            ("trtkern", *_arguments()),
        )  # fmt: skip
    found = _run(chosen, options, csv)
    tell(rows=found)
    if plot is not None and found:
        from trtkern.bench import heat, lines
        from trtkern.bench import plot as bars

        with user_errors():
            {"sizes": heat.picture, "sweep": lines.picture}.get(suite, bars.picture)(found, plot)
    written = [csv, *([plot] if plot is not None and found else [])]
    console().print(f"rows of {measure.commit()}: {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def _wanted(
    op: str, shapes: list[str], dtype: str, suite: str, neuron: str, networks: list[str], sweeps: list[str]
) -> list[Case]:
    """The cases of a suite, of shapes, or of a sweep."""
    if not sweeps:
        return cases.select(op, shapes, dtype, suite, neuron, networks)
    if suite != "default":
        raise ValueError(f"--sweep: expected no --suite beside it, got --suite {suite}")
    from trtkern.bench import sweep

    cases.select(op, [], dtype, suite, neuron, networks)  # which refuses unknown names
    return sweep.cases(sweeps, op, shapes, dtype, neuron)


def _run(chosen: list[Case], options: Options, csv: Path) -> list[Row]:
    """Measure; every table is printed and its rows are saved when they are there."""
    from trtkern.bench import rows, runner
    from trtkern.bench.table import table

    out = console()
    found: list[Row] = []

    def sink(made: list[Row]) -> None:
        if made:
            rows.append(made, csv)
            found.extend(made)
            out.print(table(made))

    try:
        with user_errors():
            runner.run(chosen, options, sink)
    except KeyboardInterrupt:
        raise Quit(f"stopped; the {len(found)} rows that were measured are in {csv}", INTERRUPTED) from None
    return found


def _check_numbers(rounds: int, budget: float | None, threads: int | None) -> None:
    if rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, got {rounds}")
    if budget is not None and not budget > 0:
        raise ValueError(f"--budget: expected more than 0 seconds, got {budget}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads: expected an integer of at least 1, got {threads}")


def _check_folder(path: Path) -> None:
    """An error before the measurement if a picture cannot be written there."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"{path}: expected a folder that can be written, got {path.parent}")


def _fitting(chosen: list[Case], where: torch.device, named: bool) -> list[Case]:
    """Those that fit into memory. A shape that was asked for by name and does not is an error; a suite goes without."""
    kept = []
    for case in chosen:
        try:
            cases.check_memory(case, where)
            kept.append(case)
        except ValueError as error:
            if named:
                raise
            console().print(f"left out: {error}", soft_wrap=True)
    return kept


def _write_page(page: Path, csv: Path) -> int:
    with user_errors():
        need("bench", "matplotlib")
        _check_folder(page)
        from trtkern.bench import page as pages
        from trtkern.bench import rows

        made = pages.write(rows.read(csv), page, csv, shlex.join(("trtkern", *_arguments())))
    tell(written=made)
    console().print(f"written: {', '.join(map(str, made))}", soft_wrap=True)
    return 0


def _arguments() -> list[str]:
    """Of the command line, as it was given."""
    return sys.argv[sys.argv.index("bench") :] if "bench" in sys.argv else ["bench"]
