"""Networks built from the fused layers."""

from trtkern.models.conv import ConvSNN, vggsnn

__all__ = ["ConvSNN", "vggsnn"]
