"""NIR, the Neuromorphic Intermediate Representation: export, import, and the layers that only its graphs have."""

from trtkern.interop.nir.graph import NodeGraph
from trtkern.interop.nir.layers import PerNeuron, Scale, Threshold
from trtkern.interop.nir.reading import from_nir
from trtkern.interop.nir.writing import to_nir

__all__ = ["NodeGraph", "PerNeuron", "Scale", "Threshold", "from_nir", "to_nir"]
