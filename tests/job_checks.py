"""What ``test_jobs.py`` runs in several processes that train together: its checks, in all of them and in order."""

import json
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from patience import PATIENCE
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from trtkern import nn as snn
from trtkern.commands import _jobs
from trtkern.commands._common import Quit
from trtkern.parallel import job as jobs
from trtkern.parallel import launch
from trtkern.parallel.job import ALONE, Job, JobError, join
from trtkern.parallel.parts import full
from trtkern.train import Trainer
from trtkern.training import folder as folders
from trtkern.training import loop
from trtkern.training.callbacks import CallbackError
from trtkern.training.gathering import gather
from trtkern.training.settings import resolve

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def images(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count, 1, 8, 8), generator=draw).float(), torch.randint(10, (count,), generator=draw)


def plif(timesteps, width=24):
    """Learned scalars, and no statistics."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, width), snn.PLIF(), nn.Linear(width, 10))
    return snn.TimeSequential(*flat, timesteps=timesteps)


def normed(timesteps):
    """Statistics over the batch, and a learned scalar."""
    conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
    spikes = snn.BatchNormLIF(6, neuron=snn.PLIF)
    return snn.TimeSequential(conv, spikes, nn.Flatten(), nn.Linear(384, 10), timesteps=timesteps)


def tied(timesteps):
    """One weight in two layers."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    layers = nn.Flatten(), first, snn.PLIF(), second, snn.LIF(), nn.Linear(64, 10)
    return snn.TimeSequential(*layers, timesteps=timesteps)


class Idle(nn.Module):
    """Weights that the logits do not always come from, and some that they never do."""

    def __init__(self, timesteps):
        super().__init__()
        self.network, self.never = plif(timesteps), nn.Parameter(torch.ones(3))
        self.now_and_then, self.calls = nn.Parameter(torch.ones(10)), 0

    def forward(self, images):
        self.calls += self.training
        logits = self.network(images)
        return logits + self.now_and_then if self.training and self.calls % 2 == 0 else logits


@contextmanager
def by_itself():
    """Inside, each process trains as if there were no others."""
    loop.join = lambda timeout: ALONE
    try:
        yield
    finally:
        loop.join = join


def trained(folder, model=plif, data=None, drawn=False, **more):
    """A trainer after 20 steps in two epochs, and what it told of them; ``drawn``: with all that a run leaves."""
    data = (images(160), images(37, 1)) if data is None else data
    told = {"optimizer": {"name": "sgd", "momentum": 0.9}, "lr": 0.05, "select": "last", "threads": 1, "batch_size": 16}
    trainer = Trainer(model, data, epochs=2, timesteps=3, **{**told, **more})
    folder.mkdir(exist_ok=True)
    return trainer, trainer.fit(folder, show=False) if drawn else trainer.run(folder)


def weights(trainer):
    return {name: full(value).clone() for name, value in trainer.model.state_dict().items()}


def as_one(rank, world, folder, name, model=plif, **more):
    """All together reach what one process reaches: weights, loss of each epoch, figures of an uneven test split."""
    several, together = trained(folder / f"{name}-together", model, **more)
    found = None
    if rank == 0:
        with by_itself():
            one, alone = trained(folder / f"{name}-alone", model, **{**more, "parallel": "ddp", "sync_norm": False})
        found = weights(one), alone
    wanted, alone = several.job.told(found)
    got = weights(several)
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, **TOLERANCE, msg=lambda text, key=key: f"{name}, {key}: {text}")
    for here, there in zip(together.rows, alone.rows, strict=True):
        for split in ("train", "test"):
            for figure, value in there[split].items():
                assert here[split][figure] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, split, figure)
        assert here["firing"] == pytest.approx(there["firing"], abs=1e-3)
        told = ["communication_share", "loader_share", "samples_per_s"]
        assert [sorted(each) for each in here["processes"]] == [told] * world
    assert together.final.splits["test"]["accuracy"] == alone.final.splits["test"]["accuracy"]
    assert int(together.final.confusion.sum()) == 37  # each test image once
    assert not [file for file in (folder / f"{name}-together").iterdir() if file.name.endswith(".part")]


def losses(rank, world, folder):
    """TRT, TET and SDT under DDP, with random changes of the images."""
    for loss in ("trt", "tet", "sdt"):
        as_one(rank, world, folder, loss, loss=loss, augment=["crop", "flip", "cutout"])


def accumulated(rank, world, folder):
    """Several batches an update, clipped, under DDP and FSDP."""
    for parallel in ("ddp", "fsdp"):
        as_one(rank, world, folder, f"two-{parallel}", accumulate=2, clip=0.5, parallel=parallel)


