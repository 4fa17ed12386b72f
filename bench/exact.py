"""Whether a training whose convolutions are computed from packed spikes is as good as one with torch's own.

    python bench/exact.py           trains what is missing in bench/exact.csv, takes the steps that are missing in
                                    bench/exact_losses.csv, then writes docs/exact.md
    python bench/exact.py --part trainings
                                    those alone, without the page; or --part steps
    python bench/exact.py --page    writes the page anew from the rows

Every training has its row as soon as it is done, so that the same command goes on where it was stopped. Trainings of
one seed begin with the same weights and see the images in the same order; one is exact (``--exact-convolutions``), the
other has the kernels. In the first steps of a network the kernels are compared with what one unit in the last place of
every weight does, which is the least that another rounding can change.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import exact_page
import torch
from torch import Tensor, nn

from trtkern import malloc
from trtkern.backends import cpu
from trtkern.bench.measure import append
from trtkern.bench.rows import origin
from trtkern.data import Dataset, load
from trtkern.models import vggsnn
from trtkern.nn import SpikeConv2d, SpikeLinear, TRTLoss, exact_convolutions
from trtkern.training import gathering, settings
from trtkern.training.loop import Trainer

FASHION = ["train_images=10000"]
SETUPS: dict[str, tuple[range, dict[str, Any]]] = {
    "digits": (range(5), {"recipe": "digits"}),
    "fashion-mnist": (range(3), {"recipe": "fashion-mnist", "changes": FASHION}),
}
"""The seeds of a data set, and what is trained: its recipe, and what is changed."""
WAYS = {"exact": True, "kernels": False}
STEPS, NUDGES = 50, 4
"""How many steps are compared; with how many runs whose weights were moved by one unit in the last place."""
SHAPE, CLASSES = (4, 8, 2, 48, 48), 10
"""Frames for VGGSNN: [T, B, C, H, W]."""


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the calls of layers for packed spikes, and how often a kernel computed one, forward and for the weight's
    gradient."""
    counts: Counter[str] = Counter(calls=0, forward=0, weight_grad=0)
    layers = [layer for layer in model.modules() if isinstance(layer, (SpikeConv2d, SpikeLinear))]
    handles = [layer.register_forward_hook(lambda *_: counts.update(calls=1)) for layer in layers]
    before = cpu.spike_conv_forward, cpu.spike_conv_weight_grad

    def counted(name: str, run: Callable[..., bool]) -> Callable[..., bool]:
        def call(*given: Any) -> bool:
            done = run(*given)
            counts[name] += done
            return done

        return call

    cpu.spike_conv_forward, cpu.spike_conv_weight_grad = map(counted, ("forward", "weight_grad"), before)
    try:
        yield counts
    finally:
        cpu.spike_conv_forward, cpu.spike_conv_weight_grad = before
        for handle in handles:
            handle.remove()


def trained(data: str, seed: int, way: str, command: str) -> dict[str, Any]:
    """The row of a training."""
    _, options = SETUPS[data]
    plan = settings.resolve(
        **options, seed=seed, select="last", device="cpu", threads=torch.get_num_threads(), exact_convolutions=WAYS[way]
    )
    trainer = Trainer.of(plan, gathering.gather(plan))
    begin = time.monotonic()
    with counting(trainer.model) as counts, tempfile.TemporaryDirectory() as folder:
        result = trainer.run(Path(folder))
    assert result.final is not None
    return {
        **origin(torch.device("cpu")), "isa": cpu._extension().isa(), "data": data, "way": way, "seed": seed,
        "epochs": plan.epochs, "test": result.final.splits["test"]["accuracy"],
        "train": result.rows[-1]["train"]["accuracy"], "train_loss": round(result.rows[-1]["train"]["loss"], 6),
        "layer_calls": counts["calls"], "kernel_forward": counts["forward"],
        "kernel_weight_grad": counts["weight_grad"], "seconds": round(time.monotonic() - begin, 1), "command": command,
    }  # fmt: skip


def digits_steps() -> tuple[nn.Module, float, Callable[[int], tuple[Tensor, Tensor]]]:
    """The digits' network, its rate, and the batch of a step."""
    plan = settings.resolve(recipe="digits", device="cpu", select="last")
    data: Dataset = load("digits")
    trainer = Trainer.of(plan, data)
    images, labels = data.train
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        places = order[(torch.arange(plan.batch_size) + step * plan.batch_size) % len(order)]
        return data.normalise(images[places]), labels[places]

    return trainer.model, plan.lr, batch


