"""Each family's real pipelines on tiny parts, called without their text encoders."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from crepa_trainer.families import TrainingFamily
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import TEXT_DIM
from tiny_families import TEXT_TOKENS


def pipeline_of(name: str, transformer: Any, vae: Any, *, image: bool = False, **settings: Any) -> Any:
    """The family's text-to-video pipeline, or with ``image`` its image-to-video one."""
    scheduler = CogVideoXDDIMScheduler() if name == "cogvideox" else FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
    if name in ("kandinsky5_video", "hunyuan_video"):
        parts |= {"tokenizer_2": None, "text_encoder_2": None}
    if name == "hunyuan_video" and image:
        parts["image_processor"] = None
    kind = getattr(diffusers, TrainingFamily.known[name].pipelines["image2video" if image else "text2video"])
    made = kind(**parts, transformer=transformer, vae=vae, scheduler=scheduler, **settings)
    made.set_progress_bar_config(disable=True)
    return made


def run(name: str, pipeline: Any, batch: int, pixels: tuple[int, int, int], **options: Any) -> torch.Tensor:
    """What a pipeline shows as (frames, height, width) = ``pixels``: (B, P, 3, H, W) in [0, 1]."""
    frames, height, width = pixels
    text = torch.zeros(batch, TEXT_TOKENS, TEXT_DIM)
    arguments: dict[str, Any] = {"prompt_embeds": text, "num_frames": frames, "guidance_scale": 1.0}
    if name in ("ltxvideo", "sanavideo", "hunyuan_video"):
        arguments["prompt_attention_mask"] = torch.ones(batch, TEXT_TOKENS, dtype=torch.int64)
    if name == "hunyuan_video":
        arguments["pooled_prompt_embeds"] = text[:, 0]
    if name == "sanavideo":
        arguments["frames"] = arguments.pop("num_frames")
        arguments["use_resolution_binning"] = False
    if name == "kandinsky5_video":
        arguments["prompt_embeds_qwen"] = arguments.pop("prompt_embeds")
        arguments["prompt_embeds_clip"] = text[:, 0]
        arguments["prompt_cu_seqlens"] = torch.arange(batch + 1) * TEXT_TOKENS
    generator = torch.Generator().manual_seed(0)
    sizes = {"height": height, "width": width}
    return pipeline(**arguments, **sizes, **options, generator=generator, output_type="pt").frames
