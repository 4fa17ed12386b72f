"""Networks built from the fused layers."""

from trtkern.models.small import SmallNet

__all__ = ["SmallNet"]
