"""A folder of videos with captions beside them, to the clips that a run trains on: which, how long, in what size."""

from __future__ import annotations

import codecs
import glob
import logging
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from crepa_kernels.config import ConfigError
from crepa_kernels.config.rules import describe

from ..terminal import several
from .files import content_identity, remembered_frames
from .listing import list_videos
from .video import DataError, VideoError, VideoInfo, probe_video

if TYPE_CHECKING:
    from ..families import TrainingFamily
    from ..settings import RunSettings
    from .shares import Share

logger = logging.getLogger(__name__)

T = TypeVar("T")

NAMED = 50  # files in one message


@dataclass(frozen=True, order=True)
class Bucket:
    """Clips of one size in pixels and pixel frames; a batch is of one bucket."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{several(self.frames, 'frame')} of {self.height}x{self.width}"


@dataclass(frozen=True)
class ClipKey:
    """One training clip: `bucket.frames` frames of `video` (relative to the data folder) from frame `start` on."""

    video: str
    start: int
    bucket: Bucket
    caption: str

    @property
    def name(self) -> str:
        return f"{self.video} [{self.start}:{self.start + self.bucket.frames}]"


@dataclass(frozen=True)
class FoundClips:
    """The clips of a run, in the order of their videos' names, and the videos that gave none with the reason.

    `contents`: by what the content of each video that clips are cut from is known; `infos`: what it is like;
    `passed_over`: how many files and folders of each kind are no videos to train on; `captions`: of every video of the
    folder, also where the clips are those of a share of them.
    """

    folder: Path
    keys: tuple[ClipKey, ...]
    skipped: Mapping[str, str]
    contents: Mapping[str, str]
    infos: Mapping[str, VideoInfo] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)

    @property
    def videos(self) -> int:
        """Videos that clips are cut from."""
        return len({key.video for key in self.keys})

    def buckets(self) -> dict[Bucket, int]:
        """How many clips each bucket that is used has, in the order of their sizes."""
        used = [key.bucket for key in self.keys]
        return {bucket: used.count(bucket) for bucket in sorted(set(used))}


def find_clips(settings: RunSettings, family: TrainingFamily, share: Share | None = None) -> FoundClips:
    """Clips of the videos below `settings.data`; of each video its first frame is decoded and no other.

    A video takes the resolution of the nearest aspect ratio, of those the largest that it fills, and the largest
    frame count that it has. One that cannot be used is skipped, or with `settings.strict` a VideoError.

    share: of which alone videos are opened, and which may have none; None for all.

    Raises:
        ConfigError: (a ValueError) sizes or frame counts that the model cannot make, all in one; validation prompts
            that it cannot read.
        DataError: (a ValueError) no video, captions missing, empty or such that the model cannot read them (all in
            one), or nothing left to train on.
    """
    _check_buckets(settings, family)
    _check_validation_prompts(settings, family)
    listing = list_videos(settings.data, (settings.output, settings.cache_folder))
    captions = read_captions(listing.videos)
    _check_captions(captions, family)
    names = {path: path.relative_to(settings.data).as_posix() for path in listing.videos}
    videos = [path for path in listing.videos if share is None or share.has(names[path])]
    keys: list[ClipKey] = []
    skipped: dict[str, str] = {}
    contents: dict[str, str] = {}
    infos: dict[str, VideoInfo] = {}
    for path in videos:
        try:
            info = probe_video(path, settings.fps)
            if info.hdr and settings.hdr == "skip":
                # Asked for: with `strict` no error either.
                skipped[str(path)] = f'HDR ({info.hdr}), and hdr is "skip"'
                continue
            content, name = content_identity(path), names[path]
            shown = remembered_frames(settings.cache_folder, content, settings.fps)
            # One that fits nowhere is left out when it is encoded, as in the run's first start.
            if shown is not None and shown >= min(settings.frame_counts):
                info = replace(info, frames=shown)
            keys += _clips_of(name, info, captions[path], settings)
        except VideoError as error:
            skip_video(skipped, path, error, strict=settings.strict)
            continue
        contents[name], infos[name] = content, info
    if not keys and share is None:
        reasons = listed(f"{path}: {reason}" for path, reason in skipped.items())
        raise DataError(f"no usable clip in {several(len(videos), 'video')}: {reasons or settings.data}")
    texts = {names[path]: caption for path, caption in captions.items()}
    return FoundClips(settings.data, tuple(keys), skipped, contents, infos, listing.passed_over, texts)


def _clips_of(name: str, info: VideoInfo, caption: str, settings: RunSettings) -> list[ClipKey]:
    """The clips of one video. VideoError for one that is too short."""
    bucket = choose_bucket(info, settings.resolutions, settings.frame_counts)
    starts = clip_starts(info.frames, bucket.frames, settings.clips_per_video)
    return [ClipKey(name, start, bucket, caption) for start in starts]


def fit_again(found: FoundClips, lengths: Mapping[str, int], settings: RunSettings) -> FoundClips:
    """`found` with other clips of the videos that turned out to show fewer frames, `lengths`, than was found.

    One that is too short for any is skipped; a VideoError with `settings.strict`.
    """
    clips: dict[str, list[ClipKey]] = {}
    for key in found.keys:
        clips.setdefault(key.video, []).append(key)
    infos, skipped = dict(found.infos), dict(found.skipped)
    for name, frames in lengths.items():
        said, infos[name] = infos[name].frames, replace(infos[name], frames=frames)
        path, caption = found.folder / name, clips[name][0].caption
        try:
            clips[name] = _clips_of(name, infos[name], caption, settings)
        except VideoError as error:
            del clips[name]
            skip_video(skipped, path, error, strict=settings.strict)
        else:
            bucket = clips[name][0].bucket
            shown = several(frames, "frame")
            logger.warning("%s shows %s, its container says %d: its clips are %s", path, shown, said, bucket)
    keys = tuple(key for each in clips.values() for key in each)
    return replace(found, keys=keys, infos=infos, skipped=skipped)


def skip_video(skipped: dict[str, str], path: Path, error: VideoError, *, strict: bool) -> None:
    """Notes the reason why a video cannot be used; a VideoError with `strict`."""
    if strict:
        raise VideoError(f"{path}: {error} (strict)") from error
    skipped[str(path)] = str(error)


def tell_skipped(skipped: Mapping[str, str], videos: int) -> None:
    """Logs each skipped video with its reason, and how many of `videos` they are."""
    for path, reason in skipped.items():
        logger.warning("skipped %s: %s", path, reason)
    if skipped:
        logger.warning("%d of %s skipped", len(skipped), several(videos, "video"))


def _check_buckets(settings: RunSettings, family: TrainingFamily) -> None:
    sizes = [Bucket(*size, frames) for size in settings.resolutions for frames in settings.frame_counts]
    problems = [_problem(family.check_bucket, bucket) for bucket in sizes]
    if any(problems):
        raise ConfigError(dict.fromkeys(problem for problem in problems if problem))


def _check_validation_prompts(settings: RunSettings, family: TrainingFamily) -> None:
    problems = {prompt: _problem(family.check_prompt, prompt) for prompt in settings.validation_prompts}
    if any(problems.values()):
        raise ConfigError(describe("validation_prompts", prompt, rule) for prompt, rule in problems.items() if rule)


def _check_captions(captions: Mapping[Path, str], family: TrainingFamily) -> None:
    problems = {caption_file(path): _problem(family.check_prompt, text) for path, text in captions.items()}
    found = [f"{file}: {problem}" for file, problem in problems.items() if problem]
    if found:
        raise DataError(f"{len(found)} of {several(len(captions), 'caption')} cannot be used: {listed(found)}")


def _problem(check: Callable[[T], None], value: T) -> str | None:
    try:
        check(value)
    except ValueError as error:
        return str(error)
    return None


def caption_file(video: Path) -> Path:
    """The `name.txt` beside `name.mp4`, also in capitals; where there is none, what it should be called."""
    usual = video.with_suffix(".txt")
    if usual.exists():
        return usual
    others = (path for path in video.parent.glob(f"{glob.escape(video.stem)}.*") if path.suffix.lower() == ".txt")
    return min((path for path in others if path.stem == video.stem), default=usual)


def read_captions(videos: Sequence[Path]) -> dict[Path, str]:
    """The text of `name.txt` beside each `name.mp4`, without space around it.

    Raises DataError naming every caption that is missing, empty, not UTF-8 text, or of characters that nobody sees.
    """
    captions: dict[Path, str] = {}
    problems = []
    for path in videos:
        file = caption_file(path)
        try:
            captions[path] = _caption(file)
        except FileNotFoundError:
            problems.append(f"{file} is missing")
        except (OSError, ValueError) as error:
            problems.append(f"{file} {error.strerror if isinstance(error, OSError) else error}")
    if problems:
        raise DataError(f"no caption beside {len(problems)} of {several(len(videos), 'video')}: {listed(problems)}")
    return captions


def _caption(file: Path) -> str:
    """ValueError saying what a file is that holds no caption."""
    content = file.read_bytes()
    # Without a mark at its beginning, UTF-16 of Latin letters is UTF-8 too, with a NUL at every other place.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or content.count(b"\0") * 3 > len(
            content
        )
        raise ValueError("is UTF-16 or UTF-32, not UTF-8 text" if utf16 else "has NUL bytes: it is not UTF-8 text")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text") from error
    if not text:
        raise ValueError("is empty")
    if all(unicodedata.category(letter)[0] in "CZ" for letter in text):
        raise ValueError("has nothing but characters that nobody sees")
    return text


def choose_bucket(info: VideoInfo, resolutions: Sequence[tuple[int, int]], frame_counts: Sequence[int]) -> Bucket:
    """The nearest aspect ratio, of those the largest size that the video fills; the largest frame count that it has.

    Raises VideoError for a video shorter than every frame count.
    """
    counts = [count for count in frame_counts if count <= info.frames]
    if not counts:
        raise VideoError(f"{several(info.frames, 'frame')}, the shortest clip needs {min(frame_counts)}")

    def preference(size: tuple[int, int]) -> tuple[float, bool, int]:
        height, width = size
        distance = abs(math.log(height * info.width / (width * info.height)))
        # A crop is taken from what is at least as large both ways; what is not would be blown up.
        too_large = height > info.height or width > info.width
        return round(distance, 9), too_large, height * width if too_large else -height * width

    height, width = min(resolutions, key=preference)
    return Bucket(height, width, max(counts))


def enlargement(info: VideoInfo, bucket: Bucket) -> float:
    """How many times as large as it is shown a video's picture becomes in a bucket."""
    return max(bucket.height / info.height, bucket.width / info.width)


def cropped_share(info: VideoInfo, bucket: Bucket) -> float:
    """Which share of a video's picture is outside its clips."""
    return 1 - bucket.height * bucket.width / (info.height * info.width * enlargement(info, bucket) ** 2)


def clip_starts(frames: int, clip: int, count: int) -> list[int]:
    """First frames of up to `count` clips of `clip` frames, evenly spread from the first frame to the last.

    One clip is the video's beginning; where they would coincide there are fewer.
    """
    spare = frames - clip
    return sorted({n * spare // max(count - 1, 1) for n in range(count)})


def listed(items: Iterable[str], named: int = NAMED) -> str:
    """The first of `items` and how many more there are, for a message."""
    every = list(items)
    more = [f"and {len(every) - named} more"] if len(every) > named else []
    return "; ".join([*every[:named], *more])
