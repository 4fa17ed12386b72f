"""A user's whole file: killed at random moments it ends as if nothing had happened, and is reported and analysed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from own_parts import BACKEND
from patience import PATIENCE

from trtkern import analysis, cli
from trtkern.train import Trainer
from trtkern.training import checkpoint, run

pytestmark = pytest.mark.usefixtures("one_thread")
FILE = f"""import sys
import torch
from torch import nn
from trtkern import nn as snn
from trtkern.train import Trainer

class Network(nn.Sequential):
    def forward(self, images):
        return super().forward(images.flatten(1).expand(2, -1, -1))

def network(hidden=16):
    neurons = snn.LIF(decay=0.5, backend="{BACKEND}")
    return Network(nn.Linear(64, hidden), neurons, nn.Dropout(0.1), nn.Linear(hidden, 2))

class Stripes(torch.utils.data.Dataset):
    def __len__(self):
        return 160

    def __getitem__(self, index):
        image = torch.rand(1, 8, 8)
        image[0, torch.randint(8, ())] += 1
        return (image.mT if index % 2 else image), index % 2

def flipped(images, generator):
    return images.flip(-1) if torch.rand((), generator=generator) < 0.5 else images

def falling(step, steps):
    return 1 - step / steps

def trainer():
    options = dict(lr=1e-2, epochs=20, batch_size=16, threads=1, device="cpu")
    return Trainer(network, Stripes, augment=flipped, schedule=falling, **options)
"""
PROGRAM = """
if __name__ == "__main__":
    trainer().fit(sys.argv[1] if len(sys.argv) == 2 else "killed", show=False)
"""
COMMAND = [
    "--model", "stripes_of_a_test:network", "--data", "stripes_of_a_test:Stripes", "--lr", "1e-2", "--epochs", "20",
    "--batch-size", "16", "--threads", "1", "--device", "cpu", "--set", "schedule.name=stripes_of_a_test:falling",
    "--set", "augment=[{name='stripes_of_a_test:flipped'}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with the file, and runs of it that were killed ten times each: of the program, and of the command."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "stripes_of_a_test.py").write_text(FILE + PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    script = Path(__file__).with_name("killed.py")
    both = ["killed", "10", "1", "--", "stripes_of_a_test.py", "++", "typed", "10", "2", "--", *COMMAND]
    command = [sys.executable, str(script), *both]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, cwd=folder)
    assert [line for line in done.stdout.splitlines() if "killed, status" in line] == 2 * ["10 killed, status 0"], done
    return folder


@pytest.fixture
def here(killed, monkeypatch):
    monkeypatch.chdir(killed)
    monkeypatch.syspath_prepend(killed)
    monkeypatch.setattr("trtkern.commands._runs.keep_pages", lambda: False)
    yield
    sys.modules.pop("stripes_of_a_test", None)


def same_run(one, two):
    a, b = checkpoint.load(Path(one)), checkpoint.load(Path(two))
    assert a.model.keys() == b.model.keys() and a.state.keys() == b.state.keys()
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
    rows = [run.read_metrics(Path(place)) for place in (one, two)]
    assert len(rows[0]) == 20
    assert [(row["train"], row["validation"]) for row in rows[0]] == [(r["train"], r["validation"]) for r in rows[1]]


def test_a_program_that_was_killed_ten_times(here, no_pictures):
    made = import_module("stripes_of_a_test").trainer()
    made.fit("whole", show=False)
    same_run("killed", "whole")
    settings = run.settings_of(Path("killed"))
    assert settings.model == {"name": "stripes_of_a_test:network"} and settings.data == "stripes_of_a_test:Stripes"
    again = import_module("stripes_of_a_test").trainer()
    result = again.fit("killed", show=False)
    found = analysis.fisher(again.model, again.samples("test"))
    assert len(found.information) == 2 and result.final.splits["test"]["accuracy"] > 0.5
    assert isinstance(again, Trainer) and Path("killed/report.html").exists()


def test_a_command_that_was_killed_ten_times(here, no_pictures, capsys):
    assert cli.main(["train", "--run-dir", "once", *COMMAND]) == 0
    same_run("typed", "once")
    assert cli.main(["evaluate", "typed"]) == 0
    assert cli.main(["report", "typed", "--only", "fisher"]) == 0
    assert Path("typed/analysis/fisher.json").exists() and "Learning curves" in Path("typed/report.html").read_text()
