"""Operators of ``torch.ops.crepa_kernels``: schemas, fake kernels, autograd, and their kernels in PyTorch."""

from . import layer_norm_resample, relation, resample
from . import rows as row_alignment
from .extension import has_extension, load

__all__ = ["has_extension", "layer_norm_resample", "relation", "resample", "row_alignment"]

load()
