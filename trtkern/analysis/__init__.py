"""What a spiking network learnt, and how: Fisher information and gradients over time, flat minima, energy, spikes.

Every function takes any ``torch.nn.Module`` whose output is [T, B, C] (the logits of every time step) and labelled
samples, leaves the model as it was, and returns a frozen dataclass with ``save``, ``load``, ``table``, ``remarks`` and
``plot``. matplotlib is needed for ``plot`` alone. ``trtkern analyze`` runs them on a run of ``trtkern train``.
"""

from trtkern.analysis._curvature import Curvature, curvature
from trtkern.analysis._directions import Directions
from trtkern.analysis._early import Early, early
from trtkern.analysis._energy import Energy, energy
from trtkern.analysis._fisher import Fisher, fisher
from trtkern.analysis._gradients import gradients
from trtkern.analysis._gradients_result import Gradients
from trtkern.analysis._landscape import Landscape, landscape
from trtkern.analysis._memory import Memory
from trtkern.analysis._network import Samples
from trtkern.analysis._result import Picture, Result, Table
from trtkern.analysis._spikes import SpikeStatistics, spikes

__all__ = [
    "Curvature", "Directions", "Early", "Energy", "Fisher", "Gradients", "Landscape", "Memory", "Picture", "Result",
    "Samples", "SpikeStatistics", "Table", "curvature", "early", "energy", "fisher", "gradients", "landscape", "spikes",
]  # fmt: skip
