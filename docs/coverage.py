"""Writes docs/backends.md: every cell of every backend that is available here, with its error against float64.

    python docs/coverage.py            all available backends, and triton in its interpreter where there is no GPU
    python docs/coverage.py --versions the table of versions alone, from docs/versions.csv

A backend that is not available keeps the rows that another machine wrote to docs/backends.csv. ``make test-torch``
writes docs/versions.csv.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is first imported

from trtkern import neurons, surrogates
from trtkern.backends import BACKENDS
from trtkern.backends.base import Backend, RegularizerSpec
from trtkern.selftest import (
    MARGIN,
    PARAMETER_TOLERANCE,
    REGULARIZER_TOLERANCE,
    TOLERANCE,
    Cell,
    NormCell,
    cells,
    compare,
    compare_norm,
    compare_regularizer,
    device_of,
    norm_cells,
    worst,
)
from trtkern.selftest.norm import MARGIN as NORM_MARGIN
from trtkern.spec import RESETS

HERE = Path(__file__).resolve().parent
FIELDS = ("op", "backend", "machine", "variant", "neuron", "dtype", "surrogate", "reset", "detach", "learnable")
RESULT = ("spikes", "error", "ok")
DTYPES = ("float32", "bfloat16", "float16")
NOTES = {
    "cuda": " `tests/test_cuda_threads.py` runs this grid through what a thread of it does, compiled for the CPU, and\n"
    "`tests/test_cuda_neurons.py` the other neurons; the launch itself, and the sums within a block, are what only a\n"
    "GPU can show."
}
OTHERS = [name for name in neurons.TABLE if name != "LIF"]
TOGETHER = ("op", "neuron", "reset", "dtype")
"""What a row of another neuron than LIF is for."""
LEARNABLE = ("none", "scalar", "channel")
OPS = {
    "lif": "LIF",
    "batch_norm_lif": "BatchNorm + LIF",
}
HEAD = """# What each backend runs, and how far it is from float64

A *backend* is one way to compute the neurons: `cpu` (C++), `triton`, `cuda`, and `reference`, the readable loop in
plain torch. Each must give the same spikes and gradients as the reference does in float64, to within what its own
precision rounds. This page shows that it does, for every combination of surrogate, reset and dtype. Read it when you
want to know whether a combination is supported, and how exact it is. `trtkern doctor` tries a few of these cells on
your machine.

```sh
trtkern doctor
```

## How to read the tables

A row is a combination of surrogate, reset and whether the reset is *detached* (no gradient passes through it). A
column is a dtype, and what of the neuron's parameters is learned: none, a scalar each, or one number for each
channel. The figure in a cell is its largest error, relative to the largest magnitude in the tensor.

What a cell computes: T = 5 steps of 2 x 3 x 5 neurons, forward and backward through spikes, potentials, final state,
x, v0 and, where learnable, all parameters. Inputs keep every potential {margin} away from a discontinuity, so that
spikes must agree exactly: a cell with a single different spike would say so.

What counts as right: for v and for the gradients of x and v0 the bounds are those of x's dtype ({bounds}). The
gradients of the parameters are float32, and their bound is {parameter:.0e}.

**BatchNorm + LIF** runs the same cells against torch's BatchNorm in float64 and the reference neuron, with batch and
running statistics, without a residual, with one, and with one whose words are kept, taking turns (the column
`variant` of the CSV). Its error is the largest of what LIF has, of the running statistics, and of the gradients of y,
the residual, weight and bias. A neuron within {norm_margin} of a discontinuity is left out, for it cannot be drawn
again without moving its channel.

**The other neurons** run the same grid (every surrogate, parameters as numbers, scalars and per channel). They have
one line for each reset: the worst of its cells in each dtype. LIF has a table for each backend.

**Not in the tables.** float64 runs on the reference. A user's own neuron or surrogate runs on reference and triton,
and on cpu compiled at first use ([Extending](extending.md)); cuda refuses it by name.

`python docs/coverage.py` made this page; the rows are in [backends.csv](backends.csv).
"""


VERSIONS = """## Versions of torch, Triton and Python

The package needs Python 3.11 or newer and torch 2.11 or newer. The rows below say with which versions the whole suite
of tests has been run, and what became of it. It ran on a CPU, where Triton's kernels run in its interpreter, and are
compiled for GPUs that are not there.

To try other versions:

```sh
make test-torch TORCH=2.11.0 PYTHON=python3.12    # an environment of its own, .venv-torch-2.11.0-py312
make gpu-rehearsal TORCH=2.11.0 PYTHON=python3.12 # any other target in that environment
```

