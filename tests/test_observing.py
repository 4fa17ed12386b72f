"""``trtkern train --observe``: what is looked at has no say in the training, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

from trtkern import cli, data
from trtkern.backends import named
from trtkern.commands import _observing
from trtkern.commands._observing import FisherObserver
from trtkern.data import Split
from trtkern.training import checkpoint, run, settings
from trtkern.training.loop import Trainer
from trtkern.training.observer import Observer, Observers

BACKEND = "cpu" if named("cpu").missing() is None else "reference"
CHANGES = ["model.layers=[4]", "warmup=0.3", "augment=[{name='flip'}, {name='crop', padding=1}]"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few():
    digits = data.load("digits")
    splits = {name: Split(*(t[:n] for t in getattr(digits, name))) for name, n in (("train", 72), ("test", 30))}
    return dataclasses.replace(digits, **splits)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(_observing, "SAMPLES", 24)
    monkeypatch.setattr(_observing, "BATCH", 16)


def trainer(few, neuron="LIF"):
    options = {
        "backend": BACKEND,
        "threads": 1,
        "device": "cpu",
        "epochs": 3,
        "batch_size": 32,
        "timesteps": 3,
        "select": "last",
    }
    return Trainer.of(settings.resolve(changes=[*CHANGES, f"model.neuron={neuron}"], **options), few)


class Impatient(Observer):
    interval = 0.0

    def step(self, epoch, step, averages):
        if (epoch, step) == (3, 1):
            raise KeyboardInterrupt


TIMES = ("seconds", "samples_per_s", "loader_share")


def plain(rows):
    """Without times and without what was observed."""
    return [{name: value for name, value in row.items() if name not in (*TIMES, "fisher")} for row in rows]


def observed(rows):
    return [{name: v for name, v in row["fisher"].items() if name != "seconds"} for row in rows if "fisher" in row]


def same(a, b):
    """Two checkpoints: weights, optimiser, generators."""
    for one, two in ((a.model, b.model), (a.state, b.state)):
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(one[name], two[name]), name
    assert a.metadata["loop"] == b.metadata["loop"]


@pytest.mark.parametrize("neuron", ["LIF", "PLIF"])
def test_the_training_is_the_same(few, tmp_path, neuron):
    """By hooks and by the loop (the decay of PLIF), with random changes of the images; and where it is resumed."""
    for name in ("with", "parts"):
        (tmp_path / name).mkdir()
    without = trainer(few, neuron).run(tmp_path).rows
    rows = trainer(few, neuron).run(tmp_path / "with", FisherObserver()).rows
    assert plain(rows) == plain(without)
    same(checkpoint.load(tmp_path / "with"), checkpoint.load(tmp_path))
    found = observed(rows)
    assert [len(row["information"]) for row in found] == [3, 3, 3] and found[0] != found[1] != found[2]
    assert all(row["samples"] == 24 and row["batch_size"] == 16 and 1 <= row["centroid"] <= 3 for row in found)
    with pytest.raises(KeyboardInterrupt):
        trainer(few, neuron).run(tmp_path / "parts", Observers([Impatient(), FisherObserver()]))
    again = trainer(few, neuron)
    again.resume(checkpoint.load(tmp_path / "parts"), tmp_path / "parts")
    rows = again.run(tmp_path / "parts", FisherObserver()).rows
    assert observed(rows) == found == observed(run.read_metrics(tmp_path / "parts"))
    same(checkpoint.load(tmp_path / "parts"), checkpoint.load(tmp_path))


def test_now_and_then(few, tmp_path):
    """Every second epoch, and the last one."""
    rows = trainer(few).run(tmp_path, FisherObserver(2)).rows
    assert ["fisher" in row for row in rows] == [False, True, True]


def test_the_command(tmp_path):
    """As the command trains, with memory pages that are kept."""
    options = ["--epochs", "2", "-T", "2", "--batch-size", "256", "--device", "cpu", "--backend", BACKEND]
    options += ["--threads", "1", "--set", "model.layers=[4]"]
    code = (
        "from trtkern import cli\n"
        "from trtkern.commands import _runs\n"
        "_runs.session.report.write = _runs.session.figures.learning_curves = lambda *_, **__: None\n"
        f"for name, more in (('with', ['--observe', 'fisher', '--observe-every', '2']), ('without', [])):\n"
        f"    assert cli.main(['train', '--run-dir', {str(tmp_path)!r} + '/' + name, *{options!r}, *more]) == 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("information centroid") == 1 and " of 2 steps (256 images, " in done.stdout
    same(*(checkpoint.load(tmp_path / name) for name in ("with", "without")))
    rows = [run.read_metrics(tmp_path / name) for name in ("with", "without")]
    assert plain(rows[0]) == plain(rows[1]) and ["fisher" in row for row in rows[0]] == [False, True]
    assert all(json.loads((tmp_path / "with" / "config.json").read_text())["settings"][key] == value
               for key, value in (("observe", "fisher"), ("observe_every", 2)))  # fmt: skip


def test_what_cannot_be_observed():
    with pytest.raises(ValueError, match="--observe: expected one of fisher, got 'fish'; did you mean 'fisher'"):
        settings.resolve(observe="fish")
    with pytest.raises(ValueError, match="--observe-every: expected --observe beside it, got 2 without"):
        settings.resolve(observe_every=2)
    with pytest.raises(ValueError, match="--observe-every: expected an integer of at least 1, got 0"):
        settings.resolve(observe="fisher", observe_every=0)
