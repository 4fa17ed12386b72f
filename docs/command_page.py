"""The commands of ``trtkern`` as Markdown, taken from the command line itself: what docs/cli.md shows on the site."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer

from trtkern.cli import EXTRAS
from trtkern.commands import app

EXAMPLES = {
    "train": (
        "trtkern train                                       # the 8x8 digits that come with the package",
        "trtkern train --data fashion-mnist --loss tet       # another data set, another loss",
        "trtkern train --recipe cifar10 --data-dir DIR --set lr=2e-3",
        "trtkern train --resume runs/digits-trt-seed0        # goes on with a run that was begun",
    ),
    "sweep": ("trtkern sweep digits --grid loss.lam=1e-6,1e-5 --seeds 0,1,2 --jobs 2",),
    "evaluate": ("trtkern evaluate runs/digits-trt-seed0",),
    "report": ("trtkern report runs/digits-trt-seed0",),
    "bench": (
        "trtkern bench",
        "trtkern bench --op lif --neuron ALIF",
        "trtkern bench --suite sizes --budget 3600",
    ),
    "profile": (
        "trtkern profile",
        "trtkern profile resnet19 --batch-size 16 -T 6 --amp bf16",
        "trtkern profile --html step.html --plot step.png",
    ),
    "inspect": ("trtkern inspect",),
    "convert": ("trtkern convert mymodel:net --check --input 4,8,3,32,32",),
    "export": ("trtkern export runs/digits-trt-seed0 --onnx digits.onnx",),
    "doctor": ("trtkern doctor",),
    "analyze fisher": ("trtkern analyze fisher runs/digits-trt-seed0 --samples 512",),
    "analyze gradients": ("trtkern analyze gradients runs/digits-trt-seed0",),
    "analyze landscape": ("trtkern analyze landscape runs/digits-trt-seed0",),
    "analyze energy": ("trtkern analyze energy runs/digits-trt-seed0",),
    "analyze spikes": ("trtkern analyze spikes runs/digits-trt-seed0",),
    "analyze early": ("trtkern analyze early runs/digits-trt-seed0",),
    "data shard": ("trtkern data shard DIR SHARDS",),
    "data check": ("trtkern data check DIR",),
}
"""Lines to copy; docs that a test holds against the command line, as those of every page."""


def commands() -> dict[str, Any]:
    """Every command by its words, as "data check"; a group stands before its commands."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        if words:
            found[" ".join(words)] = command
        for name, each in getattr(command, "commands", {}).items():
            walk(each, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def cell(text: str) -> str:
    """Text for a cell of a table; an option in it is code."""
    parts = re.split(r"(`+[^`]*`+)", " ".join(text.split()).replace("|", "\\|"))
    return "".join(
        part if part.startswith("`") else re.sub(r"(?<![\w-])--?\w[\w-]*", r"`\g<0>`", part) for part in parts
    )


def bare(text: str) -> str:
    """Text for a cell that is code as a whole."""
    return text.replace("|", "\\|")


def kind(parameter: Any) -> str:
    """What stands behind an option, as NAME or <int>."""
    if parameter.metavar:
        return str(parameter.metavar)
    annotation = parameter.type_descriptor.annotation
    return "" if annotation is bool else f"<{getattr(annotation, '__name__', str(annotation))}>"


def default(parameter: Any) -> str:
    """The default in words; empty where nothing is one."""
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if parameter.default in (None, False, (), []) or not parameter.show_default:
        return ""
    return "on" if parameter.default is True else f"`{parameter.default}`"


def row(parameter: Any) -> str:
    """A parameter as a line of the table."""
    if parameter.param_type_name == "argument":
        name = f"`{bare(kind(parameter) or parameter.name.upper())}`"
    else:
        spelt = sorted(parameter.opts, key=lambda each: each.startswith("--"))
        name = ", ".join(f"`{each}`" for each in [*spelt, *parameter.secondary_opts])
        name += f" `{bare(kind(parameter))}`" if kind(parameter) else ""
    return f"| {name} | {cell(parameter.help or '')} | {cell(default(parameter))} |"


def tables(command: Any) -> Iterator[str]:
    """The arguments and options, a table for each panel of the help."""
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False) and parameter.name != "help":
            panel = getattr(parameter, "rich_help_panel", None)
            title = panel or ("Arguments" if parameter.param_type_name == "argument" else "Options")
            panels.setdefault(str(title), []).append(row(parameter))
    for title, rows in panels.items():
        yield "\n".join([f"| {title} | What it does | Default |", "|---|---|---|", *rows])


def section(words: str, command: Any) -> str:
    """The section of a command; a group has its description alone."""
    parts = [f"{'#' * (2 + words.count(' '))} trtkern {words}", inspect.cleandoc(command.help or "")]
    if words in EXAMPLES:
        parts.append("\n".join(["```sh", *EXAMPLES[words], "```"]))
    if not hasattr(command, "commands"):
        if extra := EXTRAS.get(words.split()[0]):
            parts.append(f"What it needs comes with `pip install 'trtkern[{extra}]'`.")
        parts += tables(command)
    return "\n\n".join(parts)


def page() -> str:
    """All commands, one section each."""
    found = commands()
    lines = [f"- [`trtkern {words}`](#trtkern-{words.replace(' ', '-')})" for words in found]
    return "\n\n".join(["\n".join(lines), *(section(words, command) for words, command in found.items())]) + "\n"
