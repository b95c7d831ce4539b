"""What a run needs of its device's memory, term by term and phase by phase, and which settings make it fit.

Weights are counted on models without values, activations in steps on such models (`shadow`). The rest is arithmetic:

    base        frozen weights, by `base_precision`, without what `offload` keeps on the host
    trained     4 bytes a parameter: weights of the LoRA, or all of them, and CREPA's projector
    optimizer   OPTIMIZER_BYTES a trained parameter
    ema         4 bytes a parameter of the LoRA or of the model
    gradients   4 bytes a trained parameter, and on several processes as many in the buckets of their sum
    activations what one micro-batch of the largest bucket keeps at the most, by `gradient_checkpointing`
    teacher     its weights while frames are encoded in training, and what it makes of a micro-batch's frames

With `sharding` each process has its share of the first five (`shares`), and beside them two whole blocks while they
compute. With `context_parallel` the step that is counted is that of one process, on its part of each clip's tokens.

Not counted: what CUDA itself takes of a card (half a GiB or so), fragments of its allocator, workspaces of its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from crepa_kernels.regularizer.aligning import compares_own_tokens, make_projector
from crepa_kernels.teachers.encoders import FrozenEncoder
from crepa_kernels.teachers.encoding import FrameEncoder, named_encoder
from crepa_kernels.transfer import touched_frames

from ..data.cache import PROMPTS_AT_A_TIME
from ..data.names import encoder_type, teacher_device, teacher_is_encoder
from ..settings import RunSettings
from .plan import Plan
from .shadow import Features, Shadow, StepBytes, empty_transformer, empty_vae, weight_type
from .shares import Shares, Weight

if TYPE_CHECKING:
    from .plan import BucketPlan

FP32 = 4  # bytes
# Of one weight of a block's linear layers; scales of int8 and fp8 are one a row, those of nf4 one in fp32 for 64.
BASE_BYTES: Mapping[str, float] = {"fp8": 1, "int8": 1, "fp8_dynamic": 1, "nf4": 0.5 + 4 / 64}
# State of one trained parameter: so many averages in fp32, or in 8 bits with a scale in fp32 for 256.
_EIGHT_BITS = 1 + 4 / 256
OPTIMIZER_BYTES: Mapping[str, float] = {
    **dict.fromkeys(("adamw", "adam", "nadam", "radam", "adamax", "adamw_schedulefree", "radam_schedulefree"), 8),
    **dict.fromkeys(("adagrad", "rmsprop", "lion", "muon", "sgd_schedulefree"), 4),
    **dict.fromkeys(("adamw8bit", "adam8bit", "paged_adamw8bit"), 2 * _EIGHT_BITS),
    "ademamix8bit": 3 * _EIGHT_BITS,
    "lion8bit": _EIGHT_BITS,
    "adafactor": 0,  # a row and a column of each matrix
    "prodigy": 16,
    "sgd": 0,  # 4 with a momentum, which is an argument
}
# Blocks on the device under `offload`: the one that runs, and the next one, which is on its way.
_BLOCKS_THERE = 2


@dataclass(frozen=True)
class Choices:
    """The settings that trade memory for time or exactness."""

    gradient_checkpointing: bool = True
    cache_teacher: str = "frames"
    vae_tiling: bool = False
    offload: str = "none"
    base_precision: str = "bf16"
    optimizer: str = "adamw"
    teacher_offload: bool = False
    sharding: str = "none"

    @classmethod
    def of(cls, settings: RunSettings) -> Choices:
        """As a run's settings say."""
        given = {key: getattr(settings, key) for key in cls.__dataclass_fields__ if key in RunSettings.model_fields}
        return cls(**given)


# What can be switched on, what costs least first: `(setting, value)`.
REMEDIES: tuple[tuple[str, Any], ...] = (
    ("gradient_checkpointing", True),
    ("cache_teacher", "features"),
    ("vae_tiling", True),
    ("offload", "block"),
    ("sharding", "fsdp2"),
    ("base_precision", "fp8"),
    ("base_precision", "nf4"),
    ("offload", "leaf"),
    ("optimizer", "adamw8bit"),
)


_WORTH = 0.01  # of what is needed; for less nobody changes a setting


@dataclass(frozen=True)
class Phase:
    """A part of a run: bytes by what they are, all at the moment when there are most of them."""

    name: str
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Remedy:
    """A setting with which, beside those before it, `saved` bytes less are needed, and `need` then."""

    key: str
    value: Any
    saved: int
    need: int


def state_bytes(optimizer: str, parameters: int) -> int:
    """Bytes of an optimizer's state of trained parameters in fp32; of one that is not in the table as AdamW's."""
    return ceil(OPTIMIZER_BYTES.get(optimizer, OPTIMIZER_BYTES["adamw"]) * parameters)


