"""``--json``: one document of every command that shows a table, on standard output alone or in a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trtkern import cli, selftest
from trtkern.commands import _json, app
from trtkern.commands._common import Quit

TABLES = (
    "doctor", "bench", "inspect", "evaluate", "sweep", "convert", "export", "train", "data check", "analyze fisher",
    "analyze gradients", "analyze landscape", "analyze energy", "analyze spikes", "analyze early",
)  # fmt: skip
"""The commands that show one."""


def strict(text: str) -> dict:
    """JSON as every reader takes it: without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def command(name: str):
    from typer.main import get_command

    found = get_command(app)
    for word in name.split():
        found = found.commands[word]
    return found


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_the_option(name):
    (option,) = [each for each in command(name).params if "--json" in each.opts]
    assert option.metavar == "FILE" and "prints the JSON alone" in option.help


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [selftest.Row("good", True, "fine"), selftest.Row("gone", None, "get it")]
    monkeypatch.setattr(selftest, "run", lambda: rows)


def test_a_dash_is_the_document_alone(capsys):
    assert cli.main(["doctor", "--json", "-"]) == 0
    said = capsys.readouterr()
    found = strict(said.out)
    assert found["schema"] == {"name": "trtkern doctor", "version": 1} and found["machine"]["torch"]
    assert found["backends"][1] == {"name": "gone", "ok": None, "detail": "get it"}
    assert said.err == ""


def test_a_file_is_beside_what_is_shown(capsys):
    assert cli.main(["doctor", "--json", "found.json"]) == 0
    assert "Backends" in capsys.readouterr().out
    assert strict(Path("found.json").read_text())["backends"][0]["ok"] is True


def test_a_failing_command_writes_what_it_found(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "run", lambda: [selftest.Row("bad", False, "off by 3")])
    assert cli.main(["doctor", "--json", "-"]) == 1
    assert strict(capsys.readouterr().out)["backends"] == [{"name": "bad", "ok": False, "detail": "off by 3"}]


def test_a_wrong_command_line_prints_no_document(capsys):
    assert cli.main(["bench", "--json", "-", "--op", "lfi"]) == 2
    assert capsys.readouterr().out == ""
    assert cli.main(["doctor", "--json", "gone/found.json"]) == 2
    assert "--json: expected a file in a folder that exists, or -, got gone/found.json" in capsys.readouterr().err


def test_a_dry_run(capsys):
    line = ["train", "--dry-run", "--backend", "reference", "--threads", "1", "--set", "model.layers=[8]"]
    before = torch.get_num_threads()
    assert cli.main([*line, "--json", "-"]) == 0
    torch.set_num_threads(before)
    found = strict(capsys.readouterr().out)
    assert found["schema"]["name"] == "trtkern train --dry-run" and found["settings"]["data"] == "digits"
    assert found["parameters"] == 5218 and {"name", "bytes"} & {*found["memory"]["rows"][0]}


def test_a_bench(capsys):
    line = ["bench", "--op", "lif", "--shape", "2,64", "--rounds", "1", "--peers", "none", "--no-compile"]
    assert cli.main([*line, "--backend", "reference", "--json", "-"]) == 0
    rows = strict(capsys.readouterr().out)["rows"]
    assert {"candidate", "p50_ms", "status"} <= {*rows[0]} and any(row["status"] == "ok" for row in rows)


def test_what_json_lacks():
    held = {
        "nan": math.nan, "inf": torch.tensor([1.0, math.inf]), "number": np.float64(2.5), "whole": np.int64(3),
        "path": Path("a/b"), "row": selftest.Row("a", None, ""), "pair": (1, "x"), 5: True,
    }  # fmt: skip
    assert _json.plain(held) == {
        "nan": None, "inf": [1.0, None], "number": 2.5, "whole": 3, "path": "a/b",
        "row": {"name": "a", "ok": None, "detail": ""}, "pair": [1, "x"], "5": True,
    }  # fmt: skip


def test_lists_grow_and_nothing_is_told_without_the_option(capsys):
    _json.tell(rows=[1])
    with pytest.raises(Quit), _json.telling("x", "-"):
        _json.tell(rows=[1], name="a")
        _json.tell(rows=[2])
        raise Quit("failed", 1)
    assert strict(capsys.readouterr().out) == {
        "schema": {"name": "trtkern x", "version": 1},
        "rows": [1, 2],
        "name": "a",
    }
