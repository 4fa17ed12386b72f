"""Events of a sensor to frames: counted exactly, then, for the sets that ask for it, scaled and resized.

An event is (t, x, y, p): time, column, row and polarity. Frames are [T, P, H, W], time first, polarity as the channel.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int, int]
"""(P, H, W): polarities, rows and columns of the sensor."""


class Events(NamedTuple):
    """The events of a sample in the order of its file: four integer arrays [N]."""

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray


def by_count(events: Events, frames: int, size: Size, rest: Literal["drop", "last"] = "drop") -> np.ndarray:
    """Frames of equal numbers of events: event i of N is in frame i // (N // T). Counts [T, P, H, W], int64.

    The N % T events left over are dropped, or go into the last frame with ``rest="last"``. With fewer events than
    frames, N // T is 0: all are left over.

    Raises:
        ValueError: an event outside of the sensor, or T below 1.
    """
    count = _check(events, frames, size)
    share = count // frames
    kept = count if rest == "last" else share * frames
    place = np.arange(kept) // share if share else np.full(kept, frames - 1)
    return _count(Events(*(part[:kept] for part in events)), np.minimum(place, frames - 1), frames, size)


def by_time(events: Events, frames: int, size: Size, start: int, stop: int) -> np.ndarray:
    """Frames of equal time: an event at t is in frame (t - start) * T // (stop - start). Counts [T, P, H, W], int64.

    Exact, in whole numbers; events before ``start``, or at ``stop`` and later, are dropped.

    Raises:
        ValueError: an event outside of the sensor, T below 1, or no time between start and stop.
    """
    _check(events, frames, size)
    if stop <= start:
        raise ValueError(f"events: expected stop after start, got start {start} and stop {stop}")
    time = events.t.astype(np.int64)
    within = (time >= start) & (time < stop)
    place = (time[within] - start) * frames // (stop - start)
    return _count(Events(*(part[within] for part in events)), place, frames, size)


def relative(frames: np.ndarray) -> np.ndarray:
    """Each frame divided by its own maximum over both polarities: 0..1, float32; a frame without events stays 0."""
    largest = frames.max(axis=(1, 2, 3), keepdims=True)
    return (frames / np.maximum(largest, 1)).astype(np.float32)


def resized(frames: np.ndarray, side: int) -> Tensor:
    """Frames [T, P, side, side] float16: bilinear, antialiased, each polarity by itself, computed in float32.

    float16 rounds by 2^-11 of a value at most, an eighth of a step of 8 bits at 1.

    Raises:
        ValueError: a value that float16 does not hold.
    """
    images = torch.from_numpy(frames.astype(np.float32))
    images = functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    if (largest := images.max()) > torch.finfo(torch.float16).max:
        raise ValueError(f"events: expected frames of values up to 65504, as float16 holds, got {float(largest):g}")
    return images.half()


def of_reference(events: Events, width: int) -> Events:
    """The events of DVS-CIFAR10 as the reference implementation of TRT puts them into frames of two channels.

    Its polarity is +1 or -1, and the index -1 is the last channel: all events are in channel 1, none in channel 0. Its
    columns are the sensor's own numbers, from the other side than ours.
    """
    return Events(events.t, width - 1 - events.x, events.y, np.ones_like(events.p))


def resized_with_alpha(frames: np.ndarray, side: int) -> Tensor:
    """Frames [T, 2, side, side] uint8, resized by Pillow as images of luminance (channel 0) and alpha (channel 1).

    Pillow multiplies the luminance by the alpha before it resizes, so that channel 0 is erased wherever channel 1 is
    silent. The reference implementation of TRT does this to frames whose channel 0 is empty (``of_reference``).

    Args:
        frames: [T, 2, H, W] of 0..1; they become floor(255 x).
        side: height and width.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"data: expected Pillow for the resize of the paper, got none ({error}); pip install 'trtkern[events]'"
        ) from None
    pixels = (frames.astype(np.float32) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    images = [
        np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((side, side), Image.Resampling.BILINEAR))
        for frame in pixels
    ]
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def narrowest(counts: np.ndarray) -> Tensor:
    """The same counts in the narrowest of uint8, int16 and float32 that holds them exactly."""
    largest = int(counts.max(initial=0))
    dtype = np.uint8 if largest < 1 << 8 else np.int16 if largest < 1 << 15 else np.float32
    return torch.from_numpy(counts.astype(dtype))


def _check(events: Events, frames: int, size: Size) -> int:
    """The number of events, after a check of all of them."""
    if frames < 1:
        raise ValueError(f"events: expected 1 frame or more, got {frames}")
    if len({part.shape for part in events}) != 1 or events.t.ndim != 1:
        raise ValueError(f"events: expected t, x, y and p of one length, got {[list(part.shape) for part in events]}")
    polarities, height, width = size
    for name, part, limit in (("x", events.x, width), ("y", events.y, height), ("p", events.p, polarities)):
        wrong = np.flatnonzero((part < 0) | (part >= limit))
        if wrong.size:
            raise ValueError(
                f"events: expected {name} of 0..{limit - 1}, got {part[wrong[0]]} for event {wrong[0]} "
                f"({wrong.size:,} such events)"
            )
    return len(events.t)


def _count(events: Events, place: np.ndarray, frames: int, size: Size) -> np.ndarray:
    polarities, height, width = size
    cell = place.astype(np.int64)
    for part, side in ((events.p, polarities), (events.y, height), (events.x, width)):
        cell = cell * side + part
    return np.bincount(cell, minlength=frames * polarities * height * width).reshape(frames, *size)
