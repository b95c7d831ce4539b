"""The student's side of a chunk: raw tokens, or normalised ones on the common grid, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...grid import should_save_aligned
from ...ops import has_extension
from ...ops.layer_norm_resample import layer_norm_resample_backward_out_op, layer_norm_resample_op
from ...ops.resample import resample_tokens_adjoint_op, resample_tokens_op
from .chunks import RowChunk
from .frames import Clip
from .launch import Cost, operator
from .statistics import TokenFrames, layer_norm_backward, token_statistics
from .tiles import RowTile


@dataclass(frozen=True)
class Spatial:
    """What happens to the student's grid: ``change`` is "keep", "resample" or "pool"."""

    change: str
    student_grid: Sequence[int]
    grid: Sequence[int]
    antialias: bool

    @property
    def student_tokens(self) -> int:
        return self.student_grid[0] * self.student_grid[1]

    @property
    def keeps_aligned(self) -> bool:
        """Whether the backward pass finds the student's rows on the common grid as the forward pass made them."""
        return self.change != "keep" and should_save_aligned(self.grid[0] * self.grid[1], self.student_tokens)


@dataclass(frozen=True)
class StudentTokens:
    """The hidden states of a call and how they reach the projection.

    Attributes:
        tokens: (B, L, D), last axis contiguous.
        spatial: the student's grid and what happens to it.
        clip: the call's sizes, on the common grid.
        eps: LayerNorm's.
        raw: the product takes the tokens as they are, and LayerNorm is folded into it.
        compute_dtype: the products' type.
        tf32: fp32 products may round their operands to 10 bits, as fp16 has.
        tile: of kernels over rows of width D.
    """

    tokens: torch.Tensor
    spatial: Spatial
    clip: Clip
    eps: float
    raw: bool
    compute_dtype: torch.dtype
    tf32: bool
    tile: RowTile

    @property
    def joined(self) -> bool:
        """Whether the rows of all clips are rows of one matrix."""
        tokens = self.tokens
        return tokens.shape[0] == 1 or tokens.stride(0) == tokens.shape[1] * tokens.stride(1)

    @property
    def fused(self) -> bool:
        """Whether the extension normalises and resamples in one pass over the tokens, each way."""
        # Tensors without memory stand for a GPU's, in a call whose launches are recorded.
        device_type = "cuda" if self.tokens.is_meta else self.tokens.device.type
        # Its rows have the tokens' type, and fp32 ones are rounded to the products' afterwards.
        same_type = self.tokens.dtype in (self.compute_dtype, torch.float32)
        return self.spatial.change == "resample" and same_type and has_extension(device_type)

    @property
    def row_count(self) -> int:
        return self.tokens.shape[0] * self.tokens.shape[1]

    def span(self, chunk: RowChunk) -> slice:
        """The chunk's rows among all B x L rows of the hidden states."""
        if self.spatial.change == "keep":
            return slice(chunk.first_row, chunk.stop_row)
        tokens = self.spatial.student_tokens
        first = (chunk.first_clip * self.clip.frames + chunk.first_frame) * tokens
        return slice(first, first + chunk.clips * (chunk.last_frame - chunk.first_frame) * tokens)

    def rows(self, chunk: RowChunk) -> torch.Tensor:
        """The chunk's hidden states (rows, D), a view."""
        span = self.span(chunk)
        if self.joined:
            return within(self.tokens.reshape(-1, self.tokens.shape[2]), span)
        first = chunk.first_clip * self.tokens.shape[1]
        return self.tokens[chunk.first_clip][span.start - first : span.stop - first]

    def frames_of(self, span: slice, mask: torch.Tensor | None) -> TokenFrames:
        per_frame = self.clip.tokens if self.spatial.change == "keep" else self.spatial.student_tokens
        return TokenFrames(mask, span.start, self.tokens.shape[1], self.clip.start, per_frame, self.clip.frames)

    def operand(
        self,
        chunk: RowChunk,
        mask: torch.Tensor | None,
        mean: torch.Tensor,
        inverse_std: torch.Tensor,
        *,
        measured: bool = False,
    ) -> torch.Tensor:
        """What the projection multiplies, (rows, D): the raw tokens, or the normalised ones on the common grid.

        Writes ``mean`` and ``inverse_std`` (rows of the call,) of the chunk's tokens, unless ``measured``. ``mask``
        (B, T) uint8: frames in the loss; None: all.
        """
        span, tokens = self.span(chunk), self.rows(chunk)
        if self.fused:
            rows, *of_tokens = self._normalized_and_resampled(tokens, _in_loss(chunk, mask))
            if not measured:
                mean[span], inverse_std[span] = (each.view(-1) for each in of_tokens)
            return rows.view(-1, tokens.shape[1]).to(self.compute_dtype)
        normalized = None if self.raw else tokens.new_empty(tokens.shape, dtype=self.compute_dtype)
        if not (self.raw and measured):
            where = self.frames_of(span, mask)
            of_chunk = within(mean, span), within(inverse_std, span)
            token_statistics(tokens, *of_chunk, self.eps, self.tile, where, normalized)
        return tokens if normalized is None else self._align(normalized)

    @property
    def _geometry(self) -> tuple[Sequence[int], Sequence[int], bool]:
        return self.spatial.student_grid, self.spatial.grid, self.spatial.antialias

    def _framed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the hidden states, or a number for each, by frames."""
        return rows.unflatten(0, (-1, self.spatial.student_tokens))

    def _bytes(self, rows: torch.Tensor, per_frame: int) -> int:
        """Of rows as wide as ``rows``, (frames, tokens, D), but ``per_frame`` of them in each frame."""
        return rows.shape[0] * per_frame * rows.shape[2] * rows.element_size()

    def _normalized_and_resampled(
        self, tokens: torch.Tensor, in_loss: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        framed = self._framed(tokens)
        statistics = 2 * 4 * tokens.shape[0]
        cost = Cost((tokens,), (self._bytes(framed, self.clip.tokens), statistics))
        return operator(
            "layer_norm_resample", cost, lambda: layer_norm_resample_op(framed, *self._geometry, self.eps, in_loss)
        )

    def _align(self, normalized: torch.Tensor) -> torch.Tensor:
        spatial, width = self.spatial, normalized.shape[1]
        if spatial.change == "keep":
            return normalized
        framed = self._framed(normalized)
        if spatial.change == "pool":
            return framed.mean(dim=1)
        cost = Cost((framed,), (self._bytes(framed, self.clip.tokens),))
        return operator("resample", cost, lambda: resample_tokens_op(framed, *self._geometry)).view(-1, width)

    def normalized_gradient(
        self,
        grad: torch.Tensor,
        chunk: RowChunk,
        mask: torch.Tensor | None,
        mean: torch.Tensor,
        inverse_std: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """dh of the chunk into ``out`` (B x L, D), from ``grad`` (rows, D), that of the normalised, aligned tokens."""
        span, spatial, tokens, repeat = self.span(chunk), self.spatial, self.rows(chunk), 1
        mean, inverse_std, out = within(mean, span), within(inverse_std, span), within(out, span)
        if spatial.change == "resample":
            framed = grad.view(-1, self.clip.tokens, grad.shape[1])
            if self.fused:
                arguments = [framed.to(tokens.dtype), *(self._framed(each) for each in (tokens, mean, inverse_std))]
                into, in_loss = self._framed(out), _in_loss(chunk, mask)
                operator(
                    "layer_norm_resample_backward",
                    Cost((*arguments,), (into,)),
                    lambda: layer_norm_resample_backward_out_op(*arguments, *self._geometry, into, in_loss, scale),
                )
                return
            cost = Cost((framed,), (self._bytes(framed, spatial.student_tokens),))
            adjoint = operator("resample", cost, lambda: resample_tokens_adjoint_op(framed, *self._geometry))
            grad = adjoint.view(-1, grad.shape[1])
        elif spatial.change == "pool":
            repeat = spatial.student_tokens
        where = self.frames_of(span, mask)
        layer_norm_backward(tokens, grad, mean, inverse_std, scale, out, self.tile, where, repeat)

    def finite_rows(self, chunk: RowChunk, operand: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """``operand`` with the rows of frames outside the loss at 0: its product with their zero gradients is 0."""
        if not self.raw or mask is None:
            return operand
        clip = self.clip
        keep = mask.bool().repeat_interleave(clip.tokens, dim=1)[:, clip.start : clip.start + clip.rows]
        return operand.where(keep.reshape(-1)[chunk.first_row : chunk.stop_row, None], 0)


def within(rows: torch.Tensor, span: slice) -> torch.Tensor:
    """``rows[span]``, without a view where that is all of them."""
    return rows if span.stop - span.start == rows.shape[0] else rows[span]


def _in_loss(chunk: RowChunk, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which of the chunk's frames are in the loss, (frames,) bool; None if all are."""
    if mask is None:
        return None
    clips = slice(chunk.first_clip, chunk.first_clip + chunk.clips)
    return mask[clips, chunk.first_frame : chunk.last_frame].flatten().bool()
