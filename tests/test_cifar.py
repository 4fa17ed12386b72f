"""CIFAR-10 and CIFAR-100 from tiny files in the published format, and what a bad one is told."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import tarfile
import urllib.error
import urllib.request

import pytest
import torch
from data_files import COUNT, NAMES, VARIANTS, cifar_files, write

from trtkern import data
from trtkern.data import cifar, files, sets


def pack(name: str, made: dict[str, bytes]) -> bytes:
    """An archive like the published one, with a file that nobody reads."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, raw in {"readme.html": b"hello", **made}.items():
            member = tarfile.TarInfo(f"{VARIANTS[name].folder}/{file}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return buffer.getvalue()


@pytest.fixture(params=list(VARIANTS))
def published(request, monkeypatch):
    """(name, files, archive): the tiny archive has the size and the checksum of the published one."""
    name = request.param
    made = cifar_files(name)
    archive = pack(name, made)
    variant = VARIANTS[name]._replace(size=len(archive), md5=hashlib.md5(archive).hexdigest())
    maker = sets.cifar(variant, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    monkeypatch.setitem(data.DATASETS, name, dataclasses.replace(data.DATASETS[name], make=maker))
    return name, made, archive


@pytest.mark.parametrize("inner", [False, True], ids=["there", "in-its-folder"])
@pytest.mark.parametrize("name", VARIANTS)
def test_unpacked_files_are_read(tmp_path, name, inner):
    variant, made = VARIANTS[name], cifar_files(name)
    write(tmp_path / variant.folder if inner else tmp_path, made)
    dataset = data.load(name, str(tmp_path))
    count = COUNT * len(variant.train)
    assert dataset.name == name and dataset.classes == NAMES[name] and dataset.shape == (3, 32, 32)
    assert dataset.train.images.shape == (count, 3, 32, 32) and dataset.train.images.dtype == torch.uint8
    assert dataset.test.images.shape == (COUNT, 3, 32, 32) and dataset.test.labels.dtype == torch.int64
    assert dataset.train.labels.tolist() == [i % variant.labels[-1] for i in range(count)]
    assert dataset.test.labels.tolist() == [(count + i) % variant.labels[-1] for i in range(COUNT)]
    size, skip = cifar.PIXELS + len(variant.labels), len(variant.labels)
    for split, names in ((dataset.train, variant.train), (dataset.test, (variant.test,))):
        raw = b"".join(made[file] for file in names)
        for index, image in enumerate(split.images):
            red, green, blue = (raw[index * size + skip + plane * 1024 :][:1024] for plane in range(3))
            assert image.numpy().tobytes() == red + green + blue
            assert int(image[1, 2, 5]) == green[2 * 32 + 5]
    assert dataset.shared() == []


def test_mean_and_std_are_the_published_ones_in_raw_units(tmp_path):
    for name, mean, std in (("cifar10", 0.4914, 0.2023), ("cifar100", 0.5071, 0.2675)):
        dataset = data.load(name, str(write(tmp_path / name, cifar_files(name))))
        assert isinstance(dataset.mean, tuple) and isinstance(dataset.std, tuple)
        images = dataset.train.images
        red = (images[:, 0] / 255 - mean) / std
        torch.testing.assert_close(dataset.normalise(images)[:, 0], red, rtol=0, atol=1e-5)


def test_a_test_image_in_the_train_split_is_found(tmp_path):
    made = cifar_files("cifar10")
    made["test_batch.bin"] = made["test_batch.bin"][:-3073] + made["data_batch_2.bin"][:3073]
    assert data.load("cifar10", str(write(tmp_path, made))).shared() == [(COUNT, COUNT - 1)]


def test_the_archive_is_checked_and_read_in_place(tmp_path, published):
    name, made, archive = published
    write(tmp_path / "packed", {VARIANTS[name].archive: archive})
    dataset = data.load(name, str(tmp_path / "packed"))
    other = data.load(name, str(write(tmp_path / "plain", made)))
    for split, same in ((dataset.train, other.train), (dataset.test, other.test)):
        assert torch.equal(split.images, same.images) and torch.equal(split.labels, same.labels)
    assert dataset.classes == other.classes
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [VARIANTS[name].archive]


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda raw: raw[:-1],
            r"expected the archive of CIFAR-100? of ([\d,]+) bytes with MD5 .*, got [\d,]+ bytes in",
        ),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), r"with MD5 ([0-9a-f]{32}), got MD5 (?!\1)[0-9a-f]{32} in"),
        (lambda raw: b"", "got 0 bytes in .* delete it and add --download"),
    ],
    ids=["truncated", "one-bit", "empty"],
)
def test_another_archive_is_refused(tmp_path, published, damage, message):
    name, _, archive = published
    write(tmp_path, {VARIANTS[name].archive: damage(archive)})
    with pytest.raises(ValueError, match=message) as error:
        data.load(name, str(tmp_path))
    assert str(tmp_path / VARIANTS[name].archive) in str(error.value)


