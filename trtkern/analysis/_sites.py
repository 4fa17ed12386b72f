"""Where the gradients of a forward pass are looked at: potentials of neuron layers, outputs of other modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trtkern import reference
from trtkern.backends.base import PARAMS
from trtkern.names import unknown
from trtkern.nn import LI, BatchNormLIF, ConvBatchNormLIF, Recurrent
from trtkern.nn._neuron import NeuronLayer
from trtkern.ops import checks
from trtkern.ops.batch_norm_lif import normalised
from trtkern.ops.parameters import firing, reference_rows, stack, state_dtype
from trtkern.ops.spikes import Spikes, dense
from trtkern.profiling.firing.activity import dense_spikes

Grads = Sequence[Tensor | None]


class Chain(NamedTuple):
    """How the neurons of a layer carry a gradient back in time, [T, B, ...] each."""

    factors: Tensor
    """dv[t]/dv[t-1] = decay * dv[t]/dh[t], [T, B, ...]."""
    fired: Tensor
    """Whether h[t] was above the threshold."""
    flat: Tensor
    """Whether the surrogate derivative at h[t] is exactly 0."""
    decay: float
    """The largest of the layer."""


class Site(Protocol):
    """A layer in one forward pass."""

    kind: str
    """The name of its class."""
    ours: bool
    """The gradients are those of potentials; else those of an output."""

    @property
    def tensors(self) -> list[Tensor]:
        """What has to be differentiated by."""

    def gradients(self, grads: Grads) -> dict[str, Tensor]:
        """{"h": dL/dh[t], "v": dL/dv[t]}, or {"h": dL/d output[t]}, [T, B, ...] each, of those of ``tensors``."""

    def chain(self) -> Chain | None:
        """How it carries gradients back in time; None of what is no neuron of this package."""


@dataclass
class _Call:
    """One call of a neuron layer."""

    tap: Tensor
    """Its gradient is that of the neurons' input current x, through this call alone."""
    time: int
    rows: list[Any]
    """decay, gain, ..., v_reset, as they broadcast with [T, B, ...]."""
    chain: Chain
    resets: bool
    outer: dict[str, Tensor] = field(default_factory=dict)
    """Potentials that the call handed out: "v" of every step and "state", that of the last."""

    @property
    def tensors(self) -> list[Tensor]:
        return [self.tap, *self.outer.values()]

    def gradients(self, grads: Grads) -> tuple[Tensor, Tensor]:
        """dL/dh and dL/dv. x reaches the loss through h alone, so dL/dx = gain * dL/dh; v[t] reaches it through
        h[t+1] = decay * v[t] + ..., and where the call handed it out."""
        gx = torch.zeros_like(self.tap) if grads[0] is None else grads[0]
        gx = gx.movedim(self.time, 0)
        decay, gain = self.rows[:2]
        gh = gx / gain
        if not self.resets:  # v is h, and is what is handed out
            return gh, gh
        gv = torch.cat((gh[1:] * decay, torch.zeros_like(gh[:1])))
        for name, g in zip(self.outer, grads[1:], strict=True):
            if g is not None and name == "v":
                gv = gv + g.movedim(self.time, 0)
            elif g is not None:
                gv[-1] += g
        return gh, gv


@dataclass
class _Potentials:
    """Neurons over the consecutive parts of one sequence, which are usually one."""

    kind: str
    calls: list[_Call]
    ours = True

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for call in self.calls for tensor in call.tensors]

    def gradients(self, grads: Grads) -> dict[str, Tensor]:
        found, start = [], 0
        for call in self.calls:
            end = start + len(call.tensors)
            found.append(call.gradients(grads[start:end]))
            start = end
        return {name: torch.cat(parts) for name, parts in zip(("h", "v"), zip(*found, strict=True), strict=True)}

    def chain(self) -> Chain:
        factors, fired, flat, decay = zip(*(call.chain for call in self.calls), strict=True)
        return Chain(torch.cat(factors), torch.cat(fired), torch.cat(flat), max(decay))


