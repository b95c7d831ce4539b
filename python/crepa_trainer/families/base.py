"""`TrainingFamily`: one pipeline folder or hub id, from its configs to the exported weights."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from crepa_kernels.families import FAMILIES
from crepa_kernels.layouts import TokenLayout, raster_layout
from crepa_kernels.teachers.decoding import VIDEO_VAES

from ..loop import NoisyLatents, add_noise
from .folder import constructor_defaults, has_part, read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..settings import RunSettings

TASKS = ("text2video", "image2video")

# Embedding of one prompt: tensors by name, without a batch axis.
Text = Mapping[str, Tensor]


class ClipSize(Protocol):
    """Size of a training clip in pixels and pixel frames."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def frames(self) -> int: ...


class TrainingFamily(ABC):
    """A pipeline in the hub's layout, of one family. Made by `TrainingFamily.of`, which reads configs alone.

    Class attributes:
        name: the family's name, the same as in `crepa_kernels.supported_families()`.
        transformer_class: the diffusers class that tells the family.
        pipelines: the diffusers pipeline of each task that the family has.
        parts, text_parts: parts that a pipeline's folder must have, and those of them that only encode text.
        depth: keys of the transformer's config that say how many blocks it has.
        lora_targets: attention projections that get a LoRA when the settings name none.

    Attributes:
        model: folder or hub id. `task`: "text2video" or "image2video".
        expert: "high" or "low" where the pipeline has a transformer for each side of a noise level, else None.
        transformer_part: the pipeline's part that is trained.
        configs: the parsed configs of "transformer", with the class's defaults under it, "vae" and "scheduler", and
            model_index.json as "pipeline".
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    pipelines: ClassVar[Mapping[str, str]]
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    depth: ClassVar[tuple[str, ...]] = ("num_layers",)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    _known: ClassVar[dict[str, type[TrainingFamily]]] = {}

    def __init_subclass__(cls) -> None:
        TrainingFamily._known[cls.name] = cls

    def __init__(
        self, model: str, task: str, configs: Mapping[str, Mapping[str, Any]], expert: str | None = None
    ) -> None:
        self.model, self.task, self.configs, self.expert = model, task, configs, expert
        self.row = next(row for row in FAMILIES if row.name == self.name)
        if self.vae_class not in self.row.vaes:
            raise ValueError(f"{model}: its VAE is an {self.vae_class}; {self.name} needs {' or '.join(self.row.vaes)}")
        self._check_task()

    @classmethod
    def of(
        cls, model: str, task: str = "text2video", family: str | None = None, expert: str | None = None
    ) -> TrainingFamily:
        """The family of a pipeline folder or hub id, from its configs; no weights are loaded.

        Raises:
            ValueError: not a pipeline, a part that is missing, a transformer or VAE class of no family or of another
                than `family`, a task that this model cannot be trained for, an expert that it does not have, none
                named where it has two.
        """
        if task not in TASKS:
            raise ValueError(f"task = {task}: valid are {', '.join(TASKS)}")
        index = read_config(model)
        transformer = index.get("transformer") or [None, None]
        found = {each.transformer_class: each for each in cls._known.values()}.get(transformer[1])
        if found is None:
            known = ", ".join(f"{each.name} ({each.transformer_class})" for each in cls._known.values())
            raise ValueError(f"{model}: transformer {transformer[1]} is of no supported family; supported: {known}")
        if family not in (None, found.name):
            raise ValueError(f"family = {family}, but {model} has a {found.transformer_class} ({found.name})")
        trained = found.part_of_expert(model, index, expert)
        parts = (*found.text_parts, "vae", *dict.fromkeys(("transformer", trained)), "scheduler")
        missing = [part for part in parts if not has_part(model, index, part)]
        if missing:
            raise ValueError(f"{model} lacks {', '.join(missing)}: a {found.name} pipeline has {', '.join(parts)}")
        configs = {part: read_config(model, part) for part in ("vae", "scheduler")}
        # A folder that was saved by an older diffusers lacks what was added since.
        configs["transformer"] = {**constructor_defaults(found.transformer_class), **read_config(model, trained)}
        return found(model, task, {"pipeline": index, **configs}, expert)

    @classmethod
    def part_of_expert(cls, model: str, index: Mapping[str, Any], expert: str | None) -> str:
        """The part of a pipeline with this model_index.json that is trained. ValueError for an expert it lacks."""
        if expert is not None:
            raise ValueError(f"expert = {expert}: {model} has one transformer, which is trained at all noise levels")
        return "transformer"

    @property
    def transformer_part(self) -> str:
        return self.part_of_expert(self.model, self.configs["pipeline"], self.expert)

    def check_run(self, settings: RunSettings, device_type: str) -> None:  # noqa: B027
        """ValueError for what this model cannot be trained with, on a device of this type."""

    def _check_task(self) -> None:
        """ValueError where the model cannot be trained for `task`."""
        if self.task not in self.pipelines:
            raise ValueError(f"task = {self.task}: {self.name} can be trained for {', '.join(self.pipelines)} alone")

    @abstractmethod
    def check_bucket(self, bucket: ClipSize) -> None:
        """ValueError for a size that VAE and patches cannot make, or a frame count that the VAE cannot make."""

    @abstractmethod
    def latent_shape(self, bucket: ClipSize) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a clip's latents, from configs alone."""

    def layout(self, bucket: ClipSize) -> TokenLayout:
        """How a clip's tokens lie in the transformer, from configs alone."""
        return raster_layout(SimpleNamespace(**self.configs["transformer"]), self.latent_shape(bucket)[1:])

    def token_grid(self, bucket: ClipSize) -> tuple[int, int, int]:
        """(frames, height, width) of a clip's tokens in the transformer, from configs alone."""
        layout = self.layout(bucket)
        return layout.frames, *layout.grid

    def tokens_per_frame(self, bucket: ClipSize) -> int:
        """Tokens of one token frame."""
        _, height, width = self.token_grid(bucket)
        return height * width

    @property
    def hidden_size(self) -> int:
        """Width D of a block's output."""
        return self.row.hidden_size(SimpleNamespace(**self.configs["transformer"]))

    @property
    def blocks(self) -> int:
        """Number of the transformer's blocks."""
        return sum(int(self.configs["transformer"][key]) for key in self.depth)

    @property
    def vae_class(self) -> str | None:
        """The diffusers class of the VAE."""
        name: str | None = self.configs["pipeline"]["vae"][1]
        return name

    def load_transformer(self, dtype: torch.dtype) -> torch.nn.Module:
        """The transformer, frozen, in train mode."""
        return self._load(self.transformer_part, dtype).train()

    def _load(self, part: str, dtype: torch.dtype) -> torch.nn.Module:
        model: torch.nn.Module = _diffusers(self.transformer_class).from_pretrained(
            self.model, subfolder=part, torch_dtype=dtype
        )
        return model.requires_grad_(False)

    def load_vae(self, dtype: torch.dtype) -> torch.nn.Module:
        """The VAE, frozen, in eval mode."""
        vae: torch.nn.Module = _diffusers(self.vae_class).from_pretrained(
            self.model, subfolder="vae", torch_dtype=dtype
        )
        return vae.requires_grad_(False).eval()

    def load_text(self, dtype: torch.dtype) -> DiffusionPipeline:
        """Tokenizers and text encoders in a pipeline without the rest; move it with `.to(device)`."""
        without = dict.fromkeys(("vae", "transformer", "scheduler"))
        pipeline: DiffusionPipeline = _diffusers(self.pipelines[self.task]).from_pretrained(
            self.model, torch_dtype=dtype, **without
        )
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        return pipeline

    @abstractmethod
    def encode_text(self, parts: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        """The pipeline's own embedding of each prompt, in the encoder's type, on its device.

        A text is one or more tensors without a batch axis, e.g. `text` (L, d), `text_mask` (L,) bool; their names are
        the family's, and none of those that `CachedClips` gives. In a batch a shorter one is filled with zeros.
        """

    @abstractmethod
    def encode_latents(self, vae: torch.nn.Module, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, T, h, w), normalised as the transformer sees them, of pixels (B, P, 3, H, W) uint8.

        A sample of the VAE's distribution with a generator, its mode without.
        """

    @property
    def image_parts(self) -> tuple[str, ...]:
        """Parts of the pipeline that encode the given image, beside the VAE."""
        return ()

    def load_image_encoder(self) -> DiffusionPipeline | None:
        """`image_parts` in a pipeline without the rest, frozen, in fp32; None where there are none."""
        return None

    def encode_clip(self, vae: torch.nn.Module, pixels: Tensor, image_encoder: Any = None) -> dict[str, Tensor]:
        """What training needs of one clip's pixels (P, 3, H, W) uint8: fp32 `latents` (C, T, h, w), and beside them
        what else the family asks for, such as those of the first frame alone.

        image_encoder: of `load_image_encoder`.
        """
        return {"latents": self.encode_latents(vae, pixels[None])[0].float()}

    def decode(self, vae: torch.nn.Module, latents: Tensor) -> Tensor:
        """Pixels (B, P, 3, H, W) in [0, 1] of clean latents (B, C, T, h, w), as the pipeline decodes them."""
        return VIDEO_VAES[type(vae).__name__].decode(vae, latents)

    def noise_level(self, draw: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """Levels in [0, 1] at which clips of `latent_shape` (C, T, h, w) are trained, from standard normal draws (B,).

        Logit-normal, then moved by the shift of the pipeline's scheduler as its sampling steps are.
        """
        return shifted(draw.sigmoid(), scheduler_shift(self.configs["scheduler"]))

    def noisy(self, batch: Mapping[str, Tensor], noise: Tensor, time: Tensor) -> NoisyLatents:
        """Clean `latents` (B, C, T, h, w) at noise level `time` (B,) in [0, 1], and what is to be predicted there."""
        return add_noise(batch["latents"], noise, time)

    @abstractmethod
    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        """The transformer's prediction of `noisy.target`, (B, C, T, h, w). `batch` has the texts, with a batch axis."""

    def pipeline(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> DiffusionPipeline:
        """A pipeline without text side that samples with prompt embeddings."""
        kind = _diffusers(self.pipelines[self.task])
        scheduler = _diffusers(self.configs["pipeline"]["scheduler"][1])
        parts: dict[str, Any] = {
            name: None
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name != "self" and parameter.default is parameter.empty
        }
        parts |= self._pipeline_models(transformer, vae)
        parts["scheduler"] = scheduler.from_pretrained(self.model, subfolder="scheduler")
        pipeline: DiffusionPipeline = kind(**parts, **self._pipeline_settings())
        return pipeline

    def _pipeline_models(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> dict[str, Any]:
        """Models that a pipeline without text side samples with."""
        return {"vae": vae, "transformer": transformer}

    def _pipeline_settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor that are not its parts."""
        return {}

    @abstractmethod
    def text_arguments(self, text: Text, negative: Text | None) -> dict[str, Any]:
        """A prompt's embedding and that of the empty one as arguments of the pipeline's call."""

    def size_arguments(self, size: ClipSize) -> dict[str, Any]:
        """A clip's size as arguments of the pipeline's call."""
        return {"height": size.height, "width": size.width, "num_frames": size.frames}

    def sample(
        self,
        pipeline: Any,
        text: Text,
        negative: Text | None,
        size: ClipSize,
        *,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        image: Tensor | None = None,
    ) -> np.ndarray:
        """A clip (P, H, W, 3) in [0, 1] of a prompt's embedding; `image` (3, H, W) begins it where it is given.

        `negative` is only needed with a guidance above 1.
        """
        given = {} if image is None else {"image": self.image_argument(image)}
        clip: np.ndarray = pipeline(
            **self.text_arguments(text, negative),
            **self.size_arguments(size),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
            **given,
        ).frames[0]
        return clip

    def image_argument(self, image: Tensor) -> Any:
        """An image (3, H, W) in [0, 1] as the pipeline's call takes it."""
        return image[None]

    def save_lora(self, transformer: torch.nn.Module, folder: Path) -> Path:
        """Writes the adapter's weights for the pipeline's `load_lora_weights`; returns the file."""
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
        from peft.utils import get_peft_model_state_dict

        _diffusers(self.pipelines[self.task]).save_lora_weights(
            folder, transformer_lora_layers=get_peft_model_state_dict(transformer)
        )
        return folder / LORA_WEIGHT_NAME_SAFE


def scheduler_shift(config: Mapping[str, Any]) -> float:
    """By how much a scheduler moves its noise levels, from its config."""
    return float(config.get("flow_shift", config.get("shift", 1.0)))


def shifted(time: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] moved towards noise as `FlowMatchEulerDiscreteScheduler` does with `shift` > 1."""
    return shift * time / (1 + (shift - 1) * time)


def _diffusers(name: str | None) -> Any:
    import diffusers

    return getattr(diffusers, str(name))
