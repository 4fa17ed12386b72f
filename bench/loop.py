"""What a step of the training loop costs beside that of a plain one, on the digits: rows of bench/results/loop.

python bench/loop.py --rounds 40

Both train the network of the recipe "digits" on the same images, in the same order, with the same optimiser. An epoch
of the one and one of the other take turns; a row has the time of a step, and the ratio of both in the same rounds. The
loop also adds up losses and accuracy, looks for what is not finite, and moves the learning rate; its evaluations and
checkpoints, which come after an epoch, are not part of a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from trtkern import malloc
from trtkern.bench import measure, rows
from trtkern.data import load
from trtkern.training import settings
from trtkern.training.loop import Trainer
from trtkern.training.observer import Observer
from trtkern.training.watch import StopSignal

LOSSES = ("sdt", "trt")


def trainer(loss: str) -> Trainer:
    """Of the recipe, for more epochs than there are rounds: the rate of a step changes nothing of its cost."""
    plan = settings.resolve(recipe="digits", loss=loss, epochs=10_000, device="cpu", threads=1, select="last")
    return Trainer.of(plan, load("digits"))


class Ours:
    """An epoch of the loop."""

    def __init__(self, loss: str, folder: Path) -> None:
        self.trainer, self._folder, self._epochs = trainer(loss), folder, 0

    def __call__(self) -> None:
        self._epochs += 1
        self.trainer._epoch(self._epochs, Observer(), StopSignal(), self._folder)


class Plain:
    """An epoch of the loop that everybody writes, of the same parts."""

    def __init__(self, loss: str) -> None:
        made = trainer(loss)
        self._data, self._model, self._loss, self._optimizer = made.data, made.model, made.loss, made.optimizer
        self._steps, self._batch = made.steps, made.batch_size
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        images, labels = self._data.train
        self._model.train()
        order = torch.randperm(len(labels), generator=self._generator)[: self._steps * self._batch]
        for places in order.split(self._batch):
            self._optimizer.zero_grad()
            self._loss(self._model(self._data.normalise(images[places])), labels[places]).backward()
            self._optimizer.step()


def measured(loss: str, rounds: int, folder: Path, command: str) -> list[rows.Row]:
    """The rows of a loss."""
    ours, plain = Ours(loss, folder), Plain(loss)
    candidates = [measure.Candidate("loop", ours, 0), measure.Candidate("plain", plain, 0)]
    for candidate in candidates:
        measure.warm_up(candidate)
    times = measure.interleave(candidates, [rounds, rounds], f"loop {loss}")
    steps = ours.trainer.steps
    each = {name: [seconds / steps for seconds in found] for name, found in times.items()}
    made = []
    for name, candidate, note in (
        ("loop", "trtkern.train", f"a step of {steps}, evaluations and checkpoints left out"),
        ("plain", "plain loop", "a step; times_ours is plain over loop"),
    ):
        made.append(
            rows.Row(
                **rows.origin(torch.device("cpu")),
                malloc="keeps pages",
                suite="loop",
                case=f"digits {loss}",
                op="loop",
                shape="4,64,1,8,8",
                dtype="float32",
                direction="step",
                candidate=candidate,
                library="trtkern" if name == "loop" else f"torch {torch.__version__}",
                status="ok",
                note=note,
                **rows.figures(each[name], [], each["loop"], 0, 0),
                command=command,
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--csv", type=Path, help="the file that the rows are added to")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    malloc.keep_pages()
    place = asked.csv or measure.ROOT / "bench" / "results" / "loop" / f"{rows.slug(measure.machine())}.csv"
    rows.check_writable(place)
    command = " ".join(["python", "bench/loop.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        for loss in LOSSES:
            made = measured(loss, asked.rounds, Path(folder), command)
            rows.append(made, place)
            for row in made:
                print(
                    f"{row.case}, {row.candidate}: {row.p50_ms:.4f} ms a step, "
                    f"{row.times_ours:.3f} x the loop ({row.times_ours_low:.3f} to {row.times_ours_high:.3f})"
                )


if __name__ == "__main__":
    main()
