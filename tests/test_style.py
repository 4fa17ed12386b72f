"""The style of the pictures: one module has it, and what is drawn with it can be told apart and read."""

import ast
import io
import re
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from trtkern.output import pictures, style

ROOT = Path(__file__).resolve().parent.parent
DRAWING = [
    path
    for folder in ("trtkern", "bench", "docs", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "trtkern" / "output" / "style.py" and "_build" not in path.parts
]
SIGHT = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "without red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "without green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "without blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""Linear RGB as it is seen (Machado, Oliveira and Fernandes 2009, severity 1)."""


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_are_told_apart_and_read_on_white_and_on_black(sight):
    """The distance of every two in CIE L*a*b*, of which 2.3 is just noticed; contrast as WCAG has it."""
    parts = torch.tensor([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in style.SERIES]).double()
    linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    seen = linear @ torch.tensor(SIGHT[sight]).double().T
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).double()
    xyz = (seen @ to_xyz.T).clamp(min=0) / torch.tensor([0.95047, 1.0, 1.08883]).double()
    root = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(1)
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    assert len(style.SERIES) == 8 and float(torch.pdist(lab).min()) > 15
    luminance = linear @ to_xyz[1]
    assert bool((1.05 / (luminance + 0.05) > 2.4).all()) and bool(((luminance + 0.05) / 0.0588 > 2.4).all())


def test_ours_and_theirs_are_of_the_series():
    named = {style.OURS, style.THEIRS, *style.SPLITS.values(), *style.KINDS.values()}
    assert named <= {*style.SERIES, style.ASIDE} and style.OURS != style.THEIRS
    assert len(style.MARKS) == len(style.SERIES) and style.series(len(style.SERIES)) == style.SERIES[0]


def test_no_other_file_has_a_colour_of_its_own():
    """Neither as a hex number, nor as a name of matplotlib, nor as a word that is given for a colour."""
    literal = re.compile(r"(?<!\w)#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})\b|^C\d$|^tab:|^xkcd:")
    asked = re.compile(r"^(c|color|colors|cmap|facecolors?|edgecolors?|ecolor|markerfacecolor|markeredgecolor)$")
    found = []
    for path in DRAWING:
        text = path.read_text(encoding="utf-8")
        if not re.search(r"color|cmap|\bc=|#[0-9a-fA-F]{3}|['\"](C\d|tab:|xkcd:)", text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and literal.search(node.value):
                found.append((path.name, node.lineno, node.value[:40]))
            named = isinstance(node, ast.keyword) and node.arg and asked.match(node.arg)
            if named and isinstance(node.value, ast.Constant) and node.value.value not in (None, "none"):
                found.append((path.name, node.value.lineno, node.value.value))
    assert not found


def test_the_smallest_words_have_ten_pixels_wherever_a_page_shows_a_picture():
    sizes = [
        size for name, size in style.options().items() if name.endswith(("size", "labelsize")) and "marker" not in name
    ]
    assert len(sizes) > 5 and min(sizes) == style.SMALL
    assert pytest.approx(10) == style.LEAST * style.SMALL * style.PX
    assert style.LEAST * style.WIDTH * 96 <= 358, "a phone of 390 pixels shows a picture whole"
    assert style.MOST >= 480 / (style.WIDTH * 96), "and two fill the row of a page"


def lines(axes):
    axes.plot([1, 2, 3], [1.0, 2.0, 3.0], label="one")
    axes.plot([1, 2, 3], [3.0, 2.9, 3.02], label="$two")
    pictures.over_steps(axes)


def test_names_stand_at_the_ends_of_lines_and_apart():
    with pictures.styled():
        axes = Figure().add_subplot()
        lines(axes)
    assert axes.get_legend() is None
    names = {text.get_text(): text for text in axes.texts}
    assert set(names) == {"one", "$two"}
    one, two = (names[name].xyann[1] for name in ("one", "$two"))
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    assert two - one >= style.SMALL / height, "more than the height of the words"


def test_long_names_and_many_lines_have_a_legend_below():
    for names in (["x" * 40, "y"], [f"line {i}" for i in range(40)]):
        with pictures.styled():
            axes = Figure().add_subplot()
            for i, name in enumerate(names):
                axes.plot([0, 1], [i, i], label=name)
            pictures.named(axes)
        legend = axes.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == names and not axes.texts
        assert legend.get_bbox_to_anchor().y1 < axes.get_window_extent().y0


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.0, 0.0, 0.05], [0.0, 0.1, 0.2]),
        ([0.2, 0.98, 1.0], [0.2, 0.9, 1.0]),
        ([], []),
    ],
)
def test_places_are_moved_apart_as_little_as_that_takes(places, expected):
    assert pictures.spread(places, 0.1) == pytest.approx(expected)


