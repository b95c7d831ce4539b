"""Which rows are worked on together."""

from __future__ import annotations

from dataclasses import dataclass

from .frames import Clip

# Tokens at a time where something of width D or E is made for them only: enough to fill a GPU.
CHUNK_TOKENS = 16384


@dataclass(frozen=True)
class RowChunk:
    """Rows [first_row, first_row + rows) of a call: frames [first_frame, last_frame) of ``clips`` clips.

    More than one clip only with all their rows.
    """

    first_clip: int
    clips: int
    first_frame: int
    last_frame: int
    first_row: int
    rows: int

    @property
    def stop_row(self) -> int:
        return self.first_row + self.rows


def row_chunks(clip: Clip, limited: bool, joined: bool, per_frame: int) -> list[RowChunk]:
    """Chunks of all rows of the call, in order.

    Args:
        clip: the call's sizes.
        limited: ``CHUNK_TOKENS`` tokens at most (one frame at least); otherwise as many as possible.
        joined: clips may share a chunk.
        per_frame: the larger number of tokens a frame, before or after its student side is resampled.
    """
    most = max(1, CHUNK_TOKENS // per_frame) if limited else clip.frames * clip.batch
    if joined and most >= clip.frames * clip.batch:
        return [RowChunk(0, clip.batch, 0, clip.frames, 0, clip.all_rows)]
    first_frame = clip.start // clip.tokens
    last_frame = -(-(clip.start + clip.rows) // clip.tokens)
    # As many chunks as needed, all about as large.
    most = -(-(last_frame - first_frame) // -(-(last_frame - first_frame) // most))
    chunks = []
    for index in range(clip.batch):
        for frame in range(first_frame, last_frame, most):
            stop = min(frame + most, last_frame)
            first = max(frame * clip.tokens - clip.start, 0)
            end = min(stop * clip.tokens - clip.start, clip.rows)
            chunks.append(RowChunk(index, 1, frame, stop, index * clip.rows + first, end - first))
    return chunks
