"""Networks and data of the user's own: by name on the command line and in recipes, and through ``Trainer``."""

from __future__ import annotations

import json
from pathlib import Path

import own_parts
import pytest
import torch
from own_parts import BACKEND, Impatient, Net, Sequences, Stripes
from torch.utils.data import DataLoader, TensorDataset

from trtkern import cli
from trtkern.train import Callback, Trainer
from trtkern.training import checkpoint, epochs, run

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")
FAST = ["--device", "cpu", "--threads", "1", "--backend", BACKEND]
OWN = ["--model", "own_parts:network", "--data", "own_parts:data", "--epochs", "2", "--batch-size", "16"]


def timeless(rows):
    return [
        {name: v for name, v in row.items() if name not in ("seconds", "samples_per_s", "loader_share")} for row in rows
    ]


def same(one, two):
    """Two run folders: weights, optimiser, generators and rows, all but times."""
    a, b = checkpoint.load(one), checkpoint.load(two)
    for left, right in ((a.model, b.model), (a.state, b.state)):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
    assert a.metadata["loop"] == b.metadata["loop"]
    assert timeless(run.read_metrics(one)) == timeless(run.read_metrics(two))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trtkern.commands._runs.keep_pages", lambda: False)
    return tmp_path


def test_a_run_of_names_from_its_dry_run_to_its_report(here, capsys):
    assert cli.main(["train", *OWN, *FAST, "--dry-run", "--set", "model.hidden=24"]) == 0
    said = capsys.readouterr().out
    assert "in_features=64, out_features=24" in said and "The data set was made as a run makes it" in said
    assert "5 steps of 16 images an epoch" in said and not Path("runs").exists()
    change = ["--set", "schedule.name=own_parts:falling", "--set", "augment=[{name='own_parts:noisy', amount=0.2}]"]
    assert cli.main(["train", *OWN, *FAST, *change, "--set", "model.hidden=24", "--set", "data_options.count=80"]) == 0
    folder = Path("runs/data-trt-seed0")
    said = capsys.readouterr().out
    assert "own_parts:data: 72 training, 8 validation and 32 test images, 4 steps an epoch" in said
    settings = run.settings_of(folder)
    assert settings.model == {"name": "own_parts:network", "hidden": 24} and settings.recipe == "own"
    assert settings.schedule == {"name": "own_parts:falling"} and settings.data_options == {"count": 80}
    rates = [row["lr"] for row in run.read_metrics(folder)]
    assert rates == [1e-3, pytest.approx(0.5e-3)]
    saved = checkpoint.load(folder)
    assert saved.metadata["class"] == "own_parts.Net" and saved.metadata["classes"] == own_parts.CLASSES
    assert saved.model["layers.0.weight"].shape == (24, 64)
    reached = run.read_result(folder)["test"]["accuracy"]
    assert cli.main(["evaluate", str(folder)]) == 0
    assert f"{reached:.2%}" in capsys.readouterr().out
    assert cli.main(["train", "--resume", str(folder), "--epochs", "3"]) == 0
    assert cli.main(["analyze", "fisher", str(folder), "--samples", "24"]) == 0
    assert cli.main(["analyze", "spikes", str(folder), "--samples", "24"]) == 0
    assert cli.main(["report", str(folder), "--only", "early", "--only", "fisher"]) == 0
    assert cli.main(["train", *OWN, *FAST, "--loss", "sdt", "--seeds", "0,1", "--epochs", "1"]) == 0
    assert set(json.loads(Path("runs/data-sdt-seeds/seeds.json").read_text())["seeds"]) == {"0", "1"}


def test_a_recipe_of_names_is_profiled_and_trained(here, capsys):
    Path("mine.toml").write_text(
        'data = "own_parts:data"\nmodel = {name = "own_parts:network", hidden = 8}\nepochs = 1\naccumulate = 2\n'
        'optimizer = {name = "RMSprop", alpha = 0.9}\nschedule = {name = "one-cycle", pct_start = 0.2}\n'
        'mix = {name = "mixup"}\nloss = {name = "sdt"}\nbatch_size = 16\n'
    )
    assert cli.main(["train", "--recipe", "mine.toml", *FAST]) == 0
    settings = run.settings_of(Path("runs/data-sdt-seed0"))
    assert settings.optimizer == {"name": "RMSprop", "alpha": 0.9} and settings.accumulate == 2
    assert settings.schedule["div_factor"] == 25.0 and settings.mix == {"name": "mixup", "alpha": 0.2, "p": 1.0}
    assert cli.main(["profile", "mine.toml", "--steps", "1", "--threads", "1", "--device", "cpu"]) == 0
    assert "layers.1" in capsys.readouterr().out