@dataclass(frozen=True)
class BaseWeights:
    """Frozen weights of the transformer.

    Attributes:
        outside: bytes of those that are in no block.
        other: bytes of the blocks' norms, biases and tables, which no precision changes.
        linear: bytes of their linear layers' weights in the run's own type; `numbers`: how many these are.
        widest: bytes of the largest of these weights; `blocks`: number of blocks.
    """

    outside: int
    other: int
    linear: int
    numbers: int
    widest: int
    blocks: int

    def on_device(self, precision: str = "bf16", offload: str = "none") -> int:
        """Bytes on the device in training."""
        linear, working = self.linear, 0
        if precision in BASE_BYTES:
            # The layer that runs is there in the type of the products too.
            linear, working = ceil(BASE_BYTES[precision] * self.numbers), self.widest
        there = self.other + linear
        if offload == "block":
            there = min(there, ceil(there * _BLOCKS_THERE / self.blocks))
        elif offload == "leaf":
            # A block's layers are all there once more in its backward.
            there = self.other + ceil(linear / self.blocks)
        return self.outside + there + working


class RunMemory:
    """What a planned run needs of its device on each process. Every number is counted when it is first asked for.

    RuntimeError where a model runs operations that have no answer without values.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.settings, self.family = plan, plan.settings, plan.family
        self.chosen, self.device = Choices.of(plan.settings), torch.device(plan.device_type)
        self._place = teacher_device(self.settings, self.device)
        # On another card, or on the host, it takes nothing of this one.
        self._taught_here = self._place.type == self.device.type and not self._place.index

    def phases(self, choices: Choices | None = None) -> list[Phase]:
        """Those of the run in their order, with these settings in the place of its own."""
        found = [self.texts(), self.clips(choices), self.training(choices)]
        return [*found, self.validation(choices)] if self.plan.validations else found

    def need(self, choices: Choices | None = None) -> int:
        """The most that any phase needs."""
        return max(phase.total for phase in self.phases(choices))

    def remedies(self, available: int) -> list[Remedy]:
        """Settings to change until it fits into so many bytes, what costs least first; none where it fits.

        Only those that a run has and that go with its own, and of which each saves a hundredth or more.
        """
        applied: dict[str, Any] = {}
        found: dict[str, Remedy] = {}
        need = self.need()
        for key, value in REMEDIES:
            if need <= available:
                break
            if self._goes(applied, key, value):
                less = self.need(replace(self.chosen, **{**applied, key: value}))
                if need - less > _WORTH * need:
                    before = found.pop(key, None)
                    found[key] = Remedy(key, value, need - less + (before.saved if before else 0), less)
                    applied[key], need = value, less
        return list(found.values())

    def _goes(self, applied: Mapping[str, Any], key: str, value: Any) -> bool:
        """Whether a setting can be changed beside those that are, and was not chosen for another reason."""
        if key not in RunSettings.model_fields or getattr(self.chosen, key) == value:
            return False
        if key == "optimizer" and self.chosen.optimizer != "adamw":
            return False
        if key == "cache_teacher" and not teacher_is_encoder(self.plan.config):
            return False
        # One process has nobody to share with, and several do not offload.
        if key in ("sharding", "offload") and (self.plan.processes == 1) is (key == "sharding"):
            return False
        try:
            self.settings.replace(**{**applied, key: value})
        except ValueError:  # the settings' own rules
            return False
        return True

    def activations(self, *, checkpointing: bool) -> int:
        """Bytes of a micro-batch between the start of its forward and the end of its backward, at the most, without the
        frames that the teacher sees.
        """
        return self._step(checkpointing).peak + self.plan.layersync

    @cached_property
    def base(self) -> BaseWeights:
        """The transformer's frozen weights; none where all are trained."""
        model = empty_transformer(self.settings, self.family)
        blocks = self.family.row.blocks(model)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        matrices = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Linear)}
        sizes = {"outside": 0, "other": 0, "linear": 0, "numbers": 0, "widest": 0}
        for name, each in model.named_parameters():
            if each.requires_grad:
                continue
            size = each.numel() * weight_type(name, self.settings, model).itemsize
            if id(each) not in inside:
                sizes["outside"] += size
            elif id(each) in matrices:
                sizes["linear"] += size
                sizes["numbers"] += each.numel()
                sizes["widest"] = max(sizes["widest"], size)
            else:
                sizes["other"] += size
        return BaseWeights(**sizes, blocks=len(blocks))

    @cached_property
    def shares(self) -> Shares:
        """Of transformer and projector on each of the run's processes, under FSDP2."""
        model = empty_transformer(self.settings, self.family)
        of = {id(p): n for n, block in enumerate(self.family.row.blocks(model)) for p in block.parameters()}
        weights = [
            Weight(each.shape, weight_type(name, self.settings, model).itemsize, each.requires_grad, of.get(id(each)))
            for name, each in model.named_parameters()
        ]
        return Shares.of(weights, [Weight(shape, FP32, True) for shape in self._projector], self.plan.processes)

    @cached_property
    def _projector(self) -> list[torch.Size]:
        config = self.plan.config
        if not config.crepa_enabled:
            return []
        with torch.device("meta"):
            made = make_projector(config, self.family.hidden_size, self._feature_size or self.family.hidden_size)
        return [each.shape for each in made.parameters()]

    @property
    def projector(self) -> int:
        """Parameters of CREPA's projector."""
        return sum(shape.numel() for shape in self._projector)

    @property
    def _largest(self) -> BucketPlan:
        size = self.settings.batch_size
        return max(self.plan.buckets, key=lambda each: min(size, each.clips) * each.tokens)

    @property
    def _feature_size(self) -> int | None:
        config = self.plan.config
        return FrameEncoder.from_config(config).feature_size() if teacher_is_encoder(config) else None

    @cached_property
    def _shadow(self) -> Shadow:
        plan, each, features = self.plan, self._largest, None
        if (width := self._feature_size) is not None:
            dtype = named_encoder(plan.config.crepa_encoder).dtype(self._place)
            features = Features(each.teacher_grid or each.grid, width, dtype)
        clips = min(self.settings.batch_size, each.clips)
        return Shadow(self.settings, plan.config, self.family, each.bucket, clips, features)

    @cache  # noqa: B019 - as long as a plan is looked at
    def _step(self, checkpointing: bool) -> StepBytes:
        return self._shadow.step(checkpointing=checkpointing)

    @cache  # noqa: B019
    def _vae(self, way: str, tiling: bool) -> int:
        passed: int = getattr(self._shadow, way)(tiling=tiling)
        return passed

    @cached_property
    def denoising(self) -> int:
        """Bytes beside the weights in one step of a sample."""
        return self._shadow.denoising()

    @cached_property
    def _vae_weights(self) -> int:
        return FP32 * sum(each.numel() for each in empty_vae(self.family).parameters())

    @cached_property
    def _teacher_weights(self) -> int:
        if not teacher_is_encoder(self.plan.config) or not self._taught_here:
            return 0
        encoder = named_encoder(self.plan.config.crepa_encoder)
        return encoder.parameters() * encoder.dtype(self._place).itemsize

    @cache  # noqa: B019
    def _teaching(self, clips: int) -> int:
        """Bytes of one pass over the frames of so many clips; of an encoder that was given nothing is known."""
        config, each = self.plan.config, self._largest
        encoder = named_encoder(config.crepa_encoder)
        if isinstance(encoder, FrozenEncoder) or each.encoded is None or not self._taught_here:
            return 0
        frames, limit = clips * self._frames_seen, config.crepa_encoder_frames_batch_size
        height, width = each.teacher_grid or each.grid
        patch = encoder.patch_size
        size = (patch * height, patch * width)
        at_a_time = min(frames, limit) if limit > 0 else frames
        return self._shadow.teaching(encoder, encoder.dtype(self._place), at_a_time, size)

    @property
    def _frames_seen(self) -> int:
        """Of a clip by the teacher in one process; where tokens are shared out, the most that teach those of one."""
        each, degree = self._largest, self.settings.context_parallel
        if degree == 1 or not compares_own_tokens(self.plan.config):
            return each.encoded or 0
        length, neighbours = each.tokens // degree, self.plan.config.neighbours
        ranges = ((rank * length, (rank + 1) * length) for rank in range(degree))
        wanted = [neighbours.around(touched_frames(own, each.tokens_per_frame), each.frames) for own in ranges]
        return ceil((each.encoded or 0) * max(map(len, wanted)) / each.frames)

    def texts(self) -> Phase:
        """Text encoders, and the widest layer's rows and scores of a round of prompts."""
        dtype, counted = encoder_type(self.device), [self._of_transformers(part) for part in self._encoders]
        rows = 1 if self.family.one_prompt_at_a_time else PROMPTS_AT_A_TIME
        working = max((self._widest(config, rows * dtype.itemsize) for _, config in counted), default=0)
        weights = sum(parameters for parameters, _ in counted) * dtype.itemsize
        return Phase("encoding captions", {"text encoders": weights, "activations": working})

    @property
    def _encoders(self) -> list[str]:
        return [part for part in self.family.text_parts if not part.startswith("tokenizer")]

    @cache  # noqa: B019
    def _of_transformers(self, part: str) -> tuple[int, Any]:
        """Parameters of a part that transformers has, and its config."""
        import transformers
        from accelerate import init_empty_weights

        config = transformers.AutoConfig.from_pretrained(self.family.model, subfolder=part)
        kind: Any = getattr(transformers, self.family.configs["pipeline"][part][1])
        with init_empty_weights():
            return sum(each.numel() for each in kind(config).parameters()), config

    def _widest(self, config: Any, row: int) -> int:
        """Bytes of a layer on rows of tokens, `row` bytes for a number of each prompt: inputs, outputs, and scores."""
        text = config.get_text_config()
        length = max(self.family.text_limits.values())
        inner = getattr(text, "d_ff", None) or text.intermediate_size
        return row * length * (4 * text.hidden_size + 2 * inner + 2 * text.num_attention_heads * length)

    def clips(self, chosen: Choices | None = None) -> Phase:
        """VAE and image encoder in fp32, and where features are kept the teacher beside them."""
        chosen = chosen or self.chosen
        images = [part for part in self.family.image_parts if part != "image_processor"]
        terms = {"VAE": self._vae_weights + FP32 * sum(self._of_transformers(part)[0] for part in images)}
        working = self._vae("encoding", chosen.vae_tiling)
        if chosen.cache_teacher == "features" and teacher_is_encoder(self.plan.config):
            terms["teacher"] = self._teacher_weights
            working = max(working, self._teaching(1))
        return Phase("encoding clips", {**terms, "activations": working})

    def _held(self, chosen: Choices) -> dict[str, int]:
        """What is there from the first optimizer step on."""
        model, trained = self.plan.trained, self.plan.trained + self.projector
        if chosen.sharding == "fsdp2":
            base, model, trained = self.shares.frozen, self.shares.model, self.shares.trained
        else:
            base = self.base.on_device(chosen.base_precision, chosen.offload)
        return {
            "transformer": base,
            "trained": FP32 * trained,
            "optimizer": state_bytes(chosen.optimizer, trained),
            "EMA": 0 if self.settings.ema_decay is None else FP32 * model,
        }

    def training(self, chosen: Choices | None = None) -> Phase:
        """What is there in every step, and gradients, activations and the teacher at its worst moment."""
        chosen = chosen or self.chosen
        held, step, layersync = self._held(chosen), self._step(chosen.gradient_checkpointing), self.plan.layersync
        gradients, gathered = held["trained"], self._gathered(chosen)
        teacher = teaching = frames = 0
        if chosen.cache_teacher == "frames" and (encoded := self._largest.encoded) is not None:
            teacher = self._teacher_weights
            teaching = self._teaching(self._shadow.clips)
            frames = self._shadow.clips * encoded * 3 * self._largest.bucket.height * self._largest.bucket.width
        resident = 0 if chosen.teacher_offload else teacher
        peak, kept = (each + layersync + frames for each in (step.peak, step.kept))
        # Gradients and activations, at the moments of which one has most: those of earlier micro-batches are there
        # throughout, those of this one come block by block, as what the blocks kept goes.
        earlier = gradients if self.settings.gradient_accumulation_steps > 1 else 0
        blocks = self.base.blocks
        moments = [
            (earlier, peak, 0, gathered),
            (max(earlier, gradients - gradients // blocks), max(peak - (blocks - 1) * step.block, 0), 0, gathered),
            (gradients, self._working(gradients), 0, 0),
            (earlier, kept, teaching + teacher - resident, 0),
        ]
        grads, active, taught, whole = max(moments, key=sum)
        buckets = gradients if self.plan.processes > 1 and chosen.sharding == "none" else 0
        terms = {**held, "gathered": whole, "gradients": grads + buckets, "activations": active}
        return Phase("training", {**terms, "teacher": resident + taught})

    def _gathered(self, chosen: Choices) -> int:
        return self.shares.gathered if chosen.sharding == "fsdp2" else 0

    def _working(self, gradients: int) -> int:
        """Bytes of an optimizer step beside its state: on a GPU all parameters are taken together."""
        return gradients if self.device.type == "cuda" else 0

    def validation(self, chosen: Choices | None = None) -> Phase:
        """What training leaves there, the VAE in fp32, and a clip while it is denoised or decoded."""
        chosen = chosen or self.chosen
        held = self._held(chosen)
        if self.family.expert is not None:
            # Of two transformers the other is loaded too, in the type of the trained one.
            full = self.settings.training == "full"
            held["transformer"] += FP32 * self.plan.parameters if full else self.base.on_device()
        held["gathered"] = self._gathered(chosen)
        working = max(self.denoising, self._vae("decoding", chosen.vae_tiling))
        return Phase("validation", {**held, "VAE": self._vae_weights, "activations": working})
