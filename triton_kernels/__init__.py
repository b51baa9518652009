"""Triton kernels of the routed LoRA operator for GPUs will live here, one file per kernel (``moelora.triton_kernels``).
Each is an optional faster path of a function in ``moelora/ops``, tested against ``moelora/ops/reference.py``."""
