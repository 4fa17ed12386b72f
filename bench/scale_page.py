"""docs/scale.md and docs/scale.png, made of the rows that ``bench/scale.py`` measured."""

from __future__ import annotations

import csv
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from trtkern.bench.measure import ROOT
from trtkern.models.build import build
from trtkern.output import style
from trtkern.parallel.sharding import blocks_of
from trtkern.profiling.scaling import LINKS, PASSES, Link, least_compute, predict, traffic
from trtkern.training.plan import make

ROWS, PAGE, PICTURE = ROOT / "bench" / "scale.csv", ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.png"
GPUS = (8, 64, 512)
ENOUGH = 0.9
"""The efficiency below which a step is called too small."""
ALLOWED = 0.15
"""How far a prediction may be from the step that was measured."""
KEY = ("use", "network", "parallel", "ranks", "batch", "sync_norm", "accumulate")
SENT = tuple(f"{place}_{what}" for place in ("waited", "beside") for what in ("calls", "messages", "bytes"))
COUNTS = ("ranks", "batch", "accumulate", "rounds", *SENT, "flops")
Row = dict[str, Any]


class Large(NamedTuple):
    """A network whose training is predicted, as a recipe has it."""

    recipe: str
    shape: tuple[int, int, int]
    classes: int

    @property
    def timesteps(self) -> int:
        """T."""
        return int(make(recipe=self.recipe)["timesteps"])

    def network(self) -> nn.Module:
        """Itself."""
        options = dict(make(recipe=self.recipe)["model"])
        return build(options.pop("name"), self.shape, self.classes, timesteps=self.timesteps, **options)

    def sizes(self) -> nn.Module:
        """The network without its memory."""
        with torch.device("meta"):
            return self.network()


LARGE = {
    "ResNet-19": Large("cifar10", (3, 32, 32), 10),
    "SEW-ResNet-34": Large("imagenet", (3, 224, 224), 1000),
    "Spikformer-8-512": Large("spikformer-imagenet100", (3, 224, 224), 100),
}


def read() -> list[Row]:
    """bench/scale.csv, numbers as numbers; of what is there twice the later row counts."""
    found: dict[tuple, Row] = {}
    with open(ROWS, newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: float(value) for name, value in row.items() if name.endswith("_ms") and value}
            counts = {name: int(row[name]) for name in COUNTS if row[name]}
            found[tuple(row[name] for name in KEY)] = {**row, **numbers, **counts}
    return list(found.values())


def fit(rows: list[Row]) -> Link:
    """gloo's start, latency, bandwidth and overlap: least squares of the relative error of the steps to be fitted.

    For each overlap of a grid the others follow from linear equations, which are solved again as the time that is
    hidden follows from them.
    """
    fitted = [row for row in rows if row["use"] == "fit" and row["ranks"] > 1]
    step = np.array([row["step_p50_ms"] for row in fitted])
    rest = step - [row["compute_p50_ms"] for row in fitted]
    sides = np.array([np.add(carried(row, "waited"), carried(row, "beside")) for row in fitted])
    found = []
    for overlap in np.linspace(0, 1, 101):
        link = LINKS["gloo"]._replace(overlap=float(overlap))
        for _ in range(20):
            hides = np.array([hidden(row, link) for row in fitted])
            solved = np.linalg.lstsq(sides / step[:, None], (rest + hides) / step, rcond=None)[0]
            if min(solved) <= 0:
                break
            start, latency, second = (1e-3 * solved).tolist()
            link = link._replace(start=start, latency=latency, bandwidth=1 / second)
        else:
            found.append((sum(error(row, link) ** 2 for row in fitted), link))
    return min(found)[1]


def carried(row: Row, place: str) -> tuple[int, int, int]:
    """Collectives, messages, and the bytes of all ranks together."""
    return row[f"{place}_calls"], row[f"{place}_messages"], row["ranks"] * row[f"{place}_bytes"]


def under_way(row: Row, place: str, link: Link) -> float:
    """Milliseconds of the collectives "waited" for, or "beside" the backward pass."""
    calls, messages, size = carried(row, place)
    return 1e3 * (calls * link.start + messages * link.latency + size / link.bandwidth)


def hidden(row: Row, link: Link) -> float:
    """Of those beside the backward pass, the milliseconds in which it goes on."""
    most = link.overlap * PASSES["backward"] * row["compute_p50_ms"] / row["accumulate"]
    return min(most, under_way(row, "beside", link))


