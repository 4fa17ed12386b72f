"""``trtkern train``. Until the run folder has its plan nothing here loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkern import names
from trtkern.commands._common import need, user_errors
from trtkern.training import folder as folders
from trtkern.training import plan as plans
from trtkern.training import recipes, signals


def _loss_defaults(name: str) -> str:
    values = ", ".join(f"{options[name]:g} for {loss}" for loss, options in names.LOSSES.items() if name in options)
    return f"of the recipe, else {values}"


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[+CONTROL]",
            help=f"{', '.join(recipes.names())}, or a .toml file; a control changes its loss: "
            f"{', '.join(recipes.controls())}.",
            show_default="as --data",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: lr=1e-3, model.width=16, loss.eta=0."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Data set: {', '.join(names.DATASETS)}. The digits come with the package.", show_default="digits"
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the files of the data set are: the four IDX files of fashion-mnist, cifar's binary archive, "
            "the folders train and val of imagenet, the files of events.",
            show_default="for fashion-mnist where Debian's package puts them",
        ),
    ] = None,
    cache_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where frames of events are kept.", show_default="~/.cache/trtkern"),
    ] = None,
    class_list: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The class folders of imagenet100, one a line.",
            show_default="classes.txt in --data-dir",
        ),
    ] = None,
    dvs_resize: Annotated[
        str | None,
        typer.Option(
            help=f"Frames of events: {', '.join(names.DVS_RESIZE)} (as the paper's code feeds them: binary, mirrored, "
            "both polarities in one channel, the other one empty).",
            show_default="bilinear",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch missing files into --data-dir first; checksums are verified.")
    ] = False,
    loss: Annotated[
        str | None, typer.Option(help=f"Loss: {', '.join(names.LOSSES)}.", show_default="of the recipe")
    ] = None,
    lam: Annotated[
        float | None,
        typer.Option(
            help="trt: strength of the weight penalty. tet: share of the squared error.",
            show_default=_loss_defaults("lam"),
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="trt: decay of the penalty over time; 0 is plain L2.", show_default=_loss_defaults("delta")),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="trt: share of the squared error, 0 to 1.", show_default=_loss_defaults("eta")),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            "--timesteps", "-T", help="Time steps T that an image is shown for.", show_default="of the recipe"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs.", show_default="of the recipe")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.", show_default="of the recipe")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate; it falls as a cosine.", show_default="of the recipe"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights and of the order of the images.")] = 0,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,2",
            help="A run of each, in folders of the run folder, with mean and standard deviation at the end; the same "
            "command goes on where it was stopped.",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help=f"Whose weights are reported: {', '.join(names.SELECT)}. validation: of the best epoch on a tenth of "
            "the training images, held out, and the test images are looked at once. test: of the best on them, as in "
            "the paper.",
            show_default="validation",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help=f"Kernels of the LIF layers: {', '.join(names.BACKENDS)}.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:N.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="of the recipe, else what torch takes")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode image files.", show_default="of the recipe, else 0")
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(
            help=f"What autocast computes in where it deems it safe: {', '.join(names.AMP)}.", show_default="none"
        ),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the network with torch.compile: slow first steps, then faster ones."),
    ] = False,
    cuda_graphs: Annotated[
        bool,
        typer.Option("--cuda-graphs", help="Replay the whole step from a CUDA graph; on a GPU, with adam or adamw."),
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the curves for TensorBoard as well, into the run folder.")
    ] = False,
    run_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Run folder, new or empty.",
            show_default="runs/<data>-<loss>-seed<seed>, or that with -2, -3, ...",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the settings, the network and the memory of a step; train nothing.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Go on with the run in that folder, with its settings and no other option."),
    ] = None,
) -> int:
    """Train a spiking network on images or events.

    Without options: the 8x8 handwritten digits with the TRT loss, in seconds. The run folder receives a checkpoint
    after every epoch, metrics.jsonl, config.json, the learning curves, and at the end result.json and a report.
    Ctrl-C ends the run with a checkpoint.
    """
    need("train", "matplotlib")
    if tensorboard:
        need("tensorboard", "tensorboard")
    if resume is not None:
        with user_errors():
            _alone(context, "resume")
            folders.read_plan(Path(resume))
        with signals.waiting():
            from trtkern.commands import _runs

        return _runs.resume(Path(resume))
    with user_errors():
        plan = plans.make(
            recipe=recipe, changes=changes or (), data=data, data_dir=data_dir, cache_dir=cache_dir,
            class_list=class_list, dvs_resize=dvs_resize, loss=loss, lam=lam, delta=delta, eta=eta, timesteps=timesteps,
            select=select, backend=backend, device=device, threads=threads, workers=workers, seed=seed, epochs=epochs,
            batch_size=batch_size, lr=lr, amp=amp, compile=compile or None, cuda_graphs=cuda_graphs or None,
            tensorboard=tensorboard,
        )  # fmt: skip
        if seeds is not None and _given(context, "seed"):
            raise ValueError("--seeds: expected no --seed beside it, got both")
        folder = None if dry_run or seeds is not None else folders.create(plan, run_dir)
    with signals.waiting():
        from trtkern.commands import _runs
    if folder is not None:
        return _runs.begin(plan, folder, download)
    if dry_run:
        return _runs.show(plan, download)
    return _runs.series(plan, seeds or "", Path(run_dir or f"runs/{plan['data']}-{plan['loss']}-seeds"), download)


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _alone(context: typer.Context, option: str) -> None:
    """Raise if another option was given besides that one."""
    for name in context.params:
        if name != option and _given(context, name):
            raise ValueError(f"--{option}: expected no other option, got it with --{name.replace('_', '-')}")