def vggsnn_steps() -> tuple[nn.Module, float, Callable[[int], tuple[Tensor, Tensor]]]:
    """VGGSNN, a rate, and the batch of a step: events that are drawn with the rates of their class."""
    torch.manual_seed(0)
    model = vggsnn(CLASSES, shape=SHAPE[2:])
    rates = 0.4 * torch.rand(CLASSES, *SHAPE[2:], generator=torch.Generator().manual_seed(1)) ** 3

    def batch(step: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(step)
        labels = torch.randint(CLASSES, SHAPE[1:2], generator=draw)
        return (torch.rand(SHAPE, generator=draw) < rates[labels]).float(), labels

    return model, 1e-3, batch


NETWORKS = {"digits": digits_steps, "vggsnn": vggsnn_steps}


def nudged(model: nn.Module, seed: int) -> None:
    """Move every parameter by one unit in the last place, up or down at random."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            up = torch.rand(p.shape, generator=draw) < 0.5
            p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf)))


def losses(name: str, way: str, nudge: int | None = None) -> tuple[list[float], Counter[str]]:
    """The loss of each of the first steps of a network, and what computed them."""
    model, rate, batch = NETWORKS[name]()
    exact_convolutions(model, WAYS[way])
    if nudge is not None:
        nudged(model, nudge)
    loss, optimizer = TRTLoss(model), torch.optim.Adam(model.parameters(), rate, fused=True)
    found = []
    with counting(model) as counts:
        for step in range(STEPS):
            images, labels = batch(step)
            optimizer.zero_grad(set_to_none=True)
            total = loss(model(images), labels)
            total.backward()
            optimizer.step()
            found.append(total.item())
    print(f"{name}: {STEPS} steps, {way}, {'first weights' if nudge is None else f'nudge {nudge}'}", flush=True)
    return found, counts


def stepped(name: str, command: str) -> list[dict[str, Any]]:
    """The rows of a network's first steps."""
    exact, none = losses(name, "exact")
    assert not none["forward"]
    kernels, counts = losses(name, "kernels")
    others = [losses(name, "exact", seed)[0] for seed in range(NUDGES)]
    same = {**origin(torch.device("cpu")), "isa": cpu._extension().isa(), "network": name}
    made = []
    for step in range(STEPS):
        moved = sorted(abs(other[step] - exact[step]) for other in others)
        made.append({
            **same, "step": step + 1, "loss": exact[step], "kernels": abs(kernels[step] - exact[step]),
            "one_ulp_least": moved[0], "one_ulp_middle": statistics.median(moved), "one_ulp_most": moved[-1],
            "nudges": NUDGES, "layer_calls": counts["calls"], "kernel_forward": counts["forward"],
            "kernel_weight_grad": counts["weight_grad"], "command": command,
        })  # fmt: skip
    return made


def known(path: Path, columns: Iterable[str]) -> set[tuple[str, ...]]:
    """What has a row already."""
    if not path.exists():
        return set()
    with open(path, newline="") as file:
        return {tuple(row[column] for column in columns) for row in csv.DictReader(file)}


def main() -> None:
    """Train and step what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="train nothing")
    parser.add_argument("--part", choices=("all", "steps", "trainings"), default="all", help="what is missing of these")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = shlex.join(["python", "bench/exact.py", *sys.argv[1:]])
    if not options.page:
        malloc.keep_pages()
        done = known(exact_page.LOSSES, ("network",))
        for name in NETWORKS:
            if options.part != "trainings" and (name,) not in done:
                append(stepped(name, command), exact_page.LOSSES)
                print(f"{name}: {STEPS} steps", flush=True)
        done = known(exact_page.ROWS, ("data", "seed", "way"))
        wanted = [(data, seed, way) for data, (seeds, _) in SETUPS.items() for seed in seeds for way in WAYS]
        for data, seed, way in wanted:
            if options.part == "steps" or (data, str(seed), way) in done:
                continue
            row = trained(data, seed, way, command)
            append([row], exact_page.ROWS)
            print(f"{data}, seed {seed}, {way}: test {row['test']:.2%}, {row['seconds']} s", flush=True)
    if options.part == "all" or options.page:
        exact_page.PAGE.write_text(exact_page.page(*exact_page.read()), encoding="utf-8")


if __name__ == "__main__":
    main()
