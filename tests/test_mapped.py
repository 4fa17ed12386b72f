"""Frames of events stay on the disk: while they are made, when a part is held out, and while batches are made."""

from __future__ import annotations

import resource
import signal

import pytest
import torch

pytest.importorskip("safetensors")
from anonymous import memory

from trtkern.data import Dataset, Split, cache, fingerprint
from trtkern.data.augment import Flip, Pipeline
from trtkern.data.mapped import Mapped
from trtkern.training.loader import Loader

CPU = torch.device("cpu")
MIB = 1 << 20


def test_it_stands_where_a_tensor_does():
    values = torch.randint(0, 256, (12, 3, 2, 4, 4), dtype=torch.uint8)
    frames = Mapped(values)
    assert (frames.shape, frames.dtype, frames.device, len(frames)) == (values.shape, values.dtype, CPU, 12)
    assert not frames.is_floating_point() and Mapped(values.half()).is_floating_point() and frames.to(CPU) is frames
    mask = torch.arange(12) % 3 == 0
    for index in (slice(2, 7), slice(None), torch.tensor([7, 0, 7]), mask):
        part = frames[index]
        assert isinstance(part, Mapped) and torch.equal(part.read(slice(None)), values[index])
        assert torch.equal(part[torch.tensor([1, 0])].read(torch.tensor([0, 1])), values[index][[1, 0]])
    assert [len(part) for part in frames.split(5)] == [5, 5, 2]
    assert torch.equal(torch.cat(list(frames.split(5))), values)
    there = frames[mask].to(torch.device("meta"))
    assert isinstance(there, torch.Tensor) and there.shape == (4, 3, 2, 4, 4) and there.dtype == torch.uint8


def test_it_is_the_same_data_set():
    values, labels = torch.randint(0, 256, (40, 3, 2, 4, 4), dtype=torch.uint8), torch.arange(40) % 4
    values[35] = values[3]
    whole = [
        Dataset("frames", Split(images[:30], labels[:30]), Split(images[30:], labels[30:]), tuple("abcd"), 0.0, 1.0)
        for images in (values, Mapped(values))
    ]
    assert fingerprint(whole[0]) == fingerprint(whole[1]) and whole[0].shared() == whole[1].shared() == [(3, 5)]
    (rest, held), (its_rest, its_held) = (each.hold_out(0.2) for each in whole)
    assert torch.equal(its_held.images.read(slice(None)), held.images)
    loaders = [Loader(each.train, CPU, Pipeline((Flip(),))) for each in (rest, its_rest)]
    epochs = []
    for loader in loaders:
        plan = loader.draw(3, 8, torch.Generator().manual_seed(0))
        epochs.append([*loader.batches(plan, 1, torch.Generator().manual_seed(1)), *loader.whole(7)])
    for (images, target), (its_images, its_target) in zip(*epochs, strict=True):
        assert torch.equal(images, its_images) and torch.equal(target, its_target) and images.shape[0] == 3


def test_memory_does_not_grow_by_the_frames(tmp_path):
    """96 MiB of frames: made, kept, read again, a part held out, every batch of an epoch; less than a quarter of it."""
    count, made = 768, []

    def make():
        frames = cache.empty(tmp_path, (count, 4, 2, 128, 128), torch.uint8)
        for index in range(count):
            frames[index] = index % 251
        made.append(memory())
        return {"frames": frames}

    before = memory()
    first = cache.cached(tmp_path, {"name": "frames"}, make)
    after = memory()
    again = cache.cached(tmp_path, {"name": "frames"}, make)
    assert len(made) == 1 and torch.equal(first["frames"][::100], again["frames"][::100])
    labels = torch.arange(count) % 3
    whole = Dataset("frames", Split(Mapped(again["frames"]), labels), Split(Mapped(first["frames"])[:3], labels[:3]),
                    tuple("abc"), 0.0, 1.0)  # fmt: skip
    rest, _ = whole.hold_out(0.1)
    loader = Loader(rest.train, CPU)
    plan, total = loader.draw(43, 16, torch.Generator().manual_seed(0)), 0
    for images, _ in loader.batches(plan, 0, torch.Generator()):
        total += int(images[0, :, 0, 0, 0].sum())
    assert total == sum(int(rest.train.images.read(places)[:, 0, 0, 0, 0].sum()) for places in plan.order)
    assert max(made[0], after, memory()) - before < 24 * MIB


def test_a_full_disk_is_said_before_a_page_fails_to_come(tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"has room, got .*name another one with --cache-dir"):
            cache.empty(tmp_path, (100, 100), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
    assert cache.empty(tmp_path, (0, 3), torch.int16).shape == (0, 3) and list(tmp_path.iterdir()) == []
