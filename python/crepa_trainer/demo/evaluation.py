"""What the student has learned, over all clips at one fixed noise: against a constant, against shuffled patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crepa_kernels import crepa_loss, frame_indices, similarity_matrix
from crepa_kernels.grid import SpatialPlan, plan_alignment
from crepa_kernels.models.families import family_of
from crepa_kernels.regularizer.aligning import Sides
from crepa_kernels.regularizer.capture import Capture, CapturedStates
from crepa_kernels.teachers import TeacherFeatures
from crepa_kernels.teachers.clips import ClipLengths, encode_clips
from crepa_kernels.teachers.encoding import FrameEncoder

from ..data.sampler import collate

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig

    from ..data.cache import CachedClips
    from ..families import TrainingFamily
    from ..state import TrainState


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


class Evaluator:
    """Measures a state of a run on the clips that it is trained on.

    Its teacher is its own, so that the regularizer's count of encoded frames is the training's alone. The teacher
    features are computed once: they never change (in backbone mode they do, and are computed at every call).

    Args:
        config: block, teacher and the loss's options.
        family: the model's.
        clips: a run's, all of one bucket.
        time: noise level in [0, 1] at which the student is asked, 0 for the clean video.
        seed: of the noise and of the shuffling, the same at every call.
    """

    def __init__(
        self, config: CrepaConfig, family: TrainingFamily, clips: CachedClips, *, time: float, seed: int
    ) -> None:
        self.config, self.family, self.clips = config, family, clips
        self.time, self.seed = time, seed
        self._layout = family.layout(clips.keys[0].bucket)
        self._teacher: TeacherFeatures | None = None

    def features(self, state: TrainState) -> Sides:
        """Hidden states as training captures them, and the teacher's features of the same clips."""
        config, device = self.config, state.accelerator.device
        transformer, crepa = state.accelerator.unwrap_model(state.transformer), state.crepa
        if crepa is None or crepa.projector is None:
            raise ValueError("CREPA is off: there is no projector to measure")
        keys = ["crepa_block_index"] + ["crepa_teacher_block_index"] * (config.crepa_feature_source == "backbone")
        blocks = {key: getattr(config, key) for key in keys}
        captured: dict[str, list[Tensor]] = {key: [] for key in keys}
        capture = Capture(transformer, family_of(transformer), blocks, crepa.projector)
        capture.attach()
        generator = torch.Generator().manual_seed(self.seed)
        try:
            for item in self._items():
                batch = {name: tensor.to(device) for name, tensor in collate([item]).items()}
                noise = torch.randn(batch["latents"].shape, generator=generator).to(device)
                noisy = self.family.noisy(batch, noise, torch.tensor([self.time], device=device))
                self.family.predict(transformer, noisy, batch)
                for key, index in blocks.items():
                    captured[key].append(capture.states(index).hidden_states.detach().float())
        finally:
            capture.remove()
        student, *deeper = (torch.cat(states) for states in captured.values())
        teacher = TeacherFeatures(deeper[0], self._layout.grid) if deeper else self._encoded(device)
        with torch.no_grad():
            return Sides.of(config, crepa.projector, CapturedStates(student, self._layout), teacher)

    def _items(self) -> Iterator[dict[str, Tensor]]:
        self.clips.without_teacher = False
        return (self.clips[number] for number in range(len(self.clips)))

    def _encoded(self, device: torch.device) -> TeacherFeatures:
        if self._teacher is None:
            teacher, rule = FrameEncoder.from_config(self.config), self.config.crepa_frame_map
            encoded = []
            for pixels in (item["pixels"][None] for item in self._items()):
                lengths = ClipLengths.of(None, 1, pixels.shape[1], self._layout)
                encoded.append(encode_clips(teacher, pixels, lengths, rule, device))
            self._teacher = TeacherFeatures(torch.cat([each.features for each in encoded]).float(), encoded[0].grid)
        return self._teacher

    def teacher_frames(self) -> list[int]:
        """The pixel frame of each latent frame; of a group that is averaged, the last."""
        rule, frames = self.config.crepa_frame_map, self.clips.keys[0].bucket.frames
        return frame_indices("last" if rule == "mean" else rule, frames, self._layout.frames)

    def alignment(self, features: Sides) -> Alignment:
        """The means over all clips."""
        shuffled = shuffle_patches(features.teacher_features, self.seed)
        constants = best_constants(features, self.config)
        return Alignment(
            similarity=self._similarity(features, features.teacher_features),
            shuffled=self._similarity(features, shuffled),
            constant=float(constants.mean(0).norm()),
            position=float(constants.norm(dim=-1).mean()),
        )

    @torch.no_grad()
    def _similarity(self, features: Sides, teacher: Tensor) -> float:
        return float(
            features._replace(teacher_features=teacher).given_to(crepa_loss, **self.config.loss_options()).similarity
        )

    def matrix(self, features: Sides) -> Tensor:
        """s[b, f, k] of every student frame with every teacher frame, (n, T, T)."""
        return features.given_to(similarity_matrix, **self.config.loss_options())

    @torch.no_grad()
    def on_common_grid(self, features: Sides) -> tuple[Tensor, Tensor]:
        """Projected student and teacher on the grid that the loss compares them on, both (n, T, h, w, E)."""
        plan = _plan(features, self.config)
        projector = features.projector or nn.Identity()
        student = plan.align(projector(features.hidden_states), "student")
        return student.unflatten(2, plan.grid), plan.align(features.teacher_features, "teacher").unflatten(2, plan.grid)


def best_constants(features: Sides, config: CrepaConfig) -> Tensor:
    """Vectors g (M, E), one a patch position: their directions are the best constant predictors.

    A predictor that says the unit vector c[m] at position m has `crepa_similarity = mean_m <c[m], g[m]>`, with g[m]
    the mean over clips and frames of `z[f, m] / (1 + Σ w)`, `z[f] = ŷ[f] + Σ_k w(|k-f|) ŷ[k]`. So the best is
    `g[m] / ||g[m]||`, which scores the mean norm; the best that is the same everywhere scores the norm of the mean.
    """
    unit = F.normalize(_plan(features, config).align(features.teacher_features, "teacher").float(), dim=-1)
    frames = unit.shape[1]
    weights = config.neighbours.weights(frames, None, unit)[0] + torch.eye(frames, device=unit.device)
    weights = weights / weights.sum(1, keepdim=True)  # (f, k)
    return torch.einsum("fk,bkme->me", weights, unit) / (len(unit) * frames)


def shuffle_patches(teacher: Tensor, seed: int) -> Tensor:
    """Teacher features (n, T, N, E) with the patches of every frame in an order of their own."""
    order = torch.rand(teacher.shape[:3], generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return teacher.gather(2, order.to(teacher.device)[..., None].expand_as(teacher))


def _plan(features: Sides, config: CrepaConfig) -> SpatialPlan:
    return plan_alignment(config.spatial_align, features.student_grid, features.teacher_grid)
