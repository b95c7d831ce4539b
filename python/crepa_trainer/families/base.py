"""`TrainingFamily`: one pipeline folder or hub id, from its configs to the exported weights."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from crepa_kernels.models.families import FAMILIES
from crepa_kernels.models.layouts import raster_layout
from crepa_kernels.models.vaes import VAES, encode

from .folder import constructor_defaults, has_part, missing_shards, read_config
from .noise import NoisyLatents, add_noise, scheduler_shift, shifted, with_clean_first_frame, with_given_first_frame
from .sizes import ClipSize, ModelSizes
from .text_limits import TextLimits

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

TASKS = ("text2video", "image2video")

# Embedding of one prompt: tensors by name, without a batch axis.
Text = Mapping[str, Tensor]


class TrainingFamily(ModelSizes, TextLimits, ABC):
    """A pipeline in the hub's layout, of one family. Made by `TrainingFamily.of`, which reads configs alone.

    Class attributes, beside those of `ModelSizes`:
        transformer_class: the diffusers class that tells the family.
        pipelines: the diffusers pipeline of each task that the family has.
        text_parts: parts of its folder that only encode text.
        text_keys: what is kept of the first values of the pipeline's `encode_prompt`, in their order, by the names in a
            text, with the argument of the pipeline's call that takes each.
        text_widths: keys of the transformer's config that say how wide the tensors of a text are, by their names in it.
        one_prompt_at_a_time: whether texts are encoded one by one.
        encodes_first_frame: whether image to video needs latents of the first pixel frame alone, which the VAE makes
            others of than of the frame with those after it.
        shares_tokens: whether diffusers trains it with the tokens of a clip shared out over processes: its class has a
            plan for that, and attention to text, by `attn2` of its blocks, is apart.
        lora_targets: attention projections that get a LoRA when the settings name none.
        original_names: layers by the names of the checkpoints that diffusers' were converted from, which ComfyUI has;
            a * is a block's number and what is the same after it. Layers with one original name are parts of one
            there, in this order. None where they are not known.
        known: every family by its name.

    Attributes:
        model: folder or hub id. `task`: "text2video" or "image2video".
        expert: "high" or "low" where the pipeline has a transformer for each side of a noise level, else None.
        transformer_part: the pipeline's part that is trained.
    """

    transformer_class: ClassVar[str]
    pipelines: ClassVar[Mapping[str, str]]
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    text_keys: ClassVar[Mapping[str, str]] = {"text": "prompt_embeds"}
    text_widths: ClassVar[Mapping[str, str]]
    one_prompt_at_a_time: ClassVar[bool] = False
    encodes_first_frame: ClassVar[bool] = False
    shares_tokens: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    original_names: ClassVar[Mapping[str, str] | None] = None
    known: ClassVar[dict[str, type[TrainingFamily]]] = {}

    def __init_subclass__(cls) -> None:
        TrainingFamily.known[cls.name] = cls

    def __init__(
        self, model: str, task: str, configs: Mapping[str, Mapping[str, Any]], expert: str | None = None
    ) -> None:
        super().__init__(configs)
        self.model, self.task, self.expert = model, task, expert
        self._place: Callable[[Any], None] | None = None
        self._loading: dict[str, Any] = {}
        self._check_task()

    @classmethod
    def of(
        cls,
        model: str,
        task: str = "text2video",
        family: str | None = None,
        expert: str | None = None,
        *,
        cached: bool = False,
    ) -> TrainingFamily:
        """The family of a pipeline folder or hub id, from its configs; no weights are loaded.

        cached: those of a hub id are read from the cache on this machine alone.

        Raises:
            ValueError: not a pipeline, a part or a file of weights that is missing, a transformer or VAE class of no
                family or of another than `family` or model_index.json say, a task that this model cannot be trained
                for, an expert that it does not have, none named where it has two.
        """
        if task not in TASKS:
            raise ValueError(f"task = {task}: valid are {', '.join(TASKS)}")
        index = read_config(model, cached=cached)
        transformer = index.get("transformer") or [None, None]
        found = {each.transformer_class: each for each in cls.known.values()}.get(transformer[1])
        if found is None:
            image = next((row.name for row in FAMILIES if row.images and row.transformer == transformer[1]), None)
            if image is not None:
                raise ValueError(
                    f"{model}: {image} ({transformer[1]}) makes images, and crepa-train trains on videos: attach "
                    "CrepaRegularizer in a loop of your own, as examples/train_flux_repa.py does"
                )
            if index.get("unet") and transformer[1] is None:
                raise ValueError(
                    f"{model}: its UNet makes images, and crepa-train trains transformers on videos: attach "
                    "UrepaRegularizer in a loop of your own, as examples/train_sdxl_urepa.py does"
                )
            known = ", ".join(f"{each.name} ({each.transformer_class})" for each in cls.known.values())
            raise ValueError(f"{model}: transformer {transformer[1]} is of no supported family; supported: {known}")
        if family not in (None, found.name):
            raise ValueError(f"family = {family}, but {model} has a {found.transformer_class} ({found.name})")
        trained = found.part_of_expert(model, index, expert)
        parts = (*found.text_parts, "vae", *dict.fromkeys(("transformer", trained)), "scheduler")
        missing = [part for part in parts if not has_part(model, index, part)]
        if missing:
            raise ValueError(f"{model} lacks {', '.join(missing)}: a {found.name} pipeline has {', '.join(parts)}")
        shards = [name for part in parts for name in missing_shards(model, part)]
        if shards:
            raise ValueError(f"{model} lacks {', '.join(shards)}: download it again")
        vaes, vae = next(row.vaes for row in FAMILIES if row.name == found.name), index["vae"][1]
        if vae not in vaes:
            raise ValueError(f"{model}: its VAE is an {vae}; {found.name} needs an {' or '.join(vaes)}")
        configs = {"pipeline": index, "scheduler": read_config(model, "scheduler", cached=cached)}
        for part, folder, kind in (("transformer", trained, found.transformer_class), ("vae", "vae", vae)):
            # A folder that was saved by an older diffusers lacks what was added since.
            configs[part] = {**constructor_defaults(kind), **read_config(model, folder, cached=cached)}
            # diffusers would give it random weights where the names differ.
            if (own := configs[part].get("_class_name", kind)) != kind:
                raise ValueError(f"{model}: {folder} is an {own}, where its model_index.json has {kind}")
        return found(model, task, configs, expert)

    @classmethod
    def part_of_expert(cls, model: str, index: Mapping[str, Any], expert: str | None) -> str:
        """The part of a pipeline with this model_index.json that is trained. ValueError for an expert it lacks."""
        if expert is not None:
            raise ValueError(f"expert = {expert}: {model} has one transformer, which is trained at all noise levels")
        return "transformer"

    @property
    def transformer_part(self) -> str:
        return self.part_of_expert(self.model, self.configs["pipeline"], self.expert)

    def check_run(self, batch_size: int, device_type: str) -> None:
        """ValueError for what this model cannot be trained with, on a device of this type."""

    def _check_task(self) -> None:
        """ValueError where the model cannot be trained for `task`."""
        if self.task not in self.pipelines:
            raise ValueError(f"task = {self.task}: {self.name} can be trained for {', '.join(self.pipelines)} alone")

    def check_bucket(self, bucket: ClipSize) -> None:
        """ValueError for a size that VAE and patches cannot make, or a frame count that leaves nothing to train."""
        super().check_bucket(bucket)
        if self.task == "image2video" and self.latent_shape(bucket)[1] < 2:
            raise ValueError(
                f"frame count {bucket.frames}: the first latent frame is the given image's, and none is left to predict"
            )

    def dense(self) -> TrainingFamily:
        """The same with attention of every token to every other, where a model's own needs a GPU."""
        return self

    def load_transformer(
        self, dtype: torch.dtype, place: Callable[[Any], None] | None = None, **loading: Any
    ) -> torch.nn.Module:
        """The transformer, frozen, in train mode.

        loading: further arguments of `from_pretrained`, also for what else a pipeline samples with. `place`: brings
        that to its device, in place of `.to`.
        """
        self._place, self._loading = place, loading
        return self._load(self.transformer_part, dtype, **loading).train()

    def _load(self, part: str, dtype: torch.dtype, **loading: Any) -> torch.nn.Module:
        model: torch.nn.Module = _diffusers(self.transformer_class).from_pretrained(
            self.model, subfolder=part, torch_dtype=dtype, **loading
        )
        return model.requires_grad_(False)

    def load_vae(self, dtype: torch.dtype, tiling: bool = False) -> torch.nn.Module:
        """The VAE, frozen, in eval mode; with `tiling` it takes large clips tile by tile."""
        vae: Any = _diffusers(self.vae_class).from_pretrained(self.model, subfolder="vae", torch_dtype=dtype)
        if tiling:
            vae.enable_tiling()
        frozen: torch.nn.Module = vae.requires_grad_(False).eval()
        return frozen

    def load_text(self, dtype: torch.dtype) -> DiffusionPipeline:
        """Tokenizers and text encoders in a pipeline without the rest; move it with `.to(device)`."""
        import transformers

        parts: dict[str, Any] = {}
        for name in self.text_parts:
            if name.startswith("tokenizer"):
                parts[name] = self.load_tokenizer(name)
                continue
            kind = getattr(transformers, self.configs["pipeline"][name][1])
            parts[name] = kind.from_pretrained(self.model, subfolder=name, dtype=dtype).requires_grad_(False).eval()
        # Also for image to video: some of its pipelines' copies of encode_prompt cannot do without ftfy.
        return self._bare_pipeline("text2video", parts)

    @torch.no_grad()
    def encode_text(self, parts: Any, prompts: Sequence[str]) -> list[Text]:
        """The pipeline's own embedding of each prompt, in the encoder's type, on its device.

        A text is one or more tensors without a batch axis, e.g. `text` (L, d), `text_mask` (L,) bool; their names are
        the family's, and none of those that `CachedClips` gives. In a batch a shorter one is filled with zeros.
        """
        rounds = [[prompt] for prompt in prompts] if self.one_prompt_at_a_time else [list(prompts)]
        encoded = [parts.encode_prompt(each, **self.prompt_options(each)) for each in rounds]
        return [text for each in encoded for text in self._texts(each)]

    def prompt_options(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of the pipeline's `encode_prompt` beside the prompts."""
        return {"max_sequence_length": self.text_limits["tokenizer"], "do_classifier_free_guidance": False}

    def _texts(self, encoded: Sequence[Tensor]) -> list[Text]:
        """Of what the pipeline's `encode_prompt` returns for one or several prompts."""
        columns = zip(*encoded[: len(self.text_keys)], strict=True)
        return [{name: tensor.clone() for name, tensor in zip(self.text_keys, each, strict=True)} for each in columns]

    @torch.no_grad()
    def encode_latents(self, vae: torch.nn.Module, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, T, h, w), normalised as the transformer sees them, of pixels (B, P, 3, H, W) uint8.

        A sample of the VAE's distribution with a generator, its mode without.
        """
        return encode(vae, pixels, generator)

    def check_prompt(self, prompt: str) -> None:
        """ValueError for a caption or validation prompt that the text encoder cannot read."""

    @property
    def text_image_parts(self) -> tuple[str, ...]:
        """Further parts that encode text, where the text encoder reads a clip's first frame together with the caption;
        empty where a text is that of its prompt alone.
        """
        return ()

    @property
    def text_image_options(self) -> Mapping[str, Any]:
        """Options (JSON values) with which a text is encoded together with a first frame."""
        return {}

    def encode_text_of_clip(self, parts: DiffusionPipeline, prompt: str, first_frame: Tensor) -> Text:
        """The pipeline's own embedding of a prompt for a clip that begins with `first_frame` (3, H, W) uint8."""
        (text,) = self.encode_text(parts, [prompt])
        return text

    @property
    def image_parts(self) -> tuple[str, ...]:
        """Parts of the pipeline that encode the given image, beside the VAE."""
        return ()

    @property
    def of_image_encoder(self) -> frozenset[str]:
        """Names of those tensors of `encode_clip` that `image_parts` make, and not the VAE."""
        return frozenset()

    def load_image_encoder(self) -> DiffusionPipeline | None:
        """`image_parts` in a pipeline without the rest, frozen, in fp32; None where there are none."""
        return None

    def encode_clip(self, vae: torch.nn.Module, pixels: Tensor, image_encoder: Any = None) -> dict[str, Tensor]:
        """What training needs of one clip's pixels (P, 3, H, W) uint8: fp32 `latents` (C, T, h, w), and beside them
        what else the family asks for: with `encodes_first_frame` `image_latents` (C, 1, h, w), with `text_image_parts`
        `first_frame` (3, H, W) uint8.

        image_encoder: of `load_image_encoder`.
        """
        encoded = {"latents": self.encode_latents(vae, pixels[None])[0].float()}
        if self.encodes_first_frame and self.task == "image2video":
            encoded["image_latents"] = self.encode_latents(vae, pixels[None, :1])[0]
        return encoded

    def blank_clip(self, bucket: ClipSize) -> dict[str, Tensor]:
        """Zeros in the shapes of what `encode_clip` gives of a clip of this size for `noisy` and `predict`."""
        channels, _, height, width = self.latent_shape(bucket)
        layout = self.layout(bucket)
        blank = {"latents": torch.zeros(channels, layout.frames * layout.patch, height, width)}
        if self.encodes_first_frame and self.task == "image2video":
            blank["image_latents"] = blank["latents"][:, :1].clone()
        return blank

    def blank_text(self) -> dict[str, Tensor]:
        """Zeros in the shapes of the longest text that is read, as `CachedClips` gives one; nothing of it is masked."""
        length, config = self.text_limits["tokenizer"], self.configs["transformer"]
        blank = {name: torch.zeros(config[key]) for name, key in self.text_widths.items()}
        blank["text"] = torch.zeros(length, config[self.text_widths["text"]])
        return blank | ({"text_mask": torch.ones(length, dtype=torch.bool)} if "text_mask" in self.text_keys else {})

    def decode(self, vae: torch.nn.Module, latents: Tensor) -> Tensor:
        """Pixels (B, P, 3, H, W) in [0, 1] of clean latents (B, C, T, h, w), as the pipeline decodes them."""
        return VAES[type(vae).__name__].decode(vae, latents)

    def noise_level(self, draw: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """Levels in [0, 1] at which clips of `latent_shape` (C, T, h, w) are trained, from standard normal draws (B,).

        Logit-normal, then moved by the shift of the pipeline's scheduler as its sampling steps are.
        """
        return shifted(draw.sigmoid(), scheduler_shift(self.configs["scheduler"]))

    def noisy(self, batch: Mapping[str, Tensor], noise: Tensor, time: Tensor) -> NoisyLatents:
        """Clean `latents` (B, C, T, h, w) at noise level `time` (B,) in [0, 1], and what is to be predicted there.

        In image to video with a clean first frame, that frame is as it was, at time 0 and not predicted, and the
        timesteps are those of each token, (B, tokens). Where `image_latents` are given it is these, and the timestep
        is the other frames': such transformers take the first frame's tokens at 0 by themselves.
        """
        latents = batch["latents"]
        noisy = add_noise(latents, noise, time)
        config = self.config("transformer")
        if self.task == "text2video" or not self.row.first_frame_is_clean(config):
            return noisy
        if self.encodes_first_frame:
            return with_given_first_frame(noisy, batch["image_latents"])
        return with_clean_first_frame(noisy, latents, raster_layout(config, latents.shape[2:]))

    @abstractmethod
    def predict(self, transformer: torch.nn.Module, noisy: NoisyLatents, batch: Mapping[str, Tensor]) -> Tensor:
        """The transformer's prediction of `noisy.target`, (B, C, T, h, w). `batch` has the texts, with a batch axis."""

    def pipeline(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> DiffusionPipeline:
        """A pipeline without text side that samples with prompt embeddings."""
        scheduler = _diffusers(self.configs["pipeline"]["scheduler"][1]).from_pretrained(
            self.model, subfolder="scheduler"
        )
        return self._bare_pipeline(self.task, {**self._pipeline_models(transformer, vae), "scheduler": scheduler})

    def _bare_pipeline(self, task: str, parts: Mapping[str, Any]) -> DiffusionPipeline:
        """The pipeline of a task with these parts and no others."""
        kind = _diffusers(self.pipelines[task])
        without = {
            name: None
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name != "self" and parameter.default is parameter.empty
        }
        pipeline: DiffusionPipeline = kind(**{**without, **parts}, **self._pipeline_settings())
        return pipeline

    def _pipeline_models(self, transformer: torch.nn.Module, vae: torch.nn.Module) -> dict[str, Any]:
        """Models that a pipeline without text side samples with."""
        return {"vae": vae, "transformer": transformer}

    def _pipeline_settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor that are not its parts."""
        return {}

    def text_arguments(self, text: Text, negative: Text | None) -> dict[str, Any]:
        """A prompt's embedding and that of the empty one as arguments of the pipeline's call."""
        both = {"": text} if negative is None else {"": text, "negative_": negative}
        return {
            f"{prefix}{key}": each[name][None] for prefix, each in both.items() for name, key in self.text_keys.items()
        }

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
        given = {} if image is None else {"image": self.image_argument(image)}
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

    def first_frame(self, vae: torch.nn.Module, clip: Mapping[str, Tensor]) -> Tensor:
        """The first pixel frame (3, H, W) in [0, 1] of a clip as `encode_clip` gave it."""
        latents = clip["latents"][None, :, :1]
        # The first latent frame of a causal VAE is the first pixel frame.
        return self.decode(vae, latents.to(next(vae.parameters()).device, torch.float32))[0, 0]

    def image_argument(self, image: Tensor) -> Any:
        """An image (3, H, W) in [0, 1] as the pipeline's call takes it."""
        return image[None]

    def original_rows(self, layer: str) -> int:
        """Outputs of a layer that shares its original name with others."""
        raise NotImplementedError


def picture(pixels: Tensor) -> Image:
    """(3, H, W) uint8 as pipelines are given an image."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _diffusers(name: str | None) -> Any:
    import diffusers

    return getattr(diffusers, str(name))
