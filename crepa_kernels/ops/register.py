"""The ``crepa_kernels`` operator library: schemas, and what autocast does to them."""

from __future__ import annotations

import torch

_library = torch.library.Library("crepa_kernels", "FRAGMENT")


def define(name: str, schema: str) -> None:
    """Defines ``crepa_kernels::<name>``; kernels may be registered from Python and from the extension."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


def keeps_type(name: str) -> None:
    """Autocast leaves the operator's tensors alone: it sums in fp32 whatever their type, and returns that type."""
    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, torch.library.fallthrough_kernel, key)
