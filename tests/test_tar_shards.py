"""Tar shards: found by name, read where each image lies, ordered by shard and buffer; what is wrong is named."""

from __future__ import annotations

import gzip
import os
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")
import tar_files
from own_parts import BACKEND
from tar_files import CLASSES, jpeg, sample, shards, tar, whole

from trtkern import cli, data
from trtkern.data import Split, difference, fingerprint, folder, tar_images, tar_index, tar_sets, tar_shards
from trtkern.data.augment import ResizedCrop
from trtkern.training.loader import Loader

SIZE = tar_files.SIZE
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTKERN_CACHE", str(tmp_path / "cache"))


def load(place, class_list=None):
    return tar_sets.load(place, class_list, SIZE)


def as_folders(place, counts=((0, 12), (100, 106))):
    """The same images in class folders."""
    for split, (first, last) in zip(("train", "val"), counts, strict=True):
        for number in range(first, last):
            path = place / split / CLASSES[number % 3] / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number))
    return place


def test_images_and_labels_are_those_of_the_folder(tmp_path):
    """Whatever way they are stored; windows, labels, classes, and digests."""
    got, want = load(whole(tmp_path / "tar")), folder.load(as_folders(tmp_path / "dir"), None, SIZE)
    assert got.classes == want.classes == CLASSES and got.train.shape == want.train.shape == (12, 3, SIZE, SIZE)
    assert got.train_labels.tolist() == [number % 3 for number in range(12)] and got.train_labels.dtype == torch.int64
    assert got.train.name(7) == b"train-000001.tar/00007.jpg"
    assert got.train.path(11) == f"{tmp_path}/tar/train-000002.tar/00011.jpg"
    for mine, its in ((got.train, want.train), (got.test, want.test)):
        names = [mine.name(index).rpartition(b"/")[2] for index in range(len(mine))]
        places = [names.index(its.name(index).rpartition(b"/")[2]) for index in range(len(its))]
        again = mine[torch.tensor(places)]
        assert again.digests() == its.digests()
        assert [again.stored(index) for index in range(len(its))] == [its.stored(index) for index in range(len(its))]
        crop = ResizedCrop(SIZE)
        for index in range(len(its)):
            assert torch.equal(again.read(index), its.read(index))
            assert torch.equal(again.read(index, crop, index), its.read(index, crop, index))


def test_it_is_a_data_set_like_any_other(tmp_path):
    made = data.load("imagenet", str(whole(tmp_path / "tar")), size=SIZE)
    rest, held = made.hold_out(0.25)
    assert len(rest.train.images) == 9 and torch.bincount(held.labels).tolist() == [1, 1, 1] and not made.shared()
    names = {held.images.name(i) for i in range(3)} | {rest.train.images.name(i) for i in range(9)}
    assert names == {made.train.images.name(i) for i in range(12)}
    for index in range(3):
        assert int(held.images.name(index).rpartition(b"/")[2][:5]) % 3 == held.labels[index]
    before = fingerprint(made)
    shutil.copytree(tmp_path / "tar", tmp_path / "other")
    assert fingerprint(data.load("imagenet", str(tmp_path / "other"), size=SIZE)) == before
    tar(tmp_path / "other" / "train-000001.tar", [each for number in (5, 6, 9) for each in sample(number)])
    now = fingerprint(data.load("imagenet", str(tmp_path / "other"), size=SIZE))
    assert difference(before, now) == "the train split has as many images (12), but not the same"


@pytest.mark.parametrize("layout", ["names", "folders", "timm"])
def test_layouts(tmp_path, layout):
    series = {"names": ("train-", "val-"), "folders": ("train/", "validation/"),
              "timm": ("imagenet1k-train-", "imagenet1k-validation-")}[layout]  # fmt: skip
    for each, first in zip(series, (0, 100), strict=True):
        shards(tmp_path, each, (3, 3), first)
    (tmp_path / "notes.tar").write_bytes(b"no shard: it has no number")
    got = load(tmp_path)
    assert [len(part) for part in (got.train, got.test)] == [6, 6] and got.classes == ("0", "1", "2")
    assert got.test.name(0) == f"{series[1]}000000.tar/00100.jpg".encode()
    assert tar_shards.holds(tmp_path) and not tar_shards.holds(tmp_path / "nowhere")


