"""The options of a training: one row each, from which command line, recipes, plans and ``Settings`` are made.

A field of ``Options`` is a value of the run; it stands in its config.json. A field of ``Call`` belongs to the command
line alone. To add one is to add a field: ``trtkern train --help``, the messages, ``recipes.KEYS``, the checks of
``plan`` and what ``--resume`` takes follow from it. What only a loss, an optimiser or a neuron takes is no option: it
stands in the recipe's table of that name, and in ``trtkern.names`` (LOSSES, OPTIMIZERS, NEURONS).

The standard library only, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from enum import Flag, auto
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from trtkern.datasets import DATASETS
from trtkern.names import AMP, BACKENDS, DVS_RESIZE, LOSSES, OBSERVE, PARALLEL, SELECT
from trtkern.output.text import parsed_size


class Place(Flag):
    """Where an option may stand: on the command line, in a recipe, and beside --resume, where it may change while a run
    is under way; everything else would make two runs of it."""

    COMMAND, RECIPE, RESUME = auto(), auto(), auto()


COMMAND, RECIPE, RESUME = Place


class Range(NamedTuple):
    """The numbers that an option takes."""

    words: str
    holds: Callable[[Any], bool]
    instead: str = ""
    """What to do otherwise, in words."""


@dataclass(frozen=True)
class Option:
    """A row of the table: what a field of ``Options`` or ``Call`` says by ``option``, with its name and type."""

    name: str
    kind: type
    """Of its value; where the default is None, None is a value too."""
    help: str
    """For --help; {choices}, {recipes}, {controls} and {beside} become lists."""
    flags: tuple[str, ...] = ()
    """Without any, it is its name with dashes."""
    where: Place = COMMAND
    default: Any = None
    """The value where nobody says one; of ... there is none, and the recipe must."""
    shown: str | None = None
    """The default in the words of --help; None is the default itself."""
    metavar: str | None = None
    choices: Iterable[str] | None = None
    range: Range | None = None
    own: str = ""
    """What of the user's own may stand there beside the choices, in words."""
    before: Any = ...
    """The value of runs that were begun before there was this option, whose files do not say it; ... is the default."""
    path: bool = False
    """Whether it is a path, which a run keeps as an absolute one."""
    table: bool = False
    """Whether a recipe says it as a table: its name, and what goes with that name."""
    after: str | None = None
    """The option that it follows in --help, in a field of ``Call``; None: the one above it."""

    def __post_init__(self) -> None:
        if not self.flags:
            object.__setattr__(self, "flags", (f"--{self.name.replace('_', '-')}",))

    @property
    def spoken(self) -> str:
        """How a user says it."""
        return self.flags[0] if COMMAND in self.where else f"--set {self.name}"


def option(help: str, *flags: str, **told: Any) -> Any:
    """A field of ``Options`` or ``Call``; what is told of it are the fields of ``Option``."""
    return field(metadata={"help": help, "flags": flags, **told})


def _at_least(least: int) -> Range:
    return Range(f"an integer of at least {least}", lambda value: value >= least)


def _loss_defaults(name: str) -> str:
    values = ", ".join(f"{options[name]:g} for {loss}" for loss, options in LOSSES.items() if name in options)
    return f"of the recipe, else {values}"


class Limit(NamedTuple):
    """What ``memory`` says."""

    amount: float
    """Bytes, or the share of what there is."""
    is_share: bool

    def of(self, total: int) -> int:
        """In bytes, where there are ``total``."""
        return int(self.amount * total) if self.is_share else int(self.amount)


def limit(text: str) -> Limit | None:
    """A size or a share of memory, above nothing and at most all; None is neither."""
    share = text.endswith("%")
    if not text or text[-1].isdigit():  # of what?
        return None
    try:
        amount = float(text[:-1]) / 100 if share else float(parsed_size(text, "--memory"))
    except ValueError:
        return None
    return Limit(amount, share) if 0 < amount <= (1 if share else sys.maxsize) else None


