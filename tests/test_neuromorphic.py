"""Data sets of events from tiny files in the published formats, and what bad ones are told."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec

import event_files
import numpy as np
import pytest
import torch
from event_files import SIZES

from trtkern.data import neuromorphic, recordings

for needed in ("aedat", "h5py", "safetensors", "PIL"):
    pytest.importorskip(needed)
if find_spec("tonic") is None:
    pytest.skip("tonic is not installed", allow_module_level=True)

LAYOUTS = [(name, "publisher") for name in neuromorphic.NAMES] + [("dvs-cifar10", "tonic"), ("dvs-gesture", "tonic")]
STEPS = 3


def expected(name: str, rows: np.ndarray, steps: int) -> torch.Tensor:
    """Frames by loops over events; then torch's float64 resize where the set is resized."""
    frames = torch.zeros(steps, *SIZES[name], dtype=torch.float64)
    share = len(rows) // steps
    for index, (t, x, y, p) in enumerate(rows.tolist()):
        step = t * steps // 1_400_000 if name == "shd" else index // share
        if step >= steps and name != "dvs-cifar10":
            step = steps - 1
        if step < steps:
            frames[step, p, y, x] += 1
    if name == "dvs-cifar10":
        for step in range(steps):
            frames[step] /= max(1, frames[step].max())
    if name in ("dvs-cifar10", "n-caltech101"):
        frames = torch.nn.functional.interpolate(frames, size=(48, 48), mode="bilinear", antialias=True)
    return frames


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_frames_and_labels_are_those_of_the_files(tmp_path, name, layout):
    made = event_files.make(name, tmp_path / "data", layout=layout, per_class=1 if name == "n-caltech101" else 2)
    told = []
    arrays = neuromorphic.load(
        name, str(tmp_path / "data"), timesteps=STEPS, cache=str(tmp_path / "c"), progress=lambda *row: told.append(row)
    )
    for split, samples, images, labels in (
        ("train", made.train, arrays.train_images, arrays.train_labels),
        ("test", made.test, arrays.test_images, arrays.test_labels),
    ):
        assert labels.tolist() == [label for label, _ in samples] and labels.dtype == torch.int64
        wanted = torch.stack([expected(name, rows, STEPS) for _, rows in samples])
        assert images.shape == wanted.shape
        if images.dtype == torch.float16:
            assert ((images.double() - wanted).abs() <= wanted * 2**-11 + 1e-6).all()
        else:
            assert images.dtype == torch.uint8 and torch.equal(images.double(), wanted)
        assert [row for row in told if row[0] == f"{name} {split}"] == [
            (f"{name} {split}", index + 1, len(samples)) for index in range(len(samples))
        ]
    assert (arrays.mean, arrays.std) == (0, 1) and max(arrays.train_labels) < len(arrays.classes)
    rows = [{image.numpy().tobytes() for image in images} for images in (arrays.train_images, arrays.test_images)]
    assert not rows[0] & rows[1]


def test_classes(tmp_path):
    counts = {"dvs-cifar10": 10, "n-caltech101": 101, "n-mnist": 10, "dvs-gesture": 11, "shd": 20}
    for name, count in counts.items():
        event_files.make(name, tmp_path / name, per_class=2)
        classes = neuromorphic.KINDS[name].find(tmp_path / name).classes
        assert len(set(classes)) == count
    assert neuromorphic.KINDS["n-caltech101"].find(tmp_path / "n-caltech101").classes[0] == "BACKGROUND_Google"
    assert tuple(counts) == neuromorphic.NAMES


@pytest.mark.parametrize(
    ("name", "count", "train"), [("dvs-cifar10", 1000, 900), ("dvs-cifar10", 20, 18), ("n-caltech101", 31, 28)]
)
def test_splits_are_by_number(tmp_path, name, count, train):
    event_files.make(name, tmp_path)
    source = neuromorphic.KINDS[name].find(tmp_path)
    place = source.split()[0][0].path.parent
    for path in place.iterdir():
        path.unlink()
    for index in np.random.default_rng(0).permutation(count):
        (place / f"cifar10_airplane_{index}{source.layout}").touch()
    parts = neuromorphic.KINDS[name].find(tmp_path).split()
    first, second = ([recording.path for recording in part if recording.path.parent == place] for part in parts)
    numbers = [[int(path.stem.rpartition("_")[2]) for path in part] for part in (first, second)]
    assert numbers == [list(range(train)), list(range(train, count))]


