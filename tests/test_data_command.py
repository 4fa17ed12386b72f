"""``trtkern data``: shards that the library reads, made once and gone on with; checks that name all that is broken."""

from __future__ import annotations

import json
import os
import tarfile
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")
import data_files
import tar_files
from tar_files import CLASSES, jpeg, whole

from trtkern import cli
from trtkern.data import checking, folder, tar_index, tar_sets, tar_writer
from trtkern.output.text import parsed_size

SIZE = tar_files.SIZE


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "150")


def images(place, splits=("train", "val"), count=8, classes=CLASSES):
    """Images by class, all different; ``count`` of each class and split."""
    for index in range(len(splits) * len(classes) * count):
        split, rest = divmod(index, len(classes) * count)
        path = place / splits[split] / classes[rest % len(classes)] / f"{index:04}.v{index}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(index))
    return place


def command(capsys, *arguments):
    status = cli.main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == (status != 0), captured.err
    return status, captured.out, captured.err


def content(images):
    """{digest: its label} would hide copies: (digest, label) of each image, sorted."""
    return sorted(zip(images[0].digests(), images[1].tolist(), strict=True))


def same_shards(*places):
    """The same files but for the index, whose header safetensors writes in any order."""
    found = [{path.name: path.read_bytes() for path in place.iterdir()} for place in places]
    indices = [each.pop(tar_index.INDEX) for each in found]
    return found[0] == found[1] and len(found[0]) > 1 and len(indices[0]) == len(indices[1])


def test_shards_hold_the_images_of_the_folder(tmp_path, capsys):
    images(tmp_path / "images")
    status, out, _ = command(capsys, "shard", "images", "tar", "--size", "8KiB")
    assert status == 0 and "48 images of 3 classes in " in out
    there = sorted(path.name for path in (tmp_path / "tar").iterdir())
    count = sum(name.startswith("train-") for name in there)
    assert there == sorted([
        "classes.txt", "index.safetensors", *(f"{s}-{n:06}.tar" for s in ("train", "val") for n in range(count))
    ])  # fmt: skip
    got, want = tar_sets.load(tmp_path / "tar", size=SIZE), folder.load(tmp_path / "images", None, SIZE)
    assert got.classes == want.classes == CLASSES and count >= 3
    assert content(got[:2]) == content(want[:2]) and content(got[2:4]) == content(want[2:4])
    assert not (tmp_path / "cache").exists()  # the index stands beside them
    first = torch.from_numpy(got.train.index.label)[torch.from_numpy(got.train.index.shard) == 0]
    assert len(first.unique()) == 3, "classes are spread over the shards"
    for path in (tmp_path / "tar").glob("*.tar"):
        assert path.stat().st_size <= 2 * tarfile.RECORDSIZE  # 8 KiB and an image, then its end to a whole record
    again = command(capsys, "shard", "images", "again", "--size", "8KiB")
    assert again[0] == 0
    assert same_shards(tmp_path / "tar", tmp_path / "again")
    command(capsys, "shard", "images", "other", "--size", "8KiB", "--seed", "1")
    assert (tmp_path / "other" / there[-1]).read_bytes() != (tmp_path / "tar" / there[-1]).read_bytes()


def test_a_folder_without_splits_and_names_that_are_no_words(tmp_path, capsys):
    images(tmp_path / "images", splits=("",), classes=("big cat", "#dog"))
    assert command(capsys, "shard", "images", "tar")[0] == 0
    made = tar_sets.by_shard(tmp_path / "tar", size=SIZE)
    assert made.classes == ("_dog", "big_cat") and len(made.train.images) + len(made.test.images) == 16
    assert made.train.images.name(0).startswith(b"data-000000.tar/000000")
    (tmp_path / "images" / "big_cat").mkdir()
    (tmp_path / "images" / "big_cat" / "a.jpg").write_bytes(jpeg(99))
    status, _, error = command(capsys, "shard", "images", "more")
    assert status == 2 and "class folders that differ in more than spaces, got several that are big_cat" in error


