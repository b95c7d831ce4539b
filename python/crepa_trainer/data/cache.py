"""Clips and captions encoded once: latents, the teacher's side and text on disk, and the encoders gone afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from crepa_kernels.teachers import TeacherFeatures
from crepa_kernels.teachers.cache import (
    DamagedFile,
    check_whole,
    file_name,
    packed,
    read_tensors,
    unpacked,
    write_tensors,
)
from crepa_kernels.teachers.clips import ClipLengths, encode_clips
from crepa_kernels.teachers.encoding import FrameEncoder

from ..ranks import wait_for_all
from ..terminal import several
from .clips import read_clips
from .dataset import Bucket, ClipKey, FoundClips, caption_file, find_clips, fit_again, listed, skip_video, tell_skipped
from .files import remember_frames, remove_abandoned
from .names import CacheNames, ClipFiles, encoder_type, teacher_frames
from .video import DataError, EndsEarly, VideoError

if TYPE_CHECKING:
    from crepa_kernels import CrepaConfig

    from ..families import Text, TrainingFamily
    from ..settings import RunSettings
    from .shares import Share

__all__ = ["Bucket", "CachedClips", "ClipKey", "fill_share", "prepare_cache"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROMPTS_AT_A_TIME = 16
NEGATIVE_PROMPT = ""


class CachedClips(Dataset[dict[str, Tensor]]):
    """The clips of a run, each read from disk when it is asked for.

    An item has `latents` (C, T, h, w) as the transformer sees them, what else `TrainingFamily.encode_clip` gives, the
    tensors of its caption's embedding (`text` (L, d) and others of the family's; in fp32, masks as they are), `index`
    () int64, and where an encoder teaches `pixels` (S, 3, H, W) uint8, the S frames that the frame map needs, or
    `features` (T, N, E) with `feature_grid` (2,) int64.

    Attributes:
        keys: what each item is a clip of.
        without_teacher: leave the teacher's side out of items, once nothing needs it.
        negative_text: embedding of the empty prompt; None without validation prompts.
        validation_text: embeddings of the validation prompts, each for the clip of `clip_of_prompt` where the text
            encoder reads first frames.
    """

    def __init__(
        self,
        keys: Sequence[ClipKey],
        files: Sequence[ClipFiles],
        negative_text: Text | None = None,
        validation_text: Sequence[Text] = (),
    ) -> None:
        self.keys, self.files = tuple(keys), tuple(files)
        self.without_teacher = False
        self.negative_text, self.validation_text = negative_text, tuple(validation_text)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Raises ValueError naming a file that was damaged since; it is removed, and the next start makes it again."""
        item = {"index": torch.tensor(index)}
        files = self.files[index]
        for path in [files.latents] if self.without_teacher else files.of_pixels:
            item |= unpacked(_read_or_remove(path))
        return item | _in_fp32(_read_or_remove(files.text))


def _in_fp32(text: Text) -> dict[str, Tensor]:
    # An encoder in bf16 made it, but a transformer in fp32 may take it; under autocast it makes no difference.
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in text.items()}


def _read_or_remove(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except DamagedFile as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"{error}; it was removed: start again, with --resume latest") from error


def prepare_cache(
    settings: RunSettings,
    config: CrepaConfig,
    family: TrainingFamily,
    device: torch.device,
    console: Console,
    found: FoundClips | None = None,
) -> CachedClips:
    """Encodes what is not yet in `settings.cache_folder` and lets go of the encoders; called by every process.

    Each process takes its share of the videos, then the first one the captions, or each its share of them where every
    clip has a text of its own. An encoder is loaded when something is missing that it makes, in fp32 on a CPU; on other
    devices the text encoder and the teacher in bf16. A damaged or half-written file is named and made again. A video
    that cannot be decoded is named, skipped and counted.

    found: the result of `find_clips`, where it is at hand and what it skipped has been said.

    Raises:
        ValueError: as `find_clips`; with `settings.strict` also a video that cannot be decoded, or of which the VAE or
            the teacher makes NaN; a text of which the text encoder does; a cache folder that the processes do not
            share.
        OSError: the folder cannot be written.
    """
    if found is None:
        found = find_clips(settings, family)
        tell_skipped(found.skipped, found.videos + len(found.skipped))
    names = CacheNames(settings, config, family, device, found)
    filler = _Filler(PartialState(), console, names)
    clips, skipped = filler.encode_clips()
    _check_shared(clips, settings.cache_folder)
    if not clips:
        raise DataError(
            f"no usable clip in {several(found.videos, 'video')}: {listed(map(': '.join, skipped.items()))}"
        )
    prompts = _validation_texts(settings.validation_prompts, clips, names)
    filler.encode_texts([*_captions(clips, names), *prompts])
    embeddings = [_in_fp32(_read_or_remove(text.file)) for text in prompts]
    return CachedClips(list(clips), list(clips.values()), embeddings[0] if prompts else None, embeddings[1:])


