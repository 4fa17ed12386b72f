"""Optimisers: by name with their arguments, or made by the user's function; and the rate of each of their groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trtkern import own
from trtkern.names import OPTIMIZERS, is_own, unknown
from trtkern.ops.checks import is_distributed
from trtkern.profiling.memory import held

if TYPE_CHECKING:
    from trtkern.training.settings import Settings

Maker = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimiser of the weights."""

_OTHERS = ("LBFGS", "SparseAdam", "Optimizer")
"""Of torch.optim: what wants the loss anew within a step, gradients of another kind, and the base of all."""
_OURS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
_TAKEN = ("self", "params", "lr", "fused", "foreach", "capturable", "differentiable", "maximize")
"""What is the loop's to say, or says how and not what is computed."""


def names() -> list[str]:
    """What an optimiser may be called."""
    found = [name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and _theirs(kind)]
    return [*OPTIMIZERS, *sorted(name for name in found if name.lower() not in OPTIMIZERS)]


def _theirs(kind: type) -> bool:
    return issubclass(kind, torch.optim.Optimizer) and kind.__name__ not in _OTHERS


def checked(said: dict[str, Any]) -> dict[str, Any]:
    """The optimiser of a plan, spelt as torch spells it.

    Raises:
        ValueError: torch has no such optimiser, or it takes no such argument or value; the message lists what there is.
    """
    name = said["name"]
    if is_own(name):
        return said
    spelt = {each.lower(): each for each in names()}.get(str(name).lower())
    if spelt is None:
        raise unknown("--set optimizer.name", name, names(), ", or module:function")
    options = {key: value for key, value in said.items() if key != "name"}
    taken = [key for key in inspect.signature(_kind(spelt)).parameters if key not in _TAKEN]
    if others := [key for key in options if key not in taken]:
        raise unknown(f"--set optimizer: {spelt}", others[0], taken)
    _made(spelt, [nn.Parameter(torch.zeros(2, 2))], 1e-3, options)
    return {"name": spelt, **(OPTIMIZERS.get(spelt, {}) | options)}


def _kind(name: str) -> Any:
    return _OURS.get(name) or getattr(torch.optim, name)


def _made(name: str, weights: Iterable[nn.Parameter], rate: Any, options: dict[str, Any], **more: Any) -> Any:
    """The optimiser; what torch says of its arguments names them."""
    kind = _kind(name)
    defaults = {key: parameter.default for key, parameter in inspect.signature(kind).parameters.items()}
    options = {
        k: tuple(v) if isinstance(v, list) and isinstance(defaults.get(k), tuple) else v for k, v in options.items()
    }
    try:
        return kind(weights, lr=rate, **options, **more)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"--set optimizer: {name}: expected arguments that it takes, got {options} ({error})"
        ) from None


def build(
    settings: Settings, model: nn.Module, given: Maker | torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """The optimiser of the settings. Ours (adam, adamw and sgd) have all their arithmetic in one kernel, but where
    weights lie in parts on several processes.

    For a CUDA graph the learning rate is a tensor on the device: a graph reads it anew at each replay.

    Args:
        settings: their ``optimizer`` and ``lr``.
        model: whose weights that can be trained it gets.
        given: what a program gave instead of a name.

    Raises:
        ValueError: an argument that it does not take, a function that gives no optimiser, one of other weights.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError("optimizer: expected a network with weights that can be trained, got none")
    name = settings.optimizer["name"]
    options = {key: value for key, value in settings.optimizer.items() if key != "name"}
    if is_own(name):
        return _own(name, weights, options, given)
    if name not in _OURS:
        return _made(name, weights, settings.lr, options)
    if name == "sgd":
        descent = _made(name, weights, settings.lr, options, **_arithmetic(weights))
        if options["momentum"] and not options.get("dampening"):
            for weight in weights:  # torch leaves them uninitialised where the first step overflows
                descent.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return descent
    rate: float | Tensor = settings.lr
    if settings.cuda_graphs:
        rate = torch.tensor(settings.lr, device=weights[0].device)
    return _made(name, weights, rate, options, capturable=settings.cuda_graphs, **_arithmetic(weights))


def _arithmetic(weights: Sequence[Tensor]) -> dict[str, bool]:
    """How an optimiser of torch computes: it takes no list of which only some lie in parts, and sgd has no fused kernel
    for those that do."""
    parts = sum(map(is_distributed, weights))
    return {"fused": True} if not parts else {"foreach": parts == len(weights)}


def state_bytes(settings: Settings, model: nn.Module, given: Maker | torch.optim.Optimizer | None = None) -> int:
    """Bytes of the state that the optimiser of ``build`` has from its first step on.

    A function of the user's is called with weights without memory for it.

    Raises:
        ValueError: as ``build``.
    """
    if isinstance(given, torch.optim.Optimizer):
        return held.state_bytes(given)
    stand_in = nn.ParameterList(nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters())
    for mine, theirs in zip(stand_in, model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return held.state_bytes(build(settings, stand_in, given))


def _own(
    name: str, weights: list[nn.Parameter], options: dict[str, Any], given: Maker | torch.optim.Optimizer | None
) -> torch.optim.Optimizer:
    found = given or own.imported(name, "optimizer")
    if not isinstance(found, torch.optim.Optimizer):
        spelt = getattr(found, "__qualname__", type(found).__name__)
        if not callable(found):
            raise own.OwnError(f"optimizer: expected a function of the weights, got {found!r}")
        try:
            made = found(weights, **options)
        except Exception as error:
            raise own.failed(error, f"optimizer: expected {spelt} to make one of the weights") from error
        if not isinstance(made, torch.optim.Optimizer):
            raise own.OwnError(
                f"optimizer: expected {spelt} to give a torch.optim.Optimizer, got {type(made).__name__}"
            )
        found = made
    held = {id(weight) for group in found.param_groups for weight in group["params"]}
    if not held <= {id(weight) for weight in weights}:
        raise own.OwnError(
            f"optimizer: expected one of the weights of this network, got {type(found).__name__} with others; make it "
            f"after the network, on its device, or give a function of the weights"
        )
    return found


class Rates:
    """The learning rates of an optimiser's groups: each goes as the schedule does, from its own highest one.

    Args:
        optimizer: with the highest rates in its groups.
        rate: the highest one of groups whose rate is a tensor.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        self._optimizer = optimizer  # not its groups, which are others after a checkpoint was loaded
        groups = optimizer.param_groups
        self.peaks = [rate if isinstance(group["lr"], Tensor) else float(group["lr"]) for group in groups]

    def set(self, rate: Callable[[float], float]) -> None:
        """That of the next step: ``rate`` of the highest one."""
        for group, peak in zip(self._optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate(peak))
            else:
                group["lr"] = rate(peak)