def test_the_network_of_a_recipe_is_another(here, capsys):
    """--model beside a recipe: its data stay, its network and what that takes go."""
    assert (
        cli.main(["train", "--recipe", "digits", "--model", "vggsnn", "--set", "model.width=4", "--dry-run", *FAST])
        == 2
    )
    more = ["--set", "model.classes=10", "--epochs", "1", "--set", "train_images=64", "-T", "3"]
    assert cli.main(["train", "--model", "own_parts:Net", *more, *FAST]) == 0
    settings = run.settings_of(Path("runs/digits-trt-seed0"))
    assert settings.model == {"name": "own_parts:Net", "classes": 10} and settings.data == "digits"


def inputs(kind):
    """The data of each kind, made anew: the same samples."""
    images, labels = own_parts.stripes(96)
    test = own_parts.stripes(32, 1)
    if kind == "tensors":
        return (images, labels), test
    if kind == "numpy":
        return (images.numpy(), labels.numpy()), tuple(part.numpy() for part in test)
    if kind == "TensorDataset":
        return TensorDataset(images, labels), TensorDataset(*test)
    if kind == "Dataset":
        return own_parts.data()
    shuffled = torch.Generator().manual_seed(5) if kind == "DataLoader" else None
    workers = 2 if kind == "DataLoader with workers" else 0
    loader = DataLoader(Stripes(90), batch_size=16, shuffle=True, generator=shuffled, num_workers=workers)
    return loader, DataLoader(Stripes(32, 1), batch_size=20)


KINDS = ["tensors", "TensorDataset", "Dataset", "DataLoader", "DataLoader without generator", "DataLoader with workers"]


