"""The report is one HTML file that says what the rows say; TensorBoard gets each epoch once."""

import math
import os
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from html_page import Page

from trtkern.output import page, pictures, style
from trtkern.output.text import printable
from trtkern.profiling.firing.activity import LayerActivity
from trtkern.training import checkpoint, figures, folder, plan, report, run
from trtkern.training.tensorboard import TensorBoard, scalars


def averages(loss, accuracy):
    return {"loss": loss, "cross_entropy": loss * 0.9, "mse": 0.1, "regularizer": 0.01, "accuracy": accuracy}


def make_rows(count, split="test"):
    return [
        {
            "epoch": epoch, "step": 10 * epoch, "lr": 1e-3 / epoch, "train": averages(2 / epoch, 1 - 0.5 / epoch),
            split: averages(3 / epoch, 1 - 0.6 / epoch), "seconds": 2.0, "samples_per_s": 1000.0 * epoch,
        }
        for epoch in range(1, count + 1)
    ]  # fmt: skip


def make_activity(layers, steps):
    rate = torch.linspace(0.1, 0.3, steps, dtype=torch.float64)
    return {f"layers.{i}.norm": LayerActivity("BatchNormLIF", rate, 0.25, 0.0, 64, 9) for i in range(layers)}


def written(path, **changes):
    rows = changes.pop("rows", make_rows(2))
    final = {"train": averages(1.0, 0.75), "test": averages(1.5, 0.7)} if rows else {}
    given = {"title": "digits", "settings": {"lr": 1e-3}, "rows": rows, "final": final, "versions": {"torch": "2.13"}}
    report.write(path, **{**given, **changes})
    return path.read_text(encoding="utf-8")


def test_the_page_says_what_the_run_did(tmp_path):
    counts = torch.tensor([[8, 2, 0], [1, 5, 4], [0, 0, 0]])
    text = written(
        tmp_path / "report.html",
        settings={"lr": 0.001, "model": {"name": "conv", "layers": [8, "pool"]}, "data_dir": None},
        confusion=counts, classes=["cat", "dog", "owl"], activity=make_activity(2, 3), memory="3.1 MiB a step",
        command=["trtkern", "train", "--set", "a b"],
    )  # fmt: skip
    page = Page(text)
    for row in (
        ["test", "1.5", "1.35", "0.1", "0.01", "70.00%"],
        ["dog", "owl", "4", "40.0%"],
        ["cat", "dog", "2", "20.0%"],
        ["dog", "10", "50.0%", "71.4%"],
        ["owl", "0", "-", "0.0%"],
        ["layers.1.norm", "BatchNormLIF", "64", "20.0%", "25.0%", "0.0%", "0.100", "0.200", "0.300"],
        ["model.layers", '[8, "pool"]'],
        ["model.name", "conv"],
        ["data_dir", "null"],
        ["torch", "2.13"],
    ):
        assert row in page.rows, row
    shown = " ".join(page.text)
    for words in ("3.1 MiB a step", "trtkern train --set 'a b'", "of 7 errors in 20", "2 epochs in 4.0 s"):
        assert words in shown
    assert "Accuracy: 70.00 % (test) after epoch 2" in shown, "the text of a picture is text"
    # Nothing from outside, and nothing to run.
    assert not page.tags & {"script", "link", "img", "iframe", "object"} and text.count("<svg") == 5
    assert not re.search(r'(?:src|href)="(?!#|data:)', text) and "url(http" not in text and "@import" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"], "no temporary file stays"


