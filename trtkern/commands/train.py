"""``trtkern train``. Until the run folder has its plan nothing here loads torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from trtkern import names
from trtkern.commands import _completion
from trtkern.commands._common import Quit, need, user_errors
from trtkern.commands._json import check, telling
from trtkern.output import signals
from trtkern.parallel import launch
from trtkern.training import folder as folders
from trtkern.training import plan as plans
from trtkern.training import recipes
from trtkern.training.options import CALL, FREE, RECIPE, RESUME, Call, Option, of_command

_BESIDE = tuple(option.flags[0] for option in of_command() if RESUME in option.where)
"""What may stand beside --resume."""


def train(context: typer.Context, **said: Any) -> int:
    """Train a spiking network on images or events.

    Without options: the 8x8 handwritten digits with the TRT loss, in seconds. The run folder receives a checkpoint
    after every epoch, metrics.jsonl, config.json, the learning curves, and at the end result.json and a report.
    Ctrl-C ends the run with a checkpoint.
    """
    if (status := launch.ended()) is not None:
        raise Quit("", status)
    call = Call(**{name: said[name] for name in CALL})
    with user_errors():
        if call.json is not None:
            check(call.json)
            if not call.dry_run:
                raise ValueError("--json: expected --dry-run beside it, got it without; a run has metrics.jsonl")
    need("train", "matplotlib", "safetensors")
    together = launch.started()
    with user_errors():
        _expect_processes(call, together)
    several = (call.processes or 1) > 1 and not together
    if said["tensorboard"]:
        need("tensorboard", "tensorboard")
    if call.resume is not None:
        with user_errors():
            _beside_resume(context)
            folders.begun(Path(call.resume))
        if several:
            return _launched(context, call)
        wanted = {name: said[name] for name in FREE if _given(context, name)}
        with signals.waiting():
            from trtkern.commands import _jobs, _runs
        return (_jobs if together else _runs).resume(Path(call.resume), wanted, call.other_data)
    with user_errors():
        if call.other_data:
            raise ValueError("--other-data: expected it beside --resume, got it without")
        if call.ranks is not None:
            plans.fitting(CALL["ranks"], call.ranks)
            if not call.dry_run:
                raise ValueError("--ranks: expected --dry-run beside it, got it without; processes are --processes")
        plan = plan_of(said)
        names.device(plan["device"])
        launch.divided(call.processes or 1, plan["batch_size"])
        if call.seeds is not None and _given(context, "seed"):
            raise ValueError("--seeds: expected no --seed beside it, got both")
        one = not call.dry_run and call.seeds is None
        folder = folders.create(plan, call.run_dir) if one and not together else None
    if several and not call.dry_run:
        return _launched(context, call, folder)
    with signals.waiting():
        from trtkern.commands import _jobs, _runs
    if call.dry_run:
        with telling("train --dry-run", call.json):
            return _runs.show(plan, call.ranks)
    if folder is not None:
        return _runs.begin(plan, folder, call.download)
    if one:
        return _jobs.begin(plan, call.run_dir, call.download)
    place = Path(call.run_dir or f"runs/{names.short(plan['data'])}-{names.short(plan['loss'])}-seeds")
    return (_jobs if together else _runs).series(plan, call.seeds or "", place, call.download)


def plan_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of what stands on the command line.

    Raises:
        ValueError: as ``plan.make``.
    """
    over = {name: None if said[name] is False else said[name] for name in plans.SAID}  # a switch is on or not said
    network = [] if said["network"] is None else [f"model.name={said['network']}"]
    return plans.make(recipe=said["recipe"], changes=[*network, *(said["changes"] or ())], **over)


def _expect_processes(call: Call, together: bool) -> None:
    """Raise if so many processes cannot be started here, or so often."""
    for name in ("processes", "restarts"):
        if (count := getattr(call, name)) is not None:
            plans.fitting(CALL[name], count)
    if together and call.processes not in (None, launch.world_size()):
        raise ValueError(
            f"--processes: expected it without torchrun, which has started {launch.world_size()} of them, got "
            f"{call.processes}; leave it out"
        )


def _launched(context: typer.Context, call: Call, folder: Path | None = None) -> int:
    """The same command in several processes, which train together: in ``folder``, if it has been made for them."""
    words = _without(context.obj, "--processes", "--restarts")
    if folder is not None:
        folders.release(folder)
        words = [*_without(words, "--run-dir"), "--run-dir", str(folder)]
    with signals.waiting():
        import torch.distributed  # noqa: F401
    if status := launch.launch(call.processes or 1, call.restarts, words):
        raise Quit("", status)  # one of them has said why
    return 0


def _without(words: Sequence[str], *flags: str) -> list[str]:
    """A command line without these options and their values."""
    left, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in flags:
            left.append(word)
        skip = not skip and word in flags
    return left


_COMPLETED = {"recipe": _completion.recipe, "resume": _completion.runs}
"""What the shell completes behind options that name something, beside those with choices."""


def _parameter(option: Option) -> inspect.Parameter:
    """What typer reads of an option: its type, its default and its text."""
    text = option.help.format(
        choices=", ".join(option.choices or ()), recipes=", ".join(recipes.names()),
        controls=", ".join(recipes.controls()), beside=", ".join(_BESIDE),
    )  # fmt: skip
    told: dict[str, Any] = {"help": text, "metavar": option.metavar, "autocompletion": _COMPLETED.get(option.name)}
    if option.choices is not None:
        told["autocompletion"] = _completion.among(option.choices)
    if option.shown is not None:
        told["show_default"] = option.shown
    # What a recipe says holds where the command line says nothing; a switch is then off.
    default = option.default if RECIPE not in option.where and option.default is not ... else None
    kind = list[str] if option.kind is list else option.kind
    hint: Any = bool if kind is bool else kind | None
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=bool(default) if kind is bool else default,
        annotation=Annotated[hint, typer.Option(*option.flags, **told)],
    )  # fmt: skip


def _signature() -> inspect.Signature:
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    return inspect.Signature([context, *map(_parameter, of_command())], return_annotation=int)


cast(Any, train).__signature__ = _signature()


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