@dataclass
class _Outputs:
    """A module of another kind, called once with all steps, or once a step."""

    kind: str
    tensors: list[Tensor]
    ours = False

    def gradients(self, grads: Grads) -> dict[str, Tensor]:
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(self.tensors, grads, strict=True)]
        return {"h": found[0] if len(found) == 1 else torch.stack(found)}

    def chain(self) -> None:
        return None


class _Neurons:
    """The hooks of a neuron layer of this package."""

    def __init__(self, who: str, name: str, layer: nn.Module) -> None:
        self.who, self.name, self.layer = who, name, layer
        self.neuron: Any = layer.lif if isinstance(layer, BatchNormLIF) else layer
        if self.neuron.kind != "LIF":
            raise ValueError(
                f"{who}: expected neurons whose one state decays by a factor (LIF, IF, PLIF, LI), got "
                f"{name or 'the model'} with {type(self.neuron).__name__}; leave it out with layers="
            )
        self.calls: list[tuple[_Call, bool]] = []

    def hook(self) -> list[Any]:
        return [
            self.layer.register_forward_pre_hook(self.before, with_kwargs=True),
            self.layer.register_forward_hook(self.after, with_kwargs=True),
        ]

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        values = given.arguments
        if isinstance(module, BatchNormLIF):
            y, residual = values["y"], values.get("residual")
            # What is added before the neurons has the gradient of their input, in evaluation and in training.
            values["residual"] = tap = _alias(torch.zeros_like(y) if residual is None else dense(residual))
            x, _ = normalised(y.detach(), module.norm(), tap.detach(), module.channel_dim % y.dim())
            x = x.to(state_dtype(y)).detach()
        else:
            values["x"] = tap = _alias(values["x"])
            x = tap.detach()
        v0 = values.get("v0")
        time, _ = self.neuron.axes(x)
        rows = self._rows(x)
        with torch.no_grad():
            h = self._potentials(x, None if v0 is None else v0.detach()).movedim(time, 0)
        spec = self.neuron.spec
        call = _Call(tap, time, rows, _chain(h, rows, spec), spec.reset != "none")
        self.calls.append((call, v0 is not None))
        return given.args, given.kwargs

    def _potentials(self, x: Tensor, v0: Tensor | None) -> Tensor:
        """h of every step. Without the reset of the spikes v is h."""
        if isinstance(self.neuron, LI):
            return dense_spikes(self.neuron.forward(x, v0))
        return self.neuron.forward(x, v0, return_h=True)[-1]

    def _rows(self, x: Tensor) -> list[Any]:
        time, channel = self.neuron.axes(x)
        x = x.movedim(time, 0)
        defaults = {"reset_amount": 1.0, "v_threshold": 1.0, "v_reset": 0.0}
        found = {**defaults, **self.neuron.values()}
        held = {name: v.detach() if isinstance(v := found[name], Tensor) else v for name in PARAMS}
        held = firing(self.who, held, getattr(self.neuron, "fire_on_equal", False), x)
        rows = reference_rows(*stack(self.who, x, held, channel, state_dtype(x)), held, x)
        if not bool((torch.as_tensor(rows[1]) != 0).all()):
            raise ValueError(
                f"{self.who}: expected neurons whose gain is not 0, got {self.name or 'the model'} with gain 0, which "
                "ignores its input; leave it out with layers="
            )
        return rows

    def after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        if isinstance(output, Spikes) or not isinstance(output, tuple):
            return None
        # In the order in which ``forward`` returns them. LI hands out h, which its input has reached already.
        wanted = [name for name in ("return_state", "return_v", "return_h") if given.get(name)]
        made, outer = list(output), self.calls[-1][0].outer
        for i, option in enumerate(wanted, start=1):
            if option != "return_h":
                made[i] = outer["state" if option == "return_state" else "v"] = made[i].view_as(made[i])
        return tuple(made)

    def sites(self) -> dict[str, Site]:
        parts: list[list[_Call]] = []
        for call, goes_on in self.calls:
            if goes_on and parts:
                parts[-1].append(call)
            else:
                parts.append([call])
        self.calls = []
        kind = type(self.layer).__name__
        if len(parts) == 1:
            return {self.name: _Potentials(kind, parts[0])}
        return {f"{self.name} (call {i})": _Potentials(kind, calls) for i, calls in enumerate(parts, start=1)}


