"""``trtkern profile``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from trtkern import names
from trtkern.commands._common import FAILURE, USER, need, quits, user_errors
from trtkern.commands._json import as_json, tell
from trtkern.commands._models import made, sizes_of
from trtkern.output.console import console
from trtkern.training import recipes

if TYPE_CHECKING:
    from trtkern.profiling.step.comparison import ProfileComparison
    from trtkern.profiling.step.report import StepProfile
    from trtkern.profiling.step.subject import Subject

NETWORKS: dict[str, tuple[int, ...]] = {
    "vggsnn": (2, 48, 48), "resnet19": (3, 32, 32), "sew_resnet34": (3, 224, 224), "spiking_resnet34": (3, 224, 224),
    "spikformer": (3, 32, 32), "spike_driven_transformer": (3, 32, 32),
}  # fmt: skip
"""(C, H, W) of what each network by name is profiled on; vggsnn takes frames, the others images."""
BATCH, TIMESTEPS = 8, 4


@as_json("profile")
def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help=f"What to profile. A network ({', '.join(NETWORKS)}), on random images, with TRT loss and Adam. Or a "
            "recipe of `trtkern train`, such as cifar10+l2, with its data, loss and optimiser. Or module:function of "
            "your own, in this folder: a function without arguments that returns a torch.nn.Module.",
        ),
    ] = "vggsnn",
    input: Annotated[
        str | None,
        typer.Option(
            metavar="4,8,2,48,48",
            help="Sizes of the random input: T,B,C,H,W for frames, B,C,H,W for images; for module:function any.",
            show_default="that of the network",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="How many images a step takes.", show_default=f"that of the recipe, else {BATCH}")
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            "--timesteps",
            "-T",
            help="How many time steps T an image is shown for.",
            show_default=f"that of the recipe, else {TIMESTEPS}",
        ),
    ] = None,
    backward: Annotated[
        bool,
        typer.Option(
            "--backward/--no-backward",
            help="Profile the whole training step, or only the forward pass of an evaluation.",
        ),
    ] = True,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe, as in `trtkern train`."),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The folder with the files of the recipe's data set.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help=f"What computes the spiking neurons: {', '.join(names.BACKENDS)}.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:N.")
    ] = "auto",
    amp: Annotated[
        str | None,
        typer.Option(
            help=f"Mixed precision (torch.autocast): {', '.join(names.AMP)}.",
            show_default="that of the recipe, else none",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="How many CPU threads to use.", show_default="what torch takes")
    ] = None,
    steps: Annotated[
        int,
        typer.Option(help="How many steps to profile; as many run without the profiler in between, for comparison."),
    ] = 8,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="List below each layer what ran for it: operators on a CPU, kernels on a GPU."),
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER.json",
            help="Say what became faster and what slower since this profile, which --json has written.",
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", help="Write the last step as a timeline for chrome://tracing or Perfetto."),
    ] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE.html", help="Write a report on one page.")] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.png", help="Draw the roofline: how near each layer comes to the limits of the machine."
        ),
    ] = None,
) -> int:
    """Show where the time of a training step goes, layer by layer, and what bounds it.

    For each layer: the time forward and backward, the bytes moved and kept, the arithmetic (FLOP), how near that comes
    to what this machine can do at best (measured at the same time), and how often its neurons fire. Below it loss,
    optimiser and data loading, and the time that no layer accounts for.
    """
    need("train", "matplotlib", "safetensors")
    with user_errors():
        _check({"steps": steps, "threads": threads, "batch-size": batch_size, "timesteps": timesteps})
        for option, file in (("trace", trace), ("html", html), ("plot", plot)):
            _check_file(option, file)
        earlier = None if compare is None else _read(compare)
        names.one_of("backend", backend, names.BACKENDS)
        if amp is not None:
            names.one_of("amp", amp, names.AMP)
        kind = _kind(model)
        if kind == "recipe" and input is not None:
            raise ValueError("--input: expected with a network or module:function only, got it with a recipe")
        if kind != "recipe" and (changes or data_dir is not None):
            raise ValueError(f"--set, --data-dir: expected with a recipe only, got them with {model}")
        sizes = None if input is None else sizes_of(input)
        if kind == "network":
            sizes = _network_sizes(model, sizes, batch_size, timesteps)
        elif kind == "factory" and (sizes is None or batch_size is not None or timesteps is not None):
            raise ValueError(f"--input: expected the sizes of what {model} takes, and no --batch-size or -T beside it")
        elif kind == "factory" and backend != "auto":
            raise ValueError(f"--backend: expected it where {model} makes its layers, got --backend {backend}")

        chosen = {"batch_size": batch_size, "timesteps": timesteps, "backend": backend, "amp": amp, "threads": threads,
                  "device": device, "data_dir": data_dir, "changes": changes or ()}  # fmt: skip
        subject = _subject(model, kind, sizes, chosen, backward)
    from trtkern.profiling.step import comparison
    from trtkern.profiling.step.profiler import profile_subject

    out = console()
    with quits(USER, ValueError, TypeError), quits(FAILURE, RuntimeError), out.status(Text(f"profiling {model}")):
        found = profile_subject(subject, steps)
    compared = None if earlier is None else comparison.compare(earlier, found)
    tell(**{name: held for name, held in found.to_json().items() if name != "schema"})
    out.print(found.text(kernels), soft_wrap=True, markup=False)
    if compared is not None:
        tell(compared=compared.to_json())
        out.print(f"\n{compared}", soft_wrap=True, markup=False)
    with user_errors():
        _write(found, trace, html, plot, compared)
    return 0


def _check(numbers: dict[str, int | None]) -> None:
    for option, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"--{option}: expected an integer of at least 1, got {value}")


def _check_file(option: str, name: str | None) -> None:
    """Before the work, not after it."""
    if name is None:
        return
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--{option}: expected a file that can be written, in a folder that is there, got {name}")


def _kind(model: str) -> str:
    """What the argument is: "network", "recipe" or "factory"."""
    if model in NETWORKS:
        return "network"
    if model.split("+")[0] in recipes.names() or model.split("+")[0].endswith(".toml"):
        return "recipe"
    if ":" in model:
        return "factory"
    raise names.unknown("profile", model, (*NETWORKS, *recipes.names()), ", a recipe's .toml file or module:function")


def _network_sizes(
    name: str, sizes: tuple[int, ...] | None, batch_size: int | None, timesteps: int | None
) -> tuple[int, ...]:
    """Frames [T, B, C, H, W] or images [B, C, H, W]."""
    if sizes is not None:
        if len(sizes) not in (4, 5):
            raise ValueError(f"--input: expected T,B,C,H,W of frames or B,C,H,W of images for {name}, got {sizes}")
        if batch_size is not None or (timesteps is not None and len(sizes) != 4):
            raise ValueError("--input: expected T and the batch in it, or --timesteps and --batch-size, got both")
        return sizes
    time = (timesteps or TIMESTEPS,) if name == "vggsnn" else ()
    return (*time, batch_size or BATCH, *NETWORKS[name])


def _subject(model: str, kind: str, sizes: tuple[int, ...] | None, chosen: dict[str, Any], backward: bool) -> Subject:
    """The step to profile, and this process set to it."""
    import torch

    from trtkern.malloc import keep_pages
    from trtkern.training.settings import resolve_device

    chosen["device"] = resolve_device(chosen["device"])
    if chosen["threads"] is not None:
        torch.set_num_threads(chosen["threads"])
    keep_pages()
    if kind == "recipe":
        return _recipe(model, chosen, backward)
    assert sizes is not None
    if kind == "network":
        return _network(model, sizes, chosen, backward)
    return _factory(model, sizes, chosen, backward)


def _read(path: Path) -> StepProfile:
    """An earlier profile."""
    from trtkern.output.files import parse
    from trtkern.profiling.step.report import StepProfile

    try:
        content = parse(path.read_bytes())
    except OSError as error:
        raise ValueError(f"--compare: expected a file that can be read, got {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--compare: expected a profile that --json has written, got {path}: {error}") from None
    return StepProfile.from_json(content, f"--compare {path}")


def _write(
    found: StepProfile, trace: str | None, html: str | None, plot: str | None, compared: ProfileComparison | None
) -> None:
    """The files that were asked for."""
    if trace is not None:
        found.write_trace(Path(trace))
    if plot is not None:
        from trtkern.profiling.step import roofline

        roofline.plot(found, Path(plot))
    if html is not None:
        from trtkern.profiling.step import page
        from trtkern.training.run import versions

        page.write(Path(html), found, versions(), ["trtkern", *sys.argv[1:]], compared)


def _network(name: str, sizes: tuple[int, ...], chosen: dict[str, Any], backward: bool) -> Subject:
    import torch

    from trtkern.models.build import BUILDERS
    from trtkern.training.profiled import of_network

    torch.manual_seed(0)
    options = {"timesteps": chosen["timesteps"] or TIMESTEPS, "backend": chosen["backend"]}
    made = BUILDERS[name](shape=sizes[-3:], **options).to(chosen["device"])
    return of_network(name, made, sizes, chosen["device"], amp=chosen["amp"] or "none", backward=backward)


def _recipe(name: str, options: dict[str, Any], backward: bool) -> Subject:
    from trtkern.commands import _runs
    from trtkern.training import plan as plans
    from trtkern.training.profiled import of_trainer
    from trtkern.training.settings import settle

    plan = {**plans.make(recipe=name, **options), "compile": False, "cuda_graphs": False}  # layers are seen eagerly
    return of_trainer(_runs.prepare(settle(plan)), backward)


def _factory(name: str, sizes: tuple[int, ...], chosen: dict[str, Any], backward: bool) -> Subject:
    import torch

    from trtkern.profiling.step.subject import ModelStep
    from trtkern.training.step import DTYPES

    torch.manual_seed(0)
    model = made(name, "profile").to(chosen["device"])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-3, fused=True) if weights and backward else None
    low = None if chosen["amp"] in (None, "none") else DTYPES[chosen["amp"]]
    step = ModelStep(model, torch.rand(sizes, device=chosen["device"]), None, optimizer, backward, low)
    step.title = name
    return step
