"""What is written of a run, and taken up again: the part of the ``Trainer`` that makes and reads its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtkern.data import Dataset
from trtkern.names import is_own
from trtkern.nn._neuron import NeuronLayer
from trtkern.parallel.job import Job
from trtkern.parallel.parts import full, like
from trtkern.training import checkpoint, resuming, run, selection, snapshot
from trtkern.training.loader import Loader
from trtkern.training.selection import Best
from trtkern.training.settings import Settings
from trtkern.training.tally import Begun
from trtkern.training.watch import NonFiniteError, Watch, refuse

_NEEDED = ("epoch", "step", "row", "best", "seconds", "versions")
"""What the metadata of a checkpoint must have to go on from it."""


class Kept:
    """Where a run is, and its checkpoints."""

    settings: Settings
    files: dict[str, Any] | None
    data: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: Loader
    watch: Watch
    job: Job
    best: Best | None
    steps: int
    _class: str
    """Of the network, before it was laid on several processes."""
    _shuffle: torch.Generator
    _changes: torch.Generator
    _drawn: dict[str, Tensor]
    _begun: Begun
    _first: int
    _base: int
    _resumed: checkpoint.Checkpoint | None
    _writer: checkpoint.Writer

    def _made(self, epoch: int, step: int) -> int:
        """The steps that the run has made after that one."""
        return self._base + (epoch - self._first) * self.steps + step

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the weights of a checkpoint.

        Raises:
            ValueError: it belongs to another network, to images of another shape or to other classes.
        """
        if (shape := saved.metadata.get("shape")) != list(self.data.shape):
            raise ValueError(f"checkpoint: expected one for images {self.data.shape}, got {shape}")
        if (kind := saved.metadata.get("class")) is not None and kind != self._class:
            raise ValueError(
                f"checkpoint: expected one of a network of class {self._class}, got one of {kind}; give the network "
                f"that was trained"
            )
        resuming.same_classes(saved, self.data.classes)
        if (neurons := saved.metadata.get("neurons", [])) != own_neurons(self.model):
            now = ", ".join(own_neurons(self.model)) or "none"
            warnings.warn(
                f"checkpoint: expected neurons that have not changed since the training, got {now} in place of "
                f"{', '.join(neurons) or 'none'}: what it computes now may be something else",
                stacklevel=2,
            )
        held = self.model.state_dict()
        weights = {name: like(value, held[name]) if name in held else value for name, value in saved.model.items()}
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: expected one for this network; {error}") from None

    def chosen(self, folder: Path) -> checkpoint.Checkpoint:
        """The weights that the run in ``folder`` has chosen, as the first process finds them.

        Raises:
            DamagedError, FileNotFoundError: as ``selection.chosen``.
        """
        found = checkpoint.spread(self.job, selection.chosen(folder, self.best) if self.job.first else None)
        assert found is not None
        return found

    def finished(self, saved: checkpoint.Checkpoint) -> bool:
        """Whether the run was at its end when that checkpoint was written."""
        return saved.metadata["epoch"] == self.settings.epochs and saved.metadata["row"] is not None

    def resume(self, saved: checkpoint.Checkpoint, folder: Path, say: Callable[[str], None] | None = None) -> None:
        """Take over a checkpoint of the run in ``folder``: the next ``run`` goes on bitwise, on a CPU with the same
        versions. What the folder holds from after that checkpoint is removed.

        Args:
            saved: the checkpoint.
            folder: the run folder.
            say: told about each line of metrics.jsonl that is no row.

        Raises:
            ValueError: it belongs to another network or other classes, or has no more than weights.
        """
        if missing := [name for name in _NEEDED if name not in saved.metadata]:
            raise ValueError(f"checkpoint: expected the state of a run, got one without {', '.join(missing)}")
        epoch, step, row = (saved.metadata[name] for name in ("epoch", "step", "row"))
        self.restore(saved)
        snapshot.restore(saved, self.optimizer, self.scaler)
        self._shuffle.set_state(saved.state["shuffle"])
        self.loader.set_state([value for name, value in saved.state.items() if name.startswith("loader.")])
        self._changes.set_state(saved.state["changes"])
        self._resumed = saved
        self.best = None if saved.metadata["best"] is None else Best(*saved.metadata["best"])
        steps = saved.metadata.get("steps", self.steps)
        made = saved.metadata.get("made", (epoch - 1) * steps + step)
        if self.job.first:
            selection.forget(folder, made)
            run.cut_metrics(folder, epoch, row, say)
        if row is not None:
            self._first, self._base = epoch + 1, made
        elif steps == self.steps:
            self._first, self._base = epoch, made - step
            self._begun = Begun(step, self._sums_in(saved), saved.metadata["seconds"])
        else:  # other images: the epoch begins anew
            self._first, self._base = epoch, made

    def _sums_in(self, saved: checkpoint.Checkpoint) -> Tensor:
        """What this process had added up in the epoch. Where there were more of them, or fewer, the first has all."""
        every = saved.state["sums"].view(-1, saved.state["sums"].shape[-1])
        if len(every) == self.job.world_size:
            return every[self.job.rank]
        return every.sum(0) if self.job.first else torch.zeros_like(every[0])

    def _finite(self, place: str | None, when: str) -> None:
        """Raise in every process if one of them has met a number that is not finite.

        Args:
            place: where this one has; None is nowhere.
            when: in words.

        Raises:
            NonFiniteError: naming the rank and the place.
        """
        refuse(self.job.gathered(place), when)

    def _weights(self, when: str) -> dict[str, Tensor]:
        """The network's state, whole, with the first process's running statistics in all of them.

        Raises:
            NonFiniteError: a number of it is not finite; such a model is not worth saving.
        """
        self._same_buffers()
        broken = self.watch.broken_weight()
        for name in self.job.gathered(broken):
            if name is not None:
                raise NonFiniteError(f"train: expected finite numbers, got NaN or Inf {when}, in {name}")
        return {name: full(value) for name, value in self.model.state_dict().items()}

    def _same_buffers(self) -> None:
        """Running statistics as the first process has them: where they are not shared each has those of its part."""
        if not self.job.alone:
            kept = self.model.state_dict().keys()
            self.job.copy_([buffer for name, buffer in self.model.named_buffers() if name in kept])

    def _metadata(self, epoch: int, step: int, row: dict[str, Any] | None) -> dict[str, Any]:
        """What rebuilds the network, and where the run is."""
        return {
            "settings": self.settings.to_json(),
            "class": self._class if is_own(self.settings.model["name"]) else None,
            "neurons": own_neurons(self.model),
            "shape": list(self.data.shape),
            "classes": list(self.data.classes),
            "data": self.files,
            "epoch": epoch,
            "step": step,
            "steps": self.steps,
            "made": self._made(epoch, step),
            "row": row,
            "versions": run.versions(),
            "processes": self.job.world_size,
        }

    def _drawing(self) -> dict[str, Tensor]:
        """The state of the generators that the order of an epoch comes from."""
        theirs = {f"loader.{place}": state for place, state in enumerate(self.loader.state())}
        return {"shuffle": self._shuffle.get_state(), **theirs}

    def _save(
        self, folder: Path, epoch: int, step: int, row: dict[str, Any] | None, begun: Begun | None = None
    ) -> None:
        weights = self._weights(f"in epoch {epoch}, step {step}")
        # Within an epoch its order is drawn again when the run is resumed.
        drawn = self._drawing() if begun is None else self._drawn
        state, loop = snapshot.capture(self.optimizer, self.scaler, self.job)
        state |= {**drawn, "changes": self._changes.get_state()}
        if begun is not None and begun.sums is not None:
            state["sums"] = torch.stack(self.job.gathered(begun.sums)).squeeze(0)
        metadata = {
            **self._metadata(epoch, step, row),
            "seconds": 0.0 if begun is None else begun.seconds,
            "best": self.best,
            "loop": loop,
        }
        if self.job.first:
            made = checkpoint.Checkpoint(weights, metadata, state)
            self._writer.write(checkpoint.save, folder, made, self._made(epoch, step))


def own_neurons(model: nn.Module) -> list[str]:
    """The neurons of the user's own in a model, each with the digest of what it computes."""
    kinds = {layer.kind for layer in model.modules() if isinstance(layer, NeuronLayer) and not layer.spec.row.builtin}
    return sorted(kinds)
