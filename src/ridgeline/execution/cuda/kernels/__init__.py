"""Triton kernels, each beside its launcher and a plain PyTorch reference of the launcher's signature.

A launcher checks shapes and strides and starts kernels on the current stream. It allocates nothing, never
waits for the device and decides nothing from what tensors hold, so that a CUDA graph can record it.
"""