def test_a_file_that_is_there_twice_is_named(tmp_path):
    content = cifar_files("cifar10")
    content["data_batch_4.bin"] = content["test_batch.bin"]
    with pytest.raises(ValueError, match=r"got the same in data_batch_4\.bin and test_batch\.bin of "):
        data.load("cifar10", str(write(tmp_path, content)))


def label(raw: bytes, record: int, column: int, value: int, size: int) -> bytes:
    changed = bytearray(raw)
    changed[record * size + column] = value
    return bytes(changed)


@pytest.mark.parametrize(
    "name, file, damage, message",
    [
        ("cifar10", "data_batch_3.bin", lambda raw: raw[:-1], r"records of 3,073 .*12,291 bytes \(3 records and 3,072"),
        ("cifar10", "test_batch.bin", lambda raw: raw + b"x", r"got 12,293 bytes \(4 records and 1 bytes\)"),
        ("cifar10", "test_batch.bin", lambda raw: b"", "got 0 bytes"),
        ("cifar100", "train.bin", lambda raw: raw[:-3073], r"records of 3,074 bytes \(2 of labels, 3,072 of pixels\)"),
        (
            "cifar10", "data_batch_5.bin", lambda raw: label(raw, 2, 0, 10, 3073),
            r"expected labels of 0\.\.9, got 10 in record 2 \(byte 6,146\)",
        ),
        ("cifar100", "test.bin", lambda raw: label(raw, 1, 1, 100, 3074), r"0\.\.99, got 100 in record 1 \(byte 3,0"),
        ("cifar100", "test.bin", lambda raw: label(raw, 0, 0, 20, 3074), r"0\.\.19, got 20 in record 0 \(byte 0\)"),
        ("cifar10", "batches.meta.txt", lambda raw: raw[:29], "expected 10 different class names, one a line, got 4 l"),
        ("cifar10", "batches.meta.txt", lambda raw: raw.replace(b"ship", b"frog"), "got 10 lines, 9 different"),
        ("cifar100", "fine_label_names.txt", lambda raw: b"", "expected 100 different class names, .*got 0 lines"),
    ],
)  # fmt: skip
def test_damaged_file_is_named(tmp_path, name, file, damage, message):
    made = cifar_files(name)
    made[file] = damage(made[file])
    with pytest.raises(ValueError, match=message) as error:
        data.load(name, str(write(tmp_path, made)))
    assert str(tmp_path / file) in str(error.value)


