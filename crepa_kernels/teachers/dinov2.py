"""DINOv2 as the frozen teacher: patch features of video frames on their true grid."""

from __future__ import annotations

import logging
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from ..config.rules import DINOV2_HUB_IDS, DINOV2_PATCH_SIZE, ENCODER_PATCH_SIZES
from ..optional import require
from ..transfer import moved
from .encoders import FrozenEncoder

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MODEL_TYPES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
# Of the published checkpoints, so that their names need neither a network nor a cache.
FEATURE_SIZES = {"s": 384, "b": 768, "l": 1024, "g": 1536}


class Dinov2Patches(nn.Module):
    """The patch tokens of a transformers DINOv2 after the final norm, class and register tokens dropped.

    Frames (n, 3, H, W) in [0, 1] are normalised with the ImageNet statistics, in fp32, and then take the model's type.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.dropped = 1 + int(getattr(config, "num_register_tokens", 0))
        self.patch_size = int(config.patch_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        images = normalized(frames).to(next(self.model.parameters()).dtype)
        tokens: torch.Tensor = self.model(pixel_values=images).last_hidden_state[:, self.dropped :]
        height, width = (side // self.patch_size for side in frames.shape[-2:])
        return tokens.unflatten(1, (height, width))


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, H, W) in [0, 1] less ImageNet's mean, divided by its deviation."""
    # From pageable memory, so the host does not wait for the device.
    statistics = moved(torch.tensor([IMAGENET_MEAN, IMAGENET_STD]), images.device)
    mean, std = statistics.view(2, 1, 3, 1, 1)
    return (images - mean) / std


def is_dinov2(model: Any) -> bool:
    """Whether ``model`` is one of transformers' DINOv2 models, by its config."""
    return isinstance(model, nn.Module) and getattr(getattr(model, "config", None), "model_type", None) in MODEL_TYPES


def dinov2_patches(model: nn.Module, name: str | None = None) -> FrozenEncoder:
    """A transformers DINOv2 as an encoder."""
    config: Any = model.config
    patches = Dinov2Patches(model)
    name = name or type(model).__name__
    return FrozenEncoder(patches, name, feature_size=int(config.hidden_size), patch_size=patches.patch_size)


class DinoV2:
    """The DINOv2 of a name (``dinov2_vitg14`` ...), a local folder or a hub id; bf16 on a GPU and fp32 on a CPU.

    What it says of itself is by its name or its config.json, without loading weights. ``key`` is the setting that the
    name is of.

    Raises:
        ValueError: where that is asked for, for a config.json that cannot be read or is of another kind of model.
    """

    def __init__(self, name: str, key: str = "crepa_encoder") -> None:
        self.name = name
        self._key = key
        self.weights = DINOV2_HUB_IDS.get(name, name)

    @property
    def feature_size(self) -> int:
        if self.name in DINOV2_HUB_IDS:
            return FEATURE_SIZES[self.name.removeprefix("dinov2_vit")[0]]
        return int(self._config.hidden_size)

    @property
    def patch_size(self) -> int:
        return DINOV2_PATCH_SIZE if self.name in DINOV2_HUB_IDS else int(self._config.patch_size)

    def load(self, device: torch.device) -> FrozenEncoder:
        dtype = self.dtype(device)
        _tell_loading(self.weights, dtype)
        return dinov2_patches(self._class.from_pretrained(self.weights, dtype=dtype).to(device), self.name)

    def dtype(self, device: torch.device) -> torch.dtype:
        return torch.float32 if device.type == "cpu" else torch.bfloat16

    def skeleton(self) -> nn.Module:
        """Frames to patches, with weights of no meaning."""
        return Dinov2Patches(self._class(self._config))

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(each.numel() for each in self.skeleton().parameters())

    def content_key(self) -> None:
        """Its folder or hub id says it."""

    @property
    def _class(self) -> Any:
        return getattr(require("transformers", "the DINOv2 teacher"), MODEL_TYPES[self._config.model_type])

    @cached_property
    def _config(self) -> Any:
        transformers = require("transformers", "the DINOv2 teacher")
        try:
            config = transformers.AutoConfig.from_pretrained(self.weights)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._key} = {self.name}: its config.json cannot be read ({error}). "
                f"Give one of {', '.join(ENCODER_PATCH_SIZES)}, a local folder or a hub id; "
                "where loss() is always given features=, pass feature_size= instead"
            ) from error
        if config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"the encoder's model type is {config.model_type!r}, "
                f"supported are {', '.join(f'{kind!r} ({name})' for kind, name in MODEL_TYPES.items())}"
            )
        return config


@cache
def _tell_loading(name: str, dtype: torch.dtype) -> None:
    # Once a process: a run may load it for its clips, for training and for what it shows.
    logger.info("loading the teacher %s as %s", name, dtype)
