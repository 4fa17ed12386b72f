"""What training costs and what a network does: the traffic model, kept memory, firing rates, a diagnosis."""

from trtkern.profiling.firing.activity import FiringRates, LayerActivity, Limits, firing_rates, problems
from trtkern.profiling.firing.diagnosis import Diagnosis, diagnose
from trtkern.profiling.memory.measured import memory
from trtkern.profiling.memory.report import LayerMemory, MemoryReport
from trtkern.profiling.step.comparison import Difference, ProfileComparison, compare
from trtkern.profiling.step.parts import Operator, Part, PartTime
from trtkern.profiling.step.profiler import profile
from trtkern.profiling.step.report import StepProfile

__all__ = [
    "Diagnosis", "Difference", "FiringRates", "LayerActivity", "LayerMemory", "Limits", "MemoryReport", "Operator",
    "Part", "PartTime", "ProfileComparison", "StepProfile", "compare", "diagnose", "firing_rates", "memory", "problems",
    "profile",
]  # fmt: skip
