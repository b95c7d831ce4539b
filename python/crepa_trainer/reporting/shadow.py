"""Steps of a run on tensors that have shapes and no values: the bytes that are alive in them, for a plan.

Every operator of the model runs as in training, under autograd, autocast and gradient checkpointing, and PyTorch's fake
tensors answer with shapes alone. So what a family's blocks keep is not written down a second time here. The operators
are those of a CPU; attention is taken by a fused kernel there as on a GPU, which keeps nothing of tokens x tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from crepa_kernels import CrepaRegularizer, crepa_loss, relational_loss
from crepa_kernels.grid import Grid
from crepa_kernels.regularizer.aligning import Sides, compares_own_tokens
from crepa_kernels.teachers import TeacherFeatures
from crepa_kernels.teachers.dinov2 import DinoV2
from crepa_kernels.teachers.efficientnet import EfficientNetLite0
from crepa_kernels.teachers.encoding import resized

from ..context import share_tokens
from ..state import PRECISIONS, add_lora
from ..step import flow_matching_loss

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig

    from ..families import ClipSize, TrainingFamily
    from ..settings import RunSettings

# The first and the last block may keep other things than those between them, which all keep the same.
_SHORTEST = 2


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return, once each and for as long as somebody holds them.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, Tensor):
                self._count(each)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def leave_out(self, module: nn.Module) -> None:
        """Weights and buffers are no part of it, whoever returns them."""
        for each in (*module.parameters(), *module.buffers()):
            self._sizes[each.untyped_storage()._cdata] = 0


@contextmanager
def _counted(shapes: FakeTensorMode, *modules: nn.Module) -> Iterator[LiveBytes]:
    """What is alive beside the modules."""
    with torch.random.fork_rng(devices=[]), shapes, LiveBytes() as live:
        for module in modules:
            live.leave_out(module)
        yield live


@contextmanager
def _shared_out(transformer: Any, processes: int) -> Iterator[None]:
    """What the first of so many processes does that share out tokens; torch's fake group sends nothing."""
    if processes == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=processes)
    try:
        share_tokens(transformer, processes, "cpu")
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one forward and backward beside weights and their gradients.

    `kept`: between the two; `peak`: the most at a time; `block`: what each further block of the deepest kind adds.
    """

    kept: int
    peak: int
    block: int


@dataclass(frozen=True)
class Features:
    """The teacher's features of a frame: their grid, width E and type."""

    grid: Grid
    width: int
    dtype: torch.dtype


def empty_transformer(settings: RunSettings, family: TrainingFamily, depth: Mapping[str, int] | None = None) -> Any:
    """The transformer with its LoRA on the meta device. depth: in the place of what its config says.

    ValueError for LoRA targets that it lacks.
    """
    import diffusers

    kind = getattr(diffusers, family.transformer_class)
    with init_empty_weights():
        transformer: Any = kind.from_config({**family.configs["transformer"], **(depth or {})})
        transformer.requires_grad_(settings.training == "full")
        if settings.training == "lora":
            add_lora(transformer, family, settings)
    return transformer


def weight_type(name: str, settings: RunSettings, transformer: Any) -> torch.dtype:
    """What a run holds a parameter in: fp32 if it is trained or diffusers keeps it so, else `mixed_precision`."""
    kept = transformer._keep_in_fp32_modules or ()
    if transformer.get_parameter(name).requires_grad or any(part in kept for part in name.split(".")):
        return torch.float32
    return PRECISIONS[settings.mixed_precision]


