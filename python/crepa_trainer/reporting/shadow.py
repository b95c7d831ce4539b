"""Steps of a run on tensors that have shapes and no values: the bytes that are alive in them, for a plan.

Every operator of the model runs as in training, under autograd, autocast and gradient checkpointing, and PyTorch's fake
tensors answer with shapes alone. So what a family's blocks keep is not written down a second time here. The operators
are those of a CPU; attention is taken by a fused kernel there as on a GPU, which keeps nothing of tokens x tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from crepa_kernels import CrepaRegularizer, crepa_loss, relational_loss
from crepa_kernels.regularizer.aligning import Sides
from crepa_kernels.teachers import TeacherFeatures
from crepa_kernels.teachers.encoding import NamedEncoder, resized

from ..state import PRECISIONS, add_lora
from ..step import flow_matching_loss

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig

    from ..families import TrainingFamily
    from ..settings import RunSettings
    from .plan import BucketPlan

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


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one forward and backward beside weights and their gradients.

    `kept`: between the two; `peak`: the most at a time; `block`: what each further block of the deepest kind adds.
    """

    kept: int
    peak: int
    block: int


def empty_transformer(settings: RunSettings, family: TrainingFamily, depth: Mapping[str, int] | None = None) -> Any:
    """The transformer with its LoRA on the meta device. depth: in the place of what its config says."""
    import diffusers

    kind = getattr(diffusers, family.transformer_class)
    with init_empty_weights():
        transformer: Any = kind.from_config({**family.configs["transformer"], **(depth or {})})
        full = settings.training == "full"
        transformer.requires_grad_(full)
        if not full:
            add_lora(transformer, family, settings)
    return transformer


def weight_type(name: str, trained: bool, settings: RunSettings, transformer: Any) -> torch.dtype:
    """What a run holds a parameter in: fp32 if it is trained, or diffusers keeps it so, else `mixed_precision`."""
    kept = transformer._keep_in_fp32_modules or ()
    if trained or settings.training == "full" or any(part in kept for part in name.split(".")):
        return torch.float32
    return PRECISIONS[settings.mixed_precision]


def _without_values(module: nn.Module, shapes: FakeTensorMode, types: Mapping[str, torch.dtype]) -> None:
    """Gives parameters of the meta device a place on the CPU, and no values."""
    with shapes:
        for name, parameter in list(module.named_parameters()):
            owner, _, own = name.rpartition(".")
            made = torch.empty(parameter.shape, dtype=types[name])
            setattr(module.get_submodule(owner), own, nn.Parameter(made, requires_grad=parameter.requires_grad))


def step_bytes(
    settings: RunSettings,
    config: CrepaConfig,
    family: TrainingFamily,
    bucket: BucketPlan,
    teacher: tuple[torch.dtype, int] | None,
    *,
    checkpointing: bool,
) -> StepBytes:
    """Of a micro-batch of a bucket's clips, with CREPA's loss where it is on.

    teacher: type and width of its features, None where no encoder teaches.
    """
    whole = {key: int(family.configs["transformer"][key]) for key in family.depth}
    short = {key: min(_SHORTEST, number) for key, number in whole.items()}

    def traced(depth: Mapping[str, int]) -> StepBytes:
        return _traced_step(settings, config, family, bucket, teacher, depth, checkpointing=checkpointing)

    first = traced(short)
    kept, peak, block = first.kept, first.peak, 0
    for key, number in whole.items():
        if number > short[key]:
            more = traced({**short, key: short[key] + 1})
            kept += (number - short[key]) * (more.kept - first.kept)
            peak += (number - short[key]) * (more.peak - first.peak)
            block = max(block, more.kept - first.kept)
    return StepBytes(kept, peak, block)


def _traced_step(
    settings: RunSettings,
    config: CrepaConfig,
    family: TrainingFamily,
    bucket: BucketPlan,
    teacher: tuple[torch.dtype, int] | None,
    depth: Mapping[str, int],
    *,
    checkpointing: bool,
) -> StepBytes:
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    transformer = empty_transformer(settings, family, depth)
    trained = {name: each.requires_grad for name, each in transformer.named_parameters()}
    types = {name: weight_type(name, each, settings, transformer) for name, each in trained.items()}
    _without_values(transformer, shapes, types)
    transformer.train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    crepa = None
    if config.crepa_enabled:
        # Which block it is changes nothing, and these are there at any depth.
        deeper = {"crepa_teacher_block_index": 1} if config.crepa_feature_source == "backbone" else {}
        at = config.replace(crepa_block_index=0, crepa_backend="torch", **deeper)
        with torch.random.fork_rng(devices=[]):
            crepa = CrepaRegularizer(at, transformer, max_train_steps=settings.max_train_steps, feature_size=_width(teacher))
    _drop_gradients(transformer)
    with _counted(shapes, transformer) as live:
        clips = min(settings.batch_size, bucket.clips)
        blank = {**family.blank_clip(bucket.bucket), **family.blank_text()}
        batch = {name: torch.stack([each] * clips) for name, each in blank.items()}
        del blank
        noise = torch.empty_like(batch["latents"])
        noisy = family.noisy(batch, noise, torch.full((clips,), 0.5))
        features = None
        if teacher is not None:
            dtype, width = teacher
            grid = bucket.teacher_grid or bucket.grid
            of_frames = torch.empty(clips, bucket.frames, grid[0] * grid[1], width, dtype=dtype)
            features = TeacherFeatures(of_frames, grid)
        live.peak = live.now
        with _autocast(settings):
            prediction = family.predict(transformer, noisy, batch).float()
        loss = flow_matching_loss(prediction, noisy)
        if crepa is not None:
            loss = loss + _alignment(crepa, features)
            crepa.release()
        kept = live.now
        loss.backward()
        return StepBytes(kept, live.peak, 0)


def _width(teacher: tuple[torch.dtype, int] | None) -> int | None:
    return None if teacher is None else teacher[1]


def _drop_gradients(transformer: nn.Module) -> None:
    """As soon as they are made: how many there are at a time is known without this."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for each in transformer.parameters():
        if each.requires_grad:
            each.register_post_accumulate_grad_hook(drop)


def _autocast(settings: RunSettings) -> Any:
    dtype = PRECISIONS[settings.mixed_precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def _alignment(crepa: CrepaRegularizer, features: TeacherFeatures | None) -> Tensor:
    """CREPA's loss of the last forward. Not by `crepa.loss`, which reads numbers that are not there."""
    config, student = crepa.config, crepa.captured()
    if features is None:
        features = TeacherFeatures(student.hidden_states.detach(), student.layout.grid)
    projector: Any = crepa.projector
    sides = Sides.of(config, projector, student, features)
    loss: Tensor = sides.given_to(crepa_loss, **config.loss_options()).loss
    if config.crepa_relational_weight > 0:
        loss = loss + sides.given_to(relational_loss, **config.relational_options())
    return loss
