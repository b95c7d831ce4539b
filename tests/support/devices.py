"""Where a test of the Triton backend runs: through the interpreter on a CPU, and on a GPU when there is one."""

from __future__ import annotations

import pytest
import torch

from crepa_kernels.backends.triton.launch import INTERPRETED

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for the GPU here")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
on_a_gpu = pytest.mark.parametrize("device", DEVICES[1:])