def published(file: bytes, steps: int) -> np.ndarray:
    """A port of the published conversion (its polarity is +1 or -1) and loader: frames [T, 48, 48, 2] of 0..255."""
    from PIL import Image

    while file.startswith(b"#"):
        file = file[file.index(b"\n") + 1 :]
    address = np.frombuffer(file, ">u4")[::2].astype(np.int64)
    pol, x, y = 1 - 2 * (address % 2), 127 - address // 2 % 128, address // 256 % 128
    frames, share = np.zeros((steps, 2, 128, 128)), len(address) // steps
    for step in range(steps):
        chosen = slice(step * share, (step + 1) * share)
        frames[step, pol[chosen], x[chosen], y[chosen]] += 1
        frames[step] /= frames[step].max()
    pictures = [
        Image.merge("LA", [Image.fromarray((255 * plane).astype(np.uint8)) for plane in pair]) for pair in frames
    ]
    return np.stack([np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR)) for picture in pictures])


@pytest.mark.parametrize("count", [57, 4000])
def test_the_paper_feeds_what_its_code_makes(tmp_path, count):
    event_files.make("dvs-cifar10", tmp_path / "data", count=count)
    load = lambda resize: neuromorphic.load(  # noqa: E731
        "dvs-cifar10", str(tmp_path / "data"), timesteps=STEPS, resize=resize, cache=str(tmp_path / "c")
    )
    paper, usual = load("paper"), load("bilinear")
    assert paper.train_images.dtype == torch.uint8 and (paper.mean, paper.std) == (0, 255)
    for split, images in (("train", paper.train_images), ("test", paper.test_images)):
        recordings = neuromorphic.KINDS["dvs-cifar10"].find(tmp_path / "data").split()[split == "test"]
        for image, recording in zip(images, recordings, strict=True):
            wanted = published(recording.path.read_bytes(), STEPS)
            assert np.array_equal(image.permute(0, 2, 3, 1).numpy(), wanted) and wanted.any()
    assert not paper.train_images[:, :, 0].any()
    assert usual.train_images.dtype == torch.float16 and usual.train_images[:, :, 0].any()


def test_a_hit_reads_no_source(tmp_path, monkeypatch):
    event_files.make("n-mnist", tmp_path / "data")
    load = lambda **more: neuromorphic.load(  # noqa: E731
        "n-mnist", str(tmp_path / "data"), **{"timesteps": STEPS, "cache": str(tmp_path / "c")} | more
    )
    first = load()
    reads = []
    read = recordings.tonic_io().read_mnist_file
    monkeypatch.setattr(recordings.tonic_io(), "read_mnist_file", lambda *a, **k: reads.append(a) or read(*a, **k))
    again = load()
    assert not reads and all(torch.equal(one, other) for one, other in zip(first[:4], again[:4], strict=True))
    assert first[4:] == again[4:]
    load(timesteps=STEPS + 1)
    assert len(reads) == 40
    file = next((tmp_path / "data").rglob("*.bin"))
    os.utime(file, ns=(1, 1))
    load()
    assert len(reads) == 80
    for file in (tmp_path / "c").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.warns(RuntimeWarning, match="making it again"):
        assert torch.equal(load().train_images, first.train_images)
    assert len(reads) == 120


def test_the_default_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    event_files.make("shd", tmp_path / "data", per_class=1)
    neuromorphic.load("shd", str(tmp_path / "data"), timesteps=2)
    assert [path.name[:4] for path in (tmp_path / "home" / "trtkern").iterdir()] == ["shd-"]