def test_a_call_that_was_interrupted_goes_on(tmp_path, capsys, monkeypatch):
    images(tmp_path / "images")
    real, made = tar_writer._shard, []

    def dying(path, *more):
        made.append(path.name)
        if len(made) == 3:
            monkeypatch.setattr(tar_writer, "_add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        real(path, *more)

    monkeypatch.setattr(tar_writer, "_shard", dying)
    status, _, error = command(capsys, "shard", "images", "tar", "--size", "8KiB")
    assert status == 130 and "stopped, as asked; the same `trtkern data shard` goes on where it was" in error
    there = {path.name for path in (tmp_path / "tar").iterdir()}
    assert there == {"train-000000.tar", "train-000001.tar", "unfinished.json"}
    status, _, error = command(capsys, "check", "tar")
    assert status == 1
    with pytest.raises(ValueError, match=r"expected whole shards in .*, got some that are still being made; the same"):
        tar_sets.load(tmp_path / "tar")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    status, _, error = command(capsys, "shard", "images", "tar", "--size", "8KiB", "--seed", "1")
    assert status == 2 and "same images, --size and --seed, with which it was begun, got others" in error
    status, out, _ = command(capsys, "shard", "images", "tar", "--size", "8KiB")
    assert status == 0 and "shards, 2 of them from before" in out
    assert command(capsys, "shard", "images", "new", "--size", "8KiB")[0] == 0
    assert same_shards(tmp_path / "tar", tmp_path / "new")
    status, _, error = command(capsys, "shard", "images", "tar", "--size", "8KiB")
    assert status == 2 and "expected a new or empty folder for the shards, got tar with classes.txt in it" in error


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path, capsys):
    webdataset = pytest.importorskip("webdataset")
    images(tmp_path / "images")
    assert command(capsys, "shard", "images", "tar", "--size", "8KiB")[0] == 0
    got = tar_sets.load(tmp_path / "tar", size=SIZE)
    paths = [str(tmp_path / "tar" / shard.name) for shard in got.train.index.shards if shard.name.startswith("train")]
    theirs = webdataset.WebDataset(paths, shardshuffle=False).to_tuple("__key__", "jpg", "cls")
    found = [(key, raw, int(label)) for key, raw, label in theirs]
    ours = [
        (os.path.splitext(os.path.basename(got.train.path(i)))[0], got.train.opened(i).read(), int(label))
        for i, label in enumerate(got.train_labels)
    ]
    assert found == ours and len(found) == 24
    (tmp_path / "theirs").mkdir()
    for split, first in (("train", 0), ("val", 100)):
        pattern = str(tmp_path / "theirs" / f"{split}-%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as sink:
            for number in range(first, first + 10):
                sink.write({"__key__": f"{number:04}", "jpg": jpeg(number), "cls": number % 3, "json": {"n": number}})
    read = tar_sets.load(tmp_path / "theirs", size=SIZE)
    assert [read.train.opened(index).read() for index in range(10)] == [jpeg(number) for number in range(10)]
    assert read.train_labels.tolist() == [number % 3 for number in range(10)] and len(read.test) == 10
    assert len({read.train.name(index).partition(b"/")[0] for index in range(10)}) == 3


def test_a_check_that_was_stopped_says_so(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, "find", stop)
    assert command(capsys, "check", ".") == (130, "", "trtkern: stopped, as asked\n")


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_that_is_broken_is_named(tmp_path, capsys, workers):
    images(tmp_path / "images", count=20)
    status, out, _ = command(capsys, "check", "images", "--workers", workers)
    assert status == 0 and out.strip() == "images: 120 images read, nothing is broken"
    broken = sorted((tmp_path / "images").glob("*/bee/*"))[5:28]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    status, out, error = command(capsys, "check", "images", "--workers", workers)
    assert status == 1 and "data check: 23 broken in images, 120 images read" in error
    assert out.count("expected a whole image, got") == 20 and "and 3 more; --json - names all of them" in out
    status, out, _ = command(capsys, "check", "images", "--workers", workers, "--json", "-")
    told = json.loads(out)
    assert status == 1 and told["read"] == {"images": 120} and len(told["broken"]) == 23
    for path in broken:
        assert any(str(path.relative_to(tmp_path)) in line for line in told["broken"]), path


def test_a_folder_that_is_not_as_it_should_be_is_read_all_the_same(tmp_path, capsys):
    images(tmp_path / "images", count=2)
    for path in (tmp_path / "images" / "val" / "cat").iterdir():
        path.unlink()
    path = next((tmp_path / "images" / "val" / "ape").iterdir())
    path.write_bytes(b"<html>")
    status, out, error = command(capsys, "check", "images", "--workers", "0")
    assert status == 1 and "2 broken in images, 10 images read" in error
    assert "of class cat, got none in" in out and f"a file of another kind: {path}" in out
    status, out, error = command(capsys, "check", "images", "--data", "imagenet", "--workers", "0")
    assert status == 1 and "2 broken in images, 10 images read" in error


def test_broken_shards(tmp_path, capsys):
    whole(tmp_path / "tar")
    status, out, _ = command(capsys, "check", "tar", "--workers", "1")
    assert status == 0 and out.strip() == "tar: 18 images read, nothing is broken"
    for name, number in (("train-000000.tar", 3), ("val-000001.tar", 104)):
        raw = bytearray((tmp_path / "tar" / name).read_bytes())
        start = raw.index(jpeg(number))
        raw[start + 2 : start + 100] = bytes(98)
        (tmp_path / "tar" / name).write_bytes(raw)
    for name in ("train-000002.tar", "val-000000.tar"):
        raw = (tmp_path / "tar" / name).read_bytes()
        (tmp_path / "tar" / name).write_bytes(raw[:1000])
    status, out, error = command(capsys, "check", "tar", "--workers", "1")
    assert status == 1 and "4 broken in tar, 11 images read" in error
    for where in ("train-000000.tar/00003.jpg", "val-000001.tar/00104.jpg", "train-000002.tar (", "val-000000.tar ("):
        assert where in out, where
    (tmp_path / "tar" / "train-000001.tar").unlink()
    status, out, _ = command(capsys, "check", "tar", "--workers", "1")
    assert status == 1 and "got no train-000001.tar" in out


def test_an_index_that_says_other_places(tmp_path, capsys):
    """Shards that were written anew with as many bytes: sizes do not tell."""
    images(tmp_path / "images")
    assert command(capsys, "shard", "images", "tar")[0] == 0
    path = tmp_path / "tar" / "train-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    tar_files.tar(path, members[2:] + members[:2])
    status, out, _ = command(capsys, "check", "tar", "--workers", "0")
    assert status == 1 and "index.safetensors to say where the images of the shards lie, got other places" in out
    (tmp_path / "tar" / tar_index.INDEX).unlink()
    assert command(capsys, "check", "tar", "--workers", "0")[0] == 0


def test_data_sets_by_name(tmp_path, capsys):
    data_files.make("cifar10", tmp_path / "cifar")
    status, out, _ = command(capsys, "check", "cifar", "--data", "cifar10", "--workers", "0")
    assert status == 0 and "nothing is broken" in out
    path = tmp_path / "cifar" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-7])
    status, out, _ = command(capsys, "check", "cifar", "--data", "cifar10", "--workers", "1")
    assert status == 1 and "data_batch_3.bin; get it again" in out


