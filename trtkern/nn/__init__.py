"""Layers and losses: drop them into any PyTorch model."""

from trtkern.nn.batch_norm_lif import BatchNormLIF, BatchNormNeuron
from trtkern.nn.block import ConvBatchNormLIF
from trtkern.nn.bounded import Bounded
from trtkern.nn.convert import ConversionReport, convert_norm_lif, convert_state_dict, unfuse
from trtkern.nn.convert_spikes import SpikeLayersReport, convert_spike_layers
from trtkern.nn.losses import LossParts, SDTLoss, TETLoss, TRTLoss
from trtkern.nn.neurons import ALIF, CLIF, CUBALI, CUBALIF, IF, LI, LIF, PLIF, AdLIF
from trtkern.nn.norms import batch_norms, convert_sync_norms, freeze_norms, update_norms
from trtkern.nn.packed import PackedReport, packed_activations
from trtkern.nn.spike_layers import SpikeConv2d, SpikeLinear, exact_convolutions
from trtkern.nn.time import OverTime, TimeSequential
from trtkern.nn.timed import EIF, QIF, Izhikevich
from trtkern.nn.unfused import Absorbed, UnfusedBatchNormLIF
from trtkern.ops.spikes import Spikes

__all__ = [
    "ALIF", "CLIF", "CUBALI", "CUBALIF", "EIF", "IF", "LI", "LIF", "PLIF", "QIF", "Absorbed", "AdLIF", "BatchNormLIF",
    "BatchNormNeuron", "Bounded", "ConvBatchNormLIF", "ConversionReport", "Izhikevich", "LossParts", "OverTime",
    "PackedReport", "SDTLoss", "SpikeConv2d", "SpikeLayersReport", "SpikeLinear", "Spikes", "TETLoss", "TRTLoss",
    "TimeSequential", "UnfusedBatchNormLIF", "batch_norms", "convert_norm_lif", "convert_spike_layers",
    "convert_state_dict", "convert_sync_norms", "exact_convolutions", "freeze_norms", "packed_activations", "unfuse",
    "update_norms",
]  # fmt: skip
