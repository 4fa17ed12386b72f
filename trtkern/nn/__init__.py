"""Layers and losses: drop them into any PyTorch model."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from trtkern.nn.batch_norm_lif import BatchNormLIF, BatchNormNeuron
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.nn.bounded import Bounded
from trtkern.nn.losses import LossParts, SDTLoss, TETLoss, TRTLoss
from trtkern.nn.neurons import ALIF, CLIF, CUBALI, CUBALIF, IF, LI, LIF, PLIF, AdLIF
from trtkern.nn.packed import PackedReport, packed_activations
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear, exact_convolutions
from trtkern.nn.time import OverTime, TimeSequential
from trtkern.nn.timed import EIF, QIF, Izhikevich
from trtkern.nn.unfused import Absorbed, UnfusedBatchNormLIF
from trtkern.ops.spikes import Spikes

if _TYPE_CHECKING:
    from trtkern.nn.convert import ConversionReport, convert_norm_lif, convert_state_dict, unfuse
    from trtkern.nn.convert_spikes import SpikeLayersReport, convert_spike_layers
    from trtkern.nn.delay import Delay
    from trtkern.nn.norms import batch_norms, convert_sync_norms, freeze_norms, update_norms
    from trtkern.nn.own import Neuron
    from trtkern.nn.recurrent import Recurrent
    from trtkern.nn.streams import Stream, stream

__all__ = [
    "ALIF", "CLIF", "CUBALI", "CUBALIF", "EIF", "IF", "LI", "LIF", "PLIF", "QIF", "Absorbed", "AdLIF", "BatchNormLIF",
    "BatchNormNeuron", "Bounded", "ConvBatchNormLIF", "ConversionReport", "Delay", "Izhikevich", "LossParts", "Neuron",
    "OverTime", "PackedReport", "Recurrent", "SDTLoss", "SpikeConv2d", "SpikeLayersReport", "SpikeLinear", "Spikes",
    "Stream", "TETLoss", "TRTLoss", "TimeSequential", "UnfusedBatchNormLIF", "batch_norms", "convert_norm_lif",
    "convert_spike_layers", "convert_state_dict", "convert_sync_norms", "exact_convolutions", "freeze_norms",
    "packed_activations", "stream", "unfuse", "update_norms",
]  # fmt: skip

_LATER = {
    "ConversionReport": "convert",
    "Delay": "delay",
    "Neuron": "own",
    "Recurrent": "recurrent",
    "SpikeLayersReport": "convert_spikes",
    "Stream": "streams",
    "batch_norms": "norms",
    "convert_norm_lif": "convert",
    "convert_spike_layers": "convert_spikes",
    "convert_state_dict": "convert",
    "convert_sync_norms": "norms",
    "freeze_norms": "norms",
    "stream": "streams",
    "unfuse": "convert",
    "update_norms": "norms",
}
"""What is imported when it is asked for, by the file that has it."""


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
