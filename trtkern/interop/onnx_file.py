"""A model as an ONNX file, and such a file run by ONNX Runtime."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from trtkern.interop.decomposition import decompose
from trtkern.interop.recording import BATCH, TIME, record
from trtkern.output import files
from trtkern.output.text import missing

INPUT, OUTPUT = "input", "output"
"""The names of what goes in and comes out; several outputs are numbered, "output_0"."""


def to_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    time_dim: int | None = 0,
    batch_dim: int | None = 1,
    scan: bool = False,
) -> Path:
    """Write a model as ONNX: operators of the standard alone, the loop over time of each neuron among them.

    The numbers are those of ``trtkern.interop.decompose``, as far as ONNX Runtime multiplies matrices as torch does: it
    adds up in another order, and a spike may differ where a potential lies within rounding of its threshold.

    Args:
        model: in evaluation (``model.eval()``); what it takes and gives are tensors.
        example: an input, such as [T, B, C, H, W]. Its values do not matter.
        path: the file; one that is there is replaced.
        time_dim: the axis of the example that is time; None: it has none, as an image [B, C, H, W] that the model
            shows T times.
        batch_dim: the axis that may have any size in the file; None: all sizes are those of the example.
        scan: each neuron is one Scan, which runs for as many steps as the input has: T may differ from the example's.
            Else it is T copies of a step, and T is fixed.

    Returns:
        The file's path.

    Raises:
        ImportError: onnx or onnxscript is not installed; the message has what to type.
        TypeError, ValueError: no module, a model in training, no tensor, axes that it has not; or an operator that
            ONNX has not, with its name.
        OSError: the file cannot be written.
    """
    if lacking := missing("interop", ("onnx", "onnxscript")):
        raise ImportError(f"to_onnx: {lacking}")
    place = Path(path)
    if place.is_dir() or not place.absolute().parent.is_dir():
        raise ValueError(f"to_onnx: expected a file in a folder that exists, got {place}")
    with torch.no_grad(), _quiet():
        program = record(model, example, time_dim=time_dim, batch_dim=batch_dim, dynamic_time=scan)
        made = _translated(decompose(program, scan=scan))
        _tidy(made.model, {TIME: time_dim, BATCH: batch_dim})
        files.write(place, made.model_proto.SerializeToString())
    return place


def _translated(program: ExportedProgram) -> Any:
    count = len(program.graph_signature.user_outputs)
    names = [OUTPUT] if count == 1 else [f"{OUTPUT}_{i}" for i in range(count)]
    try:
        return torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=names, verbose=False, external_data=False
        )
    except torch.onnx.OnnxExporterError as error:
        said = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"to_onnx: expected operators that torch.onnx translates, got {said}; replace what makes it in the model"
        ) from error


def _tidy(model: Any, axes: dict[str, int | None]) -> None:
    """Call the dynamic sizes "batch" and "time", where torch calls them "s0" and the like; and leave out what torch
    notes of where each operator came from, which has the folders of this machine in it."""
    sizes = tuple(model.graph.inputs[0].shape)
    names = {str(sizes[axis]): name for name, axis in axes.items() if axis is not None}
    nodes = list(model.graph.all_nodes())
    inside = (attribute.value for node in nodes for attribute in node.attributes.values())
    graphs = [model.graph, *(each for each in inside if hasattr(each, "all_nodes"))]
    values = [value for graph in graphs for value in graph.inputs] + [value for node in nodes for value in node.outputs]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                value.shape[axis] = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size.value)
    for each in (model, *graphs, *nodes, *values, *model.graph.initializers.values()):
        each.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself as it records and translates."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def run_onnx(path: str | Path, x: Tensor) -> Tensor | tuple[Tensor, ...]:
    """What ONNX Runtime computes on the CPU with such a file: a tensor, or a tuple of several.

    Args:
        path: of a file that ``to_onnx`` wrote.
        x: the input, on the CPU, in the shape that the file was made for.

    Raises:
        ImportError: onnxruntime is not installed; the message has what to type.
    """
    if lacking := missing("interop", ("onnxruntime",)):
        raise ImportError(f"run_onnx: {lacking}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = tuple(map(torch.from_numpy, session.run(None, {INPUT: x.detach().cpu().numpy()})))
    return found[0] if len(found) == 1 else found
