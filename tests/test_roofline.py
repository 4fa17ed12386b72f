"""What the pictures of a profiled step draw."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from trtkern.output import style
from trtkern.profiling import profile
from trtkern.profiling.step import roofline


@pytest.fixture
def found(one_thread):
    """A step of two linear layers with something without FLOP between them."""
    return profile(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), torch.rand(8, 64), steps=1)


def test_the_roofline_joins_forward_and_backward_and_names_the_layers(found):
    axes = Figure().add_subplot()
    roofline.roofline(axes, found)
    drawn = roofline.points(found)
    assert {point.row.name for point in drawn} == {"0", "2"} and len({p.filled for p in drawn}) == 2
    dots = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert len(dots) == len(drawn)
    assert sorted(line.get_ydata()[0] for line in dots) == pytest.approx(sorted(p.rate / 1e9 for p in drawn))
    joined = [
        line for line in axes.lines if line.get_marker() == "None" and line.get_color() == style.KINDS["linear layers"]
    ]
    assert [len(line.get_xdata()) for line in joined] == [sum(p.row.name == name for p in drawn) for name in ("0", "2")]
    said = [text.get_text() for text in axes.texts]
    assert sum(text.startswith(("0, ", "2, ")) for text in said) == 2
    assert any(text.startswith("memory: ") for text in said) and any(text.startswith("arithmetic: ") for text in said)


def test_times_and_traffic_have_a_row_a_layer_and_fit(found, tmp_path):
    axes = Figure().add_subplot()
    roofline.share(axes, found)
    rows = sorted(found.rows, key=lambda row: -row.seconds)
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in rows]
    widths = [patch.get_width() for patch in axes.patches]
    assert sum(widths) == pytest.approx(1e3 * sum(row.seconds for row in rows))
    assert axes.get_xlim()[1] > 1e3 * rows[0].seconds
    axes = Figure().add_subplot()
    roofline.bandwidth(axes, found)
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in roofline.uncounted(found)]
    assert "1" in [row.name for row in roofline.uncounted(found)]
    copies = [line for line in axes.lines if list(line.get_xdata()) == [found.rates.copy / 1e9] * 2]
    assert len(copies) == 1
    roofline.plot(found, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
