"""Everything that needs a CUDA GPU, in one command of a few minutes: ``make gpu``.

    python bench/gpu.py              build, tests, compute-sanitizer, whole steps, benches, within 8 minutes
    python bench/gpu.py --bundle     before: wheels of the other libraries into build/gpu-bundle (make gpu-bundle)
    python bench/gpu.py --rehearse   what can run without a GPU, on the CPU, at reduced sizes

It takes the torch and the Triton that are here and installs nothing from a network: an environment in build/gpu stands
in front of this interpreter's packages. Rows go to bench/results/NAME.csv as they come, a summary to NAME.md beside it,
what the stages say to build/gpu/logs. Exit status 1 if a stage fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_bundle
import gpu_stages
from gpu_stages import Outcome, Stage

ROOT = gpu_bundle.ROOT
WORK = ROOT / "build" / "gpu"
ENVIRONMENT = WORK / "env"
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--target-processes",
             "application-only", "--tool")  # fmt: skip
REFUSALS = ("Device not supported", "Unable to find injection library", "unsupported driver")
"""Of compute-sanitizer where it is installed and cannot work."""
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Each tensor in an allocation of its own: in torch's cached segments memcheck would not see the end of one."""
GRID = [f"{steps},{neurons}" for steps in (500, 1000) for neurons in (512, 1024, 2048, 4096, 8192, 16384)]
"""Long sequences of few neurons: bound by latency, from far too little for a GPU to almost enough."""
PLAIN = "--no-compile"
SUITES = {  # name: options of trtkern bench, its shapes on a GPU (of the suite) and in a rehearsal, share
    "bench": ((PLAIN,), (), ("4,4096", "4,2,4,6,6"), 8),
    "bench bfloat16": (("--dtype", "bfloat16", PLAIN), (), ("4,4096", "4,2,4,6,6"), 5),
    "bench long": (("--suite", "long", PLAIN), (), ("40,256",), 5),
    "bench grid": (("--op", "lif", "--peers", "none", PLAIN), GRID, ("50,16", "100,16"), 6),
    "bench open-neuromorphic": (("--suite", "open-neuromorphic", PLAIN), (), ("20,2,16",), 5),
    "bench compiled": (("--op", "all", "--peers", "spikingjelly"), ("4,2097152", "4,8,128,32,32"), ("4,64",), 6),
}
STEPS = (  # network, its shape, dtype, share
    ("resnet19", "6,64,3,32,32", "bfloat16", 20),
    ("resnet19", "6,64,3,32,32", "float32", 14),
    ("vggsnn", "10,32,2,48,48", "bfloat16", 10),
    ("vggsnn", "10,32,2,48,48", "float32", 10),
)
REHEARSED_STEPS = (("resnet19", "2,2,3,8,8", "float32", 40), ("vggsnn", "2,2,2,16,16", "float32", 25))
REHEARSED_TESTS = ("tests/test_lif.py", "tests/test_batch_norm_lif.py", "-k",
                   "fires_strictly or nonfinite or no_neurons or two_runs or running_statistics")  # fmt: skip


def gpu_name() -> str | None:
    """What torch calls the GPU; None without one of CUDA's."""
    import torch

    return torch.cuda.get_device_name() if torch.version.cuda and torch.cuda.is_available() else None