@dataclass(frozen=True)
class Shadow:
    """A micro-batch of `clips` clips of a bucket on a model without weights.

    `features`: of the teacher, None where no encoder teaches.
    """

    settings: RunSettings
    config: CrepaConfig
    family: TrainingFamily
    bucket: ClipSize
    clips: int
    features: Features | None

    def step(self, *, checkpointing: bool) -> StepBytes:
        """One forward and backward, with CREPA's loss where it is on."""
        whole = {key: int(self.family.configs["transformer"][key]) for key in self.family.depth}
        short = {key: min(_SHORTEST, number) for key, number in whole.items()}
        first = self._step(short, checkpointing)
        kept, peak, block = first.kept, first.peak, 0
        for key, number in whole.items():
            if number > short[key]:
                longer = self._step({**short, key: short[key] + 1}, checkpointing)
                kept += (number - short[key]) * (longer.kept - first.kept)
                peak += (number - short[key]) * (longer.peak - first.peak)
                block = max(block, longer.kept - first.kept)
        return StepBytes(kept, peak, block)

    def _step(self, depth: Mapping[str, int], checkpointing: bool) -> StepBytes:
        shapes, family, degree = _shapes(), self.family.dense(), self.settings.context_parallel
        transformer = self._transformer(shapes, depth).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        crepa = self._crepa(transformer)
        for each in transformer.parameters():
            if each.requires_grad:
                # As soon as it is made: how many gradients there are at a time is known without this.
                each.register_post_accumulate_grad_hook(_drop_gradient)
        with _shared_out(transformer, degree), _counted(shapes, transformer) as live:
            batch, features = self._batch(), self._features()
            noisy = family.noisy(batch, torch.empty_like(batch["latents"]), torch.full((self.clips,), 0.5))
            with _autocast(self.settings):
                prediction = family.predict(transformer, noisy, batch).float()
            loss = flow_matching_loss(prediction, noisy)
            if crepa is not None:
                # Without a teacher its weight is 0 throughout.
                if features is not None or crepa.config.teacher.backbone:
                    loss = loss + _alignment(crepa, features)
                crepa.release()
            kept = live.now
            loss.backward()
            return StepBytes(kept, live.peak, 0)

    def denoising(self) -> int:
        """Bytes beside the weights while a clip is denoised, with and without the prompt at a time."""
        shapes, family = _shapes(), self.family.dense()
        transformer = self._transformer(shapes, dict.fromkeys(family.depth, 1)).eval()
        two = replace(self, clips=2 if self.settings.validation_guidance > 1 else 1)
        degree = self.settings.context_parallel
        with _shared_out(transformer, degree), _counted(shapes, transformer) as live, torch.no_grad():
            batch = two._batch()
            noisy = family.noisy(batch, torch.empty_like(batch["latents"]), torch.full((two.clips,), 0.5))
            with _autocast(self.settings):
                family.predict(transformer, noisy, batch)
            return live.peak

    def _transformer(self, shapes: FakeTensorMode, depth: Mapping[str, int]) -> Any:
        transformer = empty_transformer(self.settings, self.family.dense(), depth)
        names = [name for name, _ in transformer.named_parameters()]
        _without_values(transformer, shapes, {name: weight_type(name, self.settings, transformer) for name in names})
        return transformer

    def _crepa(self, transformer: nn.Module) -> CrepaRegularizer | None:
        if not self.config.crepa_enabled:
            return None
        # Which blocks they are changes nothing, nor does when CREPA ends, which would be logged at each count.
        changes: dict[str, Any] = {"crepa_block_index": 0, "crepa_similarity_threshold": None}
        if self.config.crepa_feature_source == "backbone":
            changes["crepa_teacher_block_index"] = 1
        config = self.config.replace(**changes, crepa_backend="torch")
        width = self.family.hidden_size if self.features is None else self.features.width
        with torch.random.fork_rng(devices=[]):
            return CrepaRegularizer(
                config, transformer, max_train_steps=self.settings.max_train_steps, feature_size=width
            )

    def _batch(self) -> dict[str, Tensor]:
        blank = {**self.family.blank_clip(self.bucket), **self.family.blank_text()}
        return {name: torch.stack([each] * self.clips) for name, each in blank.items()}

    def _features(self) -> TeacherFeatures | None:
        if self.features is None:
            return None
        frames, (height, width) = self.family.layout(self.bucket).frames, self.features.grid
        shape = self.clips, frames, height * width, self.features.width
        return TeacherFeatures(torch.empty(shape, dtype=self.features.dtype), self.features.grid)

    def encoding(self, *, tiling: bool) -> int:
        """Bytes beside the VAE's weights while it encodes one clip."""
        with self._vae(tiling) as (live, vae):
            self.family.encode_clip(vae, torch.empty(self._pixels, dtype=torch.uint8))
            return live.peak

    def decoding(self, *, tiling: bool) -> int:
        """Bytes beside the VAE's weights while it decodes one clip."""
        with self._vae(tiling) as (live, vae), _autocast(self.settings):
            self.family.decode(vae, torch.empty(1, *self.family.latent_shape(self.bucket)))
            return live.peak

    @property
    def _pixels(self) -> tuple[int, int, int, int]:
        return self.bucket.frames, 3, self.bucket.height, self.bucket.width

    @contextmanager
    def _vae(self, tiling: bool) -> Iterator[tuple[LiveBytes, Any]]:
        vae, shapes = empty_vae(self.family).eval(), _shapes()
        if tiling:
            vae.enable_tiling()
        _without_values(vae, shapes, {name: torch.float32 for name, _ in vae.named_parameters()})
        with _counted(shapes, vae) as live, torch.no_grad():
            yield live, vae

    def teaching(self, encoder: DinoV2 | EfficientNetLite0, dtype: torch.dtype, frames: int, size: Grid) -> int:
        """Bytes beside the encoder's weights while it takes so many frames, resized to a size, at a time."""
        with init_empty_weights():
            model = encoder.skeleton()
        shapes = _shapes()
        _without_values(model, shapes, {name: dtype for name, _ in model.named_parameters()})
        with _counted(shapes, model) as live, torch.no_grad():
            model(resized(torch.empty(frames, *self._pixels[1:], dtype=torch.uint8), size))
            return live.peak


