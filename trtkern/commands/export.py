"""``trtkern export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from trtkern.commands import _models
from trtkern.commands._common import FAILURE, Quit, need, quits, user_errors
from trtkern.commands._json import as_json, tell
from trtkern.names import OWN
from trtkern.output.console import console
from trtkern.output.text import missing, size
from trtkern.own import imported

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = 16
"""Of a run: how many test samples ONNX Runtime is compared on."""
NEAR, SHARE = 1e-3, 0.9
"""An output is near where it differs by at most this, relative to 1 + |output|; so many have to be near."""


@as_json("export")
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODULE:FACTORY",
            help="A run folder of `trtkern train`, one of its checkpoint files, or a function of yours that returns a "
            "network.",
        ),
    ],
    onnx: Annotated[
        Path | None, typer.Option(metavar="FILE.onnx", help="Write the network as ONNX, which other programs run.")
    ] = None,
    program: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.pt2",
            help="Write it as a program of torch.export, which torch loads without the code of the network.",
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="With --program: operators of torch alone, so that trtkern is not needed to run it."
        ),
    ] = False,
    scan: Annotated[
        bool,
        typer.Option(
            "--scan",
            help="Each neuron as one operator that runs T times: sequences of any length. Else T copies of a step.",
        ),
    ] = False,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="4,8,2,48,48",
            help="Of module:factory, the sizes of an input, T,B,... for sequences, or B,... with --images.",
        ),
    ] = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="Of module:factory, where its input has no axis of time but is shown T times."),
    ] = False,
    data_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Of a run: the folder with the files of its data.", show_default="as in training"
        ),
    ] = None,
) -> int:
    """Write a network for other programs: as ONNX, or as a program of torch.export.

    The batch may have any size in the file. Where ONNX Runtime is installed, it runs an ONNX file on the CPU, and what
    it gives is compared with the network.
    """
    own = not Path(model).exists()
    with user_errors():
        _check(model, own, onnx, program, plain, sizes, images)
        if onnx is not None:
            need("interop", "onnx", "onnxscript")
        if own:
            imported(model, "export")
        subject = _of_function(model, sizes, images) if own else _of_run(model, data_dir)
    out = console()
    with quits(FAILURE, ValueError, RuntimeError, OSError):
        if program is not None:
            out.print(_write_program(subject, program, plain, scan), soft_wrap=True, markup=False, highlight=False)
        if onnx is not None:
            from trtkern import interop

            interop.to_onnx(
                subject.model, subject.example, onnx, time_dim=subject.time, batch_dim=subject.batch, scan=scan
            )
            out.print(_written(onnx, subject, scan), soft_wrap=True, markup=False, highlight=False)
            out.print(_compared(onnx, subject), soft_wrap=True, markup=False, highlight=False)
    return 0


class Subject(NamedTuple):
    """What is written."""

    model: nn.Module
    """In evaluation, on the CPU."""
    example: Tensor
    time: int | None
    """The axis of time."""
    batch: int
    """The axis of the batch."""
    samples: str
    """What the example is, in words."""


def _check(
    model: str, own: bool, onnx: Path | None, program: Path | None, plain: bool, sizes: str | None, images: bool
) -> None:
    """What can be wrong with the words of the command line."""
    if own and ":" not in model:
        raise ValueError(f"export: expected a run folder, a checkpoint file, or {OWN}, got {model!r}: no such file")
    if onnx is None and program is None:
        raise ValueError("export: expected a file to write, got none; say --onnx FILE.onnx or --program FILE.pt2")
    for name, file in (("onnx", onnx), ("program", program)):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise ValueError(f"--{name}: expected a file in a folder that exists, got {file}")
    if plain and program is None:
        raise ValueError("--plain: expected --program beside it, got none; an ONNX file is plain in any case")
    if own and sizes is None:
        raise ValueError(
            "--input: expected the sizes of an input of your network, such as 4,8,2,48,48 for T,B,C,H,W, got none"
        )
    if not own and (sizes is not None or images):
        raise ValueError(
            f"{'--images' if sizes is None else '--input'}: expected it with a function of yours, got the run {model}, "
            "whose data say what goes in"
        )
    if sizes is not None and len(_models.sizes_of(sizes)) < (1 if images else 2):
        raise ValueError(f"--input: expected T,B,... or with --images B,..., got {sizes}")


def _of_function(name: str, sizes: str | None, images: bool) -> Subject:
    import torch

    model = _models.made(name, "export").cpu().eval()
    example = torch.rand(_models.sizes_of(sizes or ""), generator=torch.Generator().manual_seed(0))
    return Subject(model, example, None if images else 0, 0 if images else 1, "random numbers between 0 and 1")


def _of_run(path: str, data_dir: str | None) -> Subject:
    need("interop", "matplotlib", "safetensors")
    from trtkern.commands import _runs
    from trtkern.training import resuming

    saved = _runs.weights(Path(path))
    settings = _runs.with_options(resuming.settings_in(saved), data_dir=data_dir, device="cpu")
    trainer = _runs.to_evaluate(saved, settings)
    samples = trainer.samples("test", SAMPLES, SAMPLES)
    example, batch = samples.batches[0][0], samples.batch_dim
    return Subject(trainer.model.eval(), example, None if batch == 0 else 0, batch, "test samples")


def _write_program(subject: Subject, path: Path, plain: bool, scan: bool) -> str:
    import torch

    from trtkern import interop

    recorded = interop.record(
        subject.model, subject.example, time_dim=subject.time, batch_dim=subject.batch, dynamic_time=scan or not plain
    )
    recorded = interop.decompose(recorded, scan=scan) if plain else recorded
    torch.export.save(recorded, path)
    needs = "operators of torch alone" if plain else "import trtkern before torch.export.load"
    return f"{_written(path, subject, scan or not plain)}; {needs}"


def _written(path: Path, subject: Subject, dynamic_time: bool) -> str:
    sizes: list[Any] = list(subject.example.shape)
    sizes[subject.batch] = "batch"
    if subject.time is not None and dynamic_time:
        sizes[subject.time] = "time"
    tell(files=[{"file": path, "bytes": path.stat().st_size, "input": sizes}])
    return f"{path}: {size(path.stat().st_size)}, input [{', '.join(map(str, sizes))}]"


def _compared(path: Path, subject: Subject) -> str:
    """What ONNX Runtime makes of the example, beside what the network does."""
    if lacking := missing("interop", ("onnxruntime",)):
        return f"not compared with the network: {lacking}"
    import torch

    from trtkern import interop

    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(subject.model(subject.example))
    found = torch.utils._pytree.tree_leaves(interop.run_onnx(path, subject.example))
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(found, wanted, strict=True)])
    scale = torch.cat([1 + b.abs().flatten() for b in wanted])
    near = (apart <= NEAR * scale).double().mean().item()
    tell(onnxruntime={"samples": subject.example.shape[subject.batch], "furthest": apart.max().item(), "near": near})
    if not near >= SHARE:
        raise Quit(
            f"export: expected ONNX Runtime to give what the network gives, got {100 * near:.1f} % of the outputs near "
            f"it and differences up to {apart.max().item():.3g} ({subject.samples}); please report the network",
            FAILURE,
        )
    return (
        f"ONNX Runtime on {subject.example.shape[subject.batch]} {subject.samples}: outputs differ by at most "
        f"{apart.max().item():.2g}; {100 * near:.1f} % are within {NEAR:g} of the network's"
    )
