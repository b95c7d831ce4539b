"""Teacher, its cache and the schedule by themselves, without a regularizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_dinov2

from crepa_kernels import CrepaConfig, CrepaSchedule, DinoV2Teacher, TeacherCache, TeacherFeatures


def test_frames_to_features_on_their_grid(tmp_path: Path) -> None:
    model = tiny_dinov2(tmp_path / "dinov2")
    frames = torch.rand(2, 3, 3, 40, 56)
    teacher = DinoV2Teacher(str(tmp_path / "dinov2"), image_size=28)
    features, grid = teacher(frames)
    width = model.config.hidden_size
    assert (grid, features.shape) == ((2, 2), (2, 3, 4, width))
    again, _ = DinoV2Teacher(model, image_size=28, frames_batch_size=1)(frames)
    torch.testing.assert_close(again, features)
    wide, grid = teacher(frames, grid=(3, 5))
    assert (grid, wide.shape) == ((3, 5), (2, 3, 15, width))
    one, _ = teacher(frames[0, :1])
    torch.testing.assert_close(one[0], features[0, 0])
    with pytest.raises(ValueError, match=r"frames must be \(\.\.\., 3, H, W\)"):
        teacher(frames[0, 0])
    with pytest.raises(ValueError, match="needs a DINOv2"):
        DinoV2Teacher(torch.nn.Identity())


def test_features_are_made_once_and_again_where_their_file_is_damaged(tmp_path: Path) -> None:
    cache, made = TeacherCache(tmp_path / "teacher"), []

    def make() -> TeacherFeatures:
        made.append(1)
        return TeacherFeatures(torch.arange(24.0).view(1, 6, 4), (2, 3))

    content = {"video": "1234-abcd", "frames": [0, 4], "encoder": "dinov2_vitb14", "image_size": 518}
    for expected in (1, 1):
        features, grid = cache.get(content, make)
        assert (len(made), grid) == (expected, (2, 3))
        assert features.equal(torch.arange(24.0).view(1, 6, 4))
    cache.get({**content, "image_size": 224}, make)
    assert len(made) == 2
    path = cache.path(content)
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get(content, make).grid == (2, 3)
    assert len(made) == 3
    # Another process finds it.
    assert TeacherCache(str(tmp_path / "teacher")).get(content, make).grid == (2, 3)
    assert len(made) == 3


def test_the_schedule_alone() -> None:
    schedule = CrepaSchedule(CrepaConfig.preset("t2v", family="wan", crepa_cutoff_step=150), max_train_steps=200)
    assert schedule.weight(0) == 0
    assert schedule.weight(100) == pytest.approx(0.5)
    assert not schedule.decide(10).cutoff
    assert schedule.decide(150).cutoff