def fill_share(
    settings: RunSettings,
    config: CrepaConfig,
    family: TrainingFamily,
    device: torch.device,
    console: Console,
    found: FoundClips,
    share: Share,
) -> None:
    """Encodes what one share has of what `prepare_cache` would; other shares may be at work in the same folder.

    Where texts are read with a clip's first frame, those of validation prompts are left to the run, which alone knows
    the clips that all shares made.

    found: the result of `find_clips` for this share. Raises ValueError and OSError as `prepare_cache`.
    """
    names = CacheNames(settings, config, family, device, found)
    filler = _Filler(PartialState(), console, names)
    clips, _ = filler.encode_clips()
    _check_shared(clips, settings.cache_folder)
    others = [NEGATIVE_PROMPT, *settings.validation_prompts] if settings.validation_prompts else []
    if family.text_image_parts:
        texts = [*_captions(clips, names), *(_prompt(each, names) for each in others[:1] if share.has(each))]
    else:
        prompts = share.prompts(found.captions, others, {key.caption for key in clips})
        texts = [_prompt(each, names, video) for each, video in prompts.items()]
    filler.encode_texts(texts)


@dataclass(frozen=True)
class _Text:
    """A prompt, what to call it in a message, the file of its embedding, and the latents' file of the clip that it is
    for; None: of no clip.
    """

    prompt: str
    source: str
    file: Path
    clip: Path | None


def _source(key: ClipKey, folder: Path, family: TrainingFamily) -> str:
    read_too = f" with the first frame of {key.name}" if family.text_image_parts else ""
    return f"{caption_file(folder / key.video)}{read_too}"


def clip_of_prompt(number: int, clips: int) -> int:
    """Which of a run's clips, `clips` many, gives the first frame of a validation prompt in image to video."""
    return number % clips


def _captions(clips: Mapping[ClipKey, ClipFiles], names: CacheNames) -> list[_Text]:
    """Those of clips whose latents are there."""
    folder, family = names.found.folder, names.family
    return [_Text(key.caption, _source(key, folder, family), each.text, each.latents) for key, each in clips.items()]


def _prompt(prompt: str, names: CacheNames, video: str | None = None) -> _Text:
    """A text of its prompt alone, which may be the caption of a video."""
    source = f"validation prompt {prompt!r}" if prompt != NEGATIVE_PROMPT else "the empty prompt"
    source = source if video is None else str(caption_file(names.found.folder / video))
    return _Text(prompt, source, names.text(prompt), None)


def _validation_texts(prompts: Sequence[str], clips: dict[ClipKey, ClipFiles], names: CacheNames) -> list[_Text]:
    """The negative prompt and the validation prompts, or nothing where there are none."""
    if not prompts:
        return []
    keys = list(clips)
    texts = [_prompt(NEGATIVE_PROMPT, names)]
    for number, prompt in enumerate(prompts):
        key = keys[clip_of_prompt(number, len(keys))]
        texts.append(_Text(prompt, f"validation prompt {prompt!r}", names.text(prompt, key), clips[key].latents))
    return texts


def _missing(paths: Iterable[Path]) -> set[Path]:
    return {path for path in sorted(set(paths)) if _is_missing(path)}


def _is_missing(path: Path) -> bool:
    """Whether a file is not there, or not whole, which is logged."""
    try:
        check_whole(path)
    except FileNotFoundError:
        return True
    except DamagedFile as error:
        logger.warning("%s: made again", error)
        path.unlink(missing_ok=True)
        return True
    return False


