"""``trtkern convert``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import typer

from trtkern import own
from trtkern.commands._common import FAILURE, USER, Quit, user_errors
from trtkern.commands._json import as_json, tell
from trtkern.commands._models import load, made, sizes_of
from trtkern.names import OWN
from trtkern.output.console import console
from trtkern.output.text import say

OUTPUTS, GRADIENTS = 1e-9, 1e-5
"""How far outputs and gradients in float64 may differ: both are sums in another order."""
SINGLE = 1e-4
"""The same of both where a model runs in float32 alone."""


@as_json("convert")
def convert(
    model: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="A function that returns a model of another library.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Weights of that model, loaded before it is converted: .safetensors, or torch.save."
        ),
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Also fuse each BatchNorm directly followed by neurons into one layer.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a model with a neuron that has no equal here.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Compare outputs and gradients on random input in float64, and time a step in float32."
        ),
    ] = False,
    sizes: Annotated[
        str | None,
        typer.Option("--input", metavar="N,N,...", help="With --check: the sizes of the input, such as 4,8,3,32,32."),
    ] = None,
    loop: Annotated[
        bool,
        typer.Option(
            "--loop",
            help="With --check: the model takes one step; the first size of the input is the time to loop over.",
        ),
    ] = False,
    scale: Annotated[float, typer.Option(help="With --check: the input is drawn between 0 and this.")] = 1.0,
) -> int:
    """Say what of another library's model converts to fused layers; with --check compare the two.

    The model is made by your function, and nothing is written. In a program one line does the same:
    `trtkern.interop.convert(model)`.
    """
    with user_errors():
        if (sizes is not None or loop) and not check:
            raise ValueError(f"{'--input' if sizes is not None else '--loop'}: expected --check beside it, got none")
        if check and sizes is None:
            raise ValueError("--check: expected --input with the sizes of the input, such as 4,8,3,32,32, got none")
        shape = () if sizes is None else sizes_of(sizes)
        if not scale > 0:
            raise ValueError(f"--scale: expected a number above 0, got {scale}")
        if ":" not in model:
            raise ValueError(f"convert: expected {OWN}, got {model!r}")
        own.imported(model, "convert")
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise ValueError(f"--checkpoint: expected a file of tensors, got {checkpoint}: No such file")
        from trtkern import interop

        before = made(model, "convert")
        if checkpoint is not None:
            load(before, Path(checkpoint))
        report = interop.ConvertReport()
        after = interop.convert(copy.deepcopy(before), report, strict=strict, fuse=fuse)
    tell(model=model, **report.summary())
    console().print(str(report), markup=False, highlight=False, soft_wrap=True)
    if not report.converted:
        raise Quit("convert: expected a model with neurons that have an equal here, got none", USER)
    return _checked(before, after, shape, loop, scale) if check else 0


def _checked(before: Any, after: Any, shape: tuple[int, ...], loop: bool, scale: float) -> int:
    import torch

    from trtkern import interop

    def stepped(net: Any, x: Any) -> Any:
        steps = [net(step) for step in x]
        if isinstance(steps[0], torch.Tensor):
            return torch.stack(steps)
        return [torch.stack(each) for each in zip(*steps, strict=True)]  # spikes and potentials, as of snnTorch

    options: dict[str, Any] = {}
    if loop:
        after, options = interop.over_time(after), {"run": stepped, "run_after": lambda net, x: net(x)}
    x = scale * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs, gradients, double = OUTPUTS, GRADIENTS, [copy.deepcopy(net).double() for net in (before, after)]
    with user_errors():
        try:
            result = interop.check(double[0], double[1], x, **options)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            say("the two do not run in float64: compared in float32, where rounding may move a spike")
            outputs = gradients = SINGLE
            result = interop.check(before, after, x.float(), **options)
        result.seconds = interop.check(before, after, x.float(), timed=True, **options).seconds
    tell(check=result)
    console().print(str(result), markup=False, highlight=False, soft_wrap=True)
    if result.within(outputs, gradients):
        same = "the outputs are the same numbers, the gradients too" if result.different == 0 else "the two agree"
        more = "; a larger --scale lets neurons fire" if result.zeros else ""
        console().print(f"{same} but for rounding{more}", soft_wrap=True)
        return 0
    if result.fired == 0:
        raise Quit(
            "--check: expected outputs that are not all 0, got zeros; a larger --scale lets neurons fire", FAILURE
        )
    raise Quit(
        f"--check: expected outputs within {outputs:g} and gradients within {gradients:g} of those before, got more; "
        "please report the model's neurons",
        FAILURE,
    )
