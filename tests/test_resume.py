"""Runs that survive: what is resumed ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

from trtkern import cli, data
from trtkern.backends import _spike_kernels, named
from trtkern.data import Split
from trtkern.nn import SpikeConv2d, SpikeLinear
from trtkern.training import checkpoint, epochs, folder, resuming, run, selection, settings
from trtkern.training.loop import Trainer
from trtkern.training.observer import Observer

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few():
    digits = data.load("digits")
    splits = {name: Split(*(t[:n] for t in getattr(digits, name))) for name, n in (("train", 144), ("test", 60))}
    return dataclasses.replace(digits, **splits)


def plan(**options):
    options = {"backend": BACKEND, "threads": 1, "device": "cpu", "epochs": 4, "batch_size": 32, **options}
    return settings.resolve(changes=["warmup=0.3", "augment=[{name='flip'}, {name='crop', padding=1}]"], **options)


class Impatient(Observer):
    """Ends the run after a step, as Ctrl-C does; 0 is after the epoch."""

    interval = 0.0

    def __init__(self, epoch, step):
        self.at = epoch, step

    def step(self, epoch, step, averages):
        if (epoch, step) == self.at:
            raise KeyboardInterrupt

    def epoch(self, row):
        if (row["epoch"], 0) == self.at:
            raise KeyboardInterrupt


def timeless(rows):
    return [
        {name: v for name, v in row.items() if name not in ("seconds", "samples_per_s", "loader_share")} for row in rows
    ]


def exact_layers(model):
    """Whether torch's own kernels compute each layer for packed spikes."""
    return [layer.exact for layer in model.modules() if isinstance(layer, (SpikeConv2d, SpikeLinear))]


def newest(folder):
    return checkpoint.load(folder)


def same(a, b):
    """Two checkpoints: weights, optimiser, generators, all but times."""
    for one, two in ((a.model, b.model), (a.state, b.state)):
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(one[name], two[name]), name
    assert a.metadata["loop"] == b.metadata["loop"] and timeless([a.metadata["row"]]) == timeless([b.metadata["row"]])


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("undisturbed")
    return Trainer.of(plan(), few).run(place).rows, newest(place)


@pytest.mark.parametrize(
    ("at", "every"), [((1, 1), 600.0), ((1, 1), 0.0), ((1, 0), 600.0), ((2, 3), 0.0), ((3, 0), 0.0), ((4, 2), 600.0)]
)
def test_parts_of_a_run_are_the_run(few, tmp_path, undisturbed, monkeypatch, at, every):
    """Crashed after some step or epoch; with a checkpoint of every step, or of epochs alone."""
    monkeypatch.setattr(epochs, "SAVE_EVERY", every)
    with pytest.raises(KeyboardInterrupt):
        Trainer.of(plan(), few).run(tmp_path, Impatient(*at))
    torch.manual_seed(99)
    again = Trainer.of(run.settings_of(tmp_path), few)
    if checkpoint.found(tmp_path):
        saved = newest(tmp_path)
        again.resume(saved, tmp_path)
    rows = again.run(tmp_path).rows
    assert timeless(rows) == timeless(undisturbed[0]) == timeless(run.read_metrics(tmp_path))
    same(newest(tmp_path), undisturbed[1])


def test_kernels_for_packed_spikes_run_in_these_runs(few):
    """The network, and those that are killed below, are large enough for them, where this processor has any."""
    trainer, said = Trainer.of(plan(), few), []
    conv = trainer.model.layers[1].conv
    conv.register_forward_pre_hook(lambda layer, given: said.append((layer.kernel_for(given[0]), given[0])))
    with torch.no_grad():
        trainer.model(few.normalise(few.train.images[:32]))
    ((kernel, spikes),) = said
    work = spikes.spikes.numel() * conv.weight[:, 0].numel()
    assert work >= _spike_kernels.LEAST_WORK and not conv.exact and "products" not in kernel
    if BACKEND == "cpu" and import_module("trtkern._cpu").isa() == "amx":
        assert "torch's own" not in kernel, kernel


