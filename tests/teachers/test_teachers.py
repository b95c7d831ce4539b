"""The DINOv2 teacher."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import clip_pixels, tiny_dinov2
from transformers import ViTConfig, ViTModel

from crepa_kernels import CrepaConfig
from crepa_kernels.teachers.encoding import FrameEncoder, resized

CPU = torch.device("cpu")
GRID = (2, 3)


def square_frames(count: int, side: int = 70) -> torch.Tensor:
    return clip_pixels(1, count, side, side)[0]


@pytest.mark.parametrize("registers", [0, 3])
def test_features_are_the_patch_tokens_after_the_final_norm(registers: int) -> None:
    model = tiny_dinov2(registers=registers).eval()
    frames = square_frames(2)
    found = FrameEncoder(model, image_size=70).encode(frames, GRID, CPU)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = (frames.permute(0, 2, 3, 1).numpy() / 255 - mean) / std
    with torch.no_grad():
        states = model.encoder(model.embeddings(torch.tensor(images).permute(0, 3, 1, 2).float())).last_hidden_state
        expected = model.layernorm(states)[:, 1 + registers :]
    assert found.grid == (5, 5)
    assert found.features.shape == (2, 25, 32)
    # Images normalised in float64 here and in float32 there.
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", [CPU, "cpu"], ids=["device", "name"])
def test_whatever_its_source_a_model_is_loaded_once(device: torch.device | str, tmp_path: Path) -> None:
    model = tiny_dinov2(tmp_path)
    for source in (model, lambda: model, str(tmp_path)):
        teacher = FrameEncoder(source, image_size=70)
        loaded = teacher.load(device)
        assert loaded is teacher.load(device)
        assert (loaded.encode.model is model) == (source != str(tmp_path))


@pytest.mark.parametrize("size", ["70", 70.0, True])
def test_a_size_that_is_no_integer_is_named(size: Any) -> None:
    with pytest.raises(ValueError, match=f"image_size must be an integer, in pixels, got {size!r}"):
        FrameEncoder("dinov2_vits14", image_size=size)


def test_patches_are_in_raster_order() -> None:
    # Position embeddings and layers out of the way: a patch's features are a function of its own pixels.
    model = tiny_dinov2(num_hidden_layers=0)
    torch.nn.init.zeros_(model.embeddings.position_embeddings)
    frames = torch.zeros(1, 3, 70, 70)
    teacher = FrameEncoder(model, image_size=70)
    blank = teacher.encode(frames, GRID, CPU).features
    frames[:, :, 14:28, 42:56] = 1.0
    changed = (teacher.encode(frames, GRID, CPU).features - blank).abs().sum(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 5 + 3]


def test_frames_are_resized_with_antialiasing() -> None:
    frames = square_frames(1, side=96)
    found = resized(frames, (28, 42))[0].permute(1, 2, 0).numpy() * 255
    image = Image.fromarray(frames[0].permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((42, 28), Image.Resampling.BILINEAR), dtype=np.float64)
    # Pillow rounds to whole levels after each of its two passes.
    assert np.abs(found - expected).max() <= 1.01


def test_floating_point_pixels_mean_the_same_as_bytes() -> None:
    frames = square_frames(1)
    # Division by 255 rounds in another place.
    torch.testing.assert_close(resized(frames / 255, (28, 28)), resized(frames, (28, 28)))


def test_resize_to_the_grid_gives_one_patch_for_each_student_token() -> None:
    teacher = FrameEncoder(tiny_dinov2(), resize="grid")
    found = teacher.encode(clip_pixels(1, 2, 32, 48)[0], (3, 7), CPU)
    assert found.grid == (3, 7)
    assert found.features.shape == (2, 21, 32)


@pytest.mark.parametrize("at_a_time", [1, 2, 5, -1, 0])
def test_frames_encoded_at_a_time_change_nothing(at_a_time: int) -> None:
    frames, model = square_frames(5), tiny_dinov2()
    whole = FrameEncoder(model, image_size=70).encode(frames, GRID, CPU).features
    teacher = FrameEncoder(model, image_size=70, frames_batch_size=at_a_time)
    # Batched products may add up in another order.
    torch.testing.assert_close(teacher.encode(frames, GRID, CPU).features, whole, rtol=1e-4, atol=1e-5)
    assert teacher.frames_encoded == 5


def test_the_encoder_is_frozen_and_ignores_autocast() -> None:
    model = tiny_dinov2().train()
    teacher = FrameEncoder(model, image_size=70)
    expected = teacher.encode(square_frames(1), GRID, CPU).features
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher.encode(square_frames(1), GRID, CPU).features
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("registers", [0, 3])
def test_feature_size_comes_from_config_json_without_weights(tmp_path: Path, registers: int) -> None:
    tiny_dinov2(tmp_path, registers=registers)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    teacher = FrameEncoder(str(tmp_path), image_size=70)
    assert (teacher.feature_size(), teacher.encoder.patch_size) == (32, 14)
    with pytest.raises(OSError, match="safetensors"):  # so there was nothing to load
        teacher.encode(square_frames(1), GRID, CPU)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dinov2_vits14", 384),
        ("dinov2_vitb14", 768),
        ("dinov2_vitl14_reg", 1024),
        ("dinov2_vitg14", 1536),
        ("dino_v2_g", 1536),
        ("dinov2-vitb14", 768),
    ],
)
def test_feature_size_of_a_known_name_needs_no_file(name: str, size: int) -> None:
    assert FrameEncoder(name).feature_size() == size


@pytest.mark.parametrize("registers", [0, 3])
def test_a_folder_is_loaded_at_the_first_frame(tmp_path: Path, registers: int) -> None:
    model = tiny_dinov2(tmp_path, registers=registers)
    expected = FrameEncoder(model, image_size=70).encode(square_frames(1), GRID, CPU).features
    found = FrameEncoder(tmp_path, image_size=70).encode(square_frames(1), GRID, CPU).features
    # Weights read from a file lie at other addresses, and products over them round differently.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_callable_is_called_once_and_only_when_needed() -> None:
    calls: list[int] = []

    def load() -> torch.nn.Module:
        calls.append(1)
        return tiny_dinov2()

    teacher = FrameEncoder(load, image_size=70)
    assert teacher.feature_size() is None
    assert not calls
    for _ in range(2):
        teacher.encode(square_frames(1), GRID, CPU)
    assert calls == [1]
    assert teacher.feature_size() == 32


def vit() -> ViTModel:
    return ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14))


def test_another_kind_of_encoder_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 16}))
    with pytest.raises(ValueError, match=r"'vit'.*Dinov2Model.*Dinov2WithRegistersModel"):
        FrameEncoder(str(tmp_path), image_size=28).feature_size()
    # A module may answer anything, which is only known when it is asked.
    with pytest.raises(ValueError, match=r"ViTModel.* must answer a tensor .* got BaseModelOutputWithPooling"):
        FrameEncoder(vit(), image_size=28).feature_size()
    with pytest.raises(ValueError, match="got dict"):
        FrameEncoder({}, image_size=28)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got Tensor"):
        FrameEncoder(lambda: torch.ones(1), image_size=28).encode(square_frames(1), GRID, CPU)  # type: ignore


def test_an_encoder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"crepa_encoder = .*nowhere: its config.json cannot be read.*dinov2_vits14"):
        FrameEncoder(tmp_path / "nowhere").feature_size()


@pytest.mark.parametrize("size", [0, 13, 71])
def test_the_image_size_must_be_whole_patches(tmp_path: Path, size: int) -> None:
    tiny_dinov2(tmp_path)
    with pytest.raises(ValueError, match=f"crepa_encoder_image_size = {size} must be a multiple .* 14"):
        FrameEncoder(tmp_path, image_size=size).feature_size()


def test_a_configurations_teacher_is_the_one_of_its_keys(tmp_path: Path) -> None:
    tiny_dinov2(tmp_path)
    sizes = {"crepa_encoder_image_size": 28, "crepa_encoder_frames_batch_size": 1}
    config = CrepaConfig.from_dict({"crepa_encoder": str(tmp_path), **sizes})
    frames = square_frames(2)
    expected = FrameEncoder(tmp_path, image_size=28).encode(frames, GRID, CPU)
    batches: list[int] = []
    model = tiny_dinov2()
    model.register_forward_pre_hook(lambda _, args, given: batches.append(len(given["pixel_values"])), with_kwargs=True)
    for teacher in (FrameEncoder.from_config(config), FrameEncoder.from_config(config, model)):
        found = teacher.encode(frames, GRID, CPU)
        assert found.grid == expected.grid == (2, 2)
        torch.testing.assert_close(found.features, expected.features)
    assert batches == [1, 1]
    grid = config.replace(crepa_encoder_resize="grid")
    assert FrameEncoder.from_config(grid).encode(frames, GRID, CPU).grid == GRID


def test_loading_a_teacher_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_dinov2(tmp_path)
    with caplog.at_level(logging.INFO, "crepa_kernels"):
        for _ in range(3):
            FrameEncoder(str(tmp_path), image_size=28).encode(square_frames(1), GRID, CPU)
    assert [record.getMessage() for record in caplog.records] == [f"loading the teacher {tmp_path} as torch.float32"]
