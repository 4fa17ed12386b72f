"""Where in time the information of a network's weights lies: the empirical Fisher information of every timestep."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from trtkern.analysis import _fisher_pictures, _per_sample
from trtkern.analysis._network import Data, Progress, Samples, still
from trtkern.analysis._per_sample import Hooked, Layers, NotSeparableError, Squares
from trtkern.analysis._result import Picture, Result, Table
from trtkern.names import unknown

METHODS = ("auto", "hooks", "loop")
LEAST = 20
"""Samples that an interval takes."""
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class BatchMean:
    """The reference's estimator: the squared norm of the gradient of a batch's mean loss, averaged over the batches."""

    size: int
    """Samples in a batch; the numbers move with it, those of different sizes cannot be compared."""
    batches: int
    """Batches of that size; a smaller last one is left out."""
    information: Tensor
    """[T]."""
    by_layer: Tensor
    """[L, T]."""
    centroid: float


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What is kept of another epoch of the same run: as the fields of ``Fisher`` and ``BatchMean``."""

    epoch: int
    information: Tensor
    centroid: float
    centroid_interval: tuple[float, float] | None
    batch_information: Tensor
    batch_centroid: float

    @classmethod
    def of(cls, epoch: int, found: Fisher) -> Epoch:
        """Of what ``fisher`` found with the weights of that epoch."""
        return cls(
            epoch=epoch, information=found.information, centroid=found.centroid,
            centroid_interval=found.centroid_interval, batch_information=found.batch_mean.information,
            batch_centroid=found.batch_mean.centroid,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fisher(Result):
    """Fisher information I_t of every timestep and its centroid, what ``fisher`` returns.

    Args:
        information: [T] I_t: the mean over the samples of the squared norm of the gradient of log p(label), where p is
            softmax of the mean of the first t outputs; t is 1 .. T.
        interval: [2, T], low and high end for I_t by bootstrap over the samples; None: not asked for.
        centroid: IC = sum_t t I_t / sum_t I_t, in [1, T]; NaN where all I_t are 0.
        centroid_interval: low and high end.
        confidence: of the intervals.
        layers: the names of the modules that own parameters.
        by_layer: [L, T], whose sum over the layers is ``information``.
        by_sample: [N, T], whose mean is ``information``.
        batch_mean: the other estimator.
        method: "hooks" (one graph a batch) or "loop" (each sample alone).
        reason: why it was the loop, or "".
        seconds: that it took.
        history: the same numbers of several epochs of a run, the earliest first; none where nobody looked at them.
    """

    NAME = "fisher"

    information: Tensor
    interval: Tensor | None
    centroid: float
    centroid_interval: tuple[float, float] | None
    confidence: float | None
    layers: list[str]
    by_layer: Tensor
    by_sample: Tensor
    batch_mean: BatchMean
    method: str
    reason: str
    seconds: float
    history: list[Epoch] = field(default_factory=list)

    def table(self) -> Table:
        """A row a timestep."""
        head = ["t", "I_t", "share", f"batch mean, B={self.batch_mean.size}", "share"]
        pairs = zip(self.information.tolist(), self.batch_mean.information.tolist(), strict=True)
        totals = float(self.information.sum()), float(self.batch_mean.information.sum())
        rows = [
            [str(t), f"{own:.4g}", _share(own, totals[0]), f"{mean:.4g}", _share(mean, totals[1])]
            for t, (own, mean) in enumerate(pairs, 1)
        ]
        if self.interval is not None:
            head.insert(2, f"{100 * (self.confidence or 0):g} % interval")
            for row, (low, high) in zip(rows, self.interval.T.tolist(), strict=True):
                row.insert(2, f"{low:.4g} to {high:.4g}")
        return Table(head, rows, 0)

    def remarks(self) -> list[str]:
        """What I_t is, where its centre is, what the other estimator says, and what none of it says."""
        samples, steps = self.by_sample.shape
        mean, size = self.batch_mean, self.batch_mean.size
        certain = ""
        if self.centroid_interval is not None:
            low, high = self.centroid_interval
            certain = (
                f" ({100 * (self.confidence or 0):g} % interval {low:.3f} to {high:.3f}, by bootstrap over the "
                "samples: it stands for the choice of samples, not for another training)"
            )
        said = [
            f"I_t is the Fisher information of the first t steps together: how strongly the log-probability of the "
            f"true label, taken from the mean of the first t outputs, changes with the weights. It is the squared norm "
            f"of its gradient by all trainable parameters, for each of {samples:,} samples alone, averaged; in "
            f"evaluation mode, with the same samples for every t.",
            f"The information centroid, sum of t I_t over sum of I_t, is {self.centroid:.3f}{certain}; the same "
            f"information at every t would give {(steps + 1) / 2:g}.",
            f"The estimator of the paper's code squares the gradient of a batch's mean loss instead. With batches of "
            f"{size} ({mean.batches} of them) its centroid is {mean.centroid:.3f}. It mixes the squared mean of the "
            f"gradients with 1/{size} of their variance, so both I_t and the centroid move with the batch size: "
            f"compare it only with numbers of the same batch size.",
        ]
        total = float(self.by_layer.sum())
        if total > 0:
            shares = self.by_layer.sum(1) / total
            top = [
                f"{self.layers[i] or 'the model'} ({shares[i]:.0%})"
                for i in shares.argsort(descending=True)[:3].tolist()
            ]
            said.append(f"Most of the information lies in {', '.join(top)}.")
        if self.history:
            first, last = self.history[0], self.history[-1]
            said.append(
                f"From epoch {first.epoch} to epoch {last.epoch} the centroid went from {first.centroid:.3f} to "
                f"{last.centroid:.3f}."
            )
        said.append(
            "I_t falls as the network fits its samples, so its size says little; how it is spread over t is what can "
            "be compared. A centroid says where in time the weights matter for the labels; it does not measure how "
            "well the network generalises."
        )
        if self.reason:
            said.append(f"Each sample went through the network alone, which is slow, because {self.reason}.")
        return said

    @classmethod
    def pictures(cls, results: Mapping[str, Self]) -> dict[str, Picture]:
        """I_t, its shares by both estimators, the layers, and where there is a history the centroid over the epochs."""
        return _fisher_pictures.pictures(results)


def _share(part: float, total: float) -> str:
    return f"{part / total:.1%}" if total else "-"


def centroid(information: Tensor) -> Tensor:
    """sum_t t I_t / sum_t I_t of I [..., T], t from 1, float64; NaN where all are 0."""
    information = information.double()
    steps = torch.arange(1, information.shape[-1] + 1, dtype=torch.float64, device=information.device)
    return (information * steps).sum(-1) / information.sum(-1)


def fisher(
    model: nn.Module,
    data: Data | Samples,
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    batch_dim: int = 0,
    confidence: float | None = 0.95,
    method: str = "auto",
    progress: Progress | None = None,
) -> Fisher:
    """Trace of the empirical Fisher information of every timestep, per sample and by squared batch means.

    I_t = (1/N) sum_n ||grad_w log softmax(mean_{k <= t} O_k(x_n))[y_n]||^2 over all trainable parameters w, in
    evaluation mode, in the precision of the model, squared norms added up in float64 (Kim et al. 2023,
    arXiv 2211.14406). The same samples are taken for all t. Nothing random is drawn; the model stays as it was.

    Args:
        model: any module with logits [T, B, C].
        data: samples, batches (inputs, labels), or all inputs and all labels as two tensors.
        samples: how many of them, the first; None is all.
        batch_size: of the second estimator, and of the computation; None leaves batches as they are, of two tensors
            it makes batches of 64.
        batch_dim: of the inputs: 1 of frames [T, B, ...].
        confidence: of the intervals (bootstrap over the samples, percentiles); None makes none.
        method: "hooks": one forward pass a batch, T backward passes that make no gradient of a weight, and from what
            they leave the gradients of each sample. "loop": each sample alone. "auto": hooks, and the loop where they
            cannot be used: parameters of other layers than convolutions, linear ones and normalisations (such as the
            decay of PLIF), shared or reparametrized ones, or where a comparison with the definition fails.
        progress: told how many of the samples are done.

    Raises:
        TypeError, ValueError: no model with logits [T, B, C], no samples, fewer than 20 for an interval, logits that
            are not finite, method="hooks" for a model that it is not for.
    """
    if method not in METHODS:
        raise unknown("fisher: method", method, METHODS)
    began = time.perf_counter()
    with still("fisher", model), torch.enable_grad():
        where = next(model.parameters()).device
        taken = Samples.of("fisher", data, count=samples, batch_size=batch_size, batch_dim=batch_dim, device=where)
        confident(confidence, len(taken))
        layers = _per_sample.layers_of(model)
        found, method, reason = _found(model, layers, taken, method, progress)
    size = len(taken.batches[0][1])
    whole = [part.mean for part, (_, labels) in zip(found, taken, strict=True) if len(labels) == size]
    by_layer = torch.stack(whole).mean(0)
    own = torch.cat([part.own for part in found])
    by_sample = own.sum(1)
    interval, middle = (None, None) if confidence is None else bootstrap(by_sample, confidence)
    return Fisher(
        information=by_sample.mean(0),
        interval=interval,
        centroid=float(centroid(by_sample.mean(0))),
        centroid_interval=middle,
        confidence=confidence,
        layers=list(layers),
        by_layer=own.mean(0),
        by_sample=by_sample,
        batch_mean=BatchMean(
            size=size,
            batches=len(whole),
            information=by_layer.sum(0),
            by_layer=by_layer,
            centroid=float(centroid(by_layer.sum(0))),
        ),
        method=method,
        reason=reason,
        seconds=time.perf_counter() - began,
    )


def confident(confidence: float | None, samples: int) -> None:
    """Raise a ValueError if that is no confidence, or takes more samples."""
    if confidence is None:
        return
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"fisher: expected confidence to be None or a number above 0 and below 1, got {confidence!r}")
    if samples < LEAST:
        raise ValueError(
            f"fisher: expected at least {LEAST} samples for an interval, got {samples}; give more, or pass "
            "confidence=None"
        )


