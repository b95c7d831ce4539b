"""The loss as algebra on ATen calls: the fast path on CPUs, and the fallback elsewhere.

What makes it cheap, with x the normalised token (no affine part), W' = W diag(gamma), c = W beta + b:

1. teacher features are constants, so all neighbours of a frame collapse into one row per token,
   ``z[f] = y[f] + sum_k w(|k-f|) y[k]``, and its total is ``<p, z> / |p|``;
2. resampling weights sum to 1 and Linear is affine, so tokens are resampled before they are projected where that makes
   fewer of them, and only the tokens and frames that the loss sees are projected at all; where it makes more, p is
   resampled;
3. the gradient of the total with respect to p is ``q / |p|`` with ``q = z - (<p, z> / |p|^2) p``. It is formed in p's
   place during the forward pass; with two numbers a token it is all that is kept for the backward pass;
4. ``<q, p> = 0``, but for rows below the norm's floor, gives LayerNorm's two row sums of dx = g W' from E numbers a
   token, before the product: ``sum dx x = <g, p> - <g, c>``, and ``sum dx = 0`` once the row means are taken off W'.
   So on equal grids ``dh = (g W' + x (<g, c> - <g, p>) / D) / std`` is one product on an initialised accumulator.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...grid import SpatialPlan, num_tokens
from ...inputs import LossInputs
from ...ops.rows import align_rows_backward_op, align_rows_op, normalize_rows_op
from ...output import CrepaOutput
from ...reduction import plan_reduction, reduce_frames
from .chunks import Chunk, chunk_policy, plan_chunks
from .student import Aligned, GradientRows, Projected, Settings, StudentRows, keeps_aligned, product_type
from .teacher import TeacherRows


def crepa_torch(inputs: LossInputs) -> CrepaOutput:
    """The loss of ``inputs``; differentiable once."""
    with torch.autocast(inputs.hidden_states.device.type, enabled=False):
        like = inputs.teacher_features.new_empty(0, dtype=inputs.statistics_type)
        weights = inputs.neighbours.weights(inputs.frames, inputs.teacher_mask, like)
        reduction = plan_reduction(inputs, weights)
        gamma, beta, weight, bias, _ = inputs.projector
        own, total = _FrameSimilarity.apply(
            _whole_frames(inputs), gamma, beta, weight, bias, inputs, weights, torch.is_grad_enabled()
        )
        return reduce_frames(own, total, reduction)


def kept_bytes(
    plan: SpatialPlan,
    frames: int,
    hidden_size: int,
    feature_size: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    device_type: str,
    recompute: bool = False,
    given: bool = False,
) -> int:
    """Bytes kept between forward and backward, beside the inputs and what has a number a frame.

    Of each projected token q (E) and two numbers, or five where it is projected on its own grid; where the student's
    side is resampled to a quarter of its tokens or fewer, those (D), and two numbers of each of the student's. Of given
    p q and two numbers. With ``recompute`` nothing.

    Args:
        plan: the grids.
        frames: B x T.
        hidden_size: D.
        feature_size: E.
        dtype: of the hidden states, and of the products' operands as asked for.
        teacher_dtype: of the teacher's features, of which nothing is kept.
        device_type: where the loss runs.
        recompute: as ``crepa_loss``.
        given: without a projector.
    """
    if recompute:
        return 0
    number, rows = torch.promote_types(dtype, torch.float32).itemsize, frames * plan.projected
    own_grid = not given and (plan.student == "keep" or plan.project_first)
    kept = rows * (feature_size * dtype.itemsize + (5 if own_grid else 2) * number)
    if given:
        return kept
    kept += number * feature_size
    if keeps_aligned(plan):
        kept += rows * hidden_size * product_type(dtype, device_type).itemsize
        kept += 2 * number * frames * num_tokens(plan.student_grid)
    return kept


def _whole_frames(inputs: LossInputs) -> torch.Tensor:
    """Hidden states as (B, T, P, D), zeros outside ``token_range``."""
    if inputs.token_range is None:
        return inputs.hidden_states
    (start, stop), tokens = inputs.token_range, inputs.plan.tokens
    whole = F.pad(inputs.hidden_states, (0, 0, start, inputs.frames * tokens - stop))
    return whole.unflatten(1, (inputs.frames, tokens))


def _rows_in_range(inputs: LossInputs, chunk: Chunk) -> tuple[int, int]:
    """Rows [start, stop) of a chunk whose student token is in ``token_range``; the others are zeros."""
    rows = chunk.frames * inputs.plan.tokens
    if inputs.token_range is None:
        return 0, rows
    first = chunk.start * inputs.plan.tokens
    start, stop = (min(max(token - first, 0), rows) for token in inputs.token_range)
    return start, stop


class Kept(NamedTuple):
    """Numbers kept for each row: 1 / |p| and <q, p>, and on equal grids the token's mean in two parts and 1/std."""

    inverse_norm: torch.Tensor
    q_dot_p: torch.Tensor
    mean: torch.Tensor
    low: torch.Tensor
    inverse_std: torch.Tensor


