"""What training costs and what a network does: the traffic model, kept memory, firing rates, a diagnosis."""

from trtkern.profiling.firing.activity import FiringRates, LayerActivity, Limits, firing_rates, problems
from trtkern.profiling.firing.diagnosis import Diagnosis, diagnose
from trtkern.profiling.memory.measured import memory
from trtkern.profiling.memory.report import LayerMemory, MemoryReport
from trtkern.profiling.step.profiler import profile
from trtkern.profiling.step.report import PartTime, StepProfile

__all__ = [
    "Diagnosis", "FiringRates", "LayerActivity", "LayerMemory", "Limits", "MemoryReport", "PartTime", "StepProfile",
    "diagnose", "firing_rates", "memory", "problems", "profile",
]  # fmt: skip
