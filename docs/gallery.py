"""Draws the pictures of docs/gallery.md and docs/landing.svg:

    python docs/gallery.py              all of them: a minute or two
    python docs/gallery.py --landing    docs/landing.svg alone

The Python blocks of the page run as they stand, and what they found is drawn; runs are trained and a step is profiled
by what the page's commands call; times come from bench/results.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from trtkern.bench import machine_page, plot, rows
from trtkern.bench.rows import Row
from trtkern.output import style
from trtkern.output.pictures import alone, below, interval

DOCS = Path(__file__).resolve().parent
PAGE, FOLDER, LANDING, RESULTS = (
    DOCS / "gallery.md",
    DOCS / "gallery",
    DOCS / "landing.svg",
    DOCS.parent / "bench/results",
)

CHOSEN = {
    "raster": ("spiking", "Spikes of sample"),
    "rates": ("spiking", "Mean firing rate"),
    "fisher": ("informed", "Fisher information"),
    "fisher-layers": ("informed", "Where in time each layer"),
    "gradients": ("carried", "Norm of the gradient of the last step"),
    "landscape": ("around", "Loss on the plane"),
    "energy": ("used", "Modelled energy of each layer"),
    "early": ("stopped", "Accuracy by"),
    "exit": ("stopped", "Early exit"),
}
"""Of each picture of an analysis: the name of the result on the page, and how its caption begins."""
MEASURED = "lif 4x2097152 float32", "both"
"""The case and direction of the picture of times."""


def blocks(page: Path = PAGE) -> list[str]:
    """The Python on the page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def results() -> dict[str, Any]:
    """What the page's Python finds, by its names; the files that it writes are dropped."""
    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            for block in blocks():
                exec(compile(block, PAGE.name, "exec"), names)
        finally:
            os.chdir(before)
    return names


