"""What training costs: the traffic model, and the memory that a model keeps for its backward pass."""

from trtkern.profiling.memory import memory
from trtkern.profiling.report import LayerMemory, MemoryReport

__all__ = ["LayerMemory", "MemoryReport", "memory"]