def _found(
    model: nn.Module, layers: Layers, samples: Samples, method: str, progress: Progress | None
) -> tuple[list[Squares], str, str]:
    """Of every batch; how it was done, and why not by hooks."""
    reason = ""
    if method != "loop":
        try:
            return _by_hooks(model, layers, samples, progress), "hooks", ""
        except NotSeparableError as error:
            if method == "hooks":
                raise ValueError(
                    f'fisher: expected a model for method="hooks", got one where {error}; pass "auto"'
                ) from None
            reason = str(error)
    found = []
    for inputs, labels in samples:
        found.append(_per_sample.one_by_one("fisher", model, layers, inputs, labels, samples.batch_dim))
        _tell(progress, found, samples)
    return found, "loop", reason


def _by_hooks(model: nn.Module, layers: Layers, samples: Samples, progress: Progress | None) -> list[Squares]:
    hooked = Hooked("fisher", model, layers)
    inputs, labels = samples.batches[0]
    few = min(2, len(labels))
    hooked.verify(inputs.narrow(samples.batch_dim, 0, few), labels[:few], samples.batch_dim)
    found: list[Squares] = []
    for inputs, labels in samples:
        found.append(hooked.squares(inputs, labels))
        _tell(progress, found, samples)
    return found


def _tell(progress: Progress | None, found: Sequence[Squares], samples: Samples) -> None:
    if progress is not None:
        progress(sum(len(part.own) for part in found), len(samples))


def bootstrap(by_sample: Tensor, confidence: float, resamples: int = RESAMPLES) -> tuple[Tensor, tuple[float, float]]:
    """Percentile intervals of I_t, [2, T], and of the centroid, over means [T] of samples drawn with replacement.

    Args:
        by_sample: [N, T].
        confidence: above 0, below 1.
        resamples: how many means.
    """
    count, steps = by_sample.shape
    draw = torch.Generator().manual_seed(0)
    means = torch.empty(resamples, steps, dtype=torch.float64)
    for row in means:  # one at a time: N of them may be many
        row.copy_(by_sample[torch.randint(count, (count,), generator=draw)].mean(0))
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = centroid(means).quantile(ends).tolist()
    return means.quantile(ends, dim=0), (low, high)
