"""Texts that are encoded together with their clip's first frame: what is kept for each clip, and when it is made."""

from __future__ import annotations

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.data.cache import CachedClips, clip_of_prompt, prepare_cache
from crepa_trainer.data.clips import read_clips
from crepa_trainer.data.dataset import find_clips
from crepa_trainer.data.names import FORMAT, CacheNames
from crepa_trainer.data.video import DataError
from crepa_trainer.families import TrainingFamily
from crepa_trainer.families.hunyuan_video import HunyuanVideoFamily
from crepa_trainer.settings import RunSettings
from hub_cases import CASES
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_pipelines import save_tiny_wan_pipeline
from videos import moving_square, write_video

from crepa_kernels import CrepaConfig
from crepa_kernels.teachers.cache import file_name

CPU = torch.device("cpu")
CAPTION = "a red square moves"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    CASES["hunyuan token_replace"].save(folder / "hunyuan")
    save_tiny_wan_pipeline(folder / "wan")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two videos with one caption; the first gives two clips."""
    (folder := tmp_path / "data").mkdir()
    for seed, (name, frames) in enumerate((("a", 8), ("b", 5))):
        write_video(folder / f"{name}.mp4", moving_square(frames, seed=seed))
        (folder / f"{name}.txt").write_text(CAPTION)
    return folder


def settings(model: Path, data: Path, **changes: Any) -> RunSettings:
    task = "image2video" if model.name == "hunyuan" else "text2video"
    values = {"resolutions": ((32, 48),), "frame_counts": (5,), "clips_per_video": 2, "task": task, **changes}
    return RunSettings(model=str(model), data=data, output=data.parent / "out", max_train_steps=1, **values)


def prepare(run: RunSettings) -> CachedClips:
    family = TrainingFamily.of(run.model, run.task)
    return prepare_cache(run, CrepaConfig(), family, CPU, Console(file=io.StringIO()))


def first_frame(clips: CachedClips, data: Path, number: int) -> torch.Tensor:
    key = clips.keys[number]
    ((_, pixels),) = read_clips(data / key.video, 32, 48, [key.start], 1)
    return pixels[0]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with what is loaded; nothing else may be there then."""
    names: list[str] = []
    alive: list[weakref.ref[Any]] = []

    def counted(name: str) -> Any:
        load = getattr(HunyuanVideoFamily, name)

        def counting(*args: Any) -> Any:
            gc.collect()
            assert not [ref for ref in alive if ref() is not None]
            names.append(name)
            model = load(*args)
            alive.append(weakref.ref(getattr(model, "text_encoder", model)))
            return model

        return counting

    for name in ("load_vae", "load_text"):
        monkeypatch.setattr(HunyuanVideoFamily, name, counted(name))
    return names


def test_clips_with_one_caption_have_texts_of_their_own(models: Path, data: Path) -> None:
    clips = prepare(settings(models / "hunyuan", data))
    family = TrainingFamily.of(str(models / "hunyuan"), "image2video")
    parts = family.load_text(torch.float32)
    assert [key.name for key in clips.keys] == ["a.mp4 [0:5]", "a.mp4 [3:8]", "b.mp4 [0:5]"]
    assert {key.caption for key in clips.keys} == {CAPTION}
    assert len({files.text for files in clips.files}) == 3
    for n in range(3):
        item, frame = clips[n], first_frame(clips, data, n)
        assert set(item) == {
            "latents", "image_latents", "first_frame", "text", "text_pooled", "text_mask", "index",
        }  # fmt: skip
        assert item["first_frame"].equal(frame)
        for name, tensor in family.encode_text_of_clip(parts, CAPTION, frame).items():
            assert item[name].equal(tensor)
    assert not clips[0]["text"].equal(clips[1]["text"])
    assert not clips[0]["text"].equal(clips[2]["text"])


def test_a_second_start_loads_nothing_and_a_new_caption_the_text_encoder_alone(
    models: Path, data: Path, loaded: list[str]
) -> None:
    run = settings(models / "hunyuan", data, validation_prompts=("a blue square",), validation_every=1)
    first = prepare(run)
    # One after the other, each once.
    assert loaded == ["load_vae", "load_text"]
    second = prepare(run)
    assert loaded == ["load_vae", "load_text"]
    assert first.files == second.files
    for n in range(3):
        assert all(value.equal(second[n][name]) for name, value in first[n].items())
    (data / "b.txt").write_text("a blue pattern")
    changed = prepare(run)
    assert loaded == ["load_vae", "load_text", "load_text"]
    assert changed.files[:2] == first.files[:2]
    assert changed.files[2].latents == first.files[2].latents
    assert not changed[2]["text"].equal(first[2]["text"])
    write_video(data / "a.mp4", moving_square(8, seed=7))
    new = prepare(run)
    assert loaded[3:] == ["load_vae", "load_text"]
    assert not new[0]["text"].equal(first[0]["text"])


