"""Times, peak memory and rates on the current GPU, and what machine they are from."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of single calls, the caches cold."""

    median: float
    p20: float
    p80: float


def machine() -> dict[str, str]:
    """Device, versions and commit, for the head of a result file."""
    import triton

    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=folder, capture_output=True, text=True
    ).stdout.strip()
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return {
        "device": torch.cuda.get_device_name(),
        "runtime": runtime,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown: no git checkout",
    }


def timed(step: Step, repeats: int = 25, warmup: int = 5) -> Times:
    """``repeats`` calls, each after the caches were flushed; the GPU's own clock."""
    for _ in range(warmup):
        step()
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        flush.zero_()
        start.record()
        step()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in events)
    fifths = statistics.quantiles(times, n=5)
    return Times(statistics.median(times), fifths[0], fifths[-1])


def graphed(step: Step) -> Step:
    """``step`` captured in a CUDA graph: its launches cost the host nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def extra_memory(step: Step) -> int:
    """Most bytes allocated at once during ``step``, beyond what was there before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate() -> float:
    """Bytes read and written a second by a device-to-device copy of 2 GiB (a quarter of the memory if that is less)."""
    size = min(2 * 2**30, torch.cuda.get_device_properties(0).total_memory // 8)
    source = torch.empty(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / (timed(lambda: target.copy_(source)).median * 1e-3)


def matrix_rate() -> float:
    """Operations a second of the vendor's best bf16 product of normal numbers, 8192 cubed."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (timed(lambda: a @ b).median * 1e-3)


def kernel_times(step: Step, repeats: int = 5) -> dict[str, float]:
    """Milliseconds a call of ``step`` spends in each GPU kernel, by its name."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in recorded.key_averages():
        if event.device_time_total > 0:
            found[event.key] = event.device_time_total / 1e3 / repeats
    return found
