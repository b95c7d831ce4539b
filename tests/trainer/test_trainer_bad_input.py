"""Bad input of each family is one line of `crepa-train run`, before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from crepa_trainer.cli import main
from crepa_trainer.families import TrainingFamily
from tiny_hub_folders import save_tiny_cogvideox, save_tiny_hunyuan_image, save_tiny_kandinsky, save_tiny_wan_experts
from tiny_pipelines import TINY_PIPELINES, save_tiny_wan_pipeline
from videos import captioned_squares

from crepa_kernels.models.families import FAMILIES, Family

IMAGE = "image2video"
ENCODERS = ("tokenizer", "text_encoder")
PAIRS = (*ENCODERS, "tokenizer_2", "text_encoder_2")


@dataclass(frozen=True)
class Row:
    """A family's folder, what it must hold, lengths that its VAE cannot make, and what its models are not made for."""

    save: Callable[[Path], Path]
    text_parts: tuple[str, ...]
    frames: dict[int, str]
    without_image: str | None = None  # of a model that is given no first frame
    task: str = "text2video"
    options: dict[str, str] = field(default_factory=dict)


FOUR, EIGHT = "the VAE makes 1 + 4n frames (1, 5, ...)", "the VAE makes 1 + 8n frames (1, 9, ...)"
ROWS = {
    "wan": Row(save_tiny_wan_pipeline, ENCODERS, {8: FOUR, 10: FOUR}, "is a text-to-video model (no expand_timesteps"),
    "wan experts": Row(
        save_tiny_wan_experts,
        (*ENCODERS, "transformer_2"),
        {8: FOUR},
        "is a text-to-video model (no expand_timesteps",
        options={"expert": "low"},
    ),
    "ltxvideo": Row(TINY_PIPELINES["ltxvideo"].save, ENCODERS, {8: EIGHT, 13: EIGHT}),
    "sanavideo": Row(TINY_PIPELINES["sanavideo"].save, ENCODERS, {8: FOUR}),
    "sanavideo ltx2": Row(TINY_PIPELINES["sanavideo ltx2"].save, ENCODERS, {13: EIGHT}),
    "kandinsky5_video": Row(
        partial(save_tiny_kandinsky, cond=False), PAIRS, {8: FOUR}, "has no channels that say which frame is given"
    ),
    "cogvideox": Row(save_tiny_cogvideox, ENCODERS, {8: EIGHT, 13: EIGHT}, "takes 4 channels, image2video needs 8"),
    "hunyuan_video": Row(TINY_PIPELINES["hunyuan_video"].save, PAIRS, {8: FOUR}, "is a text-to-video model"),
    "hunyuan_video image": Row(
        partial(save_tiny_hunyuan_image, condition="token_replace"), (*PAIRS, "image_processor"), {8: FOUR}, task=IMAGE
    ),
}
every_row = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


@pytest.fixture
def refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """The one line of the command with a row's folder, or a copy of it, and these options."""
    for name in ("load_vae", "load_text", "load_transformer"):
        monkeypatch.setattr(TrainingFamily, name, lambda *_, **__: pytest.fail("weights were loaded"))

    def line(name: str, model: Path | None = None, **options: str) -> str:
        given = {"task": ROWS[name].task, "data": str(tmp_path), "output": str(tmp_path / "run"), **ROWS[name].options}
        given |= {"model": str(model or saved(folder, name)), "max_train_steps": "1", **options}
        capsys.readouterr()
        words = [word for key, value in given.items() if value for word in (f"--{key}", value)]
        assert main(["run", *words]) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("crepa-train: error: ")
        return error

    return line


def saved(folder: Path, name: str) -> Path:
    """A row's folder, made when it is first asked for."""
    model = folder / name.replace(" ", "-")
    return model if model.is_dir() else ROWS[name].save(model)


def copied(folder: Path, name: str, target: Path) -> Path:
    return shutil.copytree(saved(folder, name), target, copy_function=shutil.copyfile)


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_every_family_has_a_row() -> None:
    assert {name.split()[0] for name in ROWS} == set(TrainingFamily.known)


@every_row
def test_a_folder_of_another_family(name: str, refused: Callable[..., str]) -> None:
    own = name.split()[0]
    for other in TrainingFamily.known:
        if other != own:
            line = refused(name, family=other)
            assert f"family = {other}, but " in line
            assert f"({own})" in line


