"""Data sets: what is shipped, what is read from files, and what a bad file is told."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import io
import re
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import data_files
import numpy as np
import pytest
import torch
from data_files import fashion_files, pack_idx, write

from trtkern import data
from trtkern.data import Dataset, Split, digits, idx, neuromorphic


def test_digits_are_the_whole_uci_test_set():
    images, labels, test_images, test_labels = digits.load()
    every, labelled = torch.cat([images, test_images]), torch.cat([labels, test_labels])
    assert every.shape == (1797, 8, 8) and every.dtype == torch.uint8
    assert (int(every.min()), int(every.max()), int(every.long().sum())) == (0, 16, 561718)
    assert torch.bincount(labelled).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # Distinct images: none is in both splits.
    assert len({image.numpy().tobytes() for image in every}) == 1797


def test_digits_split_is_stratified_and_always_the_same():
    first, second = digits.load(), digits.load()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, labels, _, test_labels = first
    assert (labels.numel(), test_labels.numel()) == (1437, 360)
    share = torch.bincount(test_labels) / torch.bincount(torch.cat([labels, test_labels]))
    assert (share - 0.2).abs().max() < 1 / 174


def test_digits_attribution_is_shipped():
    text = digits.PATH.with_name("digits.txt").read_text()
    assert "CC BY 4.0" in text and "Alpaydin" in text and digits.PATH.name in text


def test_digits_data_set_is_normalised():
    dataset = data.load("digits")
    assert dataset.shape == (1, 8, 8) and dataset.train.labels.dtype == torch.int64
    values = dataset.normalise(dataset.train.images)
    assert values.dtype == torch.float32
    assert abs(float(values.mean())) < 0.02 and abs(float(values.std()) - 1) < 0.02


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_files_are_read(tmp_path, packed):
    content = fashion_files()
    dataset = data.load("fashion-mnist", str(write(tmp_path, content, packed)))
    assert dataset.train.images.shape == (12, 1, 28, 28) and dataset.test.images.shape == (7, 1, 28, 28)
    assert bytes(dataset.train.images.numpy().tobytes()) == content["train-images-idx3-ubyte"][16:]
    assert dataset.test.labels.tolist() == list(range(7))


def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "DEBIAN_DIR", write(tmp_path, fashion_files(), packed=True))
    assert data.load("fashion-mnist").train.labels.numel() == 12


def test_missing_file_is_named_with_its_size_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("went to the network unasked"))
    content = fashion_files()
    del content["t10k-labels-idx1-ubyte"]
    with pytest.raises(
        FileNotFoundError, match=r"t10k-labels-idx1-ubyte\[\.gz\] \(10,008 bytes unpacked\); check"
    ) as e:
        data.load("fashion-mnist", str(write(tmp_path, content)))
    assert "train-images" not in str(e.value) and str(tmp_path) in str(e.value)


IMAGES = "t10k-images-idx3-ubyte"
WHOLE = 16 + 7 * 28 * 28


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[:-100], rf"expected {WHOLE:,} bytes \(7 x 28 x 28 .*got {WHOLE - 100:,} in"),
        (lambda raw: raw + b"x", rf"expected {WHOLE:,} bytes .*got more in"),
        (lambda raw: raw[:9], "expected an IDX header of 16 bytes, got 9 bytes"),
        (lambda raw: b"", "expected an IDX header of 16 bytes, got 0 bytes"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "expected the magic number 0x00000803 .*got 0x00000801"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], r"expected [\d,]+ bytes \(4294967295 x .*got"),
    ],
    ids=["truncated", "longer", "short-header", "empty", "wrong-magic", "damaged-header"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_damaged_file_is_named(tmp_path, packed, damage, message):
    content = fashion_files()
    content[IMAGES] = damage(content[IMAGES])
    with pytest.raises(ValueError, match=message) as error:
        data.load("fashion-mnist", str(write(tmp_path, content, packed)))
    assert str(tmp_path / IMAGES) in str(error.value)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-50], lambda raw: b"not gzip at all", lambda raw: b""])
def test_damaged_gzip_stream_is_named(tmp_path, damage):
    write(tmp_path, fashion_files(), packed=True)
    file = tmp_path / f"{IMAGES}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        data.load("fashion-mnist", str(tmp_path))


def test_labels_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train split: expected labels of 0\.\.9, got 11 for image 11.*files in"):
        data.load("fashion-mnist", str(write(tmp_path, fashion_files(classes=12))))
    images = torch.zeros(3, 1, 2, 2)
    good = Split(images, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"test split: expected labels of 0\.\.1, got -1 for image 2"):
        Dataset("x", good, Split(images, torch.tensor([0, 1, -1])), ("a", "b"), 0.0, 1.0)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("train-labels-idx1-ubyte", [5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5]),
        ("t10k-labels-idx1-ubyte", [7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6]),
    ],
)
def test_mnist_is_not_taken_for_fashion_mnist(tmp_path, name, labels, packed):
    """Its files have the same names and sizes; these are the first labels of the published ones."""
    content = {**fashion_files(test=12), name: pack_idx(np.array(labels, np.uint8))}
    with pytest.raises(ValueError, match=rf"expected Fashion-MNIST, got MNIST's digits, .* in .*{name}"):
        data.load("fashion-mnist", str(write(tmp_path, content, packed)))


@pytest.mark.parametrize("index", range(4))
def test_files_of_the_published_size_must_be_the_published_ones(tmp_path, monkeypatch, index):
    """Other data sets, such as KMNIST, come in files of these names and sizes."""
    content = fashion_files()
    tiny = [
        file._replace(size=len(content[file.name]), sha256=hashlib.sha256(content[file.name]).hexdigest())
        for file in idx.FILES
    ]
    monkeypatch.setattr(idx, "FILES", tuple(tiny))
    assert len(data.load("fashion-mnist", str(write(tmp_path, content))).train.labels) == 12
    name = tiny[index].name
    changed = bytearray(content[name])
    changed[-1] ^= 1
    (tmp_path / name).write_bytes(changed)
    with pytest.raises(ValueError, match=rf"expected Fashion-MNIST's {name} with SHA-256 .* in .*{name}; is it of ano"):
        data.load("fashion-mnist", str(tmp_path))
    write(tmp_path, fashion_files(train=11, test=6))  # other sizes: a part of the data
    assert len(data.load("fashion-mnist", str(tmp_path)).train.labels) == 11


def test_test_images_are_not_those_of_training(tmp_path):
    content = fashion_files()
    content = {name: content[name.replace("t10k", "train")] for name in content}
    with pytest.raises(ValueError, match=r"expected other images in .*t10k-images-idx3-ubyte than in .*train-images"):
        data.load("fashion-mnist", str(write(tmp_path, content)))


def test_counts_and_shapes_must_agree(tmp_path):
    content = fashion_files()
    content["train-labels-idx1-ubyte"] = pack_idx(np.zeros(11, np.uint8))
    with pytest.raises(ValueError, match="train split: expected 12 int64 labels, one an image, got"):
        data.load("fashion-mnist", str(write(tmp_path, content)))
    content = {**fashion_files(), IMAGES: pack_idx(np.zeros((7, 9, 9), np.uint8))}
    with pytest.raises(
        ValueError, match=r"test split: expected images \[N, C, H, W\] or .* as in the train split, got"
    ):
        data.load("fashion-mnist", str(write(tmp_path, content)))


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist", "dvs-gesture", "n-mnist"])
def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    """Root may read everything, so opening is what is refused here."""
    if name in neuromorphic.NAMES and None in map(find_spec, ("tonic", "safetensors")):
        pytest.skip("what reads events is not installed")
    data_files.make(name, tmp_path / "data")
    refused = {"cifar10": "test_batch.bin", "fashion-mnist": "t10k-labels-idx1-ubyte.gz", "n-mnist": "00021.bin",
               "dvs-gesture": "trials_to_test.txt"}[name]  # fmt: skip
    whole = builtins.open

    def refuse(path, *args, **more):
        if str(path).endswith(refused):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, *args, **more)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises((OSError, ValueError), match=rf"^data: expected .*{refused} \(.*Permission denied") as caught:
        data.load(name, str(tmp_path / "data"), timesteps=2, cache=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def served(monkeypatch):
    """A server of the tiny files, whose checksums are known; yields the URLs that were asked for."""
    content = fashion_files()
    files = tuple(
        file._replace(size=len(content[file.name]), sha256=hashlib.sha256(content[file.name]).hexdigest())
        for file in idx.FILES
    )
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(gzip.compress(content[url.rsplit("/", 1)[1].removesuffix(".gz")]))

    monkeypatch.setattr(idx, "FILES", files)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return content, asked


def test_download_fetches_what_is_missing(tmp_path, served):
    content, asked = served
    write(tmp_path, {IMAGES: content[IMAGES]})
    assert data.load("fashion-mnist", str(tmp_path), download=True).train.labels.numel() == 12
    assert len(asked) == 3 and not any(IMAGES in url for url in asked)
    assert not list(tmp_path.glob("*.part"))
    data.load("fashion-mnist", str(tmp_path), download=True)
    assert len(asked) == 3


def test_download_with_the_wrong_checksum_keeps_nothing(tmp_path, served):
    content, _ = served
    content["train-images-idx3-ubyte"] = content["train-images-idx3-ubyte"][:-1] + b"\0"
    with pytest.raises(
        ValueError, match=r"expected train-images-idx3-ubyte\.gz with SHA-256 .*got SHA-256 .* from http"
    ):
        data.load("fashion-mnist", str(tmp_path), download=True)
    assert list(tmp_path.iterdir()) == []


def test_download_without_a_server_says_so(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(OSError, match=r"could not download train-images-idx3-ubyte\.gz .*no route.*by hand"):
        data.load("fashion-mnist", str(tmp_path), download=True)
    with pytest.raises(ValueError, match="expected --data-dir DIR with --download"):
        data.load("fashion-mnist", download=True)


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of digits, fashion-mnist, cifar10, cifar100, .*, got 'cifar'"):
        data.load("cifar")


def test_normalise_is_per_channel_where_mean_and_std_are():
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.zeros(5, dtype=torch.int64))
    mean, std = (10.0, 20.0, 30.0), (1.0, 2.0, 4.0)
    dataset = Dataset("x", split, split, ("a",), mean, std)
    values = dataset.to(torch.device("cpu")).normalise(images)
    assert values.dtype == torch.float32
    for channel in range(3):
        assert torch.equal(values[:, channel], (images[:, channel].float() - mean[channel]) / std[channel])
    frames = images.expand(2, *images.shape)  # [T, B, C, H, W]
    assert torch.equal(dataset.normalise(frames), values.expand(2, *values.shape))
    one = Dataset("x", split, split, ("a",), 10.0, 4.0)
    assert torch.equal(one.normalise(images), (images.float() - 10.0) / 4.0)


@pytest.mark.parametrize(
    "mean, std, message",
    [
        ((1.0, 2.0), 1.0, r"data: x: expected mean as a finite number, or a tuple of 3, .*got \(1.0, 2.0\)"),
        (0.0, (1.0, 0.0, 1.0), "expected std as a finite number above 0"),
        (0.0, -1.0, "got -1.0"),
        (float("nan"), 1.0, "got nan"),
    ],
)
def test_mean_and_std_must_fit(mean, std, message):
    split = Split(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        Dataset("x", split, split, ("a",), mean, std)


def test_shared_images_are_found():
    images = torch.arange(2 * 6 * 4, dtype=torch.uint8).view(12, 1, 2, 2)
    labels = torch.zeros(6, dtype=torch.int64)
    train, test = Split(images[:6], labels), Split(images[6:].clone(), labels)
    assert Dataset("x", train, test, ("a",), 0.0, 1.0).shared() == []
    test.images[2], test.images[5] = images[4], images[0]
    assert Dataset("x", train, test, ("a",), 0.0, 1.0).shared() == [(4, 2), (0, 5)]
    half = [Split(split.images.bfloat16(), labels) for split in (train, test)]
    assert Dataset("x", *half, ("a",), 0.0, 1.0).shared() == [(4, 2), (0, 5)]
    assert data.load("digits").shared() == []


def test_the_code_of_the_guide_runs():
    page = Path(__file__).resolve().parent.parent / "docs" / "data.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert all(f"`{name}`" in page.read_text() for name in data.DATASETS)


def test_stratified_takes_the_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 4)
    mask = digits.stratified(labels, 0.2, seed=3)
    assert int(mask.sum()) == 17 and torch.bincount(labels[mask]).tolist() == [10, 6, 1]
    assert not torch.equal(mask, digits.stratified(labels, 0.2, seed=4))


def test_fewer_images_are_stratified_and_drawn_by_the_seed():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    whole = Dataset("some", Split(images, labels), Split(images, labels), ("a", "b", "c"), 0.0, 1.0)
    fewer = whole.fewer(17)
    assert torch.bincount(fewer.train.labels).tolist() == [9, 5, 3]  # of 8.5, 5.1 and 3.4
    index = fewer.train.images.flatten().long()
    assert torch.equal(labels[index], fewer.train.labels) and index.unique().numel() == 17
    assert torch.equal(whole.fewer(17).train.images, fewer.train.images) and fewer.test is whole.test
    assert not torch.equal(whole.fewer(17, seed=1).train.images, fewer.train.images)
    assert torch.equal(whole.fewer(100).train.images, images)
    for count in (2, 101):
        with pytest.raises(ValueError, match=f"expected 3 to 100 training images, got {count}"):
            whole.fewer(count)
