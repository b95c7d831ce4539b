"""Pipeline folders that a run is started from, one for each way in which a family is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from crepa_trainer.families import TrainingFamily
from tiny_hub_folders import (
    save_tiny_cogvideox,
    save_tiny_hunyuan_image,
    save_tiny_kandinsky,
    save_tiny_wan_experts,
    save_tiny_wan_image,
)
from tiny_pipelines import save_tiny_wan_pipeline
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Of a clip."""

    frames: int
    height: int = 32
    width: int = 48


@dataclass(frozen=True)
class HubCase:
    """A folder's maker, what is trained of it, the size of its clips, and how many first frames its pipeline hides."""

    save: Callable[[Path], Path]
    size: Size
    task: str = "text2video"
    settings: Mapping[str, Any] = field(default_factory=dict)
    hidden: int = 0

    def family(self, folder: Path) -> TrainingFamily:
        return TrainingFamily.of(str(folder), self.task, expert=self.settings.get("expert"))

    def stock(self, folder: Path) -> Any:
        """The whole stock pipeline of the task: of Wan 2.2 5B the folder names that of text to video."""
        pipeline = getattr(diffusers, self.family(folder).pipelines[self.task]).from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def shown(self) -> tuple[int, int, int, int]:
        """Shape (P, H, W, 3) of a clip that is sampled."""
        return self.size.frames - self.hidden, self.size.height, self.size.width, 3


def encoded_clip(family: TrainingFamily, vae: Any, pixels: Tensor, prompt: str) -> dict[str, Tensor]:
    """What the cache holds of a clip (P, 3, H, W) uint8 with this caption."""
    text = family.encode_text_of_clip(family.load_text(torch.float32), prompt, pixels[0])
    return {**family.encode_clip(vae, pixels, family.load_image_encoder()), **text}


_EXPERTS = partial(save_tiny_wan_experts)
_IMAGE = "image2video"
CASES = {
    "wan": HubCase(save_tiny_wan_pipeline, Size(9)),
    "wan 2.2 5B": HubCase(partial(save_tiny_wan_pipeline, expand_timesteps=True), Size(9), _IMAGE),
    "wan high": HubCase(_EXPERTS, Size(9), settings={"expert": "high"}),
    "wan low": HubCase(_EXPERTS, Size(9), settings={"expert": "low"}),
    "wan image high": HubCase(partial(_EXPERTS, image=True), Size(9), _IMAGE, {"expert": "high"}),
    "wan image low": HubCase(partial(_EXPERTS, image=True), Size(9), _IMAGE, {"expert": "low"}),
    "wan image encoder": HubCase(save_tiny_wan_image, Size(9), _IMAGE),
    "kandinsky5": HubCase(save_tiny_kandinsky, Size(9)),
    "kandinsky5 without conditions": HubCase(partial(save_tiny_kandinsky, cond=False), Size(9)),
    "kandinsky5 image": HubCase(partial(save_tiny_kandinsky, image=True), Size(17), _IMAGE),
    "cogvideox": HubCase(save_tiny_cogvideox, Size(9)),
    "cogvideox image": HubCase(partial(save_tiny_cogvideox, image=True), Size(9), _IMAGE),
    "cogvideox 1.5": HubCase(partial(save_tiny_cogvideox, version="1.5"), Size(17)),
    "cogvideox 1.5 image": HubCase(partial(save_tiny_cogvideox, version="1.5", image=True), Size(17), _IMAGE),
    "hunyuan token_replace": HubCase(partial(save_tiny_hunyuan_image, condition="token_replace"), Size(9), _IMAGE),
    "hunyuan latent_concat": HubCase(
        partial(save_tiny_hunyuan_image, condition="latent_concat"), Size(13), _IMAGE, hidden=4
    ),
}
