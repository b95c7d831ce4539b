"""Interleaved times and peak memory of calls that do the same work."""

from __future__ import annotations

import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


def interleaved_medians(calls: Mapping[str, Call], rounds: int = 9, warmup: int = 2) -> dict[str, float]:
    """Seconds a call, each round timing every call once: a slow spell of the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Call) -> int:
    """Most bytes of tensors that ``call`` had allocated at once on a CPU, beyond what was there before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def kept_bytes(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, the inputs not counted."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


def keep_heap_warm() -> None:
    """Freed memory stays mapped, as in a training loop that reuses it: otherwise page faults are what is timed."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
