"""The package's operator library, ``crepa_kernels``: schemas, and what autocast does to them."""

from __future__ import annotations

import torch

from .namespace import add_op_namespace_prefix

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")


def define(name: str, schema: str) -> None:
    """Defines ``crepa_kernels::<name>``; kernels may be registered from Python and from the extension."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


def keeps_type(name: str) -> None:
    """Autocast leaves the operator's tensors alone: it sums in fp32 whatever their type, and returns that type."""
    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, torch.library.fallthrough_kernel, key)
