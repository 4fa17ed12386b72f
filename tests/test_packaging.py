"""The scripts of packaging/, the version, the changelog and the workflows, as far as they need no build."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from patience import PATIENCE

import trtkern

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """The scripts import each other by their folder, as where they are run."""
    monkeypatch.syspath_prepend(str(ROOT / "packaging"))
    yield
    for name in ("contents", "licences", "readme", "release_check", "try_wheel", "wheels"):
        sys.modules.pop(name, None)


def test_the_version_stands_in_one_place():
    import release_check

    assert "version" not in PROJECT["project"] and "version" in PROJECT["project"]["dynamic"]
    assert release_check.version() == trtkern.__version__
    code = "import sys, setup; print(sys.modules.keys() & {'torch', 'numpy', 'typer'})"
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.split("\n")[:2] == [trtkern.__version__, "set()"]  # read without an import


def test_the_changelog_has_this_version():
    import release_check

    assert re.search(rf"^## \[{re.escape(trtkern.__version__)}\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    try:
        assert trtkern.__version__ in release_check.changelog()
    except release_check.Warned as warned:
        assert "no date" in str(warned)


def test_wheels_are_of_the_pythons_that_the_classifiers_name():
    import wheels

    versions = wheels.supported()
    assert (3, 11) in versions and (3, 14) in versions and versions == sorted(versions)
    built = PROJECT["tool"]["cibuildwheel"]["build"]
    assert built == [f"{wheels.Python('', version).tag}-*" for version in versions]
    assert PROJECT["project"]["requires-python"] == ">={}.{}".format(*versions[0])
    here = wheels.ask(sys.executable)
    assert here is not None and here.version == sys.version_info[:2] and here in wheels.found()
    assert wheels.ask("/nowhere/python") is None and wheels.ask("/bin/false") is None


def test_both_ways_to_a_wheel_leave_libgomp_to_torch():
    import wheels

    repair = PROJECT["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    assert f"--exclude {wheels.TORCHS_OWN} " in repair


def test_a_source_distribution_is_unpacked_with_the_objects_of_the_checkout(tmp_path, monkeypatch):
    import wheels

    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    monkeypatch.setattr(wheels, "WORK", tmp_path / "work")
    archive = tmp_path / "trtkern-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        info = tarfile.TarInfo("trtkern-1.0/setup.py")
        info.size = 2
        file.addfile(info, io.BytesIO(b"ab"))
    tree = wheels.unpacked(archive)
    assert (tree / "setup.py").read_text() == "ab"
    assert (tree / wheels.OBJECTS).resolve() == (tmp_path / wheels.OBJECTS).resolve()


def held(out: Path, *left_out: str, more: tuple[str, ...] = ()) -> None:
    """A source distribution and a wheel of what git has, without some of it and with more."""
    import contents

    names = [name for name in [*contents.tracked(), *more] if name not in left_out]
    with tarfile.open(out / "trtkern-1.0.tar.gz", "w:gz") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(f"trtkern-1.0/{name}"))
    info = "trtkern-1.0.dist-info"
    code = [name for name in names if name.startswith("trtkern/")]
    code += [f"trtkern/{name}" for name in names if name.startswith("kernels/")]
    with zipfile.ZipFile(out / "trtkern-1.0-cp311-cp311-linux_x86_64.whl", "w") as file:
        for name in (
            *code,
            "trtkern/_cpu.so",
            f"{info}/METADATA",
            f"{info}/licenses/LICENSE",
            f"{info}/entry_points.txt",
        ):
            if name not in left_out:
                file.writestr(name, "")


@pytest.mark.parametrize(
    ("left_out", "more", "message"),
    [
        ((), (), ""),
        (("LICENSE",), (), "'LICENSE'"),
        (("csrc/lif/args.h",), (), "'csrc/lif/args.h'"),
        ((), ("secrets.txt",), "'secrets.txt'"),
        (("trtkern-1.0.dist-info/licenses/LICENSE",), (), "licenses/LICENSE"),
        (("trtkern/_cpu.so",), (), "expected trtkern/_cpu"),
    ],
)
def test_what_is_missing_in_a_distribution_is_named(tmp_path, left_out, more, message):
    import contents

    held(tmp_path, *left_out, more=more)
    if not message:
        assert contents.check(tmp_path, "1.0").endswith("; 1 wheels")
        return
    with pytest.raises(contents.Failed, match=re.escape(message)):
        contents.check(tmp_path, "1.0")


def test_the_manifest_takes_what_a_build_needs():
    import contents

    rules = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    whole = {name for words in rules if words[0] == "include" for name in words[1:]}
    ends = {
        words[1]: [end.removeprefix("*") for end in words[2:]] for words in rules if words[0] == "recursive-include"
    }
    by_setuptools = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", "trtkern/py.typed"}
    for name in contents.tracked():
        if name.startswith(contents.LEFT_OUT) or name in whole | by_setuptools:
            continue
        taken = [name.endswith(tuple(end)) for folder, end in ends.items() if name.startswith(f"{folder}/")]
        assert any(taken) or (name.startswith("trtkern/") and name.endswith(".py")), name


@pytest.mark.parametrize(
    ("expression", "text", "classifiers", "verdict"),
    [
        ("MIT", "", [], "permissive"),
        ("Apache-2.0 AND BSD-3-Clause", "", [], "permissive"),
        ("MIT OR GPL-3.0-only", "", [], "permissive"),
        ("MIT AND LGPL-2.1-or-later", "", [], "copyleft"),
        ("", "BSD", ["License :: OSI Approved :: BSD License"], "permissive"),
        ("", "", ["License :: OSI Approved :: GNU General Public License v3 (GPLv3)"], "copyleft"),
        ("", "GPLv2+", [], "copyleft"),
        ("", "", [], "unknown"),
        ("", "ask us", [], "unknown"),
    ],
)
def test_licences(expression, text, classifiers, verdict):
    import licences

    assert licences.verdict({"expression": expression, "text": [text], "classifiers": classifiers}) == verdict


def test_readme_is_typed_as_it_stands(tmp_path):
    import readme

    page = tmp_path / "README.md"
    page.write_text(
        "```sh\npip install x\ntrtkern train   # digits\ntrtkern train --recipe cifar10 --data-dir DIR\n"
        "trtkern evaluate runs/digits\ntrtkern bench --rounds 3\ntrtkern --version\n```\n```python\nx = 1\n```\n"
        "```python\nassert x == 1\n```\n```text\ntrtkern doctor\n```\n"
    )
    found = [readme.quick(words) for words in readme.commands(page)]
    assert found[:3] == [["train", "--epochs", "2"], None, ["evaluate", "runs/digits"]]
    assert found[3][:3] == ["bench", "--rounds", "3"] and found[3].count("--rounds") == 1 and "--peers" in found[3]
    assert found[4:] == [["--version"]]
    assert readme.blocks(page, Path(sys.executable)) == "2 blocks"
    with pytest.raises(readme.Failed, match="expected at least the lines"):
        readme.lines(page, Path("/bin/true"))


def test_workflows_call_targets_that_exist_with_few_rights_and_pinned_actions():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert [path.name for path in files] == ["ci.yml", "release.yml"]
    called = set()
    for path in files:
        flow = yaml.safe_load(path.read_text())
        assert flow["permissions"] == {"contents": "read"}, path.name
        for job in flow["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {})
            for step in job["steps"]:
                assert re.search(r"@v\d+\.\d+\.\d+$", step.get("uses", "x@v1.2.3")), step
                words = step.get("run", "").replace("${{ matrix.target }}", " make ".join(matrix.get("target", ())))
                called |= set(re.findall(r"make ([\w-]+)", words))
    assert {"test", "lint", "docs", "wheels", "release-check"} == called <= targets


def test_what_a_release_needs_is_pinned():
    lines = (ROOT / "packaging/requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines if not line.startswith("#"))


def test_a_wheel_is_tried_without_anything_of_the_checkout(monkeypatch):
    import try_wheel

    for name in ("PYTHONPATH", "TRTKERN_CPU_ISA", "LD_PRELOAD", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "x")
    assert not [name for name in try_wheel.alone() if name.startswith(("PYTHON", "TRTKERN", "LD_"))]
    told = try_wheel.MAPPED.replace('"file": trtkern.__file__', '"file": "x"')
    compile(told, "MAPPED", "exec")
