"""What a network knows after t steps, and what it costs in accuracy to stop as soon as it is sure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trtkern import names
from trtkern.analysis._network import Data, Progress, Samples, logits_of
from trtkern.analysis._result import Picture, Result, Table
from trtkern.analysis._steps import watching
from trtkern.output import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHO = "early"
"""Of the mean output so far: the largest probability, or 1 - entropy / log(classes)."""
THRESHOLDS = (0.0, *(1 - 10 ** (-i / 8) for i in range(1, 41)))
"""Of the confidence, closer together towards 1."""
_Z = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Early(Result):
    """Accuracy by the number of time steps, and by how sure the network has to be before it stops.

    Args:
        timesteps: T.
        samples: how many.
        correct: [T], of the mean output of the first t steps.
        alone: [T], of the output of step t by itself.
        confidence: how sureness is measured (``names.CONFIDENCES``).
        thresholds: [K], rising; the last is infinite: nobody stops early.
        exits: [K, T], share of the samples that stop after step t.
        exit_correct: [K], accuracy with each threshold.
        margin: how far below the accuracy of all steps still counts as reaching it.
    """

    NAME = "early"

    timesteps: int
    samples: int
    correct: Tensor
    alone: Tensor
    confidence: str
    thresholds: Tensor
    exits: Tensor
    exit_correct: Tensor
    margin: float

    @property
    def steps(self) -> Tensor:
        """[K], mean number of steps with each threshold."""
        return self.exits @ torch.arange(1.0, self.timesteps + 1, dtype=torch.float64)

    @property
    def steps_error(self) -> Tensor:
        """[K], standard error of ``steps`` over the samples."""
        squares = self.exits @ torch.arange(1.0, self.timesteps + 1, dtype=torch.float64).square()
        return ((squares - self.steps.square()).clamp(min=0) / self.samples).sqrt()

    @property
    def fixed_needed(self) -> int:
        """The fewest steps, the same for all samples, whose accuracy is that of all steps less ``margin``."""
        return int((self.correct >= self._wanted).nonzero()[0]) + 1

    @property
    def needed(self) -> float:
        """The fewest steps in the mean, of all thresholds whose accuracy is that of all steps less ``margin``."""
        return float(self.steps[self.exit_correct >= self._wanted].min())

    @property
    def _wanted(self) -> float:
        return float(self.correct[-1]) - self.margin - 1e-9

    def interval(self, accuracy: Tensor) -> tuple[Tensor, Tensor]:
        """The Wilson interval (95 %) of an accuracy over the samples: low and high."""
        z2 = _Z**2 / self.samples
        middle = (accuracy + z2 / 2) / (1 + z2)
        half = _Z / (1 + z2) * (accuracy * (1 - accuracy) / self.samples + z2 / (4 * self.samples)).sqrt()
        return middle - half, middle + half

    def table(self) -> Table:
        """A row a number of steps, and a row for stopping early."""
        low, high = self.interval(self.correct)
        rows = [
            (
                f"{t + 1} step{'s' * (t > 0)}",
                f"{self.correct[t]:.2%}",
                f"{low[t]:.1%} to {high[t]:.1%}",
                f"{self.alone[t]:.2%}",
            )
            for t in range(self.timesteps)
        ]
        best = int(torch.where(self.exit_correct >= self._wanted, self.steps, math.inf).argmin())
        low, high = self.interval(self.exit_correct)
        rows.append(
            (f"{self.needed:.2f} steps in the mean", f"{self.exit_correct[best]:.2%}",
             f"{low[best]:.1%} to {high[best]:.1%}", "")
        )  # fmt: skip
        return Table(("time", "accuracy", "95 % interval", "of that step alone"), rows)

    def remarks(self) -> list[str]:
        """What the numbers are."""
        sure = {
            "probability": "the largest probability (softmax)",
            "entropy": "1 - entropy / log(classes) of the probabilities",
        }[self.confidence]
        return [
            f"Of {self.samples:,} samples in evaluation mode, where no step sees a later one. (In training mode "
            "BatchNorm normalises over all steps together, so early outputs would know of late inputs.)",
            "Accuracy is that of the mean output of the steps so far, as the network would answer if it was stopped "
            "there. It was trained to answer after all steps, and may lose by that at fewer.",
            f"All {self.timesteps} steps reach {self.correct[-1]:.2%}. To within {100 * self.margin:g} points of that, "
            f"the first {self.fixed_needed} of every sample are enough, or {self.needed:.2f} in the mean where each "
            f"sample stops as soon as the network is sure. Sureness is {sure} of the mean output so far, at or above a "
            "threshold.",
            "The threshold was chosen on these same samples, so the mean number of steps is a little too good. A "
            "network can be sure and wrong: sureness is no probability of being right.",
        ]

    @classmethod
    def pictures(cls, results: Mapping[str, Early]) -> dict[str, Picture]:
        """Accuracy over steps, and over mean steps."""
        found = dict(results)
        return {
            "Accuracy by the number of time steps; bands are 95 % intervals.": Picture(partial(_fixed, found)),
            "Early exit: accuracy against the mean number of steps.": Picture(partial(_exits, found)),
        }


def early(
    model: nn.Module,
    data: Data | Samples,
    *,
    confidence: str = "probability",
    thresholds: Sequence[float] | None = None,
    margin: float = 0.005,
    progress: Progress | None = None,
) -> Early:
    """Accuracy after each number of time steps, and with early exit by confidence; in evaluation mode.

    A sample stops at the first step whose mean output so far is sure enough, at the last step in any case. Memory does
    not grow with the number of samples.

    Args:
        model: its output is [T, B, C]; step t must not depend on later inputs. With frames [T, B, ...] that is checked
            on the first batch.
        data: labelled samples.
        confidence: "probability" or "entropy" (``names.CONFIDENCES``).
        thresholds: of the confidence, one or more; None is ``THRESHOLDS``. "Never" is added.
        margin: how far below the accuracy of all steps still counts as reaching it, 0.005 for half a point.
        progress: told how many samples are done.

    Raises:
        TypeError, ValueError: an argument or an output of another kind, outputs that are not finite, or steps that
            depend on later inputs.
    """
    if confidence not in names.CONFIDENCES:
        raise names.unknown(f"{_WHO}: confidence", confidence, names.CONFIDENCES)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise ValueError(f"{_WHO}: expected margin to be a number from 0 to below 1, got {margin!r}")
    given = list(THRESHOLDS if thresholds is None else thresholds)
    if not given or not all(isinstance(t, (int, float)) and math.isfinite(t) for t in given):
        raise ValueError(f"{_WHO}: expected thresholds to be one or more finite numbers, got {thresholds!r}")
    levels = torch.tensor([*sorted(given), math.inf], dtype=torch.float64)
    samples = Samples.of(_WHO, data)
    with watching(_WHO, model, {}, samples, lambda *_: None) as watched:
        steps = watched.steps
        right = torch.zeros(2, steps, dtype=torch.float64)
        exits = torch.zeros(len(levels), steps, dtype=torch.float64)
        exit_right = torch.zeros(len(levels), dtype=torch.float64)
        if samples.batch_dim == 1 and steps > 1:
            _causal(model, samples)
        for labels, logits in watched.run(progress):
            logits, labels = logits.double().cpu(), labels.cpu()
            if not bool(logits.isfinite().all()):
                raise ValueError(f"{_WHO}: expected finite outputs, got some that are not; look at the model's weights")
            mean = logits.cumsum(0) / torch.arange(1, steps + 1)[:, None, None]
            hit = mean.argmax(2) == labels
            right += torch.stack([hit, logits.argmax(2) == labels]).sum(2)
            sure = _confidence(mean, confidence)
            stops = sure[None] >= levels[:, None, None]
            stops[:, -1] = True
            at = stops.int().argmax(1)
            exits.scatter_add_(1, at, torch.ones(at.shape, dtype=torch.float64))
            exit_right += hit.expand(len(levels), -1, -1).gather(1, at[:, None])[:, 0].sum(1)
    count = len(samples)
    return Early(
        timesteps=steps,
        samples=count,
        correct=right[0] / count,
        alone=right[1] / count,
        confidence=confidence,
        thresholds=levels,
        exits=exits / count,
        exit_correct=exit_right / count,
        margin=float(margin),
    )


def _confidence(mean: Tensor, kind: str) -> Tensor:
    """[T, B] of mean outputs [T, B, C]."""
    log = mean.log_softmax(2)
    if kind == "probability":
        return log.amax(2).exp()
    return 1 + (log.exp() * log).sum(2) / math.log(max(2, mean.shape[2]))


def _causal(model: nn.Module, samples: Samples) -> None:
    """Whether outputs stay when the later half of the frames is taken away.

    Raises:
        ValueError: they do not.
    """
    frames, labels = next(iter(samples))
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    frames, labels = frames.to(device), labels.to(device)
    whole, half = logits_of(_WHO, model, frames, labels), frames.shape[0] // 2
    cut = frames.clone()
    cut[half:] = 0
    if half == 0 or frames.shape[0] != whole.shape[0]:
        return
    off = (logits_of(_WHO, model, cut, labels)[:half] - whole[:half]).abs().max()
    if not float(off) <= 1e-4 * float(whole.abs().max()):
        raise ValueError(
            f"{_WHO}: expected the outputs of the first {half} steps not to depend on later frames, got outputs that "
            f"move by {float(off):.3g}; such a model cannot stop early"
        )


def _fixed(found: Mapping[str, Early], axes: Axes) -> None:
    """Accuracy over the steps."""
    from trtkern.output.pictures import over_steps

    for i, (label, result) in enumerate(found.items()):
        steps, color = range(1, result.timesteps + 1), style.series(i)
        low, high = result.interval(result.correct)
        axes.fill_between(steps, (100 * low).tolist(), (100 * high).tolist(), color=color, alpha=0.15, linewidth=0)
        mean = label or "mean so far"
        axes.plot(steps, (100 * result.correct).tolist(), marker="o", color=color, label=mean)
        alone = None if label else "step alone"
        axes.plot(steps, (100 * result.alone).tolist(), "--", linewidth=1, color=color, label=alone)
    axes.set(xlabel="time steps used", ylabel="accuracy (%)", title="How many time steps are needed")
    axes.set_ylim(top=min(100.5, axes.get_ylim()[1]))
    over_steps(axes)


def _exits(found: Mapping[str, Early], axes: Axes) -> None:
    """Accuracy over the mean steps."""
    from trtkern.output.pictures import named

    for i, (label, result) in enumerate(found.items()):
        color = style.series(i)
        accuracy = (100 * result.exit_correct).tolist()
        axes.plot(result.steps.tolist(), accuracy, marker=".", color=color, label=label or "early exit")
        if not label:
            steps = range(1, result.timesteps + 1)
            axes.plot(
                steps, (100 * result.correct).tolist(), "--", linewidth=1, color=style.SERIES[1], label="same for all"
            )
    axes.set(xlabel="mean time steps used", ylabel="accuracy (%)", title="Stopping when confident")
    axes.set_ylim(top=min(100.5, axes.get_ylim()[1]))
    axes.grid()
    named(axes)
