"""Clips and captions encoded once: what items hold, what is encoded again and what is not, and damage."""

from __future__ import annotations

import gc
import io
import logging
import os
import pickle
import shutil
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.data.cache import Bucket, CachedClips, prepare_cache
from crepa_trainer.data.clips import read_clips
from crepa_trainer.data.dataset import find_clips
from crepa_trainer.data.names import teacher_frames
from crepa_trainer.data.video import DataError, VideoError, probe_video
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.wan import WanFamily
from crepa_trainer.settings import RunSettings
from rich.console import Console
from tiny import tiny_wan
from videos import moving_square, read_frames, write_video, write_with_empty_samples

from crepa_kernels import CrepaConfig, CrepaRegularizer, frame_indices
from crepa_kernels.teachers.dinov2 import DinoV2

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (folder := tmp_path / "data").mkdir()
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
        for owner, name in ((WanFamily, "load_vae"), (WanFamily, "load_text"), (DinoV2, "load")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), name.removeprefix("load_")))

    def _counted(self, load: Any, name: str) -> Any:
        def counted(*args: Any) -> Any:
            self.count[name] += 1
            model = load(*args)
            self.alive.append(weakref.ref(getattr(model, "text_encoder", None) or model))
            return model

        return counted

    def made(self) -> set[str]:
        """What was loaded since the last call; all of it must be gone."""
        gc.collect()
        assert not [ref() for ref in self.alive if ref() is not None]
        names, self.count = set(self.count), Counter()
        return names


def prepare(run: RunSettings, config: CrepaConfig) -> CachedClips:
    family = TrainingFamily.of(run.model, run.task)
    return prepare_cache(run, config, family, CPU, Console(file=io.StringIO()))


def test_an_item_is_what_the_encoders_make_of_the_clip(models: Path, data: Path) -> None:
    run = settings(models, data)
    clips = prepare(run, crepa(models))
    family = TrainingFamily.of(run.model)
    vae, text = family.load_vae(torch.float32), family.load_text(torch.float32)
    assert [key.name for key in clips.keys] == [
        "short.mp4 [0:5]", "short.mp4 [1:6]", "wide.mp4 [0:9]", "wide.mp4 [3:12]",
    ]  # fmt: skip
    assert len(clips) == 4
    for n, key in enumerate(clips.keys):
        item = clips[n]
        ((_, pixels),) = read_clips(data / key.video, 32, 48, [key.start], key.bucket.frames)
        assert set(item) == {"latents", "text", "pixels", "index"}
        assert item["latents"].equal(family.encode_latents(vae, pixels[None])[0])
        assert item["text"].equal(family.encode_text(text, [key.caption])[0]["text"])
        assert item["pixels"].equal(pixels[::4])
        assert int(item["index"]) == n
    assert clips.negative_text is None
    assert clips.validation_text == ()
    sent = pickle.loads(pickle.dumps(clips))[2]  # to the data loader's processes
    assert all(value.equal(sent[name]) for name, value in clips[2].items())


def test_the_validation_prompts_and_the_empty_one_are_encoded(models: Path, data: Path) -> None:
    run = settings(models, data, validation_prompts=("a red square", "a wide square moves"), validation_every=1)
    clips = prepare(run, CrepaConfig())
    family = TrainingFamily.of(run.model)
    empty, *others = family.encode_text(family.load_text(torch.float32), ["", *run.validation_prompts])
    assert clips.negative_text is not None
    assert clips.negative_text["text"].equal(empty["text"])
    assert len(clips.validation_text) == len(others)
    for text, other in zip(clips.validation_text, others, strict=True):
        assert text["text"].equal(other["text"])


