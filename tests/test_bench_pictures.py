"""What the pictures of the measurements draw: every candidate once, the limit as a line, others beside this project."""

import math
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from trtkern.bench import ahead, machine_page, page, plot, rows
from trtkern.output import style

OURS = rows.Row(
    *["x"] * 4, 2, "x", "default", "lif 4x1024 float32", "lif", "4,1024", "float32", "both", "trtkern cpu", "trtkern",
    "ok", "", rounds=25, p20_ms=0.9, p50_ms=1.0, p80_ms=1.2, bytes=100, copy_share=0.8, times_ours=1.0,
    times_ours_low=1.0, times_ours_high=1.0,
)  # fmt: skip


def other(name, library, times, **changes):
    ms = {"p20_ms": 0.9 * times, "p50_ms": times, "p80_ms": 1.1 * times}
    low_high = {"times_ours_low": times - 0.25, "times_ours_high": times + 0.25}
    return replace(OURS, candidate=name, library=library, times_ours=times, **{**ms, **low_high, **changes})


COPY = other("copy_", "torch 2", 0.3)
EAGER, FASTER = other("eager loop, x[t]", "torch 2", 9.0), other("eager loop, unbind", "torch 2", 4.0)
NORSE, WRONG = other("norse LIFBoxCell", "norse 1", 3.0), other("sinabs LIF", "sinabs 1", 2.0, status="WRONG")


def test_a_panel_has_a_dot_and_an_interval_for_each_candidate_and_a_line_at_the_limit():
    axes = Figure().add_subplot()
    plot.panel(axes, [OURS, NORSE, EAGER, COPY])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "trtkern cpu",
        "norse LIFBoxCell",
        "eager loop, x[t]",
    ]
    dots = {line.get_xdata()[0]: line.get_color() for line in axes.lines if line.get_marker() == "o"}
    assert list(dots) == [1.0, 3.0, 9.0]
    spans = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert [tuple(span) for span in spans] == [
        pytest.approx((0.9, 1.2)),
        pytest.approx((2.7, 3.3)),
        pytest.approx((8.1, 9.9)),
    ]
    (limit,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert limit.get_xdata()[0] == pytest.approx(0.8) == plot.limit([OURS, COPY]) and axes.get_xscale() == "log"
    assert "copy limit" in [text.get_text() for text in axes.texts]


def test_without_a_copy_there_is_no_limit():
    axes = Figure().add_subplot()
    plot.panel(axes, [OURS, NORSE])
    assert plot.limit([OURS, NORSE]) is None and not [line for line in axes.lines if line.get_linestyle() == "--"]


def test_the_fastest_of_each_other_stands_beside_this_project():
    relu = other("BatchNorm + ReLU", "torch 2", 0.5)
    own = other("norse Net", "norse 1", 0.1, note="its own network and neurons")
    (line,) = ahead.lines([OURS, COPY, EAGER, FASTER, NORSE, WRONG, relu, own])
    assert {each.who: each.middle for each in line.others} == {"eager loop": 4.0, "Norse": 3.0, ahead.RELU: 0.5}
    assert line.name == "LIF 4x1024" and line.limit == pytest.approx(0.8)
    axes = Figure().add_subplot()
    ahead.draw(axes, [line], "title")
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert sorted(drawn) == [0.5, 3.0, 4.0]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["eager loop", "Norse", ahead.RELU, "copy limit"]
    low, high = axes.get_xlim()
    assert low < 0.25 and high > 4.25, "intervals are whole"


def test_whole_steps_come_first_and_say_their_threads():
    step = {"op": "step", "case": "mlp step 4x2 float32", "bytes": 0, "threads": 1}
    made = [OURS, NORSE, replace(OURS, **step), other("ReLU", "torch 2", 2.0, **step)]
    first, second = ahead.lines(made)
    assert (first.name, second.name) == ("step of mlp 4x2, 1 thread", "LIF 4x1024, 2 threads")
    assert math.isnan(first.limit)
    assert ahead.lines([OURS, COPY, WRONG]) == []


def test_no_two_colours_of_the_others_are_one():
    assert len(ahead.WHO) == len(style.SERIES) - 1 and style.SERIES[0] == style.OURS


@pytest.mark.parametrize(
    ("name", "called", "stem"),
    [
        (
            "Intel(R) Xeon(R) Processor (family 6, model 1), 2 cores, AMX",
            "Intel Xeon (family 6, model 1), 2 cores, AMX",
            "intel-xeon-6-1-2c-amx",
        ),
        (
            "A CPU, 1 core, AVX-512, TRTKERN_CPU_ISA=avx2",
            "A CPU, 1 core, AVX-512, trtkern held to AVX2",
            "a-cpu-1c-avx512-as-avx2",
        ),
        (
            "A CPU, AMX, TRTKERN_CPU_ISA=avx2, ATEN_CPU_CAPABILITY=avx2",
            "A CPU, AMX, trtkern and torch held to AVX2",
            "a-cpu-amx-as-avx2",
        ),
        ("NVIDIA H200", "NVIDIA H200", "nvidia-h200"),
    ],
)
def test_a_machine_has_a_name_for_people_and_a_short_one_for_files(tmp_path, name, called, stem):
    (machine,) = machine_page.machines([replace(OURS, machine=name)], tmp_path / "p.md")
    assert machine.title == called and machine.page.name == f"p-{stem}.md"


def test_machines_of_one_short_name_keep_pages_apart(tmp_path):
    made = [replace(OURS, machine=name) for name in ("A (R) CPU", "A CPU")]
    written = page.write(made, tmp_path / "p.md", tmp_path / "rows.csv", "command")
    assert [path.name for path in written] == ["p.md", "p-a-cpu.md", "p-a-cpu-2.md"]
