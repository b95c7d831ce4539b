"""Which rows are worked on together."""

from __future__ import annotations

from typing import NamedTuple

from .call import Call

# Tokens at a time where something of width D or E is made for them only: enough to fill a GPU.
CHUNK_TOKENS = 16384


class RowChunk(NamedTuple):
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
    def span(self) -> slice:
        return slice(self.first_row, self.first_row + self.rows)


def row_chunks(call: Call, limited: bool) -> list[RowChunk]:
    """Chunks of all rows of the call, in order; clips share one where their tokens are rows of one matrix.

    ``limited``: ``CHUNK_TOKENS`` tokens at most (one frame at least); otherwise as many as possible.
    """
    most = call.frames * call.batch
    if limited:
        # Where the extension normalises and resamples at once, nothing is made of the student's own tokens.
        per_frame = call.per_frame if call.fused else max(call.per_frame, call.student_per_frame)
        most = max(1, CHUNK_TOKENS // per_frame)
    if most >= call.frames * call.batch and call.joined:
        return [RowChunk(0, call.batch, 0, call.frames, 0, call.all_rows)]
    start, rows, per_frame = call.start, call.rows, call.per_frame
    first_frame = start // per_frame
    last_frame = -(-(start + rows) // per_frame)
    # As many chunks as needed, all about as large.
    most = -(-(last_frame - first_frame) // -(-(last_frame - first_frame) // most))
    chunks = []
    for index in range(call.batch):
        for frame in range(first_frame, last_frame, most):
            stop = min(frame + most, last_frame)
            first = max(frame * per_frame - start, 0)
            end = min(stop * per_frame - start, rows)
            chunks.append(RowChunk(index, 1, frame, stop, index * rows + first, end - first))
    return chunks