def test_the_same_input_gives_the_same_bytes_and_names_of_its_own(tmp_path):
    again = [pictures.svg(lambda axes: figures.accuracy(axes, make_rows(2)), (3, 2), salt) for salt in "aab"]
    assert again[0] == again[1]
    names = [set(re.findall(r' id="([^"]+)"', picture)) for picture in again]
    assert names[0] and not names[0] & names[2]


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('\"&')</script>$x_{"
    layer = make_activity(1, 2)["layers.0.norm"]._replace(kind=evil, silent=1.0, rate=torch.zeros(2).double())
    text = written(
        tmp_path / "r.html", title=evil + "\x00", settings={evil: evil}, confusion=torch.ones(2, 2, dtype=torch.int64),
        classes=[evil, "\x07猫\ud800"], activity={evil: layer}, versions={evil: evil}, memory=evil, command=[evil],
    )  # fmt: skip
    page = Page(text)
    assert "script" not in page.tags and "\x00" not in text and "猫" in text
    assert sum("alert" in cell for row in page.rows for cell in row) >= 6
    assert "never fires" in text


@pytest.mark.parametrize("name", [b"r\xff\xfe", b"[/x] [bold]", "<b>&\u732b".encode(), b"$x_{"])
def test_a_folder_of_any_name(tmp_path, name):
    """Names that are no UTF-8, markup, and what matplotlib takes for formulas: everything that a run writes."""
    text = os.fsdecode(name)
    place = tmp_path / text
    wanted = plan.make(data_dir=str(place), data="cifar10")
    folder.create(wanted, str(place))
    assert folder.read_plan(place) == wanted
    checkpoint.save(place, checkpoint.Checkpoint({"w": torch.zeros(2)}, {"settings": {"data_dir": text}}, {}), 1)
    assert checkpoint.load(place).metadata["settings"]["data_dir"] == text
    for row in make_rows(2):
        run.append_metrics(place, {**row, "loader_share": 0.5})
    assert len(run.read_metrics(place)) == 2
    figures.learning_curves(make_rows(2), text, place / run.CURVES)
    assert (place / run.CURVES).read_bytes().startswith(b"\x89PNG")
    shown = written(place / run.REPORT, title=text, settings={"data_dir": str(place)}, command=["train", str(place)])
    assert printable(str(place)) in " ".join(Page(shown).text) and "b" not in Page(shown).tags
    folder.discard(place)


def test_tensorboard_in_a_folder_of_any_name(tmp_path):
    pytest.importorskip("tensorboard")
    place = tmp_path / "[/x] \u732b"
    place.mkdir(parents=True)
    board = TensorBoard(place)
    board.epoch(make_rows(1)[0])
    board.close()
    (file,) = (place / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()
    with pytest.raises(ValueError, match=r"expected a run folder with a name in UTF-8, got '.*r\\udcff'; name another"):
        TensorBoard(tmp_path / os.fsdecode(b"r\xff"))


def test_a_picture_reads_on_a_light_and_on_a_dark_page():
    """Black and white are the page's ink and paper, but for words and cells that have them as their own colours; lines
    that are lost on one of the two pages are mixed there."""

    def draw(axes):
        axes.plot([0, 1], [0, 1], color="#222222", label="dark")
        axes.scatter([0.5], [0.5], facecolors="white", edgecolors="#3b6ea8")
        axes.scatter([0.2], [0.5], color="black")
        axes.plot([0, 1], [1, 1], color="#440154")
        axes.plot([0, 1], [2, 2], color="#fde725")
        axes.pcolormesh([0, 1, 2], [0, 1], [[0.0, 1.0]], cmap="gray")
        axes.text(0, 0, "on a cell", color="black")
        axes.text(0, 1, "aside", color="#444444")
        axes.text(0, 2, "dark", color="#440154")
        axes.text(0, 3, "light", color="#fde725")
        axes.set(title="title", xlabel="x")
        axes.legend()

    text = pictures.svg(draw, (4, 3), "theme")
    styles = dict.fromkeys(re.findall(r'style="([^"]*)"', text))
    assert style.INK not in text and "#222222" not in text and "#444444" not in text
    strokes = " ".join(each for each in styles if "stroke: " in each)
    assert "#000000" not in strokes and "#ffffff" not in strokes and "stroke: #3b6ea8" in strokes
    assert "fill: var(--page, #fff); stroke: #3b6ea8" in strokes
    assert "fill: #ffffff" in styles, "a white cell"
    for name, other in (("#440154", "white var(--lift, 0%)"), ("#fde725", "black var(--sink, 0%)")):
        assert f"stroke: {name}; stroke: color-mix(in srgb, {other}, {name})" in strokes
        assert f"fill: {name}; fill: color-mix(in srgb, {other}, {name})" in text, "words of that colour too"
    assert "fill: currentColor; stroke: currentColor" in styles, "a black mark"
    words = {word: look for look, word in re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)', text)}
    assert "fill" not in words["on a cell"] or "#000000" in words["on a cell"]
    assert all("fill: currentColor" in words[word] for word in ("aside", "title", "x", "0.0"))


def test_the_page_has_contents_anchors_and_a_choice_of_colours(tmp_path):
    text = written(tmp_path / "r.html", activity=make_activity(1, 2))
    found = Page(text)
    found.stands_alone()
    assert {"result", "learning-curves", "firing-rates", "origin", "auto", "dark"} <= set(found.ids)
    names = set(re.findall(r"(--[a-z]+):", page.STYLE))
    assert names == {"--page", "--ink", "--soft", "--line", "--band", "--link", "--alarm", "--lift", "--sink"}
    assert set(re.findall(r"var\((--[a-z]+)", page.STYLE)) - {"--of"} == names - {"--lift", "--sink"}


def test_a_run_leads_to_its_analyses_once(tmp_path):
    path = tmp_path / "a b" / "report.html"
    path.parent.mkdir()
    before = written(path)
    assert f"trtkern report &#x27;{path.parent}&#x27;" in before
    for _ in range(2):
        report.link(path, "ana lysis.html")
        after = path.read_text()
        assert after.count('<a href="ana%20lysis.html">') == 1 and "trtkern report" not in after
    assert len(Page(after).rows) == len(Page(before).rows)
    path.write_text("<h1>of an older version</h1>")
    report.link(path, "x.html")
    assert '</h1><p id="analyses">' in path.read_text()
    report.link(tmp_path / "report.html", "x.html")
    assert not (tmp_path / "report.html").exists()


def test_one_epoch_and_a_validation_split():
    rows = make_rows(1, "validation")
    text = "".join(pictures.svg(lambda axes, d=d: d(axes, rows), (4, 3), "x") for d in (figures.loss, figures.accuracy))
    assert "Accuracy: 40.00 % (validation) after epoch 1" in text and "validation, loss" in text
    assert "1.0" not in "".join(re.findall(r"<text.*?</text>", text)).replace("10.0", ""), "an epoch is a whole number"


def test_no_epoch_at_all(tmp_path):
    text = written(tmp_path / "r.html", rows=[])
    assert "No epoch was finished" in text and "<svg" not in text


def test_many_classes_layers_and_epochs_stay_small(tmp_path):
    counts = torch.randint(0, 9, (101, 101))
    path = tmp_path / "r.html"
    text = written(
        path, rows=make_rows(300), confusion=counts, classes=[f"class {i}" for i in range(101)],
        activity=make_activity(36, 100),
    )  # fmt: skip
    assert path.stat().st_size < 1_000_000 and "class 100" in text
    (head,) = (row for row in Page(text).rows if row[0] == "layer")
    assert head[6:] == ["t=1", "t=2", "t=3", "t=4", "t=97", "t=98", "t=99", "t=100"]


def test_losses_that_no_logarithm_takes():
    rows = make_rows(2)
    rows[1]["train"] = averages(0.0, 1.0)
    assert "<svg" in pictures.svg(lambda axes: figures.loss(axes, rows), (4, 3), "x")
    rows[1]["train"] = averages(math.nan, 1.0)
    assert "<svg" in pictures.svg(lambda axes: figures.loss(axes, rows), (4, 3), "x")


def test_what_is_refused(tmp_path):
    for wrong in (torch.zeros(2, 3).long(), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"report: expected a confusion matrix of counts \[2, 2\]"):
            written(tmp_path / "r.html", confusion=wrong, classes=["a", "b"])
    with pytest.raises(ValueError, match="counts of at least 0"):
        written(tmp_path / "r.html", confusion=-torch.eye(2).long(), classes=["a", "b"])
    with pytest.raises(FileNotFoundError, match="report: expected a file in a folder that is there"):
        written(tmp_path / "none" / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_scalars_of_a_row():
    (row,) = make_rows(1)
    row |= {"firing": {"layers.0.norm": 0.25}, "note": "x", "done": True}
    found = dict(scalars(row))
    assert found["train/loss"] == 2.0 and found["lr"] == 1e-3 and found["samples_per_s"] == 1000.0
    assert found["firing/layers.0.norm"] == 0.25 and len(found) == 5 + 5 + 3 + 1
    assert not {"epoch", "step", "note", "done"} & set(found)


def test_tensorboard_has_each_epoch_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = make_rows(4)
    for part in (rows[:3], [{**rows[1], "lr": 0.5}, *rows[2:]]):  # the second begins again at epoch 2
        board = TensorBoard(tmp_path)
        for row in part:
            board.epoch(row)
        board.close()
        board.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {tag for tag, _ in scalars(rows[0])}
    assert [event.value for event in read.Scalars("lr")] == pytest.approx([1e-3, 0.5, 1e-3 / 3, 1e-3 / 4], rel=1e-6)
    assert [event.step for event in read.Scalars("test/accuracy")] == [1, 2, 3, 4]


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"expected the package tensorboard.*pip install 'trtkern\[tensorboard\]'"):
        TensorBoard(tmp_path)
