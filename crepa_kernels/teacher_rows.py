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

    def _unit(self, clip: int, frame: int, out: torch.Tensor) -> None:
        """Rows of the teacher frame of student frame ``frame`` into ``out`` (M, E); zero if it does not exist."""
        features, plan = self._features(clip, frame), self.problem.plan
        if self.problem.teacher_mask is not None:
            features = features.where(self.problem.teacher_mask[clip, frame], 0)
        if plan.teacher != "keep":
            features = features.to(out.dtype)
        if plan.teacher == "pool":
            features = features.mean(dim=0, keepdim=True)
        elif plan.teacher == "resample":
            features = resample_tokens_op(features, plan.teacher_grid, plan.grid, plan.antialias)
        norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=out.dtype)
        torch.div(features, norm.clamp_min_(NORM_FLOOR), out=out)

    def _new_rows(self, frames: int) -> torch.Tensor:
        tokens, width = self.problem.plan.tokens, self.problem.teacher_features.shape[-1]
        return self.problem.teacher_features.new_empty((frames * tokens, width), dtype=self.problem.statistics_type)

    def _rows_of(self, clip: int, frame: int) -> torch.Tensor:
        if frame not in self.rows:
            self.rows[frame] = self._new_rows(1)
            self._unit(clip, frame, self.rows[frame])
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
        if len(frames) == 1:
            return self._rows_of(chunk.clip, chunk.start)
        own = self._new_rows(len(frames))
        for frame, out in zip(frames, own.split(self.problem.plan.tokens), strict=True):
            if frame in self.rows:
                out.copy_(self.rows[frame])
            else:
                self._unit(chunk.clip, frame, out)
            self.rows[frame] = out
        return own

    def combined(self, chunk: Chunk, own: torch.Tensor) -> torch.Tensor:
        """z = y + the weighted neighbours, (frames x M, E); ``own`` itself where there are none."""
        if self.reach == 0:
            return own
        tokens, combined = self.problem.plan.tokens, torch.empty_like(own)
        frames = range(chunk.start, chunk.stop)
        for frame, rows, out in zip(frames, own.split(tokens), combined.split(tokens), strict=True):
            so_far = rows
            for neighbour, weight in self._neighbours(chunk.clip, frame):
                other = self._rows_of(chunk.clip, neighbour)
                if isinstance(weight, float):
                    torch.add(so_far, other, alpha=weight, out=out)
                else:
                    torch.addcmul(so_far, other, weight, out=out)
                so_far = out
            if so_far is rows:
                out.copy_(rows)
        return combined

    def _neighbours(self, clip: int, frame: int) -> Iterator[tuple[int, float | torch.Tensor]]:
        """Weights are numbers, unless a mask on the device decides which frames exist."""
        dynamic = self.problem.teacher_mask is not None
        for offset in range(1, self.reach + 1) if dynamic else self.offsets:
            for neighbour in (frame - offset, frame + offset):
                if 0 <= neighbour < self.frames:
                    yield neighbour, self.weights[clip, frame, neighbour] if dynamic else self.offsets[offset]
