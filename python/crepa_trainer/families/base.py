"""`TrainingFamily`: one pipeline folder or hub id, from its configs to the exported weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ..loop import NoisyLatents, add_noise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TASKS = ("text2video", "image2video")
_WEIGHTS = (".safetensors", ".bin")


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

    Attributes:
        name: the family's name, the same as in `crepa_kernels.supported_families()`.
        transformer_class: the diffusers class that tells the family.
        model: folder or hub id. `task`: "text2video" or "image2video".
        configs: the parsed config.json of "transformer" and "vae", and model_index.json as "pipeline".
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    _known: ClassVar[dict[str, type[TrainingFamily]]] = {}

    def __init_subclass__(cls) -> None:
        TrainingFamily._known[cls.name] = cls

    def __init__(self, model: str, task: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self.model, self.task, self.configs = model, task, configs
        self._check_task()

    @classmethod
    def of(cls, model: str, task: str = "text2video", family: str | None = None) -> TrainingFamily:
        """The family of a pipeline folder or hub id, from its configs; no weights are loaded.

        Raises:
            ValueError: not a pipeline, a part that is missing, a transformer class of no family or of another than
                `family`, a task that this model cannot be trained for.
        """
        if task not in TASKS:
            raise ValueError(f"task = {task}: valid are {', '.join(TASKS)}")
        index = _config(model, "model_index.json")
        transformer = index.get("transformer") or [None, None]
        found = {each.transformer_class: each for each in cls._known.values()}.get(transformer[1])
        if found is None:
            known = ", ".join(f"{each.name} ({each.transformer_class})" for each in cls._known.values())
            raise ValueError(f"{model}: transformer {transformer[1]} is of no supported family; supported: {known}")
        if family not in (None, found.name):
            raise ValueError(f"family = {family}, but {model} has a {found.transformer_class} ({found.name})")
        missing = [part for part in found.parts if not _has_part(model, index, part)]
        if missing:
            raise ValueError(
                f"{model} lacks {', '.join(missing)}: a {found.name} pipeline has {', '.join(found.parts)}"
            )
        configs = {part: _config(model, "config.json", part) for part in ("transformer", "vae")}
        return found(model, task, {"pipeline": index, **configs})

    @abstractmethod
    def _check_task(self) -> None:
        """ValueError where the model cannot be trained for `task`."""

    @abstractmethod
    def check_bucket(self, bucket: ClipSize) -> None:
        """ValueError for a size that VAE and patches cannot make, or a frame count that the VAE cannot make."""

    @abstractmethod
    def latent_shape(self, bucket: ClipSize) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a clip's latents, from configs alone."""

    @abstractmethod
    def token_grid(self, bucket: ClipSize) -> tuple[int, int, int]:
        """(frames, height, width) of a clip's tokens in the transformer, from configs alone."""

    def tokens_per_frame(self, bucket: ClipSize) -> int:
        """Tokens of one token frame."""
        _, height, width = self.token_grid(bucket)
        return height * width

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width D of a block's output."""

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Number of the transformer's blocks."""

    @abstractmethod
    def load_transformer(self, dtype: torch.dtype) -> torch.nn.Module:
        """The transformer, frozen, in train mode."""

    @abstractmethod
    def load_vae(self, dtype: torch.dtype) -> torch.nn.Module:
        """The VAE, frozen, in eval mode."""

    @abstractmethod
    def load_text(self, dtype: torch.dtype) -> DiffusionPipeline:
        """Tokenizer and text encoder in a pipeline without the rest; move it with `.to(device)`."""

    @abstractmethod
    def encode_text(self, parts: DiffusionPipeline, prompts: Sequence[str]) -> list[Tensor]:
        """The pipeline's own embedding of each prompt, (L, d), in the encoder's type, on its device."""

    @abstractmethod
    def encode_latents(self, vae: torch.nn.Module, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, T, h, w), normalised as the transformer sees them, of pixels (B, P, 3, H, W) uint8.

        A sample of the VAE's distribution with a generator, its mode without.
        """

    def noisy(self, latents: Tensor, noise: Tensor, time: Tensor) -> NoisyLatents:
        """Clean latents (B, C, T, h, w) at noise level `time` (B,) in [0, 1], and what is to be predicted there."""
        return add_noise(latents, noise, time)

    @abstractmethod
    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        """The transformer's prediction of `noisy.target`, (B, C, T, h, w). `batch` has `text` (B, L, d)."""

    @abstractmethod
    def pipeline(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> DiffusionPipeline:
        """A pipeline without text side that samples with prompt embeddings."""

    def sample(
        self,
        pipeline: Any,
        text: Tensor,
        negative: Tensor | None,
        size: ClipSize,
        *,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        image: Tensor | None = None,
    ) -> np.ndarray:
        """A clip (P, H, W, 3) in [0, 1] of a prompt's embedding (L, d); `image` (3, H, W) begins it where it is given.

        `negative` (L, d) is only needed with a guidance above 1.
        """
        given = {} if image is None else {"image": image[None]}
        clip: np.ndarray = pipeline(
            prompt_embeds=text[None],
            negative_prompt_embeds=None if negative is None else negative[None],
            height=size.height,
            width=size.width,
            num_frames=size.frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
            **given,
        ).frames[0]
        return clip

    @abstractmethod
    def save_lora(self, transformer: torch.nn.Module, folder: Path) -> Path:
        """Writes the adapter's weights for the pipeline's `load_lora_weights`; returns the file."""


def _config(model: str, name: str, part: str | None = None) -> Mapping[str, Any]:
    from diffusers import AutoModel, DiffusionPipeline

    loader: Any = DiffusionPipeline if part is None else AutoModel
    where = name if part is None else f"{part}/{name}"
    # diffusers would take another folder's file of that name, and ask the hub for a folder that is misspelt.
    if Path(model).is_dir():
        if not (Path(model) / where).is_file():
            raise ValueError(f"{model} has no {where}: model must be a diffusers pipeline folder or hub id")
    elif Path(model).is_absolute() or model.count("/") != 1:
        raise ValueError(f"model = {model}: no such folder, and not a hub id (owner/name)")
    try:
        config: Mapping[str, Any] = loader.load_config(model, subfolder=part)
    except OSError as error:
        raise ValueError(f"{model}: {where} cannot be read: {error}") from error
    return config


def _has_part(model: str, index: Mapping[str, Any], part: str) -> bool:
    if (index.get(part) or [None, None])[1] is None:
        return False
    folder = Path(model)
    if not folder.is_dir():
        return True
    names = [path.name for path in (folder / part).iterdir()] if (folder / part).is_dir() else []
    if part in ("scheduler", "tokenizer"):
        return bool(names)
    return "config.json" in names and any(name.endswith(_WEIGHTS) for name in names)
