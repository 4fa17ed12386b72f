"""Losses over the outputs of every timestep: TRT, TET and SDT, called the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trtkern.backends import named
from trtkern.backends.base import RegularizerSpec
from trtkern.nn._leaf import Leaf, is_proxy
from trtkern.nn._neuron import NeuronLayer
from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.ops import checks
from trtkern.ops._beneath import look, requires_grad
from trtkern.ops._library import is_dual
from trtkern.ops.regularizer import add_regularizer_grad_, check_spec, regularizer

Named = nn.Module | Iterable[tuple[str, Tensor]]
NORMS = (BatchNormLIF, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EXCLUDABLE = ("norm", "classifier")


class LossParts(NamedTuple):
    """A loss and what it is made of, 0-dim tensors; the parts are unweighted, ``regularizer`` holds its lam."""

    total: Tensor
    """What is minimised: the parts, each with its weight."""
    cross_entropy: Tensor
    """The mean cross entropy over the steps."""
    mse: Tensor
    """The mean squared error to the targets."""
    regularizer: Tensor
    """The penalty on the weights."""


class _TimestepLoss(Leaf):
    """What the losses share: the checks, the call, and a regulariser that is absent unless a loss has one.

    Args:
        label_smoothing: in [0, 1]; the cross entropy is taken against (1 - s) onehot(y) + s / C (Szegedy et al. 2016,
            arXiv 1512.00567). The squared error keeps its target.
    """

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = _fraction(type(self).__name__, "label_smoothing", label_smoothing)
        self._device: torch.device | None = None  # of the last logits

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, a 0-dim tensor in float32 (float64 for float64).

        Args:
            logits: outputs of the last layer at every timestep, [T, B, C].
            target: labels [B], int64, in [0, C); or soft ones, a probability for each class [B, C] in a floating
                dtype, as mixup and CutMix make them and ``torch.nn.functional.cross_entropy`` takes them. Where every
                step has a target of its own: [T, B] or [T, B, C].

        Raises:
            TypeError, ValueError: another rank, dtype or device, a label out of range, a probability that is negative
                or not finite.
        """
        if is_proxy(logits):
            return self(logits, target)
        return self.parts(logits, target).total

    def parts(self, logits: Tensor, target: Tensor, *, regularize: bool = True) -> LossParts:
        """The loss and its parts; with ``regularize=False`` the penalty is left to ``add_grad_``."""
        return self._parts(*self._checked(logits, target), regularize)

    def terms(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms of the loss that depend on the data, by name, weighted and with their graph: their sum is the loss
        without its penalty. A term of weight 0 is absent."""
        cross_entropy, mse = self._errors(*self._checked(logits, target))
        weighted = {"cross entropy": (1 - self.mse_weight, cross_entropy), "squared error": (self.mse_weight, mse)}
        return {name: weight * term for name, (weight, term) in weighted.items() if weight}

    @property
    def mse_weight(self) -> float:
        """Of the squared error; the cross entropy has the rest of 1."""
        return 0.0

    def _checked(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the dtype of the loss."""
        _check_logits(type(self).__name__, logits, target)
        if logits.dtype != torch.float64:
            logits = logits.float()
        if target.dtype.is_floating_point:
            target = target.to(logits.dtype)
        self._device = logits.device
        return logits, target

    def _parts(self, logits: Tensor, target: Tensor, regularize: bool) -> LossParts:
        raise NotImplementedError

    def _errors(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy and the squared error, unweighted, with their graph."""
        raise NotImplementedError

    @torch.no_grad()
    def add_grad_(self, scale: float = 1.0) -> Tensor:
        """Nothing to add: this loss has no regulariser. Returns 0."""
        return torch.zeros((), device=self._device)


def _check_logits(name: str, logits: Tensor, target: Tensor) -> None:
    for what, tensor in (("logits", logits), ("target", target)):
        if isinstance(tensor, Tensor):
            checks.plain(name, what, tensor)
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
        raise TypeError(f"{name}: expected floating-point logits [T, B, C], got {checks.describe(logits)}")
    if logits.dim() != 3 or 0 in logits.shape:
        raise ValueError(
            f"{name}: expected logits [T, B, C] with no empty axis, got {checks.describe(logits)}; "
            "keep the time axis: pass the output of every step, not their mean"
        )
    soft = isinstance(target, Tensor) and target.dtype.is_floating_point
    if not isinstance(target, Tensor) or not (soft or target.dtype == torch.int64):
        raise TypeError(
            f"{name}: expected target to be int64 labels [B], or floating-point probabilities [B, C], got "
            f"{checks.describe(target)}"
        )
    shape = logits.shape[1:] if soft else logits.shape[1:2]
    if target.shape not in (shape, logits.shape[:1] + shape) or target.device != logits.device:
        kind = "probabilities" if soft else "int64 labels"
        hint = "; labels are int64: target.long()" if soft and target.dim() == 1 else ""
        raise ValueError(
            f"{name}: expected {kind} of shape {tuple(shape)} on {logits.device}, got {checks.describe(target)}{hint}"
        )
    if torch.compiler.is_compiling() or not (target.device.type == "cpu" or checks.debugging()):
        return
    look(lambda target: _check_values(name, target, logits.shape[2]), target.detach())


def _check_values(name: str, target: Tensor, classes: int) -> None:
    low, high = (bound.item() for bound in target.aminmax())
    if target.dtype.is_floating_point:
        if not (low >= 0 and high < math.inf):
            raise ValueError(f"{name}: expected probabilities that are finite and >= 0, got some from {low} to {high}")
    elif low < 0 or high >= classes:
        raise ValueError(
            f"{name}: expected labels in [0, {classes}), got labels from {low} to {high}; check the number of classes"
        )


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """mean over t and b of the cross entropy of every step."""
    if _each_step(target):
        repeated = target.flatten(0, 1)
    else:
        repeated = target.repeat(logits.shape[0], *[1] * (target.dim() - 1))
    return F.cross_entropy(logits.flatten(0, 1), repeated, label_smoothing=label_smoothing)


def _each_step(target: Tensor) -> bool:
    """Whether it is [T, B] or [T, B, C]."""
    return target.dim() == (3 if target.dtype.is_floating_point else 2)


def _fraction(name: str, field: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected {field} to be a number in [0, 1], got {value!r}")
    return float(value)


class SDTLoss(_TimestepLoss):
    """Standard direct training: the cross entropy of the mean output, CE(1/T sum_t O_t, y).

    Args:
        label_smoothing: share of every label that is spread over all classes, in [0, 1].
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)

    def extra_repr(self) -> str:
        """The settings."""
        return f"label_smoothing={self.label_smoothing:g}" if self.label_smoothing else ""

    def _parts(self, logits: Tensor, target: Tensor, regularize: bool) -> LossParts:
        loss, zero = self._errors(logits, target)
        return LossParts(loss, loss.detach(), zero, zero)

    def _errors(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if _each_step(target):
            raise ValueError(
                f"SDTLoss: expected one target a sample, for the mean output, got {checks.describe(target)}; TETLoss "
                "and TRTLoss take one for each step"
            )
        loss = F.cross_entropy(logits.mean(0), target, label_smoothing=self.label_smoothing)
        return loss, loss.new_zeros(())


class TETLoss(_TimestepLoss):
    """Temporal efficient training (arXiv 2202.11946): (1 - lam) 1/T sum_t CE(O_t, y) + lam MSE(O, means).

    Args:
        means: what every output is drawn to; the threshold of the neurons.
        lam: weight of the mean squared error, in [0, 1] (0.05 on CIFAR, 0.001 on ImageNet and DVS data).
        label_smoothing: share of every label that is spread over all classes, in [0, 1]; of the cross entropy alone.
    """

    def __init__(self, means: float = 1.0, lam: float = 0.05, *, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.lam = _fraction("TETLoss", "lam", lam)
        if isinstance(means, bool) or not isinstance(means, (int, float)) or not math.isfinite(means):
            raise ValueError(f"TETLoss: expected means to be a finite number, got {means!r}")
        self.means = float(means)

    def extra_repr(self) -> str:
        """The settings."""
        smoothed = f", label_smoothing={self.label_smoothing:g}" if self.label_smoothing else ""
        return f"means={self.means:g}, lam={self.lam:g}{smoothed}"

    def _parts(self, logits: Tensor, target: Tensor, regularize: bool) -> LossParts:
        cross_entropy, mse = self._errors(logits, target)
        total = (1 - self.lam) * cross_entropy + self.lam * mse
        return LossParts(total, cross_entropy.detach(), mse.detach(), total.new_zeros(()))

    @property
    def mse_weight(self) -> float:
        """lam."""
        return self.lam

    def _errors(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return _cross_entropy(logits, target, self.label_smoothing), (logits - self.means).square().mean()


class TRTLoss(_TimestepLoss):
    """Temporal regularization training (arXiv 2506.19256), over the outputs O_t and the weights w::

        1/T sum_t [ (1 - eta) CE(O_t, y) + eta MSE(O_t, onehot(y)) + r_t ]
        r_t = sum_w lam w^2 / (1 + (e^(delta t) - 1)(|w| + eps)),   t = 0 .. T-1

    The last term does not depend on the data; it is one fused pass over all weights. As in the reference
    implementation it covers every trainable parameter whose name does not contain "bias": convolutions, linear layers
    with the classifier, and the scales of normalisation layers. Parameters of the neurons (a learned decay or
    threshold, also behind a parametrization) are left out: the penalty would pull them to 0. For soft labels
    ``onehot(y)`` is the probabilities themselves.

    Args:
        model: a module, or (name, parameter) pairs. Nothing is registered here. A module is held, and its parameters
            are looked up at each call: also after ``load_state_dict(assign=True)`` or ``weight_norm``, and inside
            ``torch.func.functional_call`` of a module that holds both. Pairs stay as given. A copy or a pickle of the
            loss holds a copy of the model; copied or pickled together with the model it holds that one.
        lam: strength of the penalty, >= 0.
        delta: how fast it decays over time, >= 0; 0 is plain L2.
        eps: >= 0, added to abs(w).
        eta: weight of the mean squared error, in [0, 1].
        exclude: what not to regularise: "norm" (scales of normalisation layers), "classifier" (the last Linear).
        label_smoothing: share of every label that is spread over all classes, in [0, 1]; of the cross entropy alone.
        backend: of the penalty.

    A training loop that wants the fastest step uses ``parts(..., regularize=False)``, ``backward()``, then
    ``add_grad_()``: the penalty's gradient goes straight into ``.grad``.

    Raises:
        TypeError, ValueError: a hyper-parameter out of range, nothing to regularise, an unknown name in ``exclude``.
    """

    def __init__(
        self,
        model: Named,
        lam: float = 1e-5,
        delta: float = 0.25,
        eps: float = 1e-5,
        eta: float = 0.05,
        *,
        exclude: Iterable[str] = (),
        label_smoothing: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(label_smoothing)
        self.lam, self.delta, self.eps, self.backend = lam, delta, eps, backend
        self.eta = _fraction("TRTLoss", "eta", eta)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self._timesteps: int | None = None
        # In a tuple, so that nothing is registered: the parameters belong to the model.
        self._model: tuple[Any, ...] = (model if isinstance(model, nn.Module) else list(model),)
        _regularized(self._model[0], self.exclude)
        check_spec(self._spec(1))
        if backend != "auto":
            named(backend)

    def _spec(self, timesteps: int) -> RegularizerSpec:
        return RegularizerSpec(timesteps, self.lam, self.delta, self.eps)

    def regularized(self) -> list[tuple[str, Tensor]]:
        """The (name, parameter) pairs that the penalty covers now: those of the model that are trainable."""
        chosen = _regularized(self._model[0], self.exclude)
        # Tangents (forward mode) do not require a gradient, and are differentiated all the same.
        return [(name, p) for name, p in chosen if requires_grad(p) or is_dual(p)]

    def extra_repr(self) -> str:
        """The settings and the size of what is regularised."""
        chosen = self.regularized()
        count = sum(p.numel() for _, p in chosen)
        settings = f"lam={self.lam:g}, delta={self.delta:g}, eps={self.eps:g}, eta={self.eta:g}"
        settings += f", label_smoothing={self.label_smoothing:g}" if self.label_smoothing else ""
        return f"{settings}, exclude={self.exclude}, regularizes {count:,} weights in {len(chosen)} tensors"

    def _parts(self, logits: Tensor, target: Tensor, regularize: bool) -> LossParts:
        self._timesteps = logits.shape[0]
        cross_entropy, mse = self._errors(logits, target)
        total = (1 - self.eta) * cross_entropy + self.eta * mse
        penalty = total.new_zeros(())
        if regularize and (weights := [p for _, p in self.regularized()]):
            penalty = self._penalty(weights, logits.shape[0])
            total = total + penalty
        return LossParts(total, cross_entropy.detach(), mse.detach(), penalty.detach())

    @property
    def mse_weight(self) -> float:
        """eta."""
        return self.eta

    def _errors(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.arange(logits.shape[2], device=logits.device)
        # Not F.one_hot, which looks at the labels: torch.vmap has no one value to show.
        soft = target.dtype.is_floating_point
        onehot = target if soft else (target.unsqueeze(-1) == classes).to(logits.dtype)
        return _cross_entropy(logits, target, self.label_smoothing), (logits - onehot).square().mean()

    def _penalty(self, weights: list[Tensor], timesteps: int) -> Tensor:
        return regularizer(weights, self._spec(timesteps), backend=self.backend)

    def penalty_grads(self, timesteps: int) -> list[Tensor]:
        """dR/dw of what ``regularized`` lists, for T = ``timesteps``; no ``.grad`` changes."""
        leaves = [w.detach().requires_grad_() for _, w in self.regularized()]
        if not leaves:
            return []
        with torch.enable_grad():
            return list(torch.autograd.grad(self._penalty(leaves, timesteps), leaves))

    @torch.no_grad()
    def add_grad_(self, scale: float = 1.0) -> Tensor:
        """Add scale * dR/dw into ``.grad`` of every regularised parameter, in one pass; returns R, a 0-dim tensor.

        Call it after ``backward()`` (the T of the last call counts) and before the optimiser's step; with a gradient
        scaler pass its scale.
        """
        if self._timesteps is None:
            raise RuntimeError(
                "TRTLoss: expected a call of the loss before add_grad_, got none; T comes from its logits"
            )
        weights = [p for _, p in self.regularized()]
        if not weights:
            return torch.zeros(())
        return add_regularizer_grad_(weights, self._spec(self._timesteps), scale=scale, backend=self.backend)


def _regularized(model: Any, exclude: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    """The pairs that the reference implementation regularises, less ``exclude`` and the neurons' own parameters.

    A parametrization keeps its tensors in modules of its own below the layer, so a layer is left out with all of them.
    """
    unknown = [name for name in exclude if name not in _EXCLUDABLE]
    if unknown:
        raise ValueError(f"TRTLoss: expected exclude from {_EXCLUDABLE}, got {unknown[0]!r}")
    left_out: set[int] = set()
    if isinstance(model, nn.Module):
        modules = list(model.modules())
        kinds = (NeuronLayer, *NORMS) if "norm" in exclude else (NeuronLayer,)
        for module in modules:
            if isinstance(module, kinds):
                left_out.update(id(p) for p in module.parameters())
        if "classifier" in exclude:
            linear = [module for module in modules if isinstance(module, nn.Linear)]
            if not linear:
                raise ValueError("TRTLoss: expected a Linear to exclude as the classifier, got a model without one")
            left_out.update(id(p) for p in linear[-1].parameters())
        pairs: list[tuple[str, Tensor]] = list(model.named_parameters())
    else:
        if exclude:
            raise ValueError(
                f"TRTLoss: expected a module with exclude={exclude}, got pairs; leave them out of the pairs"
            )
        pairs = model
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
                raise TypeError(f"TRTLoss: expected a module or (name, parameter) pairs, got {checks.describe(pair)}")
    chosen = [(name, p) for name, p in pairs if "bias" not in name and id(p) not in left_out]
    if not chosen:
        raise ValueError("TRTLoss: expected parameters to regularise, got none; check the model and exclude")
    return chosen
