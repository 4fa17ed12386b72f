"""What the README and the guides show runs as it stands."""

import re
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from urllib.parse import urlparse

import pytest
import shell
import torch
from pages import PAGES, ROOT, Fence, anchors, commands, fences, links

from trtkern import cli
from trtkern.training import recipes

WALKED = {
    "docs/own.md": "test_the_page_on_data_and_models_of_one_s_own_runs",
    "docs/extending.md": "test_extending.py",
    "docs/export.md": "test_onnx.py",
    "docs/nir.md": "test_nir.py",
    "docs/from-spikingjelly.md": "test_coming_from.py",
    "docs/from-snntorch.md": "test_coming_from.py",
    "docs/from-norse.md": "test_coming_from.py",
    "docs/from-sinabs.md": "test_coming_from.py",
    "docs/from-rockpool.md": "test_coming_from.py",
}
"""Pages that a test of their own runs, block by block."""
KINDS = {"python", "sh", "text", "toml", "json", "yaml", "c++", "cpp", "ini", "diff", "markdown"}


def fence_problems(page: str) -> list[str]:
    """Fences of a page that do not say what they hold, or hold what is not a language here."""
    return [
        f"{page}, line {fence.line}: expected a fence of {', '.join(sorted(KINDS))} or a directive, got {fence.kind!r}"
        for fence in fences(page)
        if fence.kind not in KINDS and not re.fullmatch(r"\{[\w:-]+\}.*", fence.kind)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_says_what_it_holds(page):
    assert not (problems := fence_problems(page)), "\n".join(problems)


def with_python() -> list[str]:
    """The pages with code that no other test runs."""
    return [page for page in PAGES if page not in WALKED and any(f.kind == "python" for f in fences(page))]


@pytest.mark.parametrize("page", with_python())
def test_the_code_on_the_page_runs(page, tmp_path, monkeypatch, capsys, one_thread, no_pictures):
    """Every block of Python, page by page, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for fence in fences(page):
        if fence.kind == "python":
            exec(compile("\n" * fence.line + fence.text, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_the_command_lines_on_the_page_exist(page):
    blocks = [fence for fence in fences(page) if fence.kind == "sh"]
    if page == "docs/cli.md":
        blocks = [
            Fence("sh", text, 0) for text in re.findall(r"^```sh\n(.*?)^```", commands(), re.DOTALL | re.MULTILINE)
        ]
    problems = [
        f"{page}, block at line {fence.line}: {line}: {problem}"
        for fence in blocks
        for line in shell.lines(fence.text)
        if (problem := shell.problem(line, (ROOT / page).read_text()))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trtkern train --lossy tet", "--lossy"),
        ("trtkern trian", "expected one of train"),
        ("trtkern train --epochs many", "valid integer"),
        ("trtkern analyze fisher", "Missing argument"),
        ("trtkern sweep digits --grid lr=1,2 --epochz 3", "--epochz"),
        ("make coffee", "no target"),
        ("pip install 'trtkern[coffee]'", "no extra"),
        ("python bench/coffee.py", "no file"),
        ("coffee --now", "not a command"),
        ("$ trtkern train", "not a command"),
        ("trtkern train --epochs 3  # a comment", None),
        ("OMP_NUM_THREADS=1 trtkern sweep digits --grid lr=1,2 --epochs 3", None),
        ("make docs", None),
        ("pip install 'trtkern[train,data]'", None),
    ],
)
def test_a_command_line_that_does_not_exist_is_found(line, expected):
    problem = shell.problem(line, "")
    assert (problem is None) if expected is None else (problem is not None and expected in problem)


@pytest.mark.parametrize("page", [page for page in PAGES if any(f.kind == "toml" for f in fences(page))])
def test_the_recipes_on_the_page_are_recipes(page, tmp_path):
    """A block of TOML can be read, and one that names a model or a data set is a recipe that `trtkern train` takes."""
    for number, fence in enumerate(each for each in fences(page) if each.kind == "toml"):
        said = tomllib.loads(fence.text)
        if {"data", "model"} & set(said):
            path = tmp_path / f"recipe{number}.toml"
            path.write_text(fence.text)
            recipes.load(str(path))


def test_the_page_on_data_and_models_of_one_s_own_runs(tmp_path, monkeypatch, capsys, one_thread, no_pictures):
    """Every block of it in a new folder, in its order: files are written, commands typed, lines run."""
    page = (ROOT / "docs" / "own.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr("trtkern.commands._runs.keep_pages", lambda: False)
    first, *blocks = re.findall(r"^```(python|sh|toml)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    Path("mine.py").write_text(first[1])
    monkeypatch.syspath_prepend(tmp_path)
    names = dict(vars(import_module("mine")))
    exec(compile(first[1].partition('if __name__ == "__main__":')[2].replace("\n    ", "\n"), "mine.py", "exec"), names)
    for kind, block in blocks:
        if kind == "toml":
            Path("mine.toml").write_text(block)
            block = "trtkern train --recipe mine.toml\ntrtkern profile mine.toml --steps 1"
        if kind == "python":
            exec(compile(block, "own.md", "exec"), names)
            continue
        for line in block.splitlines():
            assert cli.main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert Path("runs/mine/report.html").exists() and Path("runs/data-trt-seeds/seeds.json").exists()
    del sys.modules["mine"]


def broken_links(page: str) -> list[str]:
    """The links of a page that lead nowhere, each with what is missing."""
    folder, found = (ROOT / page).parent, []
    for target in links(page):
        if re.match(r"[a-z][a-z+.-]*:", target):
            url = urlparse(target)
            if url.scheme not in ("https", "mailto") or (url.scheme == "https" and "." not in url.netloc):
                found.append(f"{target}: expected https:// and a host")
            continue
        place, _, anchor = target.partition("#")
        path = (folder / place).resolve() if place else ROOT / page
        if not path.exists():
            found.append(f"{target}: no such file")
        elif anchor and path.suffix == ".md" and anchor not in anchors(str(path.relative_to(ROOT))):
            found.append(f"{target}: {path.name} has no heading {anchor!r}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert not (problems := broken_links(page)), f"{page}: " + "; ".join(problems)


def test_a_link_that_leads_nowhere_is_found(monkeypatch):
    page = "docs/index.md"
    for target in ("gone.md", "own.md#gone", "#gone", "http://example.org", "https://x", "../gone.py"):
        monkeypatch.setattr(sys.modules[__name__], "links", lambda _, target=target: [target])
        assert len(broken_links(page)) == 1, target
    for target in ("own.md#from-an-empty-folder", "../README.md", "https://arxiv.org/abs/2506.19256"):
        monkeypatch.setattr(sys.modules[__name__], "links", lambda _, target=target: [target])
        assert not broken_links(page), target


def test_pages_that_the_docstrings_name_are_there():
    """``docs/x.md``, in a docstring or a comment of the package."""
    for path in sorted(ROOT.glob("trtkern/**/*.py")):
        for named in re.findall(r"\b(docs/[\w/-]+\.md)(?:#([\w-]+))?", path.read_text()):
            assert (ROOT / named[0]).exists(), (path, named)
            assert not named[1] or named[1] in anchors(named[0]), (path, named)


def test_the_results_are_the_rows(monkeypatch):
    """The page is what bench/controls.py makes of bench/controls.csv, five seeds of five losses."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import controls

    runs = controls.read()
    assert list(runs) == list(controls.CONTROLS) and all(sorted(found) == [0, 1, 2, 3, 4] for found in runs.values())
    assert controls.PAGE.read_text() == controls.page(runs)


def test_the_exact_trainings_are_the_rows(monkeypatch):
    """The page is what bench/exact.py makes of its rows, of which those with kernels had some, and the others none."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import exact_page

    trained, stepped = exact_page.read()
    for row in trained:
        ran = int(row["kernel_forward"]), int(row["kernel_weight_grad"])
        assert min(ran) > 0 if row["way"] == "kernels" else ran == (0, 0)
    for data, seeds in {"digits": 5, "fashion-mnist": 3}.items():
        for way in ("exact", "kernels"):
            found = [int(row["seed"]) for row in trained if (row["data"], row["way"]) == (data, way)]
            assert found == list(range(seeds))
    assert {row["network"] for row in stepped} == {"digits", "vggsnn"}
    assert all(int(row["kernel_forward"]) > 0 for row in stepped)
    assert exact_page.PAGE.read_text() == exact_page.page(trained, stepped)


def test_the_claims_are_the_rows(monkeypatch):
    """The page is what bench/claims.py makes of bench/claims.csv, several seeds of every way to train."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import claims_page

    found = claims_page.read()
    assert found and set(found) <= set(claims_page.SETUPS)
    for arms in found.values():
        assert {claims_page.TRT, *claims_page.OTHERS} <= set(arms) and all(len(seeds) > 2 for seeds in arms.values())
    assert claims_page.PAGE.read_text() == claims_page.page(found)


def test_what_is_said_of_several_gpus_is_the_rows(monkeypatch):
    """The page is what bench/scale.py makes of its rows; the model is right where it was not fitted."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import scale_page

    from trtkern.profiling.scaling import LINKS

    rows = scale_page.read()
    link, checked = scale_page.fit(rows), [row for row in rows if row["use"] == "check"]
    assert {row["ranks"] for row in rows if row["use"] == "fit"} == {1, 2, 4}
    assert {row["parallel"] for row in checked} == {"ddp", "fsdp"}
    for row in checked:
        assert abs(scale_page.error(row, link)) <= scale_page.ALLOWED, row
    assert LINKS["gloo"][1:4] == pytest.approx(link[1:4], rel=0.05) and LINKS["gloo"].overlap == round(link.overlap, 2)
    assert scale_page.PAGE.read_text() == scale_page.page(rows)


@pytest.mark.parametrize("name", ["migrate", "recurrence"])
def test_a_part_of_a_page_is_its_rows(monkeypatch, name):
    """What bench/migrate.py and bench/recurrence.py write into their pages is what they make of their rows."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    script = import_module(name)
    text = script.PAGE.read_text()
    assert f"bench/{name}.py --page writes from here" in text and script.page(text, script.read()) == text