def test_other_members_are_passed_over(tmp_path):
    """As webdataset does: the first dot decides; what is no image and no class has nothing to say."""
    others = [("README", b"x"), ("._00000.jpg", b"x"), ("00000.json", b"{}"), ("00001.seg.png", b"x")]
    last = [("./sub.d/00002.jpg", jpeg(2)), ("./sub.d/00002.cls", b"2\n")]
    members = [*others[:2], *sample(0, "JPEG"), *others[2:], *sample(1, "png"), *last]
    tar(tmp_path / "a" / "train-0.tar", members)
    found = tar_index.places(tmp_path / "a" / "train-0.tar")
    assert [place.name for place in found] == ["00000.JPEG", "00001.png", "./sub.d/00002.jpg"]
    assert [place.label for place in found] == [0, 1, 2] and [place.size for place in found] == [
        len(jpeg(number)) for number in range(3)
    ]


def test_hidden_files_are_no_shards(tmp_path):
    whole(tmp_path)
    before = tar_shards.find(tmp_path)
    for name in ("._train-000000.tar", ".train-000007.tar"):
        (tmp_path / name).write_bytes(b"what a Mac writes beside each file that it copies")
    assert tar_shards.find(tmp_path) == before
    os.mkdir(tmp_path / "none")
    (tmp_path / "none" / "._train-000000.tar").touch()
    assert not tar_shards.any_in(tmp_path / "none") and not tar_shards.holds(tmp_path / "none")


@pytest.mark.parametrize("highest", ["7", "1000000000000", "10000000000000000000", "1" + " " * 40])
@pytest.mark.parametrize("series", ["train-", "data-"])
def test_a_number_of_a_class_that_is_a_slip(highest, series, tmp_path):
    """It asks for no memory, whether or not anything names the classes."""
    members = [*sample(0), *sample(1), ("00002.jpg", jpeg(2)), ("00002.cls", highest.encode())]
    tar(tmp_path / f"{series}0.tar", members)
    tar(tmp_path / "val-0.tar", sample(3)) if series == "train-" else None
    for named in ("", "ape\nbee\ncat\n"):
        if named:
            (tmp_path / "classes.txt").write_text(named)
        with pytest.raises(
            ValueError, match=r"numbered in a row from 0, got|expected a class as a number|names 3, got"
        ):
            tar_sets.by_shard(tmp_path, size=SIZE)


def test_a_class_list_chooses_by_name(tmp_path):
    whole(tmp_path)
    (tmp_path / "list.txt").write_text("cat a pet\nape\n")
    got = load(tmp_path, tmp_path / "list.txt")
    assert got.classes == ("ape", "cat a pet")
    assert got.train_labels.tolist() == [0, 1] * 4 and int(got.train.name(1)[-9:-4]) == 2
    (tmp_path / "list.txt").write_text("dog\n")
    with pytest.raises(ValueError, match=r"classes of .*list\.txt to be among those of the shards, got dog"):
        load(tmp_path, tmp_path / "list.txt")
    (tmp_path / "classes.txt").write_text("ape\nbee\n")
    with pytest.raises(ValueError, match=r"expected classes of 0\.\.1, as .*classes\.txt names 2, got 2 in a \.cls"):
        load(tmp_path)
    (tmp_path / "classes.txt").write_text("ape\nbee\ncat\ndog\n")
    with pytest.raises(ValueError, match=r"each of the 4 classes .*, got none of dog \(class 3\) in the train split"):
        load(tmp_path)


def test_headers_are_read_once(tmp_path, monkeypatch):
    whole(tmp_path / "tar")
    read, real = [], tar_index.places
    monkeypatch.setattr(tar_index, "places", lambda path: read.append(path.name) or real(path))
    first, again = load(tmp_path / "tar"), load(tmp_path / "tar")
    assert len(read) == 5 and first.train.digests() == again.train.digests()
    os.utime(tmp_path / "tar" / "val-000001.tar", (1, 1))
    load(tmp_path / "tar")
    assert len(read) == 10  # it may be another one now
    shutil.copytree(tmp_path / "tar", tmp_path / "copy")
    found = tar_shards.find(tmp_path / "copy")
    listed = [shard for each in found.values() for shard in each]
    made = tar_index.tensors(real(tmp_path / "copy" / shard.name) for shard in listed)
    tar_index.write(tmp_path / "copy", listed, made)
    assert load(tmp_path / "copy").train.digests() == first.train.digests() and len(read) == 10
    shards(tmp_path / "copy", "train-", (5, 3, 3))
    with pytest.raises(ValueError, match=r"bytes of train-000002\.tar, as .*index\.safetensors says, got 10,240 bytes"):
        load(tmp_path / "copy")
    (tmp_path / "copy" / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"of train-000002\.tar, as .*index\.safetensors says, got no shard; copy the"):
        load(tmp_path / "copy")
    raw = bytearray((tmp_path / "copy" / tar_index.INDEX).read_bytes())
    raw[-1] ^= 1
    (tmp_path / "copy" / tar_index.INDEX).write_bytes(raw)
    with pytest.raises(ValueError, match="it is damaged; delete the index: it is made anew"):
        load(tmp_path / "copy")


