"""What training costs and what a network does: the traffic model, kept memory, firing rates, a diagnosis."""

from trtkern.profiling.activity import FiringRates, LayerActivity, Limits, firing_rates, problems
from trtkern.profiling.diagnosis import Diagnosis, diagnose
from trtkern.profiling.memory import memory
from trtkern.profiling.report import LayerMemory, MemoryReport

__all__ = [
    "Diagnosis", "FiringRates", "LayerActivity", "LayerMemory", "Limits", "MemoryReport", "diagnose", "firing_rates",
    "memory", "problems",
]  # fmt: skip
