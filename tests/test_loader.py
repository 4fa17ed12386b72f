"""Batches of a split: the same whatever the workers and wherever an epoch is resumed; no process is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import time
from pathlib import Path

import pytest
import torch
from patience import PATIENCE, no_hang

pytest.importorskip("PIL")
from image_files import write_folder

from trtkern.data import Split, folder
from trtkern.data.augment import Crop, Cutout, Flip, Pipeline, ResizedCrop
from trtkern.training.loader import Loader

CPU = torch.device("cpu")
SIZE = 24
WINDOWS = Pipeline((ResizedCrop(SIZE), Flip(), Cutout(6)))


@pytest.fixture(autouse=True)
def _no_hang():
    """A deadlock fails its test instead of the whole run."""

    with no_hang():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    train, labels, *_ = folder.load(write_folder(tmp_path_factory.mktemp("images")), None, SIZE)
    return Split(train, labels)


def held(*shape):
    count = shape[0]
    return Split(torch.randint(0, 256, shape, dtype=torch.uint8), torch.arange(count) % 3)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def epoch(split, augment=WINDOWS, workers=0, first=0, steps=2, batch=4, state=None):
    """(images, labels, state of the changes after it) of each batch."""
    loader, changes = Loader(split, CPU, augment, workers), generator(1)
    if state is not None:
        changes.set_state(state)
    plan = loader.draw(steps, batch, generator(0))
    return [(*made, changes.get_state()) for made in loader.batches(plan, first, changes)]


def same(got, want):
    return len(got) == len(want) and all(
        torch.equal(a, b) for one, other in zip(got, want, strict=True) for a, b in zip(one, other, strict=True)
    )


def none_left(before=()):
    return not [child for child in multiprocessing.active_children() if child not in before]


def test_memory_as_by_hand():
    """A permutation is all that is drawn for the order, and the changes are drawn batch after batch."""
    split, augment = held(10, 1, 8, 8), Pipeline((Crop(2), Flip()))
    order, changes = generator(0), generator(1)
    indices = torch.randperm(10, generator=order)[:8].view(2, 4)
    want = [(augment(split.images[i], changes), split.labels[i], changes.get_state()) for i in indices]
    assert same(epoch(split, augment), want)
    drawn = generator(0)
    assert Loader(split, CPU, augment).draw(2, 4, drawn).seeds is None
    assert torch.equal(drawn.get_state(), order.get_state())


def test_files_as_by_hand(files):
    """The window comes from each image's own seed, drawn after the order; the rest from the changes, a batch a draw."""
    order, changes = generator(0), generator(1)
    indices = torch.randperm(9, generator=order)[:8].view(2, 4)
    seeds = torch.randint(2**62, (8,), generator=order).view(2, 4)
    want = []
    for row, seed in zip(indices.tolist(), seeds.tolist(), strict=True):
        pairs = zip(row, seed, strict=True)
        images = torch.stack([files.images.read(index, WINDOWS.transforms[0], number) for index, number in pairs])
        images = Pipeline(WINDOWS.transforms[1:])(images, changes)
        want.append((images, files.labels[row], changes.get_state()))
    assert same(epoch(files), want)
    drawn = generator(0)
    plan = Loader(files, CPU, WINDOWS).draw(2, 4, drawn)
    assert torch.equal(plan.seeds, seeds) and torch.equal(drawn.get_state(), order.get_state())


def test_files_without_a_window(files):
    changes, augment = generator(1), Pipeline((Flip(),))
    (images, labels, _), *_ = epoch(files, augment)
    order = torch.randperm(9, generator=generator(0))[:4]
    want = augment(torch.stack([files.images.read(index) for index in order.tolist()]), changes)
    assert torch.equal(images, want) and torch.equal(labels, files.labels[order])


def test_sequences_come_time_first():
    split = held(6, 3, 2, 5, 4)
    for images, labels in Loader(split, CPU).whole(4):
        assert images.shape[:2] == (3, len(labels))
    index = torch.randperm(6, generator=generator(0))[:4]
    (images, *_), *_ = epoch(split, Pipeline((Flip(),)), steps=1)
    assert torch.equal(images, Flip()(split.images[index].transpose(0, 1), generator(1)))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(files, workers):
    assert same(epoch(files, workers=workers, steps=3, batch=3), epoch(files, steps=3, batch=3))
    assert none_left()


@pytest.mark.parametrize("kind", ["files", "memory"])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_an_epoch_goes_on_anywhere(files, kind, first):
    split, augment = (files, WINDOWS) if kind == "files" else (held(9, 3, 8, 8), Pipeline((Crop(2), Flip())))
    want = epoch(split, augment, steps=3, batch=3)
    got = epoch(split, augment, steps=3, batch=3, first=first, state=want[first - 1][2], workers=int(first == 1))
    assert same(got, want[first:])


