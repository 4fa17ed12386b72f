"""How gradients reach the early time steps: norms, temporal Jacobians, and what each weight's gradient is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtkern.analysis._gradients_result import EDGES, Factors, Gradients, Layer, Norms, Origin, Vanishing
from trtkern.analysis._network import Data, Progress, Samples, logits_of, still
from trtkern.analysis._sites import Chain, Site, sites
from trtkern.nn import SDTLoss, TETLoss, TRTLoss
from trtkern.ops import checks
from trtkern.profiling.firing.activity import firing_rates

WHO = "gradients"
Loss = Callable[[Tensor, Tensor], Tensor]
LONGEST = 64
"""Steps over which factors are multiplied unless ``max_k`` says so."""


def gradients(
    model: nn.Module,
    data: Data | Samples,
    losses: Mapping[str, Loss] | None = None,
    *,
    layers: Sequence[str] | None = None,
    max_k: int | None = None,
    batch_dim: int = 0,
    progress: Progress | None = None,
) -> Gradients:
    """How the gradient of each loss reaches every layer at every time step, and what it is made of.

    For the neurons h[t] = decay * v[t-1] + gain * x[t] + bias, firing and reset, v[t]: the norms of dL/dh[t] and of
    dL/dv[t] (total derivatives, through all later steps and layers), the factors dv[t]/dv[t-1] = decay * dv[t]/dh[t]
    and their products over k steps, and the share of dead neurons. ``vanishing`` is one number for comparisons: what
    remains of the gradient of the last step's cross entropy for each step that it goes back.

    The model is in evaluation mode. With the statistics of the batch, as in training, every step of every sample would
    reach every other one through the mean and the variance, and no gradient would belong to one step. Batches stream
    through: memory does not grow with their number.

    Args:
        model: any module with logits [T, B, C]; evaluation makes its samples independent of each other.
        data: ``Samples``, batches (inputs, labels), or two tensors.
        losses: by name, called with logits [T, B, C] and labels [B], means over the samples; None is ``SDTLoss()``,
            ``TETLoss()`` and ``TRTLoss(model)``; {} looks at the last step's cross entropy alone. What a loss of
            ``trtkern.nn`` is made of is told apart.
        layers: names of modules to look at; None is every neuron layer of trtkern. Of a module of another kind, which
            is called with all steps or once a step, the gradient of its output [T, B, ...] is measured, not that of
            potentials.
        max_k: the longest product of factors; None is T - 1, at most 64.
        batch_dim: axis of the samples in the inputs: 1 for frames [T, B, ...].
        progress: told how many of how many batches are done.

    Returns:
        Gradients: with ``save``, ``table``, ``remarks`` and ``plot``.

    Raises:
        TypeError, ValueError: no such layers, a gain of 0, a model with other outputs, losses that are no scalars.
    """
    samples = Samples.of(WHO, data, batch_dim=batch_dim)
    if max_k is not None and (isinstance(max_k, bool) or not isinstance(max_k, int) or max_k < 1):
        raise ValueError(f"{WHO}: expected max_k to be an int of at least 1, got {max_k!r}")
    with still(WHO, model), torch.enable_grad(), sites(WHO, model, layers) as followed, firing_rates(model) as rates:
        named = dict(_defaults(model) if losses is None else losses)
        seen = _Seen(model, named, len(samples), max_k)
        for done, (inputs, labels) in enumerate(samples, start=1):
            logits = logits_of(WHO, model, inputs, labels)
            if not logits.requires_grad:
                raise ValueError(f"{WHO}: expected logits with a gradient, got {checks.describe(logits)} without one")
            seen.add(logits, labels, followed.take())
            if progress is not None:
                progress(done, len(samples.batches))
        activity = rates.layers
        weights = {name: seen.origins(name) for name in named}
    found = {}
    for name, layer in seen.layers.items():
        active = activity.get(name)
        found[name] = layer.read(active.silent if active else None, active.saturated if active else None)
    return Gradients(
        layers=found,
        weights=weights,
        vanishing=_mean([layer.vanishing.ratio for layer in found.values()]),
        timesteps=seen.timesteps,
        samples=len(samples),
    )


def _defaults(model: nn.Module) -> dict[str, Loss]:
    return {"SDT": SDTLoss(), "TET": TETLoss(), "TRT": TRTLoss(model)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class _Seen:
    """The sums over the batches."""

    def __init__(self, model: nn.Module, losses: dict[str, Loss], samples: int, max_k: int | None) -> None:
        self.losses, self.samples, self.max_k = losses, samples, max_k
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.layers: dict[str, _LayerSums] = {}
        self.terms: dict[str, dict[str, list[Tensor]]] = {name: {} for name in losses}
        self.timesteps = 0

    def add(self, logits: Tensor, labels: Tensor, found: Mapping[str, Site]) -> None:
        """One batch."""
        steps, batch = logits.shape[:2]
        if self.timesteps not in (0, steps):
            raise ValueError(
                f"{WHO}: expected batches of T = {self.timesteps} steps, got one of {steps}; group them by T"
            )
        if not found or (self.layers and set(found) != set(self.layers)):
            raise ValueError(
                f"{WHO}: expected every batch to run the same layers, got {', '.join(found) or 'none of them'}; name "
                "modules that run in layers="
            )
        self.timesteps = steps
        for name, site in found.items():
            sums = self.layers.setdefault(name, _LayerSums(name, site, self.samples, self.max_k))
            if (chain := site.chain()) is not None:
                sums.chain(chain)
        for name, loss in self.losses.items():
            terms = {term: self._at_logits(name, value, logits) for term, value in _terms(loss, logits, labels).items()}
            parts = [self._back(logits, gradient, found, name, term, batch) for term, gradient in terms.items()]
            self._sum(name, found, parts, batch)
        last = self._at_logits("", F.cross_entropy(logits[-1], labels), logits)
        self._sum(None, found, [self._back(logits, last, found, None, None, batch)], batch)

    def _at_logits(self, name: str, value: Tensor, logits: Tensor) -> Tensor:
        """The gradient of a term at the logits: the graph below is that of every term."""
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
            raise ValueError(
                f"{WHO}: expected losses[{name!r}] to return a 0-dim tensor that depends on the logits, got "
                f"{checks.describe(value)}"
            )
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True, allow_unused=True)
        return torch.zeros_like(logits) if gradient is None else gradient

    def _back(
        self,
        logits: Tensor,
        gradient: Tensor,
        found: Mapping[str, Site],
        loss: str | None,
        term: str | None,
        batch: int,
    ) -> list[Tensor | None]:
        """From the logits to the sites; on the way the parameters' gradients are added to those of that term."""
        targets = [tensor for site in found.values() for tensor in site.tensors]
        wanted = list(self.parameters.values()) if loss is not None else []
        grads = torch.autograd.grad(logits, [*targets, *wanted], gradient, retain_graph=True, allow_unused=True)
        if loss is not None and term is not None:
            sums = self.terms[loss].setdefault(term, [torch.zeros_like(p) for p in wanted])
            for total, g in zip(sums, grads[len(targets) :], strict=True):
                if g is not None:
                    total.add_(g, alpha=batch / self.samples)
        return list(grads[: len(targets)])

    def _sum(self, loss: str | None, found: Mapping[str, Site], parts: list[list[Tensor | None]], batch: int) -> None:
        """The norms of the sum of the terms' gradients."""
        whole = [_total(each) for each in zip(*parts, strict=True)]
        start = 0
        for name, site in found.items():
            end = start + len(site.tensors)
            self.layers[name].norms(loss, site.gradients(whole[start:end]), batch)
            start = end

    @torch.no_grad()
    def origins(self, loss: str) -> dict[str, Origin]:
        """What the gradient of each parameter is made of, of the mean over all samples."""
        call, terms = self.losses[loss], dict(self.terms[loss])
        if isinstance(call, TRTLoss):
            pairs = zip(call.regularized(), call.penalty_grads(self.timesteps), strict=True)
            penalty = {id(weight): g for (_, weight), g in pairs}
            terms["regulariser"] = [penalty.get(id(p), torch.zeros_like(p)) for p in self.parameters.values()]
        found = {}
        for i, name in enumerate(self.parameters):
            parts = {term: grads[i].double() for term, grads in terms.items()}
            total = torch.stack(list(parts.values())).sum(0)
            cosines = {term: _cosine(part, total - part) for term, part in parts.items()}
            norms = {term: float(part.norm()) for term, part in parts.items()}
            found[name] = Origin(total.numel(), float(total.norm()), norms, cosines)
        return found


