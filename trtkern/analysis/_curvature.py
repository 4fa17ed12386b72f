"""How sharp a minimum is: the largest eigenvalues of the Hessian, its trace, and how much the loss rises nearby."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trtkern import names
from trtkern.analysis import _ascent
from trtkern.analysis._ascent import BALLS, Sharpness
from trtkern.analysis._directions import with_filters
from trtkern.analysis._krylov import Pairs, lanczos, ratio, signs
from trtkern.analysis._network import Data, Progress, Samples, on_reference
from trtkern.analysis._objective import WORDS, Loss, Objective, opened
from trtkern.analysis._products import Product, differences, exact, twice_differentiable
from trtkern.analysis._result import Picture, Result, Table
from trtkern.output import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHO = "curvature"


@dataclass(frozen=True, kw_only=True)
class Curvature(Result):
    """The curvature of a loss at a network's weights, over some samples.

    Args:
        method: "exact" or "differences", how products with the Hessian H were made.
        loss_name: which loss.
        loss: its mean.
        gradient: length of its gradient, 0 at a minimum.
        weights: how many.
        samples: how many.
        step: of the differences, as a share of the length of the weights; None with "exact".
        eigenvalues: the largest ones of (H + H^T) / 2, falling, float64 [k]: means over the starts.
        residuals: how accurate they are: the largest ``|H y - (what the Krylov space holds of it)|`` of a start, [k].
        spreads: standard deviations over the starts, [k]; NaN with one start.
        errors: standard errors over the samples, to first order, [k]; NaN with one batch.
        lowest: the smallest eigenvalue that was seen: negative where the loss also curves down.
        converged: whether all residuals are below the tolerance.
        products: how many products with H were made.
        trace: the sum of all eigenvalues, by Hutchinson's estimator.
        trace_spread: its standard error over the random vectors.
        trace_error: its standard error over the samples.
        asymmetry: ``|H - H^T| / |H + H^T|``, Frobenius norms, estimated from the vectors of the trace; 0 if symmetric.
        asymmetry_leading: the same of the part of H that the eigenvalues were found in.
        sharpness: the rise of the loss in balls around the weights, by the names of the balls.
    """

    NAME = "curvature"

    method: str
    loss_name: str
    loss: float
    gradient: float
    weights: int
    samples: int
    step: float | None
    eigenvalues: Tensor
    residuals: Tensor
    spreads: Tensor
    errors: Tensor
    lowest: float
    converged: bool
    products: int
    trace: float
    trace_spread: float
    trace_error: float
    asymmetry: float
    asymmetry_leading: float
    sharpness: dict[str, Sharpness]

    def table(self) -> Table:
        """A row a number, with its two kinds of error."""
        rows = [
            (f"eigenvalue {i + 1}", _short(value), _short(float(spread)), _short(float(error)))
            for i, (value, spread, error) in enumerate(
                zip(self.eigenvalues.tolist(), self.residuals, self.errors, strict=True)
            )
        ]
        rows.append(("trace", _short(self.trace), _short(self.trace_spread), _short(self.trace_error)))
        for ball, found in self.sharpness.items():
            row = (_short(found.increase), _short(found.spread), _short(found.error))
            rows.append((f"rise, {ball} {found.radius:g}", *row))
        rows.append(("loss", _short(self.loss), "", ""))
        rows.append(("gradient", _short(self.gradient), "", ""))
        return Table(("quantity", "value", "± method", "± samples"), rows)

    def remarks(self) -> list[str]:
        """What the numbers are."""
        said = [
            f"The loss is {WORDS.get(self.loss_name, self.loss_name)}, without a regulariser, of "
            f"{self.samples:,} samples, in evaluation mode, over {self.weights:,} trainable weights.",
            "Its true value is a step function of the weights of a spiking network, for a spike is there or not; so it "
            "has no second derivative. What has one is the surrogate, which also gives the gradient of training.",
        ]
        if self.method == "exact":
            said.append(
                "Products with the Hessian are exact: the gradient is differentiated again, on the reference. That is "
                "the Hessian of a smooth network that has, at every neuron and step, this network's value, surrogate "
                f"derivative and its derivative; it is symmetric (measured: {_short(self.asymmetry)})."
            )
        else:
            said.append(
                "Products with the Hessian are differences of two surrogate gradients, at the weights "
                f"± {self.step:g} of their length: spikes flip between the two, so they depend on that step. The "
                f"matrix that they make is not symmetric (|H - H^T| / |H + H^T| = {_short(self.asymmetry)}, and "
                f"{_short(self.asymmetry_leading)} where the eigenvalues were found); the eigenvalues are those of "
                "(H + H^T) / 2."
            )
        if not self.converged:
            said.append(
                "The eigenvalues have not settled to the tolerance: read them with their residuals, or give more "
                "iterations."
            )
        said.append(
            "± method: of an eigenvalue how far the iteration was from its end (its residual), of the trace the "
            "standard error over random vectors, of a rise the standard deviation over the starts of the ascent. "
            "± samples: the standard error over batches of samples."
        )
        for ball, found in self.sharpness.items():
            said.append(f"Rise in the ball {ball!r}: {_ascent.WORDS[ball].format(radius=found.radius)}.")
        if self.sharpness:
            said.append(
                "A rise is of the true loss, found by ascent along the surrogate gradient: a lower bound. Eigenvalues, "
                "trace and the balls 'box' and 'sphere' change when weights before a norm are scaled, which leaves the "
                "network as it is; the ball 'filters' does not, so compare networks by it."
            )
        return said

    @classmethod
    def pictures(cls, results: Mapping[str, Curvature]) -> dict[str, Picture]:
        """The eigenvalues and the trace, and the rises."""
        found = dict(results)
        pictures = {
            "Largest eigenvalues of the Hessian; intervals are standard errors.": Picture(partial(_bars, found))
        }
        if any(result.sharpness for result in found.values()):
            pictures["Rise of the loss in balls around the weights; intervals are standard errors."] = Picture(
                partial(_rises, found)
            )
        return pictures


def curvature(
    model: nn.Module,
    data: Data | Samples,
    *,
    eigenvalues: int = 3,
    method: str = "auto",
    trace_vectors: int = 10,
    seed: int = 0,
    loss: Loss = "sdt",
    starts: int = 2,
    iterations: int = 60,
    tolerance: float = 1e-3,
    step: float = 3e-3,
    balls: Mapping[str, float] | None = None,
    ascent_steps: int = 8,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Curvature:
    """The largest eigenvalues of the Hessian of the mean loss, its trace, and the rise of the loss in small balls.

    Eigenvalues: Lanczos with full reorthogonalisation. Trace: Hutchinson 1989, v^T H v with v of random signs. Rise:
    the largest true loss that ascent finds (Keskar et al. 2017, Foret et al. 2021). All in evaluation mode, with frozen
    running statistics and without a regulariser.

    Args:
        model: its output is [T, B, C].
        data: labelled samples. Errors over the samples come from the batches: give 8 or more of one size.
        eigenvalues: k, how many.
        method: "exact" differentiates twice, on the backend "reference"; "differences" takes the difference of two
            gradients, on the backend that the model has; "auto" is "exact" where the model can be differentiated twice.
        trace_vectors: random vectors for the trace, 2 or more for its error.
        seed: of everything random.
        loss: "sdt", the cross entropy of the mean output; "tet", the mean of the cross entropy of every output; or a
            function of (logits, labels) that returns a mean over the batch.
        starts: random vectors that Lanczos begins with, and points that ascent begins at.
        iterations: products that Lanczos makes at most, from each start.
        tolerance: of the eigenvalues' residuals, as a share of the largest eigenvalue.
        step: of the differences: ``|h v| / |w|``.
        balls: {"filters", "box" or "sphere": radius}; None is ``BALLS``, {} leaves them out.
        ascent_steps: of the ascent in each ball.
        dtype: torch.float64 computes on a copy in float64, on the reference; None is as the model is.
        progress: told how many products and passes are done.

    Raises:
        TypeError, ValueError: an argument or an output of another kind; the message says which and what to do.
        RuntimeError: "exact" for a model that cannot be differentiated twice.
    """
    if method not in names.CURVATURES:
        raise names.unknown(f"{_WHO}: method", method, names.CURVATURES)
    counts = {"eigenvalues": eigenvalues, "trace_vectors": trace_vectors, "starts": starts, "iterations": iterations}
    for name, value in {**counts, "ascent_steps": ascent_steps}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{_WHO}: expected {name} to be an int of at least 1, got {value!r}")
    balls = dict(BALLS if balls is None else balls)
    for name, number in {"tolerance": tolerance, "step": step, **balls}.items():
        if not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise ValueError(f"{_WHO}: expected {name} to be a number above 0, got {number!r}")
    for ball in balls:
        if ball not in BALLS:
            raise names.unknown(f"{_WHO}: balls", ball, BALLS)
    samples = Samples.of(_WHO, data)
    if dtype is not None:
        model, samples = _copied(model, samples, dtype)
    passes = len(balls) * starts * (ascent_steps + 1)
    told = _Told(progress, starts * iterations + eigenvalues + trace_vectors + passes)
    with opened(_WHO, model, samples, loss) as objective, on_reference(model) if dtype is not None else nullcontext():
        if eigenvalues > objective.size:
            raise ValueError(
                f"{_WHO}: expected at most {objective.size} eigenvalues, as there are weights, got {eigenvalues}"
            )
        with on_reference(model):
            twice = method != "differences" and twice_differentiable(objective)
        if method == "exact" and not twice:
            raise RuntimeError(
                f"{_WHO}: expected a model that can be differentiated twice, got one with a function of its own that "
                'cannot, or too little memory; pass method="differences", or smaller batches'
            )
        with on_reference(model) if twice else nullcontext():
            multiply: Callable[[Tensor], Product] = (
                partial(exact, objective) if twice else partial(differences, objective, step=step)
            )
            spectrum = _spectrum(objective, multiply, eigenvalues, starts, iterations, tolerance, seed, told)
            trace = _trace(objective, multiply, trace_vectors, seed, told)
        found = _rest(objective, balls, ascent_steps, starts, seed, told)
        told.finish()
        return Curvature(
            method="exact" if twice else "differences",
            loss_name=objective.loss_name,
            weights=objective.size,
            samples=len(samples),
            step=None if twice else float(step),
            **found,
            **spectrum,
            **trace,
        )


class _Told:
    """Counts what is done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    def finish(self) -> None:
        """All is done, though it took less than was thought."""
        if self.progress is not None:
            self.progress(self.total, self.total)


