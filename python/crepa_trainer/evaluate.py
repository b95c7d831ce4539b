"""What the student has learned, over all clips at one fixed noise: against a constant, against shuffled patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crepa_kernels import crepa_loss, frame_indices, select_frames, similarity_matrix
from crepa_kernels.families import family_of
from crepa_kernels.grid import Grid, SpatialPlan, plan_alignment
from crepa_kernels.neighbours import Neighbours
from crepa_kernels.teachers.dinov2 import DinoV2Teacher

from .loop import add_noise

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig


@dataclass(frozen=True)
class Alignment:
    """`crepa_similarity` of the student, with the teacher's patches shuffled, and of the best that do not look.

    constant: of the best single vector for every patch. position: of the best vector for each patch position, which
    knows where a patch is and nothing of the clip.
    """

    similarity: float
    shuffled: float
    constant: float
    position: float


@dataclass(frozen=True)
class Features:
    """Both sides of the loss for n clips: hidden_states (n, T, P, D), teacher (n, T, N, E), and their grids."""

    hidden_states: Tensor
    teacher: Tensor
    student_grid: Grid
    teacher_grid: Grid


class Evaluator:
    """Measures a transformer and its projector on fixed clips.

    Its teacher is its own, so that the regularizer's count of encoded frames is the training's alone. The teacher
    features are computed once: they never change (in backbone mode they do, and are computed at every call).

    Args:
        config: block, teacher and the loss's options.
        latents: (n, C, T, h, w), clean, normalised as the transformer sees them.
        pixels: (n, P, 3, H, W) uint8, on the CPU.
        text: (1, L, text_dim).
        time: noise level in [0, 1] at which the student is asked, 0 for the clean video.
        seed: of the noise and of the shuffling, the same at every call.
    """

    def __init__(
        self, config: CrepaConfig, latents: Tensor, pixels: Tensor, text: Tensor, *, time: float, seed: int
    ) -> None:
        self.config = config
        self.latents = latents
        self.pixels = pixels
        self.text = text
        self.time = time
        self.seed = seed
        self._teacher: tuple[Tensor, Grid] | None = None

    @torch.no_grad()
    def features(self, transformer: nn.Module) -> Features:
        """Hidden states of a forward without gradient, and the teacher's features of the same clips."""
        config, family = self.config, family_of(transformer)
        layout = family.layout(transformer, tuple(self.latents.shape[2:]))
        backbone = config.crepa_feature_source == "backbone"
        keys = ["crepa_block_index"] + ["crepa_teacher_block_index"] * backbone
        captured: list[list[Tensor]] = [[] for _ in keys]
        hooks = [
            family.block(transformer, getattr(config, key), key).register_forward_hook(
                lambda module, inputs, output, kept=kept: kept.append(family.video_tokens(output))
            )
            for key, kept in zip(keys, captured, strict=True)
        ]
        was_training = transformer.training
        transformer.eval()
        generator = torch.Generator().manual_seed(self.seed)
        try:
            for clip in self.latents.split(1):
                noise = torch.randn(clip.shape, generator=generator).to(clip)
                noisy = add_noise(clip, noise, torch.tensor([self.time], device=clip.device))
                transformer(noisy.latents, noisy.timestep, self.text)
        finally:
            transformer.train(was_training)
            for hook in hooks:
                hook.remove()
        states = [layout.by_frame(torch.cat(kept)).float() for kept in captured]
        teacher, grid = (states[1], layout.grid) if backbone else self._encoded(layout.frames, layout.grid)
        return Features(states[0], teacher, layout.grid, grid)

    def _encoded(self, frames: int, student_grid: Grid) -> tuple[Tensor, Grid]:
        if self._teacher is None:
            config, device = self.config, self.latents.device
            teacher = DinoV2Teacher.from_config(config)
            rule = config.crepa_frame_map
            needed = frame_indices(rule, self.pixels.shape[1], frames)
            encoded = [teacher.encode(clip[needed], student_grid, device) for clip in self.pixels]
            features = torch.stack([each.features for each in encoded]).float()
            if rule == "mean":
                features = select_frames(features, rule, frames)
            self._teacher = (features, encoded[0].grid)
        return self._teacher

    def teacher_frames(self, frames: int) -> list[int]:
        """The pixel frame of each of `frames` latent frames; of a group that is averaged, the last."""
        rule = self.config.crepa_frame_map
        return frame_indices("last" if rule == "mean" else rule, self.pixels.shape[1], frames)

    def alignment(self, features: Features, projector: nn.Module) -> Alignment:
        """The means over all clips."""
        shuffled = shuffle_patches(features.teacher, self.seed)
        constants = best_constants(features, self.config)
        return Alignment(
            similarity=self._similarity(features, features.teacher, projector),
            shuffled=self._similarity(features, shuffled, projector),
            constant=float(constants.mean(0).norm()),
            position=float(constants.norm(dim=-1).mean()),
        )

    @torch.no_grad()
    def _similarity(self, features: Features, teacher: Tensor, projector: nn.Module) -> float:
        output = crepa_loss(
            features.hidden_states,
            teacher,
            projector,
            student_grid=features.student_grid,
            teacher_grid=features.teacher_grid,
            **self.config.loss_options(),
        )
        return float(output.similarity)

    def matrix(self, features: Features, projector: nn.Module) -> Tensor:
        """s[b, f, k] of every student frame with every teacher frame, (n, T, T)."""
        return similarity_matrix(
            features.hidden_states,
            features.teacher,
            projector,
            student_grid=features.student_grid,
            teacher_grid=features.teacher_grid,
            spatial_align=self.config.spatial_align,
        )

    @torch.no_grad()
    def on_common_grid(self, features: Features, projector: nn.Module) -> tuple[Tensor, Tensor]:
        """Projected student and teacher on the grid that the loss compares them on, both (n, T, h, w, E)."""
        plan = _plan(features, self.config)
        student = plan.align(projector(features.hidden_states), "student")
        return student.unflatten(2, plan.grid), plan.align(features.teacher, "teacher").unflatten(2, plan.grid)


def best_constants(features: Features, config: CrepaConfig) -> Tensor:
    """Vectors g (M, E), one a patch position: their directions are the best constant predictors.

    A predictor that says the unit vector c[m] at position m has `crepa_similarity = mean_m <c[m], g[m]>`, with g[m]
    the mean over clips and frames of `z[f, m] / (1 + Σ w)`, `z[f] = ŷ[f] + Σ_k w(|k-f|) ŷ[k]`. So the best is
    `g[m] / ||g[m]||`, which scores the mean norm; the best that is the same everywhere scores the norm of the mean.
    """
    unit = F.normalize(_plan(features, config).align(features.teacher, "teacher").float(), dim=-1)
    frames = unit.shape[1]
    neighbours = Neighbours(
        config.crepa_adjacent_distance, config.crepa_adjacent_tau, config.crepa_cumulative_neighbors
    )
    weights = neighbours.weights(frames, None, unit)[0] + torch.eye(frames, device=unit.device)
    weights = weights / weights.sum(1, keepdim=True)  # (f, k)
    return torch.einsum("fk,bkme->me", weights, unit) / (len(unit) * frames)


def shuffle_patches(teacher: Tensor, seed: int) -> Tensor:
    """Teacher features (n, T, N, E) with the patches of every frame in an order of their own."""
    order = torch.rand(teacher.shape[:3], generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return teacher.gather(2, order.to(teacher.device)[..., None].expand_as(teacher))


def _plan(features: Features, config: CrepaConfig) -> SpatialPlan:
    return plan_alignment(config.spatial_align, features.student_grid, features.teacher_grid)
