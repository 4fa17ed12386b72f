"""The public modules: what has an entry in the API reference, and what tests/public_api.txt keeps an eye on.

A name is public when it stands in the ``__all__`` of one of these modules. Everything else may change without a word.
"""

from __future__ import annotations

MODULES = (
    "trtkern",
    "trtkern.nn",
    "trtkern.models",
    "trtkern.data",
    "trtkern.data.augment",
    "trtkern.data.encode",
    "trtkern.data.neuromorphic",
    "trtkern.train",
    "trtkern.analysis",
    "trtkern.profiling",
    "trtkern.profiling.memory.budget",
    "trtkern.profiling.memory.held",
    "trtkern.profiling.memory.ways",
    "trtkern.profiling.traffic",
    "trtkern.profiling.scaling",
    "trtkern.profiling.collectives",
    "trtkern.profiling.inspect",
    "trtkern.interop",
    "trtkern.interop.nir",
    "trtkern.surrogates",
    "trtkern.neurons",
    "trtkern.ops.delay",
    "trtkern.ops.regularizer",
    "trtkern.ops.spikes",
    "trtkern.backends",
    "trtkern.backends.base",
    "trtkern.reference",
    "trtkern.selftest",
    "trtkern.parallel.job",
    "trtkern.parallel.sharding",
    "trtkern.malloc",
)
