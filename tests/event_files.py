"""Tiny data sets of events in the formats in which they are published, and what was written into them."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {
    "dvs-cifar10": (2, 128, 128),
    "n-caltech101": (2, 180, 240),
    "n-mnist": (2, 34, 34),
    "dvs-gesture": (2, 128, 128),
    "shd": (1, 1, 700),
}
SPAN = 1_000_000
"""Microseconds of a sample."""


class Made(NamedTuple):
    """(label, events) of each sample in the order in which they are loaded; events are rows [N, 4] of t, x, y, p."""

    train: list[tuple[int, np.ndarray]]
    test: list[tuple[int, np.ndarray]]


def make(
    name: str, folder: Path, per_class: int = 2, count: int = 57, layout: str = "publisher", seed: int = 0
) -> Made:
    """Write a data set into ``folder``.

    Args:
        name: a name of ``trtkern.data.neuromorphic``.
        folder: made if it is missing.
        per_class: samples a class. DVS-CIFAR10 splits them 9 to 1 (2: 1 and 1); N-MNIST, DVS128 Gesture and SHD have
            as many in each split. N-Caltech101 has one a class, and ten of each of its first ``per_class`` classes, the
            last of which is tested.
        count: events a sample.
        layout: "publisher", or "tonic" for DVS-CIFAR10 and DVS128 Gesture.
        seed: of the events.
    """
    rng = np.random.default_rng(seed)
    if name == "dvs-cifar10":
        return _dvs_cifar10(folder, per_class, count, layout, rng)
    return {"n-caltech101": _n_caltech101, "n-mnist": _n_mnist, "dvs-gesture": _gesture, "shd": _shd}[name](
        folder, per_class, count, *([layout] if name == "dvs-gesture" else []), rng
    )


def draw(rng: np.random.Generator, count: int, size: tuple[int, int, int], start: int = 0) -> np.ndarray:
    """Events [count, 4] in the order of time; a few pixels have many of them."""
    polarities, height, width = size
    columns = [np.sort(rng.integers(start, start + SPAN, count))]
    columns += [np.where(rng.random(count) < 0.3, side // 3, rng.integers(0, side, count)) for side in (width, height)]
    return np.column_stack([*columns, rng.integers(0, polarities, count)])


def _dvs_cifar10(folder: Path, per_class: int, count: int, layout: str, rng: np.random.Generator) -> Made:
    made = Made([], [])
    for label, name in enumerate(CIFAR10):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            rows = draw(rng, count, SIZES["dvs-cifar10"])
            file = folder / name / f"cifar10_{name}_{index}"
            if layout == "tonic":
                file.with_suffix(".aedat4").write_bytes(aedat4(rows))
            else:
                file.with_suffix(".aedat").write_bytes(aedat2(rows))
            (made.train if index < 9 * per_class // 10 else made.test).append((label, rows))
    return made


def _n_caltech101(folder: Path, per_class: int, count: int, rng: np.random.Generator) -> Made:
    made = Made([], [])
    for label in range(101):
        place = folder / "Caltech101" / ("BACKGROUND_Google" if label == 0 else f"object_{label:03d}")
        place.mkdir(parents=True)
        for index in range(10 if label < per_class else 1):
            rows = draw(rng, count, SIZES["n-caltech101"])
            (place / f"image_{index + 1:04d}.bin").write_bytes(atis(rows))
            (made.test if index == 9 else made.train).append((label, rows))
    return made


def _n_mnist(folder: Path, per_class: int, count: int, rng: np.random.Generator) -> Made:
    made, number = Made([], []), 0
    for split, samples in (("Train", made.train), ("Test", made.test)):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for _ in range(per_class):
                rows, number = draw(rng, count, SIZES["n-mnist"]), number + 1
                (folder / split / str(label) / f"{number:05d}.bin").write_bytes(atis(rows))
                samples.append((label, rows))
    return made


def _gesture(folder: Path, per_class: int, count: int, layout: str, rng: np.random.Generator) -> Made:
    made = Made([], [])
    for split, samples, user in (("train", made.train, 1), ("test", made.test, 24)):
        names = [f"user{user + index:02d}_{('lab', 'led')[index % 2]}" for index in range(per_class)]
        for name in names:
            spans = [(label, 5 * SPAN * (label + 1)) for label in range(11)]
            parts = [draw(rng, count, SIZES["dvs-gesture"], start) for _, start in spans]
            if layout == "tonic":
                parts = [np.column_stack([part[:, 0] // 1000 * 1000, part[:, 1:]]) for part in parts]
                place = folder / f"ibmGesture{split.capitalize()}" / name
                place.mkdir(parents=True)
                for label, part in enumerate(parts):
                    np.save(place / f"{label}.npy", np.column_stack([part[:, [1, 2, 3]], part[:, 0] // 1000]))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                between = [draw(rng, 20, SIZES["dvs-gesture"], start + 2 * SPAN) for _, start in spans]
                rows = np.concatenate([rows for pair in zip(parts, between, strict=True) for rows in pair])
                (folder / f"{name}.aedat").write_bytes(aedat3(rows))
                with open(folder / f"{name}_labels.csv", "w", newline="") as file:
                    table = [[label + 1, start, start + SPAN] for label, start in spans]
                    csv.writer(file).writerows([["class", "startTime_usec", "endTime_usec"], *table])
            samples.extend(enumerate(parts))
        if layout != "tonic":
            (folder / f"trials_to_{split}.txt").write_text("".join(f"{name}.aedat\n" for name in names))
    return made


def _shd(folder: Path, per_class: int, count: int, rng: np.random.Generator) -> Made:
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    made = Made([], [])
    for split, samples in (("train", made.train), ("test", made.test)):
        labels = rng.permutation(np.repeat(np.arange(20), per_class))
        times = [np.sort(rng.random(count) * 1.38).astype(np.float16) for _ in labels]
        units = [rng.integers(0, 700, count).astype(np.uint16) for _ in labels]
        with h5py.File(folder / f"shd_{split}.h5", "w") as file:
            for column, values, dtype in (("times", times, np.float16), ("units", units, np.uint16)):
                table = file.create_dataset(f"spikes/{column}", (len(labels),), h5py.vlen_dtype(dtype))
                for index, value in enumerate(values):
                    table[index] = value
            file["labels"] = labels.astype(np.uint16)
        for label, time, unit in zip(labels, times, units, strict=True):
            whole = [int(float(value) * 1e6) for value in time]
            samples.append((int(label), np.column_stack([whole, unit, np.zeros((count, 2), int)]).astype(np.int64)))
    return made


def aedat2(rows: np.ndarray) -> bytes:
    """AEDAT 2.0 of a DVS128: big-endian address and time; the sensor's corner and polarity are the other ones."""
    head = (
        b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n"
        b"# Data format is int32 address, int32 timestamp (8 bytes total), repeated for each event\r\n"
        b"# Timestamps tick is 1 us\r\n# created Wed Jun 17 20:12:01 CST 2015\r\n"
    )
    addresses = [(127 - x) << 8 | (127 - y) << 1 | (1 - p) for _, x, y, p in rows.tolist()]
    return head + b"".join(struct.pack(">II", *pair) for pair in zip(addresses, rows[:, 0].tolist(), strict=True))