def test_a_validation_prompts_text_is_for_the_clip_whose_frame_it_is_given(models: Path, data: Path) -> None:
    prompts = ("a blue square", CAPTION, "video", "a blue square")
    clips = prepare(settings(models / "hunyuan", data, validation_prompts=prompts, validation_every=1))
    family = TrainingFamily.of(str(models / "hunyuan"), "image2video")
    parts = family.load_text(torch.float32)
    assert [clip_of_prompt(n, len(clips)) for n in range(4)] == [0, 1, 2, 0]
    for n, (prompt, text) in enumerate(zip(prompts, clips.validation_text, strict=True)):
        expected = family.encode_text_of_clip(parts, prompt, clips[clip_of_prompt(n, len(clips))]["first_frame"])
        assert text["text"].equal(expected["text"])
    # A caption of the clip itself and two equal prompts for one clip are encoded once: three clips', two prompts', "".
    assert len(list((data.parent / "out" / "cache" / "text").iterdir())) == 3 + 2 + 1
    (negative,) = family.encode_text(parts, [""])
    assert clips.negative_text is not None
    assert clips.negative_text["text"].equal(negative["text"])


def test_a_clip_that_cannot_be_decoded_gives_no_text(models: Path, data: Path) -> None:
    path = write_video(data / "cut.mp4", moving_square(40, seed=9), faststart=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    path.with_suffix(".txt").write_text(CAPTION)
    run = settings(models / "hunyuan", data, validation_prompts=("video",) * 5, validation_every=1)
    clips = prepare(run)
    # The first of its two clips is intact.
    assert [key.name for key in clips.keys][2:] == ["b.mp4 [0:5]", "cut.mp4 [0:5]"]
    assert len(list((run.cache_folder / "text").iterdir())) == 4 + 4 + 1


def test_the_files_of_other_families_are_shared_by_caption_and_named_as_ever(models: Path, data: Path) -> None:
    run = settings(models / "wan", data)
    clips = prepare(run)
    family = TrainingFamily.of(run.model)
    names = CacheNames(run, CrepaConfig(), family, CPU, find_clips(run, family))
    content = {"format": FORMAT, "family": "wan", "text": CAPTION, "encoder": names.text_encoder}
    assert {files.text for files in clips.files} == {run.cache_folder / "text" / file_name(content)}
    assert {file.name for file in (run.cache_folder / "text").iterdir()} == {file_name(content)}


def test_what_else_a_text_depends_on_is_in_its_name(models: Path, data: Path, tmp_path: Path) -> None:
    run = settings(models / "hunyuan", data)
    clips = prepare(run)
    CASES["hunyuan latent_concat"].save(tmp_path / "hunyuan")
    other = TrainingFamily.of(str(tmp_path / "hunyuan"), "image2video")
    family = TrainingFamily.of(run.model, run.task)
    names = [CacheNames(run, CrepaConfig(), each, CPU, find_clips(run, family)) for each in (family, other)]
    # As of one model that has the same text encoder with both conditions.
    names[1].__dict__["text_encoder"] = names[0].text_encoder
    assert names[0].text(CAPTION, clips.keys[0]) == clips.files[0].text
    assert names[1].text(CAPTION, clips.keys[0]) != clips.files[0].text
    parts = [part for part, *_ in names[0].text_encoder]
    assert "image_processor/preprocessor_config.json" in parts


@pytest.mark.parametrize(
    ("case", "weights", "message"),
    [
        ("wan image encoder", "vae/diffusion_pytorch_model", r"a\.mp4: the VAE makes NaN or infinity of the clip at"),
        (
            "wan image encoder",
            "image_encoder/model",
            r"a\.mp4: the image encoder makes NaN or infinity of the clip at frame 0",
        ),
        (
            "hunyuan token_replace",
            "text_encoder/model",
            r"a\.txt with the first frame of a\.mp4 \[0:5\]: the text encoder makes NaN or infinity of it",
        ),
    ],
    ids=["vae", "image encoder", "text encoder"],
)
def test_what_is_not_finite_is_said_of_the_part_that_made_it(
    data: Path, tmp_path: Path, case: str, weights: str, message: str
) -> None:
    model = tmp_path / "hunyuan"
    CASES[case].save(model)
    file = model / f"{weights}.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(DataError, match=message):
        prepare(settings(model, data))