class Record:
    """What the forward pass keeps for the backward pass of the rows of ``chunks``, which is filled chunk by chunk.

    Attributes:
        q: (rows, E); the gradient of row p is q / |p| times one number a frame.
        kept: numbers of each row.
        tokens: rows a frame.
    """

    def __init__(
        self, student: StudentRows, chunks: list[Chunk], dtype: torch.dtype, needs_input_grad: Sequence[bool]
    ) -> None:
        self.student, self.chunks = student, chunks
        self.need_folded = needs_input_grad[1] or needs_input_grad[3]  # gamma's or the weight's gradient
        h, self.tokens = student.hidden_states, student.plan.projected
        rows = sum(chunk.frames for chunk in chunks) * self.tokens
        self.q = h.new_empty((rows, student.feature_size), dtype=dtype)
        sizes = (2, rows), (3, rows if student.on_own_grid else 0)
        numbers = (h.new_empty(size, dtype=student.accum_dtype) for size in sizes)
        self.kept = Kept(*itertools.chain.from_iterable(numbers))
        self.aligned: list[torch.Tensor] = []  # rows and statistics of every chunk, where they are small enough to keep

    def room(self, chunk: Chunk) -> torch.Tensor:
        """(frames x M, E): the chunk's own rows of q, where they are those of the common grid; empty without rows."""
        if not self.student.plan.project_first or not self.q.numel():
            return self.q[chunk.rows(self.tokens)]
        return self.q.new_empty(
            (chunk.frames * self.student.plan.tokens, self.q.shape[1]), dtype=self.student.accum_dtype
        )

    def keep(self, chunk: Chunk, found: GradientRows, own: torch.Tensor | None, in_room: bool = False) -> None:
        """A chunk's gradient rows on the common grid, their q in ``room`` or elsewhere; ``own`` as ``Projected``'s."""
        rows = chunk.rows(self.tokens)
        q, inverse_norm, q_dot_p = self.student.recorded(found, own)
        if not in_room or self.student.plan.project_first:
            self.q[rows] = q
        self.kept.inverse_norm[rows], self.kept.q_dot_p[rows] = inverse_norm, q_dot_p

    def add(self, rows: slice, projected: Projected) -> None:
        """A chunk's tokens: their statistics, and where they are kept the rows that were projected."""
        for values, into in zip(projected.statistics or (), self.kept[2:], strict=False):
            into[rows] = values
        if projected.aligned is not None and self.student.keeps_aligned:
            x, *of_tokens = projected.aligned
            self.aligned += [x if self.need_folded else x.new_empty(0), *of_tokens]

    def save(self, ctx: Any, settings: Settings, beta: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        """For ``projector_gradients``."""
        student = self.student
        tensors = student.hidden_states, student.gamma, beta, student.weight, bias, student.offset
        ctx.save_for_backward(*tensors, self.q, *self.kept, *self.aligned)
        ctx.settings, ctx.chunks = settings, self.chunks


class _FrameSimilarity(torch.autograd.Function):
    """Per-frame similarity with the own teacher frame and with all weighted neighbours, both (B, T)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        inputs: LossInputs,
        weights: torch.Tensor,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        policy = chunk_policy()
        settings = Settings.of(inputs, policy)
        student = StudentRows(settings, hidden_states, gamma, beta, weight, bias)
        teacher = TeacherRows(inputs, weights, policy)
        chunks, tokens = plan_chunks(inputs, policy), inputs.plan.tokens
        own = hidden_states.new_zeros(hidden_states.shape[:2], dtype=student.accum_dtype)
        total = torch.zeros_like(own)
        keep = grad_enabled and any(ctx.needs_input_grad)
        record = Record(student, chunks if keep else [], inputs.compute_dtype, ctx.needs_input_grad)
        for chunk in chunks:
            projected = student.project(chunk)
            span, q = slice(chunk.start, chunk.stop), record.room(chunk)
            own_rows, total_rows, inverse_norm, q_dot_p = align_rows_op(
                projected.rows, *projected.fold, *teacher.around(chunk), chunk.start, teacher.offsets,
                *_rows_in_range(inputs, chunk), q,
            )  # fmt: skip
            own[chunk.clip, span] = own_rows.view(-1, tokens).mean(dim=-1)
            total[chunk.clip, span] = total_rows.view(-1, tokens).mean(dim=-1)
            if keep:
                record.keep(chunk, GradientRows(q, inverse_norm, q_dot_p), projected.own, in_room=True)
                record.add(chunk.rows(record.tokens), projected)
        if keep:
            record.save(ctx, settings, beta, bias)
        ctx.mark_non_differentiable(own)
        return own, total

    @staticmethod
    def backward(ctx: Any, _: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *projector_gradients(ctx, grad_total), None, None, None


def projector_gradients(ctx: Any, grad_frames: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of h, gamma, beta, weight and bias, of which ``Record.save`` kept the rows.

    Args:
        ctx: of the function whose first five arguments they are.
        grad_frames: (B, T), what each frame's mean over its tokens of <q, dp> / |p| is multiplied by.
    """
    # Read once: a checkpoint gives what it made again no second time.
    saved = ctx.saved_tensors
    with torch.no_grad():
        gradients = _gradients(ctx, saved, grad_frames)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    # A graph of the gradients is made: a second derivative that stops here must not be taken for 0.
    made = _Once.apply(
        *(tensor for tensor in (*saved[:5], grad_frames) if tensor is not None),
        *(gradient for gradient in gradients if gradient is not None),
    )
    guarded = iter(made[-sum(gradient is not None for gradient in gradients) :])
    return tuple(None if gradient is None else next(guarded) for gradient in gradients)


def _gradients(ctx: Any, saved: Sequence[torch.Tensor], grad_frames: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # A backward pass inside autocast would cast the fp32 products below.
    with torch.autocast(grad_frames.device.type, enabled=False):
        hidden_states, gamma, beta, weight, bias, offset, q, *rest = saved
        kept, aligned = rest[: len(Kept._fields)], iter(rest[len(Kept._fields) :])
        need_h, need_gamma, need_beta, need_weight, need_bias = ctx.needs_input_grad[:5]
        student = StudentRows(ctx.settings, hidden_states, gamma, beta, weight, bias, offset)
        gradients = _Gradients(student, ctx.chunks, need_h, need_gamma or need_weight)
        tokens = ctx.settings.plan.projected
        for chunk in ctx.chunks:
            rows = chunk.rows(tokens)
            grad = grad_frames[chunk.clip, chunk.start : chunk.stop].contiguous()
            of_chunk = Aligned(*itertools.islice(aligned, 3)) if student.keeps_aligned else None
            gradients.add(chunk, grad, q[rows], Kept(*(tensor[rows] for tensor in kept)), of_chunk)
        gradients.release()
        if weight is None:
            return gradients.hidden_states, None, None, None, None
        # W' = W diag(gamma) and c = W beta + b, taken apart again.
        d_weight, d_offset = gradients.folded, gradients.offset
        accum_dtype = d_offset.dtype
        weight_accum = weight.to(accum_dtype)
        d_gamma = None
        if need_gamma or need_weight:
            if d_weight is None:
                d_weight = torch.zeros_like(weight_accum)
            if need_gamma:
                d_gamma = (weight_accum * d_weight).sum(dim=0)
            if gamma is not None:
                d_weight.mul_(gamma.to(accum_dtype))
            if beta is not None:
                d_weight.addr_(d_offset, beta.to(accum_dtype))
        d_beta = weight_accum.t() @ d_offset if need_beta else None
        d_bias = d_offset if need_bias else None
        d_weight = d_weight if need_weight else None
        pairs = ((d_gamma, gamma), (d_beta, beta), (d_weight, weight), (d_bias, bias))
        weights = [None if grad is None else grad.to(like.dtype) for grad, like in pairs]
        return gradients.hidden_states, *weights


class _Once(torch.autograd.Function):
    """Its tensors, with a graph that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError("backend 'torch' can be differentiated once; backend 'reference' can be twice")


class _Gradients:
    """dh, dW' and dc, summed over the chunks."""

    def __init__(self, student: StudentRows, chunks: list[Chunk], need_h: bool, need_folded: bool):
        self.student, self.need_folded = student, need_folded
        h = student.hidden_states
        self.offset = h.new_zeros(student.feature_size, dtype=student.accum_dtype)  # dc (E,)
        self.folded: torch.Tensor | None = None  # dW' (E, D)
        self.hidden_states: torch.Tensor | None = None
        if need_h:
            # Frames outside the loss have no chunk, and keep the zeros.
            covered = sum(chunk.frames for chunk in chunks) == h.shape[0] * h.shape[1]
            self.hidden_states = h.new_empty(h.shape) if covered else h.new_zeros(h.shape)
        self.centered = student.centered if need_h and student.on_own_grid else None

    def add(self, chunk: Chunk, grad: torch.Tensor, q: torch.Tensor, kept: Kept, aligned: Aligned | None) -> None:
        """A chunk's part: ``grad`` (frames,) of its totals, ``q`` (frames x M, E), and what was kept of its rows.

        Rows whose ``aligned`` was not kept are aligned again.
        """
        student, same_grid = self.student, self.centered is not None
        # fp32 rows are scaled in their place later; half types would be rounded twice.
        both = same_grid and (not self.need_folded or student.compute_dtype != student.accum_dtype)
        need_g = self.need_folded or (self.hidden_states is not None and not both)
        out = None
        if self.hidden_states is not None:
            out = self.hidden_states[chunk.clip, chunk.start : chunk.stop]
        if out is not None and student.is_given(out):
            g = out.flatten(0, 1)
        else:
            g = torch.empty_like(q if need_g else q[:0], dtype=student.gradient_dtype)
        scaled = torch.empty_like(q if both else q[:0], dtype=student.compute_dtype)
        along = torch.empty_like(kept.mean if same_grid else kept.mean[:0])
        align_rows_backward_op(
            q, grad, kept.inverse_norm, kept.q_dot_p, student.offset, kept.inverse_std,
            student.hidden_states.shape[-1], g, scaled, along, self.offset,
        )  # fmt: skip
        if not self.need_folded and out is None:
            return
        if student.weight is None:
            if out is not None and not student.is_given(out):
                student.spread(g, out)
        elif student.on_own_grid:
            self._same_grid(student.tokens(chunk), g, scaled, along, kept, out)
        else:
            aligned = aligned or student.align(chunk)
            self._fold(g, aligned.rows)
            if out is not None:
                student.align_backward(g @ student.operand, aligned, chunk, out)

    def release(self) -> None:
        """Lets go of all but the sums: what comes after them takes as much memory as the weights."""
        self.centered = None
        self.student.release()

    def _fold(self, g: torch.Tensor, x: torch.Tensor) -> None:
        if not self.need_folded:
            return
        if self.folded is None:
            self.folded = (g.t() @ x).to(self.student.accum_dtype)
        elif g.dtype == self.folded.dtype:
            self.folded.addmm_(g.t(), x)
        else:
            self.folded += g.t() @ x

    def _same_grid(
        self,
        tokens: torch.Tensor,
        g: torch.Tensor,
        scaled: torch.Tensor,
        along: torch.Tensor,
        kept: Kept,
        out: torch.Tensor | None,
    ) -> None:
        """dh = (g / std) W'' + x (<g, c> - <g, p>) / (D std), the second term being where the product's sum starts."""
        rows = tokens.flatten(0, 1)
        # dh's own memory holds x first: it is the only thing of its size.
        in_place = out is not None and out.dtype == rows.dtype
        x = out.view(rows.shape) if out is not None and in_place else rows.new_empty(rows.shape)
        normalize_rows_op(tokens, kept.mean, kept.low, kept.inverse_std, x)
        self._fold(g, x.to(g.dtype))
        if out is None or self.centered is None:
            return
        if not scaled.numel():
            scaled = g.mul_(kept.inverse_std[:, None])
        x.mul_(along[:, None].to(x.dtype))
        if x.dtype == scaled.dtype:
            x.addmm_(scaled, self.centered)
        else:
            x.add_(scaled @ self.centered)
        if not in_place:
            out.copy_(x.view(out.shape))
