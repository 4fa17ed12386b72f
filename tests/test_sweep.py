"""Sweeps: the points of a grid, runs in processes of their own that go on where they were, one table."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE
from rich.console import Console

from trtkern import cli
from trtkern.commands import sweep as commands
from trtkern.training import folder, plan, sweep

QUICK = ["--epochs", "1", "--set", "train_images=64", "--threads", "1", "--select", "last"]


def test_a_grid_is_every_value_with_every_other():
    points = sweep.grid(["loss.lam=1e-6, 1e-5", 'model.layers=[16,"pool"],[8]'])
    assert points == [
        ("loss.lam=1e-6", 'model.layers=[16,"pool"]'), ("loss.lam=1e-6", "model.layers=[8]"),
        ("loss.lam=1e-5", 'model.layers=[16,"pool"]'), ("loss.lam=1e-5", "model.layers=[8]"),
    ]  # fmt: skip
    assert sweep.grid([]) == [()]
    made = sweep.runs([("a=x/y",), ("a=x y",)], [0, 1], Path("all"))
    assert len({run.folder for run in made}) == 4 and all(run.folder.parent == Path("all") for run in made)


@pytest.mark.parametrize("text", ["lr", "lr=", "=1", "lr=1,1", "lr=1,,2"])
def test_what_is_no_grid(text):
    with pytest.raises(ValueError, match="--grid: expected a key that is not there yet and different values of it"):
        sweep.grid([text])
    with pytest.raises(ValueError, match="--grid"):
        sweep.grid(["lr=1", "lr=2"])


def written(run: sweep.Run, **accuracies: float) -> sweep.Run:
    """A run at its end."""
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_text(
        json.dumps({n: {"accuracy": a, "loss": 1.0} for n, a in accuracies.items()})
    )
    return run


def test_the_best_point_comes_first_and_a_run_without_a_result_is_left_out(tmp_path):
    low, high, none = (sweep.runs([(name,)], [0, 1], tmp_path) for name in ("lr=1", "lr=2", "lr=3"))
    written(low[0], validation=0.5, test=0.9)
    written(low[1], validation=0.7, test=0.9)
    written(high[0], validation=0.8, test=0.1)
    none[0].folder.mkdir()
    rows, figure = sweep.table([*low, *high, *none])
    assert figure == "accuracy" and [row["point"] for row in rows] == [["lr=2"], ["lr=1"]]
    assert rows[1]["mean"] == {"validation": pytest.approx(0.6), "test": 0.9}
    assert rows[1]["sd"]["validation"] == pytest.approx(0.02**0.5) and rows[0]["sd"]["validation"] is None


def test_points_without_held_out_images_are_compared_by_the_test_images_in_columns_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both, last = (sweep.runs([(name,)], [0], tmp_path)[0] for name in ("select=validation", "select=last"))
    rows, _ = sweep.table([written(both, validation=0.9, test=0.5), written(last, test=0.7)])
    assert [row["point"] for row in rows] == [["select=last"], ["select=validation"]]
    console = Console(width=100, file=io.StringIO())
    console.print(commands._table(rows, "accuracy", "both"))
    lines = console.file.getvalue().splitlines()
    (head,) = (line for line in lines if "validation (%)" in line)
    (mine,) = (line for line in lines if "select=last" in line)
    assert mine.index("70.00") >= head.index("test (%)") - 1


def test_names_of_folders_that_would_be_too_long(tmp_path):
    points = [(f"model.layers={[number] * 60}".replace(" ", ""),) for number in (123, 124)]
    made = sweep.runs(points, [0, 1], tmp_path)
    assert len({run.folder for run in made}) == 4
    for run in made:
        run.folder.mkdir()
        run.log.touch()


def test_a_sweep_is_of_one_process(tmp_path):
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"sweep: expected a sweep that no other process is at, .* in use"):
        sweep.claim(tmp_path, "digits", [])
    os.close(other)
    sweep.claim(tmp_path, "digits", [])


def test_a_recipe_that_has_changed_since_is_not_taken_for_the_one_that_was_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "mine.toml"
    recipe.write_text('data = "digits"\nlr = 1e-3\n[model]\nname = "conv"\nlayers = [8, "pool"]\n')
    run = tmp_path / "runs" / "mine-sweep" / "seed0"
    folder.create(plan.make(recipe="mine.toml", seed=0), str(run))
    assert cli.main(["sweep", "mine.toml", "--slurm"]) == 0
    recipe.write_text(recipe.read_text().replace("1e-3", "2e-3"))
    capsys.readouterr()
    assert cli.main(["sweep", "mine.toml", "--slurm"]) == 2
    assert "mine-sweep/seed0 with lr = 0.002, as the recipe says now, got 0.001" in capsys.readouterr().err


def test_what_a_run_does_not_keep_is_said_again_beside_resume(tmp_path):
    (run,) = sweep.runs([("lr=1",)], [0], tmp_path)
    more = ["--batch-size", "8", "--processes", "2", "--restarts=1", "-T", "4", "--sync-norm", "--device", "cpu"]
    assert run.arguments("digits", more)[-len(more) - 2 : -2] == more
    run.folder.mkdir()
    (run.folder / "plan.json").touch()
    resumed = ["--processes", "2", "--restarts=1", "--device", "cpu"]
    assert run.arguments("digits", more) == ["train", "--resume", str(run.folder), *resumed]


def test_a_folder_has_one_sweep(tmp_path):
    sweep.claim(tmp_path, "digits", ["--epochs", "1"])
    sweep.claim(tmp_path, "digits", ["--epochs", "1"])
    with pytest.raises(
        ValueError, match="a sweep of --recipe digits --epochs 2, got one of --recipe digits --epochs 1"
    ):
        sweep.claim(tmp_path, "digits", ["--epochs", "2"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["digits", "--grid", "lrr=1,2"], "lrr"),
        (["digits", "--seeds", "0,0"], "--seeds: expected different integers"),
        (["digits", "--seed", "3"], "expected options of a run, got --seed, which the sweep gives each"),
        (["digits", "--epoch", "3"], "did you mean '--epochs'"),
        (["digitz"], "did you mean 'digits'"),
        (["digits", "--seeds", "0", "1"], "unexpected extra argument"),
        (["digits", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["digits", "--grid", "lr=1e-3,2e-3", "--lr", "1e-3"], "the same at lr=1e-3 as at lr=2e-3"),
        (["digits", "--grid", "lr=1e-3,0.001"], "expected another training at each point"),
    ],
)
def test_what_is_refused_before_any_run(arguments, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *arguments]) == 2
    assert why in capsys.readouterr().err and not list(tmp_path.rglob("plan.json"))


def test_the_array_begins_each_run_or_goes_on_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "all of 100%"
    line = ["sweep", "digits", "--grid", "loss.lam=1e-6,1e-5", "--jobs", "2", "--run-dir", name, "--processes", "2"]
    assert cli.main([*line, "--slurm"]) == 0
    script = tmp_path / name / "array.slurm"
    assert f"sbatch {shlex.quote(f'{name}/array.slurm')}" in " ".join(capsys.readouterr().out.split())
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=0-1%2" in directives and f'#SBATCH --output="{tmp_path}/all of 100%%/%a.log"' in directives
    (tmp_path / "trtkern").write_text('#!/bin/bash\necho "$@" >> said\n')
    (tmp_path / "trtkern").chmod(0o755)
    told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    run = tmp_path / name / "loss.lam=1e-5,seed0"
    subprocess.run(["bash", script], env=told, check=True, cwd="/")
    run.mkdir()
    (run / "plan.json").touch()
    subprocess.run(["bash", script], env=told, check=True, cwd="/")
    (run / "result.json").touch()
    subprocess.run(["bash", script], env=told, check=True, cwd="/")
    assert (tmp_path / "said").read_text().splitlines() == [
        f"train --recipe digits --set loss.lam=1e-5 --seed 0 --processes 2 --run-dir {run}",
        f"train --resume {run} --processes 2",
    ]


def test_a_sweep_that_is_killed_leaves_nobody_and_goes_on(tmp_path, monkeypatch, capsys):
    """One run of the two is at its end already; the other fails, since its folder holds something else."""
    monkeypatch.chdir(tmp_path)
    line = ["sweep", "digits", "--grid", "lr=1e-3,2e-3", "--jobs", "2", "--run-dir", "all", "--json", "-", *QUICK]
    process = subprocess.Popen([sys.executable, "-m", "trtkern.cli", *line], stdout=subprocess.DEVNULL)
    begun = [tmp_path / "all" / f"lr={lr},seed0" / "plan.json" for lr in ("1e-3", "2e-3")]
    until = time.monotonic() + PATIENCE
    while not all(path.exists() for path in begun) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while working(tmp_path / "all") and time.monotonic() < until:
        time.sleep(0.02)
    assert not working(tmp_path / "all")
    begun[1].rename(begun[1].with_name("other.json"))
    assert cli.main(line) == 1
    said = capsys.readouterr()
    rows = json.loads(said.out)["rows"]
    assert [row["point"] for row in rows] == [["lr=1e-3"]] and rows[0]["mean"]["test"] > 0.05
    assert "1 of 2 runs failed: all/lr=2e-3,seed0 (trtkern: --run-dir: expected an empty or new folder" in said.err


def working(place: Path) -> list[str]:
    """The processes whose command line names a folder there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "all/lr=" in words and os.path.realpath(path.parent / "cwd") == str(place.parent):
            found.append(words)
    return found
