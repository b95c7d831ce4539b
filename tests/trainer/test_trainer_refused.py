"""What the families with images, experts and new conventions refuse, each with one line that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.families import TrainingFamily
from hub_cases import CASES, Size
from tiny_hub_folders import save_tiny_cogvideox, save_tiny_kandinsky

IMAGE = "image2video"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, made when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else CASES[name].save(root / name)

    return folder


def changed(folder: Path, target: Path, part: str, **changes: Any) -> str:
    shutil.copytree(folder, target)
    file = target / part
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(target)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("cogvideox", Size(13), r"frame count 13: the VAE makes 1 \+ 8n frames \(1, 9, \.\.\.\)"),
        ("cogvideox", Size(8), "frame count 8"),
        ("cogvideox", Size(9, 40), "40x48: height must be a multiple of 16, width of 16"),
        ("kandinsky5", Size(8), r"frame count 8: the VAE makes 1 \+ 4n frames"),
        ("kandinsky5", Size(9, 32, 40), "32x40: height must be a multiple of 16, width of 16"),
        ("kandinsky5 image", Size(13), "frame count 13: the image-to-video pipeline makes clips of 17 frames or more"),
        ("wan image encoder", Size(8), r"frame count 8: the VAE makes 1 \+ 4n frames"),
        ("hunyuan token_replace", Size(1), "frame count 1: .*none is left to predict"),
        ("hunyuan latent_concat", Size(1), "frame count 1: .*none is left to predict"),
        ("hunyuan latent_concat", Size(9, 32, 40), "32x40: height must be a multiple of 16"),
    ],
)
def test_a_size_that_the_model_cannot_make(saved: Callable[[str], Path], name: str, size: Size, message: str) -> None:
    family = CASES[name].family(saved(name))
    family.check_bucket(CASES[name].size)
    with pytest.raises(ValueError, match=message):
        family.check_bucket(size)


def test_the_frame_counts_that_are_refused_come_back_with_another_length(saved: Callable[[str], Path]) -> None:
    # Why 13 frames are none that CogVideoX can be trained on, though its VAE encodes them without an error.
    family = CASES["cogvideox"].family(saved("cogvideox"))
    vae = family.load_vae(torch.float32)
    lengths = {}
    for frames in (9, 13, 17):
        latents = family.encode_latents(vae, torch.zeros(1, frames, 3, 32, 48, dtype=torch.uint8))
        lengths[frames] = family.decode(vae, latents).shape[1]
    assert lengths == {9: 9, 13: 16, 17: 17}


def test_kandinskys_image_pipeline_makes_nothing_of_shorter_clips(saved: Callable[[str], Path]) -> None:
    # Why they are refused before a run, whose validation clips would be all NaN.
    case = CASES["kandinsky5 image"]
    family = case.family(saved("kandinsky5 image"))
    texts = family.encode_text(family.load_text(torch.float32), ["a red square", ""])
    pipeline: Any = family.pipeline(family.load_transformer(torch.float32), family.load_vae(torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    image, generator = torch.zeros(1, 3, 32, 48), torch.Generator().manual_seed(0)
    finite = {}
    for frames in (13, 17):
        size = family.size_arguments(Size(frames))
        arguments = {**family.text_arguments(*texts), **size, "image": image, "generator": generator}
        latents = pipeline(**arguments, num_inference_steps=1, output_type="latent").frames
        finite[frames] = bool(latents.isfinite().all())
    assert finite == {13: False, 17: True}


def test_learned_positions_are_of_one_size(tmp_path: Path) -> None:
    learned = {"use_learned_positional_embeddings": True, "use_rotary_positional_embeddings": True}
    folder = save_tiny_cogvideox(tmp_path / "cogvideox", image=True, **learned)
    family = TrainingFamily.of(str(folder), IMAGE)
    family.check_bucket(Size(9))
    for size in (Size(17), Size(9, 48, 48)):
        with pytest.raises(ValueError, match="has learned positions for 32x48 with 9 frames alone"):
            family.check_bucket(size)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("cogvideox", IMAGE, "task = image2video: .* takes 4 channels, image2video needs 8"),
        ("cogvideox image", "text2video", "task = text2video: .* takes 8 channels, text2video needs 4"),
        ("kandinsky5 without conditions", IMAGE, r"no channels that say which frame is given \(visual_cond\)"),
        ("wan image encoder", "text2video", r"is an image-to-video model \(12 channels\)"),
        ("hunyuan token_replace", "text2video", r"an image-to-video model \(image_condition_type = token_replace\)"),
        ("hunyuan latent_concat", "text2video", r"an image-to-video model \(image_condition_type = latent_concat\)"),
    ],
)
def test_a_task_that_the_model_is_not_made_for(
    saved: Callable[[str], Path], name: str, task: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingFamily.of(str(saved(name)), task)


def test_another_familys_folder_and_parts_that_are_missing(saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"family = wan, but .* has a CogVideoXTransformer3DModel \(cogvideox\)"):
        TrainingFamily.of(str(saved("cogvideox")), family="wan")
    with pytest.raises(ValueError, match=r"expert = low: .* has one transformer"):
        TrainingFamily.of(str(saved("kandinsky5")), expert="low")
    copy = tmp_path / "kandinsky5"
    shutil.copytree(saved("kandinsky5"), copy)
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(ValueError, match="lacks text_encoder_2: a kandinsky5_video pipeline has tokenizer, "):
        TrainingFamily.of(str(copy))
    without = changed(saved("wan image encoder"), tmp_path / "a", "model_index.json", image_encoder=[None, None])
    with pytest.raises(ValueError, match="lacks image_encoder, whose image embeddings"):
        TrainingFamily.of(without, IMAGE)
    shutil.copytree(saved("wan image encoder"), tmp_path / "b")
    (tmp_path / "b" / "image_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks image_encoder, whose image embeddings"):
        TrainingFamily.of(str(tmp_path / "b"), IMAGE)
    without = changed(saved("hunyuan token_replace"), tmp_path / "d", "model_index.json", image_processor=[None, None])
    with pytest.raises(ValueError, match="lacks image_processor, which makes the text encoder's image"):
        TrainingFamily.of(without, IMAGE)
    other = changed(saved("cogvideox"), tmp_path / "c", "model_index.json", vae=["diffusers", "AutoencoderKLWan"])
    with pytest.raises(ValueError, match="its VAE is an AutoencoderKLWan; cogvideox needs an AutoencoderKLCogVideoX"):
        TrainingFamily.of(other)


def test_models_of_other_conventions(saved: Callable[[str], Path], tmp_path: Path) -> None:
    predicts = changed(saved("cogvideox"), tmp_path / "a", "scheduler/scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type = epsilon of the scheduler: must be v_prediction"):
        TrainingFamily.of(predicts)
    two = changed(saved("wan image encoder"), tmp_path / "b", "transformer/config.json", pos_embed_seq_len=514)
    with pytest.raises(ValueError, match="wants a first and a last frame"):
        TrainingFamily.of(two, IMAGE)
    odd = changed(saved("wan image encoder"), tmp_path / "c", "transformer/config.json", in_channels=9)
    with pytest.raises(ValueError, match=r"takes 9 channels and the VAE makes 4: supported are 4 and, .*, 12"):
        TrainingFamily.of(odd, IMAGE)
    noisy = changed(saved("hunyuan latent_concat"), tmp_path / "d", "transformer/config.json", in_channels=4)
    with pytest.raises(ValueError, match=r"takes 4 channels, image2video with .* = latent_concat needs 9"):
        TrainingFamily.of(noisy, IMAGE)


def test_kandinskys_sparse_attention_and_batches(tmp_path: Path) -> None:
    family = TrainingFamily.of(str(save_tiny_kandinsky(tmp_path / "kandinsky5", sparse=True)))
    family.check_bucket(Size(9, 128, 256))
    with pytest.raises(ValueError, match=r"must be a multiple of 128, width of 128 .*squares of sparse attention"):
        family.check_bucket(Size(9, 64, 128))
    family.check_run(1, "cuda")
    with pytest.raises(ValueError, match=r"attends sparsely .* no backward on a CPU: train it on a GPU"):
        family.check_run(1, "cpu")
    with pytest.raises(ValueError, match=r"batch_size = 2: .* set batch_size to 1 and gradient_accumulation_steps"):
        family.check_run(2, "cuda")
