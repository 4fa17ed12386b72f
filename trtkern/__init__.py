"""Fused kernels for training spiking neural networks, and Temporal Regularization Training (TRT).

``trtkern.nn`` holds the layers and losses, ``trtkern.lif`` the functional form; ``trtkern doctor`` on the command line
shows which backends run here. Importing this package loads no kernel: a backend is loaded when it first runs.
"""

from trtkern import nn
from trtkern.ops._check import debug
from trtkern.ops.lif import LIFOutput, lif
from trtkern.spec import LIFSpec

__version__ = "0.1.0"
__all__ = ["LIFOutput", "LIFSpec", "debug", "lif", "nn"]
