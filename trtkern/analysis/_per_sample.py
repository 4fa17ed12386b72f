"""Squared norms of the gradients of single samples at every timestep, out of one graph of a batch.

The gradient of a layer's weights follows from what the layer reads and from the gradient of what it gives. T backward
passes over one graph give the latter for the T first-t-steps losses, without a gradient of any weight; the former are
the same for all of them. Samples are then kept apart in the product of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from trtkern.analysis import _layer_gradients
from trtkern.analysis._first_steps import FirstSteps
from trtkern.analysis._layer_gradients import Layer
from trtkern.analysis._network import logits_of
from trtkern.nn.batch_norm_lif import BatchNormLIF
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear
from trtkern.ops.spikes import Spikes, dense

Layers = dict[str, nn.Module]
"""Those that own trainable parameters, by name."""
TOLERANCE = 1e-3
"""Relative, between the two ways on one graph: a wrong axis differs by far more, rounding by far less."""


class NotSeparableError(ValueError):
    """The gradients of single samples do not follow from the graph of a batch; the message says why."""


class Squares(NamedTuple):
    """Squared norms of gradients of log p, float64."""

    own: Tensor
    """[B, L, T]: of every sample alone."""
    mean: Tensor
    """[L, T]: of the mean over the samples."""


def layers_of(model: nn.Module) -> Layers:
    """The modules with trainable parameters of their own."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(p is not None and p.requires_grad for p in module._parameters.values())
    }


