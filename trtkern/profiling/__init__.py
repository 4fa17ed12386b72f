"""What training costs and what a network does: the traffic model, kept memory, firing rates, a diagnosis."""

from trtkern.profiling.activity import FiringRates, LayerActivity, Limits, firing_rates, problems
from trtkern.profiling.diagnosis import Diagnosis, diagnose
from trtkern.profiling.memory import memory
from trtkern.profiling.profiler import profile
from trtkern.profiling.report import LayerMemory, MemoryReport
from trtkern.profiling.step_profile import PartTime, StepProfile

__all__ = [
    "Diagnosis", "FiringRates", "LayerActivity", "LayerMemory", "Limits", "MemoryReport", "PartTime", "StepProfile",
    "diagnose", "firing_rates", "memory", "problems", "profile",
]  # fmt: skip
