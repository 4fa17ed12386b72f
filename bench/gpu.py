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
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import gpu_bundle
import gpu_stages
from gpu_stages import Outcome, Stage

ROOT = gpu_bundle.ROOT
WORK = ROOT / "build" / "gpu"
ENVIRONMENT = WORK / "env"
SELF_TEST = "import sys; from trtkern import selftest; sys.exit(any(row.ok is False for row in selftest.run()))"
"""The short run for compute-sanitizer: every backend, a handful of cells."""
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--target-processes",
             "application-only", "--tool")  # fmt: skip
SUITES = {  # name: options of trtkern bench, its shapes in a rehearsal, share
    "bench": ((), ("4,4096", "4,2,4,6,6"), 12),
    "bench bfloat16": (("--dtype", "bfloat16"), ("4,4096", "4,2,4,6,6"), 8),
    "bench long": (("--suite", "long"), ("40,256",), 8),
    "bench open-neuromorphic": (("--suite", "open-neuromorphic"), ("20,2,16",), 8),
}
STEPS = (("resnet19", "bfloat16", 8), ("resnet19", "float32", 8), ("vggsnn", "bfloat16", 5), ("vggsnn", "float32", 5))
REHEARSED_STEPS = (STEPS[1], STEPS[3])
REHEARSED_TESTS = ("tests/test_lif.py", "tests/test_batch_norm_lif.py", "-k",
                   "fires_strictly or nonfinite or no_neurons or two_runs or running_statistics")  # fmt: skip


def gpu_name() -> str | None:
    """What torch calls the GPU; None without one of CUDA's."""
    import torch

    return torch.cuda.get_device_name() if torch.version.cuda and torch.cuda.is_available() else None


def plan(csv: Path, rehearse: bool) -> list[Stage]:
    """All stages, in their order."""
    # A rehearsal runs in the environment that it is called from; on a GPU the build makes one.
    python = sys.executable if rehearse else str(gpu_bundle.python_of(ENVIRONMENT))
    env = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "TRTKERN_REHEARSAL": "1"} if rehearse else {}
    reduced = ["--rehearse"] if rehearse else []
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    pytest = (python, "-m", "pytest", "-q", "-p", "gpu_only")
    build = () if rehearse else ("build",)

    def stage(name: str, command: Sequence[str], share: float, **options: object) -> Stage:
        return Stage(name, command, share, after=build if name != "build" else (), env=env, **options)  # type: ignore[arg-type]

    tests = REHEARSED_TESTS if rehearse else ("tests", "--ignore=tests/test_gpu.py", *workers())
    made = [
        stage("build", (sys.executable, __file__, "--build", *reduced), 35),
        stage("self-test", (python, "-m", "trtkern.cli", "doctor"), 10, modules=("typer", "rich")),
        stage("tests of the GPU", (*pytest, "tests/test_gpu.py"), 10, modules=("pytest",), tests=True),
        stage("tests", (*pytest, *tests), 25, modules=("pytest",), tests=True),
    ]
    for tool in ("memcheck", "racecheck"):
        command = (*SANITIZER, tool, python, "-c", SELF_TEST)
        made.append(stage(tool, command, 10, programs=("compute-sanitizer",)))
    for case, dtype, share in REHEARSED_STEPS if rehearse else STEPS:
        options = ("--case", case, "--dtype", dtype, "--csv", str(csv), "--budget", "{seconds}", *reduced)
        made.append(stage(f"step {case} {dtype}", (python, "bench/gpu_steps.py", *options), share, modules=("rich",)))
    for name, (options, shapes, share) in SUITES.items():
        small = [word for shape in shapes for word in ("--shape", shape)] + ["--device", "cpu", "--no-compile"]
        where = [*small, "--rounds", "3"] if rehearse else ["--device", "cuda"]
        command = (python, "-m", "trtkern.cli", "bench", *options, *where, "--budget", "{seconds}", "--csv", str(csv))
        made.append(stage(name, command, share, modules=("typer", "rich")))
    return made


def workers() -> list[str]:
    """Of pytest-xdist, where it is installed: most of a test's time on a GPU is Triton's compiler, on the CPU."""
    count = min(8, (os.cpu_count() or 2) // 2)
    return ["-n", str(count), "--dist", "worksteal"] if count > 1 and find_spec("xdist") else []


def summary(path: Path, csv: Path, head: str, outcomes: Sequence[Outcome]) -> str:
    """Write the Markdown file: the stages, and the page of the rows behind them. What could not be written of it."""
    lines = [head, "", "| stage | | s | of | |", "|---|---|---|---|---|"]
    for each in outcomes:
        said = each.words.replace("|", "\\|")
        lines.append(f"| {each.name} | {each.status} | {each.seconds:.0f} | {each.allowed:.0f} | {said} |")
    missing = ""
    try:
        from trtkern.bench import page, rows

        page.write(rows.read(csv), path, csv, f"trtkern bench --page {path.name} --csv {csv.name}")
        lines += ["", path.read_text()]
    except Exception as error:  # whatever it is: the stages are written
        missing = f"no page of the rows: {type(error).__name__}: {error}"
        lines += ["", missing]
    path.write_text("\n".join(lines) + "\n")
    return missing


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
    if options.rehearse:
        csv.unlink(missing_ok=True)
    stages = [stage for stage in plan(csv, options.rehearse) if stage.name.startswith(("build", options.only))]

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(
            f"[{time.monotonic() - begin:4.0f} s] {outcome.name}: {outcome.status} "
            f"({outcome.seconds:.0f} s of {outcome.allowed:.0f}): {outcome.words}", flush=True,
        )  # fmt: skip
        if outcome.status == gpu_stages.FAILED:
            print(tail(outcome.name), flush=True)

    os.chdir(ROOT)
    try:
        gpu_stages.run(stages, 60 * options.minutes, WORK / "logs", done)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        missing = summary(path, csv, facts(name or "Rehearsal", options.rehearse), outcomes)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(missing or f"rows: {csv.relative_to(ROOT)}")
        print(f"written: {path.relative_to(ROOT)}; {used.ru_utime + used.ru_stime:.0f} s of CPU time")
    return gpu_stages.exit_status(outcomes)


def tail(name: str, lines: int = 30) -> str:
    """The end of what a stage said."""
    path = WORK / "logs" / gpu_stages.log_name(name)
    return "\n".join(["  | " + line for line in path.read_text(errors="replace").splitlines()[-lines:]])


if __name__ == "__main__":
    sys.exit(main())
