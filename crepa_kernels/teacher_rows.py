"""The teacher's side of the ``torch`` backend."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .chunks import Chunk, is_readable
from .ops.resample import resample_tokens_op
from .problem import NORM_FLOOR, Problem


class TeacherRows:
    """Unit teacher rows on the common grid, one clip at a time; each frame is made once and dropped when passed.

    Chunks are asked for in order: ``own`` first, then ``combined``.
    """

    def __init__(self, problem: Problem, weights: torch.Tensor):
        self.problem, self.weights = problem, weights
        self.frames = problem.frames
        self.reach = min(problem.neighbours.distance, self.frames - 1)
        self.offsets = problem.neighbours.offsets(self.frames)
        index = problem.frame_index
        self.host_index = index.tolist() if index is not None and is_readable(index) else None
        self.clip = -1
        self.rows: dict[int, torch.Tensor] = {}

    def unit(self, clip: int, frame: int) -> torch.Tensor:
        """Rows (M, E) of the teacher frame of student frame ``frame``; zero if it does not exist."""
        if frame not in self.rows:
            features = self._features(clip, frame).to(self.problem.statistics_type)
            if self.problem.teacher_mask is not None:
                features = features.where(self.problem.teacher_mask[clip, frame], 0)
            plan = self.problem.plan
            if plan.teacher == "pool":
                features = features.mean(dim=0, keepdim=True)
            elif plan.teacher == "resample":
                features = resample_tokens_op(features, plan.teacher_grid, plan.grid, plan.antialias)
            norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
            self.rows[frame] = features / norm.clamp_min_(NORM_FLOOR)
        return self.rows[frame]

    def _features(self, clip: int, frame: int) -> torch.Tensor:
        features, index = self.problem.teacher_features[clip], self.problem.frame_index
        if self.host_index is not None:
            return features[self.host_index[clip][frame]]
        return features[frame] if index is None else features.index_select(0, index[clip, frame : frame + 1])[0]

    def own(self, chunk: Chunk) -> torch.Tensor:
        """(frames x M, E)."""
        if chunk.clip != self.clip:
            self.clip, self.rows = chunk.clip, {}
        self.rows = {k: rows for k, rows in self.rows.items() if k >= chunk.start - self.reach}
        frames = range(chunk.start, chunk.stop)
        rows = [self.unit(chunk.clip, frame) for frame in frames]
        if len(rows) == 1:
            return rows[0]
        own = torch.cat(rows)
        self.rows |= zip(frames, own.split(self.problem.plan.tokens), strict=True)
        return own

    def combined(self, chunk: Chunk, own: torch.Tensor) -> torch.Tensor:
        """z = y + the weighted neighbours, (frames x M, E); ``own`` itself where there are none."""
        if self.reach == 0:
            return own
        tokens = self.problem.plan.tokens
        combined = own.clone()
        for frame, out in zip(range(chunk.start, chunk.stop), combined.split(tokens), strict=True):
            for neighbour, weight in self._neighbours(chunk.clip, frame):
                if isinstance(weight, float):
                    out.add_(self.unit(chunk.clip, neighbour), alpha=weight)
                else:
                    out.addcmul_(self.unit(chunk.clip, neighbour), weight)
        return combined

    def _neighbours(self, clip: int, frame: int) -> Iterator[tuple[int, float | torch.Tensor]]:
        """Weights are numbers, unless a mask on the device decides which frames exist."""
        dynamic = self.problem.teacher_mask is not None
        for offset in range(1, self.reach + 1) if dynamic else self.offsets:
            for neighbour in (frame - offset, frame + offset):
                if 0 <= neighbour < self.frames:
                    yield neighbour, self.weights[clip, frame, neighbour] if dynamic else self.offsets[offset]