@pytest.mark.parametrize("teacher", ["frames", "features"])
def test_a_second_run_loads_no_encoder(models: Path, data: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(monkeypatch)
    run = settings(models, data, cache_teacher=teacher, validation_prompts=("a red square",), validation_every=1)
    first = prepare(run, crepa(models))
    assert loads.made() == {"vae", "text"} | ({"load"} if teacher == "features" else set())
    second = prepare(run, crepa(models))
    assert loads.made() == set()
    assert first.keys == second.keys
    assert all(value.equal(second[n][name]) for n in range(len(first)) for name, value in first[n].items())


@pytest.mark.every(4)
@pytest.mark.parametrize("resize", ["square", "grid"])
@pytest.mark.parametrize("rule", ["last", "center", "mean"])
def test_what_is_cached_gives_the_loss_of_the_whole_clip(models: Path, data: Path, rule: str, resize: str) -> None:
    """Bit for bit: the same frames go through the same encoder."""
    config = crepa(models, crepa_frame_map=rule, crepa_encoder_resize=resize)
    transformer = tiny_wan()
    regularizer = CrepaRegularizer(config, transformer)
    losses = []
    for teacher in ("frames", "features"):
        clips = prepare(settings(models, data, cache_teacher=teacher), config)
        item = {name: value[None] for name, value in clips[3].items()}
        transformer(item["latents"], torch.tensor([500]), item["text"])
        key = clips.keys[3]
        ((_, pixels),) = read_clips(data / key.video, 32, 48, [key.start], key.bucket.frames)
        losses.append(regularizer.loss(step=0, pixels=pixels[None])[0].item())
        if teacher == "frames":
            assert item["pixels"].shape[1] == (9 if rule == "mean" else 3)
            losses.append(regularizer.loss(step=0, pixels=item["pixels"])[0].item())
        else:
            grid = item["feature_grid"][0].tolist()
            assert grid == ([2, 3] if resize == "grid" else [5, 5])
            losses.append(regularizer.loss(step=0, features=item["features"], feature_grid=grid)[0].item())
    assert len(losses) == 4
    assert len(set(losses)) == 1


def test_features_in_8_bits_are_half_a_step_off_at_most(models: Path, data: Path) -> None:
    config = crepa(models)
    run = settings(models, data, cache_teacher="features")
    whole, small = prepare(run, config), prepare(run.replace(cache_teacher_precision="int8"), config)
    assert whole[0].keys() == small[0].keys()
    for one, other in zip(whole, small, strict=True):
        step = one["features"].abs().amax(-1, keepdim=True) / 127
        assert ((one["features"] - other["features"]).abs() <= 0.501 * step).all()
        assert not one["features"].equal(other["features"])
    sizes = [clips.files[0].teacher.stat().st_size for clips in (whole, small) if clips.files[0].teacher]
    assert sizes[1] < 0.45 * sizes[0]
    again = prepare(run, config)  # of the first kind still
    assert again[0]["features"].equal(whole[0]["features"])


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_the_kept_frames_are_mapped_to_themselves_for_every_temporal_patch(models: Path, patch: int) -> None:
    """The regulariser maps the frames that it is given as if they were all: the same ones must come out."""
    family = TrainingFamily.of(str(models / "wan"))
    family.configs["transformer"]["patch_size"][0] = patch  # type: ignore[index]
    for latents in range(patch, 40, patch):
        frames = 1 + 4 * (latents - 1)
        for rule in ("last", "center", "mean"):
            kept = teacher_frames(CrepaConfig(crepa_frame_map=rule), family, Bucket(32, 48, frames))
            chosen = frame_indices(rule, len(kept), latents, patch=patch)
            assert [kept[n] for n in chosen] == frame_indices(rule, frames, latents, patch=patch)


@pytest.mark.parametrize(
    "off",
    [
        {"crepa_enabled": False},
        {"crepa_feature_source": "backbone", "crepa_teacher_block_index": 2},
        {"crepa_lambda": 0.0},
    ],
    ids=["disabled", "backbone", "no-weight"],
)
@pytest.mark.parametrize("teacher", ["frames", "features"])
def test_nothing_of_the_teacher_is_kept_where_no_encoder_teaches(
    models: Path, data: Path, off: dict[str, Any], teacher: str
) -> None:
    config = crepa(models, **off).replace(crepa_encoder="nowhere/at-all")
    clips = prepare(settings(models, data, cache_teacher=teacher), config)
    assert set(clips[0]) == {"latents", "text", "index"}
    assert not (data.parent / "out" / "cache" / "teacher").exists()


def test_only_what_changed_is_encoded_again(models: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(monkeypatch)
    own = data.parent / "models"
    shutil.copytree(models, own)

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
    assert made(crepa(own), cache_teacher="features") == {"teacher", "load"}
    assert made(crepa(own, crepa_encoder_resize="grid"), cache_teacher="features") == {"teacher", "load"}
    assert made(crepa(own), clips_per_video=1) == set()
    assert made(crepa(own), frame_counts=(5,)) == {"vae", "latents", "teacher"}
    (data / "wide.txt").write_text("another square")
    assert made(crepa(own)) == {"text"}
    os.utime(data / "wide.mp4", (1, 1))
    assert made(crepa(own)) == set()
    write_video(data / "wide.mp4", moving_square(12, seed=5))
    assert made(crepa(own)) == {"vae", "latents", "teacher"}
    for part in ("wan/vae/diffusion_pytorch_model", "wan/text_encoder/model", "dinov2/model"):
        os.utime(own / f"{part}.safetensors", (1, 1))
    assert made(crepa(own)) == set()
    own = own.rename(data.parent / "moved")
    assert made(crepa(own)) == set()
    change_weights(own / "wan" / "vae" / "diffusion_pytorch_model.safetensors")
    assert made(crepa(own)) == {"vae", "latents"}
    change_weights(own / "wan" / "text_encoder" / "model.safetensors")
    assert made(crepa(own)) == {"text"}
    change_weights(own / "dinov2" / "model.safetensors")
    assert made(crepa(own)) == set()
    assert made(crepa(own), cache_teacher="features") == {"teacher", "load"}


def change_weights(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    name = next(name for name, value in weights.items() if value.is_floating_point())
    save_file({**weights, name: weights[name] * 1.5}, file, {"format": "pt"})


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


def test_damage_inside_a_validation_prompts_text_is_made_good_by_the_next(models: Path, data: Path) -> None:
    run = settings(models, data, validation_prompts=("a red square",), validation_every=1)
    of_clips = {files.text for files in prepare(run, crepa(models)).files}
    bad = next(path for path in (run.cache_folder / "text").iterdir() if path not in of_clips)
    whole = bad.read_bytes()
    damage(bad, "one bit")
    with pytest.raises(ValueError, match=rf"{bad.name} is damaged: its checksum.*--resume latest"):
        prepare(run, crepa(models))
    prepare(run, crepa(models))
    assert bad.read_bytes() == whole


def test_the_teachers_side_is_not_read_when_nothing_needs_it(models: Path, data: Path) -> None:
    clips = prepare(settings(models, data), crepa(models))
    whole, clips.without_teacher = clips[0].keys(), True
    Path(str(clips.files[0].teacher)).unlink()
    assert whole - clips[0].keys() == {"pixels"}


def test_a_damaged_file_whose_video_has_gone_bad_is_not_used(models: Path, data: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("crepa_trainer.data.files.SAMPLE", 16)  # so that it goes bad where nobody looks
    video = write_video(data / "short.mp4", moving_square(40), faststart=True)
    run = settings(models, data, frame_counts=(9, 37), clips_per_video=1)
    clips = prepare(run, crepa(models))
    assert [key.name for key in clips.keys] == ["short.mp4 [0:37]", "wide.mp4 [0:9]"]
    damage(clips.files[0].latents, "cut off")
    content = video.read_bytes()
    video.write_bytes(content[: len(content) * 2 // 3].ljust(len(content) - 16, b"\0") + content[-16:])
    assert probe_video(video).frames == 40
    assert [key.name for key in prepare(run, crepa(models)).keys] == ["wide.mp4 [0:9]"]


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
    with caplog.at_level(logging.INFO, "crepa_trainer"):
        clips = prepare(settings(models, data), crepa(models))
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [told[0].startswith(f"skipped {path}: damaged or cut off"), told[1:]] == [True, ["1 of 3 videos skipped"]]
    assert f"encoded 2 videos into {data.parent}/out/cache" in caplog.messages
    # Its first clip is intact; the last one is not.
    assert [key.name for key in clips.keys if key.video == "cut.mp4"] == ["cut.mp4 [0:9]"]
    loads = Loads(monkeypatch)
    assert prepare(settings(models, data), crepa(models)).keys == clips.keys
    assert loads.made() == set()


def test_a_video_that_ends_early_goes_to_the_bucket_that_it_fits(
    models: Path, data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, frames in (("half", 12), ("less", 3)):
        path = write_with_empty_samples(data / f"{name}.mp4", moving_square(frames, 48, 80))
        path.with_suffix(".txt").write_text("a square")
        assert (probe_video(path).frames, len(read_frames(path, 48, 80, 100))) == (2 * frames, frames)
    run = settings(models, data, frame_counts=(5, 9, 21), strict=False)
    with caplog.at_level(logging.WARNING, "crepa_trainer"):
        clips = prepare(run, crepa(models))
    kept = [key.name for key in clips.keys if key.video in ("half.mp4", "less.mp4")]
    assert kept == ["half.mp4 [0:9]", "half.mp4 [3:12]"]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{data}/half.mp4 shows 12 frames, its container says 24: its clips are 9 frames of 32x48",
        f"skipped {data}/less.mp4: 3 frames, the shortest clip needs 5",
        "1 of 4 videos skipped",
    ]
    ((_, pixels),) = read_clips(data / "half.mp4", 32, 48, [3], 9)
    family, index = TrainingFamily.of(run.model), [key.name for key in clips.keys].index("half.mp4 [3:12]")
    latents = family.encode_clip(family.load_vae(torch.float32), pixels)["latents"]
    assert torch.equal(clips[index]["latents"], latents)
    # The next start and its plan know it.
    loads = Loads(monkeypatch)
    found = find_clips(run, family)
    assert [key.name for key in found.keys if key.video == "half.mp4"] == kept
    assert prepare(run, crepa(models)).keys == clips.keys
    assert loads.made() == set()
    with pytest.raises(VideoError, match=r"less\.mp4: 3 frames, the shortest clip needs 5 \(strict\)"):
        prepare(settings(models, data, frame_counts=(5, 9, 21), strict=True), crepa(models))


def test_no_intact_clip_is_one_error(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    cut_off_while_playing(folder)
    with pytest.raises(DataError, match=r"no usable clip in 1 video: .*cut\.mp4: damaged or cut off"):
        prepare(settings(models, folder, frame_counts=(37,), clips_per_video=1), crepa(models))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("wan/vae/diffusion_pytorch_model", r"wide\.mp4: the VAE makes NaN or infinity of the clip at frame 0"),
        ("wan/text_encoder/model", r"short\.txt: the text encoder makes NaN or infinity of it"),
        ("dinov2/model", r"wide\.mp4: the teacher makes NaN or infinity of the clip at frame 0"),
    ],
    ids=["latents", "text", "teacher"],
)
def test_what_is_not_finite_is_never_kept(models: Path, data: Path, weights: str, message: str) -> None:
    from safetensors.torch import load_file, save_file

    own = data.parent / "models"
    shutil.copytree(models, own)
    file = own / f"{weights}.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(DataError, match=message):
        prepare(settings(own, data, cache_teacher="features"), crepa(own))
    kept = (data.parent / "out").rglob("*.safetensors")
    kind = {"wan/vae": "latents", "wan/text_encoder": "text", "dinov2": "teacher"}[weights.rpartition("/")[0]]
    assert kind not in {path.parent.name for path in kept}


@pytest.mark.parametrize("kind", ["latents", "teacher", "text"])
def test_two_files_in_each_others_places_are_made_again(
    models: Path, data: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    clips = prepare(settings(models, data), crepa(models))
    first, second = (getattr(clips.files[number], kind) for number in (0, 2))
    both = first.read_bytes(), second.read_bytes()
    first.write_bytes(both[1])
    second.write_bytes(both[0])
    with caplog.at_level(logging.WARNING, "crepa_trainer"):
        prepare(settings(models, data), crepa(models))
    assert sum("it was written as" in record.getMessage() for record in caplog.records) == 2
    assert (first.read_bytes(), second.read_bytes()) == both
    first.write_bytes(both[1])
    with pytest.raises(ValueError, match=f"{first.name} is damaged: it was written as {second.name}"):
        clips[0]