def log_likelihoods(who: str, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """log softmax(mean of the first t outputs)[label], [T, B] for t = 1 .. T.

    Raises:
        TypeError, ValueError: what the model gives is not [T, B, C], or not finite.
    """
    logits = logits_of(who, model, inputs, labels)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not bool(torch.isfinite(logits.detach()).all()):
        raise ValueError(f"{who}: expected finite logits, got some that are NaN or infinite; look for where they begin")
    steps = torch.arange(1, len(logits) + 1, device=logits.device, dtype=logits.dtype)
    means = logits.cumsum(0) / steps.view(-1, 1, 1)
    return means.log_softmax(2).gather(2, labels.expand(len(logits), -1).unsqueeze(2)).squeeze(2)


def one_by_one(who: str, model: nn.Module, layers: Layers, inputs: Tensor, labels: Tensor, batch_dim: int) -> Squares:
    """The definition: each sample alone through the network, and T backward passes; the mean from the whole batch."""
    own = [
        _squares(layers, log_likelihoods(who, model, inputs.narrow(batch_dim, n, 1), labels[n : n + 1]).sum(1))
        for n in range(len(labels))
    ]
    return Squares(torch.stack(own), _squares(layers, log_likelihoods(who, model, inputs, labels).mean(1)))


def _squares(layers: Layers, values: Tensor) -> Tensor:
    """[L, T] of values [T]."""
    return torch.stack([_square(layers, value, t < len(values)) for t, value in enumerate(values, 1)], 1)


def _square(layers: Layers, value: Tensor, again: bool) -> Tensor:
    """[L] squared norms of the gradient of one value."""
    owned = _owned(layers)
    grads = torch.autograd.grad(value, [p for p, _ in owned], retain_graph=again, allow_unused=True)
    found = torch.zeros(len(layers), dtype=torch.float64)
    for (_, place), grad in zip(owned, grads, strict=True):
        if grad is not None:
            found[place] += grad.double().square().sum().cpu()
    return found


def _owned(layers: Layers) -> list[tuple[nn.Parameter, int]]:
    """Every trainable parameter once, with the place of the layer that has it first."""
    found = {
        id(p): (p, place)
        for place, module in reversed(list(enumerate(layers.values())))
        for p in module._parameters.values()
        if p is not None and p.requires_grad
    }
    return list(found.values())


class Hooked:
    """The same from one graph of a batch.

    Args:
        who: the function that asks, for messages.
        model: in evaluation mode, and still (``_network.still``).
        layers: of the model.

    Raises:
        NotSeparableError: a trainable parameter of a kind that is not known here, or with several owners.
    """

    def __init__(self, who: str, model: nn.Module, layers: Layers) -> None:
        self._who, self._model, self._layers = who, model, layers
        self._kinds: dict[str, type[Layer]] = {}
        self._axes: dict[str, str] = {}
        self._first = FirstSteps()
        self._trained = {
            name: frozenset(own for own, p in module._parameters.items() if p is not None and p.requires_grad)
            for name, module in layers.items()
        }
        owner: dict[int, str] = {}
        for name, module in layers.items():
            if (kind := _layer_gradients.kind_of(module)) is None:
                raise NotSeparableError(
                    f"{name or 'the model'} ({type(module).__name__}) has parameters of its own kind"
                )
            self._kinds[name] = kind
            for p in module._parameters.values():
                if p is not None and owner.setdefault(id(p), name) != name:
                    raise NotSeparableError(f"{name} and {owner[id(p)]} share a parameter")

    def verify(self, inputs: Tensor, labels: Tensor, batch_dim: int) -> None:
        """Compare with the definition: one sample alone at the first step, and another alone at the last.

        Raises:
            NotSeparableError: they differ: samples have a say in each other, axes are others than was thought, a weight
                is used beside its layer, an output depends on later steps.
        """
        parts, values = self._graph(inputs, labels)
        for t, n in sorted({(1, len(labels) - 1), (len(values), 0)}):
            own, _ = self._at(parts, values, t, True)
            with torch.enable_grad():
                alone = inputs.narrow(batch_dim, n, 1), labels[n : n + 1]
                defined = log_likelihoods(self._who, self._model, *alone)
            wanted = _square(self._layers, defined[t - 1, 0], False)
            if not bool(((own[n] - wanted).abs() <= TOLERANCE * wanted + 1e-9 * wanted.sum()).all()):
                raise NotSeparableError(
                    "gradients put together from what the layers read and give differ from those of a single sample"
                )

    def squares(self, inputs: Tensor, labels: Tensor) -> Squares:
        """Of a batch.

        Raises:
            NotSeparableError: a layer reads something else than it did in ``verify``.
        """
        parts, values = self._graph(inputs, labels)
        found = [self._at(parts, values, t, t < len(values)) for t in range(1, len(values) + 1)]
        return Squares(torch.stack([own for own, _ in found], 2), torch.stack([mean for _, mean in found], 1))

    def _graph(self, inputs: Tensor, labels: Tensor) -> tuple[list[_Part], Tensor]:
        """Of a batch, with the values [T, B] at its end; the parameters require no gradient meanwhile."""
        parameters = [p for p, _ in _owned(self._layers)]
        try:
            for p in parameters:
                p.requires_grad_(False)
            with self._recording() as calls:
                values = log_likelihoods(self._who, self._model, inputs, labels)
                return self._parts(calls, *values.shape), values
        finally:
            for p in parameters:
                p.requires_grad_(True)

    def _at(self, parts: list[_Part], values: Tensor, t: int, again: bool) -> tuple[Tensor, Tensor]:
        """[B, L] and [L], of the loss of the first t steps."""
        steps, batch = values.shape
        targets: Any = [target for part in parts for target in part.targets]
        own = torch.zeros(batch, len(parts), dtype=torch.float64)
        mean = torch.zeros(len(parts), dtype=torch.float64)
        if not targets or not values.requires_grad:
            return own, mean
        self._first.share, sums = t / steps, dict[Any, tuple[Tensor, Tensor]]()
        grads = iter(torch.autograd.grad(values[t - 1].sum(), targets, retain_graph=again, allow_unused=True))
        for place, part in enumerate(parts):
            mine = [next(grads) for _ in part.targets]
            if part.layer is None or all(g is None for g in mine):
                continue
            rows = [
                torch.zeros(shape, dtype=values.dtype, device=values.device)
                if g is None
                else _layer_gradients.rows(g, steps, batch, part.axes, part.layer.MIXED)
                for g, shape in zip(mine, part.shapes, strict=True)
            ]
            g = rows[0] if len(rows) == 1 else torch.cat(rows)
            if part.static or len(g) == steps:  # what an output does not know of has no gradient: steps after t
                g = g[:t]
            if part.static:
                # A layer and the norm behind it have one gradient.
                kind = g.data_ptr(), g.shape, g.stride()
                if kind not in sums:
                    sums[kind] = g, _layer_gradients.over_steps(g)
                g = sums[kind][1]
            one, whole = part.layer(g)
            own[:, place], mean[place] = one.cpu(), whole.cpu() / batch**2
        return own, mean

    def _parts(self, calls: dict[str, list[_Call]], steps: int, batch: int) -> list[_Part]:
        """What each layer read, ready for the gradients."""
        return [self._part(name, calls[name], steps, batch) for name in self._layers]

    def _part(self, name: str, calls: list[_Call], steps: int, batch: int) -> _Part:
        kind, module = self._kinds[name], self._layers[name]
        if not calls:
            return _Part(None, [], [], "", False)
        if any(call.x._version != call.version for call in calls):
            raise NotSeparableError(f"what {name} reads is written to afterwards")
        read = [kind.read(module, call.x) for call in calls]
        found = {_layer_gradients.axes_of(x, kind.core(module), steps, batch) for x in read}
        if len(found) > 1 or None in found or self._axes.setdefault(name, str(min(found, key=str))) not in found:
            seen = ", ".join(sorted({str(list(x.shape)) for x in read}))
            raise NotSeparableError(f"{name} reads {seen}, in which time and batch are not where they are elsewhere")
        axes = self._axes[name]
        rows = [_layer_gradients.rows(x, steps, batch, axes, kind.MIXED) for x in read]
        static = len(rows) == 1 and len(rows[0]) == steps > 1 and rows[0].stride(0) == 0
        x = rows[0][:1] if static else rows[0] if len(rows) == 1 else torch.cat(rows)
        shapes = [_layer_gradients.rows(call.given, steps, batch, axes, kind.MIXED).shape for call in calls]
        return _Part(kind(module, x, self._trained[name]), [call.target for call in calls], shapes, axes, static)

    @contextmanager
    def _recording(self) -> Iterator[dict[str, list[_Call]]]:
        """Inside, every call of a layer is noted."""
        calls: dict[str, list[_Call]] = {name: [] for name in self._layers}
        handles = []
        blocks = [m for m in self._model.modules() if isinstance(m, ConvBatchNormLIF)]
        checkpoints = [block.checkpoint for block in blocks]
        try:
            for block in blocks:
                block.checkpoint = False  # else its norm is not called
            for name, module in self._layers.items():
                note = calls[name].append
                if isinstance(module, (SpikeConv2d, SpikeLinear)):
                    handles.append(module.register_forward_pre_hook(_unpacked))
                if isinstance(module, BatchNormLIF):
                    handles.append(module.register_forward_pre_hook(_before(note), with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(_behind(note), with_kwargs=True))
            with torch.enable_grad(), self._first:
                yield calls
        finally:
            for handle in handles:
                handle.remove()
            for block, checkpoint in zip(blocks, checkpoints, strict=True):
                block.checkpoint = checkpoint


class _Call(NamedTuple):
    """One call of a layer."""

    x: Tensor
    """What it read."""
    version: int
    target: Tensor | GradientEdge
    """Where the gradient is taken: what it gave, or the part of the graph that it alone reads."""
    given: Tensor
    """Of the shape of that gradient; on "meta"."""


class _Part(NamedTuple):
    """A layer in the graph of a batch."""

    layer: Layer | None
    """None: it is not called."""
    targets: list[Tensor | GradientEdge]
    shapes: list[torch.Size]
    """Of the rows of the gradients."""
    axes: str
    static: bool
    """What it reads is the same at every step, and is held once."""


def _unpacked(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook before a layer that would keep the words of spikes, of which only a gradient of its weight makes use."""
    return tuple(dense(arg) for arg in args)


def _behind(note: Callable[[_Call], None]) -> Callable[..., Any]:
    """A hook behind a layer whose output is linear in its weights."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not args or not isinstance(args[0], (Tensor, Spikes)) or not isinstance(out, Tensor):
            raise NotSeparableError(f"a {type(module).__name__} takes or gives something else than one tensor")
        if not out.requires_grad:
            out.requires_grad_()
        x = dense(args[0]).detach()
        # The edge stays that of this output, also where the next layer works in place.
        target = out if out.is_leaf else get_gradient_edge(out)
        note(_Call(x, x._version, target, torch.empty_like(out, device="meta")))

    return hook


def _before(note: Callable[[_Call], None]) -> Callable[..., Any]:
    """A hook before a ``BatchNormLIF``, whose normalised input is seen nowhere: its gradient is, behind a factor, that
    of the input, or exactly that of the residual."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not args or not isinstance(args[0], Tensor):
            raise NotSeparableError("a BatchNormLIF takes something else than one tensor")
        y, residual, *rest = args if len(args) > 1 else (*args, kwargs.pop("residual", None))
        x = y.detach()
        if _layer_gradients.invertible(module):
            branch = y.view_as(y) if y.requires_grad else x.view_as(x).requires_grad_()
            y = branch
        else:
            held = torch.zeros_like(x) if residual is None else dense(residual)
            branch = held.view_as(held) if held.requires_grad else held.detach().requires_grad_()
            residual = residual._replace(spikes=branch) if isinstance(residual, Spikes) else branch
        note(_Call(x, x._version, branch, torch.empty_like(branch, device="meta")))
        return (y, residual, *rest), kwargs

    return hook
