"""Before any test: where Triton runs, how memory comes, and which backends are tried."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import interpreter
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

# What a user's own neurons and surrogates are compiled to takes seconds each: the tests of it allow it (``compiled``).
os.environ.setdefault("TRTKERN_JIT", "0")

from trtkern.backends import BACKENDS
from trtkern.selftest import device_of

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()

ROOT = Path(__file__).resolve().parent.parent

FUSED = [b.name for b in BACKENDS if b.name != "reference" and b.missing() is None]
DEVICE = {b.name: device_of(b) for b in BACKENDS if b.missing() is None}
LONGEST = (
    *("test_triton_aot.py", "test_spike_conv_aot.py", "test_onnx.py", "test_norm_finish.py", "test_compile.py"),
    *("test_export.py", "test_batch_norm_lif.py", "test_lif.py", "test_recipe_steps.py", "test_resume.py"),
    *("test_compiled_neurons.py", "test_bench_overhead.py", "test_cpu_isa.py", "test_recurrent_aot.py"),
    *("test_lengths.py", "test_recurrent_triton.py", "test_own_killed.py", "test_cuda_build.py", "test_extending.py"),
    *("test_cuda_threads.py", "test_triton_spike_conv.py", "test_spike_layers.py", "test_interop_rockpool.py"),
    "test_tracing.py",
)
"""Files that take from 20 seconds on. Where the order is kept (--no-loadscope-reorder) they come first, so that no
worker is left alone with one of them."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("loadscopereorder", True):
        return
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_report_header() -> str:
    """Which backends this run tries, and why not the others."""
    missing = [f"{b.name} ({reason})" for b in BACKENDS if (reason := b.missing()) is not None]
    return f"backends: {', '.join(FUSED)}; not here: {'; '.join(missing) or 'none'}"


def pytest_terminal_summary(terminalreporter) -> None:
    """``make test-torch``: what became of the tests under these versions, into the file that TRTKERN_VERSIONS names."""
    path = os.environ.get("TRTKERN_VERSIONS")
    if path:
        counts = {name: len(terminalreporter.stats.get(name, ())) for name in ("passed", "failed", "error", "skipped")}
        _write_versions(Path(path), counts)


def _write_versions(path: Path, counts: dict[str, int]) -> None:
    import csv
    import platform
    from importlib.metadata import version

    versions = {"torch": str(torch.__version__), "triton": version("triton"), "python": platform.python_version()}
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    others = [row for row in rows if any(row[name] != value for name, value in versions.items())]
    rows = [*others, {**versions, **{name: str(count) for name, count in counts.items()}}]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, tuple(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: [int(part) for part in row["torch"].split("+")[0].split(".")]))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every torch.empty comes filled with NaN (integers: their largest value): an unwritten output fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_copy_of_the_kernels():
    """`import kernels` from the repository root would make a second copy of trtkern.kernels."""
    yield
    import sys

    stray = sys.modules.get("kernels")
    if stray is not None and str(ROOT) in str(getattr(stray, "__file__", "")):
        raise RuntimeError("a test imported `kernels`; the package is trtkern.kernels")


@pytest.fixture(scope="session")
def compiled_neurons(tmp_path_factory) -> Path:
    """Where the tests keep what they compile, each thing once."""
    own = tmp_path_factory.getbasetemp()  # of this worker, where there are several
    return (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "compiled-neurons"


@pytest.fixture
def compiled(compiled_neurons, monkeypatch) -> Path:
    """Neurons and surrogates of one's own are compiled for the CPU at first use, as they are for a user."""
    monkeypatch.setenv("TRTKERN_CACHE", str(compiled_neurons))
    monkeypatch.delenv("TRTKERN_JIT")
    return compiled_neurons


@pytest.fixture
def one_thread():
    """One thread, whatever the run was started with."""
    yield from _threads(1)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs leave a report of one word and no curves: a second a run. The real ones: test_cli, test_report."""
    from trtkern.training import figures, report

    monkeypatch.setattr(report, "write", lambda path, **_: path.write_text("report"))
    monkeypatch.setattr(figures, "learning_curves", lambda *_: None)


@pytest.fixture
def two_threads():
    """Two threads, whatever the run was started with: large enough problems are then split."""
    yield from _threads(2)


def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FUSED)
def backend(request) -> str:
    """Each fused backend that can run here."""
    return request.param


@pytest.fixture
def device(backend) -> str:
    """Where that backend runs here."""
    return DEVICE[backend]


@pytest.fixture
def share(backend, device) -> Callable:
    """share(cases, every=5, start=0): all cases; in Triton's interpreter, which takes a quarter of a second for one,
    every fifth: a number that divides no axis of the grid keeps each value of each axis in, and another start takes
    others. ``docs/coverage.py`` runs the whole grid there too."""
    interpreted = backend == "triton" and device == "cpu"
    return lambda cases, every=5, start=0: list(cases)[start % every :: every] if interpreted else list(cases)