@dataclass
class _Encoders:
    """The VAE and the teacher, loaded when first asked for."""

    names: CacheNames
    loaded: dict[str, Any] = field(default_factory=dict)

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self.loaded:
            self.loaded[name] = load()
        return self.loaded[name]

    def latents(self, pixels: Tensor) -> dict[str, Tensor]:
        family, device, tiling = self.names.family, self.names.device, self.names.settings.vae_tiling
        vae = self._once("vae", lambda: family.load_vae(torch.float32, tiling).to(device))
        images = self._once("image encoder", family.load_image_encoder)
        return family.encode_clip(vae, pixels, None if images is None else images.to(device))

    def teacher_side(self, pixels: Tensor, bucket: Bucket) -> dict[str, Tensor]:
        config, family, settings = self.names.config, self.names.family, self.names.settings
        if settings.cache_teacher == "frames":
            return {"pixels": pixels[teacher_frames(config, family, bucket)]}
        place, offload = settings.teacher_device, settings.teacher_offload
        teacher = self._once("teacher", lambda: FrameEncoder.from_config(config, device=place, offload=offload))
        lengths = ClipLengths.of(None, 1, len(pixels), family.layout(bucket))
        features, grid = encode_clips(teacher, pixels[None], lengths, config.crepa_frame_map, self.names.device)
        return packed(TeacherFeatures(features[0], grid), settings.cache_teacher_precision)