def test_counts_above_a_byte_are_exact(tmp_path):
    made = event_files.make("n-mnist", tmp_path / "data", per_class=1, count=900)
    arrays = neuromorphic.load("n-mnist", str(tmp_path / "data"), timesteps=1, cache=str(tmp_path / "c"))
    assert arrays.train_images.dtype == torch.uint8
    path = tmp_path / "data" / "Test" / "7" / f"{18:05d}.bin"
    path.write_bytes(event_files.atis(np.repeat([[5, 1, 2, 1]], 300, axis=0)))
    arrays = neuromorphic.load("n-mnist", str(tmp_path / "data"), timesteps=1, cache=str(tmp_path / "c"))
    assert arrays.train_images.dtype == arrays.test_images.dtype == torch.int16
    assert arrays.test_images[7, 0, 1, 2, 1] == 300
    assert torch.equal(arrays.train_images[3].double(), expected("n-mnist", made.train[3][1], 1))


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@pytest.mark.parametrize("how", ["cut", "empty", "garbage"])
def test_a_damaged_file_is_named(tmp_path, name, layout, how):
    event_files.make(name, tmp_path, layout=layout)
    source = neuromorphic.KINDS[name].find(tmp_path)
    path = source.split()[0][0].path
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-3], "empty": b"", "garbage": b"no events here"}[how])
    with pytest.raises(ValueError, match=r"data: expected .*") as caught:
        neuromorphic.load(name, str(tmp_path), timesteps=STEPS, cache=str(tmp_path / "c"))
    assert str(path) in str(caught.value) and "get it again" in str(caught.value).replace("the file", "it")
    assert list((tmp_path / "c").iterdir()) == []


def test_events_beyond_the_sensor_name_their_file(tmp_path):
    event_files.make("n-mnist", tmp_path)
    path = next((tmp_path / "Train" / "3").iterdir())
    path.write_bytes(event_files.atis(np.array([[5, 1, 2, 1], [6, 34, 2, 1]])))
    with pytest.raises(ValueError, match=r"expected x of 0..33, got 34 for event 1 .*0.*\.bin"):
        neuromorphic.load("n-mnist", str(tmp_path), timesteps=1, cache=str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("name", "layout", "first", "copy", "said"),
    [
        ("dvs-cifar10", "publisher", "bird/cifar10_bird_1.aedat", "bird/cifar10_bird_1 (1).aedat", "names like c"),
        ("dvs-cifar10", "publisher", "bird/cifar10_bird_0.aedat", "bird/cifar10_bird_1_1.aedat", "names like c"),
        ("dvs-cifar10", "tonic", "bird/cifar10_bird_0.aedat4", "bird/cifar10_bird_0 - Copy.aedat4", "names like c"),
        ("dvs-cifar10", "publisher", "bird/cifar10_bird_0.aedat", "bird/cifar10_bird_00.aedat", "each number once in"),
        ("dvs-cifar10", "publisher", "bird/cifar10_bird_0.aedat", "bird/cifar10_bird_2.aedat", "the same content in"),
        ("n-mnist", "publisher", "Test/0/00021.bin", "Test/0/00021(1).bin", r"names like <number>\.bin in"),
        ("n-mnist", "publisher", "Test/0/00021.bin", "Train/0/00099.bin", "the same content in"),
        ("n-caltech101", "publisher", "Caltech101/object_001/image_0001.bin", "Caltech101/object_001/image_0001-1.bin",
         r"names like image_<number>\.bin in"),
        ("dvs-gesture", "tonic", "ibmGestureTest/user24_lab", "ibmGestureTest/user24_lab (1)", "folders like user"),
        ("dvs-gesture", "tonic", "ibmGestureTest/user24_lab", "ibmGestureTrain/user24_lab", "the same content in"),
        ("dvs-gesture", "publisher", "user24_lab.aedat", "user01_lab.aedat", "the same content in"),
        ("shd", "publisher", "shd_train.h5", "shd_test.h5", "the same content in"),
    ],
)  # fmt: skip
def test_copies_are_refused(tmp_path, name, layout, first, copy, said):
    """Names say which split a recording is of: a second unpacking would bring test samples into training."""
    event_files.make(name, tmp_path / "data", layout=layout)
    one, other = tmp_path / "data" / first, tmp_path / "data" / copy
    (shutil.copytree if one.is_dir() else shutil.copy)(one, other)
    with pytest.raises(ValueError, match=rf"data: .*{said}") as caught:
        neuromorphic.load(name, str(tmp_path / "data"), timesteps=STEPS, cache=str(tmp_path / "c"))
    assert other.name in str(caught.value) and "\n" not in str(caught.value)


