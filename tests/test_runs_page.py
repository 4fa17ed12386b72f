"""The page of one run or of several side by side, and the command that makes it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from html_page import Page
from patience import PATIENCE
from torch import Tensor

from trtkern import cli, names
from trtkern.analysis import Picture, Result, Table
from trtkern.commands import analyze
from trtkern.commands._common import INTERRUPTED, Quit
from trtkern.output.style import SERIES as COLORS
from trtkern.reports import page, pictures, runs
from trtkern.reports.runs import Analyses
from trtkern.training import checkpoint, plan, run
from trtkern.training.folder import PLAN
from trtkern.training.settings import settle

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waves(Result):
    """As the analyses return it: a curve of T steps, and a number a layer."""

    NAME = "waves"
    curve: Tensor
    layers: dict[str, float]
    wide: bool = False

    def table(self):
        head = ["layer", "height", *(["width"] if self.wide else [])]
        return Table(
            head, [[name, f"{value:.2f}", *(["9"] if self.wide else [])] for name, value in self.layers.items()]
        )

    def remarks(self):
        return ["Heights are in metres.", f"The curve has {len(self.curve)} steps."]

    @classmethod
    def pictures(cls, results):
        def draw(axes):
            for (name, result), color in zip(results.items(), COLORS, strict=False):
                axes.plot(range(1, len(result.curve) + 1), result.curve, color=color, label=name or None)
            axes.set(xlabel="timestep", ylabel="height", title="waves")
            axes.text(0.5, 0.5, "black")
            if "" not in results:
                axes.legend()

        return {"The waves.": Picture(draw), "The waves, broad.": Picture(draw, (9.0, 3.0))}


def waves(steps=4, layers=("a", "b"), **changes):
    curve = torch.linspace(0, 1, steps, dtype=torch.float64)
    return Waves(curve=curve, layers=dict.fromkeys(layers, 1.5), about={"weights": WEIGHTS}, **changes)


WEIGHTS = "epoch 2 of 3, step 14"


def averages(accuracy):
    return {"loss": 1.0, "cross_entropy": 0.5, "mse": 0.1, "regularizer": 0.01, "accuracy": accuracy}


def make_run(folder, *, done=True, weights=False, own_page=True, **changes):
    """A run folder as training leaves it, without the training."""
    folder.mkdir(parents=True)
    wanted = plan.make(**{"epochs": 3, "timesteps": 4, "device": "cpu", "threads": 1, **changes})
    (folder / PLAN).write_text(json.dumps(wanted))
    settings = settle(wanted)
    run.write_config(folder, settings, {}, [])
    for epoch in range(1, 4 if done else 2):
        made = {
            "epoch": epoch,
            "step": 7 * epoch,
            "lr": 1e-3,
            "seconds": 1.0,
            "samples_per_s": 9.0,
            "loader_share": 0.1,
        }
        run.append_metrics(folder, {**made, "train": averages(0.3 * epoch), "validation": averages(0.25 * epoch)})
    if done:
        run.write_result(folder, settings, 2, {"test": averages(0.5), "validation": averages(0.5)})
        if own_page:
            (folder / run.REPORT).write_text("<h1>a run</h1>")
    if weights:
        made = {"settings": settings.to_json(), "epoch": 2, "made": 14, "best": None}
        checkpoint.save(folder, checkpoint.Checkpoint({"w": torch.zeros(2)}, made, {}), 14)
    return str(folder)


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")


@pytest.fixture
def made(monkeypatch):
    """The analysis that `trtkern report` knows in these tests; the runs that it was made of."""
    calls: list[str] = []

    def command(run: str, data_dir=None, backend=None, device=None, threads=None) -> int:
        calls.append(run)
        if Path(run).name.startswith("bad"):
            raise Quit("waves: expected water, got none", 2)
        if Path(run).name.startswith("stop"):
            raise Quit("stopped, as asked", INTERRUPTED)
        Path(run, "analysis").mkdir(exist_ok=True)
        waves().save(Path(run, "analysis", "waves.json"))
        return 0

    monkeypatch.setattr(analyze, "reported", lambda: {"waves": command})
    return calls


def written(tmp_path, folders, found):
    page.write(tmp_path / "page.html", runs.read(folders), found, ["trtkern", "report", *folders])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = Page(text)
    shown.stands_alone()
    return text, shown


def test_one_run(tmp_path):
    folder = make_run(tmp_path / "one", weights=True)
    text, shown = written(tmp_path, [folder], [Analyses("waves", {"one": waves()}, [])])
    assert ["one", "50.00%", "60.00%", "+10.00 points", "2 of 3", "digits", "trt", "4", "0"] in shown.rows
    assert ["a", "1.50"] in shown.rows and ["weights", WEIGHTS] in shown.rows
    said = " ".join(shown.text)
    for words in ("digits, trt loss, T=4, seed 0 (one)", "Heights are in metres.", f"trtkern report {folder}"):
        assert words in said
    assert "one/report.html" in shown.links and len(shown.pictures) == 5 and 'class="run"' not in text
    assert {"run", "learning-curves", "waves", "origin"} <= set(shown.ids)


def test_runs_that_differ_in_everything(tmp_path):
    """Data, time steps, layers, heads of the tables, how far they are: side by side all the same."""
    folders = [
        make_run(tmp_path / "a" / "seed0"),
        make_run(tmp_path / "b" / "seed0", timesteps=2, loss="tet", seed=1),
        make_run(tmp_path / "c" / "seed0", data="fashion-mnist", data_dir=str(tmp_path), done=False),
    ]
    results = {"a/seed0": waves(), "b/seed0": waves(2, ("b", "c")), "c/seed0": waves(9, ("d",))}
    text, shown = written(tmp_path, folders, [Analyses("waves", results, ["c/seed0: of other weights."])])
    said = " ".join(shown.text)
    for words in (
        "trained on different data sets", "different numbers of time steps", "c/seed0: The run is not finished",
        "it has 1 of 3 epochs", "of other weights", "The curve has 2 steps.", "The curve has 9 steps.",
    ):  # fmt: skip
        assert words in said, words
    assert said.count("Heights are in metres.") == 1, "what all say is said once"
    assert ["c/seed0", "", "", "", "1 of 3 so far", "fashion-mnist", "trt", "4", "0"] in shown.rows
    assert ["timesteps", "4", "2", "4"] in shown.rows and ["loss", "trt", "tet", "trt"] in shown.rows
    assert ["b", "1.50", "1.50", "-"] in shown.rows and ["d", "-", "-", "1.50"] in shown.rows
    assert all(color in text for color in COLORS[:3]) and COLORS[3] not in text
    # Heads that are not the same, and too many columns: a table a run.
    results["b/seed0"] = waves(2, ("b", "c"), wide=True)
    _, shown = written(tmp_path, folders, [Analyses("waves", results, [])])
    assert ["c", "1.50", "9"] in shown.rows and ["d", "1.50"] in shown.rows


def test_a_run_has_its_colour_also_where_another_is_missing(tmp_path):
    folders = [make_run(tmp_path / name) for name in "abc"]
    text, _ = written(tmp_path, folders, [Analyses("waves", {"b": waves(), "c": waves()}, ["a: not made."])])
    picture = re.search(r'aria-label="The waves\.".*?</svg>', text, flags=re.DOTALL)[0]
    assert COLORS[1] in picture and COLORS[2] in picture and COLORS[0] not in picture
    assert re.search(rf'--of:{COLORS[2]}">c</span>', text)


def test_names_of_runs(tmp_path):
    long = "x" * 60
    places = [tmp_path / "a" / long, tmp_path / "b" / long, tmp_path / "b" / "c" / long]
    found = runs.labels(places)
    assert len(set(found)) == 3 and all(len(name) <= runs.LENGTH for name in found)
    assert runs.labels([Path("/r/l2/seed0"), Path("/r/trt/seed0")]) == ["l2/seed0", "trt/seed0"]
    assert runs.labels([tmp_path / "a"]) == ["a"]
    evil = [make_run(tmp_path / name) for name in ("<script>$x_{$", "[/x] \u732b", os.fsdecode(b"r\xff"))]
    text, shown = written(
        tmp_path, evil, [Analyses("waves", dict.fromkeys(runs.labels([*map(Path, evil)]), waves()), [])]
    )
    assert "<script>$x_{$" in " ".join(shown.text) and "%FF" in text and "\u732b" in text
    assert pictures.label("a$b$") == r"a\$b\$"


def test_the_command_makes_what_is_missing_once(tmp_path, made, capsys):
    folder = make_run(tmp_path / "one", weights=True)
    assert cli.main(["report", "one"]) == 0
    assert made == ["one"] and "waves of one" in capsys.readouterr().out
    text = Path(folder, "analysis.html").read_text()
    Page(text).stands_alone()
    assert "Heights are in metres." in text
    for _ in range(2):
        assert cli.main(["report", "one"]) == 0
    assert made == ["one"]
    assert Path(folder, run.REPORT).read_text().count('href="analysis.html"') == 1
    file = Path(folder, "analysis", "waves.json")
    file.write_text(file.read_text().replace("step 14", "step 7"))  # of other weights
    assert cli.main(["report", "one", "--no-compute"]) == 0
    assert "Of other weights (epoch 2 of 3, step 7)" in " ".join(Page(Path(folder, "analysis.html").read_text()).text)
    assert made == ["one"]
    assert cli.main(["report", "one"]) == 0
    assert made == ["one", "one"] and "step 7" not in Path(folder, "analysis.html").read_text()
    file.write_text("{")
    capsys.readouterr()
    assert cli.main(["report", "one", "--no-compute"]) == 2
    error = capsys.readouterr().err
    assert (
        f"got {Path('one', 'analysis', 'waves.json')}" in error and "--skip waves" in error and error.count("\n") == 1
    )
    assert cli.main(["report", "one", "--no-compute", "--skip", "waves"]) == 0
    assert "Heights" not in Path(folder, "analysis.html").read_text()
    assert cli.main(["report", "one", "--only", "waves"]) == 0
    assert len(made) == 3 and "waves.json" in capsys.readouterr().out, "made anew, and said why"


def test_several_runs_one_of_which_fails(tmp_path, made, capsys):
    for name in ("good", "bad", "begun"):
        make_run(tmp_path / name, weights=name != "begun", done=name != "begun")
    assert cli.main(["report", "good", "bad", "begun"]) == 1
    error = capsys.readouterr().err
    assert "waves of bad could not be made (waves: expected water, got none)" in error and error.count("\n") == 1
    shown = " ".join(Page(Path("report-good-bad-begun.html").read_text()).text)
    assert (
        "bad: could not be made: waves: expected water" in shown and "begun: not made: the run has no weights" in shown
    )
    assert made == ["good", "bad"]
    assert "analysis.html" not in Path("good", run.REPORT).read_text(), "that is not the page of this run alone"
    make_run(tmp_path / "stop", weights=True)
    assert cli.main(["report", "stop"]) == INTERRUPTED
    assert not Path("stop", "analysis.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "report: expected a run folder of `trtkern train`, got gone (nothing there)"),
        (["file"], "got file (a file)"),
        (["empty"], "got empty, which holds no run"),
        (["one", "./one"], "report: expected different runs, got one twice"),
        (["one"] * 9, f"report: expected at most {len(COLORS)} runs"),
        (["one", "--only", "wavs"], "got 'wavs'; did you mean 'waves'?"),
        (["one", "--skip", "x"], "--skip: expected one of waves, got 'x'"),
        (["one", "--out", "gone/x.html"], "--out: expected a file in a folder that exists, got gone/x.html"),
        (["broken"], "report: expected the config.json of a run"),
        ([], "Missing argument"),
    ],
)
def test_what_is_refused(tmp_path, made, capsys, arguments, message):
    make_run(tmp_path / "one")
    make_run(tmp_path / "broken")
    Path("broken", "config.json").write_text("{")
    Path("file").write_text("")
    Path("empty").mkdir()
    assert cli.main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_every_analysis_of_a_report_is_a_command():
    commands = [each.callback.__name__ for each in analyze.app.registered_commands]
    assert set(commands) <= {*analyze._REPORTED.values()}, "a new analysis goes into the report too"
    assert list(analyze.reported()) == [name for name, command in analyze._REPORTED.items() if command in commands]
    assert set(analyze._REPORTED) == set(page.HEADINGS)
    assert cli.EXTRAS["report"] == "train" and names.SPLITS


FRAMES = """<!doctype html><html><body><script>
for (const width of [1280, 390]) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 800; frame.style.border = 0; frame.src = "page.html";
  frame.onload = () => {
    const root = frame.contentDocument.documentElement;
    const pictures = [...frame.contentDocument.querySelectorAll("svg")];
    const broken = pictures.filter(each => !each.getBoundingClientRect().height);
    const over = root.scrollWidth - root.clientWidth;
    document.body.append(`[${frame.clientWidth}: ${pictures.length} pictures, ${broken.length} empty, ${over} over]`);
  };
  document.body.append(frame);
}
console.log("heard");
</script></body></html>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_opens_the_page_without_a_word(tmp_path):
    """At 1280 and at 390 pixels: nothing on the console, and nothing wider than the window."""
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / ("long" * 20), timesteps=2)]
    labels = runs.labels([*map(Path, folders)])
    written(tmp_path, folders, [Analyses("waves", {labels[0]: waves(), labels[1]: waves(9, ("b", "c" * 60))}, [])])
    (tmp_path / "frames.html").write_text(FRAMES)
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--virtual-time-budget=9000",
        "--dump-dom", (tmp_path / "frames.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1 and "heard" in console[0], console
    for width in (1280, 390):
        assert f"[{width}: 5 pictures, 0 empty, 0 over]" in done.stdout, done.stdout
