"""Makes dist/: a source distribution, and of it one wheel for each Python. ``make wheels``.

    python packaging/wheels.py                 where Docker works by cibuildwheel, else by the Pythons of this machine
    python packaging/wheels.py --here          by the Pythons of this machine in any case
    python packaging/wheels.py --python python3.12     by that one; may be given again

The wheels are made of what the source distribution holds, not of the checkout; the compiled kernels are the same for
every Python, so the second wheel takes seconds. ``auditwheel repair`` gives each the tag of the oldest glibc that it
runs with. It must leave libgomp out: the CPU kernels share the thread pool of the libgomp that torch carries, and a
copy in the wheel would be a second pool.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
OBJECTS = Path("build") / f"objects-{sysconfig.get_platform()}"
TORCHS_OWN = "libgomp.so.1"
"""What the wheel takes from torch; auditwheel would copy it."""
VERSION = "import sys; print(sys.executable, *sys.version_info[:2], sys.implementation.name)"


class Python(NamedTuple):
    """A Python to make a wheel for."""

    program: str
    version: tuple[int, int]

    @property
    def tag(self) -> str:
        """cp312."""
        return "cp{}{}".format(*self.version)


def supported(metadata: Path = ROOT / "pyproject.toml") -> list[tuple[int, int]]:
    """The Pythons that the classifiers name, the oldest first."""
    text = " ".join(tomllib.loads(metadata.read_text())["project"]["classifiers"])
    return sorted((int(major), int(minor)) for major, minor in re.findall(r"Python :: (\d+)\.(\d+)", text))


def ask(program: str) -> Python | None:
    """Which Python a program is; None where it does not run or is not CPython."""
    try:
        done = subprocess.run([program, "-c", VERSION], capture_output=True, text=True, check=False)
    except OSError:
        return None
    path, major, minor, kind = done.stdout.split() if done.returncode == 0 else ("", "0", "0", "")
    return Python(path, (int(major), int(minor))) if kind == "cpython" else None


def found() -> list[Python]:
    """One of each supported version: this one, those on PATH, those of pyenv."""
    wanted = supported()
    programs = [sys.executable, *("python{}.{}".format(*version) for version in wanted)]
    programs += [str(path) for path in sorted((Path.home() / ".pyenv/versions").glob("*/bin/python"), reverse=True)]
    pythons: dict[tuple[int, int], Python] = {}
    for program in programs:
        python = ask(program) if shutil.which(program) else None
        if python is not None and python.version in wanted:
            pythons.setdefault(python.version, python)
    return [pythons[version] for version in sorted(pythons)]


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """A step of the build; it ends the script where it fails."""
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)


def docker() -> bool:
    """Whether a Docker engine answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def sdist(out: Path) -> Path:
    """The source distribution, in ``out``."""
    for old in out.glob("trtkern-*.tar.gz"):
        old.unlink()
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out)
    (made,) = out.glob("trtkern-*.tar.gz")
    return made


def unpacked(archive: Path) -> Path:
    """The tree of a source distribution, with the objects of this checkout: those that are still right are not
    compiled again."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    with tarfile.open(archive) as file:
        file.extractall(WORK, filter="data")
    tree = WORK / archive.name.removesuffix(".tar.gz")
    (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
    (tree / "build").mkdir()
    (tree / OBJECTS).symlink_to(ROOT / OBJECTS)
    return tree


def wheel(python: Python, tree: Path, out: Path) -> Path:
    """The wheel of that Python, repaired, in ``out``."""
    raw, builder = WORK / f"raw-{python.tag}", WORK / f"venv-{python.tag}"
    run(python.program, "-m", "venv", builder)
    run(builder / "bin/python", "-m", "pip", "install", "--quiet", "build", "setuptools>=77", "wheel", "pybind11>=2.12")
    shutil.rmtree(tree / "build" / "lib", ignore_errors=True)
    run(builder / "bin/python", "-m", "build", "--wheel", "--no-isolation", "--outdir", raw, cwd=tree)
    (made,) = raw.glob("*.whl")
    for old in out.glob(f"trtkern-*-{python.tag}-*.whl"):
        old.unlink()
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", TORCHS_OWN, "--wheel-dir", out, made)
    (repaired,) = out.glob(f"trtkern-*-{python.tag}-*.whl")
    return repaired


def main(arguments: Sequence[str] | None = None) -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="by the Pythons of this machine, even where Docker works")
    parser.add_argument("--python", action="append", metavar="PROGRAM", help="by this one; may be given again")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder of the wheels")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not given.here and not given.python and docker():
        sdist(out)
        run(sys.executable, "-m", "cibuildwheel", "--output-dir", out)
        return 0
    pythons = found() if not given.python else [each for each in map(ask, given.python) if each is not None]
    lacking = [version for version in supported() if version not in [each.version for each in pythons]]
    if not pythons or (given.python and len(pythons) < len(given.python)):
        parser.error(f"expected programs of CPython, such as python3.12, got {given.python}")
    tree = unpacked(sdist(out))
    made = [wheel(python, tree, out) for python in pythons]
    for each in made:
        print(f"{each.name}: {each.stat().st_size / 2**20:.1f} MiB")
    if lacking and not given.python:
        print("no wheel for", ", ".join("Python {}.{}".format(*v) for v in lacking), "which is not on this machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
