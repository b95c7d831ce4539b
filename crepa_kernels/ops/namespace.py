"""Where the operators are; in a tree for the kernel hub its build says so (``tools/hub``)."""

from __future__ import annotations

import torch

ops = torch.ops.crepa_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    return f"crepa_kernels::{op_name}"
