"""Several processes that train together: the numbers of one that trains alone, and one voice.

``job_checks.py`` has the checks, and says in their docstrings what they are about. All of them run in one start of two
processes and one of four; a test says how one of them went.
"""

import json
import random
import sys
from pathlib import Path

import processes
import pytest
from patience import PATIENCE

from trtkern import cli
from trtkern.parallel import launch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import job_kills

FILE = Path(__file__).with_name("job_checks.py")
CHECKS = {
    2: (
        *("losses", "accumulated", "in_parts", "odd_weights", "one_by_one", "shared_statistics", "own_statistics"),
        *("resumed", "ended", "refused", "digits", "meeting", "spoken", "silent"),
    ),
    4: ("meeting", "begun", "losses", "in_parts", "shared_statistics", "refused"),
}
"""By the number of processes."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def said(place):
    return processes.said(FILE, place, CHECKS)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in CHECKS.items() for name in names])
def test_processes_are_as_one(said, world, name):
    processes.went_right(said, world, name)


def test_a_job_whose_processes_are_killed_ends_as_if_nobody_had(said, place, tmp_path):
    """torchrun starts them anew, and they go on; ``bench/job_kills.py`` does it 20 times."""
    processes.went_right(said, 2, "digits")
    job = job_kills.started(tmp_path / "run", 2, 2)
    killed = job_kills.kill_one(job, tmp_path / "run", 2, random.Random(2))
    text, status = job.communicate(timeout=PATIENCE)[0], job.wait()
    assert status == 0 and killed, text
    assert job_kills.difference(place / "2" / "digits", tmp_path / "run") == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.suffix != ".safetensors") == [
        "config.json", "curves.png", "metrics.jsonl", "plan.json", "report.html", "result.json",
    ]  # fmt: skip
    assert [json.loads(line)["epoch"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_what_the_command_line_shows_is_said_before_there_are_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "launch", lambda *told: pytest.fail(f"launched {told}"))
    place = str(tmp_path / "run")
    assert cli.main(["train", "--processes", "2", "--batch-size", "63", "--run-dir", place]) == 2
    expected = "expected a multiple of 2, the processes that share a batch, got 63; take 62"
    assert capsys.readouterr().err == f"trtkern: --batch-size: {expected}\n"
    assert not (tmp_path / "run").exists()


def test_the_command_that_each_process_gets(tmp_path, monkeypatch):
    """It is the one that was typed, in the folder that was made."""
    told = []
    monkeypatch.setattr(launch, "launch", lambda *asked: told.append(asked) or 0)
    place = str(tmp_path / "run")
    assert cli.main(["train", "--processes=2", "--lr", "0.1", "--restarts", "5", "--run-dir", place]) == 0
    assert cli.main(["train", "--seeds", "0,1", "--processes", "2"]) == 0
    assert cli.main(["train", "--resume", place, "--processes", "4", "--parallel", "fsdp"]) == 0
    assert told == [
        (2, 5, ["train", "--lr", "0.1", "--run-dir", place]),
        (2, 3, ["train", "--seeds", "0,1"]),
        (4, 3, ["train", "--resume", place, "--parallel", "fsdp"]),
    ]
    assert (tmp_path / "run" / "plan.json").exists()


def test_what_cannot_be_mended_by_starting_anew_ends_the_job(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(launch.OUTCOME, str(tmp_path / "outcome.json"))
    assert launch.ended() is None
    launch.end(2)
    assert cli.main(["train"]) == 2 and capsys.readouterr().err == ""
