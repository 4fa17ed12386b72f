"""Sweeps of ``trtkern bench``: which cases they are, and what is drawn of them."""

from __future__ import annotations

import pytest

from trtkern import cli
from trtkern.bench import lines, measure, rows, sweep


def shapes(*texts, op="lif", given=()):
    return [case.shape for case in sweep.cases(texts, op, given, "float32", "LIF")]


def test_every_combination_is_a_case_and_small_ones_come_first():
    assert shapes("T=4,1", "N=8,2") == [(1, 2), (1, 8), (4, 2), (4, 8)]
    assert shapes("N=8,2", given=["7,100"]) == [(7, 2), (7, 8)]
    assert shapes("B=2,1", given=["3,9,5"]) == [(3, 1, 5), (3, 2, 5)]
    assert shapes("T=2", op="bn-lif") == [(2, 8, 128, 32, 32)]
    assert shapes("C=16", "T=1", op="delay") == [(1, 128, 16)]


@pytest.mark.parametrize(
    "texts, more, wanted",
    [
        (["T"], {}, "expected an axis and its sizes such as T=1,4,16, got 'T'"),
        (["T=1,x"], {}, "--sweep: expected whole numbers"),
        (["T=0"], {}, "--sweep: expected T, N and all others to be at least 1"),
        (["T=1", "T=2"], {}, "expected each axis once"),
        (["T=1,1"], {}, "each size of it once"),
        (["H=1"], {}, "expected an axis of --op lif, whose shapes are T,N or T,B,N, got 'H'"),
        (["T=1"], {"op": "step"}, "expected one of lif, bn-lif"),
        (["T=1"], {"given": ["1,2", "3,4"]}, "at most one --shape beside it, got 2"),
        (["T=1"], {"given": ["1,2,3,4"]}, "--shape: expected T,N or T,B,N beside --sweep"),
    ],
)
def test_bad_sweeps_are_named(texts, more, wanted):
    with pytest.raises(ValueError, match=wanted):
        shapes(*texts, **more)


def line(shape, candidate, library, ms, status="ok"):
    text = ",".join(map(str, shape))
    return rows.Row(
        "d", "c", "m", "v", 1, "", "sweep", f"lif {text} float32", "lif", text, "float32", "both", candidate, library,
        status, "", p20_ms=ms / 2, p50_ms=ms, p80_ms=2 * ms, times_ours=ms,
    )  # fmt: skip


def test_a_line_a_step_count_with_time_for_a_neuron_step(tmp_path):
    found = [
        *(line((T, N), "trtkern cpu", "trtkern", 1.0) for T in (1, 4) for N in (10, 100)),
        line((4, 100), "trtkern reference", "trtkern", 9.0), line((4, 100), "eager loop", "torch", 3.0),
        line((4, 100), "copy_", "torch", 0.1), line((1, 10), "eager loop", "torch", 0.1, "WRONG"),
    ]  # fmt: skip
    (panel,) = lines.panels(found)
    assert (panel.axis, [each.label for each in panel.lines]) == ("N", ["T = 1", "T = 4"])
    assert panel.lines[1].ours == [lines.Point(10, 0.5e6 / 40, 1e6 / 40, 2e6 / 40),
                                   lines.Point(100, 0.5e6 / 400, 1e6 / 400, 2e6 / 400)]  # fmt: skip
    assert [point.size for point in panel.lines[1].other] == [100] and panel.lines[0].other == []
    lines.picture(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    (over_time,) = lines.panels([each for each in found if each.shape.endswith(",100")])
    assert over_time.axis == "T" and [each.label for each in over_time.lines] == [""]


def test_the_command_sweeps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trtkern.malloc.keep_pages", lambda: False)
    monkeypatch.setattr(measure, "compile_apart", lambda: None)
    file = tmp_path / "rows.csv"
    words = ["bench", "--op", "lif", "--backend", "reference", "--peers", "none", "--no-compile", "--rounds", "2"]
    sizes = ["--sweep", "T=1,2", "--sweep", "N=8"]
    assert cli.main([*words, "--device", "cpu", *sizes, "--csv", str(file), "--plot", str(tmp_path / "p.png")]) == 0
    assert list(dict.fromkeys(row.shape for row in rows.read(file))) == ["1,8", "2,8"]
    assert {row.suite for row in rows.read(file)} == {"sweep"} and (tmp_path / "p.png").stat().st_size
    assert cli.main([*words, "--sweep", "T=1", "--suite", "long", "--csv", str(file)]) == 2
    assert "expected no --suite beside it" in capsys.readouterr().err
