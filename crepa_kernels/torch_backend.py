"""The loss as algebra on ATen calls: the fast path on CPUs, and the fallback elsewhere.

What makes it cheap, with x the normalised token (no affine part), W' = W diag(gamma), c = W beta + b:

1. teacher features are constants, so all neighbours of a frame collapse into one row per token,
   ``z[f] = y[f] + sum_k w(|k-f|) y[k]``, and its total is ``<p, z> / |p|``;
2. resampling weights sum to 1 and Linear is affine, so tokens are resampled before they are projected, and only the
   tokens and frames that the loss sees are projected at all;
3. the gradient of the total with respect to p is ``q / |p|`` with ``q = z - (<p, z> / |p|^2) p``. It is formed in p's
   place during the forward pass; with two numbers a token it is all that is kept for the backward pass;
4. ``<q, p> = 0``, but for rows below the norm's floor, gives LayerNorm's two row sums of dx = g W' from E numbers a
   token, before the product: ``sum dx x = <g, p> - <g, c>``, and ``sum dx = 0`` once the row means are taken off W'.
   So on equal grids ``dh = (g W' + x (<g, c> - <g, p>) / D) / std`` is one product on an initialised accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .chunks import Chunk, is_readable, plan_chunks
from .compiling import constant_when_compiled
from .grid import SpatialPlan
from .ops.layer_norm_resample import (
    layer_norm_resample_backward_op,
    layer_norm_resample_backward_out_op,
    layer_norm_resample_op,
)
from .problem import NORM_FLOOR, CrepaOutput, Problem
from .reduction import plan_reduction, reduce_frames
from .teacher_rows import TeacherRows


def crepa_torch(problem: Problem) -> CrepaOutput:
    """The loss of ``problem``; differentiable once."""
    with torch.autocast(problem.hidden_states.device.type, enabled=False):
        like = problem.teacher_features.new_empty(0, dtype=problem.statistics_type)
        weights = problem.neighbours.weights(problem.frames, problem.teacher_mask, like)
        reduction = plan_reduction(problem, weights)
        gamma, beta, weight, bias, _ = problem.projector
        own, total = _FrameSimilarity.apply(
            _whole_frames(problem), gamma, beta, weight, bias, problem, weights, torch.is_grad_enabled()
        )
        return reduce_frames(own, total, reduction)


def _whole_frames(problem: Problem) -> torch.Tensor:
    """Hidden states as (B, T, P, D), zeros outside ``token_range``."""
    if problem.token_range is None:
        return problem.hidden_states
    (start, stop), tokens = problem.token_range, problem.plan.tokens
    whole = F.pad(problem.hidden_states, (0, 0, start, problem.frames * tokens - stop))
    return whole.unflatten(1, (problem.frames, tokens))


def _in_range(problem: Problem, chunk: Chunk, rows: torch.Tensor) -> torch.Tensor:
    """Teacher rows of a chunk (frames x M, E), zero where the student's token is not in ``token_range``."""
    if problem.token_range is None:
        return rows
    token = chunk.start * problem.plan.tokens + torch.arange(len(rows), device=rows.device)
    start, stop = problem.token_range
    return rows * ((token >= start) & (token < stop))[:, None]


@dataclass(frozen=True)
class _Settings:
    """What the student's side needs besides tensors that carry gradients; kept for the backward pass."""

    plan: SpatialPlan
    eps: float
    frame_mask: torch.Tensor | None


