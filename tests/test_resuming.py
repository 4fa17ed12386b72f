"""What may stand beside --resume, and what is noticed: edited settings, other classes, other files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from trtkern import cli, data
from trtkern.backends import named
from trtkern.commands import _runs
from trtkern.data import Split
from trtkern.training import checkpoint, folder, plan, run, settings
from trtkern.training.loop import Trainer
from trtkern.training.schedules import Schedule
from trtkern.training.tally import Begun

# Not "auto": in Triton's interpreter a step takes minutes.
BACKEND = "cpu" if named("cpu").missing() is None else "reference"
OPTIONS = ["--device", "cpu", "--backend", BACKEND, "--threads", "1", "-T", "2", "--set", "model.layers=[4]"]

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def few(train=144, test=40):
    digits = data.load("digits")
    splits = {name: Split(*(t[:n] for t in getattr(digits, name))) for name, n in (("train", train), ("test", test))}
    return dataclasses.replace(digits, **splits)


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs, "keep_pages", lambda: False)
    monkeypatch.setattr(_runs.gathering, "load", lambda *_, **__: few())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs at its end."""
    place = tmp_path_factory.mktemp("trained") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_runs, "keep_pages", lambda: False)
        patch.setattr(_runs.gathering, "load", lambda *_, **__: few())
        patch.setattr(_runs.session.report, "write", lambda path, **_: path.write_text("report"))
        patch.setattr(_runs.session.figures, "learning_curves", lambda *_: None)
        assert cli.main(["train", "--epochs", "2", "--batch-size", "32", "--run-dir", str(place), *OPTIONS]) == 0
    return place


@pytest.fixture
def done(trained):
    """It, in a folder of this test's own."""
    shutil.copytree(trained, "a")
    return Path("a")


@pytest.fixture
def half(done):
    """The run after its first epoch."""
    checkpoint.found(done)[0].unlink()
    return done


def rows(place):
    return run.read_metrics(place)