def in_parts(rank, world, folder):
    """FSDP with learned scalars and each loss; adam, whose numbers lie in parts as well."""
    as_one(rank, world, folder, "fsdp-trt", parallel="fsdp", optimizer="adam", lr=1e-3)
    as_one(rank, world, folder, "fsdp-sdt", parallel="fsdp", loss="sdt")


def odd_weights(rank, world, folder):
    """A weight in two layers, under FSDP, and weights without a gradient, under DDP."""
    as_one(rank, world, folder, "tied", tied, parallel="fsdp")
    as_one(rank, world, folder, "idle", Idle)


def one_by_one(rank, world, folder):
    """A DataLoader whose batches of the test split have no image for the first process."""
    loaders = (DataLoader(TensorDataset(*images(160)), 16, shuffle=True), DataLoader(TensorDataset(*images(37, 1)), 1))
    as_one(rank, world, folder, "loaders", data=loaders)


def shared_statistics(rank, world, folder):
    """Statistics over all processes, under DDP and FSDP."""
    for parallel in ("ddp", "fsdp"):
        as_one(rank, world, folder, f"sync-{parallel}", normed, sync_norm=True, parallel=parallel)


def own_statistics(rank, world, folder):
    """Statistics of each one's part: all evaluate, and keep, those of the first process."""
    trainer, result = trained(folder / "parts", normed)
    assert len({json.dumps(each) for each in trainer.job.gathered(result.rows[-1]["test"])}) == 1
    for name, value in trainer.model.state_dict().items():
        for other in trainer.job.gathered(value):
            assert torch.equal(value, other), name


class Stops:
    """Of one process alone: all of them stop."""

    def __init__(self, *place):
        self.place = place

    def step(self, trainer, epoch, step, loss):
        if (epoch, step) == self.place:
            trainer.stop()


def resumed(rank, world, folder):
    """A run that is stopped within an epoch goes on bit for bit; DDP goes on from FSDP, and the reverse."""
    whole, _ = trained(folder / "whole")
    calls = {"callbacks": [Stops(2, 3)]} if rank == world - 1 else {}
    _, result = trained(folder / "halves", drawn=True, **calls)
    assert result.stopped is not None and result.stopped[0] == 2 and result.stopped[1] < 10
    again, result = trained(folder / "halves", drawn=True)
    assert result.stopped is None and [row["epoch"] for row in result.rows] == [1, 2]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp")):
        trained(folder / first, drawn=True, parallel=first, **calls)
        other, _ = trained(folder / first, drawn=True, parallel=second)
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(other)[name], value, **TOLERANCE)


def begun(rank, world, folder):
    """What four have begun (``ended``)."""
    calls = {"callbacks": [Stops(1, 4)]} if rank == 2 else {}
    _, result = trained(folder, drawn=True, parallel="fsdp", optimizer="adam", lr=1e-3, **calls)
    assert result.stopped is not None
    folders.release(folder)  # which a process has to its end


def ended(rank, world, folder):
    """What four have begun, two go on with, and one brings to its end: what one reaches that does all of it."""
    four, told = folder.parent / "4", {"drawn": True, "optimizer": "adam", "lr": 1e-3}
    while len(list(folder.parent.glob("4-begun-*.said"))) < 4:
        pass
    calls = {"callbacks": [Stops(2, 5)]} if rank == 1 else {}
    trainer, result = trained(four, parallel="fsdp", **told, **calls)
    assert result.stopped is not None
    folders.release(four)
    if rank == 0:
        with by_itself():
            one, result = trained(four, **told)
            whole, alone = trained(folder / "by-itself", **told)
        assert [row["epoch"] for row in result.rows] == [1, 2]
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(one)[name], value, **TOLERANCE)
        for here, there in zip(result.rows, alone.rows, strict=True):
            assert here["train"] == pytest.approx(there["train"], rel=1e-5, abs=1e-5)
    trainer.job.told(None)