The environment has the Triton that this torch asks for. A build of torch for CPUs asks for none, and gets the one
that constraints.txt pins; `TRITON=3.8.0` chooses another. All else is as pinned. Each run of the whole suite puts its
row into [versions.csv](versions.csv) and into this table. Private names of torch and Triton, and those that not every
version has, stand with their reasons in `trtkern/_torch.py`; a test fails where another is used.
"""


def key(cell: Cell) -> dict[str, str]:
    """The cell as the columns of the CSV."""
    variant = ""
    if isinstance(cell, NormCell):
        variant = f"{'batch' if cell.training else 'running'} statistics, residual {cell.residual}"
    return {
        "op": "batch_norm_lif" if isinstance(cell, NormCell) else "lif",
        "variant": variant,
        "neuron": cell.neuron,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "surrogate": cell.surrogate,
        "reset": cell.reset,
        "detach": "yes" if cell.detach_reset else "no",
        "learnable": cell.learnable,
    }


def grid(backend: Backend, names: Iterable[str]) -> Iterator[Cell]:
    """The cells of those neurons, alone and behind a BatchNorm where the backend holds it."""
    size = {"timesteps": 5, "shape": (2, 3, 5)}
    yield from cells(names, **size)
    if backend.holds("batch_norm_lif"):
        yield from norm_cells(names, **size)


def result(backend: str, cell: Cell, device: str) -> dict[str, str]:
    """What became of the cell, as columns of the CSV."""
    errors = (compare_norm if isinstance(cell, NormCell) else compare)(backend, cell, device)
    largest = worst(*(error for name, error in errors._asdict().items() if name not in ("spikes", "words")))
    return key(cell) | {
        "spikes": str(errors.spikes + getattr(errors, "words", 0)),
        "error": f"{largest:.1e}",
        "ok": "yes" if errors.within(cell.dtype) else "NO",
    }


def together(rows: list[dict[str, str]]) -> dict[str, str]:
    """One row for cells that differ in what is not in ``TOGETHER``."""
    return {
        **rows[0],
        **dict.fromkeys(("variant", "surrogate", "detach", "learnable"), f"worst of {len(rows)}"),
        "spikes": str(sum(int(row["spikes"]) for row in rows)),
        "error": f"{worst(*(float(row['error']) for row in rows)):.1e}",
        "ok": "yes" if all(row["ok"] == "yes" for row in rows) else "NO",
    }


def measure() -> list[dict[str, str]]:
    """A row a cell, for every backend that is available here."""
    rows = []
    for backend in BACKENDS:
        if backend.missing() is not None:
            print(f"{backend.name}: {backend.missing()}", file=sys.stderr)
            continue
        device = device_of(backend)
        machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        if backend.name == "triton" and device == "cpu":
            machine = "CPU, Triton's interpreter"
        about = {"backend": backend.name, "machine": machine}
        rows += [{**about, **result(backend.name, cell, device)} for cell in grid(backend, ("LIF",))]
        groups: dict[tuple, list[dict[str, str]]] = {}
        for cell in grid(backend, OTHERS):
            row = {**about, **result(backend.name, cell, device)}
            groups.setdefault(tuple(row[name] for name in TOGETHER), []).append(row)
        rows += [together(group) for group in groups.values()]
        print(f"{backend.name}: {sum(row['backend'] == backend.name for row in rows)} cells", file=sys.stderr)
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """The cells of one backend: a line a (surrogate, reset, detach), a column a (dtype, learnable)."""
    found = {tuple(row[name] for name in FIELDS[5:]): row for row in rows}
    columns = [(dtype, learnable) for dtype in DTYPES for learnable in LEARNABLE]
    lines = ["| surrogate | reset | detached | " + " | ".join(f"{d}, {n}" for d, n in columns) + " |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for surrogate in surrogates.BUILTIN:
        for reset in RESETS:
            for detach in ("no", "yes"):
                of = [found.get((dtype, surrogate, reset, detach, learnable)) for dtype, learnable in columns]
                cells_of = " | ".join("not run" if row is None else shown(row) for row in of)
                lines.append(f"| {surrogate} | {reset} | {detach} | {cells_of} |")
    return "\n".join(lines)


def shown(row: dict[str, str]) -> str:
    """The error of a row, marked where it is outside its bounds."""
    return row["error"] if row["ok"] == "yes" else f"**{row['error']}: outside**"


def others_table(rows: list[dict[str, str]]) -> str:
    """The other neurons of one backend: a line a (neuron, reset), a column a (op, dtype)."""
    found = {tuple(row[name] for name in TOGETHER): row for row in rows}
    columns = [(op, dtype) for op in OPS for dtype in DTYPES]
    heads = [f"{dtype}" if op == "lif" else f"behind BatchNorm, {dtype}" for op, dtype in columns]
    lines = ["| neuron | reset | " + " | ".join(heads) + " |", "|---" * (2 + len(columns)) + "|"]
    for name in OTHERS:
        for reset in neurons.lookup(name).settle:
            of = [found.get((op, name, reset, dtype)) for op, dtype in columns]
            cells_of = " | ".join("not run" if row is None else shown(row) for row in of)
            lines.append(f"| {name} | {reset} | {cells_of} |")
    return "\n".join(lines)


def regularizer_lines() -> list[str]:
    """The regulariser's largest relative error on every backend that holds it here."""
    lines = ["| backend | T = 1 | T = 4 | T = 6 | T = 10 |", "|---|---|---|---|---|"]
    for backend in BACKENDS:
        if backend.holds("regularizer") and backend.missing() is None:
            errors = [
                compare_regularizer(backend.name, RegularizerSpec(t, 1e-5, 0.5, 1e-5), device_of(backend))
                for t in (1, 4, 6, 10)
            ]
            lines.append(f"| {backend.name} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    return lines


def versions() -> str:
    """The section about versions, from the rows of docs/versions.csv."""
    with (HERE / "versions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("torch", "triton", "python", "passed", "failed", "error", "skipped")
    lines = ["| torch | Triton | Python | passed | failed | errors | skipped |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row[name] for name in columns) + " |" for row in rows]
    return VERSIONS + "\n" + "\n".join(lines) + "\n"


def write_versions() -> None:
    """Replace that section, the last one of docs/backends.md."""
    page = HERE / "backends.md"
    before = page.read_text().partition(VERSIONS.splitlines()[0])[0]
    page.write_text(before.rstrip("\n") + "\n\n" + versions())


def main() -> None:
    """Measure, keep the rows of backends that are not here, and write both files."""
    rows, path = measure(), HERE / "backends.csv"
    fresh = {row["backend"] for row in rows}
    if path.exists():
        with path.open(newline="") as file:
            rows += [{"neuron": "LIF", **row} for row in csv.DictReader(file) if row["backend"] not in fresh]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*FIELDS, *RESULT))
        writer.writeheader()
        writer.writerows(rows)
    bounds = ", ".join(f"{str(d).removeprefix('torch.')} {TOLERANCE[d]:.0e}" for d in TOLERANCE if d != torch.float64)
    parts = [HEAD.format(margin=MARGIN, bounds=bounds, parameter=PARAMETER_TOLERANCE, norm_margin=NORM_MARGIN)]
    for backend in BACKENDS:
        parts.append(f"## {backend.name}\n")
        mine = [row for row in rows if row["backend"] == backend.name]
        if not mine:
            note = NOTES.get(backend.name, "")
            parts.append(f"Not run yet: no machine that has it has written its rows.{note}\n")
        for op, title in OPS.items():
            cells_of = [row for row in mine if row["op"] == op and row["neuron"] == "LIF"]
            if cells_of:
                bad = sum(row["ok"] != "yes" for row in cells_of)
                verdict = "all inside the bounds" if not bad else f"**{bad} outside the bounds**"
                where = cells_of[0]["machine"]
                parts.append(f"{title}: {len(cells_of)} cells, {verdict}, on: {where}.\n\n{table(cells_of)}\n")
        rest = [row for row in mine if row["neuron"] != "LIF"]
        if rest:
            bad = sum(row["ok"] != "yes" for row in rest)
            verdict = "all inside the bounds" if not bad else f"**{bad} rows outside the bounds**"
            count = sum(int(row["surrogate"].rpartition(" ")[2]) for row in rest)
            parts.append(
                f"The other neurons: {count} cells, {verdict}, on: {rest[0]['machine']}.\n\n{others_table(rest)}\n"
            )
    parts.append(
        "## The regulariser\n\nLargest relative error of the value and of each gradient, delta = 0.5 "
        f"(bound {REGULARIZER_TOLERANCE:.0e}); cuda leaves it to triton.\n\n" + "\n".join(regularizer_lines()) + "\n"
    )
    parts.append(versions())
    (HERE / "backends.md").write_text("\n".join(parts))
    if any(row["ok"] != "yes" for row in rows):
        raise SystemExit("docs/coverage.py: a cell is outside its bounds")


if __name__ == "__main__":
    write_versions() if "--versions" in sys.argv else main()