def plan(csv: Path, rehearse: bool) -> list[Stage]:
    """All stages, in their order: what has to be right before what is to be fast."""
    python = str(gpu_bundle.python_of(ENVIRONMENT))
    env = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "TRTKERN_REHEARSAL": "1"} if rehearse else {}
    where = ["--device", "cpu", "--rounds", "3"] if rehearse else ["--device", "cuda"]
    bench = (python, "-m", "trtkern.cli", "bench", *where, "--budget", "{seconds}", "--csv", str(csv))
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    pytest = (python, "-m", "pytest", "-q", "-p", "gpu_only", "--durations", "8", "-o", "faulthandler_timeout=60")

    def stage(name: str, command: Sequence[str], share: float, modules: Sequence[str] = (), **options: Any) -> Stage:
        options = {"after": ("build",), "env": env, **options}
        return Stage(name, command, share, modules=(*modules, "torch"), **options)

    build = (sys.executable, __file__, "--build", *(["--rehearse"] if rehearse else []))
    tests = REHEARSED_TESTS if rehearse else ("tests", "--ignore=tests/test_gpu.py", *workers())
    made = [
        stage("build", build, 200, after=()),  # all else hangs on it
        stage("self-test", (python, "-m", "trtkern.cli", "doctor"), 25),
        stage("cells", (python, "bench/gpu_cells.py"), 12),
        stage("tests of the GPU", (*pytest, "tests/test_gpu.py"), 24, ("pytest",), tests=True),
        stage("tests", (*pytest, *tests), 70, ("pytest", "hypothesis"), tests=True),
    ]
    for tool in ("memcheck", "racecheck"):
        under = stage(tool, (*SANITIZER, tool, python, "bench/gpu_cells.py", "--sparse"), 18)
        made.append(replace(under, programs=SANITIZER[:1], refusals=REFUSALS, env={**env, **UNCACHED}))
    layers = (python, "bench/gpu_spike_conv.py", "--csv", str(csv), "--seconds", "{seconds}")
    command = (*layers, "--small") if rehearse else layers
    made.append(stage("layers on packed spikes", command, 8, ("triton",), rows=csv))
    recurrent = (python, "bench/gpu_recurrent.py", "--csv", str(csv), "--seconds", "{seconds}")
    made.append(stage("recurrent", (*recurrent, *["--small"] * rehearse), 8, ("triton",), rows=csv))
    for network, shape, dtype, share in REHEARSED_STEPS if rehearse else STEPS:
        command = (*bench, "--op", "step", "--shape", shape, "--dtype", dtype, "--peers", "spikingjelly")
        made.append(stage(f"step {network} {dtype}", command, share, ("typer", "rich"), rows=csv))
    for name, (words, large, small, share) in SUITES.items():
        shapes = [word for shape in (small if rehearse else large) for word in ("--shape", shape)]
        command = (*bench, *words, *shapes, *([PLAIN] if rehearse else []))
        made.append(stage(name, command, share, ("typer", "rich"), rows=csv))
    return made


def workers() -> list[str]:
    """Of pytest-xdist, where it is or will be installed: most of a test's time on a GPU is Triton's compiler, which
    runs on the CPU."""
    count = min(12, (os.cpu_count() or 2) * 3 // 4)
    xdist = find_spec("xdist") or any(gpu_bundle.FOLDER.glob("pytest_xdist-*.whl"))
    return ["-n", str(count), "--dist", "worksteal"] if count > 1 and xdist else []


def summary(path: Path, head: str, outcomes: Sequence[Outcome], page: str = "") -> None:
    """Write the Markdown file: the stages, and behind them the page of the rows."""
    lines = [head, "", "| stage | | s | of | |", "|---|---|---|---|---|"]
    for each in outcomes:
        said = each.words.replace("|", "\\|")
        lines.append(f"| {each.name} | {each.status} | {each.seconds:.0f} | {each.allowed:.0f} | {said} |")
    path.write_text("\n".join([*lines, *(["", page] if page else [])]) + "\n")


def page_of(csv: Path, path: Path) -> str:
    """What ``trtkern bench --page`` makes of the rows, or why there is none."""
    if not csv.exists():
        return "No rows were measured."
    files = ("--page", os.path.relpath(path), "--csv", os.path.relpath(csv))
    command = (str(gpu_bundle.python_of(ENVIRONMENT)), "-m", "trtkern.cli", "bench", *files)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"No page of the rows in {csv.name}: {error}"
    said = (done.stderr or done.stdout).strip().splitlines()
    return path.read_text() if not done.returncode else f"No page of the rows in {csv.name}: {' '.join(said[-1:])}"


def facts(name: str, rehearse: bool) -> str:
    """A heading and what was measured with what."""
    import torch

    from trtkern.bench import measure

    triton = f", Triton {__import__('triton').__version__}" if find_spec("triton") else ", no Triton"
    what = "Checked by `make gpu`"
    if rehearse:
        what = "Rehearsed without a GPU at reduced sizes: no figure here is a measurement"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}{triton}"
    return f"# {name}\n\n{what}, {measure.today()}, commit {measure.commit()}. {versions}."


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="of all stages together (default: 8; 15 of a rehearsal)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU; rows go to build/gpu")
    parser.add_argument("--only", default="", help="only stages whose name starts with this, and the build")
    parser.add_argument("--bundle", action="store_true", help="fetch the wheels that travel along, and end")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.minutes is None:
        options.minutes = 15.0 if options.rehearse else 8.0
    if not options.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes}")
    return options


