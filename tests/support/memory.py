"""Bytes that a loss keeps: through autograd's hooks, however held, and at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Every storage that operators return, and its size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.made = 0  # bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self.seen.get(storage._cdata)
                self.made += storage.nbytes() if known is None or known[0].expired() else 0
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, inputs: list[torch.Tensor]) -> int:
        """Bytes of the storages that somebody still holds, those of ``inputs`` not counted."""
        gc.collect()
        ours = {tensor.untyped_storage()._cdata for tensor in inputs}
        return sum(size for key, (ref, size) in self.seen.items() if key not in ours and not ref.expired())


def saved_bytes(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> int:
    """Bytes that autograd saves for the backward pass of ``forward()``, storages once, inputs not counted."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no storage's address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        if tensor.untyped_storage().data_ptr() not in ours:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(saved.values())


def held_bytes(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> int:
    """Bytes that are still there while the loss is, however they are held: not through autograd's hooks alone."""
    with Storages() as storages:
        loss = forward()
    held = storages.alive(inputs)
    del loss
    return held


def allocated_peak(call: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator has given out at a time during ``call()``, beside those of before it."""
    gc.collect()  # else what was garbage before is taken off when it is collected in between
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    # `profiler.events()` has no sizes.
    changes = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    assert changes
    now = peak = 0
    for each in sorted(changes, key=lambda each: each.start_ns()):
        now += each.nbytes()
        peak = max(peak, now)
    return peak