BACKWARDS = [case for case in LAYOUTS if case[0] != "shd"]  # whose frames do not depend on the order


@pytest.mark.parametrize(("name", "layout"), BACKWARDS)
def test_time_that_runs_backwards_is_refused(tmp_path, monkeypatch, name, layout):
    """Events of another format, read as of this one, have times of any order."""
    draw = event_files.draw

    def turned(*args):
        rows = draw(*args)
        rows[15, 0] = rows[14, 0] - 5000
        return rows

    monkeypatch.setattr(event_files, "draw", turned)
    event_files.make(name, tmp_path / "data", layout=layout, per_class=1 if name == "n-caltech101" else 2)
    with pytest.raises(
        ValueError, match=r"order of time, .* got -?\d+ after \d+ for event 15 .* sample of .*; is this"
    ) as e:
        neuromorphic.load(name, str(tmp_path / "data"), timesteps=STEPS, cache=str(tmp_path / "c"))
    assert str(tmp_path / "data") in str(e.value)


def test_bytes_of_another_format_are_no_events(tmp_path):
    """A recording of 16,160 bytes in another format, called .bin: 3,232 events of random times."""
    event_files.make("n-mnist", tmp_path)
    path = tmp_path / "Train" / "3" / "00007.bin"
    raw = np.random.default_rng(0).integers(0, 34, 16_160).astype(np.uint8)
    path.write_bytes(raw.tobytes())
    with pytest.raises(ValueError, match=r"expected events in the order of time.* of a sample of .*00007\.bin"):
        neuromorphic.load("n-mnist", str(tmp_path), timesteps=STEPS, cache=str(tmp_path / "c"))


def test_a_burst_is_no_disorder(tmp_path):
    rows = np.array([[5000, 1, 2, 0], [4000, 3, 4, 1]])
    (tmp_path / "a.bin").write_bytes(event_files.atis(rows))
    (got,) = recordings.atis(recordings.Recording(tmp_path / "a.bin", (0,)))
    assert got.t.tolist() == [5000, 4000]


@pytest.mark.parametrize("file", ["trials_to_train.txt", "user01_lab_labels.csv"])
def test_lists_that_are_no_text_are_named(tmp_path, file):
    event_files.make("dvs-gesture", tmp_path)
    (tmp_path / file).write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match=rf"expected a text file in UTF-8, got other bytes in .*{file}"):
        neuromorphic.load("dvs-gesture", str(tmp_path), timesteps=STEPS, cache=str(tmp_path / "c"))


def test_a_folder_that_is_named_like_a_file(tmp_path):
    event_files.make("n-mnist", tmp_path)
    (tmp_path / "Train" / "3" / "00099.bin").mkdir()
    with pytest.raises(ValueError, match=r"expected files \*\.bin in .*3, got 00099\.bin, which is none"):
        neuromorphic.load("n-mnist", str(tmp_path), timesteps=STEPS, cache=str(tmp_path / "c"))


@pytest.mark.parametrize("name", neuromorphic.NAMES)
def test_an_empty_folder_is_told_what_and_where_from(tmp_path, name):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"expected .* in .*; check --data-dir\. .*https://") as caught:
            neuromorphic.load(name, str(folder), timesteps=1, cache=str(tmp_path / "c"))
        assert str(folder) in str(caught.value) and ("which is no folder" in str(caught.value)) == (folder != tmp_path)


