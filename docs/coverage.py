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
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is first imported

from trtkern import surrogates
from trtkern.backends import BACKENDS
from trtkern.backends.base import RegularizerSpec
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
FIELDS = ("op", "backend", "machine", "variant", "dtype", "surrogate", "reset", "detach", "learnable")
RESULT = ("spikes", "error", "ok")
DTYPES = ("float32", "bfloat16", "float16")
NOTES = {
    "cuda": " `tests/test_cuda_threads.py` runs this grid through what a thread of it does, compiled for the CPU; the\n"
    "launch itself, and the sums within a block, are what only a GPU can show."
}
LEARNABLE = ("none", "scalar", "channel")
OPS = {
    "lif": "LIF",
    "batch_norm_lif": "BatchNorm + LIF",
}
HEAD = """# What each backend runs, and how far it is from float64

Made by `python docs/coverage.py`; the rows are in [backends.csv](backends.csv). Every cell runs T = 5 steps of
2 x 3 x 5 neurons forward and backward through spikes, potentials, final state, x, v0 and, where learnable, all six
parameters, against the float64 reference. Inputs keep every potential {margin} away from a discontinuity, so that
spikes must agree exactly: a cell with a single different spike would say so.

The figure in a cell is its largest error, relative to the largest magnitude in the tensor: of v and of the gradients of
x and v0 in x's dtype (bounds: {bounds}), and of the parameters' gradients, which are float32 (bound {parameter:.0e}).
BatchNorm + LIF runs the same cells against torch's BatchNorm in float64 and the reference neuron, with batch and
running statistics, without a residual, with one, and with one whose words are kept, taking turns (the column
`variant` of the CSV). Its error is the largest of what LIF has, of the running statistics, and of the gradients of y,
the residual, weight and bias. A neuron within {norm_margin} of a discontinuity is left out, for it cannot be drawn
again without moving its channel.

float64 runs on the reference. A user's own surrogate runs on reference and triton; cpu and cuda refuse it by name.
"""


VERSIONS = """## Versions of torch, Triton and Python

The package needs Python 3.11 or newer and torch 2.11 or newer. These rows say with which versions the whole suite of
tests has been run, on a CPU (where Triton's kernels run in its interpreter, and are compiled for GPUs that are not
there), and what became of it:

```
make test-torch TORCH=2.11.0 PYTHON=python3.12    # an environment of its own, .venv-torch-2.11.0-py312
make gpu-rehearsal TORCH=2.11.0 PYTHON=python3.12 # any other target in that environment
```

The environment has the Triton that this torch asks for. A build of torch for CPUs asks for none, and gets the one that
constraints.txt pins; `TRITON=3.8.0` chooses another. All else is as pinned. Each run of the whole suite puts its row
into [versions.csv](versions.csv) and into this table. Private names of torch and Triton, and those that not every
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
        "dtype": str(cell.dtype).removeprefix("torch."),
        "surrogate": cell.surrogate,
        "reset": cell.reset,
        "detach": "yes" if cell.detach_reset else "no",
        "learnable": cell.learnable,
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
        size = {"timesteps": 5, "shape": (2, 3, 5)}
        normed = norm_cells(**size) if backend.holds("batch_norm_lif") else ()
        for cell in (*cells(**size), *normed):
            run = compare_norm if isinstance(cell, NormCell) else compare
            errors = run(backend.name, cell, device)
            largest = worst(*(error for name, error in errors._asdict().items() if name not in ("spikes", "words")))
            rows.append(
                {"backend": backend.name, "machine": machine, **key(cell)}
                | {
                    "spikes": str(errors.spikes + getattr(errors, "words", 0)),
                    "error": f"{largest:.1e}",
                    "ok": "yes" if errors.within(cell.dtype) else "NO",
                }
            )
        print(f"{backend.name}: {sum(row['backend'] == backend.name for row in rows)} cells", file=sys.stderr)
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """The cells of one backend: a line a (surrogate, reset, detach), a column a (dtype, learnable)."""
    found = {tuple(row[name] for name in FIELDS[4:]): row for row in rows}
    columns = [(dtype, learnable) for dtype in DTYPES for learnable in LEARNABLE]
    lines = ["| surrogate | reset | detached | " + " | ".join(f"{d}, {n}" for d, n in columns) + " |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for surrogate in surrogates.BUILTIN:
        for reset in RESETS:
            for detach in ("no", "yes"):
                shown = []
                for dtype, learnable in columns:
                    row = found.get((dtype, surrogate, reset, detach, learnable))
                    text = "not run" if row is None else row["error"]
                    shown.append(text if row is None or row["ok"] == "yes" else f"**{text}: outside**")
                lines.append(f"| {surrogate} | {reset} | {detach} | " + " | ".join(shown) + " |")
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
            rows += [row for row in csv.DictReader(file) if row["backend"] not in fresh]
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
            cells_of = [row for row in mine if row["op"] == op]
            if cells_of:
                bad = sum(row["ok"] != "yes" for row in cells_of)
                verdict = "all inside the bounds" if not bad else f"**{bad} outside the bounds**"
                where = cells_of[0]["machine"]
                parts.append(f"{title}: {len(cells_of)} cells, {verdict}, on: {where}.\n\n{table(cells_of)}\n")
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
