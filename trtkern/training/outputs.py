"""A first look at what a network of the user's gives for the user's data, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trtkern import own as theirs
from trtkern.data import Dataset
from trtkern.data.own import OwnDataset
from trtkern.data.samples import Loaded, Samples
from trtkern.names import is_own
from trtkern.training.losses import Loss, OwnLoss, SquaredError, arranged
from trtkern.training.settings import Settings


def own(settings: Settings, data: Dataset) -> bool:
    """Whether the network or the data are the user's."""
    return isinstance(data, OwnDataset) or is_own(settings.model["name"])


def tried(
    settings: Settings, data: Dataset, loss: Loss, model: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor
) -> Dataset:
    """The data, with as many classes as the network has outputs where they say none.

    Args:
        settings: of the run.
        data: its data set.
        loss: its loss, which is taken once.
        model: its network.
        logits: of a batch, in float32.
        images: a batch of one sample.

    Raises:
        OwnError: a network that raises, or whose outputs are no logits [T, B, C].
        TypeError, ValueError: targets that are none for these outputs.
    """
    name = settings.model["name"] if ":" in settings.model["name"] else type(model).__qualname__
    came = f"a batch of {list(images.shape)} {images.dtype}"
    try:
        out: Any = logits(images)
    except NoTensorError as error:
        raise theirs.OwnError(f"model: expected {name} to give logits [T, B, C] for {came}, got {error}") from None
    except Exception as error:
        raise theirs.failed(error, f"model: expected {name} to take {came}") from error
    time_first = (isinstance(data, OwnDataset) and data.time_first) or images.dim() == 5
    count = images.shape[1] if time_first else images.shape[0]
    numbers = isinstance(loss, SquaredError | OwnLoss)
    wanted = "outputs [T, B, ...]" if numbers else "logits [T, B, C]"
    shape = list(out.shape)
    if out.dim() < (2 if numbers else 3) or (not numbers and out.dim() > 3) or shape[1] != count or 0 in shape:
        raise theirs.OwnError(
            f"model: expected {name} to give {wanted} with B = {count} for {came}, got {shape}; keep the output of "
            f"every step, with time as the first axis"
        )
    if isinstance(data, OwnDataset) and not isinstance(loss, SquaredError):
        data = _classes(data, out, isinstance(loss, OwnLoss))
    elif len(data.classes) != out.shape[-1] and not numbers:
        raise theirs.OwnError(
            f"model: expected {name} to give logits [T, B, {len(data.classes)}] for the {len(data.classes)} classes of "
            f"{data.name}, got {shape}"
        )
    _loss(data, loss, out)
    return data


class NoTensorError(TypeError):
    """An output that is no tensor; the message says what it is."""


def tensor(out: Any) -> Tensor:
    """Itself, if it is one.

    Raises:
        NoTensorError: it is none.
    """
    if not isinstance(out, Tensor):
        raise NoTensorError(f"a {type(out).__name__}" + (f" of {len(out)}" if isinstance(out, (tuple, list)) else ""))
    return out


def _classes(data: OwnDataset, out: Tensor, numbers: bool) -> OwnDataset:
    count = out.shape[-1]
    targets = _targets(data)
    if numbers and (targets.is_floating_point() or out.dim() != 3):
        return data
    if data.classes and len(data.classes) != count:
        raise theirs.OwnError(
            f"model: expected logits [T, B, {len(data.classes)}] for the {len(data.classes)} classes of the data, got "
            f"{list(out.shape)}"
        )
    return data.named(data.classes or [str(number) for number in range(count)])


def _targets(data: Dataset) -> Tensor:
    """Those of the first sample, [1, ...]."""
    images, labels = data.train
    return images.first[1][:1] if isinstance(images, (Samples, Loaded)) else labels[:1]


def _loss(data: Dataset, loss: Loss, out: Tensor) -> None:
    """Raise what the loss says of these outputs and the first target."""
    target = _targets(data).to(out.device)
    with torch.no_grad():
        try:
            found = loss.parts(out, arranged(target, out), regularize=False)
        except (TypeError, ValueError) as error:
            raise (
                type(error)(f"{error} (the first sample's)") if type(error) in (TypeError, ValueError) else error
            ) from None
    del found