def _terms(loss: Loss, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The terms of a loss that depend on the data; a loss of another kind is one."""
    if isinstance(loss, (SDTLoss, TETLoss, TRTLoss)):
        return loss.terms(logits, labels)
    return {"loss": loss(logits, labels)}


def _total(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return None if not there else there[0] if len(there) == 1 else torch.stack(there).sum(0)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors in float64; NaN where one is zero."""
    return float((a * b).sum() / (a.norm() * b.norm()))


@dataclass
class _NormSums:
    """Per step: the sum of the squares of the gradients of single samples, and the sum of their norms."""

    squares: Tensor
    norms: Tensor


class _LayerSums:
    """The sums of one layer."""

    def __init__(self, name: str, site: Site, samples: int, max_k: int | None) -> None:
        self.name, self.samples, self.max_k = name, samples, max_k
        self.kind, self.ours = site.kind, site.ours
        self.sums: dict[str | None, dict[str, _NormSums]] = {}
        """By loss; None is the last step's cross entropy."""
        self.factors: _FactorSums | None = None
        self.flat: Tensor | None = None
        self.neurons = 0

    @torch.no_grad()
    def norms(self, loss: str | None, found: dict[str, Tensor], batch: int) -> None:
        """Of a mean over ``batch`` samples: a sample's own gradient is ``batch`` times its part of it."""
        for what, g in found.items():
            if g.dim() < 2 or g.shape[1] != batch:
                raise ValueError(
                    f"{WHO}: expected {self.name} to run on [T, B, ...] with B = {batch}, got {checks.describe(g)}; "
                    "name other modules in layers="
                )
            self.neurons = g[0, 0].numel()
            each = torch.linalg.vector_norm(g.reshape(*g.shape[:2], -1), dim=2, dtype=torch.float64).mul(batch).cpu()
            squares, norms = each.square().sum(1), each.sum(1)
            held = self.sums.setdefault(loss, {}).get(what)
            if held is not None:
                squares, norms = squares + held.squares, norms + held.norms
            self.sums[loss][what] = _NormSums(squares, norms)

    @torch.no_grad()
    def chain(self, chain: Chain) -> None:
        """How the neurons carried gradients back, in one batch."""
        if self.factors is None:
            self.factors = _FactorSums(len(chain.factors), self.max_k)
        self.factors.add(chain)
        flat = chain.flat.all(0).all(0)
        if self.flat is not None and self.flat.shape != flat.shape:
            raise ValueError(
                f"{WHO}: expected {self.name} to have the same neurons in every batch, got "
                f"{tuple(self.flat.shape)} and {tuple(flat.shape)}; use samples of one size"
            )
        self.flat = flat if self.flat is None else self.flat & flat

    def read(self, silent: float | None, saturated: float | None) -> Layer:
        """What they come to."""
        norms = {loss: self._norms(sums) for loss, sums in self.sums.items()}
        last = norms.pop(None)
        return Layer(
            kind=self.kind,
            ours=self.ours,
            neurons=self.neurons,
            norms={str(loss): found for loss, found in norms.items()},
            last=last,
            vanishing=per_step(last.h),
            factors=None if self.factors is None else self.factors.read(),
            silent=silent,
            saturated=saturated,
            dead=None if self.flat is None else float(self.flat.double().mean()),
        )

    def _norms(self, sums: dict[str, _NormSums]) -> Norms:
        h, v = sums["h"], sums.get("v")
        count = self.samples
        return Norms(
            h.squares.sqrt() / count,
            None if v is None else v.squares.sqrt() / count,
            h.norms / count,
            None if v is None else v.norms / count,
        )


class _FactorSums:
    """Factors dv[t]/dv[t-1] of t = 2 .. T, and their products over k steps."""

    def __init__(self, steps: int, max_k: int | None) -> None:
        longest = min(steps - 1, LONGEST if max_k is None else max_k)
        self.sums, self.zeros, self.largest = (torch.zeros(longest, dtype=torch.float64) for _ in range(3))
        self.counts = [0] * longest
        self.histograms = torch.zeros(2, len(EDGES) - 1, dtype=torch.float64)
        self.fired_zeros, self.decay = 0.0, 0.0

    def add(self, chain: Chain) -> None:
        """Of one batch."""
        self.decay = max(self.decay, chain.decay)
        factors, fired = chain.factors[1:], chain.fired[1:]
        if factors.numel() == 0:
            return
        edges = torch.tensor(EDGES[1:-1], dtype=factors.dtype, device=factors.device)
        bins = torch.bucketize(factors, edges)
        for i, which in enumerate((~fired, fired)):
            self.histograms[i] += torch.bincount(bins[which], minlength=len(EDGES) - 1).cpu()
        self.fired_zeros += float(((factors == 0) & fired).sum())
        products, zero = factors, factors == 0
        for k in range(len(self.counts)):
            if k:  # of the steps t+1 .. t+k+1, in place of t+1 .. t+k
                products, zero = products[:-1] * factors[k:], zero[:-1] | (factors[k:] == 0)
            size = products.abs()
            self.sums[k] += size.sum(dtype=torch.float64).cpu()
            self.zeros[k] += float(zero.sum())
            self.largest[k] = torch.maximum(self.largest[k], size.max().double().cpu())
            self.counts[k] += size.numel()

    def read(self) -> Factors:
        counts = torch.tensor(self.counts, dtype=torch.float64)
        bound = self.decay ** torch.arange(1, len(counts) + 1, dtype=torch.float64)
        fired = float(self.histograms[1].sum())
        return Factors(
            decay=self.decay,
            silent=self.histograms[0],
            fired=self.histograms[1],
            fired_zero=self.fired_zeros / fired if fired else math.nan,
            product=self.sums / counts,
            zero=self.zeros / counts,
            largest=self.largest,
            bound=bound,
        )


def per_step(norms: Tensor) -> Vanishing:
    """How fast norms [T] fall towards the first step: the slope of their logarithms by least squares.

    Norms that are exactly 0 have no logarithm: they are left out and counted. Where fewer than two are left, no
    gradient goes further back than one step: the ratio is 0.
    """
    there = norms > 0
    zeros = int((norms == 0).sum())
    first = float(norms[0] / norms[-1]) if norms[-1] > 0 else 0.0
    if norms.isnan().any() or len(norms) == 1:
        return Vanishing(math.nan, math.nan, zeros)
    if int(there.sum()) < 2:
        return Vanishing(0.0, first, zeros)
    steps = torch.arange(len(norms), dtype=torch.float64)[there]
    logs, steps = norms[there].log(), steps - steps.mean()
    slope = float((steps * logs).sum() / steps.square().sum())
    return Vanishing(math.exp(-slope), first, zeros)