def rewrite(path, change):
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw))


def second_header(raw):
    raw[512 + -(-len(jpeg(5)) // 512) * 512] ^= 255
    return raw


def without_end(raw):
    return raw[: -(-len(raw.rstrip(b"\0")) // 512) * 512]


@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: rewrite(path, lambda raw: raw[:700]), r"whole tar file, got .*1\.tar \(unexpected end of data\)"),
    (lambda path: rewrite(path, without_end), r"end of a tar file in .*000001\.tar, got no end after 00007\.cls"),
    (lambda path: rewrite(path, second_header), r"train-000001\.tar, got other bytes after 00005\.jpg"),
    (lambda path: rewrite(path, lambda raw: raw[:0]), r"whole tar file, got .*train-000001\.tar \(empty file\)"),
    (lambda path: rewrite(path, gzip.compress), r"not compressed, .* got one packed by gzip in .*train-000001\.tar"),
    (lambda path: path.rename(path.with_name("train-000001.tar.gz")), r"not compressed, .* got train-000001\.tar\.gz"),
    (lambda path: path.unlink(), r"train-000000\.tar to train-000002\.tar in .*, got no train-000001\.tar; copy it"),
    (lambda path: tar(path, sample(5)[:1]), r"its \.cls of each sample, got 00005\.jpg alone of 00005 in .*1\.tar"),
    (lambda path: tar(path, sample(5)[1:]), r"image .*, got 00005\.cls alone of 00005 in .*train-000001\.tar"),
    (lambda path: tar(path, [*sample(5), sample(5, "png")[0]]), r"got 00005\.jpg, 00005\.cls, 00005\.png alone of"),
    (lambda path: tar(path, [("5.jpg", jpeg(5)), ("5.cls", b"bee")]), r"number .* in 5\.cls of .*1\.tar, got b'bee'"),
    (lambda path: tar(path, [*sample(5), *sample(6), *sample(5)]), r"once in .*000001\.tar, got 00005\.jpg twice"),
    (lambda path: tar(path, [("a.txt", b"x")]), r"expected images .* got none in .*train-000001\.tar"),
    (lambda path: shutil.copy(path, path.with_name("train-000003.tar")), r"different shards, got the same .*1\.tar a"),
    (lambda path: shutil.copy(path, path.with_name("more-7.tar")), r"of a split, .* got more-7\.tar; name it so"),
    (lambda path: shutil.copy(path, path.with_name("train-1.tar")), r"each number once .*, got train-000001\.tar an"),
    (lambda path: [each.unlink() for each in path.parent.glob("val*")], r"shards of train and of val .* of train$"),
    (lambda path: [each.unlink() for each in path.parent.glob("*.tar")], r"expected tar shards such as .*, got none"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, damage, said):
    damage(whole(tmp_path / "tar") / "train-000001.tar")
    with pytest.raises((ValueError, OSError), match=said) as caught:
        load(tmp_path / "tar")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: rewrite(path, lambda raw: raw[:1200]), r"expected .*train-000001\.tar as it was when its index was"),
    (lambda path: path.unlink(), r"an image that can be read, got .*train-000001\.tar/00005\.jpg \(No such"),
    (lambda path: os.utime(path, (1, 1)), r"train-000001\.tar as it was .*, got it changed since"),
])  # fmt: skip
def test_what_changes_during_a_run_is_named(tmp_path, damage, said, workers):
    got = load(whole(tmp_path))
    loader = Loader(Split(got.train, got.train_labels), CPU, workers=workers)
    damage(tmp_path / "train-000001.tar")
    batches = loader.whole(5)
    assert len(next(batches)[0]) == 5
    with pytest.raises((ValueError, OSError), match=said):
        next(batches)