def main() -> int:
    """Run what was asked for; the exit status."""
    options = arguments()
    if options.bundle:
        return gpu_bundle.fetch()
    sys.path.insert(0, str(ROOT))
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    if find_spec("torch") is None:
        print("gpu: expected a Python with torch, got none; call make with PYTHON=...", file=sys.stderr)
        return 2
    name = gpu_name()
    if options.build:
        return gpu_bundle.build(ENVIRONMENT, archs(), options.rehearse)
    if name is None and not options.rehearse:
        import torch

        why = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        print(f"gpu: there is no CUDA GPU that torch can use{why}; --rehearse runs what needs none", file=sys.stderr)
        return 2
    return measured(name or "", options)


def archs() -> str:
    """TRTKERN_CUDA_ARCHS: of this GPU alone unless it is set; a rehearsal keeps setup.py's."""
    import torch

    if "TRTKERN_CUDA_ARCHS" in os.environ or not torch.cuda.is_available():
        return os.environ.get("TRTKERN_CUDA_ARCHS", "")
    return "{}{}".format(*torch.cuda.get_device_capability())


def measured(name: str, options: argparse.Namespace) -> int:
    """All stages, the rows, the summary; the exit status."""
    from trtkern.bench.rows import slug

    folder = WORK if options.rehearse else ROOT / "bench" / "results"
    path = folder / ("rehearsal.md" if options.rehearse else f"{slug(name)}.md")
    csv, outcomes, begin = path.with_suffix(".csv"), [], time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    known = plan(csv.relative_to(ROOT), options.rehearse)
    stages = [stage for stage in known if stage.name.startswith(("build", options.only))]
    if len(stages) < 2 and options.only != "build":
        names = ", ".join(stage.name for stage in known)
        print(f"--only: expected the beginning of one of {names}; got {options.only!r}", file=sys.stderr)
        return 2
    if options.rehearse:
        csv.unlink(missing_ok=True)
    head = facts(name or "Rehearsal", options.rehearse)

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        summary(path, head, outcomes)  # whoever ends this process keeps what there is
        print(
            f"[{time.monotonic() - begin:4.0f} s] {outcome.name}: {outcome.status} "
            f"({outcome.seconds:.0f} s of {outcome.allowed:.0f}): {outcome.words}", flush=True,
        )  # fmt: skip
        if outcome.status == gpu_stages.FAILED:
            print(tail(outcome.name), flush=True)

    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the stage that runs is ended, too
    try:
        gpu_stages.run(stages, 60 * options.minutes, WORK / "logs", done)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        summary(path, head, outcomes, page_of(csv, path))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = ", ".join(f"{sum(each.status == s for each in outcomes)} {s}" for s in gpu_stages.STATUS)
        print(f"{said}; {time.monotonic() - begin:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU time")
        rows = f"rows: {csv.relative_to(ROOT)}" if csv.exists() else "no rows"
        print(f"summary: {path.relative_to(ROOT)}; {rows}; logs: {(WORK / 'logs').relative_to(ROOT)}")
    return gpu_stages.exit_status(outcomes)


def tail(name: str, lines: int = 30) -> str:
    """The end of what a stage said."""
    path = WORK / "logs" / gpu_stages.log_name(name)
    return "\n".join(["  | " + line for line in path.read_text(errors="replace").splitlines()[-lines:]])


if __name__ == "__main__":
    sys.exit(main())
