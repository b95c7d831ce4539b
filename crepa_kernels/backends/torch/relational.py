"""The relational loss on the ``torch`` backend's rows: a clip at a time, without a matrix of all its tokens.

The gradient of a clip's sum is made with the sum, from what it has at hand. With Z the rows of p by their length, what
is kept for the backward pass is ``q = dZ - <dZ, Z> Z`` and two numbers a token, as ``crepa_torch`` keeps them.

A plain autograd function, as ``crepa_torch``'s is: what is large and has loops is in operators, and the rest of it is
traced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...inputs import LossInputs
from ...neighbours import Relation
from ...ops.relation import OfRank, relate_frames_op, relate_ranks
from ...ops.rows import NORM_FLOOR, floored_norm, unfolded_rows
from ...reduction import reduce_pairs
from ...transfer import in_touched_frames
from .autograd import Record, projector_gradients
from .chunks import Chunk, chunk_policy, plan_chunks
from .student import GradientRows, Projected, Settings, StudentRows
from .teacher import TeacherFrames


def relational_torch(
    inputs: LossInputs,
    relation: Relation,
    relate: Callable[..., torch.Tensor] = relate_frames_op,
    rows_type: torch.dtype | None = None,
) -> torch.Tensor:
    """The relational loss of ``inputs``; differentiable once.

    ``relate``: the operator that compares a clip's rows. ``rows_type``: the type that it is given them in; None: the
    narrowest that PyTorch multiplies into the sums' type.

    Of a shard of tokens it is this rank's share, without ``relate``: the ranks of the group relate their rows together.
    """
    with torch.autocast(inputs.hidden_states.device.type, enabled=False):
        gamma, beta, weight, bias, _ = inputs.projector
        touched, own = _touched(inputs)
        sums = _ClipSums.apply(
            touched.hidden_states, gamma, beta, weight, bias, touched, relation, relate, rows_type,
            torch.is_grad_enabled(), own,
        )  # fmt: skip
        return reduce_pairs(sums, inputs.frame_mask, relation.weights(inputs.frames, like=sums))


def _touched(inputs: LossInputs) -> tuple[LossInputs, OfRank | None]:
    """``inputs`` with the frames alone of which the hidden states have tokens, zeros for those of other ranks."""
    if inputs.token_range is None or inputs.context_group is None:
        return inputs, None
    tokens, touched = inputs.plan.tokens, inputs.touched_frames
    rows = slice(*(token - touched.start * tokens for token in inputs.token_range))
    frames = slice(touched.start, touched.stop)
    index, masks = inputs.frame_index, (inputs.frame_mask, inputs.teacher_mask)
    frame_mask, teacher_mask = (None if mask is None else mask[:, frames] for mask in masks)
    of_frames = replace(
        inputs,
        hidden_states=in_touched_frames(inputs.hidden_states, inputs.token_range, tokens),
        teacher_features=inputs.teacher_features[:, frames] if index is None else inputs.teacher_features,
        frame_index=None if index is None else index[:, frames],
        frame_mask=frame_mask,
        teacher_mask=teacher_mask,
        frames=len(touched),
        token_range=None,
        context_group=None,
    )
    return of_frames, OfRank(inputs.context_group, touched.start, inputs.frames, rows)


class _ClipSums(torch.autograd.Function):
    """(B,): the sum over pairs of frames of w[f, k] times the mean cost of their tokens' pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        inputs: LossInputs,
        relation: Relation,
        relate: Callable[..., torch.Tensor],
        rows_type: torch.dtype | None,
        grad_enabled: bool,
        own: OfRank | None,
    ) -> torch.Tensor:
        policy = chunk_policy()
        settings = Settings.of(inputs, policy)
        student = StudentRows(settings, hidden_states, gamma, beta, weight, bias)
        teacher, chunks = TeacherFrames(inputs, policy), plan_chunks(inputs, policy)
        keep = grad_enabled and any(ctx.needs_input_grad)
        record = Record(student, chunks if keep else [], student.compute_dtype, ctx.needs_input_grad)
        rows_type = rows_type or operand_type(student.compute_dtype, student.accum_dtype, hidden_states.device)
        sums = hidden_states.new_zeros(inputs.batch, dtype=student.accum_dtype)
        for clip in range(inputs.batch):
            of_clip = [chunk for chunk in chunks if chunk.clip == clip]
            if not of_clip and own is None:
                continue
            rows = _ClipRows(inputs, student, of_clip, rows_type, whole=own is not None)
            for chunk in of_clip:
                projected = student.project(chunk)
                rows.add(chunk, projected, teacher)
                if keep:
                    record.add(chunk.rows(record.tokens), projected)
            gradient = rows.room_for_gradient(record) if keep else rows.norm.new_empty(0)
            offsets = relation.offsets(len(rows.z) if own is None else own.frames)
            if own is None:
                sums[clip] = relate(rows.z, rows.d, list(offsets), list(offsets.values()), relation.margin, gradient)
            else:
                rows.keep_only(own.rows)
                sums[clip] = relate_ranks(rows.z, rows.d, offsets, relation.margin, gradient, own)
            if keep:
                rows.keep(gradient, record)
        if keep:
            record.save(ctx, settings, beta, bias)
            ctx.frames = inputs.frames
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *projector_gradients(ctx, grad_sums[:, None].expand(-1, ctx.frames)), *[None] * 6


