"""The rows of ``trtkern inspect``: what they say, what is wrong with them, how they are shown and written."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trtkern.profiling.inspect.contract import Kernel, bytes_per_step, op_of, spills_allowed
from trtkern.profiling.inspect.occupancy import Occupancy, occupancy
from trtkern.profiling.inspect.reading import Reading

if TYPE_CHECKING:
    from rich.table import Table


class Row(NamedTuple):
    """One compiled kernel."""

    backend: str
    """"triton" or "cuda"."""
    target: str
    """One of ``TARGETS``."""
    kernel: Kernel
    """Which kernel, for which element and steps."""
    reading: Reading
    """What stands in its code: registers, spills, accesses."""
    threads: int
    """Of a block."""
    shared: int
    """Bytes of shared memory a block, as launched."""
    counted: float
    """Bytes per neuron-step (regulariser: per parameter) in the code."""
    contract: float
    """The same by the traffic model."""
    why: str = ""
    """What else the code moves that it should not."""

    @property
    def occupancy(self) -> Occupancy:
        """How many warps of it a multiprocessor can hold, and what limits them."""
        return occupancy(self.target, self.reading.registers, self.shared, self.threads)

    @property
    def problems(self) -> list[str]:
        """What is worse than it may be, a sentence each; [] if nothing is."""
        found = []
        if self.counted > self.contract:
            said = f"{self.counted:g} bytes a neuron-step, the contract has {self.contract:g}"
            found.append(f"moves {said}{f' ({self.why})' if self.why else ''}")
        if self.reading.spilled > spills_allowed(self.kernel):
            found.append(f"spills {self.reading.spilled} bytes")
        return found

    @property
    def name(self) -> str:
        """Backend, target and kernel."""
        return f"{self.backend} {self.target} {self.kernel.label}"

    def cells(self) -> dict[str, Any]:
        """The row as it is written to a CSV file."""
        held = self.occupancy
        return {
            "backend": self.backend, "target": self.target, "op": op_of(self.kernel.name),
            "kernel": self.kernel.label, "element_bytes": self.kernel.element,
            "chunk": self.kernel.steps, "loop": int(self.kernel.loop),
            "registers": self.reading.registers, "spilled_bytes": self.reading.spilled,
            "threads": self.threads, "shared_bytes": self.shared,
            "loads": widths(self.reading.loads), "stores": widths(self.reading.stores),
            "bytes_per_neuron_step": self.counted, "contract": self.contract,
            "occupancy": held.warps, "occupancy_most": held.most, "occupancy_unit": held.unit,
            "occupancy_limit": held.limit, "problems": "; ".join(self.problems),
        }  # fmt: skip


def row(
    backend: str, target: str, kernel: Kernel, reading: Reading, threads: int, shared: int, excess: float, why: str = ""
) -> Row:
    """excess: bytes per neuron-step that the code moves beyond the contract."""
    contract = bytes_per_step(kernel)
    return Row(backend, target, kernel, reading, threads, shared, contract + excess, contract, why)


def widths(accesses: Mapping[int, int]) -> str:
    """Number of instructions x bytes of each, the widest first: "4x16 1x4"."""
    return " ".join(f"{accesses[width]}x{width}" for width in sorted(accesses, reverse=True))


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows of one target for a terminal.

    Args:
        rows: of one target.
        title: what stands above.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("kernel")
    for name in ("registers", "spilled", "shared", "threads"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("loads", no_wrap=True)
    made.add_column("stores", no_wrap=True)
    made.add_column("bytes", justify="right")
    made.add_column("contract", justify="right")
    made.add_column(rows[0].occupancy.unit if rows else "", justify="right")
    made.add_column("limited by")
    for each in rows:
        held, bad = each.occupancy, "red" if each.problems else ""
        numbers = (each.reading.registers, each.reading.spilled, each.shared, each.threads)
        made.add_row(
            Text(f"{each.backend} {each.kernel.label}", bad), *map(str, numbers), widths(each.reading.loads),
            widths(each.reading.stores), Text(f"{each.counted:g}", bad), f"{each.contract:g}",
            f"{held.warps}/{held.most}", held.limit,
        )  # fmt: skip
    return made


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as a CSV file.

    Args:
        rows: of any targets.
        path: of the file, which is replaced.
    """
    cells = [each.cells() for each in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)
