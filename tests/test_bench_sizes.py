"""``trtkern bench --suite sizes``: its cases, its candidates, its map on the page. No test looks at how fast it is."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
import typer
from torch import nn

from trtkern import malloc
from trtkern.bench import cases, contest, heat, layers, measure, page, peers, plain, rows, sizes
from trtkern.bench.cases import Case
from trtkern.commands import bench as command

CPU = torch.device("cpu")
FAST = ["--backend", "auto", "--peers", "none", "--no-compile", "--rounds", "3", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(malloc, "keep_pages", lambda: False)
    monkeypatch.setattr(contest, "rotations", lambda case, device: 1)


def measured(*arguments: str) -> list[rows.Row]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command.bench)
    app(args=["--suite", "sizes", "--csv", "rows.csv", *arguments, *FAST], standalone_mode=False)
    from pathlib import Path

    return rows.read(Path("rows.csv"))


def test_the_grid_of_neurons_is_whole_up_to_the_largest():
    made = [case for case in sizes.cases() if case.op == "lif"]
    assert {case.shape for case in made} == {
        (T, N) for T in (1, 2, 4, 8, 16, 32, 100, 500) for N in sizes.NEURONS if T * N <= 128 << 20
    }
    assert {(500, 256 << 10), (100, 1 << 20)} < {case.shape for case in made}
    assert not {(500, 1 << 20), (100, 2 << 20)} & {case.shape for case in made}


def _norms(net: nn.Module, x: torch.Tensor) -> set[tuple[int, ...]]:
    """(C, H, W) of what every BatchNorm of a plain network is given."""
    found = set()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, given: found.add(tuple(given[0].shape[1:])))
    with torch.no_grad():
        net(x)
    return found


def test_the_layers_are_those_of_the_networks():
    vggsnn = _norms(plain.vggsnn(4608), torch.zeros(1, 1, 2, 48, 48))
    resnet19 = _norms(plain.resnet19(), torch.zeros(1, 3, 32, 32))
    digits = {(16, 8, 8), (32, 8, 8)}
    assert {shape[1:] for shape in sizes.layer_shapes()} == vggsnn | resnet19 | digits
    assert len(set(sizes.layer_shapes())) == len(sizes.layer_shapes())
    normed = [case for case in sizes.cases() if case.op == "bn-lif"]
    assert {(case.shape[1], case.layout) for case in normed} == {(b, at) for b in (8, 64) for at in cases.LAYOUTS}
    assert len(normed) == 4 * len(sizes.layer_shapes()) == len({case.name for case in normed})


def test_parts_take_turns_and_make_up_the_whole():
    chosen = cases.select("all", [], "float32", "sizes")
    parts = [cases.part(chosen, f"{k}/8") for k in range(1, 9)]
    assert sorted(case.name for part in parts for case in part) == sorted(case.name for case in chosen)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for text in ("0/3", "4/3", "2", "a/b", "1/", "-1/2"):
        with pytest.raises(ValueError, match="expected K/N with 1 <= K <= N"):
            cases.part(chosen, text)


def test_a_part_is_measured_and_drawn_alone(tmp_path):
    made = measured("--shape", "3,20", "--shape", "2,10", "--shape", "4,8", "--part", "2/3", "--plot", "part.png")
    assert {row.case for row in made} == {"lif 2x10 float32"}
    assert (tmp_path / "part.png").read_bytes()[:4] == b"\x89PNG"


def test_only_the_strongest_are_compared():
    made = measured("--shape", "3,20", "--shape", "3,2,4,2,2")
    seen: dict[str, set[str]] = {}
    for row in made:
        assert row.status == "ok" and row.suite == "sizes"
        seen.setdefault(row.case, set()).add(row.candidate)
    (ours,) = {row.candidate for row in made if row.library == "trtkern"}
    normed = {"copy_", ours, "BatchNorm + ReLU", "BatchNorm, then eager loop, unbind"}
    assert seen == {
        "lif 3x20 float32": {"copy_", ours, "eager loop, unbind"},
        "bn-lif 3x2x4x2x2 float32": normed,
        "bn-lif 3x2x4x2x2 float32 channels_last": normed,
    }


@pytest.mark.parametrize("timesteps, loop", [(layers.WHOLE_LOOP, True), (layers.WHOLE_LOOP + 1, False)])
def test_the_strongest_are_compiled_as_far_as_that_is_done(timesteps, loop):
    strong = {
        layer.name for layer in layers.eager(layers.Where(CPU, torch.float32, timesteps, 8, True)) if layer.strong
    }
    whole, cell = {"torch.compile of the loop, unbind"}, {"torch.compile of the cell, unbind", "eager loop, unbind"}
    assert strong == (whole if loop else cell)
    for peer in peers.choose("snntorch,spikingjelly"):
        if not peer.missing:
            theirs = peer.layers(layers.Where(CPU, torch.float32, timesteps, 8, True))
            assert [layer.compiled for layer in theirs if layer.strong] == [True] * loop


BASE = rows.Row(
    "2026-01-01", "c", "A CPU, 2 cores", "v", 2, "m", "sizes", "lif 4x1024 float32", "lif", "4,1024", "float32", "both",
    "trtkern cpu", "trtkern", "ok", "", 9, 1.0, 1.0, 1.0, 64, 1.0, 0.5, 1.0, 1.0, 1.0, 0, 0.0, "trtkern bench",
)  # fmt: skip


def other(middle: float, high: float, **changes: object) -> rows.Row:
    """A row of another candidate, of which a call takes ``middle`` of this project's time, at the most ``high``."""
    values = {"candidate": "loop", "library": "torch", "times_ours": middle, "times_ours_high": high}
    return replace(BASE, **{**values, "times_ours_low": middle / 2, **changes})


