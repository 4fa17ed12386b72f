"""Files of events as they are published, read through tonic: one function a format, each checked for being whole.

tonic is optional and is imported where it is used. Nothing is downloaded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from trtkern.data import files
from trtkern.data.events import Events

PACKET = 28
"""Bytes of the header of a packet of AEDAT 3.1."""
JITTER = 1000
"""Microseconds that an event may be before the one in front of it: sensors are read out in bursts."""


class Recording(NamedTuple):
    """A file, or a part of one, and the labels of its samples.

    Args:
        path: the file.
        labels: one a sample.
        parts: which samples of the file: (start, stop) in microseconds, or indices; empty where the file is one sample.
    """

    path: Path
    labels: tuple[int, ...]
    parts: tuple[Any, ...] = ()


def aedat2(recording: Recording) -> Iterator[Events]:
    """An AEDAT 2.0 file of a DVS128, 8 bytes an event: DVS-CIFAR10 as published.

    Of its address, x = 127 - bits 8..14, y = 127 - bits 1..7 and p = 1 - bit 0: the sensor counts from the opposite
    corner and marks an event that is off by a 1.
    """
    path = recording.path
    start, rows = _addresses(path, 2)
    if rest := (path.stat().st_size - start) % 8:
        raise ValueError(f"data: expected events of 8 bytes, got {rest} bytes after the last in {path}; get it again")
    address = rows["address"].astype(np.int64)
    yield _events(path, rows["timeStamp"], 127 - (address >> 8 & 127), 127 - (address >> 1 & 127), 1 - (address & 1))


def aedat4(recording: Recording) -> Iterator[Events]:
    """An AEDAT 4 file, DVS-CIFAR10 as tonic packs it: x, y and p as they are in it."""
    path, io = recording.path, tonic_io()
    require("aedat")
    rows = _whole(path, "an AEDAT 4 file", lambda: io.read_aedat4(str(path)))
    yield _events(path, rows["t"], rows["x"], rows["y"], rows["on"])


def atis(recording: Recording) -> Iterator[Events]:
    """A .bin file, 5 bytes an event: N-MNIST and N-Caltech101. x, y and p as they are in it."""
    path, io = recording.path, tonic_io()
    if rest := path.stat().st_size % 5:
        raise ValueError(f"data: expected events of 5 bytes, got {rest} bytes after the last in {path}; get it again")
    dtype = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
    rows = _whole(path, "a .bin file of events", lambda: io.read_mnist_file(str(path), dtype=dtype))
    yield _events(path, rows["t"], rows["x"], rows["y"], rows["p"])


def aedat3(recording: Recording) -> Iterator[Events]:
    """An AEDAT 3.1 file of DVS128 Gesture: the events of each span of time, start <= t < stop.

    Of the address, x = bits 17..31, y = bits 2..16 and p = bit 1.
    """
    path = recording.path
    start, rows = _addresses(path, 3)
    rows = rows[_packets(path, start)]
    for begin, end in recording.parts:
        span = rows[(rows["timeStamp"] >= begin) & (rows["timeStamp"] < end)]
        address = span["address"].astype(np.int64)
        yield _events(path, span["timeStamp"], address >> 17, address >> 2 & 0x7FFF, address >> 1 & 1)


def npy(recording: Recording) -> Iterator[Events]:
    """An array [N, 4] of x, y, p and t in milliseconds: DVS128 Gesture as tonic cuts it."""
    path = recording.path
    rows = _whole(path, "an .npy file", lambda: np.load(path, allow_pickle=False))
    if rows.ndim != 2 or rows.shape[1] != 4 or not np.isfinite(rows).all():
        raise ValueError(f"data: expected an array [N, 4] of numbers, got {list(rows.shape)} {rows.dtype} in {path}")
    x, y, p, t = rows.T.astype(np.int64)
    yield _events(path, 1000 * t, x, y, p)


def hdf5(recording: Recording) -> Iterator[Events]:
    """Samples of an SHD file: spike times in whole microseconds, x the unit, y and p 0. A sample may be empty.

    The order of its spikes is not looked at: a spike's frame is told by its time alone.
    """
    path, h5py = recording.path, require("h5py")

    def read() -> list[tuple[np.ndarray, np.ndarray]]:
        with h5py.File(path, "r") as file:
            times, units = file["spikes/times"], file["spikes/units"]
            return [(times[index].astype(np.float64), units[index].astype(np.int64)) for index in recording.parts]

    for index, (times, units) in zip(recording.parts, _whole(path, "an HDF5 file of SHD", read), strict=True):
        if times.shape != units.shape or not (np.isfinite(times) & (times >= 0)).all():
            raise ValueError(
                f"data: expected a finite time of 0 or later for each unit, got others in sample {index} of {path}"
            )
        nothing = np.zeros(len(units), np.int64)
        yield Events((times * 1e6).astype(np.int64), units, nothing, nothing)


def hdf5_labels(path: Path) -> np.ndarray:
    """The labels [N] int64 of an SHD file.

    Raises:
        ValueError: a damaged file, or not a label a sample.
    """
    h5py = require("h5py")

    def read() -> tuple[np.ndarray, int, int]:
        with h5py.File(path, "r") as file:
            return file["labels"][:].astype(np.int64), len(file["spikes/times"]), len(file["spikes/units"])

    labels, times, units = _whole(path, "an HDF5 file of SHD", read)
    if not len(labels) == times == units > 0:
        raise ValueError(
            f"data: expected a label, times and units for each sample, got {len(labels)}, {times} and {units} in {path}"
        )
    return labels


@cache
def tonic_io() -> ModuleType:
    """tonic's file io.py alone, which needs numpy alone; ``import tonic`` imports scipy, h5py, requests and more.

    Raises:
        ImportError: tonic is not installed; the message says what to type.
    """
    package = find_spec("tonic")
    if package is None or not package.submodule_search_locations:
        raise ImportError("data: expected tonic for data sets of events, got none; pip install 'trtkern[events]'")
    spec = spec_from_file_location("tonic.io", Path(package.submodule_search_locations[0]) / "io.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require(name: str) -> ModuleType:
    """The module of that name.

    Raises:
        ImportError: it is not installed; the message says what to type.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"data: expected {name} for data sets of events, got none ({error}); pip install 'trtkern[events]'"
        ) from None


