"""`TrainingFamily`: one pipeline folder or hub id, from its configs to the exported weights."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import lcm
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from crepa_kernels.families import FAMILIES
from crepa_kernels.layouts import TokenLayout, patch_size, raster_layout
from crepa_kernels.teachers.decoding import VIDEO_VAES

from ..loop import NoisyLatents, add_noise
from .folder import constructor_defaults, has_part, read_config
from .vaes import ENCODINGS, encode

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

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
        pixel_multiple: what the pipeline asks height and width to be a multiple of, beside VAE and patches.

    Attributes:
        model: folder or hub id. `task`: "text2video" or "image2video".
        configs: the parsed configs of "transformer", with the class's defaults under it, "vae" and "scheduler", and
            model_index.json as "pipeline".
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    pipelines: ClassVar[Mapping[str, str]]
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    depth: ClassVar[tuple[str, ...]] = ("num_layers",)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    pixel_multiple: ClassVar[int] = 1
    _known: ClassVar[dict[str, type[TrainingFamily]]] = {}

    def __init_subclass__(cls) -> None:
        TrainingFamily._known[cls.name] = cls

    def __init__(self, model: str, task: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self.model, self.task, self.configs = model, task, configs
        self.row = next(row for row in FAMILIES if row.name == self.name)
        self._check_task()

    @classmethod
    def of(cls, model: str, task: str = "text2video", family: str | None = None) -> TrainingFamily:
        """The family of a pipeline folder or hub id, from its configs; no weights are loaded.

        Raises:
            ValueError: not a pipeline, a part that is missing, a transformer or VAE class of no family or of another
                than `family`, a task that this model cannot be trained for.
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
        parts = (*found.text_parts, "vae", "transformer", "scheduler")
        missing = [part for part in parts if not has_part(model, index, part)]
        if missing:
            raise ValueError(f"{model} lacks {', '.join(missing)}: a {found.name} pipeline has {', '.join(parts)}")
        vaes, vae = next(row.vaes for row in FAMILIES if row.name == found.name), index["vae"][1]
        if vae not in vaes:
            raise ValueError(f"{model}: its VAE is an {vae}; {found.name} needs an {' or '.join(vaes)}")
        configs = {"pipeline": index, "scheduler": read_config(model, "scheduler")}
        for part, kind in (("transformer", found.transformer_class), ("vae", vae)):
            # A folder that was saved by an older diffusers lacks what was added since.
            configs[part] = {**constructor_defaults(kind), **read_config(model, part)}
        return found(model, task, configs)

    def _check_task(self) -> None:
        """ValueError where the model cannot be trained for `task`."""
        if self.task not in self.pipelines:
            raise ValueError(f"task = {self.task}: {self.name} can be trained for {', '.join(self.pipelines)} alone")

    def config(self, part: str) -> SimpleNamespace:
        """A part's config as the models have theirs."""
        return SimpleNamespace(**self.configs[part])

    @property
    def compression(self) -> tuple[int, int]:
        """(pixel frames, pixels) of one latent frame and of one latent's side."""
        return ENCODINGS[str(self.vae_class)].compression(self.config("vae"))

    def check_bucket(self, bucket: ClipSize) -> None:
        """ValueError for a size that VAE and patches cannot make, or a frame count that the VAE cannot make."""
        (factor, pixels), (patch, *sides) = self.compression, patch_size(self.config("transformer"))
        height, width = (lcm(pixels * side, self.pixel_multiple) for side in sides)
        if bucket.height % height or bucket.width % width or bucket.height < height or bucket.width < width:
            raise ValueError(
                f"resolution {bucket.height}x{bucket.width}: height must be a multiple of {height}, "
                f"width of {width} (VAE and patches)"
            )
        if bucket.frames < 1 or (bucket.frames - 1) % factor:
            raise ValueError(f"frame count {bucket.frames}: the VAE makes 1 + {factor}n frames (1, {1 + factor}, ...)")
        frames = self.latent_shape(bucket)[1]
        if frames % patch:
            raise ValueError(
                f"frame count {bucket.frames}: {frames} latent frames are not a multiple of the transformer's "
                f"temporal patch {patch}"
            )

    def latent_shape(self, bucket: ClipSize) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a clip's latents, from configs alone."""
        factor, pixels = self.compression
        channels = VIDEO_VAES[str(self.vae_class)].channels(self.config("vae"))
        return channels, 1 + (bucket.frames - 1) // factor, bucket.height // pixels, bucket.width // pixels

    def layout(self, bucket: ClipSize) -> TokenLayout:
        """How a clip's tokens lie in the transformer, from configs alone."""
        return raster_layout(self.config("transformer"), self.latent_shape(bucket)[1:])

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
        return self.row.hidden_size(self.config("transformer"))

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
        model: torch.nn.Module = _diffusers(self.transformer_class).from_pretrained(
            self.model, subfolder="transformer", torch_dtype=dtype
        )
        return model.requires_grad_(False).train()

    def load_vae(self, dtype: torch.dtype) -> torch.nn.Module:
        """The VAE, frozen, in eval mode."""
        vae: torch.nn.Module = _diffusers(self.vae_class).from_pretrained(
            self.model, subfolder="vae", torch_dtype=dtype
        )
        return vae.requires_grad_(False).eval()

    def load_text(self, dtype: torch.dtype) -> DiffusionPipeline:
        """Tokenizers and text encoders in a pipeline without the rest; move it with `.to(device)`."""
        import transformers

        parts: dict[str, Any] = {}
        for name in self.text_parts:
            kind = transformers.AutoTokenizer
            options = {}
            if not name.startswith("tokenizer"):
                kind, options = getattr(transformers, self.configs["pipeline"][name][1]), {"dtype": dtype}
            parts[name] = kind.from_pretrained(self.model, subfolder=name, **options)
            if options:
                parts[name].requires_grad_(False).eval()
        return self._bare_pipeline(parts)

    @abstractmethod
    def encode_text(self, parts: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        """The pipeline's own embedding of each prompt, in the encoder's type, on its device.

        A text is one or more tensors without a batch axis, e.g. `text` (L, d), `text_mask` (L,) bool; their names are
        the family's, and none of those that `CachedClips` gives. In a batch a shorter one is filled with zeros.
        """

    @torch.no_grad()
    def encode_latents(self, vae: torch.nn.Module, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, T, h, w), normalised as the transformer sees them, of pixels (B, P, 3, H, W) uint8.

        A sample of the VAE's distribution with a generator, its mode without.
        """
        return encode(vae, pixels, generator)

    def encode_clip(self, vae: torch.nn.Module, pixels: Tensor) -> dict[str, Tensor]:
        """What training needs of one clip's pixels (P, 3, H, W) uint8: fp32 `latents` (C, T, h, w), and beside them
        what else the family asks for, such as those of the first frame alone.
        """
        return {"latents": self.encode_latents(vae, pixels[None])[0].float()}

    def decode(self, vae: torch.nn.Module, latents: Tensor) -> Tensor:
        """Pixels (B, P, 3, H, W) in [0, 1] of clean latents (B, C, T, h, w), as the pipeline decodes them."""
        return VIDEO_VAES[type(vae).__name__].decode(vae, latents)

    def noise_level(self, draw: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """Levels in [0, 1] at which clips of `latent_shape` (C, T, h, w) are trained, from standard normal draws (B,).

        Logit-normal, then moved by the shift of the pipeline's scheduler as its sampling steps are.
        """
        scheduler = self.configs["scheduler"]
        return shifted(draw.sigmoid(), float(scheduler.get("flow_shift", scheduler.get("shift", 1.0))))

    def noisy(self, batch: Mapping[str, Tensor], noise: Tensor, time: Tensor) -> NoisyLatents:
        """Clean `latents` (B, C, T, h, w) at noise level `time` (B,) in [0, 1], and what is to be predicted there.

        In image to video with a clean first frame, that frame is as it was, at time 0 and not predicted, and the
        timesteps are those of each token, (B, tokens).
        """
        latents = batch["latents"]
        noisy = add_noise(latents, noise, time)
        config = self.config("transformer")
        if self.task == "text2video" or not self.row.first_frame_is_clean(config):
            return noisy
        given = torch.cat([latents[:, :, :1], noisy.latents[:, :, 1:]], dim=2)
        layout = raster_layout(config, latents.shape[2:])
        predicted = torch.ones(len(latents), layout.frames, dtype=torch.bool, device=latents.device)
        predicted[:, 0] = False
        tokens = layout.grid[0] * layout.grid[1]
        timestep = (noisy.timestep[:, None] * predicted).repeat_interleave(tokens, dim=1)
        return replace(noisy, latents=given, timestep=timestep, frame_mask=predicted)

    @abstractmethod
    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        """The transformer's prediction of `noisy.target`, (B, C, T, h, w). `batch` has the texts, with a batch axis."""

    def pipeline(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> DiffusionPipeline:
        """A pipeline without text side that samples with prompt embeddings."""
        scheduler = _diffusers(self.configs["pipeline"]["scheduler"][1]).from_pretrained(
            self.model, subfolder="scheduler"
        )
        return self._bare_pipeline({"vae": vae, "transformer": transformer, "scheduler": scheduler})

    def _bare_pipeline(self, parts: Mapping[str, Any]) -> DiffusionPipeline:
        """The task's pipeline with these parts and no others."""
        kind = _diffusers(self.pipelines[self.task])
        without = {
            name: None
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name != "self" and parameter.default is parameter.empty
        }
        pipeline: DiffusionPipeline = kind(**{**without, **parts}, **self._pipeline_settings())
        return pipeline

    def _pipeline_settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor that are not its parts."""
        return {}

    @abstractmethod
    def text_arguments(self, text: Text, negative: Text | None) -> dict[str, Any]:
        """A prompt's embedding and that of the empty one as arguments of the pipeline's call."""

    def size_arguments(self, size: ClipSize) -> dict[str, Any]:
        """A clip's size as arguments of the pipeline's call."""
        return {"height": size.height, "width": size.width, "num_frames": size.frames}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """Classifier-free guidance as arguments of the pipeline's call."""
        return {"guidance_scale": guidance}

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
        given = {} if image is None else {"image": image[None]}
        clip: np.ndarray = pipeline(
            **self.text_arguments(text, negative),
            **self.size_arguments(size),
            num_inference_steps=steps,
            **self.guidance_arguments(guidance),
            generator=generator,
            output_type="np",
            **given,
        ).frames[0]
        return clip

    def save_lora(self, transformer: torch.nn.Module, folder: Path) -> Path:
        """Writes the adapter's weights for the pipeline's `load_lora_weights`; returns the file."""
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
        from peft.utils import get_peft_model_state_dict

        _diffusers(self.pipelines[self.task]).save_lora_weights(
            folder, transformer_lora_layers=get_peft_model_state_dict(transformer)
        )
        return folder / LORA_WEIGHT_NAME_SAFE


def shifted(time: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] moved towards noise as `FlowMatchEulerDiscreteScheduler` does with `shift` > 1."""
    return shift * time / (1 + (shift - 1) * time)


def _diffusers(name: str | None) -> Any:
    import diffusers

    return getattr(diffusers, str(name))