def test_changes_are_not_drawn_ahead(files):
    loader, changes = Loader(files, CPU, WINDOWS, 1), generator(1)
    batches = loader.batches(loader.draw(3, 3, generator(0)), 0, changes)
    before = changes.get_state()
    assert torch.equal(before, generator(1).get_state())
    next(batches)
    time.sleep(0.2)  # the worker is ahead
    assert torch.equal(changes.get_state(), epoch(files, steps=3, batch=3)[0][2])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(files, workers):
    before = torch.get_rng_state()
    epoch(files, workers=workers)
    list(Loader(files, CPU, WINDOWS, workers).whole(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_whole(files, workers):
    loader = Loader(files, CPU, WINDOWS, workers)
    batches = list(loader.whole(4))
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    want = torch.stack([files.images.read(index) for index in range(9)])
    assert torch.equal(torch.cat([images for images, _ in batches]), want)
    assert torch.equal(torch.cat([labels for _, labels in batches]), files.labels)
    split = held(9, 1, 4, 4)
    images, labels = (torch.cat(part) for part in zip(*Loader(split, CPU).whole(4), strict=True))
    assert torch.equal(images, split.images) and torch.equal(labels, split.labels)


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_workers_end_early(files, end):
    loader = Loader(files, CPU, WINDOWS, 2)
    batches = loader.batches(loader.draw(9, 1, generator(0)), 0, generator(1))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    if end == "closed":
        batches.close()
    else:
        del batches
        gc.collect()
    assert none_left()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage, kind, said", [
    (lambda path: path.write_bytes(path.read_bytes()[:300]), ValueError, "expected a whole image, got "),
    (lambda path: path.unlink(), FileNotFoundError, "expected an image that can be read, got "),
])  # fmt: skip
def test_a_bad_file_is_named(tmp_path, workers, damage, kind, said):
    train, labels, *_ = folder.load(write_folder(tmp_path), None, SIZE)
    damage(Path(train.path(5)))
    loader, came = Loader(Split(train, labels), CPU, workers=workers), 0
    with pytest.raises(kind) as caught:
        for _ in loader.whole(2):
            came += 1
    assert came == 2  # the batches before it come whole
    message = str(caught.value)
    assert message.startswith(f"data: {said}{train.path(5)} (") and "\n" not in message and "worker" not in message
    del caught
    gc.collect()
    assert none_left()


def test_threads_of_the_parent(files, two_threads):
    """Forked after a parallel region of OpenMP, workers do not wait for threads that they do not have."""
    torch.nn.functional.conv2d(torch.rand(8, 16, 64, 64), torch.rand(16, 16, 3, 3)).sum()
    assert same(epoch(files, workers=2), epoch(files))


def test_signals_of_a_whole_run(files):
    """Ctrl-C and SIGTERM to all processes do not end the workers, which the main one needs for its checkpoint."""
    loader = Loader(files, CPU, WINDOWS, 1)
    batches = loader.batches(loader.draw(9, 1, generator(0)), 0, generator(1))
    made = [next(batches)]
    (worker,) = multiprocessing.active_children()
    for number in ("INT", "TERM", "TERM"):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    made += batches
    assert same([pair[:1] for pair in made], [pair[:1] for pair in epoch(files, steps=9, batch=1)])
    assert none_left()


def test_the_end_of_python(files):
    """An iterator that is still there does not keep Python waiting: its workers obey the process they belong to."""
    loader = Loader(files, CPU, WINDOWS, 2)
    batches = loader.batches(loader.draw(9, 1, generator(0)), 0, generator(1))
    next(batches)
    for worker in (workers := multiprocessing.active_children()):
        worker.terminate()  # as multiprocessing does
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0, 0]
    batches.close()


def test_waited(files):
    loader = Loader(files, CPU, WINDOWS)
    begin = time.perf_counter()
    for _ in loader.whole(3):
        time.sleep(0.05)
    passed = time.perf_counter() - begin
    assert 0 < loader.waited <= passed - 0.15
    loader.waited = 0.0
    assert loader.waited == 0


@pytest.mark.parametrize("steps, batch", [(3, 4), (0, 4), (10, 1)])
def test_epochs_too_long(files, steps, batch):
    with pytest.raises(ValueError, match=f"an epoch of 1 to 9 images, got {steps} steps of {batch}"):
        Loader(files, CPU).draw(steps, batch, generator(0))


def test_wrong_settings(files):
    for workers in (-1, 1.0, True):
        with pytest.raises(ValueError, match="expected workers as an integer of at least 0"):
            Loader(files, CPU, workers=workers)
    with pytest.raises(ValueError, match=r"resized_crop with the size of the images .*24, got 32"):
        Loader(files, CPU, Pipeline((ResizedCrop(32),)))
