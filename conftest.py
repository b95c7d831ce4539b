"""Where there is no GPU, Triton kernels run through its interpreter, which it decides when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
