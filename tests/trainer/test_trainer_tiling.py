"""`vae_tiling`: large clips are encoded and decoded tile by tile, and their cached latents are kept apart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.data.cache import CachedClips, prepare_cache
from crepa_trainer.data.clips import read_clips
from crepa_trainer.families import TrainingFamily
from crepa_trainer.validation import Sampling, sample_clips
from hub_cases import Size
from rich.console import Console
from tiny_hub_folders import save_tiny_cogvideox
from tiny_pipelines import TINY_PIPELINES
from training_runs import tiny_settings
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig

CPU = torch.device("cpu")
SIDE = 288  # more than the 240 x 360 pixels of CogVideoX's tiles, in height


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiling")
    save_tiny_cogvideox(folder / "cogvideox")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "0.mp4", moving_square(2, SIDE, SIDE))
    (folder / "videos" / "0.txt").write_text("a red square")
    return folder


def cached(folder: Path, output: Path, **changes: Any) -> CachedClips:
    given = {
        "model": str(folder / "cogvideox"),
        "data": str(folder / "videos"),
        "resolutions": [[SIDE, SIDE]],
        "frame_counts": [1],
    }
    settings = tiny_settings(folder, output, **given, **changes)
    family = TrainingFamily.of(settings.model)
    return prepare_cache(settings, CrepaConfig(), family, CPU, Console(file=io.StringIO()))


def test_cached_latents_are_those_of_the_tiled_vae_and_not_taken_for_others(folder: Path, tmp_path: Path) -> None:
    family = TrainingFamily.of(str(folder / "cogvideox"))
    ((_, pixels),) = read_clips(folder / "videos" / "0.mp4", SIDE, SIDE, [0], 1)
    whole, tiled = (family.encode_clip(family.load_vae(torch.float32, tiling), pixels) for tiling in (False, True))
    assert not torch.equal(whole["latents"], tiled["latents"])
    # One cache folder for both.
    for tiling, expected in ((False, whole), (True, tiled), (False, whole)):
        assert torch.equal(cached(folder, tmp_path / "run", vae_tiling=tiling)[0]["latents"], expected["latents"])


def test_validation_clips_are_decoded_by_tiles(folder: Path) -> None:
    family = TrainingFamily.of(str(folder / "cogvideox"))
    (text,) = family.encode_text(family.load_text(torch.float32), ["a red square"])
    clips = []
    for tiling in (False, True):
        sampling = Sampling([text], None, Size(1, SIDE, SIDE), steps=1, guidance=1.0, seed=0, tiling=tiling)
        clips += sample_clips(family, family.load_transformer(torch.float32), sampling, CPU)
    assert clips[0].shape == clips[1].shape == (1, SIDE, SIDE, 3)
    assert (clips[0] != clips[1]).any()


@pytest.mark.parametrize("name", TINY_PIPELINES)
def test_every_familys_vae_can_be_tiled(name: str, tmp_path: Path) -> None:
    family = TrainingFamily.of(str(TINY_PIPELINES[name].save(tmp_path / "model")))
    assert family.load_vae(torch.float32, tiling=True).use_tiling
    assert not family.load_vae(torch.float32).use_tiling
