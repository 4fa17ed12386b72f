"""An epoch over tar shards: 10,000 images, each once, over two ranks of two workers each, resumed, in flat memory."""

from __future__ import annotations

import io
import multiprocessing

import pytest
import torch
from anonymous import memory
from patience import no_hang

pytest.importorskip("PIL")
pytest.importorskip("safetensors")
from PIL import Image
from tar_files import tar

from trtkern.data import Split, tar_sets
from trtkern.data.augment import Pipeline, ResizedCrop
from trtkern.training.loader import Loader, Plan

COUNT, SHARDS, SIZE = 10_000, 10, 8
BATCH, STEPS = 100, COUNT // 100
CPU = torch.device("cpu")
PADDING, MIB = 1 << 12, 1 << 20


@pytest.fixture(autouse=True)
def _no_hang():
    with no_hang():
        yield


def jpeg(number: int) -> bytes:
    """One colour, from which ``numbers`` knows it again: JPEG changes it by less than half of what a digit is. Behind
    its end stand zeros, so that all files together are more than the free memory that a process has anyway."""
    file = io.BytesIO()
    digits = number % 32, number // 32 % 32, number // 1024
    Image.new("RGB", (SIZE, SIZE), tuple(8 * digit for digit in digits)).save(file, "JPEG", quality=95)
    return file.getvalue() + bytes(PADDING)


def numbers(images: torch.Tensor) -> list[int]:
    digits = (images.float().mean((2, 3)) / 8).round().long()
    return (digits @ torch.tensor([1, 32, 1024])).tolist()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Ten shards of a thousand images, and one of the test."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        members = []
        for number in range(shard * COUNT // SHARDS, (shard + 1) * COUNT // SHARDS):
            members += [(f"{number}.jpg", jpeg(number)), (f"{number}.cls", str(number % 2).encode())]
        tar(folder / f"train-{shard}.tar", members)
    tar(folder / "val-0.tar", members[:4])
    return folder


@pytest.fixture
def train(place, tmp_path_factory):
    """A new one for each call, as each process of a job has it, by an index that is made once."""
    cache = tmp_path_factory.getbasetemp() / "tar-epochs"

    def load() -> Split:
        return tar_sets.by_shard(place, size=SIZE, cache=str(cache), buffer=300).train

    return load


def part(plan: Plan, rank: int, ranks: int) -> Plan:
    """The columns of a rank."""
    columns = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    return Plan(plan.order[:, columns], plan.seeds[:, columns])


def test_every_image_once_over_two_ranks_of_two_workers_resumed(train):
    """Each rank ends in the middle of the epoch, and another process, with another number of workers, goes on."""
    found, labels, end = [], [], 37
    for rank in range(2):
        for first, last, workers in ((0, end, 2), (end, STEPS, 2)):
            loader = Loader(train(), CPU, workers=workers)
            plan = part(loader.draw(STEPS, BATCH, torch.Generator().manual_seed(3)), rank, 2)
            batches = loader.batches(plan, first, torch.Generator())
            for _, (images, target) in zip(range(first, last), batches, strict=False):
                found += numbers(images)
                labels += target.tolist()
            batches.close()
    assert sorted(found) == list(range(COUNT))
    assert labels == [number % 2 for number in found]
    images = train().images
    steps = images.order(torch.Generator().manual_seed(3)).view(STEPS, BATCH)
    wanted = [int(images.name(row).rpartition(b"/")[2][:-4]) for row in steps[:, : BATCH // 2].flatten().tolist()]
    assert found[: COUNT // 2] == wanted
    shards = [len({images.name(row).partition(b"/")[0] for row in rows}) for rows in steps.tolist()]
    assert sum(shards) / STEPS < 3, "a batch reads from few shards"


def test_one_order_whatever_the_ranks_and_workers(train):
    """Random windows too: an image has the same one whoever decodes it."""
    windows, made = Pipeline((ResizedCrop(SIZE),)), {}
    for ranks, workers in ((1, 0), (2, 2), (4, 1)):
        batches = []
        for rank in range(ranks):
            loader = Loader(train(), CPU, windows, workers)
            plan = part(loader.draw(STEPS, BATCH, torch.Generator().manual_seed(3)), rank, ranks)
            few = Plan(plan.order[:3], plan.seeds[:3])
            batches.append([images for images, _ in loader.batches(few, 0, torch.Generator())])
        made[ranks] = [torch.cat(step) for step in zip(*batches, strict=True)]
    for ranks in (2, 4):
        assert all(torch.equal(one, other) for one, other in zip(made[1], made[ranks], strict=True))


def test_memory_is_flat_over_ten_thousand_images(train):
    """Of the process and of both workers, of which each reads 18 MiB of files between 1,000 images and nearly all."""
    loader = Loader(train(), CPU, workers=2)
    plan = loader.draw(STEPS, BATCH, torch.Generator().manual_seed(0))
    before, sizes, seen = multiprocessing.active_children(), {}, 0
    for step, (images, _) in enumerate(loader.batches(plan, 0, torch.Generator())):
        seen += len(images)
        if step + 1 in (10, STEPS - 8):  # later a worker may be at its end
            workers = [child.pid for child in multiprocessing.active_children() if child not in before]
            assert len(workers) == 2
            sizes[seen] = [memory(), *(memory(pid) for pid in workers)]
    early, late = sizes.values()
    assert seen == COUNT and max(now - then for now, then in zip(late, early, strict=True)) < 4 * MIB