def config(place):
    return json.loads((place / run.CONFIG).read_text())


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def refused(capsys, arguments):
    """The one line on stderr."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("trtkern: "), error
    return error


def same_weights(a, b):
    one, two = checkpoint.load(a).model, checkpoint.load(b).model
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (["--set", "lr=1"], "--set"),
        (["-T", "3"], "-T"),
        (["--timesteps=3"], "--timesteps"),
        (["--batch-size", "8"], "--batch-size"),
        (["--dry-run"], "--dry-run"),
        (["--compile"], "--compile"),
    ],
)
def test_what_may_not_stand_beside_resume_is_named_as_it_was_typed(done, capsys, monkeypatch, typed, name):
    monkeypatch.setattr("sys.argv", ["trtkern", "train", "--resume", "a", *typed])
    error = refused(capsys, ["train", "--resume", "a", *typed])
    assert f", got {name};" in error and "--changes" not in error
    beside = "--data-dir, --epochs, --device, --threads, --workers, --parallel, --timeout, --processes, --restarts"
    assert f"{beside}, --other-data" in error
    assert "expected it beside --resume" in refused(capsys, ["train", "--other-data"])


def test_workers_and_the_folder_of_the_data_change_nothing(trained, half, capsys):
    assert cli.main(["train", "--resume", "a", "--workers", "0", "--data-dir", "moved", "--device", "cpu"]) == 0
    said = lines(capsys)
    assert not [line for line in said if "not promised" in line or "another run" in line]
    assert same_weights(half, trained)
    assert config(half)["settings"]["data_dir"] == str(Path("moved").resolve())
    (entry,) = config(half)["resumed"]
    assert (entry["epoch"], entry["changed"]) == (1, {"data_dir": [None, str(Path("moved").resolve())]})


def test_threads_are_no_longer_bit_for_bit_and_stay_for_the_next_time(half, capsys):
    assert cli.main(["train", "--resume", "a", "--threads", "2", "--workers", "1"]) == 0
    assert any(line.endswith("not promised: threads was 1, is 2") for line in lines(capsys))
    assert torch.get_num_threads() == 2 and config(half)["settings"]["threads"] == 2
    checkpoint.found(half)[0].unlink()  # killed: what the folder says is in force stays so
    assert cli.main(["train", "--resume", "a"]) == 0
    assert (config(half)["settings"]["threads"], config(half)["settings"]["workers"]) == (2, 1)
    assert [list(entry["changed"]) for entry in config(half)["resumed"]] == [["threads", "workers"]] * 2


def test_more_epochs_take_the_rates_of_the_longer_run(done, capsys):
    before = rows(done)
    assert cli.main(["train", "--resume", "a", "--epochs", "4"]) == 0
    assert "4 epochs instead of 2: the learning rate of the steps that are left is that of a run of 4" in "".join(
        lines(capsys)
    )
    after, used = rows(done), config(done)["settings"]
    assert after[:2] == before and [row["step"] for row in after] == [4, 8, 12, 16]
    cosine = Schedule("cosine", {"eta_min": 0.0}, used["warmup"])
    wanted = [cosine.rate(used["lr"], step, 4, 4) for step in (8, 12)]
    assert [row["lr"] for row in after[2:]] == wanted
    assert run.read_result(done)["epoch"] in (1, 2, 3, 4) and used["epochs"] == 4


def test_a_run_that_is_taken_up_again_has_no_result_until_its_end(done, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "finish", die)
    assert cli.main(["train", "--resume", "a", "--epochs", "3"]) == 130
    assert run.read_result(done) is None and not (done / run.REPORT).exists()


def test_fewer_epochs_end_it_but_not_before_what_was_made(half, capsys):
    zero = refused(capsys, ["train", "--resume", "a", "--epochs", "0"])
    assert "--epochs: expected an integer of at least 1, got 0" in zero
    assert cli.main(["train", "--resume", "a", "--epochs", "1"]) == 0
    assert len(rows(half)) == 1 and run.read_result(half)["epoch"] == 1
    assert cli.main(["train", "--resume", "a", "--epochs", "2"]) == 0
    error = refused(capsys, ["train", "--resume", "a", "--epochs", "1"])
    assert "--epochs: expected at least 2, as many as the run has begun, got 1" in error


def test_a_device_that_is_not_there(half, capsys):
    assert "--device: cuda:99 was asked for" in refused(capsys, ["train", "--resume", "a", "--device", "cuda:99"])
    assert "--workers: expected an integer of" in refused(capsys, ["train", "--resume", "a", "--workers", "-1"])
    assert "--threads: expected an integer of" in refused(capsys, ["train", "--resume", "a", "--threads", "0"])


# Edited and damaged files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "--batch-size: expected an integer of at least 1, got 0"),
        ({"batch_size": "ten"}, "--batch-size: expected int, got 'ten'"),
        ({"batch_size": True}, "--batch-size: expected int, got True"),
        ({"lr": None}, "--lr: expected float, got None"),
        ({"lr": 10**400}, "--lr: expected a finite number above 0, got inf"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name: expected one of adam, adamw, sgd, "),
        ({"model": {}}, "--set model.name: expected the name of a model, got None"),
        ({"threads": None}, "--threads: expected an integer of at least 1, got None"),
        ({"bogus": 1}, "got 'bogus'"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name was 'adam', is 'sgd'"),
        ({"timesteps": 3, "seed": 5}, "timesteps was 2, is 3, seed was 0, is 5"),
        ({"batch_size": 16}, "batch_size was 32, is 16; put them back, or delete config.json"),
    ],
)
def test_an_edited_config_is_refused_by_name(half, capsys, change, words):
    edited = config(half)
    edited["settings"] |= change
    (half / run.CONFIG).write_text(json.dumps(edited))
    before = sorted(path.name for path in half.iterdir())
    error = refused(capsys, ["train", "--resume", "a"])
    assert words in error and "a/config.json" in error
    assert sorted(path.name for path in half.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "words"), [({"batch_size": 0}, "--batch-size: expected"), ({"data": 3}, "--data: ")]
)
def test_an_edited_plan_is_refused_by_name(capsys, change, words):
    folder.create({**plan.make(device="cpu"), **change, "data": change.get("data", "digits")}, None)
    error = refused(capsys, ["train", "--resume", str(next(Path("runs").iterdir()))])
    assert words in error and "plan.json)" in error


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 3}', "{}", "[" * 200_000, "\xff"])
def test_a_config_that_is_none_is_named_and_may_be_deleted(trained, half, capsys, text):
    (half / run.CONFIG).write_bytes(text.encode("latin-1"))
    assert "expected the config.json of a run, got a/config.json" in refused(capsys, ["train", "--resume", "a"])
    (half / run.CONFIG).unlink()
    (half / folder.PLAN).write_text("damaged as well")  # the checkpoint has the settings
    if text == "":
        assert cli.main(["train", "--resume", "a"]) == 0
        assert same_weights(half, trained) and config(half)["settings"] == config(trained)["settings"]


def test_what_may_change_may_be_edited(trained, half, capsys):
    edited = config(half)
    edited["settings"]["workers"] = 3
    (half / run.CONFIG).write_text(json.dumps(edited))
    assert cli.main(["train", "--resume", "a"]) == 0
    assert config(half)["resumed"][0]["changed"] == {"workers": [0, 3]} and same_weights(half, trained)


def test_a_bad_line_of_the_metrics_is_said(half, capsys):
    path = half / run.METRICS
    path.write_text("junk\n" + path.read_text())
    assert cli.main(["train", "--resume", "a"]) == 0
    assert any("line 1 of a/metrics.jsonl is no row of a run" in line for line in lines(capsys))
    assert [row["epoch"] for row in rows(half)] == [1, 2]


# Other data


def test_other_classes_are_an_error(done, capsys, monkeypatch):
    renamed = dataclasses.replace(few(), classes=(*"012345678", "zero"))
    monkeypatch.setattr(_runs.gathering, "load", lambda *_, **__: renamed)
    words = "class 9 was '9' in training (10 classes), is 'zero' here (10 classes)"
    assert words in refused(capsys, ["evaluate", "a"])
    assert words in refused(capsys, ["train", "--resume", "a", "--epochs", "3", "--other-data"])
    monkeypatch.setattr(
        _runs.gathering, "load", lambda *_, **__: dataclasses.replace(few(), classes=tuple("0123456789x"))
    )
    assert "class 10 was none in training" in refused(capsys, ["evaluate", "a"])


def test_other_files_are_an_error_that_a_flag_lifts(half, capsys, monkeypatch):
    monkeypatch.setattr(_runs.gathering, "load", lambda *_, **__: few(train=96))
    error = refused(capsys, ["train", "--resume", "a"])
    assert "the train split had 144 images, now 96" in error and "go on with these by --other-data" in error
    assert cli.main(["train", "--resume", "a", "--other-data", "--epochs", "5"]) == 0
    said = "from here on another run, with other files than before: the train split had 144 images"
    assert any(said in line for line in lines(capsys))
    assert "the train split had 144 images" in config(half)["resumed"][0]["other_data"]
    # Two steps an epoch instead of four; they are counted on, so that the newest checkpoint is the newest.
    assert [row["step"] for row in rows(half)] == [4, 6, 8, 10, 12]
    assert [checkpoint.step_of(path) for path in checkpoint.found(half)] == [12, 10, 8]
    assert cli.main(["train", "--resume", "a", "--epochs", "6"]) == 0, "those are its files now"


def test_an_epoch_that_was_begun_with_other_images_begins_anew(monkeypatch):
    changes = {"changes": ["model.layers=[4]"], "device": "cpu", "backend": BACKEND, "timesteps": 2}
    asked = plan.make(**changes, threads=1, epochs=2, batch_size=32)
    place = folder.create(asked, "b")
    trainer = Trainer.of(settings.settle(asked), few(), data.fingerprint(few()))
    trainer._save(place, 1, 1, None, Begun(1, trainer._tally.state(), 0.5))
    monkeypatch.setattr(_runs.gathering, "load", lambda *_, **__: few(train=96))
    assert cli.main(["train", "--resume", "b", "--other-data"]) == 0
    assert [row["step"] for row in rows(place)] == [3, 5]


def test_other_test_images_are_said(done, capsys, monkeypatch):
    monkeypatch.setattr(_runs.gathering, "load", lambda *_, **__: few(test=30))
    assert cli.main(["evaluate", "a"]) == 0
    out = capsys.readouterr().out
    assert "evaluate: other test images than those of the training: the test split had 40 images, now 30" in out
    monkeypatch.setattr(_runs.gathering, "load", lambda *_, **__: few(train=120))
    assert cli.main(["evaluate", "a"]) == 0
    assert "evaluate:" not in capsys.readouterr().out


def test_a_checkpoint_of_before_there_were_fingerprints_goes_on(trained, half, capsys):
    (path,) = checkpoint.found(half)
    saved = checkpoint.load(path)
    for name in ("data", "steps", "made"):
        del saved.metadata[name]
    checkpoint.save(half, saved, checkpoint.step_of(path))
    assert cli.main(["train", "--resume", "a"]) == 0
    assert any("does not say which files it was trained on" in line for line in lines(capsys))
    assert same_weights(half, trained)
    assert cli.main(["evaluate", str(path)]) == 0


# What befalls a run


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a worker"), OSError(5, "Input/output error"), MemoryError("full"), torch.OutOfMemoryError("GPU")],
)
def test_what_befalls_a_run_names_the_checkpoint_and_the_way_on(half, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Trainer, "_epoch", fail)
    assert cli.main(["train", "--resume", "a"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(error) in line
    assert (
        f"the last good checkpoint is {checkpoint.found(half)[0]}: `trtkern train --resume a` goes on from it" in line
    )


def test_a_run_that_fails_before_its_first_step_can_be_taken_up(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert cli.main(["train", "--epochs", "1", "--run-dir", "b c", *OPTIONS]) == 1
    assert "no checkpoint was written: `trtkern train --resume 'b c'` begins anew" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "b c"]) == 0


def test_evaluate_takes_the_checkpoint_before_a_damaged_one(done, capsys):
    newest = checkpoint.found(done)[0]
    newest.write_bytes(b"")
    assert cli.main(["evaluate", "a"]) == 0
    out = capsys.readouterr().out
    assert f"damaged or different file {newest}" in out and "going on from the one before it" in out
