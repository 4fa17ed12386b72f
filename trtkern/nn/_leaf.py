"""Layers under torch.fx: what meets a Proxy is recorded whole, as the layers of ``torch.nn`` are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn


class Leaf(nn.Module):
    """A layer that a ``torch.fx.Tracer`` records as one ``call_module``.

    A tracer takes for whole what is defined in ``torch.nn``; of every other layer it runs ``forward`` with Proxies,
    which stand for values that are not there yet. Such a layer decides by its input's shape, dtype and kind, and has
    to record itself. ``__call__`` does so; ``forward`` begins with::

        if is_proxy(x):
            return self(x, ...)

    for the case that the layer is all of the model: a tracer then begins with ``forward``.
    """

    @property
    def itself(self) -> Leaf:
        """The layer: its name in a graph of which it is the root, where the names of submodules begin below it."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor:  # one tensor, the common call, is no Proxy
            tracer = _tracer((*args, *kwargs.values()))
            if tracer is not None:
                return self._record(tracer, args, kwargs)
        return nn.Module.__call__(self, *args, **kwargs)

    def _record(self, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call as a node of the tracer's graph; hooks run when the graph does."""
        if self is tracer.root:
            if not type(self).forward.__module__.startswith("trtkern."):
                # Its forward has come here through super(): what it does beside would be recorded once more.
                raise TypeError(
                    f"{type(self).__name__}: expected torch.fx to trace a model that has this layer in it, got the "
                    "layer itself, whose forward is your own; trace torch.nn.Sequential(layer)"
                )
            return tracer.create_proxy("call_module", "itself", args, kwargs)

        def whole(*args: Any, **kwargs: Any) -> fx.Proxy:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, whole, args, kwargs)


def is_proxy(value: object) -> bool:
    """Whether it stands for a value, or for ``Spikes``, in what torch.fx traces."""
    return type(value) is not Tensor and _tracer((value,)) is not None


def _tracer(values: Iterable[Any]) -> Any:
    """The tracer of the first Proxy among the values, which may be ``Spikes`` of Proxies; None without one."""
    for value in values:
        if value is None or type(value) is Tensor or type(value) is bool:
            continue
        if isinstance(value, fx.Proxy):
            return value.tracer
        if isinstance(value, tuple) and (found := _tracer(value)) is not None:
            return found
    return None