def predicted(row: Row, link: Link) -> float:
    """Milliseconds of the step of a row, by the formula of ``trtkern.profiling.scaling``."""
    sent = under_way(row, "waited", link) + under_way(row, "beside", link)
    return float(row["compute_p50_ms"] + sent - hidden(row, link))


def error(row: Row, link: Link) -> float:
    """Of the prediction, relative to what was measured."""
    return predicted(row, link) / row["step_p50_ms"] - 1


def steps(rows: list[Row], use: str, link: Link) -> str:
    """A table of the steps of more than one process."""
    lines = [
        "| network | how | processes | bytes sent | computing, ms | step, ms | predicted, ms | error |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        if row["use"] != use or row["ranks"] == 1:
            continue
        more = ", synchronised norm" * (row["sync_norm"] == "True") + ", 2 batches a step" * (row["accumulate"] == 2)
        lines.append(
            f"| {row['network']} | {row['parallel'].upper()}{more} | {row['ranks']} | "
            f"{row['waited_bytes'] + row['beside_bytes']:,} | "
            f"{row['compute_p50_ms']:.1f} | {row['step_p50_ms']:.1f} | {predicted(row, link):.1f} | "
            f"{100 * error(row, link):+.0f} % |"
        )
    return "\n".join(lines)


def flops(rows: list[Row], name: str) -> float:
    """Of the training step of one image in one time step."""
    row = next(row for row in rows if row["use"] == "count" and row["network"] == name)
    return row["flops"] / LARGE[name].timesteps


def large(rows: list[Row], *, sync_norm: bool = False) -> str:
    """What the links ask of each network: the least computing, and the images times steps of it."""
    lines = [
        "| network | link | GPUs | sent, MB | DDP: C, ms | T·B per TFLOP/s | FSDP2: C, ms | T·B per TFLOP/s |",
        "|" + "---|" * 8,
    ]
    for name, what in LARGE.items():
        model, each = what.sizes(), flops(rows, name)
        for link in (LINKS["nvlink"], LINKS["infiniband"]):
            for gpus in GPUS:
                sent = traffic(model, gpus, sync_norm=sync_norm)
                cells = [name, link.name, str(gpus), f"{sent.bytes / 1e6:.0f}"]
                for found in (
                    sent,
                    traffic(model, gpus, parallel="fsdp", blocks=list(blocks_of(model)), sync_norm=sync_norm),
                ):
                    least = least_compute(found, link, ENOUGH)
                    cells += [f"{1e3 * least:.2f}", f"{1e12 * least / each:.2g}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw() -> None:
    """docs/scale.png: the efficiency over the computing of a step."""
    from trtkern.output.pictures import below, plain, sheet

    seconds = np.geomspace(1e-4, 1, 200)
    with sheet(PICTURE, (2 * style.WIDTH, 1.4 * style.HEIGHT)) as figure:
        shown = (LINKS["nvlink"], LINKS["infiniband"])
        for axes, link in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
            for color, (name, what) in zip(style.SERIES, LARGE.items(), strict=False):
                model = what.sizes()
                for dashes, gpus in zip((":", "--", "-"), GPUS, strict=True):
                    found = traffic(model, gpus)
                    values = [predict(c, found, gpus, link).efficiency for c in seconds]
                    axes.plot(1e3 * seconds, values, dashes, color=color, label=f"{name}, {gpus} GPUs")
            axes.axhline(ENOUGH, color=style.ASIDE, linewidth=0.8)
            axes.annotate(f"{ENOUGH:.0%}", (1e3 * seconds[0], ENOUGH), xytext=(3, 2), textcoords="offset points")
            axes.set(xlim=(1e3 * seconds[0], 1e3 * seconds[-1]), ylim=(0, 1.02))
            axes.set(xlabel="computing of a step on one GPU, ms", title=f"GPUs joined by {link.name}")
            plain(axes)
            axes.grid()
        figure.axes[0].set_ylabel("efficiency: share of the time that computes")
        below(figure.axes[0])


def page(rows: list[Row]) -> str:
    """docs/scale.md, of what ``read`` found."""
    link = fit(rows)
    checked = [row for row in rows if row["use"] == "check"]
    worst = max(checked, key=lambda row: abs(error(row, link)))
    first = checked[0]
    counts = "\n".join(f"| {name} | {what.timesteps} | {flops(rows, name) / 1e9:.2f} |" for name, what in LARGE.items())
    return PAGE_TEXT.format(
        machine=first["machine"], versions=first["versions"], rounds=first["rounds"], start=1e3 * link.start,
        latency=1e3 * link.latency,
        bandwidth=link.bandwidth / 1e9, overlap=link.overlap, fitted=steps(rows, "fit", link),
        checked=steps(rows, "check", link),
        worst=100 * abs(error(worst, link)), allowed=100 * ALLOWED, enough=100 * ENOUGH, counts=counts,
        large=large(rows), synchronised=large(rows, sync_norm=True), command=first["command"],
    )  # fmt: skip


PAGE_TEXT = """# Several GPUs: what a step sends, and when it is too small

When several GPUs train one network, they send one another gradients, weights and statistics at every step. If a GPU
computes for long between two of these exchanges, they hardly matter. If it computes for a short time only, the GPUs
wait more than they train. This page says what is sent, and how large a step has to be for 8, 64 or 512 GPUs. Read it
before you ask for a cluster. How to start a training on several GPUs is in [Training on several
processes](parallel.md).

**No GPU has measured any of it.** What stands here about GPUs is what a model says, with published numbers of their
links. The model itself was fitted and checked on processes of one CPU.

## The smallest example

About a recipe of the package or of your own, `--ranks` asks the model:

```sh
trtkern train --recipe cifar10 --dry-run --ranks 8
```

In Python the same model is a module of functions. torch calls the processes of a training *ranks*:

```python
from trtkern.models import resnet19
from trtkern.profiling.scaling import LINKS, predict, traffic

sent = traffic(resnet19(), 8)  # or parallel="fsdp", sync_norm=True, accumulate=4
print(sent.bytes, sent.messages)  # of one rank in a step
print(predict(0.05, sent, 8, LINKS["nvlink"]))  # of a step that computes for 0.05 s
```

## What it says of GPUs

Let C be the time that a GPU computes for a step. The *efficiency* is C divided by the time of the whole step: of n
GPUs, the share that trains. The picture has the efficiency over C with DDP.

![Efficiency over the computing of a step](scale.png)

C is not known here, so that it is what the answer is expressed in. The table with the links has the least C at which
a step still has {enough:.0f} % efficiency. A step that computes for less is too small for so many GPUs: communication
eats the rest.

C follows from the batch. A training step of one image in one time step takes so many floating-point operations,
counted by torch's formulas for matrix products and convolutions, backward pass included:

| network | T | GFLOP a step of one image, per time step |
|---|---|---|
{counts}

A GPU that reaches R TFLOP/s on these needs at least R times the T·B of this table: time steps times images of
**each** GPU. For R a profile of the step on one GPU is the only good source (`trtkern profile`). The peak of the data
sheet is not, as it is not reached.

{large}

NVLink is taken as 450 GB/s in one direction (NVLink 4 of an H100) and 3.4 µs a message; InfiniBand as 50 GB/s (NDR, a
port a GPU) and 9.6 µs a message; to start, each takes 8.4 µs. The times are those of NCCL's own model. Eight GPUs of
one machine have NVLink among them. Whether 64 or 512 have it depends on the machine: most have InfiniBand between
machines of eight, and then the rows of InfiniBand hold, since a ring is as slow as its slowest link. All weights and
gradients are float32.

### With synchronised statistics

With `--sync-norm` each BatchNorm waits for two collectives, and that wait does not shrink with the batch. With many
GPUs the latency of these is what decides:

{synchronised}

## On a cluster

`torchrun` starts a process for each GPU, and starts all of them anew where one of them ends; the run then goes on
from its last checkpoint. On one machine that is

```sh
torchrun --nproc-per-node 8 --max-restarts 3 -m trtkern.cli train --recipe cifar10 --data-dir DIR --parallel ddp \\
    --sync-norm --run-dir runs/mine
```

Several machines take a word on where they meet. [examples/cluster/train.slurm](../examples/cluster/train.slurm) says
it for SLURM: `sbatch train.slurm --recipe imagenet --data-dir DIR`. Two minutes before its time is up the job writes
a checkpoint, is queued again, and goes on with `--resume`.
[examples/cluster/kubernetes.yaml](../examples/cluster/kubernetes.yaml) has the same as an Indexed Job of Kubernetes.
The run folder has to lie where all machines see it.

## The model

### What is sent

Of n ranks, each computes the step of its own batch, which takes C seconds. Besides, they send one another what they
need to stay alike:

- With **DDP** every rank has the whole network. Each step ends with an all-reduce: every gradient becomes its average
  over the ranks. torch puts the gradients into buckets of 25 MiB, the first of 1 MiB, and sends a bucket as soon as
  the backward pass has filled it.
- With **FSDP2** every rank keeps a part of each weight. An all-gather makes the weights of a block whole before its
  forward pass, and again before its backward pass; a reduce-scatter behind that leaves each rank the average of its
  own part of the gradients.
- With **synchronised statistics** (`--sync-norm`) each BatchNorm sends twice more in each batch: its statistics in
  the forward pass, and two sums in the backward pass.
- The **TRT penalty** needs the weights alone. With DDP every rank has them, and nothing is sent. With FSDP2 each rank
  takes its part, and an all-reduce of one number makes the value.
- At each step the ranks tell one another whether one of them wants to stop or to save: an all-reduce of four numbers.

### How long that takes

An operation that all ranks do together is a *collective*. It takes u seconds to start, a message has a latency of a
seconds, and a link carries b bytes a second in one direction. Where a collective is made of m messages that wait for
one another, and one rank sends s bytes for it, it takes u + m a + s / b. On one CPU all ranks share b, which makes
the last term n s / b.

| of a tensor of S bytes | messages m | bytes s |
|---|---|---|
| all-reduce, on a ring | 2 (n - 1) | 2 (n - 1) / n S |
| all-reduce, on a tree (NCCL, where that is less) | 2 ceil(log2 n) | 2 (n - 1) / n S |
| all-gather, reduce-scatter | n - 1 | (n - 1) / n S |
| broadcast | ceil(log2 n) | S |

### How long the step takes

Some of what is sent goes on while the GPU computes. The forward pass takes C/3 and the backward pass 2 C/3, since a
backward pass has two products for each of the forward pass. A share o of each can go on while something is sent. With
F what is sent beside the forward pass, B beside the backward pass, and E what the step has to wait for, all in
seconds:

```text
step = C + E + max(0, F - o C/3) + max(0, B - 2 o C/3, G - 2 o C/(3 j))
```

G is what of B are gradients. Of j batches that are accumulated they go out beside the last one's backward pass. E has
the last bucket of DDP, the first all-gather of each pass and the last reduce-scatter of FSDP2, and all statistics
that are synchronised.

On GPUs o is taken to be 1. On a CPU it is small, since the cores that compute also send, and FSDP2 waits for
everything: what it gathers ahead of time it gathers on streams, which a CPU has not.

### That the bytes are right

The bytes are not only computed. The tests count what two processes hand to torch.distributed in a step, with DDP and
with FSDP2, accumulated and synchronised, and compare each kind of collective with the model. They compare the sum
with what the system says that their sockets have sent. gloo has no reduce-scatter, and sends an all-reduce in its
place.

## The fit, and the check

`{command}` measured the rows of this page ([bench/scale.csv](../bench/scale.csv)) and made the page and its picture
of them.

One, two and four processes of one thread each ran on {machine} ({versions}), medians of {rounds} interleaved rounds.
Each process is bound to a core. Four processes share two cores, so C is not that of one process. It is measured
beside as many others as there are ranks: n jobs of one process each, the same program, which sends nothing.

Four numbers were fitted to these steps, by least squares of the relative error: a collective takes {start:.2f} ms to
start, and each of its messages {latency:.2f} ms, both mostly to wake processes that wait; all processes together send
{bandwidth:.2f} GB/s; and the overlap o is {overlap:.2f}.

{fitted}

With these numbers the model predicts steps that were not fitted: FSDP2, other networks, synchronised statistics, and
several batches a step. The form of the model was chosen while most of these steps were known. Those of the network
"deep" were measured for the first time after that.

{checked}

The largest error is {worst:.0f} %; {allowed:.0f} % is what was asked for.

## What this leaves out

- A rank that is slower than the others: all wait for it. The table of the check has some of that, as its processes
  share cores; a cluster has more.
- Loading data, and writing checkpoints.
- Kernels that communication slows down, as it takes some of a GPU's multiprocessors and of its memory's bandwidth.
- NCCL's protocols for small messages, NVLS, and links that other jobs use at the same time.
- Clipping under FSDP2, whose norm is one more all-reduce of a number.
"""


def write() -> None:
    """The page and its picture, anew from the rows."""
    rows = read()
    draw()
    PAGE.write_text(page(rows), encoding="utf-8")