def trainer(kind, *callbacks, **options):
    torch.manual_seed(1)
    options = {"epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu", "lr": 0.01, "seed": 3, **options}
    return Trainer(Net(dropout=0.1), inputs(kind), callbacks=callbacks, augment=own_parts.noisy, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_any_data_resume_bitwise(kind, tmp_path, monkeypatch):
    """Ended within an epoch behind its first checkpoint, and after one; the same lines go on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(kind).fit(whole, show=False)
    monkeypatch.setattr(epochs, "SAVE_EVERY", 0.0)
    for at in ((1, 3), (2, 2)):
        with pytest.raises(KeyboardInterrupt):
            trainer(kind, Impatient(*at)).fit(parts, show=False)
        torch.manual_seed(99)
    again = trainer(kind)
    result = again.fit(parts, show=False)
    same(whole, parts)
    assert [entry["step"] for entry in again.history] == [2, 1]
    settings = run.settings_of(parts)
    assert settings.model == {"name": "object", "class": "own_parts.Net"} and settings.data.startswith("object:")
    assert settings.select == ("last" if kind.startswith("DataLoader") else "validation")
    ended = trainer(kind).fit(parts, show=False)
    assert ended.final.splits == result.final.splits and ended.stopped is None
    with pytest.raises(
        ValueError, match=r"fit: expected a run of these settings in .*, got others: lr was 0.01, is 0.5"
    ):
        trainer(kind, lr=0.5).fit(parts, show=False)


def test_numpy_arrays_are_tensors(tmp_path):
    rows = [trainer(kind, epochs=1).fit(tmp_path / kind, show=False).rows for kind in ("numpy", "tensors")]
    assert timeless(rows[0]) == timeless(rows[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers, tmp_path):
    made = [trainer("Dataset", epochs=1, workers=each).fit(tmp_path / str(each), show=False) for each in (0, workers)]
    assert timeless(made[0].rows) == timeless(made[1].rows)


def test_one_set_of_data_alone_is_split():
    images, labels = own_parts.stripes(100)
    alone = Trainer(Net(), (images, labels), threads=1, device="cpu", select="last")
    assert [len(split.images) for split in alone.splits.values()] == [80, 20]
    assert torch.bincount(alone.data.test.labels).tolist() == [5, 5, 5, 5]
    assert not alone.data.shared()
    lazily = Trainer(Net(), Stripes(100), threads=1, device="cpu")
    assert [len(split.images) for split in lazily.splits.values()] == [72, 20, 8]
    assert list(lazily.data.classes) == own_parts.CLASSES


def test_sequences_come_with_time_first():
    x, y = torch.randn(40, 7, 5), torch.arange(40) % 3
    made = Trainer(Sequences(), (x, y), time_first=True, threads=1, device="cpu", batch_size=8, select="last")
    batch, _ = next(made.loader.whole(8))
    assert batch.shape == (7, 8, 5) and made.data.timesteps == 7
    frames = torch.randn(20, 3, 1, 8, 8)
    still = Trainer(lambda: Still(), (frames, torch.arange(20) % 4), threads=1, device="cpu", select="last")
    assert next(still.loader.whole(4))[0].shape == (3, 4, 1, 8, 8)


class Still(Net):
    def forward(self, x):
        return self.layers(x.flatten(2))


def test_a_program_and_the_command_line_share_a_run(here, capsys):
    """Functions have names: what one began the other evaluates, and makes the same numbers."""
    options = {"epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu", "backend": BACKEND}
    Trainer(own_parts.network, own_parts.data, **options, schedule=own_parts.falling).fit("a", show=False)
    assert cli.main(["evaluate", "a"]) == 0
    change = ["--set", "schedule.name=own_parts:falling", "-T", "4"]
    assert cli.main(["train", *OWN, *FAST, *change, "--run-dir", "b"]) == 0
    same(Path("a"), Path("b"))
    assert json.loads(Path("a/config.json").read_text())["command"][0] == "python"


def test_callbacks_are_told(tmp_path):
    told = []

    class Told(Callback):
        def start(self, trainer):
            told.append(("start", trainer.steps))

        def step(self, trainer, epoch, step, loss):
            told.append((epoch, step, loss.dim()))

        def epoch(self, trainer, row):
            assert not trainer.model.training
            row["norm"] = trainer.model.layers[0].weight.norm().item()

        def end(self, trainer, result):
            told.append(("end", len(result.rows), result.stopped))

    class Stopping:
        def step(self, trainer, epoch, step, loss):
            if (epoch, step) == (2, 2):
                trainer.stop()

    rows = trainer("tensors", Told(), epochs=2).fit(tmp_path / "a", show=False).rows
    steps = [(epoch, step, 0) for epoch in (1, 2) for step in range(1, 6)]
    assert told == [("start", 5), *steps, ("end", 2, None)]
    assert [row["norm"] for row in run.read_metrics(tmp_path / "a")] == [row["norm"] for row in rows]
    assert trainer("tensors", Told(), Stopping()).fit(tmp_path / "b", show=False).stopped == (2, 2)
    trainer("tensors", Told()).fit(tmp_path / "b", show=False)
    same(tmp_path / "a", tmp_path / "b")


def test_a_trained_network_goes_into_its_class_alone(tmp_path):
    made = trainer("tensors", epochs=1)
    made.fit(tmp_path / "a", show=False)
    saved = checkpoint.load(tmp_path / "a")

    class Other(Net):
        pass

    other = Trainer(Other(), inputs("tensors"), threads=1, device="cpu")
    with pytest.raises(
        ValueError, match=r"of class .*test_own\..*Other, got one of own_parts\.Net; give the network that"
    ):
        other.restore(saved)
    assert not any(path.suffix in (".pt", ".pkl", ".pth") for path in (tmp_path / "a").iterdir())
    assert cli.main(["evaluate", str(tmp_path / "a")]) == 2


def test_weights_under_two_names_are_kept(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = self.layers[0]

    torch.manual_seed(0)
    made = Trainer(Tied(), inputs("tensors"), threads=1, device="cpu", epochs=1)
    made.fit(tmp_path / "a", show=False)
    held = checkpoint.load(tmp_path / "a").model
    assert torch.equal(held["again.weight"], held["layers.0.weight"])
