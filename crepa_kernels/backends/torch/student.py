"""The student's side of the ``torch`` backend: tokens normalised, resampled and projected, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...grid import SpatialPlan, num_tokens, should_save_aligned
from ...ops.compiling import constant_when_compiled
from ...ops.layer_norm_resample import (
    layer_norm_resample_backward_op,
    layer_norm_resample_backward_out_op,
    layer_norm_resample_op,
)
from ...ops.rows import layer_norm, layer_norm_rows_op, wide_statistics
from .chunks import Chunk, ChunkPolicy


@dataclass(frozen=True)
class Settings:
    """What the student's side needs besides tensors that carry gradients; kept for the backward pass."""

    plan: SpatialPlan
    eps: float
    frame_mask: torch.Tensor | None
    compute_dtype: torch.dtype
    policy: ChunkPolicy


class Aligned(NamedTuple):
    """A chunk of the student's side: normalised rows (frames x M, D), and the mean and 1/std of its tokens."""

    rows: torch.Tensor
    mean: torch.Tensor
    inverse_std: torch.Tensor


@dataclass(frozen=True)
class Projected:
    """Projected rows (frames x M, E) of a chunk.

    fold: mean, 1/std, row sums of the weights and offset, as ``align_rows`` makes p of the rows with them.
    statistics: mean, its low part and 1/std of the tokens, each (frames x M,), on equal grids.
    aligned: what was projected, on other grids.
    """

    rows: torch.Tensor
    fold: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    aligned: Aligned | None = None


class StudentRows:
    """The student's side of a chunk: normalised tokens, their projection, and the way back.

    ``accum_dtype`` is the type of statistics and sums, ``compute_dtype`` that of the products' operands: the
    inputs', or fp32 for fp16, whose range cannot hold the gradient of a row below the norm's floor, and for bf16 on a
    CPU without bf16 products. ``raw`` tokens are multiplied as they are, and LayerNorm is folded into the product.
    """

    def __init__(
        self,
        settings: Settings,
        hidden_states: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        offset: torch.Tensor | None = None,
    ) -> None:
        self.hidden_states, self.gamma, self.weight = hidden_states, gamma, weight
        self.plan, self.eps, self.frame_mask = settings.plan, settings.eps, settings.frame_mask
        self.policy = settings.policy
        self.accum_dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        self.compute_dtype = product_type(settings.compute_dtype, hidden_states.device.type)
        self.raw = (
            self.compute_dtype != self.accum_dtype
            and hidden_states.dtype == self.compute_dtype
            and self.plan.student == "keep"
        )
        # fp32 tokens are normalised before they are rounded: they may have a large mean.
        self.token_dtype = torch.promote_types(hidden_states.dtype, self.compute_dtype)
        self._operand: torch.Tensor | None = None
        self._centered: torch.Tensor | None = None
        self.offset = offset  # c (E,)
        if offset is None:
            terms = [weight.to(self.accum_dtype) @ beta.to(self.accum_dtype)] if beta is not None else []
            terms += [bias.to(self.accum_dtype)] if bias is not None else []
            self.offset = terms[0] if len(terms) == 1 else terms[0] + terms[1] if terms else None

    def folded(self) -> torch.Tensor:
        """W' = W diag(gamma) (E, D) in accum_dtype."""
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
        return keeps_aligned(self.plan)

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
        """The chunk's tokens on the common grid, normalised and projected.

        bf16 tokens on equal grids are projected as they are, by weights whose row means are taken off: products of
        bf16 are exact in fp32, and what is left of the tokens' mean is small where the sum is rounded.
        """
        statistics, aligned = None, None
        if self.plan.student == "keep":
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
