"""Times of steps on the current GPU: replayed from a CUDA graph, on cold caches, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], object]
_FLUSH_BYTES = 256 * 2**20  # several times the largest L2


@dataclass(frozen=True)
class Times:
    """Milliseconds of single calls, the caches cold."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Times:
        fifths = statistics.quantiles(milliseconds, n=5)
        return cls(statistics.median(milliseconds), fifths[0], fifths[-1])


class CaptureError(RuntimeError):
    """A step runs, but not while a CUDA graph is captured. The process may be left with a stream in that state."""


class Clock:
    """The GPU's own clock."""

    device = "cuda"

    def graphed(self, step: Step) -> Step:
        """``step`` captured in a CUDA graph: its launches cost the host nothing, what it returns is dropped.

        Raises:
            CaptureError: if it cannot be captured; errors of the calls before the capture are its own.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            raise CaptureError(first_line(error)) from error
        return graph.replay

    def interleaved(self, steps: Mapping[str, Step], repeats: int = 25, warmup: int = 5) -> dict[str, Times]:
        """Each round times every step once, its caches flushed: a slow spell of the machine meets them all."""
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
        for turn in range(warmup + repeats):
            for name, step in steps.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # The flush keeps the GPU busy until the host has queued the step.
                flush.zero_()
                start.record()
                step()
                stop.record()
                if turn >= warmup:
                    events[name].append((start, stop))
        torch.cuda.synchronize()
        return {name: Times.of([start.elapsed_time(stop) for start, stop in pairs]) for name, pairs in events.items()}

    def wait(self) -> None:
        """Until all that was queued is done; raises what went wrong on the GPU since."""
        torch.cuda.synchronize()

    def timed(self, step: Step) -> Times:
        return self.interleaved({"step": step})["step"]


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, and its kind."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
