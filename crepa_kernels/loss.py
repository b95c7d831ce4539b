"""The drop-in calls: ``crepa_loss`` and ``relational_loss``, the choice of backend, the similarity matrix for plots."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from .backends.reference import crepa_reference, reference_matrix, relational_reference
from .backends.torch.autograd import crepa_torch
from .backends.torch.autograd import kept_bytes as torch_keeps
from .backends.torch.relational import relational_torch
from .backends.triton.availability import why_no_triton, why_not_triton_for
from .backends.triton.operator import crepa_triton
from .backends.triton.operator import kept_bytes as triton_keeps
from .backends.triton.relational import relational_triton
from .backends.triton.self_check import prefers_pair_tiles, prefers_triton
from .grid import SpatialAlign, grid_of, plan_alignment
from .inputs import LossInputs, check_inputs
from .neighbours import Neighbours, Pairs, Relation
from .ops.compiling import constant_when_compiled
from .output import CrepaOutput
from .projector import CrepaProjector
from .transfer import check_group

__all__ = ["CrepaOutput", "available_backends", "crepa_loss", "relational_loss", "similarity_matrix"]


def _kept_or_recomputed(backend: Callable[[LossInputs], CrepaOutput]) -> Callable[[LossInputs], CrepaOutput]:
    """``backend``, under activation checkpointing where the problem asks to recompute."""

    def run(inputs: LossInputs) -> CrepaOutput:
        if inputs.recompute and torch.is_grad_enabled():
            return checkpoint(backend, inputs, use_reentrant=False)
        return backend(inputs)

    return run


# Slowest first.
_BACKENDS: dict[str, Callable[[LossInputs], CrepaOutput]] = {
    "reference": _kept_or_recomputed(crepa_reference),
    "torch": _kept_or_recomputed(crepa_torch),
    "triton": crepa_triton,
}

_RELATIONAL: dict[str, Callable[[LossInputs, Relation], torch.Tensor]] = {
    "reference": relational_reference,
    "torch": relational_torch,
    "triton": relational_triton,
}

# Of each backend that a run trains with, its own formula for the bytes that it keeps between forward and backward.
KEPT_BYTES: dict[str, Callable[..., int]] = {"torch": torch_keeps, "triton": triton_keeps}


def available_backends() -> tuple[str, ...]:
    """The names that ``crepa_loss(backend=...)`` takes on this machine, slowest first, without ``"auto"``."""
    return tuple(name for name in _BACKENDS if name != "triton" or why_no_triton() is None)


@constant_when_compiled
def requested_backend(backend: str) -> str:
    """``backend``, or what ``CREPA_BACKEND`` in the environment says in its place; ValueError for no backend's name."""
    forced = os.environ.get("CREPA_BACKEND", "")
    name, chosen = ("CREPA_BACKEND", forced) if forced else ("backend", backend)
    if chosen != "auto" and chosen not in _BACKENDS:
        raise ValueError(f"{name} must be 'auto' or one of {', '.join(_BACKENDS)}, got {chosen!r}")
    return chosen


def _backend_for(backend: str, inputs: LossInputs, relation: Relation | None = None) -> str:
    """The backend of one call: of ``relational_loss`` with a ``relation``."""
    backend = requested_backend(backend)
    if backend == "auto":
        triton = prefers_triton(inputs) if relation is None else prefers_pair_tiles(inputs, relation)
        return "triton" if triton else "torch"
    h = inputs.hidden_states
    if backend == "triton" and (reason := why_not_triton_for(h.device, h.dtype)):
        raise ValueError(f"backend 'triton' cannot run here: {reason}")
    return backend


