"""A folder of videos to clips: captions, buckets, where clips start, and what is refused before anything is loaded."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crepa_trainer.data.clips import read_clips
from crepa_trainer.data.dataset import Bucket, choose_bucket, clip_starts, find_clips, read_captions
from crepa_trainer.data.video import DataError, Upright, VideoError, VideoInfo, probe_video
from crepa_trainer.families import TrainingFamily
from crepa_trainer.settings import RunSettings
from tiny_pipelines import save_tiny_wan_pipeline
from videos import moving_square, read_frames, write_video

from crepa_kernels.config import ConfigError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TrainingFamily:
    return TrainingFamily.of(str(save_tiny_wan_pipeline(tmp_path_factory.mktemp("model") / "wan")))


def settings(folder: Path, **changes: Any) -> RunSettings:
    values = {"resolutions": ((32, 48), (48, 32)), "frame_counts": (5, 9), "clips_per_video": 2, **changes}
    return RunSettings(model="wan", data=folder / "data", output=folder / "out", max_train_steps=1, **values)


def add_video(folder: Path, name: str, frames: int = 12, height: int = 48, width: int = 80, **how: Any) -> Path:
    path = folder / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, moving_square(frames, height, width), **how)
    path.with_suffix(".txt").write_text(f" {path.stem} moves\n")
    return path


def test_each_video_gives_clips_in_the_bucket_that_fits_it(tmp_path: Path, family: TrainingFamily) -> None:
    add_video(tmp_path, "b/wide.mp4", frames=21)
    add_video(tmp_path, "a tall.mkv", height=80, width=48)
    add_video(tmp_path, "c short.mp4", frames=6)
    add_video(tmp_path, "d phone.mp4", frames=9, rotation=90)
    found = find_clips(settings(tmp_path), family)
    wide, tall = Bucket(32, 48, 9), Bucket(48, 32, 9)
    assert [(key.video, key.start, key.bucket, key.caption) for key in found.keys] == [
        ("a tall.mkv", 0, tall, "a tall moves"),
        ("a tall.mkv", 3, tall, "a tall moves"),
        ("b/wide.mp4", 0, wide, "wide moves"),
        ("b/wide.mp4", 12, wide, "wide moves"),
        ("c short.mp4", 0, Bucket(32, 48, 5), "c short moves"),
        ("c short.mp4", 1, Bucket(32, 48, 5), "c short moves"),
        ("d phone.mp4", 0, tall, "d phone moves"),
    ]
    assert found.buckets() == {Bucket(32, 48, 5): 2, wide: 2, tall: 3}
    assert (found.videos, dict(found.skipped)) == (4, {})
    assert found.keys[3].name == "b/wide.mp4 [12:21]"


@pytest.mark.parametrize(
    ("height", "width", "chosen"),
    [
        (48, 80, (32, 48)),
        (80, 48, (48, 32)),
        (64, 64, (32, 32)),
        (1080, 1920, (64, 96)),  # two of one ratio: the larger, which it fills
        (63, 200, (32, 48)),  # ... unless it would be blown up
        (20, 30, (32, 48)),
    ],
)
def test_the_nearest_aspect_ratio_is_taken(height: int, width: int, chosen: tuple[int, int]) -> None:
    sizes = ((64, 96), (32, 48), (48, 32), (32, 32))
    assert choose_bucket(VideoInfo(9, height, width), sizes, (5, 9)) == Bucket(*chosen, 9)
    assert choose_bucket(VideoInfo(8, height, width), sizes, (5, 9)) == Bucket(*chosen, 5)


@pytest.mark.parametrize(
    ("frames", "clip", "count", "starts"),
    [
        (21, 9, 1, [0]),
        (21, 9, 3, [0, 6, 12]),
        (10, 9, 4, [0, 1]),
        (9, 9, 4, [0]),
        (1000, 81, 5, [0, 229, 459, 689, 919]),
    ],
)
def test_clips_are_evenly_spread(frames: int, clip: int, count: int, starts: list[int]) -> None:
    assert clip_starts(frames, clip, count) == starts


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv", "video.webm", "video.avi"])
def test_a_probe_says_what_decoding_gives(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("webm"):
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("libvpx", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
            for picture in moving_square(30):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    else:
        write_video(path, moving_square(30))
    assert probe_video(path) == VideoInfo(len(read_frames(path, 48, 80, 100)), 48, 80) == VideoInfo(30, 48, 80)


def test_a_probe_decodes_one_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    path = write_video(tmp_path / "long.mp4", moving_square(200))
    packets = []
    original = av.open

    class Counting:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.container = original(*args, **options)
            self.streams, self.format = self.container.streams, self.container.format

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            self.container.close()

        def demux(self, stream: Any) -> Any:
            for packet in self.container.demux(stream):
                packets.append(packet)
                yield packet

    monkeypatch.setattr(av, "open", Counting)
    assert probe_video(path).frames == 200
    # The encoder looks 40 frames ahead and the decoder's threads hold a few packets before the first frame.
    assert 0 < len(packets) < 60


def test_clips_are_cut_where_they_start(tmp_path: Path) -> None:
    path = write_video(tmp_path / "grey.mp4", [np.full((48, 64, 3), 8 * f, np.uint8) for f in range(30)])
    whole = read_frames(path, 48, 64, 30)
    for starts in ([0, 3, 20], [2, 25], [4]):
        clips = list(read_clips(path, 48, 64, starts, 5))
        assert [start for start, _ in clips] == starts
        for start, pixels in clips:
            assert pixels.equal(whole[start : start + 5])
    with pytest.raises(VideoError, match="ends after 30 frames, a clip of it needs 31"):
        list(read_clips(path, 48, 64, [0, 26], 5))


def test_only_the_frames_of_open_clips_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "long.mp4", moving_square(60))
    shrunk, most = Upright.__call__, 0
    made: list[weakref.ref[np.ndarray]] = []

    def counted(*args: Any) -> np.ndarray:
        nonlocal most
        picture = shrunk(*args).copy()
        made.append(weakref.ref(picture))
        most = max(most, sum(ref() is not None for ref in made))
        return picture

    monkeypatch.setattr(Upright, "__call__", counted)
    assert len(list(read_clips(path, 48, 80, [0, 3, 30, 50], 5))) == 4
    # Two clips share frames 3 and 4; frames between clips are never shrunk.
    assert len(made) == 8 + 5 + 5
    assert most <= 6


def test_missing_and_empty_captions_are_one_error(tmp_path: Path, family: TrainingFamily) -> None:
    add_video(tmp_path, "good.mp4")
    for name, text in (("none", None), ("empty", b" \n"), ("latin", "café".encode("latin-1"))):
        file = add_video(tmp_path, f"{name}.mp4").with_suffix(".txt")
        file.unlink() if text is None else file.write_bytes(text)
    with pytest.raises(DataError) as error:
        find_clips(settings(tmp_path), family)
    message = str(error.value)
    assert message.startswith("no caption beside 3 of 4 videos: ")
    for words in ("none.txt is missing", "empty.txt is empty", "latin.txt is not UTF-8 text"):
        assert words in message
    assert "good" not in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a café".encode("utf-16-le"), "is UTF-16 or UTF-32, not UTF-8 text"),
        ("a cafe moves".encode("utf-16-be"), "is UTF-16 or UTF-32, not UTF-8 text"),
        ("a cafe".encode("utf-16"), "is UTF-16 or UTF-32, not UTF-8 text"),
        ("a cafe".encode("utf-32"), "is UTF-16 or UTF-32, not UTF-8 text"),
        ("日本".encode("utf-16"), "is UTF-16 or UTF-32, not UTF-8 text"),
        (b"a square moves\0", "has NUL bytes: it is not UTF-8 text"),
        ("\u200b".encode(), "has nothing but characters that nobody sees"),
        ("\ufeff\ufeff \u200d\u2060\n".encode(), "has nothing but characters that nobody sees"),
        ("\xad\x07".encode(), "has nothing but characters that nobody sees"),
    ],
)
def test_what_is_no_caption_is_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    file = add_video(tmp_path, "a.mp4").with_suffix(".txt")
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt {problem}$"):
        read_captions([file.with_suffix(".mp4")])


@pytest.mark.parametrize("text", ["\ufeffa square", "日本", "👩\u200d🚀", "a\u200b square", "7", "…"])
def test_what_is_a_caption_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    video = add_video(tmp_path, "a.mp4")
    video.with_suffix(".txt").write_text(text, encoding="utf-8")
    assert read_captions([video]) == {video: text.removeprefix("\ufeff")}


def test_a_caption_is_found_whatever_the_case_of_its_ending(tmp_path: Path) -> None:
    videos = [add_video(tmp_path, name) for name in ("A.MP4", "b [1].mp4")]
    for video, ending in zip(videos, (".TXT", ".Txt"), strict=True):
        video.with_suffix(".txt").rename(video.with_suffix(ending))
    (videos[1].parent / "b 1.TXT").write_text("of another")
    assert read_captions(videos) == {videos[0]: "A moves", videos[1]: "b [1] moves"}


def test_many_missing_captions_are_counted(tmp_path: Path, family: TrainingFamily) -> None:
    (tmp_path / "data").mkdir()
    for n in range(60):
        (tmp_path / "data" / f"{n:02}.mp4").touch()
    with pytest.raises(DataError, match=r"60 of 60 videos: .*00\.txt is missing;.*49\.txt is missing; and 10 more$"):
        find_clips(settings(tmp_path), family)


def test_sizes_that_the_model_cannot_make_are_one_error(tmp_path: Path, family: TrainingFamily) -> None:
    with pytest.raises(ConfigError) as error:
        find_clips(settings(tmp_path, resolutions=((33, 48), (32, 50), (32, 48)), frame_counts=(5, 8)), family)
    problems = error.value.problems
    assert ["33x48" in problems[0], "32x50" in problems[1], "frame count 8" in problems[2], len(problems)] == [
        True
    ] * 3 + [3]


def test_a_video_that_is_too_short_or_damaged_is_named_and_skipped(
    tmp_path: Path, family: TrainingFamily, caplog: pytest.LogCaptureFixture
) -> None:
    add_video(tmp_path, "good.mp4")
    short = add_video(tmp_path, "short.mp4", frames=4)
    garbage = add_video(tmp_path, "bad.mp4")
    garbage.write_bytes(b"\x17" * 1000)
    with caplog.at_level(logging.WARNING, "crepa_trainer"):
        found = find_clips(settings(tmp_path), family)
    assert {key.video for key in found.keys} == {"good.mp4"}
    assert found.skipped[str(short)] == "4 frames, the shortest clip needs 5"
    assert "cannot be decoded" in found.skipped[str(garbage)]
    told = [record.getMessage() for record in caplog.records]
    assert told == []  # the plan says it, and so says it once
    with pytest.raises(VideoError, match=r"bad\.mp4: .*\(strict\)"):
        find_clips(settings(tmp_path, strict=True), family)


def test_nothing_left_names_every_video(tmp_path: Path, family: TrainingFamily) -> None:
    for n in range(2):
        add_video(tmp_path, f"{n}.mp4", frames=3)
    with pytest.raises(DataError, match=r"no usable clip in 2 videos: .*0\.mp4: 3 frames.*1\.mp4: 3 frames"):
        find_clips(settings(tmp_path), family)


def test_what_a_run_wrote_is_not_trained_on(tmp_path: Path, family: TrainingFamily) -> None:
    add_video(tmp_path, "good.mp4")
    add_video(tmp_path, "out/validation/step-1.mp4").with_suffix(".txt").unlink()
    with pytest.raises(DataError, match=r"step-1\.txt is missing"):
        find_clips(settings(tmp_path), family)
    inside = settings(tmp_path).model_copy(update={"output": tmp_path / "data" / "out"})
    assert {key.video for key in find_clips(inside, family).keys} == {"good.mp4"}
