"""``trtkern analyze landscape``: what it writes for several runs, how it goes on, what it refuses."""

from __future__ import annotations

import json
import re

import pytest
import torch

from trtkern import cli
from trtkern.analysis import Curvature, Landscape, Result
from trtkern.commands import _runs

TRAIN = ["--data", "digits", "--epochs", "1", "-T", "2", "--loss", "sdt", "--threads", "1", "--device", "cpu",
         "--batch-size", "512", "--select", "last"]  # fmt: skip
SMALL = ["--set", 'model.layers=[4, "pool"]']
FAST = ["--points", "3", "--samples", "24", "--batch-size", "12", "--trace-vectors", "2", "--eigenvalues", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one architecture and one of another."""
    place = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runs, "keep_pages", lambda: False)
        patch.setenv("COLUMNS", "150")
        for name, more in (
            ("one", SMALL),
            ("two", [*SMALL, "--seed", "1"]),
            ("wide", ["--set", 'model.layers=[8, "pool"]']),
        ):
            assert cli.main(["train", *TRAIN, *more, "--run-dir", str(place / name)]) == 0
    torch.set_num_threads(threads)
    return place


def test_two_runs(runs, capsys, monkeypatch):
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    one, two = str(runs / "one"), str(runs / "two")
    assert cli.main(["analyze", "landscape", one, two, *FAST, "--save-directions", str(runs / "directions.json")]) == 0
    out = capsys.readouterr().out
    assert out.count("eigenvalue 1") == 2 and "landscapes.png compares the runs" in out
    slices = {name: Landscape.load(runs / name / "analysis" / "landscape.json") for name in ("one", "two")}
    assert slices["one"].shapes == slices["two"].shapes and slices["one"].plane.losses.shape == (3, 3)
    assert not torch.equal(slices["one"].line.losses, slices["two"].line.losses)
    for name, found in slices.items():
        assert float(found.line.losses[3]) == found.loss and found.about["run"].startswith("digits, sdt loss, T=2")
        bent = Curvature.load(runs / name / "analysis" / "curvature.json")
        assert bent.loss == pytest.approx(found.loss, rel=1e-6) and bent.samples == 24
        names = sorted(path.name for path in (runs / name / "analysis").iterdir())
        more = ["landscapes.png"] if name == "one" else []
        assert names == sorted(["curvature.json", "curvature.png", "landscape.json", "landscape.png", *more])


def test_ctrl_c_keeps_the_points_and_other_options_are_refused(runs, capsys, monkeypatch):
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    from trtkern.analysis import _grid

    real = _grid.Grid.points

    def cut(self, wanted, processes):
        for i, found in enumerate(real(self, wanted, processes)):
            if i == 4:
                raise KeyboardInterrupt
            yield found

    command = ["analyze", "landscape", str(runs / "wide"), *FAST, "--no-curvature"]
    with monkeypatch.context() as patch:
        patch.setattr(_grid.Grid, "points", cut)
        assert cli.main(command) == 130
    assert "the points are kept: call the same command again" in capsys.readouterr().err
    points = runs / "wide" / "analysis" / "landscape.points.jsonl"
    assert len(points.read_text().splitlines()) == 5
    assert cli.main([*command, "--range", "0.5"]) == 2
    assert re.search(r"radius is 1\.0 there and 0\.5 here; delete the file", capsys.readouterr().err)
    first = json.loads(points.read_text().splitlines()[1])
    assert cli.main(command) == 0
    assert not points.exists()
    assert Result.load(runs / "wide" / "analysis" / "landscape.json").loss == first["loss"]


def test_what_is_refused(runs, capsys, monkeypatch):
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    one, wide = str(runs / "one"), str(runs / "wide")
    for words, why in (
        ([one, wide], r"wide: expected directions of this network.*: \S+weight is \[.*\] there and \[.*\] here"),
        ([one, "--loss", "std"], "--loss: expected one of sdt, tet, got 'std'"),
        ([one, "--method", "exakt"], "--method: expected one of auto, exact, differences"),
        ([one, "--directions", str(runs / "no.json")], r"no\.json"),
        ([str(runs / "none")], "none"),
        ([one, *FAST, "--points", "2"], "expected points to be an int of at least 3, got 2"),
    ):
        assert cli.main(["analyze", "landscape", *words]) == 2, words
        error = capsys.readouterr().err
        assert re.search(why, error) and error.count("\n") == 1, error
