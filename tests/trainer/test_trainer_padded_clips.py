"""CogVideoX 1.5 pads an odd number of latent frames at the front: what is cached of a clip teaches it as the whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.data.cache import CachedClips, prepare_cache
from crepa_trainer.data.clips import read_clips
from crepa_trainer.families import TrainingFamily
from rich.console import Console
from tiny import CHANNELS, tiny_dinov2
from tiny_hub_folders import save_tiny_cogvideox
from training_runs import tiny_config, tiny_settings
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig, CrepaRegularizer

FRAMES = 17  # 5 latent frames, which 3 token frames are made of
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    save_tiny_cogvideox(folder / "cogvideox", version="1.5")
    tiny_dinov2(folder / "dinov2")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "0.mp4", moving_square(FRAMES))
    (folder / "videos" / "0.txt").write_text("a red square")
    return folder


def cached(folder: Path, config: CrepaConfig, **changes: Any) -> CachedClips:
    sizes = {"resolutions": [[32, 48]], "frame_counts": [FRAMES]}
    given = {"model": str(folder / "cogvideox"), "data": str(folder / "videos"), **sizes}
    settings = tiny_settings(folder, folder / "run", **given, **changes)
    return prepare_cache(settings, config, TrainingFamily.of(settings.model), CPU, Console(file=io.StringIO()))


def test_latents_are_padded_by_a_copy_of_the_first_frame(folder: Path) -> None:
    family = TrainingFamily.of(str(folder / "cogvideox"))
    ((_, pixels),) = read_clips(folder / "videos" / "0.mp4", 32, 48, [0], FRAMES)
    vae = family.load_vae(torch.float32)
    latents, encoded = family.encode_clip(vae, pixels)["latents"], family.encode_latents(vae, pixels[None])[0]
    assert latents.shape == (CHANNELS, 6, 4, 6)
    assert torch.equal(latents[:, 1:], encoded)
    assert torch.equal(latents[:, 0], encoded[:, 0])
    assert torch.equal(
        family.encode_clip(vae, pixels[:9])["latents"][:, 1:], family.encode_latents(vae, pixels[None, :9])[0]
    )


@pytest.mark.parametrize("rule", ["last", "center", "mean"])
def test_what_is_cached_gives_the_loss_of_the_whole_clip(folder: Path, rule: str) -> None:
    """Bit for bit: the same frames go through the same encoder."""
    config = tiny_config(folder, crepa_frame_map=rule, crepa_encoder_resize="grid")
    family = TrainingFamily.of(str(folder / "cogvideox"))
    transformer = family.load_transformer(torch.float32)
    regularizer = CrepaRegularizer(config, transformer)
    ((_, pixels),) = read_clips(folder / "videos" / "0.mp4", 32, 48, [0], FRAMES)
    losses = []
    for teacher in ("frames", "features"):
        (item,) = cached(folder, config, cache_teacher=teacher)
        batch = {name: value[None] for name, value in item.items()}
        noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(0))
        family.predict(transformer, family.noisy(batch, noise, torch.tensor([0.5])), batch)
        losses.append(regularizer.loss(step=0, pixels=pixels[None])[0].item())
        if teacher == "frames":
            # The padding frame is the first group's; its teacher is the first pixel frame.
            if rule == "last":
                assert torch.equal(item["pixels"], pixels[[0, 8, 16]])
            losses.append(regularizer.loss(step=0, pixels=batch["pixels"])[0].item())
        else:
            assert item["features"].shape[:2] == (3, 6)
            grid = item["feature_grid"].tolist()
            losses.append(regularizer.loss(step=0, features=batch["features"], feature_grid=grid)[0].item())
    assert len(losses) == 4
    assert len(set(losses)) == 1