def crepa_loss(
    hidden_states: torch.Tensor,
    teacher_features: torch.Tensor,
    projector: nn.Module | None,
    *,
    student_grid: Sequence[int] | None = None,
    teacher_grid: Sequence[int],
    latent_shape: Sequence[int] | None = None,
    patch: Sequence[int] | None = None,
    distance: int = 1,
    tau: float = 1.0,
    cumulative: bool = False,
    normalize_neighbour_sum: bool = False,
    normalize_by_frames: bool = True,
    spatial_align: SpatialAlign = "student",
    antialias: bool = True,
    frame_index: torch.Tensor | Sequence[int] | None = None,
    frame_mask: torch.Tensor | None = None,
    teacher_mask: torch.Tensor | None = None,
    token_range: Sequence[int] | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> CrepaOutput:
    """Cross-frame Representation Alignment of one block's hidden states with a frozen teacher's features.

    Equation (arXiv 2506.09229), with p = projector(h), unit rows, M tokens a frame on the common grid and
    ``s[b,f,k] = mean over M of <p[b,f], y[b,k]>``::

        total[b,f] = s[b,f,f] + sum over neighbours k of exp(-|k-f|/tau) s[b,f,k]
        loss       = -mean_b( sum_f total[b,f] / T )

    Args:
        hidden_states: (B, T, P, D) or (B, T x P, D), the block's video tokens in raster order; fp64, fp32, fp16 or
            bf16.
        teacher_features: (B, S, N, E), patch features of the clip; they never receive a gradient.
        projector: ``CrepaProjector(D, E)``, or an ``nn.Sequential`` of LayerNorm and Linear. None: ``hidden_states``
            are p, projected already by what the caller likes, and D is E.
        student_grid: (height, width) of the P tokens; or in its place ``latent_shape`` and ``patch``.
        teacher_grid: (height, width) of the N tokens.
        latent_shape: (frames, height, width) of the latents that the tokens are of.
        patch: (t, h, w), latent frames, rows and columns of one token.
        distance: d in frames; 0 aligns each frame with its own teacher frame only. Clamped to the clip's existing
            teacher frames - 1.
        tau: decay of the neighbours' weight, in frames.
        cumulative: every offset 1..d in both directions instead of d alone.
        normalize_neighbour_sum: divide total[b,f] by 1 + the sum of its weights.
        normalize_by_frames: divide by the number of the clip's frames in the loss.
        spatial_align: which side is resampled to the other's grid: ``"student"`` (the teacher is resampled),
            ``"teacher"``, ``"smaller"`` or ``"pool"`` (both averaged to one token where the grids differ).
        antialias: widen the filter where an axis shrinks, so that every token takes part.
        frame_index: (T,) or (B, T) integers, the teacher frame of each student frame; without it S must equal T.
        frame_mask: (B, T) bool, student frames in the loss; conditioning frames and padding are False.
        teacher_mask: (B, T) bool, teacher frames that exist, after ``frame_index``; padding is False. A student frame
            whose own teacher frame does not exist is not in the loss.
        token_range: (start, stop) of the clip's flattened T x P tokens, for sequence parallelism: hidden_states are
            (B, stop - start, D), that slice only, and the teacher is on the student's grid or resampled to it. Means
            still divide by the whole clip, so losses, metrics and gradients of all shards add up to the clip's.
        recompute: keep nothing of size tokens x E for the backward pass, which makes it again.
        backend: a name of ``available_backends()``, or ``"auto"``: ``"triton"`` where its kernels run and, at the first
            call of a kind, agree with ``"torch"``; otherwise ``"torch"``. ``CREPA_BACKEND`` in the environment
            overrides it.

    Returns:
        ``CrepaOutput``; ``loss`` carries the gradients to the hidden states (in their type) and to the projector (in
        its weights' types). Products are taken in the hidden states' type with fp32 sums, inside and outside
        autocast, but for fp32 hidden states inside autocast: in its type, of tokens normalised in fp32.

    Raises:
        ValueError: for grids that do not match the token counts, widths that do not match the projector, types that
            are not floating point, devices that differ, and options out of range; the message holds the numbers.
    """
    neighbours = Neighbours(distance, tau, cumulative, normalize_neighbour_sum)
    grid = grid_of(student_grid, latent_shape, patch, hidden_states)

    def run() -> CrepaOutput:
        inputs = check_inputs(
            hidden_states,
            teacher_features,
            projector,
            plan_alignment(spatial_align, grid, teacher_grid, antialias),
            neighbours,
            normalize_by_frames=normalize_by_frames,
            frame_index=frame_index,
            frame_mask=frame_mask,
            teacher_mask=teacher_mask,
            token_range=token_range,
            recompute=recompute,
        )
        return _BACKENDS[_backend_for(backend, inputs)](inputs)

    return projector(hidden_states, run) if isinstance(projector, CrepaProjector) else run()


def relational_loss(
    hidden_states: torch.Tensor,
    teacher_features: torch.Tensor,
    projector: nn.Module | None,
    *,
    student_grid: Sequence[int] | None = None,
    teacher_grid: Sequence[int],
    latent_shape: Sequence[int] | None = None,
    patch: Sequence[int] | None = None,
    pairs: Pairs = "all",
    distance: int = 1,
    tau: float = 1.0,
    margin: float | None = None,
    spatial_align: SpatialAlign = "student",
    antialias: bool = True,
    frame_index: torch.Tensor | Sequence[int] | None = None,
    frame_mask: torch.Tensor | None = None,
    teacher_mask: torch.Tensor | None = None,
    token_range: Sequence[int] | None = None,
    context_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Token relation distillation: a clip's tokens are to be as similar to each other as the teacher's are.

    Equation, with p = projector(h), unit rows of p and y, and the M tokens i, j of frames f, k on the common grid::

        A[(f,i),(k,j)] = <p[f,i], p[k,j]> - <y[f,i], y[k,j]>
        loss = mean_b( sum_{f,k} w[f,k] mean_{i,j} phi(A[(f,i),(k,j)]) / sum_{f,k} w[f,k] )

    ``pairs="all"`` with a margin of 0.1 is VideoREPA's loss (arXiv 2505.23656), ``"frame"`` the manifold loss of U-REPA
    (arXiv 2503.18414). No matrix of all tokens by all tokens is made, but by ``backend="reference"``.

    Args:
        hidden_states: (B, T, P, D) or (B, T x P, D), the block's video tokens in raster order; fp64, fp32, fp16 or
            bf16.
        teacher_features: (B, S, N, E), patch features of the clip; they never receive a gradient.
        projector: ``CrepaProjector(D, E)``, or an ``nn.Sequential`` of LayerNorm and Linear. None: ``hidden_states``
            are p, projected already by what the caller likes, and D is E.
        student_grid: (height, width) of the P tokens; or in its place ``latent_shape`` and ``patch``.
        teacher_grid: (height, width) of the N tokens.
        latent_shape: (frames, height, width) of the latents that the tokens are of.
        patch: (t, h, w), latent frames, rows and columns of one token.
        pairs: w[f, k] is 1 for f = k (``"frame"``), for all f and k (``"all"``), for f != k (``"cross"``), or
            exp(-|f - k| / tau) for |f - k| <= distance (``"neighbours"``); else 0.
        distance: frames, of ``"neighbours"``; those that are farther apart are not compared.
        tau: decay of the neighbours' weight, frames.
        margin: phi(a) = max(|a| - margin, 0), with derivative 0 where |a| is the margin; None: a squared.
        spatial_align, antialias, frame_index: as in ``crepa_loss``.
        frame_mask: (B, T) bool, student frames in the loss.
        teacher_mask: (B, T) bool, teacher frames that exist, after ``frame_index``. A frame is compared where both
            masks have it, and is as if it were not there where not.
        token_range: (start, stop) of the clip's flattened T x P tokens, as in ``crepa_loss``.
        context_group: the process group whose ranks have the rest of the same clips' tokens, with ``token_range``
            alone: every token is compared with those of all ranks. Each rank's loss is a share, the shares add up to
            the clips' loss, and the gradients are the clips'. All ranks call this, and the backward pass, alike.
        backend: as in ``crepa_loss``. Without a margin ``"triton"`` is the same algebra as ``"torch"``, which
            ``"auto"`` takes; with one it walks over tiles of pairs by kernels of its own.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 hidden states), with gradients as ``crepa_loss`` has them. A clip
        without a pair of frames is not in the mean; with no clip left the loss and its gradients are 0.

    Raises:
        ValueError: as ``crepa_loss``, and for other ``pairs``, or a margin that is not a number of at least 0.
    """
    relation = Relation(pairs, distance, tau, margin)
    if (token_range is None) != (context_group is None):
        raise ValueError(
            "token_range and context_group go together: every token is compared with those that other ranks have"
        )
    if context_group is not None:
        check_group(context_group, "context_group")
    grid = grid_of(student_grid, latent_shape, patch, hidden_states)

    def run() -> torch.Tensor:
        inputs = check_inputs(
            hidden_states,
            teacher_features,
            projector,
            plan_alignment(spatial_align, grid, teacher_grid, antialias),
            Neighbours(distance=0),
            frame_index=frame_index,
            frame_mask=frame_mask,
            teacher_mask=teacher_mask,
            token_range=token_range,
            context_group=context_group,
        )
        return _RELATIONAL[_backend_for(backend, inputs, relation)](inputs, relation)

    return projector(hidden_states, run) if isinstance(projector, CrepaProjector) else run()


_ONLY_IN_THE_LOSS = {
    "distance", "tau", "cumulative", "normalize_neighbour_sum", "normalize_by_frames", "backend",
    "recompute",
}  # fmt: skip


@torch.no_grad()
def similarity_matrix(
    hidden_states: torch.Tensor,
    teacher_features: torch.Tensor,
    projector: nn.Module | None,
    *,
    student_grid: Sequence[int] | None = None,
    teacher_grid: Sequence[int],
    latent_shape: Sequence[int] | None = None,
    patch: Sequence[int] | None = None,
    spatial_align: SpatialAlign = "student",
    antialias: bool = True,
    frame_index: torch.Tensor | Sequence[int] | None = None,
    frame_mask: torch.Tensor | None = None,
    teacher_mask: torch.Tensor | None = None,
    token_range: Sequence[int] | None = None,
    **loss_options: object,
) -> torch.Tensor:
    """``s[b,f,k] = mean over tokens of <p[b,f], y[b,k]>`` for every student frame f and teacher frame k, for plots.

    Takes the arguments of ``crepa_loss``; those that weigh frames against each other (``loss_options``) change
    nothing here.

    Returns:
        (B, T, S) in fp32 (fp64 for fp64 hidden states), detached. With ``frame_index``, S counts the teacher's own
        frames and the loss's pair of frame f is ``[b, f, frame_index[b, f]]``. Rows of frames outside the loss are 0;
        without ``frame_index`` so are the columns of teacher frames that do not exist.

    Raises:
        ValueError: as ``crepa_loss``.
        TypeError: for an argument that ``crepa_loss`` does not have.
    """
    if unknown := loss_options.keys() - _ONLY_IN_THE_LOSS:
        raise TypeError(f"similarity_matrix() got unexpected arguments: {', '.join(sorted(unknown))}")
    grid = grid_of(student_grid, latent_shape, patch, hidden_states)

    def run() -> torch.Tensor:
        inputs = check_inputs(
            hidden_states,
            teacher_features,
            projector,
            plan_alignment(spatial_align, grid, teacher_grid, antialias),
            Neighbours(distance=0),
            frame_index=frame_index,
            frame_mask=frame_mask,
            teacher_mask=teacher_mask,
            token_range=token_range,
        )
        return reference_matrix(inputs)

    return projector(hidden_states, run) if isinstance(projector, CrepaProjector) else run()
