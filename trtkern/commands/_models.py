"""What the commands share that take a model of the user's: module:factory, the sizes of its input, its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkern import own
from trtkern.commands._common import need

if TYPE_CHECKING:
    from torch import nn


def sizes_of(text: str) -> tuple[int, ...]:
    """The numbers of "4,8,3"."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ValueError(
            f"--input: expected sizes of at least 1 with commas between, such as 4,8,2,48,48, got {text!r}"
        )
    return found


def made(name: str, what: str) -> nn.Module:
    """What module:function gives.

    Args:
        name: the function.
        what: the command, for the messages.
    """
    from trtkern.models.build import module

    return module(own.called(own.imported(name, what), name, what), name)


def load(model: nn.Module, path: Path) -> None:
    """The weights in a file, into the model; no code that a file may hold is run."""
    import torch

    if path.suffix == ".safetensors":
        need("interop", "safetensors")
        from safetensors.torch import load_file

        held: Any = load_file(path)
    else:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if isinstance(error, OSError):
                raise
            raise ValueError(f"--checkpoint: expected a file of tensors, got {path}: {error}") from None
        for key in ("state_dict", "model", "net"):
            if isinstance(held, dict) and isinstance(held.get(key), dict):
                held = held[key]
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise ValueError(f"--checkpoint: expected a state dict of tensors in {path}, got {type(held).__name__}")
    wanted = model.state_dict()
    lacking, foreign = [key for key in wanted if key not in held], [key for key in held if key not in wanted]
    if lacking or foreign:
        raise ValueError(
            f"--checkpoint: expected the weights of this model, got {path}, which lacks {lacking[:3] or 'none'} and "
            f"has {foreign[:3] or 'none'} that the model has not ({len(lacking)} and {len(foreign)} in all)"
        )
    for key, value in held.items():
        if value.shape != wanted[key].shape:
            raise ValueError(
                f"--checkpoint: expected {key} of {list(wanted[key].shape)}, got {list(value.shape)} in {path}"
            )
    model.load_state_dict(held)