def test_a_damaged_image_is_named(tmp_path):
    whole(tmp_path)
    raw = bytearray((tmp_path / "train-000001.tar").read_bytes())
    start = raw.index(jpeg(6))
    raw[start + 2 : start + 200] = bytes(198)
    (tmp_path / "train-000001.tar").write_bytes(raw)
    images = load(tmp_path).train
    images.read(5)
    with pytest.raises(folder.DataError, match=r"image, got .*train-000001\.tar/00006\.jpg"):
        images.read(6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("buffer", [1, 4, 12, 100])
def test_the_order_by_hand(buffer):
    """Shards in a random order, then one sample for another out of a buffer."""
    shard = torch.tensor([2, 0, 0, 2, 0, 5, 5, 2, 0])
    got, draws = tar_images.shuffled(shard, buffer, generator()), generator()
    groups = [[1, 2, 4, 8], [0, 3, 7], [5, 6]]
    sequence = [row for place in torch.randperm(3, generator=draws) for row in groups[place]]
    held, out = sequence[:buffer], []
    coming = sequence[buffer:]
    for place, row in zip(torch.randint(len(held), (len(coming),), generator=draws).tolist(), coming, strict=True):
        out.append(held[place])
        held[place] = row
    out += [held[place] for place in torch.randperm(len(held), generator=draws)]
    assert got.tolist() == out and sorted(out) == list(range(9))
    assert not torch.equal(got, tar_images.shuffled(shard, buffer, generator(1)))


def test_reads_stay_within_few_shards(monkeypatch):
    """40 shards of 50 samples, drawn in pieces: nearly all that a batch reads lies in a few of them."""
    monkeypatch.setattr(tar_images, "PIECE", 64)
    shard = torch.arange(2000) // 50
    order = tar_images.shuffled(shard, 100, generator())
    assert order.sort().values.tolist() == list(range(2000))
    near = [len(shard[part].unique()) for part in order.split(50)]
    assert max(near) <= 12 and np.mean(near) < 8
    neighbours = (order.diff().abs() == 1).float().mean()
    assert neighbours < 0.05


def test_few_shards_are_open(tmp_path, monkeypatch):
    shards(tmp_path, "train-", [3] * 9)
    shards(tmp_path, "val-", [3], 100)
    monkeypatch.setattr(tar_images, "OPEN", 2)
    images = load(tmp_path).train
    before = len(os.listdir("/proc/self/fd"))
    for index in range(27):
        images[torch.tensor([index])].read(0)
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_own_shards_have_a_test_split_or_get_one(tmp_path, monkeypatch, capsys, one_thread, no_pictures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trtkern.commands._runs.keep_pages", lambda: False)
    shards(tmp_path / "alone", "", (10, 20))
    alone = tar_sets.by_shard(tmp_path / "alone", size=SIZE, mean=[1, 2, 3], std=4.0, buffer=3)
    assert [len(split.images) for split in (alone.train, alone.test)] == [24, 6] and alone.train.images.buffer == 3
    assert alone.mean == (1, 2, 3) and alone.std == 4.0 and alone.classes == ("0", "1", "2") and not alone.shared()
    both = tar_sets.by_shard(whole(tmp_path / "both"), size=SIZE)
    assert [len(split.images) for split in (both.train, both.test)] == [12, 6] and both.classes == CLASSES
    options = ["-T", "1", "--model", "conv", "--set", "model.layers=[2]", "--set", f"data_options.size={SIZE}"]
    options += ["--epochs", "1", "--batch-size", "4", "--select", "last", "--backend", BACKEND, "--device", "cpu"]
    assert cli.main(["train", "--data", "tar:both", "--threads", "1", *options]) == 0, capsys.readouterr().err
    assert "12 training and 6 test images" in capsys.readouterr().out
    (tmp_path / "both").rename(tmp_path / "moved")
    assert cli.main(["evaluate", "runs/both-trt-seed0"]) == 2
    assert "expected tar:DIR with tar shards, got no folder" in capsys.readouterr().err
    assert cli.main(["evaluate", "runs/both-trt-seed0", "--data-dir", "moved"]) == 0
    with pytest.raises(ValueError, match="data_options: expected one of size, mean, std, buffer, got 'bufer'; did you"):
        tar_sets.by_shard(tmp_path / "alone", bufer=3)
    with pytest.raises(ValueError, match="expected a shuffle buffer of at least 1 sample, got 0"):
        tar_sets.by_shard(tmp_path / "alone", buffer=0)