def aedat3(rows: np.ndarray, packet: int = 100) -> bytes:
    """AEDAT 3.1: little-endian packets of polarity events, with one of special events before each."""
    out = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#Start-Time: 2016-09-28 12:00:00\r\n#!END-HEADER\r\n"
    for first in range(0, len(rows), packet):
        part = rows[first : first + packet].tolist()
        out += _packet(1, [(1 | p << 1 | y << 2 | x << 17, t) for t, x, y, p in part])
        out += _packet(0, [(5 << 1 | 1, part[-1][0])])
    return out


def _packet(kind: int, events: list[tuple[int, int]]) -> bytes:
    head = struct.pack("<hhiiiiii", kind, 1, 8, 4, 0, len(events), len(events), len(events))
    return head + b"".join(struct.pack("<II", *event) for event in events)


def aedat4(rows: np.ndarray) -> bytes:
    """AEDAT 4, not compressed: a header and one packet of events, both size-prefixed flatbuffers."""
    size = "".join(f'<attr key="size{axis}" type="int">128</attr>' for axis in "XY")
    kind = '<attr key="typeIdentifier" type="string">EVTS</attr>'
    node = f'<node name="0">{kind}<node name="info">{size}</node></node>'
    described = f'<dv version="2.0"><node name="outInfo">{node}</node></dv>'.encode()
    described = struct.pack("<I", len(described)) + described + b"\0"
    described += b"\0" * (-len(described) % 4)
    # Root, identifier, table of fields (the third is the text), the table, the text.
    header = struct.pack("<I4s5H2xiI", 20, b"IOHE", 10, 8, 0, 0, 4, 12, 4) + described
    table = struct.pack("<I4s3H2xiII", 16, b"EVTS", 6, 8, 4, 8, 4, len(rows))
    events = table + b"".join(struct.pack("<qhh?3x", *row[:3], bool(row[3])) for row in rows.tolist())
    events = struct.pack("<I", len(events)) + events
    return b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header + struct.pack("<II", 0, len(events)) + events


def atis(rows: np.ndarray) -> bytes:
    """5 bytes an event: x, y, then a bit of polarity and 23 of time, big-endian."""
    return b"".join(bytes([x, y]) + (p << 23 | t).to_bytes(3, "big") for t, x, y, p in rows.tolist())