def refused(rank, world, folder):
    """What cannot go together is refused in every process, in the same words."""

    def says(words, kind=ValueError, **more):
        with pytest.raises(kind) as raised:
            trained(folder / f"refused{len(words)}-{rank}", **more)
        assert words in str(raised.value), str(raised.value)

    says(f"--batch-size: expected a multiple of {world}, the processes that share a batch, got 15", batch_size=15)
    says("expected the same option lr in every process, got '0.1' in rank 0 and '0.2' in rank 1", lr=0.1 * (1 + rank))
    says("expected the same data (by its checksum) in every process", data=(images(160, rank), images(37, 1)))
    narrow = partial(plif, width=24 + rank)
    says("expected the same network (by the shapes of its weights) in every process", model=narrow)
    says("expected a network that lies on no processes yet", model=nn.parallel.DistributedDataParallel(plif(3)))
    split, drawn = TensorDataset(*images(160)), torch.Generator().manual_seed(rank)
    parts = DataLoader(split, 8, sampler=DistributedSampler(split))
    says("got one with a DistributedSampler", data=(parts, DataLoader(split, 8)))
    mixed = DataLoader(split, 16, shuffle=True, generator=drawn)
    says("expected the same order of the data", data=(mixed, DataLoader(split, 8)))
    says("expected a network with weights that can be trained", model=plif(3).requires_grad_(False))
    says("--amp fp16: expected it with --parallel ddp", amp="fp16", parallel="fsdp")
    says("expected as many test images as processes", data=(images(160), images(1, 1)))
    # An image that only the last process meets, in the second batch of the first epoch.
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0)).view(-1, 16)
    data = images(160)
    data[0][order[1, -1]] = torch.nan
    places = ("ddp", "fsdp")
    for parallel in places:
        says(
            f"got NaN or Inf in epoch 1, step 2 in rank {world - 1}, first in the membrane potential of layer 2",
            RuntimeError, data=(data, images(37, 1)), parallel=parallel,
        )  # fmt: skip


def digits(rank, world, folder):
    """What a job on the digits ends with that nobody kills (``test_jobs.py``)."""
    settings = resolve(epochs=4, threads=1)
    (folder / "digits").mkdir(exist_ok=True)
    Trainer.of(settings, gather(settings)).run(folder / "digits")


def meeting(rank, world, folder):
    """Whoever is started together finds a word in common, whatever an earlier start has left in the store."""
    store, words = distributed.FileStore(str(folder / "meeting"), world), []
    for _ in range(3):
        words.append(jobs._met(store, rank, world, PATIENCE))
        if rank == 1:
            store.set("greeting/1", "of one that was killed before it heard an answer")
        distributed.barrier()
    together = [None] * world
    distributed.all_gather_object(together, words)
    assert together == [words] * world and len(set(words)) == 3


def spoken(rank, world, folder):
    """What befalls all of them is said by the first, and what befalls one by that one, which ends the job."""
    for number, failing in enumerate([range(world), [world - 1]]):
        job = Job(rank, world, store=distributed.PrefixStore(str(number), distributed.FileStore(str(folder / "words"))))
        os.environ[launch.OUTCOME] = str(folder / f"outcome{number}-{rank}")
        with pytest.raises(Quit) as said, _jobs._spoken(job):
            if rank in failing:
                raise Quit("a bad file", 2)
            while not (folder / f"outcome{number}-{world - 1}").exists():
                pass
            raise JobError("another one is gone")
        speaker = 0 if len(failing) == world else world - 1
        wanted = {0: "a bad file", world - 1: f"rank {world - 1}: a bad file"}[speaker] if rank == speaker else ""
        assert str(said.value) == wanted
        assert launch.ended() == (2 if rank == speaker else None)


def silent(rank, world, folder):
    """One that does not answer, for a second that has to pass, is named by the others."""
    job, second, jobs.FOUND_OUT = join(), 1.0, 1.0
    store = distributed.FileStore(str(folder / "words"), world)
    job._store, job.timeout = distributed.PrefixStore("words", store), second
    job._store.set(f"process/{rank}", json.dumps(["elsewhere", 0]))
    job._group = distributed.new_group(timeout=timedelta(seconds=second))
    if rank == world - 1:
        while not store.check(["words/heard"]):
            pass
        return
    with pytest.raises(JobError, match=f"expected rank {world - 1} of {world} to answer within 1 s"), job.listening():
        job.summed(1.0)
    with pytest.raises(CallbackError, match="Connection refused"), job.listening():  # not of another process
        raise CallbackError("callback: expected Log.step to return, got OSError: Connection refused")
    assert [job.speaks() for _ in range(2)] in ([True, False], [False, False])
    job._store.set("heard", "1")


def of_world(check, rank, world):
    """The check in a folder of these processes."""
    folder = Path(sys.argv[1]) / str(world)
    folder.mkdir(exist_ok=True)
    check(rank, world, folder)


if __name__ == "__main__":
    CHECKS = {name: partial(of_world, check) for name, check in list(globals().items()) if callable(check)}
    processes.main(CHECKS, *sys.argv[1:])
