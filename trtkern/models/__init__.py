"""Networks built from the fused layers: by name, of a topology string, and with the weights of the paper's code."""

from trtkern.models._network import SpikingNetwork
from trtkern.models.conv import ConvSNN, vggsnn
from trtkern.models.reference_weights import load_reference_weights, reference_keys
from trtkern.models.resnet import resnet19, sew_resnet34, spiking_resnet34
from trtkern.models.spike_driven import SpikeDrivenTransformer
from trtkern.models.spikformer import Spikformer
from trtkern.models.topology import from_topology, parse_topology

__all__ = [
    "ConvSNN", "SpikeDrivenTransformer", "Spikformer", "SpikingNetwork", "from_topology", "load_reference_weights",
    "parse_topology", "reference_keys", "resnet19", "sew_resnet34", "spiking_resnet34", "vggsnn",
]  # fmt: skip