class _Others:
    """The hook of a module of another kind."""

    def __init__(self, who: str, name: str, layer: nn.Module) -> None:
        self.who, self.name, self.layer = who, name, layer
        self.outputs: list[Tensor] = []

    def hook(self) -> list[Any]:
        return [self.layer.register_forward_hook(self.after)]

    def after(self, module: Any, args: tuple, output: Any) -> None:
        found = dense_spikes(output)
        if not isinstance(found, Tensor) or not found.requires_grad:
            raise ValueError(
                f"{self.who}: expected {self.name} to give a tensor that gradients flow through, got "
                f"{checks.describe(output)}; name another module in layers="
            )
        self.outputs.append(found)

    def sites(self) -> dict[str, Site]:
        outputs, self.outputs = self.outputs, []
        return {self.name: _Outputs(type(self.layer).__name__, outputs)} if outputs else {}


def _alias(x: Tensor) -> Tensor:
    """x by another name, in a graph, so that its gradient is that through one use of x."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _chain(h: Tensor, rows: list[Any], spec: Any) -> Chain:
    """What the neuron does at the potentials h [T, B, ...]: the oracle's one step, differentiated."""
    decay, _, _, *reset = rows
    with torch.enable_grad():
        at = h.detach().requires_grad_()
        s, v, *_ = reference.lif(at.unsqueeze(0), None, (0.0, 1.0, 0.0, *reset), spec)
        (kept,) = torch.autograd.grad(v.sum(), at, retain_graph=True)
        slope = torch.ones_like(at) if spec.reset == "none" else torch.autograd.grad(s.sum(), at)[0]
    fires = torch.zeros_like(h, dtype=torch.bool) if spec.reset == "none" else s.detach().squeeze(0) > 0
    return Chain(kept * decay, fires, slope == 0, float(torch.as_tensor(decay).max()))


def _chosen(who: str, model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that are looked at."""
    modules = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}
    inside = {id(module.lif) for module in modules.values() if isinstance(module, BatchNormLIF)}
    inside |= {id(module.neuron) for module in modules.values() if isinstance(module, Recurrent)}
    if layers is None:
        kinds = (NeuronLayer, BatchNormLIF, Recurrent)
        found: dict[str, nn.Module] = {n: m for n, m in modules.items() if isinstance(m, kinds) and id(m) not in inside}
        if not found:
            raise ValueError(
                f"{who}: expected a model with neurons of trtkern, got none; name the modules to look at in layers=, "
                "such as its neurons: their outputs are looked at"
            )
        return found
    if isinstance(layers, str) or not layers:
        raise TypeError(f"{who}: expected layers as a list of names of modules, got {layers!r}")
    for name in layers:
        if name not in modules:
            raise unknown(f"{who}: layers", name, modules)
    return {name: modules[name] for name in layers}


@contextmanager
def sites(who: str, model: nn.Module, layers: Sequence[str] | None) -> Iterator[Sites]:
    """Inside, every forward pass of the model is followed. ``unchanged`` stands around: blocks keep what they made.

    Raises:
        TypeError, ValueError: no neurons, or a name that no module has.
    """
    watched = [
        (_Neurons if isinstance(module, (NeuronLayer, BatchNormLIF)) else _Others)(who, name, module)
        for name, module in _chosen(who, model, layers).items()
    ]
    for module in model.modules():
        if isinstance(module, ConvBatchNormLIF):
            module.checkpoint = False  # which runs the layer without calling it
    hooks = [hook for each in watched for hook in each.hook()]
    try:
        yield Sites(who, watched)
    finally:
        for hook in hooks:
            hook.remove()


class Sites:
    """What was seen since ``take`` was last called."""

    def __init__(self, who: str, watched: Sequence[_Neurons | _Others]) -> None:
        self._who, self._watched = who, watched

    def take(self) -> Mapping[str, Site]:
        """By name, in the order of the modules; those that did not run are absent."""
        return {name: site for each in self._watched for name, site in each.sites().items()}
