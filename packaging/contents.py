"""What lies in the source distribution and in the wheels."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

from try_wheel import Failed

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".ci/", ".github/", ".gitignore", ".clang-format", "bench/", "docs/", "examples/", "tests/")
"""Of what git has: what the source distribution need not hold, since nobody builds or uses the package with it. Where
MANIFEST.in takes some of it along, more of it may be missing."""
MADE = ("PKG-INFO", "setup.cfg", "trtkern.egg-info/")
"""What the source distribution has beside what git has."""


def tracked() -> set[str]:
    """The files that git has."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


def of_sdist(archive: Path) -> set[str]:
    """The files of a source distribution, within its folder."""
    with tarfile.open(archive) as file:
        return {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}


def of_wheel(archive: Path) -> set[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(archive) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


def check(out: Path, version: str) -> str:
    """Compare them with what git has.

    Raises:
        Failed: something is missing, or came along that is not the project's.
    """
    known, source = tracked(), of_sdist(out / f"trtkern-{version}.tar.gz")
    missing = sorted(name for name in known - source if not name.startswith(LEFT_OUT))
    foreign = sorted(name for name in source - known if not name.startswith(MADE))
    if missing or foreign:
        raise Failed(f"source distribution: expected the files of git, got {missing[:5]} missing, {foreign[:5]} beside")
    wheels = sorted(out.glob(f"trtkern-{version}-*.whl"))
    for wheel in wheels:
        _wheel(wheel, known)
    return f"{len(source)} files in the source distribution; {len(wheels)} wheels"


def _wheel(wheel: Path, known: set[str]) -> None:
    held = of_wheel(wheel)
    code = {name for name in known if name.startswith("trtkern/")}
    code |= {f"trtkern/{name}" for name in known if name.startswith("kernels/")}
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    wanted = {*code, f"{info}/licenses/LICENSE", f"{info}/METADATA", f"{info}/entry_points.txt"}
    if lacking := sorted(wanted - held):
        raise Failed(f"{wheel.name}: expected {lacking[:5]}, got a wheel without")
    extensions = [name for name in held if name.endswith(".so")]
    if not any("/_cpu." in name for name in extensions):
        raise Failed(f"{wheel.name}: expected trtkern/_cpu, got {extensions}")
    if stray := sorted(name for name in held if not name.startswith(("trtkern/", info))):
        raise Failed(f"{wheel.name}: expected trtkern alone, got {stray[:5]} beside")