@dataclass
class _Filler:
    """Encodes this process's share of what is missing, in step with the others."""

    state: PartialState
    console: Console
    names: CacheNames

    def __post_init__(self) -> None:
        self.family, self.device = self.names.family, self.names.device

    def encode_clips(self) -> tuple[dict[ClipKey, ClipFiles], dict[str, str]]:
        """Makes what is missing of the clips that were found. Returns those that are there, and the videos that were
        skipped with the reason, each of which is logged.
        """
        settings, found = self.names.settings, self.names.found
        if self.state.is_main_process:
            remove_abandoned(settings.cache_folder)
        files = {key: self.names.files(key) for key in found.keys}
        skipped, lengths = self.encode_videos(files)
        if lengths:
            # Videos that have fewer frames than their containers say: the clips that fit into them.
            shorter = fit_again(found, lengths, settings)
            skipped |= {path: shorter.skipped[path] for path in shorter.skipped.keys() - found.skipped.keys()}
            files = {key: self.names.files(key) for key in shorter.keys}
            skipped |= self.encode_videos(files)[0]
        tell_skipped(skipped, found.videos)
        return {key: each for key, each in files.items() if all(path.is_file() for path in each.of_pixels)}, skipped

    def encode_texts(self, texts: Sequence[_Text]) -> None:
        """Makes those that are missing, of clips whose latents are there.

        Text encoders are large, and captions few: the first process alone loads one, unless each clip has a text.
        """
        wanted = {text.file: text for text in texts}
        missing = _missing(wanted)
        # As for the videos.
        wait_for_all()
        texts = [text for path, text in wanted.items() if path in missing]
        rank, shares = self.state.process_index, self.state.num_processes if self.family.text_image_parts else 1
        parts: Any = None
        for chunk in self._in_step("captions", _chunks(texts, PROMPTS_AT_A_TIME * shares)):
            share = chunk[rank::shares] if rank < shares else []
            if not share:
                continue
            if parts is None:
                parts = self.family.load_text(encoder_type(self.device)).to(self.device)
            for text in share:
                embedding = self._embedding(parts, text)
                if not _finite(embedding):
                    raise DataError(f"{text.source}: the text encoder makes NaN or infinity of it")
                write_tensors(text.file, embedding)
        if parts is not None:
            del parts
            release_memory()
        self._tell_encoded(len(texts), "caption")

    def _embedding(self, parts: Any, text: _Text) -> Text:
        # Alone: beside others in a batch its last bits would be of the company, and no file the same again.
        if text.clip is None or not self.family.text_image_parts:
            return self.family.encode_text(parts, [text.prompt])[0]
        return self.family.encode_text_of_clip(parts, text.prompt, _read_or_remove(text.clip)["first_frame"])

    def encode_videos(self, files: Mapping[ClipKey, ClipFiles]) -> tuple[dict[str, str], dict[str, int]]:
        """Makes what is missing. Returns videos that could not be decoded, with the reason, and those that ended early,
        with the number of their frames, both of all processes; their intact clips are there.
        """
        missing = _missing(path for each in files.values() for path in each.of_pixels)
        # Nobody may write before everybody has looked, or their shares would not be of one whole.
        wait_for_all()
        clips = {key: each for key, each in files.items() if missing.intersection(each.of_pixels)}
        videos: dict[str, list[ClipKey]] = {}
        for key in clips:
            videos.setdefault(key.video, []).append(key)
        world = self.state.num_processes
        settings, found = self.names.settings, self.names.found
        encoders = _Encoders(self.names)
        skipped: dict[str, str] = {}
        lengths: dict[str, int] = {}
        for share in self._in_step("videos", _chunks(list(videos), world)):
            if self.state.process_index >= len(share):
                continue
            video = share[self.state.process_index]
            try:
                self._encode_video(encoders, {key: clips[key] for key in videos[video]}, missing)
            except EndsEarly as error:
                lengths[video] = error.frames
                remember_frames(settings.cache_folder, found.contents[video], settings.fps, error.frames)
            except VideoError as error:
                skip_video(skipped, found.folder / video, error, strict=settings.strict)
        if encoders.loaded:
            encoders.loaded.clear()
            release_memory()
        everywhere = gather_object([(skipped, lengths)])
        skipped = {video: reason for each, _ in everywhere for video, reason in each.items()}
        lengths = {video: frames for _, each in everywhere for video, frames in each.items()}
        self._tell_encoded(len(videos) - len(skipped) - len(lengths), "video")
        return skipped, lengths

    def _encode_video(self, encoders: _Encoders, clips: dict[ClipKey, ClipFiles], missing: set[Path]) -> None:
        first = next(iter(clips))
        keys, bucket = {key.start: key for key in clips}, first.bucket
        path = self.names.found.folder / first.video
        starts, fps = list(keys), self.names.settings.fps
        for start, pixels in read_clips(path, bucket.height, bucket.width, starts, bucket.frames, fps):
            files = clips[keys[start]]
            if files.latents in missing:
                tensors = encoders.latents(pixels)
                if not _finite(tensors):
                    raise VideoError(f"the {self._maker(tensors)} makes NaN or infinity of the clip at frame {start}")
                write_tensors(files.latents, tensors)
            if files.teacher is not None and files.teacher in missing:
                tensors = encoders.teacher_side(pixels, bucket)
                if not _finite(tensors):
                    raise VideoError(f"the teacher makes NaN or infinity of the clip at frame {start}")
                write_tensors(files.teacher, tensors)

    def _maker(self, tensors: Mapping[str, Tensor]) -> str:
        """What made those of a clip's encoding that are not finite."""
        wrong = {name for name, tensor in tensors.items() if not _finite({name: tensor})}
        return "image encoder" if wrong <= self.family.of_image_encoder else "VAE"

    def _in_step(self, what: str, rounds: list[list[T]]) -> Iterator[list[T]]:
        """Each round, waited for by all: a barrier at the end alone would run into the time limit of one."""
        if not rounds:
            return
        if self.state.is_main_process:
            self.names.folder.mkdir(parents=True, exist_ok=True)
        total = sum(map(len, rounds))
        hidden = not (self.console.is_terminal and self.state.is_main_process)
        with Progress(console=self.console, disable=hidden) as progress:
            task = progress.add_task(f"encoding {what}", total=total)
            for each in rounds:
                yield each
                wait_for_all()
                progress.advance(task, len(each))

    def _tell_encoded(self, number: int, what: str) -> None:
        """Logs how many there are now that were missing."""
        if number:
            logger.info("encoded %s into %s", several(number, what), self.names.folder)


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _check_shared(clips: dict[ClipKey, ClipFiles], folder: Path) -> None:
    names = [[key.name, *map(str, each.of_pixels), str(each.text)] for key, each in clips.items()]
    if len(set(gather_object([file_name({"clips": names})]))) > 1:
        raise ValueError(f"the processes see different files in {folder}: cache must be a folder that they share")
