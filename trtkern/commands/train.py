"""``trtkern train``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from trtkern import backends
from trtkern.commands._common import FAILURE, INTERRUPTED, Quit, console, need, quits, user_errors
from trtkern.data import DATASETS, load
from trtkern.training import checkpoint, recipes, run
from trtkern.training import seeds as series
from trtkern.training.loop import Trainer
from trtkern.training.pages import keep_pages
from trtkern.training.settings import LOSSES, Settings, resolve, resolve_device
from trtkern.training.watch import NonFiniteError


def _loss_defaults(name: str) -> str:
    values = ", ".join(f"{options[name]:g} for {loss}" for loss, options in LOSSES.items() if name in options)
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
        typer.Option(help=f"Data set: {', '.join(DATASETS)}. The digits come with the package.", show_default="digits"),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the files of the data set are: the four IDX files of fashion-mnist, cifar's binary archive.",
            show_default="for fashion-mnist where Debian's package puts them",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch missing files into --data-dir first; checksums are verified.")
    ] = False,
    loss: Annotated[str | None, typer.Option(help=f"Loss: {', '.join(LOSSES)}.", show_default="of the recipe")] = None,
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
    backend: Annotated[str, typer.Option(help=f"Kernels of the LIF layers: {', '.join(backends.NAMES)}.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:N.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="of the recipe, else what torch takes")
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Compute in bfloat16 where autocast deems it safe.")] = False,
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
    """Train a spiking network on images.

    Without options: the 8x8 handwritten digits with the TRT loss, in seconds. The run folder receives a checkpoint
    after every epoch, metrics.jsonl, config.json and the learning curves. Ctrl-C ends the run with a checkpoint.
    """
    need("train", "matplotlib")
    if resume is not None:
        with user_errors():
            _alone(context, "resume")
        return _resume(Path(resume))
    with user_errors():
        settings = resolve(
            recipe=recipe, changes=changes or (), data=data, data_dir=data_dir, loss=loss, lam=lam, delta=delta,
            eta=eta, timesteps=timesteps, backend=backend, device=device, threads=threads, seed=seed, epochs=epochs,
            batch_size=batch_size, lr=lr, amp=amp,
        )  # fmt: skip
        if seeds is not None and _given(context, "seed"):
            raise ValueError("--seeds: expected no --seed beside it, got both")
        plans = [] if seeds is None else [replace(settings, seed=number) for number in series.parse(seeds)]
        if not plans or dry_run:
            trainer = _trainer(settings, download)
        if not plans and not dry_run:
            folder = run.create(settings, run_dir)
    if dry_run:
        return _show(trainer)
    if plans:
        return _series(plans, Path(run_dir or f"runs/{settings.data}-{settings.loss}-seeds"), download)
    return _run(trainer, folder)


def _series(plans: list[Settings], folder: Path, download: bool) -> int:
    """Every plan in a folder of its own; those that are done are only evaluated again."""
    from trtkern.training import progress

    rows = {}
    for plan in plans:
        place = folder / f"seed{plan.seed}"
        with user_errors():
            trainer = _trainer(plan, download)
            if not (place / run.CONFIG).exists():
                run.create(plan, str(place))
                left = True
            elif run.read_settings(place) == plan:
                left = _take_over(trainer, place)
            else:
                raise ValueError(
                    f"--seeds: expected a run of these settings in {place}, got others; name another --run-dir"
                )
        if left:
            _run(trainer, place)
        values = {name: trainer.evaluate(getattr(trainer.data, name))["accuracy"] for name in ("train", "test")}
        rows[plan.seed] = {**values, "gap": values["train"] - values["test"]}
    summary = series.summarise(rows)
    series.write(folder, summary)
    console().print(progress.series(summary, f"{plans[0].recipe}, {plans[0].loss} loss, {len(plans)} seeds"))
    return 0


def _show(trainer: Trainer) -> int:
    """What a run would be."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    lines = [
        json.dumps(trainer.settings.to_json(), indent=2),
        str(trainer.model),
        str(trainer.loss),
        str(trainer.memory()),
        f"{parameters:,} parameters, {trainer.steps} steps of {trainer.batch_size} images an epoch, "
        f"{trainer.settings.epochs} epochs",
    ]
    console().print("\n\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _alone(context: typer.Context, option: str) -> None:
    """Raise if another option was given besides that one."""
    for name in context.params:
        if name != option and _given(context, name):
            raise ValueError(f"--{option}: expected no other option, got it with --{name.replace('_', '-')}")


def _trainer(settings: Settings, download: bool = False) -> Trainer:
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same run on a GPU as well
    keep_pages()
    return Trainer(settings, load(settings.data, settings.data_dir, download))


def _resume(folder: Path) -> int:
    """Go on from the newest good checkpoint; without one, from the start."""
    with user_errors():
        settings = run.read_settings(folder)
        resolve_device(settings.device)
        trainer = _trainer(settings)
        if not _take_over(trainer, folder):
            raise ValueError(
                f"--resume: expected a run that is not at its end, got all {settings.epochs} epochs in {folder}"
            )
    return _run(trainer, folder)


def _take_over(trainer: Trainer, folder: Path) -> bool:
    """Bring the trainer to where the run in ``folder`` is; whether there is something left to do."""
    out = console()

    def say(line: str) -> None:
        out.print(f"resume: {line}", highlight=False, soft_wrap=True, markup=False)

    if not checkpoint.found(folder):
        run.cut_metrics(folder, 1, None)
        say(f"there is no checkpoint in {folder} yet; starts from the beginning")
        return True
    saved = checkpoint.load(folder, say)
    if trainer.finished(saved):
        trainer.restore(saved)
        return False
    trainer.resume(saved)
    epoch, step = saved.metadata["epoch"], saved.metadata["step"]
    run.cut_metrics(folder, epoch, saved.metadata["row"])
    say(f"goes on after epoch {epoch}, step {step} of {trainer.steps}")
    if different := run.differences(saved.metadata["versions"]):
        say(f"the same numbers to the last bit are not promised: {different}")
    return True


def _run(trainer: Trainer, folder: Any) -> int:
    from trtkern.training import plots, progress

    out = console()
    settings, images = trainer.settings, [split.labels.numel() for split in (trainer.data.train, trainer.data.test)]
    out.print(
        f"{settings.data}: {images[0]:,} training and {images[1]:,} test images, {trainer.steps} steps an epoch, "
        f"run folder {folder}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    try:
        with quits(FAILURE, NonFiniteError, OSError):
            result = trainer.run(folder, progress.observer(out))
            if result.rows:
                title = f"{settings.data}, {settings.loss} loss, T={settings.timesteps}, seed {settings.seed}"
                plots.learning_curves(result.rows, title, folder / run.CURVES)
    except Quit as error:
        saved = checkpoint.found(folder)
        kept = f"; the last good checkpoint is {saved[0]}" if saved else "; no checkpoint was written"
        raise Quit(f"{error}{kept}", error.status) from error
    if result.rows:
        out.print(progress.summary(trainer, result, folder))
    if result.stopped:
        epoch, step = result.stopped
        raise Quit(
            f"stopped in epoch {epoch} after step {step} of {trainer.steps}, as asked; "
            f"`trtkern train --resume {folder}` goes on, `trtkern evaluate {folder}` tries its weights", INTERRUPTED,
        )  # fmt: skip
    return 0
