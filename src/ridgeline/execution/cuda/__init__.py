"""The CUDA executor: programs lowered to Triton kernels and PyTorch's dense products."""
