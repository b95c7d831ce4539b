"""What a player shows is what is read: orientation, aspect, colours, cuts, times, and files that are no videos."""

from __future__ import annotations

import contextlib
import itertools
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from corner_videos import HEIGHT, PRIMARIES_2020, WIDTH, as_yuv, corner_error, corners, hlg, linear, pq, write
from crepa_trainer.data.clips import read_clips
from crepa_trainer.data.video import VideoError, VideoInfo, probe_video
from videos import read_frames

NEAR = 8  # of 255: what 4:2:0 and a quantizer leave of a flat colour
NEAR_HDR = 25  # tone mapping bends what is bright


def shown(path: Path, **how: Any) -> tuple[VideoInfo, float]:
    """What a probe says, and the colours' error in the first frame of that size."""
    info = probe_video(path, **how)
    frames = read_frames(path, info.height, info.width, 1000)
    assert len(frames) == info.frames or how
    return info, corner_error(frames[0])


TURNS = [m for m in itertools.product((-1, 0, 1), repeat=4) if sum(map(abs, m)) == 2 and m[0] * m[3] != m[1] * m[2]]


@pytest.mark.parametrize("matrix", TURNS)
def test_every_turn_and_mirroring_of_a_display_matrix(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = matrix
    across, down = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    # Where each pixel of the stored picture is shown, which is what the container says.
    x, y = a * across + c * down, b * across + d * down
    x, y = x - x.min(), y - y.min()
    upright = corners(int(y.max()) + 1, int(x.max()) + 1)
    info, error = shown(write(tmp_path / "turned.mp4", [upright[y, x]] * 3, matrix=matrix))
    assert (info, error < NEAR) == (VideoInfo(3, *upright.shape[:2]), True), error


@pytest.mark.parametrize(
    ("aspect", "suffix"),
    [(Fraction(4, 3), "mp4"), (Fraction(8, 9), "mkv"), (Fraction(64, 45), "avi"), (Fraction(1, 2), "ts")],
)
def test_pixels_that_are_not_square(tmp_path: Path, aspect: Fraction, suffix: str) -> None:
    info, error = shown(write(tmp_path / f"wide.{suffix}", [corners()] * 12, aspect=aspect))
    assert (info, error < NEAR) == (VideoInfo(12, HEIGHT, round(WIDTH * aspect)), True), (info, error)


def test_pixels_that_are_not_square_and_lie_on_their_side(tmp_path: Path) -> None:
    stored = np.ascontiguousarray(np.rot90(corners(), 1))
    path = write(tmp_path / "a.mp4", [stored] * 3, matrix=(0, 1, -1, 0), aspect=Fraction(4, 3))
    info, error = shown(path)
    assert (info, error < NEAR) == (VideoInfo(3, HEIGHT * 4 // 3, WIDTH), True), (info, error)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 5, 6, 9])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_each_matrix_in_each_range(tmp_path: Path, matrix: int, full: bool, codec: str) -> None:
    picture = as_yuv(corners() / 255, matrix, full)
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    codec_options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    for pixels in ("yuv420p10le", "yuv444p10le"):
        path = tmp_path / f"{pixels}.mkv"
        _, error = shown(write(path, [picture] * 2, codec=codec, pixels=pixels, tags=tags, options=codec_options))
        assert error < NEAR


@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p"])
def test_eight_bits(tmp_path: Path, pixels: str) -> None:
    codec = "mjpeg" if pixels == "yuvj420p" else "libx264"
    tags = {"color_range": 2} if codec == "mjpeg" else {}
    options = {"qmin": "1", "qmax": "2"} if codec == "mjpeg" else {}
    path = write(tmp_path / "a.mov", [corners()] * 2, pixels=pixels, codec=codec, tags=tags, options=options)
    assert shown(path)[1] < NEAR


@pytest.mark.parametrize(("transfer", "number", "curve"), [("PQ", 16, pq), ("HLG", 18, hlg)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_hdr_is_tone_mapped(tmp_path: Path, transfer: str, number: int, curve: Any, suffix: str) -> None:
    signal = curve(linear(corners()) @ PRIMARIES_2020.T)
    tags = {"colorspace": 9, "color_range": 1, "color_trc": number, "color_primaries": 9}
    path = tmp_path / f"hdr.{suffix}"
    info, error = shown(write(path, [as_yuv(signal, 9, False)] * 2, pixels="yuv420p10le", tags=tags))
    assert info.hdr == transfer
    assert error < NEAR_HDR
    white = as_yuv(curve(np.full((HEIGHT, WIDTH, 3), 4.9)), 9, False)
    write(path, [white] * 2, pixels="yuv420p10le", tags=tags)
    # Highlights are bent to white and not cut off below it.
    assert read_frames(path, HEIGHT, WIDTH, 1).float().mean() > 245


def test_bt2020_primaries_without_hdr_are_converted(tmp_path: Path) -> None:
    light = (linear(corners()) @ PRIMARIES_2020.T).clip(0)
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    tags = {"colorspace": 9, "color_range": 1, "color_trc": 14, "color_primaries": 9}
    path = write(tmp_path / "a.mkv", [as_yuv(signal, 9, False)] * 2, pixels="yuv420p10le", tags=tags)
    assert shown(path)[1] < NEAR


def counted(frames: int) -> list[np.ndarray]:
    return [np.full((64, 64, 3), 5 * n, np.uint8) for n in range(frames)]


def values(pixels: Any) -> list[int]:
    return [round(float(frame.float().mean()) / 5) for frame in pixels]


def test_a_trim_by_stream_copy_shows_what_its_edit_list_leaves(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", counted(40), options={"g": "30", "bf": "0"})
    path = tmp_path / "trimmed.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                # What comes before time 0 is left out by an edit list.
                packet.stream = stream
                packet.pts -= 12 * 512
                packet.dts -= 12 * 512
                target.mux(packet)
    assert probe_video(path).frames == 28
    assert values(read_frames(path, 64, 64, 100)) == list(range(12, 40))


def test_fragments_after_the_first_samples_are_counted(tmp_path: Path) -> None:
    for flags in ("frag_keyframe+empty_moov", "frag_keyframe", "frag_keyframe+default_base_moof"):
        path = write(tmp_path / "a.mp4", counted(30), options={"g": "5", "bf": "0"}, mux={"movflags": flags})
        assert probe_video(path).frames == 30
        assert values(read_frames(path, 64, 64, 100)) == list(range(30))


def test_a_recording_that_begins_anywhere_has_the_frames_that_can_be_shown(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.ts", counted(40), options={"g": "10", "bf": "2"}).read_bytes()
    cut = tmp_path / "cut.ts"
    for packets in (11, 17, 23):
        cut.write_bytes(whole[188 * packets :])
        frames = values(read_frames(cut, 64, 64, 100))
        assert probe_video(cut).frames == len(frames)
        assert 20 <= len(frames) < 40
        assert frames == list(range(frames[0], 40))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_trim_at_an_open_group_of_pictures_has_the_frames_that_can_be_shown(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    groups = "open-gop=1:keyint=12:min-keyint=12:bframes=4:b-adapt=0:scenecut=0"
    options = {"x264-params": groups} if codec == "libx264" else {"x265-params": f"{groups}:log-level=none"}
    whole = write(tmp_path / "whole.mp4", counted(40), codec=codec, options=options)
    path = tmp_path / f"cut.{suffix}"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream, packets = target.add_stream_from_template(source.streams.video[0]), list(source.demux(video=0))[:-1]
        begin = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        # Late enough that no edit list leaves out the frames before the key frame, which need those that were cut away.
        late = min(packet.dts for packet in packets[begin:]) - 12 * 512
        for packet in packets[begin:]:
            packet.stream, packet.pts, packet.dts = stream, packet.pts - late, packet.dts - late
            target.mux(packet)
    frames = values(read_frames(path, 64, 64, 100))
    assert frames == list(range(frames[0], 40))
    assert probe_video(path).frames == len(frames) < len(packets) - begin


RATES = [(60, 24, 8), (60, 30, 10), (25, 25, 20), (12, 24, 40), (50, 12.5, 5)]


@pytest.mark.parametrize(("rate", "fps", "taken"), RATES)
def test_frames_are_taken_at_their_times(tmp_path: Path, rate: int, fps: float, taken: int) -> None:
    for suffix in ("mp4", "mkv", "ts"):
        path = write(tmp_path / f"a.{suffix}", counted(20), rate=rate)
        info = probe_video(path, fps)
        (clip,) = [pixels for _, pixels in read_clips(path, 64, 64, [0], info.frames, fps)]
        assert info.frames == taken
        assert info.rate == pytest.approx(rate, rel=0.03)
        assert values(clip) == [int(n * rate / fps + 1e-6) for n in range(taken)]
        with pytest.raises(VideoError, match="ends after"):
            list(read_clips(path, 64, 64, [1], info.frames, fps))


def test_a_variable_frame_rate_is_told_and_followed(tmp_path: Path) -> None:
    times = [0, 1, 2, 3, 10, 11, 20, 24]
    for suffix in ("mp4", "mkv"):
        path = write(tmp_path / f"a.{suffix}", counted(8), times=times)
        info = probe_video(path, 25)
        assert not info.constant
        assert probe_video(write(tmp_path / f"b.{suffix}", counted(8))).constant
        clips = list(read_clips(path, 64, 64, [0], info.frames, 25))
        assert values(clips[0][1])[:25] == [max(n for n, t in enumerate(times) if t <= tick) for tick in range(25)]


@pytest.mark.parametrize("name", ["12:30.mp4", "concat:ok.mp4", "file:ok.mp4", "a%20b#?.mp4", "%03d.mp4", "-i.mp4"])
def test_a_name_is_a_path_whatever_it_looks_like(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "ok.mp4", [corners()[:64]] * 9)
    write(tmp_path / "own.mp4", [corners()] * 3).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert shown(Path(name))[0] == shown(tmp_path / name)[0] == VideoInfo(3, HEIGHT, WIDTH)


def test_metadata_that_is_not_utf8_is_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLE OF IT"
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(corners(), format="rgb24")), *stream.encode()])
    data = path.read_bytes()
    assert data.count(b"TITLE OF IT") == 1
    path.write_bytes(data.replace(b"TITLE OF IT", b"TITL\xe9 \xff\xfe IT"))
    assert shown(path)[1] < NEAR


def test_what_is_no_video_file_is_said_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    write(tmp_path / "other.ts", [corners()] * 9)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/other.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile other.ts\n")
    for path in sorted(tmp_path.iterdir()):
        if path.name != "other.ts":
            with pytest.raises(VideoError, match=r"regular file|playlist|cannot be decoded"):
                probe_video(path)


def test_whatever_a_decoder_raises_is_the_videos_error(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp4", [corners()] * 9).read_bytes()
    broken = tmp_path / "b.mp4"
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 12):
            data[place] = rng.integers(0, 256)
        broken.write_bytes(data)
        # What comes out of it is a clip or this error.
        with contextlib.suppress(VideoError):
            info = probe_video(broken)
            assert len(read_frames(broken, 32, 48, info.frames)) <= info.frames