@dataclass(frozen=True)
class _Aligned:
    """A chunk of the student's side: normalised rows (frames x M, D), and what they were made of.

    tokens (frames, P, D) with the mean and 1/std of each.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    mean: torch.Tensor
    inverse_std: torch.Tensor


class _Student:
    """The student's side of a chunk: normalised tokens, their projection, and the way back.

    ``wide`` is the type of statistics and sums, ``narrow`` that of the products' operands: the hidden states' type,
    or fp32 for fp16, whose range cannot hold the gradient of a row below the norm's floor, and for bf16 on a CPU
    without bf16 products.
    """

    def __init__(
        self,
        settings: _Settings,
        hidden_states: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        self.hidden_states = hidden_states
        self.plan, self.eps, self.frame_mask = settings.plan, settings.eps, settings.frame_mask
        self.wide = torch.promote_types(hidden_states.dtype, torch.float32)
        self.narrow = _product_type(hidden_states)
        self.weight_wide = weight.to(self.wide) if gamma is None else weight.to(self.wide) * gamma.to(self.wide)
        self.weight = self.weight_wide.to(self.narrow)  # W' (E, D)
        self.offset = None if bias is None else bias.to(self.wide)  # c (E,)
        if beta is not None:
            folded = weight.to(self.wide) @ beta.to(self.wide)
            self.offset = folded if self.offset is None else folded + self.offset
        # On a CPU LayerNorm keeps the statistics of bf16 tokens in bf16 unless it is given fp32 weights.
        cpu_bf16 = self.narrow == torch.bfloat16 and hidden_states.device.type == "cpu"
        self.ones = hidden_states.new_ones(weight.shape[1], dtype=torch.float32) if cpu_bf16 else None

    def align(self, chunk: Chunk) -> _Aligned:
        """The chunk's tokens, normalised and on the common grid."""
        tokens = self.hidden_states[chunk.clip, chunk.start : chunk.stop].to(self.narrow)
        if self.frame_mask is not None and not is_readable(self.frame_mask):
            tokens = tokens.where(self.frame_mask[chunk.clip, chunk.start : chunk.stop, None, None], 0)
        width, plan = tokens.shape[-1], self.plan
        if plan.student == "resample":
            x, mean, inverse_std = layer_norm_resample_op(
                tokens, plan.student_grid, plan.grid, plan.antialias, self.eps
            )
        else:
            x, mean, inverse_std = torch.native_layer_norm(tokens, (width,), self.ones, None, self.eps)
            if plan.student == "pool":
                x = x.mean(dim=1)
        return _Aligned(x.view(-1, width), tokens, mean, inverse_std)

    def align_backward(self, grad: torch.Tensor, aligned: _Aligned, out: torch.Tensor) -> None:
        """dh (frames, P, D) of the chunk into ``out``, from the gradient (frames x M, D) of its aligned rows."""
        tokens, mean, inverse_std, plan = aligned.tokens, aligned.mean, aligned.inverse_std, self.plan
        shaped = grad.view(tokens.shape[0], -1, tokens.shape[-1])
        if plan.student == "resample":
            geometry = (plan.student_grid, plan.grid, plan.antialias)
            if out.dtype == tokens.dtype:
                layer_norm_resample_backward_out_op(shaped, tokens, mean, inverse_std, *geometry, out)
            else:
                out.copy_(layer_norm_resample_backward_op(shaped, tokens, mean, inverse_std, *geometry))
            return
        spread = (shaped / tokens.shape[1]).expand(tokens.shape).contiguous()
        out.copy_(
            torch.ops.aten.native_layer_norm_backward(
                spread, tokens, tokens.shape[-1:], mean, inverse_std, self.ones, None, [True, False, False]
            )[0]
        )

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """p = x W'ᵀ + c in the wide type."""
        if self.narrow == self.wide and self.offset is not None:
            return torch.addmm(self.offset, tokens, self.weight.t())
        projected = torch.mm(tokens, self.weight.t())
        return projected.to(self.wide) if self.offset is None else projected + self.offset


@constant_when_compiled
def _cpu_has_bf16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product_type(hidden_states: torch.Tensor) -> torch.dtype:
    dtype = hidden_states.dtype
    if dtype == torch.float16:
        return torch.float32
    on_cpu = hidden_states.device.type == "cpu"
    if dtype == torch.bfloat16 and on_cpu and not _cpu_has_bf16_products():
        return torch.float32
    return dtype


