"""The extras of the package: each brings what it is named for, and a hint names the one that helps."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from patience import PATIENCE

from trtkern import cli
from trtkern.bench import peers

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"pillow": "PIL"}
"""What a package is imported as, where that is not its name."""


def modules(requirements: list[str]) -> set[str]:
    found = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    return {MODULES.get(name, name) for name in found}


EXTRAS = {name: modules(needs) for name, needs in PROJECT["optional-dependencies"].items()}
FILES = sorted([*ROOT.glob("trtkern/**/*.py"), *ROOT.glob("kernels/*.py")])


@cache
def imports(path: Path, late: bool) -> list[str]:
    """The modules that a file imports when it is imported itself; with ``late`` also those of its functions."""
    tree, found = ast.parse(path.read_text()), []
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def file_of(module: str) -> Path | None:
    base = ROOT / module.replace(".", "/").replace("trtkern/kernels", "kernels")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def test_every_extra_that_is_named_somewhere_exists():
    pages = [*FILES, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    named = {(path.name, name) for path in pages for name in re.findall(r"trtkern\[([\w,]+)\]", path.read_text())}
    assert {name for _, name in named} >= {"data", "events", "inspect", "tensorboard", "triton"}
    for path, extras in named:
        assert set(extras.split(",")) <= set(EXTRAS), path
    assert set(cli.EXTRAS.values()) <= set(EXTRAS)


def test_what_a_hint_misses_is_in_the_extra_that_it_names():
    """``need("train", "matplotlib")``, and each ``except ImportError`` or ``find_spec`` beside a pip line."""
    checked = 0
    for path in FILES:
        if "trtkern[" not in (text := path.read_text()) and "need(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "need":
                extra, *wanted = (argument.value for argument in node.args)
                assert set(wanted) <= EXTRAS[extra], path
                checked += 1
            if isinstance(node, ast.FunctionDef) and (named := re.findall(r"trtkern\[(\w+)\]", ast.unparse(node))):
                outside = (
                    {
                        name.split(".")[0]
                        for inner in ast.walk(node)
                        if isinstance(inner, ast.Import | ast.ImportFrom)
                        for name in (
                            [inner.module] if isinstance(inner, ast.ImportFrom) else [a.name for a in inner.names]
                        )
                    }
                    - sys.stdlib_module_names
                    - {"trtkern", "torch", "numpy"}
                )
                assert outside <= EXTRAS[named[0]], (path, node.name)
                checked += bool(outside)
    assert checked >= 8


@pytest.mark.parametrize("command", [*cli.EXTRAS, "bench", "inspect", "doctor"])
def test_a_command_imports_what_its_extra_brings(command):
    """The command and its package with their late imports, and what is imported with those; a hint beside an import
    answers for it."""
    package = {"bench": "trtkern/bench/", "inspect": "trtkern/profiling/inspect/"}.get(command, "trtkern/commands/")
    own = {*modules(PROJECT["dependencies"]), *EXTRAS.get(cli.EXTRAS.get(command, command), ()), "triton", *peers.NAMES}
    waiting, seen = ["trtkern.doctor" if command == "doctor" else f"trtkern.commands.{command}"], set()
    while waiting:
        path = file_of(waiting.pop())
        if path is None or path in seen:
            continue
        late = not seen or package in str(path)
        seen.add(path)
        hinted = set().union(*(EXTRAS[name] for name in re.findall(r"trtkern\[(\w+)\]", path.read_text())))
        found = imports(path, late)
        waiting += [name for name in found if name.startswith("trtkern.")]
        assert {name.split(".")[0] for name in found} <= own | hinted | sys.stdlib_module_names | {"trtkern"}, path
    assert len(seen) > 10


def test_the_doctor_runs_with_torch_alone_and_the_others_say_what_to_type(tmp_path):
    """In a process where nothing of the extras can be imported."""
    lost = sorted(set().union(*EXTRAS.values(), {"typer", "rich"}) - {"setuptools"})
    code = f"import sys; sys.modules.update(dict.fromkeys({lost!r})); from trtkern import cli; sys.exit(cli.main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def call(command):
        made = [sys.executable, "-c", code, command]
        return subprocess.run(made, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=PATIENCE)

    done = call("doctor")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.search(r"^  reference +ok +", done.stdout, re.MULTILINE) and "Triton is not installed" in done.stdout
    for command in ("train", "bench", "trian"):
        done = call(command)
        said = "trtkern: typer and rich not installed; type: pip install trtkern"
        assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_a_peer_that_is_missing_is_answered_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for name, peer in zip(peers.NAMES, peers.choose("all"), strict=True):
        assert peer.missing.startswith("not installed; pip install ") and name.split("-")[0] in peer.missing
        assert "--no-deps spikingjelly" not in peer.missing or "loguru" in peer.missing


PLAIN = """
import sys
sys.modules.update(dict.fromkeys({lost!r}))
from trtkern import cli
from trtkern.profiling import inspect as inspector
rows = []
inspector.inspect = lambda target, **asked: rows.append(asked["backend"]) or []
sys.argv = ["trtkern", "bench"]
line = "bench --op lif --shape 2,64 --rounds 1 --peers none --no-compile --backend reference"
for each in (line, f"{{line}} --plot x.png", "bench --page x.md", "inspect --op lif", "inspect --backend triton"):
    print(cli.main(each.split()), rows, file=sys.stderr)
"""


def test_bench_and_inspect_run_with_the_plain_install(tmp_path):
    """In a process where only what ``pip install trtkern`` brings can be imported; the inspection itself is another
    test's."""
    lost = sorted(set().union(*EXTRAS.values()) - {"setuptools", *modules(PROJECT["dependencies"])})
    assert {"matplotlib", "triton", "safetensors"} <= {*lost}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PLAIN.format(lost=lost)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    plot = page = "trtkern: matplotlib not installed; type: pip install 'trtkern[bench]'"
    built = any((ROOT / "trtkern").glob("_cuda*.so"))
    word = ["trtkern: Triton is not installed: its kernels are left out; type: pip install 'trtkern[inspect]'"]
    shown = ["cuda" if built else "all"]
    wanted = ["0 []", plot, "2 []", page, "2 []", *(word * built), f"0 {shown}", f"0 {[*shown, 'triton']}"]
    assert [line for line in done.stderr.splitlines() if not line.startswith("[W")] == wanted  # torch's own warnings
    assert "lif 2x64 float32" in done.stdout