def _addresses(path: Path, version: int) -> tuple[int, np.ndarray]:
    """Where the events of an AEDAT 2 or 3 file begin, and their addresses and times of 32 bits."""
    io = tonic_io()

    def read() -> tuple[int, np.ndarray]:
        found, start = io.read_aedat_header_from_file(str(path))[:2]
        if int(found) != version:
            raise ValueError(f"AEDAT {found}")
        return start, io.get_aer_events_from_file(str(path), found, start)

    # tonic's read_dvs_128 and read_dvs_ibm are not called: in 1.7.0 they fail on every file.
    return _whole(path, f"an AEDAT {version} file", read)


def _packets(path: Path, start: int) -> np.ndarray:
    """Which events of an AEDAT 3.1 file are of polarity, [N] bool: its packets hold other kinds too."""
    kinds, counts, size = [], [], path.stat().st_size
    with open(path, "rb") as file:
        position = start
        while position < size:
            file.seek(position)
            header = file.read(PACKET)
            kind, _, width, _, _, capacity, _, _ = struct.unpack("<hhiiiiii", header.ljust(PACKET, b"\0"))
            position += PACKET + capacity * width
            if len(header) < PACKET or width != 8 or capacity < 0 or position > size:
                raise ValueError(
                    f"data: expected whole packets of events of 8 bytes, got another or one that is cut off before "
                    f"byte {size:,} of {path}; get the file again"
                )
            kinds.append(kind == 1)
            counts.append(capacity)
    return np.repeat(np.array(kinds, bool), np.array(counts, int))


def _whole(path: Path, what: str, read: Callable[[], Any]) -> Any:
    """What ``read`` returns; whatever it raises names the file."""
    if not path.stat().st_size:
        raise ValueError(f"data: expected {what}, got 0 bytes in {path}; get it again")
    try:
        return read()
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise files.unreadable(what, path, error) from None
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"data: expected {what}, got a damaged or different one {path} ({type(error).__name__}: {reason}); get it "
            f"again"
        ) from None


def _events(path: Path, *parts: np.ndarray) -> Events:
    if not len(parts[0]):
        raise ValueError(f"data: expected events, got none for a sample of {path}; get the file again")
    events = Events(*(part.astype(np.int64) for part in parts))
    back = np.flatnonzero(np.diff(events.t) < -JITTER)
    if back.size:
        index = int(back[0]) + 1
        raise ValueError(
            f"data: expected events in the order of time, to within {JITTER} microseconds, got {events.t[index]} after "
            f"{events.t[index - 1]} for event {index} ({back.size:,} such events) of a sample of {path}; is this a "
            f"file of another format or data set?"
        )
    return events
