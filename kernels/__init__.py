"""The Triton kernels, one file per op family; importing a file here imports Triton.

They run on NVIDIA and AMD GPUs, and in Triton's interpreter on CPU tensors when ``TRITON_INTERPRET=1`` was set before
Triton was first imported. ``trtkern/backends/triton.py`` is the only caller.
"""