def _copied(model: nn.Module, samples: Samples, dtype: torch.dtype) -> tuple[nn.Module, Samples]:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{_WHO}: expected dtype to be torch.float32, torch.float64 or None, got {dtype!r}")
    batches = tuple((x.to(dtype) if x.is_floating_point() else x, y) for x, y in samples.batches)
    return copy.deepcopy(model).to(dtype), Samples(batches, samples.batch_dim)


def _spectrum(
    objective: Objective,
    multiply: Callable[[Tensor], Product],
    count: int,
    starts: int,
    iterations: int,
    tolerance: float,
    seed: int,
    told: _Told,
) -> dict[str, Any]:
    """The fields about eigenvalues."""
    generator = torch.Generator().manual_seed(seed)

    def image(v: Tensor) -> Tensor:
        told()
        found = multiply(v).vector
        if not bool(torch.isfinite(found).all()):
            raise RuntimeError(
                f"{_WHO}: expected finite second derivatives, got a product that is not; the loss or its gradient is "
                "not finite at these weights"
            )
        return found

    runs: list[Pairs] = []
    for start in range(starts):
        first = torch.randn(objective.size, generator=generator).to(objective.device, objective.dtype)
        runs.append(lanczos(image, first, count, iterations=iterations, tolerance=tolerance, generator=generator))
        told.done = (start + 1) * iterations
    values = torch.stack([run.values for run in runs])
    residuals = torch.stack([run.residuals for run in runs]).amax(0)
    errors = []
    for y in runs[0].vectors:
        told()
        errors.append(objective.deviation(multiply(y).quotients))
    return {
        "eigenvalues": values.mean(0),
        "residuals": residuals,
        "spreads": values.std(0) if starts > 1 else torch.full((count,), math.nan, dtype=torch.float64),
        "errors": torch.tensor(errors, dtype=torch.float64),
        "lowest": min(run.lowest for run in runs),
        "converged": bool((residuals <= tolerance * values.abs().max()).all()),
        "products": sum(run.products for run in runs) + count,
        "asymmetry_leading": sum(run.asymmetry for run in runs) / starts,
    }


