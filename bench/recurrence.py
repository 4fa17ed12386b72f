"""What recurrence and delays add on sequences: the 8x8 digits read row by row, a step a row of 8 pixels.

    python bench/recurrence.py           five seeds of four networks, a minute or two; rows go to bench/recurrence.csv
    python bench/recurrence.py --page    the table of docs/recurrence.md, from the rows

A row is shown for two steps, and four steps without input follow, so that T = 20. The network is two hidden layers of
64 AdLIF neurons behind BatchNorm and a Linear readout whose mean over the steps is classified; with recurrence each
hidden layer feeds itself, with delays what each hidden layer reads comes up to 4 steps later, by learned delays a
channel. All train for 8 epochs with the same numbers and are tested on 360 images, which choose nothing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trtkern.bench import rows  # noqa: E402
from trtkern.bench.measure import append  # noqa: E402
from trtkern.data import digits  # noqa: E402
from trtkern.models.topology import from_topology  # noqa: E402
from trtkern.train import Trainer  # noqa: E402

CSV, PAGE = ROOT / "bench" / "recurrence.csv", ROOT / "docs" / "recurrence.md"
BEGIN, END = "<!-- bench/recurrence.py --page writes from here -->", "<!-- to here -->"
SEEDS, EPOCHS, HOLD, SILENT, MAX_DELAY = 5, 8, 2, 4, 4
KINDS: dict[str, dict[str, Any]] = {
    "neither": {},
    "recurrence": {"recurrent": True},
    "delays": {"max_delay": MAX_DELAY},
    "both": {"recurrent": True, "max_delay": MAX_DELAY},
}


def sequences(images: Tensor) -> Tensor:
    """[N, T, 1, 1, 8]: each row for ``HOLD`` steps, then nothing for ``SILENT``."""
    held = images.float().div(16).repeat_interleave(HOLD, 1)
    return torch.nn.functional.pad(held, (0, 0, 0, SILENT))[:, :, None, None]


def trained(kind: str, seed: int) -> dict[str, Any]:
    """A row: one network, trained."""
    train, train_labels, test, test_labels = digits.load()
    data = (sequences(train), train_labels.long()), (sequences(test), test_labels.long())

    def network(timesteps: int) -> torch.nn.Module:
        layers = "FCBN-64_FCBN-64_L-10"
        return from_topology(layers, shape=(1, 1, 8), timesteps=timesteps, neuron="AdLIF", **KINDS[kind])

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(
            network, data, loss="sdt", lr=1e-2, epochs=EPOCHS, batch_size=64, timesteps=data[0][0].shape[1], classes=10,
            seed=seed, select="last", threads=1, device="cpu",
        ).fit(folder)  # fmt: skip
    assert result.final is not None
    return rows.origin(torch.device("cpu")) | {
        "kind": kind,
        "seed": seed,
        "epochs": EPOCHS,
        "accuracy": round(100 * result.final.splits["test"]["accuracy"], 2),
        "seconds": round(time.perf_counter() - start, 1),
        "command": "python bench/recurrence.py",
    }


def table(found: list[dict[str, str]]) -> str:
    """The table of the page: the last run of each kind and seed."""
    last = {(row["kind"], row["seed"]): float(row["accuracy"]) for row in found}
    lines = ["| network | test accuracy, % |", "|---|---|"]
    for kind in KINDS:
        values = [value for (other, _), value in last.items() if other == kind]
        if len(values) > 1:
            spread = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({len(values)} seeds)"
            lines.append(f"| with {kind} | {spread} |".replace("with neither", "with neither of the two"))
    return "\n".join(lines)


def page(text: str, found: list[dict[str, str]]) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{rest.split(END, 1)[1]}"


def read() -> list[dict[str, str]]:
    """The rows that there are."""
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the table of docs/recurrence.md and train nothing")
    if parser.parse_args().page:
        PAGE.write_text(page(PAGE.read_text(), read()))
        return 0
    for seed in range(SEEDS):
        for kind in KINDS:
            row = trained(kind, seed)
            append([row], CSV)
            print(f"{kind}, seed {seed}: {row['accuracy']} %, {row['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
