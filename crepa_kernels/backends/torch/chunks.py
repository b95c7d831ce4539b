"""Which frames are worked on together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...grid import num_tokens
from ...inputs import LossInputs
from ...ops import has_extension

# Tokens worked on at a time: a CPU's caches like few. A GPU's launches want many, and every one costs fp32 rows of p, y
# and z: more than this, and a short clip's peak passes that of the eager loss.
_ON_A_CPU, _ELSEWHERE = 2560, 4096


@dataclass(frozen=True)
class ChunkPolicy:
    """How the work is cut.

    Attributes:
        tokens: worked on at a time, 1 or more, but a frame's at least; None: as many as suit the device.
        reads: whether masks and indices are read where that costs no waiting. Frames outside the loss are left out
            then; else, as on a GPU, all frames are worked on and masked.
    """

    tokens: int | None = None
    reads: bool = True

    def __post_init__(self) -> None:
        whole = isinstance(self.tokens, int) and not isinstance(self.tokens, bool)
        if self.tokens is not None and not (whole and self.tokens >= 1):
            raise ValueError(f"tokens must be None or an integer of at least 1, got {self.tokens!r}")

    def limit(self, device_type: str) -> int:
        """Tokens at a time on a device."""
        return self.tokens or (_ON_A_CPU if device_type == "cpu" else _ELSEWHERE)

    def readable(self, tensor: torch.Tensor) -> bool:
        """Whether the values of ``tensor`` are at hand: elsewhere than on a CPU reading them would synchronise."""
        return self.reads and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


_policy = ChunkPolicy()


@contextmanager
def chunked(policy: ChunkPolicy) -> Iterator[None]:
    """Inside, every call cuts its work by ``policy``: for tuning, benches and tests."""
    global _policy
    outer, _policy = _policy, policy
    try:
        yield
    finally:
        _policy = outer


def chunk_policy() -> ChunkPolicy:
    """Of the calls that are made now."""
    return _policy


@dataclass(frozen=True)
class Chunk:
    """Frames [start, stop) of one clip, and where their rows begin among all the rows that are kept."""

    clip: int
    start: int
    stop: int
    row: int

    @property
    def frames(self) -> int:
        return self.stop - self.start

    def rows(self, tokens: int) -> slice:
        """Its rows, ``tokens`` a frame."""
        return slice(self.row, self.row + self.frames * tokens)


def plan_chunks(inputs: LossInputs, policy: ChunkPolicy) -> list[Chunk]:
    """Runs of frames in the loss, a cache's worth of tokens each.

    Frames outside the loss are skipped where the mask is readable; elsewhere all frames are worked on and masked.
    """
    batch, tokens = inputs.batch, num_tokens(inputs.plan.student_grid)
    first, last = inputs.touched_frames.start, inputs.touched_frames.stop
    mask, device = inputs.frame_mask, inputs.hidden_states.device.type
    in_loss = mask.tolist() if mask is not None and policy.readable(mask) else None
    # Where LayerNorm and resampling are one pass, only resampled rows are held; more of them make faster products.
    resampled = inputs.plan.student == "resample" and inputs.projector.weight is not None
    fused = resampled and not inputs.plan.project_first and device == "cpu" and has_extension(device)
    most = max(1, policy.limit(device) // (inputs.plan.tokens if fused else max(tokens, inputs.plan.tokens)))
    chunks: list[Chunk] = []
    row = 0
    for clip in range(batch):
        start = first
        while start < last:
            stop = start
            while stop < min(start + most, last) and (in_loss is None or in_loss[clip][stop]):
                stop += 1
            if stop > start:
                chunks.append(Chunk(clip, start, stop, row))
                row += (stop - start) * inputs.plan.projected
            start = max(stop, start + 1)
    return chunks