def test_a_missing_class_is_no_smaller_set(tmp_path):
    for name, gone in (("dvs-cifar10", "frog"), ("n-caltech101", "Caltech101/object_007"), ("n-mnist", "Test/4")):
        event_files.make(name, tmp_path / name)
        (tmp_path / name / gone).rename(tmp_path / f"{name}-gone")
        with pytest.raises(FileNotFoundError, match="100 such folders" if name == "n-caltech101" else "no such files"):
            neuromorphic.KINDS[name].find(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("trials_to_test.txt", "user01_lab.aedat\n", "expected different recordings .* user01_lab.aedat in both"),
        ("trials_to_test.txt", "user24_lab.aedat\n" * 2, "each recording once in .*test.txt, got user24_lab.aedat 2 t"),
        ("trials_to_test.txt", "user29_lab.aedat\n", "user29_lab.aedat, as a list in .* no such file"),
        ("trials_to_test.txt", "\n", "test split of 1 sample or more"),
        ("user01_lab_labels.csv", "class,startTime_usec,endTime_usec\n12,0,5\n", "class 1..11"),
        ("user01_lab_labels.csv", "class,startTime_usec,endTime_usec\n1,5,5\n", "class 1..11"),
        ("user01_lab_labels.csv", "class,startTime_usec,endTime_usec\n1,nan,5\n", "class 1..11"),
        ("user01_lab_labels.csv", "", "class 1..11"),
        ("user01_lab_labels.csv", "class,startTime_usec,endTime_usec\n1,0,5\n", "expected events, got none"),
    ],
)
def test_lists_and_labels_of_gestures_are_checked(tmp_path, file, text, message):
    event_files.make("dvs-gesture", tmp_path, per_class=1)
    (tmp_path / file).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        neuromorphic.load("dvs-gesture", str(tmp_path), timesteps=1, cache=str(tmp_path / "c"))


def test_times_and_labels_of_shd_are_checked(tmp_path):
    import h5py

    for change, message in (("nan", "finite time"), ("label", "got 20"), ("length", "for each sample")):
        event_files.make("shd", tmp_path / change, per_class=1)
        with h5py.File(tmp_path / change / "shd_test.h5", "r+") as file:
            if change == "nan":
                file["spikes/times"][3] = np.array([0.1, np.nan] + [0.2] * 55, np.float16)
            elif change == "label":
                file["labels"][2] = 20
            else:
                labels = file["labels"][:-1]
                del file["labels"]
                file["labels"] = labels
        with pytest.raises(ValueError, match=message) as caught:
            neuromorphic.load("shd", str(tmp_path / change), timesteps=1, cache=str(tmp_path / "c"))
        assert "shd_test.h5" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("mnist", {}, "expected one of dvs-cifar10, .*, got 'mnist'"),
        ("shd", {"resize": "paper"}, "shd: expected resize as one of bilinear, got 'paper'"),
        ("dvs-cifar10", {"resize": "nearest"}, "one of bilinear, paper"),
        ("shd", {"timesteps": 0}, "timesteps as a whole number of 1 or more, got 0"),
        ("shd", {"timesteps": 2.5}, "got 2.5"),
        ("shd", {"timesteps": True}, "got True"),
    ],
)
def test_arguments_are_checked(tmp_path, name, more, message):
    with pytest.raises(ValueError, match=message):
        neuromorphic.load(name, str(tmp_path), **{"timesteps": 4} | more)


def test_without_tonic_the_error_says_what_to_type(tmp_path, monkeypatch):
    event_files.make("n-mnist", tmp_path)
    monkeypatch.setitem(sys.modules, "tonic", None)
    monkeypatch.setattr(recordings, "tonic_io", recordings.tonic_io.__wrapped__)
    with pytest.raises(ImportError, match=r"expected tonic .*pip install 'trtkern\[events\]'"):
        neuromorphic.load("n-mnist", str(tmp_path), timesteps=1, cache=str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("name", "layout", "inner"),
    [
        ("dvs-cifar10", "tonic", "CIFAR10DVS"), ("n-caltech101", "publisher", "NCALTECH101"),
        ("n-mnist", "publisher", "NMNIST"), ("dvs-gesture", "publisher", "DvsGesture"),
        ("dvs-gesture", "tonic", "DVSGesture"), ("shd", "publisher", "SHD"),
    ],
)  # fmt: skip
def test_files_are_found_in_the_folder_of_the_archive(tmp_path, name, layout, inner):
    event_files.make(name, tmp_path / inner, per_class=1 if name != "dvs-cifar10" else 2, layout=layout)
    outer, there = (neuromorphic.KINDS[name].find(folder) for folder in (tmp_path, tmp_path / inner))
    assert outer.root == there.root and outer.files == there.files and outer.split() == there.split()
    assert set(outer.files) <= set(tmp_path.rglob("*")) and len(set(outer.files)) == len(outer.files)