def _trace(
    objective: Objective, multiply: Callable[[Tensor], Product], count: int, seed: int, told: _Told
) -> dict[str, Any]:
    """The fields about the trace, and the asymmetry that its vectors show.

    For independent v and w of random signs the mean of (v^T A w)^2 is |A|_F^2.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    like = torch.empty((), device=objective.device, dtype=objective.dtype)
    vectors = [signs(objective.size, generator, like) for _ in range(count)]
    quotients, forms = [], torch.zeros(count, count, dtype=torch.float64)
    for i, v in enumerate(vectors):
        product = multiply(v)
        told()
        quotients.append(product.quotients)
        forms[:, i] = torch.stack([torch.dot(w, product.vector) for w in vectors]).double().cpu()
    by_batch = torch.stack(quotients)
    found = by_batch @ objective.shares
    apart = forms.triu(1), forms.tril(-1).T
    return {
        "trace": float(found.mean()),
        "trace_spread": float(found.std() / math.sqrt(count)) if count > 1 else math.nan,
        "trace_error": objective.deviation(by_batch.mean(0)),
        "asymmetry": ratio(apart[0] - apart[1], apart[0] + apart[1]) if count > 1 else math.nan,
    }


def _rest(
    objective: Objective, balls: Mapping[str, float], steps: int, starts: int, seed: int, told: _Told
) -> dict[str, Any]:
    """The loss, its gradient, and its rise in the balls, on the backend that the model has."""
    filters = with_filters(objective.model, objective.names)
    losses, total = [], torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    for share, (loss, gradient) in zip(objective.shares, objective.gradients(), strict=True):
        losses.append(loss)
        total.add_(gradient, alpha=float(share))
    rises = {
        ball: _ascent.sharpness(
            objective, ball, float(radius), filters, steps=steps, starts=starts,
            generator=torch.Generator().manual_seed(seed + 2), told=told,
        )
        for ball, radius in balls.items()
    }  # fmt: skip
    return {
        "loss": objective.mean(torch.stack(losses)),
        "gradient": float(torch.linalg.vector_norm(total)),
        "sharpness": rises,
    }


def _short(value: float) -> str:
    """Four digits."""
    return "" if math.isnan(value) else f"{value:.4g}"


def _bars(results: Mapping[str, Curvature], axes: Axes) -> None:
    """Eigenvalues side by side, a group each."""
    count = max(result.eigenvalues.numel() for result in results.values())
    columns = {
        name: (r.eigenvalues.tolist(), torch.maximum(r.errors.nan_to_num(), r.residuals).tolist())
        for name, r in results.items()
    }
    _groups(axes, columns, [str(i + 1) for i in range(count)])
    axes.set(
        xlabel="eigenvalue, from the largest",
        ylabel="eigenvalue of the Hessian",
        title="The steepest directions",
    )


def _rises(results: Mapping[str, Curvature], axes: Axes) -> None:
    """Rises side by side, a group a ball."""
    balls = list(dict.fromkeys(ball for result in results.values() for ball in result.sharpness))
    columns = {}
    for name, result in results.items():
        found = [result.sharpness.get(ball) for ball in balls]
        columns[name] = (
            [math.nan if s is None else s.increase for s in found],
            [0.0 if s is None or math.isnan(s.error) else s.error for s in found],
        )
    _groups(axes, columns, balls)
    axes.set(xlabel="ball around the weights", ylabel="rise of the loss", title="How far the loss rises nearby")


def _groups(axes: Axes, columns: Mapping[str, tuple[list[float], list[float]]], labels: list[str]) -> None:
    """Dots with errors, a group a label."""
    from trtkern.output.pictures import below

    width = 0.6 / len(columns)
    for i, (name, (values, errors)) in enumerate(columns.items()):
        places = [j + (i - (len(columns) - 1) / 2) * width for j in range(len(values))]
        axes.errorbar(
            places, values, errors, fmt=style.mark(i), markersize=6, elinewidth=1.6,
            color=style.series(i), label=name or None,
        )  # fmt: skip
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.0), max(high, 0.0))
    axes.grid(axis="y")
    if any(columns):
        below(axes)
