"""Which data set it is: the same wherever it lies, another one whenever a file, a label or a class is."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec

import data_files
import pytest
import torch

from trtkern import data
from trtkern.data import Dataset, Split, difference, fingerprint

for needed in ("aedat", "h5py", "safetensors", "PIL"):
    pytest.importorskip(needed)
if find_spec("tonic") is None:
    pytest.skip("tonic is not installed", allow_module_level=True)


KNOWN = "d0d8568db88f278001aa6cc766fe91d3da1a64025f4fcc817822ff3512ab3d58"


def load(name: str, where) -> Dataset:
    more = {"size": 32} if name.startswith("imagenet") else {"cache": str(where / "c"), "timesteps": 2}
    directory = data_files.make(name, where / "data") if not (where / "data").exists() else where / "data"
    return data.load(name, None if directory is None else str(directory), **more)


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "cifar10", "imagenet100", "dvs-cifar10", "n-mnist"])
def test_it_is_the_same_wherever_the_files_lie(tmp_path, name):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    first = load(name, tmp_path / "one")
    if name != "digits":
        shutil.copytree(tmp_path / "one" / "data", tmp_path / "other" / "data")
        for path in (tmp_path / "other" / "data").rglob("*"):
            os.utime(path, (1, 1))
    made, again = fingerprint(first), fingerprint(load(name, tmp_path / "other"))
    assert made == again == json.loads(json.dumps(made)) and difference(made, again) == ""
    assert made["classes"] == list(first.classes)
    assert [made[split]["images"] for split in ("train", "test")] == [len(first.train.labels), len(first.test.labels)]
    assert made["train"]["sha256"] != made["test"]["sha256"]


def test_it_is_known():
    """The value itself, which checkpoints hold: it must not change from one version to the next."""
    images, labels = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2), torch.tensor([0, 1])
    made = fingerprint(Dataset("tiny", Split(images, labels), Split(images[:1], labels[:1]), ("a", "b"), 0.0, 1.0))
    assert made["classes"] == ["a", "b"]
    assert made["train"] == {"images": 2, "sha256": KNOWN}


def _rename(folder):
    (folder / "train" / "n01440764").rename(folder / "train" / "n99")
    (folder / "val" / "n01440764").rename(folder / "val" / "n99")


def _remove(folder):
    next((folder / "train" / "n01440764").iterdir()).unlink()


def _replace(folder):
    image = sorted((folder / "val" / "n01440764").iterdir())[0]
    image.write_bytes(image.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_rename, "class 0 was 'n01440764', now 'n01443537'; the train split has as many"),
        (_remove, "the train split had 9 images, now 8"),
        (_replace, "the test split has as many images (3), but not the same"),
    ],
)
def test_changed_image_files(tmp_path, change, said):
    before = fingerprint(load("imagenet", tmp_path))
    change(tmp_path / "data")
    assert said in difference(before, fingerprint(load("imagenet", tmp_path)))


def test_changed_values_labels_and_classes():
    digits = data.load("digits")
    before = fingerprint(digits)
    images, labels = digits.train.images.clone(), digits.train.labels.clone()
    images[700, 0, 4, 4] += 1
    labels[700] = (labels[700] + 1) % 10
    for train in (Split(images, digits.train.labels), Split(digits.train.images, labels)):
        now = fingerprint(replace(digits, train=train))
        assert difference(before, now) == "the train split has as many images (1,437), but not the same"
    assert difference(before, fingerprint(replace(digits, classes=(*digits.classes, "ten")))) == (
        "there were 10 classes, now 11"
    )


def test_changed_recordings(tmp_path):
    before = fingerprint(load("dvs-cifar10", tmp_path))
    path = tmp_path / "data" / "bird" / "cifar10_bird_0.aedat"
    path.write_bytes(path.read_bytes()[:-8])
    now = fingerprint(load("dvs-cifar10", tmp_path))
    assert "the train split has as many images (10), but not the same" in difference(before, now)


def test_a_missing_file_is_named(tmp_path):
    loaded = load("imagenet", tmp_path)
    _remove(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"expected an image that can be read, got .*n01440764"):
        fingerprint(loaded)