def empty_vae(family: TrainingFamily) -> Any:
    """The VAE on the meta device."""
    import diffusers

    with init_empty_weights():
        return getattr(diffusers, str(family.vae_class)).from_config(family.configs["vae"])


def _shapes() -> FakeTensorMode:
    # Buffers and the projector are small, and have their values.
    return FakeTensorMode(allow_non_fake_inputs=True)


def _without_values(module: nn.Module, shapes: FakeTensorMode, types: Mapping[str, torch.dtype]) -> None:
    """Gives parameters of the meta device a place on the CPU, in these types and without values."""
    with shapes:
        for name, dtype in types.items():
            owner, _, own = name.rpartition(".")
            parameter = module.get_parameter(name)
            made = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)
            setattr(module.get_submodule(owner), own, made)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _autocast(settings: RunSettings) -> AbstractContextManager[Any]:
    dtype = PRECISIONS[settings.mixed_precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def _alignment(crepa: CrepaRegularizer, features: TeacherFeatures | None) -> Tensor:
    """CREPA's loss of the last forward. Not by `crepa.loss`, which reads numbers that are not there."""
    config, student = crepa.config, crepa.captured()
    if features is None:
        whole = student.gathered()
        features = TeacherFeatures(whole.hidden_states.detach(), whole.layout.grid)
    of_tokens: dict[str, Any] = {}
    of_group: dict[str, Any] = {}
    if (shard := student.layout.shard) is not None:
        if compares_own_tokens(config):
            of_tokens, of_group = {"token_range": shard.token_range}, {"context_group": shard.group}
        else:
            student = student.gathered()
    projector: Any = crepa.projector
    sides = Sides.of(config, projector, student, features)
    loss: Tensor = sides.given_to(crepa_loss, **of_tokens, **config.loss_options()).loss
    if config.crepa_relational_weight > 0:
        loss = loss + sides.given_to(relational_loss, **of_tokens, **of_group, **config.relational_options())
    return loss