@pytest.mark.parametrize("row", [row for row in FAMILIES if row.images], ids=lambda row: row.name)
def test_a_family_of_images(row: Family, refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    model = copied(folder, "wan", tmp_path / "model")
    change(model / "model_index.json", transformer=["diffusers", row.transformer])
    line = refused("wan", model)
    assert f"{row.name} ({row.transformer}) makes images, and crepa-train trains on videos: attach" in line


def test_a_pipeline_with_a_unet(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    model = copied(folder, "wan", tmp_path / "model")
    change(model / "model_index.json", transformer=None, unet=["diffusers", "UNet2DConditionModel"])
    assert "its UNet makes images, and crepa-train trains transformers on videos: attach Urepa" in refused("wan", model)


@every_row
def test_a_part_of_another_model(name: str, refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    # As where folders were mixed up: diffusers would fill such a model with random weights.
    trained = "transformer_2" if ROWS[name].options.get("expert") == "low" else "transformer"
    for part in (trained, "vae"):
        model = copied(folder, name, tmp_path / part)
        change(model / part / "config.json", _class_name="AutoencoderKLMochi")
        assert f"{part} is an AutoencoderKLMochi, where its model_index.json has " in refused(name, model)


@every_row
def test_each_part_that_is_missing_is_named(
    name: str, refused: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    model = copied(folder, name, tmp_path / "model")
    for part in ("transformer", "vae", "scheduler", *ROWS[name].text_parts):
        (model / part).rename(model / "away")
        assert f" lacks {part}" in refused(name, model)
        (model / "away").rename(model / part)
        weights = next((model / part).glob("*.safetensors"), None)
        if weights is not None:
            weights.rename(model / "away")
            assert f" lacks {part}" in refused(name, model)
            (model / "away").rename(weights)


def test_weights_of_which_a_part_was_not_downloaded(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    model = copied(folder, "wan", tmp_path / "model")
    for part, size in (("transformer", "20KB"), ("text_encoder", "2KB")):
        _save_in_shards(model, part, size)
        TrainingFamily.of(str(model))
        shard = sorted((model / part).glob("*-of-*.safetensors"))[-1]
        shard.rename(tmp_path / "away")
        assert f"lacks {part}/{shard.name}" in refused("wan", model)
        (tmp_path / "away").rename(shard)


def _save_in_shards(model: Path, part: str, size: str) -> None:
    from diffusers import WanTransformer3DModel
    from transformers import UMT5EncoderModel

    kind: Any = {"transformer": WanTransformer3DModel, "text_encoder": UMT5EncoderModel}[part]
    loaded = kind.from_pretrained(model / part)
    shutil.rmtree(model / part)
    loaded.save_pretrained(model / part, max_shard_size=size)
    assert len(list((model / part).glob("*-of-*.safetensors"))) > 1


@every_row
def test_a_frame_count_that_the_vae_cannot_make(name: str, refused: Callable[..., str]) -> None:
    for frames, why in ROWS[name].frames.items():
        line = refused(name, frame_counts=f"[{frames}]", resolutions="[[128, 128]]")
        assert f"frame count {frames}: {why}" in line


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.without_image])
def test_image_to_video_of_a_model_that_is_given_no_first_frame(name: str, refused: Callable[..., str]) -> None:
    line = refused(name, task=IMAGE)
    assert str(ROWS[name].without_image) in line


@pytest.mark.parametrize("name", ["ltxvideo", "sanavideo", "hunyuan_video image"])
def test_image_to_video_of_the_first_frame_alone(name: str, refused: Callable[..., str]) -> None:
    line = refused(name, task=IMAGE, frame_counts="[1]", resolutions="[[128, 128]]")
    assert "frame count 1: the first latent frame is the given image's, and none is left to predict" in line


@every_row
def test_an_expert_of_a_model_that_has_none_and_none_of_one_that_has_two(
    name: str, refused: Callable[..., str]
) -> None:
    if ROWS[name].options:
        assert "has two transformers, of which one is trained: set expert to high (" in refused(name, expert="")
        return
    for expert in ("high", "low"):
        assert f"expert = {expert}: " in (line := refused(name, expert=expert))
        assert "has one transformer, which is trained at all noise levels" in line


def test_a_caption_or_prompt_that_the_text_encoder_would_take_for_the_image(
    refused: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    name, sizes = "hunyuan_video image", {"resolutions": "[[32, 48]]", "frame_counts": "[9]"}
    videos = captioned_squares(tmp_path / "videos", 3)
    why = "the text encoder reads the first frame at <image>, which a text must not contain"
    prompts = {"validation_prompts": '["a cat", "an <image> of it"]', "validation_every": "1"}
    assert f'validation_prompts = "an <image> of it": {why}' in refused(name, data=str(videos), **sizes, **prompts)
    for number in (0, 2):
        (videos / f"{number}.txt").write_text("a square, <image>")
    line = refused(name, data=str(videos), **sizes)
    assert line.endswith(f"2 of 3 captions cannot be used: {videos}/0.txt: {why}; {videos}/2.txt: {why}")
    # For other text encoders they are words like any others.
    TrainingFamily.of(str(saved(folder, "hunyuan_video"))).check_prompt("a square, <image>")


def test_optimizers_adapters_and_trackers_that_cannot_work(refused: Callable[..., str], tmp_path: Path) -> None:
    videos = captioned_squares(tmp_path / "videos", 1)
    sizes = {"data": str(videos), "resolutions": "[[32, 48]]", "frame_counts": "[9]"}
    for options, said in (
        ({"optimizer_args": '{"beta": 1}'}, "optimizer_args: beta is no argument of torch.optim.AdamW; did you mean"),
        ({"optimizer_args": '{"eps": -1}'}, 'optimizer_args = {"eps": -1}: torch.optim.AdamW refuses it: Invalid eps'),
        ({"optimizer": "sgd_schedulefree", "lr_scheduler": "cosine"}, 'lr_scheduler = "cosine": sgd_schedulefree'),
        ({"report_to": "wandbb"}, "report_to: wandbb is unknown; did you mean wandb?"),
        ({"report_to": '["tensorboard", "clearml"]'}, "report_to: clearml is not installed: pip install clearml"),
        ({"lora_type": "lokr"}, 'lora_format = "diffusers": pipelines of stock diffusers load no lora_type = "lokr"'),
        (
            {"lora_type": "loha", "lora_format": "peft", "lora_targets": '["patch_embedding"]'},
            "lora_targets: patch_embedding is a Conv3d, and only linear layers",
        ),
    ):
        assert said in refused("wan", **sizes, **options)
    assert not (tmp_path / "run").exists()
