"""Each image family's stock pipeline on tiny parts, called without its text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tiny import TEXT_DIM
from tiny_images import TEXT_TOKENS

PIPELINES = {
    "flux": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "sd3": "StableDiffusion3Pipeline",
    "qwen_image": "QwenImagePipeline",
    "chroma": "ChromaPipeline",
    "sana": "SanaPipeline",
    "pixart": "PixArtSigmaPipeline",
}
# Parts without which it is made, beside the tokenizer and text encoder that all have.
_MORE = {
    "flux": ("tokenizer_2", "text_encoder_2"),
    "sd3": ("tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3"),
}
_DIFFUSION = {"beta_schedule": "linear"}
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def pipeline_of(name: str, transformer: Any, vae: Any, kind: str | None = None, **parts: Any) -> Any:
    """The family's text-to-image pipeline, or another one of it."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name in ("sana", "pixart"):
        scheduler = DPMSolverMultistepScheduler(**(_FLOW if name == "sana" else _DIFFUSION))
    missing = dict.fromkeys(("tokenizer", "text_encoder", *_MORE.get(name, ())))
    made = getattr(diffusers, kind or PIPELINES[name])(
        **missing, transformer=transformer, vae=vae, scheduler=scheduler, **parts
    )
    made.set_progress_bar_config(disable=True)
    return made


def run(name: str, pipeline: Any, batch: int, size: tuple[int, int], latents: Any = None, **options: Any) -> Any:
    """What a pipeline shows (B, 3, H, W) in [0, 1] after one step, whose result is replaced by ``latents`` if given."""
    text = torch.zeros(batch, TEXT_TOKENS, TEXT_DIM)
    arguments: dict[str, Any] = {"prompt_embeds": text, "guidance_scale": 1.0}
    if name in ("flux", "sd3"):
        arguments["pooled_prompt_embeds"] = text[:, 0]
    if name == "qwen_image":
        arguments["prompt_embeds_mask"] = torch.ones(batch, TEXT_TOKENS, dtype=torch.int64)
    if name in ("chroma", "sana", "pixart"):
        arguments["prompt_attention_mask"] = torch.ones(batch, TEXT_TOKENS)
    if name in ("sana", "pixart"):
        arguments["use_resolution_binning"] = False
    if name == "pixart":
        arguments["negative_prompt"] = None
    if latents is not None and name == "pixart":
        arguments["callback"] = lambda step, timestep, own: own.copy_(latents)
    elif latents is not None:
        arguments["callback_on_step_end"] = lambda *_: {"latents": latents.clone()}
    sizes = {"height": size[0], "width": size[1], "num_inference_steps": 1, "output_type": "pt"}
    return pipeline(**{**arguments, **sizes, **options}, generator=torch.Generator().manual_seed(0)).images


def calls_of(transformer: Any) -> list[Mapping[str, Any]]:
    """A list that gets the arguments of each of the transformer's forwards, as its pipeline makes them."""
    calls: list[Mapping[str, Any]] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        names = module.forward.__wrapped__ if hasattr(module.forward, "__wrapped__") else module.forward
        named = dict(zip(names.__code__.co_varnames[1:], args, strict=False)) if args else {}
        calls.append({**named, **kwargs})

    transformer.register_forward_pre_hook(keep, with_kwargs=True)
    return calls
