"""Triton kernels of the loss and their launchers, one file a kernel family; no autograd here (ops/ has it)."""