def test_a_cell_is_the_fastest_other_over_the_fastest_own():
    relu = other(0.5, 0.6, candidate="BatchNorm + ReLU")
    copy = other(0.1, 0.1, candidate="copy_")
    assert heat.ahead([BASE, other(3.0, 4.0), other(2.0, 2.5), relu, copy]) == heat.Cell(2.0, False)
    assert heat.ahead([BASE, other(0.8, 0.9), relu]) == heat.Cell(0.8, True)
    assert heat.ahead([BASE, other(0.8, 1.1)]) == heat.Cell(0.8, False)
    assert heat.ahead([BASE, other(0.8, 0.8, rounds=1)]) == heat.Cell(0.8, False)
    assert heat.ahead([BASE, relu], relu=True) == heat.Cell(0.5, True)
    assert heat.ahead([BASE, replace(BASE, candidate="trtkern cuda", times_ours=0.5), other(0.8, 0.9)]).value == 1.6
    assert math.isnan(heat.ahead([BASE, copy]).value) and math.isnan(heat.ahead([other(1.0, 1.0)]).value)
    assert heat.of_copy([BASE, replace(BASE, copy_share=0.75)]).value == 0.75


def test_a_map_has_its_cells_in_order():
    made = []
    for T, N in ((4, 1024), (100, 3000), (4, 2 << 20)):
        case = Case("lif", (T, N))
        same = {"case": case.name, "shape": f"{T},{N}"}
        made += [replace(BASE, **same), other(T / 2, T, **same)]
    normed = Case("bn-lif", (4, 8, 16, 6, 5), layout="channels_last")
    same = {"case": normed.name, "shape": "4,8,16,6,5", "op": "bn-lif"}
    made += [replace(BASE, **same), other(0.5, 0.6, candidate="BatchNorm + ReLU", **same)]
    ratio, share, best, relu = heat.maps(made)
    assert (ratio.columns, ratio.rows) == (["1 Ki", "3000", "2 Mi"], ["4", "100"])
    assert [[cell.value for cell in row] for row in ratio.cells] == [
        [2.0, pytest.approx(math.nan, nan_ok=True), 2.0],
        [pytest.approx(math.nan, nan_ok=True), 50.0, pytest.approx(math.nan, nan_ok=True)],
    ]
    assert share.cells[0][0].value == 0.5 and not share.ratio and ratio.ratio
    assert (relu.columns, relu.rows) == (["batch 8\nchannels_last"], ["T=4 16x6x5"])
    assert relu.cells == [[heat.Cell(0.5, True)]] and math.isnan(best.cells[0][0].value)


def test_the_page_has_the_map_and_keeps_the_tables_apart(tmp_path):
    """The same case of another suite keeps its table, with the candidates that the suite of many sizes leaves out."""
    slow = other(9.0, 9.0, candidate="eager loop, x[t]", suite="default")
    made = [replace(BASE, suite="default"), slow, replace(BASE, command="later"), other(0.5, 0.6, command="later")]
    forced = replace(BASE, machine="A CPU, 2 cores, TRTKERN_CPU_ISA=avx2")
    rows.append([*made, forced], tmp_path / "rows.csv")
    page.write(rows.read(tmp_path / "rows.csv"), tmp_path / "page.md", tmp_path / "rows.csv", "command")
    text = (tmp_path / "page-a-cpu-2c.md").read_text()
    assert "| eager loop, x[t] | torch |" in text and "Of 1 comparisons with other implementations" in text
    assert "is behind in 1:\n\n- lif 4x1024 float32, forward + backward: loop, 0.50 of our time" in text
    names = ["page-a-cpu-2c-as-avx2-sizes.png", "page-a-cpu-2c-sizes.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names)
    assert all(f"]({name})" in text for name in ("page-a-cpu-2c.svg", names[1]))
    assert f"]({names[0]})" in (tmp_path / "page-a-cpu-2c-as-avx2.md").read_text()
    overview = (tmp_path / "page.md").read_text()
    assert (
        "[A CPU, 2 cores, trtkern held to AVX2](page-a-cpu-2c-as-avx2.md)" in overview and f"]({names[0]})" in overview
    )


def test_what_is_compiled_for_an_instruction_set_is_not_found_for_another(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of the user")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    measure.compile_apart()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ  # torch's own
    folders = set()
    for asked in ("avx2", "default"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", asked)
        measure.compile_apart()
        folders.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len(folders) == 2
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of the user")
    measure.compile_apart()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "of the user"


def test_an_instruction_set_that_is_asked_for_is_part_of_the_machine(monkeypatch):
    for key in measure.ISA_ASKED:
        monkeypatch.delenv(key, raising=False)
    plainly = measure.machine()
    widest = plainly.rpartition(", ")[2].lower().replace("-", "")
    monkeypatch.setenv("TRTKERN_CPU_ISA", widest)
    assert measure.machine() == plainly
    monkeypatch.setenv("TRTKERN_CPU_ISA", "wide")
    assert measure.machine() == f"{plainly}, TRTKERN_CPU_ISA=wide"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512" if widest == "amx" else widest)
    assert measure.machine() == f"{plainly}, TRTKERN_CPU_ISA=wide"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert measure.machine() == f"{plainly}, TRTKERN_CPU_ISA=wide, ATEN_CPU_CAPABILITY=default"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert measure.machine().endswith(", ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=AVX2")
