"""A folder of the user's with a folder of files for each class: images and recordings of events."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own_parts import BACKEND

from trtkern import cli
from trtkern.data import fingerprint
from trtkern.data.folders import by_class
from trtkern.training import run

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")
FAST = ["--device", "cpu", "--threads", "1", "--backend", BACKEND]


def images(place, count=5, classes=("cat", "dog"), size=12):
    Image = pytest.importorskip("PIL.Image")
    for shade, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((size, size, 3), 40 + 120 * shade + index, np.uint8)
            Image.fromarray(pixels).save(place / name / f"{index}.png")


def recordings(place, count=5, start=0, classes=("left", "right"), width=6):
    """Events that wander to one side; no two recordings are the same."""
    for way, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for index in range(count):
            step = np.arange(24)
            x = step % width if way else width - 1 - step % width
            t = start + step * (1 + index)
            np.savez(place / name / f"{index}.npz", t=t, x=x, y=np.full(24, index % 4), p=step % 2)


def test_images_with_and_without_splits(tmp_path):
    images(tmp_path / "alone", 10)
    alone = by_class(tmp_path / "alone", timesteps=2, size=8)
    assert alone.classes == ("cat", "dog") and alone.shape == (3, 8, 8)
    assert torch.bincount(alone.train.labels).tolist() == [8, 8] and torch.bincount(alone.test.labels).tolist() == [
        2,
        2,
    ]
    assert not alone.shared()
    images(tmp_path / "both" / "train", 4)
    images(tmp_path / "both" / "test", 3, size=13)
    both = by_class(tmp_path / "both", timesteps=2, size=8, mean=0.0, std=255.0)
    assert [len(split.images) for split in (both.train, both.test)] == [8, 6] and both.std == 255.0
    assert both.normalise(both.train.images.read(0)).max() < 0.2


def test_recordings_become_frames(tmp_path):
    recordings(tmp_path / "both" / "train")
    recordings(tmp_path / "both" / "val", 2, start=100)
    made = by_class(tmp_path / "both", timesteps=3, cache=str(tmp_path / "cache"))
    assert made.train.images.shape == (10, 3, 2, 5 - 1, 6) and made.timesteps == 3
    frames = made.train.images.read(slice(None)).float()
    assert (frames.sum((2, 3, 4)) == 8).all(), "frames of equally many events"
    first = frames[0].sum((0, 1))
    assert first[0].tolist() == [4.0] * 6 and made.classes == ("left", "right")
    again = by_class(tmp_path / "both", timesteps=3, cache=str(tmp_path / "cache"), sensor=[8, 8])
    assert again.shape == (2, 8, 8) and fingerprint(made) != fingerprint(again)
    recordings(tmp_path / "alone", 5)
    alone = by_class(tmp_path / "alone", timesteps=2, cache=str(tmp_path / "cache"))
    assert [len(split.images) for split in (alone.train, alone.test)] == [8, 2]


def test_the_command_trains_on_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trtkern.commands._runs.keep_pages", lambda: False)
    recordings(tmp_path / "hands", 10)
    options = ["--model", "conv", "--set", "model.layers=[4]", "-T", "3", "--epochs", "1", "--batch-size", "4"]
    options += ["--cache-dir", "cache", "--set", "validation=0.25", *FAST]
    assert cli.main(["train", "--data", "folder:hands", *options]) == 0, capsys.readouterr().err
    settings = run.settings_of(tmp_path / "runs" / "hands-trt-seed0")
    assert settings.data == f"folder:{tmp_path / 'hands'}" and settings.model == {"name": "conv", "layers": [4]}
    (tmp_path / "hands").rename(tmp_path / "moved")
    assert cli.main(["evaluate", "runs/hands-trt-seed0"]) == 2
    assert "expected folder:DIR with a folder of files for each class, got no folder" in capsys.readouterr().err
    assert cli.main(["evaluate", "runs/hands-trt-seed0", "--data-dir", "moved"]) == 0
    images(tmp_path / "pets", 6)
    more = ["--set", "data_options.size=16", "--set", "model.layers=[4]", "--epochs", "1", "--workers", "1", *FAST]
    assert cli.main(["train", "--data", "folder:pets", "--model", "conv", "-T", "1", *more]) == 2
    assert "expected a share that leaves an image of each of 2 classes on both sides" in capsys.readouterr().err
    assert cli.main(["train", "--data", "folder:pets", "--model", "conv", "-T", "1", "--select", "last", *more]) == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected in .* a folder for each class, with files .jpeg, .jpg, .png, .aedat, .*, got none"),
        ({"a/1.txt": b"x"}, "a folder for each class, with files"),
        ({"a/1.png": b"x", "a/1.npz": b"x"}, "expected images or recordings of events in .*, got both"),
        ({"a/1.npz": b"x", "a/1.bin": b"x"}, "expected recordings of one kind in .*, got .bin, .npz"),
        ({"a/1.npz": b"x", "b/1.txt": b"x"}, "expected files .*npz of each class in .*, got none of b"),
        ({"a/1.npz": b"x"}, "expected five files or more of each class, .* got 1 of class 0"),
        ({f"a/{index}.npz": b"x" for index in range(5)}, "expected an .npz file with the arrays t, x, y and p, got"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        by_class(tmp_path, timesteps=2, cache=str(tmp_path / "cache"))


def test_options_that_it_does_not_take(tmp_path):
    recordings(tmp_path / "a")
    with pytest.raises(
        ValueError, match="data_options: expected one of size, sensor, mean, std, got 'sizes'; did you mean"
    ):
        by_class(tmp_path / "a", timesteps=2, sizes=3)
    with pytest.raises(ValueError, match=r"data_options.sensor: expected \[height, width\], got 3"):
        by_class(tmp_path / "a", timesteps=2, sensor=3)
