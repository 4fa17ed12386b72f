"""Where the files of the data sets of events lie, which are of the train split, and what is missing.

Each function takes a folder and knows two layouts: the publisher's archives unpacked, and tonic's where it differs.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from trtkern.data import files, recordings
from trtkern.data.events import Events
from trtkern.data.recordings import Recording

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GESTURES = (
    "hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter clockwise",
    "left arm clockwise", "left arm counter clockwise", "arm roll", "air drums", "air guitar", "other gestures",
)  # fmt: skip
PERSON = r"user\d+_[a-z_]+"
"""The folder of a recording of gestures in tonic's layout: a person and a light."""
SPOKEN = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "null", "eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun",
)  # fmt: skip
CALTECH_CLASSES = 101
"""100 objects and BACKGROUND_Google: the publisher left out Faces, keeping Faces_easy."""
AWAY = "is it from a second unpacking? Take it away"
AT_ONCE = 64
"""Samples of an SHD file read in one go."""

FROM = {
    "dvs-cifar10": "airplane.zip .. truck.zip of https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671, or "
    "CIFAR10DVS.zip of https://figshare.com/ndownloader/files/38023437 (MD5 ce3a4a0682dc0943703bd8f749a7701c)",
    "n-caltech101": "Caltech101.zip of https://data.mendeley.com/datasets/cy6cvx3ryv "
    "(MD5 66201824eabb0239c7ab992480b50ba3)",
    "n-mnist": "Train.zip (MD5 20959b8e626244a1b502305a9e6e2031) and Test.zip (MD5 69ca8762b2fe404d9b9bad1103e97832) "
    "of https://data.mendeley.com/datasets/468j46mzdv",
    "dvs-gesture": "DvsGesture.tar.gz (MD5 8a5c71fb11e24e5ca5b11866ca6c00a1) of https://research.ibm.com/dvsgesture, "
    "or ibmGestureTrain.tar.gz (MD5 3a8f0d4120a166bac7591f77409cb105) and ibmGestureTest.tar.gz "
    "(MD5 56070e45dadaa85fff82e0fbfbc06de5) of https://figshare.com/ndownloader/files/38022171 and 38020584",
    "shd": "shd_train.h5.zip (MD5 f3252aeb598ac776c1b526422d90eecb) and shd_test.h5.zip "
    "(MD5 1503a5064faa34311c398fb0a1ed0a6f) of https://zenkelab.org/datasets",
}

Split = tuple[list[Recording], list[Recording]]


class Source(NamedTuple):
    """The files of a data set.

    Args:
        root: the folder that they are in.
        files: every file that is read.
        classes: names; a label is an index into them.
        layout: which of the layouts, and so how the files are read.
        split: the recordings of the train and of the test split, in a fixed order; may read lists and labels.
        read: the samples of a recording.
    """

    root: Path
    files: tuple[Path, ...]
    classes: tuple[str, ...]
    layout: str
    split: Callable[[], Split]
    read: Callable[[Recording], Iterator[Events]]


