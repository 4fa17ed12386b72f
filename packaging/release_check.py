"""What is looked at before a release, as one table; it ends with 0 if nothing failed. ``make release-check``.

    python packaging/release_check.py                     builds dist/ and checks it
    python packaging/release_check.py --keep              checks the dist/ that is there
    python packaging/release_check.py --site 'FOLDER{}'   torch for Python 3.12 lies in FOLDER3.12, where
                                                          pip install --target FOLDER3.12 torch numpy has put it;
                                                          left out: pip gets the torch of constraints.txt

A step is "ok", "FAILED", or "warning": what has to be mended before a tag, but may be so on the way to it.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import contents
import licences
import readme
import try_wheel
import wheels
from try_wheel import Failed

ROOT = wheels.ROOT
EXTRAS = "[train,bench,inspect]"
"""Of the environment in which README's lines run."""


class Warned(Exception):
    """What is not as it has to be in a release, but hinders nobody before."""


@dataclass
class Check:
    """The steps, and what became of them."""

    out: Path
    site: str
    torch: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def step(self, name: str, what: Callable[[], object]) -> None:
        """Do it, and keep what it says or what is wrong."""
        print(f"-- {name}", flush=True)
        begin = time.monotonic()
        try:
            said, state = what(), "ok"
        except Warned as error:
            said, state = error, "warning"
        except (Failed, OSError, ValueError, subprocess.CalledProcessError) as error:
            said, state = error, "FAILED"
        print(f"   {state} after {time.monotonic() - begin:.0f} s: {said}", flush=True)
        self.rows.append((name, state, " ".join(str(said).split())))

    def folder_of(self, python: wheels.Python) -> Path | None:
        """Where torch for that Python lies."""
        return Path(self.site.replace("{}", "{}.{}".format(*python.version))) if self.site else None


def version() -> str:
    """``trtkern.__version__``, read as setuptools reads it."""
    tree = ast.parse((ROOT / "trtkern/__init__.py").read_text())
    return next(
        str(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )


def changelog() -> str:
    """The entry of this version in CHANGELOG.md."""
    heads = re.findall(r"^## \[?([^\]\s]+)\]?(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    entry = next((more for name, more in heads if name == version()), None)
    if entry is None:
        raise Failed(f"CHANGELOG.md: expected a heading `## [{version()}]`, got {[name for name, _ in heads]}")
    if not re.search(r"\d{4}-\d\d-\d\d", entry):
        raise Warned(f"CHANGELOG.md: {version()} has no date yet")
    return f"{version()}{entry}"


def tree() -> str:
    """Whether the checkout is what a tag would be."""
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    if changed.stdout.strip():
        raise Warned(f"{len(changed.stdout.splitlines())} files differ from the last commit")
    tags = subprocess.run(["git", "tag", "--points-at"], cwd=ROOT, capture_output=True, text=True, check=True)
    if f"v{version()}" not in tags.stdout.split():
        raise Warned(f"the last commit has no tag v{version()}")
    return f"v{version()}"


def workflows() -> str:
    """The workflow files against the schema that check-jsonschema brings."""
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    _tool("check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, files))
    return ", ".join(file.name for file in files)


def metadata(out: Path) -> str:
    """What an index reads of the files."""
    made = [str(path) for path in sorted(out.iterdir()) if path.suffix in (".whl", ".gz")]
    _tool("twine", "check", "--strict", *made)
    return f"{len(made)} files"


def sbom(python: Path, place: Path) -> str:
    """A bill of materials of an environment, in CycloneDX's JSON."""
    _tool("cyclonedx_py", "environment", str(python), "--output-format", "JSON", "--output-file", str(place))
    return f"{place.name}, {place.stat().st_size / 2**10:.0f} KiB"


def _tool(module: str, *words: str) -> None:
    try_wheel.call(sys.executable, "-m", module, *words, cwd=ROOT, env=os.environ)


NAMES = """
import sys
sys.path.insert(0, sys.argv[1])
import public
kept = [line for line in open(sys.argv[2]).read().splitlines() if not line.startswith("#")]
now = public.snapshot()
if now != kept:
    sys.exit("expected the names of the file, got others: " + "; ".join(sorted(set(now) ^ set(kept))[:10]))
print(len(now), "names")
"""
"""Compares the public names of the installed package with those of the file."""


def api(python: Path) -> str:
    """The public names of the installed wheel are those of tests/public_api.txt."""
    with tempfile.TemporaryDirectory() as folder:
        file = ROOT / "tests/public_api.txt"
        said = try_wheel.call(python, "-c", NAMES, ROOT / "docs", file, cwd=Path(folder), env=try_wheel.alone())
    return said.strip().splitlines()[-1]


def tried(check: Check) -> Iterator[tuple[str, Callable[[], str]]]:
    """A step for each wheel that a Python of this machine can use."""
    for python in wheels.found():
        made = sorted(check.out.glob(f"trtkern-{version()}-{python.tag}-*.whl"))
        place = wheels.WORK / f"try-{python.tag}"
        name = f"wheel of Python {python.version[0]}.{python.version[1]}"
        if len(made) != 1:
            yield name, lambda tag=python.tag: _none(tag)
            continue
        yield (
            name,
            lambda made=made[0], python=python, place=place: (
                f"{made.name}, {made.stat().st_size / 2**20:.1f} MiB, "
                + try_wheel.attempt(made, python.program, place, check.torch, check.folder_of(python))
            ),
        )


def _none(tag: str) -> str:
    raise Failed(f"expected one wheel {tag} in dist, got none or several")


def _pinned() -> str:
    """The torch of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def main(arguments: Sequence[str] | None = None) -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--site", default="")
    parser.add_argument("--torch", default=_pinned())
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    given = parser.parse_args(arguments)
    check = Check(given.out.resolve(), given.site, given.torch)
    check.step("changelog", changelog)
    check.step("git", tree)
    check.step("workflows", workflows)
    if not given.keep:
        check.step("sdist and wheels", lambda: wheels.main(["--here", "--out", str(check.out)]) or "built")
    check.step("metadata", lambda: metadata(check.out))
    check.step("contents", lambda: contents.check(check.out, version()))
    wheels.WORK.mkdir(parents=True, exist_ok=True)
    for name, what in tried(check):
        check.step(name, what)
    _installed(check)
    print()
    width = max(len(name) for name, _, _ in check.rows)
    for name, state, said in check.rows:
        print(f"{name:<{width}}  {state:<7}  {said}")
    return int(any(state == "FAILED" for _, state, _ in check.rows))


def _installed(check: Check) -> None:
    """The steps in one environment, of this Python's wheel with what README's lines need."""
    python = wheels.ask(sys.executable)
    assert python is not None
    place, made = wheels.WORK / "readme", sorted(check.out.glob(f"trtkern-{version()}-{python.tag}-*.whl"))
    inside = place / "bin" / "python"

    def install() -> str:
        if len(made) != 1:
            _none(python.tag)
        try_wheel.environment(place, python.program, made[0], EXTRAS, check.torch, check.folder_of(python))
        return EXTRAS

    check.step("environment", install)
    check.step("README's command lines", lambda: readme.lines(ROOT / "README.md", inside.parent / "trtkern"))
    check.step("README's Python", lambda: readme.blocks(ROOT / "README.md", inside))
    check.step("public names", lambda: api(inside))
    check.step("licences", lambda: licences.check(inside))
    check.step("SBOM", lambda: sbom(inside, check.out / f"trtkern-{version()}.cdx.json"))


if __name__ == "__main__":
    sys.exit(main())
