"""``trtkern train``. Until the run folder has its plan nothing here loads torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trtkern import names
from trtkern.commands._common import need, user_errors
from trtkern.training import folder as folders
from trtkern.training import plan as plans
from trtkern.training import recipes, signals

_BESIDE = ("--data-dir", "--other-data", "--workers", "--device", "--threads", "--epochs")
"""What --resume takes: ``resuming.FREE``, and leave to go on with other files."""


def _loss_defaults(name: str) -> str:
    values = ", ".join(f"{options[name]:g} for {loss}" for loss, options in names.LOSSES.items() if name in options)
    return f"of the recipe, else {values}"


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[+CONTROL]",
            help="The network, its loss and all numbers of the training: a recipe of the package "
            f"({', '.join(recipes.names())}) or a .toml file of your own. A control after a + gives it another loss: "
            f"{', '.join(recipes.controls())}.",
            show_default="the recipe named like --data",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value of the recipe, such as lr=1e-3, model.width=16 or loss.eta=0. May be given again.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"The data set to train on: {', '.join(names.DATASETS)}. The digits come with the package.",
            show_default="that of the recipe, else digits",
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The folder with the files of the data set. The digits need none; fashion-mnist is also found where "
            "Debian's package puts it.",
        ),
    ] = None,
    cache_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the frames that are made of a data set of events are kept for the next run.",
            show_default="~/.cache/trtkern",
        ),
    ] = None,
    class_list: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="For imagenet100: a text file with the names of its 100 class folders, one a line.",
            show_default="classes.txt in --data-dir",
        ),
    ] = None,
    dvs_resize: Annotated[
        str | None,
        typer.Option(
            help=f"How the frames of dvs-cifar10 are made smaller: {', '.join(names.DVS_RESIZE)}. paper is what the "
            "paper's code feeds: binary frames, mirrored, both polarities in one channel, the other one empty.",
            show_default="bilinear",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch missing files into --data-dir first, and check them.")
    ] = False,
    loss: Annotated[
        str | None, typer.Option(help=f"The loss: {', '.join(names.LOSSES)}.", show_default="that of the recipe")
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(
            help="With the loss trt: strength of the penalty on the weights. With tet: share of the squared error.",
            show_default=_loss_defaults("lam"),
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="With the loss trt: how fast the penalty fades over the time steps; 0 is plain L2.",
            show_default=_loss_defaults("delta"),
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(
            help="With the loss trt: share of the squared error beside the cross-entropy, 0 to 1.",
            show_default=_loss_defaults("eta"),
        ),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            "--timesteps", "-T", help="How many time steps T an image is shown for.", show_default="that of the recipe"
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="How often all training images are seen.", show_default="that of the recipe")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="How many images a training step takes.", show_default="that of the recipe")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The highest learning rate; from there it falls as a cosine.", show_default="that of the recipe"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed of the first weights, the order of the images and their random changes.")
    ] = 0,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,2",
            help="Train once with each of these seeds, in folders of their own in --run-dir, and show mean and standard"
            " deviation. The same command goes on where it was stopped.",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help=f"Which epoch's weights are reported: {', '.join(names.SELECT)}. validation: the best on a tenth of "
            "the training images, held out, so that the test images are looked at once. test: the best on the test "
            "images, as in the paper. last: the last.",
            show_default="validation",
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help=f"What computes the spiking neurons: {', '.join(names.BACKENDS)}.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Where to train: auto (a GPU if there is one), cpu, cuda, cuda:N.")
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(help="How many CPU threads to use.", show_default="that of the recipe, else what torch takes"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="How many processes decode image files; 0: the training does.",
            show_default="that of the recipe, else 0",
        ),
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(
            help="Mixed precision: what torch.autocast uses where it deems it safe. none is float32 throughout. "
            f"{', '.join(names.AMP)}.",
            show_default="that of the recipe, else none",
        ),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the network with torch.compile: the first steps are slow, the others faster."
        ),
    ] = False,
    cuda_graphs: Annotated[
        bool,
        typer.Option("--cuda-graphs", help="Run a whole step as one CUDA graph; on a GPU, with adam or adamw."),
    ] = False,
    keep_every: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Keep the weights of every N-th epoch as well, so that `trtkern analyze` can show how they changed.",
            show_default="those of the last three epochs and of the best one",
        ),
    ] = None,
    observe: Annotated[
        str | None,
        typer.Option(
            help=f"What to look at after each epoch: {', '.join(names.OBSERVE)}, the Fisher information of every time "
            "step and its centroid. It goes into metrics.jsonl; the training is the same to the last bit.",
            show_default="nothing",
        ),
    ] = None,
    observe_every: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --observe: after every N-th epoch alone.", show_default="each"),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the curves for TensorBoard as well, into the run folder.")
    ] = False,
    run_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The folder that the run writes into, new or empty.",
            show_default="runs/<data>-<loss>-seed<seed>, or that with -2, -3, ...",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the settings, the network and the memory of a step; train nothing.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help=f"Go on with the run in that folder, with its settings; beside it may stand {', '.join(_BESIDE)}.",
        ),
    ] = None,
    other_data: Annotated[
        bool,
        typer.Option(
            "--other-data", help="With --resume: go on although the data set's files are not those of the training."
        ),
    ] = False,
) -> int:
    """Train a spiking network on images or events.

    Without options: the 8x8 handwritten digits with the TRT loss, in seconds. The run folder receives a checkpoint
    after every epoch, metrics.jsonl, config.json, the learning curves, and at the end result.json and a report.
    Ctrl-C ends the run with a checkpoint.
    """
    need("train", "matplotlib", "safetensors")
    if tensorboard:
        need("tensorboard", "tensorboard")
    if resume is not None:
        with user_errors():
            _beside_resume(context)
            folders.begun(Path(resume))
        with signals.waiting():
            from trtkern.commands import _runs

        given = {
            "data_dir": data_dir, "workers": workers, "device": device if _given(context, "device") else None,
            "threads": threads, "epochs": epochs,
        }  # fmt: skip
        return _runs.resume(Path(resume), given, other_data)
    with user_errors():
        if other_data:
            raise ValueError("--other-data: expected it beside --resume, got it without")
        plan = plans.make(
            recipe=recipe, changes=changes or (), data=data, data_dir=data_dir, cache_dir=cache_dir,
            class_list=class_list, dvs_resize=dvs_resize, loss=loss, lam=lam, delta=delta, eta=eta, timesteps=timesteps,
            select=select, backend=backend, device=device, threads=threads, workers=workers, seed=seed, epochs=epochs,
            batch_size=batch_size, lr=lr, amp=amp, compile=compile or None, cuda_graphs=cuda_graphs or None,
            keep_every=keep_every, observe=observe, observe_every=observe_every, tensorboard=tensorboard,
        )  # fmt: skip
        if seeds is not None and _given(context, "seed"):
            raise ValueError("--seeds: expected no --seed beside it, got both")
        folder = None if dry_run or seeds is not None else folders.create(plan, run_dir)
    with signals.waiting():
        from trtkern.commands import _runs
    if folder is not None:
        return _runs.begin(plan, folder, download)
    if dry_run:
        return _runs.show(plan)
    return _runs.series(plan, seeds or "", Path(run_dir or f"runs/{plan['data']}-{plan['loss']}-seeds"), download)


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _beside_resume(context: typer.Context) -> None:
    """Raise if an option was given beside --resume that it does not take."""
    for option in context.command.params:
        if option.name != "resume" and _given(context, str(option.name)) and not {*option.opts} & {*_BESIDE}:
            typed = [name for name in option.opts if any(word.startswith(name) for word in sys.argv)]
            raise ValueError(
                f"--resume: expected beside it one of {', '.join(_BESIDE)}, got {(typed or option.opts)[0]}; a run "
                f"goes on with its own settings, begin another one for others"
            )
