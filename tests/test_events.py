"""Events to frames against loops over single events, and the two ways to resize against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from event_files import draw

from trtkern.data import events
from trtkern.data.events import Events

SIZE = (2, 5, 7)


def as_events(rows: np.ndarray) -> Events:
    return Events(*(rows[:, column] for column in range(4)))


def counted(rows: np.ndarray, steps: int, size: tuple[int, int, int], rest: str) -> np.ndarray:
    """The reference: one event after another."""
    frames = np.zeros((steps, *size), int)
    share = len(rows) // steps
    for index, (_, x, y, p) in enumerate(rows.tolist()):
        step = index // share if share else steps
        if step >= steps and rest == "last":
            step = steps - 1
        if step < steps:
            frames[step, p, y, x] += 1
    return frames


@pytest.mark.parametrize("rest", ["drop", "last"])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 39, 40, 41, 200])
def test_frames_of_equal_counts(count, rest):
    rows = draw(np.random.default_rng(count), count, SIZE)
    frames = events.by_count(as_events(rows), 4, SIZE, rest)
    assert frames.shape == (4, *SIZE)
    assert (frames == counted(rows, 4, SIZE, rest)).all()
    assert frames.sum() == (count if rest == "last" else count // 4 * 4)


def test_fewer_events_than_frames_are_left_over():
    rows = np.array([[0, 1, 2, 0], [5, 1, 2, 0], [9, 6, 4, 1]])
    assert events.by_count(as_events(rows), 10, SIZE, "drop").sum() == 0
    frames = events.by_count(as_events(rows), 10, SIZE, "last")
    assert frames[:9].sum() == 0 and frames[9, 0, 2, 1] == 2 and frames[9, 1, 4, 6] == 1


def test_frames_of_equal_time():
    rows = draw(np.random.default_rng(1), 300, SIZE)
    rows[:100, 0] = rows[100:200, 0]  # files are not always in order
    rows[:4, 0] = [0, 99_999, 100_000, 999_999]
    expected = np.zeros((9, *SIZE), int)
    for t, x, y, p in rows.tolist():
        for step in range(9):
            if 9 * (t - 100_000) >= step * 800_000 and 9 * (t - 100_000) < (step + 1) * 800_000:
                expected[step, p, y, x] += 1
    frames = events.by_time(as_events(rows), 9, SIZE, 100_000, 900_000)
    assert (frames == expected).all() and 0 < frames.sum() < 300


def test_frames_without_events_are_zero():
    rows = np.array([[10, 0, 0, 0], [990, 0, 0, 1]])
    frames = events.by_time(as_events(rows), 5, SIZE, 0, 1000)
    assert frames.sum(axis=(1, 2, 3)).tolist() == [1, 0, 0, 0, 1]
    assert events.by_time(as_events(rows[:0]), 5, SIZE, 0, 1000).sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1, 7]}, "expected x of 0..6, got 7 for event 1"),
        ({"y": [-1, 0]}, "expected y of 0..4, got -1 for event 0"),
        ({"p": [2, 2]}, r"expected p of 0..1, got 2 for event 0 \(2 such events\)"),
        ({"t": [0]}, "of one length"),
    ],
)
def test_events_that_cannot_be(change, message):
    parts = {name: np.zeros(2, int) for name in "txyp"} | {name: np.array(part) for name, part in change.items()}
    for frame in (lambda e: events.by_count(e, 2, SIZE), lambda e: events.by_time(e, 2, SIZE, 0, 10)):
        with pytest.raises(ValueError, match=message):
            frame(Events(**parts))


def test_steps_that_cannot_be():
    some = as_events(draw(np.random.default_rng(0), 4, SIZE))
    with pytest.raises(ValueError, match="1 frame or more, got 0"):
        events.by_count(some, 0, SIZE)
    with pytest.raises(ValueError, match="stop after start"):
        events.by_time(some, 2, SIZE, 5, 5)


def test_relative_to_the_maximum_over_both_polarities():
    frames = np.zeros((3, *SIZE), int)
    frames[0, 0, 1, 1], frames[0, 1, 2, 2], frames[2, 1, 0, 0] = 4, 3, 1
    out = events.relative(frames)
    assert out.dtype == np.float32 and (out[1] == 0).all()
    assert out[0, 0, 1, 1] == 1 and out[0, 1, 2, 2] == 0.75 and out[2, 1, 0, 0] == 1 and out.sum() == 2.75


@pytest.mark.parametrize(("largest", "dtype"), [(255, torch.uint8), (256, torch.int16), (40_000, torch.float32)])
def test_narrowest_type_is_exact(largest, dtype):
    counts = np.array([[0, 1], [7, largest]])
    out = events.narrowest(counts)
    assert out.dtype == dtype and out.tolist() == counts.tolist()


@pytest.mark.parametrize("shape", [(128, 128), (180, 240)])
def test_resize_is_that_of_each_polarity_by_itself(shape):
    image = pytest.importorskip("PIL.Image")
    levels = np.random.default_rng(0).integers(0, 256, (2, 2, *shape)) * (np.random.default_rng(1).random(shape) < 0.3)
    out = events.resized((levels / 255).astype(np.float32), 48)
    assert out.shape == (2, 2, 48, 48) and out.dtype == torch.float16
    for step in range(2):
        for polarity in range(2):
            plane = image.fromarray(levels[step, polarity].astype(np.uint8))
            expected = np.asarray(plane.resize((48, 48), image.Resampling.BILINEAR)) / 255
            assert np.abs(out[step, polarity].numpy() - expected).max() < 1.5 / 255  # Pillow rounds twice


def test_float16_is_finer_than_8_bits():
    frames = np.random.default_rng(0).random((1, 2, 128, 128)).astype(np.float32)
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(frames).double(), size=(48, 48), mode="bilinear", antialias=True
    )
    error = (events.resized(frames, 48).double() - exact).abs()
    assert (error <= exact * 2**-11 + 1e-6).all() and error.max() < 0.5 / 255
    with pytest.raises(ValueError, match="up to 65504, as float16 holds, got 70000"):
        events.resized(np.full((1, 2, 128, 128), 70_000), 48)


def test_the_paper_puts_all_events_into_one_channel_and_mirrors_them():
    sample = events.Events(*(np.array(part) for part in ([5, 6, 7], [0, 100, 127], [1, 2, 3], [0, 1, 0])))
    t, x, y, p = events.of_reference(sample, 128)
    assert [part.tolist() for part in (t, x, y, p)] == [[5, 6, 7], [127, 27, 0], [1, 2, 3], [1, 1, 1]]


def test_resize_with_alpha_erases_a_channel_where_the_other_is_silent():
    pytest.importorskip("PIL")
    frames = np.zeros((2, 2, 128, 128))
    frames[:, 0] = 1
    frames[:, 1, :, 64:] = 1
    frames[1, 1] = 0
    out = events.resized_with_alpha(frames, 48)
    assert out.dtype == torch.uint8 and out.shape == (2, 2, 48, 48)
    assert (out[0, 0, :, :23] == 0).all() and (out[0, 0, :, 25:] == 255).all()
    assert (out[1] == 0).all()
    assert (events.resized(frames, 48)[:, 0] == 1).all()


def test_resize_with_alpha_premultiplies():
    pytest.importorskip("PIL")
    rng = np.random.default_rng(0)
    frames = rng.random((1, 2, 128, 128)) * (rng.random((1, 2, 128, 128)) < 0.5)
    levels = torch.from_numpy(np.floor(frames.astype(np.float32) * 255)).double()
    planes = torch.stack([levels[:, 0] * levels[:, 1] / 255, levels[:, 1]], 1)
    light, alpha = torch.nn.functional.interpolate(planes, size=(48, 48), mode="bilinear", antialias=True)[0]
    out = events.resized_with_alpha(frames, 48)[0].double()
    assert (out[1] - alpha).abs().max() <= 1.5
    assert (out[0] - 255 * light / alpha)[alpha > 60].abs().max() <= 10  # rounded before it is divided by alpha
    assert (out[0] - 255 * light / alpha)[alpha > 60].abs().mean() <= 2
