"""The student's side of the ``torch`` backend: tokens normalised, resampled and projected, and the way back.

Where the common grid has more tokens than the student's, p is resampled instead; its rows' gradients are taken back to
the student's own tokens in the forward pass, and what is kept and comes after is as on equal grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ...grid import SpatialPlan, num_tokens, should_save_aligned
from ...inputs import LossInputs
from ...ops.compiling import constant_when_compiled
from ...ops.layer_norm_resample import (
    layer_norm_resample_backward_op,
    layer_norm_resample_backward_out_op,
    layer_norm_resample_op,
)
from ...ops.resample import resample_tokens_adjoint_op
from ...ops.rows import layer_norm, layer_norm_rows_op, unfolded_rows, wide_statistics
from .chunks import Chunk, ChunkPolicy


@dataclass(frozen=True)
class Settings:
    """What the student's side needs besides tensors that carry gradients; kept for the backward pass."""

    plan: SpatialPlan
    feature_size: int
    eps: float
    frame_mask: torch.Tensor | None
    compute_dtype: torch.dtype
    policy: ChunkPolicy

    @classmethod
    def of(cls, inputs: LossInputs, policy: ChunkPolicy) -> Settings:
        eps = inputs.projector.eps
        return cls(inputs.plan, inputs.feature_size, eps, inputs.frame_mask, inputs.compute_dtype, policy)


class Aligned(NamedTuple):
    """A chunk of the student's side: normalised rows (frames x M, D), and the mean and 1/std of its tokens."""

    rows: torch.Tensor
    mean: torch.Tensor
    inverse_std: torch.Tensor


@dataclass(frozen=True)
class Projected:
    """Projected rows (frames x M, E) of a chunk.

    fold: mean, 1/std, row sums of the weights and offset, as ``align_rows`` makes p of the rows with them.
    statistics: mean, its low part and 1/std of the tokens, each (frames x P,), where they were projected as they lie.
    aligned: what was projected, where it was resampled or pooled before.
    own: p (frames x P, E) of the student's own tokens, where p was resampled.
    """

    rows: torch.Tensor
    fold: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    aligned: Aligned | None = None
    own: torch.Tensor | None = None


class GradientRows(NamedTuple):
    """A chunk's rows q (rows, E), whose gradient is q x ``inverse_norm`` x grad / the rows of a frame, and <q, p>."""

    q: torch.Tensor
    inverse_norm: torch.Tensor
    q_dot_p: torch.Tensor