def test_an_exact_run_stays_one(few, tmp_path, undisturbed):
    """It goes on exact, and ends as if undisturbed; so does one from before there was the option, which was exact."""
    whole, broken, old = (tmp_path / name for name in ("whole", "broken", "old"))
    for place in (whole, broken, old):
        place.mkdir()
    Trainer.of(plan(exact_convolutions=True), few).run(whole)
    for place in (broken, old):
        with pytest.raises(KeyboardInterrupt):
            Trainer.of(plan(exact_convolutions=True), few).run(place, Impatient(2, 3))
    saved = newest(old)
    del saved.metadata["settings"]["exact_convolutions"]
    checkpoint.save(old, saved, checkpoint.step_of(checkpoint.found(old)[0]))
    (old / run.CONFIG).unlink()
    for place in (broken, old):
        again = Trainer.of(resuming.settings(place, newest(place), {}), few)
        assert again.settings.exact_convolutions and all(exact_layers(again.model))
        again.resume(newest(place), place)
        again.run(place)
        same(newest(place), newest(whole))
    assert not any(exact_layers(Trainer.of(plan(), few).model))


def test_a_signal_then_resume(few, tmp_path, undisturbed):
    class Stopper(Observer):
        interval = 0.0

        def step(self, epoch, step, averages):
            if (epoch, step) == (3, 2):
                signal.raise_signal(signal.SIGTERM)

    assert Trainer.of(plan(), few).run(tmp_path, Stopper()).stopped == (3, 2)
    saved = newest(tmp_path)
    again = Trainer.of(run.settings_of(tmp_path), few)
    again.resume(saved, tmp_path)
    assert timeless(again.run(tmp_path).rows) == timeless(undisturbed[0])
    same(newest(tmp_path), undisturbed[1])


