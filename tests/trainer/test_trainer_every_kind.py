"""A folder with a file of every kind: what is trained on is what a player shows, and the plan names all the rest."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from corner_videos import CORNERS, corners
from corner_videos import write as write_corners
from crepa_trainer.data.clips import read_clips
from crepa_trainer.data.dataset import FoundClips, find_clips
from crepa_trainer.data.video import VideoError, VideoInfo
from crepa_trainer.families import TrainingFamily
from crepa_trainer.reporting.plan import make_plan
from crepa_trainer.reporting.table import print_plan
from crepa_trainer.settings import RunSettings
from kinds_changed import CHANGED, PASSED_OVER
from kinds_encoded import ENCODED
from rich.console import Console
from tiny_pipelines import save_tiny_wan_pipeline
from video_kinds import Kind, number_of

from crepa_kernels import CrepaConfig

KINDS = [*ENCODED, *CHANGED]
SIZES = ((48, 64), (64, 48), (48, 128), (48, 32), (128, 128), (128, 256), (96, 128), (144, 176), (576, 768))
RATE = 25
FAST = 50  # frames a second at which clips are taken in the second plan
SLACK = 1e-3  # seconds: some containers count in milliseconds


@dataclass(frozen=True)
class Folder:
    """The files, why some could not be written here, and what is found in them, frame by frame and at a rate."""

    path: Path
    missing: Mapping[str, str]
    found: FoundClips
    at_rate: FoundClips
    plan: str
    read: dict[tuple[str, float | None], Any] = field(default_factory=dict)

    def clips(self, kind: Kind, fps: float | None = None) -> tuple[VideoInfo, dict[int, np.ndarray]]:
        """What is known of a file, and the pixels (F, 3, H, W) of its clips by their first frames."""
        if kind.name in self.missing:
            pytest.skip(self.missing[kind.name])
        found = self.found if fps is None else self.at_rate
        keys = [key for key in found.keys if key.video == kind.name]
        assert keys, found.skipped.get(str(self.path / kind.name))
        bucket = keys[0].bucket
        clips = read_clips(
            self.path / kind.name, bucket.height, bucket.width, [key.start for key in keys], bucket.frames, fps
        )
        return found.infos[kind.name], {start: pixels.numpy() for start, pixels in clips}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path, missing = tmp_path_factory.mktemp("every kind"), {}
    for kind in KINDS:
        file = path / kind.name
        try:
            kind.make(file)
        except (av.FFmpegError, ValueError, OSError, AttributeError) as error:
            file.unlink(missing_ok=True)
            missing[kind.name] = f"this PyAV does not write it: {error}"
        else:
            # One for all that differ in their suffixes.
            file.with_suffix(".txt").write_text("four colours")
    for name, (make, _) in PASSED_OVER.items():
        make(path / name)
    model = save_tiny_wan_pipeline(tmp_path_factory.mktemp("model") / "wan")
    places = {"model": str(model), "data": path, "output": tmp_path_factory.mktemp("out")}
    settings = RunSettings(
        **places, resolutions=SIZES, frame_counts=(5, 9, 13, 17, 21, 49), max_train_steps=1, clips_per_video=2
    )
    family = TrainingFamily.of(settings.model)
    found = find_clips(settings, family)
    console = Console(file=io.StringIO(), width=200)
    print_plan(console, make_plan(settings, CrepaConfig(), family, found))
    at_rate = find_clips(settings.model_copy(update={"fps": FAST}), family)
    written: Any = console.file
    return Folder(path, missing, found, at_rate, " ".join(written.getvalue().split()))


def corner_error(pixels: np.ndarray) -> float:
    """How far the worst channel of the four corners of (3, H, W) is from what is shown there, of 255."""
    _, height, width = pixels.shape
    near, down, right = slice(2, 9), slice(height - 9, height - 2), slice(width - 9, width - 2)
    places = ((near, near), (near, right), (down, right), (down, near))
    means = [pixels[(slice(None), *place)].mean((1, 2)) for place in places]
    return float(max(np.abs(mean - color).max() for mean, color in zip(means, CORNERS.values(), strict=True)))


def numbers(info: VideoInfo, clips: Mapping[int, np.ndarray]) -> dict[int, int]:
    """The number that each frame of the clips shows."""
    height, width = next(iter(clips.values())).shape[2:]
    scale = max(height / info.height, width / info.width)
    return {
        start + n: number_of(frame, info.height, scale) for start, each in clips.items() for n, frame in enumerate(each)
    }


def ids(kinds: list[Kind]) -> dict[str, Any]:
    return {"argvalues": kinds, "ids": [kind.name for kind in kinds]}


TRAINED = [kind for kind in KINDS if kind.frames]


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", **ids(TRAINED))
def test_what_is_trained_on_is_what_a_player_shows(folder: Folder, kind: Kind) -> None:
    info, clips = folder.clips(kind)
    assert (info.frames, info.height, info.width) == (len(kind.frames), *kind.size)
    assert (info.cut is not None) == kind.name.startswith("cut off")
    shown = numbers(info, clips)
    assert shown == {n: kind.frames[n] for n in shown}
    assert {0, info.frames - 1} <= set(shown)
    assert max(corner_error(frame) for each in clips.values() for frame in each) < kind.near
    times = kind.times or [n / RATE for n in range(len(kind.frames) + 1)]
    lasts = np.diff(times)
    assert info.constant == (np.ptp(lasts) < SLACK)
    assert info.rate == pytest.approx((len(lasts) - 1) / (times[-2] - times[0]), rel=0.03)


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", **ids(TRAINED))
def test_frames_are_taken_at_their_times(folder: Folder, kind: Kind) -> None:
    times = kind.times or [n / RATE for n in range(len(kind.frames) + 1)]
    taken = math.ceil((times[-1] - times[0] - SLACK) * FAST)
    info, clips = folder.clips(kind, FAST)
    assert info.frames == taken
    begun = [sum(time - times[0] <= tick / FAST + SLACK for time in times[:-1]) - 1 for tick in range(taken)]
    shown = numbers(info, clips)
    assert shown == {n: kind.frames[begun[n]] for n in shown}


@pytest.mark.parametrize("kind", **ids([kind for kind in KINDS if kind.why]))
def test_what_is_passed_over_is_named_with_its_reason(folder: Folder, kind: Kind) -> None:
    if not kind.late:
        reason = folder.found.skipped[str(folder.path / kind.name)]
        assert re.search(kind.why, reason)
        assert f"{kind.name} ({reason})" in folder.plan
        return
    with pytest.raises(VideoError, match=kind.why):
        folder.clips(kind)


@pytest.mark.parametrize("kind", **ids([kind for kind in KINDS if kind.said]))
def test_what_becomes_of_a_video_is_said(folder: Folder, kind: Kind) -> None:
    if kind.name in folder.missing:
        pytest.skip(folder.missing[kind.name])
    assert kind.said in folder.plan


def test_every_file_is_trained_on_or_named(folder: Folder) -> None:
    written = {kind.name for kind in KINDS} - set(folder.missing)
    # Most kinds are there, whatever this FFmpeg lacks.
    assert len(written) > 0.9 * len(KINDS)
    trained, skipped = {key.video for key in folder.found.keys}, {Path(path).name for path in folder.found.skipped}
    assert not trained & skipped
    assert trained | skipped == written
    kinds = [kind for _, kind in PASSED_OVER.values()]
    assert folder.found.passed_over == {kind: kinds.count(kind) for kind in kinds}
    for kind in folder.found.passed_over:
        assert f"{kind}: {kinds.count(kind)}" in folder.plan
    assert len(written) + len(PASSED_OVER) == sum(path.suffix != ".txt" for path in folder.path.iterdir()) + 1


def test_no_encoder_makes_the_tests_a_real_time_process(tmp_path: Path) -> None:
    before = os.sched_getscheduler(0)
    write_corners(tmp_path / "av1.mp4", [corners()] * 3, codec="libsvtav1")
    assert os.sched_getscheduler(0) == before