@pytest.mark.skipif(find_spec("tonic") is None, reason="needs tonic")
def test_recordings(tmp_path, capsys):
    data_files.make("n-mnist", tmp_path / "events")
    status, out, _ = command(capsys, "check", "events", "--data", "n-mnist", "--workers", "1")
    assert status == 0 and "40 recordings read, nothing is broken" in out
    damaged = [tmp_path / "events" / split / "3" for split in ("Train", "Test")]
    damaged = [sorted(place.iterdir())[0] for place in damaged]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-2])
    status, out, _ = command(capsys, "check", "events", "--data", "n-mnist", "--workers", "1", "--json", "-")
    assert status == 1 and len(json.loads(out)["broken"]) == 2 and all(str(path.name) in out for path in damaged)
    (tmp_path / "own" / "left").mkdir(parents=True)
    (tmp_path / "own" / "left" / "1.npz").write_bytes(b"x")
    status, out, _ = command(capsys, "check", "own", "--workers", "0")
    assert status == 1 and "expected an .npz file with the arrays" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["check", "nowhere"], "expected a folder with the files of a data set, got no folder nowhere"),
    (["check", "."], "expected images, recordings of events or tar shards in ., got none; --data NAME says which"),
    (["check", ".", "--data", "cifar"], "--data: expected one of fashion-mnist, cifar10, "),
    (["check", ".", "--workers", "-1"], "--workers: expected an integer of at least 0, got -1"),
    (["chek", "."], "trtkern data: expected one of shard, check, got 'chek'; did you mean 'check'?"),
    (["shard", "nowhere", "tar"], "expected nowhere with a folder of images for each class, got no such folder"),
    (["shard", ".", "tar", "--size", "big"], "--size: expected a size such as 256MiB or 1GiB, got 'big'"),
    (["shard", ".", "tar", "--sise", "1"], "trtkern data shard: expected one of --size, --seed, --class-list, --help"),
])  # fmt: skip
def test_user_errors(tmp_path, capsys, arguments, message):
    status, _, error = command(capsys, *arguments)
    assert status == 2 and message in error


def test_sizes():
    sizes = {"512": 512, "512B": 512, "1KB": 1000, "1.5 KiB": 1536, "2MiB": 2 << 20, "1G": 10**9}
    assert {text: parsed_size(text, "--memory") for text in sizes} == sizes
    for text in ("", "-1", "1kb", "1iB", "MiB", "1 GiB more"):
        with pytest.raises(ValueError, match="--memory: expected a size such as"):
            parsed_size(text, "--memory")
