"""What the README and the guides show runs as it stands."""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from trtkern import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "page",
    [
        "README.md", "docs/layers.md", "docs/data.md", "docs/models.md", "docs/training.md", "docs/profiling.md",
        "docs/budget.md",
        "docs/scale.md",
    ],
)  # fmt: skip
def test_the_code_on_the_page_runs(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


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


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (folder / target).exists(), target


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
