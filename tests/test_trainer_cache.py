"""Clips and captions encoded once: what items hold, what is encoded again and what is not, and damage."""

from __future__ import annotations

import gc
import io
import logging
import os
import pickle
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.cache import CachedClips, prepare_cache
from crepa_trainer.data import DataError, VideoError, read_clips
from crepa_trainer.families import TrainingFamily, WanFamily
from crepa_trainer.settings import RunSettings
from rich.console import Console
from tiny import tiny_dinov2, tiny_wan
from tiny_pipelines import save_tiny_wan_pipeline
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig, CrepaRegularizer
from crepa_kernels.teachers.dinov2 import DinoV2Teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_wan_pipeline(folder / "wan")
    tiny_dinov2(folder / "dinov2")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (name, frames) in enumerate((("wide", 12), ("short", 6))):
        write_video(folder / f"{name}.mp4", moving_square(frames, seed=seed))
        (folder / f"{name}.txt").write_text(f"a {name} square moves")
    return folder


def settings(models: Path, data: Path, **changes: Any) -> RunSettings:
    values = {"resolutions": ((32, 48),), "frame_counts": (5, 9), "clips_per_video": 2, **changes}
    return RunSettings(model=str(models / "wan"), data=data, output=data.parent / "out", max_train_steps=1, **values)


def crepa(models: Path, **changes: Any) -> CrepaConfig:
    values = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": str(models / "dinov2"), **changes}
    return CrepaConfig(**{"crepa_encoder_image_size": 70, **values})


class Loads:
    """Counts what loads encoders, and holds weak references to what was loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[str] = Counter()
        self.alive: list[weakref.ref[Any]] = []
        for owner, name in ((WanFamily, "load_vae"), (WanFamily, "load_text"), (DinoV2Teacher, "_load")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), name.removeprefix("load_")))

    def _counted(self, load: Any, name: str) -> Any:
        def counted(*args: Any) -> Any:
            self.count[name] += 1
            model = load(*args)
            self.alive.append(weakref.ref(getattr(model, "text_encoder", None) or model))
            return model

        return counted

    def made(config: CrepaConfig, **changes: Any) -> set[str]:
        before = set((data.parent / "out").rglob("*.safetensors"))
        prepare(settings(own, data, **changes), config)
        new = set((data.parent / "out").rglob("*.safetensors")) - before
        return loads.made() | {path.parent.name for path in new}

    whole = {"vae", "text", "latents", "teacher"}
    assert made(crepa(own)) == whole
    assert made(CrepaConfig()) == set()
    assert made(crepa(own, crepa_frame_map="center")) == {"teacher"}
    assert made(crepa(own, crepa_lambda=0.1, crepa_encoder_resize="grid")) == set()
    assert made(crepa(own), cache_teacher="features") == {"teacher", "_load"}
    assert made(crepa(own, crepa_encoder_resize="grid"), cache_teacher="features") == {"teacher", "_load"}
    assert made(crepa(own), clips_per_video=1) == set()
    assert made(crepa(own), frame_counts=(5,)) == {"vae", "latents", "teacher"}
    (data / "wide.txt").write_text("another square")
    assert made(crepa(own)) == {"text"}
    write_video(data / "wide.mp4", moving_square(12, seed=5))
    assert made(crepa(own)) == {"vae", "latents", "teacher"}
    os.utime(own / "wan" / "vae" / "diffusion_pytorch_model.safetensors", (1, 1))
    assert made(crepa(own)) == {"vae", "latents"}
    os.utime(own / "wan" / "text_encoder" / "model.safetensors", (1, 1))
    assert made(crepa(own)) == {"text"}
    os.utime(own / "dinov2" / "model.safetensors", (1, 1))
    assert made(crepa(own)) == set()
    assert made(crepa(own), cache_teacher="features") == {"teacher", "_load"}


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut off":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "zeros":
        content = bytearray(len(content))
    elif how == "one bit":
        content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(("kind", "how"), [("latents", "cut off"), ("teacher", "empty"), ("text", "zeros")])
def test_a_file_that_is_not_whole_is_named_and_made_again(
    models: Path, data: Path, kind: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = settings(models, data)
    before = prepare(run, crepa(models))
    bad = getattr(before.files[0], kind)
    whole = bad.read_bytes()
    damage(bad, how)
    with caplog.at_level(logging.WARNING, "crepa_trainer"):
        prepare(run, crepa(models))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{bad} is damaged: ")
    assert told.endswith(": made again")
    assert bad.read_bytes() == whole


@pytest.mark.parametrize("kind", ["latents", "teacher", "text"])
def test_damage_inside_a_file_stops_the_run_and_is_made_good_by_the_next(models: Path, data: Path, kind: str) -> None:
    run = settings(models, data)
    clips = prepare(run, crepa(models))
    bad = getattr(clips.files[0], kind)
    whole = bad.read_bytes()
    damage(bad, "one bit")
    with pytest.raises(ValueError, match=rf"{bad.name} is damaged: its checksum.*--resume latest"):
        clips[0]
    prepare(run, crepa(models))
    assert bad.read_bytes() == whole


def test_a_damaged_file_whose_video_is_gone_bad_is_not_used(models: Path, data: Path) -> None:
    run = settings(models, data)
    clips = prepare(run, crepa(models))
    video, status = data / "short.mp4", (data / "short.mp4").stat()
    damage(clips.files[0].latents, "cut off")
    content = bytearray(video.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    video.write_bytes(content)
    os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "short.mp4 [0:5]" not in [key.name for key in prepare(run, crepa(models)).keys]


def cut_off_while_playing(folder: Path) -> Path:
    """A video that begins well and is damaged further in."""
    path = write_video(folder / "cut.mp4", moving_square(40, seed=9), faststart=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    path.with_suffix(".txt").write_text("a cut square")
    return path


def test_a_video_that_breaks_while_it_is_decoded_is_named_skipped_and_counted(
    models: Path, data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cut_off_while_playing(data)
    with pytest.raises(VideoError, match=r"cut\.mp4: damaged or cut off after frame \d+ \(strict\)"):
        prepare(settings(models, data, strict=True), crepa(models))
    with caplog.at_level(logging.WARNING, "crepa_trainer"):
        clips = prepare(settings(models, data), crepa(models))
    told = [record.getMessage() for record in caplog.records]
    assert [told[0].startswith(f"skipped {path}: damaged or cut off"), told[1:]] == [True, ["1 of 3 videos skipped"]]
    # Its first clip is intact; the last one is not.
    assert [key.name for key in clips.keys if key.video == "cut.mp4"] == ["cut.mp4 [0:9]"]
    loads = Loads(monkeypatch)
    assert prepare(settings(models, data), crepa(models)).keys == clips.keys
    assert loads.made() == set()


def test_no_intact_clip_is_one_error(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    cut_off_while_playing(folder)
    with pytest.raises(DataError, match=r"no usable clip in 1 video\(s\): .*cut\.mp4: damaged or cut off"):
        prepare(settings(models, folder, frame_counts=(37,), clips_per_video=1), crepa(models))


def test_latents_that_are_not_finite_are_never_kept(models: Path, data: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    own = data.parent / "models"
    shutil.copytree(models, own)
    weights = own / "wan" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(DataError, match=r"wide\.mp4: the VAE makes NaN or infinity of the clip at frame 0"):
        prepare(settings(own, data), crepa(own))
