"""Kernel throughput against the eager reference, torch.compile and other libraries: what ``trtkern bench`` runs."""
