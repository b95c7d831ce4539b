"""Interleaved times, memory and waits of calls that do the same work, and where they were measured."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from benches.gpu.measure import commit

Call = Callable[[], object]
# What gives a tensor's numbers to Python, and makes the host wait where they are on a GPU.
_READS = ("item", "tolist", "numpy", "cpu", "equal", "allclose", "nonzero", "is_nonzero")
_READS_OF_PYTHON = ("__float__", "__int__", "__bool__", "__index__", "__contains__")
READS = {getattr(torch.Tensor, name) for name in (*_READS, *_READS_OF_PYTHON)}


def machine(device: str) -> dict[str, Any]:
    """Device, versions and commit, for the head of a result file; and how busy the machine was before."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "commit": commit(),
    }


def processor() -> str:
    """The CPU's name, from what pytest-benchmark uses."""
    import cpuinfo

    return str(cpuinfo.get_cpu_info()["brand_raw"])


def waiting(call: Call, device: str) -> Call:
    """``call``, and at its end the device is done."""
    if device == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


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


def peak_bytes(call: Call, device: str = "cpu") -> int:
    """Most bytes of tensors that ``call`` had allocated at once, beyond what was there before."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return int(torch.cuda.max_memory_allocated()) - int(before)
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


class _Reads(TorchFunctionMode):
    """Counts what reads a tensor."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


def host_waits(call: Call, device: str = "cpu") -> int:
    """How often Python reads a tensor during ``call``, which on a GPU makes it wait; there torch itself counts."""
    call()
    if device == "cpu":
        with _Reads() as reads:
            call()
        return reads.count
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def keep_heap_warm() -> None:
    """Freed memory stays mapped, as in a training loop that reuses it: otherwise page faults are what is timed."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
