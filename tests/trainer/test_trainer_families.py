"""Wan as the trainer sees it: parts of a pipeline folder, the pipeline's own encodings, the transformer's call."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.families import TrainingFamily
from diffusers import WanImageToVideoPipeline, WanPipeline
from tiny import CHANNELS, clip_pixels
from tiny_pipelines import save_tiny_wan_pipeline

from crepa_kernels.models.families import family_of
from crepa_kernels.models.layouts import raster_layout


@dataclass(frozen=True)
class Bucket:
    height: int = 32
    width: int = 48
    frames: int = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan_pipeline(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def family(folder: Path) -> TrainingFamily:
    return TrainingFamily.of(str(folder))


def test_sizes_from_the_configs_are_those_of_the_models(family: TrainingFamily) -> None:
    bucket = Bucket()
    vae, transformer = family.load_vae(torch.float32), family.load_transformer(torch.float32)
    latents = family.encode_latents(vae, clip_pixels(batch=2))
    assert latents.shape == (2, *family.latent_shape(bucket))
    layout = raster_layout(transformer.config, latents.shape[2:])
    assert family.layout(bucket) == layout
    assert family.hidden_size == family_of(transformer).hidden_size(transformer.config)
    assert family.blocks == len(transformer.blocks)
    assert not any(p.requires_grad for p in (*vae.parameters(), *transformer.parameters()))


def test_latents_decode_in_the_pipeline_to_what_the_vae_makes_of_the_clip(family: TrainingFamily) -> None:
    vae = family.load_vae(torch.float32)
    pixels = clip_pixels()
    latents = family.encode_latents(vae, pixels)
    pipeline = family.pipeline(family.load_transformer(torch.float32), vae)
    # Zero denoising steps of the pipeline: its own denormalisation and decoding of the given latents.
    raw = vae.encode(pixels.transpose(1, 2) / 127.5 - 1).latent_dist.mode()
    expected = pipeline.video_processor.postprocess_video(vae.decode(raw, return_dict=False)[0], output_type="pt")
    decoded = family.decode(vae, latents)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)  # fp32 rounding of two affine maps


def test_a_sample_of_the_latents_repeats_with_the_generators_seed(family: TrainingFamily) -> None:
    vae = family.load_vae(torch.float32)
    first, second, other = (
        family.encode_latents(vae, clip_pixels(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_text_is_the_stock_pipelines_embedding(family: TrainingFamily, folder: Path) -> None:
    stock = WanPipeline.from_pretrained(folder)
    prompts = ["a red square moves", "the video"]
    expected, _ = stock.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    embeddings = family.encode_text(family.load_text(torch.float32), prompts)
    # Weights lie otherwise in memory after loading, so products round otherwise in the last bit.
    first, second = (embedding["text"] for embedding in embeddings)
    torch.testing.assert_close(torch.stack([first, second]), expected, atol=1e-5, rtol=0)
    assert not torch.equal(first, second)


def test_a_pipeline_with_cached_embeddings_samples_as_the_stock_one(family: TrainingFamily, folder: Path) -> None:
    sizes: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
    prompt, negative = family.encode_text(family.load_text(torch.float32), ["a red square", ""])
    ours = family.pipeline(family.load_transformer(torch.float32).eval(), family.load_vae(torch.float32))
    stock = WanPipeline.from_pretrained(folder)
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    embeds = {"prompt_embeds": prompt["text"][None], "negative_prompt_embeds": negative["text"][None]}
    frames = ours(**embeds, **sizes, generator=generator, output_type="pt").frames
    expected = stock("a red square", negative_prompt="", **sizes, generator=generator.manual_seed(0), output_type="pt")
    torch.testing.assert_close(frames, expected.frames, atol=1e-5, rtol=0)  # fp32 rounding, memory layouts differ


def test_image_to_video_noises_all_but_the_first_frame(tmp_path: Path) -> None:
    folder = save_tiny_wan_pipeline(tmp_path / "wan", expand_timesteps=True)
    family = TrainingFamily.of(str(folder), "image2video")
    latents, noise = torch.randn(2, 2, CHANNELS, 3, 4, 6).unbind()
    noisy = family.noisy({"latents": latents}, noise, torch.tensor([0.25, 0.5]))
    assert torch.equal(noisy.latents[:, :, 0], latents[:, :, 0])
    assert noisy.timestep.view(2, 3, 6)[:, :, 0].tolist() == [[0, 250, 250], [0, 500, 500]]
    assert noisy.frame_mask is not None
    assert noisy.frame_mask.tolist() == [[False, True, True]] * 2
    prediction = family.predict(family.load_transformer(torch.float32), noisy, {"text": torch.randn(2, 5, 8)})
    assert prediction.shape == latents.shape
    pipeline = family.pipeline(family.load_transformer(torch.float32), family.load_vae(torch.float32))
    assert isinstance(pipeline, WanImageToVideoPipeline)
    assert pipeline.config.expand_timesteps


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        (Bucket(height=40), "40x48: height must be a multiple of 16"),
        (Bucket(width=0), "32x0"),
        (Bucket(frames=8), r"frame count 8: the VAE makes 1 \+ 4n frames"),
    ],
)
def test_a_size_that_the_model_cannot_make_is_refused(family: TrainingFamily, bucket: Bucket, message: str) -> None:
    family.check_bucket(Bucket())
    with pytest.raises(ValueError, match=message):
        family.check_bucket(bucket)


def test_a_missing_part_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "wan"
    shutil.copytree(folder, copy)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ValueError, match="lacks tokenizer, vae"):
        TrainingFamily.of(str(copy))
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        TrainingFamily.of(str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        TrainingFamily.of(str(tmp_path / "misspelt"))


def _with(folder: Path, target: Path, part: str, **changes: Any) -> str:
    shutil.copytree(folder, target)
    file = target / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(target)


def test_models_that_cannot_be_trained_say_why(folder: Path, tmp_path: Path) -> None:
    other = _with(folder, tmp_path / "other", "model_index.json", transformer=["diffusers", "MochiTransformer3DModel"])
    with pytest.raises(ValueError, match="MochiTransformer3DModel is of no supported family"):
        TrainingFamily.of(other)
    two = _with(folder, tmp_path / "two", "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(ValueError, match="two transformers"):
        TrainingFamily.of(two)
    channels = _with(folder, tmp_path / "channels", "transformer/config.json", in_channels=36)
    with pytest.raises(ValueError, match="takes 36 channels and the VAE makes 4"):
        TrainingFamily.of(channels)
    with pytest.raises(ValueError, match="text-to-video model"):
        TrainingFamily.of(str(folder), "image2video")
    with pytest.raises(ValueError, match=r"family = ltxvideo, but .* has a WanTransformer3DModel"):
        TrainingFamily.of(str(folder), family="ltxvideo")