def test_missing_files_are_named_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("went to the network unasked"))
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary\.tar\.gz \(170,052,171 bytes\) in") as error:
        data.load("cifar10", str(tmp_path))
    assert "add --download" in str(error.value) and str(tmp_path) in str(error.value)
    made = cifar_files("cifar10")
    del made["data_batch_4.bin"]
    write(tmp_path / "cifar-10-batches-bin", made)
    with pytest.raises(FileNotFoundError, match=r"got no data_batch_4\.bin \(30,730,000 bytes\) in .*batches-bin;"):
        data.load("cifar10", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"train\.bin \(153,700,000 bytes\), test\.bin \(30,740,000 bytes\)"):
        data.load("cifar100", str(tmp_path))
    with pytest.raises(ValueError, match=r"expected --data-dir DIR with cifar100, got none; .*cifar-100-binary"):
        data.load("cifar100", download=True)


class Answer(io.BytesIO):
    """A server's answer; ``length`` is what it still owes, as in http.client."""

    length = 0


@pytest.fixture
def served(published, monkeypatch):
    """(name, archive, asked): a server of the archive; a list of the URLs that were asked for."""
    name, _, archive = published
    asked: list[str] = []

    def urlopen(url, timeout):
        asked.append(url)
        return Answer(archive)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return name, archive, asked


def test_download_fetches_the_archive_once(tmp_path, served):
    name, archive, asked = served
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert data.load(name, str(folder), download=True).test.labels.numel() == COUNT
    assert asked == [f"https://www.cs.toronto.edu/~kriz/{VARIANTS[name].archive}"]
    assert [path.name for path in folder.iterdir()] == [VARIANTS[name].archive]
    assert (folder / VARIANTS[name].archive).read_bytes() == archive


def test_download_leaves_unpacked_files_alone(tmp_path, served):
    name, _, asked = served
    data.load(name, str(write(tmp_path, cifar_files(name))), download=True)
    assert asked == []


@pytest.mark.parametrize("change", [lambda raw: raw[:-9], lambda raw: raw + b"x" * 99, lambda raw: b"<html>"])
def test_download_of_something_else_keeps_nothing(tmp_path, served, monkeypatch, change):
    name, archive, _ = served
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(change(archive)))
    with pytest.raises(ValueError, match=r"expected cifar-100?-binary\.tar\.gz with MD5 .*, got MD5 .* from https"):
        data.load(name, str(tmp_path), download=True)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_starts_anew(tmp_path, served, monkeypatch):
    name, archive, _ = served

    def broken(url, timeout):
        answer = Answer(archive[:100])
        answer.length = 50
        return answer

    server = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", broken)
    with pytest.raises(OSError, match=r"could not download .*broke off 50 bytes before the end\); put the file into"):
        data.load(name, str(tmp_path), download=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f"{VARIANTS[name].archive}.part").write_bytes(b"what a killed process left")
    monkeypatch.setattr(urllib.request, "urlopen", server)
    assert data.load(name, str(tmp_path), download=True).test.labels.numel() == COUNT
    assert len(list(tmp_path.iterdir())) == 1


def test_the_next_server_is_tried(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        if "first" in url:
            raise urllib.error.URLError("no route")
        return Answer(b"whole")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    target = tmp_path / "file"
    files.fetch(target, ["https://first/", "https://second/"], "5", lambda path: str(path.stat().st_size), limit=9)
    assert target.read_bytes() == b"whole"
    with pytest.raises(OSError, match=re.escape("(https://first/: no route)")):
        files.fetch(tmp_path / "other", ["https://first/"], "5", str, limit=9)


def test_no_more_is_read_than_the_limit(tmp_path, monkeypatch):
    answer = Answer(b"x" * 100)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: answer)
    with pytest.raises(ValueError, match=r"expected file with 5, got 9 \(9 bytes\) from https://one/; try again"):
        files.fetch(tmp_path / "file", ["https://one/"], "5", lambda path: str(path.stat().st_size), limit=9)


def test_published_names_sizes_and_checksums_have_their_form():
    for variant in VARIANTS.values():
        assert re.fullmatch(r"[0-9a-f]{32}", variant.md5) and variant.archive.endswith("-binary.tar.gz")
        assert len(set(variant.files)) == len(variant.files)
