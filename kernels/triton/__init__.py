"""Triton kernels of EntmaxKV."""
