"""Fused kernels for training spiking neural networks, and Temporal Regularization Training (TRT).

``trtkern.nn`` holds the layers and losses, ``trtkern.lif`` the functional form; ``trtkern doctor`` on the command line
shows which backends run here. Importing this package loads no kernel: a backend is loaded when it first runs. Where
torch is not loaded yet, what needs it is loaded at its first use, so that the command line can answer without waiting.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtkern import nn
    from trtkern.ops.checks import debug
    from trtkern.ops.lif import LIFOutput, lif
    from trtkern.spec import LIFSpec

__version__ = "0.1.0"
__all__ = ["LIFOutput", "LIFSpec", "debug", "lif", "nn"]

_PLACES = {"LIFOutput": "ops.lif", "LIFSpec": "spec", "debug": "ops.checks", "lif": "ops.lif"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trtkern' has no attribute {name!r}")
    place = import_module(f"trtkern.{_PLACES.get(name, name)}")
    found = place if name == "nn" else getattr(place, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if (
    sys.modules.get("torch") is not None
):  # at once, so that the operators are there for programs that were exported with them
    for _name in __all__:
        __getattr__(_name)
