"""Which frames are worked on together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...grid import num_tokens
from ...inputs import LossInputs
from ...ops import has_extension

# Tokens worked on at a time: a CPU's caches like few. A GPU's launches want many, and every one costs fp32 rows of p, y
# and z: more than this, and a short clip's peak passes that of the eager loss.
_CHUNK_TOKENS = {"cpu": 2560}
_CHUNK_TOKENS_ELSEWHERE = 4096


@dataclass(frozen=True)
class Chunk:
    """Frames [start, stop) of one clip, and where their rows begin among all the rows that are worked on."""

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


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the values of ``tensor`` are at hand: elsewhere than on a CPU reading them would synchronise."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def plan_chunks(inputs: LossInputs) -> list[Chunk]:
    """Runs of frames in the loss, a cache's worth of tokens each.

    Frames outside the loss are skipped where the mask is readable; elsewhere all frames are worked on and masked.
    """
    batch, tokens = inputs.batch, num_tokens(inputs.plan.student_grid)
    first, last = 0, inputs.frames
    if inputs.token_range is not None:
        first, last = inputs.token_range[0] // tokens, -(-inputs.token_range[1] // tokens)
    mask, device = inputs.frame_mask, inputs.hidden_states.device.type
    in_loss = mask.tolist() if mask is not None and is_readable(mask) else None
    limit = _CHUNK_TOKENS.get(device, _CHUNK_TOKENS_ELSEWHERE)
    # Where LayerNorm and resampling are one pass, only resampled rows are held; more of them make faster products.
    fused = inputs.plan.student == "resample" and device == "cpu" and has_extension(device)
    most = max(1, limit // (inputs.plan.tokens if fused else max(tokens, inputs.plan.tokens)))
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
                row += (stop - start) * inputs.plan.tokens
            start = max(stop, start + 1)
    return chunks
