"""The teacher's side of the ``torch`` backend."""

from __future__ import annotations

import torch

from ...inputs import LossInputs, frames_at
from ...ops.resample import resample_tokens_op
from .chunks import Chunk, ChunkPolicy


class TeacherFrames:
    """Teacher rows on the common grid, frame by frame."""

    def __init__(self, inputs: LossInputs, policy: ChunkPolicy):
        self.inputs = inputs
        index = inputs.frame_index
        self.host_index = index.tolist() if index is not None and policy.readable(index) else None

    def frame(self, clip: int, frame: int) -> torch.Tensor:
        """Rows (M, E) of the teacher frame of student frame ``frame``; zero if it does not exist."""
        features, plan, accum_dtype = self._features(clip, frame), self.inputs.plan, self.inputs.statistics_type
        if self.inputs.teacher_mask is not None:
            features = features.where(self.inputs.teacher_mask[clip, frame], 0)
        # Half types are widened row by row where they are read.
        if plan.teacher != "keep" or torch.float64 in (accum_dtype, features.dtype):
            features = features.to(accum_dtype)
        if plan.teacher == "pool":
            return features.mean(dim=0, keepdim=True)
        if plan.teacher == "resample":
            return resample_tokens_op(features, plan.teacher_grid, plan.grid, plan.antialias)
        return features if features.stride(-1) == 1 else features.contiguous()

    def _features(self, clip: int, frame: int) -> torch.Tensor:
        features, index = self.inputs.teacher_features[clip], self.inputs.frame_index
        if self.host_index is not None:
            return features[self.host_index[clip][frame]]
        return (
            features[frame]
            if index is None
            else frames_at(features[None], index[clip : clip + 1, frame : frame + 1])[0, 0]
        )


class TeacherRows(TeacherFrames):
    """Teacher rows on the common grid, one clip at a time; each frame is made once and dropped when passed.

    Chunks are asked for in order. Frames that lie on the common grid already are views of the teacher's features.

    Attributes:
        offsets: k - f of every neighbour, those before a frame as well.
    """

    def __init__(self, inputs: LossInputs, weights: torch.Tensor, policy: ChunkPolicy):
        super().__init__(inputs, policy)
        self.weights = weights
        self.frames = inputs.frames
        self.reach = min(inputs.neighbours.distance, self.frames - 1)
        # Where a mask says which frames exist, it says how far a clip's own distance reaches as well.
        masked = inputs.teacher_mask is not None
        chosen = range(1, self.reach + 1) if masked else inputs.neighbours.offsets(self.frames)
        self.offsets = [sign * offset for offset in chosen for sign in (-1, 1)]
        self.clip = -1
        self.rows: dict[int, torch.Tensor] = {}

    def around(self, chunk: Chunk) -> tuple[list[torch.Tensor], int, torch.Tensor]:
        """Rows (M, E) of the frames base, base + 1, ... that the chunk reads, base, and w[f, k] (T, T) of its clip.

        A frame between them that the chunk does not read is there as another one.
        """
        if chunk.clip != self.clip:
            self.clip, self.rows = chunk.clip, {}
        base, end = max(0, chunk.start - self.reach), min(self.frames, chunk.stop + self.reach)
        self.rows = {frame: rows for frame, rows in self.rows.items() if frame >= base}
        own = range(chunk.start, chunk.stop)
        read = {frame + offset for frame in own for offset in (0, *self.offsets)}
        for frame in range(base, end):
            if frame in read and frame not in self.rows:
                self.rows[frame] = self.frame(chunk.clip, frame)
        frames = [self.rows.get(frame, self.rows[chunk.start]) for frame in range(base, end)]
        return frames, base, self.weights[chunk.clip if len(self.weights) > 1 else 0]