def dvs_cifar10(folder: Path) -> Source:
    """Folders of the ten classes with .aedat files, or with tonic's .aedat4; here or in CIFAR10DVS.

    The first nine tenths of each class by number are the train split: 0 to 899 of 1000.
    """
    for suffix, read in ((".aedat", recordings.aedat2), (".aedat4", recordings.aedat4)):
        for root in (folder, folder / "CIFAR10DVS"):
            found = [_numbered(root / name, suffix) for name in CIFAR10]
            if all(found):
                return _by_class(root, CIFAR10, found, suffix, read, lambda count: 9 * count // 10)
    raise _missing(folder, "dvs-cifar10", f"the folders {', '.join(CIFAR10)}, each with .aedat or .aedat4 files")


def n_caltech101(folder: Path) -> Source:
    """The folders of 101 classes with .bin files; here, in Caltech101 or in NCALTECH101/Caltech101.

    The first ceil(0.9 n) of the n files of each class are the train split. Labels follow the names of the folders.
    """
    counts = []
    for root in (folder, folder / "Caltech101", folder / "NCALTECH101" / "Caltech101"):
        places = sorted(place for place in root.iterdir() if place.is_dir()) if root.is_dir() else []
        found = {place.name: files for place in places if (files := _numbered(place, ".bin"))}
        if len(found) == CALTECH_CLASSES:
            by_class = list(found.values())
            return _by_class(root, tuple(found), by_class, ".bin", recordings.atis, lambda count: -(-9 * count // 10))
        counts.append(len(found))
    came = f"{max(counts)} such folders"
    raise _missing(folder, "n-caltech101", f"Caltech101 with {CALTECH_CLASSES} folders of .bin files", came)


def n_mnist(folder: Path) -> Source:
    """Train and Test, each with folders 0 to 9 of .bin files; here or in NMNIST."""
    names = tuple("0123456789")
    for root in (folder, folder / "NMNIST"):
        found = {split: [_numbered(root / split / name, ".bin") for name in names] for split in ("Train", "Test")}
        if all(map(all, found.values())):
            train, test = _labelled(found["Train"]), _labelled(found["Test"])
            return Source(root, _paths(train + test), names, ".bin", partial(_both, train, test), recordings.atis)
    raise _missing(folder, "n-mnist", "the folders Train and Test, each with folders 0 to 9 of .bin files")


def dvs_gesture(folder: Path) -> Source:
    """The published recordings, lists and labels, here or in DvsGesture; or tonic's samples, here or in DVSGesture."""
    for root in (folder, folder / "DvsGesture"):
        lists = tuple(root / f"trials_to_{split}.txt" for split in ("train", "test"))
        if all(path.is_file() for path in lists):
            files = (*lists, *sorted(root.glob("*.aedat")), *sorted(root.glob("*_labels.csv")))
            return Source(root, files, GESTURES, ".aedat", partial(_trials, *lists), recordings.aedat3)
    for root in (folder, folder / "DVSGesture"):
        train, test = (_cut(root / f"ibmGesture{split}") for split in ("Train", "Test"))
        if train and test:
            return Source(root, _paths(train + test), GESTURES, ".npy", partial(_both, train, test), recordings.npy)
    expected = "trials_to_train.txt and trials_to_test.txt beside .aedat and _labels.csv files, or the folders "
    raise _missing(folder, "dvs-gesture", expected + "ibmGestureTrain and ibmGestureTest of .npy files")


def shd(folder: Path) -> Source:
    """shd_train.h5 and shd_test.h5, here or in SHD."""
    for root in (folder, folder / "SHD"):
        files = (root / "shd_train.h5", root / "shd_test.h5")
        if all(path.is_file() for path in files):
            return Source(root, files, SPOKEN, ".h5", partial(_spoken, *files), recordings.hdf5)
    raise _missing(folder, "shd", "shd_train.h5 and shd_test.h5, unpacked")


def _by_class(
    root: Path,
    classes: tuple[str, ...],
    found: Sequence[list[Path]],
    layout: str,
    read: Callable[[Recording], Iterator[Events]],
    cut: Callable[[int], int],
) -> Source:
    train = _labelled([files[: cut(len(files))] for files in found])
    test = _labelled([files[cut(len(files)) :] for files in found])
    return Source(root, _paths(train + test), classes, layout, partial(_both, train, test), read)


def _both(train: list[Recording], test: list[Recording]) -> Split:
    return train, test


def _labelled(found: Iterable[list[Path]]) -> list[Recording]:
    """Recordings of one sample, of files [class][index]."""
    return [Recording(path, (label,)) for label, files in enumerate(found) for path in files]


def _numbered(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder by the number at the end of their names; none if there is no such folder.

    The number decides about the split, so all names are of one form and no number is there twice: what a second
    unpacking leaves behind, such as ``cifar10_bird_9 (1).aedat``, would move test samples into training.

    Raises:
        ValueError: a name of another form, a number that is there twice, or a folder that is named like a file.
        OSError: the folder cannot be read.
    """
    if not folder.is_dir():
        return []
    names = {path: re.fullmatch(r"(.*?)(\d+)", path.stem) for path in sorted(_entries(folder, suffix))}
    stems = Counter(match[1] for match in names.values() if match)
    stem = max(stems, key=stems.__getitem__, default="")
    found: dict[int, Path] = {}
    for path, match in names.items():
        if match is None or match[1] != stem:
            like = f"{stem}<number>{suffix}"
            raise ValueError(f"data: expected only names like {like} in {folder}, got {path.name}; {AWAY}")
        first = found.setdefault(int(match[2]), path)
        if first is not path:
            raise ValueError(f"data: expected each number once in {folder}, got {first.name} and {path.name}; {AWAY}")
    return [found[number] for number in sorted(found)]


def _entries(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder that end in that."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name.endswith(suffix) and not entry.name.startswith(".")]
            for entry in found:
                if not entry.is_file():
                    raise ValueError(f"data: expected files *{suffix} in {folder}, got {entry.name}, which is none")
    except OSError as error:
        raise files.unreadable("a folder", folder, error) from None
    return [folder / entry.name for entry in found]


def _paths(found: Iterable[Recording]) -> tuple[Path, ...]:
    return tuple(recording.path for recording in found)


def _trials(train: Path, test: Path) -> Split:
    """The spans of the labels of each recording of the two lists."""
    names = [[line.strip() for line in files.text(path).splitlines() if line.strip()] for path in (train, test)]
    for path, listed in zip((train, test), names, strict=True):
        if twice := [name for name in listed if listed.count(name) > 1]:
            raise ValueError(
                f"data: expected each recording once in {path}, got {twice[0]} {listed.count(twice[0])} times"
            )
    if both := set(names[0]) & set(names[1]):
        raise ValueError(f"data: expected different recordings in {train} and {test.name}, got {min(both)} in both")
    for name in (*names[0], *names[1]):
        for path in (train.parent / name, train.parent / _labels_of(name)):
            if not path.is_file():
                raise FileNotFoundError(f"data: expected {path}, as a list in {train.parent} says, got no such file")
    first, second = ([_trial(train.parent / name) for name in part] for part in names)
    return first, second


def _labels_of(name: str) -> str:
    return f"{name.removesuffix('.aedat')}_labels.csv"


def _trial(path: Path) -> Recording:
    """A recording and its table of class (1 to 11), start and end in microseconds."""
    table = path.with_name(_labels_of(path.name))
    try:
        rows = [tuple(map(int, row)) for row in csv.reader(files.text(table).splitlines()[1:]) if row]
        if not rows or any(len(row) != 3 or not 1 <= row[0] <= 11 or row[2] <= row[1] for row in rows):
            raise ValueError("a row of other numbers, or none")
    except ValueError as error:
        raise ValueError(f"data: expected rows of class 1..11, start and end in {table}, got {error}") from None
    return Recording(path, tuple(row[0] - 1 for row in rows), tuple(row[1:] for row in rows))


def _cut(folder: Path) -> list[Recording]:
    """tonic's samples user<N>_<light>/<class>.npy of one split."""
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if place.is_dir() and not re.fullmatch(PERSON, place.name) and any(place.glob("*.npy")):
            raise ValueError(f"data: expected folders like user01_lab in {folder}, got {place.name}; {AWAY}")
    found = sorted(folder.glob("*/*.npy"), key=lambda path: (path.parent.name, _label(path)))
    return [Recording(path, (_label(path),)) for path in found]


def _label(path: Path) -> int:
    if not path.stem.isdecimal() or int(path.stem) >= len(GESTURES):
        raise ValueError(f"data: expected a name of 0.npy to {len(GESTURES) - 1}.npy, got {path}")
    return int(path.stem)


def _spoken(train: Path, test: Path) -> Split:
    first, second = (list(_pieces(path)) for path in (train, test))
    return first, second


def _pieces(path: Path) -> Iterator[Recording]:
    labels = recordings.hdf5_labels(path).tolist()
    if wrong := [label for label in labels if not 0 <= label < len(SPOKEN)]:
        raise ValueError(f"data: expected labels of 0..{len(SPOKEN) - 1}, got {wrong[0]} in {path}")
    for start in range(0, len(labels), AT_ONCE):
        piece = tuple(labels[start : start + AT_ONCE])
        yield Recording(path, piece, tuple(range(start, start + len(piece))))


def _missing(folder: Path, name: str, expected: str, came: str = "no such files") -> FileNotFoundError:
    state = "" if folder.is_dir() else ", which is no folder"
    return FileNotFoundError(
        f"data: {name}: expected {expected} in {folder}{state}, got {came}; check --data-dir. They are in "
        f"{FROM[name]}: unpack them there"
    )
