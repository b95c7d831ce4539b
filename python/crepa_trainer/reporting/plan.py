"""What a run is going to do and what CREPA adds to its memory, from configs and the videos' first frames alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from crepa_kernels import CrepaConfig
from crepa_kernels.backends.triton.availability import why_not_triton_for
from crepa_kernels.grid import Grid, num_tokens, plan_alignment
from crepa_kernels.loss import KEPT_BYTES, requested_backend
from crepa_kernels.regularizer.aligning import compares_own_tokens, make_projector
from crepa_kernels.teachers.encoding import FrameEncoder, named_encoder

from ..context import check_context
from ..data.dataset import Bucket, FoundClips, caption_file
from ..data.names import teacher_device, teacher_frames, teacher_is_encoder
from ..optimizers import check_optimizer
from ..state import PRECISIONS
from ..terminal import several
from .shadow import empty_transformer
from .trackers import check_trackers

if TYPE_CHECKING:
    from ..families import CutText, TrainingFamily
    from ..settings import RunSettings

FP32 = 4  # bytes
# Weights, their gradient, and AdamW's two averages of it.
COPIES_OF_TRAINED = 4


@dataclass(frozen=True)
class BucketPlan:
    """One bucket's clips, and of each clip its latent frames, and the frames and grid of its tokens.

    `teacher_grid` and `encoded`, the frames that the teacher sees, are None where no encoder teaches, the grid
    also where only the encoder's answer says it. `cached`: bytes of latents and the teacher's side.
    """

    bucket: Bucket
    clips: int
    latent_frames: int
    frames: int
    grid: Grid
    teacher_grid: Grid | None
    encoded: int | None
    cached: int

    @property
    def tokens_per_frame(self) -> int:
        return num_tokens(self.grid)

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame


@dataclass(frozen=True)
class CrepaMemory:
    """Bytes on the training device that a run without CREPA would not need, on each process.

    Attributes:
        projector: its parameters, their gradients and AdamW's state, all in fp32; of FSDP2 a share.
        kept: what the loss keeps between forward and backward for a micro-batch of the largest bucket.
        teacher: the encoder's weights while it is needed in training.
    """

    projector: int
    kept: int
    teacher: int

    @property
    def total(self) -> int:
        return self.projector + self.kept + self.teacher


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    `device_type`: of the devices that it trains on, `available`: bytes of each, where they are known;
    `epochs`: how often each clip is seen; `memory` is None without CREPA; `layersync`: what its loss keeps, in bytes;
    `workers`: those of each process; `cut`: captions and validation prompts of which the text encoder does not read
    the end.
    """

    settings: RunSettings
    config: CrepaConfig
    family: TrainingFamily
    found: FoundClips
    processes: int
    parameters: int
    trained: int
    buckets: tuple[BucketPlan, ...]
    epochs: float
    memory: CrepaMemory | None
    layersync: int
    workers: int
    cut: tuple[CutText, ...]
    device_type: str = "cpu"
    available: int | None = None

    @property
    def cached(self) -> int:
        """Bytes that the encoded clips take on disk."""
        return sum(each.clips * each.cached for each in self.buckets)

    @property
    def checkpoints(self) -> int:
        return -(-self.settings.max_train_steps // self.settings.checkpoint_every)

    @property
    def validations(self) -> int:
        every = self.settings.validation_every
        return self.settings.max_train_steps // every if every else 0

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Clips of each micro-batch of an epoch; a bucket's last is what is left."""
        size = self.settings.batch_size
        return tuple(min(size, each.clips - n) for each in self.buckets for n in range(0, each.clips, size))

    @property
    def clips_a_step(self) -> float:
        """On average."""
        micro_batches = self.settings.gradient_accumulation_steps * self.processes // self.settings.context_parallel
        return sum(self.batch_sizes) / len(self.batch_sizes) * micro_batches


def make_plan(
    settings: RunSettings,
    config: CrepaConfig,
    family: TrainingFamily,
    found: FoundClips,
    *,
    processes: int = 1,
    device_type: str = "cpu",
    available: int | None = None,
) -> Plan:
    """The plan of a run of `processes` on devices of `device_type`; no weights are loaded.

    Raises:
        ValueError: a block index that the model lacks, LoRA targets that it lacks, an encoder whose config cannot be
            read, settings or a device that the family cannot be trained with, a backend that cannot run there, an
            optimizer or tracker that is not installed, or an optimizer that refuses its arguments.
    """
    check_blocks(settings, config, family)
    check_optimizer(settings.optimizer, settings.optimizer_args, settings.weight_decay, device_type)
    check_trackers(settings.report_to)
    family.check_run(settings.batch_size, device_type)
    check_context(settings, family, found.buckets(), processes)
    parameters, trained = count_parameters(settings, family)
    buckets = tuple(
        _plan_bucket(bucket, clips, settings, config, family, device_type) for bucket, clips in found.buckets().items()
    )
    batches = sum(-(-each.clips // settings.batch_size) for each in buckets)
    taken = settings.max_train_steps * settings.gradient_accumulation_steps * processes // settings.context_parallel
    return Plan(
        settings,
        config,
        family,
        found,
        processes,
        parameters,
        trained,
        buckets,
        epochs=taken / batches,
        memory=_memory(settings, config, family, buckets, device_type, processes) if config.crepa_enabled else None,
        layersync=_kept_by_layersync(settings, family, buckets, device_type) if settings.layersync_enabled else 0,
        workers=settings.workers_on(device_type),
        cut=tuple(family.cut_texts(_texts(settings, found))),
        device_type=device_type,
        available=available,
    )


def _texts(settings: RunSettings, found: FoundClips) -> dict[str, str]:
    """What is encoded, by its file below the data folder or its number."""
    captions = {caption_file(found.folder / key.video): key.caption for key in found.keys}
    prompts = {f"validation prompt {n}": text for n, text in enumerate(settings.validation_prompts, 1)}
    return {file.relative_to(found.folder).as_posix(): text for file, text in captions.items()} | prompts


def check_blocks(settings: RunSettings, config: CrepaConfig, family: TrainingFamily) -> None:
    """ValueError, with the valid range, for a block that the model does not have."""
    indices: dict[str, int | None] = {}
    if config.crepa_enabled:
        indices["crepa_block_index"] = config.crepa_block_index
    if config.crepa_enabled and config.crepa_feature_source == "backbone":
        indices["crepa_teacher_block_index"] = config.crepa_teacher_block_index
    if settings.layersync_enabled:
        indices |= {key: getattr(settings, key) for key in ("layersync_student_block", "layersync_teacher_block")}
    for key, index in indices.items():
        if index is not None and index >= family.blocks:
            raise ValueError(
                f"{key} = {index}: the {family.transformer_class} of {family.model} has "
                f"{several(family.blocks, 'block')}, valid are 0 to {family.blocks - 1}"
            )


def projector_bytes(hidden_size: int, feature_size: int, config: CrepaConfig | None = None) -> int:
    """Bytes of a projector in training: 16 (2 D + E D + E), for LayerNorm(D) and Linear(D, E).

    With iREPA in `config` 16 (k k E D + E), for its convolution.
    """
    with torch.device("meta"):
        projector = make_projector(config or CrepaConfig.from_dict({}), hidden_size, feature_size)
    return FP32 * COPIES_OF_TRAINED * sum(each.numel() for each in projector.parameters())


def _feature_size(config: CrepaConfig) -> int:
    """E. ValueError for an encoder that nobody knows, or that does not take images of this size."""
    width = FrameEncoder.from_config(config).feature_size()
    assert width is not None  # only a loader does not know it
    return width


def count_parameters(settings: RunSettings, family: TrainingFamily) -> tuple[int, int]:
    """Parameters of the transformer, and those that are trained, without CREPA's projector."""
    transformer = empty_transformer(settings, family)
    trained = sum(each.numel() for each in transformer.parameters() if each.requires_grad)
    if settings.training == "full":
        return trained, trained
    return sum(each.numel() for each in transformer.parameters()) - trained, trained


def _plan_bucket(
    bucket: Bucket,
    clips: int,
    settings: RunSettings,
    config: CrepaConfig,
    family: TrainingFamily,
    device_type: str,
) -> BucketPlan:
    layout = family.layout(bucket)
    cached = FP32 * prod(family.latent_shape(bucket))
    grid = encoded = None
    if teacher_is_encoder(config):
        grid = FrameEncoder.from_config(config).grid(layout.grid)
        encoded = len(teacher_frames(config, family, bucket))
        if settings.cache_teacher == "frames":
            cached += encoded * 3 * bucket.height * bucket.width
        else:
            token = _feature_size(config)
            if settings.cache_teacher_precision == "teacher":
                place = teacher_device(settings, torch.device(device_type))
                token *= named_encoder(config.crepa_encoder).dtype(place).itemsize
            else:
                token += FP32  # its scale
            cached += layout.frames * num_tokens(grid or layout.grid) * token
    return BucketPlan(bucket, clips, layout.latent_shape[0], layout.frames, layout.grid, grid, encoded, cached)


def _takes_triton(backend: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether Triton computes the loss, which `auto` tries at the first step; ValueError where it must and cannot."""
    backend, reason = requested_backend(backend), why_not_triton_for(device_type, dtype)
    if backend == "triton" and reason is not None:
        raise ValueError(f"crepa_backend = triton cannot run here: {reason}")
    return backend == "triton" or (backend == "auto" and device_type == "cuda" and reason is None)


def _memory(
    settings: RunSettings,
    config: CrepaConfig,
    family: TrainingFamily,
    buckets: Sequence[BucketPlan],
    device_type: str,
    processes: int,
) -> CrepaMemory:
    hidden, dtype = family.hidden_size, PRECISIONS[settings.mixed_precision]
    encoder = named_encoder(config.crepa_encoder) if teacher_is_encoder(config) else None
    features = _feature_size(config) if encoder else hidden
    place = teacher_device(settings, torch.device(device_type))
    teacher_dtype = encoder.dtype(place) if encoder else dtype
    keeps = KEPT_BYTES["triton" if _takes_triton(config.crepa_backend, device_type, dtype) else "torch"]
    kept = []
    for each in buckets:
        plan = plan_alignment(config.spatial_align, each.grid, each.teacher_grid or each.grid)
        frames = min(settings.batch_size, each.clips) * each.frames
        sizes = (plan, frames, hidden, features, dtype, teacher_dtype, device_type)
        # Relations keep the same of their own rows, whatever compares them.
        relations = KEPT_BYTES["torch"](*sizes, given=config.irepa_enabled) if config.crepa_relational_weight > 0 else 0
        kept.append(keeps(*sizes, recompute=config.crepa_recompute, given=config.irepa_enabled) + relations)
        if config.irepa_enabled:
            kept[-1] += frames * each.tokens_per_frame * features * dtype.itemsize  # p
    weights = 0
    if encoder and settings.cache_teacher == "frames" and place.type == device_type:
        weights = encoder.parameters() * teacher_dtype.itemsize
    projector = projector_bytes(hidden, features, config)
    # The convolution's weights in the products' type.
    copied = projector // (FP32 * COPIES_OF_TRAINED) * dtype.itemsize if dtype.itemsize < FP32 else 0
    largest = max(kept) // (settings.context_parallel if compares_own_tokens(config) else 1)
    share = projector // (processes if settings.sharding == "fsdp2" else 1)
    return CrepaMemory(share, largest + copied * config.irepa_enabled, weights)


def _kept_by_layersync(
    settings: RunSettings, family: TrainingFamily, buckets: Sequence[BucketPlan], device_type: str
) -> int:
    """Bytes that LayerSync keeps for a micro-batch of the largest bucket, of the tokens that a process has of it."""
    width, dtype = family.hidden_size, PRECISIONS[settings.mixed_precision]
    keeps = KEPT_BYTES["triton" if _takes_triton("auto", device_type, dtype) else "torch"]
    kept = []
    for each in buckets:
        plan = plan_alignment("student", each.grid, each.grid)
        frames = min(settings.batch_size, each.clips) * each.frames
        kept.append(keeps(plan, frames, width, width, dtype, dtype, device_type, given=True))
    return max(kept) // settings.context_parallel
