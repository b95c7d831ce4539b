"""A host memory that is apart from the device, on a machine where both are one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor


class Apart:
    """What diffusers' group offloading has sent off, and `most`: groups that were there at once, once all were off."""

    def __init__(self, groups: list[Any]) -> None:
        self.most = 0
        self._away: dict[Tensor, Tensor] = {}
        self._groups = groups
        for group in groups:
            self.off(group)

    def off(self, group: Any) -> None:
        for tensor in (*group.parameters, *group.buffers):
            if tensor not in self._away and tensor.is_floating_point():
                self._away[tensor] = tensor.data
                tensor.data = torch.full_like(tensor.data, float("nan"))

    def on(self, group: Any) -> None:
        for tensor in (*group.parameters, *group.buffers):
            if tensor in self._away:
                tensor.data = self._away.pop(tensor)
        there = [each for each in self._groups if each.parameters and each.parameters[0] not in self._away]
        self.most = max(self.most, len(there))


@contextmanager
def host_memory_apart(groups: list[Any]) -> Iterator[Apart]:
    """Whoever reads a weight of one of these groups while it is off reads NaN."""
    apart = Apart(groups)
    with patch.multiple(ModuleGroup, offload_=lambda group: apart.off(group), onload_=lambda group: apart.on(group)):
        yield apart