class _ClipRows:
    """Rows of a clip from its first frame in the loss to its last; frames between them that are not in it are zero.

    Or of all of the clip's frames, ``whole``.

    Attributes:
        z, d: (T', M, E), the student's unit rows, and what they differ from the teacher's by.
        norm: (T', M), the length of p.
        own: of each chunk, p of the student's own tokens where that was resampled to more.
    """

    def __init__(
        self, inputs: LossInputs, student: StudentRows, chunks: list[Chunk], dtype: torch.dtype, *, whole: bool = False
    ) -> None:
        self.inputs, self.chunks, self.policy = inputs, chunks, student.policy
        self.first = 0 if whole else chunks[0].start
        frames = inputs.frames if whole else chunks[-1].stop - self.first
        self.has_holes = frames > sum(chunk.frames for chunk in chunks)
        self.accum_dtype = student.accum_dtype
        shape, like = (frames, inputs.plan.tokens, student.feature_size), inputs.hidden_states
        new = like.new_zeros if self.has_holes else like.new_empty
        self.z, self.d = new(shape, dtype=dtype), new(shape, dtype=dtype)
        self.norm = new(shape[:2], dtype=student.accum_dtype)
        self.own: list[torch.Tensor | None] = []

    def _frames(self, chunk: Chunk) -> slice:
        return slice(chunk.start - self.first, chunk.stop - self.first)

    def add(self, chunk: Chunk, projected: Projected, teacher: TeacherFrames) -> None:
        self.own.append(projected.own)
        frames, shape = self._frames(chunk), (chunk.frames, *self.z.shape[1:])
        p = unfolded_rows(projected.rows.to(self.accum_dtype), *projected.fold).view(shape)
        self.norm[frames] = torch.linalg.vector_norm(p, dim=-1)
        z = p / floored_norm(self.norm[frames])[..., None]
        y = torch.stack([teacher.frame(chunk.clip, frame) for frame in range(chunk.start, chunk.stop)])
        y = y.to(self.accum_dtype)
        y = y / floored_norm(torch.linalg.vector_norm(y, dim=-1, keepdim=True))
        mask = self.inputs.frame_mask
        if mask is not None and not self.policy.readable(mask):
            counted = mask[chunk.clip, chunk.start : chunk.stop, None, None]
            z, y = z.where(counted, 0), y.where(counted, 0)
        self.z[frames], self.d[frames] = z, z - y

    def keep_only(self, rows: slice) -> None:
        """Zeros in all but ``rows`` of the flattened frames."""
        for tensor in (self.z, self.d):
            flat = tensor.flatten(0, 1)
            flat[: rows.start].zero_()
            flat[rows.stop :].zero_()

    def room_for_gradient(self, record: Record) -> torch.Tensor:
        """(T', M, E) in ``accum_dtype``: the clip's own rows of q where they can hold it."""
        if self.has_holes or record.q.dtype != self.accum_dtype or record.tokens != self.z.shape[1]:
            return self.z.new_empty(self.z.shape, dtype=self.accum_dtype)
        return record.q[self.chunks[0].row : self.chunks[-1].rows(record.tokens).stop].view(self.z.shape)

    def keep(self, gradient: torch.Tensor, record: Record) -> None:
        """Records q and numbers of each row; ``gradient`` (T', M, E) is dZ."""
        for chunk, own in zip(self.chunks, self.own, strict=True):
            frames = self._frames(chunk)
            z = self.z[frames].flatten(0, 1)
            dz, norm = gradient[frames].flatten(0, 1), self.norm[frames].flatten()
            along, floored = torch.mul(dz, z).sum(dim=-1), norm <= NORM_FLOOR
            inverse = floored_norm(norm).reciprocal_()
            # Below the floor the length is a constant, and nothing of Z is taken off.
            q = torch.addcmul(dz, z, along.where(~floored, 0)[:, None], value=-1)
            record.keep(chunk, GradientRows(q, inverse, (along / inverse).where(floored, 0)), own)


def operand_type(compute_dtype: torch.dtype, accum_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``compute_dtype`` where its products can be written in ``accum_dtype``: by NVIDIA's library. Else that itself."""
    return compute_dtype if device.type == "cuda" and torch.version.hip is None else accum_dtype