def keep(name: str, draw: Callable[[Axes], None], size: tuple[float, float], title: str) -> None:
    """A picture of the page."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.svg").write_text(alone(draw, size, title), encoding="utf-8")


def analyses(names: Mapping[str, Any]) -> None:
    """The pictures of ``CHOSEN``."""
    for file, (result, beginning) in CHOSEN.items():
        pictures = names[result].pictures({"": names[result]})
        caption, picture = next((c, p) for c, p in pictures.items() if c.startswith(beginning))
        keep(file, picture.draw, picture.size, caption)


def trained() -> None:
    """Of two runs: the accuracy of one, the gaps of both."""
    from trtkern import cli
    from trtkern.reports import pictures
    from trtkern.reports.runs import read
    from trtkern.training import figures

    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, loss) for loss in ("trt", "sdt")]
        for place in places:
            words = ["train", "--data", "digits", "--loss", place.name, "--epochs", "12", "--run-dir", str(place)]
            assert cli.main(words) == 0
        runs = read([str(place) for place in places])
        keep(
            "accuracy", partial(figures.accuracy, rows=runs[0].rows), (style.WIDTH, style.HEIGHT),
            "Accuracy over the epochs of a run",
        )  # fmt: skip
        size = style.WIDTH, style.tall(2, least=1.8, around=1.6)
        keep("gaps", partial(pictures.gaps, runs=runs), size, "Accuracy of two runs on test and training images")


def profiled() -> None:
    """Where the time of a step of a Spikformer goes."""
    import torch

    from trtkern.models.build import BUILDERS
    from trtkern.profiling.step import roofline
    from trtkern.profiling.step.profiler import profile_subject
    from trtkern.training.profiled import of_network

    torch.manual_seed(0)
    model = BUILDERS["spikformer"](shape=(3, 32, 32), timesteps=4)
    step = of_network("spikformer", model, (8, 3, 32, 32), "cpu", amp="none", backward=True)
    found = profile_subject(step, 5)
    height, _ = roofline.heights(found)
    keep("profile", partial(roofline.share, found=found), (style.WIDTH, height), "The parts of a training step")
    size = 1.3 * style.WIDTH, 0.9 * style.WIDTH
    keep("roofline", partial(roofline.roofline, found=found), size, "Each layer below the limits of the machine")


def measured(found: list[Row]) -> None:
    """The times of a layer in every library."""
    compared = [row for row in found if row.suite == "default"]
    group = [row for row in plot.groups(compared)[MEASURED] if row.status == "ok"]
    group.sort(key=lambda row: row.p50_ms)
    machine = machine_page.called(group[0].machine)
    title = f"One layer of neurons, T = 4, on one machine: {machine}"

    def draw(axes: Axes) -> None:
        plot.panel(axes, group)
        axes.set_title("One layer of 2,097,152 neurons, T = 4", loc="right")

    keep("bench", draw, (1.3 * style.WIDTH, style.tall(len(group), around=1.4)), title)


class Step(NamedTuple):
    """The training step of a network on the landing page, in times of the same network with ReLU."""

    name: str
    ours: tuple[float, float, float]
    """(low, middle, high)."""
    theirs: tuple[str, float] | None
    """Its time with the neurons of another library, and which; None: not measured."""


def steps(found: list[Row]) -> list[Step]:
    """Of each network the newest rows of a whole step on one thread, on machines whose instructions were not held back,
    against ReLU in the memory layout in which that is faster."""
    made: dict[str, Step] = {}
    free = [row for row in found if row.op == "step" and row.threads == 1 and "ISA=" not in row.machine]
    for (case, direction), group in plot.groups(free).items():
        timed = [row for row in group if row.status == "ok"]
        relu = min((row for row in timed if "ReLU" in row.candidate), key=lambda row: row.p50_ms, default=None)
        if direction != "both" or relu is None:
            continue
        others = [row for row in timed if "LIFNode" in row.candidate]  # their own transformers are other networks
        best = min(others, key=lambda row: row.p50_ms, default=None)
        ratio = 1 / relu.times_ours_high, 1 / relu.times_ours, 1 / relu.times_ours_low
        theirs = None if best is None else (best.library.split()[0], best.times_ours / relu.times_ours)
        made[case] = Step(case.partition(" step")[0], ratio, theirs)
    return sorted(made.values(), key=lambda step: step.ours[1])


NAMES = {
    "vggsnn": "VGGSNN", "resnet19": "ResNet-19", "sew_resnet34": "SEW-ResNet-34", "mlp": "784-512-512-10, T = 100",
    "spikformer": "a Spikformer block", "spikformer_4_384": "Spikformer-4-384",
    "sdt_2_512": "Spike-driven Transformer-2-512",
}  # fmt: skip


def landing(axes: Axes, found: list[Row]) -> None:
    """A row a network: the time of a training step, where 1 is the same network with ReLU."""
    shown = steps(found)
    for at, step in enumerate(shown):
        interval(axes, at, step.ours, style.OURS)
        axes.annotate(
            f"{NAMES.get(step.name, step.name)}: {step.ours[1]:.2f}", (0, at), xytext=(2, 5),
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=style.TEXT, va="bottom",
        )  # fmt: skip
        if step.theirs is not None:
            interval(axes, at, (float("nan"), step.theirs[1], float("nan")), style.THEIRS)
    axes.axvline(1, color=style.DARK, linewidth=1.4)
    axes.annotate(
        "the same network\nwith ReLU", (1, -0.95), xytext=(5, 0), textcoords="offset points", fontsize=style.SMALL,
        va="center",
    )  # fmt: skip
    axes.plot([], [], "o", color=style.OURS, markersize=6, label="trtkern")
    axes.plot([], [], "o", color=style.THEIRS, markersize=6, label="SpikingJelly, the same network")
    axes.set(xlim=(0, None), ylim=(len(shown) - 0.5, -1.4), yticks=[])
    axes.set(
        xlabel="time of a training step (1: with ReLU instead of spiking neurons)",
        title="A training step with spikes takes less time than with ReLU",
    )
    axes.grid(axis="x")
    below(axes)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landing", action="store_true", help="docs/landing.svg alone")
    asked = parser.parse_args()
    found = rows.read(RESULTS)
    size = 1.2 * style.WIDTH, 1.6 + 0.42 * len(steps(found))
    LANDING.write_text(
        alone(partial(landing, found=found), size, "The time of a training step, beside ReLU's"), "utf-8"
    )
    if asked.landing:
        return
    measured(found)
    analyses(results())
    trained()
    profiled()


if __name__ == "__main__":
    main()