class _FrameSimilarity(torch.autograd.Function):
    """Per-frame similarity with the own teacher frame and with all weighted neighbours, both (B, T)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        problem: Problem,
        weights: torch.Tensor,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        settings = _Settings(problem.plan, problem.projector.eps, problem.frame_mask)
        student = _Student(settings, hidden_states, gamma, beta, weight, bias)
        teacher = TeacherRows(problem, weights)
        chunks, tokens = plan_chunks(problem), problem.plan.tokens
        own = hidden_states.new_zeros(hidden_states.shape[:2], dtype=student.wide)
        total = torch.zeros_like(own)
        keep = grad_enabled and any(ctx.needs_input_grad)
        rows = sum(chunk.frames for chunk in chunks) * tokens if keep else 0
        q = hidden_states.new_empty((rows, weight.shape[0]))
        inverse_norm, q_dot_p = hidden_states.new_empty((2, rows), dtype=student.wide)
        for chunk in chunks:
            p = student.project(student.align(chunk).rows)
            y = teacher.own(chunk)
            z = _in_range(problem, chunk, teacher.combined(chunk, y))
            y = _in_range(problem, chunk, y)
            norm = torch.linalg.vector_norm(p, dim=-1)
            inverse = norm.clamp_min(NORM_FLOOR).reciprocal_()
            scratch = torch.mul(p, z)
            cosine = scratch.sum(dim=-1).mul_(inverse)
            span = slice(chunk.start, chunk.stop)
            total[chunk.clip, span] = cosine.view(-1, tokens).mean(dim=-1)
            if teacher.reach == 0:
                own[chunk.clip, span] = total[chunk.clip, span]
            else:
                torch.mul(p, y, out=scratch)
                own[chunk.clip, span] = scratch.sum(dim=-1).mul_(inverse).view(-1, tokens).mean(dim=-1)
            if keep:
                # Below the norm's floor the row is divided by a constant: nothing to project out, and <q, p> stays.
                floored = norm <= NORM_FLOOR
                along = (cosine * inverse).where(~floored, 0)
                out = slice(chunk.row, chunk.row + len(p))
                q_dot_p[out] = (cosine / inverse).where(floored, 0)
                torch.addcmul(z, p, along[:, None], value=-1, out=q[out])
                inverse_norm[out] = inverse
        if keep:
            ctx.save_for_backward(hidden_states, gamma, beta, weight, bias, q, inverse_norm, q_dot_p)
            ctx.settings, ctx.chunks = settings, chunks
        ctx.mark_non_differentiable(own)
        return own, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A backward pass inside autocast would cast the fp32 products below.
        with torch.autocast(grad_total.device.type, enabled=False):
            hidden_states, gamma, beta, weight, bias, q, inverse_norm, q_dot_p = ctx.saved_tensors
            need_h, need_gamma, need_beta, need_weight, need_bias = ctx.needs_input_grad[:5]
            student = _Student(ctx.settings, hidden_states, gamma, beta, weight, bias)
            gradients = _Gradients(student, ctx.chunks, need_h, need_gamma or need_weight)
            tokens = ctx.settings.plan.tokens
            for chunk in ctx.chunks:
                rows = slice(chunk.row, chunk.row + chunk.frames * tokens)
                scale = (grad_total[chunk.clip, chunk.start : chunk.stop] / tokens).repeat_interleave(tokens)
                scale *= inverse_norm[rows]
                gradients.add(chunk, q[rows] * scale[:, None], q_dot_p[rows] * scale)
            # W' = W diag(gamma) and c = W beta + b, taken apart again.
            d_folded, d_offset, weight_wide = gradients.folded, gradients.offset, weight.to(student.wide)
            d_weight = d_gamma = None
            if d_folded is not None and need_weight:
                d_weight = d_folded if gamma is None else d_folded * gamma.to(student.wide)
                if beta is not None:
                    d_weight = torch.addr(d_weight, d_offset, beta.to(student.wide))
            if d_folded is not None and need_gamma:
                d_gamma = (weight_wide * d_folded).sum(dim=0)
            d_beta = weight_wide.t() @ d_offset if need_beta else None
            d_bias = d_offset if need_bias else None
            pairs = ((d_gamma, gamma), (d_beta, beta), (d_weight, weight), (d_bias, bias))
            weights = [None if grad is None else grad.to(like.dtype) for grad, like in pairs]
            return gradients.hidden_states, *weights, None, None, None


class _Gradients:
    """dh, dW' and dc, summed over the chunks."""

    def __init__(self, student: _Student, chunks: list[Chunk], need_h: bool, need_folded: bool):
        self.student = student
        h, weight = student.hidden_states, student.weight_wide
        self.offset = weight.new_zeros(weight.shape[0])  # dc (E,)
        self.folded = torch.zeros_like(weight) if need_folded else None  # dW' (E, D)
        self.hidden_states: torch.Tensor | None = None
        if need_h:
            # Frames outside the loss have no chunk, and keep the zeros.
            covered = sum(chunk.frames for chunk in chunks) == h.shape[0] * h.shape[1]
            self.hidden_states = h.new_empty(h.shape) if covered else h.new_zeros(h.shape)
        self.centred = None
        if need_h and student.plan.student == "keep":
            self.centred = (weight - weight.mean(dim=1, keepdim=True)).to(student.narrow)  # W'' (E, D)

    def add(self, chunk: Chunk, g: torch.Tensor, g_dot_p: torch.Tensor) -> None:
        """``g`` = d loss / d p of the chunk's rows, (frames x M, E) in the wide type; ``g_dot_p`` (frames x M,)."""
        self.offset += g.sum(dim=0)
        if self.folded is None and self.hidden_states is None:
            return
        student = self.student
        aligned = student.align(chunk)
        if self.folded is not None:
            narrow = g.to(student.narrow)
            if student.narrow == student.wide:
                self.folded.addmm_(narrow.t(), aligned.rows)
            else:
                self.folded += narrow.t() @ aligned.rows
        if self.hidden_states is None:
            return
        out = self.hidden_states[chunk.clip, chunk.start : chunk.stop]
        if self.centred is not None:
            rows = out.view(aligned.rows.shape)
            self._equal_grids(g, g_dot_p, aligned.rows, aligned.inverse_std, rows)
        else:
            student.align_backward(g.to(student.narrow) @ student.weight, aligned, out)

    def _equal_grids(
        self, g: torch.Tensor, g_dot_p: torch.Tensor, x: torch.Tensor, inverse_std: torch.Tensor, out: torch.Tensor
    ) -> None:
        """dh = (g W'' + x (<g, c> - <g, p>) / D) / std, the second term being where the product's sum starts."""
        assert self.centred is not None  # for the type checker
        student, inverse_std = self.student, inverse_std.view(-1, 1).to(g.dtype)
        scaled = torch.mul(g, inverse_std, out=torch.empty_like(g, dtype=student.narrow))
        total = out if out.dtype == student.narrow else x
        along = -g_dot_p if student.offset is None else g @ student.offset - g_dot_p
        along = along[:, None] * inverse_std / x.shape[1]
        torch.mul(x, along.to(x.dtype), out=total).addmm_(scaled, self.centred)
        if total is not out:
            out.copy_(total)
