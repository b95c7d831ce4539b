"""Every family as the trainer sees it: sizes, text, latents, noise and the transformer's call are its pipeline's."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from crepa_trainer.data.dataset import Bucket
from crepa_trainer.families import TrainingFamily
from diffusers import LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from tiny import clip_pixels
from tiny_pipelines import TINY_PIPELINES

from crepa_kernels import image_to_video_mask
from crepa_kernels.models.families import family_of
from crepa_kernels.models.layouts import raster_layout

NAMES = tuple(TINY_PIPELINES)
CASES = [(name, task) for name, tiny in TINY_PIPELINES.items() for task in tiny.tasks]
PROMPT = "the video moves over a blue pattern"
STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: tiny.save(root / name.replace(" ", "-")) for name, tiny in TINY_PIPELINES.items()}


def bucket_of(name: str) -> Bucket:
    return Bucket(*TINY_PIPELINES[name].size)


def pixels_of(name: str, frames: int | None = None) -> torch.Tensor:
    size = bucket_of(name)
    return clip_pixels(1, frames or size.frames, size.height, size.width)


def stock(family: TrainingFamily) -> Any:
    pipeline = getattr(diffusers, family.pipelines[family.task]).from_pretrained(family.model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def calls(transformer: Any) -> list[dict[str, Any]]:
    """Fills with the arguments of each forward, by name, without those that are None."""
    kept: list[dict[str, Any]] = []
    signature = inspect.signature(type(transformer).forward.__wrapped__)  # below the decorator that takes kwargs alone

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        given = signature.bind(module, *args, **kwargs).arguments
        del given["self"], given["return_dict"]
        kept.append({key: value for key, value in given.items() if value is not None})

    transformer.register_forward_pre_hook(keep, with_kwargs=True)
    return kept


def unpacked(family: TrainingFamily, states: torch.Tensor, size: Bucket) -> torch.Tensor:
    if family.name != "ltxvideo":
        return states
    return LTXPipeline._unpack_latents(states, *family.latent_shape(size)[1:])


@pytest.mark.parametrize("name", NAMES)
def test_sizes_from_the_configs_are_those_of_the_models(folders: dict[str, Path], name: str) -> None:
    family, size = TrainingFamily.of(str(folders[name])), bucket_of(name)
    family.check_bucket(size)
    vae, transformer = family.load_vae(torch.float32), family.load_transformer(torch.float32)
    latents = family.encode_latents(vae, pixels_of(name))
    assert latents.shape == (1, *family.latent_shape(size))
    row = family_of(transformer)
    assert family.layout(size) == raster_layout(transformer.config, latents.shape[2:])
    assert family.hidden_size == row.hidden_size(transformer.config)
    assert family.blocks == len(row.blocks(transformer))
    assert not any(p.requires_grad for p in (*vae.parameters(), *transformer.parameters()))


@pytest.mark.parametrize("name", [name for name, task in CASES if task == "image2video"])
def test_image_to_video_of_one_frame_leaves_nothing_to_predict(folders: dict[str, Path], name: str) -> None:
    size = replace(bucket_of(name), frames=1)
    TrainingFamily.of(str(folders[name])).check_bucket(size)
    with pytest.raises(ValueError, match=r"frame count 1: .*none is left to predict"):
        TrainingFamily.of(str(folders[name]), "image2video").check_bucket(size)


@pytest.mark.parametrize("name", NAMES)
def test_latents_decode_to_what_the_vae_makes_of_the_clip(folders: dict[str, Path], name: str) -> None:
    family = TrainingFamily.of(str(folders[name]))
    vae = family.load_vae(torch.float32)
    pixels = pixels_of(name)
    latents = family.encode_latents(vae, pixels)
    raw = vae.encode(pixels.transpose(1, 2) / 127.5 - 1).latent_dist.mode()
    expected = (vae.decode(raw, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(family.decode(vae, latents), expected, atol=1e-5, rtol=0)  # two affine maps in fp32
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = (family.encode_latents(vae, pixels, generator) for generator in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", [name for name, task in CASES if task == "image2video"])
def test_a_first_frame_is_encoded_as_the_image_to_video_pipeline_does(folders: dict[str, Path], name: str) -> None:
    family, size = TrainingFamily.of(str(folders[name]), "image2video"), bucket_of(name)
    pipeline, pixels = stock(family), pixels_of(name)
    image = pixels[:, 0] / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    given = {"height": size.height, "width": size.width, "num_frames": size.frames}
    prepared = pipeline.prepare_latents(
        image, 1, family.latent_shape(size)[0], **given, dtype=torch.float32, device="cpu", generator=generator
    )
    if family.name == "ltxvideo":
        # It takes a sample where SANA-Video takes the mode.
        prepared = unpacked(family, prepared[0], size)
        first = family.encode_latents(pipeline.vae, pixels[:, :1], torch.Generator().manual_seed(0))
    else:
        first = family.encode_latents(pipeline.vae, pixels[:, :1])
    torch.testing.assert_close(prepared[:, :, :1], first, atol=1e-5, rtol=0)
    # All of the clip together, for the VAE looks only back.
    whole = family.encode_latents(pipeline.vae, pixels)[:, :, :1]
    torch.testing.assert_close(whole, family.encode_latents(pipeline.vae, pixels[:, :1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_transformer_is_called_as_its_pipeline_calls_it(folders: dict[str, Path], name: str, task: str) -> None:
    family, size = TrainingFamily.of(str(folders[name]), task), bucket_of(name)
    pipeline, image = stock(family), pixels_of(name, 1)[:, 0] / 255.0
    theirs, given = calls(pipeline.transformer), {"image": image} if task == "image2video" else {}
    pipeline(
        prompt=PROMPT,
        **family.size_arguments(size),
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **given,
    )
    assert len(theirs) == STEPS
    (text,) = family.encode_text(family.load_text(torch.float32), [PROMPT])
    batch = {key: value[None] for key, value in text.items()}
    transformer = family.load_transformer(torch.float32)
    ours = calls(transformer)
    for call in theirs:
        level = call["timestep"].flatten().max().view(1) / 1000
        states = unpacked(family, call["hidden_states"], size)
        clean = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        if task == "image2video":
            clean[:, :, :1] = states[:, :, :1]
        # The noise that is in the pipeline's states if the clip is this one.
        noise = (states - (1 - level) * clean) / level
        noisy = family.noisy({"latents": clean}, noise, level)
        prediction = family.predict(transformer, noisy, batch)
        assert prediction.shape == noisy.target.shape
        assert set(ours[-1]) == set(call)
        for key, value in call.items():
            # Products round otherwise in the last bits where weights lie otherwise in memory; timesteps are 0 to 1000,
            # which DPM-Solver has as whole numbers.
            close: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-5, "check_dtype": key != "timestep"}
            torch.testing.assert_close(ours[-1][key], value, **close, msg=lambda text, key=key: f"{key}: {text}")
        mask = image_to_video_mask(transformer, 1, family.layout(size).frames) if task == "image2video" else None
        assert (noisy.frame_mask is None) == (mask is None)
        assert mask is None or torch.equal(noisy.frame_mask, mask)


def scheduler_of(family: TrainingFamily, size: Bucket, **settings: Any) -> Any:
    """The pipeline's scheduler, set to the pipeline's steps for a clip of this size."""
    kind = getattr(diffusers, family.configs["pipeline"]["scheduler"][1])
    scheduler = kind.from_pretrained(family.model, subfolder="scheduler", **settings)
    if family.name == "sanavideo":
        scheduler.set_timesteps(STEPS)
        return scheduler
    config, mu = scheduler.config, {}
    if config.use_dynamic_shifting:
        _, frames, height, width = family.latent_shape(size)
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = {"mu": calculate_shift(frames * height * width, *(config[key] for key in keys))}
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), **mu)
    return scheduler


@pytest.mark.parametrize("name", NAMES)
def test_a_step_along_the_target_from_the_last_level_gives_the_clean_clip(folders: dict[str, Path], name: str) -> None:
    family, size = TrainingFamily.of(str(folders[name])), bucket_of(name)
    scheduler = scheduler_of(family, size)
    latents, noise = torch.randn(2, 1, *family.latent_shape(size), generator=torch.Generator().manual_seed(2)).unbind()
    last = scheduler.timesteps[-1]
    noisy = family.noisy({"latents": latents}, noise, last.view(1) / 1000)
    stepped = scheduler.step(noisy.target, last, noisy.latents, return_dict=False)[0]
    # DPM-Solver's timesteps are whole numbers, its levels are not.
    torch.testing.assert_close(stepped, latents, atol=5e-3 if family.name == "sanavideo" else 1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_noise_levels_are_moved_as_the_scheduler_moves_its_own(folders: dict[str, Path], name: str) -> None:
    family, size = TrainingFamily.of(str(folders[name])), bucket_of(name)
    shape = family.latent_shape(size)
    if family.name == "sanavideo":
        expected = scheduler_of(family, size).sigmas[1:-1]
        plain = scheduler_of(family, size, flow_shift=1.0).sigmas[1:-1]
    else:
        # Sampling alone stretches LTX's levels so that the last is not too near to 0.
        settings = {"shift_terminal": None} if family.name == "ltxvideo" else {}
        expected = scheduler_of(family, size, **settings).sigmas[1:-1]
        plain = scheduler_of(family, size, **settings, use_dynamic_shifting=False, shift=1.0).sigmas[1:-1]
    assert float((expected - plain).max()) > 0.05
    torch.testing.assert_close(family.noise_level(plain.logit(), shape), expected, atol=1e-3, rtol=0)