ABOVE_0 = Range("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
OF_RECIPE = "that of the recipe"


@dataclass(frozen=True)
class Options:
    """A run: every value is the one in force (``settings.settle``), or the one that was asked for (``plan.make``)."""

    recipe: str = option(
        "The network, its loss and all numbers of the training: a recipe of the package ({recipes}) or a .toml file of "
        "your own. A control after a + gives it another loss: {controls}.",
        default=..., metavar="NAME[+CONTROL]", shown="the recipe named like --data",
    )  # fmt: skip
    data: str = option(
        "The data set to train on: {choices}. The digits come with the package. Or one of your own: module:function "
        "that gives it, in this folder, folder:DIR with a folder of files for each class, or tar:DIR with tar shards.",
        where=COMMAND | RECIPE, default=..., choices=DATASETS, own=", module:function, folder:DIR or tar:DIR",
        shown="that of the recipe, else digits",
    )  # fmt: skip
    data_options: dict[str, Any] = option("What a data set of your own takes.", where=RECIPE, default={})
    time_first: bool | None = option(
        "Whether samples are sequences [T, ...], which the network gets as [T, B, ...]; None: those of four axes are.",
        where=RECIPE,
    )
    data_dir: str | None = option(
        "The folder with the files of the data set. The digits need none; fashion-mnist is also found where Debian's "
        "package puts it.",
        where=COMMAND | RESUME, metavar="DIR", path=True,
    )  # fmt: skip
    cache_dir: str | None = option(
        "Where the frames that are made of a data set of events are kept for the next run.",
        metavar="DIR", path=True, shown="~/.cache/trtkern",
    )  # fmt: skip
    class_list: str | None = option(
        "For imagenet100: a text file with the names of its 100 class folders, one a line.",
        metavar="FILE", path=True, shown="classes.txt in --data-dir",
    )  # fmt: skip
    dvs_resize: str = option(
        "How the frames of dvs-cifar10 are made smaller: {choices}. paper is what the paper's code feeds: binary "
        "frames, mirrored, both polarities in one channel, the other one empty.",
        where=COMMAND | RECIPE, default="bilinear", choices=DVS_RESIZE, shown="bilinear",
    )  # fmt: skip
    train_images: int | None = option(
        "Of so many training images, stratified (``Dataset.fewer`` with seed 0); None is all.", where=RECIPE
    )
    augment: list[dict[str, Any]] = option(
        "The random changes of the images (``trtkern.data.augment.Pipeline.from_recipe``).", where=RECIPE, default=[]
    )
    mix: dict[str, Any] = option(
        "What mixes the images of a batch with one another, and their labels: its name and what it takes.",
        where=RECIPE, default={},
    )  # fmt: skip
    model: dict[str, Any] = option(
        "Its name and what its builder takes (``trtkern.models.build``), the neuron's parameters among it.",
        where=RECIPE, default=...,
    )  # fmt: skip
    loss: str = option(
        "The loss: {choices}; mse is for numbers instead of classes. Or module:function of your own.",
        where=COMMAND | RECIPE, default="trt", choices=LOSSES, own=", or module:function", table=True,
        shown=f"{OF_RECIPE}, else trt",
    )  # fmt: skip
    loss_options: dict[str, Any] = option("What the loss takes.", where=Place(0), default={})
    label_smoothing: float = option(
        "Share of the labels that is spread over all classes.",
        where=RECIPE, default=0.0, range=Range("a number of 0 to below 1", lambda value: 0 <= value < 1),
    )  # fmt: skip
    timesteps: int = option(
        "How many time steps T an image is shown for.", "--timesteps", "-T",
        where=COMMAND | RECIPE, default=4, range=_at_least(1), shown=f"{OF_RECIPE}, else 4",
    )  # fmt: skip
    epochs: int = option(
        "How often all training images are seen.",
        where=COMMAND | RECIPE | RESUME, default=10, range=_at_least(1), shown=f"{OF_RECIPE}, else 10",
    )  # fmt: skip
    batch_size: int = option(
        "How many images a training step takes.",
        where=COMMAND | RECIPE, default=64, range=_at_least(1), shown=f"{OF_RECIPE}, else 64",
    )  # fmt: skip
    accumulate: int = option(
        "Batches whose gradients are averaged for one update of the weights.",
        where=COMMAND | RECIPE, default=1, range=_at_least(1), shown="that of the recipe, else 1",
    )  # fmt: skip
    optimizer: dict[str, Any] = option(
        "Its name, one of ``trtkern.names.OPTIMIZERS`` or of torch.optim, and what it takes.", where=RECIPE, default={}
    )
    lr: float = option(
        "The highest learning rate; from there it falls as a cosine, or as the recipe's schedule says.",
        where=COMMAND | RECIPE, default=1e-3, range=ABOVE_0, shown=f"{OF_RECIPE}, else 1e-3",
    )  # fmt: skip
    schedule: dict[str, Any] = option(
        "How the learning rate goes: a name of ``trtkern.names.SCHEDULES`` and what it takes.", where=RECIPE, default={}
    )
    warmup: float = option(
        "Share of all steps in which the learning rate rises linearly, before the schedule begins.",
        where=RECIPE, default=0.0, range=Range("a number of 0 to 1", lambda value: 0 <= value <= 1),
    )  # fmt: skip
    clip: float | None = option(
        "The largest norm of all gradients together; None leaves them.", where=RECIPE, range=ABOVE_0
    )
    seed: int = option(
        "Random seed of the first weights, the order of the images and their random changes.",
        default=0, range=Range("an integer of 0 to 2**63 - 1", lambda value: 0 <= value < 2**63),
    )  # fmt: skip
    select: str = option(
        "Which epoch's weights are reported: {choices}. validation: the best on a tenth of the training images, held "
        "out, so that the test images are looked at once. test: the best on the test images, as in the paper. last: "
        "the last.",
        where=COMMAND | RECIPE, default="validation", choices=SELECT, shown="validation",
    )  # fmt: skip
    validation: float = option(
        "Share of the training images that is held out, with ``select`` \"validation\".",
        where=RECIPE, default=0.1, range=Range(
            "a share above 0 and below 1", lambda value: 0 < value < 1, "without held-out images use --select last"
        ),
    )  # fmt: skip
    backend: str = option("What computes the spiking neurons: {choices}.", default="auto", choices=BACKENDS)
    device: str = option(
        "Where to train: auto (a GPU if there is one), cpu, cuda, cuda:N.", where=COMMAND | RESUME, default="auto"
    )
    threads: int = option(
        "How many CPU threads to use.",
        where=COMMAND | RECIPE | RESUME, range=_at_least(1), shown="that of the recipe, else what torch takes",
    )  # fmt: skip
    workers: int = option(
        "How many processes decode image files; 0: the training does.",
        where=COMMAND | RECIPE | RESUME, default=0, range=_at_least(0), shown="that of the recipe, else 0",
    )  # fmt: skip
    parallel: str = option(
        "How the network lies on several processes: {choices}. ddp: whole on each of them. fsdp: its weights, their "
        "gradients and the optimiser's numbers in parts, each on one.",
        where=COMMAND | RECIPE | RESUME, default="ddp", choices=PARALLEL, shown="that of the recipe, else ddp",
    )  # fmt: skip
    sync_norm: bool = option(
        "Statistics of every BatchNorm over the batches of all processes together; without it each takes those of its "
        "own part.",
        where=COMMAND | RECIPE, default=False,
    )  # fmt: skip
    timeout: float = option(
        "Seconds that a process waits for the others before it gives them up.",
        where=COMMAND | RESUME, default=1800.0, range=ABOVE_0,
    )  # fmt: skip
    amp: str = option(
        "Mixed precision: what torch.autocast uses where it deems it safe. none is float32 throughout. {choices}.",
        where=COMMAND | RECIPE, default="none", choices=AMP, shown="that of the recipe, else none",
    )  # fmt: skip
    compile: bool = option(
        "Compile the network with torch.compile: the first steps are slow, the others faster.",
        where=COMMAND | RECIPE, default=False,
    )  # fmt: skip
    exact_convolutions: bool = option(
        "Convolutions and matrix products of spikes by torch's own kernels, bit for bit. Without it a CPU computes "
        "them from packed spikes where it has kernels for that: the same sums in another order, faster.",
        where=COMMAND | RECIPE, default=False, before=True,
    )  # fmt: skip
    memory: str | None = option(
        "The most memory that a training step may take, by prediction: a size, or a share of what the device has. Of "
        "the ways of running the network's blocks (keep, pack, compute again) the fastest that fit are taken.",
        where=COMMAND | RECIPE, metavar="SIZE", shown="that of the recipe, else as the network is made",
        range=Range("a size such as 20GiB or 512MiB, or a share such as 80%", lambda value: limit(value) is not None),
    )  # fmt: skip
    ways: dict[str, str] = option("How each block runs, once ``memory`` has chosen it.", where=Place(0), default={})
    cuda_graphs: bool = option(
        "Run a whole step as one CUDA graph; on a GPU, with adam or adamw.", where=COMMAND | RECIPE, default=False
    )
    keep_every: int | None = option(
        "Keep the weights of every N-th epoch as well, so that `trtkern analyze` can show how they changed.",
        metavar="N", range=_at_least(1), shown="those of the last three epochs and of the best one",
    )  # fmt: skip
    observe: str | None = option(
        "What to look at after each epoch: {choices}, the Fisher information of every time step and its centroid. It "
        "goes into metrics.jsonl; the training is the same to the last bit.",
        choices=OBSERVE, shown="nothing",
    )  # fmt: skip
    observe_every: int | None = option(
        "With --observe: after every N-th epoch alone.", metavar="N", range=_at_least(1), shown="each"
    )
    tensorboard: bool = option("Write the curves for TensorBoard as well, into the run folder.", default=False)


@dataclass(frozen=True)
class Call:
    """What the command line takes beside ``Options``: changes of the recipe, and what is of this call alone."""

    network: str | None = option(
        "The network instead of that of the recipe: a name of ``trtkern.models.build``, or module:function of your "
        "own, in this folder. What it takes is said by --set model.KEY=VALUE.", "--model",
        metavar="NAME", shown="that of the recipe", after="recipe",
    )  # fmt: skip
    changes: list[str] | None = option(
        "Change one value of the recipe, such as lr=1e-3, model.width=16 or loss.eta=0. May be given again.", "--set",
        metavar="KEY=VALUE", after="network",
    )  # fmt: skip
    download: bool = option(
        "Fetch missing files into --data-dir first, and check them.", default=False, after="dvs_resize"
    )
    lam: float | None = option(
        "With the loss trt: strength of the penalty on the weights. With tet: share of the squared error.",
        shown=_loss_defaults("lam"), after="loss",
    )  # fmt: skip
    delta: float | None = option(
        "With the loss trt: how fast the penalty fades over the time steps; 0 is plain L2.",
        shown=_loss_defaults("delta"), after="lam",
    )  # fmt: skip
    eta: float | None = option(
        "With the loss trt: share of the squared error beside the cross-entropy, 0 to 1.",
        shown=_loss_defaults("eta"), after="delta",
    )  # fmt: skip
    seeds: str | None = option(
        "Train once with each of these seeds, in folders of their own in --run-dir, and show mean and standard "
        "deviation. The same command goes on where it was stopped.",
        metavar="0,1,2", after="seed",
    )  # fmt: skip
    run_dir: str | None = option(
        "The folder that the run writes into, new or empty.",
        metavar="DIR", shown="runs/<data>-<loss>-seed<seed>, or that with -2, -3, ...",
    )  # fmt: skip
    processes: int | None = option(
        "Train with so many processes of this machine, one a GPU where there are GPUs. torchrun starts them, and "
        "starts them anew where one of them ends.",
        where=COMMAND | RESUME, range=_at_least(1), shown="1, or as many as torchrun has started",
    )  # fmt: skip
    restarts: int = option(
        "With --processes: how often they are started anew, from the last checkpoint.",
        where=COMMAND | RESUME, default=3, range=_at_least(0),
    )  # fmt: skip
    dry_run: bool = option("Show the settings, the network and the memory of a step; train nothing.", default=False)
    ranks: int | None = option(
        "With --dry-run: what each of so many processes would have in memory and send, and the share of its time that "
        "trains.",
        metavar="N", range=_at_least(1),
    )  # fmt: skip
    json: str | None = option(
        "With --dry-run: write what is shown into that file as JSON too; - prints the JSON alone.",
        metavar="FILE",
    )  # fmt: skip
    resume: str | None = option(
        "Go on with the run in that folder, with its settings; beside it may stand {beside}.",
        metavar="RUN",
    )  # fmt: skip
    other_data: bool = option(
        "With --resume: go on although the data set's files are not those of the training.",
        default=False, where=COMMAND | RESUME,
    )  # fmt: skip


def rows(table: type) -> dict[str, Option]:
    """The options that the fields of a dataclass are, by name."""
    hints = get_type_hints(table)
    return {each.name: Option(each.name, _kind(hints[each.name]), **each.metadata) for each in fields(table)}


def _kind(hint: Any) -> type:
    """int of ``int | None``, dict of ``dict[str, Any]``."""
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    kind: type = get_origin(hint) or hint
    return kind


OPTIONS = rows(Options)
CALL = rows(Call)
LOSS = tuple(name for name in CALL if any(name in options for options in LOSSES.values()))
"""What the command line says of the loss: options of ``trtkern.names.LOSSES``."""
FREE = tuple(name for name, each in OPTIONS.items() if RESUME in each.where)
"""What may change while a run is under way."""


def of_command() -> list[Option]:
    """The options of the command line, in the order of its help."""
    found = [each for each in OPTIONS.values() if COMMAND in each.where]
    for each in CALL.values():
        names = [other.name for other in found]
        found.insert(len(found) if each.after is None else names.index(each.after) + 1, each)
    return found