def test_a_logarithmic_axis_has_plain_numbers():
    for low, high, some in ((1.0, 30.0, "20"), (0.6, 1.5, "0.9"), (1e-4, 1e4, "1,000")):
        with pictures.styled():
            axes = Figure().add_subplot()
            axes.plot([low, high], [0, 1])
            axes.set_xlim(low, high)
            pictures.plain(axes)
            axes.figure.draw_without_rendering()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        shown = [label.get_text() for place, label in ticks if low <= place <= high]
        assert some in shown and not any("$" in text for text in shown), shown
        assert len(shown) <= 12


def test_an_interval_is_a_dot_and_a_line():
    axes = Figure().add_subplot()
    pictures.interval(axes, 3, (1.0, 2.0, 4.0), style.OURS)
    pictures.interval(axes, 4, (float("nan"), 2.0, float("nan")), style.THEIRS, filled=False)
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 3], [4, 3]], [[2, 3]], [[2, 4]]]
    assert axes.lines[-1].get_markerfacecolor() == style.EMPTY


def test_a_picture_of_its_own_has_paper_light_and_dark_and_is_the_same_each_time():
    first, again = (pictures.alone(lines, (style.WIDTH, style.HEIGHT), "Two & more") for _ in range(2))
    assert first == again and first.startswith("<svg") and "<title>Two &amp; more</title>" in first
    assert "prefers-color-scheme: dark" in first and style.NIGHT["page"] in first
    assert 'fill="var(--page)"' in first and first.count("<svg") == 1 and "$two" in first


def test_a_sheet_is_written_in_the_kind_that_its_name_says(tmp_path):
    for name, begins in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        with pictures.sheet(tmp_path / name, title="costs $1 and $2") as figure:
            lines(figure.add_subplot())
        assert (tmp_path / name).read_bytes().startswith(begins)
    stream = io.BytesIO()
    with pictures.sheet(stream, (2, 1)) as figure:
        figure.add_subplot()
    assert stream.getvalue().startswith(b"\x89PNG")


def test_the_gallery_has_the_pictures_that_its_page_shows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "gallery", raising=False)
    import gallery

    text = gallery.PAGE.read_text()
    shown = re.findall(r"\]\(gallery/([\w-]+)\.svg\)", text)
    files = {path.stem: path for path in gallery.FOLDER.iterdir()}
    assert sorted(shown) == sorted(files) and set(gallery.CHOSEN) < set(files)
    assert sum(path.stat().st_size for path in files.values()) < 1.5 * 2**20
    names = {line.split(" = ")[0] for block in gallery.blocks() for line in block.splitlines() if " = " in line}
    assert {result for result, _ in gallery.CHOSEN.values()} <= names
    assert all(path.read_text().startswith("<svg") for path in files.values())


def test_the_landing_picture_says_what_the_rows_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "gallery", raising=False)
    import gallery

    from trtkern.bench import rows

    steps = gallery.steps(rows.read(gallery.RESULTS))
    text = gallery.LANDING.read_text()
    assert len(steps) > 4 and all(low <= middle <= high for _, (low, middle, high), _ in steps)
    for step in steps:
        assert f"{gallery.NAMES[step.name]}: {step.ours[1]:.2f}" in text