def test_from_the_checkpoint_before_a_damaged_one(few, tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        Trainer.of(plan(), few).run(tmp_path, Impatient(3, 1))
    path = checkpoint.found(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    said = []
    saved = checkpoint.load(tmp_path, said.append)
    assert saved.metadata["epoch"] == 1 and path.name in said[0]
    again = Trainer.of(run.settings_of(tmp_path), few)
    again.resume(saved, tmp_path)
    assert timeless(again.run(tmp_path).rows) == timeless(undisturbed[0])
    same(newest(tmp_path), undisturbed[1])


def test_what_cannot_be_resumed(few, tmp_path, undisturbed):
    saved = undisturbed[1]._replace(state={}, metadata={**undisturbed[1].metadata, "epoch": 1})
    with pytest.raises(ValueError, match="weights alone; it cannot be resumed"):
        Trainer.of(plan(), few).resume(saved, tmp_path)


FAST = ["--device", "cpu", "--backend", BACKEND, "--threads", "1"]
SMALL = ["-T", "2", "--set", "model.layers=[4]"]


def test_processes_that_cannot_be_started_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for given, torchrun, words in (
        (["--processes", "0"], {}, "--processes: expected an integer of at least 1, got 0"),
        (["--restarts", "-1"], {}, "--restarts: expected an integer of at least 0, got -1"),
        (["--processes", "4"], told, "expected it without torchrun, which has started 2 of them, got 4; leave it out"),
    ):
        for name, value in torchrun.items():
            monkeypatch.setenv(name, value)
        assert cli.main(["train", *given]) == 2 and words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_function_that_fails_ends_a_run_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("theirs.py").write_text("def change(images, generator):\n    raise KeyError('mine')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed = ["--set", 'augment=[{name="theirs:change"}]', "--epochs", "1"]
    assert cli.main(["train", "--run-dir", "a", *changed, *SMALL, *FAST]) == 1
    assert "augment: expected theirs:change to change images" in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume", "nowhere"]) == 2
    assert "--resume: expected a run folder with plan.json, got nowhere; start the run anew" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "nowhere", "--lr", "1"]) == 2
    assert "--restarts, --other-data, got --lr;" in capsys.readouterr().err
    assert cli.main(["train", "--epochs", "2", "--run-dir", "a", *SMALL, *FAST]) == 0
    assert cli.main(["train", "--resume", "a"]) == 2
    assert "expected a run that is not at its end" in capsys.readouterr().err
    for path in checkpoint.found(Path("a"))[:1]:
        path.write_bytes(b"")
    assert cli.main(["train", "--resume", "a"]) == 0
    out = capsys.readouterr().out
    assert "going on from the one before it" in out and "goes on after epoch 1" in out and " 2/2 " in out


def test_the_plan_is_there_before_torch(tmp_path, capsys, no_pictures):
    """A process that dies while it imports leaves what --resume needs."""
    options = ["--epochs", "1", *SMALL, *FAST]
    arguments = ["train", "--run-dir", str(tmp_path / "a"), *options]
    code = f"import sys; sys.modules['torch'] = None; from trtkern import cli; cli.main({arguments!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert "import of torch halted" in done.stderr, done.stderr
    assert [path.name for path in (tmp_path / "a").iterdir()] == [folder.PLAN]
    assert cli.main(["train", "--resume", str(tmp_path / "a")]) == 0
    assert "there is no checkpoint in" in capsys.readouterr().out
    assert run.read_result(tmp_path / "a") and len(run.read_metrics(tmp_path / "a")) == 1
    settings = run.settings_of(tmp_path / "a")
    assert (settings.timesteps, settings.model["layers"], settings.backend) == (2, [4], BACKEND)


def test_a_run_that_dies_before_its_report(few, tmp_path, undisturbed, monkeypatch):
    def die(folder):
        raise KeyboardInterrupt

    trainer = Trainer.of(plan(), few)
    monkeypatch.setattr(trainer, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path)
    assert run.read_result(tmp_path) is None
    again = Trainer.of(run.settings_of(tmp_path), few)
    saved = newest(tmp_path)
    assert again.finished(saved)
    again.resume(saved, tmp_path)
    result = again.run(tmp_path)
    assert timeless(result.rows) == timeless(undisturbed[0])
    assert run.read_result(tmp_path)["test"] == result.final.splits["test"]


def test_weights_chosen_after_the_checkpoint_that_is_left_are_dropped(few, tmp_path, undisturbed):
    """The newest checkpoint is lost, and with it an epoch that was the best."""
    Trainer.of(plan(), few).run(tmp_path)
    epochs = undisturbed[0]
    last = max(range(4), key=lambda i: (epochs[i]["validation"]["accuracy"], -epochs[i]["validation"]["loss"]))
    assert last > 1  # or this test says nothing
    for path in checkpoint.found(tmp_path)[: 4 - last]:
        path.unlink()
    saved = newest(tmp_path)
    again = Trainer.of(plan(), few)
    again.resume(saved, tmp_path)
    kept = [checkpoint.step_of(path) for path in checkpoint.found(tmp_path, selection.BEST)]
    assert kept and max(kept) == again.best.step <= saved.metadata["epoch"] * 4
    assert timeless(again.run(tmp_path).rows) == timeless(epochs)
    assert again.best.epoch == last + 1
    same(newest(tmp_path), undisturbed[1])


def test_the_weights_of_every_second_epoch_stay(few, tmp_path, undisturbed):
    """Through a crash that makes one of them anew, and without a say in the numbers."""
    with pytest.raises(KeyboardInterrupt):
        Trainer.of(plan(keep_every=2), few).run(tmp_path, Impatient(3, 2))
    checkpoint.save(tmp_path, newest(tmp_path), 99, selection.EPOCH)  # of after the checkpoint: another run's
    again = Trainer.of(plan(keep_every=2), few)
    again.resume(newest(tmp_path), tmp_path)
    assert timeless(again.run(tmp_path).rows) == timeless(undisturbed[0])
    kept = [checkpoint.load(path) for path in checkpoint.found(tmp_path, selection.EPOCH)]
    assert [made.metadata["epoch"] for made in kept] == [4, 2] and not any(made.state for made in kept)
    for name, weights in undisturbed[1].model.items():
        assert torch.equal(kept[0].model[name], weights)
    with pytest.raises(ValueError, match="--keep-every: expected an integer of at least 1, got 0"):
        plan(keep_every=0)


def test_twenty_kills(tmp_path, no_pictures):
    # More epochs than kills: a life ends at its first checkpoint, or soon after.
    options = ["--epochs", "40", "--batch-size", "256", *SMALL, *FAST]
    assert cli.main(["train", "--run-dir", str(tmp_path / "whole"), *options]) == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(tmp_path / "killed"), "20", "1", "--", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.splitlines()[-1] == "20 killed, status 0", done.stderr
    same(newest(tmp_path / "killed"), newest(tmp_path / "whole"))
    rows = [run.read_metrics(tmp_path / name) for name in ("killed", "whole")]
    assert len(rows[0]) == 40 and timeless(rows[0]) == timeless(rows[1])
