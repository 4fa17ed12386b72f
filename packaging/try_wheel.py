"""Installs a wheel into a new virtual environment, and uses it as somebody would who has nothing else.

    python packaging/try_wheel.py dist/trtkern-0.1.0-cp312-cp312-manylinux_2_34_x86_64.whl --python python3.12

It imports, it says its version, the CPU backend is the compiled one and takes torch's OpenMP threads, `trtkern doctor`
finds no fault, `trtkern train` learns the digits and `trtkern evaluate` finds the accuracy again. As root it does the
same once more where the system has no libgomp, as in a slim container.

    --torch 'torch==2.13.0'     what pip installs as torch; left out: what the wheel asks for
    --site FOLDER               a folder with torch and numpy (pip install --target FOLDER torch numpy) in place of that
    --environment FOLDER        where the environment is made, and stays; left out: in a temporary folder
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

EPOCHS = 3
LEARNT = 0.5
"""The accuracy on ten digits after ``EPOCHS`` that shows that something was learnt: chance is 0.1."""
MAPPED = """
import json, torch, trtkern
from trtkern.backends import cpu
from trtkern import nn

layer, x = nn.LIF(), torch.randn(4, 1 << 14, requires_grad=True)
layer(x).sum().backward()
maps = {part for part in open("/proc/self/maps").read().split() if part.startswith("/")}
runtimes = sorted(part for part in maps if any(name in part for name in ("libgomp", "libomp", "libiomp")))
print(json.dumps({
    "backend": str(layer.backend_for(x)), "missing": cpu.missing(), "torch": torch.__version__,
    "version": trtkern.__version__, "file": trtkern.__file__, "runtimes": runtimes,
    "finite": bool(x.grad.isfinite().all()),
}))
"""
HIDE = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$2"
rm -f "$2"/libgomp.so*
shift 2
exec "$@"
"""
"""A command in a mount namespace of its own, where that folder of libraries has no libgomp."""


class Failed(Exception):
    """What the wheel does not do, in one line."""


