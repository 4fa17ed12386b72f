"""Models of other libraries on this project's fused layers, and this project's models elsewhere.

``convert`` puts fused neurons into a model that was written with SpikingJelly, snnTorch, Norse, sinabs, Rockpool or the
code of a paper; ``over_time`` runs a network that was written for one time step over a whole sequence at once.
``check`` compares a model before and after. None of the other libraries is imported: their classes are known by name.
``record`` makes a program of a model with torch.export, ``decompose`` makes plain torch of it, and ``to_onnx`` writes
an ONNX file, which ``run_onnx`` runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtkern.interop.adapters import Adapter, CannotConvert, register
    from trtkern.interop.comparison import Comparison, check
    from trtkern.interop.conversion import ConvertReport, convert
    from trtkern.interop.decomposition import decompose
    from trtkern.interop.nir import from_nir, to_nir
    from trtkern.interop.onnx_file import run_onnx, to_onnx
    from trtkern.interop.recording import record
    from trtkern.interop.stepping import OverTimeNetwork, Stepping, over_time

_PLACES = {
    "Adapter": "adapters", "CannotConvert": "adapters", "register": "adapters",
    "Comparison": "comparison", "check": "comparison", "ConvertReport": "conversion", "convert": "conversion",
    "from_nir": "nir", "to_nir": "nir",
    "decompose": "decomposition", "record": "recording", "run_onnx": "onnx_file", "to_onnx": "onnx_file",
    "OverTimeNetwork": "stepping", "Stepping": "stepping", "over_time": "stepping",
}  # fmt: skip

__all__ = [
    "Adapter", "CannotConvert", "Comparison", "ConvertReport", "OverTimeNetwork", "Stepping", "check",
    "convert", "decompose", "from_nir", "over_time", "record", "register", "run_onnx", "to_nir", "to_onnx",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'trtkern.interop' has no attribute {name!r}")
    found = getattr(import_module(f"trtkern.interop.{place}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
