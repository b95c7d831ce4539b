"""Validation clips: sampled from the weights as they are, and nothing of the training is changed by them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from crepa_trainer.checkpoint import FOLDER
from crepa_trainer.families import TrainingFamily
from crepa_trainer.state_files import read_state
from crepa_trainer.validation import Sampling, sample_clips, save_clip
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image
from tiny_pipelines import save_tiny_wan_pipeline
from training_runs import TinyClips, tiny_config, tiny_settings, train
from videos import moving_square

CPU = torch.device("cpu")
VALIDATION: dict[str, Any] = {"validation_prompts": ["a video"], "validation_every": 2, "validation_steps": 2}


def sampling(**changes: Any) -> Sampling:
    clips = TinyClips(1, 0)
    given = {"texts": clips.validation_text, "negative": clips.negative_text, "size": clips.keys[0].bucket}
    return Sampling(**{**given, "steps": 2, "guidance": 5.0, "seed": 0, **changes})


def test_losses_and_random_state_are_those_of_a_run_without_validation(models: Path, tmp_path: Path) -> None:
    rows, states = [], []
    for name, changes in (("without", {}), ("with", VALIDATION)):
        settings = tiny_settings(models, tmp_path / name, **changes, ema_decay=0.5, max_train_steps=5)
        rows.append(train(settings, tiny_config(models)))
        saved = tmp_path / name / FOLDER / "step-00000005" / "random_state_0.safetensors"
        states.append(read_state(saved)["cpu"])
    assert rows[0] == rows[1]
    assert torch.equal(*states)
    assert sorted(path.name for path in (tmp_path / "with" / "validation").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_a_clip_is_the_stock_pipelines_with_the_exported_ema(models: Path, tmp_path: Path) -> None:
    settings = tiny_settings(models, tmp_path / "run", **VALIDATION, ema_decay=0.5, validation_seed=7)
    train(settings, tiny_config(models), TinyClips(1, 0))
    pipeline = WanPipeline.from_pretrained(models / "wan")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "run" / "trained" / "ema")
    clips = TinyClips(1, 0)
    frames = pipeline(
        prompt_embeds=clips.validation_text[0]["text"][None],
        negative_prompt_embeds=clips.negative_text["text"][None],
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
    ).frames[0]
    expected = np.concatenate(list(frames[[0, 1, 2, 3, 5, 6, 7, 8]]), axis=1) * 255
    with Image.open(tmp_path / "run" / "validation" / "step-00000004" / "prompt-0.png") as strip:
        shown = np.asarray(strip)
    # Rounded to whole numbers; weights loaded from a file lie otherwise in memory and round otherwise.
    np.testing.assert_allclose(shown, expected, atol=1.0)


def test_a_seed_gives_its_clip_and_the_vae_is_let_go(models: Path) -> None:
    family = TrainingFamily.of(str(models / "wan"))
    transformer = family.load_transformer(torch.float32)
    gc.collect()
    before = sum(type(each) is AutoencoderKLWan for each in gc.get_objects())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (sample_clips(family, transformer, sampling(seed=seed), CPU)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert transformer.training
    assert first.shape == (9, 32, 48, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    gc.collect()
    assert sum(type(each) is AutoencoderKLWan for each in gc.get_objects()) == before


def test_image_to_video_trains_and_begins_its_clip_with_the_given_frame(models: Path, tmp_path: Path) -> None:
    save_tiny_wan_pipeline(tmp_path / "wan", expand_timesteps=True)
    settings = tiny_settings(models, tmp_path / "run", model=str(tmp_path / "wan"), task="image2video", **VALIDATION)
    clips = TinyClips(1, 0)
    rows = train(settings, tiny_config(models), clips)
    assert all(float(row["crepa_similarity"]) for row in rows)
    family = TrainingFamily.of(str(tmp_path / "wan"))
    vae = family.load_vae(torch.float32)
    given = family.decode(vae, clips[0]["latents"][None, :, :1])[0, 0]
    with Image.open(tmp_path / "run" / "validation" / "step-00000004" / "prompt-0.png") as strip:
        first = torch.from_numpy(np.array(strip)[:, :48]).permute(2, 0, 1) / 255
    # Through the VAE once more, which with random weights does not give back what it was given; near it all the same.
    encoded = family.encode_latents(vae, (given * 255).round().byte()[None, None])
    again = family.decode(vae, encoded)[0, 0]
    torch.testing.assert_close(first, again, atol=0.01, rtol=0)


def test_a_saved_clip_can_be_played_and_seen(tmp_path: Path) -> None:
    clip = np.stack(moving_square(20))
    strip = save_clip(clip, tmp_path, "clip")
    assert strip.shape == (48, 8 * 80, 3)
    assert np.array_equal(strip[:, :80], clip[0])
    assert np.array_equal(strip[:, -80:], clip[-1])
    with av.open(str(tmp_path / "clip.mp4")) as video:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert frames.shape == clip.shape
    # H.264 at its default quality, with colours at half the resolution.
    assert np.abs(frames.astype(int) - clip).mean() < 12
