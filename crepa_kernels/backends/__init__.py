"""Three ways to compute one loss: the definition, PyTorch on any device, and fused Triton kernels."""
