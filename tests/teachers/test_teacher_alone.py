"""Teacher, its cache and the schedule by themselves, without a regularizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_dinov2

from benches.teacher_cache import errors, features_of
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


@pytest.mark.parametrize("width", [384, 1536])
@pytest.mark.parametrize("outlier", [1.0, 40.0])
def test_8_bits_change_little_of_a_teacher_with_outliers(width: int, outlier: float) -> None:
    """What docs/training.md says of them, by the command that measured it."""
    found = errors(features_of(width, outlier, frames=2))
    assert 0 < found.cosine <= found.worst < 1.5e-3
    assert found.loss < 1e-3
    assert found.gradient < 0.05


def test_a_cache_in_8_bits_gives_the_same_the_first_time_and_later(tmp_path: Path) -> None:
    made = features_of(32, 40.0)
    cache = TeacherCache(tmp_path, precision="int8")
    first = cache.get({"video": 1}, lambda: made)
    later = cache.get({"video": 1}, lambda: pytest.fail("made twice"))
    assert first.features.equal(later.features)
    assert later.features.dtype == torch.float32
    assert TeacherCache(tmp_path).get({"video": 1}, lambda: made).features.equal(made.features)
    with pytest.raises(ValueError, match="precision must be 'teacher' or 'int8', got 'int4'"):
        TeacherCache(tmp_path, precision="int4")


def test_a_token_of_zeros_stays_one_in_8_bits(tmp_path: Path) -> None:
    zeros = TeacherFeatures(torch.zeros(1, 2, 4, 8), (2, 2))
    assert not TeacherCache(tmp_path, precision="int8").get({}, lambda: zeros).features.any()
