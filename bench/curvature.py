"""The two ways to curvature on one trained network: python bench/curvature.py RUN [--samples N] -> bench/curvature.csv.

"exact" differentiates twice, on the reference; "differences" takes the difference of two gradients, on the backend that
trained, at several steps. The table of docs/analysis.md has these rows.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from pathlib import Path

from trtkern.analysis import curvature
from trtkern.commands.analyze._opened import opened

PLACE = Path(__file__).resolve().parent / "curvature.csv"
STEPS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args()
    run = opened(given.run, samples=given.samples, batch_size=given.batch_size)
    rows = []
    for method, step in (("exact", None), *(("differences", step) for step in STEPS)):
        found = curvature(
            run.trainer.model, run.samples, method=method, balls={}, starts=2, iterations=30, trace_vectors=10,
            **({} if step is None else {"step": step}),
        )  # fmt: skip
        values = {f"eigenvalue_{i + 1}": f"{value:.5g}" for i, value in enumerate(found.eigenvalues.tolist())}
        spreads = {f"spread_{i + 1}": f"{value:.2g}" for i, value in enumerate(found.spreads.tolist())}
        rows.append({
            "method": method, "step": "" if step is None else f"{step:g}", **values, **spreads,
            "lowest": f"{found.lowest:.4g}", "trace": f"{found.trace:.5g}", "trace_spread": f"{found.trace_spread:.3g}",
            "asymmetry": f"{found.asymmetry:.3g}", "asymmetry_leading": f"{found.asymmetry_leading:.3g}",
            "converged": found.converged, "products": found.products,
            "samples": len(run.samples), "run": run.about["run"], "versions": run.about["versions"],
            "command": shlex.join(["python", "bench/curvature.py", *sys.argv[1:]]),
        })  # fmt: skip
        print({name: rows[-1][name] for name in list(rows[-1])[:14]}, flush=True)
        with PLACE.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