def call(*command: str | Path, cwd: Path, env: Mapping[str, str], wrap: Sequence[str] = ()) -> str:
    """What a command prints.

    Raises:
        Failed: it ended with another status than 0.
    """
    words = [*wrap, *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=dict(env), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise Failed(f"{' '.join(map(str, command[-4:]))} ended with {done.returncode}: {' '.join(last)[:400]}")
    return done.stdout


def environment(place: Path, python: str, wheel: Path, extras: str, torch: str, site: Path | None) -> Path:
    """A new virtual environment with the wheel; its Python."""
    call(python, "-m", "venv", "--clear", place, cwd=place.parent, env=os.environ)
    inside = place / "bin" / "python"
    install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    if site is not None:
        (folder,) = (place / "lib").glob("python*/site-packages")
        (folder / "torch_from_elsewhere.pth").write_text(f"{site.resolve()}\n")
    elif torch:
        call(*install, torch, cwd=place.parent, env=os.environ)
    call(*install, f"trtkern{extras} @ {wheel.resolve().as_uri()}", cwd=place.parent, env=os.environ)
    return inside


def alone() -> dict[str, str]:
    """This process's environment without what could lend the wheel something of a checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRTKERN", "LD_"))}


def imports(python: Path, folder: Path, wrap: Sequence[str] = ()) -> dict[str, object]:
    """What runs a neuron on the CPU, and which OpenMP runtimes the process has then.

    Raises:
        Failed: it is not the compiled extension, or not on the one OpenMP runtime that torch has.
    """
    told = json.loads(call(python, "-c", MAPPED, cwd=folder, env=alone(), wrap=wrap))
    if told["missing"] is not None or not told["backend"].startswith("cpu"):
        raise Failed(f"expected the compiled CPU backend, got {told['backend']}: {told['missing']}")
    if not told["finite"]:
        raise Failed("expected finite gradients of a LIF, got others")
    if len(told["runtimes"]) != 1 or "/torch/lib/" not in told["runtimes"][0]:
        raise Failed(f"expected torch's libgomp as the only OpenMP runtime, got {told['runtimes']}")
    return told


def doctor(command: Path, folder: Path, wrap: Sequence[str] = ()) -> None:
    """Raises:
    Failed: a self-test fails, or the CPU backend is not among those that pass.
    """
    said = call(command, "doctor", cwd=folder, env=alone(), wrap=wrap)
    if not re.search(r"^ *cpu +ok\b", said, re.MULTILINE):
        raise Failed("trtkern doctor: expected a line `cpu ok`, got none")


def trains(command: Path, folder: Path, wrap: Sequence[str] = ()) -> float:
    """The accuracy of a short training, found again by ``trtkern evaluate``.

    Raises:
        Failed: one of them fails, nothing is learnt, or they differ.
    """
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    call(command, "train", "--epochs", str(EPOCHS), "--run-dir", run, cwd=folder, env=alone(), wrap=wrap)
    reached = json.loads((run / "result.json").read_text())["test"]["accuracy"]
    if not reached > LEARNT:
        raise Failed(f"trtkern train: expected an accuracy above {LEARNT} after {EPOCHS} epochs, got {reached}")
    said = call(command, "evaluate", run, cwd=folder, env=alone(), wrap=wrap)
    if f"{reached:.2%}" not in said:
        raise Failed(f"trtkern evaluate: expected the {reached:.2%} of the training, got {said[-300:]}")
    return float(reached)


@contextmanager
def without_libgomp() -> Iterator[list[str] | None]:
    """What stands before a command that shall find no libgomp of the system; None where that takes other rights."""
    folders = {path.resolve().parent for path in Path("/usr/lib").glob("*-linux-gnu/libgomp.so.1")}
    with tempfile.TemporaryDirectory() as mount:
        if len(folders) != 1 or os.geteuid() != 0 or shutil.which("unshare") is None:
            yield None
            return
        wrap = ["unshare", "--mount", "sh", "-c", HIDE, "sh", mount, str(*folders)]
        look = "import ctypes; ctypes.CDLL('libgomp.so.1')"
        works = subprocess.run([*wrap, "true"], capture_output=True, check=False).returncode == 0
        hidden = subprocess.run([*wrap, sys.executable, "-c", look], capture_output=True, check=False).returncode != 0
        yield wrap if works and hidden else None


def attempt(wheel: Path, python: str, place: Path, torch: str = "", site: Path | None = None) -> str:
    """All of it; what it found, in one line.

    Raises:
        Failed: the first thing that went wrong.
    """
    inside = environment(place, python, wheel, "[train]", torch, site)
    command, folder = inside.parent / "trtkern", place / "empty"
    folder.mkdir()
    told = imports(inside, folder)
    if str(place) not in str(told["file"]):
        raise Failed(f"expected the trtkern of {place}, got {told['file']}")
    said = call(command, "--version", cwd=folder, env=alone())
    if not said.startswith(f"trtkern {told['version']}"):
        raise Failed(f"trtkern --version: expected {told['version']}, got {said}")
    doctor(command, folder)
    reached = trains(command, folder)
    line = f"torch {told['torch']}, {EPOCHS} epochs {reached:.1%}"
    with without_libgomp() as wrap:
        if wrap is None:
            return f"{line}; not tried without the system's libgomp"
        imports(inside, folder, wrap)
        doctor(command, folder, wrap)
        return f"{line}; without the system's libgomp {trains(command, folder, wrap):.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--torch", default="")
    parser.add_argument("--site", type=Path)
    parser.add_argument("--environment", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.environment or Path(temporary) / "environment").resolve()
        try:
            print(f"{given.wheel.name}: {attempt(given.wheel, given.python, place, given.torch, given.site)}")
        except Failed as error:
            print(f"{given.wheel.name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
