"""What a student has learned, over all clips at fixed noise: against a constant, shuffled patches, another student."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from crepa_kernels import crepa_loss, similarity_matrix
from crepa_kernels.grid import plan_alignment
from crepa_kernels.models.families import family_of
from crepa_kernels.regularizer.aligning import Sides
from crepa_kernels.regularizer.capture import Capture, CapturedStates
from crepa_kernels.teachers import TeacherFeatures
from crepa_kernels.teachers.clips import ClipLengths, encode_clips
from crepa_kernels.teachers.encoding import FrameEncoder

from ..alignment import best_constants
from ..data.sampler import collate
from ..step import flow_matching_loss

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig
    from crepa_kernels.projector import Projector

    from ..data.cache import CachedClips
    from ..families import TrainingFamily
    from ..families.noise import NoisyLatents
    from ..state import TrainState

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Answers:
    """What a model that was trained without CREPA can be asked as well as one that was trained with it.

    flow_loss: flow matching at the noise levels `LEVELS`. readable: as `linearly_readable`; None for a single clip, or
    where the teacher is the model itself.
    """

    flow_loss: float
    readable: float | None


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
        crepa = state.crepa
        if crepa is None or crepa.projector is None:
            raise ValueError("CREPA is off: there is no projector to measure")
        student, *deeper = self._states(state, crepa.projector)
        teacher = TeacherFeatures(deeper[0], self._layout.grid) if deeper else self._encoded(state.accelerator.device)
        with torch.no_grad():
            return Sides.of(self.config, crepa.projector, CapturedStates(student, self._layout), teacher)

    def _states(self, state: TrainState, projector: Projector | None) -> list[Tensor]:
        """Hidden states (n, T, P, D) of the student's block, and in backbone mode of the teacher's."""
        config, transformer = self.config, state.accelerator.unwrap_model(state.transformer)
        keys = ["crepa_block_index"] + ["crepa_teacher_block_index"] * config.teacher.backbone
        blocks: dict[str, int] = {key: getattr(config, key) for key in keys}
        captured: dict[str, list[Tensor]] = {key: [] for key in keys}
        capture = Capture(transformer, family_of(transformer), blocks, projector)
        capture.attach()
        try:
            for batch, noisy in self._noisy(self.time, state.accelerator.device):
                self.family.predict(transformer, noisy, batch)
                for key, index in blocks.items():
                    captured[key].append(capture.states(index).hidden_states.detach().float())
        finally:
            capture.remove()
        return [torch.cat(states) for states in captured.values()]

    @torch.no_grad()
    def answers(self, state: TrainState) -> Answers:
        """Of a model that was trained with CREPA or without it, on the same noise."""
        device, transformer = state.accelerator.device, state.accelerator.unwrap_model(state.transformer)
        losses = [
            flow_matching_loss(self.family.predict(transformer, noisy, batch), noisy)
            for time in LEVELS
            for batch, noisy in self._noisy(time, device)
        ]
        return Answers(float(torch.stack(losses).mean()), self._readable(state))

    @torch.enable_grad()  # without it nothing is captured
    def _readable(self, state: TrainState) -> float | None:
        if len(self.clips) < 2 or self.config.teacher.backbone:
            return None
        (student,), (teacher, grid) = self._states(state, None), self._encoded(state.accelerator.device)
        plan = plan_alignment(self.config.spatial_align, self._layout.grid, grid)
        return linearly_readable(plan.align(student, "student"), plan.align(teacher, "teacher"))

    def _noisy(self, time: float, device: torch.device) -> Iterator[tuple[dict[str, Tensor], NoisyLatents]]:
        """Each clip as a batch, and with the noise of `seed` at a level; the same at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        for item in self._items():
            batch = {name: tensor.to(device) for name, tensor in collate([item]).items()}
            noise = torch.randn(batch["latents"].shape, generator=generator).to(device)
            yield batch, self.family.noisy(batch, noise, torch.tensor([time], device=device))

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


def linearly_readable(states: Tensor, teacher: Tensor) -> float:
    """Mean cosine of the teacher's features with the best that a linear map makes of a model's states.

    The map is fitted to every other clip, by ridge regression, and asked on the rest. states (n, T, M, D) of n >= 2
    clips, teacher (n, T, M, E), in the same places.
    """
    x = F.layer_norm(states.double(), states.shape[-1:])
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    y = F.normalize(teacher.double(), dim=-1)
    fitted, target = x[::2].flatten(0, 2), y[::2].flatten(0, 2)
    products = fitted.T @ fitted
    # A hundredth of the mean square of a state's entry: what is only noise in a few clips is not fitted.
    products.diagonal().add_(0.01 * len(fitted))
    weights = torch.linalg.solve(products, fitted.T @ target)
    return float(F.cosine_similarity(x[1::2] @ weights, y[1::2], dim=-1).mean())


def shuffle_patches(teacher: Tensor, seed: int) -> Tensor:
    """Teacher features (n, T, N, E) with the patches of every frame in an order of their own."""
    order = torch.rand(teacher.shape[:3], generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return teacher.gather(2, order.to(teacher.device)[..., None].expand_as(teacher))