class StudentRows:
    """The student's side of a chunk: normalised tokens, their projection, and the way back.

    ``accum_dtype`` is the type of statistics and sums, ``compute_dtype`` that of the products' operands: the
    inputs', or fp32 for fp16, whose range cannot hold the gradient of a row below the norm's floor, and for bf16 on a
    CPU without bf16 products. Tokens ``on_own_grid`` are projected where they lie; ``raw`` ones are multiplied as they
    are, and LayerNorm is folded into the product. Without a weight the tokens are p. With ``own_rows`` what is kept is
    of the student's own tokens, otherwise of those of the common grid.
    """

    def __init__(
        self,
        settings: Settings,
        hidden_states: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        offset: torch.Tensor | None = None,
    ) -> None:
        self.hidden_states, self.gamma, self.weight = hidden_states, gamma, weight
        self.feature_size = settings.feature_size
        self.plan, self.eps, self.frame_mask = settings.plan, settings.eps, settings.frame_mask
        self.policy = settings.policy
        self.accum_dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        self.compute_dtype = product_type(settings.compute_dtype, hidden_states.device.type)
        self.own_rows = self.plan.student == "keep" or self.plan.project_first
        self.on_own_grid = weight is not None and self.own_rows
        self.raw = (
            self.on_own_grid and self.compute_dtype != self.accum_dtype and hidden_states.dtype == self.compute_dtype
        )
        # fp32 tokens are normalised before they are rounded: they may have a large mean.
        self.token_dtype = torch.promote_types(hidden_states.dtype, self.compute_dtype)
        self._operand: torch.Tensor | None = None
        self._centered: torch.Tensor | None = None
        self.offset = offset  # c (E,)
        if offset is None and weight is not None:
            terms = [weight.to(self.accum_dtype) @ beta.to(self.accum_dtype)] if beta is not None else []
            terms += [bias.to(self.accum_dtype)] if bias is not None else []
            self.offset = terms[0] if len(terms) == 1 else terms[0] + terms[1] if terms else None

    def folded(self) -> torch.Tensor:
        """W' = W diag(gamma) (E, D) in accum_dtype."""
        assert self.weight is not None  # for the type checker
        weight = self.weight.to(self.accum_dtype)
        return weight if self.gamma is None else weight * self.gamma.to(self.accum_dtype)

    # Not functools.cached_property, whose lock torch.compile does not know.
    @property
    def operand(self) -> torch.Tensor:
        """W' in the products' type."""
        if self._operand is None:
            self._operand = self.folded().to(self.compute_dtype)
        return self._operand

    @property
    def centered(self) -> torch.Tensor:
        """W'', the row means of W' taken off, in the products' type; kept until ``release``."""
        if self._centered is None:
            folded = self.folded()
            # In its own place where it is nobody else's.
            owned = self.compute_dtype == self.accum_dtype and self.gamma is not None
            out = folded if owned else torch.empty_like(folded, dtype=self.compute_dtype)
            self._centered = torch.sub(folded, folded.mean(dim=1, keepdim=True), out=out)
        return self._centered

    def release(self) -> None:
        """Lets go of W''."""
        self._centered = None

    def tokens(self, chunk: Chunk) -> torch.Tensor:
        """The chunk's hidden states (frames, P, D) in the type that they are normalised in."""
        tokens = self.hidden_states[chunk.clip, chunk.start : chunk.stop].to(self.token_dtype)
        if self.frame_mask is not None and not self.policy.readable(self.frame_mask):
            tokens = tokens.where(self.frame_mask[chunk.clip, chunk.start : chunk.stop, None, None], 0)
        return tokens

    def align(self, chunk: Chunk) -> Aligned:
        """The chunk's tokens, normalised and on the common grid, which is not their own."""
        tokens, plan = self.tokens(chunk), self.plan
        width = tokens.shape[-1]
        if plan.student == "resample":
            x, mean, inverse_std = layer_norm_resample_op(
                tokens, plan.student_grid, plan.grid, plan.antialias, self.eps
            )
        else:
            x, mean, inverse_std = layer_norm(tokens, self.eps)
            x = x.mean(dim=1)
        return Aligned(x.view(-1, width).to(self.compute_dtype), mean, inverse_std)

    @property
    def keeps_aligned(self) -> bool:
        return self.weight is not None and keeps_aligned(self.plan)

    def align_backward(self, grad: torch.Tensor, aligned: Aligned, chunk: Chunk, out: torch.Tensor) -> None:
        """dh (frames, P, D) of the chunk into ``out``, from the gradient (frames x M, D) of its aligned rows."""
        tokens, mean, inverse_std, plan = self.tokens(chunk), aligned.mean, aligned.inverse_std, self.plan
        shaped = grad.view(tokens.shape[0], -1, tokens.shape[-1]).to(tokens.dtype)
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
                spread,
                tokens,
                tokens.shape[-1:],
                mean,
                inverse_std,
                wide_statistics(tokens),
                None,
                [True, False, False],
            )[0]
        )

    def project(self, chunk: Chunk) -> Projected:
        """The chunk's tokens, normalised and projected, on the common grid.

        bf16 tokens on their own grid are projected as they are, by weights whose row means are taken off: products of
        bf16 are exact in fp32, and what is left of the tokens' mean is small where the sum is rounded.
        """
        if self.weight is None:
            return self._resampled(Projected(self.tokens(chunk).flatten(0, 1), (None, None, None, None), None))
        projected = self._projected(chunk)
        return self._resampled(projected) if self.plan.project_first else projected

    def _projected(self, chunk: Chunk) -> Projected:
        statistics, aligned = None, None
        if self.on_own_grid:
            tokens = self.tokens(chunk)
            x, mean, low, inverse_std = layer_norm_rows_op(tokens, self.eps, not self.raw)
            statistics = (mean, low, inverse_std)
            if self.raw:
                sums = self.centered.sum(dim=1, dtype=self.accum_dtype)
                rows = torch.mm(tokens.flatten(0, 1), self.centered.t())
                return Projected(rows, (mean, inverse_std, sums, self.offset), statistics)
            x = x.to(self.compute_dtype)
        else:
            aligned = self.align(chunk)
            x = aligned.rows
        # The offset would be rounded in half types.
        if self.offset is None or self.compute_dtype != self.accum_dtype:
            return Projected(torch.mm(x, self.operand.t()), (None, None, None, self.offset), statistics, aligned)
        return Projected(torch.addmm(self.offset, x, self.operand.t()), (None, None, None, None), statistics, aligned)

    def _resampled(self, projected: Projected) -> Projected:
        """``projected`` tokens of the student's own grid on the common one, p's sums being in ``accum_dtype``."""
        if self.plan.student == "keep":
            return replace(projected, rows=projected.rows.to(self.compute_dtype).contiguous())
        own = unfolded_rows(projected.rows.to(self.accum_dtype), *projected.fold)
        rows = self.plan.align(own.unflatten(0, (-1, num_tokens(self.plan.student_grid))), "student").flatten(0, 1)
        return Projected(rows, (None, None, None, None), projected.statistics, own=own)

    def recorded(self, rows: GradientRows, own_p: torch.Tensor | None) -> GradientRows:
        """``rows`` of the common grid as they are kept: of the student's own tokens, where p was resampled to more."""
        if not self.plan.project_first or own_p is None:
            return rows
        plan, own = self.plan, num_tokens(self.plan.student_grid)
        gradient = rows.q * rows.inverse_norm[:, None]
        gradient = resample_tokens_adjoint_op(
            gradient.unflatten(0, (-1, plan.tokens)), plan.student_grid, plan.grid, plan.antialias
        ).flatten(0, 1)
        # Of a size that every type holds.
        size = gradient.abs().amax(dim=1)
        size = size.where(size != 0, 1)
        q = gradient.div_(size[:, None])
        # Means are over the tokens of the common grid, but the rows of a frame are those of the student's.
        return GradientRows(q, size * (own / plan.tokens), (q * own_p).sum(dim=1))

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of p's gradient: the products' type, or where it is that of given p on another grid, the type of its sums."""
        return self.accum_dtype if self.weight is None and not self.own_rows else self.compute_dtype

    def is_given(self, grad: torch.Tensor) -> bool:
        """Whether the gradients of the rows that are kept are those of given tokens, in the type of ``grad``."""
        return self.weight is None and self.own_rows and grad.dtype == self.gradient_dtype

    def spread(self, grad: torch.Tensor, out: torch.Tensor) -> None:
        """The gradient of given p (frames, P, E) into ``out``, from that of the rows that are kept."""
        plan, framed = self.plan, grad.unflatten(0, (out.shape[0], -1))
        if self.own_rows:
            out.copy_(framed)
        elif plan.student == "pool":
            out.copy_((framed / out.shape[1]).expand(out.shape))
        else:
            out.copy_(resample_tokens_adjoint_op(framed, plan.student_grid, plan.grid, plan.antialias))


def keeps_aligned(plan: SpatialPlan) -> bool:
    """Whether the forward pass keeps what ``align`` makes."""
    return plan.student != "keep" and should_save_aligned(plan.tokens, num_tokens(plan.student_grid))


@constant_when_compiled
def _cpu_has_bf16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_type(compute_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type of the products' operands where ``compute_dtype`` is asked for."""
    slow_bf16 = compute_dtype == torch.bfloat16 and device_type == "cpu" and not _cpu_has_bf16_products()
    return torch.float32 if compute_dtype == torch.float16 or slow_bf16 else compute_dtype
