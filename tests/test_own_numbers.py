"""Numbers instead of classes: a run from its lines to its pages, with the pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_parts import BACKEND

from trtkern import cli
from trtkern.training import run

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ["--device", "cpu", "--threads", "1", "--backend", BACKEND]


def test_numbers_instead_of_classes_on_every_page(tmp_path, monkeypatch, capsys):
    """Where other runs have an accuracy these have their loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trtkern.commands._runs.keep_pages", lambda: False)
    options = ["--model", "own_parts:Sequences", "--set", "model.outputs=1", "--data", "own_parts:numbers", *FAST]
    options += ["--set", "time_first=true", "--loss", "mse", "--epochs", "2", "--batch-size", "16"]
    assert cli.main(["train", *options, "--run-dir", "a"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "train loss" in said and "validation loss" in said and "accuracy" not in said
    assert cli.main(["evaluate", "a"]) == 0
    loss = run.read_result(Path("a"))["test"]["loss"]
    assert f"{loss:.4f}" in capsys.readouterr().out
    page = Path("a/report.html").read_text()
    assert "Learning rate at the start of each epoch" in page and "Accuracy" not in page and "Confusions" not in page
    assert cli.main(["train", *options, "--seeds", "0,1", "--run-dir", "both"]) == 0
    assert "test (loss)" in capsys.readouterr().out
    assert cli.main(["report", "a", "both/seed1", "--no-compute", "--out", "page.html"]) == 0
    assert f"loss {loss:.4g}" in Path("page.html").read_text()
    assert cli.main(["analyze", "fisher", "a"]) == 2
    assert "samples: expected one label a sample, which the analyses take, got targets of" in capsys.readouterr().err
