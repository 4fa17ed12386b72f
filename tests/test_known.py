"""What is known of the data sets agrees with their files, and is enough for a dry run."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import data_files
import pytest

from trtkern import cli, data
from trtkern.commands import _runs
from trtkern.data.blank import blank
from trtkern.datasets import DATASETS

for needed in ("aedat", "h5py", "safetensors", "PIL", "matplotlib", "typer"):
    pytest.importorskip(needed)


@pytest.mark.parametrize("name", DATASETS)
def test_shape_and_classes_are_those_of_the_files(tmp_path, name):
    if DATASETS[name].frames and find_spec("tonic") is None:
        pytest.skip("tonic is not installed")
    folder = data_files.make(name, tmp_path / "data")
    loaded = data.load(
        name, None if folder is None else str(folder), timesteps=3, size=32, cache=str(tmp_path / "cache")
    )
    known = blank(name, 2, timesteps=3, size=32)
    assert known.train.images.shape[1:] == loaded.train.images.shape[1:] == known.test.images.shape[1:]
    assert (known.shape, known.timesteps, known.name) == (loaded.shape, loaded.timesteps, loaded.name)
    if not name.startswith("imagenet"):  # whose tiny files have fewer
        assert len(known.classes) == len(loaded.classes) == DATASETS[name].classes
    if name == "digits":
        assert DATASETS[name].train == len(loaded.train.labels)


def dry(capsys, *options: str) -> str:
    small = ["--set", "model={name='conv', layers=[2]}", "--device", "cpu", "--dry-run"]
    assert cli.main(["train", *options, *small]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("digits", "20 steps of 64 images an epoch"),
        ("cifar10", "703 steps of 64 images"),
        ("imagenet100", "as many steps as its files give of 64 images"),
        ("dvs-cifar10", "126 steps of 64 images"),
        ("n-caltech101", "as many steps as its files give of 64 images"),
        ("shd", "57 steps of 128 images"),
    ],
)
def test_a_dry_run_needs_no_file(tmp_path, monkeypatch, capsys, name, said):
    """Nor a module that reads one: importing these fails."""
    monkeypatch.setattr(_runs.gathering, "load", lambda *args, **more: pytest.fail("looked at the data set"))
    for module in ("tonic", "tonic.io", "h5py", "aedat"):
        monkeypatch.setitem(sys.modules, module, None)
    out = dry(capsys, "--recipe", name, "--set", "timesteps=2" if name == "imagenet100" else "epochs=2")
    assert said in out and f"{DATASETS[name].classes:,} classes and number of images are those of {name}" in out
    assert "kept for backward" in out and "The data set was not looked at" in out


def test_what_changes_the_number_of_images_counts(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("n01\nn02\nn03\n")
    out = dry(capsys, "--recipe", "imagenet100", "--class-list", str(tmp_path / "list.txt"), "--set",
              "augment=[{name='resized_crop', size=32}]", "--set", "train_images=100")  # fmt: skip
    assert "3 classes" in out
    out = dry(capsys, "--recipe", "cifar10", "--select", "last", "--set", "train_images=1000")
    assert "15 steps of 64 images" in out
    out = dry(capsys, "--recipe", "cifar10", "--set", "train_images=10")
    assert "1 steps of 10 images" in out
